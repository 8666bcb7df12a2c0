//! How long a step takes by shape and batch size, and so how many samples are best advanced together.
//!
//! Measured on the steps that are taken anyway, so that nobody waits for a measurement: the first steps of a shape are of one sample, then of
//! twice as many for as long as that gives more samples per second. What is known of the same model on the same device is read from a file,
//! and written to it.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::{Path, PathBuf},
};

use efferent_proto::v1::Model;
use efferent_worker::engine::BatchKey;
use serde::{Deserialize, Serialize};

/// How often a batch size is measured; the quickest step counts, as whatever else the machine does only makes steps slower.
const MEASUREMENTS: u32 = 3;
/// How many times as many samples per second a larger batch must give: less may be chance, and would keep samples waiting for nothing.
const GAIN: f64 = 1.03;

/// Times of steps.
#[derive(Debug, Clone, Default)]
pub struct Profile {
    shapes: BTreeMap<String, BTreeMap<usize, Measured>>,
    file: Option<(PathBuf, File)>,
}

#[derive(Debug, Clone, Copy)]
struct Measured {
    seconds: f64,
    count: u32,
}

/// A profile as a file.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    model: String,
    revision: String,
    device: String,
    /// Seconds of a step, by shape and batch size.
    step_seconds: BTreeMap<String, BTreeMap<usize, f64>>,
}

impl File {
    fn is_of(&self, other: &Self) -> bool {
        (&self.model, &self.revision, &self.device) == (&other.model, &other.revision, &other.device)
    }
}

/// How large batches of a shape should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Advice {
    /// The size that gives the most samples per second of those that are measured.
    pub best: usize,
    /// A size that may give more, and is not measured.
    pub untried: Option<usize>,
}

impl Profile {
    /// A profile with times that are known, in seconds by batch size.
    #[must_use]
    pub fn with(mut self, shape: &str, times: &[(usize, f64)]) -> Self {
        let known = |&(size, seconds): &(usize, f64)| (size, Measured { seconds, count: MEASUREMENTS });
        self.shapes.insert(shape.to_owned(), times.iter().map(known).collect());
        self
    }

    /// What a file tells of a model on a device, and keeps what is measured in that file. A file that is missing, cannot be read or tells
    /// of something else counts as empty.
    pub fn at(path: &Path, model: &Model, device: &str) -> Self {
        let (name, revision) = (model.name.clone(), model.revision.clone());
        let ours = File { model: name, revision, device: device.to_owned(), step_seconds: BTreeMap::new() };
        let mut this = Self::default();
        match read(path) {
            Ok(Some(file)) if file.is_of(&ours) => {
                for (shape, times) in &file.step_seconds {
                    let times: Vec<_> = times.iter().map(|(size, seconds)| (*size, *seconds)).collect();
                    if times.iter().all(|(size, seconds)| *size > 0 && *seconds > 0.0 && seconds.is_finite()) {
                        this = this.with(shape, &times);
                    }
                }
                tracing::info!(path = %path.display(), shapes = this.shapes.len(), "profile read");
            }
            Ok(Some(file)) => {
                let (model, device) = (file.model, file.device);
                tracing::warn!(path = %path.display(), model, device, "the profile is of something else; not used");
            }
            Ok(None) => {}
            Err(error) => tracing::warn!(path = %path.display(), %error, "the profile cannot be read; not used"),
        }
        this.file = Some((path.to_owned(), ours));
        this
    }

    /// How large batches of a shape should be, at most `most`.
    pub fn advice(&self, shape: &BatchKey, most: usize) -> Advice {
        let times = self.shapes.get(&shape.0);
        let measured = |size: usize| times?.get(&size).filter(|time| time.count >= MEASUREMENTS);
        let known = times.into_iter().flatten().filter(|(size, time)| **size <= most && time.count >= MEASUREMENTS);
        let sizes: BTreeSet<usize> = tried(most).chain(known.map(|(size, _)| *size)).collect();
        let (mut best, mut rate, mut grows) = (1, 0.0, true);
        for size in sizes {
            match measured(size).map(|time| size as f64 / time.seconds) {
                Some(found) => {
                    grows = found > rate * GAIN;
                    if grows {
                        (best, rate) = (size, found);
                    }
                }
                None if grows => return Advice { best, untried: Some(size) },
                None => {}
            }
        }
        Advice { best, untried: None }
    }

    /// How many of `waiting` samples of a shape to advance together, at most `most`.
    pub fn batch(&self, shape: &BatchKey, waiting: usize, most: usize) -> usize {
        let Advice { best, untried } = self.advice(shape, most);
        untried.filter(|size| *size <= waiting).unwrap_or_else(|| best.min(waiting))
    }

    /// Takes note of a step of `size` samples, if there is something to learn from it.
    pub fn record(&mut self, shape: &BatchKey, size: usize, seconds: f64, most: usize) {
        let Advice { untried: Some(untried), .. } = self.advice(shape, most) else { return };
        if !tried(most).any(|tried| tried == size) {
            return;
        }
        let time =
            self.shapes.entry(shape.0.clone()).or_default().entry(size).or_insert(Measured { seconds, count: 0 });
        time.seconds = time.seconds.min(seconds.max(f64::MIN_POSITIVE));
        time.count += 1;
        if untried != size || time.count < MEASUREMENTS {
            return;
        }
        let advice = self.advice(shape, most);
        tracing::info!(
            shape = shape.0,
            size,
            step_ms = self.milliseconds(shape, size),
            best = advice.best,
            "step measured"
        );
        metrics::gauge!("efferent_hand_best_batch_size", "shape" => shape.0.clone()).set(advice.best as f64);
        self.write();
    }

