//! `scheduler_config.json`: what a network was trained with, which sampler it comes with, and which others fit it.
//!
//! What is made of it is the hand's (`worker-hand/src/samplers`).
//!
//! Source: diffusers 0.42.1, `schedulers/`.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

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
    /// `SCMScheduler`, for networks of trigonometric flow distilled into few steps.
    Scm,
}

impl Sampler {
    /// Every sampler.
    pub const ALL: [Self; 10] = [
        Self::Ddim,
        Self::Pndm,
        Self::Euler,
        Self::EulerAncestral,
        Self::Heun,
        Self::DpmPp2m,
        Self::DpmPp2mKarras,
        Self::UniPc,
        Self::Lcm,
        Self::Scm,
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
            Self::Scm => "scm",
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

/// Fields that say nothing of the mathematics, or are read where they are used.
const KNOWN: [&str; 33] = [
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "prediction_type",
    "timestep_spacing",
    "steps_offset",
    "rescale_betas_zero_snr",
    "final_sigmas_type",
    "use_karras_sigmas",
    "sigma_min",
    "sigma_max",
    "clip_sample",
    "clip_sample_range",
    "set_alpha_to_one",
    "skip_prk_steps",
    "solver_order",
    "solver_type",
    "algorithm_type",
    "lower_order_final",
    "euler_at_final",
    "use_flow_sigmas",
    "flow_shift",
    "disable_corrector",
    "original_inference_steps",
    "timestep_scaling",
    "shift",
    "use_dynamic_shifting",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
    "stochastic_sampling",
];

/// Fields with the only values that are computed here; `null` is one too. Of those that belong to other fields, which are off, any value is fine.
const NEUTRAL: [(&str, &[&str]); 18] = [
    ("trained_betas", &[]),
    ("thresholding", &["false"]),
    ("dynamic_thresholding_ratio", &["*"]),
    ("sample_max_value", &["*"]),
    ("interpolation_type", &["\"linear\""]),
    ("timestep_type", &["\"discrete\""]),
    ("use_exponential_sigmas", &["false"]),
    ("use_beta_sigmas", &["false"]),
    ("use_lu_lambdas", &["false"]),
    ("lambda_min_clipped", &[]),
    ("variance_type", &[]),
    ("predict_x0", &["true"]),
    ("solver_p", &[]),
    ("time_shift_type", &["\"exponential\""]),
    ("invert_sigmas", &["false"]),
    ("shift_terminal", &[]),
    ("skip_type", &["*"]),
    // What latents of SCM are multiplied by, from the noise on to the end, where it is taken off again.
    ("sigma_data", &["*"]),
];

/// Fields as the file has them. What it leaves out is filled in with the defaults of the sampler that is asked for, as diffusers does when it makes one
/// scheduler from another's configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The scheduler's class.
    pub class: String,
    fields: Map<String, Value>,
}

impl<'de> Deserialize<'de> for Config {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use serde::de::Error as _;
        let fields = Map::deserialize(deserializer)?;
        let class = fields.get("_class_name").and_then(Value::as_str).unwrap_or_default().to_owned();
        let config = Self { class, fields };
        config.check().map_err(D::Error::custom)?;
        Ok(config)
    }
}

impl Config {
    fn check(&self) -> Result<(), Error> {
        for (field, value) in self.fields.iter().filter(|(field, _)| !field.starts_with('_')) {
            let neutral = NEUTRAL.iter().find(|(name, _)| name == field);
            let fine = match neutral {
                Some((_, values)) => {
                    let text = value.to_string();
                    value.is_null() || values.iter().any(|known| *known == "*" || text == *known)
                }
                None => KNOWN.contains(&&**field),
            };
            if !fine {
                return Err(Error(format!("{field} = {value} is not known")));
            }
        }
        self.own().map(drop)
    }

