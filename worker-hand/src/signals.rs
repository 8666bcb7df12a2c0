//! Where a hand gets its control signals: with the task, from the brain that made them, or from the object store.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use efferent_bus::{Bucket, MAX_OBJECT, SharedBus, ledger, read_object};
use efferent_proto::{
    ApiError,
    internal::{
        ControlSignal, FetchRequest, HandTask, SharedSignal, hand_task, signal_transfer_client::SignalTransferClient,
    },
    names,
    v1::ErrorCode,
};
use efferent_worker::engine::EngineError;
use moka::sync::Cache;
use prost::Message as _;
use tokio::sync::Semaphore;
use tonic::transport::{Channel, Endpoint};

/// Bytes of decoded signals that are kept: the images of a job that one hand renders share one.
const KEPT: u64 = 64 * 1024 * 1024;
/// Bytes that may be under way without our having said that they arrived.
const WINDOW: u32 = 16 * 1024 * 1024;
/// How long a connection may take to be made, and a signal to arrive, before the store is asked.
const CONNECT: Duration = Duration::from_secs(1);
const ARRIVE: Duration = Duration::from_secs(10);
/// How long a brain that could not be reached is not asked again.
const SULK: Duration = Duration::from_secs(30);
/// After what time a connection that nobody uses is given up.
const IDLE: Duration = Duration::from_secs(600);
/// How long to wait before it is looked again for a signal that is neither stored nor to be had from its brain.
const PAUSE: Duration = Duration::from_secs(5);
/// Most tasks that wait for their signals here at once. Each has its lease extended: so many are as much to the queue's server as a few hands at work.
const WAITING: usize = 256;
/// How long the next one is put back for: each delivery counts, so there are to be few.
pub(crate) const CROWDED: Duration = Duration::from_secs(60);

/// What there is instead of a signal.
#[derive(Debug)]
pub(crate) enum Absent {
    /// The task cannot be done.
    Failed(EngineError),
    /// It is not durable yet, and the brain that has it cannot be reached: if that is dead, another makes the signal again.
    Later,
}

/// The signals of one hand's tasks.
#[derive(Debug)]
pub(crate) struct Signals {
    bus: SharedBus,
    kept: Cache<String, Arc<ControlSignal>>,
    brains: Cache<String, Channel>,
    unreachable: Cache<String, ()>,
    waiting: Semaphore,
    pause: Duration,
}

impl Signals {
    /// None yet.
    pub(crate) fn new(bus: SharedBus) -> Self {
        let weigh = |_: &String, signal: &Arc<ControlSignal>| u32::try_from(signal.encoded_len()).unwrap_or(u32::MAX);
        Self {
            bus,
            kept: Cache::builder().max_capacity(KEPT).weigher(weigh).build(),
            brains: Cache::builder().time_to_idle(IDLE).build(),
            unreachable: Cache::builder().time_to_live(SULK).build(),
            waiting: Semaphore::new(WAITING),
            pause: PAUSE,
        }
    }

    /// The signal of a task that was not there yet, once it is. It is waited for with the task in hand, however long that takes: a task that is put back each time
    /// has soon been delivered as often as it may. `None` after `stop`, or at once if as many as may wait already.
    ///
    /// # Errors
    /// As those of [`Signals::of`].
    pub(crate) async fn wait(
        &self,
        task: &HandTask,
        stop: impl Future<Output = ()>,
    ) -> efferent_bus::Result<Option<Result<Arc<ControlSignal>, EngineError>>> {
        let Ok(_turn) = self.waiting.try_acquire() else { return Ok(None) };
        tokio::pin!(stop);
        loop {
            tokio::select! {
                () = tokio::time::sleep(self.pause) => {}
                () = &mut stop => return Ok(None),
            }
            match self.of(task).await? {
                Ok(signal) => return Ok(Some(Ok(signal))),
                Err(Absent::Failed(error)) => return Ok(Some(Err(error))),
                Err(Absent::Later) => {}
            }
        }
    }

