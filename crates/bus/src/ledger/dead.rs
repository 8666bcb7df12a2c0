//! Dead letters: one for each job that was given up, by the job's id.

use efferent_proto::{
    internal::JobRecord,
    names, time,
    v1::{DeadLetter, Error, FailureClass},
};

use super::{Ledger, decode, encode};
use crate::{Bucket, Entry, Result};

/// The id of the job that replays a dead one: the same whoever replays it.
pub fn replay_job_id(job_id: &str) -> String {
    let hash = blake3::hash(format!("replay/{job_id}").as_bytes());
    let mut digest = [0; 16];
    digest.copy_from_slice(&hash.as_bytes()[..16]);
    names::derived_job_id(job_id, digest)
}

impl Ledger {
    /// Keeps what there is to know of a job that is given up. If two of its tasks are at once, the first counts.
    pub async fn bury(&self, record: &JobRecord, class: FailureClass, error: Error) -> Result<()> {
        let job = record.job.clone().unwrap_or_default();
        let ended = record.attempts.iter().filter(|attempt| attempt.class() != FailureClass::Unspecified);
        let letter = DeadLetter {
            request: job.request,
            class: class.into(),
            error: Some(error),
            attempts: ended.cloned().collect(),
            time: Some(time::timestamp(self.now())),
            replayed_as: String::new(),
            job_id: job.job_id,
        };
        let value = encode(&letter);
        self.bus.create(Bucket::Dead, &letter.job_id, value, Some(self.options.retention)).await.map(drop)
    }

    /// A dead letter.
    pub async fn letter(&self, job_id: &str) -> Result<Option<DeadLetter>> {
        let entry = self.bus.get(Bucket::Dead, job_id).await?;
        entry.map(|entry| decode(&entry.value, "dead letter", job_id)).transpose()
    }

    /// Every dead letter, the newest first.
    pub async fn letters(&self) -> Result<Vec<DeadLetter>> {
        let entries = self.bus.list(Bucket::Dead).await?;
        let letter = |entry: &Entry| {
            let letter = decode::<DeadLetter>(&entry.value, "dead letter", &entry.key);
            letter.inspect_err(|error| tracing::warn!(%error, "left out")).ok()
        };
        let mut letters: Vec<_> = entries.iter().filter_map(letter).collect();
        letters
            .sort_by_key(|letter| std::cmp::Reverse(letter.time.map_or(0, |at| time::unix_ms(time::system_time(&at)))));
        Ok(letters)
    }

    /// Notes which job a dead letter was replayed as.
    pub async fn note_replay(&self, job_id: &str, replayed_as: &str) -> Result<()> {
        let Some(entry) = self.bus.get(Bucket::Dead, job_id).await? else { return Ok(()) };
        let letter = decode::<DeadLetter>(&entry.value, "dead letter", job_id)?;
        let letter = DeadLetter { replayed_as: replayed_as.to_owned(), ..letter };
        // If another was quicker, it noted the same.
        self.bus
            .swap(Bucket::Dead, job_id, encode(&letter), entry.revision, Some(self.options.retention))
            .await
            .map(drop)
    }

    /// Removes a dead letter; fine if there is none.
    pub async fn drop_letter(&self, job_id: &str) -> Result<()> {
        self.bus.delete(Bucket::Dead, job_id).await
    }
}
