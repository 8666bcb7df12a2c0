//! A leased task and the duties that come with it, the same for brains and hands: keep the lease, notice cancellation and deadline, drop
//! what is no longer wanted, try again what may succeed, bury what will not.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use efferent_bus::{
    Delivery, Lease, SharedBus,
    ledger::{
        Ledger, Outcome, Transition,
        attempts::{MAX_CRASHES, MAX_DELIVERIES, Tally},
        has_ended, transition,
    },
};
use efferent_proto::{
    ApiError,
    internal::{JobRecord, KnownJob},
    names, time,
    v1::{Attempt, ErrorCode, FailureClass, Job, JobState},
};
use efferent_service::trace;
use futures::StreamExt as _;
use prost::Message;
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;

use crate::engine::EngineError;

/// How long the outcome of work is kept for a bus that is unavailable, rather than thrown away and computed again.
const PATIENCE: Duration = Duration::from_secs(60);
/// The first and the longest pause between tries to write an outcome.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// What doubles with each delivery to make the pause before the next one, and how often it doubles at most.
const BACK_OFF: (Duration, u32) = (Duration::from_millis(250), 6);

/// Work that is over within this time does not have its beginning written first: it is written together with what came of it.
pub const BRISK: Duration = Duration::from_millis(5);

/// Jobs that this worker holds, by id, so that one subscription to cancellations serves all.
#[derive(Debug, Clone, Default)]
pub struct Cancellations(Arc<Mutex<HashMap<String, Vec<CancellationToken>>>>);

impl Cancellations {
    /// Listens for as long as the bus lives.
    ///
    /// # Errors
    /// If the bus is unavailable.
    pub async fn listen(bus: &SharedBus) -> efferent_bus::Result<Self> {
        let this = Self::default();
        let mut events = bus.subscribe(names::ANY_CANCEL).await?;
        let held = this.clone();
        tokio::spawn(async move {
            while let Some(event) = events.next().await {
                if let Some(job_id) = names::cancelled_job(&event.subject) {
                    held.cancel(job_id);
                }
            }
        });
        Ok(this)
    }

    fn cancel(&self, job_id: &str) {
        let tokens = self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(job_id);
        tokens.into_iter().flatten().for_each(|token| token.cancel());
    }

    fn add(&self, job_id: &str) -> CancellationToken {
        let token = CancellationToken::new();
        self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(job_id.to_owned()).or_default().push(token.clone());
        token
    }

    /// Forgets tokens that nobody else holds... which is those already given; called when a task ends.
    fn remove(&self, job_id: &str, token: &CancellationToken) {
        token.cancel();
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(tokens) = held.get_mut(job_id) {
            tokens.retain(|token| !token.is_cancelled());
            if tokens.is_empty() {
                held.remove(job_id);
            }
        }
    }
}

/// A task that this worker holds: its lease is extended until it is dropped or answered.
#[derive(Debug)]
pub struct Held {
    queue: String,
    key: String,
    job_id: String,
    attempt: u32,
    /// The span of the work on it, and when that began.
    span: (trace::Context, SystemTime),
    lease: Arc<dyn Lease>,
    ledger: Ledger,
    worker_id: String,
    cancellations: Cancellations,
    token: CancellationToken,
    keeper: AbortHandle,
    /// That work on it has begun, as long as that is not written.
    beginning: Option<Transition>,
}

/// What to do with a task that was just pulled.
#[derive(Debug)]
pub enum Admission {
    /// Work on it; the job as it is now.
    Go(Box<Held>, Box<JobRecord>),
    /// It may be its fault that earlier attempts took their workers down: it is to be worked on with nothing else in its worker. When that is so, it
    /// begins by [`Held::begin_again`].
    Suspect(Box<Held>),
    /// Nothing: it was cancelled, expired, finished or buried, and is answered.
    Dropped,
}

/// The message of a pulled task. One that cannot be decoded is logged and removed: it would fail everywhere.
pub async fn read<M: Message + Default>(delivery: &Delivery) -> Option<M> {
    match M::decode(delivery.payload.clone()) {
        Ok(task) => Some(task),
        Err(error) => {
            tracing::error!(job_id = delivery.job, queue = delivery.queue, %error, "a task cannot be decoded; dropped");
            let _ = delivery.lease.terminate("malformed").await;
            None
        }
    }
}

