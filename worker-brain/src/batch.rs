//! From prompts to control signals: cached ones first, the rest in batches by token budget.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use efferent_worker::{
    engine::{Brain, EmbedRequest, EngineError},
    signal::ControlSignal,
    thread::EngineThread,
};
use moka::sync::Cache;
use prost::Message as _;

/// A control signal, or why there is none, shared by the tasks that have the same prompt.
pub type Outcome = Result<Arc<ControlSignal>, Arc<EngineError>>;

/// A brain with a cache in front of it, keyed by content: fingerprint of model, connector and template, and the request.
#[derive(Debug, Clone)]
pub struct Encoder {
    engine: EngineThread<dyn Brain>,
    fingerprint: Arc<str>,
    cache: Cache<blake3::Hash, Arc<ControlSignal>>,
}

impl Encoder {
    /// A brain with a cache of at most `cache_bytes`.
    ///
    /// # Errors
    /// If the engine is gone.
    pub async fn new(engine: EngineThread<dyn Brain>, cache_bytes: u64) -> Result<Self, EngineError> {
        let fingerprint = engine.run(|brain| brain.fingerprint()).await?.into();
        let weigh = |_: &_, signal: &Arc<ControlSignal>| u32::try_from(signal.encoded_len() + 128).unwrap_or(u32::MAX);
        let cache = Cache::builder().max_capacity(cache_bytes).weigher(weigh).build();
        Ok(Self { engine, fingerprint, cache })
    }

    /// One outcome for each request, in order. Requests that are equal, or cached, cost one forward pass or none.
    pub async fn encode(&self, requests: Vec<EmbedRequest>) -> Vec<Outcome> {
        let keys: Vec<_> = requests.iter().map(|request| self.key(request)).collect();
        let mut known: HashMap<blake3::Hash, Outcome> = HashMap::new();
        let mut asked = HashSet::new();
        let mut misses = Vec::new();
        for (key, request) in keys.iter().zip(requests) {
            let hit = self.cache.get(key);
            let result = if hit.is_some() || asked.contains(key) { "hit" } else { "miss" };
            metrics::counter!("efferent_signal_cache_total", "result" => result).increment(1);
            if let Some(signal) = hit {
                known.insert(*key, Ok(signal));
            } else if asked.insert(*key) {
                misses.push((*key, request));
            }
        }
        if !misses.is_empty() {
            let (missed, requests): (Vec<_>, Vec<_>) = misses.into_iter().unzip();
            match self.engine.run(move |brain| embed(brain, &requests)).await {
                Ok(outcomes) => {
                    for (key, outcome) in missed.into_iter().zip(outcomes) {
                        let outcome = outcome.map(Arc::new).map_err(Arc::new);
                        if let Ok(signal) = &outcome {
                            self.cache.insert(key, signal.clone());
                        }
                        known.insert(key, outcome);
                    }
                }
                Err(error) => {
                    let error = Arc::new(error);
                    known.extend(missed.into_iter().map(|key| (key, Err(error.clone()))));
                }
            }
        }
        let missing = || Err(Arc::new(EngineError::Crashed("the engine left out a prompt of its batch".to_owned())));
        keys.iter().map(|key| known.get(key).cloned().unwrap_or_else(missing)).collect()
    }

    fn key(&self, request: &EmbedRequest) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        for part in [&*self.fingerprint, &request.prompt, &request.negative_prompt] {
            // The length before each part keeps ("ab", "c") and ("a", "bc") apart.
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part.as_bytes());
        }
        hasher.finalize()
    }
}

/// Embeds requests in batches of at most the brain's token budget, padding counted: those of like length go together.
fn embed(brain: &mut dyn Brain, requests: &[EmbedRequest]) -> Vec<Result<ControlSignal, EngineError>> {
    let budget = brain.spec().max_batch;
    let mut outcomes: Vec<Option<Result<ControlSignal, EngineError>>> = requests.iter().map(|_| None).collect();
    let mut lengths = Vec::new();
    for (index, request) in requests.iter().enumerate() {
        match brain.tokens(request) {
            Ok(tokens) => lengths.push((tokens, index)),
            Err(error) => outcomes[index] = Some(Err(error)),
        }
    }
    lengths.sort_unstable();
    for group in groups(&lengths, budget) {
        let batch: Vec<_> = group.iter().map(|&(_, index)| requests[index].clone()).collect();
        metrics::histogram!("efferent_brain_batch_size").record(batch.len() as f64);
        let started = std::time::Instant::now();
        let signals = brain.embed(&batch);
        metrics::histogram!("efferent_brain_embed_seconds").record(started.elapsed().as_secs_f64());
        for (&(_, index), signal) in group.iter().zip(signals) {
            outcomes[index] = Some(signal);
        }
    }
    let missing = || Err(EngineError::Crashed("the engine left out a prompt of its batch".to_owned()));
    outcomes.into_iter().map(|outcome| outcome.unwrap_or_else(missing)).collect()
}

/// Cuts (tokens, index) pairs, sorted by tokens, so that count x longest is within the budget; one that is over it goes alone.
fn groups(lengths: &[(usize, usize)], budget: usize) -> Vec<&[(usize, usize)]> {
    let mut groups = Vec::new();
    let mut start = 0;
    for end in 1..=lengths.len() {
        let full = end == lengths.len() || lengths[end].0 * (end + 1 - start) > budget;
        if full {
            groups.push(&lengths[start..end]);
            start = end;
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_keep_the_budget_and_lose_nothing() {
        let lengths: Vec<_> = [3, 3, 4, 9, 9, 50].into_iter().zip(0..).collect();
        let sizes: Vec<_> = groups(&lengths, 18).iter().map(|group| group.len()).collect();
        assert_eq!(sizes, [3, 2, 1]);
        assert!(groups(&[], 18).is_empty());
    }
}
