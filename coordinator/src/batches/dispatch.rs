//! From items to jobs: one coordinator at a time releases the backlog to the queues, as much as keeps the workers busy, and counts what ends.
//!
//! All it does can be done twice without harm: a job is made once and its task stored once, whoever asks; states are swapped, and a swap that
//! fails makes the loser read again. So a dispatcher that was paused and wakes up late changes nothing.

use std::{
    collections::HashMap,
    time::{Duration, Instant, SystemTime},
};

use efferent_bus::ledger::{
    Transition,
    batches::{CHUNK_ITEMS, batch_id, is_over, item_job_id},
    decode, is_final, transition,
};
use efferent_proto::{
    ApiError,
    internal::{BatchRecord, ChunkRecord, JobEnded, JobRecord},
    names, time,
    v1::{Batch, BatchState, ErrorCode, GenerateRequest, ItemState, Job, JobState, Lane, Model},
};
use efferent_service::{Shutdown, trace};
use futures::{StreamExt as _, stream};

use super::{
    Batches,
    lease::{Lease, RENEWAL},
};
use crate::{follow, images::unavailable};

const LEASE: &str = "dispatcher";
/// How often there is a round even if nothing is heard.
const TICK: Duration = Duration::from_millis(100);
/// How often counts and states are written while they change.
const WRITE: Duration = Duration::from_millis(250);
/// How often batches are looked for, in case the word of one was lost.
const SEARCH: Duration = Duration::from_secs(2);
/// How long nothing may be heard of a job before its record is read.
const PATIENCE: Duration = Duration::from_secs(2);
/// Most ends that are heard before the next round.
const GATHERED: usize = 256;
/// Jobs made, read or cancelled at once.
const AT_ONCE: usize = 16;
/// Fewest items that are released ahead, of all batches together, and how many for each place of a live hand.
const AHEAD: (usize, usize) = (32, 2);

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
        round(batches, &mut active).await?;
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

/// A batch that is worked on.
struct Active {
    batch: Batch,
    /// The rest of its record.
    record: BatchRecord,
    revision: u64,
    chunks: Vec<Chunk>,
    /// Items below this one do not wait.
    next: u64,
    /// Released and not ended, and when something was last heard of them.
    open: HashMap<String, (u64, Instant)>,
    changed: bool,
}

struct Chunk {
    record: ChunkRecord,
    revision: u64,
    /// Only while its items are being released.
    items: Option<Vec<GenerateRequest>>,
    changed: bool,
}

impl Active {
    async fn load(batches: &Batches, record: BatchRecord, revision: u64) -> Result<Self> {
        let id = batch_id(&record).to_owned();
        let reads = (0..record.chunk_count).map(|number| {
            let (ledger, id) = (&batches.ledger, id.as_str());
            async move { ledger.chunk(id, number).await }
        });
        let mut read = stream::iter(reads).buffered(AT_ONCE);
        let mut active = Self {
            batch: record.batch.clone().unwrap_or_default(),
            record,
            revision,
            chunks: Vec::new(),
            next: 0,
            open: HashMap::new(),
            changed: true,
        };
        while let Some(chunk) = read.next().await {
            let (record, revision) = chunk?.ok_or_else(|| efferent_bus::Error::Unavailable {
                what: format!("a chunk of batch {id} is no longer kept"),
                source: None,
            })?;
            active.chunks.push(Chunk { record, revision, items: None, changed: false });
        }
        // Long ago: whether they have ended is looked up at once.
        let long_ago = Instant::now().checked_sub(PATIENCE).unwrap_or_else(Instant::now);
        for index in 0..active.batch.item_count {
            if active.state(index) == ItemState::Running {
                active.open.insert(item_job_id(&id, index), (index, long_ago));
            }
        }
        Ok(active)
    }

    fn cancelling(&self) -> bool {
        self.batch.state() == BatchState::Cancelling
    }

    fn state(&self, index: u64) -> ItemState {
        let (chunk, at) = place(index);
        self.chunks.get(chunk).map_or(ItemState::Unspecified, |chunk| super::state(&chunk.record, at))
    }

