//! `SignalService`: control signals as objects. The values go from brains to hands; what is here are their ids.

use std::time::Instant;

use efferent_bus::ledger::Ledger;
use efferent_proto::{
    ApiError, names,
    v1::{
        DeleteSignalRequest, DeleteSignalResponse, EncodeRequest, ErrorCode, GetSignalRequest, Signal, WorkerRole,
        job_event::Event, signal_service_server::SignalService,
    },
};
use efferent_service::{Shutdown, trace};
use tokio::sync::mpsc;
use tonic::{Request, Response, Status};

use crate::{
    directory::Directory,
    follow::{self, Wish},
    images::{Images, count, trace_of, unavailable},
    pictures,
    tenants::{self, Gate},
    validate,
};

/// Events of the job that wait to be looked at.
const BACKLOG: usize = 8;

/// The service.
#[derive(Debug, Clone)]
pub struct Signals {
    ledger: Ledger,
    directory: Directory,
    images: Images,
    gate: Gate,
    shutdown: Shutdown,
}

/// What is known of a signal that is kept.
///
/// # Errors
/// If there is none of this id, or the bus is unavailable.
pub(crate) async fn find(ledger: &Ledger, signal_id: &str) -> Result<Signal, ApiError> {
    let unknown = || {
        let message = format!("no control signal {signal_id:?} is kept; the time it was kept for may be over");
        ApiError::new(ErrorCode::UnknownSignal, message).field("signal_id")
    };
    if !names::is_signal_id(signal_id) {
        return Err(unknown());
    }
    ledger.signal(signal_id).await.map_err(unavailable)?.ok_or_else(unknown)
}

impl Signals {
    /// A service on these records, which makes jobs as `images` does.
    pub fn new(ledger: Ledger, directory: Directory, images: Images, gate: Gate, shutdown: Shutdown) -> Self {
        Self { ledger, directory, images, gate, shutdown }
    }

    /// A job of its own, in the brain's queue like any other: it is as durable, and as patient with a brain that dies.
    async fn encode(&self, request: EncodeRequest, trace: &trace::Context) -> Result<Signal, ApiError> {
        let _permit = self.images.stream_permit()?;
        let (mut request, keep) = validate::encoding(request, self.ledger.options().retention)?;
        let tenant = tenants::named(&request.tenant)?;
        self.gate.request(tenant)?;
        let _place = self.gate.stream(tenant)?;
        let model = self.directory.choose(&request.model, &[WorkerRole::Brain])?;
        pictures::fit(&self.ledger, &mut request, &model).await?;
        let mut request = validate::resolve(request, &model, self.images.default_deadline())?;
        pictures::keep(&self.ledger, &mut request).await?;
        let job = names::new_job_id();
        let mut record = self.images.drafted(job.clone(), request, model);
        record.keep_signal_ms = u64::try_from(keep.as_millis()).unwrap_or(u64::MAX);
        let tail = self.images.begin(record, trace).await?;
        let (sender, mut events) = mpsc::channel(BACKLOG);
        let wish = Wish { after: 0, inline_images: false };
        let following = follow::follow(self.ledger.clone(), job.clone(), tail, wish, sender, self.shutdown.clone());
        let following = tokio::spawn(following);
        let outcome = loop {
            match events
                .recv()
                .await
                .transpose()
                .map_err(|status| ApiError::from(&status))?
                .and_then(|event| event.event)
            {
                Some(Event::Encoded(encoded)) => break find(&self.ledger, &encoded.signal_id).await,
                Some(Event::Failed(failed)) => break Err(ApiError::from(&failed.error.unwrap_or_default())),
                Some(Event::Detached(_)) => {
                    break Err(ApiError::new(ErrorCode::Stopping, "this coordinator is stopping; ask another one"));
                }
                Some(_) => {}
                None => {
                    let message = format!("the events of job {job} ended without telling how it ended");
                    break Err(ApiError::new(ErrorCode::Internal, message));
                }
            }
        };
        following.abort();
        outcome
    }

    async fn delete(&self, signal_id: &str) -> Result<DeleteSignalResponse, ApiError> {
        if names::is_signal_id(signal_id) {
            self.ledger.forget_signal(signal_id).await.map_err(unavailable)?;
        }
        Ok(DeleteSignalResponse {})
    }
}

#[tonic::async_trait]
impl SignalService for Signals {
    async fn encode(&self, request: Request<EncodeRequest>) -> Result<Response<Signal>, Status> {
        let (started, began) = (Instant::now(), self.ledger.now());
        let trace = trace_of(&request);
        let outcome = self.encode(request.into_inner(), &trace).await;
        trace.tell("Encode", began, self.ledger.now(), &[]);
        count("Encode", started, outcome).map(Response::new)
    }

    async fn get_signal(&self, request: Request<GetSignalRequest>) -> Result<Response<Signal>, Status> {
        let started = Instant::now();
        count("GetSignal", started, find(&self.ledger, &request.into_inner().signal_id).await).map(Response::new)
    }

    async fn delete_signal(
        &self,
        request: Request<DeleteSignalRequest>,
    ) -> Result<Response<DeleteSignalResponse>, Status> {
        let started = Instant::now();
        count("DeleteSignal", started, self.delete(&request.into_inner().signal_id).await).map(Response::new)
    }
}
