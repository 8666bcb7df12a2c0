//! Tasks that the server would never give out.
//!
//! A nats-server that was killed may come back with tasks that its consumer takes for done: they lie in the stream below the consumer's ack floor, though
//! nobody had them, and count neither as waiting nor as leased. (Seen with nats-server 2.15.1, `sync_interval: always`, killed twice within seconds while tasks were
//! published.) Whoever asks a queue's depth notices. After a while they are published again; what was done after all, its worker finds out.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use async_nats::{
    HeaderMap,
    header::NATS_MESSAGE_ID,
    jetstream::{message::PublishMessage, stream::DirectGetErrorKind},
};

use super::{
    Nats, Queue, fault, is_full,
    tasks::{HEADER_PREFIX, JOB},
};
use crate::{Error, Result};

/// How long tasks lie below the floor before they count as forgotten: a task that was acknowledged just now is still there for a moment.
const PATIENCE: Duration = Duration::from_secs(5);
/// Between a task's key and what sets its new message apart from the old one.
const AGAIN: char = '+';

/// Since when a queue has more tasks than it gives out, and its consumer's floor then.
#[derive(Debug, Default)]
pub(super) struct Watch(Mutex<Option<(Instant, u64)>>);

impl Watch {
    /// Takes down how many tasks are neither waiting nor leased, and where the floor is. The floor below which tasks are forgotten, if some may be.
    pub(super) fn see(&self, missing: u64, floor: u64, now: Instant) -> Option<u64> {
        let mut since = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if missing == 0 {
            *since = None;
            return None;
        }
        let (begun, below) = *since.get_or_insert((now, floor));
        (now.duration_since(begun) >= PATIENCE).then(|| {
            *since = None;
            below
        })
    }
}

/// A task's key, whichever message has it.
pub(super) fn key_of(message_id: &str) -> &str {
    message_id.split(AGAIN).next().unwrap_or(message_id)
}

impl Nats {
    /// Publishes the tasks up to a sequence number again, and removes their old messages. Returns how many there were. Others may do the same at the same
    /// time: of equal messages one is stored.
    pub(super) async fn rescue(&self, name: &str, queue: &Queue, floor: u64) -> Result<u64> {
        let what = || format!("looking for forgotten tasks of {name}");
        let (mut next, mut rescued) = (1, 0);
        loop {
            let message = match queue.stream.direct_get_next_for_subject(self.subject(name, "*"), Some(next)).await {
                Ok(message) if message.sequence <= floor => message,
                Ok(_) => return Ok(rescued),
                Err(error) if error.kind() == DirectGetErrorKind::NotFound => return Ok(rescued),
                Err(error) => return Err(Error::unavailable(what(), error)),
            };
            next = message.sequence + 1;
            let mut headers = HeaderMap::new();
            let mut key = String::new();
            for (name, values) in message.headers.iter() {
                let value = values.first().map(|value| value.as_str()).unwrap_or_default();
                if *name == NATS_MESSAGE_ID {
                    key = value.to_owned();
                } else if AsRef::<str>::as_ref(name) == JOB || AsRef::<str>::as_ref(name).starts_with(HEADER_PREFIX) {
                    headers.insert(name.clone(), value);
                }
            }
            let publish = PublishMessage::build()
                .payload(message.payload.clone())
                .headers(headers)
                .message_id(format!("{}{AGAIN}{}", key_of(&key), message.sequence));
            let sent = async { self.context.send_publish(message.subject.to_string(), publish).await?.await };
            match sent.await {
                Ok(_) => {}
                // They stay where they are until there is room.
                Err(error) if is_full(&error) => return Ok(rescued),
                Err(error) => return Err(Error::unavailable(what(), error)),
            }
            queue.stream.delete_message(message.sequence).await.map_err(fault(what()))?;
            rescued += 1;
            metrics::counter!("efferent_tasks_rescued_total").increment(1);
            tracing::warn!(
                queue = name,
                key = key_of(&key),
                sequence = message.sequence,
                "the server had forgotten a task; it is published again"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_for_a_while_is_forgotten() {
        let (watch, start) = (Watch::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(watch.see(2, 10, at(0)), None);
        assert_eq!(watch.see(1, 14, at(4)), None, "it may be on its way out");
        assert_eq!(watch.see(0, 20, at(6)), None);
        assert_eq!(watch.see(1, 30, at(7)), None, "another one");
        assert_eq!(watch.see(1, 90, at(12)), Some(30), "only what was below the floor then");
        assert_eq!(watch.see(1, 91, at(13)), None);
        assert_eq!(watch.see(1, 99, at(18)), Some(91));
    }

    #[test]
    fn a_key_is_the_same_however_often_its_task_was_published() {
        for id in ["01.0.5", "01.0.5+17", "01.0.5+17+90"] {
            assert_eq!(key_of(id), "01.0.5");
        }
    }
}
