//! The thread that owns a hand and steps its running batch: samples join and leave between steps.
//!
//! Each round it takes in what arrived, drops what is no longer wanted, and advances one group of samples with equal keys by one step.
//! Groups take turns. A sample's failure or cancellation leaves the others alone; if the engine panics over a batch, it is built
//! anew and the batch's samples start again one by one, so that only the one at fault fails.

use std::{
    fmt::Debug,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::mpsc::{self, TryRecvError},
    thread,
    time::{Duration, Instant},
};

use efferent_worker::{
    engine::{BatchKey, EngineError, EngineSpec, Hand, RenderRequest, Sample},
    thread::{Factory, panic_message},
};
use image::RgbImage;
use tokio::sync::{mpsc::UnboundedSender, oneshot};
use tokio_util::sync::CancellationToken;

/// An image to render.
#[derive(Debug)]
pub struct Order {
    /// What to render.
    pub request: RenderRequest,
    /// A preview every this many steps; 0 for none.
    pub preview_interval: u32,
    /// Cancelled when nobody wants the image any more: its sample leaves before the next step.
    pub unwanted: CancellationToken,
    /// Told of what happens. The last update is `Finished`, `Failed` or `Stopped`.
    pub updates: UnboundedSender<Update>,
}

/// What happened to an image.
#[derive(Debug)]
pub enum Update {
    /// Its last step begins. In about this time the engine is done with it. Not said if there is nothing to go by.
    LastStep(Duration),
    /// A step is done.
    Step(u32),
    /// The picture as it stands after this many steps.
    Preview(u32, RgbImage),
    /// The picture, and the time since it joined the batch.
    Finished(RgbImage, Duration),
    /// It cannot be rendered.
    Failed(EngineError),
    /// It was not wanted any more.
    Stopped,
}

/// A handle to the thread, which ends when the last handle is dropped and its samples are done.
#[derive(Debug, Clone)]
pub struct EngineLoop {
    orders: mpsc::Sender<Order>,
}

impl EngineLoop {
    /// Starts the thread and builds the hand on it. Returns once it is loaded, with what the hand is.
    ///
    /// # Errors
    /// If the hand cannot be built, or the thread cannot be started.
    pub async fn start(factory: Factory<dyn Hand>) -> Result<(Self, EngineSpec), EngineError> {
        let (orders, inbox) = mpsc::channel();
        let (loaded, wait) = oneshot::channel();
        thread::Builder::new()
            .name("hand".to_owned())
            .spawn(move || run(factory, &inbox, loaded))
            .map_err(|error| EngineError::compute("starting the engine's thread", error))?;
        let spec = wait.await.unwrap_or_else(|_| Err(EngineError::Crashed("panicked while loading".to_owned())))?;
        Ok((Self { orders }, spec))
    }

    /// Has an image rendered.
    pub fn submit(&self, order: Order) {
        if let Err(mpsc::SendError(order)) = self.orders.send(order) {
            let _ =
                order.updates.send(Update::Failed(EngineError::Crashed("the engine's thread has ended".to_owned())));
        }
    }
}

struct Running {
    order: Order,
    sample: Sample,
    joined: Instant,
    /// Was in a batch over which the engine panicked: advanced alone from now on.
    suspect: bool,
}

fn run(
    mut factory: Factory<dyn Hand>,
    inbox: &mpsc::Receiver<Order>,
    loaded: oneshot::Sender<Result<EngineSpec, EngineError>>,
) {
    let hand = match build(&mut factory) {
        Ok(hand) => hand,
        Err(error) => {
            let _ = loaded.send(Err(error));
            return;
        }
    };
    let _ = loaded.send(Ok(hand.spec().clone()));
    let mut batch = Batch { hand, factory, running: Vec::new(), pace: None, decoding: Duration::ZERO };
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
            return;
        }
    }
}

