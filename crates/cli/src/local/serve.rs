//! `up`, `coordinator`, `brain`, `hand`: services on a bus, until they are told to stop.

use std::{
    future::Future,
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use efferent_bus::{SharedBus, embedded::Embedded, ledger::Ledger, nats::Nats};
use efferent_proto::{names, v1::WorkerRole};
use efferent_service::{
    Shutdown,
    admin::{self, Readiness},
    telemetry::Telemetry,
};
use efferent_worker::{
    lifecycle::Activity,
    roster::{self, Candidate, Serve},
    weights::loaded,
};
use tokio::{
    io::AsyncReadExt as _,
    net::TcpListener,
    task::{JoinHandle, JoinSet},
};

use crate::{
    exit::{Exit, Failure},
    local::engines::Engines,
    output,
    settings::{Local, Settings},
};

/// How often the log tells how much of the weights is read.
const LOADING_TOLD: Duration = Duration::from_secs(5);
/// How often to look whether every service is ready.
const READY_POLL: Duration = Duration::from_millis(5);
/// How long to wait for a NATS server that is not there yet.
const BUS_PATIENCE: Duration = Duration::from_secs(15);
const BUS_PAUSE: Duration = Duration::from_secs(1);

/// What a server process does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// Everything.
    Up,
    /// The front door.
    Coordinator,
    /// Prompts to control signals.
    Brain,
    /// Control signals to pictures.
    Hand,
}

impl Role {
    /// Its name.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::Coordinator => "coordinator",
            Self::Brain => "brain",
            Self::Hand => "hand",
        }
    }

    fn has(self, part: Role) -> bool {
        self == Self::Up || self == part
    }

    fn admin_port(self) -> u16 {
        match self {
            Self::Up | Self::Coordinator => 9090,
            Self::Brain => 9091,
            Self::Hand => 9092,
        }
    }
}

/// Services of one process that stop together.
#[derive(Debug)]
pub(crate) struct Services {
    ledger: Ledger,
    shutdown: Shutdown,
    tasks: JoinSet<Result<(), Failure>>,
    readiness: Vec<Readiness>,
}

impl Services {
    /// None yet, on these records, to be stopped by `shutdown`.
    pub(crate) fn new(ledger: Ledger, shutdown: Shutdown) -> Self {
        Self { ledger, shutdown, tasks: JoinSet::new(), readiness: Vec::new() }
    }

    fn start(&mut self, service: impl Future<Output = Result<(), Failure>> + Send + 'static, readiness: Readiness) {
        self.readiness.push(readiness);
        self.tasks.spawn(service);
    }

    /// Starts the front door.
    pub(crate) fn coordinator(&mut self, settings: &Local, listener: TcpListener) {
        let (options, ledger, shutdown) = (settings.coordinator.clone(), self.ledger.clone(), self.shutdown.clone());
        let readiness = Readiness::default();
        let service = efferent_coordinator::run(options, ledger, listener, readiness.clone(), shutdown);
        let exit = |error: &_| match error {
            efferent_coordinator::Error::Bus(error) => bus_exit(error),
            _ => Exit::Failed,
        };
        self.start(async move { service.await.map_err(|error| Failure::new(exit(&error), error)) }, readiness);
    }

