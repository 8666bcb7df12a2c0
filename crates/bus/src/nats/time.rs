//! What time it is at the server.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use async_nats::jetstream;
use serde::Deserialize;

use super::fault;
use crate::{Error, Result, clock::Clock};

/// How often the server is asked. Two clocks of computers drift apart by far less than a millisecond in that time.
const EVERY: Duration = Duration::from_secs(10);
/// An answer that took longer says too little: the server may have told the time at any moment of it.
const LONGEST: Duration = Duration::from_millis(500);
/// A change that is worth a word: more than the wait for an answer can explain.
const NOTABLE: i64 = 1_000_000;

/// The part of an answer about a stream that says when it was given.
#[derive(Debug, Deserialize)]
struct Stamped {
    ts: String,
}

/// Sets a clock by the server's, and keeps it so as long as it is used.
///
/// # Errors
/// If the server does not tell.
pub(super) async fn follow(context: &jetstream::Context, stream: &str) -> Result<Arc<Clock>> {
    let clock = Arc::new(Clock::of_machine());
    let off = ask(context, stream, &clock, Duration::MAX).await?;
    if off.abs() > NOTABLE {
        tracing::warn!(
            seconds = off / 1_000_000,
            "the server's clock differs from this machine's: the server's counts"
        );
    }
    tokio::spawn(keep(Arc::downgrade(&clock), context.clone(), stream.to_owned()));
    Ok(clock)
}

async fn keep(clock: Weak<Clock>, context: jetstream::Context, stream: String) {
    loop {
        tokio::time::sleep(EVERY).await;
        let Some(clock) = clock.upgrade() else { return };
        match ask(&context, &stream, &clock, LONGEST).await {
            Ok(moved) if moved.abs() > NOTABLE => {
                tracing::warn!(seconds = moved / 1_000_000, "the server's clock was set");
            }
            Ok(_) => {}
            // It goes on from what it was told last.
            Err(error) => tracing::debug!(%error, "asking for the time"),
        }
    }
}

/// Asks the server for the time and sets the clock by it, unless that took longer than `longest`. Returns by how much it was off, in microseconds.
async fn ask(context: &jetstream::Context, stream: &str, clock: &Clock, longest: Duration) -> Result<i64> {
    let asked = Clock::moment();
    let answer: Stamped =
        context.request(format!("STREAM.INFO.{stream}"), &()).await.map_err(fault("asking the server for the time"))?;
    let took = Clock::moment().saturating_sub(asked);
    if took > longest {
        return Ok(0);
    }
    let time = humantime::parse_rfc3339(&answer.ts)
        .map_err(|error| Error::unavailable(format!("reading the server's time {:?}", answer.ts), error))?;
    Ok(clock.set(asked + took / 2, time))
}
