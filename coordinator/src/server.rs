//! How a coordinator starts and stops.

use std::time::Duration;

use efferent_bus::ledger::Ledger;
use efferent_proto::v1::{
    batch_service_server::{self, BatchServiceServer},
    cluster_service_server::{self, ClusterServiceServer},
    dead_service_server::{self, DeadServiceServer},
    image_service_server::{self, ImageServiceServer},
    object_service_server::{self, ObjectServiceServer},
    signal_service_server::{self, SignalServiceServer},
};
use efferent_service::{Shutdown, admin::Readiness};
use futures::StreamExt as _;
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{
    batches::{self, Batches},
    cluster::Cluster,
    dead::Dead,
    directory::Directory,
    images::Images,
    objects::Objects,
    signals::Signals,
    tenants::{Gate, Tenants},
};

/// How a coordinator works.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// Most event streams open at once. Default 1024.
    pub max_streams: usize,
    /// Deadline of requests that have none. Default 10 minutes.
    #[serde(with = "humantime_serde")]
    pub default_deadline: Duration,
    /// How often queue depths are measured for `/metrics`. Default 5 s.
    #[serde(with = "humantime_serde")]
    pub measure_interval: Duration,
    /// How long a stop waits for calls in progress. Default 10 s.
    #[serde(with = "humantime_serde")]
    pub grace: Duration,
    /// Shares and quotas. Default: everyone the same share, and no quotas.
    pub tenants: Tenants,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            max_streams: 1024,
            default_deadline: Duration::from_secs(600),
            measure_interval: Duration::from_secs(5),
            grace: Duration::from_secs(10),
            tenants: Tenants::default(),
        }
    }
}

/// Why a coordinator ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The bus is unavailable or unfit.
    #[error("cannot join the cluster")]
    Bus(#[from] efferent_bus::Error),
    /// The server failed.
    #[error("the gRPC server failed")]
    Server(#[from] tonic::transport::Error),
    /// Reflection could not be set up.
    #[error("the reflection service cannot be built")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// Serves until `shutdown`; then takes no new work, tells open streams where to re-attach, and returns.
///
/// # Errors
/// If the bus is unavailable at the start, or the server fails.
pub async fn run(
    options: Options,
    ledger: Ledger,
    listener: TcpListener,
    readiness: Readiness,
    shutdown: Shutdown,
) -> Result<(), Error> {
    let directory = Directory::watch(ledger.clone()).await?;
    let grace = options.grace;
    let measure_interval = options.measure_interval;
    let gate = Gate::new(options.tenants.clone());
    let images = Images::new(ledger.clone(), directory.clone(), gate.clone(), options, shutdown.clone());
    let signals = Signals::new(ledger.clone(), directory.clone(), images.clone(), gate.clone(), shutdown.clone());
    let batches = Batches::new(ledger.clone(), directory.clone(), images.clone(), gate);
    let objects = Objects::new(ledger.clone());
    let dead = Dead::new(ledger.clone(), images.clone());
    let cluster = Cluster::new(ledger, directory, images.clone());
    let (health, health_service) = tonic_health::server::health_reporter();
    tell(&health, ServingStatus::Serving).await;
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(efferent_proto::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let address = listener.local_addr().map(|address| address.to_string()).unwrap_or_default();
    // Without it, small answers wait for the other side's delayed acknowledgement.
    let incoming = TcpListenerStream::new(listener).map(|stream| {
        stream.inspect(|stream| {
            let _ = stream.set_nodelay(true);
        })
    });
    let server = tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .initial_stream_window_size(4 * 1024 * 1024)
        .initial_connection_window_size(16 * 1024 * 1024)
        .add_service(health_service)
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?)
        .add_service(ImageServiceServer::new(images))
        .add_service(BatchServiceServer::new(batches.clone()))
        .add_service(ObjectServiceServer::new(objects))
        .add_service(DeadServiceServer::new(dead))
        .add_service(SignalServiceServer::new(signals))
        .add_service(ClusterServiceServer::new(cluster.clone()))
        .serve_with_incoming_shutdown(incoming, shutdown.requested());
    readiness.set(true);
    tracing::info!(address, "coordinator is ready");
    let dispatching = tokio::spawn(batches::dispatch(batches, shutdown.clone()));
    let measuring = tokio::spawn(measure(cluster, measure_interval)).abort_handle();
    let stopping = {
        let (shutdown, readiness) = (shutdown.clone(), readiness.clone());
        async move {
            shutdown.requested().await;
            readiness.set(false);
            tell(&health, ServingStatus::NotServing).await;
            tokio::time::sleep(grace).await;
            tracing::warn!("calls were still open at the end of the grace period");
        }
    };
    let outcome = tokio::select! {
        served = server => served.map_err(Error::from),
        () = stopping => Ok(()),
    };
    readiness.set(false);
    measuring.abort();
    // It lets its lease go, so that another coordinator need not wait for that.
    let _ = tokio::time::timeout(Duration::from_secs(2), dispatching).await;
    outcome
}

/// Tells who asks after the health of any service, or of the whole.
async fn tell(health: &HealthReporter, status: ServingStatus) {
    for service in [
        "",
        image_service_server::SERVICE_NAME,
        batch_service_server::SERVICE_NAME,
        object_service_server::SERVICE_NAME,
        dead_service_server::SERVICE_NAME,
        signal_service_server::SERVICE_NAME,
        cluster_service_server::SERVICE_NAME,
    ] {
        health.set_service_status(service, status).await;
    }
}

async fn measure(cluster: Cluster, interval: Duration) {
    loop {
        match cluster.queues().await {
            Ok(queues) => {
                if let Err(error) = cluster.tell_loads(&queues).await {
                    tracing::debug!(%error, "cannot tell loads");
                }
                for queue in queues {
                    metrics::gauge!("efferent_queue_ready", "queue" => queue.name.clone()).set(queue.ready as f64);
                    metrics::gauge!("efferent_queue_leased", "queue" => queue.name.clone()).set(queue.leased as f64);
                    metrics::gauge!("efferent_queue_oldest_age_seconds", "queue" => queue.name)
                        .set(queue.oldest_age_seconds);
                }
            }
            Err(error) => tracing::debug!(%error, "cannot measure queues"),
        }
        tokio::time::sleep(interval).await;
    }
}
