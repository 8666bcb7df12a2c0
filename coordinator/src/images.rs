//! `ImageService`: from a request to a durable job, and what clients ask about jobs afterwards.

use std::{
    sync::Arc,
    time::{Instant, SystemTime},
};

use bytes::{Bytes, BytesMut};
use efferent_bus::{
    Bucket, NewTask, Published,
    ledger::{Ledger, Outcome, Transition, encode, is_final, job_id, transition},
};
use efferent_proto::{
    ApiError,
    internal::{BrainTask, IdempotencyRecord, JobRecord, hand_task},
    names, time,
    v1::{
        CancelJobRequest, CancelJobResponse, ErrorCode, GenerateRequest, GetImageRequest, GetJobRequest, Image,
        ImageChunk, Job, JobEvent, JobState, Model, Quotation, Signal, WatchJobRequest,
        image_service_server::ImageService, job_event::Event,
    },
};
use efferent_service::{Shutdown, trace};
use futures::{StreamExt as _, future::try_join_all, stream::BoxStream};
use prost::Message as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::{
    directory::{self, Directory},
    follow::{self, Tail, Wish},
    pictures, quote,
    server::Options,
    signals,
    tenants::{self, Gate, Stream as Place},
    validate,
};

/// Bytes of an image in one message.
const CHUNK: usize = 256 * 1024;
/// Events that may wait for a slow client.
const BACKLOG: usize = 64;

/// The service.
#[derive(Debug, Clone)]
pub struct Images {
    ledger: Ledger,
    directory: Directory,
    gate: Gate,
    options: Options,
    streams: Arc<Semaphore>,
    shutdown: Shutdown,
}

pub(crate) fn unavailable(error: efferent_bus::Error) -> ApiError {
    match error {
        efferent_bus::Error::Full { .. } => ApiError::new(ErrorCode::QueueFull, error.to_string()),
        error @ efferent_bus::Error::Usage(_) => ApiError::new(ErrorCode::Internal, error.to_string()),
        error => ApiError::new(ErrorCode::BusUnavailable, error.to_string()),
    }
}

fn incomplete() -> ApiError {
    ApiError::new(ErrorCode::Internal, "a job record is incomplete")
}

/// By which a request is known again. Whether its images come along with the events changes nothing about them.
fn fingerprint(request: &GenerateRequest) -> Bytes {
    let request = GenerateRequest { inline_images: false, ..request.clone() };
    Bytes::copy_from_slice(blake3::hash(&request.encode_to_vec()).as_bytes())
}

/// Counts a call by its outcome.
pub(crate) fn count<T>(method: &'static str, started: Instant, outcome: Result<T, ApiError>) -> Result<T, Status> {
    let code = outcome.as_ref().map_or_else(ApiError::reason, |_| "OK");
    metrics::counter!("efferent_requests_total", "method" => method, "code" => code).increment(1);
    metrics::histogram!("efferent_request_seconds", "method" => method).record(started.elapsed().as_secs_f64());
    outcome.map_err(Status::from)
}

type Events = BoxStream<'static, Result<JobEvent, Status>>;

impl Images {
    /// A service on these records.
    pub fn new(ledger: Ledger, directory: Directory, gate: Gate, options: Options, shutdown: Shutdown) -> Self {
        let streams = Arc::new(Semaphore::new(options.max_streams));
        Self { ledger, directory, gate, options, streams, shutdown }
    }

    /// Streams that are open now.
    pub fn open_streams(&self) -> u32 {
        self.options.max_streams.saturating_sub(self.streams.available_permits()) as u32
    }

    /// Deadline of requests that have none.
    pub(crate) fn default_deadline(&self) -> std::time::Duration {
        self.options.default_deadline
    }

    /// An error once this process is to stop.
    pub(crate) fn check_running(&self) -> Result<(), ApiError> {
        match self.shutdown.is_triggered() {
            true => Err(ApiError::new(ErrorCode::Stopping, "this coordinator is stopping; ask another one")),
            false => Ok(()),
        }
    }

    pub(crate) fn stream_permit(&self) -> Result<OwnedSemaphorePermit, ApiError> {
        self.check_running()?;
        self.streams.clone().try_acquire_owned().map_err(|_| {
            let limit = self.options.max_streams;
            ApiError::new(ErrorCode::TooManyRequests, format!("{limit} streams are open at this coordinator"))
                .limit(limit.to_string())
        })
    }