/// Takes on a pulled task, whose beginning is `beginning`, and drops it if the job wants it no more or it was tried too often. `known` is what
/// came with the task: with that, a first attempt begins at once, and [`Held::begin`] or the next change writes its beginning.
///
/// # Errors
/// If the bus is unavailable; the task is delivered again when its lease ends.
pub async fn admit(
    ledger: &Ledger,
    worker_id: &str,
    cancellations: &Cancellations,
    delivery: Delivery,
    expires_at_ms: i64,
    known: Option<&KnownJob>,
    beginning: Transition,
) -> efferent_bus::Result<Admission> {
    let Delivery { queue, key, job, attempt, headers, payload: _, lease, published_at } = delivery;
    let now = ledger.now();
    let waited = now.duration_since(published_at).unwrap_or_default();
    let trace = trace::Context::of(&headers);
    trace.child().tell(spans(&queue).0, published_at, now, &[("efferent.queue", &queue), ("efferent.job_id", &job)]);
    metrics::histogram!("efferent_queue_wait_seconds", "queue" => queue.clone()).record(waited.as_secs_f64());
    if attempt > 1 {
        metrics::counter!("efferent_redeliveries_total", "queue" => queue.clone()).increment(1);
    }
    // Registered before the record is read: a cancellation in between is seen by one or the other.
    let token = cancellations.add(&job);
    let lease: Arc<dyn Lease> = lease.into();
    let keeper =
        tokio::spawn(keep(lease.clone(), ledger.clone(), job.clone(), expires_at_ms, token.clone())).abort_handle();
    let (ledger, worker_id, cancellations) = (ledger.clone(), worker_id.to_owned(), cancellations.clone());
    let held = Held {
        queue,
        key,
        job_id: job,
        attempt,
        span: (trace.child(), now),
        lease,
        ledger,
        worker_id,
        cancellations,
        token,
        keeper,
        beginning: Some(beginning),
    };
    if time::unix_ms(now) >= expires_at_ms {
        held.expire().await?;
        return Ok(Admission::Dropped);
    }
    if attempt > MAX_DELIVERIES {
        let message = format!("the task was delivered {MAX_DELIVERIES} times and never finished");
        held.bury(FailureClass::Transient, message).await?;
        return Ok(Admission::Dropped);
    }
    if let Some(KnownJob { record: Some(record), .. }) = known.filter(|_| attempt == 1) {
        held.ledger.remember(known.cloned().unwrap_or_default());
        return Ok(Admission::Go(Box::new(held), Box::new(record.clone())));
    }
    // What it would be to begin.
    let mut record = held.ledger.job(&held.job_id).await?.unwrap_or_default();
    let begun = held.begun();
    transition::apply(&mut record, &begun, held.ledger.now());
    let tally = Tally::of(&record, &held.key);
    if let Some(class) = tally.exhausted() {
        let message = format!("took down {MAX_CRASHES} workers: each crashed, died or was not heard of for its lease");
        held.ledger.apply(&held.job_id, &begun).await?;
        held.bury(class, message).await?;
        return Ok(Admission::Dropped);
    }
    let held = Box::new(held);
    if tally.is_suspect() { Ok(Admission::Suspect(held)) } else { held.begin_again().await }
}

impl Held {
    /// The job it belongs to.
    pub fn job_id(&self) -> &str {
        &self.job_id
    }

    /// Which delivery this is, from 1.
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// Where what it causes belongs in a trace.
    pub fn trace(&self) -> &trace::Context {
        &self.span.0
    }

    /// Whether its beginning is written.
    pub fn has_begun(&self) -> bool {
        self.beginning.is_none()
    }

    /// Writes its beginning, unless that is written. Finding the job over makes the task unwanted.
    pub async fn begin(&mut self) {
        let Some(beginning) = self.beginning.take() else { return };
        match self.ledger.apply(&self.job_id, &beginning).await {
            Ok(Outcome::Changed(_)) => {}
            Ok(Outcome::Unchanged(record)) if !has_ended(&record) => {}
            Ok(Outcome::Unchanged(_) | Outcome::Unknown) => self.token.cancel(),
            // Only a report; what counts is whether the outcome can be written.
            Err(error) => tracing::warn!(job_id = self.job_id, %error, "cannot write that work has begun"),
        }
    }

