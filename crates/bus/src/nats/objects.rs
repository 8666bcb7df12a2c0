//! Objects as messages, one a chunk.

use std::time::{Duration, SystemTime};

use async_nats::{
    header::NATS_MESSAGE_TTL,
    jetstream::{
        message::{PublishMessage, StreamMessage},
        stream::{DirectGetErrorKind, LastRawMessageErrorKind, Stream},
    },
};
use bytes::Bytes;

use super::{Nats, is_outdated};
use crate::{Error, Result};

pub(super) const CHUNK: usize = 900 * 1024;
/// Chunks on their way at once.
pub(super) const WINDOW: usize = 8;
/// The header that says of how many chunks the object is.
pub(super) const CHUNKS: &str = "Efferent-Chunks";
/// How often a chunk is tried that others are storing too, and the pause while the other's is on its way.
const TRIES: u32 = 50;
const PAUSE: Duration = Duration::from_millis(20);

impl Nats {
    /// Stores a chunk that is to stay until then, or for ever. One that is there and stays as long is left as it is: of two who store the same, neither
    /// shortens the other's time.
    pub(super) async fn store_chunk(
        &self,
        subject: String,
        chunk: PublishMessage,
        until: Option<SystemTime>,
    ) -> Result<()> {
        // Most are new: the first try goes without asking.
        let mut known = 0;
        for _ in 0..TRIES {
            let message = chunk.clone().expected_last_subject_sequence(known).outbound_message(subject.clone());
            match self.send(message).await {
                Ok(_) => return Ok(()),
                Err(error) if is_outdated(&error) => {}
                Err(error) => return Err(Error::unavailable("storing an object", error)),
            }
            let there = leaders(&self.objects, &subject).await?;
            if there.as_ref().is_some_and(|there| stays(there, until)) {
                return Ok(());
            }
            let sequence = there.map_or(0, |there| there.sequence);
            if sequence == known {
                tokio::time::sleep(PAUSE).await;
            }
            known = sequence;
        }
        Err(Error::Unavailable { what: "storing an object that others store again and again".to_owned(), source: None })
    }
}

/// Whether a message stays until then; `None` is for ever.
fn stays(message: &StreamMessage, until: Option<SystemTime>) -> bool {
    let ttl = message.headers.get(NATS_MESSAGE_TTL).and_then(|seconds| seconds.as_str().parse().ok());
    let expiry = ttl.and_then(|ttl| SystemTime::from(message.time).checked_add(Duration::from_secs(ttl)));
    expiry.is_none_or(|expiry| until.is_some_and(|until| until <= expiry))
}

/// A chunk, and of how many its object is.
pub(super) async fn get_chunk(objects: &Stream, subject: &str) -> Result<Option<(Bytes, usize)>> {
    let parts = |message: StreamMessage| {
        let chunks = message.headers.get(CHUNKS).and_then(|value| value.as_str().parse().ok()).unwrap_or(1);
        (message.payload, chunks)
    };
    match objects.direct_get_last_for_subject(subject).await {
        Ok(message) => Ok(Some(parts(message))),
        Err(error) if error.kind() == DirectGetErrorKind::NotFound => match objects.cached_info().config.num_replicas {
            0 | 1 => Ok(None),
            // That copy may be behind.
            _ => Ok(leaders(objects, subject).await?.map(parts)),
        },
        Err(error) => Err(Error::unavailable("reading an object", error)),
    }
}

/// A chunk's message as the leader has it.
async fn leaders(objects: &Stream, subject: &str) -> Result<Option<StreamMessage>> {
    match objects.get_last_raw_message_by_subject(subject).await {
        Ok(message) => Ok(Some(message)),
        Err(error) if error.kind() == LastRawMessageErrorKind::NoMessageFound => Ok(None),
        Err(error) => Err(Error::unavailable("reading an object", error)),
    }
}