    fn set(&mut self, index: u64, state: ItemState) {
        let (chunk, at) = place(index);
        let Some(chunk) = self.chunks.get_mut(chunk) else { return };
        let mut states = chunk.record.states.to_vec();
        if let Some(old) = states.get_mut(at) {
            *old = state as u8;
        }
        chunk.record.states = states.into();
        chunk.changed = true;
        self.changed = true;
    }

    /// The first item that waits.
    fn waiting(&mut self) -> Option<u64> {
        while self.next < self.batch.item_count && self.state(self.next) != ItemState::Waiting {
            self.next += 1;
        }
        (self.next < self.batch.item_count).then_some(self.next)
    }

    /// Up to `most` items that waited, as running.
    async fn take(&mut self, batches: &Batches, most: usize) -> Result<Vec<(u64, GenerateRequest)>> {
        let mut taken = Vec::new();
        while taken.len() < most
            && let Some(index) = self.waiting()
        {
            let request = self.request(batches, index).await?;
            self.set(index, ItemState::Running);
            taken.push((index, request));
        }
        Ok(taken)
    }

    async fn request(&mut self, batches: &Batches, index: u64) -> Result<GenerateRequest> {
        let (chunk, at) = place(index);
        if let Some(before) = chunk.checked_sub(1).and_then(|before| self.chunks.get_mut(before)) {
            before.items = None;
        }
        let chunk = &mut self.chunks[chunk];
        if chunk.items.is_none() {
            chunk.items = Some(batches.ledger.chunk_items(&chunk.record).await?);
        }
        Ok(chunk.items.as_ref().and_then(|items| items.get(at)).cloned().unwrap_or_default())
    }

    /// Counts states anew into the record.
    fn count(&mut self) {
        let mut counts = [0; 6];
        for state in self.chunks.iter().flat_map(|chunk| chunk.record.states.iter()) {
            counts[usize::from(*state).min(5)] += 1;
        }
        let over = counts[ItemState::Waiting as usize] == 0 && self.open.is_empty();
        let cancelling = self.cancelling();
        let batch = &mut self.batch;
        batch.running = counts[ItemState::Running as usize];
        batch.succeeded = counts[ItemState::Succeeded as usize];
        batch.failed = counts[ItemState::Failed as usize];
        batch.cancelled = counts[ItemState::Cancelled as usize];
        if over {
            batch.set_state(if cancelling { BatchState::Cancelled } else { BatchState::Ended });
            batch.finished_at = Some(time::timestamp(SystemTime::now()));
        }
    }
}