    /// The work was over before its beginning was written: that is left to the next change.
    pub fn defer_beginning(&mut self) {
        if let Some(beginning) = self.beginning.take() {
            self.ledger.defer(&self.job_id, &beginning);
        }
    }

    /// Waits until the job is cancelled or its deadline has passed.
    pub fn unwanted(&self) -> impl Future<Output = ()> + Send + 'static {
        self.token.clone().cancelled_owned()
    }

    /// Whether the job is cancelled or its deadline has passed.
    pub fn is_unwanted(&self) -> bool {
        self.token.is_cancelled()
    }

    /// Writes that an attempt is made that is not the first, before it is.
    ///
    /// # Errors
    /// If the bus is unavailable; the task is delivered again when its lease ends.
    pub async fn begin_again(self: Box<Self>) -> efferent_bus::Result<Admission> {
        match self.ledger.apply(&self.job_id, &self.begun()).await? {
            Outcome::Changed(record) => Ok(Admission::Go(self, record)),
            Outcome::Unchanged(_) | Outcome::Unknown => {
                metrics::counter!("efferent_tasks_dropped_total", "why" => "job over").increment(1);
                self.done().await?;
                Ok(Admission::Dropped)
            }
        }
    }

    fn begun(&self) -> Transition {
        Transition::Begun(self.attempt_with(FailureClass::Unspecified, String::new()))
    }

    /// Has an outcome written. While the bus is unavailable it is tried again, as long as the job is wanted: what was computed is not computed
    /// anew because a server restarts.
    ///
    /// # Errors
    /// If the bus is unavailable for long, or refuses.
    pub async fn patiently<T, F: Future<Output = efferent_bus::Result<T>>>(
        &self,
        write: impl Fn() -> F,
    ) -> efferent_bus::Result<T> {
        let until = Instant::now() + PATIENCE;
        let (mut pause, longest) = PAUSES;
        loop {
            match write().await {
                Err(error @ efferent_bus::Error::Unavailable { .. })
                    if !self.is_unwanted() && Instant::now() < until =>
                {
                    tracing::debug!(job_id = self.job_id, %error, "an outcome cannot be written yet");
                    tokio::time::sleep(pause).await;
                    pause = longest.min(pause * 2);
                }
                written => return written,
            }
        }
    }

    /// Its output is durable, or not wanted: removes the task.
    ///
    /// # Errors
    /// If the bus is unavailable. The task is then delivered again, and found done.
    pub async fn done(self) -> efferent_bus::Result<()> {
        self.patiently(|| self.lease.ack()).await
    }

    /// Hands it back for another worker, after a pause, and tells why. It does not count as a failure.
    ///
    /// # Errors
    /// If the bus is unavailable. The task is then delivered again when its lease ends.
    pub async fn hand_back(mut self, why: &str, pause: Duration) -> efferent_bus::Result<()> {
        self.defer_beginning();
        let handed_back = self.attempt_with(FailureClass::HandedBack, why.to_owned());
        self.ledger.apply(&self.job_id, &Transition::Missed(handed_back)).await?;
        self.lease.nak(pause).await
    }

    /// It was stopped because the job is cancelled or expired: settles which.
    ///
    /// # Errors
    /// If the bus is unavailable.
    pub async fn stopped(self, expires_at_ms: i64) -> efferent_bus::Result<()> {
        if time::unix_ms(self.ledger.now()) >= expires_at_ms { self.expire().await } else { self.done().await }
    }

    /// It failed: ends the job, or has the task delivered again with growing delay, as often as failures of its class may happen. If the engine is gone,
    /// hands it back.
    ///
    /// # Errors
    /// If the bus is unavailable.
    pub async fn failed(mut self, error: &EngineError) -> efferent_bus::Result<()> {
        if matches!(error, EngineError::Gone) {
            return self.hand_back(&error.told(), Duration::ZERO).await;
        }
        self.defer_beginning();
        let class = error.class();
        let label = class.map_or("bad_input", class_label);
        tracing::warn!(
            job_id = self.job_id,
            attempt = self.attempt,
            class = label,
            error = error.told(),
            "task failed"
        );
        metrics::counter!("efferent_tasks_failed_total", "queue" => self.queue.clone(), "class" => label).increment(1);
        let Some(class) = class else {
            self.end(JobState::Failed, error.to_api()).await?;
            return self.lease.ack().await;
        };
        let missed = Transition::Missed(self.attempt_with(class, error.told()));
        let outcome = self.patiently(|| self.ledger.apply(&self.job_id, &missed)).await?;
        let Outcome::Changed(record) = outcome else { return self.done().await };
        if let Some(class) = Tally::of(&record, &self.key).exhausted() {
            let message = format!("tried {} times, and at last: {}", self.attempt, error.told());
            return self.bury(class, message).await;
        }
        let (pause, doublings) = BACK_OFF;
        self.lease.nak(pause * 2u32.pow(self.attempt.min(doublings))).await
    }

    fn attempt_with(&self, class: FailureClass, error: String) -> Attempt {
        Attempt {
            queue: self.queue.clone(),
            task: self.key.clone(),
            number: self.attempt,
            worker_id: self.worker_id.clone(),
            time: None,
            class: class.into(),
            error,
        }
    }

    async fn expire(self) -> efferent_bus::Result<()> {
        metrics::counter!("efferent_tasks_dropped_total", "why" => "expired").increment(1);
        self.end(
            JobState::Expired,
            ApiError::new(ErrorCode::Expired, "the deadline passed before every image was rendered"),
        )
        .await?;
        self.lease.ack().await
    }

    /// Keeps the job with the dead, ends it, removes the task from its queue.
    async fn bury(self, class: FailureClass, message: String) -> efferent_bus::Result<()> {
        let Some(record) = self.ledger.job(&self.job_id).await?.filter(|record| !has_ended(record)) else {
            return self.done().await;
        };
        metrics::counter!("efferent_dead_letters_total", "queue" => self.queue.clone(), "class" => class_label(class))
            .increment(1);
        let error = ApiError::new(ErrorCode::AttemptsExhausted, message);
        self.ledger.bury(&record, class, error.clone().into()).await?;
        let reason = error.message.clone();
        let outcome = self.end(JobState::Failed, error).await?;
        let state = outcome.record().and_then(|record| record.job.as_ref()).map(Job::state);
        if state.is_some_and(|state| state != JobState::Failed) {
            // It ended otherwise at the last moment: a worker that had been given up was quicker.
            self.ledger.drop_letter(&self.job_id).await?;
        }
        self.lease.terminate(&reason).await
    }

    async fn end(&self, state: JobState, error: ApiError) -> efferent_bus::Result<Outcome> {
        self.ledger.apply(&self.job_id, &Transition::End { state, error: error.into() }).await
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let (span, began) = &self.span;
        let about = [
            ("efferent.queue", self.queue.as_str()),
            ("efferent.job_id", &self.job_id),
            ("efferent.task", &self.key),
            ("efferent.attempt", &self.attempt.to_string()),
            ("efferent.worker_id", &self.worker_id),
        ];
        span.tell(spans(&self.queue).1, *began, self.ledger.now(), &about);
        self.keeper.abort();
        self.cancellations.remove(&self.job_id, &self.token);
    }
}