    /// Makes the job durable and its task with it, or finds the job that the idempotency key names. A new one comes with its events.
    async fn accept(
        &self,
        request: GenerateRequest,
        trace: &trace::Context,
    ) -> Result<(String, Option<Tail>), ApiError> {
        validate::syntax(&request)?;
        let (key, id) = (request.idempotency_key.clone(), names::new_job_id());
        if key.is_empty() {
            let record = self.prepare(id.clone(), request).await?;
            return Ok((id, self.begin(record, trace).await?));
        }
        let hash = fingerprint(&request);
        let prepared = self.prepare(id.clone(), request.clone()).await;
        // A key is claimed for what can be done only: a refused request can be mended, and sent with the same key.
        let standing = match &prepared {
            Ok(_) => {
                let claim = IdempotencyRecord { job_id: id.clone(), request_hash: hash.clone() };
                Some(self.ledger.claim_key(&key, claim).await.map_err(unavailable)?)
            }
            Err(_) => self.ledger.claimed(&key).await.map_err(unavailable)?,
        };
        let Some(standing) = standing else { return Err(prepared.err().unwrap_or_else(incomplete)) };
        if standing.request_hash != hash {
            let message = format!("the idempotency key was used for another request, job {}", standing.job_id);
            return Err(ApiError::new(ErrorCode::IdempotencyConflict, message).field("idempotency_key"));
        }
        if let Some(record) = self.ledger.job(&standing.job_id).await.map_err(unavailable)? {
            // Whoever created it may have died before it published the task. Published again, it is stored once.
            if record.job.as_ref().is_some_and(|job| job.state() == JobState::Accepted) {
                self.publish(&record, trace).await?;
            }
            return Ok((standing.job_id, None));
        }
        let (prepared, id) = (prepared?, standing.job_id);
        let record = if job_id(&prepared) == id { prepared } else { self.draft(id.clone(), request).await? };
        // None if another request with the same key was quicker.
        let tail = self.begin(record, trace).await?;
        Ok((id, tail))
    }

    /// A job that can be accepted now, and done in the time it has.
    async fn prepare(&self, id: String, request: GenerateRequest) -> Result<JobRecord, ApiError> {
        let urgent = request.deadline.is_some();
        let record = self.draft(id, request).await?;
        if urgent {
            self.check_deadline(&record).await?;
        }
        Ok(record)
    }

    /// Makes a job durable and its task with it; the job comes back with its events. `None` if there is one of its id.
    ///
    /// Both at once, where the request has no idempotency key: should the job not be made, whoever gets the task finds none and drops it. With a key
    /// the caller may ask again for the same job, whose task must not have been dropped by then: the queue would not take it a second time.
    pub(crate) async fn begin(&self, record: JobRecord, trace: &trace::Context) -> Result<Option<Tail>, ApiError> {
        let subject = names::job_events(job_id(&record));
        let once = record.job.iter().flat_map(|job| &job.request).all(|request| request.idempotency_key.is_empty());
        let making = async {
            if once {
                self.ledger.expect_job(&record);
                return tokio::join!(self.ledger.create_job(&record), self.publish(&record, trace));
            }
            match self.ledger.create_job(&record).await {
                Ok(true) => (Ok(true), self.publish(&record, trace).await),
                made => (made, Ok(())),
            }
        };
        // The subscription is sent first: what happens to the job is heard from its beginning on. Were it not, the record has it.
        let (events, (created, published)) = tokio::join!(self.ledger.bus().subscribe(&subject), making);
        if !created.map_err(unavailable)? {
            return Ok(None);
        }
        match published.and(events.map_err(unavailable)) {
            Ok(events) => {
                tracing::info!(job_id = job_id(&record), trace_id = trace.trace_id, "accepted");
                Ok(Some(Tail { record, events }))
            }
            Err(error) => Err(self.unmake(&record, error).await),
        }
    }

    /// Refuses a job that would not be done in the time it has.
    async fn check_deadline(&self, record: &JobRecord) -> Result<(), ApiError> {
        let (Some(job), Some(model)) = (&record.job, &record.model) else { return Ok(()) };
        let Some(request) = &job.request else { return Ok(()) };
        let deadline = request.deadline.as_ref().and_then(time::duration).unwrap_or(self.options.default_deadline);
        quote::check_deadline(&quote::quote(&self.directory, request, model).await?, deadline)
    }

