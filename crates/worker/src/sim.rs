//! What simulated brains and hands agree on: the model, and how work takes time. They stand in where a test or a study needs many
//! workers, are named `sim` wherever they show, and are never a default.

use std::{
    fmt::{self, Display},
    str::FromStr,
    thread::sleep,
    time::{Duration, Instant},
};

use efferent_proto::{
    internal::ControlSpace,
    v1::{Model, Size},
};
use serde::{Deserialize, Serialize};

/// The simulated model, its brain and its hand.
pub const NAME: &str = "sim";
/// Channels of a simulated signal.
pub const WIDTH: u32 = 8;
/// Tokens of a simulated signal.
pub const TOKENS: u32 = 2;

/// The space of simulated signals.
pub fn space() -> ControlSpace {
    ControlSpace {
        family: NAME.to_owned(),
        width: WIDTH,
        layers: "hash".to_owned(),
        normalisation: "none".to_owned(),
        revision: String::new(),
    }
}

/// The simulated model as clients see it.
pub fn model() -> Model {
    Model {
        name: NAME.to_owned(),
        description: "Simulated engines: they cost what they are told to, and draw no pictures worth seeing."
            .to_owned(),
        revision: "1".to_owned(),
        brain: NAME.to_owned(),
        hand: NAME.to_owned(),
        brain_family: NAME.to_owned(),
        hand_family: NAME.to_owned(),
        space: crate::signal::space_name(&space()),
        sizes: [64, 32, 256].map(|side| Size { width: side, height: side }).to_vec(),
        samplers: vec!["euler".to_owned()],
        default_steps: 4,
        max_steps: 1000,
        default_guidance_scale: 1.0,
        max_guidance_scale: 20.0,
        max_image_count: 16,
        max_prompt_tokens: 512,
        negative_prompt: true,
        image_to_image: false,
        inpainting: false,
        guidance_rescale: false,
        guidance_range: false,
        inpainting_only: false,
        max_reference_images: 0,
        default_image_guidance_scale: 0.0,
        size_range: None,
        live_brains: 0,
        live_hands: 0,
    }
}

/// How the time of a step grows with the size of its batch: known sizes, and straight lines between them and beyond the last. Written
/// `1:100ms,4:144ms`, or `100ms` if every batch takes the same time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Curve(Vec<(usize, Duration)>);

/// Text that is no curve.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is neither a time (100ms) nor times by rising batch size (1:100ms,4:144ms)")]
pub struct NoCurve(String);

impl Curve {
    /// The time of a batch of this size.
    pub fn at(&self, batch: usize) -> Duration {
        let Some(end) = self.0.iter().position(|(size, _)| *size >= batch) else {
            return match self.0.as_slice() {
                [.., before, last] => between(*before, *last, batch),
                [only] => only.1,
                [] => Duration::ZERO,
            };
        };
        match end {
            0 => self.0[0].1,
            end => between(self.0[end - 1], self.0[end], batch),
        }
    }

    /// The largest batch whose time is known.
    pub fn largest(&self) -> usize {
        self.0.last().map_or(1, |(size, _)| *size)
    }

    /// The time of a part of it, where `parts` of them make the whole.
    #[must_use]
    pub fn split(&self, parts: u32) -> Self {
        Self(self.0.iter().map(|(size, time)| (*size, *time / parts.max(1))).collect())
    }
}

/// On the straight line through two points.
fn between((from, early): (usize, Duration), (to, late): (usize, Duration), batch: usize) -> Duration {
    let share = (batch as f64 - from as f64) / (to as f64 - from as f64);
    let seconds = early.as_secs_f64() + (late.as_secs_f64() - early.as_secs_f64()) * share;
    Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or_default()
}

impl Default for Curve {
    fn default() -> Self {
        Duration::ZERO.into()
    }
}

impl From<Duration> for Curve {
    fn from(time: Duration) -> Self {
        Self(vec![(1, time)])
    }
}

impl FromStr for Curve {
    type Err = NoCurve;

    fn from_str(text: &str) -> Result<Self, NoCurve> {
        let wrong = || NoCurve(text.to_owned());
        if let Ok(time) = humantime::parse_duration(text.trim()) {
            return Ok(time.into());
        }
        let point = |part: &str| {
            let (size, time) = part.split_once(':')?;
            Some((size.trim().parse().ok()?, humantime::parse_duration(time.trim()).ok()?))
        };
        let points = text.split(',').map(point).collect::<Option<Vec<(usize, Duration)>>>().ok_or_else(wrong)?;
        let rises = points[0].0 > 0 && points.windows(2).all(|pair| pair[0].0 < pair[1].0);
        if rises { Ok(Self(points)) } else { Err(wrong()) }
    }
}

