//! The hand worker: pulls tasks, renders them in the running batch, records images.

use std::{path::PathBuf, sync::Arc, time::Duration};

use efferent_bus::{
    Delivery,
    ledger::{Ledger, Outcome, Transition, transition},
};
use efferent_proto::{
    ApiError,
    internal::{ControlSignal, HandTask},
    names, time,
    v1::{
        Device, ErrorCode, GenerateRequest, Image, JobEvent, Lane, Model, Preview, Step, WorkerRole, job_event::Event,
    },
    work,
};
use efferent_service::{Shutdown, admin::Readiness};
use efferent_worker::{
    engine::{EngineError, Hand, Picture, RenderRequest},
    intake::{self, IDLE_WAIT},
    lifecycle::{Activity, InFlight, Member, Profile},
    pictures::{File, fetch},
    task::{self, Admission, BRISK, Cancellations, Held},
    thread::Factory,
    watchdog::{Hang, Watchdog},
};
use futures::future::join_all;
use image::RgbImage;
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    checkpoints::Checkpoints,
    encode as files,
    engine_loop::{Checkpoint, EngineLoop, Order, Rules, Update},
    pictures,
    places::{Place, Places},
    signals::{Absent, CROWDED, Signals},
};

/// Files of up to this many bytes are sent to whoever listens before the image is recorded, so that nobody has to fetch them.
const MAX_TOLD: usize = 64 * 1024;
/// Bytes of pixels up to which a picture becomes a file sooner than a thread for it wakes up.
const MAX_ENCODED_HERE: usize = 32 * 1024;

/// How long before the engine is done with an image the next one is fetched: more than a pull takes, and less than anyone would notice who
/// waits while another hand could have begun.
const LEAD: Duration = Duration::from_millis(50);
/// Most of the grace period that is kept for checkpoints of what is not done, and for handing it back.
const LEAVING: Duration = Duration::from_secs(5);

/// Why work goes back to the queue when the worker stops.
const STOPPING: &str = "the worker was told to stop";

/// How a hand worker works.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// Most images taken at once, and most interactive ones while batch work has all places; 0 for as many as are best computed together.
    /// Default 0.
    pub max_images: usize,
    /// How long a stop takes at most; what is not done shortly before goes back to the queue, with a checkpoint. Default 30 s.
    #[serde(with = "humantime_serde")]
    pub grace: Duration,
    /// Pictures of more pixels are decoded and encoded in tiles, where the model does so; 0 for those alone that memory does not suffice for. Default 0.
    pub tile_above: u64,
    /// Where times of steps are kept; empty for nowhere.
    pub profile: PathBuf,
    /// Images that take longer than this are checkpointed. Default 10 s.
    #[serde(with = "humantime_serde")]
    pub checkpoint_after: Duration,
    /// How often; never if zero. Default 5 s.
    #[serde(with = "humantime_serde")]
    pub checkpoint_interval: Duration,
    /// How long a step may take before the hand counts as hung; for ever if zero. Default 10 min.
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
            max_images: 0,
            grace: Duration::from_secs(30),
            tile_above: 0,
            profile: PathBuf::new(),
            checkpoint_after: Duration::from_secs(10),
            checkpoint_interval: Duration::from_secs(5),
            step_timeout: Duration::from_secs(600),
            model: None,
            activity: Activity::default(),
        }
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
    /// The engine does not come back. The process must end: a thread cannot be stopped, and a device that is lost stays lost within its process.
    #[error(transparent)]
    Hang(#[from] Hang),
}

#[derive(Debug)]
struct Worker {
    ledger: Ledger,
    engine: EngineLoop,
    member: Member,
    cancellations: Cancellations,
    signals: Signals,
    model: Model,
    /// Given also when the engine is gone.
    shutdown: Shutdown,
    /// Cancelled towards the end of the grace period.
    abandoned: CancellationToken,
    /// The time that is left then.
    leaving: Duration,
}

