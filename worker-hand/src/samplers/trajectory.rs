//! A sample on its way from noise to a latent.

use std::{borrow::Cow, sync::Arc};

use super::schedule::{Plan, Prediction, Rule};
use crate::noise::Noise;

/// A sample on its way: its latent, what its sampler remembers, and its own stream of noise.
#[derive(Debug)]
pub struct Trajectory {
    plan: Arc<Plan>,
    /// Evaluations done.
    done: usize,
    latent: Vec<f32>,
    /// What the sampler remembers, the newest last.
    kept: Vec<Vec<f32>>,
    /// The last prediction of the clean latent; empty before the first evaluation.
    clean: Vec<f32>,
    noise: Noise,
    /// Latents of noise that were drawn, the first included.
    draws: u32,
    /// What is not to change.
    stays: Option<KeptPart>,
}

/// What a picture is begun with instead of noise alone.
#[derive(Debug)]
pub struct Beginning {
    /// Its latent, clean.
    pub clean: Vec<f32>,
    /// The stream of noise that `clean` was drawn from, if it was, and how many latents of noise that took.
    pub noise: Noise,
    /// See `noise`.
    pub draws: u32,
    /// 1 where the picture may change, 0 where it stays; nothing if it may anywhere.
    pub mask: Option<Vec<f32>>,
    /// Whether it begins with noise alone, which then is all that `clean` counts for.
    pub whole: bool,
}

/// The part of a picture that stays: put back after every evaluation, as noisy as the rest.
#[derive(Debug)]
struct KeptPart {
    clean: Vec<f32>,
    noise: Vec<f32>,
    mask: Vec<f32>,
}

impl Trajectory {
    /// Noise of `count` values, as `torch.randn` gives it for a CPU generator of this seed.
    pub fn new(plan: Arc<Plan>, seed: u64, count: usize) -> Self {
        let mut noise = Noise::new(seed);
        let initial = plan.initial;
        let latent = noise.normal(count).into_iter().map(|value| value * initial).collect();
        Self { plan, done: 0, latent, kept: Vec::new(), clean: Vec::new(), noise, draws: 1, stays: None }
    }

    /// From a picture, by the steps that the plan has left.
    pub fn from_picture(plan: Arc<Plan>, beginning: Beginning) -> Self {
        let Beginning { clean, mut noise, mut draws, mask, whole } = beginning;
        let drawn = noise.normal(clean.len());
        draws += 1;
        let latent = match whole {
            true => drawn.iter().map(|value| value * plan.initial).collect(),
            false => noised(&plan, 0, &clean, &drawn),
        };
        let stays = mask.map(|mask| KeptPart { clean, noise: drawn, mask });
        Self { plan, done: 0, latent, kept: Vec::new(), clean: Vec::new(), noise, draws, stays }
    }

    /// Whether there is nothing left to evaluate.
    pub fn is_complete(&self) -> bool {
        self.done >= self.plan.times.len()
    }

    /// Whether the next evaluation begins a step.
    pub fn is_between_steps(&self) -> bool {
        self.done == 0 || self.plan.completes(self.done - 1)
    }

    /// The latent as it stands.
    pub fn latent(&self) -> &[f32] {
        &self.latent
    }

    /// What the network takes the clean latent for; before the first evaluation that is the noise.
    pub fn clean(&self) -> &[f32] {
        if self.clean.is_empty() { &self.latent } else { &self.clean }
    }

    /// What to ask the network: its input, and the time. Not of a complete trajectory.
    pub fn question(&self) -> (Cow<'_, [f32]>, f32) {
        let (level, next) = self.plan.spans[self.done];
        let sigma = match self.plan.rule {
            Rule::Euler | Rule::Ancestral => level,
            Rule::Heun { .. } if self.done.is_multiple_of(2) => level,
            Rule::Heun { .. } => next,
            Rule::Scm => {
                let norm = flow_norm(self.plan.times[self.done]);
                return (
                    Cow::Owned(self.latent.iter().map(|value| value * norm).collect()),
                    self.plan.times[self.done],
                );
            }
            _ => return (Cow::Borrowed(&self.latent), self.plan.times[self.done]),
        };
        let scale = (sigma * sigma + 1.0).sqrt() as f32;
        (Cow::Owned(self.latent.iter().map(|value| value / scale).collect()), self.plan.times[self.done])
    }

