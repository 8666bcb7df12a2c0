//! The hand worker: pulls tasks, renders them in the running batch, records images.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use efferent_bus::{
    Delivery,
    ledger::{Ledger, Outcome, Transition, transition},
    read_object,
};
use efferent_proto::{
    ApiError,
    internal::{ControlSignal, HandTask, hand_task},
    names, time,
    v1::{ErrorCode, GenerateRequest, Image, JobEvent, Model, Preview, Step, WorkerRole, job_event::Event},
};
use efferent_service::{Shutdown, admin::Readiness};
use efferent_worker::{
    engine::{EngineError, Hand, RenderRequest},
    intake::Intake,
    lifecycle::{Member, Profile},
    task::{self, Admission, BRISK, Cancellations, Held},
    thread::Factory,
};
use image::RgbImage;
use prost::Message as _;
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit, mpsc},
    time::Instant,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    encode as files,
    engine_loop::{EngineLoop, Order, Update},
};

/// Files of up to this many bytes travel in the event that tells of the image, so that nobody who listens has to fetch them.
const MAX_TOLD: usize = 64 * 1024;
/// Bytes of pixels up to which a picture becomes a file sooner than a thread for it wakes up.
const MAX_ENCODED_HERE: usize = 32 * 1024;

/// How long before the engine is done with an image the next one is fetched: more than a pull takes, and less than anyone would notice who
/// waits while another hand could have begun.
const LEAD: Duration = Duration::from_millis(50);

/// How a hand worker works.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// Most images taken at once; 0 for as many as the model computes together. Default 0.
    pub max_images: usize,
    /// How long a stop waits for images in hand; what is not done by then goes back to the queue. Default 30 s.
    #[serde(with = "humantime_serde")]
    pub grace: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self { max_images: 0, grace: Duration::from_secs(30) }
    }
}

