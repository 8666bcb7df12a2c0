//! What fails again and again: how often it is tried, who suffers from it, and what is left of it.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use efferent_brain::families::sim as brains;
use efferent_bus::{
    Bucket,
    ledger::{
        Options, Transition,
        attempts::{MAX_CRASHES, MAX_OUT_OF_MEMORY, MAX_TRANSIENT},
    },
};
use efferent_hand::families::sim;
use efferent_proto::{
    ApiError,
    internal::{ControlSignal, HandTask},
    v1::{
        DeadLetter, DropDeadRequest, ErrorCode, FailureClass, GenerateRequest, JobState, ListDeadRequest,
        ReplayDeadRequest, ShowDeadRequest, WorkerRole, dead_service_client::DeadServiceClient,
    },
};
use efferent_tests::{
    calls::{PATIENCE, all, code, durable, generate, job, kind, request, until},
    local::Cluster,
};
use efferent_worker::{
    engine::{Brain, EmbedRequest, EngineError, EngineSpec, Hand, RenderRequest, Sample},
    lifecycle::{Member, Profile},
    task::{self, Admission, Cancellations},
    thread::Factory,
};
use image::RgbImage;
use prost::Message as _;
use tonic::transport::Channel;

/// Seeds that do not go well.
const PANICS: u64 = 1_000;
const LACKS_MEMORY: u64 = 2_000;
const FAILS: u64 = 3_000;
const FAILS_TWICE: u64 = 4_000;

/// How often which seed was begun, and which other seeds it was stepped with.
type Begun = Arc<Mutex<HashMap<u64, u32>>>;

/// A simulated hand that some seeds do not agree with.
struct Fragile {
    inner: Box<dyn Hand>,
    begun: Begun,
    seeds: HashMap<usize, u64>,
}

fn fragile(per_step: Duration, begun: &Begun) -> Factory<dyn Hand> {
    let (mut inner, begun) =
        (sim::factory(sim::Cost { per_step: per_step.into(), max_batch: 8, ..Default::default() }), begun.clone());
    Box::new(move || Ok(Box::new(Fragile { inner: inner()?, begun: begun.clone(), seeds: HashMap::new() })))
}

impl Hand for Fragile {
    fn spec(&self) -> &EngineSpec {
        self.inner.spec()
    }

    fn begin(&mut self, request: &RenderRequest) -> Result<Sample, EngineError> {
        let mut begun = self.begun.lock().expect("is not poisoned");
        let times = begun.entry(request.seed).or_default();
        *times += 1;
        match request.seed {
            LACKS_MEMORY => return Err(EngineError::OutOfMemory("no room for 64x64".to_owned())),
            FAILS => return Err(EngineError::compute("cannot begin", "a reason")),
            FAILS_TWICE if *times <= 2 => return Err(EngineError::compute("cannot begin", "a reason")),
            _ => {}
        }
        let sample = self.inner.begin(request)?;
        self.seeds.insert(std::ptr::from_ref(sample.state.as_ref()).cast::<()>().addr(), request.seed);
        Ok(sample)
    }

    fn step(&mut self, batch: &mut [&mut Sample]) -> Vec<Result<(), EngineError>> {
        for sample in batch.iter() {
            let seed = self.seeds.get(&std::ptr::from_ref(sample.state.as_ref()).cast::<()>().addr());
            assert_ne!(seed, Some(&PANICS), "poison");
        }
        self.inner.step(batch)
    }

    fn preview(&mut self, sample: &Sample) -> Result<RgbImage, EngineError> {
        self.inner.preview(sample)
    }

    fn finish(&mut self, sample: Sample) -> Result<RgbImage, EngineError> {
        self.inner.finish(sample)
    }

    fn checkpoint(&self, sample: &Sample) -> Result<Bytes, EngineError> {
        self.inner.checkpoint(sample)
    }

    fn resume(&mut self, request: &RenderRequest, from: &[u8]) -> Result<Sample, EngineError> {
        self.inner.resume(request, from)
    }
}

