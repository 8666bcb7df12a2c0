//! Requests from end to end on the embedded queue, with simulated engines.

use std::{collections::HashSet, time::Duration};

use efferent_bus::{Bucket, ledger::Options};
use efferent_proto::v1::{
    CancelJobRequest, ErrorCode, GenerateRequest, GetImageRequest, GetJobRequest, GetStatusRequest, ImageFormat,
    JobState, Lane, ListModelsRequest, ListWorkersRequest, Size, WatchJobRequest, WorkerRole, WorkerState,
    job_event::Event,
};
use efferent_tests::{
    calls::{all, code, durable, generate, job, kind, refused, request, until, watch},
    local::Cluster,
};
use tokio_stream::StreamExt as _;

const STEP: Duration = Duration::from_millis(20);

#[tokio::test(flavor = "multi_thread")]
async fn a_request_becomes_pictures_and_tells_of_its_way() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator().await;
    let _workers = (cluster.quick_brain().await, cluster.sim_hand(STEP).await);
    let mut client = coordinator.client().await;
    let mut wanted = request("a cat");
    (wanted.image_count, wanted.steps, wanted.preview_interval) = (Some(2), Some(6), 2);
    wanted.inline_images = true;
    let events = generate(&mut client, wanted).await;
    let kinds = durable(&events, 0);
    let mut sorted = kinds.clone();
    sorted.sort_unstable();
    assert_eq!(sorted, ["accepted", "conditioning", "done", "image", "image", "queued", "rendering"], "{kinds:?}");
    assert_eq!((kinds[0], kinds[kinds.len() - 1]), ("accepted", "done"));
    assert!(events.iter().any(|event| kind(event) == "step") && events.iter().any(|event| kind(event) == "preview"));
    let images: Vec<_> = events
        .iter()
        .filter_map(|event| match &event.event {
            Some(Event::Image(image)) => Some(image),
            _ => None,
        })
        .collect();
    let indices: HashSet<_> = images.iter().map(|image| (image.image_index, image.seed)).collect();
    assert_eq!(indices, HashSet::from([(0, 1), (1, 2)]));
    for image in images {
        let file = image::load_from_memory(&image.data).expect("a picture");
        assert_eq!((file.width(), file.height()), (64, 64));
        // The same bytes by the other way.
        let request = GetImageRequest { job_id: events[0].job_id.clone(), image_index: image.image_index };
        let mut chunks = client.get_image(request).await.expect("is there").into_inner();
        let mut bytes = Vec::new();
        while let Some(chunk) = chunks.next().await {
            bytes.extend_from_slice(&chunk.expect("a chunk").data);
        }
        assert_eq!(bytes, image.data);
    }
    let job = job(&mut client, &events[0].job_id).await;
    assert_eq!((job.state(), job.images.len(), job.error), (JobState::Succeeded, 2, None));
    // Nothing is left behind.
    for lane in ["interactive", "batch"] {
        for queue in [format!("brain.sim.{lane}"), format!("hand.sim.{lane}")] {
            let depth = cluster.ledger.bus().depth(&queue).await.expect("a queue");
            assert_eq!((depth.ready, depth.leased), (0, 0), "{queue}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn work_that_is_over_at_once_is_told_in_order() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator().await;
    let _workers = (cluster.quick_brain().await, cluster.sim_hand(Duration::ZERO).await);
    let mut client = coordinator.client().await;
    for seed in 0..20 {
        let mut wanted = request("a cat");
        (wanted.seed, wanted.steps, wanted.preview_interval) = (Some(seed), Some(2), 1);
        let events = generate(&mut client, wanted).await;
        let kinds: Vec<_> = events.iter().map(kind).collect();
        assert_eq!(durable(&events, 0), ["accepted", "queued", "conditioning", "rendering", "image", "done"]);
        // Progress that comes at all comes while the image is being rendered.
        let at = |wanted: &str| kinds.iter().position(|kind| *kind == wanted);
        let image = at("image").expect("an image");
        let first = kinds.iter().position(|kind| matches!(*kind, "step" | "preview")).unwrap_or(image);
        assert!(at("rendering").expect("rendering") < first && first <= image, "{kinds:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_format_and_lane_is_served_and_equal_requests_give_equal_pictures() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator().await;
    let _workers = (cluster.quick_brain().await, cluster.sim_hand(Duration::ZERO).await);
    let mut client = coordinator.client().await;
    for format in [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::Webp] {
        let mut hashes = HashSet::new();
        for lane in [Lane::Interactive, Lane::Batch] {
            let mut wanted = request("a dog");
            wanted.set_format(format);
            wanted.set_lane(lane);
            wanted.inline_images = true;
            let events = generate(&mut client, wanted).await;
            let image = events.iter().find_map(|event| match &event.event {
                Some(Event::Image(image)) => Some(image.clone()),
                _ => None,
            });
            let image = image.expect("an image");
            let magic: &[u8] = match format {
                ImageFormat::Png => b"\x89PNG",
                ImageFormat::Jpeg => b"\xff\xd8\xff",
                _ => b"RIFF",
            };
            assert!(image.data.starts_with(magic), "{format:?}");
            hashes.insert(image.hash);
        }
        assert_eq!(hashes.len(), 1, "{format:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_are_refused_by_field_and_others_go_on() {
    use ErrorCode::{InvalidField, LimitExceeded, NotOffered, UnknownModel};
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator().await;
    let _workers = (cluster.quick_brain().await, cluster.sim_hand(STEP).await);
    let mut client = coordinator.client().await;
    let mut other = coordinator.client().await.generate(request("not disturbed")).await.expect("accepted").into_inner();
    until(&mut other, "accepted").await;
    type Change = fn(&mut efferent_proto::v1::GenerateRequest);
    let cases: [(Change, ErrorCode, &str); 17] = [
        (|r| r.prompt.clear(), InvalidField, "prompt"),
        (|r| r.prompt = " \t\n".to_owned(), InvalidField, "prompt"),
        (|r| r.prompt = "x".repeat(4097), LimitExceeded, "prompt"),
        (|r| r.negative_prompt = "x".repeat(4097), LimitExceeded, "negative_prompt"),
        (|r| r.steps = Some(0), LimitExceeded, "steps"),
        (|r| r.steps = Some(10_000), LimitExceeded, "steps"),
        (|r| r.size = Some(Size { width: 65, height: 64 }), NotOffered, "size"),
        (|r| r.size = Some(Size { width: u32::MAX, height: u32::MAX }), NotOffered, "size"),
        (|r| r.image_count = Some(0), LimitExceeded, "image_count"),
        (|r| r.image_count = Some(1000), LimitExceeded, "image_count"),
        (|r| r.guidance_scale = Some(f32::NAN), InvalidField, "guidance_scale"),
        (|r| r.guidance_scale = Some(-2.0), InvalidField, "guidance_scale"),
        (|r| r.guidance_scale = Some(f32::INFINITY), InvalidField, "guidance_scale"),
        (|r| r.model = "nonesuch".to_owned(), UnknownModel, "model"),
        (|r| r.sampler = "nonesuch".to_owned(), NotOffered, "sampler"),
        (|r| r.format = 99, InvalidField, "format"),
        (|r| r.lane = 99, InvalidField, "lane"),
    ];
    for (change, wanted, field) in cases {
        let mut bad = request("a cat");
        change(&mut bad);
        let error = refused(&mut client, bad).await;
        assert_eq!((error.code, error.field.as_str()), (wanted, field), "{error:?}");
        assert!(error.message.contains(field) || error.message.contains("model"), "{error:?}");
    }
    // A prompt of 4096 bytes passes the door; what the brain refuses ends the job with the field.
    let events = generate(&mut client, request(&"word ".repeat(800))).await;
    assert!(matches!(durable(&events, 0).last(), Some(&"done" | &"failed")));
    assert_eq!(kind(all(other).await.last().expect("an end")), "done");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idempotency_key_stands_for_one_job() {
    let cluster = Cluster::new().await;
    let (first, second) = (cluster.coordinator().await, cluster.coordinator().await);
    let _workers = (cluster.quick_brain().await, cluster.sim_hand(STEP).await);
    let (mut a, mut b) = (first.client().await, second.client().await);
    let mut wanted = request("a cat");
    wanted.idempotency_key = "order 66 / ü".to_owned();
    // Two coordinators, at the same time.
    let (mut one, mut two) = (a.clone(), b.clone());
    let (one, two) = tokio::join!(generate(&mut one, wanted.clone()), generate(&mut two, wanted.clone()));
    assert_eq!(one[0].job_id, two[0].job_id);
    assert_eq!((durable(&one, 0).last(), durable(&two, 0).last()), (Some(&"done"), Some(&"done")));
    // Again, when it is long done: the whole story once more, and no second job.
    let again = generate(&mut b, wanted.clone()).await;
    assert!(matches!(&again[0].event, Some(Event::Accepted(accepted)) if accepted.existing));
    assert_eq!(again[0].job_id, one[0].job_id);
    // Whether the images come along changes nothing.
    let again = generate(&mut a, GenerateRequest { inline_images: !wanted.inline_images, ..wanted.clone() }).await;
    assert_eq!(again[0].job_id, one[0].job_id);
    assert_eq!(cluster.ledger.bus().list(Bucket::Jobs).await.expect("jobs").len(), 1);
    // Another request under the same key.
    wanted.prompt = "a dog".to_owned();
    let error = refused(&mut a, wanted.clone()).await;
    assert_eq!((error.code, error.field.as_str()), (ErrorCode::IdempotencyConflict, "idempotency_key"));
    assert!(error.message.contains(&one[0].job_id));
    // One that was refused has not used up its key.
    let wrong = GenerateRequest { idempotency_key: "new".to_owned(), steps: Some(9999), ..wanted.clone() };
    assert_eq!(refused(&mut a, wrong.clone()).await.field, "steps");
    let mended = generate(&mut a, GenerateRequest { steps: Some(2), ..wrong }).await;
    assert_eq!(durable(&mended, 0).last(), Some(&"done"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_served_is_refused_at_once() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator().await;
    let mut client = coordinator.client().await;
    assert_eq!(refused(&mut client, request("a cat")).await.code, ErrorCode::NoWorker);
    let brain = cluster.quick_brain().await;
    let mut named = request("a cat");
    named.model = "sim".to_owned();
    let error = refused(&mut client, named.clone()).await;
    assert_eq!(error.code, ErrorCode::NoWorker);
    assert!(error.message.contains("hand"), "{}", error.message);
    let hand = cluster.sim_hand(Duration::ZERO).await;
    assert_eq!(durable(&generate(&mut client, named.clone()).await, 0).last(), Some(&"done"));
    brain.stop().await;
    cluster.settled().await;
    let error = refused(&mut client, named).await;
    assert_eq!(error.code, ErrorCode::NoWorker);
    assert!(error.message.contains("brain"), "{}", error.message);
    hand.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_refuses_with_a_delay_and_keeps_nothing() {
    let options = Options { brain_queue: 2, lease: Duration::from_secs(2), ..Options::default() };
    let cluster = Cluster::with(options).await;
    let coordinator = cluster.coordinator().await;
    // A brain that takes its time: what it has pulled is leased, and counts.
    let slow = efferent_brain::families::sim::Cost { per_batch: Duration::from_secs(3), ..Default::default() };
    let brain = cluster.brain(efferent_brain::families::sim::factory(slow)).await;
    let hand = cluster.sim_hand(Duration::ZERO).await;
    let mut client = coordinator.client().await;
    let mut accepted = Vec::new();
    let error = loop {
        match client.generate(request(&format!("number {}", accepted.len()))).await {
            Ok(events) => accepted.push(events.into_inner()),
            Err(status) => break efferent_proto::ApiError::from(&status),
        }
        assert!(accepted.len() < 10, "the queue is bounded");
    };
    assert_eq!(error.code, ErrorCode::QueueFull);
    assert!(error.retry_after.is_some(), "{error:?}");
    assert_eq!(cluster.ledger.bus().list(Bucket::Jobs).await.expect("jobs").len(), accepted.len());
    for events in accepted {
        assert_eq!(kind(all(events).await.last().expect("an end")), "done");
    }
    brain.stop().await;
    hand.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelling_stops_running_work_and_drops_waiting_work() {
    let cluster = Cluster::new().await;
    let (coordinator, second) = (cluster.coordinator().await, cluster.coordinator().await);
    let _workers = (cluster.quick_brain().await, cluster.sim_hand(Duration::from_millis(50)).await);
    let (mut client, mut other) = (coordinator.client().await, second.client().await);
    let mut long = request("a long one");
    (long.steps, long.image_count) = (Some(150), Some(16));
    let mut events = client.generate(long).await.expect("accepted").into_inner();
    let mut mate = client.generate(request("a mate")).await.expect("accepted").into_inner();
    let id = until(&mut events, "step").await[0].job_id.clone();
    // By another coordinator than the one that accepted it. Four run, twelve wait.
    let cancelled = other.cancel_job(CancelJobRequest { job_id: id.clone() }).await.expect("cancels").into_inner();
    assert_eq!(cancelled.job.expect("the job").state(), JobState::Cancelled);
    assert!(cancelled.purged > 0, "waiting images are dropped");
    let rest = all(events).await;
    match &rest.last().expect("an end").event {
        Some(Event::Failed(failed)) => assert_eq!(failed.state(), JobState::Cancelled),
        other => panic!("{other:?}"),
    }
    let mate = until(&mut mate, "done").await;
    assert_eq!(kind(mate.last().expect("an end")), "done");
    let workers = tokio::time::timeout(Duration::from_secs(5), async {
        let mut cluster_client = coordinator.cluster_client().await;
        loop {
            let workers =
                cluster_client.list_workers(ListWorkersRequest {}).await.expect("workers").into_inner().workers;
            if workers.iter().all(|worker| worker.in_flight == 0) {
                return workers;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    assert_eq!(workers.await.expect("all work stops").len(), 2);
    // Again: nothing to do, no error. Finished: an error that says so. Unknown: likewise.
    client.cancel_job(CancelJobRequest { job_id: id }).await.expect("is cancelled already");
    let done = mate[0].job_id.clone();
    assert_eq!(code(client.cancel_job(CancelJobRequest { job_id: done.clone() }).await), ErrorCode::JobFinished);
    assert_eq!(job(&mut client, &done).await.state(), JobState::Succeeded);
    for id in ["", "nonesuch", "01ARZ3NDEKTSV4RRFFQ69G5FAV", "a.b.*", &"x".repeat(10_000)] {
        let id = id.to_owned();
        assert_eq!(code(client.cancel_job(CancelJobRequest { job_id: id.clone() }).await), ErrorCode::UnknownJob);
        assert_eq!(code(client.get_job(GetJobRequest { job_id: id.clone() }).await), ErrorCode::UnknownJob);
        let watch = WatchJobRequest { job_id: id.clone(), ..Default::default() };
        assert_eq!(code(client.watch_job(watch).await), ErrorCode::UnknownJob);
        let image = GetImageRequest { job_id: id, image_index: 0 };
        assert_eq!(code(client.get_image(image).await), ErrorCode::UnknownJob);
    }
    let missing = GetImageRequest { job_id: done, image_index: 7 };
    assert_eq!(code(client.get_image(missing).await), ErrorCode::UnknownImage);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_ends_what_waits_and_what_runs() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator().await;
    let _workers = (cluster.quick_brain().await, cluster.sim_hand(Duration::from_millis(20)).await);
    let mut client = coordinator.client().await;
    let mut wanted = request("too long");
    (wanted.steps, wanted.image_count) = (Some(150), Some(8));
    wanted.deadline = Some(efferent_proto::time::proto_duration(Duration::from_millis(700)));
    let events = generate(&mut client, wanted).await;
    match &events.last().expect("an end").event {
        Some(Event::Failed(failed)) => assert_eq!(failed.state(), JobState::Expired),
        other => panic!("{other:?}"),
    }
    assert_eq!(job(&mut client, &events[0].job_id).await.state(), JobState::Expired);
    // The hand is free again.
    assert_eq!(durable(&generate(&mut client, request("next")).await, 0).last(), Some(&"done"));
    let mut wrong = request("a cat");
    for seconds in [0, -5, 1_000_000] {
        let mut deadline = efferent_proto::time::proto_duration(Duration::ZERO);
        deadline.seconds = seconds;
        wrong.deadline = Some(deadline);
        assert_eq!(refused(&mut client, wrong.clone()).await.field, "deadline");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_comes_back_misses_nothing() {
    let cluster = Cluster::new().await;
    let (first, second) = (cluster.coordinator().await, cluster.coordinator().await);
    let _workers = (cluster.quick_brain().await, cluster.sim_hand(STEP).await);
    let mut client = first.client().await;
    let mut wanted = request("a cat");
    (wanted.steps, wanted.image_count) = (Some(30), Some(3));
    let mut events = client.generate(wanted).await.expect("accepted").into_inner();
    let heard = until(&mut events, "conditioning").await;
    let id = heard[0].job_id.clone();
    let last = heard.iter().map(|event| event.number).max().expect("a number");
    drop(events);
    // From where it was, at another coordinator; and from the start, when all is over.
    let mut other = second.client().await;
    let rest = all(watch(&mut other, &id, last).await).await;
    durable(&rest, last);
    let whole = all(watch(&mut client, &id, 0).await).await;
    let kinds = durable(&whole, 0);
    assert_eq!((kinds[0], kinds.iter().filter(|kind| **kind == "image").count()), ("accepted", 3));
    assert_eq!(kinds.last(), Some(&"done"));
    let after_all = all(watch(&mut client, &id, 1000).await).await;
    assert!(after_all.is_empty(), "{after_all:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopping_coordinator_tells_where_to_go_on_and_loses_nothing() {
    let cluster = Cluster::new().await;
    let (first, second) = (cluster.coordinator().await, cluster.coordinator().await);
    let _workers = (cluster.quick_brain().await, cluster.sim_hand(STEP).await);
    let mut client = first.client().await;
    let mut wanted = request("a cat");
    wanted.steps = Some(40);
    let mut events = client.generate(wanted).await.expect("accepted").into_inner();
    let heard = until(&mut events, "rendering").await;
    first.service.tell_to_stop();
    let end = all(events).await;
    let last = match &end.last().expect("an end").event {
        Some(Event::Detached(detached)) => detached.after,
        other => panic!("{other:?}"),
    };
    let rest = all(watch(&mut second.client().await, &heard[0].job_id, last).await).await;
    assert_eq!(durable(&rest, last).last(), Some(&"done"));
    first.service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopping_hand_finishes_or_hands_back() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator().await;
    let brain = cluster.quick_brain().await;
    let hand = cluster.sim_hand(Duration::from_millis(100)).await;
    let mut client = coordinator.client().await;
    let mut wanted = request("longer than the grace period");
    wanted.steps = Some(150);
    let mut events = client.generate(wanted).await.expect("accepted").into_inner();
    until(&mut events, "step").await;
    hand.tell_to_stop();
    // A quick one takes over what is handed back.
    let _quick = cluster.sim_hand(Duration::ZERO).await;
    hand.stop().await;
    let end = until(&mut events, "done").await;
    let image = end.iter().find_map(|event| match &event.event {
        Some(Event::Image(image)) => Some(image),
        _ => None,
    });
    assert!(image.expect("an image").attempt > 1);
    brain.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_are_bounded() {
    let cluster = Cluster::new().await;
    let options = efferent_coordinator::Options { max_streams: 2, ..Default::default() };
    let coordinator = cluster.coordinator_with(options).await;
    let _workers = (cluster.quick_brain().await, cluster.sim_hand(Duration::from_millis(50)).await);
    let mut client = coordinator.client().await;
    let mut long = request("a cat");
    long.steps = Some(150);
    let first = client.generate(long.clone()).await.expect("accepted").into_inner();
    let _second = client.generate(long.clone()).await.expect("accepted").into_inner();
    let error = refused(&mut client, long.clone()).await;
    assert_eq!((error.code, error.limit.as_str()), (ErrorCode::TooManyRequests, "2"));
    drop(first);
    let freed = tokio::time::timeout(Duration::from_secs(5), async {
        while client.generate(long.clone()).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    freed.await.expect("a stream that is closed makes room");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_cluster_can_be_looked_at() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator().await;
    let _workers = (cluster.quick_brain().await, cluster.sim_hand(STEP).await);
    let mut client = coordinator.cluster_client().await;
    let models = client.list_models(ListModelsRequest {}).await.expect("models").into_inner().models;
    assert_eq!(models.len(), 1);
    assert_eq!((models[0].name.as_str(), models[0].live_brains, models[0].live_hands), ("sim", 1, 1));
    assert_eq!((models[0].brain_family.as_str(), models[0].hand_family.as_str()), ("sim", "sim"));
    let workers = client.list_workers(ListWorkersRequest {}).await.expect("workers").into_inner().workers;
    let roles: HashSet<_> = workers.iter().map(|worker| worker.role()).collect();
    assert_eq!(roles, HashSet::from([WorkerRole::Brain, WorkerRole::Hand]));
    assert!(workers.iter().all(|worker| worker.state() == WorkerState::Ready && worker.devices == ["cpu"]));
    assert!(workers.iter().all(|worker| worker.simulated && worker.capacity > 0));
    let status = client.get_status(GetStatusRequest {}).await.expect("a status").into_inner();
    assert_eq!((status.bus.as_str(), status.workers, status.queues.len()), ("embedded", 2, 4));
}
