//! The bus of a cluster: NATS JetStream.
//!
//! - A queue is a work-queue stream with one durable pull consumer; its bound is the stream's, so a full queue refuses the publish. One message
//!   more, its anchor, is nobody's task.
//! - A bucket is a JetStream key-value bucket. Time-to-live is per message, so writes are made with the header themselves.
//!   That of jobs republishes what it stores, as events.
//! - An object is a stream's messages, one a chunk, the first written last: where it is, all are. Again per-message time-to-live.
//! - Events are plain NATS.
//!
//! Servers older than 2.12 ignore what they do not know instead of refusing it. So the version is checked, and so is every configuration
//! that comes back.
//!
//! Read in this order: this file (the bus), [`setup`] (is the server fit), [`tasks`] (leases), [`stranded`] (tasks that the server forgot), [`objects`] (chunks), [`watch`].

mod objects;
mod setup;
mod stranded;
mod tasks;
mod time;
mod watch;

use std::{
    collections::HashMap,
    error::Error as _,
    net::IpAddr,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use async_nats::{
    Client, ConnectOptions, HeaderMap,
    jetstream::{
        self,
        consumer::{self, AckPolicy, DeliverPolicy, PullConsumer},
        context::{PublishError, PublishErrorKind},
        kv::{Operation, Store},
        message::{OutboundMessage, PublishMessage},
        stream::{self, DirectGetErrorKind, DiscardPolicy, RetentionPolicy, StorageType, Stream},
    },
};
use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream::BoxStream};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use self::{
    objects::{CHUNK, CHUNKS, WINDOW, get_chunk},
    setup::{MARKER, check_version, make_bucket, make_stream, refuse_differences},
    tasks::{HEADER_PREFIX, JOB, collect},
    watch::{begin_watch, snapshot, watch},
};
use crate::{
    Bucket, Bus, Change, DUPLICATE_WINDOW, Delivery, Depth, Entry, Error, Event, MAX_MESSAGE, MAX_OBJECT, MAX_VALUE,
    NewTask, Published, QueueSpec, Result, check_key, check_length, check_queue, clock::Clock,
};

/// How often the server is asked whether it is there. After three questions without an answer the connection is made anew: that of a server that
/// vanished without a word would stay for minutes.
const PING: Duration = Duration::from_secs(5);
const CONSUMER: &str = "workers";
/// Bytes that a process publishes to a queue before it renews the queue's anchor: several of them in a block of the server's, which has 4 MiB.
const ANCHOR_EVERY: usize = 512 * 1024;
/// Messages in a queue's stream that are not tasks.
const ANCHORS: u64 = 1;
/// Most workers that wait for tasks of one queue at once.
const MAX_WAITING: i64 = 16_384;

/// How to reach NATS.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// Servers, separated by commas. Default `nats://127.0.0.1:4222`.
    pub url: String,
    /// A file of credentials (`.creds`); empty for none.
    pub credentials: String,
    /// What names of streams, buckets and subjects start with: clusters with other prefixes share a server without meeting. Default `efferent`.
    pub prefix: String,
    /// Copies of every stream in a NATS cluster: 1, 3 or 5. Default 1.
    pub replicas: usize,
    /// How long a call waits for an answer. Default 5 s.
    #[serde(with = "humantime_serde")]
    pub timeout: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            url: "nats://127.0.0.1:4222".to_owned(),
            credentials: String::new(),
            prefix: "efferent".to_owned(),
            replicas: 1,
            timeout: Duration::from_secs(5),
        }
    }
}

/// A bus on a NATS server or cluster.
#[derive(Debug)]
pub struct Nats {
    client: Client,
    context: jetstream::Context,
    options: Options,
    buckets: HashMap<Bucket, Store>,
    objects: Stream,
    queues: RwLock<HashMap<String, Queue>>,
    clock: Arc<Clock>,
}

#[derive(Debug, Clone)]
struct Queue {
    stream: Stream,
    consumer: PullConsumer,
    spec: QueueSpec,
    /// Bytes published since the anchor was renewed.
    published: Arc<AtomicUsize>,
    stranded: Arc<stranded::Watch>,
}

