//! A batch while it is worked on: its items' states, what is released of it, and what comes next.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    time::{Duration, Instant, SystemTime},
};

use efferent_bus::ledger::{
    batches::{CHUNK_ITEMS, batch_id, is_over, item_job_id, tries},
    is_final,
};
use efferent_proto::{
    internal::{BatchRecord, ChunkRecord},
    time,
    v1::{Batch, BatchState, GenerateRequest, ItemState, JobState},
};
use futures::{StreamExt as _, stream};

use super::{AT_ONCE, Batches};
use crate::directory::Directory;

type Result<T, E = efferent_bus::Error> = std::result::Result<T, E>;

/// How long nothing may be heard of a job before its record is read: at first, and at most, twice as long each time. The word of an end is seldom lost, and
/// thousands that take long must not be read all the time.
const PATIENCE: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(16));

/// Items that are looked at ahead: so many in a row may wait for a hand without keeping those behind them from theirs.
const WINDOW: usize = CHUNK_ITEMS;

/// A batch that is worked on.
pub(super) struct Active {
    pub(super) batch: Batch,
    /// The rest of its record.
    record: BatchRecord,
    pub(super) revision: u64,
    chunks: Vec<Chunk>,
    /// Items below this one do not wait, or are looked at.
    next: u64,
    /// The first items that wait, by the hand that will draw them (empty if there is none), in order.
    ahead: BTreeMap<String, VecDeque<Head>>,
    /// Released and not ended, by job.
    pub(super) open: HashMap<String, Open>,
    changed: bool,
}

/// An item that waits.
#[derive(Debug, Clone)]
pub(super) struct Head {
    pub(super) index: u64,
    pub(super) job_id: String,
    pub(super) request: GenerateRequest,
    /// The hand that will draw it; empty if there is none.
    pub(super) hand: String,
}

/// A released item.
#[derive(Debug)]
pub(super) struct Open {
    pub(super) index: u64,
    pub(super) hand: String,
    /// Seconds of a hand that it takes, as far as is known.
    pub(super) cost: f64,
    /// When something was last heard of it, and how long nothing may be.
    heard: Instant,
    patience: Duration,
}

impl Open {
    fn new(index: u64, hand: String, cost: f64) -> Self {
        Self { index, hand, cost, heard: Instant::now(), patience: PATIENCE.0 }
    }

    /// Whether its job is to be looked at; then it will be, and not soon again. One that is being cancelled is not left alone for long.
    pub(super) fn is_silent(&mut self, cancelling: bool) -> bool {
        let (least, most) = PATIENCE;
        let silent = self.heard.elapsed() >= if cancelling { self.patience.min(least) } else { self.patience };
        if silent {
            (self.heard, self.patience) = (Instant::now(), (self.patience * 2).clamp(least, most));
        }
        silent
    }
}

struct Chunk {
    record: ChunkRecord,
    revision: u64,
    /// Only while its items are being released.
    items: Option<Vec<GenerateRequest>>,
    changed: bool,
}

impl Active {
    pub(super) async fn load(batches: &Batches, record: BatchRecord, revision: u64) -> Result<Self> {
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
            ahead: BTreeMap::new(),
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
        for index in 0..active.batch.item_count {
            if active.state(index) == ItemState::Running {
                let job_id = active.job_id(index);
                // Its hand is not known; that it counts for none lets a few more be released, once.
                // Whether they have ended is looked up at once.
                let open = Open { patience: Duration::ZERO, ..Open::new(index, String::new(), 0.0) };
                active.open.insert(job_id, open);
            }
        }
        Ok(active)
    }

    pub(super) fn tenant(&self) -> &str {
        &self.batch.tenant
    }

