//! What describes a picture.

use std::{path::PathBuf, time::Duration};

use clap::Args;
use efferent_proto::{items, v1::Size};

use super::{Format, LaneName};

/// `efferent generate`.
#[derive(Debug, Args)]
pub(crate) struct Generate {
    /// What to draw, 1 to 4096 bytes of UTF-8.
    #[arg(required_unless_present = "signal")]
    pub(crate) prompt: Option<String>,
    /// Control signal to render instead of a prompt: an id that `efferent encode` printed. Needs --server.
    #[arg(long, value_name = "ID", conflicts_with_all = ["prompt", "negative"])]
    pub(crate) signal: Option<String>,
    /// File to write; a folder for the usual name in it; - for stdout. Several images are numbered from 1: apple-1.png, apple-2.png.
    /// Default: a name made of the prompt and the seed, in the current folder.
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
    /// Pixels. Default: the model's first size.
    #[arg(long, value_name = "WIDTHxHEIGHT", value_parser = items::size)]
    pub(crate) size: Option<Size>,
    /// Denoising steps, from 1 to the model's limit. Default: the model's.
    #[arg(long, value_name = "N")]
    pub(crate) steps: Option<u32>,
    /// Strength of guidance, from 0; 1 means none. Default: the model's.
    #[arg(long, value_name = "SCALE", allow_negative_numbers = true)]
    pub(crate) guidance: Option<f32>,
    /// How much of the contrast that guidance adds is taken back, 0 to 1, for models that offer it. Default: 0.
    #[arg(long, value_name = "SHARE")]
    pub(crate) guidance_rescale: Option<f32>,
    /// Which part of the steps is guided, for models that offer it: 0.2..0.8 leaves out the first and the last fifth. Default: 0..1.
    #[arg(long, value_name = "FROM..TO", value_parser = items::range)]
    pub(crate) guidance_range: Option<(f32, f32)>,
    /// Seed of the noise, a whole number; image number i uses the seed plus i - 1. Default: a random one.
    #[arg(long, value_name = "SEED")]
    pub(crate) seed: Option<u64>,
    /// A seed for each image: 7,12,99.
    #[arg(long, value_name = "SEED,...", value_delimiter = ',', conflicts_with_all = ["seed", "count"])]
    pub(crate) seeds: Vec<u64>,
    /// Images to draw, 1 to 16.
    #[arg(short = 'n', long, value_name = "N", default_value_t = 1)]
    pub(crate) count: u32,
    /// File format. Default: what the output's name ends in, else png.
    #[arg(long)]
    pub(crate) format: Option<Format>,
    /// Sampler by name (euler, heun). Default: the model's first.
    #[arg(long, value_name = "NAME")]
    pub(crate) sampler: Option<String>,
    /// What to keep out of the picture, for models that offer it.
    #[arg(long, value_name = "TEXT")]
    pub(crate) negative: Option<String>,
    /// A PNG, JPEG or WebP to begin with instead of noise, for models that offer it. Without --size, the picture is as large as this one.
    #[arg(long, value_name = "FILE")]
    pub(crate) init_image: Option<PathBuf>,
    /// How much of --init-image is to change, above 0 up to 1: the share of the steps that are made. Default: 0.8.
    #[arg(long, value_name = "SHARE", requires = "init_image")]
    pub(crate) strength: Option<f32>,
    /// Where --init-image may change, for models that offer it: a picture of which white may, and black stays.
    #[arg(long, value_name = "FILE", requires = "init_image")]
    pub(crate) mask: Option<PathBuf>,
    /// A PNG, JPEG or WebP for the brain to read before the prompt, for models that offer it; again for more, in the order in which the prompt speaks of them.
    #[arg(long = "reference-image", value_name = "FILE")]
    pub(crate) reference_images: Vec<PathBuf>,
    /// How strongly reference images steer beside the prompt, 0.0 to 30.0; 1.0 and below mean no guidance by them. Default: the model's.
    #[arg(long, value_name = "SCALE")]
    pub(crate) image_guidance: Option<f32>,
    /// Time allowed for all images, above 0 and up to 24h: 90s, 5m. Default: the server's (10m).
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub(crate) deadline: Option<Duration>,
    /// Queue to wait in.
    #[arg(long, value_enum, default_value_t = LaneName::Interactive)]
    pub(crate) lane: LaneName,
    /// A preview every this many steps; 0 for none. Shown where the picture is.
    #[arg(long, value_name = "STEPS", default_value_t = 0)]
    pub(crate) preview_interval: u32,
    /// The same key with the same request gives the first job again instead of a new one. Up to 128 bytes. Default: a new key.
    #[arg(long, value_name = "KEY")]
    pub(crate) idempotency_key: Option<String>,
    /// Submit, print the job's id, and leave. Needs --server.
    #[arg(long)]
    pub(crate) detach: bool,
    /// Only ask how long it would take, by what the workers measured and what waits now. Needs --server.
    #[arg(long, conflicts_with = "detach")]
    pub(crate) quote: bool,
    /// Work in this process even if a server is configured.
    #[cfg(feature = "local")]
    #[arg(long, conflicts_with_all = ["server", "detach", "quote"])]
    pub(crate) local: bool,
    /// Print events as JSON, one object a line: "event" is accepted, queued, conditioning, rendering, step, preview, image (with
    /// "path"), done, failed or error.
    #[arg(long)]
    pub(crate) json: bool,
    /// Do not show the picture in the terminal.
    #[arg(long)]
    pub(crate) no_show: bool,
}

/// `efferent encode`.
#[derive(Debug, Args)]
pub(crate) struct Encode {
    /// What will be drawn, 1 to 4096 bytes of UTF-8.
    pub(crate) prompt: String,
    /// What to keep out of the picture, for models that offer it.
    #[arg(long, value_name = "TEXT")]
    pub(crate) negative: Option<String>,
    /// A PNG, JPEG or WebP for the brain to read before the prompt, for models that offer it; again for more.
    #[arg(long = "reference-image", value_name = "FILE")]
    pub(crate) reference_images: Vec<PathBuf>,
    /// How long to keep the signal, up to the cluster's retention time (7 days): 2h, 3days. Default: 24h.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub(crate) keep: Option<Duration>,
    /// Time allowed, above 0 and up to 24h. Default: the server's (10m).
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub(crate) deadline: Option<Duration>,
    /// Queue to wait in.
    #[arg(long, value_enum, default_value_t = LaneName::Interactive)]
    pub(crate) lane: LaneName,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}
