//! Names of queues, buckets and event subjects: the one place that spells them.

use crate::v1::Lane;

/// On whose account is done what is on nobody's.
pub const DEFAULT_TENANT: &str = "default";

/// Tasks of a brain wait here, in a lane.
pub fn brain_queue(brain: &str, lane: Lane) -> String {
    format!("brain.{brain}.{}", lane_name(lane))
}

/// Tasks of a hand wait here, in a lane.
pub fn hand_queue(hand: &str, lane: Lane) -> String {
    format!("hand.{hand}.{}", lane_name(lane))
}

/// Lanes in the order in which workers serve them.
pub const LANES: [Lane; 2] = [Lane::Interactive, Lane::Batch];

/// `interactive` or `batch`.
pub fn lane_name(lane: Lane) -> &'static str {
    match lane {
        Lane::Unspecified | Lane::Interactive => "interactive",
        Lane::Batch => "batch",
    }
}

/// All that is told of one job: [`job_stored`] and [`job_passing`].
pub fn job_events(job_id: &str) -> String {
    format!("events.job.{job_id}.*")
}

/// A job's record each time that it is stored, told by the bus itself: the value, an encoded `JobRecord`.
pub fn job_stored(job_id: &str) -> String {
    format!("events.job.{job_id}.{STORED}")
}

/// The last part of [`job_stored`].
pub const STORED: &str = "stored";

/// What is told of a job and not kept: encoded `JobEvents`.
pub fn job_passing(job_id: &str) -> String {
    format!("events.job.{job_id}.passing")
}

/// Whether this is the subject of a stored record.
pub fn is_stored_job(subject: &str) -> bool {
    subject.strip_suffix(STORED).is_some_and(|rest| rest.ends_with('.'))
}

/// Cancellation of one job; workers listen to [`ANY_CANCEL`]. The payload is empty.
pub fn job_cancel(job_id: &str) -> String {
    format!("events.cancel.{job_id}")
}

/// Cancellations of all jobs.
pub const ANY_CANCEL: &str = "events.cancel.*";

/// The job id in a cancellation's subject.
pub fn cancelled_job(subject: &str) -> Option<&str> {
    subject.strip_prefix("events.cancel.")
}

/// True for a name of a model, brain or hand: 1 to 64 of `a-z`, `0-9`, `-`, `_`, so that it can be part of a queue's name.
pub fn is_name(text: &str) -> bool {
    (1..=64).contains(&text.len()) && text.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_'))
}

/// True for a job id: a ULID, 26 characters.
pub fn is_job_id(text: &str) -> bool {
    text.len() == 26 && ulid::Ulid::from_string(text).is_ok()
}

/// True for the id of a control signal, which is its hash.
pub fn is_signal_id(text: &str) -> bool {
    is_hash(text)
}

/// True for the hash of a file: BLAKE3, 64 hex digits.
pub fn is_hash(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// Key in bucket `signals` of a control signal that is kept for callers.
pub fn kept_signal_key(signal_id: &str) -> String {
    format!("kept.{signal_id}")
}

/// Key in bucket `signals` of what the brains of a cluster know of a prompt, by its hash.
pub fn shared_signal_key(prompt_hash: &str) -> String {
    format!("shared.{prompt_hash}")
}

/// Key in bucket `signals` of the signal that a later attempt at a job's brain task stored: that of the first may never have been.
pub fn job_signal_key(job_id: &str) -> String {
    format!("job.{job_id}")
}

/// A new job id. Sorts by time of creation.
pub fn new_job_id() -> String {
    ulid::Ulid::new().to_string()
}

/// The job id that belongs to `digest` within a batch: the same each time, with the batch's time.
pub fn derived_job_id(batch_id: &str, digest: [u8; 16]) -> String {
    let time = ulid::Ulid::from_string(batch_id).map_or(0, |id| id.timestamp_ms());
    ulid::Ulid::from_parts(time, u128::from_be_bytes(digest)).to_string()
}

/// That jobs of a batch have ended: encoded `JobEnded`.
pub fn batch_ends(batch_id: &str) -> String {
    format!("events.ended.{batch_id}")
}

/// [`batch_ends`] of every batch.
pub const ANY_BATCH_END: &str = "events.ended.*";

/// That a batch was made or cancelled. The payload is empty.
pub const BATCHES: &str = "events.batches";

/// Key of a batch's chunk in bucket `chunks`.
pub fn chunk_key(batch_id: &str, chunk: u64) -> String {
    format!("{batch_id}.{chunk}")
}

/// Key of the task that renders an image.
pub fn image_key(job_id: &str, image_index: u32) -> String {
    format!("{job_id}.{image_index}")
}
