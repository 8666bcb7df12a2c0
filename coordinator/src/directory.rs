//! Which models and workers there are, kept current by watching the bus.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError, RwLock},
};

use efferent_bus::{
    Bucket, Change, SharedBus,
    ledger::{self, Ledger},
};
use efferent_proto::{
    ApiError,
    v1::{ErrorCode, GenerateRequest, Model, Signal, Worker, WorkerRole, WorkerState},
    work,
};
use futures::StreamExt as _;
use tokio::task::AbortHandle;

use crate::quote::Stage;

/// How much the latest request counts in what is usual.
const LATE: f64 = 0.05;

/// The stages that a request needs: a control signal that is there already needs no brain.
pub fn needs(request: &GenerateRequest) -> &'static [WorkerRole] {
    match request.signal_id.as_str() {
        "" => &[WorkerRole::Brain, WorkerRole::Hand],
        _ => &[WorkerRole::Hand],
    }
}

/// The models and workers of the cluster. Clones share it.
#[derive(Debug, Clone)]
pub struct Directory(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    ledger: Ledger,
    state: Arc<RwLock<State>>,
    declared: Mutex<HashSet<(String, String)>>,
    /// Tasks in each queue: as last measured, and those added here since.
    depths: Mutex<HashMap<String, u64>>,
    /// By hand: images of a request and units of an image, on average of late.
    usual: Mutex<HashMap<String, (f64, f64)>>,
    watchers: [AbortHandle; 2],
}

#[derive(Debug, Default)]
struct State {
    models: BTreeMap<String, Model>,
    workers: BTreeMap<String, Worker>,
}

impl State {
    fn ready(&self, role: WorkerRole) -> impl Iterator<Item = &Worker> {
        self.workers.values().filter(move |worker| worker.role() == role && worker.state() == WorkerState::Ready)
    }

    /// Workers that have it loaded, or if there is none, that load it when it is asked for.
    fn live(&self, model: &str, role: WorkerRole) -> u32 {
        let count = |state| {
            let serves = |worker: &&Worker| worker.models.iter().any(|served| served.name == model);
            let workers = self.workers.values().filter(|worker| worker.role() == role && worker.state() == state);
            workers.filter(serves).count() as u32
        };
        match count(WorkerState::Ready) {
            0 => count(WorkerState::Standby),
            ready => ready,
        }
    }

    /// Which of the stages that are needed has no live worker.
    fn missing(&self, model: &str, needs: &[WorkerRole]) -> Option<WorkerRole> {
        needs.iter().copied().find(|role| self.live(model, *role) == 0)
    }

    fn model(&self, name: &str) -> Result<&Model, ApiError> {
        self.models.get(name).ok_or_else(|| {
            let known = self.models.keys().cloned().collect::<Vec<_>>().join(", ");
            ApiError::new(ErrorCode::UnknownModel, format!("no model {name:?}; known are: {known}"))
                .field("model")
                .limit(known)
        })
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.watchers.iter().for_each(AbortHandle::abort);
    }
}

impl Directory {
    /// Watches the bus. Returns once it knows what there is.
    ///
    /// # Errors
    /// If the bus is unavailable.
    pub async fn watch(ledger: Ledger) -> efferent_bus::Result<Self> {
        let state = Arc::new(RwLock::new(State::default()));
        let models = follow(&ledger, Bucket::Models, state.clone(), |state, key, value| {
            match value.map(|value| ledger::decode::<Model>(value, "model", key)) {
                Some(Ok(model)) => drop(state.models.insert(key.to_owned(), model)),
                Some(Err(error)) => tracing::warn!(%error, "a model is left out"),
                None => drop(state.models.remove(key)),
            }
        });
        let models = models.await?;
        let workers = follow(&ledger, Bucket::Workers, state.clone(), |state, key, value| {
            match value.map(|value| ledger::decode::<Worker>(value, "worker", key)) {
                Some(Ok(worker)) => drop(state.workers.insert(key.to_owned(), worker)),
                Some(Err(error)) => tracing::warn!(%error, "a worker is left out"),
                None => drop(state.workers.remove(key)),
            }
        });
        let watchers = [models, workers.await?];
        let (declared, depths, usual) = Default::default();
        Ok(Self(Arc::new(Inner { ledger, state, declared, depths, usual, watchers })))
    }

