//! Tasks as messages, and leases on them.

use std::{collections::BTreeMap, time::Duration};

use async_nats::{
    HeaderMap,
    jetstream::{self, AckKind},
};
use async_trait::async_trait;
use futures::StreamExt as _;

use super::stranded;
use crate::{Delivery, Error, Lease, Result};

/// Headers of a message: the task's job, and the task's own headers with a prefix.
pub(super) const JOB: &str = "Efferent-Job";
pub(super) const HEADER_PREFIX: &str = "Efferent-Header-";

/// What a pull brought. An error after some tasks came is left to the next pull: those that came are ours to do.
pub(super) async fn collect(
    mut messages: impl futures::Stream<Item = std::result::Result<jetstream::Message, async_nats::Error>> + Unpin,
    queue: &str,
) -> Result<Vec<Delivery>> {
    let mut found = Vec::new();
    while let Some(message) = messages.next().await {
        match message {
            Ok(message) => found.extend(delivery(message, queue)),
            Err(source) if found.is_empty() => {
                return Err(Error::Unavailable { what: format!("pulling from {queue}"), source: Some(source) });
            }
            Err(_) => break,
        }
    }
    Ok(found)
}

fn delivery(message: jetstream::Message, queue: &str) -> Option<Delivery> {
    let info = message.info().ok()?;
    let (attempt, published_at) = (u32::try_from(info.delivered).unwrap_or(u32::MAX), info.published.into());
    let mut headers = BTreeMap::new();
    let (mut key, mut job) = (String::new(), String::new());
    for (name, values) in message.headers.iter().flat_map(HeaderMap::iter) {
        let name: &str = name.as_ref();
        let value = values.first().map(|value| value.as_str().to_owned()).unwrap_or_default();
        if let Some(name) = name.strip_prefix(HEADER_PREFIX) {
            headers.insert(name.to_owned(), value);
        } else if name == JOB {
            job = value;
        } else if name == AsRef::<str>::as_ref(&async_nats::header::NATS_MESSAGE_ID) {
            key = stranded::key_of(&value).to_owned();
        }
    }
    let payload = message.payload.clone();
    let lease = Box::new(NatsLease { message, queue: queue.to_owned(), key: key.clone() });
    Some(Delivery { queue: queue.to_owned(), key, job, headers, payload, attempt, published_at, lease })
}

#[derive(Debug)]
struct NatsLease {
    message: jetstream::Message,
    queue: String,
    key: String,
}

impl NatsLease {
    /// Answers, and waits until the server has taken the answer.
    async fn answer(&self, kind: AckKind) -> Result<()> {
        let what = || format!("answering task {} in {}", self.key, self.queue);
        self.message
            .double_ack_with(kind)
            .await
            .map_err(|source| Error::Unavailable { what: what(), source: Some(source) })
    }
}

#[async_trait]
impl Lease for NatsLease {
    async fn extend(&self) -> Result<()> {
        self.answer(AckKind::Progress).await
    }

    async fn ack(&self) -> Result<()> {
        self.answer(AckKind::Ack).await
    }

    async fn nak(&self, delay: Duration) -> Result<()> {
        self.answer(AckKind::Nak((!delay.is_zero()).then_some(delay))).await
    }

    async fn terminate(&self, reason: &str) -> Result<()> {
        tracing::info!(queue = self.queue, key = self.key, reason, "task terminated");
        self.answer(AckKind::Term).await
    }
}
