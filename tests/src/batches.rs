//! A client's calls about batches.

use efferent_proto::v1::{
    Batch, BatchHeader, BatchItem, BatchItems, GenerateRequest, ItemState, ListBatchResultsRequest, SubmitBatchRequest,
    SubmitBatchResponse, WatchBatchRequest, batch_service_client::BatchServiceClient, submit_batch_request::Part,
};
use tokio_stream::StreamExt as _;
use tonic::{Status, transport::Channel};

use crate::calls::{PATIENCE, request};

/// A client of `BatchService`.
pub type Client = BatchServiceClient<Channel>;

/// So many requests, each with a seed of its own.
pub fn items(count: usize) -> Vec<GenerateRequest> {
    let item = |index: usize| GenerateRequest { seed: Some(index as u64), steps: Some(1), ..request("a cat") };
    (0..count).map(item).collect()
}

/// Submits a batch.
///
/// # Errors
/// As the coordinator refuses it.
pub async fn submit(
    client: &mut Client,
    header: BatchHeader,
    items: &[GenerateRequest],
) -> Result<SubmitBatchResponse, Status> {
    let header = SubmitBatchRequest { part: Some(Part::Header(header)) };
    let chunks: Vec<_> = items
        .chunks(100)
        .map(|items| SubmitBatchRequest { part: Some(Part::Items(BatchItems { items: items.to_vec() })) })
        .collect();
    let parts = std::iter::once(header).chain(chunks);
    client.submit_batch(tokio_stream::iter(parts.collect::<Vec<_>>())).await.map(tonic::Response::into_inner)
}

/// A header with this key.
pub fn key(key: &str) -> BatchHeader {
    BatchHeader { idempotency_key: key.to_owned(), name: "a test".to_owned(), ..BatchHeader::default() }
}

/// The id of a batch that was submitted.
pub fn id(answer: &SubmitBatchResponse) -> String {
    answer.batch.as_ref().expect("a batch").batch_id.clone()
}

/// Waits for the end of a batch.
pub async fn end(client: &mut Client, batch_id: &str) -> Batch {
    let watch = async {
        let request = WatchBatchRequest { batch_id: batch_id.to_owned() };
        let mut states = client.watch_batch(request).await.expect("the batch is known").into_inner();
        let mut last = None;
        while let Some(batch) = states.next().await {
            last = Some(batch.expect("the stream has no error"));
        }
        last.expect("a state")
    };
    tokio::time::timeout(PATIENCE, watch).await.expect("the batch ends in time")
}

/// A batch's items.
pub async fn results(client: &mut Client, batch_id: &str, start: u64, states: &[ItemState]) -> Vec<BatchItem> {
    let states = states.iter().map(|state| *state as i32).collect();
    let request = ListBatchResultsRequest { batch_id: batch_id.to_owned(), start, states };
    let stream = client.list_batch_results(request).await.expect("the batch is known").into_inner();
    stream.map(|item| item.expect("the stream has no error")).collect().await
}