    /// The signal of a task.
    ///
    /// # Errors
    /// If the bus is unavailable; the inner error is the task's.
    pub(crate) async fn of(&self, task: &HandTask) -> efferent_bus::Result<Result<Arc<ControlSignal>, Absent>> {
        let failed = |error: EngineError| Ok(Err(Absent::Failed(error)));
        let internal = |message: String| failed(ApiError::new(ErrorCode::Internal, message).into());
        let (hash, address) = match &task.signal {
            Some(hand_task::Signal::Inline(signal)) => return Ok(Ok(Arc::new(signal.clone()))),
            Some(hand_task::Signal::Stored(hash)) => (hash, None),
            Some(hand_task::Signal::Served(served)) => (&served.hash, Some(&served.address)),
            None => return internal("the task has no control signal".to_owned()),
        };
        if let Some(signal) = self.kept.get(hash) {
            return Ok(Ok(signal));
        }
        let started = Instant::now();
        let served = match address {
            Some(address) => self.fetch(address, hash).await,
            None => None,
        };
        let way = if served.is_some() { "served" } else { "stored" };
        let found = match (served, address) {
            (Some(bytes), _) => Some(bytes),
            (None, None) => read_object(self.bus.as_ref(), hash).await?,
            (None, Some(_)) => match read_object(self.bus.as_ref(), hash).await? {
                Some(bytes) => Some(bytes),
                None => self.later_attempt(&task.job_id).await?,
            },
        };
        let Some(bytes) = found else {
            return match address {
                Some(_) => Ok(Err(Absent::Later)),
                None => failed(EngineError::Missing(format!("the control signal {hash} is not in the object store"))),
            };
        };
        metrics::histogram!("efferent_hand_signal_seconds", "way" => way).record(started.elapsed().as_secs_f64());
        match ControlSignal::decode(bytes) {
            Ok(signal) => {
                let signal = Arc::new(signal);
                self.kept.insert(hash.clone(), signal.clone());
                Ok(Ok(signal))
            }
            Err(error) => internal(format!("the stored control signal cannot be decoded: {error}")),
        }
    }

    /// What a later attempt at the job's brain task stored: on another machine the values may differ in their last bits, and so does the hash.
    async fn later_attempt(&self, job_id: &str) -> efferent_bus::Result<Option<Bytes>> {
        let key = names::job_signal_key(job_id);
        let Some(entry) = self.bus.get(Bucket::Signals, &key).await? else { return Ok(None) };
        let known: SharedSignal = ledger::decode(&entry.value, "signal", &key)?;
        read_object(self.bus.as_ref(), &known.stored).await
    }

    /// From the brain; `None` if that does not work, whatever the reason: the store is asked next.
    async fn fetch(&self, address: &str, hash: &str) -> Option<Bytes> {
        if self.unreachable.contains_key(address) {
            return None;
        }
        match tokio::time::timeout(ARRIVE, self.try_fetch(address, hash)).await {
            Ok(Ok(bytes)) if blake3::hash(&bytes).to_hex().as_str() == hash => return Some(bytes),
            Ok(Ok(_)) => tracing::warn!(address, hash, "a brain sent other bytes than those of the control signal"),
            // It lives, and has forgotten the signal.
            Ok(Err(status)) if status.code() == tonic::Code::NotFound => return None,
            Ok(Err(status)) => {
                tracing::info!(
                    address,
                    status = status.message(),
                    "a brain cannot be reached for its control signal; the object store is asked"
                );
            }
            Err(_) => tracing::info!(address, "a control signal did not arrive in time; the object store is asked"),
        }
        self.brains.invalidate(address);
        self.unreachable.insert(address.to_owned(), ());
        None
    }

    async fn try_fetch(&self, address: &str, hash: &str) -> Result<Bytes, tonic::Status> {
        let channel = match self.brains.get(address) {
            Some(channel) => channel,
            None => {
                let endpoint = Endpoint::from_shared(format!("http://{address}"))
                    .map_err(|error| tonic::Status::invalid_argument(error.to_string()))?
                    .connect_timeout(CONNECT)
                    .tcp_nodelay(true)
                    .initial_stream_window_size(WINDOW)
                    .initial_connection_window_size(WINDOW);
                let connected = endpoint.connect().await;
                let channel = connected.map_err(|error| tonic::Status::unavailable(error.to_string()))?;
                self.brains.insert(address.to_owned(), channel.clone());
                channel
            }
        };
        let request = FetchRequest { hash: hash.to_owned() };
        let mut chunks = SignalTransferClient::new(channel).fetch(request).await?.into_inner();
        let Some(first) = chunks.message().await? else { return Ok(Bytes::new()) };
        let mut whole = BytesMut::from(first.data);
        while let Some(chunk) = chunks.message().await? {
            if whole.len() + chunk.data.len() > MAX_OBJECT {
                return Err(tonic::Status::out_of_range(format!("the signal is longer than {MAX_OBJECT} bytes")));
            }
            whole.extend_from_slice(&chunk.data);
        }
        Ok(whole.freeze())
    }
}

