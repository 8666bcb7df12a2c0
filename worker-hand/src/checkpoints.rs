//! Checkpoints of long renders, in the object store, with a pointer by job and image: whoever gets the task after a crash or a stop goes on
//! from the last one.
//!
//! All of it is best effort. A checkpoint that is missing, broken, of another request, another model or a newer version is not used, and the
//! image is begun anew. What is kept is removed when the image is settled, or at the latest when its deadline has passed.

use std::time::Duration;

use bytes::Bytes;
use efferent_bus::{Bucket, SharedBus, ledger::encode, read_object};
use efferent_proto::{internal::StoredCheckpoint, names, time};
use prost::Message as _;
use tokio::task::JoinHandle;

use crate::engine_loop::Checkpoint;

/// The form that this version writes and reads.
const SCHEMA_VERSION: u32 = 1;
/// How long a checkpoint is kept at least.
const LEAST_TIME: Duration = Duration::from_secs(60);

/// The checkpoints of one image: there is at most one at a time.
#[derive(Debug)]
pub(crate) struct Checkpoints {
    bus: SharedBus,
    key: String,
    /// Hash of what the image depends on.
    fingerprint: Bytes,
    expires_at_ms: i64,
    /// The object that the pointer names, as far as is known.
    kept: Option<String>,
    storing: Option<JoinHandle<Option<String>>>,
}

