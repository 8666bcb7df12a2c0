//! From items to jobs: one coordinator at a time releases the backlog to the queues, as much as keeps the workers busy, and counts what ends.
//!
//! All it does can be done twice without harm: a job is made once and its task stored once, whoever asks; states are swapped, and a swap that
//! fails makes the loser read again. So a dispatcher that was paused and wakes up late changes nothing.

use std::{
    collections::{HashMap, HashSet},
    time::{Duration, Instant},
};

use efferent_bus::ledger::{
    Transition,
    batches::{batch_id, is_over},
    decode, transition,
};
use efferent_proto::{
    ApiError,
    internal::{JobEnded, JobRecord},
    names, time,
    v1::{Batch, BatchState, ErrorCode, Job, JobState, Lane, Model},
    work,
};
use efferent_service::{Shutdown, trace};
use futures::{StreamExt as _, stream};

use super::{
    AT_ONCE, Batches,
    active::{Active, Head, settle, write},
    lease::{Lease, RENEWAL},
    turns::Turns,
};
use crate::{follow, images::unavailable};

const LEASE: &str = "dispatcher";
/// How often there is a round even if nothing is heard.
const TICK: Duration = Duration::from_millis(100);
/// How often counts and states are written while they change.
const WRITE: Duration = Duration::from_millis(250);
/// How often batches are looked for, in case the word of one was lost.
const SEARCH: Duration = Duration::from_secs(2);
/// Most ends that are heard before the next round.
const GATHERED: usize = 256;

type Result<T, E = efferent_bus::Error> = std::result::Result<T, E>;

/// Dispatches batches whenever this process holds the lease, until `shutdown`.
pub async fn dispatch(batches: Batches, shutdown: Shutdown) {
    let bus = batches.ledger.bus().clone();
    while !shutdown.is_triggered() {
        match Lease::take(&bus, LEASE).await {
            Ok(Some(mut lease)) => {
                tracing::info!("dispatching batches");
                if let Err(error) = lead(&batches, &mut lease, &shutdown).await {
                    tracing::warn!(%error, "dispatching stopped");
                }
                lease.release().await;
            }
            Ok(None) => {}
            Err(error) => tracing::debug!(%error, "cannot ask for the dispatcher's lease"),
        }
        tokio::select! {
            () = tokio::time::sleep(RENEWAL) => {}
            () = shutdown.requested() => {}
        }
    }
}

/// Works until the lease is lost or the process stops.
async fn lead(batches: &Batches, lease: &mut Lease, shutdown: &Shutdown) -> Result<()> {
    let bus = batches.ledger.bus().clone();
    let mut ends = bus.subscribe(names::ANY_BATCH_END).await?;
    let mut news = bus.subscribe(names::BATCHES).await?;
    let mut active: HashMap<String, Active> = HashMap::new();
    let mut turns = Turns::default();
    let (mut renewed, mut searched, mut written) = (Instant::now(), None::<Instant>, Instant::now());
    while !shutdown.is_triggered() {
        if renewed.elapsed() >= RENEWAL {
            if !lease.renew().await? {
                return Ok(());
            }
            renewed = Instant::now();
        }
        if searched.is_none_or(|at| at.elapsed() >= SEARCH) {
            search(batches, &mut active).await?;
            searched = Some(Instant::now());
        }
        round(batches, &mut active, &mut turns).await?;
        if written.elapsed() >= WRITE {
            write(batches, &mut active).await?;
            written = Instant::now();
        }
        let tick = tokio::time::sleep(TICK);
        tokio::pin!(tick);
        // What has ended makes room: gather what is there, then go on.
        let mut gathered = 0;
        loop {
            tokio::select! {
                biased;
                () = std::future::ready(()), if gathered >= GATHERED => break,
                end = ends.next() => match end {
                    Some(end) => {
                        if let Ok(ended) = decode::<JobEnded>(&end.payload, "event", &end.subject) {
                            settle(&mut active, &ended.job_id, ended.state());
                        }
                        gathered += 1;
                    }
                    None => return Ok(()),
                },
                () = std::future::ready(()), if gathered > 0 => break,
                word = news.next() => {
                    if word.is_none() {
                        return Ok(());
                    }
                    searched = None;
                    break;
                }
                () = &mut tick => break,
                () = shutdown.requested() => break,
            }
        }
    }
    write(batches, &mut active).await
}

/// Takes on batches that are new, and news of those that are known.
async fn search(batches: &Batches, active: &mut HashMap<String, Active>) -> Result<()> {
    for (record, revision) in batches.ledger.batches().await? {
        let state = record.batch.as_ref().map(Batch::state).unwrap_or_default();
        if is_over(state) || state == BatchState::Submitting {
            continue;
        }
        let id = batch_id(&record).to_owned();
        if active.get(&id).is_none_or(|known| known.revision != revision) {
            // What was not written yet of one that changed is found again: jobs are the truth.
            match Active::load(batches, record, revision).await {
                Ok(one) => drop(active.insert(id, one)),
                Err(error) => put_aside(active, &id, &error),
            }
        }
    }
    Ok(())
}

