//! Attention whose weights are products of positive features: its cost grows with the number of tokens, not with its square.

use candle_core::{DType, Result, Tensor};

/// Keeps a token that nothing attends to from a division by zero.
const EPS: f64 = 1e-15;

/// `relu(q) (relu(k)^T v) / (relu(q) sum relu(k))`, in f32. There is no mask and no scale.
///
/// q, k, v: (batch, tokens, heads, width), of equal shape, which is also what it gives.
///
/// # Errors
/// If shapes do not fit.
pub fn attend_linear(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let (batch, tokens, heads, width) = q.dims4()?;
    if k.dims() != q.dims() || v.dims() != q.dims() {
        candle_core::bail!("linear attention over q {:?}, k {:?}, v {:?}", q.dims(), k.dims(), v.dims());
    }
    // (batch, heads, tokens, width)
    let split = |x: &Tensor| x.to_dtype(DType::F32)?.transpose(1, 2)?.contiguous();
    let (features, keys) = (split(q)?.relu()?, split(k)?.relu()?);
    // One more column of ones: what it comes to is the sum of the weights.
    let ones = Tensor::ones((batch, heads, tokens, 1), DType::F32, v.device())?;
    let values = Tensor::cat(&[split(v)?, ones], 3)?;
    let sums = features.matmul(&keys.t()?.contiguous()?.matmul(&values)?)?;
    let weights = (sums.narrow(3, width, 1)? + EPS)?;
    sums.narrow(3, 0, width)?.broadcast_div(&weights)?.transpose(1, 2)?.contiguous()?.to_dtype(q.dtype())
}

#[cfg(test)]
mod tests {
    use candle_core::{D, Device};

    use super::*;

    #[test]
    fn equals_the_square_form() {
        let random = || Tensor::randn(0f32, 1.0, (2, 7, 3, 4), &Device::Cpu).unwrap();
        let (q, k, v) = (random(), random(), random());
        let split = |x: &Tensor| x.transpose(1, 2).unwrap().contiguous().unwrap();
        let (rq, rk) = (split(&q).relu().unwrap(), split(&k).relu().unwrap());
        let scores = rq.matmul(&rk.t().unwrap()).unwrap();
        let scores = scores.broadcast_div(&(scores.sum_keepdim(D::Minus1).unwrap() + EPS).unwrap()).unwrap();
        let wanted = scores.matmul(&split(&v)).unwrap().transpose(1, 2).unwrap();
        let got = attend_linear(&q, &k, &v).unwrap();
        let error = (got - wanted).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(error < 1e-5, "{error}");
    }

    #[test]
    fn without_any_weight_it_is_zero() {
        let negative = (Tensor::ones((1, 2, 1, 3), DType::F32, &Device::Cpu).unwrap() * -1.0).unwrap();
        let got = attend_linear(&negative, &negative, &negative).unwrap();
        assert!(got.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().all(|value| *value == 0.0));
    }

    #[test]
    fn shapes_that_do_not_fit_are_errors() {
        let zeros = |tokens: usize| Tensor::zeros((1, tokens, 2, 4), DType::F32, &Device::Cpu).unwrap();
        assert!(attend_linear(&zeros(3), &zeros(2), &zeros(2)).is_err());
    }
}
