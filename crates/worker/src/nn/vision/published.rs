//! The configuration of what sees, as transformers saves it: `vision_config` of a model's `config.json`.

use serde_json::{Map, Value};

use super::{Config, Kind};

impl Config {
    /// Reads what transformers saved of a whole model.
    ///
    /// # Errors
    /// If the model does not see, or in another way than is known; names a field that is missing or malformed.
    pub fn published(model: &Map<String, Value>) -> Result<Self, String> {
        let kind = model.get("model_type").and_then(Value::as_str).unwrap_or_default();
        let windowed = match kind {
            "qwen2_5_vl" => true,
            "qwen3_vl" => false,
            other => {
                return Err(format!("model_type {other:?} is not known to see; known are qwen2_5_vl, qwen3_vl"));
            }
        };
        let fields = model.get("vision_config").and_then(Value::as_object).ok_or("vision_config is missing")?;
        let size = |field: &str, usual: Option<usize>| match fields.get(field) {
            None | Some(Value::Null) => usual.ok_or_else(|| format!("vision_config.{field} is missing")),
            Some(value) => {
                let number = value.as_u64().and_then(|value| usize::try_from(value).ok());
                number.ok_or_else(|| format!("vision_config.{field} = {value} is no size"))
            }
        };
        let layers_of = |field: &str| {
            let layers = fields.get(field).and_then(Value::as_array).and_then(|layers| {
                layers.iter().map(|layer| usize::try_from(layer.as_u64()?).ok()).collect::<Option<Vec<_>>>()
            });
            layers.ok_or_else(|| format!("vision_config.{field} is missing, or no list of layers"))
        };
        let activation = if windowed { "silu" } else { "gelu_pytorch_tanh" };
        match fields.get("hidden_act") {
            None => {}
            Some(Value::String(name)) if name == activation => {}
            Some(other) => return Err(format!("vision_config.hidden_act = {other} is not known")),
        }
        for (field, only) in [("in_channels", 3), ("in_chans", 3)] {
            if size(field, Some(only))? != only {
                return Err(format!("vision_config.{field}: pictures have {only} channels"));
            }
        }
        let (patch, merge) =
            (size("patch_size", Some(if windowed { 14 } else { 16 }))?, size("spatial_merge_size", Some(2))?);
        let kind = match windowed {
            true => Kind::Windowed {
                window: size("window_size", Some(112))?.checked_div(patch * merge).unwrap_or(0),
                whole: layers_of("fullatt_block_indexes")?,
            },
            false => Kind::Tapped {
                places: size("num_position_embeddings", Some(2304))?.isqrt(),
                taps: layers_of("deepstack_visual_indexes")?,
            },
        };
        Ok(Self {
            width: size("hidden_size", None)?,
            layers: size("depth", None)?,
            heads: size("num_heads", None)?,
            mlp_width: size("intermediate_size", None)?,
            patch,
            frames: size("temporal_patch_size", Some(2))?,
            merge,
            out_width: size("out_hidden_size", None)?,
            rotary_base: rotary_base(fields)?,
            kind,
        })
    }
}

fn rotary_base(fields: &Map<String, Value>) -> Result<f64, String> {
    let parameters = match fields.get("rope_parameters") {
        None | Some(Value::Null) => return Ok(10_000.0),
        Some(parameters) => parameters,
    };
    match parameters.get("rope_type").and_then(Value::as_str) {
        None | Some("axial" | "default") => {}
        Some(other) => return Err(format!("vision_config: rope_type {other:?} is not known")),
    }
    match parameters.get("rope_theta") {
        None | Some(Value::Null) => Ok(10_000.0),
        Some(theta) => theta.as_f64().ok_or_else(|| format!("vision_config: rope_theta = {theta} is no number")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(kind: &str, vision: Value) -> Result<Config, String> {
        Config::published(json!({ "model_type": kind, "vision_config": vision }).as_object().unwrap())
    }

    #[test]
    fn published_files_are_read() {
        // Qwen2.5-VL-3B, as published.
        let config = read(
            "qwen2_5_vl",
            json!({ "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "in_chans": 3, "out_hidden_size": 2048,
                "patch_size": 14, "spatial_merge_size": 2, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "temporal_patch_size": 2 }),
        );
        let config = config.unwrap();
        assert_eq!(config.kind, Kind::Windowed { window: 4, whole: vec![7, 15, 23, 31] });
        assert_eq!((config.multiple(), config.frames), (28, 2));
        let deep = json!({ "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 2560, "deepstack_visual_indexes": [5, 11, 17] });
        let config = read("qwen3_vl", deep).unwrap();
        assert_eq!(config.kind, Kind::Tapped { places: 48, taps: vec![5, 11, 17] });
        assert_eq!(config.multiple(), 32);
    }

    #[test]
    fn what_is_not_computed_here_is_named() {
        for (kind, vision, wanted) in [
            ("llava", json!({}), "model_type \"llava\""),
            ("qwen3_vl", Value::Null, "vision_config is missing"),
            ("qwen3_vl", json!({ "deepstack_visual_indexes": [] }), "hidden_size is missing"),
            ("qwen2_5_vl", json!({ "fullatt_block_indexes": "all" }), "fullatt_block_indexes"),
            ("qwen2_5_vl", json!({ "hidden_act": "gelu" }), "hidden_act"),
            ("qwen2_5_vl", json!({ "in_channels": 4 }), "in_channels"),
        ] {
            let error = read(kind, vision).unwrap_err();
            assert!(error.contains(wanted), "{error}");
        }
    }
}
