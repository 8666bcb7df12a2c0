//! The tokenizer that lies in the GGUF file: byte-level byte-pair encoding, digits split one by one.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
};

use candle_core::quantized::gguf_file::Value;
use efferent_worker::{thread::panic_message, weights};
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
    /// The file cannot be used.
    #[error(transparent)]
    File(#[from] weights::Error),
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
    /// If the file is malformed or its tokenizer is of another kind.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let metadata = weights::gguf_metadata(path)?;
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
