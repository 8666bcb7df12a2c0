//! What sees before a language model: the vision transformers of Qwen2.5-VL and Qwen3-VL by configuration.
//!
//! A picture is cut into patches ([`patches`]); blocks of `merge` x `merge` patches become one token of the language model each.
//!
//! Source: transformers 5.23, `models/{qwen2_5_vl,qwen3_vl}/modeling_*.py`, `vision_utils.py`. Checked against them by `tests/vision.rs`.

pub mod patches;
pub mod published;

use candle_core::{Device, Result, Tensor};

use self::patches::Patches;
use super::{
    attention::{Logits, attend},
    linear::Linear,
    norm::LayerNorm,
    ops::{self, Activation},
    rotary,
};
use crate::weights::Weights;

/// Of every norm.
const EPS: f64 = 1e-6;

/// Everything in which the two differ.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Channels of a patch.
    pub width: usize,
    /// Layers.
    pub layers: usize,
    /// Attention heads.
    pub heads: usize,
    /// Channels inside the MLP.
    pub mlp_width: usize,
    /// Pixels of a patch's side.
    pub patch: usize,
    /// Frames of a film that a patch reads; a picture stands for each of them.
    pub frames: usize,
    /// Patches of a side of what becomes one token.
    pub merge: usize,
    /// Channels of a token: those of the language model.
    pub out_width: usize,
    /// Base of the rotary angles.
    pub rotary_base: f64,
    /// Which of the two.
    pub kind: Kind,
}

/// What one has and the other has not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// Qwen2.5-VL: most layers see a window, norms are RMS norms, the MLP is gated.
    Windowed {
        /// Tokens of a window's side.
        window: usize,
        /// Layers that see the whole picture.
        whole: Vec<usize>,
    },
    /// Qwen3-VL: learnt places, and tokens taken after some layers, which the language model adds after its first ones.
    Tapped {
        /// Side of the square of learnt places.
        places: usize,
        /// Layers after which tokens are taken.
        taps: Vec<usize>,
    },
}

/// The transformer.
#[derive(Debug)]
pub struct Vision {
    config: Config,
    embedding: Linear,
    /// (places^2, width)
    places: Option<Tensor>,
    layers: Vec<Layer>,
    merger: Merger,
    taps: Vec<Merger>,
}

/// What a picture comes to.
#[derive(Debug)]
pub struct Seen {
    /// (tokens, out width)
    pub tokens: Tensor,
    /// What the language model adds after its first layers, the same shape each.
    pub added: Vec<Tensor>,
}

#[derive(Debug)]
enum Norm {
    Rms(Tensor),
    Layer(LayerNorm),
}

#[derive(Debug)]
struct Layer {
    norms: [Norm; 2],
    qkv: Linear,
    output: Linear,
    gate: Option<Linear>,
    up: Linear,
    down: Linear,
}

#[derive(Debug)]
struct Merger {
    norm: Norm,
    /// The norm is over what was merged already.
    late: bool,
    up: Linear,
    down: Linear,
}

impl Norm {
    fn new(weights: &mut Weights, name: &str, width: usize, rms: bool) -> Self {
        match rms {
            true => Self::Rms(weights.get(&format!("{name}.weight"), &[width])),
            false => Self::Layer(LayerNorm::new(weights, name, width, EPS)),
        }
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Rms(weight) => ops::rms_norm(x, weight, EPS),
            Self::Layer(norm) => norm.forward(x),
        }
    }
}

impl Config {
    /// Pixels that both sides of what is seen are a multiple of.
    pub fn multiple(&self) -> usize {
        self.patch * self.merge
    }

    fn is_windowed(&self) -> bool {
        matches!(self.kind, Kind::Windowed { .. })
    }
}

