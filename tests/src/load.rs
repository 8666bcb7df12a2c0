//! Clients that do not give up, and what must hold of their jobs when all is over.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use efferent_bus::{
    Bucket,
    ledger::{Ledger, batches::item_job_id, has_ended, job_id, transition},
};
use efferent_proto::{
    ApiError, names,
    v1::{
        Batch, BatchItem, BatchState, GenerateRequest, GetBatchRequest, GetImageRequest, GetJobRequest, Image,
        ItemState, Job, JobState, ListBatchResultsRequest, job_event::Event,
    },
};
use tokio::{task::JoinSet, time::timeout};
use tokio_stream::StreamExt as _;
use tonic::transport::{Channel, Endpoint};

use crate::{
    batches,
    calls::{Client, kind, request},
};

/// How long a coordinator may be silent before another is asked.
const SILENCE: Duration = Duration::from_secs(4);
const PAUSE: Duration = Duration::from_millis(200);

/// Several coordinators, and the habit of asking the next one.
#[derive(Debug, Clone)]
pub struct Front {
    urls: Arc<Vec<String>>,
    next: Arc<AtomicU64>,
    /// Calls that were answered with an error, or not at all.
    pub refusals: Arc<AtomicU64>,
}

impl Front {
    /// These coordinators.
    pub fn new(urls: Vec<String>) -> Self {
        Self { urls: Arc::new(urls), next: Arc::default(), refusals: Arc::default() }
    }

