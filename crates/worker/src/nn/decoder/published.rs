//! A decoder's configuration as transformers saves it (`config.json`): Llama, Mistral, Qwen2, Qwen3, Gemma, Gemma 2, and those that are the language half of a
//! model that also sees (LLaVA-OneVision, Qwen2.5-VL, Qwen3-VL, InternVL3).

use serde_json::{Map, Value};

use super::{super::ops::Activation, Config, RotaryAxes, RotaryPairs};

/// Fields whose other values are mathematics that are not here; `null` is one of the allowed.
const NEUTRAL: [(&str, &[&str]); 7] = [
    ("mlp_bias", &["false"]),
    ("use_sliding_window", &["false"]),
    ("rope_scaling", &[]),
    ("partial_rotary_factor", &["1.0", "1"]),
    ("use_bidirectional_attention", &["false"]),
    ("is_encoder_decoder", &["false"]),
    ("add_cross_attention", &["false"]),
];

/// Where models that also see keep the configuration of their language half.
const HALVES: [&str; 2] = ["text_config", "llm_config"];
/// What such models put before the names of its tensors, longest first; a plain model has the last.
const PREFIXES: [&str; 5] = ["model.language_model.", "language_model.model.", "language_model.", "model.", ""];
/// The first tensor of a decoder.
const FIRST: &str = "embed_tokens.weight";

/// What stands before the names of the decoder's tensors in a file that has these.
pub fn prefix<'a>(names: impl Iterator<Item = &'a str> + Clone) -> Option<&'static str> {
    PREFIXES.into_iter().find(|prefix| names.clone().any(|name| name.strip_prefix(prefix) == Some(FIRST)))
}

impl Config {
    /// Reads what transformers saved.
    ///
    /// # Errors
    /// Names the field that is missing, malformed, or asks for what is not computed here.
    pub fn published(fields: &Map<String, Value>) -> Result<Self, String> {
        if let Some(half) = HALVES.into_iter().find_map(|half| fields.get(half)?.as_object()) {
            return Self::published(half);
        }
        for (field, allowed) in NEUTRAL {
            if let Some(value) = fields.get(field)
                && !value.is_null()
                && !(field == "rope_scaling" && is_plain_rope(value))
                && !allowed.contains(&&*value.to_string())
            {
                return Err(format!("{field} = {value} is not known"));
            }
        }
        let named = fields.get("model_type").and_then(Value::as_str).unwrap_or_default();
        let kind = match named {
            // The first is that of published files, whose fields are those of the language half and what sees beside it.
            "qwen2_5_vl" | "qwen2_5_vl_text" => "qwen2",
            "qwen3_vl_text" => "qwen3",
            kind => kind,
        };
        let (gemma, gemma2) = (matches!(kind, "gemma" | "gemma2"), kind == "gemma2");
        if !gemma && !matches!(kind, "llama" | "mistral" | "qwen2" | "qwen3") {
            return Err(format!("model_type {kind:?}; known are gemma, gemma2, llama, mistral, qwen2, qwen3"));
        }
        let optional = |field: &str| match fields.get(field) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => {
                let number = value.as_u64().and_then(|value| usize::try_from(value).ok());
                number.map(Some).ok_or_else(|| format!("{field} = {value} is no size"))
            }
        };
        let size = |field: &str| optional(field)?.ok_or_else(|| format!("{field} is missing"));
        let number = |field: &str, usual: f64| match fields.get(field) {
            None | Some(Value::Null) => Ok(usual),
            Some(value) => value.as_f64().ok_or_else(|| format!("{field} = {value} is no number")),
        };
        let flag = |field: &str| fields.get(field).and_then(Value::as_bool).unwrap_or(false);
        if flag("attention_bias") && kind != "qwen2" {
            return Err("attention_bias = true is not known".to_owned());
        }
        if kind == "mistral" && fields.get("sliding_window").is_some_and(|window| !window.is_null()) {
            return Err("sliding_window in every layer is not known".to_owned());
        }
        layer_types(fields, gemma2)?;
        let activation = ["hidden_activation", "hidden_act"].into_iter().find_map(|field| fields.get(field)?.as_str());
        let activation = match activation {
            Some("silu") => Activation::Silu,
            // Gemma was published with "gelu" where it computes the tanh form.
            Some("gelu_pytorch_tanh") => Activation::GeluTanh,
            None | Some("gelu") if gemma => Activation::GeluTanh,
            other => return Err(format!("hidden_act = {other:?} is not known")),
        };
        let (width, heads) = (size("hidden_size")?, size("num_attention_heads")?);
        let head_width = optional("head_dim")?.unwrap_or(width / heads.max(1));
        Ok(Self {
            vocabulary: size("vocab_size")?,
            width,
            layers: size("num_hidden_layers")?,
            heads,
            key_heads: optional("num_key_value_heads")?.unwrap_or(heads),
            head_width,
            mlp_width: size("intermediate_size")?,
            rotary_base: rotary_base(fields)?,
            rotary_pairs: RotaryPairs::Halves,
            rotary_axes: rotary_axes(fields, named, head_width)?,
            norm_eps: number("rms_norm_eps", 1e-6)?,
            norm_offset: gemma,
            activation,
            projection_bias: kind == "qwen2",
            head_norm: kind == "qwen3",
            output_norm: gemma2,
            scaled_embedding: gemma,
            logit_width: if gemma2 { optional("query_pre_attn_scalar")? } else { None },
            soft_cap: if gemma2 { Some(number("attn_logit_softcapping", 50.0)?) } else { None },
            sliding_window: if gemma2 { optional("sliding_window")? } else { None },
        })
    }
}

