//! Tokenizers of byte pairs from `vocab.json` and `merges.txt`, as folders have them that were saved without `tokenizer.json`: CLIP's and Qwen2's.
//!
//! Source: transformers 5.23, `models/{clip,qwen2}/tokenization_*.py`.

use std::collections::HashMap;

use tokenizers::{
    AddedToken, SplitDelimiterBehavior, Tokenizer,
    models::bpe::{BPE, BpeBuilder, Vocab},
    normalizers::{self, NormalizerWrapper},
    pre_tokenizers::{
        PreTokenizerWrapper,
        byte_level::ByteLevel,
        sequence::Sequence,
        split::{Split, SplitPattern},
    },
    processors::roberta::RobertaProcessing,
};

/// Ids of tokens.
pub(super) type Vocabulary = HashMap<String, u32>;

/// Letters, digits one by one, and the rest, in runs: how CLIP cuts a text before its bytes are paired.
const CLIP_WORDS: &str = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";
/// How Qwen2 does: what stands before a word belongs to it, and spaces count.
const QWEN2_WORDS: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The lines of `merges.txt`.
fn pairs(vocabulary: Vocabulary, merges: &str) -> tokenizers::Result<BpeBuilder> {
    let pairs = merges.lines().filter(|line| !line.starts_with("#version") && !line.trim().is_empty());
    let pairs = pairs.map(|line| match line.split_once(' ') {
        Some((left, right)) => Ok((left.to_owned(), right.to_owned())),
        None => Err(format!("{line:?} is no pair")),
    });
    let pairs = pairs.collect::<Result<Vec<_>, _>>()?;
    Ok(BPE::builder().vocab_and_merges(vocabulary.into_iter().collect::<Vocab>(), pairs))
}

/// Words by a pattern, then their bytes.
fn words(pattern: &str, between: SplitDelimiterBehavior, bytes: ByteLevel) -> tokenizers::Result<Sequence> {
    // What CLIP's pattern finds are the words; what Qwen2's finds are words too, and nothing is left between them.
    let inverted = between == SplitDelimiterBehavior::Removed;
    let words = Split::new(SplitPattern::Regex(pattern.to_owned()), between, inverted)?;
    Ok(Sequence::new(vec![PreTokenizerWrapper::Split(words), PreTokenizerWrapper::ByteLevel(bytes)]))
}

/// CLIP's: lower case, and byte pairs of words that know their end.
pub(super) fn clip(vocabulary: Vocabulary, merges: &str, start: &str, end: &str) -> tokenizers::Result<Tokenizer> {
    let id = |token: &str| vocabulary.get(token).copied().ok_or_else(|| format!("{token:?} is not in vocab.json"));
    let (start_id, end_id) = (id(start)?, id(end)?);
    let bpe = pairs(vocabulary, merges)?
        .continuing_subword_prefix(String::new())
        .end_of_word_suffix("</w>".to_owned())
        .unk_token(end.to_owned())
        .build()?;
    let mut inner = Tokenizer::new(bpe);
    let spaces = normalizers::Replace::new(normalizers::replace::ReplacePattern::Regex(r"\s+".to_owned()), " ")?;
    let steps: [NormalizerWrapper; 3] = [normalizers::NFC.into(), spaces.into(), normalizers::Lowercase.into()];
    inner.with_normalizer(Some(normalizers::Sequence::new(steps.into())))?;
    let bytes = ByteLevel::new(false, true, true);
    inner.with_pre_tokenizer(Some(words(CLIP_WORDS, SplitDelimiterBehavior::Removed, bytes)?));
    let around = RobertaProcessing::new((end.to_owned(), end_id), (start.to_owned(), start_id));
    inner.with_post_processor(Some(around.trim_offsets(false).add_prefix_space(false)));
    inner.add_special_tokens([start, end].map(|token| AddedToken::from(token.to_owned(), true)))?;
    Ok(inner)
}

/// Qwen2's: bytes of the text as it is, nothing around it. `added`: tokens beside those of the vocabulary, with their ids.
pub(super) fn qwen2(
    vocabulary: Vocabulary,
    merges: &str,
    mut added: Vec<(u32, AddedToken)>,
) -> tokenizers::Result<Tokenizer> {
    let mut inner = Tokenizer::new(pairs(vocabulary, merges)?.build()?);
    inner.with_normalizer(Some(normalizers::NFC))?;
    let bytes = ByteLevel::new(false, true, false);
    inner.with_pre_tokenizer(Some(words(QWEN2_WORDS, SplitDelimiterBehavior::Isolated, bytes)?));
    inner.with_decoder(Some(bytes));
    // The library counts on from the vocabulary's end: in the order of their ids they get the ids that they are to have.
    added.sort_by_key(|(id, _)| *id);
    for (id, token) in added {
        let name = token.content.clone();
        inner.add_tokens([token])?;
        if inner.token_to_id(&name) != Some(id) {
            return Err(format!("the added token {name:?} cannot be number {id}").into());
        }
    }
    Ok(inner)
}
