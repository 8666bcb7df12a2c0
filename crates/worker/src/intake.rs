//! Pulling tasks from the lanes of a queue: interactive work first, batch work when none of that waits ([`Intake`]); or each lane by itself
//! ([`pull`]), for who can begin interactive work while batch work has all places.

use std::time::{Duration, Instant};

use efferent_bus::{Delivery, SharedBus};

/// How long a worker waits for work in vain before it looks again (at other lanes, or whether it should stop): at first, and at most, twice as
/// long each time. A thousand that looked four times a second would keep the queue's server busy with nothing.
pub const IDLE_WAIT: Duration = Duration::from_millis(250);
const MOST_IDLE_WAIT: Duration = Duration::from_secs(2);
/// How long lanes that were empty are not looked at again while interactive work comes.
const QUIET: Duration = Duration::from_millis(20);
/// How long a worker rests after the bus failed it.
const FAULT_WAIT: Duration = Duration::from_secs(1);

/// The lanes of one queue, in the order in which they are served.
#[derive(Debug)]
pub struct Intake {
    bus: SharedBus,
    lanes: Vec<String>,
    /// Until when only the first lane is looked at.
    quiet_until: Instant,
    /// How long to wait for work the next time that there is none.
    idle_wait: Duration,
    /// The first lane was waited on just now, in vain.
    first_is_empty: bool,
}

impl Intake {
    /// Queues to pull from, most urgent first.
    pub fn new(bus: SharedBus, lanes: Vec<String>) -> Self {
        Self { bus, lanes, quiet_until: Instant::now(), idle_wait: IDLE_WAIT, first_is_empty: false }
    }

    /// What waits now, up to `max`, of the most urgent lane that has any.
    ///
    /// # Errors
    /// If the bus is unavailable.
    pub async fn ready(&mut self, max: usize) -> efferent_bus::Result<Vec<Delivery>> {
        let known_empty = usize::from(std::mem::take(&mut self.first_is_empty));
        for lane in self.lanes.iter().skip(known_empty) {
            let deliveries = self.bus.pull(lane, max, Duration::ZERO).await?;
            if !deliveries.is_empty() {
                return Ok(deliveries);
            }
        }
        self.quiet_until = Instant::now() + QUIET;
        Ok(Vec::new())
    }

    /// Up to `max` tasks, waiting a short while if there are none; empty after that, so that the caller can look whether it should stop.
    /// Not to be dropped half-way: a task that is on its way to us would wait for its lease to end.
    pub async fn next(&mut self, max: usize) -> Vec<Delivery> {
        let pulled = self.pull(max).await;
        if let Ok(deliveries) = &pulled {
            self.idle_wait = next_wait(self.idle_wait, !deliveries.is_empty());
        }
        or_rest(pulled).await
    }

    async fn pull(&mut self, max: usize) -> efferent_bus::Result<Vec<Delivery>> {
        let Some(first) = self.lanes.first().cloned() else { return Ok(Vec::new()) };
        let quiet = self.quiet_until.saturating_duration_since(Instant::now());
        if !quiet.is_zero() {
            let deliveries = self.bus.pull(&first, max, quiet).await?;
            if !deliveries.is_empty() {
                return Ok(deliveries);
            }
        }
        let deliveries = self.ready(max).await?;
        if !deliveries.is_empty() {
            return Ok(deliveries);
        }
        let deliveries = self.bus.pull(&first, max, self.idle_wait).await?;
        self.first_is_empty = deliveries.is_empty();
        Ok(deliveries)
    }
}

/// How long to wait next, after one wait that found work or did not.
pub fn next_wait(wait: Duration, found: bool) -> Duration {
    if found { IDLE_WAIT } else { (wait * 2).min(MOST_IDLE_WAIT) }
}

/// Up to `max` tasks of one lane, waiting up to `wait` for the first. Not to be dropped half-way, as [`Intake::next`].
pub async fn pull(bus: &SharedBus, lane: &str, max: usize, wait: Duration) -> Vec<Delivery> {
    or_rest(bus.pull(lane, max, wait).await).await
}

/// What was pulled; nothing, after a rest, if the bus failed.
async fn or_rest(pulled: efferent_bus::Result<Vec<Delivery>>) -> Vec<Delivery> {
    match pulled {
        Ok(deliveries) => deliveries,
        Err(error) => {
            tracing::warn!(%error, "cannot pull tasks");
            tokio::time::sleep(FAULT_WAIT).await;
            Vec::new()
        }
    }
}