    async fn quotation(&self, request: GenerateRequest) -> Result<Quotation, ApiError> {
        validate::syntax(&request)?;
        let (request, model) = self.resolve(request).await?;
        self.directory.declare(&model).await.map_err(unavailable)?;
        quote::quote(&self.directory, &request, &model).await
    }

    /// Makes the job of this id durable, and its task with it, unless it is there. Returns whether it was not.
    pub(crate) async fn make(
        &self,
        id: &str,
        request: GenerateRequest,
        trace: &trace::Context,
    ) -> Result<bool, ApiError> {
        let standing = self.ledger.job(id).await.map_err(unavailable)?;
        let mut record = match &standing {
            Some(record) => record.clone(),
            None => self.draft(id.to_owned(), request).await?,
        };
        let made = standing.is_none() && self.ledger.create_job(&record).await.map_err(unavailable)?;
        if !made && standing.is_none() {
            // Another was quicker just now.
            record = self.ledger.job(id).await.map_err(unavailable)?.unwrap_or(record);
        }
        // Whoever made it may have died before it published the task. Published again, it is stored once.
        if record.job.as_ref().is_some_and(|job| job.state() == JobState::Accepted)
            && let Err(error) = self.publish(&record, trace).await
        {
            return Err(if made { self.unmake(&record, error).await } else { error });
        }
        Ok(made)
    }

    /// A request with every default filled in, and the model that does it.
    async fn resolve(&self, mut request: GenerateRequest) -> Result<(GenerateRequest, Model), ApiError> {
        if request.signal_id.is_empty() {
            let model = self.directory.choose(&request.model, directory::needs(&request))?;
            validate::mended(&request, &model)?;
            pictures::fit(&self.ledger, &mut request, &model).await?;
            return Ok((validate::resolve(request, &model, self.options.default_deadline)?, model));
        }
        let signal = signals::find(&self.ledger, &request.signal_id).await?;
        let model = self.directory.choose_hand(&request.model, &signal)?;
        validate::mended(&request, &model)?;
        pictures::fit(&self.ledger, &mut request, &model).await?;
        let resolved = validate::resolve(request, &model, self.options.default_deadline)?;
        let Signal { prompt, negative_prompt, .. } = signal;
        Ok((GenerateRequest { prompt, negative_prompt, ..resolved }, model))
    }

    /// A job that can be accepted now, with every default filled in.
    pub(crate) async fn draft(&self, id: String, request: GenerateRequest) -> Result<JobRecord, ApiError> {
        let (mut request, model) = self.resolve(request).await?;
        pictures::keep(&self.ledger, &mut request).await?;
        Ok(self.drafted(id, request, model))
    }

    /// A job of a request that has every default filled in.
    pub(crate) fn drafted(&self, id: String, request: GenerateRequest, model: Model) -> JobRecord {
        let now = self.ledger.now();
        let deadline = request.deadline.as_ref().and_then(time::duration).unwrap_or(self.options.default_deadline);
        let depth = self.directory.depth(&first_queue(&request, &model));
        transition::accepted(id, request, model, now, now + deadline, depth + 1)
    }

    /// After a job's task could not be published. If that is certain, the job must not linger. After other errors it may have been
    /// stored: the job stays, and whoever asks for it again finds it. (If nobody does, it expires.)
    pub(crate) async fn unmake(&self, record: &JobRecord, error: ApiError) -> ApiError {
        if error.code == ErrorCode::QueueFull {
            let _ = self.ledger.bus().delete(Bucket::Jobs, job_id(record)).await;
            if tasks_are_hands(record) {
                // There was room for some of them.
                follow::purge(&self.ledger, record).await;
            }
        }
        error
    }