impl Vision {
    /// Takes the transformer's tensors. What does not fit is told by [`Weights::finish`].
    ///
    /// # Errors
    /// If the configuration cannot be: a size of 0, heads that do not divide, layers that are not there.
    pub fn new(config: Config, weights: &mut Weights) -> Result<Self> {
        let Config { width, heads, mlp_width, patch, frames, merge, out_width, .. } = config;
        if [width, config.layers, heads, mlp_width, patch, frames, merge, out_width].contains(&0) {
            candle_core::bail!("a size of what sees is 0: {config:?}");
        }
        // Rows and columns turn half of the pairs each.
        if width % heads != 0 || !(width / heads).is_multiple_of(4) {
            candle_core::bail!("{heads} heads of {width} channels cannot be");
        }
        let named = match &config.kind {
            Kind::Windowed { window: 0, .. } | Kind::Tapped { places: 0, .. } => candle_core::bail!("{config:?}"),
            Kind::Windowed { whole: layers, .. } | Kind::Tapped { taps: layers, .. } => layers,
        };
        if let Some(layer) = named.iter().find(|layer| **layer >= config.layers) {
            candle_core::bail!("layer {layer} of {} cannot be", config.layers);
        }
        let windowed = config.is_windowed();
        let layer = |weights: &mut Weights, index: usize| {
            let name = |part: &str| format!("blocks.{index}.{part}");
            let norms = ["norm1", "norm2"].map(|norm| Norm::new(weights, &name(norm), width, windowed));
            let mut linear = |part: &str, inputs, outputs| Linear::with_bias(weights, &name(part), inputs, outputs);
            let (up, down) = match windowed {
                true => ("mlp.up_proj", "mlp.down_proj"),
                false => ("mlp.linear_fc1", "mlp.linear_fc2"),
            };
            Layer {
                norms,
                qkv: linear("attn.qkv", width, 3 * width),
                output: linear("attn.proj", width, width),
                gate: windowed.then(|| linear("mlp.gate_proj", width, mlp_width)),
                up: linear(up, width, mlp_width),
                down: linear(down, mlp_width, width),
            }
        };
        let merged = width * merge * merge;
        let merger = |weights: &mut Weights, name: &str, late: bool| {
            let [norm, up, down] =
                if windowed { ["ln_q", "mlp.0", "mlp.2"] } else { ["norm", "linear_fc1", "linear_fc2"] };
            let normed = if late { merged } else { width };
            Merger {
                norm: Norm::new(weights, &format!("{name}.{norm}"), normed, windowed),
                late,
                up: Linear::with_bias(weights, &format!("{name}.{up}"), merged, merged),
                down: Linear::with_bias(weights, &format!("{name}.{down}"), merged, out_width),
            }
        };
        let (places, count) = match &config.kind {
            Kind::Windowed { .. } => (None, 0),
            Kind::Tapped { places, taps } => {
                let Some(square) = places.checked_mul(*places) else { candle_core::bail!("{places} places a side") };
                (Some(weights.get("pos_embed.weight", &[square, width])), taps.len())
            }
        };
        Ok(Self {
            embedding: Linear::of_films(weights, "patch_embed.proj", [3, frames, patch], width, !windowed)?,
            places,
            layers: (0..config.layers).map(|index| layer(weights, index)).collect(),
            merger: merger(weights, "merger", false),
            taps: (0..count).map(|tap| merger(weights, &format!("deepstack_merger_list.{tap}"), true)).collect(),
            config,
        })
    }

