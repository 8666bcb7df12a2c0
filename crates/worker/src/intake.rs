//! Pulling tasks from the lanes of a queue: interactive work first, batch work when none of that waits.

use std::time::Duration;

use efferent_bus::{Delivery, SharedBus};

/// How long an idle worker waits for interactive work before it looks at the batch lane again.
const IDLE_WAIT: Duration = Duration::from_millis(250);
/// How long a worker rests after the bus failed it.
const FAULT_WAIT: Duration = Duration::from_secs(1);

/// The lanes of one queue, in the order in which they are served.
#[derive(Debug, Clone)]
pub struct Intake {
    bus: SharedBus,
    lanes: Vec<String>,
}

impl Intake {
    /// Queues to pull from, most urgent first.
    pub fn new(bus: SharedBus, lanes: Vec<String>) -> Self {
        Self { bus, lanes }
    }

    /// What waits now, up to `max`, of the most urgent lane that has any.
    ///
    /// # Errors
    /// If the bus is unavailable.
    pub async fn ready(&self, max: usize) -> efferent_bus::Result<Vec<Delivery>> {
        for lane in &self.lanes {
            let deliveries = self.bus.pull(lane, max, Duration::ZERO).await?;
            if !deliveries.is_empty() {
                return Ok(deliveries);
            }
        }
        Ok(Vec::new())
    }

    /// Up to `max` tasks, waiting a short while if there are none; empty after that, so that the caller can look whether it should stop.
    /// Not to be dropped half-way: a task that is on its way to us would wait for its lease to end.
    pub async fn next(&self, max: usize) -> Vec<Delivery> {
        let pulled = match self.ready(max).await {
            Ok(deliveries) if deliveries.is_empty() => match self.lanes.first() {
                Some(lane) => self.bus.pull(lane, max, IDLE_WAIT).await,
                None => Ok(deliveries),
            },
            other => other,
        };
        match pulled {
            Ok(deliveries) => deliveries,
            Err(error) => {
                tracing::warn!(%error, "cannot pull tasks");
                tokio::time::sleep(FAULT_WAIT).await;
                Vec::new()
            }
        }
    }
}