    /// Starts a worker of several models, which loads them as they are asked for.
    ///
    /// # Errors
    /// If one does not say what it offers, cannot be read, or is larger than all that may be loaded.
    pub(crate) fn several(&mut self, settings: &Settings, role: Role, all: &[Arc<Engines>]) -> Result<(), Failure> {
        let local = &settings.local;
        let is_brain = role == Role::Brain;
        let parts: &[&str] = if is_brain { &["brain", "connector"] } else { &["hand"] };
        let devices = all.first().map(|engines| engines.devices()).unwrap_or_default();
        let gpus: u64 = devices.iter().filter(|device| device.cores == 0).map(|device| device.memory_bytes).sum();
        let found = if gpus > 0 { gpus } else { efferent_worker::memory::available().unwrap_or(u64::MAX) };
        // What is over is for pictures.
        let memory = if local.model_memory > 0 { local.model_memory } else { found / 5 * 4 };
        let mut candidates = Vec::new();
        for engines in all {
            let (model, bytes) = (engines.model()?, engines.memory(settings, parts)?);
            if bytes > memory {
                let message = format!(
                    "model {} takes {bytes} bytes, over the {memory} that may be loaded (model_memory)",
                    model.name
                );
                return Err(Failure::words(Exit::Config, message));
            }
            let queue = |lane| {
                if is_brain { names::brain_queue(&model.brain, lane) } else { names::hand_queue(&model.hand, lane) }
            };
            let queues = names::LANES.map(queue).to_vec();
            if let Some(Candidate { model: other, .. }) =
                candidates.iter().find(|other: &&Candidate<_>| other.queues == queues)
            {
                let message =
                    format!("models {} and {} have one {}; name one of them", other.name, model.name, role.name());
                return Err(Failure::words(Exit::Config, message));
            }
            let (engines, local, ledger) = (engines.clone(), local.clone(), self.ledger.clone());
            let serve: Serve<Failure> = Box::new(move |activity, readiness, shutdown| {
                Box::pin(work(role, local.clone(), engines.clone(), activity, ledger.clone(), readiness, shutdown))
            });
            candidates.push(Candidate { model, queues, bytes, serve });
        }
        let of = if is_brain { WorkerRole::Brain } else { WorkerRole::Hand };
        let options = roster::Options { role: of, devices, memory, patience: local.model_patience };
        let readiness = Readiness::default();
        let (ledger, shutdown) = (self.ledger.clone(), self.shutdown.clone());
        let serving =
            roster::run(options, candidates, |failure| failure.why(Exit::Config), ledger, readiness.clone(), shutdown);
        let serving = async move {
            serving.await.map_err(|error| match error {
                roster::Error::Bus(error) => Failure::new(bus_exit(&error), error),
                roster::Error::Service(failure) => failure,
            })
        };
        self.start(serving, readiness);
        Ok(())
    }

    /// Starts a brain or a hand.
    pub(crate) fn worker(&mut self, role: Role, settings: &Local, engines: &Arc<Engines>) {
        let (settings, engines, ledger) = (settings.clone(), engines.clone(), self.ledger.clone());
        let (readiness, shutdown) = (Readiness::default(), self.shutdown.clone());
        let serving = work(role, settings, engines, Activity::default(), ledger, readiness.clone(), shutdown);
        self.start(serving, readiness);
    }

    /// Whether every service takes work.
    pub(crate) fn readiness(&self) -> Readiness {
        Readiness::all(self.readiness.clone())
    }

    /// Waits until every service takes work; false if they were told to stop before. `progress` is told bytes of weights that are read, and of all.
    ///
    /// # Errors
    /// If one fails.
    pub(crate) async fn ready(&mut self, progress: impl Fn((u64, u64))) -> Result<bool, Failure> {
        let (readiness, mut told) = (self.readiness(), Instant::now());
        while !readiness.get() {
            let (read, all) = loaded();
            if read < all && told.elapsed() > LOADING_TOLD {
                told = Instant::now();
                tracing::info!(read, all, "loading weights");
            }
            progress((read, all));
            tokio::select! {
                () = tokio::time::sleep(READY_POLL) => {}
                () = self.shutdown.requested() => return Ok(false),
                failure = self.broken() => return Err(failure),
            }
        }
        Ok(true)
    }

    /// Waits until a service ends though none was told to.
    pub(crate) async fn broken(&mut self) -> Failure {
        loop {
            match self.tasks.join_next().await {
                Some(Ok(Err(failure))) => return failure,
                Some(Ok(Ok(()))) if self.shutdown.is_triggered() => {}
                Some(Ok(Ok(()))) => return Failure::words(Exit::Failed, "a service ended by itself"),
                Some(Err(error)) => {
                    return Failure::new(Exit::Failed, anyhow::Error::new(error).context("a service crashed"));
                }
                None => std::future::pending().await,
            }
        }
    }

    /// Waits until all have ended, and stops the others as soon as one fails.
    ///
    /// # Errors
    /// The first failure.
    pub(crate) async fn finish(mut self) -> Result<(), Failure> {
        let mut outcome = tokio::select! {
            () = self.shutdown.requested() => Ok(()),
            failure = self.broken() => Err(failure),
        };
        self.shutdown.trigger();
        while let Some(ended) = self.tasks.join_next().await {
            if let Ok(Err(failure)) = ended
                && outcome.is_ok()
            {
                outcome = Err(failure);
            }
        }
        outcome
    }
}

