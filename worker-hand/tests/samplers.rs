//! Schedules and trajectories against diffusers: `tests/samplers/reference.py`.

use std::{collections::HashMap, path::PathBuf, sync::Arc};

use candle_core::Device;
use efferent_hand::samplers::{Config, Flow, Plan, Sampler, Trajectory};
use efferent_worker::weights::Weights;
use serde::Deserialize;

#[derive(Deserialize)]
struct Cases {
    configs: HashMap<String, Config>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    key: String,
    config: String,
    sampler: String,
    steps: usize,
    even: bool,
    mu: Option<f64>,
}

const COUNT: usize = 24;
/// Largest difference of latents, relative to the largest value on the way. Times and levels agree to 1e-6.
const LATENTS: f32 = 5e-6;

/// The network of the reference.
fn network(x: &[f32], time: f32) -> Vec<f32> {
    let bias = |i: usize| -0.5 + i as f32 / (COUNT - 1) as f32;
    x.iter().enumerate().map(|(i, x)| (x * 0.7 + bias(i) + time / 1000.0 * 0.4).tanh()).collect()
}

/// Largest difference, relative where values are above 1.
fn difference(got: &[f32], wanted: &[f32]) -> f32 {
    assert_eq!(got.len(), wanted.len());
    got.iter().zip(wanted).map(|(g, w)| (g - w).abs() / w.abs().max(1.0)).fold(0.0, f32::max)
}

#[test]
fn schedules_and_trajectories_are_those_of_diffusers() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/samplers");
    let text = std::fs::read_to_string(folder.join("cases.json")).unwrap().replace("-Infinity", "null");
    let Cases { configs, cases } = serde_json::from_str(&text).unwrap();
    let mut golden = Weights::open_safetensors(&folder.join("golden.safetensors"), &Device::Cpu).unwrap();
    let mut values = |key: &str, count: usize| golden.get(key, &[count]).to_vec1::<f32>().unwrap();
    let mut worst: Vec<(f32, String)> = Vec::new();
    let mut rows = Weights::open_safetensors(&folder.join("golden.safetensors"), &Device::Cpu).unwrap();
    for Case { key, config, sampler, steps, even, mu } in &cases {
        let sampler: Sampler = sampler.parse().unwrap();
        let plan = Plan::new(&configs[config], sampler, *steps, 0, Flow { even: *even, mu: *mu }).unwrap();
        let times = values(&format!("{key}/times"), plan.times().len());
        worst.push((difference(plan.times(), &times), format!("{key}/times")));
        if rows.contains(&format!("{key}/levels")) {
            let mut levels: Vec<f32> = plan.levels().map(|level| level as f32).collect();
            if sampler == Sampler::Heun {
                // An evaluation in the middle of a step is at the level of the next.
                levels = levels.iter().copied().step_by(2).chain(levels.last().copied()).collect();
            }
            let wanted = values(&format!("{key}/levels"), levels.len());
            worst.push((difference(&levels, &wanted), format!("{key}/levels")));
        }
        if !rows.contains(&format!("{key}/latents")) {
            continue;
        }
        let plan = Arc::new(plan);
        let evaluations = plan.times().len();
        let wanted =
            rows.get(&format!("{key}/latents"), &[evaluations + 1, 1, COUNT]).reshape((evaluations + 1, COUNT));
        let wanted = wanted.unwrap().to_vec2::<f32>().unwrap();
        let mut way = Trajectory::new(plan.clone(), 11, COUNT);
        let mut done = 0;
        // What is left after large values were taken from one another has their rounding.
        let largest = wanted.iter().flatten().fold(1f32, |most, value| most.max(value.abs()));
        for (evaluation, wanted) in wanted.iter().enumerate() {
            let error = way.latent().iter().zip(wanted).map(|(g, w)| (g - w).abs()).fold(0.0, f32::max) / largest;
            worst.push((error * 1e-6 / LATENTS, format!("{key}/latents at {evaluation}")));
            if way.is_between_steps() {
                let (resumed, steps) = Trajectory::new(plan.clone(), 11, COUNT).resume(&way.checkpoint()).unwrap();
                assert_eq!(steps, done, "{key}");
                way = resumed;
            }
            if evaluation < evaluations {
                let (x, time) = way.question();
                let output = network(&x, time);
                done += u32::from(way.answer(&output));
            }
        }
        assert!(way.is_complete() && done == *steps as u32, "{key}: {done} steps");
    }
    worst.sort_by(|a, b| b.0.total_cmp(&a.0));
    let over: Vec<_> = worst.iter().filter(|(error, _)| error.is_nan() || *error > 1e-6).take(20).collect();
    assert!(over.is_empty(), "{} of {}: {over:#?}", over.len(), worst.len());
}

/// Noise levels of diffusers 0.42.1: `FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True, ...)`, `.set_timesteps(4)`, or `.set_timesteps(sigmas=[1, .75, .5, .25], mu=...)`.
#[test]
fn levels_of_karras_between_those_of_a_flow() {
    let flow = |even, mu| Flow { even, mu };
    for (more, flow, wanted) in [
        (r#""shift": 3.0"#, flow(false, None), [1.0, 0.286_693_93, 0.062_588_63, 0.008_928_572, 0.0]),
        (r#""shift": 3.0"#, flow(true, None), [1.0, 0.799_707_9, 0.634_835, 0.5, 0.0]),
        (r#""use_dynamic_shifting": true"#, flow(true, Some(0.83)), [1.0, 0.765_013_8, 0.579_041, 0.433_247_8, 0.0]),
    ] {
        let text =
            format!(r#"{{"_class_name": "FlowMatchEulerDiscreteScheduler", "use_karras_sigmas": true, {more}}}"#);
        let plan = Plan::new(&serde_json::from_str(&text).unwrap(), Sampler::Euler, 4, 0, flow).unwrap();
        let levels: Vec<f32> = plan.levels().map(|level| level as f32).collect();
        assert!(difference(&levels, &wanted) < 1e-6, "{more}: {levels:?}");
        let times: Vec<f32> = wanted[..4].iter().map(|level| level * 1000.0).collect();
        assert!(difference(plan.times(), &times) < 1e-6, "{more}: {:?}", plan.times());
    }
}

#[test]
fn a_shift_by_size_wants_a_size() {
    let text = r#"{"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": true, "flow_shift": 3.0, "prediction_type": "flow_prediction",
                   "use_dynamic_shifting": DYNAMIC}"#;
    let plan = |dynamic: &str, sampler| {
        let config: Config = serde_json::from_str(&text.replace("DYNAMIC", dynamic)).unwrap();
        Plan::new(&config, sampler, 4, 0, Flow::default())
    };
    // What diffusers' DPM-Solver does that is told no size.
    assert_eq!(plan("true", Sampler::DpmPp2m), plan("false", Sampler::DpmPp2m));
    for sampler in [Sampler::UniPc, Sampler::Euler] {
        assert!(plan("false", sampler).is_ok());
        assert!(plan("true", sampler).unwrap_err().to_string().contains("use_dynamic_shifting"), "{sampler}");
    }
}