    /// Goes on by the network's answer. Whether a step is complete now.
    pub fn answer(&mut self, output: &[f32]) -> bool {
        let (plan, at) = (self.plan.clone(), self.done);
        let (level, next) = plan.spans[at];
        match &plan.rule {
            Rule::Euler => {
                self.clean = by_sigma(plan.prediction, level, &self.latent, output);
                let slope = slope(&self.latent, &self.clean, level);
                add(&mut self.latent, next - level, &slope);
            }
            Rule::Ancestral => {
                self.clean = by_sigma(plan.prediction, level, &self.latent, output);
                let up = (next * next * (level * level - next * next) / (level * level)).max(0.0).sqrt();
                let down = (next * next - up * up).max(0.0).sqrt();
                let slope = slope(&self.latent, &self.clean, level);
                add(&mut self.latent, down - level, &slope);
                let noise = self.draw();
                add(&mut self.latent, up, &noise);
            }
            Rule::Heun { clip } => self.heun(&plan, *clip, output),
            Rule::Ddim { clip } => {
                let (clean, noise) = by_alpha(plan.prediction, level, &self.latent, output, *clip);
                self.latent = mix(&[(next.sqrt(), &clean), ((1.0 - next).sqrt(), &noise)]);
                self.clean = clean;
            }
            Rule::Pndm => self.pndm(&plan, output),
            Rule::Lcm { clip, scaling } => {
                let (clean, _) = by_alpha(plan.prediction, level, &self.latent, output, *clip);
                let scaled = f64::from(plan.times[at]) * scaling;
                let (skip, out) = (0.25 / (scaled * scaled + 0.25), scaled / (scaled * scaled + 0.25).sqrt());
                self.clean = mix(&[(out, &clean), (skip, &self.latent)]);
                self.latent = match at + 1 == plan.times.len() {
                    true => self.clean.clone(),
                    false => {
                        let noise = self.draw();
                        mix(&[(next.sqrt(), &self.clean), ((1.0 - next).sqrt(), &noise)])
                    }
                };
            }
            Rule::Flow { noisy } => {
                self.clean = mix(&[(1.0, &self.latent), (-level, output)]);
                if *noisy {
                    let noise = self.draw();
                    self.latent = mix(&[(1.0 - next, &self.clean), (next, &noise)]);
                } else {
                    add(&mut self.latent, next - level, output);
                }
            }
            Rule::Scm => {
                // The network speaks of a straight flow at the share of noise `u`; its answer there is this one of the angle's.
                let (u, norm) = (plan.times[at], flow_norm(plan.times[at]));
                let turned =
                    |(x, v): (&f32, &f32)| ((1.0 - 2.0 * u) * (x * norm) + (1.0 - 2.0 * u + 2.0 * u * u) * v) / norm;
                let turned: Vec<f32> = self.latent.iter().zip(output).map(turned).collect();
                self.clean = mix(&[(level.cos(), &self.latent), (-level.sin(), &turned)]);
                self.latent = match at + 1 == plan.times.len() {
                    true => self.clean.clone(),
                    false => {
                        let noise = self.draw();
                        mix(&[(next.cos(), &self.clean), (next.sin(), &noise)])
                    }
                };
            }
            Rule::Dpm { .. } => self.dpm(&plan, output),
            Rule::UniPc { .. } => self.unipc(&plan, output),
        }
        self.done += 1;
        if let Some(KeptPart { clean, noise, mask }) = &self.stays {
            let old = match self.done < plan.times.len() {
                true => noised(&plan, self.done, clean, noise),
                false => clean.clone(),
            };
            let changed = self.latent.iter().zip(&old).zip(mask);
            self.latent = changed.map(|((new, old), mask)| (1.0 - mask) * old + mask * new).collect();
        }
        plan.completes(at)
    }

