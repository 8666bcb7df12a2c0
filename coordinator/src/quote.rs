//! When a request would be done: from what workers measured, and what waits before it. The estimate itself is pure.

use std::time::Duration;

use efferent_proto::{
    ApiError, names, time,
    v1::{ErrorCode, GenerateRequest, Model, Quotation, StageTime, Worker, WorkerRole},
    work,
};

use crate::{directory::Directory, images::unavailable};

/// Seconds of a unit of a hand's work where nothing was measured. Only good to compare requests with one another.
const GUESS: f64 = 1.0;
/// A request is refused only if it would take this many times the time it has: estimates are not exact.
const DOUBT: f64 = 1.25;

/// The live workers of one stage of a model.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Stage {
    /// How many.
    pub workers: usize,
    /// Tasks that they take at once, all together.
    pub capacity: usize,
    /// Tasks that they hold.
    pub in_flight: u32,
    /// What work takes, on average over those that have measured it.
    pub time: Option<StageTime>,
}

impl Stage {
    /// The stage that these workers are.
    pub fn of<'a>(workers: impl Iterator<Item = &'a Worker>) -> Self {
        let (mut stage, mut measured, mut sum) = (Self::default(), 0.0, StageTime::default());
        for worker in workers {
            stage.workers += 1;
            stage.capacity += worker.capacity as usize;
            stage.in_flight += worker.in_flight;
            if let Some(time) = worker.time {
                measured += 1.0;
                sum.seconds_per_unit += time.seconds_per_unit;
                sum.busy_seconds_per_unit += time.busy_seconds_per_unit;
                sum.utilisation += time.utilisation;
            }
        }
        stage.time = (measured > 0.0).then(|| StageTime {
            seconds_per_unit: sum.seconds_per_unit / measured,
            busy_seconds_per_unit: sum.busy_seconds_per_unit / measured,
            utilisation: sum.utilisation / measured,
        });
        stage
    }

    /// Seconds of a worker for a unit.
    pub fn busy(&self) -> f64 {
        self.time.map_or(GUESS, |time| time.busy_seconds_per_unit)
    }
}

/// What is before a request.
#[derive(Debug, Clone, Copy, Default)]
pub struct Ahead {
    /// Requests at the brain; one that it reads is half done, on average.
    pub requests: f64,
    /// Images that no hand has begun, those of the requests at the brain included.
    pub waiting: f64,
    /// Images that hands have begun.
    pub begun: f64,
    /// Units of an image.
    pub units: f64,
}

/// The estimate for a request of so many images of so many units each.
pub fn estimate(brain: Stage, hand: Stage, ahead: Ahead, images: f64, units: f64) -> Quotation {
    let brain_time = brain.time.unwrap_or_default();
    let workers = |stage: Stage| stage.workers.max(1) as f64;
    let brain_backlog = ahead.requests * brain_time.busy_seconds_per_unit / workers(brain);
    // Seconds in which the hands, all together, end one image.
    let pace = ahead.units * hand.busy() / workers(hand);
    let hand_backlog = (ahead.waiting + ahead.begun / 2.0) * pace;
    // It begins when there is room for it: at once, or when so many have ended, the first of which are half done.
    let beyond = ahead.waiting + ahead.begun - hand.capacity as f64;
    let room = if beyond < 0.0 { 0.0 } else { (beyond + 0.5) * pace };
    // The brain works off its queue while the hands work off theirs.
    let start = (brain_backlog + brain_time.seconds_per_unit).max(room);
    let hand_seconds = images * units * hand.busy();
    // One image at its own speed; many at that of all hands.
    let alone = units * hand.time.map_or(GUESS, |time| time.seconds_per_unit);
    let rounds = (images / hand.capacity.max(1) as f64).ceil();
    let finish = start + (alone * rounds).max(hand_seconds / workers(hand));
    let seconds = |value: f64| Some(time::proto_duration(Duration::try_from_secs_f64(value).unwrap_or(Duration::MAX)));
    Quotation {
        start_in: seconds(start),
        finish_in: seconds(finish),
        brain_backlog_seconds: brain_backlog,
        hand_backlog_seconds: hand_backlog,
        hand_seconds,
        measured: hand.time.is_some() && brain.time.is_some(),
    }
}

/// The estimate for a request that has every default filled in, were it accepted now.
///
/// # Errors
/// If the bus is unavailable.
pub async fn quote(directory: &Directory, request: &GenerateRequest, model: &Model) -> Result<Quotation, ApiError> {
    // A model's first request may be this one, and only a queue that was declared can be asked.
    directory.declare(model).await.map_err(unavailable)?;
    let (mut brain, hand) = (directory.stage(WorkerRole::Brain, model), directory.stage(WorkerRole::Hand, model));
    if !request.signal_id.is_empty() {
        // It passes by the brain.
        brain.time = Some(StageTime::default());
    }
    // Batch work waits for interactive work, and not the other way round.
    let lanes = names::LANES.iter().copied().take_while(|lane| *lane != request.lane()).chain([request.lane()]);
    let (images, units) = directory.usual(&model.hand);
    let mut ahead = Ahead { units, ..Ahead::default() };
    for lane in lanes {
        let depth = async |queue: String| directory.bus().depth(&queue).await.map_err(unavailable);
        let (at_brain, at_hand) = tokio::try_join!(
            depth(names::brain_queue(&model.brain, lane)),
            depth(names::hand_queue(&model.hand, lane))
        )?;
        ahead.requests += at_brain.ready as f64 + at_brain.leased as f64 / 2.0;
        ahead.waiting += at_hand.ready as f64 + (at_brain.ready + at_brain.leased) as f64 * images;
        ahead.begun += at_hand.leased as f64;
    }
    let each = work::image_units(&request.size.unwrap_or_default(), work::steps(request));
    Ok(estimate(brain, hand, ahead, f64::from(request.image_count()), each))
}

