//! Its samplers, of flow matching: from noise (time 0) to the picture (time 1).
//!
//! `z_t = t x + (1 - t) e`, and the network predicts the clean latent `x`; so `dz/dt = (x - z) / (1 - t)`. Each sample has a
//! [`Trajectory`] of its own: samples at different steps, of different lengths, share a forward pass.

use std::str::FromStr;

/// The least `1 - t` that a velocity is divided by.
const MIN_REST: f32 = 0.02;

/// How a step is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sampler {
    /// First order, one evaluation a step.
    Euler,
    /// Second order (Heun's method), two evaluations a step; the last step is Euler's.
    Heun,
}

impl Sampler {
    /// Every sampler; the first is the default.
    pub(super) const ALL: [Self; 2] = [Self::Euler, Self::Heun];

    /// The name in requests.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Euler => "euler",
            Self::Heun => "heun",
        }
    }
}

impl FromStr for Sampler {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let known = || Self::ALL.map(Self::name).join(", ");
        Self::ALL
            .into_iter()
            .find(|s| s.name() == name)
            .ok_or_else(|| format!("no sampler {name:?}; known are {}", known()))
    }
}

/// Times of `steps` steps, `steps + 1` values from 0 to 1: `t / (t + shift (1 - t))` of even spacing. A shift above 1 spends
/// more steps near the noise.
pub(super) fn schedule(steps: usize, shift: f32) -> Vec<f32> {
    (0..=steps).map(|i| linspace(i, steps)).map(|t| t / (t + shift * (1.0 - t))).collect()
}

/// `torch.linspace(0, 1, steps + 1)[i]`: counted from the nearer end, in f32.
fn linspace(i: usize, steps: usize) -> f32 {
    let step = 1.0 / steps as f32;
    if i < steps.div_ceil(2) { step * i as f32 } else { 1.0 - step * (steps - i) as f32 }
}

/// Where a sample is on its way: the latent and what the sampler remembers between evaluations.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Trajectory {
    /// How a step is made.
    pub(super) sampler: Sampler,
    /// Noisy latent at the start of the step, flattened.
    pub(super) latent: Vec<f32>,
    /// The last prediction of the clean latent; empty before the first evaluation.
    pub(super) clean: Vec<f32>,
}

/// What to evaluate for the rest of a step.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Correction {
    /// Euler's guess of the latent at the step's end.
    pub(super) latent: Vec<f32>,
    velocity: Vec<f32>,
}

impl Trajectory {
    /// From noise.
    pub(super) fn new(sampler: Sampler, noise: Vec<f32>) -> Self {
        Self { sampler, latent: noise, clean: Vec::new() }
    }

    /// Takes the prediction made at (`latent`, `times[step]`). Ends the step, or tells what else to evaluate, at
    /// `times[step + 1]`, and to hand to [`Trajectory::correct`].
    pub(super) fn advance(&mut self, times: &[f32], step: usize, clean: Vec<f32>) -> Option<Correction> {
        let (now, next) = (times[step], times[step + 1]);
        if step + 2 >= times.len() {
            self.latent.clone_from(&clean);
            self.clean = clean;
            return None;
        }
        match self.sampler {
            Sampler::Euler => {
                // Same order of operations as the reference, so that rounding agrees.
                let rest = (1.0 - now).max(MIN_REST);
                for (z, x) in self.latent.iter_mut().zip(&clean) {
                    *z += (next - now) * (x - *z) / rest;
                }
                self.clean = clean;
                None
            }
            Sampler::Heun => {
                let velocity = velocity(&self.latent, &clean, now);
                let latent = self.latent.iter().zip(&velocity).map(|(z, v)| z + (next - now) * v).collect();
                self.clean = clean;
                Some(Correction { latent, velocity })
            }
        }
    }

    /// Ends a step with the prediction made at (`correction.latent`, `times[step + 1]`).
    pub(super) fn correct(&mut self, times: &[f32], step: usize, correction: &Correction, clean: Vec<f32>) {
        let (now, next) = (times[step], times[step + 1]);
        let second = velocity(&correction.latent, &clean, next);
        for ((z, v1), v2) in self.latent.iter_mut().zip(&correction.velocity).zip(&second) {
            *z += (next - now) * 0.5 * (v1 + v2);
        }
        self.clean = clean;
    }
}

fn velocity(latent: &[f32], clean: &[f32], time: f32) -> Vec<f32> {
    let rest = (1.0 - time).max(MIN_REST);
    latent.iter().zip(clean).map(|(z, x)| (x - z) / rest).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedules_start_at_noise_and_end_at_the_picture() {
        for steps in [1, 2, 7, 20, 150] {
            let times = schedule(steps, 6.0);
            assert_eq!(times.len(), steps + 1);
            assert_eq!((times[0], times[steps]), (0.0, 1.0));
            assert!(times.windows(2).all(|w| w[0] < w[1]));
        }
    }

    #[test]
    fn samplers_reach_a_constant_prediction() {
        for sampler in Sampler::ALL {
            let times = schedule(5, 6.0);
            let mut way = Trajectory::new(sampler, vec![1.0, -2.0]);
            for step in 0..5 {
                if let Some(correction) = way.advance(&times, step, vec![0.25, 0.5]) {
                    way.correct(&times, step, &correction, vec![0.25, 0.5]);
                }
            }
            assert_eq!(way.latent, [0.25, 0.5]);
        }
    }

    #[test]
    fn heun_is_of_second_order() {
        // x(z, t) = z + (1 - t) cos(t): then dz/dt = cos(t), so z(t) = sin(t).
        let error = |sampler, steps: usize| {
            let times = schedule(steps, 1.0);
            let mut way = Trajectory::new(sampler, vec![0.0]);
            let clean = |z: f32, t: f32| vec![z + (1.0 - t) * t.cos()];
            for step in 0..steps - 1 {
                let prediction = clean(way.latent[0], times[step]);
                if let Some(correction) = way.advance(&times, step, prediction) {
                    let prediction = clean(correction.latent[0], times[step + 1]);
                    way.correct(&times, step, &correction, prediction);
                }
            }
            (way.latent[0] - times[steps - 1].sin()).abs()
        };
        assert!(error(Sampler::Heun, 10) < 0.05 * error(Sampler::Euler, 10));
    }

    #[test]
    fn unknown_samplers_are_told_the_known() {
        assert_eq!("heun".parse(), Ok(Sampler::Heun));
        assert!("ddim".parse::<Sampler>().unwrap_err().contains("euler, heun"));
    }
}
