//! Classifier-free guidance.

use efferent_proto::internal::{Branch, ControlSignal};
use efferent_worker::engine::RenderRequest;

use super::Branches;

/// Which branches of a signal a request's picture is guided by, that with the prompt first. Of a signal with pictures, those without the prompt are that with the pictures,
/// and, if the pictures guide too, that without them: as MetaQuery does. Source: facebookresearch/metaquery 206f6de, `models/metaquery.py`.
pub fn guiding(request: &RenderRequest) -> Vec<Branch> {
    let pictured = has_pictures(&request.signal);
    match guided(request.guidance_scale) {
        _ if pictured && guided(request.image_guidance_scale).is_some() => {
            vec![Branch::Conditional, Branch::Unconditional, Branch::ImageConditional]
        }
        Some(_) if pictured => vec![Branch::Conditional, Branch::ImageConditional],
        Some(_) => vec![Branch::Conditional, Branch::Unconditional],
        None => vec![Branch::Conditional],
    }
}

fn has_pictures(signal: &ControlSignal) -> bool {
    signal.streams.iter().any(|stream| stream.branch() == Branch::ImageConditional)
}

/// How strongly a picture is guided.
#[derive(Debug, Clone, Copy)]
pub struct Strength {
    /// By the prompt.
    pub prompt: f32,
    /// By the pictures that the brain has read.
    pub pictures: f32,
}

impl From<&RenderRequest> for Strength {
    fn from(request: &RenderRequest) -> Self {
        Self { prompt: request.guidance_scale, pictures: request.image_guidance_scale }
    }
}

/// The strength of classifier-free guidance, if there is to be any. As in diffusers: at 1 and below there is one evaluation, without guidance.
fn guided(guidance_scale: f32) -> Option<f32> {
    (guidance_scale > 1.0).then_some(guidance_scale)
}

/// `u + scale (c - u)` of what a network answered with and without the prompt; the one answer, if there is no guidance. With a third answer, with pictures and without the
/// prompt: `u + pictures (p - u) + prompt (c - p)`.
pub fn guide(strength: Strength, answers: Branches) -> Vec<f32> {
    let Strength { prompt, pictures } = strength;
    match &*answers {
        [conditional, unconditional] => {
            conditional.iter().zip(unconditional).map(|(c, u)| u + prompt * (c - u)).collect()
        }
        [conditional, unconditional, pictured] => {
            let answers = conditional.iter().zip(unconditional).zip(pictured);
            answers.map(|((c, u), p)| u + pictures * (p - u) + prompt * (c - p)).collect()
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
