//! A worker's membership of the cluster: registration (before its model is loaded, and again when it is), heartbeat, drain.

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
use tokio::{
    sync::{self, Notify},
    task::AbortHandle,
};

use crate::{
    engine::EngineSpec,
    stage_time::{Begun, StageClock},
};

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
    /// Whoever writes the entry has this: what is older is never written last.
    writing: sync::Mutex<()>,
}

impl Shared {
    fn worker(&self) -> Worker {
        let mut worker = self.worker.lock().unwrap_or_else(PoisonError::into_inner).clone();
        worker.in_flight = self.in_flight.load(Ordering::Relaxed);
        worker.time = self.clock.tell(Instant::now());
        worker
    }

    /// Writes the worker's entry as it is now.
    async fn tell(&self, ledger: &Ledger) -> efferent_bus::Result<()> {
        let _turn = self.writing.lock().await;
        let worker = self.worker();
        metrics::gauge!("efferent_worker_in_flight").set(f64::from(worker.in_flight));
        metrics::gauge!("efferent_worker_utilisation").set(worker.time.map_or(0.0, |time| time.utilisation));
        ledger.register_worker(&worker, TIME_TO_LIVE).await
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

    /// Registers a worker that is about to load its model, so that it is seen meanwhile. Nobody counts on it before [`Member::ready`].
    /// The profile says what is known by then; its models are not made known on the strength of that.
    ///
    /// # Errors
    /// If the bus is unavailable.
    pub async fn start(ledger: Ledger, profile: Profile) -> efferent_bus::Result<Self> {
        Self::register(ledger, profile, WorkerState::Starting).await
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
        for model in worker.models.iter().filter(|_| state != WorkerState::Starting) {
            ledger.register_model(model).await?;
        }
        let shared = Arc::new(Shared {
            worker: Mutex::new(worker),
            in_flight: AtomicU32::new(0),
            activity: profile.activity,
            clock: StageClock::default(),
            changed: Notify::new(),
            writing: sync::Mutex::default(),
        });
        shared.tell(&ledger).await?;
        let heartbeat = tokio::spawn(beat(ledger.clone(), shared.clone())).abort_handle();
        Ok(Self { id, ledger, shared, heartbeat })
    }

    /// Its id, unique for each start of a process.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Says what it has loaded, and that it takes up to `capacity` tasks at once from now on; makes the model known.
    ///
    /// # Errors
    /// If the bus is unavailable.
    pub async fn ready(&self, spec: &EngineSpec, capacity: u32) -> efferent_bus::Result<()> {
        self.ledger.register_model(&spec.model).await?;
        {
            let mut worker = self.shared.worker.lock().unwrap_or_else(PoisonError::into_inner);
            worker.models = vec![spec.model.clone()];
            (worker.capacity, worker.simulated) = (capacity, spec.simulated);
            worker.set_state(WorkerState::Ready);
        }
        self.shared.tell(&self.ledger).await
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
        if let Err(error) = shared.tell(&ledger).await {
            tracing::warn!(%error, "heartbeat failed");
        }
    }
}

/// The host's name.
pub fn host() -> String {
    let named = std::fs::read_to_string("/proc/sys/kernel/hostname").map(|name| name.trim().to_owned()).ok();
    named.or_else(|| std::env::var("HOSTNAME").ok()).unwrap_or_else(|| "unknown".to_owned())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use efferent_bus::{
        Bucket, SharedBus,
        embedded::Embedded,
        ledger::{self, Options},
    };

    use super::*;
    use crate::sim;

    async fn entry(bus: &SharedBus, member: &Member) -> Option<Worker> {
        let entry = bus.get(Bucket::Workers, member.id()).await.unwrap();
        entry.map(|entry| ledger::decode(&entry.value, "worker", member.id()).unwrap())
    }

    #[tokio::test]
    async fn a_worker_is_seen_while_it_loads_and_counted_on_afterwards() {
        let folder = tempfile::tempdir().unwrap();
        let bus: SharedBus = Arc::new(Embedded::open(folder.path()).await.unwrap());
        let profile = Profile {
            role: WorkerRole::Hand,
            models: vec![sim::model()],
            devices: Vec::new(),
            capacity: 0,
            simulated: false,
            activity: Activity::default(),
        };
        let member = Member::start(Ledger::new(bus.clone(), Options::default()), profile).await.unwrap();
        let known = entry(&bus, &member).await.unwrap();
        assert_eq!((known.state(), known.capacity, known.models.len()), (WorkerState::Starting, 0, 1));
        assert!(bus.list(Bucket::Models).await.unwrap().is_empty(), "it may never be served");

        let spec = EngineSpec { model: sim::model(), max_batch: 4, simulated: true };
        member.ready(&spec, 4).await.unwrap();
        let known = entry(&bus, &member).await.unwrap();
        assert_eq!((known.state(), known.capacity, known.simulated), (WorkerState::Ready, 4, true));
        assert_eq!(known.models, [sim::model()]);
        assert_eq!(bus.list(Bucket::Models).await.unwrap().len(), 1);
        let id = member.id().to_owned();
        member.leave().await;
        assert_eq!(bus.get(Bucket::Workers, &id).await.unwrap(), None);
    }
}
