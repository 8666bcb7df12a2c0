//! Pictures before a prompt, for language models that also see.

use std::{path::Path, sync::Arc};

use candle_core::{Device, Tensor};
use efferent_proto::{ApiError, v1::ErrorCode};
use efferent_worker::{
    engine::{EngineError, Reference},
    nn::{
        decoder::Sight,
        vision::{Config as VisionConfig, Seen, Stretch, Vision, patches::Preparation, places},
    },
    pipeline::{diffusers, read_json},
    weights::{Dtypes, Weights},
};
use image::RgbImage;
use serde::Deserialize;

use crate::families::unloadable;

/// `brain.config.pictures` of a pipeline.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Config {
    /// What is written before and after each picture.
    around: (String, String),
    /// Pixels that a picture is scaled up to, if it has fewer.
    min_pixels: usize,
    /// Pixels that a picture is scaled down to, if it has more.
    max_pixels: usize,
    /// Taken from red, green and blue, each of 0 to 1, if not as the published models do.
    #[serde(default)]
    mean: Option<[f32; 3]>,
    /// What is left is divided by, likewise.
    #[serde(default)]
    deviation: Option<[f32; 3]>,
}

/// What sees.
#[derive(Debug)]
pub(super) struct Eyes {
    around: (String, String),
    preparation: Preparation,
    vision: Vision,
}

/// What a picture came to.
#[derive(Debug)]
pub(super) struct View {
    seen: Seen,
    at: Stretch,
}

/// A picture that is read.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Shown {
    /// One of a request.
    Picture(Arc<Reference>),
    /// A black one of this width and height.
    Black((u32, u32)),
}

impl Eyes {
    /// What sees of the model of a folder, before a language model of states of `width` channels.
    ///
    /// # Errors
    /// If a file cannot be read, is malformed, or is not of a model that sees as is known here.
    pub(super) fn open(
        config: Config,
        folder: &Path,
        width: usize,
        device: &Device,
        dtypes: &Dtypes,
    ) -> Result<Self, EngineError> {
        let unloadable = unloadable("what sees");
        let fields = read_json(&folder.join("config.json")).map_err(|e| unloadable(e.into()))?;
        let vision = VisionConfig::published(&fields).map_err(|e| unloadable(e.into()))?;
        if vision.out_width != width {
            let message = format!("what sees gives {} channels, the language model reads {width}", vision.out_width);
            return Err(unloadable(message.into()));
        }
        let Config { around, min_pixels, max_pixels, mean, deviation } = config;
        let usual = Preparation::usual(&vision.kind, min_pixels, max_pixels);
        let preparation =
            Preparation { mean: mean.unwrap_or(usual.mean), deviation: deviation.unwrap_or(usual.deviation), ..usual };
        let whole = |values: &[f32; 3], least: f32| values.iter().all(|value| value.is_finite() && *value >= least);
        if !whole(&preparation.mean, 0.0) || !whole(&preparation.deviation, 1e-3) {
            return Err(unloadable("brain.config.pictures: mean and deviation are of 0 to 1".into()));
        }
        // The longest picture is one token high.
        if min_pixels > max_pixels || max_pixels < vision.multiple() * vision.multiple() {
            return Err(unloadable(format!("brain.config.pictures: {min_pixels} to {max_pixels} pixels").into()));
        }
        let name = folder.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        let keep = dtypes.of(&name, &fields)?;
        let (files, variant) = diffusers::weights(folder).map_err(|e| unloadable(e.into()))?;
        if variant == diffusers::GGUF {
            return Err(unloadable("a GGUF file holds the language half alone; pictures need safetensors".into()));
        }
        let prefix = |name: &str| ["model.visual.", "visual."].into_iter().find(|prefix| name.starts_with(prefix));
        let mut weights = Weights::open_some(&files, device, keep, |name| prefix(name).is_some())
            .map_err(|e| unloadable(e.into()))?;
        weights.rename(|name| prefix(name).map_or(name, |prefix| &name[prefix.len()..]).to_owned());
        let vision = Vision::new(vision, &mut weights)?;
        weights.finish().map_err(|e| unloadable(e.into()))?;
        Ok(Self { around, preparation, vision })
    }

    /// Most tokens of a picture, without what is around it.
    pub(super) fn most_tokens(&self) -> usize {
        self.preparation.max_pixels / self.vision.config().multiple().pow(2)
    }

    /// Refuses pictures that cannot be read.
    ///
    /// # Errors
    /// If one is far longer than it is high, or the other way.
    pub(super) fn check(&self, size: (u32, u32)) -> Result<(), EngineError> {
        let fitted = self.preparation.fitted(size, self.vision.config().multiple());
        let refusal = |message| ApiError::new(ErrorCode::InvalidField, message).field("reference_images");
        fitted.map(drop).map_err(|message| refusal(message).into())
    }

    /// What a picture comes to.
    ///
    /// # Errors
    /// If it cannot be read.
    pub(super) fn see(&self, shown: &Shown) -> Result<View, EngineError> {
        let config = self.vision.config();
        let black;
        let picture = match shown {
            Shown::Picture(reference) => &reference.image,
            Shown::Black((width, height)) => {
                black = RgbImage::new(*width, *height);
                &black
            }
        };
        let patches = self.preparation.patches(picture, config)?;
        let at = Stretch::Picture { rows: patches.rows / config.merge, columns: patches.columns / config.merge };
        Ok(View { seen: self.vision.see(&patches)?, at })
    }

    /// A text with pictures between its two parts, and queries after it or not: what the language model reads (1, tokens, width), and where.
    ///
    /// # Errors
    /// If a picture or a text cannot be read.
    pub(super) fn read(
        &self,
        [before, after]: [&str; 2],
        pictures: &[&View],
        queries: Option<&Tensor>,
        embedded: impl Fn(&str) -> Result<Tensor, EngineError>,
    ) -> Result<(Tensor, Sight), EngineError> {
        let (mut rows, mut stretches) = (Vec::new(), Vec::new());
        // What is around a picture is one piece of text with what stands beside it, as it is for the published tokenizers, to which these tokens are special.
        let mut text = before.to_owned();
        for View { seen, at } in pictures {
            text.push_str(&self.around.0);
            let piece = embedded(&text)?;
            stretches.extend([Stretch::Text(piece.dim(1)?), *at]);
            rows.extend([piece, seen.tokens.unsqueeze(0)?]);
            text.clone_from(&self.around.1);
        }
        text.push_str(after);
        let piece = embedded(&text)?;
        stretches.push(Stretch::Text(piece.dim(1)?));
        rows.push(piece);
        if let Some(queries) = queries {
            stretches.push(Stretch::Text(queries.dim(1)?));
            rows.push(queries.clone());
        }
        let read = Tensor::cat(&rows, 1)?;
        let taps = pictures.first().map_or(0, |view| view.seen.added.len());
        let tap = |tap: usize| {
            // Nothing is added to texts.
            let mut pictures = pictures.iter().map(|view| &view.seen.added[tap]);
            let mut parts = Vec::new();
            for (stretch, row) in stretches.iter().zip(&rows) {
                parts.push(match stretch {
                    Stretch::Text(_) => row.zeros_like()?,
                    Stretch::Picture { .. } => {
                        pictures.next().map_or_else(|| row.zeros_like(), |added| added.unsqueeze(0))?
                    }
                });
            }
            Tensor::cat(&parts, 1)
        };
        let added = (0..taps).map(tap).collect::<candle_core::Result<_>>()?;
        Ok((read, Sight { places: places(&stretches), added }))
    }
}