    async fn channel(&self) -> Channel {
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed) as usize % self.urls.len();
            let endpoint = Endpoint::from_shared(self.urls[index].clone()).expect("a URL");
            match timeout(SILENCE, endpoint.connect_timeout(SILENCE).connect()).await {
                Ok(Ok(channel)) => return channel,
                _ => self.rest().await,
            }
        }
    }

    async fn rest(&self) {
        self.refusals.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(PAUSE).await;
    }

    /// Asks until there is an answer. What is refused for good is a panic: these requests are all right.
    async fn ask<T, F: Future<Output = Result<T, tonic::Status>>>(&self, call: impl Fn(Channel) -> F) -> T {
        loop {
            match timeout(SILENCE, call(self.channel().await)).await {
                Ok(Ok(answer)) => return answer,
                Ok(Err(status)) => {
                    let worth_it = !matches!(
                        status.code(),
                        tonic::Code::InvalidArgument
                            | tonic::Code::NotFound
                            | tonic::Code::AlreadyExists
                            | tonic::Code::FailedPrecondition
                    );
                    assert!(worth_it, "refused for good: {status:?}");
                }
                Err(_) => {}
            }
            self.rest().await;
        }
    }

    /// Sends a request until it is accepted, and follows its job to the end, whatever happens on the way.
    pub async fn insist(&self, request: &GenerateRequest) -> Job {
        assert!(!request.idempotency_key.is_empty());
        let mut known = None;
        loop {
            let generate = |channel| async move { Client::new(channel).generate(request.clone()).await };
            let mut events = self.ask(generate).await.into_inner();
            let ended = loop {
                match timeout(SILENCE, events.next()).await {
                    Ok(Some(Ok(event))) => {
                        if kind(&event) != "detached" {
                            let known = known.get_or_insert_with(|| event.job_id.clone());
                            assert_eq!(*known, event.job_id, "a key stands for one job");
                        }
                        if matches!(event.event, Some(Event::Done(_) | Event::Failed(_))) {
                            break true;
                        }
                    }
                    // The stream broke, or nothing is heard.
                    _ => break false,
                }
            };
            if let (true, Some(job_id)) = (ended, &known) {
                return self.job(job_id).await;
            }
            self.rest().await;
        }
    }

    /// A job as it is.
    pub async fn job(&self, job_id: &str) -> Job {
        let ask =
            |channel| async move { Client::new(channel).get_job(GetJobRequest { job_id: job_id.to_owned() }).await };
        self.ask(ask).await.into_inner()
    }

    /// Submits a batch until it is accepted, and waits for its end.
    pub async fn batch(&self, key: &str, items: &[GenerateRequest]) -> Batch {
        let answer = self
            .ask(|channel| async move {
                batches::submit(&mut batches::Client::new(channel), batches::key(key), items).await
            })
            .await;
        let batch_id = &batches::id(&answer);
        loop {
            let get = |channel| async move {
                batches::Client::new(channel).get_batch(GetBatchRequest { batch_id: batch_id.clone() }).await
            };
            let batch = self.ask(get).await.into_inner();
            if matches!(batch.state(), BatchState::Ended | BatchState::Cancelled) {
                return batch;
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// A batch's items. A stream that breaks is gone on with.
    async fn results(&self, batch_id: &str) -> Vec<BatchItem> {
        let mut items: Vec<BatchItem> = Vec::new();
        loop {
            let start = items.len() as u64;
            let list = |channel| async move {
                let request = ListBatchResultsRequest { batch_id: batch_id.to_owned(), start, states: Vec::new() };
                batches::Client::new(channel).list_batch_results(request).await
            };
            let mut stream = self.ask(list).await.into_inner();
            loop {
                match timeout(SILENCE, stream.next()).await {
                    Ok(Some(Ok(item))) => items.push(item),
                    Ok(None) => return items,
                    _ => break,
                }
            }
        }
    }

    async fn image_is_right(&self, job_id: &str, image: &Image) {
        let fetch = |channel| async move {
            let request = GetImageRequest { job_id: job_id.to_owned(), image_index: image.image_index };
            let mut chunks = Client::new(channel).get_image(request).await?.into_inner();
            let mut bytes = Vec::new();
            while let Some(chunk) = chunks.next().await {
                bytes.extend_from_slice(&chunk?.data);
            }
            Ok(bytes)
        };
        let bytes = self.ask(fetch).await;
        assert_eq!(blake3::hash(&bytes).to_hex().as_str(), image.hash, "image of {job_id}");
        assert_eq!(bytes.len() as u64, image.length);
    }
}

/// What is asked for.
#[derive(Debug, Clone)]
pub struct Load {
    /// Clients that each send one request after the other.
    pub clients: usize,
    /// Requests that are sent at least.
    pub at_least: usize,
    /// Items of the batch beside them.
    pub items: usize,
    /// Steps of each image.
    pub steps: u32,
}

/// What came of it.
#[derive(Debug, Clone, Default)]
pub struct Harvest {
    /// The jobs of single requests, by key.
    pub jobs: BTreeMap<String, Job>,
    /// The batch.
    pub batch: Batch,
    /// Longest time from a request to its end.
    pub slowest: Duration,
}

/// How many times the steps some requests take, so that hands store checkpoints of them.
const LONG: u32 = 20;

/// The request of this number. Each two have the same seed, so the same picture.
fn single(number: u64, steps: u32) -> GenerateRequest {
    let is_long = (number / 2) % 8 == 3;
    GenerateRequest {
        seed: Some(number / 2),
        steps: Some(if is_long { steps * LONG } else { steps }),
        idempotency_key: format!("single-{number}"),
        image_count: Some(1 + u32::from((number / 2).is_multiple_of(5))),
        ..request("a cat")
    }
}

/// Sends the load, and single requests until `enough`.
pub async fn send(front: &Front, load: &Load, enough: Arc<AtomicBool>) -> Harvest {
    let number = Arc::new(AtomicU64::new(0));
    let mut clients = JoinSet::new();
    for _ in 0..load.clients {
        let (front, load, number, enough) = (front.clone(), load.clone(), number.clone(), enough.clone());
        clients.spawn(async move {
            let mut done = Vec::new();
            loop {
                let mine = number.fetch_add(1, Ordering::Relaxed);
                if enough.load(Ordering::Relaxed) && mine >= load.at_least as u64 {
                    return done;
                }
                let request = single(mine, load.steps);
                let started = std::time::Instant::now();
                let job = front.insist(&request).await;
                done.push((request.idempotency_key, job, started.elapsed()));
            }
        });
    }
    let item = |seed: usize| GenerateRequest {
        seed: Some(1_000_000 + seed as u64),
        steps: Some(load.steps),
        ..request("a dog")
    };
    let items: Vec<_> = (0..load.items).map(item).collect();
    let mut harvest = Harvest { batch: front.batch("all", &items).await, ..Harvest::default() };
    while let Some(done) = clients.join_next().await {
        for (key, job, time) in done.expect("a client does not give up") {
            harvest.slowest = harvest.slowest.max(time);
            harvest.jobs.insert(key, job);
        }
    }
    harvest
}

/// Every accepted job ended once, with each image once, or with a stated error; images are what their records say; nothing is left in queues.
/// Returns how many ended with an error.
pub async fn check(front: &Front, ledger: &Ledger, load: &Load, harvest: &Harvest) -> u64 {
    let batch = &harvest.batch;
    assert_eq!((batch.state(), batch.item_count), (BatchState::Ended, load.items as u64));
    assert_eq!(batch.succeeded + batch.failed, batch.item_count, "{batch:?}");
    let items = front.results(&batch.batch_id).await;
    assert!(items.iter().map(|item| item.index).eq(0..load.items as u64), "each item once, in order");
    for item in &items {
        let images = if item.state() == ItemState::Succeeded { 1 } else { 0 };
        assert_eq!(item.images.len(), images, "{item:?}");
        assert!(images == 1 || item.error.as_ref().is_some_and(|error| !error.message.is_empty()), "{item:?}");
    }
    // What is kept are these jobs and no others, each over.
    let records = ledger.jobs().await.expect("jobs");
    let kept: HashSet<_> = records.iter().map(|record| job_id(record).to_owned()).collect();
    let mut wanted: HashSet<_> = harvest.jobs.values().map(|job| job.job_id.clone()).collect();
    assert_eq!(wanted.len(), harvest.jobs.len(), "each key has a job of its own");
    wanted.extend((0..load.items as u64).map(|index| item_job_id(&batch.batch_id, index, 0)));
    assert_eq!(kept, wanted);
    let mut failed = 0;
    let mut pictures: BTreeMap<u64, String> = BTreeMap::new();
    let mut checks = JoinSet::new();
    for record in &records {
        let job = transition::public_job(record);
        assert!(has_ended(record), "{job:?}");
        assert!(record.log.iter().zip(1..).all(|(event, number)| event.number == number), "events without gaps");
        let ends = record.log.iter().filter(|event| matches!(event.event, Some(Event::Done(_) | Event::Failed(_))));
        assert_eq!(ends.count(), 1, "it ends once");
        let indices: Vec<_> = job.images.iter().map(|image| image.image_index).collect();
        assert!(indices.windows(2).all(|pair| pair[0] < pair[1]), "each image once: {indices:?}");
        if job.state() == JobState::Succeeded {
            let wanted = job.request.as_ref().map_or(1, GenerateRequest::image_count);
            assert_eq!(indices.len() as u32, wanted, "{job:?}");
        } else {
            failed += 1;
            let error = ApiError::from(job.error.as_ref().expect("why it failed"));
            assert!(!error.message.is_empty());
            eprintln!("{} ended {:?}: {} ({})", job.job_id, job.state(), error.message, error.reason());
        }
        for image in &job.images {
            if record.batch_id.is_empty() && job.request.as_ref().is_some_and(|request| request.image_count() == 1) {
                let same = pictures.entry(image.seed).or_insert_with(|| image.hash.clone());
                assert_eq!(*same, image.hash, "the same request, the same picture");
            }
            let (front, id, image) = (front.clone(), job.job_id.clone(), image.clone());
            if checks.len() >= 16 {
                checks.join_next().await.expect("one").expect("is right");
            }
            checks.spawn(async move { front.image_is_right(&id, &image).await });
        }
    }
    while let Some(checked) = checks.join_next().await {
        checked.expect("is right");
    }
    let by_id: HashMap<_, _> = records.iter().map(|record| (job_id(record), record)).collect();
    for (key, job) in &harvest.jobs {
        let record = by_id.get(job.job_id.as_str()).expect("is kept");
        assert_eq!(transition::public_job(record), *job, "{key}: nothing changes a job that has ended");
    }
    queues_are_empty(ledger).await;
    failed
}

/// Nothing waits and nothing is leased, after a while: what late workers left is delivered once more, and found done.
async fn queues_are_empty(ledger: &Ledger) {
    let mut left = Vec::new();
    for _ in 0..150 {
        // A cluster that lost a server a moment ago may not answer yet.
        match what_queues_hold(ledger).await {
            Ok(held) if held.is_empty() => return,
            held => left = vec![held],
        }
        tokio::time::sleep(PAUSE).await;
    }
    panic!("left in queues: {left:?}");
}

async fn what_queues_hold(ledger: &Ledger) -> efferent_bus::Result<Vec<(String, efferent_bus::Depth)>> {
    ledger.declare_queues(&efferent_worker::sim::model()).await?;
    let mut held = Vec::new();
    for lane in names::LANES {
        for queue in [names::brain_queue("sim", lane), names::hand_queue("sim", lane)] {
            let depth = ledger.bus().depth(&queue).await?;
            held.extend((depth.ready + depth.leased > 0).then_some((queue, depth)));
        }
    }
    Ok(held)
}

/// When all processes have stopped, nobody is left in the lists of who is there.
pub async fn nobody_is_left(ledger: &Ledger) {
    for _ in 0..100 {
        let leases = ledger.bus().list(Bucket::Leases).await.expect("leases");
        let workers = ledger.bus().list(Bucket::Workers).await.expect("workers");
        if leases.is_empty() && workers.is_empty() {
            return;
        }
        tokio::time::sleep(PAUSE).await;
    }
    panic!("leases or workers are left");
}
