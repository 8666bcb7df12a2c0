//! A leased task and the duties that come with it, the same for brains and hands: keep the lease, notice cancellation and deadline, drop
//! what is no longer wanted, try again what may succeed, bury what will not.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use efferent_bus::{
    Delivery, Lease, SharedBus,
    ledger::{Ledger, Outcome, Transition, has_ended},
};
use efferent_proto::{
    ApiError,
    internal::{DeadLetter, JobRecord, KnownJob},
    names, time,
    v1::{ErrorCode, JobState},
};
use efferent_service::trace;
use futures::StreamExt as _;
use prost::Message;
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;

use crate::engine::EngineError;

/// How often a task is delivered before it counts as poison.
pub const MAX_ATTEMPTS: u32 = 5;

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
    job_id: String,
    attempt: u32,
    headers: BTreeMap<String, String>,
    payload: bytes::Bytes,
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
    let Delivery { queue, job, attempt, headers, payload, lease, published_at, .. } = delivery;
    let waited = SystemTime::now().duration_since(published_at).unwrap_or_default();
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
    let mut held = Held {
        queue,
        job_id: job,
        attempt,
        headers,
        payload,
        lease,
        ledger,
        worker_id,
        cancellations,
        token,
        keeper,
        beginning: None,
    };
    if attempt > MAX_ATTEMPTS {
        let message =
            format!("the task was delivered {MAX_ATTEMPTS} times and never finished: its workers failed or died");
        held.bury(ApiError::new(ErrorCode::AttemptsExhausted, message)).await?;
        return Ok(Admission::Dropped);
    }
    if time::unix_ms(SystemTime::now()) >= expires_at_ms {
        held.expire().await?;
        return Ok(Admission::Dropped);
    }
    if let Some(KnownJob { record: Some(record), .. }) = known.filter(|_| attempt == 1) {
        held.ledger.remember(known.cloned().unwrap_or_default());
        held.beginning = Some(beginning);
        return Ok(Admission::Go(Box::new(held), Box::new(record.clone())));
    }
    match held.ledger.apply(&held.job_id, &beginning).await? {
        Outcome::Changed(record) => Ok(Admission::Go(Box::new(held), record)),
        Outcome::Unchanged(record) if !has_ended(&record) => Ok(Admission::Go(Box::new(held), record)),
        Outcome::Unchanged(_) | Outcome::Unknown => {
            metrics::counter!("efferent_tasks_dropped_total", "why" => "job over").increment(1);
            held.done().await?;
            Ok(Admission::Dropped)
        }
    }
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

    /// Where it belongs in a trace.
    pub fn trace(&self) -> trace::Context {
        trace::Context::of(&self.headers)
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

    /// Its output is durable, or not wanted: removes the task.
    ///
    /// # Errors
    /// If the bus is unavailable. The task is then delivered again, and found done.
    pub async fn done(self) -> efferent_bus::Result<()> {
        self.lease.ack().await
    }

    /// Hands it back for another worker, at once.
    ///
    /// # Errors
    /// If the bus is unavailable. The task is then delivered again when its lease ends.
    pub async fn hand_back(self) -> efferent_bus::Result<()> {
        self.lease.nak(Duration::ZERO).await
    }

    /// It was stopped because the job is cancelled or expired: settles which.
    ///
    /// # Errors
    /// If the bus is unavailable.
    pub async fn stopped(self, expires_at_ms: i64) -> efferent_bus::Result<()> {
        if time::unix_ms(SystemTime::now()) >= expires_at_ms { self.expire().await } else { self.done().await }
    }

    /// It failed: ends the job, or has the task delivered again with growing delay.
    ///
    /// # Errors
    /// If the bus is unavailable.
    pub async fn failed(mut self, error: &EngineError) -> efferent_bus::Result<()> {
        self.defer_beginning();
        tracing::warn!(job_id = self.job_id, attempt = self.attempt, %error, cause = cause(error), "task failed");
        metrics::counter!("efferent_tasks_failed_total", "queue" => self.queue.clone()).increment(1);
        if !error.is_transient() {
            self.end(JobState::Failed, error.to_api()).await?;
            return self.lease.ack().await;
        }
        if self.attempt >= MAX_ATTEMPTS {
            let message = format!("tried {} times, and at last: {error}", self.attempt);
            return self.bury(ApiError::new(ErrorCode::AttemptsExhausted, message)).await;
        }
        self.lease.nak(Duration::from_millis(250) * 2u32.pow(self.attempt.min(6))).await
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

    /// Ends the job, keeps the task with the dead, removes it from its queue.
    async fn bury(self, error: ApiError) -> efferent_bus::Result<()> {
        metrics::counter!("efferent_dead_letters_total", "queue" => self.queue.clone()).increment(1);
        let reason = error.message.clone();
        let letter = DeadLetter {
            queue: self.queue.clone(),
            job_id: self.job_id.clone(),
            task: self.payload.clone(),
            error: Some(error.clone().into()),
            attempts: self.attempt,
            worker_id: self.worker_id.clone(),
            time_ms: time::unix_ms(SystemTime::now()),
        };
        self.ledger.bury(&letter).await?;
        self.end(JobState::Failed, error).await?;
        self.lease.terminate(&reason).await
    }

    async fn end(&self, state: JobState, error: ApiError) -> efferent_bus::Result<()> {
        self.ledger.apply(&self.job_id, &Transition::End { state, error: error.into() }).await.map(drop)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.keeper.abort();
        self.cancellations.remove(&self.job_id, &self.token);
    }
}

/// Extends the lease, watches the deadline, and looks at the record now and then in case a cancellation was not heard.
async fn keep(lease: Arc<dyn Lease>, ledger: Ledger, job_id: String, expires_at_ms: i64, token: CancellationToken) {
    let deadline = time::from_unix_ms(expires_at_ms).duration_since(SystemTime::now()).unwrap_or_default();
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

fn cause(error: &EngineError) -> String {
    let mut causes = Vec::new();
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        causes.push(error.to_string());
        source = error.source();
    }
    causes.join(": ")
}
