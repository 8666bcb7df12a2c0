//! Tenants: shares of the hands, quotas; quotes and deadlines; another try for failed items. With simulated engines on the embedded queue.

use std::time::Duration;

use efferent_proto::{
    ApiError, time,
    v1::{
        BatchHeader, BatchItems, BatchState, ErrorCode, GenerateRequest, GetBatchRequest, ListBatchesRequest,
        RetryBatchRequest, SubmitBatchRequest, submit_batch_request::Part,
    },
};
use efferent_tests::{
    batches::{Client, end, id, items, key, submit},
    calls::{PATIENCE, generate, kind, refused, request},
    local::Cluster,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

fn of(tenant: &str) -> BatchHeader {
    BatchHeader { tenant: tenant.to_owned(), ..key("") }
}

fn with(tenants: &str) -> efferent_coordinator::Options {
    let tenants = tenants.to_owned().try_into().expect("terms");
    efferent_coordinator::Options { tenants, ..Default::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_small_batch_does_not_wait_for_another_tenants_large_one() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator().await;
    let _workers = (cluster.quick_brain().await, cluster.sim_hand(Duration::from_millis(10)).await);
    let mut client = Client::new(coordinator.channel().await);
    let large = id(&submit(&mut client, of("large"), &items(3000)).await.expect("is accepted"));
    tokio::time::sleep(Duration::from_millis(500)).await;
    let done = async |client: &mut Client, id: &str| {
        client.get_batch(GetBatchRequest { batch_id: id.to_owned() }).await.expect("is known").into_inner().succeeded
    };
    let before = done(&mut client, &large).await;
    let small = id(&submit(&mut client, of("small"), &items(50)).await.expect("is accepted"));
    let batch = end(&mut client, &small).await;
    assert_eq!((batch.succeeded, batch.tenant.as_str()), (50, "small"));
    let list = async |client: &mut Client, tenant: &str| {
        let request = ListBatchesRequest { tenant: tenant.to_owned(), limit: 0 };
        let batches = client.list_batches(request).await.expect("a list").into_inner().batches;
        batches.into_iter().map(|batch| batch.batch_id).collect::<Vec<_>>()
    };
    assert_eq!(list(&mut client, "").await, [small.clone(), large.clone()], "the newest first");
    assert_eq!(list(&mut client, "large").await, std::slice::from_ref(&large));
    let request = ListBatchesRequest { limit: 1001, ..Default::default() };
    let refused = client.list_batches(request).await.expect_err("is too many");
    assert_eq!(ApiError::from(&refused).field, "limit");
    let meanwhile = done(&mut client, &large).await - before;
    // The two share alike: besides the 50 of its own, 50 of the other's, and what was released already or is counted late.
    assert!((25..=250).contains(&meanwhile), "{meanwhile} of the large batch were drawn beside the small one");
    client
        .cancel_batch(efferent_proto::v1::CancelBatchRequest { batch_id: large })
        .await
        .expect("the rest is not waited for");
}

#[tokio::test(flavor = "multi_thread")]
async fn quotas_are_kept_and_named() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator_with(with("small queued=100; slow rate=1; one running=1")).await;
    let _workers = (cluster.quick_brain().await, cluster.sim_hand(Duration::from_millis(50)).await);
    let mut client = Client::new(coordinator.channel().await);
    let error = submit(&mut client, of("small"), &items(101)).await.expect_err("is over the quota");
    let error = ApiError::from(&error);
    assert_eq!((error.code, error.field.as_str(), error.limit.as_str()), (ErrorCode::QuotaExceeded, "queued", "100"));
    assert!(error.retry_after.is_some());
    let header = BatchHeader { tenant: "small".to_owned(), ..key("whole") };
    let first = submit(&mut client, header.clone(), &items(90)).await.expect("is within the quota");
    submit(&mut client, of("small"), &items(90)).await.expect_err("most of the first still wait");
    assert!(submit(&mut client, header, &items(90)).await.expect("the same again costs nothing").existing);
    submit(&mut client, of("other"), &items(200)).await.expect("others have no quota");
    assert_eq!(end(&mut client, &id(&first)).await.succeeded, 90);

    let mut images = coordinator.client().await;
    let of = |tenant: &str| GenerateRequest { tenant: tenant.to_owned(), ..request("a cat") };
    let events = generate(&mut images, of("slow")).await;
    assert_eq!(kind(events.last().expect("events")), "done");
    let error = refused(&mut images, of("slow")).await;
    assert_eq!((error.code, error.field.as_str()), (ErrorCode::QuotaExceeded, "rate"));
    let slow = GenerateRequest { steps: Some(100), ..of("one") };
    let open = images.generate(slow).await.expect("is accepted");
    let error = refused(&mut images, of("one")).await;
    assert_eq!((error.code, error.field.as_str()), (ErrorCode::QuotaExceeded, "running"));
    drop(open);
    let error = refused(&mut images, of("No Name")).await;
    assert_eq!((error.code, error.field.as_str()), (ErrorCode::InvalidField, "tenant"));
}

#[tokio::test(flavor = "multi_thread")]
async fn submissions_side_by_side_do_not_go_over_a_quota_together() {
    let cluster = Cluster::new().await;
    // Without workers, what is accepted waits.
    let coordinator = cluster.coordinator_with(with("small queued=100")).await;
    let mut client = Client::new(coordinator.channel().await);
    let begin = async |header: BatchHeader| {
        let (sender, parts) = mpsc::channel(2);
        let mut client = client.clone();
        let answer = tokio::spawn(async move { client.submit_batch(ReceiverStream::new(parts)).await });
        for part in [Part::Header(header), Part::Items(BatchItems { items: items(60) })] {
            sender.send(SubmitBatchRequest { part: Some(part) }).await.expect("is read");
        }
        (sender, answer)
    };
    let (first, second) = (begin(of("small")).await, begin(of("small")).await);
    let both_began = async {
        let mut client = client.clone();
        let request = ListBatchesRequest { tenant: "small".to_owned(), limit: 0 };
        while client.list_batches(request.clone()).await.expect("a list").into_inner().batches.len() < 2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, both_began).await.expect("both begin");
    // Both end now.
    let answers = [first, second].map(|(sender, answer)| {
        drop(sender);
        answer
    });
    let mut refusals = Vec::new();
    for answer in answers {
        let answer = tokio::time::timeout(PATIENCE, answer).await.expect("an answer in time").expect("no panic");
        refusals.extend(answer.err());
    }
    assert_eq!(refusals.len(), 1, "one is within the quota, two are not: {refusals:?}");
    let error = ApiError::from(&refusals[0]);
    assert_eq!((error.code, error.field.as_str(), error.limit.as_str()), (ErrorCode::QuotaExceeded, "queued", "40"));
    // What was refused takes no room; and the same batch twice takes it once.
    let header = BatchHeader { tenant: "small".to_owned(), ..key("whole") };
    let (mut one, mut other, wanted) = (client.clone(), client.clone(), items(40));
    let (one, other) = tokio::join!(submit(&mut one, header.clone(), &wanted), submit(&mut other, header, &wanted));
    assert_eq!(id(&one.expect("is within the quota")), id(&other.expect("is the same")));
    submit(&mut client, of("small"), &items(1)).await.expect_err("all room is taken");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quote_tells_how_long_and_a_deadline_too_short_is_refused() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator().await;
    let _workers = (cluster.quick_brain().await, cluster.sim_hand(Duration::from_millis(20)).await);
    let mut client = coordinator.client().await;
    let wanted = GenerateRequest { steps: Some(20), ..request("a cat") };
    let guess = client.quote(wanted.clone()).await.expect("a quote").into_inner();
    assert!(!guess.measured);
    let hurried = |time: u64| GenerateRequest {
        deadline: Some(time::proto_duration(Duration::from_millis(time))),
        ..wanted.clone()
    };
    generate(&mut client, wanted.clone()).await;
    // The worker tells of it with its next heartbeat.
    let finish = loop {
        let quote = client.quote(wanted.clone()).await.expect("a quote").into_inner();
        if quote.measured {
            break quote.finish_in.as_ref().and_then(time::duration).expect("is told").as_secs_f64();
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    assert!((0.3..3.0).contains(&finish), "20 steps of 20 ms take {finish} s");
    let error = refused(&mut client, hurried(20)).await;
    assert_eq!((error.code, error.field.as_str()), (ErrorCode::DeadlineUnmeetable, "deadline"));
    assert!(error.limit.ends_with('s') && error.retry_after.is_some());
    let events = generate(&mut client, hurried(60_000)).await;
    assert_eq!(kind(events.last().expect("events")), "done");
    let bad = client.quote(GenerateRequest { steps: Some(0), ..wanted }).await.expect_err("is checked like a request");
    assert_eq!(ApiError::from(&bad).field, "steps");
}

#[tokio::test(flavor = "multi_thread")]
async fn failed_items_get_another_try() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator().await;
    let brain = cluster.quick_brain().await;
    let mut client = Client::new(coordinator.channel().await);
    let mut wanted = items(300);
    // Refused at submission, and refused by the brain.
    wanted[3].steps = Some(0);
    for index in [10, 290] {
        wanted[index].prompt = "word ".repeat(600);
    }
    let _hand = cluster.sim_hand(Duration::ZERO).await;
    let answer = submit(&mut client, key(""), &wanted).await.expect("is accepted");
    let batch = end(&mut client, &id(&answer)).await;
    assert_eq!((batch.succeeded, batch.failed), (297, 3));
    let first = efferent_tests::batches::results(&mut client, &batch.batch_id, 10, &[]).await[0].clone();
    let retry = RetryBatchRequest { batch_id: batch.batch_id.clone() };
    let answer = client.retry_batch(retry.clone()).await.expect("is tried again").into_inner();
    assert_eq!((answer.items, answer.batch.expect("a batch").state()), (2, BatchState::Running));
    let batch = end(&mut client, &batch.batch_id).await;
    assert_eq!((batch.state(), batch.succeeded, batch.failed, batch.retries), (BatchState::Ended, 297, 3, 1));
    let second = efferent_tests::batches::results(&mut client, &batch.batch_id, 10, &[]).await[0].clone();
    assert!(second.error.is_some() && first.job_id != second.job_id, "another try is another job");
    // While no worker is there, they wait; and what failed for want of nothing stays as it is.
    brain.stop().await;
    let answer = client.retry_batch(retry).await.expect("is tried again").into_inner();
    assert_eq!(answer.items, 2);
    let request = efferent_proto::v1::CancelBatchRequest { batch_id: batch.batch_id.clone() };
    client.cancel_batch(request).await.expect("is cancelled");
    let batch = end(&mut client, &batch.batch_id).await;
    assert_eq!((batch.state(), batch.succeeded, batch.failed, batch.cancelled), (BatchState::Cancelled, 297, 1, 2));
    let request = RetryBatchRequest { batch_id: batch.batch_id };
    let refused = client.retry_batch(request).await.expect_err("it was cancelled");
    assert_eq!(ApiError::from(&refused).code, ErrorCode::BatchFinished);
}