/// What the wait for a worker and its work are called in traces.
fn spans(queue: &str) -> (&'static str, &'static str) {
    if queue.starts_with("hand.") { ("wait for a hand", "hand") } else { ("wait for a brain", "brain") }
}

/// Extends the lease, watches the deadline, and looks at the record now and then in case a cancellation was not heard.
async fn keep(lease: Arc<dyn Lease>, ledger: Ledger, job_id: String, expires_at_ms: i64, token: CancellationToken) {
    let deadline = time::from_unix_ms(expires_at_ms).duration_since(ledger.now()).unwrap_or_default();
    let deadline = tokio::time::sleep(deadline);
    tokio::pin!(deadline);
    loop {
        tokio::select! {
            () = &mut deadline => return token.cancel(),
            () = tokio::time::sleep(ledger.options().lease / 4) => {}
        }
        if let Err(error) = lease.extend().await {
            tracing::warn!(job_id, %error, "could not extend a lease");
        }
        if let Ok(Some(record)) = ledger.job(&job_id).await
            && has_ended(&record)
        {
            return token.cancel();
        }
    }
}

fn class_label(class: FailureClass) -> &'static str {
    match class {
        FailureClass::Unspecified => "unknown",
        FailureClass::Transient => "transient",
        FailureClass::OutOfMemory => "out_of_memory",
        FailureClass::EngineCrash => "engine_crash",
        FailureClass::WorkerLost => "worker_lost",
        FailureClass::HandedBack => "handed_back",
    }
}
