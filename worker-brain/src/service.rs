//! The brain worker: pulls tasks, encodes them in batches, publishes the hands' tasks.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use efferent_bus::{
    Bucket, Delivery, MAX_MESSAGE, NewTask, Published,
    ledger::{self, Ledger, Transition},
};
use efferent_proto::{
    internal::{BrainTask, JobRecord, ServedSignal, SharedSignal, hand_task},
    names,
    v1::{Device, Model, PictureSource, Signal, WorkerRole, picture_source::Source},
    work::MAX_DEADLINE,
};
use efferent_service::{Shutdown, admin::Readiness};
use efferent_worker::{
    engine::{Brain, EmbedRequest, EngineError, EngineSpec, Reference},
    intake::Intake,
    lifecycle::{Activity, InFlight, Member, Profile},
    pictures::{File, decode, fetch},
    signal::ControlSignal,
    task::{self, Admission, Cancellations, Held},
    thread::{EngineThread, Factory},
    watchdog::{Hang, Watchdog},
};
use futures::future::join_all;
use prost::Message as _;
use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    batch::{Encoder, Outcome},
    serve::{Serve, Shelf},
    shared::Shared,
};

/// One batch computes while the next one is pulled.
const BATCHES: usize = 2;
/// Requests of a batch of which some have pictures that are read at once.
const PICTURED: usize = 4;
/// So many more may be computed and not yet published: the queue's latency does not keep the engine waiting.
const UNPUBLISHED: usize = 8;
/// Most of the grace period that is kept for handing back what is not done.
const LEAVING: Duration = Duration::from_secs(5);

/// Why work goes back to the queue when the worker stops.
const STOPPING: &str = "the worker was told to stop";

/// How a brain worker works.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// Most prompts taken at once. Default 32.
    pub max_prompts: usize,
    /// How long to wait for more prompts when the batch before had several. Alone, a prompt never waits. Default 3 ms.
    #[serde(with = "humantime_serde")]
    pub batch_wait: Duration,
    /// Bytes of control signals kept in memory. Default 64 MiB.
    pub cache_bytes: u64,
    /// How long control signals stay where the other brains of the cluster find them; 0 shares none. Default 1 h.
    #[serde(with = "humantime_serde")]
    pub share: Duration,
    /// Signals of up to this many bytes travel in the tasks of hands; larger ones are fetched. Default 512 KiB, at most 896 KiB.
    pub inline_bytes: Inline,
    /// Where hands fetch larger signals. Default where the bus sees this machine.
    pub serve: Serve,
    /// Bytes of signals that are served at most. Default 256 MiB.
    pub serve_bytes: u64,
    /// How long a stop takes at most; what is not done shortly before goes back to the queue. Default 30 s.
    #[serde(with = "humantime_serde")]
    pub grace: Duration,
    /// How long a batch may take before the brain counts as hung; for ever if zero. Default 10 min.
    #[serde(with = "humantime_serde")]
    pub step_timeout: Duration,
    /// What it is expected to offer, to be told of while it loads; nothing if that is not known.
    #[serde(skip)]
    pub model: Option<Model>,
    /// Told of what is in hand.
    #[serde(skip)]
    pub activity: Activity,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            max_prompts: 32,
            batch_wait: Duration::from_millis(3),
            cache_bytes: 64 * 1024 * 1024,
            share: Duration::from_secs(3600),
            inline_bytes: Inline::default(),
            serve: Serve::default(),
            serve_bytes: 256 * 1024 * 1024,
            grace: Duration::from_secs(30),
            step_timeout: Duration::from_secs(600),
            model: None,
            activity: Activity::default(),
        }
    }
}

/// How large a signal may be that travels in a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "usize", into = "usize")]
pub struct Inline(usize);

impl Inline {
    /// A message holds a task's other parts too.
    const MOST: usize = MAX_MESSAGE - 64 * 1024;
}

impl Default for Inline {
    fn default() -> Self {
        Self(512 * 1024)
    }
}

impl TryFrom<usize> for Inline {
    type Error = String;

    fn try_from(bytes: usize) -> Result<Self, String> {
        if bytes <= Self::MOST { Ok(Self(bytes)) } else { Err(format!("{bytes} is over {}", Self::MOST)) }
    }
}

impl From<Inline> for usize {
    fn from(inline: Inline) -> Self {
        inline.0
    }
}

