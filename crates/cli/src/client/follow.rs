//! A job's events, from submission or from a given number on, until it ends.
//!
//! Coordinators keep no state, so a stream that breaks or is detached is taken up again at any of them: after the last durable event
//! that was heard, nothing is missed. A submission that breaks before it is answered is repeated under its idempotency key.

use std::time::Duration;

use efferent_proto::{
    ApiError,
    v1::{
        ErrorCode, GenerateRequest, GetJobRequest, JobEvent, JobState, WatchJobRequest,
        image_service_client::ImageServiceClient, job_event::Event,
    },
};
use tokio::time::Instant;
use tonic::{Code, Status, Streaming, transport::Channel};

use crate::{
    client::{Server, images},
    exit::{Failure, is_ours},
};

/// How long to try to take up a broken stream before giving up.
const PATIENCE: Duration = Duration::from_secs(60);
const FIRST_DELAY: Duration = Duration::from_millis(100);
const LAST_DELAY: Duration = Duration::from_secs(5);

/// A job being followed.
#[derive(Debug)]
pub(crate) struct Follow {
    server: Server,
    /// What to submit, as long as no job is known.
    request: Option<GenerateRequest>,
    job: String,
    after: u64,
    inline_images: bool,
    stream: Option<Streaming<JobEvent>>,
    client: Option<ImageServiceClient<Channel>>,
    broken_since: Option<Instant>,
    delay: Duration,
    ended: bool,
}

impl Follow {
    /// Submits a request and follows its job. The request must have an idempotency key, as it may be sent again.
    pub(crate) fn submit(server: Server, request: GenerateRequest) -> Self {
        let inline_images = request.inline_images;
        Self { request: Some(request), inline_images, ..Self::watch(server, String::new(), 0) }
    }

    /// Follows a job from the event after a number on.
    pub(crate) fn watch(server: Server, job: String, after: u64) -> Self {
        Self {
            server,
            request: None,
            job,
            after,
            inline_images: false,
            stream: None,
            client: None,
            broken_since: None,
            delay: FIRST_DELAY,
            ended: false,
        }
    }

    /// The job's id; `None` before it is accepted.
    pub(crate) fn job(&self) -> Option<&str> {
        Some(self.job.as_str()).filter(|job| !job.is_empty())
    }

    /// The next event; `None` after the job's end. Streams that break are taken up again meanwhile.
    ///
    /// # Errors
    /// If the request is refused, no server answers at first, or none answers for [`PATIENCE`] later on.
    pub(crate) async fn next(&mut self) -> Result<Option<JobEvent>, Failure> {
        while !self.ended {
            let heard = match &mut self.stream {
                Some(stream) => stream.message().await,
                None => match self.open().await? {
                    Ok(stream) => {
                        self.stream = Some(stream);
                        continue;
                    }
                    Err(status) => Err(status),
                },
            };
            match heard {
                Ok(Some(event)) => {
                    self.broken_since = None;
                    self.delay = FIRST_DELAY;
                    if matches!(event.event, Some(Event::Detached(_))) {
                        self.stream = None;
                        self.client = None;
                        self.server.turn_away();
                        continue;
                    }
                    self.job.clone_from(&event.job_id);
                    self.request = None;
                    self.after = self.after.max(event.number);
                    self.ended = matches!(event.event, Some(Event::Done(_) | Event::Failed(_)));
                    return Ok(Some(event));
                }
                // An end without a last event: there was nothing left to tell, or the other side went away.
                Ok(None) if self.is_over().await => self.ended = true,
                Ok(None) => self.pause(&Status::unavailable("the stream ended early")).await?,
                Err(status) if may_be_taken_up(&status) => self.pause(&status).await?,
                Err(status) => return Err(Failure::status(&status)),
            }
        }
        Ok(None)
    }

    /// The image service of a coordinator that answers.
    ///
    /// # Errors
    /// If none does.
    pub(crate) async fn client(&mut self) -> Result<ImageServiceClient<Channel>, Failure> {
        if let Some(client) = &self.client {
            return Ok(client.clone());
        }
        let client = images(self.server.connect().await?);
        self.client = Some(client.clone());
        Ok(client)
    }

    /// Opens a stream. The outer error is final, the inner one may not be.
    async fn open(&mut self) -> Result<Result<Streaming<JobEvent>, Status>, Failure> {
        let mut client = match self.client().await {
            Ok(client) => client,
            // Never reached at all: whoever typed the address wants to know at once.
            Err(failure) if self.broken_since.is_none() && self.after == 0 => return Err(failure),
            Err(_) => return Ok(Err(Status::unavailable("no server answers"))),
        };
        let opened = match &self.request {
            Some(request) => client.generate(request.clone()).await,
            None => {
                let (job_id, after, inline_images) = (self.job.clone(), self.after, self.inline_images);
                client.watch_job(WatchJobRequest { job_id, after, inline_images }).await
            }
        };
        Ok(opened.map(tonic::Response::into_inner))
    }

    /// Waits before the next attempt, longer each time.
    async fn pause(&mut self, status: &Status) -> Result<(), Failure> {
        let since = *self.broken_since.get_or_insert_with(Instant::now);
        // A server that cannot take a submission is told of at once; one that is stopping or vanished half-way is not its last word.
        let refused = self.request.is_some() && is_ours(status) && ApiError::from(status).code != ErrorCode::Stopping;
        if refused || since.elapsed() >= PATIENCE {
            return Err(Failure::status(status));
        }
        self.stream = None;
        self.client = None;
        self.server.turn_away();
        tokio::time::sleep(self.delay).await;
        self.delay = (self.delay * 2).min(LAST_DELAY);
        Ok(())
    }

    async fn is_over(&mut self) -> bool {
        self.stream = None;
        match self.state().await {
            Ok((state, last_event)) => is_final(state) && last_event <= self.after,
            Err(_) => false,
        }
    }

    /// The job's state and the number of its last event.
    ///
    /// # Errors
    /// If it cannot be asked for.
    pub(crate) async fn state(&mut self) -> Result<(JobState, u64), Failure> {
        let request = GetJobRequest { job_id: self.job.clone() };
        let job = self.client().await?.get_job(request).await.map_err(|status| Failure::status(&status))?.into_inner();
        Ok((job.state(), job.last_event))
    }
}

/// Whether a job in this state has ended.
pub(crate) fn is_final(state: JobState) -> bool {
    matches!(state, JobState::Succeeded | JobState::Failed | JobState::Cancelled | JobState::Expired)
}

/// Whether another attempt can succeed: the coordinator said so, or it did not say anything.
fn may_be_taken_up(status: &Status) -> bool {
    if is_ours(status) {
        return matches!(ApiError::from(status).code, ErrorCode::Stopping | ErrorCode::BusUnavailable);
    }
    matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Internal | Code::Cancelled)
}
