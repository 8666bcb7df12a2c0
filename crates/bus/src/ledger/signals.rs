//! Control signals that are kept for callers, and the tasks that render them.

use std::{collections::BTreeMap, time::Duration};

use efferent_proto::{
    internal::{HandTask, JobRecord, hand_task},
    names, time,
    v1::Signal,
    work,
};

use super::{Ledger, decode, encode, job_id, transition};
use crate::{Bucket, NewTask, Result};

impl Ledger {
    /// A control signal that is kept, by its id.
    pub async fn signal(&self, signal_id: &str) -> Result<Option<Signal>> {
        let key = names::kept_signal_key(signal_id);
        self.bus.get(Bucket::Signals, &key).await?.map(|entry| decode(&entry.value, "signal", &key)).transpose()
    }

    /// Keeps what is known of a control signal, whose values are an object under its id, for `keep` from now; or longer, if it is kept longer already.
    pub async fn keep_signal(&self, signal: Signal, keep: Duration) -> Result<()> {
        let now = self.now();
        let until = now + keep;
        let standing = self.signal(&signal.signal_id).await?;
        if standing.and_then(|standing| standing.expires_at).is_some_and(|at| time::system_time(&at) >= until) {
            return Ok(());
        }
        let key = names::kept_signal_key(&signal.signal_id);
        let signal =
            Signal { created_at: Some(time::timestamp(now)), expires_at: Some(time::timestamp(until)), ..signal };
        self.bus.put(Bucket::Signals, &key, encode(&signal), Some(keep)).await.map(drop)
    }

    /// Forgets a control signal. Its values stay as long as they were put for: jobs may be about to render them.
    pub async fn forget_signal(&self, signal_id: &str) -> Result<()> {
        self.bus.delete(Bucket::Signals, &names::kept_signal_key(signal_id)).await
    }

    /// The hand's tasks for a job's images that are not recorded yet.
    pub fn hand_tasks(
        &self,
        record: &JobRecord,
        signal: &hand_task::Signal,
        headers: &BTreeMap<String, String>,
    ) -> Vec<NewTask> {
        let Some(job) = &record.job else { return Vec::new() };
        let request = job.request.clone().unwrap_or_default();
        let recorded: Vec<u32> = transition::images(record).map(|image| image.image_index).collect();
        let known = self.known(job_id(record));
        let images = (0..request.image_count().max(1)).filter(|index| !recorded.contains(index));
        let task = |image_index| HandTask {
            job_id: job.job_id.clone(),
            image_index,
            seed: work::image_seed(&request, image_index),
            request: Some(request.clone()),
            model: record.model.clone(),
            expires_at_ms: job.expires_at.as_ref().map_or(0, |at| time::unix_ms(time::system_time(at))),
            signal: Some(signal.clone()),
            known: known.clone(),
        };
        // A job that was taken back for want of room may be made again under its id, and the queue must not take its tasks for those that were dropped.
        let made = job.created_at.as_ref().map_or(0, |at| time::unix_ms(time::system_time(at)));
        let new = |image_index| NewTask {
            key: format!("{}.{made}", names::image_key(&job.job_id, image_index)),
            job: job.job_id.clone(),
            headers: headers.clone(),
            payload: encode(&task(image_index)),
        };
        images.map(new).collect()
    }
}
