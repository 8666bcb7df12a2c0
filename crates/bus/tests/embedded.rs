//! The contract on the embedded backend, and what is left of it after a kill -9.

use std::{
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use efferent_bus::{Bucket, Bus as _, Error, NewTask, QueueSpec, SharedBus, contract, embedded::Embedded, read_object};

const CHILD: &str = "EFFERENT_TEST_CHILD_FOLDER";
const QUEUE: &str = "crash.test";

#[tokio::test(flavor = "multi_thread")]
async fn contract() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let bus: SharedBus = Arc::new(Embedded::open(folder.path()).await.expect("opens"));
    contract::all(&bus).await;
}

#[tokio::test]
async fn a_second_process_is_kept_out() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let first = Embedded::open(folder.path()).await.expect("opens");
    match Embedded::open(folder.path()).await {
        Err(Error::Unfit(message)) => assert!(message.contains("in use by another process"), "{message}"),
        other => panic!("{other:?}"),
    }
    drop(first);
    Embedded::open(folder.path()).await.expect("opens once the first is gone");
}

/// Not a test of its own: the process that the test below kills.
#[tokio::test]
async fn child() {
    let Ok(folder) = std::env::var(CHILD) else { return };
    let bus = Embedded::open(folder).await.expect("opens");
    let spec = QueueSpec { name: QUEUE.to_owned(), capacity: 1_000_000, lease: Duration::from_secs(60) };
    bus.declare(&spec).await.expect("declares");
    for number in 0.. {
        let key = format!("k{number}");
        let object = bus.put_object(Bytes::from(key.clone()), None).await.expect("stores");
        bus.create(Bucket::Jobs, &key, Bytes::from(object), None).await.expect("creates").expect("is new");
        let task = NewTask { key: key.clone(), job: "job".to_owned(), ..Default::default() };
        bus.publish(QUEUE, task).await.expect("publishes");
        // Told only now: what was told must be there after the kill.
        println!("accepted {key}");
        if number % 3 == 0 {
            let got = bus.pull(QUEUE, 1, Duration::ZERO).await.expect("pulls");
            if number % 6 == 0 {
                got[0].lease.ack().await.expect("acks");
                println!("done {}", got[0].key);
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_accepted_is_lost_when_the_process_is_killed() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut child = Command::new(std::env::current_exe().expect("this test's program"))
        .args(["--exact", "child", "--nocapture"])
        .env(CHILD, folder.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("starts");
    let mut accepted = Vec::new();
    let mut done = Vec::new();
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    let mut note = |line: String| {
        // The harness writes before the first line of ours.
        if let Some((_, key)) = line.split_once("accepted ") {
            accepted.push(key.to_owned());
        } else if let Some((_, key)) = line.split_once("done ") {
            done.push(key.to_owned());
        }
        accepted.len()
    };
    while let Some(Ok(line)) = lines.next()
        && note(line) < 100
    {}
    child.kill().expect("SIGKILL");
    child.wait().expect("ends");
    for line in lines.map_while(Result::ok) {
        note(line);
    }
    assert!(accepted.len() >= 100 && done.len() > 10, "{} accepted, {} done", accepted.len(), done.len());

    let bus = Embedded::open(folder.path()).await.expect("opens again");
    for key in &accepted {
        let entry = bus.get(Bucket::Jobs, key).await.expect("reads").unwrap_or_else(|| panic!("value {key} is lost"));
        let hash = String::from_utf8(entry.value.to_vec()).expect("a hash");
        assert_eq!(read_object(&bus, &hash).await.expect("reads").expect("is there"), key.as_bytes());
    }
    let mut left = Vec::new();
    loop {
        let got = bus.pull(QUEUE, 64, Duration::ZERO).await.expect("pulls");
        if got.is_empty() {
            break;
        }
        left.extend(got.into_iter().map(|delivery| (delivery.key, delivery.attempt)));
    }
    for key in &accepted {
        let there = left.iter().any(|(left, _)| left == key);
        assert_ne!(there, done.contains(key), "{key}: a task is there until it is done");
    }
    assert!(left.iter().any(|(_, attempt)| *attempt == 2), "what was leased to the dead process is there at once");
}
