//! Tokenizers in the folders that transformers saves: `tokenizer.json`, or CLIP's `vocab.json` and `merges.txt`.

use std::{
    collections::HashMap,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
};

use efferent_worker::{
    pipeline::{self, read_json},
    thread::panic_message,
};
use serde::Deserialize;
use serde_json::{Map, Value};
use tokenizers::{
    AddedToken, SplitDelimiterBehavior, Tokenizer as Inner,
    models::bpe::BPE,
    normalizers::{self, NormalizerWrapper},
    pre_tokenizers::{
        PreTokenizerWrapper,
        byte_level::ByteLevel,
        sequence::Sequence,
        split::{Split, SplitPattern},
    },
    processors::roberta::RobertaProcessing,
};

/// Most bytes of a tokenizer's file.
const MAX_FILE: u64 = 64 << 20;

/// Why there is no tokenizer, or no tokens.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A configuration cannot be read.
    #[error(transparent)]
    Config(#[from] pipeline::Error),
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// A file is not one of a tokenizer.
    #[error("{}: {what}", path.display())]
    Malformed {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// The text cannot be split.
    #[error("the tokenizer failed: {0}")]
    Encode(String),
}

/// Text to token ids.
#[derive(Debug)]
pub struct Tokenizer {
    inner: Box<Inner>,
    padding: u32,
}

/// A special token in a configuration: its text, or a description of it.
#[derive(Deserialize)]
#[serde(untagged)]
enum Special {
    Text(String),
    Described { content: String },
}

impl Special {
    fn text(self) -> String {
        match self {
            Self::Text(text) | Self::Described { content: text } => text,
        }
    }
}

impl Tokenizer {
    /// Reads a tokenizer's folder.
    ///
    /// # Errors
    /// If its files cannot be read or are malformed.
    pub fn open(folder: &Path) -> Result<Self, Error> {
        let whole = folder.join("tokenizer.json");
        let path = if whole.is_file() { whole } else { folder.join("merges.txt") };
        let length = std::fs::metadata(&path).map_err(|source| Error::Read { path: path.clone(), source })?.len();
        if length > MAX_FILE {
            return Err(Error::Malformed { path, what: format!("{length} bytes are over the limit of {MAX_FILE}") });
        }
        let text = std::fs::read_to_string(&path).map_err(|source| Error::Read { path: path.clone(), source })?;
        let special = special_tokens(folder)?;
        // The library trusts its input in places: a panic in it must not take the worker along.
        let built = match path.file_name() {
            Some(name) if name == "tokenizer.json" => guarded(|| text.parse::<Inner>()),
            _ => {
                let vocabulary: HashMap<String, u32> = read_json(&folder.join("vocab.json"))?;
                let named = |key: &str, usual: &str| special.get(key).cloned().unwrap_or_else(|| usual.to_owned());
                let (start, end) = (named("bos_token", "<|startoftext|>"), named("eos_token", "<|endoftext|>"));
                guarded(|| clip(vocabulary, &text, &start, &end))
            }
        };
        let mut inner = built.map_err(|what| Error::Malformed { path: path.clone(), what })?;
        // Texts are padded here, and what is too long is refused instead of cut.
        inner.with_padding(None);
        let _ = inner.with_truncation(None);
        let padding = special.get("pad_token").map_or("<|endoftext|>", String::as_str);
        let unknown = || Error::Malformed { path: path.clone(), what: format!("pad_token {padding:?} is no token") };
        let padding = inner.token_to_id(padding).ok_or_else(unknown)?;
        Ok(Self { inner: Box::new(inner), padding })
    }

    /// Token ids of a text, with the start and the end that the tokenizer adds. Special tokens in the text count as such.
    ///
    /// # Errors
    /// If the tokenizer fails.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        let encoding = guarded(|| self.inner.encode(text, true)).map_err(Error::Encode)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of ids, without special tokens.
    ///
    /// # Errors
    /// If the tokenizer fails.
    pub fn decode(&self, ids: &[u32]) -> Result<String, Error> {
        guarded(|| self.inner.decode(ids, true)).map_err(Error::Encode)
    }

    /// The token that texts are padded with.
    pub fn padding(&self) -> u32 {
        self.padding
    }

    /// The largest id.
    pub fn largest(&self) -> usize {
        self.inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize)
    }
}

/// Special tokens by their field: of `special_tokens_map.json` or else `tokenizer_config.json`.
fn special_tokens(folder: &Path) -> Result<HashMap<String, String>, Error> {
    let mut found = HashMap::new();
    for file in ["tokenizer_config.json", "special_tokens_map.json"] {
        let path = folder.join(file);
        if !path.is_file() {
            continue;
        }
        let fields: Map<String, Value> = read_json(&path)?;
        for (field, value) in fields.into_iter().filter(|(field, _)| field.ends_with("_token")) {
            if let Ok(token) = Special::deserialize(value) {
                found.insert(field, token.text());
            }
        }
    }
    Ok(found)
}

fn guarded<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(done) => done.map_err(|error| error.to_string()),
        Err(panic) => Err(panic_message(panic.as_ref())),
    }
}

/// Letters, digits one by one, and the rest, in runs: how CLIP cuts a text before its bytes are paired.
const CLIP_WORDS: &str = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// CLIP's tokenizer: lower case, and byte pairs of words that know their end.
fn clip(vocabulary: HashMap<String, u32>, merges: &str, start: &str, end: &str) -> tokenizers::Result<Inner> {
    let pairs = merges.lines().filter(|line| !line.starts_with("#version") && !line.trim().is_empty());
    let pairs = pairs.map(|line| match line.split_once(' ') {
        Some((left, right)) => Ok((left.to_owned(), right.to_owned())),
        None => Err(format!("{line:?} is no pair")),
    });
    let pairs = pairs.collect::<Result<Vec<_>, _>>()?;
    let id = |token: &str| vocabulary.get(token).copied().ok_or_else(|| format!("{token:?} is not in vocab.json"));
    let (start_id, end_id) = (id(start)?, id(end)?);
    let bpe = BPE::builder()
        .vocab_and_merges(vocabulary.into_iter().collect::<tokenizers::models::bpe::Vocab>(), pairs)
        .continuing_subword_prefix(String::new())
        .end_of_word_suffix("</w>".to_owned())
        .unk_token(end.to_owned())
        .build()?;
    let mut inner = Inner::new(bpe);
    let spaces = normalizers::Replace::new(normalizers::replace::ReplacePattern::Regex(r"\s+".to_owned()), " ")?;
    let steps: [NormalizerWrapper; 3] = [normalizers::NFC.into(), spaces.into(), normalizers::Lowercase.into()];
    inner.with_normalizer(Some(normalizers::Sequence::new(steps.into())))?;
    let words = Split::new(SplitPattern::Regex(CLIP_WORDS.to_owned()), SplitDelimiterBehavior::Removed, true)?;
    let bytes = ByteLevel::new(false, true, true);
    inner.with_pre_tokenizer(Some(Sequence::new(vec![
        PreTokenizerWrapper::Split(words),
        PreTokenizerWrapper::ByteLevel(bytes),
    ])));
    let around = RobertaProcessing::new((end.to_owned(), end_id), (start.to_owned(), start_id));
    inner.with_post_processor(Some(around.trim_offsets(false).add_prefix_space(false)));
    inner.add_special_tokens([start, end].map(|token| AddedToken::from(token.to_owned(), true)))?;
    Ok(inner)
}
