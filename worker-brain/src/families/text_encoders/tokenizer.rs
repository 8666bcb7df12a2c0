//! Tokenizers in the folders that transformers saves: `tokenizer.json`, or `vocab.json` and `merges.txt` (`pairs`).

use std::{
    collections::HashMap,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
};

use efferent_worker::{
    pipeline::{self, read_json, read_json_of},
    thread::panic_message,
};
use serde::Deserialize;
use serde_json::{Map, Value};
use tokenizers::{AddedToken, Tokenizer as Inner};

use super::pairs;

/// Most bytes of a tokenizer's file. CLIP's `vocab.json` has 1 MB, the `tokenizer.json` of Qwen3 11 MB and of Gemma 2 34 MB.
const MAX_FILE: u64 = 64 << 20;
/// What texts are padded with where the configuration does not say, the first that is a token; else with what ends them.
const USUAL_PADDING: [&str; 2] = ["<|endoftext|>", "<pad>"];

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
    padding: Option<u32>,
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
        let config: Map<String, Value> = optional_json(&folder.join("tokenizer_config.json"))?;
        let special = special_tokens(folder, &config)?;
        // The library trusts its input in places: a panic in it must not take the worker along.
        let built = match path.file_name() {
            Some(name) if name == "tokenizer.json" => guarded(|| text.parse::<Inner>()),
            _ => {
                let vocabulary = read_json_of(&folder.join("vocab.json"), MAX_FILE)?;
                let named = |key: &str, usual: &str| special.get(key).cloned().unwrap_or_else(|| usual.to_owned());
                match config.get("tokenizer_class").and_then(Value::as_str) {
                    None | Some("CLIPTokenizer" | "CLIPTokenizerFast") => {
                        let (start, end) = (named("bos_token", "<|startoftext|>"), named("eos_token", "<|endoftext|>"));
                        guarded(|| pairs::clip(vocabulary, &text, &start, &end))
                    }
                    Some("Qwen2Tokenizer" | "Qwen2TokenizerFast") => {
                        let added = added_tokens(folder, &config)?;
                        guarded(|| pairs::qwen2(vocabulary, &text, added))
                    }
                    Some(class) => Err(format!("a {class} without tokenizer.json is not known")),
                }
            }
        };
        let mut inner = built.map_err(|what| Error::Malformed { path: path.clone(), what })?;
        // Texts are padded here, and what is too long is refused instead of cut.
        inner.with_padding(None);
        let _ = inner.with_truncation(None);
        let unknown = |token: &str| Error::Malformed { path, what: format!("pad_token {token:?} is no token") };
        let padding = match special.get("pad_token") {
            Some(token) => Some(inner.token_to_id(token).ok_or_else(|| unknown(token))?),
            None => {
                let end = special.get("eos_token").map(String::as_str);
                USUAL_PADDING.into_iter().chain(end).find_map(|token| inner.token_to_id(token))
            }
        };
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

    /// The token that texts are padded with; none of a tokenizer whose texts never are.
    pub fn padding(&self) -> Option<u32> {
        self.padding
    }

    /// The largest id.
    pub fn largest(&self) -> usize {
        self.inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize)
    }
}

/// The fields of a file that need not be there.
fn optional_json(path: &Path) -> Result<Map<String, Value>, Error> {
    if path.is_file() { Ok(read_json(path)?) } else { Ok(Map::new()) }
}

/// Special tokens by their field: of `special_tokens_map.json` or else `tokenizer_config.json`.
fn special_tokens(folder: &Path, config: &Map<String, Value>) -> Result<HashMap<String, String>, Error> {
    let mut found = HashMap::new();
    for fields in [config, &optional_json(&folder.join("special_tokens_map.json"))?] {
        for (field, value) in fields.iter().filter(|(field, _)| field.ends_with("_token")) {
            if let Ok(token) = Special::deserialize(value) {
                found.insert(field.clone(), token.text());
            }
        }
    }
    Ok(found)
}

/// Tokens beside those of `vocab.json`: of `tokenizer_config.json`, or in older folders of `added_tokens.json`.
fn added_tokens(folder: &Path, config: &Map<String, Value>) -> Result<Vec<(u32, AddedToken)>, Error> {
    let malformed = |file: &str, token: &str| Error::Malformed {
        path: folder.join(file),
        what: format!("the added token {token:?} cannot be read"),
    };
    if let Some(Value::Object(added)) = config.get("added_tokens_decoder") {
        let described = added.iter().map(|(id, token)| {
            let read = id.parse::<u32>().ok().zip(AddedToken::deserialize(token).ok());
            read.ok_or_else(|| malformed("tokenizer_config.json", id))
        });
        return described.collect();
    }
    let added = optional_json(&folder.join("added_tokens.json"))?;
    let named = added.iter().map(|(token, id)| {
        let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
        let id = id.ok_or_else(|| malformed("added_tokens.json", token))?;
        Ok((id, AddedToken::from(token.clone(), true)))
    });
    named.collect()
}

