//! How many workers each stage of a model needs: what autoscalers go by.

use std::time::Duration;

use efferent_bus::ledger::Ledger;
use efferent_bus::ledger::batches::is_over;
use efferent_proto::{
    names,
    v1::{Batch, Model, Queue, StageLoad, WorkerRole},
};

use crate::{directory::Directory, quote::Stage};

/// Within this time a backlog should be worked off.
const DRAIN: Duration = Duration::from_secs(60);
/// How much of the time workers should be at work: the rest is for bursts.
const AIM: f64 = 0.85;

/// What a stage has to do and what it has to do it with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Load {
    /// Its live workers.
    pub stage: Stage,
    /// Seconds of one worker that wait or are being worked on.
    pub backlog: f64,
}

impl Load {
    /// Seconds until it is worked off by the workers there are.
    pub fn seconds(&self) -> f64 {
        self.backlog / self.stage.workers.max(1) as f64
    }

    /// As clients see it.
    pub fn told(&self, role: WorkerRole, model: &str) -> StageLoad {
        StageLoad {
            role: role.into(),
            model: model.to_owned(),
            workers: self.stage.workers as u32,
            capacity: self.stage.capacity as u32,
            in_flight: self.stage.in_flight,
            utilisation: self.stage.time.map_or(0.0, |time| time.utilisation),
            backlog_seconds: self.seconds(),
            advised_workers: self.advised(),
        }
    }

    /// How many workers would keep up with what comes and work off what waits. At least one, as long as there is one: a model that nobody
    /// serves is refused at the door.
    pub fn advised(&self) -> u32 {
        let utilisation = self.stage.time.map_or(0.0, |time| time.utilisation);
        let for_arrivals = self.stage.workers as f64 * utilisation / AIM;
        let for_backlog = self.backlog / DRAIN.as_secs_f64();
        for_arrivals.max(for_backlog).ceil().max(1.0).min(f64::from(u32::MAX)) as u32
    }
}

/// The load of a model's brain and hand, by what was measured of the queues and by what waits in batches.
pub fn loads(directory: &Directory, model: &Model, queues: &[Queue], waiting_units: f64) -> [(WorkerRole, Load); 2] {
    let tasks = |name: fn(&str, efferent_proto::v1::Lane) -> String, of: &str| {
        let names = names::LANES.map(|lane| name(of, lane));
        let mine = queues.iter().filter(|queue| names.contains(&queue.name));
        mine.map(|queue| queue.ready as f64 + queue.leased as f64 / 2.0).sum::<f64>()
    };
    let (images, units) = directory.usual(&model.hand);
    let (at_brain, at_hand) = (tasks(names::brain_queue, &model.brain), tasks(names::hand_queue, &model.hand));
    let (brain, hand) = (directory.stage(WorkerRole::Brain, model), directory.stage(WorkerRole::Hand, model));
    // Of items that wait in batches, only the units are known: they become as many requests as are usual for these.
    let waiting_requests = if units > 0.0 { waiting_units / (units * images.max(1.0)) } else { 0.0 };
    let brain_load = (at_brain + waiting_requests) * brain.time.map_or(0.0, |time| time.busy_seconds_per_unit);
    let hand_load = ((at_hand + at_brain * images) * units + waiting_units) * hand.busy();
    [
        (WorkerRole::Brain, Load { stage: brain, backlog: brain_load }),
        (WorkerRole::Hand, Load { stage: hand, backlog: hand_load }),
    ]
}

/// Units that wait in batches and are not in any queue yet, for a model.
///
/// # Errors
/// If the bus is unavailable.
pub async fn waiting_in_batches(ledger: &Ledger) -> efferent_bus::Result<impl Fn(&str) -> f64> {
    let batches = ledger.batches().await?;
    Ok(move |model: &str| {
        let units = batches.iter().map(|(record, _)| {
            let batch = record.batch.as_ref().filter(|batch| !is_over(batch.state()) && batch.item_count > 0);
            let part = batch.map_or(0.0, |batch| waiting(batch) as f64 / batch.item_count as f64);
            record.units.get(model).copied().unwrap_or(0.0) * part
        });
        units.sum()
    })
}

/// Items of a batch that wait in its backlog.
pub fn waiting(batch: &Batch) -> u64 {
    let begun = batch.running + batch.succeeded + batch.failed + batch.cancelled;
    batch.item_count.saturating_sub(begun)
}

#[cfg(test)]
mod tests {
    use efferent_proto::v1::StageTime;

    use super::*;

    fn load(workers: usize, utilisation: f64, backlog: f64) -> Load {
        let time = StageTime { seconds_per_unit: 1.0, busy_seconds_per_unit: 1.0, utilisation };
        Load { stage: Stage { workers, capacity: workers, time: Some(time), ..Stage::default() }, backlog }
    }

    #[test]
    fn advice_follows_arrivals_and_backlog() {
        assert_eq!(load(10, 0.0, 0.0).advised(), 1, "idle");
        assert_eq!(load(10, 0.85, 0.0).advised(), 10, "as busy as they should be");
        assert_eq!(load(10, 1.0, 0.0).advised(), 12, "a little more than they can do");
        assert_eq!(load(2, 1.0, 3000.0).advised(), 50, "a backlog that is to be worked off in a minute");
        assert_eq!(load(2, 1.0, 3000.0).seconds(), 1500.0);
        assert_eq!(Load { stage: Stage::default(), backlog: 0.0 }.advised(), 1, "nobody is there");
    }
}
