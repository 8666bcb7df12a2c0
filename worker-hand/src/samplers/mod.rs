//! Samplers as diffusers has them: which noise levels a network is asked at, and how its answers lead from noise to a latent.
//!
//! Read in this order: this file (the names), [`config`] (`scheduler_config.json`), [`schedule`] (levels and times), [`trajectory`] (a sample on its way).
//! Each sample has a trajectory of its own, so samples at other steps, of other lengths, share a pass of the network.
//!
//! Source: diffusers 0.42.1, `schedulers/`. Checked against it by `tests/samplers.rs`.

pub mod config;
pub mod schedule;
pub mod trajectory;

use std::{fmt, str::FromStr};

pub use config::Config;
pub use schedule::{Flow, Plan};
pub use trajectory::Trajectory;

/// A way from noise to a latent, by its name in requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Sampler {
    /// `DDIMScheduler`, without added noise.
    Ddim,
    /// `PNDMScheduler` by linear multistep (`skip_prk_steps`); its first step asks twice.
    Pndm,
    /// `EulerDiscreteScheduler`, or `FlowMatchEulerDiscreteScheduler` of networks that predict a flow.
    Euler,
    /// `EulerAncestralDiscreteScheduler`: noise is added in each step.
    EulerAncestral,
    /// `HeunDiscreteScheduler`: second order, two evaluations a step.
    Heun,
    /// `DPMSolverMultistepScheduler`.
    DpmPp2m,
    /// The same with the noise levels of Karras et al.
    DpmPp2mKarras,
    /// `UniPCMultistepScheduler`.
    UniPc,
    /// `LCMScheduler`, for networks distilled into few steps.
    Lcm,
}

impl Sampler {
    /// Every sampler.
    pub const ALL: [Self; 9] = [
        Self::Ddim,
        Self::Pndm,
        Self::Euler,
        Self::EulerAncestral,
        Self::Heun,
        Self::DpmPp2m,
        Self::DpmPp2mKarras,
        Self::UniPc,
        Self::Lcm,
    ];

    /// The name in requests.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ddim => "ddim",
            Self::Pndm => "pndm",
            Self::Euler => "euler",
            Self::EulerAncestral => "euler-ancestral",
            Self::Heun => "heun",
            Self::DpmPp2m => "dpmpp-2m",
            Self::DpmPp2mKarras => "dpmpp-2m-karras",
            Self::UniPc => "unipc",
            Self::Lcm => "lcm",
        }
    }
}

impl fmt::Display for Sampler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Sampler {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let known = || Self::ALL.map(Self::name).join(", ");
        Self::ALL
            .into_iter()
            .find(|s| s.name() == name)
            .ok_or_else(|| format!("no sampler {name:?}; known are {}", known()))
    }
}

/// Why there is no such schedule: words that name the field or the number.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("scheduler: {0}")]
pub struct Error(pub String);