    fn milliseconds(&self, shape: &BatchKey, size: usize) -> f64 {
        let time = self.shapes.get(&shape.0).and_then(|times| times.get(&size));
        time.map_or(0.0, |time| (time.seconds * 1e6).round() / 1e3)
    }

    fn write(&self) {
        let Some((path, file)) = &self.file else { return };
        let settled = |times: &BTreeMap<usize, Measured>| {
            let measured = times.iter().filter(|(_, time)| time.count >= MEASUREMENTS);
            measured.map(|(size, time)| (*size, time.seconds)).collect()
        };
        let step_seconds = self.shapes.iter().map(|(shape, times)| (shape.clone(), settled(times))).collect();
        if let Err(error) = replace(path, &File { step_seconds, ..file.clone() }) {
            tracing::warn!(path = %path.display(), %error, "the profile cannot be written");
        }
    }
}

/// The sizes that are measured: each twice the one before, and the largest.
fn tried(most: usize) -> impl Iterator<Item = usize> {
    let doublings = std::iter::successors(Some(1), |size| usize::checked_mul(*size, 2));
    doublings.take_while(move |size| *size < most).chain([most.max(1)])
}

fn read(path: &Path) -> io::Result<Option<File>> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Readers see the old file or the new one.
fn replace(path: &Path, file: &File) -> io::Result<()> {
    let new = path.with_extension(format!("{}.new", std::process::id()));
    std::fs::write(&new, serde_json::to_vec_pretty(file)?)?;
    std::fs::rename(&new, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOST: usize = 8;

    fn shape() -> BatchKey {
        BatchKey("square".to_owned())
    }

    /// Steps with as many samples as the profile wants of `waiting`, whose time is `cost`; the sizes in order.
    fn run(profile: &mut Profile, waiting: usize, steps: usize, cost: impl Fn(usize) -> f64) -> Vec<usize> {
        let step = |_| {
            let size = profile.batch(&shape(), waiting, MOST);
            profile.record(&shape(), size, cost(size), MOST);
            size
        };
        (0..steps).map(step).collect()
    }

    #[test]
    fn a_batch_grows_while_that_gives_more_samples_per_second() {
        for (name, cost, best) in [
            ("flat", (|_| 1.0) as fn(usize) -> f64, 8),
            ("in proportion", |size| size as f64, 1),
            ("a gain of 2 %", |size| size as f64 * if size > 1 { 0.98 } else { 1.0 }, 1),
            ("an H200 at 512 pixels", |size| [1.0, 1.1, 1.444, 2.85][size.ilog2() as usize], 4),
        ] {
            let mut profile = Profile::default();
            let sizes = run(&mut profile, 20, 20, cost);
            assert_eq!(sizes[..3], [1, 1, 1], "{name}");
            assert_eq!(sizes[19], best, "{name}: {sizes:?}");
            assert!(sizes.iter().all(|size| *size <= 2 * best), "{name}: {sizes:?}");
            assert_eq!(profile.advice(&shape(), MOST), Advice { best, untried: None }, "{name}");
            assert_eq!(run(&mut profile, 1, 1, cost), [1], "{name}");
        }
    }

    #[test]
    fn what_has_no_mates_is_not_held_up_to_be_measured() {
        let mut profile = Profile::default();
        assert_eq!(run(&mut profile, 1, 9, |_| 1.0), [1; 9]);
        // Three at once: two are tried, four cannot be.
        assert_eq!(run(&mut profile, 3, 5, |_| 1.0), [2, 2, 2, 2, 2]);
        assert_eq!(profile.advice(&shape(), MOST), Advice { best: 2, untried: Some(4) });
    }

    #[test]
    fn one_slow_step_does_not_count() {
        let mut profile = Profile::default();
        let slow = std::cell::Cell::new(true);
        run(&mut profile, 8, 12, |_| if slow.take() { 50.0 } else { 1.0 });
        assert_eq!(profile.advice(&shape(), MOST).best, 8);
    }

    #[test]
    fn a_file_keeps_what_was_measured_for_the_same_model_and_device() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("profile.json");
        let model = Model { name: "m".to_owned(), revision: "1".to_owned(), ..Default::default() };
        let mut profile = Profile::at(&path, &model, "cpu");
        run(&mut profile, 8, 20, |size| size as f64);
        let settled = Advice { best: 1, untried: None };
        assert_eq!(Profile::at(&path, &model, "cpu").advice(&shape(), MOST), settled);
        let unknown = Advice { best: 1, untried: Some(1) };
        assert_eq!(Profile::at(&path, &model, "cuda:0").advice(&shape(), MOST), unknown);
        let newer = Model { revision: "2".to_owned(), ..model.clone() };
        assert_eq!(Profile::at(&path, &newer, "cpu").advice(&shape(), MOST), unknown);
        std::fs::write(&path, "{").unwrap();
        assert_eq!(Profile::at(&path, &model, "cpu").advice(&shape(), MOST), unknown);
    }
}