fn seeded(seed: u64) -> GenerateRequest {
    GenerateRequest { seed: Some(seed), steps: Some(4), ..request("a cat") }
}

type Client = DeadServiceClient<Channel>;

async fn letter(client: &mut Client, job_id: &str) -> DeadLetter {
    let shown = client.show(ShowDeadRequest { job_id: job_id.to_owned() }).await;
    shown.expect("there is a letter").into_inner()
}

async fn letters(client: &mut Client) -> Vec<DeadLetter> {
    client.list(ListDeadRequest { limit: 0 }).await.expect("a list").into_inner().letters
}

#[tokio::test(flavor = "multi_thread")]
async fn each_class_of_failure_has_its_limit_and_its_letter() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator().await;
    let begun = Begun::default();
    let _workers = (cluster.quick_brain().await, cluster.hand(fragile(Duration::from_millis(5), &begun)).await);
    let mut client = coordinator.client().await;
    let mut dead = Client::new(coordinator.channel().await);
    assert_eq!(letters(&mut dead).await, []);
    let mut running = Vec::new();
    for seed in [PANICS, LACKS_MEMORY, FAILS, FAILS_TWICE, 1, 2, 3, 4, 5] {
        running.push((seed, client.generate(seeded(seed)).await.expect("accepted").into_inner()));
    }
    for (seed, events) in running {
        let events = all(events).await;
        let job_id = events[0].job_id.clone();
        let (class, limit) = match seed {
            PANICS => (FailureClass::EngineCrash, MAX_CRASHES),
            LACKS_MEMORY => (FailureClass::OutOfMemory, MAX_OUT_OF_MEMORY),
            FAILS => (FailureClass::Transient, MAX_TRANSIENT),
            _ => {
                assert_eq!(durable(&events, 0).last(), Some(&"done"), "{seed}");
                assert_eq!(code(dead.show(ShowDeadRequest { job_id: job_id.clone() }).await), ErrorCode::UnknownJob);
                let record = cluster.ledger.job(&job_id).await.expect("reads").expect("is there");
                let failed = record.attempts.iter().filter(|attempt| attempt.class() == FailureClass::Transient);
                assert_eq!(failed.count(), if seed == FAILS_TWICE { 2 } else { 0 }, "{seed}");
                continue;
            }
        };
        let ended = job(&mut client, &job_id).await;
        let error = ended.error.expect("why it failed");
        assert_eq!((ended.state, error.code()), (JobState::Failed as i32, ErrorCode::AttemptsExhausted));
        let letter = letter(&mut dead, &job_id).await;
        assert_eq!((letter.class(), letter.attempts.len() as u32), (class, limit), "{letter:?}");
        assert_eq!(letter.request, ended.request);
        assert_eq!(letter.error, Some(error));
        for (attempt, number) in letter.attempts.iter().zip(1..) {
            assert_eq!((attempt.number, attempt.class()), (number, class));
            assert!(attempt.task.starts_with(&format!("{job_id}.0.")), "{attempt:?}");
            assert!(
                !attempt.worker_id.is_empty() && !attempt.error.is_empty() && attempt.time.is_some(),
                "{attempt:?}"
            );
        }
    }
    assert_eq!(letters(&mut dead).await.len(), 3);
    // Begun once in the batch that it brought down and once more alone; from the second attempt on alone at once.
    assert!(begun.lock().expect("is not poisoned")[&PANICS] <= 2 * MAX_CRASHES);
    for queue in ["brain.sim.interactive", "hand.sim.interactive"] {
        let depth = cluster.ledger.bus().depth(queue).await.expect("a queue");
        assert_eq!((depth.ready, depth.leased), (0, 0), "{queue}");
    }
    // What is wrong with the request itself is not tried again, and leaves no letter.
    let events = generate(&mut client, request(&"word ".repeat(800))).await;
    assert_eq!(job(&mut client, &events[0].job_id).await.error.expect("why").code(), ErrorCode::LimitExceeded);
    assert_eq!(letters(&mut dead).await.len(), 3);
}

/// A simulated brain that panics over a poisonous prompt.
struct FragileBrain(Box<dyn Brain>);

