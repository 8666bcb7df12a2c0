//! `ClusterService`: what runs.

use std::time::SystemTime;

use efferent_bus::ledger::Ledger;
use efferent_proto::{
    ApiError, names, time,
    v1::{
        ErrorCode, GetStatusRequest, GetStatusResponse, ListModelsRequest, ListModelsResponse, ListWorkersRequest,
        ListWorkersResponse, Model, Queue, StageLoad, WorkerRole, WorkerState, cluster_service_server::ClusterService,
    },
};
use tonic::{Request, Response, Status};

use crate::{directory::Directory, images::Images, scale};

/// The service.
#[derive(Debug, Clone)]
pub struct Cluster {
    ledger: Ledger,
    directory: Directory,
    images: Images,
    started_at: SystemTime,
}

impl Cluster {
    /// A service that tells of these.
    pub fn new(ledger: Ledger, directory: Directory, images: Images) -> Self {
        Self { ledger, directory, images, started_at: SystemTime::now() }
    }

    /// Every queue of every model.
    ///
    /// # Errors
    /// If the bus is unavailable.
    pub async fn queues(&self) -> efferent_bus::Result<Vec<Queue>> {
        let mut names: Vec<(String, u64)> = Vec::new();
        for model in self.directory.models() {
            self.directory.declare(&model).await?;
            names.extend(queue_names(&model, &self.ledger));
        }
        names.sort();
        names.dedup();
        let mut queues = Vec::with_capacity(names.len());
        for (name, capacity) in names {
            let depth = self.ledger.bus().depth(&name).await?;
            self.directory.set_depth(&name, depth.ready + depth.leased);
            let oldest_age_seconds = depth.oldest_age.unwrap_or_default().as_secs_f64();
            queues.push(Queue { name, ready: depth.ready, leased: depth.leased, capacity, oldest_age_seconds });
        }
        Ok(queues)
    }
    /// What each stage has to do.
    async fn stages(&self, queues: &[Queue]) -> efferent_bus::Result<Vec<StageLoad>> {
        let waiting = scale::waiting_in_batches(&self.ledger).await?;
        let models = self.directory.models();
        let loads = models.iter().flat_map(|model| {
            let loads = scale::loads(&self.directory, model, queues, waiting(&model.name));
            loads.map(|(role, load)| load.told(role, &model.name))
        });
        Ok(loads.collect())
    }

    /// Tells autoscalers what each stage has to do.
    pub(crate) async fn tell_loads(&self, queues: &[Queue]) -> efferent_bus::Result<()> {
        for load in self.stages(queues).await? {
            let stage = if load.role() == WorkerRole::Brain { "brain" } else { "hand" };
            let labels = [("stage", stage.to_owned()), ("model", load.model)];
            metrics::gauge!("efferent_stage_workers", &labels).set(f64::from(load.workers));
            metrics::gauge!("efferent_stage_backlog_seconds", &labels).set(load.backlog_seconds);
            metrics::gauge!("efferent_stage_utilisation", &labels).set(load.utilisation);
            metrics::gauge!("efferent_stage_advised_workers", &labels).set(f64::from(load.advised_workers));
        }
        Ok(())
    }
}

fn queue_names(model: &Model, ledger: &Ledger) -> Vec<(String, u64)> {
    let options = ledger.options();
    let of = |lane| {
        [
            (names::brain_queue(&model.brain, lane), options.brain_queue),
            (names::hand_queue(&model.hand, lane), options.hand_queue),
        ]
    };
    names::LANES.into_iter().flat_map(of).collect()
}

#[tonic::async_trait]
impl ClusterService for Cluster {
    async fn list_models(&self, _: Request<ListModelsRequest>) -> Result<Response<ListModelsResponse>, Status> {
        Ok(Response::new(ListModelsResponse { models: self.directory.models() }))
    }

    async fn list_workers(&self, _: Request<ListWorkersRequest>) -> Result<Response<ListWorkersResponse>, Status> {
        Ok(Response::new(ListWorkersResponse { workers: self.directory.workers() }))
    }

    async fn get_status(&self, _: Request<GetStatusRequest>) -> Result<Response<GetStatusResponse>, Status> {
        let unavailable = |error: efferent_bus::Error| ApiError::new(ErrorCode::BusUnavailable, error.to_string());
        let queues = self.queues().await.map_err(unavailable)?;
        let stages = self.stages(&queues).await.map_err(unavailable)?;
        // Those that load are listed, but they are no workers yet.
        let workers = self.directory.workers().iter().filter(|worker| worker.state() != WorkerState::Starting).count();
        Ok(Response::new(GetStatusResponse {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            bus: self.ledger.bus().kind().to_owned(),
            queues,
            stages,
            workers: workers as u32,
            started_at: Some(time::timestamp(self.started_at)),
            open_streams: self.images.open_streams(),
        }))
    }
}
