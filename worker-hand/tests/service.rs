//! The worker on a queue of its own, when its engine is gone.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{sync::Arc, time::Duration};

use efferent_bus::{
    Bucket, NewTask, SharedBus,
    embedded::Embedded,
    ledger::{self, Ledger, transition::accepted},
};
use efferent_hand::{
    Error, Options,
    families::sim::{Cost, factory},
};
use efferent_proto::{
    internal::{ControlHeader, ControlSignal, HandTask, hand_task},
    names, time,
    v1::{FailureClass, GenerateRequest, Lane, Size},
};
use efferent_service::{Shutdown, admin::Readiness};
use efferent_worker::{
    engine::{EngineError, Hand},
    signal::SCHEMA_VERSION,
    sim,
    thread::Factory,
    watchdog::Hang,
};

/// A job with one image, and its hand's task in the queue.
async fn publish(ledger: &Ledger, queue: &str, job_id: &str, side: u32) {
    let request = GenerateRequest {
        steps: Some(2),
        size: Some(Size { width: side, height: side }),
        ..GenerateRequest::default()
    };
    let now = ledger.now();
    let expires_at = now + Duration::from_secs(600);
    let record = accepted(job_id.to_owned(), request.clone(), sim::model(), now, expires_at, 0);
    assert!(ledger.create_job(&record).await.unwrap());
    let header =
        ControlHeader { schema_version: SCHEMA_VERSION, space: Some(sim::space()), ..ControlHeader::default() };
    let signal = ControlSignal { header: Some(header), ..ControlSignal::default() };
    let task = HandTask {
        job_id: job_id.to_owned(),
        request: Some(request),
        model: Some(sim::model()),
        expires_at_ms: time::unix_ms(expires_at),
        signal: Some(hand_task::Signal::Inline(signal)),
        ..HandTask::default()
    };
    let (key, job, payload) = (names::image_key(job_id, 0), job_id.to_owned(), ledger::encode(&task));
    ledger.bus().publish(queue, NewTask { key, job, payload, ..NewTask::default() }).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hand_whose_engine_is_gone_hands_back_what_it_has_and_ends() {
    let folder = tempfile::tempdir().unwrap();
    let bus: SharedBus = Arc::new(Embedded::open(folder.path()).await.unwrap());
    let ledger = Ledger::new(bus.clone(), ledger::Options::default());
    ledger.declare_queues(&sim::model()).await.unwrap();
    let queue = names::hand_queue(sim::NAME, Lane::Interactive);
    // Of two sizes, so that no batch has both.
    publish(&ledger, &queue, "ONE", 32).await;
    publish(&ledger, &queue, "TWO", 64).await;
    // It panics over the first step that it takes, and cannot be built anew.
    let mut panics = factory(Cost { crashes: 1.0, max_batch: 4, ..Cost::default() });
    let mut built = 0;
    let factory: Factory<dyn Hand> = Box::new(move || {
        built += 1;
        if built > 1 { Err(EngineError::Missing("its device is lost".to_owned())) } else { panics() }
    });
    let (readiness, shutdown) = (Readiness::default(), Shutdown::new());
    let served =
        efferent_hand::run(Options::default(), factory, Vec::new(), ledger.clone(), readiness, shutdown.clone());
    let ended = tokio::time::timeout(Duration::from_secs(20), served).await.expect("it ends by itself");
    assert!(matches!(ended, Err(Error::Hang(Hang::Gone))), "{ended:?}");
    assert!(!shutdown.is_triggered(), "what else its process does is not its to stop");
    assert!(bus.list(Bucket::Workers).await.unwrap().is_empty());
    let depth = bus.depth(&queue).await.unwrap();
    assert_eq!((depth.ready, depth.leased), (2, 0));
    // Only what was being stepped counts; the other may not have been taken at all.
    let mut classes = Vec::new();
    for job_id in ["ONE", "TWO"] {
        let record = ledger.job(job_id).await.unwrap().unwrap();
        classes.extend(record.attempts.iter().map(|attempt| attempt.class()));
    }
    let crashes = classes.iter().filter(|class| **class == FailureClass::EngineCrash).count();
    let handed_back = classes.iter().filter(|class| **class == FailureClass::HandedBack).count();
    assert_eq!((crashes, handed_back), (1, classes.len() - 1), "{classes:?}");
}