impl Brain for FragileBrain {
    fn spec(&self) -> &EngineSpec {
        self.0.spec()
    }

    fn fingerprint(&self) -> String {
        self.0.fingerprint()
    }

    fn tokens(&self, request: &EmbedRequest) -> Result<usize, EngineError> {
        self.0.tokens(request)
    }

    fn embed(&mut self, batch: &[EmbedRequest]) -> Vec<Result<ControlSignal, EngineError>> {
        assert!(batch.iter().all(|request| request.prompt != "poison"), "poison");
        self.0.embed(batch)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_that_crashes_its_brain_has_a_letter_too() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator().await;
    let mut inner = brains::factory(brains::Cost { per_batch: Duration::from_millis(20), ..Default::default() });
    let brain = Box::new(move || Ok(Box::new(FragileBrain(inner()?)) as Box<dyn Brain>));
    let _workers = (cluster.brain(brain).await, cluster.sim_hand(Duration::ZERO).await);
    let mut client = coordinator.client().await;
    let mut running = Vec::new();
    for prompt in ["a cat", "poison", "a dog", "a bird"] {
        running.push((prompt, client.generate(request(prompt)).await.expect("accepted").into_inner()));
    }
    let mut dead = Client::new(coordinator.channel().await);
    for (prompt, events) in running {
        let events = all(events).await;
        let poisonous = prompt == "poison";
        assert_eq!(kind(events.last().expect("an end")), if poisonous { "failed" } else { "done" });
        if poisonous {
            let letter = letter(&mut dead, &events[0].job_id).await;
            assert_eq!((letter.class(), letter.attempts.len() as u32), (FailureClass::EngineCrash, MAX_CRASHES));
            assert!(letter.attempts.iter().all(|attempt| attempt.queue == "brain.sim.interactive"));
            assert!(letter.attempts.iter().all(|attempt| attempt.error.contains("poison")), "{letter:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_is_one_job_however_often_it_is_asked_for() {
    let cluster = Cluster::new().await;
    let (first, second) = (cluster.coordinator().await, cluster.coordinator().await);
    let brain = cluster.quick_brain().await;
    let begun = Begun::default();
    let hand = cluster.hand(fragile(Duration::ZERO, &begun)).await;
    let mut client = first.client().await;
    let events = generate(&mut client, GenerateRequest { idempotency_key: "k".to_owned(), ..seeded(PANICS) }).await;
    let died = events[0].job_id.clone();
    assert_eq!(job(&mut client, &died).await.state(), JobState::Failed);
    let (mut one, mut two) = (Client::new(first.channel().await), Client::new(second.channel().await));
    let replay = || ReplayDeadRequest { job_id: died.clone() };
    // It dies again, and has a letter of its own.
    let again = one.replay(replay()).await.expect("is replayed").into_inner();
    assert!(!again.existing && again.job_id != died);
    let events = all(efferent_tests::calls::watch(&mut client, &again.job_id, 0).await).await;
    assert_eq!(kind(events.last().expect("an end")), "failed");
    assert_eq!(letter(&mut one, &died).await.replayed_as, again.job_id);
    assert_eq!(
        letters(&mut one).await.iter().map(|letter| letter.job_id.as_str()).collect::<Vec<_>>(),
        [again.job_id.as_str(), died.as_str()]
    );
    // Nobody can draw it now: said, and nothing is made.
    hand.stop().await;
    cluster.settled().await;
    let other = ReplayDeadRequest { job_id: again.job_id.clone() };
    assert_eq!(code(one.replay(other.clone()).await), ErrorCode::NoWorker);
    // With a hand that is well, two replays at once at two coordinators make one job.
    let _well = cluster.sim_hand(Duration::ZERO).await;
    let (left, right) = tokio::join!(one.replay(other.clone()), two.replay(other.clone()));
    let (left, right) = (left.expect("is replayed").into_inner(), right.expect("is replayed").into_inner());
    assert_eq!(left.job_id, right.job_id);
    assert!(left.existing != right.existing, "one of them made it");
    let events = all(efferent_tests::calls::watch(&mut client, &left.job_id, 0).await).await;
    assert_eq!(durable(&events, 0).last(), Some(&"done"));
    assert!(two.replay(other.clone()).await.expect("is known").into_inner().existing);
    assert_eq!(cluster.ledger.bus().list(Bucket::Jobs).await.expect("jobs").len(), 3);
    // Dropped, it is gone; dropping it again is fine, and so is what is not there.
    for _ in 0..2 {
        one.drop(DropDeadRequest { job_id: died.clone() }).await.expect("is dropped");
    }
    assert_eq!(code(two.replay(replay()).await), ErrorCode::UnknownJob);
    assert_eq!(letters(&mut two).await.len(), 1);
    for unknown in ["", "nonsense", "a.*", "01ARZ3NDEKTSV4RRFFQ69G5FAV"] {
        let error = one.show(ShowDeadRequest { job_id: unknown.to_owned() }).await.expect_err("is unknown");
        let error = ApiError::from(&error);
        assert_eq!((error.code, error.field.as_str()), (ErrorCode::UnknownJob, "job_id"));
        assert_eq!(code(one.replay(ReplayDeadRequest { job_id: unknown.to_owned() }).await), ErrorCode::UnknownJob);
    }
    brain.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_takes_down_no_more_workers_than_it_may() {
    let cluster = Cluster::with(Options { lease: Duration::from_millis(500), ..Options::default() }).await;
    let coordinator = cluster.coordinator().await;
    let brain = cluster.quick_brain().await;
    // A hand on paper: so that requests are accepted.
    let profile = Profile {
        role: WorkerRole::Hand,
        models: vec![efferent_worker::sim::model()],
        devices: Vec::new(),
        capacity: 1,
        simulated: true,
        activity: Default::default(),
    };
    let _on_paper = Member::join(cluster.ledger.clone(), profile).await.expect("joins");
    cluster.settled().await;
    let mut client = coordinator.client().await;
    let mut events = client.generate(seeded(1)).await.expect("accepted").into_inner();
    let job_id = until(&mut events, "queued").await[0].job_id.clone();
    // Workers that take it on, begin, and are never heard of again.
    let queue = "hand.sim.interactive";
    let bus = cluster.ledger.bus().clone();
    let cancellations = Cancellations::listen(&bus).await.expect("listens");
    for number in 1..=MAX_CRASHES {
        let mut pulled = bus.pull(queue, 1, PATIENCE).await.expect("pulls");
        let delivery = pulled.pop().expect("it is delivered again");
        let task = HandTask::decode(delivery.payload.clone()).expect("a task");
        let worker_id = format!("w{number}");
        let admission = task::admit(
            &cluster.ledger,
            &worker_id,
            &cancellations,
            delivery,
            task.expires_at_ms,
            task.known.as_ref(),
            Transition::Rendering { worker_id: worker_id.clone() },
        );
        let admission = admission.await.expect("the bus is there");
        let admission = match (admission, number) {
            (Admission::Suspect(held), MAX_CRASHES) => held.begin_again().await.expect("the bus is there"),
            (admission, _) => admission,
        };
        let Admission::Go(mut held, _) = admission else { panic!("it is wanted, and alone at the last only") };
        assert_eq!(held.attempt(), number);
        held.begin().await;
        drop(held);
    }
    // The next one does not begin.
    let begun = Begun::default();
    let _hand = cluster.hand(fragile(Duration::ZERO, &begun)).await;
    assert_eq!(kind(all(events).await.last().expect("an end")), "failed");
    assert!(begun.lock().expect("is not poisoned").is_empty());
    let mut dead = Client::new(coordinator.channel().await);
    let letter = letter(&mut dead, &job_id).await;
    let history: Vec<_> = letter.attempts.iter().map(|a| (a.number, a.worker_id.as_str(), a.class())).collect();
    let lost = FailureClass::WorkerLost;
    assert_eq!(history, [(1, "w1", lost), (2, "w2", lost), (3, "w3", lost)]);
    assert_eq!(letter.class(), lost);
    brain.stop().await;
}
