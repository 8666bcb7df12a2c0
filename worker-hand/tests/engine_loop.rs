//! The engine loop: samples join and leave between steps, and whatever happens to one leaves its mates alone.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    sync::{Arc, Mutex, mpsc},
    time::{Duration, Instant},
};

use bytes::Bytes;
use efferent_hand::{
    engine_loop::{Checkpoint, EngineLoop, Order, Rules, Update},
    turns::PATIENCE,
};
use efferent_proto::v1::{Lane, Size};
use efferent_worker::{
    engine::{BatchKey, EngineError, EngineSpec, Hand, RenderRequest, Sample},
    sim,
};
use image::RgbImage;
use tempfile::TempDir;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio_util::sync::CancellationToken;

/// Seeds with a meaning.
const PANICS: u64 = 666;
const FAILS: u64 = 404;
const CANNOT_BEGIN: u64 = 400;
const CANNOT_FINISH: u64 = 500;
const CANNOT_CHECKPOINT: u64 = 501;

/// A hand that does what seeds say, and takes a step only when it is told to.
struct Scripted {
    spec: EngineSpec,
    script: Script,
}

/// What the test sees of it, and tells it.
#[derive(Clone)]
struct Script {
    /// The seeds of each batch.
    batches: Arc<Mutex<Vec<Vec<u64>>>>,
    built: Arc<Mutex<u32>>,
    steps: Arc<Mutex<mpsc::Receiver<()>>>,
    /// Whether its device is lost, so that it cannot be built.
    lost: Arc<Mutex<bool>>,
}

fn seed(sample: &Sample) -> u64 {
    *sample.state.downcast_ref().unwrap()
}

impl Hand for Scripted {
    fn spec(&self) -> &EngineSpec {
        &self.spec
    }

    fn begin(&mut self, request: &RenderRequest) -> Result<Sample, EngineError> {
        if request.seed == CANNOT_BEGIN {
            return Err(EngineError::Crashed("cannot begin".to_owned()));
        }
        let key = BatchKey(request.size.width.to_string());
        Ok(Sample { key, step: 0, steps: request.steps, state: Box::new(request.seed) })
    }

    fn step(&mut self, batch: &mut [&mut Sample]) -> Vec<Result<(), EngineError>> {
        let _ = self.script.steps.lock().unwrap().recv_timeout(Duration::from_secs(20));
        let seeds: Vec<u64> = batch.iter().map(|sample| seed(sample)).collect();
        self.script.batches.lock().unwrap().push(seeds.clone());
        assert!(!seeds.contains(&PANICS), "a poisonous sample");
        let advance = |sample: &mut &mut Sample| {
            sample.step += 1;
            if seed(sample) == FAILS { Err(EngineError::Crashed("failed".to_owned())) } else { Ok(()) }
        };
        batch.iter_mut().map(advance).collect()
    }

    fn preview(&mut self, sample: &Sample) -> Result<RgbImage, EngineError> {
        Ok(RgbImage::new(1, sample.step))
    }

    fn finish(&mut self, sample: Sample) -> Result<RgbImage, EngineError> {
        assert_ne!(seed(&sample), CANNOT_FINISH, "cannot finish");
        Ok(RgbImage::new(seed(&sample) as u32, 1))
    }

    fn checkpoint(&self, sample: &Sample) -> Result<Bytes, EngineError> {
        assert_ne!(seed(sample), CANNOT_CHECKPOINT, "cannot checkpoint");
        Ok(vec![sample.step as u8].into())
    }

    fn resume(&mut self, request: &RenderRequest, from: &[u8]) -> Result<Sample, EngineError> {
        let mut sample = self.begin(request)?;
        // Panics over what is broken, as no hand should.
        sample.step = u32::from(from[0]);
        Ok(sample)
    }
}

struct Rig {
    engine: EngineLoop,
    script: Script,
    step: mpsc::Sender<()>,
    _folder: TempDir,
}

/// An order's other ends.
struct Ordered {
    heard: UnboundedReceiver<Update>,
    unwanted: CancellationToken,
    released: CancellationToken,
}

impl Rig {
    async fn start(max_batch: usize) -> Self {
        Self::with(max_batch, Rules::default()).await
    }