    /// Another latent of noise.
    pub fn draw(&mut self) -> Vec<f32> {
        self.draws += 1;
        self.noise.normal(self.latent.len())
    }

    /// kept: latent and slope at the step's start, between its two evaluations.
    fn heun(&mut self, plan: &Plan, clip: Option<f32>, output: &[f32]) {
        let (level, next) = plan.spans[self.done];
        let first = self.done.is_multiple_of(2);
        let sigma = if first { level } else { next };
        self.clean = by_sigma(plan.prediction, sigma, &self.latent, output);
        clamp(&mut self.clean, clip);
        let slope = slope(&self.latent, &self.clean, sigma);
        match <[Vec<f32>; 2]>::try_from(std::mem::take(&mut self.kept)) {
            Ok([start, before]) if !first => {
                let mean = mix(&[(0.5, &before), (0.5, &slope)]);
                self.latent = start;
                add(&mut self.latent, next - level, &mean);
            }
            _ => {
                let start = self.latent.clone();
                add(&mut self.latent, next - level, &slope);
                if !plan.completes(self.done) {
                    self.kept = vec![start, slope];
                }
            }
        }
    }

    /// kept: up to three answers before; between the two evaluations of the first step, the latent at its start before them.
    fn pndm(&mut self, plan: &Plan, output: &[f32]) {
        let (level, next) = plan.spans[self.done];
        let mut from = self.latent.clone();
        let answer = match (self.done, self.kept.len()) {
            (0, _) => {
                if plan.times.len() > 1 {
                    self.kept = vec![self.latent.clone(), output.to_vec()];
                }
                output.to_vec()
            }
            (1, 2) => {
                from = self.kept.remove(0);
                mix(&[(0.5, output), (0.5, &self.kept[0])])
            }
            _ => {
                self.kept.push(output.to_vec());
                let weights: &[f64] = match self.kept.len() {
                    1 => &[1.0],
                    2 => &[3.0 / 2.0, -1.0 / 2.0],
                    3 => &[23.0 / 12.0, -16.0 / 12.0, 5.0 / 12.0],
                    _ => &[55.0 / 24.0, -59.0 / 24.0, 37.0 / 24.0, -9.0 / 24.0],
                };
                let terms: Vec<_> = weights.iter().copied().zip(self.kept.iter().rev().map(Vec::as_slice)).collect();
                let answer = mix(&terms);
                if self.kept.len() > 3 {
                    self.kept.remove(0);
                }
                answer
            }
        };
        let answer = match plan.prediction {
            Prediction::Velocity => mix(&[(level.sqrt(), &answer), ((1.0 - level).sqrt(), &from)]),
            _ => answer,
        };
        self.clean = mix(&[(1.0 / level.sqrt(), &from), (-((1.0 - level) / level).sqrt(), &answer)]);
        let share = level * (1.0 - next).sqrt() + (level * (1.0 - level) * next).sqrt();
        self.latent = mix(&[((next / level).sqrt(), &from), (-(next - level) / share, &answer)]);
    }

