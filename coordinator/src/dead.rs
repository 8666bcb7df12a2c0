//! `DeadService`: jobs that were given up, to be looked at, tried again, or dropped.

use std::time::Instant;

use efferent_bus::ledger::{Ledger, dead::replay_job_id};
use efferent_proto::{
    ApiError, names,
    v1::{
        DeadLetter, DropDeadRequest, DropDeadResponse, ErrorCode, ListDeadRequest, ListDeadResponse, ReplayDeadRequest,
        ReplayDeadResponse, ShowDeadRequest, dead_service_server::DeadService,
    },
};
use efferent_service::trace;
use tonic::{Request, Response, Status};

use crate::images::{Images, count, unavailable};

/// Most letters of a list.
const MAX_LISTED: u32 = 1000;

/// The service.
#[derive(Debug, Clone)]
pub struct Dead {
    ledger: Ledger,
    images: Images,
}

impl Dead {
    /// A service on these records, which makes jobs as `images` does.
    pub fn new(ledger: Ledger, images: Images) -> Self {
        Self { ledger, images }
    }

    async fn letter(&self, job_id: &str) -> Result<DeadLetter, ApiError> {
        let unknown = || {
            let message = format!("there is no dead letter of job {job_id:?}");
            ApiError::new(ErrorCode::UnknownJob, message).field("job_id")
        };
        if !names::is_job_id(job_id) {
            return Err(unknown());
        }
        self.ledger.letter(job_id).await.map_err(unavailable)?.ok_or_else(unknown)
    }

    async fn list(&self, limit: u32) -> Result<ListDeadResponse, ApiError> {
        let mut letters = self.ledger.letters().await.map_err(unavailable)?;
        let total = letters.len() as u64;
        letters.truncate(if limit == 0 { MAX_LISTED } else { limit.min(MAX_LISTED) } as usize);
        Ok(ListDeadResponse { letters, total })
    }

    async fn replay(&self, job_id: &str) -> Result<ReplayDeadResponse, ApiError> {
        let letter = self.letter(job_id).await?;
        let id = replay_job_id(job_id);
        let made = self.images.make(&id, letter.request.unwrap_or_default(), &trace::Context::root()).await?;
        if letter.replayed_as.is_empty() {
            self.ledger.note_replay(job_id, &id).await.map_err(unavailable)?;
        }
        Ok(ReplayDeadResponse { job_id: id, existing: !made })
    }

    async fn drop(&self, job_id: &str) -> Result<DropDeadResponse, ApiError> {
        if !names::is_job_id(job_id) {
            self.letter(job_id).await?;
        }
        self.ledger.drop_letter(job_id).await.map_err(unavailable)?;
        Ok(DropDeadResponse {})
    }
}

#[tonic::async_trait]
impl DeadService for Dead {
    async fn list(&self, request: Request<ListDeadRequest>) -> Result<Response<ListDeadResponse>, Status> {
        let started = Instant::now();
        count("ListDead", started, self.list(request.into_inner().limit).await).map(Response::new)
    }

    async fn show(&self, request: Request<ShowDeadRequest>) -> Result<Response<DeadLetter>, Status> {
        let started = Instant::now();
        count("ShowDead", started, self.letter(&request.into_inner().job_id).await).map(Response::new)
    }

    async fn replay(&self, request: Request<ReplayDeadRequest>) -> Result<Response<ReplayDeadResponse>, Status> {
        let started = Instant::now();
        count("ReplayDead", started, self.replay(&request.into_inner().job_id).await).map(Response::new)
    }

    async fn drop(&self, request: Request<DropDeadRequest>) -> Result<Response<DropDeadResponse>, Status> {
        let started = Instant::now();
        count("DropDead", started, self.drop(&request.into_inner().job_id).await).map(Response::new)
    }
}
