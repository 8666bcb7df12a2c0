//! Several models in one worker: those that are asked for are loaded, as many as its memory holds.
//!
//! Each model that is loaded is a worker of its own, with its own entry in the cluster, which begins and ends as any other. Beside them one entry on standby
//! names all models, so that requests for one that nobody has loaded are accepted. What to load and what to let go of, [`next`] decides from what waits:
//!
//! - A model for which work waits is loaded if there is room, or if something can go for which nothing waits; the one that was used longest ago goes first.
//! - Workers that have the model loaded come first: their work is left to them until it has waited for as long as [`Options::patience`].
//! - Work does not wait for ever behind models that are in use: after that time the one that was loaded first finishes what it has in hand and goes.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use efferent_bus::{
    Bucket, Change, Depth,
    ledger::{self, Ledger},
};
use efferent_proto::v1::{Device, Model, Worker, WorkerRole, WorkerState};
use efferent_service::{Shutdown, admin::Readiness};
use futures::{StreamExt as _, future::BoxFuture};
use tokio::task::JoinHandle;

use crate::lifecycle::{self, Activity, Member, Profile};

/// How often queues are looked at.
const LOOK: Duration = Duration::from_millis(200);
/// How long a model that could not be loaded is not offered.
const REST: Duration = Duration::from_secs(60);

/// Serves a model until it is told to stop: loads it, registers, works.
pub type Serve<E> = Box<dyn Fn(Activity, Readiness, Shutdown) -> BoxFuture<'static, Result<(), E>> + Send + Sync>;

/// A model that can be loaded.
pub struct Candidate<E> {
    /// As it is offered.
    pub model: Model,
    /// The queues that its work waits in.
    pub queues: Vec<String>,
    /// Memory that it takes.
    pub bytes: u64,
    /// Loads and serves it.
    pub serve: Serve<E>,
}

impl<E> std::fmt::Debug for Candidate<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Candidate").field("model", &self.model.name).field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

/// How a roster works.
#[derive(Debug, Clone)]
pub struct Options {
    /// What its models are served as.
    pub role: WorkerRole,
    /// On what.
    pub devices: Vec<Device>,
    /// Bytes of models that are loaded at once.
    pub memory: u64,
    /// How long work waits at most for workers that have its model loaded, and for models that are in use here.
    pub patience: Duration,
}

/// A model as it stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct View {
    /// Memory that it takes.
    pub bytes: u64,
    /// Since when it is loaded here.
    pub loaded: Option<Duration>,
    /// Since when nothing of it is in hand here; zero while something is.
    pub idle: Duration,
    /// For how long the oldest of its tasks waits, if any does.
    pub waiting: Option<Duration>,
    /// Whether another worker has it loaded.
    pub elsewhere: bool,
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Load this one.
    Load(usize),
    /// Let go of this one.
    Unload(usize),
}

/// What is to be done next, if anything.
pub fn next(views: &[View], memory: u64, patience: Duration) -> Option<Next> {
    let wanted = |view: &View| {
        let waiting = view.waiting.filter(|_| view.loaded.is_none())?;
        (!view.elsewhere || waiting >= patience).then_some(waiting)
    };
    let all = || views.iter().enumerate();
    let (index, waiting) =
        all().filter_map(|(index, view)| Some((index, wanted(view)?))).max_by_key(|found| found.1)?;
    let used: u64 = views.iter().filter(|view| view.loaded.is_some()).map(|view| view.bytes).sum();
    if used + views[index].bytes <= memory {
        return Some(Next::Load(index));
    }
    let loaded = || all().filter_map(|(index, view)| Some((index, view, view.loaded?)));
    let unused = loaded().filter(|(_, view, _)| view.waiting.is_none() && !view.idle.is_zero());
    let unused = unused.max_by_key(|(_, view, _)| view.idle).map(|(index, ..)| index);
    let in_use = || loaded().filter(|(.., since)| *since >= patience).max_by_key(|(.., since)| *since);
    let goes = unused.or_else(|| in_use().filter(|_| waiting >= patience).map(|(index, ..)| index));
    goes.map(Next::Unload)
}

