//! Another try for the items that failed.

use efferent_bus::ledger::batches::{Retried, batch_id};
use efferent_proto::{
    ApiError,
    v1::{BatchState, ErrorCode, RetryBatchResponse},
};
use futures::{StreamExt as _, TryStreamExt as _, stream};

use super::{AT_ONCE, Batches, unknown};
use crate::images::unavailable;

impl Batches {
    /// Chunks first, then the batch: cut off in between, the call can be made again and finds what waits.
    pub(super) async fn retry(&self, id: &str) -> Result<RetryBatchResponse, ApiError> {
        let (record, _) = self.known(id).await?;
        let refused = |state: BatchState| {
            let message = match state {
                BatchState::Submitting => format!("the items of batch {id} are still coming in"),
                _ => format!("batch {id} was cancelled"),
            };
            ApiError::new(ErrorCode::BatchFinished, message).field("batch_id")
        };
        let allowed = |state: BatchState| matches!(state, BatchState::Running | BatchState::Ended);
        let state = record.batch.as_ref().map(|batch| batch.state()).unwrap_or_default();
        if !allowed(state) {
            return Err(refused(state));
        }
        let chunks =
            stream::iter(0..record.chunk_count).map(|number| self.ledger.retry_chunk(batch_id(&record), number));
        let chunks: Vec<Retried> = chunks.buffer_unordered(AT_ONCE).try_collect().await.map_err(unavailable)?;
        // In a batch that has ended, items wait only if a call before this one was cut off after it wrote them.
        let count = |chunk: &Retried| if state == BatchState::Ended { chunk.waiting } else { chunk.retried };
        let items = chunks.iter().map(count).sum();
        let mut cancelled = None;
        let changed = self.ledger.change_batch(id, |batch| {
            cancelled = Some(batch.state()).filter(|state| !allowed(*state));
            if cancelled.is_some() || items == 0 {
                return false;
            }
            batch.set_state(BatchState::Running);
            batch.retries += 1;
            batch.finished_at = None;
            true
        });
        let record = changed.await.map_err(unavailable)?.ok_or_else(|| unknown(id))?;
        if let Some(state) = cancelled {
            return Err(refused(state));
        }
        self.wake().await;
        Ok(RetryBatchResponse { batch: record.batch, items })
    }
}