impl TryFrom<String> for Curve {
    type Error = NoCurve;

    fn try_from(text: String) -> Result<Self, NoCurve> {
        text.parse()
    }
}

impl Display for Curve {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_slice() {
            [(1, only)] => write!(f, "{}", humantime::format_duration(*only)),
            points => {
                let parts: Vec<_> =
                    points.iter().map(|(size, time)| format!("{size}:{}", humantime::format_duration(*time))).collect();
                f.write_str(&parts.join(","))
            }
        }
    }
}

impl From<Curve> for String {
    fn from(curve: Curve) -> Self {
        curve.to_string()
    }
}

/// A number in 0..1 that depends on these numbers alone.
pub fn chance(numbers: &[u64]) -> f64 {
    let mut hasher = blake3::Hasher::new();
    for number in numbers {
        hasher.update(&number.to_le_bytes());
    }
    let mut first = [0; 8];
    first.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    (u64::from_le_bytes(first) >> 11) as f64 / (1u64 << 53) as f64
}

/// A time made longer or shorter by up to the fraction `jitter` of it, as `chance` (in 0..1) has it. The mean stays.
pub fn jittered(time: Duration, jitter: f64, chance: f64) -> Duration {
    Duration::try_from_secs_f64(time.as_secs_f64() * (1.0 + jitter * (2.0 * chance - 1.0))).unwrap_or_default()
}

/// Passes the time of a simulated engine. It sleeps to a point in time, and what the thread overslept is taken off the next piece
/// of work: the operating system's lateness is not the engine's.
#[derive(Debug, Default)]
pub struct Clock {
    overslept: Duration,
}

/// More than this is not made up for: a machine that is so late is overloaded, and a study must show it.
const MOST_OVERSLEPT: Duration = Duration::from_millis(20);

impl Clock {
    /// Takes this long.
    pub fn work(&mut self, time: Duration) {
        if time.is_zero() {
            return;
        }
        let until = Instant::now() + time.saturating_sub(self.overslept);
        sleep(until.saturating_duration_since(Instant::now()));
        self.overslept = until.elapsed().min(MOST_OVERSLEPT);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_curve_is_read_and_followed() {
        let curve: Curve = "1:100ms, 4:144ms,8:264ms".parse().unwrap();
        let times: Vec<u128> = [1, 2, 4, 6, 8, 10].map(|batch| curve.at(batch).as_micros()).to_vec();
        assert_eq!(times, [100_000, 114_666, 144_000, 204_000, 264_000, 324_000]);
        assert_eq!((curve.largest(), curve.split(2).at(4)), (8, Duration::from_millis(72)));
        assert_eq!(curve.to_string().parse(), Ok(curve));
        let flat: Curve = "1s 500ms".parse().unwrap();
        assert_eq!((flat.at(1), flat.at(9), flat.to_string()), (flat.at(2), flat.at(1), "1s 500ms".to_owned()));
        let late: Curve = "4:144ms".parse().unwrap();
        assert_eq!((late.at(1), late.at(9), late.to_string()), (late.at(4), late.at(4), "4:144ms".to_owned()));
        for bad in ["", "x", "1:", "0:1s", "4:1s,1:2s", "1:1s,1:2s", "1:1s,,"] {
            assert!(bad.parse::<Curve>().is_err(), "{bad}");
        }
    }

    #[test]
    fn chance_is_even_and_jitter_keeps_the_mean() {
        let second = Duration::from_secs(1);
        let times: Vec<f64> = (0..2000).map(|n| jittered(second, 0.5, chance(&[7, n])).as_secs_f64()).collect();
        let mean = times.iter().sum::<f64>() / times.len() as f64;
        assert!((mean - 1.0).abs() < 0.02, "{mean}");
        assert!(times.iter().all(|time| (0.5..1.5).contains(time)));
        assert!(times.iter().any(|time| *time < 0.6) && times.iter().any(|time| *time > 1.4));
        assert_eq!(chance(&[1, 2]).to_bits(), chance(&[1, 2]).to_bits());
    }

    #[test]
    fn lateness_does_not_add_up() {
        let (mut clock, started) = (Clock::default(), Instant::now());
        (0..100).for_each(|_| clock.work(Duration::from_millis(2)));
        let took = started.elapsed();
        assert!(took >= Duration::from_millis(199), "{took:?}");
        // A hundred plain sleeps oversleep by 60 microseconds each on a machine that does nothing else, by far more on a busy one.
        assert!(took < Duration::from_millis(260), "{took:?}");
    }
}