    /// Publishes the tasks that a job begins with: a brain's, or a hand's for each image if the control signal is there. A second time, they are not
    /// stored again.
    pub(crate) async fn publish(&self, record: &JobRecord, trace: &trace::Context) -> Result<(), ApiError> {
        let (Some(job), Some(model)) = (&record.job, &record.model) else {
            return Err(incomplete());
        };
        self.directory.declare(model).await.map_err(unavailable)?;
        let request = job.request.clone().unwrap_or_default();
        let queue = first_queue(&request, model);
        let tasks = if tasks_are_hands(record) {
            let signal = hand_task::Signal::Stored(request.signal_id.clone());
            self.ledger.hand_tasks(record, &signal, &trace.headers())
        } else {
            let task = BrainTask {
                job_id: job.job_id.clone(),
                request: Some(request.clone()),
                model: Some(model.clone()),
                expires_at_ms: job.expires_at.as_ref().map_or(0, |at| time::unix_ms(time::system_time(at))),
                known: self.ledger.known(&job.job_id),
                keep_signal_ms: record.keep_signal_ms,
            };
            let (key, job) = (job.job_id.clone(), job.job_id.clone());
            vec![NewTask { key, job, headers: trace.headers(), payload: encode(&task) }]
        };
        let published = try_join_all(tasks.into_iter().map(|task| self.ledger.bus().publish(&queue, task)));
        let stored =
            published.await.map_err(unavailable)?.into_iter().filter(|each| *each == Published::Stored).count();
        if stored > 0 {
            (0..stored).for_each(|_| self.directory.add_task(&queue));
            self.directory.note(&model.hand, &request);
        }
        Ok(())
    }

    fn stream(
        &self,
        id: String,
        tail: Option<Tail>,
        wish: Wish,
        places: (OwnedSemaphorePermit, Option<Place>),
        existing: bool,
        span: Option<(trace::Context, SystemTime)>,
    ) -> Events {
        let (sender, receiver) = mpsc::channel(BACKLOG);
        let following = follow::follow(self.ledger.clone(), id.clone(), tail, wish, sender, self.shutdown.clone());
        let ledger = self.ledger.clone();
        tokio::spawn(async move {
            following.await;
            drop(places);
            if let Some((trace, began)) = span {
                trace.tell("Generate", began, ledger.now(), &[("efferent.job_id", &id)]);
            }
        });
        let mark = move |event: Result<JobEvent, Status>| {
            event.map(|mut event| {
                if let Some(Event::Accepted(accepted)) = &mut event.event {
                    accepted.existing = existing;
                }
                event
            })
        };
        ReceiverStream::new(receiver).map(mark).boxed()
    }

    async fn known_job(&self, id: &str) -> Result<JobRecord, ApiError> {
        let unknown = || ApiError::new(ErrorCode::UnknownJob, format!("no job {id:?} is known")).field("job_id");
        if !names::is_job_id(id) {
            return Err(unknown());
        }
        let record = self.ledger.job(id).await.map_err(unavailable)?.ok_or_else(unknown)?;
        follow::expire(&self.ledger, record).await.map_err(unavailable)
    }

    pub(crate) async fn cancel(&self, id: &str) -> Result<CancelJobResponse, ApiError> {
        self.known_job(id).await?;
        let error = ApiError::new(ErrorCode::Cancelled, "cancelled by the caller").into();
        let end = Transition::End { state: JobState::Cancelled, error };
        let outcome = self.ledger.apply(id, &end).await.map_err(unavailable)?;
        let changed = matches!(outcome, Outcome::Changed(_));
        let record = outcome.record().cloned().unwrap_or_default();
        let state = record.job.as_ref().map(Job::state).unwrap_or_default();
        if state != JobState::Cancelled && is_final(state) {
            let message = format!("job {id} has ended already: {}", state.as_str_name());
            return Err(ApiError::new(ErrorCode::JobFinished, message).field("job_id"));
        }
        let purged = if changed { follow::purge(&self.ledger, &record).await } else { 0 };
        Ok(CancelJobResponse { job: Some(transition::public_job(&record)), purged })
    }

    async fn image(
        &self,
        request: &GetImageRequest,
    ) -> Result<(Image, BoxStream<'static, efferent_bus::Result<Bytes>>), ApiError> {
        let GetImageRequest { job_id, image_index } = request;
        let record = self.known_job(job_id).await?;
        let missing = |why: &str| {
            let message = format!("image {image_index} of job {job_id} {why}");
            ApiError::new(ErrorCode::UnknownImage, message).field("image_index")
        };
        let image = transition::images(&record).find(|image| image.image_index == *image_index);
        let image = image.cloned().ok_or_else(|| missing("is not there (yet)"))?;
        let bytes = self.ledger.bus().get_object(&image.hash).await.map_err(unavailable)?;
        Ok((image, bytes.ok_or_else(|| missing("is no longer kept"))?))
    }
}

#[tonic::async_trait]
impl ImageService for Images {
    type GenerateStream = Events;
    type WatchJobStream = Events;
    type GetImageStream = BoxStream<'static, Result<ImageChunk, Status>>;

