//! Noise levels and times of so many steps.
//!
//! What diffusers computes in f32 is computed in f32 here, and what in f64 in f64, in the same order, so that the numbers agree to their last digits.

use efferent_worker::pipeline::scheduler::FLOW_EULER;

use super::{Config, Error, Sampler};

/// What a network predicts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Prediction {
    /// The noise.
    Epsilon,
    /// `v`: a mean of noise and clean latent.
    Velocity,
    /// The clean latent.
    Sample,
    /// Noise less clean latent, where the noise level is the share of noise.
    Flow,
}

/// How a sampler goes on.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Rule {
    Euler,
    Ancestral,
    Heun { clip: Option<f32> },
    Ddim { clip: Option<f32> },
    Pndm,
    Dpm { order: usize, heun: bool, noisy: bool, lower_last: bool },
    UniPc { order: usize, simple: bool, lower_order_final: bool, uncorrected: Vec<usize> },
    Lcm { clip: Option<f32>, scaling: f64 },
    Flow { noisy: bool },
    Scm,
}

/// What a family of flow networks adds to its scheduler's configuration.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Flow {
    /// Noise levels are 1, (n - 1) / n, ... 1 / n before they are shifted, whatever the configuration says.
    pub even: bool,
    /// The exponent of a shift that depends on the picture's size.
    pub mu: Option<f64>,
}

/// How a number of steps is made with a network. Shared by samples.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    pub(super) rule: Rule,
    pub(super) prediction: Prediction,
    /// The time that the network is told, evaluation by evaluation.
    pub(super) times: Vec<f32>,
    /// Level at each evaluation, and the one that its step leads to: sigmas, cumulated alphas for [`Rule::Ddim`], [`Rule::Pndm`] and [`Rule::Lcm`],
    /// or angles for [`Rule::Scm`].
    pub(super) spans: Vec<(f64, f64)>,
    /// Whether the level is the share of noise.
    pub(super) flow: bool,
    /// What noise is multiplied by to begin with.
    pub(super) initial: f32,
}

impl Plan {
    /// Plans so many steps, of which the first `skipped` are not made.
    ///
    /// # Errors
    /// If the configuration is not one for the sampler, or the sampler cannot make so many steps.
    pub fn new(config: &Config, sampler: Sampler, steps: usize, skipped: usize, flow: Flow) -> Result<Self, Error> {
        if steps <= skipped {
            return Err(Error("there must be at least one step".to_owned()));
        }
        let known = config.samplers();
        if !known.contains(&sampler) {
            let names = known.iter().map(|s| s.name()).collect::<Vec<_>>().join(", ");
            return Err(Error(format!("{sampler} does not fit a {}; {names} do", config.class)));
        }
        let planner = Planner { config, sampler, steps, skipped, train: config.count("num_train_timesteps", 1000)? };
        if planner.train == 0 || planner.train > 100_000 {
            return Err(Error(format!("num_train_timesteps cannot be {}", planner.train)));
        }
        if steps > planner.train {
            return Err(Error(format!("{steps} steps are more than the {} of training", planner.train)));
        }
        let plan = match sampler {
            Sampler::Euler if config.is_flow() => planner.flow(flow),
            Sampler::Euler | Sampler::EulerAncestral | Sampler::Heun => planner.sigmas(),
            Sampler::DpmPp2m | Sampler::DpmPp2mKarras | Sampler::UniPc => planner.multistep(flow),
            Sampler::Ddim | Sampler::Pndm | Sampler::Lcm => planner.alphas(),
            Sampler::Scm => planner.angles(),
        };
        Ok(plan?.without(skipped))
    }

    /// Without its first steps.
    fn without(mut self, steps: usize) -> Self {
        let evaluations = match &mut self.rule {
            Rule::Heun { .. } => 2 * steps,
            // Its planner has left them out.
            Rule::Pndm => 0,
            Rule::UniPc { uncorrected, .. } => {
                *uncorrected = uncorrected.iter().filter_map(|step| step.checked_sub(steps)).collect();
                steps
            }
            _ => steps,
        };
        self.times.drain(..evaluations);
        self.spans.drain(..evaluations);
        self
    }