impl Checkpoints {
    /// Those of an image. `task` is the encoded task, which names all that the picture depends on, but for the `revision` of the model
    /// that this hand holds.
    pub(crate) fn new(
        bus: &SharedBus,
        (job_id, image_index): (&str, u32),
        task: &[u8],
        revision: &str,
        expires_at_ms: i64,
    ) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(task).update(revision.as_bytes());
        let fingerprint = Bytes::copy_from_slice(hasher.finalize().as_bytes());
        let key = names::image_key(job_id, image_index);
        Self { bus: bus.clone(), key, fingerprint, expires_at_ms, kept: None, storing: None }
    }

    /// What to go on from, if there is anything that fits.
    pub(crate) async fn find(&mut self) -> Option<Bytes> {
        match self.read().await {
            Ok(Ok(stored)) => Some(stored.state),
            Ok(Err("none")) => None,
            Ok(Err(why)) => {
                tracing::warn!(key = self.key, why, "a checkpoint is not used; the image is begun anew");
                None
            }
            Err(error) => {
                tracing::warn!(key = self.key, %error, "a checkpoint cannot be read; the image is begun anew");
                None
            }
        }
    }

    async fn read(&mut self) -> efferent_bus::Result<Result<StoredCheckpoint, &'static str>> {
        let Some(pointer) = self.bus.get(Bucket::Checkpoints, &self.key).await? else { return Ok(Err("none")) };
        let Ok(hash) = String::from_utf8(pointer.value.to_vec()) else { return Ok(Err("its pointer is malformed")) };
        self.kept = Some(hash.clone());
        let Some(bytes) = read_object(self.bus.as_ref(), &hash).await? else { return Ok(Err("it is gone")) };
        let Ok(stored) = StoredCheckpoint::decode(bytes) else { return Ok(Err("it cannot be decoded")) };
        Ok(match &stored {
            stored if stored.schema_version != SCHEMA_VERSION => Err("it is of another version"),
            stored if stored.fingerprint != self.fingerprint => Err("it is of another request or model"),
            _ => Ok(stored),
        })
    }

    /// Stores a checkpoint while the image goes on. If the one before is still on its way, this one is left out.
    pub(crate) async fn store(&mut self, checkpoint: Checkpoint) {
        if self.storing.as_ref().is_some_and(|storing| !storing.is_finished()) {
            return;
        }
        self.wait().await;
        let (bus, key, before) = (self.bus.clone(), self.key.clone(), self.kept.clone());
        let expires = time::from_unix_ms(self.expires_at_ms).duration_since(self.bus.now()).unwrap_or_default();
        let time_to_live = Some(expires.max(LEAST_TIME));
        let step = checkpoint.step;
        let stored = StoredCheckpoint {
            schema_version: SCHEMA_VERSION,
            fingerprint: self.fingerprint.clone(),
            step,
            state: checkpoint.state,
        };
        self.storing = Some(tokio::spawn(async move {
            let hash = bus.put_object(encode(&stored), time_to_live).await;
            let pointed = match &hash {
                Ok(hash) => bus.put(Bucket::Checkpoints, &key, hash.clone().into(), time_to_live).await.map(drop),
                Err(_) => Ok(()),
            };
            match pointed.and(hash) {
                Ok(hash) => {
                    metrics::counter!("efferent_hand_checkpoints_total").increment(1);
                    if let Some(before) = before.filter(|before| *before != hash) {
                        let _ = bus.delete_object(&before).await;
                    }
                    Some(hash)
                }
                Err(error) => {
                    tracing::warn!(key, step, %error, "a checkpoint cannot be stored");
                    None
                }
            }
        }));
    }

    /// Waits until the checkpoint that is on its way is stored.
    pub(crate) async fn wait(&mut self) {
        if let Some(storing) = self.storing.take()
            && let Ok(Some(hash)) = storing.await
        {
            self.kept = Some(hash);
        }
    }

    /// Removes what this process knows to be kept.
    pub(crate) async fn remove(&mut self) {
        self.wait().await;
        let Some(hash) = self.kept.take() else { return };
        let pointer = self.bus.delete(Bucket::Checkpoints, &self.key).await;
        if let Err(error) = pointer.and(self.bus.delete_object(&hash).await) {
            tracing::warn!(key = self.key, %error, "a checkpoint cannot be removed; it runs out by itself");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use efferent_bus::embedded::Embedded;

    use super::*;

    async fn bus() -> (SharedBus, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        (Arc::new(Embedded::open(folder.path()).await.unwrap()), folder)
    }

    fn of(bus: &SharedBus, task: &str, revision: &str) -> Checkpoints {
        Checkpoints::new(bus, ("JOB", 3), task.as_bytes(), revision, time::unix_ms(bus.now()) + 60_000)
    }

    fn checkpoint(step: u32) -> Checkpoint {
        Checkpoint { step, state: Bytes::from(format!("state {step}")) }
    }

    #[tokio::test]
    async fn the_last_checkpoint_is_found_by_the_same_task_and_removed() {
        let (bus, _folder) = bus().await;
        let mut here = of(&bus, "task", "1");
        assert_eq!(here.find().await, None);
        for step in [3, 6] {
            here.store(checkpoint(step)).await;
            here.wait().await;
        }
        let first = here.kept.clone().unwrap();
        assert_eq!(of(&bus, "task", "1").find().await.unwrap(), "state 6");
        assert_eq!(of(&bus, "another task", "1").find().await, None);
        assert_eq!(of(&bus, "task", "2").find().await, None);
        // Another hand goes on, and leaves nothing.
        let mut there = of(&bus, "task", "1");
        there.find().await.unwrap();
        there.store(checkpoint(9)).await;
        there.remove().await;
        assert_eq!(bus.get(Bucket::Checkpoints, "JOB.3").await.unwrap(), None);
        assert!(read_object(bus.as_ref(), &first).await.unwrap().is_none());
        assert_eq!(of(&bus, "task", "1").find().await, None);
    }

    #[tokio::test]
    async fn what_does_not_fit_is_left_aside() {
        let (bus, _folder) = bus().await;
        let ours = of(&bus, "task", "1");
        let good = StoredCheckpoint {
            schema_version: SCHEMA_VERSION,
            fingerprint: ours.fingerprint.clone(),
            step: 1,
            state: Bytes::from_static(b"state"),
        };
        let newer = StoredCheckpoint { schema_version: SCHEMA_VERSION + 1, ..good.clone() };
        for (bytes, fits) in [
            (encode(&good), true),
            (encode(&newer), false),
            (Bytes::from_static(b"\xff\xff\xff"), false),
            (encode(&good).slice(..20), false),
        ] {
            let hash = bus.put_object(bytes, None).await.unwrap();
            bus.put(Bucket::Checkpoints, "JOB.3", hash.into(), None).await.unwrap();
            let mut checkpoints = of(&bus, "task", "1");
            assert_eq!(checkpoints.find().await.is_some(), fits);
            checkpoints.remove().await;
            assert_eq!(bus.get(Bucket::Checkpoints, "JOB.3").await.unwrap(), None, "what is of no use is removed");
        }
        for pointer in [&b"nothing"[..], b"\xff", b""] {
            bus.put(Bucket::Checkpoints, "JOB.3", Bytes::from_static(pointer), None).await.unwrap();
            assert_eq!(of(&bus, "task", "1").find().await, None);
        }
    }
}
