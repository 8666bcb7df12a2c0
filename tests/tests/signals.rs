//! Control signals as objects: made once, rendered later, by whoever accepts their space.

use std::time::Duration;

use efferent_proto::{
    ApiError, time,
    v1::{
        DeleteSignalRequest, EncodeRequest, ErrorCode, GenerateRequest, GetSignalRequest, Job, JobState, Lane, Signal,
        signal_service_client::SignalServiceClient,
    },
};
use efferent_tests::{
    calls::{PATIENCE, all, generate, job, kind, request, until},
    local::{Cluster, Coordinator},
    processes::{self, connect},
};
use futures::future::join_all;
use tonic::transport::Channel;

async fn signals(coordinator: &Coordinator) -> SignalServiceClient<Channel> {
    SignalServiceClient::new(coordinator.channel().await)
}

fn encode(prompt: &str) -> EncodeRequest {
    EncodeRequest { prompt: prompt.to_owned(), ..EncodeRequest::default() }
}

fn render(signal_id: &str, seeds: &[u64]) -> GenerateRequest {
    GenerateRequest { signal_id: signal_id.to_owned(), seeds: seeds.to_vec(), ..GenerateRequest::default() }
}

fn pictures(job: &Job) -> Vec<(u64, String)> {
    job.images.iter().map(|image| (image.seed, image.hash.clone())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_is_rendered_after_its_brain_is_gone() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator().await;
    let brain = cluster.quick_brain().await;
    let mut signals = signals(&coordinator).await;
    // No hand is needed to make it.
    let signal = signals.encode(encode("a red apple")).await.expect("is kept").into_inner();
    let again = signals.encode(encode("a red apple")).await.expect("is kept").into_inner();
    let end = |signal: &Signal| signal.expires_at.as_ref().map(time::system_time);
    assert!(again.signal_id == signal.signal_id && end(&again) >= end(&signal), "it is kept already, and longer now");
    let signal = again;
    assert_eq!((signal.model.as_str(), signal.prompt.as_str()), ("sim", "a red apple"));
    assert!(signal.length > 0 && !signal.space.is_empty());
    let get = GetSignalRequest { signal_id: signal.signal_id.clone() };
    assert_eq!(signals.get_signal(get).await.expect("is known").into_inner(), signal);

    let _hand = cluster.sim_hand(Duration::ZERO).await;
    let mut client = coordinator.client().await;
    let mut prompted = Vec::new();
    for seed in [7, 3, 99] {
        let request = GenerateRequest { seed: Some(seed), image_count: Some(1), ..request("a red apple") };
        let events = generate(&mut client, request).await;
        prompted.extend(pictures(&job(&mut client, &events[0].job_id).await));
    }
    brain.stop().await;
    cluster.settled().await;
    let events = generate(&mut client, render(&signal.signal_id, &[7, 3, 99])).await;
    assert_eq!(kind(events.last().expect("an event")), "done");
    assert!(events.iter().all(|event| kind(event) != "conditioning"), "no brain has seen it");
    let rendered = job(&mut client, &events[0].job_id).await;
    assert_eq!(pictures(&rendered), prompted, "the same pictures as those of the prompt");
    assert_eq!(rendered.request.expect("a request").prompt, "a red apple");
    // With a prompt there is nobody to read it.
    let refused = client.generate(request("a red apple")).await.expect_err("no brain");
    assert_eq!(ApiError::from(&refused).code, ErrorCode::NoWorker);
    let quoted = client.quote(render(&signal.signal_id, &[])).await.expect("a quote").into_inner();
    assert_eq!(quoted.brain_backlog_seconds, 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_rendered_is_refused_by_name() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator().await;
    let _brain = cluster.quick_brain().await;
    let _hand = cluster.sim_hand(Duration::ZERO).await;
    let (mut signals, mut client) = (signals(&coordinator).await, coordinator.client().await);
    let id = "0".repeat(64);
    let asking = client.clone();
    let refused = async |request: GenerateRequest| {
        let error = ApiError::from(&asking.clone().generate(request).await.expect_err("refused"));
        (error.code, error.field, error.message)
    };
    let (code, field, _) = refused(render(&id, &[])).await;
    assert_eq!((code, field.as_str()), (ErrorCode::UnknownSignal, "signal_id"));

    let foreign = Signal {
        signal_id: id.clone(),
        model: "other".to_owned(),
        space: "other/8/x/rms".to_owned(),
        ..Signal::default()
    };
    cluster.ledger.keep_signal(foreign, Duration::from_secs(60)).await.expect("is kept");
    let (code, _, message) = refused(render(&id, &[])).await;
    assert_eq!(code, ErrorCode::NoWorker, "{message}");
    let (code, field, message) = refused(GenerateRequest { model: "sim".to_owned(), ..render(&id, &[]) }).await;
    assert_eq!((code, field.as_str()), (ErrorCode::SpaceMismatch, "model"));
    assert!(message.contains("other/8/x/rms") && message.contains("sim/"), "{message}");

    let brief = EncodeRequest { time_to_live: Some(time::proto_duration(Duration::from_secs(1))), ..encode("a cat") };
    let brief = signals.encode(brief).await.expect("is kept").into_inner();
    generate(&mut client, render(&brief.signal_id, &[1])).await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(refused(render(&brief.signal_id, &[1])).await.0, ErrorCode::UnknownSignal, "its time is over");

    let kept = signals.encode(encode("a dog")).await.expect("is kept").into_inner();
    signals.delete_signal(DeleteSignalRequest { signal_id: kept.signal_id.clone() }).await.expect("is dropped");
    assert_eq!(refused(render(&kept.signal_id, &[1])).await.0, ErrorCode::UnknownSignal);

    let week = Some(time::proto_duration(Duration::from_secs(8 * 24 * 3600)));
    for (request, field) in [
        (encode(" "), "prompt"),
        (EncodeRequest { time_to_live: week, ..encode("a cat") }, "time_to_live"),
        (EncodeRequest { model: "nobody".to_owned(), ..encode("a cat") }, "model"),
        // As the brain finds.
        (encode(&"word ".repeat(600)), "prompt"),
    ] {
        let error = ApiError::from(&signals.encode(request).await.expect_err("refused"));
        assert_eq!(error.field, field, "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn equal_prompts_at_several_brains_cost_one_pass() {
    let cluster = processes::Cluster::start(&[
        ("EFFERENT_MODEL", "sim"),
        ("EFFERENT_SIM__EMBED", "200ms"),
        ("EFFERENT_BRAIN__MAX_PROMPTS", "8"),
    ]);
    let brains: Vec<_> = (0..3).map(|_| cluster.role("brain", &[]).0).collect();
    let _hand = cluster.role("hand", &[]);
    let (_coordinator, url) = cluster.coordinator();
    let client = connect(&url).await;
    let jobs = join_all((0..100).map(|seed| {
        let mut client = client.clone();
        async move {
            let mut request = GenerateRequest { seed: Some(seed), ..request("a red apple") };
            request.set_lane(Lane::Batch);
            let events = generate(&mut client, request).await;
            job(&mut client, &events[0].job_id).await.state()
        }
    }));
    assert!(jobs.await.iter().all(|state| *state == JobState::Succeeded));
    let computed: u64 = brains.iter().map(|brain| brain.counter("efferent_brain_batch_size_sum")).sum();
    assert_eq!(computed, 1, "prompts that were computed");
    let shared: u64 = brains.iter().map(|brain| brain.counter("efferent_signal_cache_total{result=\"shared\"}")).sum();
    assert!(shared > 0, "the other brains had it from the first");
}

#[tokio::test(flavor = "multi_thread")]
async fn large_signals_come_from_their_brain_and_without_it_from_the_store() {
    let cluster = processes::Cluster::start(&[("EFFERENT_MODEL", "sim"), ("EFFERENT_SIM__STEP", "20ms")]);
    let (brain, _) = cluster.role("brain", &["--sim-signal-bytes", "3000000"]);
    let (hand, _) = cluster.role("hand", &["--max-images", "1"]);
    let (_coordinator, url) = cluster.coordinator();
    let mut client = connect(&url).await;
    let fetched = |way: &str| hand.counter(&format!("efferent_hand_signal_seconds_count{{way=\"{way}\"}}"));
    // The hand has a place for the first of two images; both have the same signal.
    let wanted = |prompt, steps| GenerateRequest { image_count: Some(2), steps: Some(steps), ..request(prompt) };
    let events = generate(&mut client, wanted("a red apple", 1)).await;
    assert_eq!(kind(events.last().expect("events")), "done");
    assert_eq!((fetched("served"), fetched("stored")), (1, 0));
    // The second job's task waits for the first job's images; meanwhile its brain dies.
    let mut slow = client.generate(wanted("a blue fish", 50)).await.expect("accepted").into_inner();
    until(&mut slow, "step").await;
    let next = client.generate(wanted("a green car", 1)).await.expect("accepted").into_inner();
    let published = async {
        while brain.counter("efferent_brain_publish_seconds_count") < 3 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, published).await.expect("the brain is done");
    brain.kill();
    let events = all(next).await;
    assert_eq!(kind(events.last().expect("events")), "done");
    assert_eq!((fetched("served"), fetched("stored")), (2, 1));
}