/// A model that is loaded, or on its way in or out.
struct Loaded<E> {
    task: JoinHandle<Result<(), E>>,
    activity: Activity,
    readiness: Readiness,
    shutdown: Shutdown,
    since: Instant,
}

/// What a roster does with each model.
struct Place<E> {
    candidate: Candidate<E>,
    loaded: Option<Loaded<E>>,
    /// Until when it is not offered, as it could not be loaded.
    resting: Option<Instant>,
    /// Since when something has been seen to wait in each of its queues, at every look.
    seen: HashMap<String, Instant>,
}

impl<E> Place<E> {
    fn of(candidate: Candidate<E>) -> Self {
        Self { candidate, loaded: None, resting: None, seen: HashMap::new() }
    }
}

/// Why a roster ended.
#[derive(Debug)]
pub enum Error<E> {
    /// The bus is unavailable or unfit.
    Bus(efferent_bus::Error),
    /// A model's service ended so that the process must.
    Service(E),
}

/// Serves until `shutdown`. `unloadable` says why a model cannot be loaded, which leaves the others alone; `None` of an error that ends the process.
///
/// # Errors
/// If the bus is unavailable at the start, or a service fails otherwise than in loading.
pub async fn run<E: Send + 'static>(
    options: Options,
    candidates: Vec<Candidate<E>>,
    unloadable: fn(&E) -> Option<String>,
    ledger: Ledger,
    readiness: Readiness,
    shutdown: Shutdown,
) -> Result<(), Error<E>> {
    for candidate in &candidates {
        ledger.declare_queues(&candidate.model).await.map_err(Error::Bus)?;
    }
    let others = others(&ledger).await.map_err(Error::Bus)?;
    let profile = Profile {
        role: options.role,
        models: candidates.iter().map(|candidate| candidate.model.clone()).collect(),
        devices: options.devices.clone(),
        capacity: 0,
        simulated: false,
        activity: Activity::default(),
    };
    let standby = Member::stand_by(ledger.clone(), profile).await.map_err(Error::Bus)?;
    readiness.set(true);
    let mut places: Vec<Place<E>> = candidates.into_iter().map(Place::of).collect();
    let mut outcome = Ok(());
    while !shutdown.is_triggered() {
        match ended(&mut places, unloadable).await {
            Ok(false) => {}
            Ok(true) => standby.offer(offered(&places)),
            Err(error) => {
                outcome = Err(Error::Service(error));
                break;
            }
        }
        let mut rested = false;
        for place in &mut places {
            rested |= place.resting.take_if(|until| *until <= Instant::now()).is_some();
        }
        if rested {
            standby.offer(offered(&places));
        }
        let views = views(&mut places, &ledger, options.role, &others).await;
        // One after the other: what is on its way in or out decides what fits.
        let moving = |loaded: &Loaded<E>| !loaded.readiness.get() || loaded.shutdown.is_triggered();
        if !places.iter().filter_map(|place| place.loaded.as_ref()).any(moving) {
            match next(&views, options.memory, options.patience) {
                Some(Next::Load(index)) => load(&mut places[index], &shutdown),
                Some(Next::Unload(index)) => unload(&places[index]),
                None => {}
            }
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            () = shutdown.requested() => {}
        }
    }
    shutdown.trigger();
    // Nothing is accepted any more on the strength of what could be loaded.
    standby.drain();
    for place in &mut places {
        if let Some(loaded) = place.loaded.take()
            && let Ok(Err(error)) = loaded.task.await
            && outcome.is_ok()
            && unloadable(&error).is_none()
        {
            outcome = Err(Error::Service(error));
        }
    }
    standby.leave().await;
    outcome
}

fn offered<E>(places: &[Place<E>]) -> Vec<Model> {
    places.iter().filter(|place| place.resting.is_none()).map(|place| place.candidate.model.clone()).collect()
}