/// Refuses a request whose deadline could not be met.
///
/// # Errors
/// With the estimate, and after how long it could be tried again.
pub fn check_deadline(quotation: &Quotation, deadline: Duration) -> Result<(), ApiError> {
    let finish = quotation.finish_in.as_ref().and_then(time::duration).unwrap_or_default();
    if !quotation.measured || finish.as_secs_f64() <= deadline.as_secs_f64() * DOUBT {
        return Ok(());
    }
    let (finish_seconds, deadline_seconds) = (finish.as_secs_f64(), deadline.as_secs_f64());
    let message = format!("it would take about {finish_seconds:.1} s; the deadline is {deadline_seconds:.1} s");
    Err(ApiError::new(ErrorCode::DeadlineUnmeetable, message)
        .field("deadline")
        .limit(format!("{finish_seconds:.1}s"))
        .retry_after(finish.saturating_sub(deadline).max(Duration::from_secs(1))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stage(workers: usize, capacity: usize, seconds: f64, busy: f64) -> Stage {
        let time = StageTime { seconds_per_unit: seconds, busy_seconds_per_unit: busy, utilisation: 1.0 };
        Stage { workers, capacity, time: Some(time), ..Stage::default() }
    }

    fn seconds(duration: Option<prost_types::Duration>) -> f64 {
        duration.as_ref().and_then(time::duration).expect("is told").as_secs_f64()
    }

    #[test]
    fn an_idle_cluster_takes_the_stages_times() {
        let quotation = estimate(stage(1, 64, 0.4, 0.1), stage(2, 2, 1.0, 1.0), Ahead::default(), 1.0, 15.0);
        assert!((seconds(quotation.start_in) - 0.4).abs() < 1e-6);
        assert!((seconds(quotation.finish_in) - 15.4).abs() < 1e-6);
        // Three images on two hands take two rounds.
        let three = estimate(stage(1, 64, 0.4, 0.1), stage(2, 2, 1.0, 1.0), Ahead::default(), 3.0, 15.0);
        assert!((seconds(three.finish_in) - 30.4).abs() < 1e-6);
    }

    #[test]
    fn what_waits_is_worked_off_by_all_workers() {
        // 16 are begun, for which there is room; the 60 that wait end one each 5 / 4 s.
        let ahead = Ahead { requests: 10.0, waiting: 60.0, begun: 16.0, units: 10.0 };
        let quotation = estimate(stage(2, 64, 0.4, 0.1), stage(4, 16, 2.0, 0.5), ahead, 1.0, 10.0);
        assert!((quotation.brain_backlog_seconds - 0.5).abs() < 1e-9);
        assert!((quotation.hand_backlog_seconds - 68.0 * 1.25).abs() < 1e-9);
        assert!((seconds(quotation.start_in) - 60.5 * 1.25).abs() < 1e-6);
        assert!((seconds(quotation.finish_in) - 60.5 * 1.25 - 20.0).abs() < 1e-6);
        assert!((quotation.hand_seconds - 5.0).abs() < 1e-9);
    }

    #[test]
    fn where_there_is_room_nothing_is_waited_for() {
        let of = |begun| {
            let ahead = Ahead { begun, units: 10.0, ..Ahead::default() };
            seconds(estimate(stage(1, 64, 0.0, 0.0), stage(4, 4, 1.0, 1.0), ahead, 1.0, 10.0).start_in)
        };
        assert!(of(3.0).abs() < 1e-6);
        // The first of four that are half done, on average, is done after an eighth of the time of one.
        assert!((of(4.0) - 1.25).abs() < 1e-6);
    }

    #[test]
    fn a_deadline_is_refused_only_on_measurements_and_beyond_doubt() {
        let known = estimate(stage(1, 1, 0.0, 0.0), stage(1, 1, 1.0, 1.0), Ahead::default(), 1.0, 10.0);
        assert!(check_deadline(&known, Duration::from_secs(9)).is_ok());
        let refused = check_deadline(&known, Duration::from_secs(6)).unwrap_err();
        assert_eq!((refused.code, refused.limit.as_str()), (ErrorCode::DeadlineUnmeetable, "10.0s"));
        assert_eq!(refused.retry_after, Some(Duration::from_secs(4)));
        let unknown = estimate(Stage::default(), Stage::default(), Ahead::default(), 1.0, 10.0);
        assert!(!unknown.measured && check_deadline(&unknown, Duration::from_secs(1)).is_ok());
    }
}