    fn read<T>(&self, read: impl FnOnce(&State) -> T) -> T {
        read(&self.0.state.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Every model, with its live workers counted.
    pub fn models(&self) -> Vec<Model> {
        self.read(|state| {
            let counted = |model: &Model| Model {
                live_brains: state.live(&model.name, WorkerRole::Brain),
                live_hands: state.live(&model.name, WorkerRole::Hand),
                ..model.clone()
            };
            state.models.values().map(counted).collect()
        })
    }

    /// A model by name, served or not.
    pub fn known(&self, name: &str) -> Option<Model> {
        self.read(|state| state.models.get(name).cloned())
    }

    /// Images that all live workers of a hand take at once.
    pub fn hand_capacity(&self, hand: &str) -> usize {
        self.read(|state| {
            let serves = |worker: &&Worker| worker.models.iter().any(|model| model.hand == hand);
            state.ready(WorkerRole::Hand).filter(serves).map(|worker| worker.capacity as usize).sum()
        })
    }

    /// The live workers of a stage of a model.
    pub fn stage(&self, role: WorkerRole, model: &Model) -> Stage {
        self.read(|state| {
            let serves = |worker: &&Worker| worker.models.iter().any(|served| served.name == model.name);
            Stage::of(state.ready(role).filter(serves))
        })
    }

    /// The hand that would draw a request, and how many seconds of one it would take. `None` if there is none now.
    pub fn work(&self, request: &GenerateRequest) -> Option<(String, f64)> {
        let model = self.choose(&request.model, needs(request)).ok()?;
        let filled = GenerateRequest {
            steps: request.steps.or(Some(model.default_steps)),
            image_count: request.image_count.or(Some(1)),
            size: request.size.or(model.sizes.first().copied()),
            ..request.clone()
        };
        let seconds = work::request_units(&filled) * self.stage(WorkerRole::Hand, &model).busy();
        Some((model.hand, seconds))
    }

    /// Images of a request for a hand, and units of an image, as they usually were of late.
    pub fn usual(&self, hand: &str) -> (f64, f64) {
        self.0.usual.lock().unwrap_or_else(PoisonError::into_inner).get(hand).copied().unwrap_or((1.0, 0.0))
    }

    /// Takes down that a request was accepted.
    pub fn note(&self, hand: &str, request: &GenerateRequest) {
        let images = f64::from(request.image_count());
        let units = work::image_units(&request.size.unwrap_or_default(), work::steps(request));
        let mut usual = self.0.usual.lock().unwrap_or_else(PoisonError::into_inner);
        let before = usual.entry(hand.to_owned()).or_insert((images, units));
        before.0 += LATE * (images - before.0);
        before.1 += LATE * (units - before.1);
    }

    /// The bus below.
    pub fn bus(&self) -> &SharedBus {
        self.0.ledger.bus()
    }

    /// Every live worker.
    pub fn workers(&self) -> Vec<Worker> {
        self.read(|state| state.workers.values().cloned().collect())
    }

    /// The model of a request that needs these stages; an empty name stands for the only one that has them.
    ///
    /// # Errors
    /// If it is unknown, a stage has no live worker now, or the empty name could mean several.
    pub fn choose(&self, name: &str, needs: &[WorkerRole]) -> Result<Model, ApiError> {
        self.read(|state| {
            if !name.is_empty() {
                let model = state.model(name)?;
                return match state.missing(name, needs) {
                    None => Ok(model.clone()),
                    Some(role) => Err(no_worker(format!("no live {} serves model {name} now", role_name(role)))),
                };
            }
            let served: Vec<_> =
                state.models.values().filter(|model| state.missing(&model.name, needs).is_none()).collect();
            match served.as_slice() {
                [only] => Ok((*only).clone()),
                [] => {
                    let needs = needs.iter().map(|role| format!("a live {}", role_name(*role)));
                    let needs = needs.collect::<Vec<_>>().join(" and ");
                    Err(ApiError::new(ErrorCode::NoWorker, format!("no model has {needs} now")))
                }
                several => {
                    let offer = several.iter().map(|model| model.name.as_str()).collect::<Vec<_>>().join(", ");
                    let message = format!("several models are served; name one of {offer}");
                    Err(ApiError::new(ErrorCode::InvalidField, message).field("model").limit(offer))
                }
            }
        })
    }

    /// The model whose hand renders a control signal; an empty name stands for the signal's own, or else for any whose hand accepts it.
    ///
    /// # Errors
    /// If it is unknown, its hand accepts another space, or no hand that would do is live now.
    pub fn choose_hand(&self, name: &str, signal: &Signal) -> Result<Model, ApiError> {
        self.read(|state| {
            let space = &signal.space;
            if name.is_empty() {
                let accepts = |model: &&Model| model.space == *space && state.live(&model.name, WorkerRole::Hand) > 0;
                let own = state.models.get(&signal.model).filter(accepts);
                let any = own.or_else(|| state.models.values().find(accepts)).cloned();
                return any.ok_or_else(|| no_worker(format!("no live hand accepts the signal's space {space} now")));
            }
            let model = state.model(name)?;
            if model.space != *space {
                let message =
                    format!("the signal is of space {space}; the hand of model {name} accepts {}", model.space);
                let error = ApiError::new(ErrorCode::SpaceMismatch, message);
                return Err(error.field("model").limit(model.space.clone()));
            }
            match state.live(name, WorkerRole::Hand) {
                0 => Err(no_worker(format!("no live hand serves model {name} now"))),
                _ => Ok(model.clone()),
            }
        })
    }

    /// About how many tasks a queue holds.
    pub fn depth(&self, queue: &str) -> u64 {
        self.0.depths.lock().unwrap_or_else(PoisonError::into_inner).get(queue).copied().unwrap_or(0)
    }

    /// Notes what was measured.
    pub fn set_depth(&self, queue: &str, depth: u64) {
        self.0.depths.lock().unwrap_or_else(PoisonError::into_inner).insert(queue.to_owned(), depth);
    }

    /// Notes that a task was added.
    pub fn add_task(&self, queue: &str) {
        *self.0.depths.lock().unwrap_or_else(PoisonError::into_inner).entry(queue.to_owned()).or_default() += 1;
    }

    /// Makes sure that the model's queues are there, asking the bus once.
    ///
    /// # Errors
    /// If the bus is unavailable.
    pub async fn declare(&self, model: &Model) -> efferent_bus::Result<()> {
        let pair = (model.brain.clone(), model.hand.clone());
        if self.0.declared.lock().unwrap_or_else(PoisonError::into_inner).contains(&pair) {
            return Ok(());
        }
        self.0.ledger.declare_queues(model).await?;
        self.0.declared.lock().unwrap_or_else(PoisonError::into_inner).insert(pair);
        Ok(())
    }
}

fn no_worker(message: String) -> ApiError {
    ApiError::new(ErrorCode::NoWorker, message).field("model")
}

fn role_name(role: WorkerRole) -> &'static str {
    match role {
        WorkerRole::Hand => "hand",
        WorkerRole::Brain | WorkerRole::Unspecified => "brain",
    }
}

/// Applies what a bucket's watch tells, in a task of its own. Returns once the present state is applied.
async fn follow(
    ledger: &Ledger,
    bucket: Bucket,
    state: Arc<RwLock<State>>,
    apply: impl Fn(&mut State, &str, Option<&[u8]>) + Send + 'static,
) -> efferent_bus::Result<AbortHandle> {
    let mut changes = ledger.bus().watch(bucket).await?;
    let (current, wait) = tokio::sync::oneshot::channel();
    let task = tokio::spawn(async move {
        let mut current = Some(current);
        while let Some(change) = changes.next().await {
            let mut state = state.write().unwrap_or_else(PoisonError::into_inner);
            match change {
                Change::Put(entry) => apply(&mut state, &entry.key, Some(&entry.value)),
                Change::Gone { key } => apply(&mut state, &key, None),
                Change::Current => drop(current.take().map(|current| current.send(()))),
            }
        }
        tracing::error!(bucket = bucket.name(), "a watch has ended");
    });
    let _ = wait.await;
    Ok(task.abort_handle())
}