#[cfg(test)]
mod tests {
    use efferent_bus::embedded::Embedded;
    use efferent_proto::internal::{ControlStream, ServedSignal};

    use super::*;

    fn signal(byte: u8) -> ControlSignal {
        let values = Bytes::from(vec![byte; 4096]);
        ControlSignal { streams: vec![ControlStream { values, ..Default::default() }], ..Default::default() }
    }

    fn task(signal: hand_task::Signal) -> HandTask {
        HandTask { job_id: "JOB".to_owned(), signal: Some(signal), ..Default::default() }
    }

    /// A task whose signal the brain at this address serves.
    fn served(signal: &ControlSignal, address: &str) -> HandTask {
        let hash = blake3::hash(&signal.encode_to_vec()).to_hex().to_string();
        task(hand_task::Signal::Served(ServedSignal { hash, address: address.to_owned() }))
    }

    /// An address with a port that was free a moment ago: nobody listens.
    fn deserted() -> String {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().to_string()
    }

    async fn bus() -> (SharedBus, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let bus: SharedBus = Arc::new(Embedded::open(folder.path()).await.unwrap());
        (bus, folder)
    }

    #[tokio::test]
    async fn a_dead_brain_s_signal_comes_from_the_store_or_from_another_brain() {
        let (bus, _folder) = bus().await;
        let signals = Signals::new(bus.clone());
        let (first, second) = (signal(1), signal(2));
        let address = deserted();
        let task = served(&first, &address);
        assert!(matches!(signals.of(&task).await.unwrap(), Err(Absent::Later)), "it may come yet");
        assert!(signals.unreachable.contains_key(&address), "it is not asked at every task");
        // Another machine's brain, whose values differ in their last bits.
        let stored = bus.put_object(second.encode_to_vec().into(), None).await.unwrap();
        let known = SharedSignal { stored, worker_id: String::new() };
        bus.put(Bucket::Signals, &names::job_signal_key("JOB"), ledger::encode(&known), None).await.unwrap();
        assert_eq!(*signals.of(&task).await.unwrap().unwrap(), second);
        // What the task names is preferred, where it is.
        bus.put_object(first.encode_to_vec().into(), None).await.unwrap();
        assert_eq!(*Signals::new(bus).of(&task).await.unwrap().unwrap(), first);
    }

    #[tokio::test]
    async fn what_is_not_there_yet_is_waited_for() {
        let (bus, _folder) = bus().await;
        let signals = Signals { pause: Duration::from_millis(5), ..Signals::new(bus.clone()) };
        let (first, never, address) = (signal(1), std::future::pending, deserted());
        let task = served(&first, &address);
        let (found, ()) = tokio::join!(signals.wait(&task, never()), async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            bus.put_object(first.encode_to_vec().into(), None).await.unwrap();
        });
        assert_eq!(*found.unwrap().unwrap().unwrap(), first);
        let absent = served(&signal(2), &address);
        let stop = tokio::time::sleep(Duration::from_millis(50));
        assert!(signals.wait(&absent, stop).await.unwrap().is_none());
        let _all = signals.waiting.acquire_many(WAITING as u32).await.unwrap();
        assert!(signals.wait(&absent, never()).await.unwrap().is_none(), "no more may wait");
    }

    #[tokio::test]
    async fn what_is_nowhere_fails_by_its_hash() {
        let (bus, _folder) = bus().await;
        let hash = "ab".repeat(32);
        let nowhere = Signals::new(bus).of(&task(hand_task::Signal::Stored(hash.clone()))).await.unwrap();
        let Err(Absent::Failed(error)) = nowhere else { panic!("{nowhere:?}") };
        assert!(error.to_string().contains(&hash), "{error}");
    }
}
