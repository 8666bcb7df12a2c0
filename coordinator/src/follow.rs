//! A job's events for one client: first those that are in the record, then those that happen.
//!
//! The bus tells the record each time that it is stored, and all durable events are in it. It may get lost: every now and then the record is read.
//! So a client misses no durable event, whichever coordinator it asks.

use std::{
    collections::HashMap,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use efferent_bus::{
    ledger::{self, Ledger, Transition, has_ended, job_id},
    read_object,
};
use efferent_proto::{
    ApiError,
    internal::{JobEvents, JobRecord},
    names, time,
    v1::{Detached, ErrorCode, JobEvent, JobState, job_event::Event},
};
use efferent_service::Shutdown;
use futures::{StreamExt as _, stream::BoxStream};
use prost::Message as _;
use tokio::sync::mpsc;
use tonic::Status;

/// After which time of silence the record is read: at first, and at most, twice as long each time. Most silence is waiting in a queue, and a
/// thousand who wait must not read a thousand records a second.
const GUARD: Duration = Duration::from_secs(1);
const MOST_GUARD: Duration = Duration::from_secs(8);
/// However near the job's deadline is.
const SHORTEST_GUARD: Duration = Duration::from_millis(20);
/// Images up to this many bytes are put into events.
const MAX_INLINE: u64 = 8 * 1024 * 1024;
/// Most passing events that are kept for the durable one after which they come.
const MAX_EARLY: usize = 64;

/// What a client wants to hear.
#[derive(Debug, Clone, Copy)]
pub struct Wish {
    /// Events above this number.
    pub after: u64,
    /// With the bytes of images.
    pub inline_images: bool,
}

/// A job's events from the first that is not in the record on.
pub struct Tail {
    /// As it was when the events began.
    pub record: JobRecord,
    /// What happens afterwards.
    pub events: BoxStream<'static, efferent_bus::Event>,
}

/// Tells a job's events until it ends, the client goes away, or this process stops. `tail` spares the reading of a job that was just made.
pub async fn follow(
    ledger: Ledger,
    job: String,
    tail: Option<Tail>,
    wish: Wish,
    client: mpsc::Sender<Result<JobEvent, Status>>,
    shutdown: Shutdown,
) {
    let (early, files) = (Vec::new(), HashMap::new());
    let follower =
        Follower { ledger, job, last: wish.after, wish, client, early, files, guard: GUARD, expires_at: None };
    if let Err(Some(error)) = follower.run(tail, shutdown).await {
        tracing::warn!(%error.source, "a client's stream ends early");
        let _ = error.client.send(Err(ApiError::new(ErrorCode::BusUnavailable, error.source.to_string()).into())).await;
    }
}

struct Follower {
    ledger: Ledger,
    job: String,
    last: u64,
    wish: Wish,
    client: mpsc::Sender<Result<JobEvent, Status>>,
    /// Passing events that came before the durable one after which they come.
    early: Vec<JobEvent>,
    /// Files of images that are about to be recorded, by hash.
    files: HashMap<String, Bytes>,
    /// How much silence is borne the next time.
    guard: Duration,
    /// When the job expires, as far as that is known: then somebody must look at it.
    expires_at: Option<SystemTime>,
}

struct Broken {
    source: efferent_bus::Error,
    client: mpsc::Sender<Result<JobEvent, Status>>,
}

impl Follower {
    /// `Err(None)` if the client has gone.
    async fn run(mut self, tail: Option<Tail>, shutdown: Shutdown) -> Result<(), Option<Broken>> {
        let mut look = tail.is_none();
        let mut events = match tail {
            Some(Tail { record, events }) => {
                self.expires_at = expires_at(&record);
                match self.tell_new(record.log).await {
                    Ok(()) => {}
                    Err(Stop::Gone) => return Err(None),
                    Err(Stop::Bus(_)) => look = true,
                }
                events
            }
            // Listen first, then read: what happens in between is in one or the other.
            None => match self.ledger.bus().subscribe(&names::job_events(&self.job)).await {
                Ok(events) => events,
                Err(source) => return Err(Some(Broken { source, client: self.client })),
            },
        };
        let mut failures = 0;
        loop {
            if look {
                match self.catch_up().await {
                    Ok(true) => return Ok(()),
                    Ok(false) => failures = 0,
                    Err(Stop::Gone) => return Err(None),
                    // The bus may come back; the client's patience is longer than a restart.
                    Err(Stop::Bus(source)) if failures >= 30 => {
                        return Err(Some(Broken { source, client: self.client }));
                    }
                    Err(Stop::Bus(_)) => failures += 1,
                }
            }
            let left = self.expires_at.map(|at| at.duration_since(self.ledger.now()).unwrap_or_default());
            let silence = self.guard.min(left.unwrap_or(MOST_GUARD).max(SHORTEST_GUARD));
            look = tokio::select! {
                event = events.next() => match event {
                    Some(event) => {
                        self.guard = GUARD;
                        match self.hear(&event).await {
                            Ok(Heard::Enough) => return Ok(()),
                            Ok(heard) => heard == Heard::Look,
                            Err(Stop::Gone) => return Err(None),
                            // What it was about is in the record, or will be.
                            Err(Stop::Bus(_)) => true,
                        }
                    }
                    None => {
                        tokio::time::sleep(GUARD).await;
                        true
                    }
                },
                () = tokio::time::sleep(silence) => {
                    self.guard = (self.guard * 2).min(MOST_GUARD);
                    true
                }
                () = self.client.closed() => return Err(None),
                () = shutdown.requested() => {
                    let event = Event::Detached(Detached { after: self.last });
                    let event = JobEvent { job_id: self.job, number: self.last, time: Some(time::timestamp(self.ledger.now())), event: Some(event) };
                    let _ = self.client.send(Ok(event)).await;
                    return Ok(());
                }
            };
        }
    }

    /// Reads the record and tells what the client has not. True if that was the end.
    async fn catch_up(&mut self) -> Result<bool, Stop> {
        let Some(record) = self.ledger.job(&self.job).await.map_err(Stop::Bus)? else {
            let gone = ApiError::new(ErrorCode::UnknownJob, format!("job {} is no longer kept", self.job));
            let _ = self.client.send(Err(gone.into())).await;
            return Ok(true);
        };
        let record = expire(&self.ledger, record).await.map_err(Stop::Bus)?;
        self.tell_record(record).await
    }

    /// Tells what the record has and the client has not. True if that was the end.
    async fn tell_record(&mut self, record: JobRecord) -> Result<bool, Stop> {
        self.expires_at = expires_at(&record);
        let ended = has_ended(&record);
        self.tell_new(record.log).await?;
        Ok(ended)
    }

    async fn tell_new(&mut self, log: Vec<JobEvent>) -> Result<(), Stop> {
        for event in log {
            if event.number > self.last {
                self.tell(event).await?;
                self.pass_early();
            }
        }
        Ok(())
    }

    async fn hear(&mut self, event: &efferent_bus::Event) -> Result<Heard, Stop> {
        if names::is_stored_job(&event.subject) {
            return match JobRecord::decode(event.payload.clone()) {
                Ok(record) if record.job.is_some() => match self.tell_record(record).await? {
                    true => Ok(Heard::Enough),
                    false => Ok(Heard::On),
                },
                // It was deleted, or there is something in its place.
                _ => Ok(Heard::Look),
            };
        }
        let passing = JobEvents::decode(event.payload.clone()).unwrap_or_default();
        for event in passing.events {
            match event.event {
                Some(Event::Image(image)) if self.wish.inline_images => {
                    self.files.insert(image.hash, image.data);
                }
                Some(Event::Image(_)) => {}
                _ if event.number > self.last && self.early.len() < MAX_EARLY => self.early.push(event),
                _ => self.pass(event),
            }
        }
        Ok(Heard::On)
    }

    /// Tells what came too early and does no longer.
    fn pass_early(&mut self) {
        for event in self.early.extract_if(.., |event| event.number <= self.last).collect::<Vec<_>>() {
            self.pass(event);
        }
    }

    /// Tells what is worth less than keeping up: a slow client misses some.
    fn pass(&self, event: JobEvent) {
        let _ = self.client.try_send(Ok(event));
    }

    async fn tell(&mut self, mut event: JobEvent) -> Result<(), Stop> {
        if let Some(Event::Image(image)) = &mut event.event {
            if !self.wish.inline_images {
                image.data = Bytes::new();
            } else if let Some(file) = self.files.remove(&image.hash) {
                image.data = file;
            } else if image.length <= MAX_INLINE {
                let bytes = read_object(self.ledger.bus().as_ref(), &image.hash).await.map_err(Stop::Bus)?;
                image.data = bytes.unwrap_or_default();
            }
        }
        self.last = event.number;
        self.client.send(Ok(event)).await.map_err(|_| Stop::Gone)
    }
}

/// What follows from an event.
#[derive(Debug, PartialEq, Eq)]
enum Heard {
    /// Listen on.
    On,
    /// One was missed: read the record.
    Look,
    /// That was the last.
    Enough,
}

enum Stop {
    /// The client has gone.
    Gone,
    /// The bus is unavailable.
    Bus(efferent_bus::Error),
}

/// Ends a job whose deadline has passed. Nobody need be working on it for that: whoever looks at it does it.
///
/// # Errors
/// If the bus is unavailable.
pub async fn expire(ledger: &Ledger, record: JobRecord) -> efferent_bus::Result<JobRecord> {
    if has_ended(&record) || expires_at(&record).is_none_or(|at| ledger.now() < at) {
        return Ok(record);
    }
    let error = ApiError::new(ErrorCode::Expired, "the deadline passed before every image was rendered");
    let end = Transition::End { state: JobState::Expired, error: error.into() };
    let outcome = ledger.apply(job_id(&record), &end).await?;
    purge(ledger, &record).await;
    Ok(outcome.record().cloned().unwrap_or(record))
}

/// When a job expires.
fn expires_at(record: &JobRecord) -> Option<SystemTime> {
    record.job.as_ref()?.expires_at.as_ref().map(time::system_time)
}

/// Drops a job's waiting tasks and tells those who work on it to stop. Returns how many were dropped.
pub async fn purge(ledger: &Ledger, record: &JobRecord) -> u64 {
    let Some(model) = &record.model else { return 0 };
    let lane =
        record.job.as_ref().and_then(|job| job.request.as_ref()).map(|request| request.lane()).unwrap_or_default();
    let mut purged = 0;
    for queue in [names::brain_queue(&model.brain, lane), names::hand_queue(&model.hand, lane)] {
        match ledger.bus().purge(&queue, job_id(record)).await {
            Ok(count) => purged += count,
            // What stays is dropped when it is pulled.
            Err(error) => tracing::warn!(%error, queue, "cannot purge"),
        }
    }
    let _ = ledger.bus().emit(&names::job_cancel(job_id(record)), ledger::encode(&())).await;
    purged
}