    /// The shares of a clean latent and of noise in one that is ready for this evaluation.
    pub(super) fn noised(&self, evaluation: usize) -> (f64, f64) {
        let (level, next) = self.spans[evaluation];
        let power = |alpha: f64| (alpha.sqrt(), (1.0 - alpha).sqrt());
        match self.rule {
            Rule::Euler | Rule::Ancestral => (1.0, level),
            Rule::Heun { .. } => (1.0, if evaluation.is_multiple_of(2) { level } else { next }),
            Rule::Ddim { .. } | Rule::Lcm { .. } => power(level),
            Rule::Pndm => power(if evaluation == 1 { next } else { level }),
            Rule::Dpm { .. } | Rule::UniPc { .. } if !self.flow => {
                let alpha = 1.0 / (level * level + 1.0).sqrt();
                (alpha, level * alpha)
            }
            Rule::Dpm { .. } | Rule::UniPc { .. } | Rule::Flow { .. } => (1.0 - level, level),
            Rule::Scm => (level.cos(), level.sin()),
        }
    }

    /// The time that the network is told, evaluation by evaluation.
    pub fn times(&self) -> &[f32] {
        &self.times
    }

    /// Noise levels: at each evaluation, and at the end.
    pub fn levels(&self) -> impl Iterator<Item = f64> {
        self.spans.iter().map(|(level, _)| *level).chain(self.spans.last().map(|(_, end)| *end))
    }

    /// How many latents a trajectory remembers beside its own, between two steps, after so many evaluations.
    pub(super) fn remembered(&self, done: usize) -> usize {
        match self.rule {
            Rule::Pndm => done.saturating_sub(1).min(3),
            Rule::Dpm { .. } => done.min(1),
            Rule::UniPc { order, .. } => done.min(order) + usize::from(done > 0),
            _ => 0,
        }
    }

    /// Whether a step is complete after this evaluation.
    pub(super) fn completes(&self, evaluation: usize) -> bool {
        match self.rule {
            Rule::Heun { .. } => !evaluation.is_multiple_of(2) || evaluation + 1 == self.times.len(),
            Rule::Pndm => evaluation > 0 || self.times.len() == 1,
            _ => true,
        }
    }
}

/// The first angle, and that between two steps.
#[expect(clippy::approx_constant, reason = "pi / 2 to four digits is what the networks were distilled with")]
const SCM_START: f32 = 1.5708;
const SCM_MIDDLE: f32 = 1.3;

struct Planner<'a> {
    config: &'a Config,
    sampler: Sampler,
    steps: usize,
    skipped: usize,
    /// Times of training.
    train: usize,
}

