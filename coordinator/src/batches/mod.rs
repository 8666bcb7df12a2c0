//! `BatchService`: many requests submitted together.
//!
//! Read in this order: [`submit`] (how a batch is stored), [`dispatch`] (how its items become jobs), [`turns`] and [`fair`] (in which order),
//! [`active`] (a batch that is worked on), [`lease`] (which coordinator does that), [`retry`], this file (what clients ask).

mod active;
mod dispatch;
mod fair;
mod lease;
mod retry;
mod submit;
mod turns;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use efferent_bus::ledger::{
    Ledger,
    batches::{CHUNK_ITEMS, Revised, batch_id, is_over, item_job_id, tries},
    encode, transition,
};
use efferent_proto::{
    ApiError,
    internal::{BatchRecord, ChunkRecord},
    names,
    v1::{
        Batch, BatchItem, BatchState, CancelBatchRequest, ErrorCode, GenerateRequest, GetBatchRequest, ItemState,
        ListBatchResultsRequest, ListBatchesRequest, ListBatchesResponse, RetryBatchRequest, RetryBatchResponse,
        SubmitBatchRequest, SubmitBatchResponse, WatchBatchRequest, batch_service_server::BatchService,
    },
};
use futures::{StreamExt as _, TryStreamExt as _, stream::BoxStream};
use tokio::sync::{Mutex, Semaphore};
use tonic::{Request, Response, Status, Streaming};

use crate::{
    directory::Directory,
    images::{Images, count, unavailable},
    tenants::Gate,
};

pub use dispatch::dispatch;

/// How often a watched batch is looked at.
const LOOK: Duration = Duration::from_millis(250);
/// Batches that a list has if nothing is said, and at most.
const USUAL_LIST: usize = 100;
const MAX_LIST: usize = 1000;
/// Items whose jobs are read at once for a list.
const READS: usize = 32;
/// Files of items, of up to 64 MiB, that are read at once.
const FILES: usize = 2;
/// Jobs made, read or cancelled, and chunks read or written, at once.
const AT_ONCE: usize = 16;

/// The service.
#[derive(Debug, Clone)]
pub struct Batches {
    ledger: Ledger,
    directory: Directory,
    images: Images,
    gate: Gate,
    /// Of those who read a file of items.
    files: Arc<Semaphore>,
    /// Of those who set a batch of a tenant with a quota going.
    going: Arc<Mutex<()>>,
}

fn unknown(id: &str) -> ApiError {
    ApiError::new(ErrorCode::UnknownBatch, format!("no batch {id:?} is known")).field("batch_id")
}

impl Batches {
    /// A service on these records, which makes jobs as `images` does.
    pub fn new(ledger: Ledger, directory: Directory, images: Images, gate: Gate) -> Self {
        Self { ledger, directory, images, gate, files: Arc::new(Semaphore::new(FILES)), going: Arc::default() }
    }

    async fn known(&self, id: &str) -> Result<Revised<BatchRecord>, ApiError> {
        if !names::is_job_id(id) {
            return Err(unknown(id));
        }
        self.ledger.batch(id).await.map_err(unavailable)?.ok_or_else(|| unknown(id))
    }

    async fn list(&self, request: &ListBatchesRequest) -> Result<ListBatchesResponse, ApiError> {
        let most = if request.limit == 0 { USUAL_LIST } else { request.limit as usize };
        if most > MAX_LIST {
            let message = format!("limit is {most}; at most {MAX_LIST} batches are listed");
            return Err(ApiError::new(ErrorCode::LimitExceeded, message)
                .field("limit")
                .limit(format!("1..={MAX_LIST}")));
        }
        let kept = self.ledger.batches().await.map_err(unavailable)?;
        let wanted = |batch: &Batch| request.tenant.is_empty() || batch.tenant == request.tenant;
        let mut batches: Vec<_> = kept.into_iter().filter_map(|(record, _)| record.batch).filter(wanted).collect();
        // Ids sort by time.
        batches.sort_by(|a, b| b.batch_id.cmp(&a.batch_id));
        batches.truncate(most);
        Ok(ListBatchesResponse { batches })
    }

    /// Has the dispatcher look at once.
    async fn wake(&self) {
        let _ = self.ledger.bus().emit(names::BATCHES, encode(&())).await;
    }

    async fn cancel(&self, id: &str) -> Result<Batch, ApiError> {
        self.known(id).await?;
        let mut over = None;
        let changed = self.ledger.change_batch(id, |batch| {
            let state = batch.state();
            over = (state == BatchState::Ended).then_some(state);
            let stops = matches!(state, BatchState::Submitting | BatchState::Running);
            if stops {
                batch.set_state(BatchState::Cancelling);
            }
            stops
        });
        let record = changed.await.map_err(unavailable)?.ok_or_else(|| unknown(id))?;
        if over.is_some() {
            let message = format!("batch {id} has ended already");
            return Err(ApiError::new(ErrorCode::BatchFinished, message).field("batch_id"));
        }
        self.wake().await;
        Ok(record.batch.unwrap_or_default())
    }

    /// The items of a chunk, with what became of them.
    async fn items(
        &self,
        id: &str,
        number: u64,
        start: u64,
        states: &[ItemState],
    ) -> Result<Vec<BatchItem>, efferent_bus::Error> {
        let Some((chunk, _)) = self.ledger.chunk(id, number).await? else { return Ok(Vec::new()) };
        let first = number * CHUNK_ITEMS as u64;
        let wanted =
            |at: usize| first + at as u64 >= start && (states.is_empty() || states.contains(&state(&chunk, at)));
        if !(0..chunk.states.len()).any(wanted) {
            return Ok(Vec::new());
        }
        let requests = self.ledger.chunk_items(&chunk).await?;
        let wanted = requests.into_iter().enumerate().filter(|(at, _)| wanted(*at));
        let wanted = wanted.map(|(at, request)| (at, first + at as u64, request));
        let chunk = &chunk;
        let read = wanted.map(|(at, index, request)| self.item(id, chunk, at, index, request));
        futures::stream::iter(read.collect::<Vec<_>>()).buffered(READS).try_collect().await
    }