    pub(super) fn cancelling(&self) -> bool {
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

    /// The job of an item's present try.
    fn job_id(&self, index: u64) -> String {
        let (chunk, at) = place(index);
        let tries = self.chunks.get(chunk).map_or(0, |chunk| tries(&chunk.record, at));
        item_job_id(&self.batch.batch_id, index, tries)
    }

    /// The first item that waits and was not looked at.
    fn waiting(&mut self) -> Option<u64> {
        while self.next < self.batch.item_count && self.state(self.next) != ItemState::Waiting {
            self.next += 1;
        }
        (self.next < self.batch.item_count).then_some(self.next)
    }

    /// Calls off every item that waits.
    pub(super) fn call_off(&mut self) {
        for head in std::mem::take(&mut self.ahead).into_values().flatten() {
            self.set(head.index, ItemState::Cancelled);
        }
        while let Some(index) = self.waiting() {
            self.set(index, ItemState::Cancelled);
        }
    }

    /// Looks at the items that come next.
    pub(super) async fn look(&mut self, batches: &Batches) -> Result<()> {
        let mut looked: usize = self.ahead.values().map(VecDeque::len).sum();
        while looked < WINDOW && !self.cancelling() {
            let Some(index) = self.waiting() else { break };
            let mut request = match self.request(batches, index).await {
                Ok(request) => request,
                // Those before it come first.
                Err(_) if looked > 0 => break,
                Err(error) => return Err(error),
            };
            request.tenant = self.batch.tenant.clone();
            let hand = batches.directory.work(&request).map(|(hand, _)| hand).unwrap_or_default();
            self.wait(Head { index, job_id: self.job_id(index), request, hand });
            self.next = index + 1;
            looked += 1;
        }
        Ok(())
    }

    /// Looks again for the hands of items that had none.
    pub(super) fn look_for_hands(&mut self, directory: &Directory) {
        for mut head in self.ahead.remove("").unwrap_or_default() {
            head.hand = directory.work(&head.request).map(|(hand, _)| hand).unwrap_or_default();
            self.wait(head);
        }
    }

    fn wait(&mut self, head: Head) {
        let line = self.ahead.entry(head.hand.clone()).or_default();
        line.insert(line.partition_point(|other| other.index < head.index), head);
    }

    /// The items that come next, one for each hand.
    pub(super) fn heads(&self) -> impl Iterator<Item = &Head> {
        self.ahead.values().filter_map(VecDeque::front)
    }

    /// Takes the item that comes next for a hand, as running.
    pub(super) fn take(&mut self, hand: &str, cost: f64) -> Option<Head> {
        let line = self.ahead.get_mut(hand)?;
        let head = line.pop_front()?;
        if line.is_empty() {
            self.ahead.remove(hand);
        }
        self.set(head.index, ItemState::Running);
        self.open.insert(head.job_id.clone(), Open::new(head.index, head.hand.clone(), cost));
        Some(head)
    }

    /// Puts an item back that could not be released. Its hand is looked for again.
    pub(super) fn put_back(&mut self, head: Head) {
        self.open.remove(&head.job_id);
        self.set(head.index, ItemState::Waiting);
        self.wait(Head { hand: String::new(), ..head });
    }

    /// Takes down how a job has ended.
    fn settle(&mut self, job_id: &str, state: ItemState) {
        if let Some(open) = self.open.remove(job_id) {
            self.set(open.index, state);
        }
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
    fn count(&mut self, now: SystemTime) {
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
            batch.finished_at = Some(time::timestamp(now));
        }
    }
}

fn place(index: u64) -> (usize, usize) {
    ((index / CHUNK_ITEMS as u64) as usize, (index % CHUNK_ITEMS as u64) as usize)
}

/// Takes down how a job has ended, if it has.
pub(super) fn settle(active: &mut HashMap<String, Active>, job_id: &str, state: JobState) {
    let state = match state {
        JobState::Succeeded => ItemState::Succeeded,
        JobState::Cancelled => ItemState::Cancelled,
        state if is_final(state) => ItemState::Failed,
        _ => return,
    };
    if let Some(one) = active.values_mut().find(|one| one.open.contains_key(job_id)) {
        one.settle(job_id, state);
    }
}

/// Writes what has changed: chunks first, so that a batch never counts what its chunks do not say. What another has changed is dropped, and
/// read again at the next search.
pub(super) async fn write(batches: &Batches, active: &mut HashMap<String, Active>) -> Result<()> {
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
            one.count(batches.ledger.now());
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
