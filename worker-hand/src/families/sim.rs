//! A hand that only pretends: it costs what it is told to, and paints a pattern made of signal and seed.

use std::{thread::sleep, time::Duration};

use bytes::Bytes;
use efferent_proto::internal::{Branch, StreamRole};
use efferent_worker::{
    engine::{BatchKey, EngineError, EngineSpec, Hand, RenderRequest, Sample},
    signal, sim,
    thread::Factory,
};
use image::{Rgb, RgbImage};

/// What work costs.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cost {
    /// For a step of a batch of any size.
    pub per_step: Duration,
    /// For decoding an image.
    pub per_image: Duration,
    /// Most samples of a batch; 0 counts as 1.
    pub max_batch: usize,
}

#[derive(Debug)]
struct Sim {
    cost: Cost,
    spec: EngineSpec,
}

#[derive(Debug, Clone)]
struct State {
    width: u32,
    height: u32,
    /// Stands for signal and seed, and for every step since: a step that is left out or taken twice shows in the picture.
    hash: [u8; 32],
}

/// Builds a simulated hand.
pub fn factory(cost: Cost) -> Factory<dyn Hand> {
    Box::new(move || {
        let spec = EngineSpec { model: sim::model(), max_batch: cost.max_batch.max(1), simulated: true };
        Ok(Box::new(Sim { cost, spec }))
    })
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
        let state = State { width, height, hash: *hasher.finalize().as_bytes() };
        Ok(Sample { key: BatchKey(format!("{width}x{height}")), step: 0, steps: request.steps, state: Box::new(state) })
    }

    fn step(&mut self, batch: &mut [&mut Sample]) -> Vec<Result<(), EngineError>> {
        sleep(self.cost.per_step);
        batch.iter_mut().map(|sample| advance(sample)).collect()
    }

    fn preview(&mut self, sample: &Sample) -> Result<RgbImage, EngineError> {
        Ok(paint(state(sample)?, sample.step))
    }

    fn finish(&mut self, sample: Sample) -> Result<RgbImage, EngineError> {
        sleep(self.cost.per_image);
        Ok(paint(state(&sample)?, sample.step))
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

    #[test]
    fn the_contract_holds() {
        let header = ControlHeader { schema_version: 1, space: Some(sim::space()), ..Default::default() };
        let signal = Arc::new(ControlSignal { header: Some(header), ..Default::default() });
        let request = |seed: u64| RenderRequest {
            signal: signal.clone(),
            size: Size { width: 32, height: 32 },
            steps: 2 + seed as u32,
            guidance_scale: 1.0,
            seed,
            sampler: "euler".to_owned(),
        };
        let mut hand = factory(Cost { max_batch: 4, ..Cost::default() })().unwrap();
        efferent_worker::testing::check_hand(hand.as_mut(), &[request(0), request(1), request(2)]);
    }
}
