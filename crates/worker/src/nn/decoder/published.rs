//! A decoder's configuration as transformers saves it (`config.json`): Llama, Mistral, Qwen2, Qwen3, Gemma, Gemma 2, and those that are the language half of a
//! model that also sees (LLaVA-OneVision, Qwen2.5-VL, Qwen3-VL, InternVL3).

use serde_json::{Map, Value};

use super::{
    super::{ops::Activation, rotary::Stretch},
    Config, RotaryAxes, RotaryPairs, Window,
};

/// Fields whose other values are mathematics that are not here; `null` is one of the allowed.
const NEUTRAL: [(&str, &[&str]); 6] = [
    ("mlp_bias", &["false"]),
    ("use_sliding_window", &["false"]),
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

/// What transformers takes for fields that are left out, as those are that are so in the language half of a model that also sees.
struct Usual {
    vocabulary: usize,
    width: usize,
    mlp_width: usize,
    layers: usize,
    heads: usize,
    /// As many as heads, if it is none.
    key_heads: Option<usize>,
    /// The width shared out over heads, if it is none.
    head_width: Option<usize>,
    positions: usize,
    rotary_base: f64,
    norm_eps: f64,
}

impl Usual {
    /// Of a `model_type`. Source: transformers 5.23, `models/*/configuration_*.py`.
    fn of(model_type: &str) -> Self {
        let llama = Self {
            vocabulary: 32_000,
            width: 4096,
            mlp_width: 11_008,
            layers: 32,
            heads: 32,
            key_heads: None,
            head_width: None,
            positions: 2048,
            rotary_base: 10_000.0,
            norm_eps: 1e-6,
        };
        let qwen = Self { vocabulary: 151_936, mlp_width: 22_016, key_heads: Some(32), positions: 32_768, ..llama };
        let gemma = Self { vocabulary: 256_000, head_width: Some(256), positions: 8192, ..llama };
        match model_type {
            "mistral" => Self { mlp_width: 14_336, key_heads: Some(8), positions: 131_072, ..llama },
            "qwen2" => qwen,
            "qwen2_5_vl" | "qwen2_5_vl_text" => Self {
                vocabulary: 152_064,
                width: 8192,
                mlp_width: 29_568,
                layers: 80,
                heads: 64,
                key_heads: Some(8),
                rotary_base: 1e6,
                norm_eps: 1e-5,
                ..qwen
            },
            "qwen3" => Self { head_width: Some(128), ..qwen },
            "qwen3_vl_text" => Self { head_width: Some(128), positions: 128_000, rotary_base: 5e5, ..qwen },
            "gemma" => Self { width: 3072, mlp_width: 24_576, layers: 28, heads: 16, key_heads: Some(16), ..gemma },
            "gemma2" => Self { width: 2304, mlp_width: 9216, layers: 26, heads: 8, key_heads: Some(4), ..gemma },
            _ => llama,
        }
    }
}

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
        let usual = Usual::of(named);
        let number = |field: &str, usual: f64| match fields.get(field) {
            None | Some(Value::Null) => Ok(usual),
            Some(value) => value.as_f64().ok_or_else(|| format!("{field} = {value} is no number")),
        };
        let optional = |field: &str, usual: Option<usize>| match fields.get(field) {
            None => Ok(usual),
            Some(Value::Null) => Ok(None),
            Some(value) => {
                let number = value.as_u64().and_then(|value| usize::try_from(value).ok());
                number.map(Some).ok_or_else(|| format!("{field} = {value} is no size"))
            }
        };
        let size =
            |field: &str, usual: usize| optional(field, Some(usual))?.ok_or_else(|| format!("{field} is missing"));
        let flag = |field: &str| fields.get(field).and_then(Value::as_bool).unwrap_or(false);
        if flag("attention_bias") && kind != "qwen2" {
            return Err("attention_bias = true is not known".to_owned());
        }
        let sliding_window = match kind {
            "gemma2" => optional("sliding_window", Some(4096))?.map(Window::EverySecond),
            "mistral" => optional("sliding_window", Some(4096))?.map(Window::Every),
            _ => None,
        };
        layer_types(fields, sliding_window)?;
        let activation = ["hidden_activation", "hidden_act"].into_iter().find_map(|field| fields.get(field)?.as_str());
        let activation = match activation {
            // Gemma was published with "gelu" where it computes the tanh form.
            None | Some("gelu") if gemma => Activation::GeluTanh,
            Some("gelu_pytorch_tanh") => Activation::GeluTanh,
            None | Some("silu") => Activation::Silu,
            other => return Err(format!("hidden_act = {other:?} is not known")),
        };
        let (width, heads) = (size("hidden_size", usual.width)?, size("num_attention_heads", usual.heads)?);
        let head_width = optional("head_dim", usual.head_width)?.unwrap_or(width / heads.max(1));
        let positions = size("max_position_embeddings", usual.positions)?;
        // `null` is no cap. (That of the logits of tokens, `final_logit_softcapping`, leaves the likeliest the likeliest.)
        let capped = gemma2 && fields.get("attn_logit_softcapping") != Some(&Value::Null);
        let Rotation { base, stretch, longest } = rotation(fields, usual.rotary_base, positions)?;
        Ok(Self {
            vocabulary: size("vocab_size", usual.vocabulary)?,
            width,
            layers: size("num_hidden_layers", usual.layers)?,
            heads,
            key_heads: optional("num_key_value_heads", usual.key_heads)?.unwrap_or(heads),
            head_width,
            mlp_width: size("intermediate_size", usual.mlp_width)?,
            rotary_base: base,
            rotary_stretch: stretch,
            longest,
            rotary_pairs: RotaryPairs::Halves,
            rotary_axes: rotary_axes(fields, named, head_width)?,
            norm_eps: number("rms_norm_eps", usual.norm_eps)?,
            norm_offset: gemma,
            activation,
            projection_bias: kind == "qwen2",
            head_norm: kind == "qwen3",
            output_norm: gemma2,
            scaled_embedding: gemma,
            logit_width: if gemma2 { optional("query_pre_attn_scalar", Some(256))? } else { None },
            soft_cap: if capped { Some(number("attn_logit_softcapping", 50.0)?) } else { None },
            sliding_window,
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

/// Refuses layers that see another part of the text than computed here.
fn layer_types(fields: &Map<String, Value>, window: Option<Window>) -> Result<(), String> {
    let Some(Value::Array(kinds)) = fields.get("layer_types") else { return Ok(()) };
    let wanted = |layer: usize| match window {
        Some(Window::EverySecond(_)) if !layer.is_multiple_of(2) => "full_attention",
        Some(_) => "sliding_attention",
        None => "full_attention",
    };
    match kinds.iter().enumerate().find(|(layer, kind)| kind.as_str() != Some(wanted(*layer))) {
        Some((layer, kind)) => Err(format!("layer_types: {kind} in layer {layer} is not known")),
        None => Ok(()),
    }
}

/// How positions turn.
struct Rotation {
    base: f64,
    stretch: Option<Stretch>,
    longest: Option<usize>,
}

/// `rope_theta` and `rope_scaling`, or in newer files `rope_parameters`, which has both.
fn rotation(fields: &Map<String, Value>, usual: f64, positions: usize) -> Result<Rotation, String> {
    let object = |field: &str| match fields.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Object(parameters)) => Ok(Some((field.to_owned(), parameters))),
        Some(other) => Err(format!("{field} = {other} is not known")),
    };
    let number = |of: &Map<String, Value>, field: &str| match of.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => value.as_f64().map(Some).ok_or_else(|| format!("{field} = {value} is no number")),
    };
    let said = object("rope_parameters")?;
    let base = match &said {
        Some((_, parameters)) => number(parameters, "rope_theta")?,
        None => None,
    };
    let base = base.or(number(fields, "rope_theta")?).unwrap_or(usual);
    let plain = Rotation { base, stretch: None, longest: None };
    let Some((name, parameters)) = said.or(object("rope_scaling")?) else { return Ok(plain) };
    if number(parameters, "partial_rotary_factor")?.is_some_and(|part| part != 1.0) {
        return Err(format!("partial_rotary_factor of {name} is not known"));
    }
    // Old files have the one name, new ones the other, and those between both.
    let mut kinds = ["rope_type", "type"].into_iter().filter_map(|field| parameters.get(field)?.as_str());
    let kind = match kinds.next() {
        None if name == "rope_parameters" || parameters.contains_key("mrope_section") => "default",
        None => return Err(format!("{name} = {} is not known", Value::Object(parameters.clone()))),
        // Pairs dealt out over axes, see [`rotary_axes`], turn as they do otherwise.
        Some("mrope") => "default",
        Some(kind) => kind,
    };
    if let Some(other) = kinds.find(|other| *other != kind && !(*other == "mrope" && kind == "default")) {
        return Err(format!("{name}: rope_type {kind:?} with type {other:?} is not known"));
    }
    let wanted = |field: &str| number(parameters, field)?.ok_or_else(|| format!("{name}: {field} is missing"));
    match kind {
        "default" => Ok(plain),
        // The base grows with what a text has more than these; up to them it is as it is said to be.
        "dynamic" => Ok(Rotation { longest: Some(positions), ..plain }),
        "llama3" => {
            let positions = number(parameters, "original_max_position_embeddings")?.unwrap_or(positions as f64);
            let (low, high) = (wanted("low_freq_factor")?, wanted("high_freq_factor")?);
            let stretch = Stretch { factor: wanted("factor")?, low, high, positions };
            if !(stretch.factor > 0.0 && positions > 0.0 && low < high) {
                return Err(format!("{name}: {stretch:?} cannot be"));
            }
            Ok(Rotation { stretch: Some(stretch), ..plain })
        }
        other => Err(format!("{name}: rope_type {other:?} is not known")),
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
        assert_eq!((gemma.logit_width, gemma.soft_cap), (Some(4), Some(50.0)));
        assert_eq!(gemma.sliding_window, Some(Window::EverySecond(3)));
    }

    #[test]
    fn what_is_left_out_is_as_in_transformers() {
        let published = |text: Value| Config::published(text.as_object().unwrap()).unwrap();
        let sizes = |config: &Config| {
            let Config { vocabulary, width, layers, heads, key_heads, head_width, mlp_width, .. } = *config;
            [vocabulary, width, layers, heads, key_heads, head_width, mlp_width]
        };
        for (kind, wanted, activation) in [
            ("llama", [32_000, 4096, 32, 32, 32, 128, 11_008], Activation::Silu),
            ("mistral", [32_000, 4096, 32, 32, 8, 128, 14_336], Activation::Silu),
            ("qwen2", [151_936, 4096, 32, 32, 32, 128, 22_016], Activation::Silu),
            ("qwen3", [151_936, 4096, 32, 32, 32, 128, 22_016], Activation::Silu),
            ("qwen2_5_vl_text", [152_064, 8192, 80, 64, 8, 128, 29_568], Activation::Silu),
            ("qwen3_vl_text", [151_936, 4096, 32, 32, 32, 128, 22_016], Activation::Silu),
            ("gemma", [256_000, 3072, 28, 16, 16, 256, 24_576], Activation::GeluTanh),
            ("gemma2", [256_000, 2304, 26, 8, 4, 256, 9216], Activation::GeluTanh),
        ] {
            let config = published(json!({ "model_type": kind }));
            assert_eq!((sizes(&config), config.activation), (wanted, activation), "{kind}");
        }
        let mistral = |window: Value| published(json!({ "model_type": "mistral", "sliding_window": window }));
        assert_eq!(published(json!({ "model_type": "mistral" })).sliding_window, Some(Window::Every(4096)));
        assert_eq!(mistral(json!(8)).sliding_window, Some(Window::Every(8)));
        assert_eq!(mistral(Value::Null).sliding_window, None);
        let gemma = published(json!({ "model_type": "gemma2", "attn_logit_softcapping": null }));
        assert_eq!((gemma.soft_cap, gemma.logit_width), (None, Some(256)), "null is no cap");
        assert_eq!(published(json!({ "model_type": "gemma2" })).soft_cap, Some(50.0));
    }

    #[test]
    fn rotations_in_the_spelling_of_old_and_new_files() {
        let llama = json!({ "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3" });
        let stretch = Some(Stretch { factor: 8.0, low: 1.0, high: 4.0, positions: 8192.0 });
        let mut new = llama.clone();
        new["rope_theta"] = json!(5e5);
        let dynamic = json!({ "factor": 2.0, "rope_type": "dynamic", "type": "dynamic" });
        let mrope = json!({ "type": "mrope", "rope_type": "default", "mrope_section": [1, 1, 1] });
        for (changes, base, stretch, longest) in [
            (json!({ "rope_parameters": null, "rope_scaling": llama, "rope_theta": 5e5 }), 5e5, stretch, None),
            (json!({ "rope_parameters": new }), 5e5, stretch, None),
            (
                json!({ "rope_parameters": null, "rope_scaling": dynamic, "rope_theta": 1e6, "max_position_embeddings": 32768 }),
                1e6,
                None,
                Some(32_768),
            ),
            (json!({ "rope_parameters": dynamic, "max_position_embeddings": 4096 }), 1e4, None, Some(4096)),
            (json!({ "rope_parameters": null, "rope_scaling": mrope, "rope_theta": 1e6 }), 1e6, None, None),
            (json!({ "rope_parameters": null }), 1e4, None, None),
        ] {
            let config = read(&changes).unwrap();
            let got = (config.rotary_base, config.rotary_stretch, config.longest);
            assert_eq!(got, (base, stretch, longest), "{changes}");
        }
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
        assert!(Config::published(whole.as_object().unwrap()).unwrap().projection_bias);
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
            (json!({ "rope_parameters": null, "rope_scaling": { "factor": 2 } }), "rope_scaling"),
            (json!({ "rope_parameters": { "rope_type": "yarn" } }), "rope_type \"yarn\""),
            (
                json!({ "rope_parameters": null, "rope_scaling": { "rope_type": "default", "type": "dynamic" } }),
                "type \"dynamic\"",
            ),
            (json!({ "rope_parameters": { "rope_type": "llama3", "factor": 8 } }), "low_freq_factor is missing"),
            (
                json!({ "rope_parameters": { "rope_type": "llama3", "factor": 0, "low_freq_factor": 1, "high_freq_factor": 4 } }),
                "cannot be",
            ),
            (json!({ "rope_parameters": { "partial_rotary_factor": 0.5 } }), "partial_rotary_factor"),
            (json!({ "attention_bias": true }), "attention_bias"),
            (json!({ "hidden_act": "relu" }), "hidden_act"),
            (json!({ "hidden_size": "8" }), "hidden_size = \"8\" is no size"),
            (json!({ "vocab_size": null }), "vocab_size is missing"),
            (json!({ "layer_types": ["full_attention", "sliding_attention"] }), "\"sliding_attention\" in layer 1"),
            (json!({ "model_type": "mistral", "sliding_window": "8" }), "sliding_window"),
        ] {
            let error = read(&changes).unwrap_err();
            assert!(error.contains(wanted), "{error}");
        }
    }
}
