//! A brain that only pretends: it costs what it is told to, and its signal is a hash of the prompt.

use std::time::Duration;

use candle_core::{Device, Tensor};
use efferent_proto::{
    ApiError,
    internal::{Branch, ControlHeader, ControlSignal, GuidanceFormula, StreamRole, UnconditionalPolicy},
    v1::ErrorCode,
};
use efferent_worker::{
    engine::{Brain, EmbedRequest, EngineError, EngineSpec},
    signal,
    sim::{self, Clock, chance, jittered},
    thread::Factory,
};

/// What a batch costs.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cost {
    /// For the batch.
    pub per_batch: Duration,
    /// For each token on top, padding included.
    pub per_token: Duration,
    /// Fraction by which that is longer or shorter, as the first prompt has it.
    pub jitter: f64,
    /// Bytes that its signals have on top of a few, in a stream that simulated hands do not read.
    pub signal_bytes: usize,
}

/// Tokens of a batch.
const MAX_BATCH: usize = 4096;

#[derive(Debug)]
struct Sim {
    cost: Cost,
    spec: EngineSpec,
    clock: Clock,
}

/// Builds a simulated brain.
pub fn factory(cost: Cost) -> Factory<dyn Brain> {
    Box::new(move || {
        let spec = EngineSpec { model: sim::model(), max_batch: MAX_BATCH, simulated: true };
        Ok(Box::new(Sim { cost, spec, clock: Clock::default() }))
    })
}

impl Brain for Sim {
    fn spec(&self) -> &EngineSpec {
        &self.spec
    }

    fn fingerprint(&self) -> String {
        sim::NAME.to_owned()
    }

    fn tokens(&self, request: &EmbedRequest) -> Result<usize, EngineError> {
        let (count, limit) = (1 + request.prompt.split_whitespace().count(), self.spec.model.max_prompt_tokens);
        if count > limit as usize {
            let message = format!("the prompt takes {count} tokens, the model reads {limit}");
            return Err(ApiError::new(ErrorCode::LimitExceeded, message)
                .field("prompt")
                .limit(limit.to_string())
                .into());
        }
        Ok(count)
    }

    fn embed(&mut self, batch: &[EmbedRequest]) -> Vec<Result<ControlSignal, EngineError>> {
        let longest = batch.iter().filter_map(|request| self.tokens(request).ok()).max().unwrap_or(0);
        let time = self.cost.per_batch + self.cost.per_token * (longest * batch.len()) as u32;
        let first = batch.first().map(|request| blake3::hash(request.prompt.as_bytes()));
        let seed = first.map_or(0, |hash| u64::from_le_bytes(std::array::from_fn(|index| hash.as_bytes()[index])));
        self.clock.work(jittered(time, self.cost.jitter, chance(&[seed])));
        batch.iter().map(|request| self.tokens(request).and_then(|_| embed(request, self.cost.signal_bytes))).collect()
    }
}

/// Channels of the stream that nobody reads.
const BALLAST: usize = 256;

fn embed(request: &EmbedRequest, bytes: usize) -> Result<ControlSignal, EngineError> {
    let hash = blake3::hash(request.prompt.as_bytes());
    let values: Vec<f32> = hash.as_bytes()[..16].iter().map(|byte| f32::from(*byte) / 255.0).collect();
    let states = Tensor::from_vec(values, (sim::TOKENS as usize, sim::WIDTH as usize), &Device::Cpu)?;
    let mut streams = vec![signal::stream(StreamRole::Query, Branch::Conditional, &states)?];
    if bytes > 0 {
        // Different for each prompt, as those of a brain are.
        let row: Vec<f32> = (0..BALLAST).map(|index| f32::from(hash.as_bytes()[index % 32])).collect();
        let tokens = bytes.div_ceil(4 * BALLAST);
        let ballast = Tensor::from_vec(row.repeat(tokens), (tokens, BALLAST), &Device::Cpu)?;
        streams.push(signal::stream(StreamRole::Text, Branch::Conditional, &ballast)?);
    }
    Ok(ControlSignal {
        header: Some(ControlHeader {
            schema_version: signal::SCHEMA_VERSION,
            space: Some(sim::space()),
            ..Default::default()
        }),
        streams,
        unconditional: UnconditionalPolicy::Zeros.into(),
        guidance_formula: GuidanceFormula::Unconditional.into(),
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_contract_holds() {
        let request = |prompt: String| EmbedRequest { prompt, ..Default::default() };
        let requests = ["a", "a cat", "a cat on a mat"].map(|prompt| request(prompt.to_owned()));
        let mut brain = factory(Cost::default())().unwrap();
        efferent_worker::testing::check_brain(brain.as_mut(), &requests, &request("word ".repeat(600)));
    }
}