/// How an image left the engine.
#[derive(Debug)]
enum Ending {
    /// The picture, and the time it took.
    Picture(RgbImage, Duration),
    /// It cannot be rendered.
    Failed(EngineError),
    /// The worker stops, or its engine is gone.
    Released(Option<Checkpoint>),
}

/// Serves until `shutdown`: registers, loads the hand, works, and at the end finishes what it has.
///
/// # Errors
/// If the hand cannot be loaded or the bus is unavailable at the start; if later the engine hangs, or crashes and cannot be built anew.
pub async fn run(
    options: Options,
    factory: Factory<dyn Hand>,
    devices: Vec<Device>,
    ledger: Ledger,
    readiness: Readiness,
    shutdown: Shutdown,
) -> Result<(), Error> {
    let rules = Rules {
        profile: Some(options.profile).filter(|path| !path.as_os_str().is_empty()),
        device: devices.iter().map(|device| device.device.as_str()).collect::<Vec<_>>().join(","),
        checkpoint_after: options.checkpoint_after,
        checkpoint_interval: options.checkpoint_interval,
    };
    let watchdog = Watchdog::default();
    let profile = Profile {
        role: WorkerRole::Hand,
        models: options.model.into_iter().collect(),
        devices,
        capacity: 0,
        simulated: false,
        activity: options.activity,
    };
    let member = Member::start(ledger.clone(), profile).await?;
    let (engine, spec) = match EngineLoop::start(watchdog.hand(factory), rules).await {
        Ok(loaded) => loaded,
        Err(error) => {
            member.leave().await;
            return Err(error.into());
        }
    };
    let model = spec.model.clone();
    ledger.declare_queues(&model).await?;
    let cancellations = Cancellations::listen(ledger.bus()).await?;
    let (places, capacity) = match options.max_images {
        0 => (engine.places(), spec.max_batch.max(1)),
        most => (watch::channel(most).1, most),
    };
    member.ready(&spec, capacity as u32).await?;
    readiness.set(true);
    tracing::info!(worker_id = member.id(), model = model.name, hand = model.hand, "hand is ready");
    let leaving = LEAVING.min(options.grace / 5);
    let (abandoned, tasks) = (CancellationToken::new(), TaskTracker::new());
    let (signals, shutdown) = (Signals::new(ledger.bus().clone()), shutdown.child());
    let stop = shutdown.clone();
    let worker =
        Arc::new(Worker { ledger, engine, member, cancellations, signals, model, shutdown: stop, abandoned, leaving });
    let places = Places::new(places);
    let done = async {
        join_all(names::LANES.map(|lane| worker.clone().work(lane, &places, &tasks, &shutdown))).await;
        tasks.close();
        tasks.wait().await;
    };
    // Counted from the request to stop: a pull that is under way then may take a moment of it.
    let out_of_time = async {
        shutdown.requested().await;
        worker.member.drain();
        tokio::time::sleep(options.grace.saturating_sub(leaving)).await;
        if !tasks.is_empty() {
            tracing::warn!("images were left in hand at the end of the grace period; they go back to the queue");
        }
        worker.abandoned.cancel();
        tokio::time::sleep(leaving).await;
    };
    let gone = async {
        worker.engine.ended().await;
        shutdown.trigger();
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = done => {}
        () = out_of_time => {}
        () = gone => {}
        hang = watchdog.hangs(options.step_timeout) => return Err(hang.into()),
    }
    let lost = worker.engine.has_ended();
    if let Some(worker) = Arc::into_inner(worker) {
        worker.member.leave().await;
    }
    if lost { Err(Hang::Gone.into()) } else { Ok(()) }
}