impl Planner<'_> {
    fn prediction(&self) -> Result<Prediction, Error> {
        match self.config.word("prediction_type", "epsilon")? {
            "epsilon" => Ok(Prediction::Epsilon),
            "v_prediction" => Ok(Prediction::Velocity),
            "sample" => Ok(Prediction::Sample),
            "flow_prediction" => Ok(Prediction::Flow),
            other => Err(Error(format!("prediction_type {other:?} is not known"))),
        }
    }

    fn clip(&self, by_default: bool) -> Result<Option<f32>, Error> {
        let range = self.config.number("clip_sample_range", 1.0)? as f32;
        Ok(self.config.flag("clip_sample", by_default)?.then_some(range))
    }

    /// `alphas_cumprod`: products in f64, kept in f32.
    fn cumulated(&self) -> Result<Vec<f32>, Error> {
        let config = self.config;
        let (start, end, kind) = match self.sampler {
            Sampler::Lcm => (0.000_85, 0.012, "scaled_linear"),
            Sampler::Heun => (0.000_85, 0.012, "linear"),
            _ => (0.000_1, 0.02, "linear"),
        };
        let (start, end) = (config.number("beta_start", start)?, config.number("beta_end", end)?);
        let mut betas: Vec<f32> = match config.word("beta_schedule", kind)? {
            "linear" => linspace(start as f32, end as f32, self.train),
            "scaled_linear" => linspace(start.sqrt() as f32, end.sqrt() as f32, self.train)
                .into_iter()
                .map(|root| root * root)
                .collect(),
            "squaredcos_cap_v2" => {
                let bar = |t: f64| ((t + 0.008) / 1.008 * std::f64::consts::PI / 2.0).cos().powi(2);
                let at = |i: usize| bar(i as f64 / self.train as f64);
                (0..self.train).map(|i| (1.0 - at(i + 1) / at(i)).min(0.999) as f32).collect()
            }
            other => return Err(Error(format!("beta_schedule {other:?} is not known"))),
        };
        let rescaled = self.sampler != Sampler::Heun
            && self.sampler != Sampler::Pndm
            && config.flag("rescale_betas_zero_snr", false)?;
        if rescaled {
            betas = without_signal_at_the_end(&betas);
        }
        let mut product = 1f64;
        let mut cumulated: Vec<f32> = betas
            .iter()
            .map(|beta| {
                product *= f64::from(1.0 - beta);
                product as f32
            })
            .collect();
        if cumulated.iter().any(|alpha| !(0.0..=1.0).contains(alpha)) {
            return Err(Error(format!("betas from {start} to {end} are no noise")));
        }
        let by_sigma = !matches!(self.sampler, Sampler::Ddim | Sampler::Pndm | Sampler::Lcm);
        if rescaled
            && by_sigma
            && let Some(last) = cumulated.last_mut()
        {
            // As diffusers has it: near enough to no signal, without an infinite level.
            *last = 2f32.powi(-24);
        }
        Ok(cumulated)
    }

    /// Times of the steps, from noise on, as diffusers spaces them for samplers that count `extra` more.
    fn spaced(&self, by_default: &str, extra: usize, rounded: bool) -> Result<Vec<f64>, Error> {
        let (train, steps) = (self.train as f64, self.steps);
        let count = steps + extra;
        let offset = self.config.count("steps_offset", 0)? as f64;
        let mut times: Vec<f64> = match self.config.word("timestep_spacing", by_default)? {
            "linspace" => {
                let even = linspace64(0.0, train - 1.0, count);
                even.into_iter()
                    .rev()
                    .map(|t| if rounded { t.round_ties_even() } else { f64::from(t as f32) })
                    .collect()
            }
            "leading" => {
                let ratio = (self.train / count) as f64;
                (0..count).rev().map(|i| i as f64 * ratio + offset).collect()
            }
            "trailing" => {
                // numpy's arange: as many as fit, at multiples of the difference of the first two.
                let ratio = train / steps as f64;
                let difference = (train - ratio) - train;
                let fitting = (train / ratio).ceil() as usize;
                (0..fitting).map(|i| (train + i as f64 * difference).round_ties_even() - 1.0).collect()
            }
            other => return Err(Error(format!("timestep_spacing {other:?} is not known"))),
        };
        times.truncate(steps);
        if times.iter().any(|t| !(0.0..train).contains(t)) {
            return Err(Error(format!("steps_offset {offset} leads beyond the times of training")));
        }
        Ok(times)
    }

    /// Samplers by sigmas, with one more level at the end.
    fn sigmas(&self) -> Result<Plan, Error> {
        let config = self.config;
        let training: Vec<f64> = self.cumulated()?.into_iter().map(|a| f64::from(((1.0 - a) / a).sqrt())).collect();
        let mut times = self.spaced("linspace", 0, false)?;
        let mut sigmas: Vec<f64> = times.iter().map(|t| interpolated(&training, *t)).collect();
        if self.sampler != Sampler::EulerAncestral && config.flag("use_karras_sigmas", false)? {
            sigmas = self.karras(&sigmas)?;
            times = sigmas.iter().map(|sigma| time_of(*sigma, &training)).collect();
        }
        let last = match (self.sampler, config.word("final_sigmas_type", "zero")?) {
            (Sampler::Euler, "sigma_min") => training[0],
            _ => 0.0,
        };
        let largest = sigmas.iter().fold(0f32, |most, s| most.max(*s as f32));
        let leading = config.word("timestep_spacing", "linspace")? == "leading";
        let initial = if leading { (largest * largest + 1.0).sqrt() } else { largest };
        let (mut spans, mut times): (Vec<_>, Vec<f32>) =
            (spans(&sigmas, last), times.into_iter().map(|t| t as f32).collect());
        let rule = match self.sampler {
            Sampler::EulerAncestral => Rule::Ancestral,
            Sampler::Heun => {
                // Each step but the last asks again, at the level that it leads to.
                spans = spans.iter().flat_map(|span| [*span, *span]).take(2 * sigmas.len() - 1).collect();
                times = (0..2 * times.len() - 1).map(|i| times[i.div_ceil(2)]).collect();
                Rule::Heun { clip: self.clip(false)? }
            }
            _ => Rule::Euler,
        };
        Ok(Plan { rule, prediction: self.prediction()?, times, spans, flow: false, initial })
    }

    /// Karras et al. 2022, equation 5, between the first and the last of these levels.
    fn karras(&self, sigmas: &[f64]) -> Result<Vec<f64>, Error> {
        let least = self.config.optional("sigma_min")?.unwrap_or(sigmas[sigmas.len() - 1]);
        let most = self.config.optional("sigma_max")?.unwrap_or(sigmas[0]);
        let (from, to) = (most.powf(1.0 / 7.0), least.powf(1.0 / 7.0));
        Ok(linspace64(0.0, 1.0, self.steps).into_iter().map(|ramp| (from + ramp * (to - from)).powi(7)).collect())
    }

    /// DPM-Solver++ and UniPC.
    fn multistep(&self, flow: Flow) -> Result<Plan, Error> {
        let config = self.config;
        let unipc = self.sampler == Sampler::UniPc;
        let training: Vec<f64> = self.cumulated()?.into_iter().map(|a| f64::from(((1.0 - a) / a).sqrt())).collect();
        let is_flow = config.flag("use_flow_sigmas", false)?;
        let karras = self.sampler == Sampler::DpmPp2mKarras || config.flag("use_karras_sigmas", false)?;
        let (sigmas, times): (Vec<f64>, Vec<f64>) = if is_flow {
            if karras {
                return Err(Error("use_karras_sigmas with use_flow_sigmas is not known".to_owned()));
            }
            let shift = match (config.flag("use_dynamic_shifting", false)?, flow.mu) {
                (true, Some(mu)) => mu.exp(),
                (true, None) if unipc => return Err(without_size()),
                // As in diffusers, where DPM-Solver shifts by a size only if its pipeline tells it one; Sana's does not.
                _ => config.number("flow_shift", 1.0)?,
            };
            let even = linspace64(1.0, 1.0 / self.train as f64, self.steps + 1);
            let shifted = |s: f64| shift * s / (1.0 + (shift - 1.0) * s);
            let mut sigmas: Vec<f64> = match unipc {
                true => even[..self.steps].iter().map(|s| shifted(*s)).collect(),
                false => even[1..].iter().rev().map(|alpha| shifted(1.0 - alpha)).collect(),
            };
            if unipc && (sigmas[0] - 1.0).abs() < 1e-6 {
                sigmas[0] -= 1e-6;
            }
            let times = sigmas.iter().map(|s| (s * self.train as f64).trunc()).collect();
            (sigmas, times)
        } else if karras {
            let down: Vec<f64> = training.iter().rev().copied().collect();
            let sigmas = self.karras(&down)?;
            let whole = unipc || config.word("beta_schedule", "linear")? != "squaredcos_cap_v2";
            let time = |sigma: &f64| time_of(*sigma, &training);
            let round = |t: f64| if whole { t.round_ties_even() } else { t.trunc() };
            let times = sigmas.iter().map(|sigma| round(time(sigma))).collect();
            (sigmas, times)
        } else {
            let times = self.spaced("linspace", 1, true)?;
            (times.iter().map(|t| interpolated(&training, *t)).collect(), times)
        };
        let last = match config.word("final_sigmas_type", "zero")? {
            "zero" => 0.0,
            "sigma_min" if unipc && (is_flow || karras) => sigmas[sigmas.len() - 1],
            "sigma_min" => training[0],
            other => return Err(Error(format!("final_sigmas_type {other:?} is not known"))),
        };
        let order = config.count("solver_order", 2)?;
        let lower = config.flag("lower_order_final", true)?;
        let few = self.steps < 15;
        let rule = match unipc {
            true if (1..=3).contains(&order) => Rule::UniPc {
                order,
                simple: config.word("solver_type", "bh2")? == "bh1",
                lower_order_final: lower,
                uncorrected: config.counts("disable_corrector")?,
            },
            false if (1..=2).contains(&order) => Rule::Dpm {
                order,
                heun: config.word("solver_type", "midpoint")? == "heun",
                noisy: match config.word("algorithm_type", "dpmsolver++")? {
                    "dpmsolver++" | "deis" => false,
                    "sde-dpmsolver++" => true,
                    other => return Err(Error(format!("algorithm_type {other:?} is not known"))),
                },
                lower_last: config.flag("euler_at_final", false)? || (lower && few) || last == 0.0,
            },
            _ => return Err(Error(format!("solver_order {order} is not known"))),
        };
        let times = times.into_iter().map(|t| t as f32).collect();
        Ok(Plan {
            rule,
            prediction: self.prediction()?,
            times,
            spans: spans(&sigmas, last),
            flow: is_flow,
            initial: 1.0,
        })
    }

    /// Samplers by cumulated alphas.
    fn alphas(&self) -> Result<Plan, Error> {
        let config = self.config;
        let training = self.cumulated()?;
        let clear = config.flag("set_alpha_to_one", self.sampler != Sampler::Pndm)?;
        let end = if clear { 1.0 } else { f64::from(training[0]) };
        let at = |time: i64| usize::try_from(time).map_or(end, |time| f64::from(training[time]));
        let stride = (self.train / self.steps) as i64;
        let back = |time: i64| (at(time), at(time - stride));
        let whole = |times: Vec<f64>| times.into_iter().map(|t| t as i64).collect::<Vec<_>>();
        let (rule, times, spans): (_, Vec<i64>, Vec<_>) = match self.sampler {
            Sampler::Lcm => {
                let times = self.lcm_times()?;
                let next = |i: usize| times.get(i + 1).unwrap_or(&times[i]);
                let spans = (0..times.len()).map(|i| (at(times[i]), at(*next(i)))).collect();
                let scaling = config.number("timestep_scaling", 10.0)?;
                (Rule::Lcm { clip: self.clip(false)?, scaling }, times, spans)
            }
            Sampler::Pndm => {
                let mut times = whole(self.spaced("leading", 0, true)?);
                if let Some(second) = times.get(1).copied() {
                    times.insert(1, second);
                }
                // As diffusers does it: whatever is first and second is treated so.
                times.drain(..self.skipped);
                let span = |i: usize, time: i64| {
                    if i == 1 { (at((time + stride).min(self.train as i64 - 1)), at(time)) } else { back(time) }
                };
                let spans = times.iter().enumerate().map(|(i, time)| span(i, *time)).collect();
                (Rule::Pndm, times, spans)
            }
            _ => {
                let times = whole(self.spaced("leading", 0, true)?);
                let spans = times.iter().map(|time| back(*time)).collect();
                (Rule::Ddim { clip: self.clip(true)? }, times, spans)
            }
        };
        let times = times.into_iter().map(|t| t as f32).collect();
        Ok(Plan { rule, prediction: self.prediction()?, times, spans, flow: false, initial: 1.0 })
    }

    /// Trigonometric flow: latents are `cos(angle) clean + sin(angle) noise`, from pi / 2 to 0. Source: diffusers 0.42.1, `SanaSprintPipeline`.
    fn angles(&self) -> Result<Plan, Error> {
        match self.config.word("prediction_type", "trigflow")? {
            "trigflow" => {}
            other => return Err(Error(format!("prediction_type {other:?} is not known"))),
        }
        let angles: Vec<f32> = match self.steps {
            2 => vec![SCM_START, SCM_MIDDLE, 0.0],
            steps => linspace(SCM_START, 0.0, steps + 1),
        };
        let times = angles[..self.steps].iter().map(|angle| angle.sin() / (angle.cos() + angle.sin())).collect();
        let angles: Vec<f64> = angles.into_iter().map(f64::from).collect();
        let spans = spans(&angles[..self.steps], 0.0);
        Ok(Plan { rule: Rule::Scm, prediction: Prediction::Flow, times, spans, flow: false, initial: 1.0 })
    }

    fn lcm_times(&self) -> Result<Vec<i64>, Error> {
        let original = self.config.count("original_inference_steps", 50)?;
        if original == 0 || original > self.train || self.steps > original {
            return Err(Error(format!("{} steps of the {original} that an LCM was distilled from", self.steps)));
        }
        let stride = (self.train / original) as i64;
        let down: Vec<i64> = (1..=original as i64).rev().map(|i| i * stride - 1).collect();
        Ok((0..self.steps).map(|i| down[(original as f64 / self.steps as f64 * i as f64) as usize]).collect())
    }

    /// Flow matching by Euler's method.
    fn flow(&self, flow: Flow) -> Result<Plan, Error> {
        let (config, train) = (self.config, self.train as f64);
        let own = config.class == FLOW_EULER;
        let shift = config.number(if own { "shift" } else { "flow_shift" }, 1.0)?;
        let dynamic = config.flag("use_dynamic_shifting", false)?;
        let shifted = |s: f64| shift * s / (1.0 + (shift - 1.0) * s);
        let start = |s: f32| if dynamic { s } else { shift as f32 * s / (1.0 + (shift as f32 - 1.0) * s) };
        let even: Vec<f64> = match flow.even {
            true => {
                linspace64(1.0, 1.0 / self.steps as f64, self.steps).into_iter().map(|s| f64::from(s as f32)).collect()
            }
            false => {
                let ends = [1.0, 1.0 / train as f32].map(|s| f64::from(start(s)) * train);
                linspace64(ends[0], ends[1], self.steps).into_iter().map(|t| t / train).collect()
            }
        };
        let sigmas: Vec<f64> = match (dynamic, flow.mu) {
            (true, Some(mu)) => even.iter().map(|s| mu.exp() / (mu.exp() + (1.0 / s - 1.0))).collect(),
            (true, None) => return Err(without_size()),
            (false, _) => even.iter().map(|s| shifted(*s)).collect(),
        };
        let mut sigmas: Vec<f64> = sigmas.into_iter().map(|s| f64::from(s as f32)).collect();
        if config.flag("use_karras_sigmas", false)? {
            sigmas = self.karras(&sigmas)?.into_iter().map(|s| f64::from(s as f32)).collect();
        }
        let times = sigmas.iter().map(|s| *s as f32 * train as f32).collect();
        let noisy = own && config.flag("stochastic_sampling", false)?;
        let spans = spans(&sigmas, 0.0);
        Ok(Plan { rule: Rule::Flow { noisy }, prediction: Prediction::Flow, times, spans, flow: true, initial: 1.0 })
    }
}

