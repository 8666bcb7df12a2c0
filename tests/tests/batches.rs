//! Batches from submission to results, with simulated engines: on the embedded queue, and over nats-server with `kill -9` of each process.

use std::{collections::HashSet, time::Duration};

use efferent_bus::{Bucket, ledger::Options};
use efferent_proto::{
    ApiError, names,
    v1::{
        BatchHeader, BatchItems, BatchState, CancelBatchRequest, ErrorCode, GenerateRequest, GetBatchRequest,
        ItemState, ListModelsRequest, Model, PutObjectRequest, SubmitBatchRequest, SubmitBatchResponse,
        object_service_client::ObjectServiceClient, submit_batch_request::Part,
    },
};
use efferent_tests::{
    batches::{Client, end, id, items, key, results, submit},
    calls::{PATIENCE, generate, kind, request},
    local::Cluster,
    processes,
};
use tonic::Status;

#[tokio::test(flavor = "multi_thread")]
async fn every_item_ends_once_and_is_listed_in_order() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator().await;
    let _workers = (cluster.quick_brain().await, cluster.sim_hand(Duration::ZERO).await);
    let mut client = Client::new(coordinator.channel().await);
    let mut wanted = items(600);
    wanted[7].prompt = " ".to_owned();
    wanted[599].steps = Some(9999);
    let answer = submit(&mut client, key(""), &wanted).await.expect("the batch is accepted");
    let faults: Vec<_> =
        answer.errors.iter().map(|error| (error.index, error.error.as_ref().map(|e| e.field.as_str()))).collect();
    assert_eq!(faults, [(7, Some("prompt")), (599, Some("steps"))]);
    let batch = end(&mut client, &id(&answer)).await;
    assert_eq!((batch.state(), batch.item_count), (BatchState::Ended, 600));
    assert_eq!((batch.succeeded, batch.failed, batch.running, batch.cancelled), (598, 2, 0, 0));
    assert!(batch.finished_at.is_some());
    let all = results(&mut client, &batch.batch_id, 0, &[]).await;
    assert_eq!(all.iter().map(|item| item.index).collect::<Vec<_>>(), (0..600).collect::<Vec<_>>());
    assert_eq!(all.iter().filter(|item| item.state() == ItemState::Succeeded).count(), 598);
    assert!(all.iter().all(|item| item.images.len() == usize::from(item.state() == ItemState::Succeeded)));
    let seeds: HashSet<_> = all.iter().flat_map(|item| &item.images).map(|image| image.seed).collect();
    assert_eq!(seeds.len(), 598, "each with its own seed");
    // From an index, and by state.
    let failed = results(&mut client, &batch.batch_id, 8, &[ItemState::Failed]).await;
    assert_eq!(failed.iter().map(|item| item.index).collect::<Vec<_>>(), [599]);
    let error = failed[0].error.as_ref().expect("why it failed");
    assert_eq!((error.code(), error.field.as_str()), (ErrorCode::LimitExceeded, "steps"));
    // Nothing is left behind.
    for queue in ["brain.sim.batch", "hand.sim.batch"] {
        let depth = cluster.ledger.bus().depth(queue).await.expect("a queue");
        assert_eq!((depth.ready, depth.leased), (0, 0), "{queue}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_submission_can_be_sent_again() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator().await;
    let _workers = (cluster.quick_brain().await, cluster.sim_hand(Duration::ZERO).await);
    let mut client = Client::new(coordinator.channel().await);
    let wanted = items(700);
    // Cut off after the first chunk.
    let header = SubmitBatchRequest { part: Some(Part::Header(key("again"))) };
    let first = SubmitBatchRequest { part: Some(Part::Items(BatchItems { items: wanted[..300].to_vec() })) };
    let nonsense = SubmitBatchRequest { part: None };
    client.submit_batch(tokio_stream::iter([header, first, nonsense])).await.expect_err("the stream breaks");
    let answer = submit(&mut client, key("again"), &wanted).await.expect("it goes on");
    let batch = end(&mut client, &id(&answer)).await;
    assert_eq!((batch.item_count, batch.succeeded), (700, 700));
    // The whole again is the same batch, also at another coordinator.
    let other = cluster.coordinator().await;
    let mut elsewhere = Client::new(other.channel().await);
    let again = submit(&mut elsewhere, key("again"), &wanted).await.expect("it is known");
    assert!(again.existing);
    assert_eq!(id(&again), batch.batch_id);
    // Other items under the same key are refused.
    let mut others = wanted.clone();
    others[650].prompt = "a dog".to_owned();
    let refused = submit(&mut client, key("again"), &others).await.expect_err("the key is taken");
    assert_eq!(ApiError::from(&refused).code, ErrorCode::IdempotencyConflict);
    let refused = submit(&mut client, key("again"), &wanted[..600]).await.expect_err("the key is taken");
    assert_eq!(ApiError::from(&refused).code, ErrorCode::IdempotencyConflict);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_a_batch_is_refused() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator().await;
    let _workers = (cluster.quick_brain().await, cluster.sim_hand(Duration::ZERO).await);
    let mut client = Client::new(coordinator.channel().await);
    let code = |outcome: Result<SubmitBatchResponse, Status>| {
        let error = ApiError::from(&outcome.expect_err("it is refused"));
        (error.code, error.field)
    };
    let headless = client.submit_batch(tokio_stream::iter([SubmitBatchRequest { part: None }])).await;
    assert_eq!(code(headless.map(tonic::Response::into_inner)), (ErrorCode::InvalidField, "header".to_owned()));
    let empty = submit(&mut client, key(""), &[]).await;
    assert_eq!(code(empty), (ErrorCode::InvalidField, "items".to_owned()));
    let long = submit(&mut client, key(&"k".repeat(129)), &items(1)).await;
    assert_eq!(code(long), (ErrorCode::LimitExceeded, "idempotency_key".to_owned()));
    let mut faulty = items(300);
    faulty[270].guidance_scale = Some(f32::NAN);
    let strict = submit(&mut client, BatchHeader { all_or_nothing: true, ..key("") }, &faulty).await;
    assert_eq!(code(strict), (ErrorCode::InvalidField, "guidance_scale".to_owned()));
    for unknown in ["", "nonsense", "01ARZ3NDEKTSV4RRFFQ69G5FAV"] {
        let request = GetBatchRequest { batch_id: unknown.to_owned() };
        let error = ApiError::from(&client.get_batch(request).await.expect_err("it is unknown"));
        assert_eq!((error.code, error.field.as_str()), (ErrorCode::UnknownBatch, "batch_id"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_of_items_is_read_line_by_line() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator().await;
    let _workers = (cluster.quick_brain().await, cluster.sim_hand(Duration::ZERO).await);
    let channel = coordinator.channel().await;
    let (mut client, mut objects) = (Client::new(channel.clone()), ObjectServiceClient::new(channel));
    let mut text = "a cat\n\n{\"prompt\": \"a dog\", \"seed\": 7}\n{\"promt\": \"x\"}\n".as_bytes().to_vec();
    text.extend_from_slice(b"\xff\n");
    text.extend("a bird\n".repeat(500).as_bytes());
    let parts = text.chunks(1000).map(|part| PutObjectRequest { data: part.to_vec().into() }).collect::<Vec<_>>();
    let object = objects.put_object(tokio_stream::iter(parts)).await.expect("is kept").into_inner();
    assert_eq!(object.length, text.len() as u64);
    let header = BatchHeader { items_object: object.hash.clone(), model: "sim".to_owned(), ..key("") };
    let answer = submit(&mut client, header.clone(), &[]).await.expect("the batch is accepted");
    let faults: Vec<_> =
        answer.errors.iter().map(|error| (error.index, error.error.clone().unwrap_or_default())).collect();
    assert_eq!(faults.iter().map(|(index, _)| *index).collect::<Vec<_>>(), [2, 3]);
    assert!(
        faults[0].1.message.starts_with("line 4:") && faults[1].1.message.contains("line 5: is not UTF-8"),
        "{faults:?}"
    );
    let batch = end(&mut client, &id(&answer)).await;
    assert_eq!((batch.item_count, batch.succeeded, batch.failed), (504, 502, 2));
    let first = results(&mut client, &batch.batch_id, 0, &[]).await;
    assert_eq!(first[1].images[0].seed, 7);
    for (header, items, field) in [
        (header.clone(), items(1), "items"),
        (BatchHeader { items_object: "0".repeat(64), ..key("") }, Vec::new(), "items_object"),
        (BatchHeader { items_object: "../secret".to_owned(), ..key("") }, Vec::new(), "items_object"),
    ] {
        let error = submit(&mut client, header, &items).await.expect_err("is refused");
        assert_eq!(ApiError::from(&error).field, field);
    }
    let nothing = objects.put_object(tokio_stream::iter([PutObjectRequest::default()])).await.expect_err("is empty");
    assert_eq!(ApiError::from(&nothing).field, "data");
    let part = PutObjectRequest { data: vec![0; 1024 * 1024].into() };
    let large = objects.put_object(tokio_stream::iter(vec![part; 65])).await.expect_err("is too large");
    assert_eq!(ApiError::from(&large).code, ErrorCode::LimitExceeded);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_batch_stops() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator().await;
    let _workers = (cluster.quick_brain().await, cluster.sim_hand(Duration::from_millis(20)).await);
    let mut client = Client::new(coordinator.channel().await);
    let answer = submit(&mut client, key(""), &items(1000)).await.expect("the batch is accepted");
    let request = CancelBatchRequest { batch_id: id(&answer) };
    tokio::time::sleep(Duration::from_millis(500)).await;
    client.cancel_batch(request.clone()).await.expect("it is cancelled");
    client.cancel_batch(request.clone()).await.expect("twice is once");
    let batch = end(&mut client, &id(&answer)).await;
    assert_eq!(batch.state(), BatchState::Cancelled);
    assert_eq!(batch.succeeded + batch.cancelled, 1000, "{batch:?}");
    assert!(batch.cancelled > 800, "{batch:?}");
    let error = client.cancel_batch(request).await.map(|answer| answer.into_inner().state());
    assert_eq!(error.expect("still once"), BatchState::Cancelled);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_coordinator_goes_on_and_interactive_requests_go_first() {
    let cluster = Cluster::with(Options { lease: Duration::from_secs(2), ..Options::default() }).await;
    let (first, second) = (cluster.coordinator().await, cluster.coordinator().await);
    let _workers = (cluster.quick_brain().await, cluster.sim_hand(Duration::from_millis(5)).await);
    let mut client = Client::new(first.channel().await);
    let answer = submit(&mut client, key(""), &items(500)).await.expect("the batch is accepted");
    tokio::time::sleep(Duration::from_millis(300)).await;
    let mut images = second.client().await;
    let events = generate(&mut images, request("in between")).await;
    assert_eq!(kind(events.last().expect("events")), "done");
    let mut elsewhere = Client::new(second.channel().await);
    let before =
        elsewhere.get_batch(GetBatchRequest { batch_id: id(&answer) }).await.expect("it is known").into_inner();
    assert_eq!(before.state(), BatchState::Running, "the request did not wait for the batch: {before:?}");
    // Whichever of the two dispatches: the other takes over.
    first.service.stop().await;
    let batch = end(&mut elsewhere, &id(&answer)).await;
    assert_eq!((batch.state(), batch.succeeded), (BatchState::Ended, 500));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_outlives_whoever_dies() {
    let cluster = processes::Cluster::start(&[
        ("EFFERENT_MODEL", "sim"),
        ("EFFERENT_LEDGER__LEASE", "2s"),
        ("EFFERENT_SIM__STEP", "10ms"),
    ]);
    let (brain, _) = cluster.role("brain", &[]);
    let (hand, _) = cluster.role("hand", &[]);
    let _other_hand = cluster.role("hand", &[]);
    let (coordinator, url) = cluster.coordinator();
    let mut client = Client::connect(url).await.expect("it listens");
    let answer = submit(&mut client, key("all"), &items(600)).await.expect("the batch is accepted");
    let pause = || tokio::time::sleep(Duration::from_millis(400));
    pause().await;
    hand.kill();
    pause().await;
    coordinator.kill();
    let (_second, url) = cluster.coordinator();
    brain.kill();
    let _second_brain = cluster.role("brain", &[]);
    pause().await;
    cluster.kill_server(0);
    pause().await;
    cluster.start_server(0);
    // Its stream breaks if the coordinator cannot read for long; a client asks again.
    let mut client = Client::connect(url).await.expect("it listens");
    let batch = end(&mut client, &id(&answer)).await;
    assert_eq!((batch.state(), batch.succeeded, batch.failed), (BatchState::Ended, 600, 0), "{}", cluster.log());
    let all = results(&mut client, &batch.batch_id, 0, &[ItemState::Succeeded]).await;
    assert_eq!(all.iter().map(|item| item.index).collect::<Vec<_>>(), (0..600).collect::<Vec<_>>());
    assert!(all.iter().all(|item| item.images.len() == 1 && item.images[0].seed == item.index));
    // Submitted again, nothing is drawn again.
    let again = submit(&mut client, key("all"), &items(600)).await.expect("it is known");
    assert!(again.existing);
    assert_eq!(again.batch.expect("a batch").succeeded, 600);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_cannot_be_read_does_not_hold_up_others() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator().await;
    let mut client = Client::new(coordinator.channel().await);
    let mut damaged = Vec::new();
    for count in [3, 4] {
        // Each with items of its own: equal ones are one object.
        let answer = submit(&mut client, key(""), &items(count)).await.expect("the batch is accepted");
        damaged.push(id(&answer));
    }
    // Nothing is released without workers, and the next coordinator has read nothing.
    coordinator.service.stop().await;
    for (batch, bucket) in damaged.iter().zip([None, Some(Bucket::Chunks)]) {
        let chunk = names::chunk_key(batch, 0);
        match bucket {
            Some(bucket) => cluster.ledger.bus().delete(bucket, &chunk).await.expect("deletes"),
            None => {
                let (record, _) = cluster.ledger.chunk(batch, 0).await.expect("reads").expect("is there");
                cluster.ledger.bus().delete_object(&record.items).await.expect("deletes");
            }
        }
    }
    let coordinator = cluster.coordinator().await;
    let mut client = Client::new(coordinator.channel().await);
    let _workers = (cluster.quick_brain().await, cluster.sim_hand(Duration::ZERO).await);
    let others = GenerateRequest { seed: Some(77), ..request("a dog") };
    let answer = submit(&mut client, key(""), &[others]).await.expect("the batch is accepted");
    assert_eq!(end(&mut client, &id(&answer)).await.succeeded, 1);
    for batch_id in damaged {
        let batch = client.get_batch(GetBatchRequest { batch_id }).await.expect("it is known").into_inner();
        assert_eq!((batch.state(), batch.succeeded), (BatchState::Running, 0));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn items_whose_model_has_no_worker_do_not_hold_up_others() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator().await;
    let _workers = (cluster.quick_brain().await, cluster.sim_hand(Duration::ZERO).await);
    cluster.settled().await;
    let mut client = Client::new(coordinator.channel().await);
    let mut models = coordinator.cluster_client().await;
    let known = models.list_models(ListModelsRequest {}).await.expect("models").into_inner().models.remove(0);
    let other =
        Model { name: "other".to_owned(), brain: "other".to_owned(), hand: "other".to_owned(), ..known.clone() };
    cluster.ledger.register_model(&other).await.expect("registers");
    let known_by_both = async {
        while models.list_models(ListModelsRequest {}).await.expect("models").into_inner().models.len() < 2 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(PATIENCE, known_by_both).await.expect("the model is heard of");
    let mut wanted = items(60);
    wanted.iter_mut().for_each(|item| item.model = known.name.clone());
    wanted[..40].iter_mut().for_each(|item| item.model = "other".to_owned());
    let batch_id = id(&submit(&mut client, key(""), &wanted).await.expect("the batch is accepted"));
    let all_else = async {
        loop {
            let wanted = GetBatchRequest { batch_id: batch_id.clone() };
            let batch = client.get_batch(wanted).await.expect("it is known").into_inner();
            if batch.succeeded == 20 {
                return batch;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let batch = tokio::time::timeout(PATIENCE, all_else).await.expect("the others are drawn");
    assert_eq!((batch.state(), batch.failed), (BatchState::Running, 0));
}
