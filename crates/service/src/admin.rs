//! The port that operators and Prometheus ask: `/healthz`, `/readyz`, `/metrics`.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use axum::{Router, extract::State, http::StatusCode, routing::get};
use efferent_bus::SharedBus;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::net::TcpListener;

use crate::Shutdown;

/// Whether a process takes work now: set by the process, read by `/readyz`.
#[derive(Debug, Clone, Default)]
pub struct Readiness {
    ready: Arc<AtomicBool>,
    parts: Arc<[Readiness]>,
}

impl Readiness {
    /// Work is taken when all of these take it: several services in one process.
    pub fn all(parts: impl Into<Arc<[Readiness]>>) -> Self {
        let this = Self { parts: parts.into(), ..Self::default() };
        this.set(true);
        this
    }

    /// Says whether work is taken.
    pub fn set(&self, ready: bool) {
        self.ready.store(ready, Ordering::Release);
    }

    /// Whether work is taken.
    pub fn get(&self) -> bool {
        self.ready.load(Ordering::Acquire) && self.parts.iter().all(Self::get)
    }
}

#[derive(Clone)]
struct Context {
    readiness: Readiness,
    bus: SharedBus,
    metrics: PrometheusHandle,
}

/// Serves until `shutdown`.
///
/// # Errors
/// If the listener fails.
pub async fn serve(
    listener: TcpListener,
    readiness: Readiness,
    bus: SharedBus,
    metrics: PrometheusHandle,
    shutdown: Shutdown,
) -> std::io::Result<()> {
    let upkeep = metrics.clone();
    let context = Context { readiness, bus, metrics };
    let router = Router::new()
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .route("/metrics", get(async |State(context): State<Context>| context.metrics.render()))
        .with_state(context);
    let maintain = async {
        loop {
            tokio::time::sleep(Duration::from_secs(5)).await;
            upkeep.run_upkeep();
        }
    };
    tokio::select! {
        result = axum::serve(listener, router).with_graceful_shutdown(shutdown.requested()) => result,
        () = maintain => Ok(()),
    }
}

async fn ready(State(context): State<Context>) -> (StatusCode, String) {
    if !context.readiness.get() {
        return (StatusCode::SERVICE_UNAVAILABLE, "not ready: starting or stopping\n".to_owned());
    }
    match tokio::time::timeout(Duration::from_secs(2), context.bus.ping()).await {
        Ok(Ok(())) => (StatusCode::OK, "ready\n".to_owned()),
        Ok(Err(error)) => (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {error}\n")),
        Err(_) => (StatusCode::SERVICE_UNAVAILABLE, "not ready: the queue does not answer\n".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_ready_when_its_parts_are() {
        let parts = [Readiness::default(), Readiness::default()];
        let all = Readiness::all(parts.clone());
        for (first, second) in [(false, false), (true, false), (false, true), (true, true)] {
            parts[0].set(first);
            parts[1].set(second);
            assert_eq!(all.get(), first && second);
        }
    }
}