    /// How it is configured.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// What a picture comes to, token by token, row by row.
    ///
    /// # Errors
    /// If the patches are of another size, or a pass fails.
    pub fn see(&self, patches: &Patches) -> Result<Seen> {
        let Config { merge, width, heads, .. } = self.config;
        let device = self.device();
        let mut x = self.embedding.forward(&patches.values.to_device(device)?)?;
        let mut cells = patches.cells(merge);
        if let (Some(table), Kind::Tapped { places, .. }) = (&self.places, &self.config.kind) {
            x = (x + learnt_places(table, *places, &cells, patches)?)?;
        }
        // Patches of a window stand together.
        let windows = match self.config.kind {
            Kind::Windowed { window, .. } => windows(patches.rows / merge, patches.columns / merge, window),
            Kind::Tapped { .. } => Vec::new(),
        };
        let unit = merge * merge;
        let order: Vec<usize> = windows.iter().flatten().copied().collect();
        if !order.is_empty() {
            let patch = |token: &usize| token * unit..(token + 1) * unit;
            let by_patch: Vec<usize> = order.iter().flat_map(patch).collect();
            x = chosen(&x, &by_patch)?;
            cells = by_patch.iter().map(|patch| cells[*patch]).collect();
        }
        let (cos, sin) = self.turns(&cells, device)?;
        let lengths: Vec<usize> = windows.iter().map(|window| window.len() * unit).collect();
        let mut added = Vec::new();
        for (index, layer) in self.layers.iter().enumerate() {
            let (lengths, tap) = match &self.config.kind {
                Kind::Windowed { whole, .. } if !whole.contains(&index) => (Some(&*lengths), None),
                Kind::Windowed { .. } => (None, None),
                Kind::Tapped { taps, .. } => (None, taps.iter().position(|tap| *tap == index)),
            };
            x = layer.forward(&x, heads, (&cos, &sin), lengths)?;
            if let Some(merger) = tap.and_then(|tap| self.taps.get(tap)) {
                added.push(merger.forward(&x, unit * width)?);
            }
        }
        let mut tokens = self.merger.forward(&x, unit * width)?;
        if !order.is_empty() {
            let mut back = vec![0; order.len()];
            order.iter().enumerate().for_each(|(at, token)| back[*token] = at);
            tokens = chosen(&tokens, &back)?;
        }
        Ok(Seen { tokens, added })
    }

    fn device(&self) -> &Device {
        self.embedding.device()
    }

    /// Cosines and sines of patches at (row, column), each (patches, half a head): the first half of the pairs turns by the row.
    fn turns(&self, cells: &[[usize; 2]], device: &Device) -> Result<(Tensor, Tensor)> {
        let half = self.config.width / self.config.heads / 2;
        let frequencies = rotary::frequencies(self.config.rotary_base, half);
        let angles: Vec<f32> = cells
            .iter()
            .flat_map(|cell| cell.map(|at| frequencies.iter().map(move |frequency| at as f32 * frequency)))
            .flatten()
            .collect();
        let angles = Tensor::from_vec(angles, (cells.len(), half), device)?;
        Ok((angles.cos()?, angles.sin()?))
    }
}

impl Layer {
    /// x: (patches, width). `lengths`: how many patches, one after the other, see each other; all without.
    fn forward(
        &self,
        x: &Tensor,
        heads: usize,
        (cos, sin): (&Tensor, &Tensor),
        lengths: Option<&[usize]>,
    ) -> Result<Tensor> {
        let (patches, width) = x.dims2()?;
        let qkv = self.qkv.forward(&self.norms[0].forward(x)?)?.reshape((1, patches, 3 * heads, width / heads))?;
        let part = |index: usize| qkv.narrow(2, index * heads, heads);
        let turned = |x: Tensor| rotary::turn_halves(&x, cos, sin);
        let (q, k, v) = (turned(part(0)?)?, turned(part(1)?)?, part(2)?);
        let logits = Logits::of_width(width / heads);
        let attended = match lengths {
            None => attend(&q, &k, &v, None, logits)?,
            Some(lengths) => {
                let starts = lengths.iter().scan(0, |sum, length| {
                    *sum += length;
                    Some(*sum - length)
                });
                let window = |(start, length): (usize, &usize)| {
                    let cut = |x: &Tensor| x.narrow(1, start, *length)?.contiguous();
                    attend(&cut(&q)?, &cut(&k)?, &cut(&v)?, None, logits)
                };
                Tensor::cat(&starts.zip(lengths).map(window).collect::<Result<Vec<_>>>()?, 1)?
            }
        };
        let x = (x + self.output.forward(&attended.reshape((patches, width))?)?)?;
        let h = self.norms[1].forward(&x)?;
        let h = match &self.gate {
            Some(gate) => (ops::silu(&gate.forward(&h)?)? * self.up.forward(&h)?)?,
            None => ops::gelu(&self.up.forward(&h)?)?,
        };
        x + self.down.forward(&h)?
    }
}