fn fault<E: std::error::Error + Send + Sync + 'static>(what: impl Into<String>) -> impl FnOnce(E) -> Error {
    let what = what.into();
    move |error| Error::unavailable(what, error)
}

impl Nats {
    /// Connects, checks the server, and makes the buckets.
    ///
    /// # Errors
    /// If the server cannot be reached, is too old, has no JetStream, or did not take a configuration.
    pub async fn connect(options: Options) -> Result<Self> {
        let mut connect = ConnectOptions::new().name("efferent").request_timeout(Some(options.timeout));
        connect = connect.ping_interval(PING);
        if !options.credentials.is_empty() {
            connect = connect
                .credentials_file(&options.credentials)
                .await
                .map_err(fault(format!("reading credentials {}", options.credentials)))?;
        }
        let servers: Vec<&str> = options.url.split(',').map(str::trim).collect();
        let client = connect.connect(servers).await.map_err(fault(format!("connecting to NATS at {}", options.url)))?;
        let info = client.server_info();
        check_version(&info.version)?;
        let context = jetstream::ContextBuilder::new().timeout(options.timeout).build(client.clone());
        let mut buckets = HashMap::new();
        for bucket in Bucket::ALL {
            buckets.insert(bucket, make_bucket(&context, &options, bucket).await?);
        }
        let objects = make_stream(
            &context,
            stream::Config {
                name: format!("{}-objects", options.prefix),
                subjects: vec![format!("{}.object.>", options.prefix)],
                retention: RetentionPolicy::Limits,
                storage: StorageType::File,
                num_replicas: options.replicas,
                max_messages_per_subject: 1,
                allow_direct: true,
                allow_message_ttl: true,
                ..Default::default()
            },
        )
        .await?;
        let clock = time::follow(&context, &objects.cached_info().config.name).await?;
        Ok(Self { client, context, options, buckets, objects, queues: RwLock::default(), clock })
    }

    fn queue(&self, name: &str) -> Result<Queue> {
        let queues = self.queues.read().unwrap_or_else(PoisonError::into_inner);
        queues.get(name).cloned().ok_or_else(|| Error::Usage(format!("queue {name} was not declared")))
    }

    fn bucket(&self, bucket: Bucket) -> &Store {
        &self.buckets[&bucket]
    }

    fn subject(&self, queue: &str, job: &str) -> String {
        format!("{}.queue.{queue}.{job}", self.options.prefix)
    }

    fn anchor_subject(&self, queue: &str) -> String {
        format!("{}.anchor.{queue}", self.options.prefix)
    }

    /// Has one message stay in a queue's newest block of storage, which no consumer is given. Without it, the server would make a file and delete one each
    /// time that the last task is done: on a queue that is mostly empty, for each task.
    fn anchor(&self, queue: &str) -> impl Future<Output = std::result::Result<(), PublishError>> + Send + 'static {
        let (context, subject) = (self.context.clone(), self.anchor_subject(queue));
        // The one before it goes.
        let publish = PublishMessage::build().header(async_nats::header::NATS_ROLLUP, "sub");
        async move { context.send_publish(subject, publish).await?.await.map(drop) }
    }

    async fn send(&self, message: OutboundMessage) -> std::result::Result<u64, PublishError> {
        let publish = PublishMessage::build().payload(message.payload).headers(message.headers.unwrap_or_default());
        Ok(self.context.send_publish(message.subject, publish).await?.await?.sequence)
    }

    /// Writes a value; with `revision` only if the key's is that (0 for none). `None` if it is not.
    async fn write(
        &self,
        bucket: Bucket,
        key: &str,
        value: Bytes,
        ttl: Option<Duration>,
        revision: Option<u64>,
    ) -> Result<Option<u64>> {
        check_key(key)?;
        check_length("value", value.len(), MAX_VALUE)?;
        let mut publish = PublishMessage::build().payload(value);
        if let Some(ttl) = ttl {
            publish = publish.ttl(whole_seconds(ttl));
        }
        if let Some(revision) = revision {
            publish = publish.expected_last_subject_sequence(revision);
        }
        let subject = format!("{}{key}", self.bucket(bucket).prefix);
        match self.send(publish.outbound_message(subject)).await {
            Ok(revision) => Ok(Some(revision)),
            Err(error) if is_outdated(&error) => Ok(None),
            Err(error) => Err(Error::unavailable(format!("writing {}", bucket.name()), error)),
        }
    }

    fn object_subject(&self, hash: &str, chunk: &str) -> String {
        format!("{}.object.{hash}.{chunk}", self.options.prefix)
    }
}

