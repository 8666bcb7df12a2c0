//! From prompts to control signals: cached ones first, the rest in batches by token budget.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Instant,
};

use efferent_worker::{
    engine::{Brain, EmbedRequest, EngineError},
    signal::ControlSignal,
    thread::EngineThread,
};
use futures::future::join_all;
use moka::sync::Cache;
use prost::Message as _;
use tokio::sync::Mutex;

use crate::shared::{Found, Shared};

/// A control signal, or why there is none, shared by the tasks that have the same prompt.
pub type Outcome = Result<Arc<ControlSignal>, Arc<EngineError>>;

/// A brain with a cache in front of it, keyed by content: fingerprint of model, connector and template, and the request.
#[derive(Debug, Clone)]
pub struct Encoder {
    engine: EngineThread<dyn Brain>,
    fingerprint: Arc<str>,
    cache: Cache<blake3::Hash, Arc<ControlSignal>>,
    shared: Option<Shared>,
    turn: Arc<Mutex<()>>,
}

/// A request that the cache has no signal for.
type Miss = (blake3::Hash, EmbedRequest);

impl Encoder {
    /// A brain with a cache of at most `cache_bytes`, and behind that what it shares with other brains.
    ///
    /// # Errors
    /// If the engine is gone.
    pub async fn new(
        engine: EngineThread<dyn Brain>,
        cache_bytes: u64,
        shared: Option<Shared>,
    ) -> Result<Self, EngineError> {
        let fingerprint = engine.run(|brain| brain.fingerprint()).await?.into();
        let weigh = |_: &_, signal: &Arc<ControlSignal>| u32::try_from(signal.encoded_len() + 128).unwrap_or(u32::MAX);
        let cache = Cache::builder().max_capacity(cache_bytes).weigher(weigh).build();
        Ok(Self { engine, fingerprint, cache, shared, turn: Arc::default() })
    }

