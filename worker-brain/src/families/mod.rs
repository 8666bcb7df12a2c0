//! Brains by family. A new one is a folder and a line in [`FAMILIES`].

pub mod metaquery;
pub mod sim;
pub mod smollm2;
pub mod text_encoders;

use std::path::{Path, PathBuf};

use candle_core::Device;
use efferent_proto::{ApiError, v1::ErrorCode};
use efferent_worker::{
    engine::{Brain, EngineError},
    pipeline::Pipeline,
    thread::Factory,
    weights::Dtypes,
};

/// Where a brain is built from.
#[derive(Debug, Clone)]
pub struct Source {
    /// Which brain and connector.
    pub pipeline: Pipeline,
    /// The language model's weights, where they are not in the model folder.
    pub weights: Option<PathBuf>,
    /// Where to compute: on one device, or on several that share the layers of a language model out, or text encoders.
    pub devices: Vec<Device>,
    /// What the weights of parts are kept as.
    pub dtypes: Dtypes,
}

impl Source {
    /// Where everything is that is not shared out.
    pub fn device(&self) -> &Device {
        self.devices.first().unwrap_or(&Device::Cpu)
    }
}

type Load = fn(&Source) -> Result<Box<dyn Brain>, EngineError>;

/// Every family by its name in `pipeline.json`.
pub const FAMILIES: [(&str, Load); 3] =
    [("metaquery", metaquery::load), ("smollm2", smollm2::load), ("text_encoders", text_encoders::load)];

/// Builds the brain of a pipeline. Weights that are not in its folder are looked for in the home folder.
pub fn factory(pipeline: &Pipeline, home: &Path, devices: Vec<Device>, dtypes: Dtypes) -> Factory<dyn Brain> {
    let source = Source { pipeline: pipeline.clone(), weights: pipeline.brain_weights(home), devices, dtypes };
    Box::new(move || {
        let family = &source.pipeline.brain().family;
        match FAMILIES.iter().find(|(name, _)| name == family) {
            Some((_, load)) => load(&source),
            None => {
                let known = FAMILIES.map(|(name, _)| name).join(", ");
                let message = format!("no brain family is called {family:?}; known are {known}");
                Err(ApiError::new(ErrorCode::InvalidField, message).field("brain.family").into())
            }
        }
    })
}

/// A failure to load, with its cause.
pub(crate) fn unloadable(what: &str) -> impl Fn(Box<dyn std::error::Error + Send + Sync>) -> EngineError + '_ {
    move |source| EngineError::compute(format!("cannot load {what}"), source)
}
