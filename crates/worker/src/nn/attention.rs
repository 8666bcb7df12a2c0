//! The one attention: every model of ours goes through it, so that masks, per-token weights and regions are all one additive bias.

use candle_core::{CpuStorage, CustomOp3, D, DType, Device, Layout, Result, Shape, Storage, Tensor};

use super::{
    kernels,
    ops::{is_ours, slice},
};

/// Added to the logit of a key that must not be seen. Finite, so that a row without any key gives a mean instead of NaN.
pub const HIDDEN: f32 = -1e9;

/// What is done to logits besides the bias.
#[derive(Debug, Clone, Copy)]
pub struct Logits {
    /// Factor of q k.
    pub scale: f64,
    /// `cap tanh(logit / cap)`, before the bias (Gemma 2).
    pub soft_cap: Option<f64>,
}

impl Logits {
    /// `1 / sqrt(width)`, as nearly every model has it.
    pub fn of_width(width: usize) -> Self {
        Self { scale: 1.0 / (width as f64).sqrt(), soft_cap: None }
    }
}

/// `softmax(q k^T scale + bias) v`.
///
/// q: (batch, queries, heads, width); k, v: (batch, keys, key heads, width), with heads a multiple of key heads;
/// bias: (batch or 1, heads or 1, queries or 1, keys). Gives (batch, queries, heads, width).
///
/// # Errors
/// If shapes do not fit.
pub fn attend(q: &Tensor, k: &Tensor, v: &Tensor, bias: Option<&Tensor>, logits: Logits) -> Result<Tensor> {
    let ((batch, queries, heads, width), (_, keys, key_heads, _)) = (q.dims4()?, k.dims4()?);
    if k.dims() != [batch, keys, key_heads, width] || v.dims() != k.dims() || key_heads == 0 || heads % key_heads != 0 {
        candle_core::bail!("attention over q {:?}, k {:?}, v {:?}", q.dims(), k.dims(), v.dims());
    }
    if let Some(bias) = bias {
        let (b, h, t, s) = bias.dims4()?;
        if (b != 1 && b != batch) || (h != 1 && h != heads) || (t != 1 && t != queries) || s != keys {
            candle_core::bail!("a bias of {:?} for q {:?} and k {:?}", bias.dims(), q.dims(), k.dims());
        }
    }
    if is_ours(q) {
        let bias = bias.map(|bias| bias.to_dtype(DType::F32)?.contiguous()).transpose()?;
        return q.contiguous()?.apply_op3_no_bwd(&k.contiguous()?, &v.contiguous()?, &Attend { bias, logits });
    }
    // (batch, heads, tokens, width)
    let split = |x: &Tensor| x.transpose(1, 2)?.contiguous();
    let repeat = |x: &Tensor| {
        let x = split(x)?.unsqueeze(2)?.expand((batch, key_heads, heads / key_heads, keys, width))?;
        x.reshape((batch, heads, keys, width))
    };
    let mut scores = (split(q)?.matmul(&repeat(k)?.t()?)? * logits.scale)?;
    if let Some(cap) = logits.soft_cap {
        scores = ((scores / cap)?.tanh()? * cap)?;
    }
    if let Some(bias) = bias {
        scores = scores.broadcast_add(&bias.to_dtype(scores.dtype())?)?;
    }
    candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(&repeat(v)?)?.transpose(1, 2)?.contiguous()
}

struct Attend {
    bias: Option<Tensor>,
    logits: Logits,
}

impl CustomOp3 for Attend {
    fn name(&self) -> &'static str {
        "attend"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        lq: &Layout,
        k: &CpuStorage,
        lk: &Layout,
        v: &CpuStorage,
        lv: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let ((batch, queries, heads, width), (_, keys, key_heads, _)) = (lq.shape().dims4()?, lk.shape().dims4()?);
        let guard = self.bias.as_ref().map(Tensor::storage_and_layout);
        let bias = match &guard {
            Some((storage, layout)) => match &**storage {
                Storage::Cpu(storage) => Some((slice(storage, layout)?, <[usize; 4]>::from(layout.shape().dims4()?))),
                _ => candle_core::bail!("the bias of an attention on CPU lies elsewhere"),
            },
            None => None,
        };
        let attention = kernels::Attention {
            batch,
            queries,
            keys,
            heads,
            key_heads,
            width,
            scale: self.logits.scale as f32,
            soft_cap: self.logits.soft_cap.map(|cap| cap as f32),
            bias,
        };
        let output = kernels::attend(slice(q, lq)?, slice(k, lk)?, slice(v, lv)?, attention);
        Ok((CpuStorage::F32(output), lq.shape().clone()))
    }
}

