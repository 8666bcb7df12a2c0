//! What a worker's work takes, as it measures it itself: what coordinators estimate waiting times from.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use efferent_proto::v1::StageTime;

/// How much what was measured last counts against what was measured before.
const NEW: f64 = 0.5;

/// Counts time at work and work done.
#[derive(Debug)]
pub struct StageClock(Mutex<Counts>);

#[derive(Debug)]
struct Counts {
    working: u32,
    since: Instant,
    /// Time at work since the units below are counted, and since the worker last told.
    busy: Duration,
    busy_told: Duration,
    told_at: Instant,
    units: f64,
    /// Of all units, from beginning to end.
    unit_seconds: f64,
    time: Option<StageTime>,
}

impl Counts {
    /// Adds the time at work up to now.
    fn pass(&mut self, now: Instant) {
        if self.working > 0 {
            let passed = now.saturating_duration_since(self.since);
            self.busy += passed;
            self.busy_told += passed;
        }
        self.since = now;
    }
}

impl Default for StageClock {
    fn default() -> Self {
        let now = Instant::now();
        Self(Mutex::new(Counts {
            working: 0,
            since: now,
            busy: Duration::ZERO,
            busy_told: Duration::ZERO,
            told_at: now,
            units: 0.0,
            unit_seconds: 0.0,
            time: None,
        }))
    }
}

impl StageClock {
    fn with<T>(&self, change: impl FnOnce(&mut Counts) -> T) -> T {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Work begins.
    pub fn begin(&self, now: Instant) {
        self.with(|counts| {
            counts.pass(now);
            counts.working += 1;
        });
    }

    /// Work ends.
    pub fn end(&self, now: Instant) {
        self.with(|counts| {
            counts.pass(now);
            counts.working = counts.working.saturating_sub(1);
        });
    }

    /// So many units were done, together, in this time.
    pub fn done(&self, units: f64, elapsed: Duration) {
        self.with(|counts| {
            counts.units += units;
            counts.unit_seconds += elapsed.as_secs_f64();
        });
    }

    /// What work took lately; `None` before any was done.
    pub fn tell(&self, now: Instant) -> Option<StageTime> {
        self.with(|counts| {
            counts.pass(now);
            if counts.units > 0.0 {
                let mut measured = StageTime {
                    seconds_per_unit: counts.unit_seconds / counts.units,
                    busy_seconds_per_unit: counts.busy.as_secs_f64() / counts.units,
                    utilisation: 0.0,
                };
                if let Some(before) = counts.time {
                    let mix = |old: f64, new: f64| old + NEW * (new - old);
                    measured.seconds_per_unit = mix(before.seconds_per_unit, measured.seconds_per_unit);
                    measured.busy_seconds_per_unit = mix(before.busy_seconds_per_unit, measured.busy_seconds_per_unit);
                }
                counts.time = Some(measured);
                (counts.units, counts.unit_seconds, counts.busy) = (0.0, 0.0, Duration::ZERO);
            }
            let passed = now.saturating_duration_since(counts.told_at).as_secs_f64();
            let utilisation = (counts.busy_told.as_secs_f64() / passed.max(1e-9)).min(1.0);
            (counts.told_at, counts.busy_told) = (now, Duration::ZERO);
            if let Some(time) = &mut counts.time {
                time.utilisation = utilisation;
            }
            counts.time
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_side_by_side_costs_less_of_the_worker_than_it_takes() {
        let clock = StageClock::default();
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        assert_eq!(clock.tell(at(0)), None);
        // Two images of 10 units in the same four seconds, then two seconds of nothing.
        clock.begin(at(0));
        clock.begin(at(0));
        for _ in 0..2 {
            clock.done(10.0, Duration::from_secs(4));
            clock.end(at(4));
        }
        let time = clock.tell(at(6)).expect("work was done");
        assert!((time.seconds_per_unit - 0.4).abs() < 1e-9, "{time:?}");
        assert!((time.busy_seconds_per_unit - 0.2).abs() < 1e-3, "{time:?}");
        assert!((time.utilisation - 4.0 / 6.0).abs() < 1e-2, "{time:?}");
        // One that is still worked on is counted when it is done.
        clock.begin(at(6));
        assert!((clock.tell(at(10)).expect("as before").busy_seconds_per_unit - 0.2).abs() < 1e-3);
        clock.done(10.0, Duration::from_secs(8));
        clock.end(at(14));
        let time = clock.tell(at(14)).expect("work was done");
        assert!((time.busy_seconds_per_unit - (0.2 + 0.8) / 2.0).abs() < 1e-3, "half old, half new: {time:?}");
        assert!((time.utilisation - 1.0).abs() < 1e-9);
    }
}