/// Why a brain worker ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The model cannot be loaded.
    #[error("cannot load the brain")]
    Engine(#[from] EngineError),
    /// The bus is unavailable or unfit.
    #[error("cannot join the cluster")]
    Bus(#[from] efferent_bus::Error),
    /// The engine does not come back. The process must end: a thread cannot be stopped, and a device that is lost stays lost within its process.
    #[error(transparent)]
    Hang(#[from] Hang),
}

#[derive(Debug)]
struct Worker {
    ledger: Ledger,
    encoder: Encoder,
    member: Member,
    cancellations: Cancellations,
    inline_bytes: usize,
    shelf: Option<Shelf>,
    /// Cancelled towards the end of the grace period.
    abandoned: CancellationToken,
}

/// Serves until `shutdown`: registers, loads the brain, works, and at the end finishes what it has.
///
/// # Errors
/// If the brain cannot be loaded or the bus is unavailable at the start; if later the engine hangs, or crashes and cannot be built anew.
pub async fn run(
    options: Options,
    factory: Factory<dyn Brain>,
    devices: Vec<Device>,
    ledger: Ledger,
    readiness: Readiness,
    shutdown: Shutdown,
) -> Result<(), Error> {
    // Given also when the engine is gone.
    let shutdown = shutdown.child();
    let watchdog = Watchdog::default();
    let profile = Profile {
        role: WorkerRole::Brain,
        models: options.model.iter().cloned().collect(),
        devices,
        capacity: 0,
        simulated: false,
        activity: options.activity.clone(),
    };
    let member = Member::start(ledger.clone(), profile).await?;
    let (engine, spec) = match load(watchdog.brain(factory)).await {
        Ok(loaded) => loaded,
        Err(error) => {
            member.leave().await;
            return Err(error.into());
        }
    };
    let model = spec.model.clone();
    ledger.declare_queues(&model).await?;
    let cancellations = Cancellations::listen(ledger.bus()).await?;
    // Where there is one process, its own cache is the cluster's.
    let shared = (ledger.bus().kind() != "embedded" && !options.share.is_zero())
        .then(|| Shared::new(ledger.bus().clone(), member.id().to_owned(), options.share));
    let encoder = Encoder::new(engine.clone(), options.cache_bytes, shared).await?;
    member.ready(&spec, (options.max_prompts * BATCHES) as u32).await?;
    readiness.set(true);
    tracing::info!(worker_id = member.id(), model = model.name, brain = model.brain, "brain is ready");
    let shelf = Shelf::open(options.serve, ledger.bus().local_address(), options.serve_bytes).await;
    let inline_bytes = options.inline_bytes.into();
    let abandoned = CancellationToken::new();
    let worker = Arc::new(Worker { ledger, encoder, member, cancellations, inline_bytes, shelf, abandoned });
    let gone = async {
        engine.ended().await;
        shutdown.trigger();
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = work(&options, &worker, &model, &shutdown) => {}
        () = gone => {}
        hang = watchdog.hangs(options.step_timeout) => return Err(hang.into()),
    }
    if let Some(worker) = Arc::into_inner(worker) {
        worker.member.leave().await;
    }
    if engine.has_ended() { Err(Hang::Gone.into()) } else { Ok(()) }
}

/// A brain on its thread, and what it is.
async fn load(factory: Factory<dyn Brain>) -> Result<(EngineThread<dyn Brain>, EngineSpec), EngineError> {
    let engine = EngineThread::<dyn Brain>::start("brain", factory).await?;
    let spec = engine.run(|brain| brain.spec().clone()).await?;
    Ok((engine, spec))
}

async fn work(options: &Options, worker: &Arc<Worker>, model: &Model, shutdown: &Shutdown) {
    let lanes = names::LANES.iter().map(|lane| names::brain_queue(&model.brain, *lane)).collect();
    let mut intake = Intake::new(worker.ledger.bus().clone(), lanes);
    let tasks = TaskTracker::new();
    let (batches, all) = (Arc::new(Semaphore::new(BATCHES)), Arc::new(Semaphore::new(BATCHES + UNPUBLISHED)));
    let mut busy = false;
    while !shutdown.is_triggered() {
        let places = async { tokio::try_join!(all.clone().acquire_owned(), batches.clone().acquire_owned()) };
        let (whole, place) = tokio::select! {
            places = places => places.expect("the semaphores are never closed"),
            () = shutdown.requested() => break,
        };
        let mut deliveries = intake.next(options.max_prompts).await;
        if deliveries.is_empty() {
            busy = false;
            continue;
        }
        if busy && deliveries.len() < options.max_prompts {
            tokio::time::sleep(options.batch_wait).await;
            deliveries.extend(intake.ready(options.max_prompts - deliveries.len()).await.unwrap_or_default());
        }
        busy = deliveries.len() > 1;
        let worker = worker.clone();
        let batches = batches.clone();
        tasks.spawn(async move {
            let suspects = worker.batch(deliveries, place).await;
            drop(whole);
            for (in_flight, task, suspect) in suspects {
                let alone = tokio::select! {
                    alone = batches.clone().acquire_many_owned(BATCHES as u32) => alone,
                    () = worker.abandoned.cancelled() => {
                        hand_back(&task, suspect).await;
                        continue;
                    }
                };
                let admission = suspect.begin_again().await;
                let taken = Worker::taken(in_flight, task, admission).into_iter().collect();
                worker.encode(taken, alone.expect("the semaphore is never closed")).await;
            }
        });
        // The work goes first, then the question for more.
        tokio::task::yield_now().await;
    }
    worker.member.drain();
    tasks.close();
    let leaving = LEAVING.min(options.grace / 5);
    if tokio::time::timeout(options.grace.saturating_sub(leaving), tasks.wait()).await.is_err() {
        tracing::warn!("work was left in hand at the end of the grace period; it goes back to the queue");
        worker.abandoned.cancel();
        let _ = tokio::time::timeout(leaving, tasks.wait()).await;
    }
}

/// Leaves a task to another worker.
async fn hand_back(task: &BrainTask, held: Box<Held>) {
    settled(&task.job_id, held.hand_back(STOPPING, Duration::ZERO).await);
}

/// Tells if a task could not be answered.
fn settled(job_id: &str, answered: efferent_bus::Result<()>) {
    if let Err(error) = answered {
        tracing::warn!(job_id, %error, "cannot settle a task; it is delivered again");
    }
}

struct Taken {
    in_flight: InFlight,
    held: Box<Held>,
    task: BrainTask,
    record: Box<JobRecord>,
}

impl Worker {
    /// Works on what was pulled, but for tasks that are to be worked on alone: those are left to the caller.
    async fn batch(
        &self,
        deliveries: Vec<Delivery>,
        place: OwnedSemaphorePermit,
    ) -> Vec<(InFlight, BrainTask, Box<Held>)> {
        let admitted = join_all(deliveries.into_iter().map(|delivery| self.admit(delivery))).await;
        let (mut taken, mut suspects) = (Vec::new(), Vec::new());
        for (in_flight, task, admission) in admitted.into_iter().flatten() {
            match admission {
                Ok(Admission::Suspect(held)) => suspects.push((in_flight, task, held)),
                admission => taken.extend(Self::taken(in_flight, task, admission)),
            }
        }
        self.encode(taken, place).await;
        suspects
    }

    /// Computes and publishes a batch. Its place is free as soon as the engine is done with it. What is not done when the worker must leave is handed back.
    async fn encode(&self, mut taken: Vec<Taken>, place: OwnedSemaphorePermit) {
        let asked = taken.iter().map(|taken| asked(&taken.task)).collect();
        let started = Instant::now();
        let encoding = async {
            let outcomes = self.outcomes(asked).await;
            drop(place);
            outcomes
        };
        tokio::pin!(encoding);
        let encoded = async {
            match tokio::time::timeout(task::BRISK, &mut encoding).await {
                Ok(outcomes) => outcomes,
                Err(_) => tokio::join!(encoding, join_all(taken.iter_mut().map(|taken| taken.held.begin()))).0,
            }
        };
        let outcomes = tokio::select! {
            outcomes = encoded => outcomes,
            () = self.abandoned.cancelled() => {
                join_all(taken.into_iter().map(async |taken| hand_back(&taken.task, taken.held).await)).await;
                return;
            }
        };
        taken.iter().for_each(|taken| taken.in_flight.done(1.0, started.elapsed()));
        join_all(taken.into_iter().zip(outcomes).map(|(taken, outcome)| self.hand_on(taken, outcome))).await;
    }

    /// One outcome for each request. One whose pictures cannot be read leaves the others alone.
    async fn outcomes(&self, asked: Vec<Asked>) -> Vec<Outcome> {
        if asked.iter().all(|(_, sources)| sources.is_empty()) {
            return self.encoder.encode(asked.into_iter().map(|(request, _)| request).collect()).await;
        }
        // Pictures take memory: few requests with some at a time.
        let mut outcomes = Vec::new();
        for asked in asked.chunks(PICTURED) {
            let read = join_all(asked.iter().map(|(request, sources)| self.with_pictures(request, sources))).await;
            let readable = read.iter().filter_map(|request| request.as_ref().ok().cloned()).collect();
            let mut encoded = self.encoder.encode(readable).await.into_iter();
            let missing =
                || Err(Arc::new(EngineError::Crashed("the engine left out a prompt of its batch".to_owned())));
            outcomes.extend(read.into_iter().map(|request| match request {
                Ok(_) => encoded.next().unwrap_or_else(missing),
                Err(error) => Err(Arc::new(error)),
            }));
        }
        outcomes
    }

    async fn with_pictures(
        &self,
        request: &EmbedRequest,
        sources: &[PictureSource],
    ) -> Result<EmbedRequest, EngineError> {
        let read = join_all(sources.iter().map(|source| self.reference(source))).await;
        Ok(EmbedRequest { references: read.into_iter().collect::<Result<_, _>>()?, ..request.clone() })
    }

    async fn reference(&self, source: &PictureSource) -> Result<Arc<Reference>, EngineError> {
        let field = "reference_images";
        let fetched = fetch(self.ledger.bus().as_ref(), field, source).await;
        let (hash, bytes) = fetched.map_err(|error| EngineError::Missing(format!("{field}: {error}")))??;
        let decoded = tokio::task::spawn_blocking(move || decode(File { field, bytes: &bytes })).await;
        let image = decoded.map_err(|error| EngineError::Crashed(error.to_string()))??;
        Ok(Arc::new(Reference { hash, image }))
    }

    async fn admit(&self, delivery: Delivery) -> Option<(InFlight, BrainTask, efferent_bus::Result<Admission>)> {
        let in_flight = self.member.hold();
        let task: BrainTask = task::read(&delivery).await?;
        let conditioning = Transition::Conditioning { worker_id: self.member.id().to_owned() };
        let admission = task::admit(
            &self.ledger,
            self.member.id(),
            &self.cancellations,
            delivery,
            task.expires_at_ms,
            task.known.as_ref(),
            conditioning,
        )
        .await;
        Some((in_flight, task, admission))
    }

    fn taken(in_flight: InFlight, task: BrainTask, admission: efferent_bus::Result<Admission>) -> Option<Taken> {
        match admission {
            Ok(Admission::Go(held, record)) => Some(Taken { in_flight, held, task, record }),
            Ok(_) => None,
            Err(error) => {
                tracing::warn!(job_id = task.job_id, %error, "cannot take a task on; it is delivered again");
                None
            }
        }
    }

    /// Publishes the hand's tasks, then lets go of the brain's.
    async fn hand_on(&self, taken: Taken, outcome: Outcome) {
        let Taken { in_flight: _in_flight, mut held, task, record } = taken;
        let answered = match outcome {
            _ if held.is_unwanted() => held.stopped(task.expires_at_ms).await,
            Err(error) => held.failed(&error).await,
            Ok(signal) => {
                let handed_on = async {
                    held.defer_beginning();
                    match task.keep_signal_ms {
                        0 => self.publish(&held, &task, &record, &signal).await,
                        _ => self.keep(&held, &task, &signal).await,
                    }
                };
                let handed_on = tokio::select! {
                    biased;
                    handed_on = handed_on => Some(handed_on),
                    () = self.abandoned.cancelled() => None,
                };
                match handed_on {
                    Some(Err(error)) => Err(error),
                    Some(Ok(())) if held.is_unwanted() => held.stopped(task.expires_at_ms).await,
                    Some(Ok(())) => held.done().await,
                    // What of it is published already, whoever has it next publishes to no effect.
                    None => return hand_back(&task, held).await,
                }
            }
        };
        settled(&task.job_id, answered);
    }

    /// Keeps the signal for callers, which is all that the job wants.
    async fn keep(&self, held: &Held, task: &BrainTask, signal: &Arc<ControlSignal>) -> efferent_bus::Result<()> {
        let keep = Duration::from_millis(task.keep_signal_ms);
        let encoded = Bytes::from(signal.encode_to_vec());
        let length = encoded.len() as u64;
        // A job that is accepted in the signal's last moment may render it for as long as its own deadline allows.
        let values = Some(keep + MAX_DEADLINE);
        let signal_id = held.patiently(|| self.ledger.bus().put_object(encoded.clone(), values)).await?;
        let request = task.request.clone().unwrap_or_default();
        let kept = Signal {
            signal_id: signal_id.clone(),
            model: request.model,
            space: task.model.clone().unwrap_or_default().space,
            length,
            prompt: request.prompt,
            negative_prompt: request.negative_prompt,
            reference_images: request.reference_images.into_iter().filter_map(hash).collect(),
            ..Signal::default()
        };
        held.patiently(|| self.ledger.keep_signal(kept.clone(), keep)).await?;
        let encoded = Transition::Encoded(signal_id);
        held.patiently(|| self.ledger.apply(&task.job_id, &encoded)).await.map(drop)
    }

    /// Publishes the hands' tasks; those of a large signal while it is being stored, if hands can fetch it here until then.
    async fn publish(
        &self,
        held: &Held,
        task: &BrainTask,
        record: &JobRecord,
        signal: &Arc<ControlSignal>,
    ) -> efferent_bus::Result<()> {
        let started = Instant::now();
        let request = task.request.clone().unwrap_or_default();
        let queue = names::hand_queue(&record.model.as_ref().unwrap_or(&Model::default()).hand, request.lane());
        // Whether a task was in the queue already, of an attempt before. (By the number of the delivery alone it cannot be known: a server that was killed may count anew.)
        let send = async |signal: hand_task::Signal| {
            let tasks = self.ledger.hand_tasks(record, &signal, &held.trace().headers());
            let published = join_all(tasks.into_iter().map(|task| self.publish_when_room(&queue, task, held))).await;
            let published = published.into_iter().collect::<efferent_bus::Result<Vec<_>>>()?;
            Ok::<_, efferent_bus::Error>(published.contains(&Some(Published::Duplicate)))
        };
        let (small, first) = (signal.encoded_len() <= self.inline_bytes, held.attempt() == 1);
        let again =
            if small && first { send(hand_task::Signal::Inline(signal.as_ref().clone())).await? } else { false };
        if !small || !first || again {
            let encoded = Bytes::from(signal.encode_to_vec());
            let hash = blake3::hash(&encoded).to_hex().to_string();
            let retention = Some(self.ledger.options().retention);
            let store = || held.patiently(|| self.ledger.bus().put_object(encoded.clone(), retention));
            let again = match self.shelf.as_ref().filter(|_| !small && first) {
                Some(shelf) => {
                    let address = shelf.put(hash.clone(), encoded.clone());
                    let served = hand_task::Signal::Served(ServedSignal { hash: hash.clone(), address });
                    let (stored, sent) = tokio::join!(store(), send(served));
                    stored?;
                    sent?
                }
                None => {
                    store().await?;
                    again || send(hand_task::Signal::Stored(hash.clone())).await?
                }
            };
            if !first || again {
                self.replace(&task.job_id, &hash, held).await?;
            }
        }
        metrics::histogram!("efferent_brain_publish_seconds").record(started.elapsed().as_secs_f64());
        if held.is_unwanted() {
            // Cancelled while publishing: the purge may have come before the tasks.
            self.ledger.bus().purge(&queue, &task.job_id).await?;
        }
        Ok(())
    }

    /// Tells hands that hold a task of the attempt before, whose signal may never have been stored, of this one's.
    async fn replace(&self, job_id: &str, hash: &str, held: &Held) -> efferent_bus::Result<()> {
        let known = SharedSignal { stored: hash.to_owned(), worker_id: self.member.id().to_owned() };
        let (key, retention) = (names::job_signal_key(job_id), Some(self.ledger.options().retention));
        let put = || self.ledger.bus().put(Bucket::Signals, &key, ledger::encode(&known), retention);
        held.patiently(put).await.map(drop)
    }

    /// Publishes, waiting for room in the queue for as long as the job is wanted.
    /// `None` if it is no longer.
    async fn publish_when_room(
        &self,
        queue: &str,
        task: NewTask,
        held: &Held,
    ) -> efferent_bus::Result<Option<Published>> {
        loop {
            match held.patiently(|| self.ledger.bus().publish(queue, task.clone())).await {
                Err(efferent_bus::Error::Full { .. }) if !held.is_unwanted() => {
                    tokio::time::sleep(Duration::from_millis(500)).await
                }
                Err(efferent_bus::Error::Full { .. }) => return Ok(None),
                other => return other.map(Some),
            }
        }
    }
}

/// What is to be read, and the pictures that belong to it.
type Asked = (EmbedRequest, Vec<PictureSource>);

fn asked(task: &BrainTask) -> Asked {
    let Some(request) = &task.request else { return Asked::default() };
    let (prompt, negative_prompt) = (request.prompt.clone(), request.negative_prompt.clone());
    (EmbedRequest { prompt, negative_prompt, references: Vec::new() }, request.reference_images.clone())
}

fn hash(source: PictureSource) -> Option<String> {
    match source.source? {
        Source::Hash(hash) => Some(hash),
        Source::Data(_) => None,
    }
}
