//! The records of jobs on a bus: what is written when, and what is told.

use std::{sync::Arc, time::SystemTime};

use efferent_bus::{
    Bucket, SharedBus,
    embedded::Embedded,
    ledger::{Ledger, Options, Outcome, Transition, job_id, transition},
};
use efferent_proto::{
    internal::JobRecord,
    names,
    v1::{Error, GenerateRequest, Image, JobEvent, JobState, Model, job_event::Event},
};

/// Three processes that share a bus, and a job that the first has accepted.
async fn processes() -> ([Ledger; 3], JobRecord, tempfile::TempDir) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let bus: SharedBus = Arc::new(Embedded::open(folder.path()).await.expect("opens"));
    let ledgers = std::array::from_fn(|_| Ledger::new(bus.clone(), Options::default()));
    let (now, id) = (SystemTime::now(), names::new_job_id());
    let record = transition::accepted(id, GenerateRequest::default(), Model::default(), now, now, 1);
    assert!(ledgers[0].create_job(&record).await.expect("the bus is there"));
    (ledgers, record, folder)
}

fn taken() -> Transition {
    Transition::Conditioning { worker_id: "brain".to_owned() }
}

fn log(outcome: &Outcome) -> Vec<&'static str> {
    let kind = |event: &JobEvent| match &event.event {
        Some(Event::Accepted(_)) => "accepted",
        Some(Event::Queued(_)) => "queued",
        Some(Event::Conditioning(_)) => "conditioning",
        Some(Event::Rendering(_)) => "rendering",
        Some(Event::Image(_)) => "image",
        Some(Event::Done(_)) => "done",
        _ => "another",
    };
    outcome.record().map(|record| record.log.iter().map(kind).collect()).unwrap_or_default()
}

#[tokio::test]
async fn what_is_deferred_is_written_by_whoever_changes_the_job_next() {
    let ([coordinator, brain, hand], record, _folder) = processes().await;
    let id = job_id(&record);
    brain.remember(coordinator.known(id).expect("it made the job"));
    brain.defer(id, &taken());
    let stored = brain.job(id).await.expect("the bus is there").expect("the job is there");
    assert_eq!(stored, record, "nothing is written yet");
    hand.remember(brain.known(id).expect("it knows the job"));
    hand.defer(id, &Transition::Rendering { worker_id: "hand".to_owned() });
    let image = Image { data: "bytes".into(), ..Image::default() };
    let outcome = hand.apply(id, &Transition::Image(image)).await.expect("the bus is there");
    assert_eq!(log(&outcome), ["accepted", "queued", "conditioning", "rendering", "image", "done"]);
    let Outcome::Changed(changed) = outcome else { panic!("{outcome:?}") };
    assert_eq!(Some(*changed), hand.job(id).await.expect("the bus is there"));
}

#[tokio::test]
async fn what_is_deferred_is_forgotten_when_another_change_comes_first() {
    let ([coordinator, brain, hand], record, _folder) = processes().await;
    let id = job_id(&record);
    brain.remember(coordinator.known(id).expect("it made the job"));
    brain.defer(id, &taken());
    let end = Transition::End { state: JobState::Cancelled, error: Error::default() };
    assert!(matches!(coordinator.apply(id, &end).await, Ok(Outcome::Changed(_))));
    hand.remember(brain.known(id).expect("it knows the job"));
    let outcome = hand.apply(id, &Transition::Image(Image::default())).await.expect("the bus is there");
    assert!(matches!(outcome, Outcome::Unchanged(record) if record.log.len() == 3), "the job stays cancelled");
}

#[tokio::test]
async fn what_another_process_knew_does_not_replace_what_is_newer() {
    let ([coordinator, brain, _], record, _folder) = processes().await;
    let id = job_id(&record);
    let old = coordinator.known(id).expect("it made the job");
    brain.remember(old.clone());
    assert!(matches!(brain.apply(id, &taken()).await, Ok(Outcome::Changed(_))));
    let new = brain.known(id).expect("it changed the job");
    brain.remember(old);
    assert_eq!(brain.known(id), Some(new));
}

#[tokio::test]
async fn a_job_can_be_changed_while_it_is_being_made() {
    let ([coordinator, brain, hand], _, _folder) = processes().await;
    let now = SystemTime::now();
    let record = transition::accepted(names::new_job_id(), GenerateRequest::default(), Model::default(), now, now, 1);
    let id = job_id(&record);
    coordinator.expect_job(&record);
    brain.remember(coordinator.known(id).expect("it is about to make the job"));
    brain.defer(id, &taken());
    hand.remember(brain.known(id).expect("it heard of the job"));
    let rendering = Transition::Rendering { worker_id: "hand".to_owned() };
    let (changed, made) = tokio::join!(hand.apply(id, &rendering), async {
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        coordinator.create_job(&record).await
    });
    assert!(made.expect("the bus is there"));
    let changed = changed.expect("the bus is there");
    assert_eq!(
        log(&changed),
        ["accepted", "queued", "conditioning", "rendering"],
        "what the brain left, and the hand's"
    );
    brain.confirm(id).await;
    let ended = brain.apply(id, &Transition::Image(Image::default())).await.expect("the bus is there");
    assert_eq!(log(&ended)[2..], ["conditioning", "rendering", "image", "done"], "what was written since, once");
    coordinator.confirm(id).await;
    assert!(coordinator.known(id).is_none_or(|known| known.revision > 0));
}

#[tokio::test]
async fn a_record_that_cannot_be_read_is_an_error_and_one_that_is_not_there_is_unknown() {
    let ([ledger, ..], record, _folder) = processes().await;
    assert_eq!(ledger.apply(&names::new_job_id(), &taken()).await.expect("the bus is there"), Outcome::Unknown);
    let id = names::new_job_id();
    ledger.bus().put(Bucket::Jobs, &id, "\u{1}".into(), None).await.expect("the bus is there");
    assert!(ledger.apply(&id, &taken()).await.is_err());
    assert!(ledger.apply(job_id(&record), &taken()).await.is_ok(), "others go on");
}
