//! The tokenizer that lies in the GGUF file: byte-level byte-pair encoding, digits split one by one.

use std::panic::{AssertUnwindSafe, catch_unwind};

use candle_core::quantized::gguf_file::Value;
use efferent_worker::{thread::panic_message, weights::Gguf};
use tokenizers::{
    AddedToken, Tokenizer,
    models::bpe::{BPE, Vocab},
    pre_tokenizers::{PreTokenizerWrapper, byte_level::ByteLevel, digits::Digits, sequence::Sequence},
};

/// `tokenizer.ggml.token_type` of control tokens (`<|im_start|>`).
const CONTROL: i64 = 3;

/// Why there is no tokenizer, or no tokens.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file's tokenizer is not one that this family has.
    #[error("the file's {key}: {what}")]
    Malformed {
        /// Key in the file's metadata.
        key: &'static str,
        /// What is wrong.
        what: String,
    },
    /// The text cannot be split.
    #[error("the tokenizer failed: {0}")]
    Encode(String),
}

/// Text to token ids.
#[derive(Debug)]
pub struct Tokens(Box<Tokenizer>);

impl Tokens {
    /// Reads the tokenizer of a GGUF file.
    ///
    /// # Errors
    /// If its tokenizer is malformed or of another kind.
    pub fn read(file: &Gguf) -> Result<Self, Error> {
        let metadata = file.metadata();
        let field = |key: &'static str| match metadata.get(key) {
            Some(value) => Ok(value),
            None => Err(Error::Malformed { key, what: "is missing".to_owned() }),
        };
        let text = |key| field(key)?.to_string().map_err(malformed(key));
        let list = |key| field(key)?.to_vec().map_err(malformed(key));
        for (key, wanted) in [("tokenizer.ggml.model", "gpt2"), ("tokenizer.ggml.pre", "smollm")] {
            let found = text(key)?;
            if found != wanted {
                return Err(Error::Malformed { key, what: format!("is {found:?}; this family has {wanted:?}") });
            }
        }
        let texts = |key| {
            list(key)?.iter().map(|v| v.to_string().cloned().map_err(malformed(key))).collect::<Result<Vec<_>, _>>()
        };
        let tokens = texts("tokenizer.ggml.tokens")?;
        let merges = texts("tokenizer.ggml.merges")?
            .into_iter()
            .map(|merge| match merge.split_once(' ') {
                Some((left, right)) => Ok((left.to_owned(), right.to_owned())),
                None => Err(Error::Malformed { key: "tokenizer.ggml.merges", what: format!("{merge:?} is no pair") }),
            })
            .collect::<Result<Vec<_>, _>>()?;
        let kinds: Vec<i64> = list("tokenizer.ggml.token_type")?.iter().map(number).collect();
        let control = tokens.iter().zip(&kinds).filter(|(_, kind)| **kind == CONTROL);
        let control: Vec<AddedToken> = control.map(|(token, _)| AddedToken::from(token.clone(), true)).collect();
        let vocabulary: Vocab = tokens.into_iter().zip(0..).collect();
        // The library trusts its input in places: a panic in it must not take the worker along.
        let built = catch_unwind(AssertUnwindSafe(|| build(vocabulary, merges, control)));
        match built {
            Ok(Ok(tokenizer)) => Ok(Self(Box::new(tokenizer))),
            Ok(Err(error)) => Err(Error::Malformed { key: "tokenizer.ggml.merges", what: error.to_string() }),
            Err(panic) => Err(Error::Malformed { key: "tokenizer.ggml.merges", what: panic_message(panic.as_ref()) }),
        }
    }

    /// Token ids of a text; control tokens in it count as such.
    ///
    /// # Errors
    /// If the tokenizer fails.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        let encoding = self.0.encode(text, false).map_err(|error| Error::Encode(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }
}

fn build(vocabulary: Vocab, merges: Vec<(String, String)>, control: Vec<AddedToken>) -> tokenizers::Result<Tokenizer> {
    let mut tokenizer = Tokenizer::new(BPE::builder().vocab_and_merges(vocabulary, merges).build()?);
    let digits = PreTokenizerWrapper::Digits(Digits::new(true));
    let bytes = PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, true, true));
    tokenizer.with_pre_tokenizer(Some(Sequence::new(vec![digits, bytes])));
    tokenizer.add_special_tokens(control)?;
    Ok(tokenizer)
}

fn number(value: &Value) -> i64 {
    value.to_i32().map(i64::from).or_else(|_| value.to_u32().map(i64::from)).unwrap_or(-1)
}

fn malformed(key: &'static str) -> impl Fn(candle_core::Error) -> Error {
    move |error| Error::Malformed { key, what: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Metadata = Vec<(&'static str, Value)>;

    fn texts(texts: &[&str]) -> Value {
        Value::Array(texts.iter().map(|text| Value::String((*text).to_owned())).collect())
    }

    fn good() -> Metadata {
        vec![
            ("tokenizer.ggml.model", Value::String("gpt2".to_owned())),
            ("tokenizer.ggml.pre", Value::String("smollm".to_owned())),
            ("tokenizer.ggml.tokens", texts(&["a", "b", "ab", "<|im_start|>"])),
            ("tokenizer.ggml.merges", texts(&["a b"])),
            ("tokenizer.ggml.token_type", Value::Array([1, 1, 1, 3].map(Value::I32).to_vec())),
        ]
    }

    fn open(metadata: &Metadata) -> Result<Tokens, Error> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.gguf");
        let entries: Vec<(&str, &Value)> = metadata.iter().map(|(key, value)| (*key, value)).collect();
        let mut file = std::fs::File::create(&path).unwrap();
        candle_core::quantized::gguf_file::write(&mut file, &entries, &[]).unwrap();
        Tokens::read(&Gguf::open(&path).unwrap())
    }

    #[test]
    fn a_small_tokenizer_reads() {
        assert_eq!(open(&good()).unwrap().encode("ab<|im_start|>ba").unwrap(), [2, 3, 1, 0]);
    }

    #[test]
    fn hostile_tokenizers_are_errors_that_name_the_key() {
        let cases: Vec<(&str, Option<Value>)> = vec![
            ("tokenizer.ggml.tokens", None),
            ("tokenizer.ggml.merges", None),
            ("tokenizer.ggml.token_type", None),
            ("tokenizer.ggml.model", Some(Value::String("llama".to_owned()))),
            ("tokenizer.ggml.pre", Some(Value::U32(7))),
            ("tokenizer.ggml.tokens", Some(Value::String("a".to_owned()))),
            ("tokenizer.ggml.tokens", Some(Value::Array(vec![Value::U8(1)]))),
            ("tokenizer.ggml.merges", Some(texts(&["ab"]))),
            ("tokenizer.ggml.merges", Some(texts(&["nobody knows"]))),
            ("tokenizer.ggml.merges", Some(texts(&["b a"]))),
        ];
        for (key, value) in cases {
            let mut metadata = good();
            metadata.retain(|(present, _)| *present != key);
            metadata.extend(value.clone().map(|value| (key, value)));
            let error = open(&metadata).expect_err("is refused");
            assert!(error.to_string().contains(key), "{key} {value:?}: {error}");
        }
        // Kinds that are too few or of a strange type mean ordinary tokens.
        for kinds in [Value::Array(Vec::new()), Value::Array(vec![Value::String("x".to_owned()); 9])] {
            let mut metadata = good();
            metadata.retain(|(key, _)| *key != "tokenizer.ggml.token_type");
            metadata.push(("tokenizer.ggml.token_type", kinds));
            open(&metadata).unwrap();
        }
    }
}