    /// kept: the clean latent of the evaluation before.
    fn dpm(&mut self, plan: &Plan, output: &[f32]) {
        let Rule::Dpm { order, heun, noisy, lower_last } = plan.rule else { return };
        let (at, last) = (self.done, plan.times.len() - 1);
        let clean = by_scaled(plan, plan.spans[at].0, &self.latent, output);
        let (to, from) = (scaled(plan, plan.spans[at].1), scaled(plan, plan.spans[at].0));
        let h = to.lambda - from.lambda;
        let first = order == 1 || at == 0 || (at == last && lower_last);
        let decay = (-h).exp();
        let mut terms: Vec<(f64, &[f32])> = vec![];
        let noise = if noisy { self.draw() } else { Vec::new() };
        let (carried, gained, curved) = match noisy {
            true => {
                let twice = (-2.0 * h).exp();
                terms.push((to.sigma * (1.0 - twice).max(0.0).sqrt(), &noise));
                let curved = if heun { (1.0 - twice) / (-2.0 * h) + 1.0 } else { 0.5 * (1.0 - twice) };
                (to.sigma / from.sigma * decay, to.alpha * (1.0 - twice), to.alpha * curved)
            }
            false => {
                let curved = if heun { (decay - 1.0) / h + 1.0 } else { -0.5 * (decay - 1.0) };
                (to.sigma / from.sigma, -to.alpha * (decay - 1.0), to.alpha * curved)
            }
        };
        terms.extend([(carried, &*self.latent), (gained, &*clean)]);
        if !first && let Some(before) = self.kept.last() {
            let r = (from.lambda - scaled(plan, plan.spans[at - 1].0).lambda) / h;
            terms.extend([(curved / r, &*clean), (-curved / r, before)]);
        }
        self.latent = mix(&terms);
        self.clean.clone_from(&clean);
        self.kept = vec![clean];
    }

    /// kept: up to `order` clean latents, then the latent that the last step started from.
    fn unipc(&mut self, plan: &Plan, output: &[f32]) {
        let Rule::UniPc { order, simple, lower_order_final, ref uncorrected } = plan.rule else { return };
        let (at, count) = (self.done, plan.times.len());
        let order_at = |at: usize| {
            let most = if lower_order_final { order.min(count - at) } else { order };
            most.min(at.min(order) + 1)
        };
        let clean = by_scaled(plan, plan.spans[at].0, &self.latent, output);
        let mut start = self.latent.clone();
        if let Some(before) = self.kept.pop()
            && at > 0
            && !uncorrected.contains(&(at - 1))
        {
            start = unified(plan, simple, order_at(at - 1), at - 1, &before, &self.kept, Some(&clean));
        }
        self.kept.push(clean.clone());
        if self.kept.len() > order {
            self.kept.remove(0);
        }
        self.latent = unified(plan, simple, order_at(at), at, &start, &self.kept, None);
        self.kept.push(start);
        self.clean = clean;
    }

    /// What [`Trajectory::resume`] needs: evaluations done and draws (u32), count of what is remembered (u32), then latent and what is remembered (f32), little endian.
    pub fn checkpoint(&self) -> Vec<u8> {
        let numbers = [self.done as u32, self.draws, self.kept.len() as u32];
        let values = self.latent.iter().chain(self.kept.iter().flatten());
        numbers.iter().flat_map(|n| n.to_le_bytes()).chain(values.flat_map(|v| v.to_le_bytes())).collect()
    }

    /// Goes on from a checkpoint of a trajectory that was like this one at its beginning, and tells how many steps are done; nothing if it is not one.
    pub fn resume(self, from: &[u8]) -> Option<(Self, u32)> {
        let Self { plan, latent, mut noise, draws: first, stays, .. } = self;
        let count = latent.len();
        let (words, rest) = from.as_chunks::<4>();
        let (numbers, values) = words.split_first_chunk::<3>()?;
        let [done, draws, kept] = numbers.map(u32::from_le_bytes);
        let done = usize::try_from(done).ok().filter(|done| *done <= plan.times.len())?;
        let fits = kept as usize == plan.remembered(done) && (first..=first + done as u32).contains(&draws);
        if !rest.is_empty() || !fits || count == 0 || values.len() != count * (kept as usize + 1) {
            return None;
        }
        let values: Vec<f32> = values.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        if values.iter().any(|value| !value.is_finite()) {
            return None;
        }
        (first..draws).for_each(|_| drop(noise.normal(count)));
        let mut parts = values.chunks_exact(count).map(<[f32]>::to_vec);
        let latent = parts.next()?;
        let steps = (0..done).filter(|evaluation| plan.completes(*evaluation)).count() as u32;
        let kept = parts.collect();
        let trajectory = Self { plan, done, latent, kept, clean: Vec::new(), noise, draws, stays };
        trajectory.is_between_steps().then_some((trajectory, steps))
    }
}