impl Worker {
    /// Takes tasks of a lane as there is room, until `shutdown`.
    async fn work(self: Arc<Self>, lane: Lane, places: &Arc<Places>, tasks: &TaskTracker, shutdown: &Shutdown) {
        let queue = names::hand_queue(&self.model.hand, lane);
        let mut wait = IDLE_WAIT;
        while !shutdown.is_triggered() {
            // No more than can be started: what waits here could be rendered by another hand.
            let room = tokio::select! {
                room = places.room(lane) => room,
                () = shutdown.requested() => return,
            };
            let deliveries = intake::pull(self.ledger.bus(), &queue, room, wait).await;
            wait = intake::next_wait(wait, !deliveries.is_empty());
            for delivery in deliveries {
                if shutdown.is_triggered() {
                    // It may even be one that this worker has just handed back.
                    let _ = delivery.lease.nak(Duration::ZERO).await;
                    continue;
                }
                let (worker, place) = (self.clone(), places.take(lane));
                tasks.spawn(async move { worker.render(delivery, lane, place).await });
            }
            // The work goes first, then the question for more.
            tokio::task::yield_now().await;
        }
    }

    async fn render(&self, delivery: Delivery, lane: Lane, place: Place) {
        let in_flight = self.member.hold();
        let Some(task) = task::read::<HandTask>(&delivery).await else { return };
        let image = (task.job_id.as_str(), task.image_index);
        let (bus, revision) = (self.ledger.bus(), &self.model.revision);
        let mut checkpoints = Checkpoints::new(bus, image, &delivery.payload, revision, task.expires_at_ms);
        if let Err(error) = self.settle(delivery, &task, lane, place, in_flight, &mut checkpoints).await {
            tracing::warn!(job_id = task.job_id, %error, "cannot settle a task; it is delivered again");
        }
    }

    async fn settle(
        &self,
        delivery: Delivery,
        task: &HandTask,
        lane: Lane,
        place: Place,
        mut in_flight: InFlight,
        checkpoints: &mut Checkpoints,
    ) -> efferent_bus::Result<()> {
        let rendering = Transition::Rendering { worker_id: self.member.id().to_owned() };
        let attempt = delivery.attempt;
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
        let found = if attempt > 1 { checkpoints.find().await } else { None };
        let (admission, mut place, resume) = match admission {
            Admission::Suspect(held) => {
                let alone = tokio::select! {
                    alone = place.alone() => alone,
                    () = self.abandoned.cancelled() => return held.hand_back(STOPPING, Duration::ZERO).await,
                };
                // It begins anew, in case it is the checkpoint that its workers died of.
                (held.begin_again().await?, alone, None)
            }
            admission => (admission, place, found),
        };
        let Admission::Go(mut held, record) = admission else {
            checkpoints.remove().await;
            return Ok(());
        };
        // What comes of the work is written here, most often while nothing else was: by then it is known over what.
        let (ledger, job_id) = (self.ledger.clone(), task.job_id.clone());
        tokio::spawn(async move { ledger.confirm(&job_id).await });
        // An earlier attempt may have recorded the image and died before it could say so.
        if transition::images(&record).any(|image| image.image_index == task.image_index) {
            checkpoints.remove().await;
            return held.done().await;
        }
        let signal = match self.signals.of(task).await? {
            Ok(signal) => signal,
            Err(Absent::Failed(error)) => return held.failed(&error).await,
            Err(Absent::Later) => {
                tracing::info!(job_id = task.job_id, "a control signal is not there yet; its task waits");
                let away = place.leave();
                drop(in_flight);
                let stop = async {
                    tokio::select! {
                        () = held.unwanted() => {}
                        () = self.shutdown.requested() => {}
                    }
                };
                match self.signals.wait(task, stop).await? {
                    Some(Ok(signal)) => {
                        (place, in_flight) = (away.back().await, self.member.hold());
                        signal
                    }
                    Some(Err(error)) => return held.failed(&error).await,
                    None if held.is_unwanted() => {
                        checkpoints.remove().await;
                        return held.stopped(task.expires_at_ms).await;
                    }
                    None if self.shutdown.is_triggered() => return held.hand_back(STOPPING, Duration::ZERO).await,
                    None => return held.hand_back("its control signal is not there yet", CROWDED).await,
                }
            }
        };
        let request = task.request.clone().unwrap_or_default();
        let picture = match self.picture(&request).await? {
            Ok(picture) => picture,
            Err(error) => return held.failed(&error).await,
        };
        let (updates, mut heard) = mpsc::unbounded_channel();
        let unwanted = CancellationToken::new();
        self.engine.submit(Order {
            request: render_request(&request, task.seed, signal, picture),
            lane,
            resume,
            preview_interval: request.preview_interval,
            unwanted: unwanted.clone(),
            released: self.abandoned.clone(),
            updates,
        });
        // However this ends, the sample leaves the batch.
        let _leave = unwanted.clone().drop_guard();
        let mut progress = Vec::new();
        let stop = held.unwanted();
        let ending = tokio::select! {
            ending = self.follow(&mut heard, task, &mut held, checkpoints, &mut progress, &mut place) => ending,
            () = stop => {
                checkpoints.remove().await;
                return held.stopped(task.expires_at_ms).await;
            }
            // The engine is in a step that takes too long.
            () = self.out_of_time() => Ending::Released(None),
        };
        match ending {
            Ending::Picture(picture, render_time) => {
                place.rendered();
                self.record(*held, task, &in_flight, picture, render_time, progress).await?;
                checkpoints.remove().await;
                Ok(())
            }
            Ending::Failed(error) => {
                // Whatever went wrong is not taken up again.
                checkpoints.remove().await;
                held.failed(&error).await
            }
            Ending::Released(checkpoint) => {
                if let Some(checkpoint) = checkpoint {
                    checkpoints.wait().await;
                    checkpoints.store(checkpoint).await;
                }
                checkpoints.wait().await;
                let why = if self.abandoned.is_cancelled() { STOPPING.to_owned() } else { EngineError::Gone.told() };
                held.hand_back(&why, Duration::ZERO).await
            }
        }
    }

