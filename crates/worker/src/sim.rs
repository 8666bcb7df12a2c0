//! What simulated brains and hands agree on. They stand in where a test or a study needs many workers, are named `sim` wherever they
//! show, and are never a default.

use efferent_proto::{
    internal::ControlSpace,
    v1::{Model, Size},
};

/// The simulated model, its brain and its hand.
pub const NAME: &str = "sim";
/// Channels of a simulated signal.
pub const WIDTH: u32 = 8;
/// Tokens of a simulated signal.
pub const TOKENS: u32 = 2;

/// The space of simulated signals.
pub fn space() -> ControlSpace {
    ControlSpace {
        family: NAME.to_owned(),
        width: WIDTH,
        layers: "hash".to_owned(),
        normalisation: "none".to_owned(),
        revision: String::new(),
    }
}

/// The simulated model as clients see it.
pub fn model() -> Model {
    Model {
        name: NAME.to_owned(),
        description: "Simulated engines: they cost what they are told to, and draw no pictures worth seeing."
            .to_owned(),
        revision: "1".to_owned(),
        brain: NAME.to_owned(),
        hand: NAME.to_owned(),
        space: crate::signal::space_name(&space()),
        sizes: [64, 32, 256].map(|side| Size { width: side, height: side }).to_vec(),
        samplers: vec!["euler".to_owned()],
        default_steps: 4,
        max_steps: 1000,
        default_guidance_scale: 1.0,
        max_guidance_scale: 20.0,
        max_image_count: 16,
        max_prompt_tokens: 512,
        negative_prompt: true,
        live_brains: 0,
        live_hands: 0,
    }
}