    /// The sampler that the network comes with.
    ///
    /// # Errors
    /// If its class is not known.
    pub fn own(&self) -> Result<Sampler, Error> {
        match &*self.class {
            "DDIMScheduler" => Ok(Sampler::Ddim),
            "PNDMScheduler" => Ok(Sampler::Pndm),
            "EulerDiscreteScheduler" | FLOW_EULER => Ok(Sampler::Euler),
            "EulerAncestralDiscreteScheduler" => Ok(Sampler::EulerAncestral),
            "HeunDiscreteScheduler" => Ok(Sampler::Heun),
            DPM => Ok(Sampler::DpmPp2m),
            UNIPC => Ok(Sampler::UniPc),
            "LCMScheduler" => Ok(Sampler::Lcm),
            SCM => Ok(Sampler::Scm),
            class => Err(Error(format!("_class_name {class:?} is not known"))),
        }
    }

    /// Whether the network predicts a flow: the noise level is the share of noise.
    pub fn is_flow(&self) -> bool {
        self.class == FLOW_EULER || self.flag("use_flow_sigmas", false).unwrap_or(false)
    }

    /// Samplers that can be had with this configuration, its own first.
    pub fn samplers(&self) -> Vec<Sampler> {
        let own = self.own().ok();
        let others: &[Sampler] = match self.is_flow() {
            true if self.class == FLOW_EULER => &[],
            true => &[Sampler::DpmPp2m, Sampler::UniPc, Sampler::Euler],
            false if self.class == SCM => &[],
            false => &Sampler::ALL,
        };
        let others = others.iter().copied().filter(|sampler| Some(*sampler) != own && *sampler != Sampler::Scm);
        let others =
            others.filter(|sampler| *sampler != Sampler::Pndm || self.flag("skip_prk_steps", false) == Ok(true));
        own.into_iter().chain(others).collect()
    }

    fn value<T>(&self, field: &str, default: T, read: impl Fn(&Value) -> Option<T>) -> Result<T, Error> {
        match self.fields.get(field).filter(|value| !value.is_null()) {
            None => Ok(default),
            Some(value) => read(value).ok_or_else(|| Error(format!("{field} cannot be {value}"))),
        }
    }

    /// A field that is true or false.
    ///
    /// # Errors
    /// If it is something else.
    pub fn flag(&self, field: &str, default: bool) -> Result<bool, Error> {
        self.value(field, default, Value::as_bool)
    }

    /// A field that is a number.
    ///
    /// # Errors
    /// If it is something else.
    pub fn number(&self, field: &str, default: f64) -> Result<f64, Error> {
        self.value(field, default, Value::as_f64)
    }

    /// A field that is a number, or not there.
    ///
    /// # Errors
    /// If it is something else.
    pub fn optional(&self, field: &str) -> Result<Option<f64>, Error> {
        self.value(field, None, |value| value.as_f64().map(Some))
    }

    /// A field that is a whole number.
    ///
    /// # Errors
    /// If it is something else.
    pub fn count(&self, field: &str, default: usize) -> Result<usize, Error> {
        self.value(field, default, |value| value.as_u64().and_then(|count| usize::try_from(count).ok()))
    }

    /// A field that is a word.
    ///
    /// # Errors
    /// If it is something else.
    pub fn word<'a>(&'a self, field: &str, default: &'a str) -> Result<&'a str, Error> {
        match self.fields.get(field).filter(|value| !value.is_null()) {
            None => Ok(default),
            Some(value) => value.as_str().ok_or_else(|| Error(format!("{field} cannot be {value}"))),
        }
    }

    /// A field that is a list of whole numbers.
    ///
    /// # Errors
    /// If it is something else.
    pub fn counts(&self, field: &str) -> Result<Vec<usize>, Error> {
        self.value(field, Vec::new(), |value| {
            value.as_array()?.iter().map(|v| v.as_u64().and_then(|count| usize::try_from(count).ok())).collect()
        })
    }
}

/// The class of flow matching by Euler's method.
pub const FLOW_EULER: &str = "FlowMatchEulerDiscreteScheduler";
const SCM: &str = "SCMScheduler";
const DPM: &str = "DPMSolverMultistepScheduler";
const UNIPC: &str = "UniPCMultistepScheduler";
