//! Classifier-free guidance.

use super::Branches;

/// The strength of classifier-free guidance, if there is to be any. As in diffusers: at 1 and below there is one evaluation, without guidance.
pub fn guided(guidance_scale: f32) -> Option<f32> {
    (guidance_scale > 1.0).then_some(guidance_scale)
}

/// `u + scale (c - u)` of what a network answered with and without the prompt; the one answer, if there is no guidance.
pub fn guide(scale: Option<f32>, answers: Branches) -> Vec<f32> {
    match (scale, &*answers) {
        (Some(scale), [conditional, unconditional]) => {
            conditional.iter().zip(unconditional).map(|(c, u)| u + scale * (c - u)).collect()
        }
        _ => answers.into_iter().next().unwrap_or_default(),
    }
}

/// A guided answer with its spread brought nearer to that of the answer with the prompt, by a share of 0 to 1. Source: diffusers 0.42.1, `rescale_noise_cfg`.
pub fn rescaled(share: f32, conditional: &[f32], guided: Vec<f32>) -> Vec<f32> {
    if share == 0.0 {
        return guided;
    }
    let spread = |values: &[f32]| {
        let count = values.len().max(1) as f64;
        let mean = values.iter().map(|value| f64::from(*value)).sum::<f64>() / count;
        (values.iter().map(|value| (f64::from(*value) - mean).powi(2)).sum::<f64>() / count).sqrt()
    };
    let ratio = (spread(conditional) / spread(&guided)) as f32;
    if !ratio.is_finite() {
        return guided;
    }
    guided.into_iter().map(|value| share * (value * ratio) + (1.0 - share) * value).collect()
}