    async fn generate(&self, request: Request<GenerateRequest>) -> Result<Response<Events>, Status> {
        let (started, began) = (Instant::now(), self.ledger.now());
        let trace = trace_of(&request);
        let request = request.into_inner();
        let inline_images = request.inline_images;
        let outcome = async {
            let permit = self.stream_permit()?;
            let tenant = tenants::named(&request.tenant)?;
            self.gate.request(tenant)?;
            let place = self.gate.stream(tenant)?;
            let (id, tail) = self.accept(request, &trace).await?;
            let existing = tail.is_none();
            trace.child().tell("accept", began, self.ledger.now(), &[("efferent.job_id", &id)]);
            let span = (!existing).then(|| (trace.clone(), began));
            Ok(self.stream(id, tail, Wish { after: 0, inline_images }, (permit, Some(place)), existing, span))
        };
        count("Generate", started, outcome.await).map(Response::new)
    }

    async fn quote(&self, request: Request<GenerateRequest>) -> Result<Response<Quotation>, Status> {
        let started = Instant::now();
        let outcome = self.quotation(request.into_inner()).await;
        count("Quote", started, outcome).map(Response::new)
    }

    async fn get_job(&self, request: Request<GetJobRequest>) -> Result<Response<Job>, Status> {
        let started = Instant::now();
        let record = self.known_job(&request.into_inner().job_id).await;
        count("GetJob", started, record).map(|record| Response::new(transition::public_job(&record)))
    }

    async fn watch_job(&self, request: Request<WatchJobRequest>) -> Result<Response<Events>, Status> {
        let started = Instant::now();
        let WatchJobRequest { job_id, after, inline_images } = request.into_inner();
        let outcome = async {
            let permit = self.stream_permit()?;
            self.known_job(&job_id).await?;
            Ok(self.stream(job_id, None, Wish { after, inline_images }, (permit, None), false, None))
        };
        count("WatchJob", started, outcome.await).map(Response::new)
    }

    async fn cancel_job(&self, request: Request<CancelJobRequest>) -> Result<Response<CancelJobResponse>, Status> {
        let started = Instant::now();
        let outcome = self.cancel(&request.into_inner().job_id).await;
        count("CancelJob", started, outcome).map(Response::new)
    }

    async fn get_image(&self, request: Request<GetImageRequest>) -> Result<Response<Self::GetImageStream>, Status> {
        let started = Instant::now();
        let outcome = self.image(&request.into_inner()).await;
        count("GetImage", started, outcome).map(|(image, bytes)| Response::new(chunks(image, bytes)))
    }
}

/// The bytes in messages of at most [`CHUNK`]; the first tells what they are.
fn chunks(
    image: Image,
    bytes: BoxStream<'static, efferent_bus::Result<Bytes>>,
) -> BoxStream<'static, Result<ImageChunk, Status>> {
    let state = (Some(image), bytes, BytesMut::new(), false);
    futures::stream::unfold(state, async |(mut image, mut bytes, mut held, mut ended)| {
        while held.len() < CHUNK && !ended {
            match bytes.next().await {
                Some(Ok(more)) => held.extend_from_slice(&more),
                Some(Err(error)) => {
                    return Some((Err(unavailable(error).into()), (None, bytes, BytesMut::new(), true)));
                }
                None => ended = true,
            }
        }
        if held.is_empty() && image.is_none() {
            return None;
        }
        let data = held.split_to(held.len().min(CHUNK)).freeze();
        let chunk = ImageChunk { image: image.take(), data };
        Some((Ok(chunk), (image, bytes, held, ended)))
    })
    .boxed()
}

/// Whether a job needs no brain.
fn tasks_are_hands(record: &JobRecord) -> bool {
    record.job.as_ref().and_then(|job| job.request.as_ref()).is_some_and(|request| !request.signal_id.is_empty())
}

/// Where a request waits first.
fn first_queue(request: &GenerateRequest, model: &Model) -> String {
    match request.signal_id.as_str() {
        "" => names::brain_queue(&model.brain, request.lane()),
        _ => names::hand_queue(&model.hand, request.lane()),
    }
}

pub(crate) fn trace_of<T>(request: &Request<T>) -> trace::Context {
    let given = request.metadata().get(trace::HEADER).and_then(|value| value.to_str().ok());
    given.and_then(trace::Context::parse).map_or_else(trace::Context::root, |caller| caller.child())
}