fn load<E: Send + 'static>(place: &mut Place<E>, parent: &Shutdown) {
    let model = &place.candidate.model.name;
    tracing::info!(model, bytes = place.candidate.bytes, "loading a model that is asked for");
    metrics::counter!("efferent_models_loaded_total", "model" => model.clone()).increment(1);
    let (activity, readiness, shutdown) = (Activity::default(), Readiness::default(), parent.child());
    let serving = (place.candidate.serve)(activity.clone(), readiness.clone(), shutdown.clone());
    let task = tokio::spawn(serving);
    place.loaded = Some(Loaded { task, activity, readiness, shutdown, since: Instant::now() });
}

fn unload<E>(place: &Place<E>) {
    let Some(loaded) = &place.loaded else { return };
    let model = &place.candidate.model.name;
    tracing::info!(model, "letting go of a model, to make room for another");
    metrics::counter!("efferent_models_unloaded_total", "model" => model.clone()).increment(1);
    loaded.shutdown.trigger();
}

/// Takes note of services that have ended. Whether one could not be loaded.
async fn ended<E>(places: &mut [Place<E>], unloadable: fn(&E) -> Option<String>) -> Result<bool, E> {
    let mut changed = false;
    for place in places {
        let Some(loaded) = place.loaded.take_if(|loaded| loaded.task.is_finished()) else { continue };
        // While it was loaded, its queues were not looked at each time.
        place.seen.clear();
        let why = match loaded.task.await {
            Ok(Ok(())) => continue,
            Ok(Err(error)) => match unloadable(&error) {
                Some(why) => why,
                None => return Err(error),
            },
            Err(error) => error.to_string(),
        };
        tracing::error!(
            model = place.candidate.model.name,
            why,
            "a model cannot be served; it is not offered for a minute"
        );
        place.resting = Some(Instant::now() + REST);
        changed = true;
    }
    Ok(changed)
}

async fn views<E>(places: &mut [Place<E>], ledger: &Ledger, role: WorkerRole, others: &Others) -> Vec<View> {
    let mut views: Vec<View> = places
        .iter()
        .map(|place| View {
            bytes: place.candidate.bytes,
            loaded: place.loaded.as_ref().map(|loaded| loaded.since.elapsed()),
            idle: place.loaded.as_ref().map_or(Duration::ZERO, |loaded| loaded.activity.idle()),
            waiting: None,
            elsewhere: others.have(role, &place.candidate.model.name),
        })
        .collect();
    // What waits for models that are loaded matters only if others are asked for.
    for loaded in [false, true] {
        for (view, place) in views.iter_mut().zip(&mut *places).filter(|(view, _)| view.loaded.is_some() == loaded) {
            view.waiting = waiting(place, ledger).await;
        }
        if views.iter().all(|view| view.waiting.is_none()) {
            break;
        }
    }
    views
}

/// For how long the oldest of a model's tasks waits, if any does.
async fn waiting<E>(place: &mut Place<E>, ledger: &Ledger) -> Option<Duration> {
    let mut waiting = None;
    for queue in place.candidate.queues.iter().filter(|_| place.resting.is_none()) {
        match ledger.bus().depth(queue).await {
            Ok(depth) if depth.ready > 0 => {
                let since = *place.seen.entry(queue.clone()).or_insert_with(Instant::now);
                waiting = waiting.max(Some(waits(&depth, since.elapsed())));
            }
            Ok(_) => drop(place.seen.remove(queue)),
            Err(error) => tracing::debug!(queue, %error, "cannot tell what waits"),
        }
    }
    waiting
}

/// For how long the oldest task that waits in a queue does at most, if one has been seen to for `seen`. The queue tells the age of the oldest that it holds,
/// which another worker may have in hand.
fn waits(depth: &Depth, seen: Duration) -> Duration {
    let oldest = depth.oldest_age.unwrap_or_default();
    if depth.leased == 0 { oldest } else { oldest.min(seen) }
}

/// The workers of other processes.
#[derive(Debug, Clone, Default)]
struct Others(Arc<Mutex<HashMap<String, Worker>>>);

impl Others {
    fn have(&self, role: WorkerRole, model: &str) -> bool {
        let workers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        workers.values().any(|worker| {
            let has = worker.models.iter().any(|served| served.name == model);
            has && worker.role() == role && worker.state() == WorkerState::Ready
        })
    }
}