/// A brain or a hand, from loading to leaving.
async fn work(
    role: Role,
    settings: Local,
    engines: Arc<Engines>,
    activity: Activity,
    ledger: Ledger,
    readiness: Readiness,
    shutdown: Shutdown,
) -> Result<(), Failure> {
    let (devices, model) = (engines.devices(), engines.model().ok());
    if role == Role::Brain {
        let options = efferent_brain::Options { activity, model, ..settings.brain };
        let factory = engines.brain(&settings.home);
        let served = efferent_brain::run(options, factory, devices, ledger, readiness, shutdown).await;
        return served.map_err(|error| {
            let exit = match &error {
                efferent_brain::Error::Engine(_) => Exit::Config,
                efferent_brain::Error::Bus(error) => bus_exit(error),
                efferent_brain::Error::Hang(_) => Exit::Hung,
            };
            Failure::new(exit, error)
        });
    }
    let factory = engines.hand(settings.hand.tile_above);
    let options = efferent_hand::Options { activity, model, ..settings.hand };
    let served = efferent_hand::run(options, factory, devices, ledger, readiness, shutdown).await;
    served.map_err(|error| {
        let exit = match &error {
            efferent_hand::Error::Engine(_) => Exit::Config,
            efferent_hand::Error::Bus(error) => bus_exit(error),
            efferent_hand::Error::Hang(_) => Exit::Hung,
        };
        Failure::new(exit, error)
    })
}

/// The exit code of a failure of the bus.
pub(crate) fn bus_exit(error: &efferent_bus::Error) -> Exit {
    match error {
        efferent_bus::Error::Unfit(_) | efferent_bus::Error::Usage(_) => Exit::Config,
        _ => Exit::Unavailable,
    }
}

/// Refuses to work without a server for the queue.
///
/// # Errors
/// If none is named.
pub(crate) fn needs_queue(local: &Local, what: &str) -> Result<(), Failure> {
    if !local.nats.url.is_empty() {
        return Ok(());
    }
    let message = format!("{what} needs the queue's server: --nats nats://HOST:4222 (or EFFERENT_NATS)");
    Err(Failure::words(Exit::Config, message))
}

/// Gives the stop signal when the input ends, as it does when whoever holds its other end is gone.
pub(crate) async fn end_with_input(shutdown: Shutdown) {
    let (mut input, mut buffer) = (tokio::io::stdin(), [0; 64]);
    while input.read(&mut buffer).await.is_ok_and(|read| read > 0) {}
    shutdown.trigger();
}

/// A stop signal that Ctrl-C and SIGTERM give.
///
/// # Errors
/// If they cannot be listened for.
pub(crate) fn signals() -> Result<Shutdown, Failure> {
    Shutdown::on_signals()
        .map_err(|error| Failure::new(Exit::Failed, anyhow::Error::new(error).context("cannot listen for signals")))
}

