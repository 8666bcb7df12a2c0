//! Processes over a real nats-server, and `kill -9` of each in the middle of a request.

use std::{collections::HashSet, time::Duration};

use efferent_proto::v1::{GetImageRequest, JobState, job_event::Event};
use efferent_tests::{
    calls::{all, durable, generate, job, kind, request, until, watch},
    processes::{Cluster, connect},
};

/// Short leases, so that work is taken from the dead soon; steps long enough to be killed in.
fn cluster() -> Cluster {
    Cluster::start(&[
        ("EFFERENT_MODEL", "sim"),
        ("EFFERENT_LEDGER__LEASE", "2s"),
        ("EFFERENT_SIM__EMBED", "300ms"),
        ("EFFERENT_SIM__STEP", "20ms"),
    ])
}

/// A request that takes a hand about a second.
fn long() -> efferent_proto::v1::GenerateRequest {
    efferent_proto::v1::GenerateRequest { steps: Some(50), image_count: Some(2), ..request("a cat") }
}

/// Durable events must tell of each image once and end with `done`.
fn ended_once(events: &[efferent_proto::v1::JobEvent]) {
    let kinds = durable(events, 0);
    assert_eq!(kinds.last(), Some(&"done"), "{kinds:?}");
    let images: Vec<_> = events
        .iter()
        .filter_map(|event| match &event.event {
            Some(Event::Image(image)) => Some(image.image_index),
            _ => None,
        })
        .collect();
    assert_eq!((images.len(), images.iter().collect::<HashSet<_>>().len()), (2, 2), "{kinds:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_goes_through_four_processes_and_all_stop_gracefully() {
    let cluster = cluster();
    let (brain, _) = cluster.role("brain", &[]);
    let (hand, _) = cluster.role("hand", &[]);
    let (coordinator, url) = cluster.coordinator();
    let mut client = connect(&url).await;
    let events = generate(&mut client, long()).await;
    ended_once(&events);
    let image = GetImageRequest { job_id: events[0].job_id.clone(), image_index: 1 };
    client.get_image(image).await.expect("the image is there");
    for process in [hand, brain, coordinator] {
        assert!(process.terminate(), "{}", cluster.log());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_brain_that_dies_in_the_middle_is_replaced() {
    let cluster = cluster();
    let (brain, _) = cluster.role("brain", &[]);
    let _hand = cluster.role("hand", &[]);
    let (_coordinator, url) = cluster.coordinator();
    let mut client = connect(&url).await;
    let mut events = client.generate(long()).await.expect("accepted").into_inner();
    let mut story = until(&mut events, "conditioning").await;
    brain.kill();
    let _second = cluster.role("brain", &[]);
    story.extend(all(events).await);
    ended_once(&story);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hand_that_dies_in_the_middle_is_replaced() {
    let cluster = cluster();
    let _brain = cluster.role("brain", &[]);
    let (hand, _) = cluster.role("hand", &[]);
    let (_coordinator, url) = cluster.coordinator();
    let mut client = connect(&url).await;
    let undisturbed = generate(&mut client, long()).await;
    let mut events = client.generate(long()).await.expect("accepted").into_inner();
    let mut story = until(&mut events, "step").await;
    hand.kill();
    let _second = cluster.role("hand", &[]);
    story.extend(all(events).await);
    ended_once(&story);
    let id = |events: &[efferent_proto::v1::JobEvent]| events[0].job_id.clone();
    let (before, after) = (job(&mut client, &id(&undisturbed)).await, job(&mut client, &id(&story)).await);
    assert!(after.images.iter().all(|image| image.attempt > 1), "{after:?}");
    // Same request, same seeds: the same pictures, whoever drew them.
    let hashes = |job: &efferent_proto::v1::Job| job.images.iter().map(|image| image.hash.clone()).collect::<Vec<_>>();
    assert_eq!(hashes(&before), hashes(&after));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_that_dies_in_the_middle_takes_nothing_with_it() {
    let cluster = cluster();
    let _brain = cluster.role("brain", &[]);
    let _hand = cluster.role("hand", &[]);
    let (coordinator, url) = cluster.coordinator();
    let mut client = connect(&url).await;
    let mut events = client.generate(long()).await.expect("accepted").into_inner();
    let heard = until(&mut events, "queued").await;
    let last = heard.iter().map(|event| event.number).max().expect("a number");
    coordinator.kill();
    let (_second, url) = cluster.coordinator();
    let mut client = connect(&url).await;
    let rest = all(watch(&mut client, &heard[0].job_id, last).await).await;
    let mut story: Vec<_> = heard.into_iter().filter(|event| !matches!(kind(event), "step" | "preview")).collect();
    story.extend(rest);
    ended_once(&story);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_queue_server_that_dies_in_the_middle_loses_nothing() {
    let cluster = cluster();
    let _brain = cluster.role("brain", &[]);
    let _hand = cluster.role("hand", &[]);
    let (_coordinator, url) = cluster.coordinator();
    let mut client = connect(&url).await;
    let mut events = client.generate(long()).await.expect("accepted").into_inner();
    let heard = until(&mut events, "step").await;
    cluster.kill_server(0);
    tokio::time::sleep(Duration::from_millis(500)).await;
    cluster.start_server(0);
    let id = heard[0].job_id.clone();
    let rest = all(watch(&mut client, &id, 0).await).await;
    ended_once(&rest);
    assert_eq!(job(&mut client, &id).await.state(), JobState::Succeeded);
    // The first stream goes on by itself.
    let mut story = heard;
    story.extend(all(events).await);
    ended_once(&story);
    // And new work is taken.
    ended_once(&generate(&mut client, long()).await);
}
