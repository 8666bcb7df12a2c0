//! A worker's membership of the cluster: registration, heartbeat, drain.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use efferent_bus::ledger::Ledger;
use efferent_proto::{
    names, time,
    v1::{Device, Model, Worker, WorkerRole, WorkerState},
};
use tokio::{sync::Notify, task::AbortHandle};

use crate::stage_time::{Begun, StageClock};

/// How long a worker that is not heard of counts as alive.
pub const TIME_TO_LIVE: Duration = Duration::from_secs(10);
const HEARTBEAT: Duration = Duration::from_secs(3);

/// What a worker says of itself when it joins.
#[derive(Debug, Clone)]
pub struct Profile {
    /// What it does.
    pub role: WorkerRole,
    /// Models it serves a part of.
    pub models: Vec<Model>,
    /// Devices it computes on.
    pub devices: Vec<Device>,
    /// Most tasks it takes at once.
    pub capacity: u32,
    /// Whether its engine only pretends.
    pub simulated: bool,
    /// Told of what is in hand.
    pub activity: Activity,
}

/// How many tasks are in hand, and since when none is. Clones share it.
#[derive(Debug, Clone)]
pub struct Activity(Arc<Mutex<(u32, Instant)>>);

impl Default for Activity {
    fn default() -> Self {
        Self(Arc::new(Mutex::new((0, Instant::now()))))
    }
}

impl Activity {
    /// Since when nothing is in hand; zero if something is.
    pub fn idle(&self) -> Duration {
        let (in_hand, since) = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if in_hand > 0 { Duration::ZERO } else { since.elapsed() }
    }

    fn change(&self, change: impl FnOnce(u32) -> u32) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *state = (change(state.0), Instant::now());
    }
}

/// A registered worker. Dropping it stops the heartbeat, so that it vanishes after [`TIME_TO_LIVE`]; [`Member::leave`] is quicker.
#[derive(Debug)]
pub struct Member {
    id: String,
    ledger: Ledger,
    shared: Arc<Shared>,
    heartbeat: AbortHandle,
}

#[derive(Debug)]
struct Shared {
    worker: Mutex<Worker>,
    in_flight: AtomicU32,
    activity: Activity,
    clock: StageClock,
    changed: Notify,
}

impl Shared {
    fn worker(&self) -> Worker {
        let mut worker = self.worker.lock().unwrap_or_else(PoisonError::into_inner).clone();
        worker.in_flight = self.in_flight.load(Ordering::Relaxed);
        worker.time = self.clock.tell(Instant::now());
        worker
    }
}

impl Member {
    /// Registers a worker as ready, and its models as known.
    ///
    /// # Errors
    /// If the bus is unavailable.
    pub async fn join(ledger: Ledger, profile: Profile) -> efferent_bus::Result<Self> {
        Self::register(ledger, profile, WorkerState::Ready).await
    }

    /// Registers a worker that loads its models when they are asked for, and its models as known.
    ///
    /// # Errors
    /// If the bus is unavailable.
    pub async fn stand_by(ledger: Ledger, profile: Profile) -> efferent_bus::Result<Self> {
        Self::register(ledger, profile, WorkerState::Standby).await
    }

    async fn register(ledger: Ledger, profile: Profile, state: WorkerState) -> efferent_bus::Result<Self> {
        let id = names::new_job_id().to_lowercase();
        let mut worker = Worker {
            id: id.clone(),
            models: profile.models,
            devices: profile.devices.iter().map(|device| device.device.clone()).collect(),
            hardware: profile.devices,
            capacity: profile.capacity,
            simulated: profile.simulated,
            host: host(),
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            started_at: Some(time::timestamp(ledger.now())),
            ..Default::default()
        };
        worker.set_role(profile.role);
        worker.set_state(state);
        for model in &worker.models {
            ledger.register_model(model).await?;
        }
        ledger.register_worker(&worker, TIME_TO_LIVE).await?;
        let shared = Arc::new(Shared {
            worker: Mutex::new(worker),
            in_flight: AtomicU32::new(0),
            activity: profile.activity,
            clock: StageClock::default(),
            changed: Notify::new(),
        });
        let heartbeat = tokio::spawn(beat(ledger.clone(), shared.clone())).abort_handle();
        Ok(Self { id, ledger, shared, heartbeat })
    }

    /// Its id, unique for each start of a process.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Counts a task as held until the guard is dropped.
    pub fn hold(&self) -> InFlight {
        self.shared.in_flight.fetch_add(1, Ordering::Relaxed);
        self.shared.activity.change(|count| count + 1);
        InFlight { begun: self.shared.clock.begin(Instant::now()), shared: self.shared.clone() }
    }

    /// Says which models it serves from now on.
    pub fn offer(&self, models: Vec<Model>) {
        self.shared.worker.lock().unwrap_or_else(PoisonError::into_inner).models = models;
        self.shared.changed.notify_one();
    }

    /// Says that no more work is taken.
    pub fn drain(&self) {
        self.shared.worker.lock().unwrap_or_else(PoisonError::into_inner).set_state(WorkerState::Draining);
        self.shared.changed.notify_one();
    }

    /// Takes the worker off the list.
    pub async fn leave(self) {
        self.heartbeat.abort();
        if let Err(error) = self.ledger.remove_worker(&self.id).await {
            tracing::warn!(%error, "could not sign off; the registration runs out by itself");
        }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.heartbeat.abort();
    }
}

/// A task that counts as held.
#[derive(Debug)]
pub struct InFlight {
    shared: Arc<Shared>,
    begun: Begun,
}

impl InFlight {
    /// Takes down that it was done: units as [`efferent_proto::v1::StageTime`] counts them, and how long they took.
    pub fn done(&self, units: f64, elapsed: Duration) {
        self.shared.clock.done(self.begun, units, elapsed, Instant::now());
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.shared.in_flight.fetch_sub(1, Ordering::Relaxed);
        self.shared.activity.change(|count| count.saturating_sub(1));
        self.shared.clock.end(Instant::now());
    }
}

async fn beat(ledger: Ledger, shared: Arc<Shared>) {
    loop {
        tokio::select! {
            () = tokio::time::sleep(HEARTBEAT) => {}
            () = shared.changed.notified() => {}
        }
        let worker = shared.worker();
        metrics::gauge!("efferent_worker_in_flight").set(f64::from(worker.in_flight));
        metrics::gauge!("efferent_worker_utilisation").set(worker.time.map_or(0.0, |time| time.utilisation));
        if let Err(error) = ledger.register_worker(&worker, TIME_TO_LIVE).await {
            tracing::warn!(%error, "heartbeat failed");
        }
    }
}

/// The host's name.
pub fn host() -> String {
    let named = std::fs::read_to_string("/proc/sys/kernel/hostname").map(|name| name.trim().to_owned()).ok();
    named.or_else(|| std::env::var("HOSTNAME").ok()).unwrap_or_else(|| "unknown".to_owned())
}
