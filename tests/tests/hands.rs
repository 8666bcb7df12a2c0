//! What a hand does when there is more than it can do at once, and when it goes in the middle of a long picture.

use std::time::{Duration, Instant};

use efferent_bus::Bucket;
use efferent_proto::v1::{GenerateRequest, Job, JobEvent, JobState, Lane, Size, job_event::Event};
use efferent_tests::{
    calls::{Client, all, generate, job, kind, request, until, watch},
    local::Cluster,
    processes::{self, connect},
};
use serde_json::Value;

/// What a request of the batch lane asks for: 60 steps, about three seconds of a hand.
fn batch(seed: u64) -> GenerateRequest {
    let mut request = GenerateRequest { steps: Some(60), seed: Some(seed), ..request("a cat") };
    request.set_lane(Lane::Batch);
    request
}

fn hashes(job: &Job) -> Vec<String> {
    job.images.iter().map(|image| image.hash.clone()).collect()
}

fn id(events: &[JobEvent]) -> String {
    events[0].job_id.clone()
}

async fn submitted(client: &mut Client, request: GenerateRequest) -> String {
    id(&until(&mut client.generate(request).await.expect("accepted").into_inner(), "accepted").await)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interactive_request_does_not_wait_for_batch_work() {
    const STEP: Duration = Duration::from_millis(50);
    const PLACES: u64 = 4;
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator().await;
    let _brain = cluster.quick_brain().await;
    let slow = cluster.sim_hand(STEP).await;
    let mut client = coordinator.client().await;
    // As many as the hand takes, and some that wait for it.
    let mut jobs = Vec::new();
    for seed in 0..PLACES + 2 {
        jobs.push(submitted(&mut client, batch(seed)).await);
    }
    let mut last = watch(&mut client, &jobs[PLACES as usize - 1], 0).await;
    until(&mut last, "step").await;
    // Of another size, so that it cannot share a step with them.
    let urgent = GenerateRequest { steps: Some(10), size: Some(Size { width: 32, height: 32 }), ..request("a dog") };
    let started = Instant::now();
    let events = generate(&mut client, urgent).await;
    let took = started.elapsed();
    assert_eq!(kind(events.last().expect("an event")), "done");
    // Its own ten steps, the one under way, the one that parked work is due, and what a busy machine adds. Those it came after take
    // sixty.
    assert!(took >= 10 * STEP && took < 40 * STEP, "{took:?}");
    for job_id in &jobs {
        assert_ne!(job(&mut client, job_id).await.state(), JobState::Succeeded, "it overtook them");
    }
    for job_id in &jobs {
        all(watch(&mut client, job_id, 0).await).await;
    }
    // Undisturbed, the pictures are the same.
    slow.stop().await;
    let _quick = cluster.sim_hand(Duration::ZERO).await;
    for (job_id, seed) in jobs.iter().zip(0..) {
        let job = job(&mut client, job_id).await;
        let image = job.images.first().expect("an image");
        assert_eq!(image.attempt, 1, "its lease was kept while it was parked");
        let mut alone = GenerateRequest { seed: Some(seed), ..batch(seed) };
        alone.set_lane(Lane::Interactive);
        let alone = id(&generate(&mut client, alone).await);
        assert_eq!(hashes(&job), hashes(&self::job(&mut client, &alone).await));
    }
}

/// Long pictures, leases that end soon, checkpoints all the time.
fn cluster() -> processes::Cluster {
    processes::Cluster::start(&[
        ("EFFERENT_MODEL", "sim"),
        ("EFFERENT_LOG_FORMAT", "json"),
        ("EFFERENT_LEDGER__LEASE", "2s"),
        ("EFFERENT_SIM__STEP", "30ms"),
        ("EFFERENT_HAND__GRACE", "1s"),
        ("EFFERENT_HAND__CHECKPOINT_AFTER", "1s"),
        ("EFFERENT_HAND__CHECKPOINT_INTERVAL", "100ms"),
    ])
}

/// Two pictures of about five seconds.
fn long() -> GenerateRequest {
    GenerateRequest { steps: Some(150), image_count: Some(2), ..request("a cat") }
}

/// The steps at which pictures were gone on with, as hands logged them.
fn resumed(cluster: &processes::Cluster) -> Vec<u64> {
    let log = cluster.log();
    let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let resumed = lines.filter(|line| line["message"] == "an image goes on from its checkpoint");
    resumed.filter_map(|line| line["step"].as_u64()).collect()
}

/// A long request whose hand goes as `go` has it, and what it looks like undisturbed.
async fn disturbed(go: impl FnOnce(processes::Process)) {
    let cluster = cluster();
    let _brain = cluster.role("brain", &[]);
    let (hand, _) = cluster.role("hand", &[]);
    let (_coordinator, url) = cluster.coordinator();
    let mut client = connect(&url).await;
    let mut events = client.generate(long()).await.expect("accepted").into_inner();
    let mut story = Vec::new();
    let step = |event: &JobEvent| if let Some(Event::Step(step)) = &event.event { step.step } else { 0 };
    while story.iter().map(step).max().unwrap_or(0) < 60 {
        story.extend(until(&mut events, "step").await);
    }
    go(hand);
    let _second = cluster.role("hand", &[]);
    story.extend(all(events).await);
    assert_eq!(kind(story.last().expect("an event")), "done");
    let after = job(&mut client, &id(&story)).await;
    assert!(after.images.iter().all(|image| image.attempt > 1), "{after:?}");
    let steps = resumed(&cluster);
    assert!(steps.len() == 2 && steps.iter().all(|step| (20..150).contains(step)), "{steps:?}\n{}", cluster.log());
    let undisturbed = id(&generate(&mut client, long()).await);
    assert_eq!(hashes(&after), hashes(&job(&mut client, &undisturbed).await));
    // Nothing is left behind.
    let bus = cluster.bus().await;
    let left = async {
        while !bus.list(Bucket::Checkpoints).await.expect("the bus is there").is_empty() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), left).await.expect("checkpoints are removed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_picture_goes_on_where_a_killed_hand_left_it() {
    disturbed(processes::Process::kill).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_picture_goes_on_where_a_stopped_hand_left_it() {
    disturbed(|hand| assert!(hand.terminate())).await;
}
