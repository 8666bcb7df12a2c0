//! The thread that owns a hand and steps its running batch: samples join and leave between steps.
//!
//! Each round it takes in what arrived, drops what is no longer wanted, and advances one group of samples with equal keys by one step: which,
//! [`Turns`] says, and how many of them, the [`Profile`]. A sample's failure or cancellation leaves the others alone; if the engine panics over
//! a batch, it is built anew and the batch's samples start again one by one, so that only the one at fault fails. If it cannot be built anew, as when
//! its device is lost, the thread ends, and with it the worker.

use std::{
    fmt::Debug,
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    sync::mpsc::{self, TryRecvError},
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use efferent_proto::v1::Lane;
use efferent_worker::{
    engine::{BatchKey, EngineError, EngineSpec, Hand, RenderRequest, Sample},
    thread::{Factory, panic_message},
};
use image::RgbImage;
use tokio::sync::{mpsc::UnboundedSender, oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::{
    profile::Profile,
    turns::{Turns, Waiting},
};

/// The least time between two previews of an image: what nobody could see is not decoded.
const PREVIEW_PAUSE: Duration = Duration::from_millis(200);

/// An image to render.
#[derive(Debug)]
pub struct Order {
    /// What to render.
    pub request: RenderRequest,
    /// How urgent it is.
    pub lane: Lane,
    /// A checkpoint to go on from. If the hand cannot, the image is begun anew.
    pub resume: Option<Bytes>,
    /// A preview every this many steps, but for those that come within 200 ms of the one before; 0 for none.
    pub preview_interval: u32,
    /// Cancelled when nobody wants the image any more: its sample leaves before the next step.
    pub unwanted: CancellationToken,
    /// Cancelled when this hand is to let go of it: its sample leaves with a checkpoint before the next step.
    pub released: CancellationToken,
    /// Told of what happens. The last update is `Finished`, `Failed`, `Stopped` or `Released`.
    pub updates: UnboundedSender<Update>,
}

/// What happened to an image.
#[derive(Debug)]
pub enum Update {
    /// Its last step begins. In about this time the engine is done with it. Not said if there is nothing to go by.
    LastStep(Duration),
    /// A step is done.
    Step {
        /// Steps done.
        step: u32,
        /// Of so many.
        steps: u32,
    },
    /// The picture as it stands.
    Preview {
        /// After this many steps.
        step: u32,
        /// Of so many.
        steps: u32,
        /// The picture.
        picture: RgbImage,
    },
    /// What is needed to go on from here.
    Checkpoint(Checkpoint),
    /// The picture, and the time since it joined the batch.
    Finished(RgbImage, Duration),
    /// It cannot be rendered.
    Failed(EngineError),
    /// It was not wanted any more.
    Stopped,
    /// This hand has let go of it; with a checkpoint if a step was done and the engine is there to make one.
    Released(Option<Checkpoint>),
}

/// A sample as it stands between two steps.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    /// Steps done.
    pub step: u32,
    /// What `Hand::checkpoint` made of it.
    pub state: Bytes,
}

/// How a loop works.
#[derive(Debug, Clone, Default)]
pub struct Rules {
    /// Where times of steps are kept from one start to the next.
    pub profile: Option<PathBuf>,
    /// What times of steps are kept as: those of one device do not hold for another.
    pub device: String,
    /// Renders that take longer than this are checkpointed.
    pub checkpoint_after: Duration,
    /// This often; never if zero.
    pub checkpoint_interval: Duration,
}

/// A handle to the thread, which ends when the last handle is dropped and its samples are done.
#[derive(Debug, Clone)]
pub struct EngineLoop {
    orders: mpsc::Sender<Order>,
    places: watch::Receiver<usize>,
}

impl EngineLoop {
    /// Starts the thread and builds the hand on it. Returns once it is loaded, with what the hand is.
    ///
    /// # Errors
    /// If the hand cannot be built, or the thread cannot be started.
    pub async fn start(factory: Factory<dyn Hand>, rules: Rules) -> Result<(Self, EngineSpec), EngineError> {
        let (orders, inbox) = mpsc::channel();
        let (loaded, wait) = oneshot::channel();
        let (room, places) = watch::channel(1);
        thread::Builder::new()
            .name("hand".to_owned())
            .spawn(move || run(factory, rules, inbox, room, loaded))
            .map_err(|error| EngineError::compute("starting the engine's thread", error))?;
        let spec = wait.await.unwrap_or_else(|_| Err(EngineError::Crashed("panicked while loading".to_owned())))?;
        Ok((Self { orders, places }, spec))
    }

    /// Has an image rendered. It is let go of at once if the engine is gone; so is, without a word, what the thread had not taken in by then.
    pub fn submit(&self, order: Order) {
        if let Err(mpsc::SendError(order)) = self.orders.send(order) {
            let _ = order.updates.send(Update::Released(None));
        }
    }

    /// Waits until the thread has ended: while there is a handle, because the engine is gone for good.
    pub async fn ended(&self) {
        let mut places = self.places.clone();
        while places.changed().await.is_ok() {}
    }

    /// Whether the thread has ended.
    pub fn has_ended(&self) -> bool {
        self.places.has_changed().is_err()
    }

    /// How many images it is worth to have here at once: as many as are best advanced together, and one to take the place of the first that
    /// is done. Changes as steps are measured.
    pub fn places(&self) -> watch::Receiver<usize> {
        self.places.clone()
    }
}

struct Running {
    order: Order,
    sample: Sample,
    /// Which samples it is advanced with: those of its key, or none.
    group: BatchKey,
    joined: Instant,
    /// Steps that were done when it joined.
    first_step: u32,
    /// When it joined or its last checkpoint was made.
    kept: Instant,
    /// When its last preview was made.
    shown: Option<Instant>,
}

fn run(
    mut factory: Factory<dyn Hand>,
    rules: Rules,
    inbox: mpsc::Receiver<Order>,
    places: watch::Sender<usize>,
    loaded: oneshot::Sender<Result<EngineSpec, EngineError>>,
) {
    let hand = match build(&mut factory) {
        Ok(hand) => hand,
        Err(error) => {
            let _ = loaded.send(Err(error));
            return;
        }
    };
    let spec = hand.spec().clone();
    let profile = match &rules.profile {
        Some(path) => Profile::at(path, &spec.model, &rules.device),
        None => Profile::default(),
    };
    let most = spec.max_batch.max(1);
    places.send_replace(most);
    let _ = loaded.send(Ok(spec));
    let turns = Turns::default();
    let mut batch = Batch {
        hand,
        factory,
        rules,
        profile,
        most,
        turns,
        running: Vec::new(),
        places,
        suspects: 0,
        pace: None,
        decoding: Duration::ZERO,
    };
    loop {
        let order = match batch.running.is_empty() {
            true => inbox.recv().map_err(|_| TryRecvError::Disconnected),
            false => inbox.try_recv(),
        };
        match order {
            Ok(order) => {
                batch.join(order);
                continue;
            }
            Err(TryRecvError::Disconnected) if batch.running.is_empty() => return,
            Err(TryRecvError::Disconnected | TryRecvError::Empty) => {}
        }
        if let Err(error) = batch.round() {
            tracing::error!(%error, "the engine cannot be built anew; its thread ends");
            for order in inbox.try_iter() {
                let _ = order.updates.send(Update::Released(None));
            }
            // Tells that it ends. To drop an engine whose device is lost may take long.
            drop(inbox);
            drop(batch.places);
            return;
        }
    }
}

struct Batch {
    hand: Box<dyn Hand>,
    factory: Factory<dyn Hand>,
    rules: Rules,
    profile: Profile,
    /// Most samples that the hand advances together.
    most: usize,
    turns: Turns,
    /// In the order in which they came.
    running: Vec<Running>,
    places: watch::Sender<usize>,
    /// How many samples were in a batch over which the engine panicked.
    suspects: u64,
    /// How long the last step took, and of which samples.
    pace: Option<(BatchKey, Duration)>,
    /// How long the last picture took to be decoded.
    decoding: Duration,
}

impl Batch {
    fn join(&mut self, order: Order) {
        if order.unwanted.is_cancelled() {
            let _ = order.updates.send(Update::Stopped);
            return;
        }
        let sample = match self.resumed(&order) {
            Some(sample) => sample,
            None => match guarded(|| self.hand.begin(&order.request)) {
                Ok(sample) => sample,
                Err(error) => return drop(order.updates.send(Update::Failed(error))),
            },
        };
        let (group, first_step, now) = (sample.key.clone(), sample.step, Instant::now());
        let running = Running { order, sample, group, joined: now, first_step, kept: now, shown: None };
        if running.sample.is_complete() {
            return self.finish(running);
        }
        self.running.push(running);
        self.advise();
    }

    /// A sample that goes on from the order's checkpoint, if there is one and the hand can make use of it.
    fn resumed(&mut self, order: &Order) -> Option<Sample> {
        let state = order.resume.as_ref()?;
        match guarded(|| self.hand.resume(&order.request, state)) {
            Ok(sample) => {
                tracing::info!(step = sample.step, steps = sample.steps, "an image goes on from its checkpoint");
                metrics::counter!("efferent_hand_resumes_total").increment(1);
                metrics::counter!("efferent_hand_steps_saved_total").increment(u64::from(sample.step));
                Some(sample)
            }
            Err(error) => {
                tracing::warn!(%error, "a checkpoint cannot be used; the image is begun anew");
                None
            }
        }
    }

    /// Advances the group whose turn it is by a step. An error is the end of the thread.
    fn round(&mut self) -> Result<(), EngineError> {
        self.let_go();
        let mut group = self.take_group();
        if group.is_empty() {
            return Ok(());
        }
        self.announce_ends(&group);
        let started = Instant::now();
        let mut samples: Vec<&mut Sample> = group.iter_mut().map(|running| &mut running.sample).collect();
        let count = samples.len();
        let outcomes = catch_unwind(AssertUnwindSafe(|| self.hand.step(&mut samples)));
        let step_time = started.elapsed();
        let seconds = step_time.as_secs_f64();
        self.pace = group.first().map(|first| (first.sample.key.clone(), step_time));
        metrics::histogram!("efferent_hand_batch_size").record(count as f64);
        metrics::histogram!("efferent_hand_step_seconds").record(seconds);
        let outcomes = match outcomes {
            Ok(outcomes) if outcomes.len() == count => outcomes,
            Ok(outcomes) => {
                let what = format!("the engine answered {} of {count} samples", outcomes.len());
                (0..count).map(|_| Err(EngineError::Crashed(what.clone()))).collect()
            }
            Err(panic) => return self.recover(group, &panic_message(panic.as_ref())),
        };
        if let [first, ..] = &*group
            && first.group == first.sample.key
            && outcomes.iter().all(Result::is_ok)
        {
            self.profile.record(&first.sample.key, count, seconds, self.most);
        }
        for (running, outcome) in group.into_iter().zip(outcomes) {
            match outcome {
                Ok(()) => self.after_step(running),
                Err(error) => {
                    let _ = running.order.updates.send(Update::Failed(error));
                }
            }
        }
        self.running.sort_by_key(|running| running.joined);
        self.advise();
        Ok(())
    }

    /// Says of which samples this is the last step, so that others can be fetched to follow them at once.
    fn announce_ends(&self, group: &[Running]) {
        for Running { order, sample, .. } in group {
            if let Some((key, step_time)) = &self.pace
                && *key == sample.key
                && sample.step + 1 >= sample.steps
            {
                let _ = order.updates.send(Update::LastStep(*step_time + self.decoding));
            }
        }
    }

    /// Has those leave that nobody wants, or nobody wants from here.
    fn let_go(&mut self) {
        let leaves =
            |running: &mut Running| running.order.unwanted.is_cancelled() || running.order.released.is_cancelled();
        let leaving: Vec<Running> = self.running.extract_if(.., leaves).collect();
        for running in leaving {
            let update = match running.order.unwanted.is_cancelled() {
                true => Update::Stopped,
                false => Update::Released(self.checkpoint(&running.sample)),
            };
            let _ = running.order.updates.send(update);
        }
    }

    /// The samples whose turn it is; they are put back afterwards.
    fn take_group(&mut self) -> Vec<Running> {
        let line: Vec<Waiting<'_>> =
            self.running.iter().map(|running| Waiting { key: &running.group, lane: running.order.lane }).collect();
        let mates = self.turns.next(&line, |key, waiting| self.profile.batch(key, waiting, self.most));
        let is_batch = |running: &Running| running.order.lane == Lane::Batch;
        let urgent = mates.first().is_some_and(|index| !is_batch(&self.running[*index]));
        let mut place = 0..;
        let group: Vec<Running> =
            self.running.extract_if(.., |_| place.next().is_some_and(|place| mates.contains(&place))).collect();
        let parked = if urgent { self.running.iter().filter(|running| is_batch(running)).count() } else { 0 };
        metrics::gauge!("efferent_hand_parked").set(parked as f64);
        group
    }

    fn after_step(&mut self, mut running: Running) {
        let (step, steps) = (running.sample.step, running.sample.steps);
        let updates = running.order.updates.clone();
        let _ = updates.send(Update::Step { step, steps });
        if running.sample.is_complete() {
            return self.finish(running);
        }
        let interval = running.order.preview_interval;
        let lately = running.shown.is_some_and(|shown| shown.elapsed() < PREVIEW_PAUSE);
        if interval > 0 && step.is_multiple_of(interval) && !lately {
            match guarded(|| self.hand.preview(&running.sample)) {
                Ok(picture) => drop(updates.send(Update::Preview { step, steps, picture })),
                Err(error) => tracing::warn!(%error, "no preview"),
            }
            running.shown = Some(Instant::now());
        }
        if self.is_checkpoint_due(&running) {
            running.kept = Instant::now();
            if let Some(checkpoint) = self.checkpoint(&running.sample) {
                let _ = updates.send(Update::Checkpoint(checkpoint));
            }
        }
        self.running.push(running);
    }

    fn is_checkpoint_due(&self, running: &Running) -> bool {
        let Rules { checkpoint_after, checkpoint_interval, .. } = self.rules;
        if checkpoint_interval.is_zero() || running.kept.elapsed() < checkpoint_interval {
            return false;
        }
        let done = running.sample.step.saturating_sub(running.first_step).max(1);
        let all = running.sample.steps.saturating_sub(running.first_step);
        running.joined.elapsed().mul_f64(f64::from(all) / f64::from(done)) >= checkpoint_after
    }

    /// What is needed to go on with a sample elsewhere; nothing if no step is done.
    fn checkpoint(&self, sample: &Sample) -> Option<Checkpoint> {
        if sample.step == 0 {
            return None;
        }
        match guarded(|| self.hand.checkpoint(sample)) {
            Ok(state) => Some(Checkpoint { step: sample.step, state }),
            Err(error) => {
                tracing::warn!(%error, "no checkpoint");
                None
            }
        }
    }

    fn finish(&mut self, running: Running) {
        let Running { order, sample, joined, .. } = running;
        let started = Instant::now();
        let update = match guarded(|| self.hand.finish(sample)) {
            Ok(picture) => Update::Finished(picture, joined.elapsed()),
            Err(error) => Update::Failed(error),
        };
        self.decoding = started.elapsed();
        metrics::histogram!("efferent_hand_decode_seconds").record(self.decoding.as_secs_f64());
        let _ = order.updates.send(update);
    }

    /// Says how many images it is worth to have here, going by the shapes that are here now.
    fn advise(&self) {
        let wanted = |running: &Running| match self.profile.advice(&running.sample.key, self.most) {
            advice if advice.untried.is_some() => self.most,
            advice => (advice.best + 1).min(self.most),
        };
        if let Some(places) = self.running.iter().map(wanted).max() {
            self.places.send_if_modified(|known| std::mem::replace(known, places) != places);
        }
    }

    /// The engine panicked over a group: builds it anew. Alone, the sample is at fault; of several, each gets another try alone.
    fn recover(&mut self, group: Vec<Running>, message: &str) -> Result<(), EngineError> {
        tracing::error!(message, samples = group.len(), "the engine panicked; building it anew");
        metrics::counter!("efferent_engine_panics_total").increment(1);
        let rebuilt = build(&mut self.factory);
        let alone = group.len() == 1;
        let hand = match rebuilt {
            Ok(hand) => hand,
            Err(error) => {
                // One of these took it down for good. Which, other workers find out, if it counts for all of them.
                for running in group {
                    let _ = running.order.updates.send(Update::Failed(EngineError::Crashed(message.to_owned())));
                }
                for running in std::mem::take(&mut self.running) {
                    let _ = running.order.updates.send(Update::Released(None));
                }
                return Err(error);
            }
        };
        self.hand = hand;
        for running in group {
            if alone {
                let _ = running.order.updates.send(Update::Failed(EngineError::Crashed(message.to_owned())));
                continue;
            }
            match guarded(|| self.hand.begin(&running.order.request)) {
                Ok(sample) => {
                    self.suspects += 1;
                    let group = BatchKey(format!("suspect {}", self.suspects));
                    self.running.push(Running { sample, group, first_step: 0, ..running });
                }
                Err(error) => drop(running.order.updates.send(Update::Failed(error))),
            }
        }
        self.running.sort_by_key(|running| running.joined);
        Ok(())
    }
}

fn guarded<T>(work: impl FnOnce() -> Result<T, EngineError>) -> Result<T, EngineError> {
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|panic| Err(EngineError::Crashed(panic_message(panic.as_ref()))))
}

fn build(factory: &mut Factory<dyn Hand>) -> Result<Box<dyn Hand>, EngineError> {
    guarded(factory)
}