    async fn with(max_batch: usize, rules: Rules) -> Self {
        // Steps take as long as the test says; the profile says that larger batches are worth while.
        let folder = tempfile::tempdir().unwrap();
        let profile = folder.path().join("profile.json");
        let times = r#"{"1": 1.0, "2": 1.0, "4": 1.0, "8": 1.0}"#;
        let model = r#""model": "sim", "revision": "1", "device": """#;
        std::fs::write(&profile, format!(r#"{{{model}, "step_seconds": {{"8": {times}, "9": {times}}}}}"#)).unwrap();
        let rules = Rules { profile: Some(profile), ..rules };
        let (step, steps) = mpsc::channel();
        let steps = Arc::new(Mutex::new(steps));
        let script = Script { batches: Arc::default(), built: Arc::default(), steps, lost: Arc::default() };
        let inside = script.clone();
        let factory = Box::new(move || {
            if *inside.lost.lock().unwrap() {
                return Err(EngineError::Missing("its device".to_owned()));
            }
            *inside.built.lock().unwrap() += 1;
            let spec = EngineSpec { model: sim::model(), max_batch, simulated: true };
            Ok(Box::new(Scripted { spec, script: inside.clone() }) as Box<dyn Hand>)
        });
        let (engine, _) = EngineLoop::start(factory, rules).await.unwrap();
        Self { engine, script, step, _folder: folder }
    }

    fn submit(&self, seed: u64, steps: u32, width: u32) -> (UnboundedReceiver<Update>, CancellationToken) {
        let Ordered { heard, unwanted, .. } = self.order(seed, steps, width, Lane::Interactive, None);
        (heard, unwanted)
    }

    fn order(&self, seed: u64, steps: u32, width: u32, lane: Lane, resume: Option<Bytes>) -> Ordered {
        let (updates, heard) = unbounded_channel();
        let (unwanted, released) = (CancellationToken::new(), CancellationToken::new());
        let size = Size { width, height: 1 };
        let (signal, sampler) = (Arc::default(), String::new());
        let request = RenderRequest {
            signal,
            size,
            steps,
            guidance_scale: 1.0,
            seed,
            sampler,
            image_guidance_scale: 1.0,
            guidance_rescale: 0.0,
            guidance_range: 0.0..1.0,
            picture: None,
        };
        let ends = (unwanted.clone(), released.clone());
        let order = Order { request, lane, resume, preview_interval: 2, unwanted: ends.0, released: ends.1, updates };
        self.engine.submit(order);
        Ordered { heard, unwanted, released }
    }

    /// Lets the engine take `count` steps.
    fn run(&self, count: usize) {
        (0..count).for_each(|_| self.step.send(()).unwrap());
    }

    fn batches(&self) -> Vec<Vec<u64>> {
        self.script.batches.lock().unwrap().clone()
    }
}

/// All updates in words, the last one first told to have come.
async fn story(mut heard: UnboundedReceiver<Update>) -> Vec<String> {
    let mut story = Vec::new();
    loop {
        let update = tokio::time::timeout(Duration::from_secs(20), heard.recv()).await.expect("in time");
        story.push(match update.expect("an end") {
            Update::LastStep(_) => "last step".to_owned(),
            Update::Step { step, .. } => format!("step {step}"),
            Update::Preview { step, picture, .. } => format!("preview {step} of {}", picture.height()),
            Update::Finished(picture, _) => format!("finished {}", picture.width()),
            Update::Failed(error) => format!("failed: {error}"),
            Update::Checkpoint(Checkpoint { step, .. }) => format!("checkpoint {step}"),
            Update::Stopped => "stopped".to_owned(),
            Update::Released(checkpoint) => format!("released at {:?}", checkpoint.map(|checkpoint| checkpoint.step)),
        });
        if story
            .last()
            .is_some_and(|last| ["f", "st", "r"].iter().any(|end| last.starts_with(end)) && !last.starts_with("step"))
        {
            return story;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn samples_join_and_leave_between_steps() {
    let rig = Rig::start(4).await;
    let (one, _keep) = rig.submit(1, 3, 8);
    rig.run(1);
    while rig.batches().is_empty() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let (two, _keep) = rig.submit(2, 3, 8);
    // The second step may have begun without the second sample, but not the third.
    rig.run(8);
    assert_eq!(story(one).await, ["step 1", "step 2", "preview 2 of 2", "last step", "step 3", "finished 1"]);
    assert_eq!(story(two).await.last().unwrap(), "finished 2");
    let batches = rig.batches();
    assert!(batches.contains(&vec![1, 2]) || batches.contains(&vec![2, 1]), "{batches:?}");
    assert_eq!((batches[0].clone(), batches[batches.len() - 1].clone()), (vec![1], vec![2]));
}

#[tokio::test(flavor = "multi_thread")]
async fn unlike_samples_take_turns_and_batches_are_capped() {
    let rig = Rig::start(2).await;
    // All are in before the first step ends.
    let orders: Vec<_> = [(1, 8), (2, 8), (3, 8), (4, 9)].map(|(seed, width)| rig.submit(seed, 4, width)).into();
    rig.run(64);
    for (index, (heard, _keep)) in orders.into_iter().enumerate() {
        assert_eq!(story(heard).await.last().unwrap(), &format!("finished {}", index + 1));
    }
    for batch in rig.batches() {
        assert!(batch.len() <= 2 && (batch == [4] || !batch.contains(&4)), "{batch:?}");
    }
    // Nobody waits until the others are done.
    let first = rig.batches().iter().position(|batch| batch.contains(&4)).unwrap();
    assert!(first <= 4, "{:?}", rig.batches());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_wanted_leaves_before_the_next_step() {
    let rig = Rig::start(4).await;
    let (long, unwanted) = rig.submit(1, 1000, 8);
    let (mate, _keep) = rig.submit(2, 6, 8);
    rig.run(3);
    while rig.batches().len() < 3 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    unwanted.cancel();
    rig.run(8);
    assert_eq!(story(mate).await.last().unwrap(), "finished 2");
    let long = story(long).await;
    assert_eq!(long.last().unwrap(), "stopped");
    // One step may have been under way.
    assert!(long.iter().filter(|update| update.starts_with("step")).count() <= 4, "{long:?}");
    let (never, unwanted) = rig.submit(3, 1000, 8);
    unwanted.cancel();
    rig.run(1);
    assert_eq!(story(never).await.last().unwrap(), "stopped");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_sample_fails_alone() {
    let rig = Rig::start(8).await;
    let orders = [1, FAILS, 2, CANNOT_BEGIN, CANNOT_FINISH].map(|seed| rig.submit(seed, 2, 8));
    rig.run(16);
    let mut ends = Vec::new();
    for (heard, _keep) in orders {
        ends.push(story(heard).await.pop().unwrap());
    }
    assert_eq!(ends[0], "finished 1");
    assert_eq!(ends[1], "failed: the engine crashed: failed");
    assert_eq!(ends[2], "finished 2");
    assert_eq!(ends[3], "failed: the engine crashed: cannot begin");
    assert!(ends[4].starts_with("failed: the engine crashed:") && ends[4].contains("cannot finish"), "{}", ends[4]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panic_fails_the_one_at_fault_and_its_mates_finish() {
    let rig = Rig::start(8).await;
    let orders = [1, 2, PANICS, 3].map(|seed| rig.submit(seed, 3, 8));
    let (elsewhere, _keep) = rig.submit(4, 3, 9);
    rig.run(64);
    for ((heard, _keep), wanted) in orders.into_iter().zip(["finished 1", "finished 2", "failed", "finished 3"]) {
        let end = story(heard).await.pop().unwrap();
        assert!(end.starts_with(wanted), "{end} {wanted}");
    }
    assert_eq!(story(elsewhere).await.last().unwrap(), "finished 4");
    assert!(*rig.script.built.lock().unwrap() >= 2, "the engine was built anew");
    // It goes on working.
    let (later, _keep) = rig.submit(5, 2, 8);
    assert_eq!(story(later).await, ["step 1", "last step", "step 2", "finished 5"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_cannot_be_built_anew_lets_go_of_what_it_has() {
    let rig = Rig::start(4).await;
    let (mate, _keep) = rig.submit(1, 1000, 9);
    rig.run(1);
    while rig.batches().is_empty() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(!rig.engine.has_ended());
    *rig.script.lost.lock().unwrap() = true;
    let (poison, _keep) = rig.submit(PANICS, 3, 8);
    rig.run(64);
    assert!(story(poison).await.last().unwrap().starts_with("failed: the engine crashed"));
    assert_eq!(story(mate).await.last().unwrap(), "released at None", "it has no part in it");
    tokio::time::timeout(Duration::from_secs(20), rig.engine.ended()).await.expect("the thread ends");
    assert!(rig.engine.has_ended());
    let (late, _keep) = rig.submit(2, 3, 8);
    assert_eq!(story(late).await, ["released at None"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_quick_steps_few_previews_are_made() {
    let rig = Rig::start(1).await;
    let started = Instant::now();
    let (heard, _keep) = rig.submit(1, 400, 8);
    rig.run(400);
    let told = story(heard).await;
    let count = |what: &str| told.iter().filter(|update| update.starts_with(what)).count() as u128;
    let most = 1 + started.elapsed().as_millis() / 200;
    assert!((1..=most).contains(&count("preview")), "{} in {:?}", count("preview"), started.elapsed());
    assert_eq!(count("step"), 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn interactive_work_parks_batch_work_which_goes_on_afterwards() {
    let rig = Rig::start(2).await;
    let batch = [1, 2].map(|seed| rig.order(seed, 30, 8, Lane::Batch, None));
    rig.run(3);
    while rig.batches().len() < 3 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    // Of another shape, so that no batch work can come along.
    let urgent = rig.order(3, 12, 9, Lane::Interactive, None);
    rig.run(80);
    assert_eq!(story(urgent.heard).await.last().unwrap(), "finished 3");
    for (ordered, seed) in batch.into_iter().zip([1, 2]) {
        let story = story(ordered.heard).await;
        assert_eq!(
            story.iter().filter(|update| update.starts_with("step")).count(),
            30,
            "no step is lost or taken twice"
        );
        assert_eq!(story.last().unwrap(), &format!("finished {seed}"));
    }
    let batches = rig.batches();
    let first = batches.iter().position(|batch| batch == &[3]).unwrap();
    let last = batches.iter().rposition(|batch| batch == &[3]).unwrap();
    assert!(first <= 4, "it waits for the step under way and no longer: {batches:?}");
    let between = batches[first..last].iter().filter(|batch| *batch != &[3]).count();
    assert!(between <= 12usize.div_ceil(PATIENCE as usize), "{batches:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn batch_work_of_the_same_shape_fills_the_batch_of_interactive_work() {
    let rig = Rig::start(2).await;
    let batch = [1, 2].map(|seed| rig.order(seed, 9, 8, Lane::Batch, None));
    let urgent = rig.order(3, 4, 8, Lane::Interactive, None);
    rig.run(40);
    for ordered in batch.into_iter().chain([urgent]) {
        assert!(story(ordered.heard).await.last().unwrap().starts_with("finished"));
    }
    let batches = rig.batches();
    let with = batches.iter().filter(|batch| batch.contains(&3)).count();
    assert!(with == 4 && batches.iter().all(|batch| !batch.contains(&3) || batch.len() == 2), "{batches:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn long_renders_are_checkpointed_and_short_ones_are_not() {
    let second = Duration::from_secs(1);
    for (checkpoint_after, checkpoint_interval, wanted) in [
        (Duration::ZERO, Duration::from_nanos(1), vec!["checkpoint 1", "checkpoint 2"]),
        (600 * second, Duration::from_nanos(1), vec![]),
        (Duration::ZERO, Duration::ZERO, vec![]),
        (Duration::ZERO, 600 * second, vec![]),
    ] {
        let rig = Rig::with(4, Rules { checkpoint_after, checkpoint_interval, ..Rules::default() }).await;
        let (heard, _keep) = rig.submit(1, 3, 8);
        let (fails, _keep) = rig.submit(CANNOT_CHECKPOINT, 3, 8);
        rig.run(9);
        let told = story(heard).await;
        assert_eq!(
            told.iter().filter(|update| update.starts_with("checkpoint")).collect::<Vec<_>>(),
            wanted.iter().collect::<Vec<_>>()
        );
        assert_eq!(told.last().unwrap(), "finished 1");
        // A checkpoint that fails does no harm.
        assert_eq!(story(fails).await.last().unwrap(), "finished 501");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sample_goes_on_from_a_checkpoint_and_begins_anew_without() {
    let rig = Rig::start(4).await;
    let order = |from: Bytes| rig.order(1, 4, 8, Lane::Interactive, Some(from)).heard;
    let (resumed, broken, complete) = (order(vec![3].into()), order(Bytes::new()), order(vec![4].into()));
    rig.run(20);
    assert_eq!(story(resumed).await, ["step 4", "finished 1"]);
    assert_eq!(story(broken).await[..2], ["step 1", "step 2"]);
    assert_eq!(story(complete).await, ["finished 1"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_released_leaves_with_a_checkpoint() {
    let rig = Rig::start(4).await;
    let mut ordered = rig.order(1, 1000, 8, Lane::Batch, None);
    rig.run(2);
    for wanted in ["Step { step: 1, steps: 1000 }", "Step { step: 2, steps: 1000 }"] {
        assert_eq!(format!("{:?}", ordered.heard.recv().await.unwrap()), wanted);
    }
    let waiting = rig.order(2, 9, 9, Lane::Batch, None);
    [&ordered, &waiting].into_iter().for_each(|ordered| ordered.released.cancel());
    rig.run(2);
    let end = story(ordered.heard).await.pop().unwrap();
    assert!(["released at Some(2)", "released at Some(3)"].contains(&&*end), "{end}");
    assert!(story(waiting.heard).await.pop().unwrap().starts_with("released at"));
    assert!(!ordered.unwanted.is_cancelled());
}