fn place(index: u64) -> (usize, usize) {
    ((index / CHUNK_ITEMS as u64) as usize, (index % CHUNK_ITEMS as u64) as usize)
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
async fn round(batches: &Batches, active: &mut HashMap<String, Active>) -> Result<()> {
    let ids: Vec<String> = active.keys().cloned().collect();
    let mut silent = Vec::new();
    for one in active.values_mut() {
        let cancelling = one.cancelling();
        if cancelling {
            while let Some(index) = one.waiting() {
                one.set(index, ItemState::Cancelled);
            }
        }
        for (job_id, (_, heard)) in &mut one.open {
            if heard.elapsed() >= PATIENCE {
                *heard = Instant::now();
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
    // Batches take turns, so that none waits for another's end.
    let mut room = AHEAD.0.max(AHEAD.1 * batches.directory.hand_capacity());
    room = room.saturating_sub(active.values().map(|one| one.open.len()).sum());
    let mut waiting = ids;
    while room > 0 && !waiting.is_empty() {
        let mut still = Vec::new();
        for id in waiting {
            let Some(one) = active.get_mut(&id).filter(|one| !one.cancelling()) else { continue };
            if room == 0 {
                break;
            }
            let share = room.min(AT_ONCE);
            let drafts = match one.take(batches, share).await {
                Ok(drafts) => drafts,
                Err(error) => {
                    put_aside(active, &id, &error);
                    continue;
                }
            };
            let took = drafts.len();
            room -= took;
            let released = stream::iter(drafts)
                .map(|(index, request)| {
                    let id = id.as_str();
                    async move { (index, release(batches, id, index, request).await) }
                })
                .buffer_unordered(AT_ONCE)
                .collect::<Vec<_>>()
                .await;
            let mut stuck = false;
            for (index, released) in released {
                match released {
                    Ok(true) => drop(one.open.insert(item_job_id(&id, index), (index, Instant::now()))),
                    Ok(false) => one.set(index, ItemState::Failed),
                    Err(error) => {
                        tracing::debug!(batch_id = id, index, %error, "not released yet");
                        one.set(index, ItemState::Waiting);
                        one.next = one.next.min(index);
                        stuck = true;
                    }
                }
            }
            if took == share && !stuck {
                still.push(id);
            }
        }
        waiting = still;
    }
    Ok(())
}

/// Makes an item a job. False if it can never be done: the job is made, as one that failed.
async fn release(batches: &Batches, batch: &str, index: u64, mut request: GenerateRequest) -> Result<bool, ApiError> {
    let id = item_job_id(batch, index);
    request.set_lane(Lane::Batch);
    request.deadline = Some(time::proto_duration(crate::validate::MAX_DEADLINE));
    (request.preview_interval, request.inline_images) = (0, false);
    let made = match batches.images.draft(id.clone(), request.clone()) {
        Ok(record) => JobRecord { batch_id: batch.to_owned(), ..record },
        Err(error) if matches!(error.code, ErrorCode::NoWorker) => return Err(error),
        Err(error) => {
            let now = SystemTime::now();
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
        Err(error) => Err(batches.images.unmake(&id, error).await),
    }
}

/// How a job is now; one that is older than the retention time counts as failed.
async fn look(batches: &Batches, job_id: &str) -> Result<JobState> {
    let Some(record) = batches.ledger.job(job_id).await? else { return Ok(JobState::Failed) };
    let record = follow::expire(&batches.ledger, record).await?;
    Ok(record.job.as_ref().map(Job::state).unwrap_or_default())
}

/// Takes down how a job has ended, if it has.
fn settle(active: &mut HashMap<String, Active>, job_id: &str, state: JobState) {
    let state = match state {
        JobState::Succeeded => ItemState::Succeeded,
        JobState::Cancelled => ItemState::Cancelled,
        state if is_final(state) => ItemState::Failed,
        _ => return,
    };
    let Some(one) = active.values_mut().find(|one| one.open.contains_key(job_id)) else { return };
    if let Some((index, _)) = one.open.remove(job_id) {
        one.set(index, state);
    }
}

/// Writes what has changed: chunks first, so that a batch never counts what its chunks do not say. What another has changed is dropped, and
/// read again at the next search.
async fn write(batches: &Batches, active: &mut HashMap<String, Active>) -> Result<()> {
    let mut gone = Vec::new();
    for (id, one) in active.iter_mut().filter(|(_, one)| one.changed) {
        let mut ours = true;
        let changed = one.chunks.iter().enumerate().filter(|(_, chunk)| chunk.changed);
        let writes = changed.map(|(number, chunk)| {
            let (record, revision, id) = (chunk.record.clone(), chunk.revision, id.clone());
            async move { (number, batches.ledger.swap_chunk(&id, number as u64, &record, revision).await) }
        });
        let writes: Vec<_> = writes.collect();
        let written: Vec<_> = stream::iter(writes).buffer_unordered(AT_ONCE).collect().await;
        for (number, written) in written {
            let written = written?;
            ours &= written.is_some();
            let chunk = &mut one.chunks[number];
            (chunk.revision, chunk.changed) = (written.unwrap_or(chunk.revision), false);
        }
        if ours {
            one.count();
            one.record.batch = Some(one.batch.clone());
            match batches.ledger.swap_batch(&one.record, one.revision).await? {
                Some(revision) => one.revision = revision,
                None => ours = false,
            }
            one.changed = false;
        }
        if !ours || is_over(one.batch.state()) {
            gone.push(id.clone());
        }
    }
    for id in gone {
        active.remove(&id);
    }
    Ok(())
}
