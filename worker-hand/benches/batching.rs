//! Step-level batching beside static batching: `cargo bench -p efferent-hand --bench batching`.
//!
//! A simulated hand whose steps cost what they do on an H200 at 512 pixels (1.82, 2.69, 2.77 and 3.14 times the pictures per second at batch 2, 3, 4 and
//! 8, as measured for Qwen-Image in SGLang's pull request 22183) gets requests at random times (Poisson), at several rates relative to what it can do at most. The engine loop begins without a profile. Beside
//! it, at the same times and on the same machine, static batching: up to eight requests, or those that came within a quarter of a render, are
//! rendered from beginning to end before the next are begun.

#![expect(clippy::print_stdout, clippy::unwrap_used, reason = "a bench prints, and fails by panicking")]

use std::{
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use efferent_hand::{
    engine_loop::{EngineLoop, Order, Rules, Update},
    noise::MersenneTwister,
};
use efferent_proto::v1::{Lane, Size};
use efferent_worker::{
    engine::{BatchKey, EngineError, EngineSpec, Hand, RenderRequest, Sample},
    sim,
};
use image::RgbImage;
use tokio::sync::mpsc::unbounded_channel;
use tokio_util::sync::CancellationToken;

const STEPS: u32 = 20;
/// A step of one sample.
const STEP: Duration = Duration::from_millis(10);
/// Times of steps of 1, 2, ... samples, relative to that.
const CURVE: [f64; 8] = [1.0, 2.0 / 1.82, 3.0 / 2.69, 4.0 / 2.77, 1.72, 1.996, 2.272, 2.548];
/// The batch that gives most.
const BEST: usize = 8;
/// How long requests come.
const TIME: Duration = Duration::from_secs(60);
/// The part of that that is not counted.
const WARM_UP: Duration = Duration::from_secs(10);

struct H200(EngineSpec);

fn step_time(samples: usize) -> Duration {
    STEP.mul_f64(CURVE[samples - 1])
}

impl Hand for H200 {
    fn spec(&self) -> &EngineSpec {
        &self.0
    }

    fn begin(&mut self, request: &RenderRequest) -> Result<Sample, EngineError> {
        Ok(Sample { key: BatchKey("512x512".to_owned()), step: 0, steps: request.steps, state: Box::new(()) })
    }

    fn step(&mut self, batch: &mut [&mut Sample]) -> Vec<Result<(), EngineError>> {
        thread::sleep(step_time(batch.len()));
        batch.iter_mut().map(|sample| sample.step += 1).map(Ok).collect()
    }

    fn preview(&mut self, _: &Sample) -> Result<RgbImage, EngineError> {
        Ok(RgbImage::new(1, 1))
    }

    fn finish(&mut self, _: Sample) -> Result<RgbImage, EngineError> {
        Ok(RgbImage::new(1, 1))
    }

    fn checkpoint(&self, _: &Sample) -> Result<Bytes, EngineError> {
        Ok(Bytes::new())
    }

    fn resume(&mut self, request: &RenderRequest, _: &[u8]) -> Result<Sample, EngineError> {
        self.begin(request)
    }
}

/// When a picture was asked for and when it was done, since the start.
type Times = Vec<(Duration, Duration)>;

async fn step_level(arrivals: &[Duration], start: Instant) -> Times {
    let spec = EngineSpec { model: sim::model(), max_batch: CURVE.len(), simulated: true };
    let factory = Box::new(move || Ok(Box::new(H200(spec.clone())) as Box<dyn Hand>));
    let (engine, _) = EngineLoop::start(factory, Rules::default()).await.unwrap();
    let mut tasks = Vec::new();
    for &arrival in arrivals {
        tokio::time::sleep_until((start + arrival).into()).await;
        let (updates, mut heard) = unbounded_channel();
        let request = RenderRequest {
            signal: Arc::default(),
            size: Size { width: 512, height: 512 },
            steps: STEPS,
            guidance_scale: 1.0,
            seed: 0,
            sampler: String::new(),
            image_guidance_scale: 1.0,
            guidance_rescale: 0.0,
            guidance_range: 0.0..1.0,
            picture: None,
        };
        engine.submit(Order {
            request,
            lane: Lane::Interactive,
            resume: None,
            preview_interval: 0,
            unwanted: CancellationToken::new(),
            released: CancellationToken::new(),
            updates,
        });
        tasks.push(tokio::spawn(async move {
            while !matches!(heard.recv().await.unwrap(), Update::Finished(..)) {}
            (arrival, start.elapsed())
        }));
    }
    let mut times = Times::new();
    for task in tasks {
        times.push(task.await.unwrap());
    }
    times
}

fn fixed(arrivals: &[Duration], start: Instant) -> Times {
    let (sender, inbox) = mpsc::channel();
    let worker = thread::spawn(move || {
        let mut times = Times::new();
        while let Ok(first) = inbox.recv() {
            let mut batch: Vec<Duration> = vec![first];
            let until = Instant::now() + STEP * STEPS / 4;
            while batch.len() < BEST {
                match inbox.recv_timeout(until.saturating_duration_since(Instant::now())) {
                    Ok(next) => batch.push(next),
                    Err(_) => break,
                }
            }
            (0..STEPS).for_each(|_| thread::sleep(step_time(batch.len())));
            times.extend(batch.into_iter().map(|arrival| (arrival, start.elapsed())));
        }
        times
    });
    for &arrival in arrivals {
        thread::sleep((start + arrival).saturating_duration_since(Instant::now()));
        sender.send(arrival).unwrap();
    }
    drop(sender);
    worker.join().unwrap()
}

/// Pictures per second in the counted time, and the latencies of those that came in it, in order.
fn figures(times: &Times) -> (f64, Vec<Duration>) {
    let counted = WARM_UP..TIME;
    let done = times.iter().filter(|(_, done)| counted.contains(done)).count();
    let mut latencies: Vec<_> =
        times.iter().filter(|(arrival, _)| counted.contains(arrival)).map(|(arrival, done)| *done - *arrival).collect();
    latencies.sort_unstable();
    (done as f64 / (TIME - WARM_UP).as_secs_f64(), latencies)
}

fn main() {
    let most = BEST as f64 / (step_time(BEST) * STEPS).as_secs_f64();
    println!(
        "simulated hand, {STEPS} steps, at most {most:.2} pictures a second by its curve; {TIME:?} of Poisson arrivals each"
    );
    println!("{:28} {:>9} {:>9} {:>12} {:>9} {:>9}", "", "offered/s", "done/s", "of possible", "p50 ms", "p99 ms");
    for load in [0.6, 0.9, 1.0, 1.1] {
        let (mut random, mut now) = (MersenneTwister::new(7), 0.0);
        let next = || {
            now -= (1.0 - random.uniform_f64()).ln() / (load * most);
            Duration::from_secs_f64(now)
        };
        let arrivals: Vec<Duration> = std::iter::repeat_with(next).take_while(|arrival| *arrival < TIME).collect();
        let offered = figures(&arrivals.iter().map(|arrival| (*arrival, *arrival)).collect()).0;
        let start = Instant::now();
        let beside = arrivals.clone();
        let beside = thread::spawn(move || fixed(&beside, start));
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let ours = runtime.block_on(step_level(&arrivals, start));
        for (name, times) in [("step-level", ours), ("static, up to 8", beside.join().unwrap())] {
            let (done, latencies) = figures(&times);
            let at = |part: f64| latencies[(latencies.len() as f64 * part) as usize].as_secs_f64() * 1e3;
            let of_possible = done / offered.min(most);
            let name = format!("load {load}: {name}");
            println!("{name:28} {offered:>9.2} {done:>9.2} {of_possible:>12.3} {:>9.0} {:>9.0}", at(0.5), at(0.99));
        }
    }
}
