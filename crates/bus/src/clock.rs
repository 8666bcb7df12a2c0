//! The time that all who share a bus go by.
//!
//! Deadlines are moments that one process states and others keep, on machines whose clocks differ, and jump when they are set. So a process asks the bus what
//! time it is now and then, and counts on from there by a clock that nobody sets.

use std::{
    sync::{
        LazyLock,
        atomic::{AtomicI64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// Time since some moment before this process. Never set; the time that the machine sleeps counts.
#[cfg(any(target_os = "linux", target_os = "android"))]
fn steady() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::new(now.tv_sec.try_into().unwrap_or(0), now.tv_nsec.try_into().unwrap_or(0))
}

/// Time since the first call. Never set; the time that the machine sleeps may be left out.
#[cfg(not(any(target_os = "linux", target_os = "android")))]
fn steady() -> Duration {
    static FIRST: LazyLock<std::time::Instant> = LazyLock::new(std::time::Instant::now);
    FIRST.elapsed()
}

fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

/// A clock that is set by the bus and by nothing else.
#[derive(Debug)]
pub(crate) struct Clock {
    /// What to add to the steady clock, in microseconds.
    offset: AtomicI64,
}

impl Clock {
    /// As this machine's clock shows now.
    pub(crate) fn of_machine() -> Self {
        let clock = Self { offset: AtomicI64::new(0) };
        clock.set(steady(), SystemTime::now());
        clock
    }

    /// The clock of this process: what the machine's clock showed when it was first asked, and the time since then.
    pub(crate) fn of_process() -> &'static Self {
        static CLOCK: LazyLock<Clock> = LazyLock::new(Clock::of_machine);
        &CLOCK
    }

    /// A moment to [`set`](Self::set) the clock by.
    pub(crate) fn moment() -> Duration {
        steady()
    }

    /// It was `time` at `moment`. Returns by how much that puts the clock forward, or back if negative, in microseconds.
    pub(crate) fn set(&self, moment: Duration, time: SystemTime) -> i64 {
        let offset = micros(time.duration_since(UNIX_EPOCH).unwrap_or_default()).saturating_sub(micros(moment));
        offset.saturating_sub(self.offset.swap(offset, Ordering::Relaxed))
    }

    pub(crate) fn now(&self) -> SystemTime {
        let now = micros(steady()).saturating_add(self.offset.load(Ordering::Relaxed));
        UNIX_EPOCH + Duration::from_micros(now.try_into().unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_counts_on_from_what_it_was_set_to() {
        let clock = Clock::of_machine();
        let hour = Duration::from_secs(3600);
        let moment = Clock::moment();
        let moved = clock.set(moment, SystemTime::now() - hour);
        assert!((moved + 3_600_000_000).abs() < 10_000_000, "it went back by {moved} us");
        let behind = SystemTime::now().duration_since(clock.now()).expect("it is behind");
        assert!(behind.abs_diff(hour) < Duration::from_secs(10), "{behind:?}");
        let before = clock.now();
        std::thread::sleep(Duration::from_millis(5));
        assert!(clock.now() >= before + Duration::from_millis(5));
    }
}