struct Batch {
    hand: Box<dyn Hand>,
    factory: Factory<dyn Hand>,
    /// In the order in which their turns come.
    running: Vec<Running>,
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
        match guarded(|| self.hand.begin(&order.request)) {
            Ok(sample) => self.running.push(Running { order, sample, joined: Instant::now(), suspect: false }),
            Err(error) => {
                let _ = order.updates.send(Update::Failed(error));
            }
        }
    }

    /// Advances the group whose turn it is by a step. An error is the end of the thread.
    fn round(&mut self) -> Result<(), EngineError> {
        let (unwanted, wanted) = std::mem::take(&mut self.running)
            .into_iter()
            .partition::<Vec<_>, _>(|running| running.order.unwanted.is_cancelled());
        self.running = wanted;
        for running in unwanted {
            let _ = running.order.updates.send(Update::Stopped);
        }
        let mut group = self.take_group();
        if group.is_empty() {
            return Ok(());
        }
        self.announce_ends(&group);
        let started = Instant::now();
        let mut samples: Vec<&mut Sample> = group.iter_mut().map(|running| &mut running.sample).collect();
        let count = samples.len();
        let outcomes = catch_unwind(AssertUnwindSafe(|| self.hand.step(&mut samples)));
        metrics::histogram!("efferent_hand_batch_size").record(count as f64);
        let step_time = started.elapsed();
        metrics::histogram!("efferent_hand_step_seconds").record(step_time.as_secs_f64());
        self.pace = group.first().map(|first| (first.sample.key.clone(), step_time));
        let outcomes = match outcomes {
            Ok(outcomes) if outcomes.len() == count => outcomes,
            Ok(outcomes) => {
                let what = format!("the engine answered {} of {count} samples", outcomes.len());
                (0..count).map(|_| Err(EngineError::Crashed(what.clone()))).collect()
            }
            Err(panic) => return self.recover(group, &panic_message(panic.as_ref())),
        };
        for (running, outcome) in group.into_iter().zip(outcomes) {
            match outcome {
                Ok(()) => self.after_step(running),
                Err(error) => {
                    let _ = running.order.updates.send(Update::Failed(error));
                }
            }
        }
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

    /// The samples that can be advanced with the first in line; they go to the end of the line afterwards.
    fn take_group(&mut self) -> Vec<Running> {
        let Some(first) = self.running.first() else { return Vec::new() };
        let (key, alone): (BatchKey, bool) = (first.sample.key.clone(), first.suspect);
        let most = if alone { 1 } else { self.hand.spec().max_batch.max(1) };
        let mut group = Vec::new();
        let mut rest = Vec::new();
        for running in std::mem::take(&mut self.running) {
            let fits = running.sample.key == key && running.suspect == alone && group.len() < most;
            if fits { group.push(running) } else { rest.push(running) }
        }
        self.running = rest;
        group
    }

    fn after_step(&mut self, running: Running) {
        let Running { order, sample, joined, suspect } = running;
        let (step, updates) = (sample.step, order.updates.clone());
        let _ = updates.send(Update::Step(step));
        if sample.is_complete() {
            let started = Instant::now();
            let update = match guarded(|| self.hand.finish(sample)) {
                Ok(picture) => Update::Finished(picture, joined.elapsed()),
                Err(error) => Update::Failed(error),
            };
            self.decoding = started.elapsed();
            metrics::histogram!("efferent_hand_decode_seconds").record(self.decoding.as_secs_f64());
            let _ = updates.send(update);
            return;
        }
        if order.preview_interval > 0 && step.is_multiple_of(order.preview_interval) {
            match guarded(|| self.hand.preview(&sample)) {
                Ok(picture) => drop(updates.send(Update::Preview(step, picture))),
                Err(error) => tracing::warn!(%error, "no preview"),
            }
        }
        self.running.push(Running { order, sample, joined, suspect });
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
                for running in group.into_iter().chain(std::mem::take(&mut self.running)) {
                    let _ = running.order.updates.send(Update::Failed(EngineError::Crashed(message.to_owned())));
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
                Ok(sample) => self.running.push(Running { sample, suspect: true, ..running }),
                Err(error) => drop(running.order.updates.send(Update::Failed(error))),
            }
        }
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
