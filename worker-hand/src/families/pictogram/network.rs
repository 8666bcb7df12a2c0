//! The denoiser: a diffusion transformer on 2 x 2 patches of a 12 x 12 x 16 latent, with control tokens in its context.
//!
//! Source of the mathematics: `training/network.py`, class `Hand`, whose names the weights have.

use candle_core::{D, DType, Device, Result, Tensor};
use efferent_worker::{
    nn::{
        attention::{Logits, attend},
        conv::Conv3x3,
        linear::Linear,
        ops,
    },
    weights::Weights,
};

use super::{CHANNELS, Config, GRID, PATCH_WIDTH, PATCHES};

const EPS: f64 = 1e-6;
/// Sines and cosines of the time embedding, each.
const FREQUENCIES: usize = 64;
/// Channels of the convolutional tail.
const TAIL: usize = 32;
const TAIL_INNER: usize = 48;

/// The denoiser.
#[derive(Debug)]
pub(super) struct Network {
    heads: usize,
    width: usize,
    queries: usize,
    input: Linear,
    positions: Tensor,
    control: Linear,
    control_positions: Tensor,
    null: Tensor,
    time: [Linear; 2],
    pooled: Linear,
    modulation: Linear,
    /// (layers, 6 width)
    tables: Tensor,
    layers: Vec<Layer>,
    final_modulation: Linear,
    output: Linear,
    tail_input: Linear,
    tail: [Conv3x3; 2],
}

#[derive(Debug)]
struct Layer {
    projections: [Linear; 3],
    head_norms: [Tensor; 2],
    output: Linear,
    up: Linear,
    down: Linear,
}

impl Network {
    /// Takes the tensors below `hand.`.
    pub(super) fn new(config: &Config, weights: &mut Weights) -> Result<Self> {
        let Config { width, queries, heads, layers, .. } = *config;
        let affine = |weights: &mut Weights, name: &str, inputs: usize, outputs: usize| {
            Linear::with_bias(weights, &format!("hand.{name}"), inputs, outputs)
        };
        let blocks = (0..layers)
            .map(|i| {
                let name = |part: &str| format!("hand.b.{i}.{part}");
                Layer {
                    projections: ["0.q", "0.k", "0.v"].map(|part| Linear::new(weights, &name(part), width, width)),
                    head_norms: ["0.qn.w", "0.kn.w"].map(|part| weights.get(&name(part), &[width / heads])),
                    output: Linear::new(weights, &name("0.o"), width, width),
                    up: Linear::new(weights, &name("1.a"), width, 4 * width),
                    down: Linear::new(weights, &name("1.b"), 4 * width, width),
                }
            })
            .collect();
        Ok(Self {
            heads,
            width,
            queries,
            input: affine(weights, "e2", PATCH_WIDTH, width),
            positions: weights.get("hand.pos", &[PATCHES, width]),
            control: affine(weights, "cin", width, width),
            control_positions: weights.get("hand.cpos", &[queries, width]),
            null: weights.get("hand.null", &[queries, width]),
            time: [affine(weights, "t1", 2 * FREQUENCIES, width), affine(weights, "t2", width, width)],
            pooled: affine(weights, "pc", width, width),
            modulation: affine(weights, "ada", width, 6 * width),
            tables: weights.get("hand.tab", &[layers, 6 * width]),
            layers: blocks,
            final_modulation: affine(weights, "fada", width, 2 * width),
            output: affine(weights, "out", width, PATCH_WIDTH),
            tail_input: affine(weights, "o2", width, 4 * TAIL),
            tail: [
                Conv3x3::load(weights, "hand.c1", TAIL + CHANNELS, TAIL_INNER)?,
                Conv3x3::load(weights, "hand.c2", TAIL_INNER, CHANNELS)?,
            ],
        })
    }

    /// What stands for "no condition": (queries, width)
    pub(super) fn null(&self) -> &Tensor {
        &self.null
    }

