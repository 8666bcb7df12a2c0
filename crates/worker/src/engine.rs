//! The contract between a worker and the model it serves.
//!
//! One OS thread owns each engine (see [`crate::thread`]), so engines need no locks and may block. Every method may be handed hostile
//! values: what an engine cannot do it answers with [`EngineError`], never with a panic. If it panics all the same, the thread
//! catches it, fails the requests at hand and builds the engine anew.

use std::{any::Any, fmt::Debug, ops::Range, sync::Arc};

use bytes::Bytes;
use efferent_proto::{
    ApiError,
    v1::{ErrorCode, FailureClass, Model, Size},
    work::as_typed,
};
use image::{GrayImage, RgbImage};

use crate::{signal::ControlSignal, weights};

/// Why an engine did not do what was asked of it.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The request can never succeed here: a limit, a field, a space that does not fit. Not tried again.
    #[error(transparent)]
    Refused(#[from] ApiError),
    /// Too little memory for this request, or for the batch that it was in. Tried again alone, up to the limit of attempts.
    #[error("out of memory: {0}")]
    OutOfMemory(String),
    /// What the task refers to is not there; it may be, a moment later. Tried again, up to the limit of attempts.
    #[error("{0}")]
    Missing(String),
    /// The computation failed. Tried again, up to the limit of attempts.
    #[error("{what}")]
    Compute {
        /// What was computed.
        what: String,
        /// The cause.
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// The engine panicked; it was built anew. Tried again, up to the limit of attempts.
    #[error("the engine crashed: {0}")]
    Crashed(String),
    /// The engine crashed before and could not be built anew: its worker ends. The request has no part in it, goes to another worker and counts for no limit.
    #[error("the worker's engine is gone")]
    Gone,
}

impl EngineError {
    /// A failed computation with its cause.
    pub fn compute(what: impl Into<String>, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Compute { what: what.into(), source: Some(source.into()) }
    }

    /// It and its causes in a line.
    pub fn told(&self) -> String {
        let mut told = self.to_string();
        let mut source = std::error::Error::source(self);
        while let Some(error) = source {
            // Further lines are where in the code it was.
            let text = error.to_string();
            told.push_str(": ");
            told.push_str(text.lines().next().unwrap_or_default());
            source = error.source();
        }
        told
    }

    /// The same for another of the items that failed together.
    #[must_use]
    pub fn again(&self) -> Self {
        match self {
            Self::Refused(error) => Self::Refused(error.clone()),
            Self::OutOfMemory(what) => Self::OutOfMemory(what.clone()),
            Self::Missing(what) => Self::Missing(what.clone()),
            Self::Compute { .. } => Self::Compute { what: self.told(), source: None },
            Self::Crashed(what) => Self::Crashed(what.clone()),
            Self::Gone => Self::Gone,
        }
    }

    /// What the caller is told.
    pub fn to_api(&self) -> ApiError {
        match self {
            Self::Refused(error) => error.clone(),
            _ => ApiError::new(ErrorCode::Engine, self.told()),
        }
    }

    /// Which limit of attempts it counts for; `None` if another attempt is in vain.
    pub fn class(&self) -> Option<FailureClass> {
        match self {
            Self::Refused(_) => None,
            Self::OutOfMemory(_) => Some(FailureClass::OutOfMemory),
            Self::Missing(_) | Self::Compute { .. } => Some(FailureClass::Transient),
            Self::Crashed(_) => Some(FailureClass::EngineCrash),
            Self::Gone => Some(FailureClass::HandedBack),
        }
    }
}

impl From<weights::Refused> for EngineError {
    fn from(refused: weights::Refused) -> Self {
        ApiError::new(ErrorCode::InvalidField, refused.to_string()).field("dtype").into()
    }
}

impl From<candle_core::Error> for EngineError {
    fn from(source: candle_core::Error) -> Self {
        // Devices have their own errors for it, known to candle as text alone.
        let text = source.to_string();
        if ["out of memory", "OUT_OF_MEMORY"].iter().any(|words| text.contains(words)) {
            return Self::OutOfMemory(text.lines().next().unwrap_or_default().to_owned());
        }
        Self::compute("tensor computation failed", source)
    }
}

/// What an engine is and offers.
#[derive(Debug, Clone)]
pub struct EngineSpec {
    /// The model it serves a part of, as clients see it.
    pub model: Model,
    /// Most items it computes at once: prompts' tokens for a brain, samples for a hand.
    pub max_batch: usize,
    /// True for engines that only pretend to compute.
    pub simulated: bool,
}

/// A prompt to read.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct EmbedRequest {
    /// What to draw.
    pub prompt: String,
    /// What to keep out of the picture; empty for nothing.
    pub negative_prompt: String,
    /// Pictures that are read before either. Only for models that offer it.
    pub references: Vec<Arc<Reference>>,
}

/// A picture for a brain to read.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reference {
    /// BLAKE3 (hex) of its file.
    pub hash: String,
    /// The picture.
    pub image: RgbImage,
}

/// Computes control signals.
pub trait Brain: Send {
    /// What it is.
    fn spec(&self) -> &EngineSpec;

    /// What a cached signal depends on besides the request: model, connector and template hashes.
    fn fingerprint(&self) -> String;

    /// Tokens that a request costs; refuses what is over the model's limit. `embed` may be called with up to `spec().max_batch`
    /// tokens, every request counted as long as the longest.
    fn tokens(&self, request: &EmbedRequest) -> Result<usize, EngineError>;

    /// One signal for each request, in order. One request's failure leaves the others alone.
    fn embed(&mut self, batch: &[EmbedRequest]) -> Vec<Result<ControlSignal, EngineError>>;
}