/// Watches the workers of other processes for as long as the bus lives.
async fn others(ledger: &Ledger) -> efferent_bus::Result<Others> {
    let mut changes = ledger.bus().watch(Bucket::Workers).await?;
    let (others, (host, pid)) = (Others::default(), (lifecycle::host(), std::process::id()));
    let known = others.clone();
    tokio::spawn(async move {
        while let Some(change) = changes.next().await {
            let mut workers = known.0.lock().unwrap_or_else(PoisonError::into_inner);
            match change {
                Change::Put(entry) => match ledger::decode::<Worker>(&entry.value, "worker", &entry.key) {
                    Ok(worker) if (&worker.host, worker.pid) != (&host, pid) => {
                        workers.insert(entry.key, worker);
                    }
                    Ok(_) => {}
                    Err(error) => tracing::debug!(%error, "a worker is left out"),
                },
                Change::Gone { key } => drop(workers.remove(&key)),
                Change::Current => {}
            }
        }
    });
    Ok(others)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const PATIENCE: Duration = Duration::from_secs(2);

    fn out(waiting: Option<Duration>) -> View {
        View { bytes: 10, waiting, ..View::default() }
    }

    fn loaded(since: u32, idle: u32) -> View {
        View { bytes: 10, loaded: Some(SECOND * since), idle: SECOND * idle, ..View::default() }
    }

    #[test]
    fn what_is_asked_for_is_loaded_where_there_is_room() {
        let decide = |views: &[View]| next(views, 20, PATIENCE);
        assert_eq!(decide(&[out(None), out(None)]), None);
        assert_eq!(decide(&[out(None), out(Some(Duration::ZERO))]), Some(Next::Load(1)));
        assert_eq!(
            decide(&[out(Some(SECOND)), out(Some(SECOND * 3))]),
            Some(Next::Load(1)),
            "who waits longest is first"
        );
        assert_eq!(decide(&[loaded(1, 0), out(Some(SECOND))]), Some(Next::Load(1)));
    }

    #[test]
    fn what_was_used_longest_ago_makes_room() {
        let decide = |views: &[View]| next(views, 20, PATIENCE);
        assert_eq!(decide(&[loaded(90, 5), loaded(60, 50), out(Some(Duration::ZERO))]), Some(Next::Unload(1)));
        let asked_for = View { waiting: Some(SECOND), ..loaded(60, 50) };
        assert_eq!(decide(&[loaded(90, 5), asked_for, out(Some(SECOND))]), Some(Next::Unload(0)));
    }

    #[test]
    fn what_is_in_use_makes_room_for_who_has_waited_long_enough() {
        let decide = |views: &[View]| next(views, 20, PATIENCE);
        assert_eq!(decide(&[loaded(90, 0), loaded(60, 0), out(Some(SECOND))]), None);
        assert_eq!(decide(&[loaded(90, 0), loaded(60, 0), out(Some(PATIENCE))]), Some(Next::Unload(0)));
        assert_eq!(decide(&[loaded(1, 0), loaded(0, 0), out(Some(SECOND * 9))]), None, "nobody goes who has just come");
    }

    #[test]
    fn what_is_in_hand_elsewhere_does_not_wait() {
        let depth = |leased| Depth { ready: 1, leased, oldest_age: Some(SECOND * 15) };
        assert_eq!(waits(&depth(0), Duration::ZERO), SECOND * 15, "it came before this worker did");
        assert_eq!(waits(&depth(1), Duration::ZERO), Duration::ZERO, "it may have come just now");
        assert_eq!(waits(&depth(1), SECOND * 3), SECOND * 3);
        assert_eq!(waits(&depth(1), SECOND * 90), SECOND * 15);
    }

    #[test]
    fn work_is_left_to_who_has_the_model_for_a_while() {
        let there = |waiting| View { elsewhere: true, ..out(Some(waiting)) };
        assert_eq!(next(&[there(SECOND)], 20, PATIENCE), None);
        assert_eq!(next(&[there(PATIENCE)], 20, PATIENCE), Some(Next::Load(0)));
        assert_eq!(next(&[there(SECOND), out(Some(Duration::ZERO))], 20, PATIENCE), Some(Next::Load(1)));
    }
}