/// Whether the table of embeddings predicts tokens too.
pub fn is_tied(fields: &Map<String, Value>) -> bool {
    let half = HALVES.into_iter().find_map(|half| fields.get(half)?.as_object());
    let said =
        [Some(fields), half].into_iter().flatten().filter_map(|fields| fields.get("tie_word_embeddings")?.as_bool());
    let gemma =
        half.unwrap_or(fields).get("model_type").and_then(Value::as_str).is_some_and(|kind| kind.starts_with("gemma"));
    said.reduce(|outer, inner| outer || inner).unwrap_or(gemma)
}

/// What GGUF calls the architecture of a configuration.
pub fn gguf_architecture(fields: &Map<String, Value>) -> &str {
    let half = HALVES.into_iter().find_map(|half| fields.get(half)?.as_object()).unwrap_or(fields);
    match half.get("model_type").and_then(Value::as_str).unwrap_or_default() {
        "mistral" => "llama",
        "qwen2_5_vl" | "qwen2_5_vl_text" => "qwen2vl",
        "qwen3_vl_text" => "qwen3vl",
        kind => kind,
    }
}

/// How the pairs of a model that also sees are dealt out over time, row and column: `mrope_section`.
fn rotary_axes(fields: &Map<String, Value>, kind: &str, head_width: usize) -> Result<Option<RotaryAxes>, String> {
    let (usual, woven) = match kind {
        "qwen2_5_vl" | "qwen2_5_vl_text" => ([16, 24, 24], false),
        "qwen3_vl_text" => ([24, 20, 20], true),
        _ => return Ok(None),
    };
    let parameters = ["rope_parameters", "rope_scaling"].into_iter().filter_map(|field| fields.get(field));
    let counts = match parameters.filter_map(|parameters| parameters.get("mrope_section")).next() {
        None | Some(Value::Null) => usual,
        Some(sections) => {
            let said: Option<Vec<usize>> = sections
                .as_array()
                .and_then(|counts| counts.iter().map(|count| usize::try_from(count.as_u64()?).ok()).collect());
            let mut counts = [0; 3];
            let said = said.filter(|said| said.len() <= counts.len());
            let said = said.ok_or_else(|| format!("mrope_section = {sections} is not known"))?;
            counts[..said.len()].copy_from_slice(&said);
            counts
        }
    };
    if counts.iter().try_fold(0usize, |sum, count| sum.checked_add(*count)) != Some(head_width / 2) {
        return Err(format!("mrope_section = {counts:?} does not add up to half of a head's {head_width} channels"));
    }
    Ok(Some(if woven { RotaryAxes::Woven(counts) } else { RotaryAxes::InTurn(counts) }))
}

/// A `rope_scaling` that scales nothing, but for dealing pairs out (see [`rotary_axes`]).
fn is_plain_rope(value: &Value) -> bool {
    let kinds = ["type", "rope_type"].into_iter().filter_map(|field| value.get(field)?.as_str());
    let mut kinds = kinds.peekable();
    kinds.peek().is_some() && kinds.all(|kind| matches!(kind, "default" | "mrope"))
}

/// Refuses layers that see another part of the text than computed here: every one sees all of it, or (`alternate`) every second, from the first on, a window.
fn layer_types(fields: &Map<String, Value>, alternate: bool) -> Result<(), String> {
    let Some(Value::Array(kinds)) = fields.get("layer_types") else { return Ok(()) };
    let wanted = |layer: usize| match alternate && layer.is_multiple_of(2) {
        true => "sliding_attention",
        false => "full_attention",
    };
    match kinds.iter().enumerate().find(|(layer, kind)| kind.as_str() != Some(wanted(*layer))) {
        Some((layer, kind)) => Err(format!("layer_types: {kind} in layer {layer} is not known")),
        None => Ok(()),
    }
}