    async fn item(
        &self,
        id: &str,
        chunk: &ChunkRecord,
        at: usize,
        index: u64,
        request: GenerateRequest,
    ) -> efferent_bus::Result<BatchItem> {
        let mut item = BatchItem { index, request: Some(request), ..BatchItem::default() };
        item.set_state(state(chunk, at));
        if let Some(refused) = chunk.refused.iter().find(|refused| refused.index == index) {
            item.error = refused.error.clone();
        } else if item.state() != ItemState::Waiting {
            let job_id = item_job_id(id, index, tries(chunk, at));
            if let Some(record) = self.ledger.job(&job_id).await? {
                let job = transition::public_job(&record);
                (item.images, item.error) = (job.images, job.error);
                item.job_id = job_id;
            }
        }
        Ok(item)
    }
}

/// An item's state, by its place in its chunk.
fn state(chunk: &ChunkRecord, at: usize) -> ItemState {
    chunk.states.get(at).and_then(|state| ItemState::try_from(i32::from(*state)).ok()).unwrap_or_default()
}

#[tonic::async_trait]
impl BatchService for Batches {
    type WatchBatchStream = BoxStream<'static, Result<Batch, Status>>;
    type ListBatchResultsStream = BoxStream<'static, Result<BatchItem, Status>>;

    async fn submit_batch(
        &self,
        request: Request<Streaming<SubmitBatchRequest>>,
    ) -> Result<Response<SubmitBatchResponse>, Status> {
        let started = Instant::now();
        let outcome = self.submit(request.into_inner()).await;
        count("SubmitBatch", started, outcome).map(Response::new)
    }

    async fn get_batch(&self, request: Request<GetBatchRequest>) -> Result<Response<Batch>, Status> {
        let started = Instant::now();
        let outcome = self.known(&request.into_inner().batch_id).await;
        count("GetBatch", started, outcome).map(|(record, _)| Response::new(record.batch.unwrap_or_default()))
    }

    async fn list_batches(
        &self,
        request: Request<ListBatchesRequest>,
    ) -> Result<Response<ListBatchesResponse>, Status> {
        let started = Instant::now();
        let outcome = self.list(&request.into_inner()).await;
        count("ListBatches", started, outcome).map(Response::new)
    }

    async fn watch_batch(
        &self,
        request: Request<WatchBatchRequest>,
    ) -> Result<Response<Self::WatchBatchStream>, Status> {
        let started = Instant::now();
        let id = request.into_inner().batch_id;
        let known = async {
            let permit = self.images.stream_permit()?;
            Ok((self.known(&id).await?, permit))
        };
        let ((record, revision), permit) = count("WatchBatch", started, known.await)?;
        let (batches, first) = (self.clone(), record.batch.clone().unwrap_or_default());
        let over = is_over(first.state());
        let changes = futures::stream::try_unfold((revision, over), move |(mut last, over)| {
            let (batches, id) = (batches.clone(), id.clone());
            async move {
                if over {
                    return Ok(None);
                }
                loop {
                    tokio::time::sleep(LOOK).await;
                    batches.images.check_running()?;
                    let (record, revision) = batches.known(&id).await.map_err(Status::from)?;
                    if revision != last {
                        last = revision;
                        let batch = record.batch.unwrap_or_default();
                        let over = is_over(batch.state());
                        return Ok(Some((batch, (last, over))));
                    }
                }
            }
        });
        let told = futures::stream::once(std::future::ready(Ok(first))).chain(changes);
        let held = told.map(move |batch| {
            let _counts = &permit;
            batch
        });
        Ok(Response::new(held.boxed()))
    }

    async fn list_batch_results(
        &self,
        request: Request<ListBatchResultsRequest>,
    ) -> Result<Response<Self::ListBatchResultsStream>, Status> {
        let started = Instant::now();
        let request = request.into_inner();
        let (record, _) = count("ListBatchResults", started, self.known(&request.batch_id).await)?;
        let states: Vec<ItemState> = request.states().collect();
        let (batches, id, start) = (self.clone(), batch_id(&record).to_owned(), request.start);
        let chunks = start / CHUNK_ITEMS as u64..record.chunk_count;
        let items = futures::stream::iter(chunks).then(move |number| {
            let (batches, id, states) = (batches.clone(), id.clone(), states.clone());
            async move {
                let items = batches.items(&id, number, start, &states).await;
                futures::stream::iter(match items {
                    Ok(items) => items.into_iter().map(Ok).collect(),
                    Err(error) => vec![Err(Status::from(unavailable(error)))],
                })
            }
        });
        Ok(Response::new(items.flatten().boxed()))
    }

    async fn cancel_batch(&self, request: Request<CancelBatchRequest>) -> Result<Response<Batch>, Status> {
        let started = Instant::now();
        let outcome = self.cancel(&request.into_inner().batch_id).await;
        count("CancelBatch", started, outcome).map(Response::new)
    }

    async fn retry_batch(&self, request: Request<RetryBatchRequest>) -> Result<Response<RetryBatchResponse>, Status> {
        let started = Instant::now();
        let outcome = self.retry(&request.into_inner().batch_id).await;
        count("RetryBatch", started, outcome).map(Response::new)
    }
}