    /// Waits until half of the time that is left for leaving is over.
    async fn out_of_time(&self) {
        self.abandoned.cancelled().await;
        tokio::time::sleep(self.leaving / 2).await;
    }

    /// The picture that a request begins with, if any; errors as those of [`fetch`].
    async fn picture(
        &self,
        request: &GenerateRequest,
    ) -> efferent_bus::Result<Result<Option<Arc<Picture>>, EngineError>> {
        let Some(image) = &request.init_image else { return Ok(Ok(None)) };
        if !self.model.image_to_image || (request.mask.is_some() && !self.model.inpainting) {
            let message = format!("model {} does not begin with pictures", self.model.name);
            return Ok(Err(ApiError::new(ErrorCode::NotOffered, message).field("init_image").into()));
        }
        let bus = self.ledger.bus().as_ref();
        let image = match fetch(bus, "init_image", image).await? {
            Ok((_, image)) => image,
            Err(error) => return Ok(Err(error)),
        };
        let mask = match &request.mask {
            Some(mask) => match fetch(bus, "mask", mask).await? {
                Ok((_, mask)) => Some(mask),
                Err(error) => return Ok(Err(error)),
            },
            None => None,
        };
        let (size, strength) = (request.size.unwrap_or_default(), work::strength(request));
        let decoded = tokio::task::spawn_blocking(move || {
            let mask = mask.as_ref().map(|bytes| File { field: "mask", bytes });
            pictures::picture(File { field: "init_image", bytes: &image }, mask, size, strength)
        });
        Ok(match decoded.await {
            Ok(picture) => picture.map(|picture| Some(Arc::new(picture))).map_err(EngineError::from),
            Err(error) => Err(EngineError::Crashed(error.to_string())),
        })
    }