/// `rope_theta`, or in newer files `rope_parameters`, which may name a kind of scaling.
fn rotary_base(fields: &Map<String, Value>) -> Result<f64, String> {
    let theta = |fields: &Map<String, Value>| match fields.get("rope_theta") {
        None | Some(Value::Null) => Ok(10_000.0),
        Some(value) => value.as_f64().ok_or_else(|| format!("rope_theta = {value} is no number")),
    };
    match fields.get("rope_parameters") {
        None | Some(Value::Null) => theta(fields),
        Some(Value::Object(parameters)) => match parameters.get("rope_type").and_then(Value::as_str) {
            None | Some("default") => theta(parameters),
            Some(other) => Err(format!("rope_type {other:?} is not known")),
        },
        Some(other) => Err(format!("rope_parameters = {other} is not known")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(changes: &Value) -> Result<Config, String> {
        let mut fields = json!({
            "model_type": "qwen3", "vocab_size": 10, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 6, "intermediate_size": 12, "rms_norm_eps": 1e-6, "hidden_act": "silu",
            "rope_parameters": { "rope_type": "default", "rope_theta": 1e6 }, "use_sliding_window": false, "rope_scaling": null,
        });
        let fields = fields.as_object_mut().unwrap();
        fields.extend(changes.as_object().unwrap().clone());
        Config::published(fields)
    }

    #[test]
    fn families_by_their_type() {
        let qwen = read(&json!({})).unwrap();
        assert!(qwen.head_norm && !qwen.projection_bias && qwen.head_width == 6 && qwen.rotary_base == 1e6);
        let old = read(&json!({ "model_type": "qwen2", "rope_parameters": null, "rope_theta": 5.0, "head_dim": null }))
            .unwrap();
        assert!(old.projection_bias && old.head_width == 4 && old.rotary_base == 5.0);
        let gemma = json!({ "model_type": "gemma2", "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 4, "sliding_window": 3 });
        let gemma = read(&gemma).unwrap();
        assert_eq!((gemma.logit_width, gemma.soft_cap, gemma.sliding_window), (Some(4), Some(50.0), Some(3)));
    }

    #[test]
    fn the_language_half_of_a_model_that_sees() {
        let half = read(
            &json!({ "model_type": "qwen2_5_vl_text", "rope_scaling": { "type": "mrope", "mrope_section": [1, 1, 1] } }),
        );
        let half = half.unwrap();
        assert_eq!((half.projection_bias, half.rotary_axes), (true, Some(RotaryAxes::InTurn([1, 1, 1]))));
        let woven =
            json!({ "rope_type": "default", "mrope_section": [1, 2], "mrope_interleaved": true, "rope_theta": 5e6 });
        let half = read(&json!({ "model_type": "qwen3_vl_text", "rope_parameters": woven })).unwrap();
        assert_eq!((half.head_norm, half.rotary_axes), (true, Some(RotaryAxes::Woven([1, 2, 0]))));
        let whole = json!({ "model_type": "internvl_chat", "llm_config": { "model_type": "qwen2" } });
        assert_eq!(Config::published(whole.as_object().unwrap()).unwrap_err(), "hidden_act = None is not known");
        for (names, wanted) in [
            (vec!["embed_tokens.weight", "norm.weight"], Some("")),
            (vec!["lm_head.weight", "model.embed_tokens.weight"], Some("model.")),
            (
                vec!["visual.blocks.0.norm1.weight", "model.language_model.embed_tokens.weight"],
                Some("model.language_model."),
            ),
            (vec!["language_model.model.embed_tokens.weight"], Some("language_model.model.")),
            (vec!["norm.weight"], None),
        ] {
            assert_eq!(prefix(names.iter().copied()), wanted);
        }
    }

    #[test]
    fn what_is_not_computed_here_is_named() {
        for (changes, wanted) in [
            (
                json!({ "model_type": "qwen3_vl_text", "rope_scaling": { "type": "default", "mrope_section": [9, 9, 9] } }),
                "mrope_section = [9, 9, 9]",
            ),
            (
                json!({ "model_type": "qwen2_5_vl_text", "rope_scaling": { "type": "default", "mrope_section": "3" } }),
                "mrope_section",
            ),
            (json!({ "model_type": "falcon" }), "model_type \"falcon\""),
            (json!({ "rope_scaling": { "factor": 2 } }), "rope_scaling"),
            (json!({ "rope_parameters": { "rope_type": "yarn" } }), "rope_type \"yarn\""),
            (json!({ "attention_bias": true }), "attention_bias"),
            (json!({ "hidden_act": "relu" }), "hidden_act"),
            (json!({ "hidden_size": "8" }), "hidden_size = \"8\" is no size"),
            (json!({ "vocab_size": null }), "vocab_size is missing"),
            (json!({ "layer_types": ["full_attention", "sliding_attention"] }), "\"sliding_attention\" in layer 1"),
            (json!({ "model_type": "mistral", "sliding_window": 8 }), "sliding_window"),
        ] {
            let error = read(&changes).unwrap_err();
            assert!(error.contains(wanted), "{error}");
        }
    }
}