/// Whether another write came first. In a cluster that is also said of one that is on its way, with a code of its own.
fn is_outdated(error: &PublishError) -> bool {
    let source = error.source().and_then(|source| source.downcast_ref::<jetstream::Error>());
    error.kind() == PublishErrorKind::WrongLastSequence
        || source.is_some_and(|error| error.error_code() == jetstream::ErrorCode::STREAM_WRONG_LAST_SEQUENCE_CONSTANT)
}

/// Time-to-live counts in seconds, from 1.
fn whole_seconds(ttl: Duration) -> Duration {
    Duration::from_secs(ttl.as_millis().div_ceil(1000).max(1).try_into().unwrap_or(u64::MAX))
}

#[async_trait]
impl Bus for Nats {
    fn kind(&self) -> &'static str {
        "nats"
    }

    fn now(&self) -> SystemTime {
        self.clock.now()
    }

    fn local_address(&self) -> Option<IpAddr> {
        self.client.server_info().client_ip.parse().ok()
    }

    async fn ping(&self) -> Result<()> {
        self.context.query_account().await.map(drop).map_err(fault("asking JetStream"))
    }

    async fn declare(&self, spec: &QueueSpec) -> Result<()> {
        check_queue(&spec.name)?;
        let config = stream::Config {
            name: format!("{}-queue-{}", self.options.prefix, spec.name.replace('.', "_")),
            subjects: vec![self.subject(&spec.name, "*"), self.anchor_subject(&spec.name)],
            retention: RetentionPolicy::WorkQueue,
            storage: StorageType::File,
            discard: DiscardPolicy::New,
            max_messages: i64::try_from(spec.capacity.saturating_add(ANCHORS)).unwrap_or(i64::MAX),
            allow_rollup: true,
            num_replicas: self.options.replicas,
            duplicate_window: DUPLICATE_WINDOW,
            allow_direct: true,
            ..Default::default()
        };
        let stream = make_stream(&self.context, config).await?;
        let wanted = consumer::pull::Config {
            durable_name: Some(CONSUMER.to_owned()),
            filter_subject: self.subject(&spec.name, "*"),
            ack_policy: AckPolicy::Explicit,
            ack_wait: spec.lease,
            deliver_policy: DeliverPolicy::All,
            // How often to try is the worker's decision: it writes the dead letter, and then terminates.
            max_deliver: -1,
            // It counts over all workers: the default of 1000 would stall a large fleet.
            max_ack_pending: i64::try_from(spec.capacity.max(1000)).unwrap_or(i64::MAX),
            // So does this one, whose default is 512.
            max_waiting: MAX_WAITING,
            num_replicas: self.options.replicas,
            ..Default::default()
        };
        let what = format!("making the consumer of queue {}", spec.name);
        let consumer: PullConsumer = stream.create_consumer(wanted.clone()).await.map_err(fault(what))?;
        let got = &consumer.cached_info().config;
        let differs = [
            ("ack_policy", got.ack_policy != wanted.ack_policy),
            ("filter_subject", got.filter_subject != wanted.filter_subject),
            ("ack_wait", got.ack_wait != wanted.ack_wait),
            ("deliver_policy", got.deliver_policy != wanted.deliver_policy),
            ("max_deliver", got.max_deliver > 0),
            ("max_ack_pending", got.max_ack_pending != wanted.max_ack_pending),
            // 0 stands for as many as the stream has.
            ("replicas", got.num_replicas != 0 && got.num_replicas != wanted.num_replicas.max(1)),
            ("max_waiting", got.max_waiting != wanted.max_waiting),
        ];
        refuse_differences("consumer of queue", &spec.name, &differs)?;
        match self.anchor(&spec.name).await {
            // A full queue has its anchor.
            Err(error) if !is_full(&error) => {
                return Err(Error::unavailable(format!("anchoring queue {}", spec.name), error));
            }
            _ => {}
        }
        let queue = Queue { stream, consumer, spec: spec.clone(), published: Arc::default(), stranded: Arc::default() };
        self.queues.write().unwrap_or_else(PoisonError::into_inner).insert(spec.name.clone(), queue);
        Ok(())
    }

    async fn publish(&self, queue: &str, task: NewTask) -> Result<Published> {
        check_length("task", task.payload.len(), MAX_MESSAGE)?;
        check_key(&task.job)?;
        let known = self.queue(queue)?;
        if known.published.fetch_add(task.payload.len(), Ordering::Relaxed) > ANCHOR_EVERY {
            known.published.store(0, Ordering::Relaxed);
            // Should it fail, the queue is only slower: a full one has no room for it.
            tokio::spawn(self.anchor(queue));
        }
        let mut headers = HeaderMap::new();
        headers.insert(JOB, task.job.as_str());
        for (name, value) in &task.headers {
            headers.insert(format!("{HEADER_PREFIX}{name}"), value.as_str());
        }
        let publish = PublishMessage::build().payload(task.payload).headers(headers).message_id(&task.key);
        let sent = async { self.context.send_publish(self.subject(queue, &task.job), publish).await?.await };
        match sent.await {
            Ok(ack) if ack.duplicate => Ok(Published::Duplicate),
            Ok(_) => Ok(Published::Stored),
            Err(error) if is_full(&error) => {
                Err(Error::Full { queue: queue.to_owned(), capacity: known.spec.capacity })
            }
            Err(error) => Err(Error::unavailable(format!("publishing to {queue}"), error)),
        }
    }

    async fn pull(&self, queue: &str, max: usize, wait: Duration) -> Result<Vec<Delivery>> {
        let known = self.queue(queue)?;
        if max == 0 {
            return Ok(Vec::new());
        }
        // `no_wait` and `expires` together: what is there, or else the first that comes, and the server says that this was all.
        let mut fetch = known.consumer.fetch().max_messages(max);
        if !wait.is_zero() {
            fetch = fetch.expires(wait);
        }
        let what = || format!("pulling from {queue}");
        let messages = fetch.messages().await.map_err(fault(what()))?;
        // A server that goes away owes the word that this was all.
        let all = tokio::time::timeout(wait + self.options.timeout, collect(messages, queue)).await;
        all.map_err(fault(what()))?
    }

    async fn purge(&self, queue: &str, job: &str) -> Result<u64> {
        let known = self.queue(queue)?;
        let purged = known.stream.purge().filter(self.subject(queue, job)).await;
        Ok(purged.map_err(fault(format!("purging {queue}")))?.purged)
    }

    async fn depth(&self, queue: &str) -> Result<Depth> {
        let known = self.queue(queue)?;
        let what = || format!("asking the depth of {queue}");
        let stream = known.stream.get_info().await.map_err(fault(what()))?;
        let consumer = known.consumer.get_info().await.map_err(fault(what()))?;
        let tasks = stream.state.messages.saturating_sub(ANCHORS);
        let leased = consumer.num_ack_pending as u64;
        let missing = tasks.saturating_sub(leased + consumer.num_pending);
        if let Some(floor) = known.stranded.see(missing, consumer.ack_floor.stream_sequence, Instant::now()) {
            self.rescue(queue, &known, floor).await?;
        }
        let oldest_age = match tasks {
            0 => None,
            _ => match known.stream.direct_get_next_for_subject(self.subject(queue, "*"), None).await {
                Ok(oldest) => Some(self.now().duration_since(oldest.time.into()).unwrap_or_default()),
                Err(error) if error.kind() == DirectGetErrorKind::NotFound => None,
                Err(error) => return Err(Error::unavailable(what(), error)),
            },
        };
        Ok(Depth { ready: tasks.saturating_sub(leased), leased, oldest_age })
    }

    async fn get(&self, bucket: Bucket, key: &str) -> Result<Option<Entry>> {
        check_key(key)?;
        let entry = self.bucket(bucket).entry(key).await.map_err(fault(format!("reading {}", bucket.name())))?;
        Ok(entry.filter(|entry| entry.operation == Operation::Put).map(|entry| Entry {
            key: entry.key,
            value: entry.value,
            revision: entry.revision,
        }))
    }

    async fn create(&self, bucket: Bucket, key: &str, value: Bytes, ttl: Option<Duration>) -> Result<Option<u64>> {
        if let Some(revision) = self.write(bucket, key, value.clone(), ttl, Some(0)).await? {
            return Ok(Some(revision));
        }
        // The mark of a deleted key is in the way: it may be written over.
        let present = self.bucket(bucket).entry(key).await.map_err(fault(format!("reading {}", bucket.name())))?;
        match present {
            Some(entry) if entry.operation != Operation::Put => {
                self.write(bucket, key, value, ttl, Some(entry.revision)).await
            }
            _ => Ok(None),
        }
    }

    async fn swap(
        &self,
        bucket: Bucket,
        key: &str,
        value: Bytes,
        revision: u64,
        ttl: Option<Duration>,
    ) -> Result<Option<u64>> {
        self.write(bucket, key, value, ttl, Some(revision)).await
    }

    async fn put(&self, bucket: Bucket, key: &str, value: Bytes, ttl: Option<Duration>) -> Result<u64> {
        let stored = self.write(bucket, key, value, ttl, None).await?;
        stored.ok_or_else(|| Error::Usage("a put cannot be refused".to_owned()))
    }

    async fn delete(&self, bucket: Bucket, key: &str) -> Result<()> {
        check_key(key)?;
        let deleted = self.bucket(bucket).purge_with_ttl(key, MARKER).await;
        deleted.map_err(fault(format!("deleting from {}", bucket.name())))
    }

    async fn list(&self, bucket: Bucket) -> Result<Vec<Entry>> {
        let mut entries = snapshot(self.bucket(bucket)).await?;
        entries.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(entries)
    }

    async fn watch(&self, bucket: Bucket) -> Result<BoxStream<'static, Change>> {
        let (sender, receiver) = mpsc::channel(1024);
        let store = self.bucket(bucket).clone();
        // Once before returning, so that a store that does not answer is an error here.
        let first = begin_watch(&store).await?;
        tokio::spawn(watch(store, first, sender));
        Ok(tokio_stream::wrappers::ReceiverStream::new(receiver).boxed())
    }

    async fn put_object(&self, bytes: Bytes, ttl: Option<Duration>) -> Result<String> {
        check_length("object", bytes.len(), MAX_OBJECT)?;
        let hash = blake3::hash(&bytes).to_hex().to_string();
        let chunks = bytes.len().div_ceil(CHUNK).max(1);
        let until = ttl.and_then(|ttl| self.now().checked_add(whole_seconds(ttl)));
        let store = |index: usize| {
            let chunk = bytes.slice((index * CHUNK).min(bytes.len())..((index + 1) * CHUNK).min(bytes.len()));
            let mut publish = PublishMessage::build().payload(chunk).header(CHUNKS, chunks.to_string().as_str());
            if let Some(ttl) = ttl {
                publish = publish.ttl(whole_seconds(ttl));
            }
            self.store_chunk(self.object_subject(&hash, &index.to_string()), publish, until)
        };
        futures::stream::iter(1..chunks).map(store).buffer_unordered(WINDOW).try_collect::<()>().await?;
        store(0).await?;
        Ok(hash)
    }

    async fn get_object(&self, hash: &str) -> Result<Option<BoxStream<'static, Result<Bytes>>>> {
        check_key(hash)?;
        let Some((first, chunks)) = get_chunk(&self.objects, &self.object_subject(hash, "0")).await? else {
            return Ok(None);
        };
        let (objects, name) = (self.objects.clone(), hash.to_owned());
        let subjects: Vec<String> = (1..chunks).map(|index| self.object_subject(hash, &index.to_string())).collect();
        let rest = futures::stream::iter(subjects).map(move |subject| {
            let objects = objects.clone();
            async move {
                let missing = || Error::Unavailable { what: format!("{subject} is missing"), source: None };
                get_chunk(&objects, &subject).await?.map(|(chunk, _)| chunk).ok_or_else(missing)
            }
        });
        let all = futures::stream::once(std::future::ready(Ok(first))).chain(rest.buffered(WINDOW));
        // Hash what passes; at the end compare.
        let mut hasher = Some(blake3::Hasher::new());
        let end = futures::stream::once(std::future::ready(Ok(Bytes::new())));
        let mut left = chunks;
        let checked = all.chain(end).filter_map(move |chunk: Result<Bytes>| {
            let outcome = match (&mut hasher, chunk) {
                (Some(hasher), Ok(chunk)) if left > 0 => {
                    left -= 1;
                    hasher.update(&chunk);
                    Some(Ok(chunk))
                }
                (Some(hasher), Ok(_)) if hasher.finalize().to_hex().as_str() != name => {
                    let what = format!("object {name} is damaged: its bytes have another hash");
                    Some(Err(Error::Unavailable { what, source: None }))
                }
                (Some(_), Err(error)) => {
                    hasher = None;
                    Some(Err(error))
                }
                _ => None,
            };
            std::future::ready(outcome)
        });
        Ok(Some(checked.boxed()))
    }

    async fn delete_object(&self, hash: &str) -> Result<()> {
        check_key(hash)?;
        let purged = self.objects.purge().filter(self.object_subject(hash, "*")).await;
        purged.map(drop).map_err(fault("deleting an object"))
    }

    async fn emit(&self, subject: &str, payload: Bytes) -> Result<()> {
        check_length("event", payload.len(), MAX_MESSAGE)?;
        let subject = format!("{}.{subject}", self.options.prefix);
        self.client.publish(subject, payload).await.map_err(fault("sending an event"))
    }

    async fn subscribe(&self, pattern: &str) -> Result<BoxStream<'static, Event>> {
        let full = format!("{}.{pattern}", self.options.prefix);
        let subscriber = self.client.subscribe(full).await.map_err(fault("subscribing to events"))?;
        // The server has it once it has answered what was sent after it.
        self.client.flush().await.map_err(fault("subscribing to events"))?;
        let cut = self.options.prefix.len() + 1;
        let event = move |message: async_nats::Message| Event {
            subject: message.subject.get(cut..).unwrap_or_default().to_owned(),
            payload: message.payload,
        };
        Ok(subscriber.map(event).boxed())
    }
}

fn is_full(error: &PublishError) -> bool {
    error.kind() == PublishErrorKind::Other
        && error.source().is_some_and(|source| source.to_string().contains("maximum messages exceeded"))
}

/// A shared bus on NATS that waits for its server: tries again until it is there or `patience` is over. A server that is unfit is not waited for.
///
/// # Errors
/// The last failure.
pub async fn connect_patiently(options: Options, patience: Duration) -> Result<Arc<Nats>> {
    let until = tokio::time::Instant::now() + patience;
    loop {
        match Nats::connect(options.clone()).await {
            Ok(nats) => return Ok(Arc::new(nats)),
            Err(error @ Error::Unavailable { .. }) if tokio::time::Instant::now() < until => {
                tracing::warn!(%error, url = options.url, "NATS is not there yet");
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
            Err(error) => return Err(error),
        }
    }
}
