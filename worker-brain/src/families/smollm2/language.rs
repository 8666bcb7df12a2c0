//! The language model in the GGUF file, as far as it is read.

use candle_core::{Device, Tensor, quantized::gguf_file::Value};
use efferent_worker::{
    nn::{
        decoder::{Config, Decoder, Naming, RotaryPairs},
        ops::Activation,
    },
    weights::{self, Gguf, Keep, Weights},
};

use crate::language::loading;

/// Why there is no language model.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be used.
    #[error(transparent)]
    File(#[from] weights::Error),
    /// The file is of another model.
    #[error("the file's {key}: {what}")]
    Malformed {
        /// Key in the file's metadata.
        key: String,
        /// What is wrong.
        what: String,
    },
    /// The model cannot be built.
    #[error("the language model cannot be built")]
    Build(#[from] candle_core::Error),
}

/// Largest size that a file may claim; more than any model of this family has, and small enough to multiply.
const MAX_SIZE: usize = 1 << 20;

/// The model up to the layer that is read.
#[derive(Debug)]
pub struct Language {
    decoder: Decoder,
    layer: usize,
}

impl Language {
    /// Reads the embeddings and the first `layer` layers, dequantised: on CPU that is ten times as fast as quantised products.
    ///
    /// # Errors
    /// If the file is malformed, of another architecture, or has fewer layers.
    pub fn read(file: &Gguf, layer: usize, devices: &[Device], keep: Keep) -> Result<Self, Error> {
        let metadata = file.metadata();
        let bad = |key: &str, what: String| Error::Malformed { key: key.to_owned(), what };
        let field = |key: &str| metadata.get(key).ok_or_else(|| bad(key, "is missing".to_owned()));
        let number = |key: &str| {
            let key = format!("llama.{key}");
            let value = size(field(&key)?).ok_or_else(|| bad(&key, "is no size".to_owned()))?;
            if value <= MAX_SIZE {
                Ok(value)
            } else {
                Err(bad(&key, format!("{value} is over the limit of {MAX_SIZE}")))
            }
        };
        let real = |key: &str| field(key)?.to_f32().map(f64::from).map_err(|error| bad(key, error.to_string()));
        let architecture = field("general.architecture")?.to_string().map_err(Error::Build)?;
        if architecture != "llama" {
            return Err(bad("general.architecture", format!("is {architecture:?}; this family has \"llama\"")));
        }
        let layers = number("block_count")?;
        if layer == 0 || layer > layers {
            return Err(bad("llama.block_count", format!("the pipeline reads layer {layer}, the model has {layers}")));
        }
        let (width, heads) = (number("embedding_length")?, number("attention.head_count")?);
        if heads == 0 || width % heads != 0 {
            return Err(bad("llama.attention.head_count", format!("{heads} does not divide {width}")));
        }
        let tokens = field("tokenizer.ggml.tokens")?.to_vec().map_err(Error::Build)?.len();
        let config = Config {
            vocabulary: tokens,
            width,
            layers: layer,
            heads,
            key_heads: number("attention.head_count_kv")?,
            head_width: width / heads,
            mlp_width: number("feed_forward_length")?,
            rotary_base: real("llama.rope.freq_base")?,
            rotary_stretch: None,
            longest: None,
            rotary_pairs: RotaryPairs::Neighbours,
            rotary_axes: None,
            norm_eps: real("llama.attention.layer_norm_rms_epsilon")?,
            norm_offset: false,
            activation: Activation::Silu,
            projection_bias: false,
            head_norm: false,
            output_norm: false,
            scaled_embedding: false,
            logit_width: None,
            soft_cap: None,
            sliding_window: None,
        };
        let mut weights = Weights::from_gguf(file, loading(devices), keep, |name| Naming::Gguf.wants(name, layer))?;
        let decoder = Decoder::new(config, Naming::Gguf, &mut weights)?;
        weights.finish()?;
        let decoder = decoder.spread(devices)?;
        Ok(Self { decoder, layer })
    }

    /// Channels of a state.
    pub fn width(&self) -> usize {
        self.decoder.config().width
    }

    /// Where it computes.
    pub fn device(&self) -> &Device {
        self.decoder.device()
    }

    /// ids u32 (batch, tokens); mask (batch, tokens), 1 = present -> states (batch, tokens, width)
    ///
    /// # Errors
    /// If the computation fails.
    pub fn states(&self, ids: &Tensor, mask: &Tensor) -> candle_core::Result<Tensor> {
        let mut states = self.decoder.states(&self.decoder.embed(ids)?, mask, &[self.layer])?;
        states.pop().ok_or_else(|| candle_core::Error::Msg("no states".to_owned()))
    }
}

fn size(value: &Value) -> Option<usize> {
    value.to_u32().map(u64::from).or_else(|_| value.to_u64()).ok().and_then(|size| usize::try_from(size).ok())
}