/// A bias that hides what is absent: mask (batch, keys), 1 = present, any type -> (batch, 1, 1, keys).
///
/// # Errors
/// If the mask is not of two axes.
pub fn hide_absent(mask: &Tensor) -> Result<Tensor> {
    let (batch, keys) = mask.dims2()?;
    let absent = (1.0 - mask.to_dtype(DType::F32)?)?;
    (absent * f64::from(HIDDEN))?.reshape((batch, 1, 1, keys))
}

/// A bias that hides later positions, and those more than `window` - 1 earlier, of the last `queries` of `tokens` positions: (1, 1, queries, tokens).
///
/// # Errors
/// If the device has no room.
pub fn causal(queries: usize, tokens: usize, window: Option<usize>, device: &Device) -> Result<Tensor> {
    let sees = |query: usize, key: usize| key <= query && window.is_none_or(|window| query - key < window);
    let row = |query: usize| (0..tokens).map(move |key| if sees(query, key) { 0.0 } else { HIDDEN });
    let values: Vec<f32> = (tokens - queries..tokens).flat_map(row).collect();
    Tensor::from_vec(values, (1, 1, queries, tokens), device)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(shape: (usize, usize, usize, usize)) -> Tensor {
        Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap()
    }

    #[test]
    fn the_kernel_agrees_with_the_portable_form() {
        let wide = |x: &Tensor| x.to_dtype(DType::F64).unwrap();
        let plain = Logits::of_width(16);
        let capped = Logits { scale: 0.7, soft_cap: Some(2.0) };
        for (batch, queries, keys, heads, key_heads, bias, logits) in [
            (1, 1, 1, 1, 1, None, plain),
            (2, 5, 7, 6, 2, None, plain),
            (2, 5, 7, 6, 3, Some((2, 1, 1, 7)), plain),
            (3, 4, 4, 2, 2, Some((1, 1, 4, 4)), capped),
            (2, 3, 9, 4, 1, Some((2, 4, 3, 9)), capped),
        ] {
            let q = random((batch, queries, heads, 16));
            let (k, v) = (random((batch, keys, key_heads, 16)), random((batch, keys, key_heads, 16)));
            let bias = bias.map(random);
            let ours = attend(&q, &k, &v, bias.as_ref(), logits).unwrap();
            let portable = attend(&wide(&q), &wide(&k), &wide(&v), bias.as_ref().map(wide).as_ref(), logits).unwrap();
            let error = (wide(&ours) - portable).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f64>().unwrap();
            assert!(error < 1e-5, "{error}");
        }
    }

    #[test]
    fn a_weight_is_the_logarithm_in_the_bias() {
        // A key of weight 2 counts like the same key twice.
        let (q, k, v) = (random((1, 3, 2, 8)), random((1, 2, 2, 8)), random((1, 2, 2, 8)));
        let bias = Tensor::new(&[[[[0f32, 2f32.ln()]]]], &Device::Cpu).unwrap();
        let weighted = attend(&q, &k, &v, Some(&bias), Logits::of_width(8)).unwrap();
        let twice = |x: &Tensor| Tensor::cat(&[x, &x.narrow(1, 1, 1).unwrap()], 1).unwrap();
        let doubled = attend(&q, &twice(&k), &twice(&v), None, Logits::of_width(8)).unwrap();
        let error = (weighted - doubled).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(error < 1e-5, "{error}");
    }

    #[test]
    fn shapes_that_do_not_fit_are_errors() {
        let (q, k) = (random((1, 3, 4, 8)), random((1, 2, 3, 8)));
        assert!(attend(&q, &k, &k, None, Logits::of_width(8)).is_err());
        let k = random((1, 2, 4, 8));
        assert!(attend(&q, &k, &k, Some(&random((1, 1, 1, 3))), Logits::of_width(8)).is_err());
    }

    #[test]
    fn causal_windows() {
        let seen = causal(4, 4, Some(2), &Device::Cpu).unwrap().squeeze(0).unwrap().squeeze(0).unwrap();
        let seen: Vec<Vec<bool>> =
            seen.to_vec2::<f32>().unwrap().into_iter().map(|row| row.into_iter().map(|v| v == 0.0).collect()).collect();
        let (y, n) = (true, false);
        assert_eq!(seen, [[y, n, n, n], [y, y, n, n], [n, y, y, n], [n, n, y, y]]);
        let last = causal(1, 4, Some(2), &Device::Cpu).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(last.into_iter().map(|v| v == 0.0).collect::<Vec<_>>(), seen[3]);
    }
}