/// A batch that cannot be read now must not keep the others waiting: it is tried again at a later search.
fn put_aside(active: &mut HashMap<String, Active>, id: &str, error: &efferent_bus::Error) {
    tracing::warn!(batch_id = id, %error, "a batch cannot be read; the others go on");
    active.remove(id);
}

/// Cancels what is to be cancelled, looks at jobs of which nothing is heard, and releases items as far as there is room.
async fn round(batches: &Batches, active: &mut HashMap<String, Active>, turns: &mut Turns) -> Result<()> {
    let mut silent = Vec::new();
    for one in active.values_mut() {
        let cancelling = one.cancelling();
        if cancelling {
            one.call_off();
        }
        one.look_for_hands(&batches.directory);
        for (job_id, open) in &mut one.open {
            if open.is_silent(cancelling) {
                silent.push((job_id.clone(), cancelling));
            }
        }
    }
    let looks = silent.into_iter().map(|(job_id, cancelling)| async move {
        if cancelling {
            // One that has just ended cannot be cancelled, and need not be.
            let _ = batches.images.cancel(&job_id).await;
        }
        let state = look(batches, &job_id).await;
        (job_id, state)
    });
    let looked: Vec<_> = stream::iter(looks).buffer_unordered(AT_ONCE).collect().await;
    for (job_id, state) in looked {
        settle(active, &job_id, state?);
    }
    turns.forget(active);
    // If an item cannot be released now, no other of its batch for that hand is tried in this round.
    let mut stuck: HashMap<String, HashSet<String>> = HashMap::new();
    loop {
        let mut taken = Vec::new();
        while taken.len() < AT_ONCE {
            look_ahead(batches, active).await;
            let next = turns.next(&batches.gate, &batches.directory, active, &stuck);
            let Some((id, hand, cost)) = next else { break };
            let head = active.get_mut(&id).and_then(|one| one.take(&hand, cost));
            taken.extend(head.map(|head| (id, head)));
        }
        if taken.is_empty() {
            return Ok(());
        }
        let released = stream::iter(taken)
            .map(|(id, head)| async move {
                let released = release(batches, &id, &head).await;
                (id, head, released)
            })
            .buffer_unordered(AT_ONCE)
            .collect::<Vec<_>>()
            .await;
        for (id, head, released) in released {
            match released {
                Ok(true) => {}
                Ok(false) => settle(active, &head.job_id, JobState::Failed),
                Err(error) => {
                    tracing::debug!(batch_id = id, index = head.index, %error, "not released yet");
                    // Those who have no hand now are in the same line.
                    stuck.entry(id.clone()).or_default().extend([head.hand.clone(), String::new()]);
                    if let Some(one) = active.get_mut(&id) {
                        one.put_back(head);
                    }
                }
            }
        }
    }
}

/// Has every batch know which of its items come next.
async fn look_ahead(batches: &Batches, active: &mut HashMap<String, Active>) {
    let mut unread = Vec::new();
    for (id, one) in active.iter_mut() {
        if let Err(error) = one.look(batches).await {
            unread.push((id.clone(), error));
        }
    }
    for (id, error) in unread {
        put_aside(active, &id, &error);
    }
}

/// Makes an item a job. False if it can never be done: the job is made, as one that failed.
async fn release(batches: &Batches, batch: &str, head: &Head) -> Result<bool, ApiError> {
    let (id, mut request) = (head.job_id.clone(), head.request.clone());
    request.set_lane(Lane::Batch);
    request.deadline = Some(time::proto_duration(work::MAX_DEADLINE));
    (request.preview_interval, request.inline_images) = (0, false);
    let made = match batches.images.draft(id.clone(), request.clone()).await {
        Ok(record) => JobRecord { batch_id: batch.to_owned(), ..record },
        Err(error) if matches!(error.code, ErrorCode::NoWorker | ErrorCode::BusUnavailable) => return Err(error),
        Err(error) => {
            let now = batches.ledger.now();
            let mut record = transition::accepted(id, request, Model::default(), now, now, 0);
            let end = Transition::End { state: JobState::Failed, error: error.into() };
            transition::apply(&mut record, &end, now);
            batches
                .ledger
                .create_job(&JobRecord { batch_id: batch.to_owned(), ..record })
                .await
                .map_err(unavailable)?;
            return Ok(false);
        }
    };
    let record = if batches.ledger.create_job(&made).await.map_err(unavailable)? {
        made
    } else {
        // The dispatcher before this one made it, and may have died before it published the task.
        let standing = batches.ledger.job(&id).await.map_err(unavailable)?.unwrap_or(made);
        if standing.job.as_ref().is_some_and(|job| job.state() != JobState::Accepted) {
            return Ok(true);
        }
        standing
    };
    match batches.images.publish(&record, &trace::Context::root()).await {
        Ok(()) => Ok(true),
        Err(error) => Err(batches.images.unmake(&record, error).await),
    }
}

/// How a job is now; one that is older than the retention time counts as failed.
async fn look(batches: &Batches, job_id: &str) -> Result<JobState> {
    let Some(record) = batches.ledger.job(job_id).await? else { return Ok(JobState::Failed) };
    let record = follow::expire(&batches.ledger, record).await?;
    Ok(record.job.as_ref().map(Job::state).unwrap_or_default())
}
