//! What the brains of a cluster know of prompts between them: one computes a control signal, the others take it from the store.
//!
//! All of it may fail or be missing: then the signal is computed here. So nothing waits for the store longer than computing would take.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use efferent_bus::{Bucket, SharedBus, ledger, read_object};
use efferent_proto::{
    internal::{ControlSignal, SharedSignal},
    names,
};
use prost::Message as _;

/// A forward pass that takes less than this is not worth asking the store for: that takes a millisecond or two.
const WORTHWHILE: Duration = Duration::from_millis(5);
/// How long another brain is waited for, beyond three times what a pass takes here.
const PATIENCE: Duration = Duration::from_millis(500);
/// What a pass is taken to be as long as none was timed.
const GUESS: Duration = Duration::from_secs(1);
/// How often it is asked whether another brain is done.
const POLL: Duration = Duration::from_millis(5);
/// After which time a brain that said it would compute a signal is not believed any more.
const CLAIM: Duration = Duration::from_secs(60);

/// The store, from one brain's point of view.
#[derive(Debug, Clone)]
pub struct Shared {
    bus: SharedBus,
    worker_id: String,
    keep: Duration,
    /// Microseconds of the latest pass.
    pass: Arc<AtomicU64>,
}

/// What the store says of a prompt.
#[derive(Debug)]
pub enum Found {
    /// Its signal.
    Signal(Box<ControlSignal>),
    /// Another brain computes it, or another batch of this one.
    Elsewhere,
    /// Nothing: it is for this brain to compute, and the others have been told.
    Nothing,
}

impl Shared {
    /// The store on this bus; signals stay there for `keep` after they were computed.
    pub fn new(bus: SharedBus, worker_id: String, keep: Duration) -> Self {
        let this = Self { bus, worker_id, keep, pass: Arc::default() };
        this.timed(GUESS);
        this
    }

    /// Notes what a pass took.
    pub fn timed(&self, pass: Duration) {
        self.pass.store(u64::try_from(pass.as_micros()).unwrap_or(u64::MAX), Relaxed);
    }

    fn pass(&self) -> Duration {
        Duration::from_micros(self.pass.load(Relaxed))
    }

    /// Whether asking the store is quicker than computing.
    pub fn is_worthwhile(&self) -> bool {
        self.pass() >= WORTHWHILE
    }

    /// Looks for a prompt's signal, and says that this brain computes it if there is none.
    pub async fn find(&self, key: &blake3::Hash) -> Found {
        let name = names::shared_signal_key(&key.to_hex());
        let claim = SharedSignal { stored: String::new(), worker_id: self.worker_id.clone() };
        let found = match self.bus.create(Bucket::Signals, &name, ledger::encode(&claim), Some(CLAIM)).await {
            Ok(None) => self.read(&name).await,
            Ok(Some(_)) => Ok(Found::Nothing),
            Err(error) => Err(error),
        };
        found.unwrap_or_else(|error| {
            tracing::debug!(%error, "cannot ask the store for a control signal; it is computed here");
            Found::Nothing
        })
    }

    async fn read(&self, name: &str) -> efferent_bus::Result<Found> {
        let Some(entry) = self.bus.get(Bucket::Signals, name).await? else { return Ok(Found::Nothing) };
        let known: SharedSignal = ledger::decode(&entry.value, "signal", name)?;
        if known.stored.is_empty() {
            return Ok(Found::Elsewhere);
        }
        // Without its values it is as good as not there.
        let Some(bytes) = read_object(self.bus.as_ref(), &known.stored).await? else { return Ok(Found::Nothing) };
        Ok(ControlSignal::decode(bytes).map_or(Found::Nothing, |signal| Found::Signal(Box::new(signal))))
    }

    /// Waits for another brain, for about as long as it should take. `None` if it is not done by then.
    pub async fn wait(&self, key: &blake3::Hash) -> Option<ControlSignal> {
        let name = names::shared_signal_key(&key.to_hex());
        let until = Instant::now() + PATIENCE + self.pass().min(CLAIM / 4) * 3;
        let mut pause = POLL;
        while Instant::now() < until {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(POLL * 8);
            match self.read(&name).await {
                Ok(Found::Signal(signal)) => return Some(*signal),
                Ok(Found::Elsewhere) => {}
                Ok(Found::Nothing) | Err(_) => return None,
            }
        }
        None
    }

    /// Tells the others of a signal that was computed here.
    pub async fn tell(&self, key: blake3::Hash, signal: Arc<ControlSignal>) {
        let name = names::shared_signal_key(&key.to_hex());
        let told = async {
            let stored = self.bus.put_object(Bytes::from(signal.encode_to_vec()), Some(self.keep)).await?;
            let known = SharedSignal { stored, worker_id: self.worker_id.clone() };
            // The values outlive the word of them, so that who has read it finds them.
            let keep = self.keep.mul_f64(0.9);
            self.bus.put(Bucket::Signals, &name, ledger::encode(&known), Some(keep)).await
        };
        if let Err(error) = told.await {
            tracing::debug!(%error, "cannot share a control signal");
        }
    }

    /// Lets the others know that this brain could not compute what it said it would.
    pub async fn give_up(&self, key: &blake3::Hash) {
        let _ = self.bus.delete(Bucket::Signals, &names::shared_signal_key(&key.to_hex())).await;
    }
}