/// A clean latent with as much noise as is right for an evaluation.
fn noised(plan: &Plan, evaluation: usize, clean: &[f32], noise: &[f32]) -> Vec<f32> {
    let (signal, level) = plan.noised(evaluation);
    mix(&[(signal, clean), (level, noise)])
}

/// The length of (signal, noise) where the share of noise is `u`: what a latent of unit length is multiplied by there.
fn flow_norm(u: f32) -> f32 {
    (u * u + (1.0 - u) * (1.0 - u)).sqrt()
}

/// A level as shares of signal and noise, and half the logarithm of their ratio of power.
struct Scaled {
    alpha: f64,
    sigma: f64,
    lambda: f64,
}

fn scaled(plan: &Plan, level: f64) -> Scaled {
    let (alpha, sigma) = match plan.flow {
        true => (1.0 - level, level),
        false => {
            let alpha = 1.0 / (level * level + 1.0).sqrt();
            (alpha, level * alpha)
        }
    };
    Scaled { alpha, sigma, lambda: alpha.ln() - sigma.ln() }
}

/// UniPC's step of an order from the level of evaluation `at` to the next: predicted from the clean latents so far (the newest last), or corrected by the one at its end.
fn unified(
    plan: &Plan,
    simple: bool,
    order: usize,
    at: usize,
    from: &[f32],
    kept: &[Vec<f32>],
    corrector: Option<&[f32]>,
) -> Vec<f32> {
    let (start, end) = (scaled(plan, plan.spans[at].0), scaled(plan, plan.spans[at].1));
    let h = end.lambda - start.lambda;
    let hh = -h;
    let phi_1 = hh.exp_m1();
    let b_h = if simple { hh } else { phi_1 };
    let newest = kept.len() - 1;
    // At the last step h is infinite, and its order is 1: nothing below is used then.
    let ratios: Vec<f64> =
        (1..order).map(|i| (scaled(plan, plan.spans[at - i].0).lambda - start.lambda) / h).chain([1.0]).collect();
    let mut phi = phi_1 / hh - 1.0;
    let mut factorial = 1.0;
    let mut right = Vec::new();
    for i in 1..=order {
        right.push(phi * factorial / b_h);
        factorial *= (i + 1) as f64;
        phi = phi / hh - 1.0 / factorial;
    }
    let rows = |n: usize| (0..n).map(|power| ratios[..n].iter().map(|r| r.powi(power as i32)).collect()).collect();
    let rhos = match (corrector.is_some(), order) {
        (true, 1) | (false, 2) => vec![0.5],
        (false, 1) => vec![],
        (true, n) => solved(rows(n), right),
        (false, n) => solved(rows(n - 1), right[..n - 1].to_vec()),
    };
    let mut terms: Vec<(f64, &[f32])> = vec![(end.sigma / start.sigma, from), (-end.alpha * phi_1, &kept[newest])];
    let weight = -end.alpha * b_h;
    for (i, rho) in rhos.iter().take(order - 1).enumerate() {
        let share = weight * rho / ratios[i];
        terms.extend([(share, kept[newest - i - 1].as_slice()), (-share, kept[newest].as_slice())]);
    }
    if let (Some(clean), Some(rho)) = (corrector, rhos.last()) {
        terms.extend([(weight * rho, clean), (-weight * rho, kept[newest].as_slice())]);
    }
    mix(&terms)
}