/// Serves until `shutdown`, with so many brains or hands.
///
/// # Errors
/// If the configuration is wrong (before anything is started), weights cannot be had, or a service fails.
pub(crate) async fn run_until(
    shutdown: Shutdown,
    settings: &Settings,
    role: Role,
    copies: usize,
    telemetry: &Telemetry,
) -> Result<(), Failure> {
    let local = &settings.local;
    if role != Role::Up {
        needs_queue(local, role.name())?;
    }
    let engines = match role {
        Role::Coordinator => Vec::new(),
        Role::Up | Role::Brain | Role::Hand => {
            Engines::open_all(settings, role.name())?.into_iter().map(Arc::new).collect()
        }
    };
    for engines in engines.iter().filter(|_| role.has(Role::Brain)) {
        tokio::select! {
            provided = provide_weights(engines, settings) => provided?,
            () = shutdown.requested() => return Ok(()),
        }
    }
    let listener = match role.has(Role::Coordinator) {
        true => Some(bind(local.listen, "--listen").await?),
        false => None,
    };
    let admin_listener = match local.admin.address(role.admin_port()) {
        Some(address) => Some(bind(address, "--admin").await?),
        None => None,
    };
    let bus = tokio::select! {
        bus = join_bus(local) => bus?,
        () = shutdown.requested() => return Ok(()),
    };
    let mut services = Services::new(Ledger::new(bus.clone(), local.ledger.options()), shutdown.clone());
    let mut ready = Vec::new();
    if let Some(listener) = listener {
        ready.push(format!("ready  grpc   http://{}", address_of(&listener)));
        services.coordinator(local, listener);
    }
    for engines in &engines {
        let simulated = if engines.is_simulated() { ", simulated: its pictures show nothing" } else { "" };
        ready.push(format!("ready  model  {}{simulated} ({})", engines.name(), role.name()));
    }
    for part in [Role::Brain, Role::Hand].into_iter().filter(|part| role.has(*part)) {
        match &engines[..] {
            [] => {}
            [only] => (0..copies).for_each(|_| services.worker(part, local, only)),
            several => services.several(settings, part, several)?,
        }
    }
    let place =
        if local.nats.url.is_empty() { local.home.join("data").display().to_string() } else { local.nats.url.clone() };
    ready.push(format!("ready  queue  {} ({place})", bus.kind()));
    let admin = admin_listener.map(|listener| {
        ready.push(format!("ready  admin  http://{}/readyz, /healthz, /metrics", address_of(&listener)));
        serve_admin(listener, services.readiness(), bus, telemetry)
    });
    let outcome = match services.ready(|_| {}).await {
        Ok(true) => {
            if role == Role::Up {
                let server = ready[0].rsplit(' ').next().unwrap_or_default();
                ready.push(format!(
                    "try    efferent generate --server {server} \"a red apple\"    (Ctrl-C stops the server)"
                ));
            }
            // Whoever started the server may have stopped reading.
            let _ = output::line(ready.join("\n"));
            services.finish().await
        }
        Ok(false) => services.finish().await,
        Err(failure) => {
            shutdown.trigger();
            let _ = services.finish().await;
            Err(failure)
        }
    };
    // Last, so that operators can watch the others stop.
    if let Some(admin) = admin {
        admin.abort();
    }
    outcome
}

/// Fetches missing weights without holding up the runtime.
///
/// # Errors
/// If they cannot be had.
pub(crate) async fn provide_weights(engines: &Arc<Engines>, settings: &Settings) -> Result<(), Failure> {
    let (engines, settings) = (engines.clone(), settings.clone());
    let provided = tokio::task::spawn_blocking(move || engines.provide_weights(&settings)).await;
    provided.map_err(|error| Failure::new(Exit::Failed, error))?
}

async fn bind(address: SocketAddr, flag: &str) -> Result<TcpListener, Failure> {
    TcpListener::bind(address).await.map_err(|error| {
        Failure::new(Exit::Config, anyhow::Error::new(error).context(format!("cannot listen on {address} ({flag})")))
    })
}

fn address_of(listener: &TcpListener) -> String {
    listener.local_addr().map(|address| address.to_string()).unwrap_or_default()
}

fn serve_admin(listener: TcpListener, readiness: Readiness, bus: SharedBus, telemetry: &Telemetry) -> JoinHandle<()> {
    let metrics = telemetry.metrics.clone();
    tokio::spawn(async move {
        if let Err(error) = admin::serve(listener, readiness, bus, metrics, Shutdown::new()).await {
            tracing::error!(%error, "the admin port has failed");
        }
    })
}

/// The cluster's bus, or this machine's.
async fn join_bus(local: &Local) -> Result<SharedBus, Failure> {
    if local.nats.url.is_empty() {
        return embedded(&local.home.join("data")).await;
    }
    let started = tokio::time::Instant::now();
    loop {
        match Nats::connect(local.nats.clone()).await {
            Ok(bus) => return Ok(Arc::new(bus)),
            Err(error @ efferent_bus::Error::Unavailable { .. }) if started.elapsed() < BUS_PATIENCE => {
                tracing::warn!(%error, "no queue yet; trying again");
                tokio::time::sleep(BUS_PAUSE).await;
            }
            Err(error) => return Err(Failure::new(bus_exit(&error), error)),
        }
    }
}

/// A bus in a folder.
///
/// # Errors
/// If the folder cannot be used, or another process uses it.
pub(crate) async fn embedded(folder: &Path) -> Result<SharedBus, Failure> {
    match Embedded::open(folder).await {
        Ok(bus) => Ok(Arc::new(bus)),
        Err(error @ efferent_bus::Error::Unfit(_)) => Err(Failure::new(Exit::Config, error)),
        Err(error) => Err(Failure::new(Exit::File, error)),
    }
}