/// Why a hand worker ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The model cannot be loaded.
    #[error("cannot load the hand")]
    Engine(#[from] EngineError),
    /// The bus is unavailable or unfit.
    #[error("cannot join the cluster")]
    Bus(#[from] efferent_bus::Error),
}

#[derive(Debug)]
struct Worker {
    ledger: Ledger,
    engine: EngineLoop,
    member: Member,
    cancellations: Cancellations,
    /// Images that the engine is done with may be recorded while it renders others: as many as it renders at once.
    desk: Semaphore,
    /// Cancelled at the end of the grace period.
    abandoned: CancellationToken,
}

/// Serves until `shutdown`: loads the hand, registers, works, and at the end finishes what it has.
///
/// # Errors
/// If the hand cannot be loaded or the bus is unavailable at the start.
pub async fn run(
    options: Options,
    factory: Factory<dyn Hand>,
    devices: Vec<String>,
    ledger: Ledger,
    readiness: Readiness,
    shutdown: Shutdown,
) -> Result<(), Error> {
    let (engine, spec) = EngineLoop::start(factory).await?;
    let model = spec.model.clone();
    ledger.declare_queues(&model).await?;
    let cancellations = Cancellations::listen(ledger.bus()).await?;
    let capacity = if options.max_images == 0 { spec.max_batch.max(1) } else { options.max_images };
    let profile = Profile {
        role: WorkerRole::Hand,
        models: vec![model.clone()],
        devices,
        capacity: capacity as u32,
        simulated: spec.simulated,
    };
    let member = Member::join(ledger.clone(), profile).await?;
    readiness.set(true);
    tracing::info!(worker_id = member.id(), model = model.name, hand = model.hand, "hand is ready");
    let (desk, abandoned) = (Semaphore::new(capacity), CancellationToken::new());
    let worker = Arc::new(Worker { ledger, engine, member, cancellations, desk, abandoned });
    work(capacity, options.grace, &worker, &model, &shutdown).await;
    if let Some(worker) = Arc::into_inner(worker) {
        worker.member.leave().await;
    }
    Ok(())
}

async fn work(capacity: usize, grace: Duration, worker: &Arc<Worker>, model: &Model, shutdown: &Shutdown) {
    let lanes = names::LANES.iter().map(|lane| names::hand_queue(&model.hand, *lane)).collect();
    let mut intake = Intake::new(worker.ledger.bus().clone(), lanes);
    let tasks = TaskTracker::new();
    let room = Arc::new(Semaphore::new(capacity));
    while !shutdown.is_triggered() {
        let first = tokio::select! {
            permit = room.clone().acquire_owned() => permit.expect("the semaphore is never closed"),
            () = shutdown.requested() => break,
        };
        // No more than can be started: what waits here could be rendered by another hand.
        let free = room.available_permits();
        let more = room.clone().try_acquire_many_owned(free as u32).ok().filter(|_| free > 0);
        let mut permits = first;
        if let Some(more) = more {
            permits.merge(more);
        }
        for delivery in intake.next(permits.num_permits()).await {
            let Some(permit) = permits.split(1) else { break };
            let worker = worker.clone();
            tasks.spawn(async move { worker.render(delivery, Place::AtEngine(permit)).await });
        }
    }
    worker.member.drain();
    tasks.close();
    if tokio::time::timeout(grace, tasks.wait()).await.is_err() {
        tracing::warn!("images were left in hand at the end of the grace period; they go back to the queue");
        worker.abandoned.cancel();
        let _ = tokio::time::timeout(grace.min(Duration::from_secs(5)), tasks.wait()).await;
    }
}

/// What a task takes up.
enum Place<'a> {
    /// One of the places in the running batch.
    AtEngine(#[expect(dead_code, reason = "held for what its drop does")] OwnedSemaphorePermit),
    /// None there any more.
    AtDesk(#[expect(dead_code, reason = "held for what its drop does")] SemaphorePermit<'a>),
}

impl Worker {
    /// Makes room for the next image at the engine, unless too many that it was done with are not recorded yet.
    fn leave_engine<'a>(&'a self, place: &mut Place<'a>) {
        if matches!(place, Place::AtEngine(_))
            && let Ok(permit) = self.desk.try_acquire()
        {
            *place = Place::AtDesk(permit);
        }
    }

    async fn render<'a>(&'a self, delivery: Delivery, place: Place<'a>) {
        let _in_flight = self.member.hold();
        let Some(task) = task::read::<HandTask>(&delivery).await else { return };
        if let Err(error) = self.settle(delivery, &task, place).await {
            tracing::warn!(job_id = task.job_id, %error, "cannot settle a task; it is delivered again");
        }
    }

    async fn settle<'a>(
        &'a self,
        delivery: Delivery,
        task: &HandTask,
        mut place: Place<'a>,
    ) -> efferent_bus::Result<()> {
        let rendering = Transition::Rendering { worker_id: self.member.id().to_owned() };
        let admission = task::admit(
            &self.ledger,
            self.member.id(),
            &self.cancellations,
            delivery,
            task.expires_at_ms,
            task.known.as_ref(),
            rendering,
        )
        .await?;
        let Admission::Go(mut held, record) = admission else { return Ok(()) };
        // An earlier attempt may have recorded the image and died before it could say so.
        if transition::images(&record).any(|image| image.image_index == task.image_index) {
            return held.done().await;
        }
        let signal = match self.signal(task).await? {
            Ok(signal) => signal,
            Err(error) => return held.failed(&error).await,
        };
        let request = task.request.clone().unwrap_or_default();
        let (updates, mut heard) = mpsc::unbounded_channel();
        let unwanted = CancellationToken::new();
        self.engine.submit(Order {
            request: render_request(&request, task.seed, signal),
            preview_interval: request.preview_interval,
            unwanted: unwanted.clone(),
            updates,
        });
        // However this ends, the sample leaves the batch.
        let _leave = unwanted.clone().drop_guard();
        let mut progress = Vec::new();
        let stop = held.unwanted();
        let ending = tokio::select! {
            ending = self.follow(&mut heard, task, &mut held, &mut progress, &mut place) => ending,
            () = stop => return held.stopped(task.expires_at_ms).await,
            () = self.abandoned.cancelled() => return held.hand_back().await,
        };
        match ending {
            Ok((picture, render_time)) => self.record(*held, task, picture, render_time, progress).await,
            Err(error) => held.failed(&error).await,
        }
    }

    /// The control signal of a task; the inner error is the task's, the outer one the bus's.
    async fn signal(&self, task: &HandTask) -> efferent_bus::Result<Result<Arc<ControlSignal>, EngineError>> {
        let refused = |message: String| Ok(Err(ApiError::new(ErrorCode::Internal, message).into()));
        match &task.signal {
            Some(hand_task::Signal::Inline(signal)) => Ok(Ok(Arc::new(signal.clone()))),
            Some(hand_task::Signal::Stored(hash)) => match read_object(self.ledger.bus().as_ref(), hash).await? {
                Some(bytes) => match ControlSignal::decode(bytes) {
                    Ok(signal) => Ok(Ok(Arc::new(signal))),
                    Err(error) => refused(format!("the stored control signal cannot be decoded: {error}")),
                },
                None => refused(format!("the control signal {hash} is not in the object store any more")),
            },
            None => refused("the task has no control signal".to_owned()),
        }
    }

    /// Passes progress on until the picture is there, and leaves the engine shortly before. What happens before it is written that work has begun is left in `progress`.
    async fn follow<'a>(
        &'a self,
        heard: &mut mpsc::UnboundedReceiver<Update>,
        task: &HandTask,
        held: &mut Held,
        progress: &mut Vec<Event>,
        place: &mut Place<'a>,
    ) -> Result<(RgbImage, Duration), EngineError> {
        let (image_index, steps) = (task.image_index, task.request.as_ref().map_or(0, GenerateRequest::steps));
        let brisk = tokio::time::sleep(BRISK);
        tokio::pin!(brisk);
        let mut leave_at = None;
        loop {
            let leave = async {
                match leave_at {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            let update = tokio::select! {
                update = heard.recv() => update,
                () = &mut brisk, if !held.has_begun() => {
                    held.begin().await;
                    self.tell(task, std::mem::take(progress)).await;
                    continue;
                }
                () = leave => {
                    leave_at = None;
                    self.leave_engine(place);
                    continue;
                }
            };
            let event = match update {
                Some(Update::LastStep(left)) => {
                    leave_at = Some(Instant::now() + left.saturating_sub(LEAD));
                    continue;
                }
                Some(Update::Step(step)) => Event::Step(Step { image_index, step, steps }),
                Some(Update::Preview(step, picture)) => match files::preview(&picture) {
                    Ok(png) => Event::Preview(Preview { image_index, step, steps, png: png.to_vec().into() }),
                    Err(error) => {
                        tracing::warn!(%error, "no preview");
                        continue;
                    }
                },
                Some(Update::Finished(picture, render_time)) => {
                    self.leave_engine(place);
                    return Ok((picture, render_time));
                }
                Some(Update::Failed(error)) => return Err(error),
                Some(Update::Stopped) | None => {
                    return Err(EngineError::Crashed("the engine let go of an image".to_owned()));
                }
            };
            if held.has_begun() {
                self.tell(task, vec![event]).await;
            } else {
                progress.push(event);
            }
        }
    }

    /// Tells of progress. At most once: what is lost is overtaken by the next step.
    async fn tell(&self, task: &HandTask, progress: Vec<Event>) {
        let number = self.ledger.known(&task.job_id).map_or(0, |known| known.written);
        let events = progress.into_iter().map(|event| passing(task, number, event)).collect();
        self.ledger.tell(&task.job_id, events).await;
    }

    /// File, then record, then the task: in this order nothing is acknowledged that is not durable.
    async fn record(
        &self,
        mut held: Held,
        task: &HandTask,
        picture: RgbImage,
        render_time: Duration,
        progress: Vec<Event>,
    ) -> efferent_bus::Result<()> {
        metrics::histogram!("efferent_hand_render_seconds").record(render_time.as_secs_f64());
        let size = efferent_proto::v1::Size { width: picture.width(), height: picture.height() };
        let file = if picture.as_raw().len() <= MAX_ENCODED_HERE {
            Ok(files::encode(&picture, task))
        } else {
            let owned = task.clone();
            tokio::task::spawn_blocking(move || files::encode(&picture, &owned)).await
        };
        let file = match file {
            Ok(Ok(file)) => file,
            Ok(Err(error)) => return held.failed(&EngineError::compute("cannot encode the picture", error)).await,
            Err(error) => return held.failed(&EngineError::Crashed(error.to_string())).await,
        };
        let length = file.len() as u64;
        let told = if file.len() <= MAX_TOLD { file.clone() } else { Bytes::new() };
        let hash = self.ledger.bus().put_object(file, Some(self.ledger.options().retention)).await?;
        let mut image = Image {
            image_index: task.image_index,
            hash,
            data: told,
            length,
            size: Some(size),
            seed: task.seed,
            worker_id: self.member.id().to_owned(),
            attempt: held.attempt(),
            render_time: Some(time::proto_duration(render_time)),
            model_revision: task.model.as_ref().map(|model| model.revision.clone()).unwrap_or_default(),
            ..Default::default()
        };
        image.set_format(task.request.as_ref().map(GenerateRequest::format).unwrap_or_default());
        held.defer_beginning();
        let (outcome, mut news) = self.ledger.change(&task.job_id, &Transition::Image(image)).await?;
        match outcome {
            Outcome::Changed(_) => metrics::counter!("efferent_images_total").increment(1),
            // A late attempt: the image is recorded, or the job is over.
            Outcome::Unchanged(_) | Outcome::Unknown => {
                metrics::counter!("efferent_results_duplicate_total").increment(1);
            }
        }
        if let Some(image) = news.iter().position(|event| matches!(event.event, Some(Event::Image(_)))) {
            let number = news[image].number.saturating_sub(1);
            news.splice(image..image, progress.into_iter().map(|event| passing(task, number, event)));
        }
        self.ledger.tell(&task.job_id, news).await;
        held.done().await
    }
}

/// An event that is told and not kept, after the durable event of this number.
fn passing(task: &HandTask, number: u64, event: Event) -> JobEvent {
    let time = Some(time::timestamp(SystemTime::now()));
    JobEvent { job_id: task.job_id.clone(), number, time, event: Some(event) }
}

fn render_request(request: &GenerateRequest, seed: u64, signal: Arc<ControlSignal>) -> RenderRequest {
    RenderRequest {
        signal,
        size: request.size.unwrap_or_default(),
        steps: request.steps(),
        guidance_scale: request.guidance_scale(),
        seed,
        sampler: request.sampler.clone(),
    }
}