fn without_size() -> Error {
    Error("use_dynamic_shifting without a size to shift by".to_owned())
}

/// Each level with the next, as f32 has them.
fn spans(levels: &[f64], last: f64) -> Vec<(f64, f64)> {
    let rounded = |level: f64| f64::from(level as f32);
    let next = |i: usize| levels.get(i + 1).copied().unwrap_or(last);
    levels.iter().enumerate().map(|(i, level)| (rounded(*level), rounded(next(i)))).collect()
}

/// `torch.linspace` in f32: counted from the nearer end.
fn linspace(start: f32, end: f32, count: usize) -> Vec<f32> {
    let step = (end - start) / (count.max(2) - 1) as f32;
    let value = |i: usize| if i < count / 2 { start + step * i as f32 } else { end - step * (count - i - 1) as f32 };
    (0..count).map(|i| if count == 1 { start } else { value(i) }).collect()
}

/// `numpy.linspace`: the end is exact.
fn linspace64(start: f64, end: f64, count: usize) -> Vec<f64> {
    let step = (end - start) / (count.max(2) - 1) as f64;
    (0..count).map(|i| if count > 1 && i + 1 == count { end } else { i as f64 * step + start }).collect()
}

/// `numpy.interp` of values at 0, 1, ...
fn interpolated(values: &[f64], at: f64) -> f64 {
    let low = (at.max(0.0) as usize).min(values.len() - 1);
    let high = (low + 1).min(values.len() - 1);
    (values[high] - values[low]) * (at - low as f64) + values[low]
}