impl Merger {
    /// (patches, width) -> (tokens, out width), `merged` channels being those of a token's patches together
    fn forward(&self, x: &Tensor, merged: usize) -> Result<Tensor> {
        let join = |x: &Tensor| x.reshape((x.elem_count() / merged, merged));
        let h = if self.late { self.norm.forward(&join(x)?)? } else { join(&self.norm.forward(x)?)? };
        self.down.forward(&ops::activate(Activation::Gelu, &self.up.forward(&h)?)?)
    }
}

/// A stretch of a sequence that a language model reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stretch {
    /// So many tokens of text.
    Text(usize),
    /// The tokens of a picture, row by row.
    Picture {
        /// Tokens from top to bottom.
        rows: usize,
        /// Tokens from left to right.
        columns: usize,
    },
}

/// Time, row and column of each token: text goes on along all three; a picture stands still in time, and what follows it begins after its longer side.
pub fn places(stretches: &[Stretch]) -> Vec<[u32; 3]> {
    let (mut places, mut next) = (Vec::new(), 0);
    for stretch in stretches {
        let begun = next as u32;
        match *stretch {
            Stretch::Text(tokens) => {
                places.extend((next..next + tokens).map(|at| [at as u32; 3]));
                next += tokens;
            }
            Stretch::Picture { rows, columns } => {
                let cells = (0..rows as u32).flat_map(|row| (0..columns as u32).map(move |column| (row, column)));
                places.extend(cells.map(|(row, column)| [begun, begun + row, begun + column]));
                next += rows.max(columns);
            }
        }
    }
    places
}

fn chosen(x: &Tensor, rows: &[usize]) -> Result<Tensor> {
    let rows: Vec<u32> = rows.iter().map(|row| *row as u32).collect();
    x.index_select(&Tensor::new(rows, x.device())?, 0)
}

/// The tokens of each window of a picture of so many tokens, both in rows; windows at the right and at the bottom may be smaller.
fn windows(rows: usize, columns: usize, side: usize) -> Vec<Vec<usize>> {
    let starts = |length: usize| (0..length).step_by(side);
    let window = |(top, left): (usize, usize)| {
        (top..(top + side).min(rows))
            .flat_map(|row| (left..(left + side).min(columns)).map(move |column| row * columns + column))
            .collect()
    };
    starts(rows).flat_map(|top| starts(columns).map(move |left| (top, left))).map(window).collect()
}

/// Places that were learnt on a square of `side`, drawn to a picture's grid so that corners meet, each from the four around it.
fn learnt_places(table: &Tensor, side: usize, cells: &[[usize; 2]], patches: &Patches) -> Result<Tensor> {
    let along = |at: usize, count: usize| {
        let place = at as f32 * (side - 1) as f32 / count.saturating_sub(1).max(1) as f32;
        let low = place.floor();
        [(low as usize, 1.0 - (place - low)), ((low as usize + 1).min(side - 1), place - low)]
    };
    let (mut rows, mut shares) = (Vec::new(), Vec::new());
    for [row, column] in cells {
        for (y, above) in along(*row, patches.rows) {
            for (x, left) in along(*column, patches.columns) {
                rows.push(y * side + x);
                shares.push(above * left);
            }
        }
    }
    let shares = Tensor::from_vec(shares, (cells.len(), 4, 1), table.device())?;
    chosen(table, &rows)?.reshape((cells.len(), 4, ()))?.broadcast_mul(&shares)?.sum(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_cover_every_token_once() {
        let windows = windows(3, 5, 2);
        assert_eq!(windows[0], [0, 1, 5, 6]);
        assert_eq!(windows[2], [4, 9], "a smaller one at the right");
        assert_eq!(windows[5], [14], "and in the corner");
        let mut all: Vec<usize> = windows.concat();
        all.sort_unstable();
        assert_eq!(all, (0..15).collect::<Vec<_>>());
    }

    #[test]
    fn what_follows_a_picture_begins_after_its_longer_side() {
        let places = places(&[Stretch::Text(2), Stretch::Picture { rows: 1, columns: 3 }, Stretch::Text(1)]);
        assert_eq!(places, [[0; 3], [1; 3], [2, 2, 2], [2, 2, 3], [2, 2, 4], [5; 3]]);
    }
}