    /// Noisy latents z (batch, 36, 64), times (batch) in [0, 1] with 1 = clean, control (batch, queries, width) -> predicted clean
    /// latents (batch, 36, 64)
    pub(super) fn forward(&self, z: &Tensor, times: &Tensor, control: &Tensor) -> Result<Tensor> {
        let (batch, width, tokens) = (z.dim(0)?, self.width, self.queries + PATCHES);
        let angles = times.unsqueeze(1)?.broadcast_mul(&frequencies(z.device())?)?; // (batch, 64)
        let e = Tensor::cat(&[angles.sin()?, angles.cos()?], D::Minus1)?;
        let e = self.time[1].forward(&ops::silu(&self.time[0].forward(&e)?)?)?;
        let e = ops::silu(&(e + self.pooled.forward(&control.mean(1)?)?)?)?; // (batch, width)
        let modulation = self.modulation.forward(&e)?; // (batch, 6 width)
        let control = self.control.forward(control)?.broadcast_add(&self.control_positions)?;
        let latent = self.input.forward(z)?.broadcast_add(&self.positions)?;
        let mut x = Tensor::cat(&[control, latent], 1)?; // (batch, tokens, width)
        let split = |y: Tensor| y.reshape((batch, tokens, self.heads, width / self.heads));
        for (index, layer) in self.layers.iter().enumerate() {
            let modulation = modulation.broadcast_add(&self.tables.get(index)?)?;
            let part = |i: usize| modulation.narrow(1, i * width, width);
            let gate = |i: usize| (part(i)? + 1.0)? * 0.5;
            let h = ops::modulated_norm(&x, &part(0)?, &part(1)?, EPS)?;
            let [q, k, v] = &layer.projections;
            let q = ops::rms_norm(&split(q.forward(&h)?)?, &layer.head_norms[0], EPS)?;
            let k = ops::rms_norm(&split(k.forward(&h)?)?, &layer.head_norms[1], EPS)?;
            let v = split(v.forward(&h)?)?;
            let attended = attend(&q, &k, &v, None, Logits::of_width(width / self.heads))?.flatten_from(2)?;
            x = ops::gated_sum(&x, &layer.output.forward(&attended)?, &gate(2)?)?;
            let h = ops::modulated_norm(&x, &part(3)?, &part(4)?, EPS)?;
            let h = layer.down.forward(&ops::gelu(&layer.up.forward(&h)?)?)?;
            x = ops::gated_sum(&x, &h, &gate(5)?)?;
        }
        let last = self.final_modulation.forward(&e)?; // (batch, 2 width)
        let y = x.narrow(1, self.queries, PATCHES)?;
        let y = ops::modulated_norm(&y, &last.narrow(1, 0, width)?, &last.narrow(1, width, width)?, EPS)?;
        let tail = Tensor::cat(&[unpatch(&self.tail_input.forward(&y)?)?, unpatch(z)?], 3)?; // (batch, 12, 12, 48)
        let tail = self.tail[1].forward(&ops::silu(&self.tail[0].forward(&tail)?)?)?; // (batch, 12, 12, 16)
        self.output.forward(&y)? + patch(&tail)?
    }
}

/// Angles of the time embedding at time 1.
fn frequencies(device: &Device) -> Result<Tensor> {
    let step = Tensor::arange(0f32, FREQUENCIES as f32, device)?;
    let step = ((step / FREQUENCIES as f64)? * -(1000f64.ln()))?.exp()?;
    (step.to_dtype(DType::F32)? * 20.0)?.unsqueeze(0)
}

/// (batch, 12, 12, channels) -> (batch, 36, 4 channels); a patch is (channels, 2, 2)
fn patch(x: &Tensor) -> Result<Tensor> {
    let (batch, _, _, channels) = x.dims4()?;
    let side = GRID / 2;
    let x = x.reshape(&[batch, side, 2, side, 2, channels])?.permute([0, 1, 3, 5, 2, 4].as_slice())?;
    x.reshape((batch, PATCHES, 4 * channels))
}

/// (batch, 36, 4 channels) -> (batch, 12, 12, channels)
pub(super) fn unpatch(x: &Tensor) -> Result<Tensor> {
    let (batch, _, width) = x.dims3()?;
    let side = GRID / 2;
    let x = x.reshape(&[batch, side, side, width / 4, 2, 2])?.permute([0, 1, 4, 2, 5, 3].as_slice())?;
    x.reshape((batch, GRID, GRID, width / 4))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patches_come_apart_and_together() {
        let x = Tensor::randn(0f32, 1.0, (2, GRID, GRID, 3), &Device::Cpu).unwrap();
        let again = unpatch(&patch(&x).unwrap()).unwrap();
        let same = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(same(&x), same(&again));
        // Patch 7 is in the second row of patches, its second: rows 2 and 3, columns 2 and 3.
        let seventh = patch(&x).unwrap().get(1).unwrap().get(7).unwrap().to_vec1::<f32>().unwrap();
        let at =
            |y, x_, c| x.get(1).unwrap().get(y).unwrap().get(x_).unwrap().get(c).unwrap().to_scalar::<f32>().unwrap();
        assert_eq!(seventh[4..8], [at(2, 2, 1), at(2, 3, 1), at(3, 2, 1), at(3, 3, 1)]);
    }
}