/// Solves up to three equations, by elimination with pivots.
fn solved(mut rows: Vec<Vec<f64>>, mut right: Vec<f64>) -> Vec<f64> {
    let n = right.len();
    for column in 0..n {
        let pivot =
            (column..n).max_by(|a, b| rows[*a][column].abs().total_cmp(&rows[*b][column].abs())).unwrap_or(column);
        rows.swap(column, pivot);
        right.swap(column, pivot);
        for row in (0..n).filter(|row| *row != column) {
            let factor = rows[row][column] / rows[column][column];
            let from = rows[column].clone();
            rows[row].iter_mut().zip(&from).for_each(|(a, b)| *a -= factor * b);
            right[row] -= factor * right[column];
        }
    }
    (0..n).map(|i| right[i] / rows[i][i]).collect()
}

/// The clean latent, of a latent that is clean latent + sigma x noise.
fn by_sigma(prediction: Prediction, sigma: f64, latent: &[f32], output: &[f32]) -> Vec<f32> {
    let power = sigma * sigma + 1.0;
    match prediction {
        Prediction::Epsilon | Prediction::Flow => mix(&[(1.0, latent), (-sigma, output)]),
        Prediction::Velocity => mix(&[(-sigma / power.sqrt(), output), (1.0 / power, latent)]),
        Prediction::Sample => output.to_vec(),
    }
}

/// The clean latent, of a latent of power 1 or of a flow.
fn by_scaled(plan: &Plan, level: f64, latent: &[f32], output: &[f32]) -> Vec<f32> {
    let Scaled { alpha, sigma, .. } = scaled(plan, level);
    match plan.prediction {
        Prediction::Epsilon => mix(&[(1.0 / alpha, latent), (-sigma / alpha, output)]),
        Prediction::Velocity => mix(&[(alpha, latent), (-sigma, output)]),
        Prediction::Sample => output.to_vec(),
        Prediction::Flow => mix(&[(1.0, latent), (-level, output)]),
    }
}

/// Clean latent and noise, of a latent of power 1 with this cumulated alpha.
fn by_alpha(
    prediction: Prediction,
    alpha: f64,
    latent: &[f32],
    output: &[f32],
    clip: Option<f32>,
) -> (Vec<f32>, Vec<f32>) {
    let (signal, sigma) = (alpha.sqrt(), (1.0 - alpha).sqrt());
    let (mut clean, noise) = match prediction {
        Prediction::Epsilon | Prediction::Flow => {
            (mix(&[(1.0 / signal, latent), (-sigma / signal, output)]), output.to_vec())
        }
        Prediction::Velocity => (mix(&[(signal, latent), (-sigma, output)]), mix(&[(signal, output), (sigma, latent)])),
        Prediction::Sample => (output.to_vec(), mix(&[(1.0 / sigma, latent), (-signal / sigma, output)])),
    };
    clamp(&mut clean, clip);
    (clean, noise)
}

fn clamp(values: &mut [f32], range: Option<f32>) {
    if let Some(range) = range {
        values.iter_mut().for_each(|value| *value = value.clamp(-range, range));
    }
}

/// (latent - clean) / sigma
fn slope(latent: &[f32], clean: &[f32], sigma: f64) -> Vec<f32> {
    let sigma = sigma as f32;
    latent.iter().zip(clean).map(|(x, c)| (x - c) / sigma).collect()
}

/// Adds a multiple.
fn add(values: &mut [f32], factor: f64, others: &[f32]) {
    let factor = factor as f32;
    values.iter_mut().zip(others).for_each(|(value, other)| *value += factor * other);
}

/// The sum of multiples; there is at least one.
fn mix(terms: &[(f64, &[f32])]) -> Vec<f32> {
    let Some(((first, values), rest)) = terms.split_first() else { return Vec::new() };
    let first = *first as f32;
    let mut sum: Vec<f32> = values.iter().map(|value| first * value).collect();
    rest.iter().for_each(|(factor, values)| add(&mut sum, *factor, values));
    sum
}