    /// Passes progress on until the image leaves the engine, and gives its place to another shortly before. What happens before it is written that work has begun is left in `progress`.
    async fn follow(
        &self,
        heard: &mut mpsc::UnboundedReceiver<Update>,
        task: &HandTask,
        held: &mut Held,
        checkpoints: &mut Checkpoints,
        progress: &mut Vec<Event>,
        place: &mut Place,
    ) -> Ending {
        let image_index = task.image_index;
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
                    place.rendered();
                    continue;
                }
            };
            let event = match update {
                Some(Update::LastStep(left)) => {
                    leave_at = Some(Instant::now() + left.saturating_sub(LEAD));
                    continue;
                }
                Some(Update::Step { step, steps }) => Event::Step(Step { image_index, step, steps }),
                Some(Update::Preview { step, steps, picture }) => match files::preview(&picture) {
                    Ok(png) => Event::Preview(Preview { image_index, step, steps, png: png.to_vec().into() }),
                    Err(error) => {
                        tracing::warn!(%error, "no preview");
                        continue;
                    }
                },
                Some(Update::Checkpoint(checkpoint)) => {
                    checkpoints.store(checkpoint).await;
                    continue;
                }
                Some(Update::Finished(picture, render_time)) => return Ending::Picture(picture, render_time),
                Some(Update::Failed(error)) => return Ending::Failed(error),
                Some(Update::Released(checkpoint)) => return Ending::Released(checkpoint),
                // It was never taken in.
                None => return Ending::Released(None),
                Some(Update::Stopped) => {
                    return Ending::Failed(EngineError::Crashed("the engine let go of an image".to_owned()));
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
        let known = self.ledger.known(&task.job_id);
        let number = known.and_then(|known| known.record).map_or(0, |record| record.log.len() as u64);
        let time = Some(time::timestamp(self.ledger.now()));
        let event = |event| JobEvent { job_id: task.job_id.clone(), number, time, event: Some(event) };
        self.ledger.pass(&task.job_id, progress.into_iter().map(event).collect()).await;
    }

    /// File, then record, then the task: in this order nothing is acknowledged that is not durable.
    async fn record(
        &self,
        mut held: Held,
        task: &HandTask,
        in_flight: &InFlight,
        picture: RgbImage,
        render_time: Duration,
        mut progress: Vec<Event>,
    ) -> efferent_bus::Result<()> {
        metrics::histogram!("efferent_hand_render_seconds").record(render_time.as_secs_f64());
        let size = efferent_proto::v1::Size { width: picture.width(), height: picture.height() };
        let steps = task.request.as_ref().map_or(0, work::steps);
        in_flight.done(work::image_units(&size, steps), render_time);
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
        let retention = Some(self.ledger.options().retention);
        let hash = held.patiently(|| self.ledger.bus().put_object(file.clone(), retention)).await?;
        let mut image = Image {
            image_index: task.image_index,
            hash,
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
        if file.len() <= MAX_TOLD {
            progress.push(Event::Image(Image { data: file, ..image.clone() }));
        }
        self.tell(task, progress).await;
        let recorded = Transition::Image(image);
        let outcome = held.patiently(|| self.ledger.apply(&task.job_id, &recorded)).await?;
        match outcome {
            Outcome::Changed(_) => metrics::counter!("efferent_images_total").increment(1),
            // A late attempt: the image is recorded, or the job is over.
            Outcome::Unchanged(_) | Outcome::Unknown => {
                metrics::counter!("efferent_results_duplicate_total").increment(1);
            }
        }
        held.done().await
    }
}

fn render_request(
    request: &GenerateRequest,
    seed: u64,
    signal: Arc<ControlSignal>,
    picture: Option<Arc<Picture>>,
) -> RenderRequest {
    RenderRequest {
        signal,
        size: request.size.unwrap_or_default(),
        steps: request.steps(),
        guidance_scale: request.guidance_scale(),
        image_guidance_scale: request.image_guidance_scale.unwrap_or(1.0),
        guidance_rescale: request.guidance_rescale(),
        guidance_range: request.guidance_start.unwrap_or(0.0)..request.guidance_stop.unwrap_or(1.0),
        seed,
        sampler: request.sampler.clone(),
        picture,
    }
}
