//! Hands by family. A new one is a folder and a line in [`FAMILIES`].

pub mod flux;
pub mod pictogram;
pub mod sana;
pub mod sim;
pub mod stable_diffusion;
pub mod stable_diffusion_3;
pub mod z_image;

use candle_core::Device;
use efferent_proto::{ApiError, v1::ErrorCode};
use efferent_worker::{
    engine::{EngineError, Hand},
    pipeline::Pipeline,
    thread::Factory,
    weights::Dtypes,
};

/// What a hand computes on, and how.
#[derive(Debug, Clone)]
pub struct Setup {
    /// Everything, or all but what the second does.
    pub first: Device,
    /// The branch without the prompt, at the same time as the first that with it.
    pub second: Option<Device>,
    /// Pixels of a picture above which it is decoded and encoded in tiles, if there is such a limit.
    pub tile_above: Option<u64>,
    /// What the weights of parts are kept as, where a family has parts to choose for.
    pub dtypes: Dtypes,
}

impl From<Device> for Setup {
    fn from(first: Device) -> Self {
        Self { first, second: None, tile_above: None, dtypes: Dtypes::default() }
    }
}

type Load = fn(&Pipeline, &Setup) -> Result<Box<dyn Hand>, EngineError>;

/// Every family by its name in `pipeline.json`.
pub const FAMILIES: [(&str, Load); 6] = [
    ("flux", flux::load),
    ("pictogram", pictogram::load),
    ("sana", sana::load),
    ("stable_diffusion", stable_diffusion::load),
    ("stable_diffusion_3", stable_diffusion_3::load),
    ("z_image", z_image::load),
];

/// Builds the hand of a pipeline.
pub fn factory(pipeline: &Pipeline, setup: impl Into<Setup>) -> Factory<dyn Hand> {
    let (pipeline, setup) = (pipeline.clone(), setup.into());
    Box::new(move || {
        let family = &pipeline.hand().family;
        match FAMILIES.iter().find(|(name, _)| name == family) {
            Some((_, load)) => load(&pipeline, &setup),
            None => {
                let known = FAMILIES.map(|(name, _)| name).join(", ");
                let message = format!("no hand family is called {family:?}; known are {known}");
                Err(ApiError::new(ErrorCode::InvalidField, message).field("hand.family").into())
            }
        }
    })
}
