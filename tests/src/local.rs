//! A cluster in this process.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use efferent_brain::families::sim as brains;
use efferent_bus::{
    Bucket, SharedBus,
    embedded::Embedded,
    ledger::{Ledger, Options},
};
use efferent_hand::families::sim as hands;
use efferent_proto::v1::{Device, ListWorkersRequest, WorkerState, cluster_service_client::ClusterServiceClient};
use efferent_service::{Shutdown, admin::Readiness};
use efferent_worker::{
    engine::{Brain, Hand},
    thread::Factory,
};
use tempfile::TempDir;
use tokio::{net::TcpListener, task::JoinHandle};
use tonic::transport::Channel;

use crate::calls::{Client, PATIENCE};

/// The embedded queue and what runs on it.
#[derive(Debug)]
pub struct Cluster {
    /// The records.
    pub ledger: Ledger,
    coordinators: Mutex<Vec<String>>,
    _folder: TempDir,
}

/// A service that can be stopped.
#[derive(Debug)]
pub struct Service {
    shutdown: Shutdown,
    task: JoinHandle<()>,
}

impl Service {
    async fn start<E: std::error::Error + Send + 'static>(
        shutdown: Shutdown,
        readiness: Readiness,
        service: impl Future<Output = Result<(), E>> + Send + 'static,
    ) -> Self {
        let task = tokio::spawn(async move { service.await.expect("the service does not fail") });
        let ready = async {
            while !readiness.get() {
                assert!(!task.is_finished(), "the service ended before it was ready");
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        tokio::time::timeout(PATIENCE, ready).await.expect("the service is ready in time");
        Self { shutdown, task }
    }

    /// Stops it gracefully and waits for its end.
    pub async fn stop(self) {
        self.shutdown.trigger();
        tokio::time::timeout(PATIENCE, self.task).await.expect("the service stops in time").expect("without a panic");
    }

    /// Tells it to stop.
    pub fn tell_to_stop(&self) {
        self.shutdown.trigger();
    }
}

/// A coordinator and its address.
#[derive(Debug)]
pub struct Coordinator {
    /// Stops it.
    pub service: Service,
    /// Where it listens.
    pub url: String,
}

impl Coordinator {
    /// A new connection to it.
    pub async fn channel(&self) -> Channel {
        Channel::from_shared(self.url.clone()).expect("a URL").connect().await.expect("it listens")
    }

    /// A new client.
    pub async fn client(&self) -> Client {
        Client::new(self.channel().await)
    }

    /// A new client of `ClusterService`.
    pub async fn cluster_client(&self) -> ClusterServiceClient<Channel> {
        ClusterServiceClient::new(self.channel().await)
    }
}

impl Cluster {
    /// Nothing runs yet.
    pub async fn new() -> Self {
        Self::with(Options { lease: Duration::from_secs(2), ..Options::default() }).await
    }

    /// With these limits.
    pub async fn with(options: Options) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let bus: SharedBus = Arc::new(Embedded::open(folder.path()).await.expect("an embedded queue"));
        Self { ledger: Ledger::new(bus, options), coordinators: Mutex::default(), _folder: folder }
    }

    /// Starts a coordinator.
    pub async fn coordinator(&self) -> Coordinator {
        self.coordinator_with(efferent_coordinator::Options::default()).await
    }

    /// Starts a coordinator with options.
    pub async fn coordinator_with(&self, options: efferent_coordinator::Options) -> Coordinator {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let (shutdown, readiness) = (Shutdown::new(), Readiness::default());
        let service =
            efferent_coordinator::run(options, self.ledger.clone(), listener, readiness.clone(), shutdown.clone());
        self.coordinators.lock().expect("is not poisoned").push(url.clone());
        Coordinator { service: Service::start(shutdown, readiness, service).await, url }
    }

    /// Waits until every coordinator that listens knows of all workers there are: they hear of them a moment later.
    pub async fn settled(&self) {
        let coordinators = self.coordinators.lock().expect("is not poisoned").clone();
        for url in coordinators {
            let Ok(mut client) = ClusterServiceClient::connect(url).await else { continue };
            let same = async {
                loop {
                    let there = self.ledger.bus().list(Bucket::Workers).await.expect("workers").len();
                    let known = client.list_workers(ListWorkersRequest {}).await.expect("workers").into_inner().workers;
                    if known.len() == there && known.iter().all(|worker| worker.state() != WorkerState::Starting) {
                        return;
                    }
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
            };
            tokio::time::timeout(PATIENCE, same).await.expect("coordinators hear of workers");
        }
    }

    /// Starts a brain.
    pub async fn brain(&self, factory: Factory<dyn Brain>) -> Service {
        let (shutdown, readiness) = (Shutdown::new(), Readiness::default());
        let options = efferent_brain::Options { grace: Duration::from_secs(5), ..Default::default() };
        let ledger = self.ledger.clone();
        let service = efferent_brain::run(options, factory, cpu(), ledger, readiness.clone(), shutdown.clone());
        let service = Service::start(shutdown, readiness, service).await;
        self.settled().await;
        service
    }

    /// Starts a hand.
    pub async fn hand(&self, factory: Factory<dyn Hand>) -> Service {
        let (shutdown, readiness) = (Shutdown::new(), Readiness::default());
        let options = efferent_hand::Options { grace: Duration::from_secs(5), ..Default::default() };
        let ledger = self.ledger.clone();
        let service = efferent_hand::run(options, factory, cpu(), ledger, readiness.clone(), shutdown.clone());
        let service = Service::start(shutdown, readiness, service).await;
        self.settled().await;
        service
    }

    /// Starts a simulated brain that takes no time.
    pub async fn quick_brain(&self) -> Service {
        self.brain(brains::factory(brains::Cost::default())).await
    }

    /// Starts a simulated hand whose steps take this long.
    pub async fn sim_hand(&self, per_step: Duration) -> Service {
        self.hand(hands::factory(hands::Cost { per_step: per_step.into(), max_batch: 4, ..Default::default() })).await
    }
}

/// What workers of this process say that they compute on.
fn cpu() -> Vec<Device> {
    vec![Device { device: "cpu".to_owned(), ..Default::default() }]
}
