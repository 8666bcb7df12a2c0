//! A hand that only pretends: it costs and fails as it is told to, and paints a pattern made of signal and seed.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use efferent_proto::internal::{Branch, StreamRole};
use efferent_worker::{
    engine::{BatchKey, EngineError, EngineSpec, Hand, RenderRequest, Sample},
    signal,
    sim::{self, Clock, Curve, chance, jittered},
    thread::Factory,
};
use image::{Rgb, RgbImage};

/// What work costs, and how often it fails.
#[derive(Debug, Clone, Default)]
pub struct Cost {
    /// For a step, by the size of the batch.
    pub per_step: Curve,
    /// The power of a picture's pixels, relative to the smallest size, that a step's time grows with: 0 for not at all.
    pub pixel_power: f64,
    /// For decoding an image.
    pub per_image: Duration,
    /// Fraction by which each of these is longer or shorter, as the request's seed has it.
    pub jitter: f64,
    /// Share of attempts at an image that fail half-way, and may succeed when tried again.
    pub failures: f64,
    /// Share of attempts at an image over which the engine panics half-way.
    pub crashes: f64,
    /// Share of attempts at an image over which the engine does not come back half-way.
    pub hangs: f64,
    /// Most samples of a batch; 0 counts as 1.
    pub max_batch: usize,
}

#[derive(Debug)]
struct Sim {
    cost: Cost,
    spec: EngineSpec,
    clock: Clock,
    /// Images begun, over all engines of a worker: another attempt at an image has another fate.
    begun: Arc<AtomicU64>,
}

#[derive(Debug, Clone)]
struct State {
    width: u32,
    height: u32,
    seed: u64,
    /// Stands for signal and seed, and for every step since: a step that is left out or taken twice shows in the picture.
    hash: [u8; 32],
    fate: Fate,
}

/// How an attempt at an image ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Picture,
    Failure,
    Crash,
    Hang,
}

/// Builds a simulated hand.
pub fn factory(cost: Cost) -> Factory<dyn Hand> {
    let begun = Arc::new(AtomicU64::new(0));
    Box::new(move || {
        let spec = EngineSpec { model: sim::model(), max_batch: cost.max_batch.max(1), simulated: true };
        Ok(Box::new(Sim { cost: cost.clone(), spec, clock: Clock::default(), begun: begun.clone() }))
    })
}

impl Sim {
    fn fate(&self, seed: u64) -> Fate {
        let drawn = chance(&[seed, self.begun.fetch_add(1, Ordering::Relaxed)]);
        match () {
            () if drawn < self.cost.crashes => Fate::Crash,
            () if drawn < self.cost.crashes + self.cost.failures => Fate::Failure,
            () if drawn < self.cost.crashes + self.cost.failures + self.cost.hangs => Fate::Hang,
            () => Fate::Picture,
        }
    }

    /// What a step of a batch takes, beginning with this sample.
    fn step_time(&self, state: &State, step: u32, batch: usize) -> Duration {
        let pixels = |width: u32, height: u32| f64::from(width) * f64::from(height);
        let smallest = self.spec.model.sizes.iter().map(|size| pixels(size.width, size.height)).reduce(f64::min);
        let growth = (pixels(state.width, state.height) / smallest.unwrap_or(1.0)).powf(self.cost.pixel_power);
        let time = self.cost.per_step.at(batch).mul_f64(growth.clamp(0.0, 1e6));
        jittered(time, self.cost.jitter, chance(&[state.seed, u64::from(step)]))
    }
}

fn state(sample: &Sample) -> Result<&State, EngineError> {
    sample.state.downcast_ref().ok_or_else(foreign)
}

fn foreign() -> EngineError {
    EngineError::Crashed("a sample of another engine".to_owned())
}

fn advance(sample: &mut Sample) -> Result<(), EngineError> {
    let state: &mut State = sample.state.downcast_mut().ok_or_else(foreign)?;
    state.hash = *blake3::hash(&state.hash).as_bytes();
    sample.step += 1;
    Ok(())
}

fn paint(state: &State, step: u32) -> RgbImage {
    RgbImage::from_fn(state.width, state.height, |x, y| {
        let cell = (x * 4 / state.width.max(1) + y * 4 / state.height.max(1) * 4) as usize;
        Rgb([state.hash[cell], state.hash[16 + cell], (step * 8).min(255) as u8])
    })
}

impl Hand for Sim {
    fn spec(&self) -> &EngineSpec {
        &self.spec
    }

    fn begin(&mut self, request: &RenderRequest) -> Result<Sample, EngineError> {
        signal::check_space(&request.signal, &sim::space())?;
        let values = signal::find(&request.signal, StreamRole::Query, Branch::Conditional).map(|s| s.values.clone());
        let mut hasher = blake3::Hasher::new();
        hasher.update(&values.unwrap_or_default());
        hasher.update(&request.seed.to_le_bytes());
        let (width, height) = (request.size.width, request.size.height);
        let (seed, fate) = (request.seed, self.fate(request.seed));
        let state = State { width, height, seed, hash: *hasher.finalize().as_bytes(), fate };
        Ok(Sample { key: BatchKey(format!("{width}x{height}")), step: 0, steps: request.steps, state: Box::new(state) })
    }