    /// One outcome for each request, in order. Requests that are equal, or cached, cost one forward pass or none; with several brains, one in all.
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
        known.extend(self.miss(misses).await);
        let missing = || Err(Arc::new(EngineError::Crashed("the engine left out a prompt of its batch".to_owned())));
        keys.iter().map(|key| known.get(key).cloned().unwrap_or_else(missing)).collect()
    }

    /// What the cache has not: from the store if another brain has computed it, else computed. Others' passes are waited for after this brain's own, so that no
    /// two wait for one another.
    async fn miss(&self, misses: Vec<Miss>) -> Vec<(blake3::Hash, Outcome)> {
        let Some(shared) = self.shared.as_ref().filter(|shared| shared.is_worthwhile() && !misses.is_empty()) else {
            return self.compute_all(misses).await;
        };
        let mut outcomes = Vec::new();
        let found = join_all(misses.iter().map(|(key, _)| shared.find(key))).await;
        let (mut own, mut others) = (Vec::new(), Vec::new());
        for (miss, found) in misses.into_iter().zip(found) {
            match found {
                Found::Signal(signal) => outcomes.push(self.remember(miss.0, *signal)),
                Found::Elsewhere => others.push(miss),
                Found::Nothing => own.push(miss),
            }
        }
        let computed = self.compute_all(own).await;
        for (key, outcome) in &computed {
            let (shared, key, outcome) = (shared.clone(), *key, outcome.clone());
            tokio::spawn(async move {
                match outcome {
                    Ok(signal) => shared.tell(key, signal).await,
                    Err(_) => shared.give_up(&key).await,
                }
            });
        }
        let waited = join_all(others.iter().map(|(key, _)| shared.wait(key))).await;
        let mut left = Vec::new();
        for (miss, signal) in others.into_iter().zip(waited) {
            match signal {
                Some(signal) => outcomes.push(self.remember(miss.0, signal)),
                None => left.push(miss),
            }
        }
        metrics::counter!("efferent_signal_cache_total", "result" => "shared").increment(outcomes.len() as u64);
        outcomes.extend(computed);
        outcomes.extend(self.compute_all(left).await);
        outcomes
    }

    /// The outcome that a signal is, with the signal in the cache.
    fn remember(&self, key: blake3::Hash, signal: ControlSignal) -> (blake3::Hash, Outcome) {
        let signal = Arc::new(signal);
        self.cache.insert(key, signal.clone());
        (key, Ok(signal))
    }

    async fn compute_all(&self, misses: Vec<Miss>) -> Vec<(blake3::Hash, Outcome)> {
        if misses.is_empty() {
            return Vec::new();
        }
        // The engine does one batch after the other anyway. Who waited for it looks whether the one before had the same prompts.
        let _turn = self.turn.lock().await;
        let mut outcomes = Vec::new();
        let (mut keys, mut requests) = (Vec::new(), Vec::new());
        for (key, request) in misses {
            match self.cache.get(&key) {
                Some(signal) => outcomes.push((key, Ok(signal))),
                None => {
                    keys.push(key);
                    requests.push(request);
                }
            }
        }
        if requests.is_empty() {
            return outcomes;
        }
        let started = Instant::now();
        let computed = self.compute(requests).await;
        if let Some(shared) = &self.shared {
            shared.timed(started.elapsed());
        }
        for (key, outcome) in keys.into_iter().zip(computed) {
            outcomes.push(match outcome {
                Ok(signal) => self.remember(key, signal),
                Err(error) => (key, Err(Arc::new(error))),
            });
        }
        outcomes
    }

    /// Has the engine embed requests. If it panics over several, each gets another try alone, so that only the one at fault fails.
    async fn compute(&self, requests: Vec<EmbedRequest>) -> Vec<Result<ControlSignal, EngineError>> {
        let several = Arc::new(requests);
        let shared = several.clone();
        let error = match self.engine.run(move |brain| embed(brain, &shared)).await {
            Ok(outcomes) => return outcomes,
            // It was before any of these was tried.
            Err(EngineError::Gone) => return several.iter().map(|_| Err(EngineError::Gone)).collect(),
            Err(error) => error,
        };
        metrics::counter!("efferent_engine_panics_total").increment(1);
        if several.len() == 1 {
            return vec![Err(error)];
        }
        let mut outcomes = Vec::new();
        for request in several.iter().cloned() {
            let alone = self.engine.run(move |brain| embed(brain, &[request]).pop()).await;
            let missing = || EngineError::Crashed("the engine left out a prompt of its batch".to_owned());
            outcomes.push(match alone {
                Ok(outcome) => outcome.unwrap_or_else(|| Err(missing())),
                // One of these took it down for good. Which, other workers find out, if it counts for all of them.
                Err(EngineError::Gone) => Err(error.again()),
                Err(crashed) => Err(crashed),
            });
        }
        outcomes
    }

    fn key(&self, request: &EmbedRequest) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        let texts = [&*self.fingerprint, &request.prompt, &request.negative_prompt];
        for part in texts.into_iter().chain(request.references.iter().map(|reference| &*reference.hash)) {
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
        let started = Instant::now();
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
    use std::sync::{Mutex, PoisonError};

    use efferent_proto::v1::FailureClass;
    use efferent_worker::engine::EngineSpec;

    use super::*;

    /// Panics over a poisonous prompt, refuses one, and notes its batches.
    struct Fragile {
        spec: EngineSpec,
        batches: Arc<Mutex<Vec<usize>>>,
    }

    impl Brain for Fragile {
        fn spec(&self) -> &EngineSpec {
            &self.spec
        }

        fn fingerprint(&self) -> String {
            "fragile".to_owned()
        }

        fn tokens(&self, _: &EmbedRequest) -> Result<usize, EngineError> {
            Ok(1)
        }

        fn embed(&mut self, batch: &[EmbedRequest]) -> Vec<Result<ControlSignal, EngineError>> {
            self.batches.lock().unwrap_or_else(PoisonError::into_inner).push(batch.len());
            assert!(batch.iter().all(|request| request.prompt != "poison"), "poison");
            let refused = |request: &EmbedRequest| request.prompt == "refused";
            let answer = |request| match refused(request) {
                true => Err(EngineError::Crashed("refused".to_owned())),
                false => Ok(ControlSignal::default()),
            };
            batch.iter().map(answer).collect()
        }
    }

    /// An encoder whose brain can be built so many times.
    async fn fragile(times: usize) -> (Encoder, Arc<Mutex<Vec<usize>>>) {
        let batches = Arc::new(Mutex::new(Vec::new()));
        let noted = batches.clone();
        let mut built = 0;
        let factory = move || {
            built += 1;
            if built > times {
                return Err(EngineError::Missing("its device is lost".to_owned()));
            }
            let spec = EngineSpec { model: efferent_worker::sim::model(), max_batch: 100, simulated: true };
            Ok(Box::new(Fragile { spec, batches: noted.clone() }) as Box<dyn Brain>)
        };
        let engine = EngineThread::start("test", Box::new(factory)).await.expect("starts");
        (Encoder::new(engine, 1 << 20, None).await.expect("starts"), batches)
    }

    fn requests(prompts: &[&str]) -> Vec<EmbedRequest> {
        let request = |prompt: &&str| EmbedRequest { prompt: (*prompt).to_owned(), ..Default::default() };
        prompts.iter().map(request).collect()
    }

    #[tokio::test]
    async fn equal_prompts_cost_one_pass_and_known_ones_none() {
        let (encoder, batches) = fragile(1).await;
        let outcomes = encoder.encode(requests(&["a", "b", "a", "a"])).await;
        assert!(outcomes.iter().all(Result::is_ok) && outcomes.len() == 4);
        assert!(encoder.encode(requests(&["b", "a"])).await.iter().all(Result::is_ok));
        assert_eq!(*batches.lock().unwrap(), [2]);
        // A negative prompt makes another request; an error is not kept.
        let mut negative = requests(&["a"]);
        negative[0].negative_prompt = "b".to_owned();
        encoder.encode(negative).await;
        encoder.encode(requests(&["refused"])).await;
        encoder.encode(requests(&["refused"])).await;
        assert_eq!(*batches.lock().unwrap(), [2, 1, 1, 1]);
    }

    #[tokio::test]
    async fn a_panic_fails_the_prompt_at_fault_alone() {
        let (encoder, batches) = fragile(99).await;
        let outcomes = encoder.encode(requests(&["a", "poison", "refused", "b"])).await;
        assert_eq!(outcomes.iter().map(Result::is_ok).collect::<Vec<_>>(), [true, false, false, true]);
        assert_eq!(*batches.lock().unwrap(), [4, 1, 1, 1, 1]);
        assert_eq!(encoder.encode(requests(&["poison"])).await.len(), 1);
    }

    #[tokio::test]
    async fn an_engine_that_is_gone_counts_only_for_those_that_took_it_down() {
        let (encoder, batches) = fragile(1).await;
        for (prompts, class) in [
            (["a", "poison"], FailureClass::EngineCrash),
            (["b", "c"], FailureClass::HandedBack),
            (["a", "poison"], FailureClass::HandedBack),
        ] {
            for outcome in encoder.encode(requests(&prompts)).await {
                assert_eq!(outcome.unwrap_err().class(), Some(class), "{prompts:?}");
            }
        }
        assert_eq!(*batches.lock().unwrap(), [2]);
    }

    #[test]
    fn groups_keep_the_budget_and_lose_nothing() {
        let lengths: Vec<_> = [3, 3, 4, 9, 9, 50].into_iter().zip(0..).collect();
        let sizes: Vec<_> = groups(&lengths, 18).iter().map(|group| group.len()).collect();
        assert_eq!(sizes, [3, 2, 1]);
        assert!(groups(&[], 18).is_empty());
    }
}
