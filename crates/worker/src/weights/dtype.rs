//! What the weights of a model's parts are kept as in memory.

use std::{collections::BTreeMap, str::FromStr};

use candle_core::DType;
use serde_json::{Map, Value};

/// A type of values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Dtype {
    /// As the file has them: half precision stays that, everything else becomes f32.
    #[default]
    Auto,
    /// Single precision.
    F32,
    /// Half precision with a short range: up to 65504.
    F16,
    /// Half precision with the range of f32.
    Bf16,
}

const NAMES: [(&str, Dtype); 4] =
    [("auto", Dtype::Auto), ("f32", Dtype::F32), ("f16", Dtype::F16), ("bf16", Dtype::Bf16)];

impl FromStr for Dtype {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = NAMES.iter().find(|(known, _)| *known == name);
        found.map(|(_, dtype)| *dtype).ok_or_else(|| format!("{name:?} is not auto, f32, f16 or bf16"))
    }
}

/// What one part's matrices are kept as. Vectors (norms, biases) are always kept in f32: they are few.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keep {
    dtype: Dtype,
    /// Whether f16 holds what the part computes; if not, f32 is taken for it.
    f16: bool,
}

impl Keep {
    /// Everything in f32.
    pub const F32: Self = Self { dtype: Dtype::F32, f16: false };

    /// What a matrix that is stored as `stored` is kept as.
    pub(super) fn matrix(self, stored: DType) -> DType {
        match (self.dtype, stored) {
            (Dtype::F16, _) | (Dtype::Auto, DType::F16) if self.f16 => DType::F16,
            (Dtype::Bf16, _) | (Dtype::Auto, DType::BF16) => DType::BF16,
            _ => DType::F32,
        }
    }
}

impl From<Dtype> for Keep {
    fn from(dtype: Dtype) -> Self {
        Self { dtype, f16: true }
    }
}

/// What is asked of the parts of a model: of some by name, of the others one for all.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Dtypes {
    others: Dtype,
    named: BTreeMap<String, Dtype>,
}

/// A part is to be kept in f16, which does not hold what it computes.
#[derive(Debug, thiserror::Error)]
#[error("{part} is not kept in f16: {why}; bf16 and f32 are offered")]
pub struct Refused {
    part: String,
    why: String,
}

impl Dtypes {
    /// What a part of this name and configuration (`config.json`) is kept as.
    ///
    /// Some networks compute values that f16 does not hold, whatever type their weights are stored as. Where f16 is asked of a whole model, or a file has it,
    /// these are kept in f32.
    ///
    /// # Errors
    /// If f16 is asked of such a part by its name.
    pub fn of(&self, part: &str, config: &Map<String, Value>) -> Result<Keep, Refused> {
        let why = beyond_f16(config);
        let named = self.named.get(part).copied();
        match (named, why) {
            (Some(Dtype::F16), Some(why)) => Err(Refused { part: part.to_owned(), why }),
            (_, why) => Ok(Keep { dtype: named.unwrap_or(self.others), f16: why.is_none() }),
        }
    }

    /// The same for a part that is one file of its own (a connector, the small hand that ships): small, and computed over and over, so it is f32 unless it is named
    /// or another type is asked of all.
    pub fn of_file(&self, part: &str) -> Keep {
        match self.named.get(part).copied().unwrap_or(self.others) {
            Dtype::Auto => Keep::F32,
            asked => asked.into(),
        }
    }

    /// The parts that are named.
    pub fn named(&self) -> impl Iterator<Item = &str> {
        self.named.keys().map(String::as_str)
    }
}

/// Why f16 does not hold what a part of this configuration computes, if so.
fn beyond_f16(config: &Map<String, Value>) -> Option<String> {
    let class = config.get("_class_name").or_else(|| config.get("architectures")?.get(0)).and_then(Value::as_str)?;
    let upcast = config.get("force_upcast").and_then(Value::as_bool) == Some(true);
    match class {
        // What diffusers' documentation of Sana asks for.
        _ if class == "AutoencoderDC" || class.starts_with("Gemma2") => {
            Some(format!("values of {class} overflow there"))
        }
        "AutoencoderKL" if upcast => Some("its configuration says force_upcast".to_owned()),
        _ => None,
    }
}

/// `bf16` for all parts, `vae=f32,transformer=bf16` for some, `bf16,vae=f32` for all but some.
impl FromStr for Dtypes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (mut others, mut named) = (None, BTreeMap::new());
        for item in text.split(',').map(str::trim).filter(|item| !item.is_empty()) {
            let again = match item.split_once('=') {
                Some((part, dtype)) => named.insert(part.trim().to_owned(), dtype.trim().parse()?).is_some(),
                None => others.replace(item.parse()?).is_some(),
            };
            if again {
                return Err(format!("{item:?}: a part has one type"));
            }
        }
        Ok(Self { others: others.unwrap_or_default(), named })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn keep(asked: &str, part: &str, config: Value) -> Result<Keep, Refused> {
        asked.parse::<Dtypes>().unwrap().of(part, config.as_object().unwrap())
    }

    #[test]
    fn parts_by_name_and_all_others() {
        let matrix = |asked: &str, part: &str, stored| keep(asked, part, json!({})).unwrap().matrix(stored);
        assert_eq!(matrix("", "vae", DType::BF16), DType::BF16);
        assert_eq!(matrix("auto", "vae", DType::F16), DType::F16);
        assert_eq!(matrix("auto", "vae", DType::F64), DType::F32);
        assert_eq!(matrix("f32", "vae", DType::F16), DType::F32);
        assert_eq!(matrix("bf16, vae=f32", "vae", DType::F16), DType::F32);
        assert_eq!(matrix("bf16, vae=f32", "unet", DType::F32), DType::BF16);
        assert_eq!(matrix("unet=f16", "vae", DType::BF16), DType::BF16);
        for wrong in ["f64", "vae=", "vae=int8", "f16,bf16", "vae=f16,vae=f16"] {
            assert!(wrong.parse::<Dtypes>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_f16_does_not_hold_is_kept_wide() {
        for config in [
            json!({"_class_name": "AutoencoderDC"}),
            json!({"architectures": ["Gemma2Model"]}),
            json!({"_class_name": "AutoencoderKL", "force_upcast": true}),
        ] {
            let whole = keep("f16", "vae", config.clone()).unwrap();
            assert_eq!(whole.matrix(DType::F16), DType::F32, "{config}");
            assert_eq!(keep("auto", "vae", config.clone()).unwrap().matrix(DType::F16), DType::F32, "{config}");
            assert_eq!(keep("auto", "vae", config.clone()).unwrap().matrix(DType::BF16), DType::BF16, "{config}");
            let error = keep("vae=f16", "vae", config).unwrap_err().to_string();
            assert!(error.starts_with("vae is not kept in f16"), "{error}");
        }
        let small = json!({"_class_name": "AutoencoderKL", "force_upcast": false});
        assert_eq!(keep("f16", "vae", small).unwrap().matrix(DType::F32), DType::F16);
    }
}