/// At which time of training this level stands: linear in the logarithm between two times.
fn time_of(sigma: f64, training: &[f64]) -> f64 {
    // As diffusers does it, logarithms of f32 levels are f32.
    let log = |sigma: f64| f64::from((sigma as f32).ln());
    let wanted = sigma.max(1e-10).ln();
    let low = training.iter().rposition(|s| wanted >= log(*s)).unwrap_or(0).min(training.len().saturating_sub(2));
    let high = (low + 1).min(training.len() - 1);
    let (below, above) = (log(training[low]), log(training[high]));
    let share = ((below - wanted) / (below - above)).clamp(0.0, 1.0);
    (1.0 - share) * low as f64 + share * high as f64
}

/// Betas that leave no signal at the last time (Lin et al. 2023, algorithm 1).
fn without_signal_at_the_end(betas: &[f32]) -> Vec<f32> {
    let mut product = 1f64;
    let mut roots: Vec<f32> = betas
        .iter()
        .map(|beta| {
            product *= f64::from(1.0 - beta);
            (product as f32).sqrt()
        })
        .collect();
    let (first, last) = (roots[0], roots[roots.len() - 1]);
    roots.iter_mut().for_each(|root| *root = (*root - last) * (first / (first - last)));
    let bars: Vec<f32> = roots.iter().map(|root| root * root).collect();
    let alpha = |i: usize| if i == 0 { bars[0] } else { bars[i] / bars[i - 1] };
    (0..bars.len()).map(|i| 1.0 - alpha(i)).collect()
}
