//! A client's calls.

use std::time::Duration;

use efferent_proto::{
    ApiError,
    v1::{
        ErrorCode, GenerateRequest, GetJobRequest, Job, JobEvent, WatchJobRequest,
        image_service_client::ImageServiceClient, job_event::Event,
    },
};
use tokio_stream::StreamExt as _;
use tonic::{Status, Streaming, transport::Channel};

/// How long anything may take before a test fails: far more than it takes.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A client of `ImageService`.
pub type Client = ImageServiceClient<Channel>;

/// A request for a picture of `prompt`.
pub fn request(prompt: &str) -> GenerateRequest {
    GenerateRequest { prompt: prompt.to_owned(), seed: Some(1), ..Default::default() }
}

/// What an event is, in a word.
pub fn kind(event: &JobEvent) -> &'static str {
    match &event.event {
        Some(Event::Accepted(_)) => "accepted",
        Some(Event::Queued(_)) => "queued",
        Some(Event::Conditioning(_)) => "conditioning",
        Some(Event::Rendering(_)) => "rendering",
        Some(Event::Step(_)) => "step",
        Some(Event::Preview(_)) => "preview",
        Some(Event::Image(_)) => "image",
        Some(Event::Encoded(_)) => "encoded",
        Some(Event::Done(_)) => "done",
        Some(Event::Failed(_)) => "failed",
        Some(Event::Detached(_)) => "detached",
        None => "nothing",
    }
}

/// Events until the stream ends.
pub async fn all(mut events: Streaming<JobEvent>) -> Vec<JobEvent> {
    let read = async {
        let mut all = Vec::new();
        while let Some(event) = events.next().await {
            all.push(event.expect("a stream ends without error"));
        }
        all
    };
    tokio::time::timeout(PATIENCE, read).await.expect("the stream ends in time")
}

/// Events up to and with the first of this kind.
pub async fn until(events: &mut Streaming<JobEvent>, wanted: &str) -> Vec<JobEvent> {
    let read = async {
        let mut seen = Vec::new();
        loop {
            let event = events.next().await.expect("the stream goes on").expect("the stream has no error");
            let found = kind(&event) == wanted;
            seen.push(event);
            if found {
                return seen;
            }
        }
    };
    tokio::time::timeout(PATIENCE, read).await.unwrap_or_else(|_| panic!("no event {wanted} in time"))
}

/// Sends a request and waits for its end.
pub async fn generate(client: &mut Client, request: GenerateRequest) -> Vec<JobEvent> {
    all(client.generate(request).await.expect("the request is accepted").into_inner()).await
}

/// Sends a request that is refused: why.
pub async fn refused(client: &mut Client, request: GenerateRequest) -> ApiError {
    ApiError::from(&client.generate(request).await.expect_err("the request is refused"))
}

/// The code of a refusal.
pub fn code<T: std::fmt::Debug>(outcome: Result<T, Status>) -> ErrorCode {
    ApiError::from(&outcome.expect_err("the call is refused")).code
}

/// A job as it is.
pub async fn job(client: &mut Client, job_id: &str) -> Job {
    client.get_job(GetJobRequest { job_id: job_id.to_owned() }).await.expect("the job is known").into_inner()
}

/// A job's events from `after` on.
pub async fn watch(client: &mut Client, job_id: &str, after: u64) -> Streaming<JobEvent> {
    let request = WatchJobRequest { job_id: job_id.to_owned(), after, inline_images: false };
    client.watch_job(request).await.expect("the job can be watched").into_inner()
}

/// A job's durable events with numbers; panics if they are not 1, 2, 3 ... from `after`.
pub fn durable(events: &[JobEvent], after: u64) -> Vec<&'static str> {
    let durable: Vec<_> = events.iter().filter(|e| !matches!(kind(e), "step" | "preview" | "detached")).collect();
    for (event, number) in durable.iter().zip(after + 1..) {
        assert_eq!(event.number, number, "durable events have no gaps and come once: {events:#?}");
    }
    durable.into_iter().map(kind).collect()
}
