//! The worker on a queue of its own, when it must leave.

use std::{sync::Arc, time::Duration};

use efferent_brain::{
    Options,
    families::sim::{Cost, factory},
};
use efferent_bus::{
    Bucket, NewTask, SharedBus,
    embedded::Embedded,
    ledger::{self, Ledger, transition::accepted},
};
use efferent_proto::{
    internal::BrainTask,
    names, time,
    v1::{FailureClass, GenerateRequest, Lane},
};
use efferent_service::{Shutdown, admin::Readiness};
use efferent_worker::sim;

const PATIENCE: Duration = Duration::from_secs(20);

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_done_when_the_grace_period_ends_goes_back() {
    let folder = tempfile::tempdir().unwrap();
    let bus: SharedBus = Arc::new(Embedded::open(folder.path()).await.unwrap());
    let ledger = Ledger::new(bus.clone(), ledger::Options { lease: Duration::from_secs(600), ..Default::default() });
    ledger.declare_queues(&sim::model()).await.unwrap();
    let request = GenerateRequest { prompt: "a cat".to_owned(), ..GenerateRequest::default() };
    let now = ledger.now();
    let expires_at = now + Duration::from_secs(600);
    let record = accepted("JOB".to_owned(), request.clone(), sim::model(), now, expires_at, 0);
    assert!(ledger.create_job(&record).await.unwrap());
    let task = BrainTask {
        job_id: "JOB".to_owned(),
        request: Some(request),
        model: Some(sim::model()),
        expires_at_ms: time::unix_ms(expires_at),
        ..BrainTask::default()
    };
    let queue = names::brain_queue(sim::NAME, Lane::Interactive);
    let (key, job, payload) = ("JOB".to_owned(), "JOB".to_owned(), ledger::encode(&task));
    bus.publish(&queue, NewTask { key, job, payload, ..NewTask::default() }).await.unwrap();

    // By far longer than it may take.
    let factory = factory(Cost { per_batch: Duration::from_secs(60), ..Cost::default() });
    let options = Options { grace: Duration::from_millis(500), ..Options::default() };
    let (readiness, shutdown) = (Readiness::default(), Shutdown::new());
    let served = efferent_brain::run(options, factory, Vec::new(), ledger.clone(), readiness, shutdown.clone());
    let served = tokio::spawn(served);
    let taken = async {
        while bus.depth(&queue).await.unwrap().leased == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, taken).await.expect("it is taken");
    shutdown.trigger();
    tokio::time::timeout(PATIENCE, served).await.expect("it ends").unwrap().unwrap();
    let depth = bus.depth(&queue).await.unwrap();
    assert_eq!((depth.ready, depth.leased), (1, 0), "another brain may have it at once");
    let record = ledger.job("JOB").await.unwrap().unwrap();
    assert_eq!(record.attempts.iter().map(|attempt| attempt.class()).collect::<Vec<_>>(), [FailureClass::HandedBack]);
    assert!(bus.list(Bucket::Workers).await.unwrap().is_empty());
}
