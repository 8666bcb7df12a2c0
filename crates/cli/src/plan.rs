//! `efferent plan`: how to split GPUs between brains and hands.

use std::time::Duration;

use serde::Serialize;
use serde_json::json;

use crate::{
    args,
    exit::{Exit, Failure},
    output,
};

/// A split, and what it brings. Every brain and every hand has a GPU of its own.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Split {
    pub(crate) brains: u64,
    pub(crate) hands: u64,
    pub(crate) images_per_second: f64,
    pub(crate) brain_utilisation: f64,
    pub(crate) hand_utilisation: f64,
}

impl Split {
    /// What so many brains and hands bring, the slower stage setting the pace.
    fn of(brains: u64, hands: u64, brain_time: f64, hand_time: f64) -> Self {
        let (conditioned, rendered) = (brains as f64 / brain_time, hands as f64 / hand_time);
        let images_per_second = conditioned.min(rendered);
        Self {
            brains,
            hands,
            images_per_second,
            brain_utilisation: images_per_second / conditioned,
            hand_utilisation: images_per_second / rendered,
        }
    }

    /// The split with the highest throughput; of equals the one with more hands. `None` if there are not GPUs for one of each, or a time
    /// is zero.
    pub(crate) fn best(gpus: u64, brain_time: Duration, hand_time: Duration) -> Option<Self> {
        let (brain_time, hand_time) = (brain_time.as_secs_f64(), hand_time.as_secs_f64());
        if gpus < 2 || brain_time <= 0.0 || hand_time <= 0.0 {
            return None;
        }
        // Throughput rises with the brains up to where both stages are equally quick, and falls after it: the best is beside that point.
        let equal = (gpus as f64 * brain_time / (brain_time + hand_time)) as u64;
        let beside = [equal, equal + 1].map(|brains| brains.clamp(1, gpus - 1));
        let [fewer, more] = beside.map(|brains| Self::of(brains, gpus - brains, brain_time, hand_time));
        Some(if more.images_per_second > fewer.images_per_second { more } else { fewer })
    }
}

/// Prints the best split.
///
/// # Errors
/// If there is none.
pub(crate) fn run(args: &args::Plan) -> Result<(), Failure> {
    let split = Split::best(args.gpus, args.brain_time, args.hand_time).ok_or_else(|| {
        Failure::words(Exit::Usage, "a plan needs at least 2 GPUs and times above 0 for brain and hand")
    })?;
    if args.json {
        return output::line(json!(split));
    }
    let stage = |name: &str, count: u64, time: Duration, utilisation: f64| {
        vec![
            name.to_owned(),
            count.to_string(),
            humantime::format_duration(time).to_string(),
            format!("{:.2}", count as f64 / time.as_secs_f64()),
            format!("{:.1} %", utilisation * 100.0),
        ]
    };
    let heading = ["STAGE", "GPUS", "TIME", "IMAGES/S", "BUSY"].map(str::to_owned).to_vec();
    let rows = [
        heading,
        stage("brain", split.brains, args.brain_time, split.brain_utilisation),
        stage("hand", split.hands, args.hand_time, split.hand_utilisation),
    ];
    output::line(output::table(&rows))?;
    output::line(format_args!("{:.2} images/s", split.images_per_second))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn best(gpus: u64, brain_ms: u64, hand_ms: u64) -> Split {
        Split::best(gpus, Duration::from_millis(brain_ms), Duration::from_millis(hand_ms)).unwrap()
    }

    #[test]
    fn eight_hundred_gpus_are_21_brains_and_779_hands() {
        let split = best(800, 400, 15_000);
        assert_eq!((split.brains, split.hands), (21, 779));
        assert!((split.images_per_second - 51.93).abs() < 0.01, "{split:?}");
        assert!((split.hand_utilisation - 1.0).abs() < 1e-9 && (split.brain_utilisation - 0.989).abs() < 0.001);
    }

    #[test]
    fn no_other_split_is_better() {
        for (gpus, brain, hand) in [(2, 5, 500), (3, 400, 400), (7, 900, 100), (100, 1, 100_000), (64, 333, 4444)] {
            let split = best(gpus, brain, hand);
            assert_eq!(split.brains + split.hands, gpus);
            for brains in 1..gpus {
                let other = Split::of(brains, gpus - brains, brain as f64 / 1000.0, hand as f64 / 1000.0);
                assert!(other.images_per_second <= split.images_per_second + 1e-9, "{split:?} {other:?}");
            }
        }
    }

    #[test]
    fn what_cannot_be_split_is_refused() {
        let second = Duration::from_secs(1);
        assert_eq!(Split::best(1, second, second), None);
        assert_eq!(Split::best(8, Duration::ZERO, second), None);
        assert_eq!(Split::best(8, second, Duration::ZERO), None);
    }
}