/// An image to render.
#[derive(Debug, Clone)]
pub struct RenderRequest {
    /// What the brain computed.
    pub signal: Arc<ControlSignal>,
    /// Pixels.
    pub size: Size,
    /// Denoising steps.
    pub steps: u32,
    /// Strength of guidance; 1.0 means none.
    pub guidance_scale: f32,
    /// How strongly pictures that the brain has read steer; 1.0 and below mean no guidance by them. Only for signals with pictures.
    pub image_guidance_scale: f32,
    /// How much of the contrast that guidance adds is taken back, 0 to 1. Only for models that offer it.
    pub guidance_rescale: f32,
    /// Between which parts of the steps there is guidance: 0..1 for all.
    pub guidance_range: Range<f32>,
    /// Seed of the noise. The picture depends on it and on nothing else that is random.
    pub seed: u64,
    /// Sampler by name.
    pub sampler: String,
    /// What to begin with instead of noise alone. Only for models that offer it.
    pub picture: Option<Arc<Picture>>,
}

impl RenderRequest {
    /// Which of so many steps are guided. Source: diffusers 0.42.1, `guiders/classifier_free_guidance.py`.
    pub fn guided_steps(&self, steps: u32) -> Range<u32> {
        // As typed: of 10 steps 0.7 is 7, the nearest number of 32 bits a little less.
        let step = |part: f32| (as_typed(part) * f64::from(steps)) as u32;
        step(self.guidance_range.start)..step(self.guidance_range.end)
    }
}

/// A picture to begin with, of the size that is asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Picture {
    /// The picture.
    pub image: RgbImage,
    /// 255 where it may change, 0 where it stays; nothing if it may anywhere.
    pub mask: Option<GrayImage>,
    /// The share of the steps that are made, above 0 up to 1.
    pub strength: f64,
}

/// Samples with equal keys may be advanced together.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct BatchKey(pub String);

/// An image on its way.
pub struct Sample {
    /// Which samples it can be advanced with.
    pub key: BatchKey,
    /// Steps done.
    pub step: u32,
    /// Steps in all.
    pub steps: u32,
    /// What the engine keeps of it.
    pub state: Box<dyn Any + Send>,
}

impl Debug for Sample {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sample")
            .field("key", &self.key)
            .field("step", &self.step)
            .field("steps", &self.steps)
            .finish_non_exhaustive()
    }
}

impl Sample {
    /// Whether every step is done.
    pub fn is_complete(&self) -> bool {
        self.step >= self.steps
    }
}

/// Renders control signals.
pub trait Hand: Send {
    /// What it is.
    fn spec(&self) -> &EngineSpec;

    /// Checks a request and draws its noise. Refuses a control signal of a space it does not accept, naming both.
    fn begin(&mut self, request: &RenderRequest) -> Result<Sample, EngineError>;

    /// Advances each sample by one step. All have the same key and are not complete; there are at most `spec().max_batch`. A sample whose result is
    /// an error must not be used again; the others are not affected.
    fn step(&mut self, batch: &mut [&mut Sample]) -> Vec<Result<(), EngineError>>;

    /// The picture as the sample stands.
    fn preview(&mut self, sample: &Sample) -> Result<RgbImage, EngineError>;

    /// The picture of a complete sample.
    fn finish(&mut self, sample: Sample) -> Result<RgbImage, EngineError>;

    /// What [`Hand::resume`] needs to go on from here.
    fn checkpoint(&self, sample: &Sample) -> Result<Bytes, EngineError>;

    /// A sample that goes on from a checkpoint as if it had never stopped.
    fn resume(&mut self, request: &RenderRequest, from: &[u8]) -> Result<Sample, EngineError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_failed_is_told_with_its_causes_and_stays_of_its_class() {
        let shapes = |a, b| candle_core::Tensor::zeros((a, b), candle_core::DType::F32, &candle_core::Device::Cpu);
        let error: EngineError = shapes(2, 3).unwrap().matmul(&shapes(4, 5).unwrap()).unwrap_err().into();
        let told = error.told();
        assert!(told.starts_with("tensor computation failed: ") && told.contains("[2, 3]"), "{told}");
        assert!(!told.contains('\n'), "{told}");
        let refused: EngineError = ApiError::new(ErrorCode::InvalidField, "too long").field("prompt").into();
        let (no_room, crashed) = (EngineError::OutOfMemory("4 GB".to_owned()), EngineError::Crashed("?".to_owned()));
        for error in [error, refused, no_room, crashed, EngineError::Gone] {
            let again = error.again();
            assert_eq!((again.told(), again.class()), (error.told(), error.class()));
        }
    }

    #[test]
    fn guided_steps_are_those_of_the_range_as_it_was_typed() {
        for (steps, range, wanted) in [
            (10, 0.7..0.9, 7..9),
            (10, 0.0..0.7, 0..7),
            (10, 0.3..0.6, 3..6),
            (20, 0.15..0.95, 3..19),
            (50, 0.1..0.58, 5..28),
            (28, 0.0..1.0, 0..28),
            (4, 0.5..0.5, 2..2),
        ] {
            let request = RenderRequest {
                signal: Arc::default(),
                size: Size::default(),
                steps,
                guidance_scale: 1.0,
                image_guidance_scale: 1.0,
                guidance_rescale: 0.0,
                guidance_range: range,
                seed: 0,
                sampler: String::new(),
                picture: None,
            };
            let range = &request.guidance_range;
            assert_eq!(request.guided_steps(steps), wanted, "{steps} steps, {range:?}");
        }
    }
}