fn guarded<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(done) => done.map_err(|error| error.to_string()),
        Err(panic) => Err(panic_message(panic.as_ref())),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::json;
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;

    use super::*;

    /// What stands for the 256 bytes, in order.
    fn bytes() -> Vec<String> {
        let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
        alphabet.sort_unstable();
        alphabet.into_iter().map(String::from).collect()
    }

    fn folder(vocabulary: &[String], merges: &[(String, String)], config: &Value) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let ids: BTreeMap<&String, usize> = vocabulary.iter().enumerate().map(|(id, token)| (token, id)).collect();
        let merges: String = merges.iter().map(|(left, right)| format!("{left} {right}\n")).collect();
        for (file, text) in [
            ("vocab.json", serde_json::to_string_pretty(&ids).unwrap().replace("\n  ", "\n    ")),
            ("merges.txt", format!("#version: 0.2\n{merges}")),
            ("tokenizer_config.json", config.to_string()),
        ] {
            std::fs::write(folder.path().join(file), text).unwrap();
        }
        folder
    }

    #[test]
    fn a_vocabulary_of_published_size_is_read() {
        // As CLIP's: bytes, bytes that end a word, 48,894 pairs, start and end; 49,408 in all.
        let ends: Vec<String> = bytes().iter().map(|byte| format!("{byte}</w>")).collect();
        let pairs = bytes().into_iter().flat_map(|left| ends.iter().map(move |right| (left.clone(), right.clone())));
        let merges: Vec<(String, String)> = pairs.take(48_894).collect();
        let joined = merges.iter().map(|(left, right)| format!("{left}{right}"));
        let special = ["<|startoftext|>", "<|endoftext|>"].map(str::to_owned);
        let vocabulary: Vec<String> = bytes().into_iter().chain(ends.clone()).chain(joined).chain(special).collect();
        let config = json!({ "tokenizer_class": "CLIPTokenizer", "pad_token": "!", "eos_token": { "content": "<|endoftext|>" } });
        let folder = folder(&vocabulary, &merges, &config);
        let length = std::fs::metadata(folder.path().join("vocab.json")).unwrap().len();
        assert!(length > 1_059_962, "{length} bytes, and the published file has 1,059,962");
        let tokenizer = Tokenizer::open(folder.path()).unwrap();
        let id = |token: &str| vocabulary.iter().position(|known| known == token).unwrap() as u32;
        assert_eq!(tokenizer.largest(), 49_407);
        assert_eq!(tokenizer.padding(), Some(id("!")));
        let wanted = [49_406, id("ab</w>"), id("c</w>"), id("!!</w>"), 49_407];
        assert_eq!(tokenizer.encode("AB  c !!").unwrap(), wanted);
    }

    /// Merges of a small tokenizer of Qwen2, whose vocabulary they and the bytes are.
    const MERGES: [(&str, &str); 6] = [("p", "p"), ("l", "e"), ("pp", "le"), ("Ġ", "a"), ("Ġa", "pple"), ("Ã", "©")];

    fn qwen2(config: &Value) -> tempfile::TempDir {
        let merges = MERGES.map(|(left, right)| (left.to_owned(), right.to_owned()));
        let joined = merges.iter().map(|(left, right)| format!("{left}{right}"));
        let vocabulary: Vec<String> = bytes().into_iter().chain(joined).collect();
        folder(&vocabulary, &merges, config)
    }

    /// Token ids of transformers 5.23: `Qwen2Tokenizer(vocab=..., merges=...)` with `<img>` added.
    #[test]
    fn byte_pairs_of_qwen2_are_those_of_transformers() {
        let token = |content: &str| json!({ "content": content, "lstrip": false, "normalized": false, "rstrip": false, "single_word": false, "special": true });
        let described = json!({
            "tokenizer_class": "Qwen2Tokenizer", "pad_token": "<|endoftext|>",
            "added_tokens_decoder": { "263": token("<img>"), "262": token("<|endoftext|>") },
        });
        let old = qwen2(&json!({ "tokenizer_class": "Qwen2Tokenizer", "pad_token": "<|endoftext|>" }));
        std::fs::write(old.path().join("added_tokens.json"), r#"{"<img>": 263, "<|endoftext|>": 262}"#).unwrap();
        for folder in [qwen2(&described), old] {
            let tokenizer = Tokenizer::open(folder.path()).unwrap();
            for (text, wanted) in [
                ("an apple", vec![64, 77, 260]),
                (
                    "e\u{301} 12,\n\n a<|endoftext|> it's<img>",
                    vec![261, 220, 16, 17, 11, 198, 198, 259, 262, 220, 72, 83, 6, 82, 263],
                ),
                ("A  apple?!", vec![32, 220, 260, 30, 0]),
            ] {
                assert_eq!(tokenizer.encode(text).unwrap(), wanted, "{text:?}");
            }
            assert_eq!(tokenizer.decode(&[64, 77, 260, 262, 261]).unwrap(), "an apple\u{e9}");
            assert_eq!((tokenizer.padding(), tokenizer.largest()), (Some(262), 263));
        }
    }

    #[test]
    fn what_is_no_tokenizer_is_told() {
        let gap = json!({ "tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": { "300": { "content": "<img>", "lstrip": false, "normalized": false,
                          "rstrip": false, "single_word": false, "special": true } } });
        for (config, wanted) in [
            (json!({ "tokenizer_class": "LlamaTokenizer" }), "a LlamaTokenizer without tokenizer.json"),
            (gap, "\"<img>\" cannot be number 300"),
            (
                json!({ "tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": { "x": {} } }),
                "\"x\" cannot be read",
            ),
            (json!({ "tokenizer_class": "Qwen2Tokenizer", "pad_token": "<pad>" }), "pad_token \"<pad>\" is no token"),
        ] {
            let error = Tokenizer::open(qwen2(&config).path()).unwrap_err().to_string();
            assert!(error.contains(wanted), "{error}");
        }
    }

    #[test]
    fn texts_are_padded_with_what_ends_them_if_nothing_else_is_said() {
        let padding = |config: Value| Tokenizer::open(qwen2(&config).path()).unwrap().padding();
        // Llama and Mistral name no padding.
        let ended = json!({ "tokenizer_class": "Qwen2Tokenizer", "pad_token": null, "eos_token": "a" });
        assert_eq!(padding(ended), Some(64));
        assert_eq!(padding(json!({ "tokenizer_class": "Qwen2Tokenizer" })), None);
    }
}
