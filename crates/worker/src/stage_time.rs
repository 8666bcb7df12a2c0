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

/// When work began, in shares of its worker.
#[derive(Debug, Clone, Copy)]
pub struct Begun(f64);

#[derive(Debug)]
struct Counts {
    working: u32,
    since: Instant,
    /// What a task that was there from the beginning would have had of the worker, in seconds: time at work, shared by those it is spent on.
    share: f64,
    /// Seconds of the worker that the units below took, and time at work since the worker last told.
    busy: f64,
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
            self.share += passed.as_secs_f64() / f64::from(self.working);
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
            share: 0.0,
            busy: 0.0,
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

    /// Work begins. Returns what [`done`](Self::done) wants to know of it.
    pub fn begin(&self, now: Instant) -> Begun {
        self.with(|counts| {
            counts.pass(now);
            counts.working += 1;
            Begun(counts.share)
        })
    }

    /// Work ends.
    pub fn end(&self, now: Instant) {
        self.with(|counts| {
            counts.pass(now);
            counts.working = counts.working.saturating_sub(1);
        });
    }

    /// So many units were done, in this time, by work that began so. What is not done yet, or never will be, counts for nothing.
    pub fn done(&self, begun: Begun, units: f64, elapsed: Duration, now: Instant) {
        self.with(|counts| {
            counts.pass(now);
            counts.busy += counts.share - begun.0;
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
                    busy_seconds_per_unit: counts.busy / counts.units,
                    utilisation: 0.0,
                };
                if let Some(before) = counts.time {
                    let mix = |old: f64, new: f64| old + NEW * (new - old);
                    measured.seconds_per_unit = mix(before.seconds_per_unit, measured.seconds_per_unit);
                    measured.busy_seconds_per_unit = mix(before.busy_seconds_per_unit, measured.busy_seconds_per_unit);
                }
                counts.time = Some(measured);
                (counts.units, counts.unit_seconds, counts.busy) = (0.0, 0.0, 0.0);
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
        let begun = [clock.begin(at(0)), clock.begin(at(0))];
        for begun in begun {
            clock.done(begun, 10.0, Duration::from_secs(4), at(4));
            clock.end(at(4));
        }
        let time = clock.tell(at(6)).expect("work was done");
        assert!((time.seconds_per_unit - 0.4).abs() < 1e-9, "{time:?}");
        assert!((time.busy_seconds_per_unit - 0.2).abs() < 1e-3, "{time:?}");
        assert!((time.utilisation - 4.0 / 6.0).abs() < 1e-2, "{time:?}");
        // One that is still worked on is counted when it is done.
        let begun = clock.begin(at(6));
        assert!((clock.tell(at(10)).expect("as before").busy_seconds_per_unit - 0.2).abs() < 1e-3);
        clock.done(begun, 10.0, Duration::from_secs(8), at(14));
        clock.end(at(14));
        let time = clock.tell(at(14)).expect("work was done");
        assert!((time.busy_seconds_per_unit - (0.2 + 0.8) / 2.0).abs() < 1e-3, "half old, half new: {time:?}");
        assert!((time.utilisation - 1.0).abs() < 1e-9);
    }

    #[test]
    fn what_others_have_had_so_far_is_not_the_cost_of_what_is_done() {
        let clock = StageClock::default();
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        // A short one alone, then a long one that is told of half way and is given up in the end.
        let begun = clock.begin(at(0));
        clock.done(begun, 1.0, Duration::from_secs(1), at(1));
        clock.end(at(1));
        clock.begin(at(1));
        let time = clock.tell(at(16)).expect("work was done");
        assert!((time.busy_seconds_per_unit - 1.0).abs() < 1e-3, "{time:?}");
        clock.end(at(31));
        let begun = clock.begin(at(31));
        clock.done(begun, 1.0, Duration::from_secs(1), at(32));
        clock.end(at(32));
        let time = clock.tell(at(32)).expect("work was done");
        assert!((time.busy_seconds_per_unit - 1.0).abs() < 1e-3, "{time:?}");
    }
}