    fn step(&mut self, batch: &mut [&mut Sample]) -> Vec<Result<(), EngineError>> {
        let time = match batch.first().map(|first| (state(first), first.step)) {
            Some((Ok(first), step)) => self.step_time(first, step, batch.len()),
            _ => Duration::ZERO,
        };
        self.clock.work(time);
        let advance = |sample: &mut &mut Sample| {
            advance(sample)?;
            let fate = state(sample)?.fate;
            let half_way = sample.step == sample.steps.div_ceil(2);
            assert!(!(half_way && fate == Fate::Crash), "a simulated crash");
            if half_way && fate == Fate::Hang {
                loop {
                    std::thread::park();
                }
            }
            match half_way && fate == Fate::Failure {
                true => Err(EngineError::Compute { what: "a simulated failure".to_owned(), source: None }),
                false => Ok(()),
            }
        };
        batch.iter_mut().map(advance).collect()
    }

    fn preview(&mut self, sample: &Sample) -> Result<RgbImage, EngineError> {
        Ok(paint(state(sample)?, sample.step))
    }

    fn finish(&mut self, sample: Sample) -> Result<RgbImage, EngineError> {
        let state = state(&sample)?;
        self.clock.work(jittered(self.cost.per_image, self.cost.jitter, chance(&[state.seed, u64::MAX])));
        Ok(paint(state, sample.step))
    }

    fn checkpoint(&self, sample: &Sample) -> Result<Bytes, EngineError> {
        Ok([&sample.step.to_le_bytes()[..], &state(sample)?.hash].concat().into())
    }

    fn resume(&mut self, request: &RenderRequest, from: &[u8]) -> Result<Sample, EngineError> {
        let unfit = || EngineError::Crashed("a checkpoint that does not fit".to_owned());
        let mut sample = self.begin(request)?;
        let (step, hash) = from.split_first_chunk::<4>().ok_or_else(unfit)?;
        let State { hash: state, .. } = sample.state.downcast_mut().ok_or_else(foreign)?;
        *state = hash.try_into().map_err(|_| unfit())?;
        sample.step = u32::from_le_bytes(*step);
        if sample.step > sample.steps { Err(unfit()) } else { Ok(sample) }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use efferent_proto::{
        internal::{ControlHeader, ControlSignal},
        v1::Size,
    };

    use super::*;

    fn request(seed: u64) -> RenderRequest {
        let header = ControlHeader { schema_version: 1, space: Some(sim::space()), ..Default::default() };
        RenderRequest {
            signal: Arc::new(ControlSignal { header: Some(header), ..Default::default() }),
            size: Size { width: 32, height: 32 },
            steps: 2 + (seed % 4) as u32,
            guidance_scale: 1.0,
            seed,
            sampler: "euler".to_owned(),
            image_guidance_scale: 1.0,
            guidance_rescale: 0.0,
            guidance_range: 0.0..1.0,
            picture: None,
        }
    }

    #[test]
    fn the_contract_holds() {
        let mut hand = factory(Cost { max_batch: 4, ..Cost::default() })().unwrap();
        efferent_worker::testing::check_hand(hand.as_mut(), &[request(0), request(1), request(2)]);
    }

    #[test]
    fn time_grows_with_batch_and_pixels() {
        let per_step: Curve = "1:100ms,4:144ms".parse().unwrap();
        let begun = Arc::default();
        let spec = EngineSpec { model: sim::model(), max_batch: 4, simulated: true };
        let cost = Cost { per_step, pixel_power: 1.0, ..Cost::default() };
        let hand = Sim { cost, spec, clock: Clock::default(), begun };
        let state = |side| State { width: side, height: side, seed: 1, hash: [0; 32], fate: Fate::Picture };
        assert_eq!(hand.step_time(&state(32), 0, 4), Duration::from_millis(144));
        assert_eq!(hand.step_time(&state(64), 0, 1), Duration::from_millis(400));
    }

    #[test]
    fn attempts_fail_as_often_as_they_are_told_to_and_another_one_may_not() {
        let mut hand = factory(Cost { failures: 0.25, ..Cost::default() })().unwrap();
        let mut failed = |seed: u64| {
            let mut sample = hand.begin(&request(seed)).unwrap();
            (sample.step..sample.steps).any(|_| hand.step(&mut [&mut sample])[0].is_err())
        };
        let failures = (0..400).filter(|_| failed(7)).count();
        assert!((60..140).contains(&failures), "{failures} of 400");
    }

    #[test]
    #[should_panic(expected = "a simulated crash")]
    fn a_crash_is_a_panic() {
        let mut hand = factory(Cost { crashes: 1.0, ..Cost::default() })().unwrap();
        let mut sample = hand.begin(&request(1)).unwrap();
        hand.step(&mut [&mut sample]);
        hand.step(&mut [&mut sample]);
    }
}
