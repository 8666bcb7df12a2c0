//! What every backend must do, as tests: call [`all`] with a bus of your own.
//!
//! Panics say what does not hold. Queues and keys are named after the time, so a suite can run again on a server that keeps its data.

#![expect(clippy::unwrap_used, reason = "this module is a test-suite")]
#![expect(clippy::missing_panics_doc, reason = "every function panics when its promise does not hold")]

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use bytes::Bytes;
use efferent_proto::names::{is_stored_job, job_events, job_passing, job_stored, new_job_id};
use futures::StreamExt as _;

use crate::{
    Bucket, Bus, Change, Delivery, Depth, Error, MAX_MESSAGE, MAX_OBJECT, MAX_VALUE, NewTask, Published, QueueSpec,
    SharedBus, read_object,
};

/// The lease of the suite's queues.
pub const LEASE: Duration = Duration::from_millis(1500);
const SECOND: Duration = Duration::from_secs(1);

/// A free port of the loopback interface, for a server that a test starts.
pub fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    // Below those that the system gives to outgoing connections: one of these could take it before a server does.
    let candidate = || {
        let number = std::process::id().wrapping_mul(7919).wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed));
        10_000 + (number % 20_000) as u16
    };
    std::iter::repeat_with(candidate)
        .take(20_000)
        .find(|port| std::net::TcpListener::bind(("127.0.0.1", *port)).is_ok())
        .unwrap()
}

/// Runs the whole contract.
pub async fn all(bus: &SharedBus) {
    let b = bus.as_ref();
    tokio::join!(
        async {
            tasks_are_delivered_in_order_with_all_they_carry(b).await;
            the_same_key_is_stored_once(b).await;
            a_full_queue_says_so(b).await;
            a_pull_waits_and_wakes(b).await;
            jobs_are_purged(b).await;
            terminated_tasks_are_gone(b).await;
        },
        leases_expire_and_can_be_extended(b),
        delayed_tasks_wait(b),
        async {
            values_are_created_once_and_swapped(b).await;
            racing_swaps_lose_nothing(bus).await;
        },
        values_expire(b),
        watches_tell_everything(b),
        objects_survive_the_round_trip(b),
        objects_stay_as_long_as_any_asked(b),
        events_reach_those_who_listen(b),
        stored_jobs_are_told(b),
        limits_are_typed_errors(b),
    );
}

/// A queue of the suite, declared.
pub async fn queue(bus: &dyn Bus, purpose: &str, capacity: u64) -> String {
    let name = format!("contract.{purpose}.{}", new_job_id().to_lowercase());
    bus.declare(&QueueSpec { name: name.clone(), capacity, lease: LEASE }).await.unwrap();
    name
}

/// A task of job `job`.
pub fn task(key: &str, job: &str) -> NewTask {
    let headers = [("traceparent".to_owned(), format!("trace-{key}"))].into();
    NewTask { key: key.to_owned(), job: job.to_owned(), headers, payload: Bytes::from(format!("payload of {key}")) }
}

/// `count` tasks of the queue. A pull gives what is there at that moment, and the server of a cluster that leads the consumer may learn of a task after the
/// one that stored it.
async fn gather(bus: &dyn Bus, queue: &str, count: usize) -> Vec<Delivery> {
    let mut got = Vec::new();
    while got.len() < count {
        let more = bus.pull(queue, count - got.len(), 5 * SECOND).await.unwrap();
        assert!(!more.is_empty(), "{count} tasks are expected, {:?} came", keys(&got));
        got.extend(more);
    }
    got
}

/// Waits until the queue's depth is as `expected`: servers of a cluster hear of tasks and acks one after the other.
async fn settles(bus: &dyn Bus, queue: &str, expected: impl Fn(&Depth) -> bool) {
    let settled = async {
        while !expected(&bus.depth(queue).await.unwrap()) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    if tokio::time::timeout(5 * SECOND, settled).await.is_err() {
        panic!("the depth of {queue} stays at {:?}", bus.depth(queue).await.unwrap());
    }
}

fn keys(deliveries: &[Delivery]) -> Vec<&str> {
    deliveries.iter().map(|delivery| delivery.key.as_str()).collect()
}

async fn tasks_are_delivered_in_order_with_all_they_carry(bus: &dyn Bus) {
    let queue = queue(bus, "order", 100).await;
    for key in ["a", "b", "c"] {
        assert_eq!(bus.publish(&queue, task(key, "job1")).await.unwrap(), Published::Stored);
    }
    settles(bus, &queue, |depth| (depth.ready, depth.leased) == (3, 0)).await;
    let first = gather(bus, &queue, 2).await;
    assert_eq!(keys(&first), ["a", "b"]);
    let a = &first[0];
    assert_eq!((a.queue.as_str(), a.job.as_str(), a.attempt), (queue.as_str(), "job1", 1));
    assert_eq!(a.headers["traceparent"], "trace-a");
    assert_eq!(&a.payload[..], b"payload of a");
    assert!(a.published_at.elapsed().unwrap_or_default() < Duration::from_secs(60));
    settles(bus, &queue, |depth| (depth.ready, depth.leased) == (1, 2) && depth.oldest_age.is_some()).await;
    for delivery in first.iter().chain(&gather(bus, &queue, 1).await) {
        delivery.lease.ack().await.unwrap();
    }
    settles(bus, &queue, |depth| *depth == Depth::default()).await;
}

async fn the_same_key_is_stored_once(bus: &dyn Bus) {
    let queue = queue(bus, "once", 100).await;
    assert_eq!(bus.publish(&queue, task("k", "job1")).await.unwrap(), Published::Stored);
    assert_eq!(bus.publish(&queue, task("k", "job1")).await.unwrap(), Published::Duplicate);
    let got = bus.pull(&queue, 10, SECOND).await.unwrap();
    assert_eq!(keys(&got), ["k"]);
    got[0].lease.ack().await.unwrap();
    // Also after it is done: a publisher that did not hear the answer may ask much later.
    assert_eq!(bus.publish(&queue, task("k", "job1")).await.unwrap(), Published::Duplicate);
    assert!(bus.pull(&queue, 10, Duration::ZERO).await.unwrap().is_empty());
}

async fn a_full_queue_says_so(bus: &dyn Bus) {
    let queue = queue(bus, "full", 2).await;
    bus.publish(&queue, task("a", "job1")).await.unwrap();
    bus.publish(&queue, task("b", "job1")).await.unwrap();
    match bus.publish(&queue, task("c", "job1")).await {
        Err(Error::Full { queue: full, capacity: 2 }) => assert_eq!(full, queue),
        other => panic!("expected a full queue, got {other:?}"),
    }
    let got = bus.pull(&queue, 1, SECOND).await.unwrap();
    assert!(matches!(bus.publish(&queue, task("c", "job1")).await, Err(Error::Full { .. })), "leased tasks count");
    got[0].lease.ack().await.unwrap();
    // A refused key is not remembered. Servers of a cluster hear of an ack one after the other.
    let stored = async {
        loop {
            match bus.publish(&queue, task("c", "job1")).await {
                Err(Error::Full { .. }) => tokio::time::sleep(Duration::from_millis(10)).await,
                other => return other.unwrap(),
            }
        }
    };
    assert_eq!(tokio::time::timeout(5 * SECOND, stored).await.expect("there is room"), Published::Stored);
}

async fn a_pull_waits_and_wakes(bus: &dyn Bus) {
    let queue = queue(bus, "wake", 100).await;
    let started = Instant::now();
    assert!(bus.pull(&queue, 4, Duration::from_millis(300)).await.unwrap().is_empty());
    assert!(started.elapsed() >= Duration::from_millis(250), "an empty pull waits");
    let (got, ()) = tokio::join!(bus.pull(&queue, 4, Duration::from_secs(20)), async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        bus.publish(&queue, task("late", "job1")).await.unwrap();
    });
    assert_eq!(keys(&got.unwrap()), ["late"]);
    assert!(started.elapsed() < Duration::from_secs(15), "a pull ends with the first task");
}

async fn leases_expire_and_can_be_extended(bus: &dyn Bus) {
    let queue = queue(bus, "lease", 100).await;
    bus.publish(&queue, task("lost", "job1")).await.unwrap();
    let lost = bus.pull(&queue, 1, SECOND).await.unwrap();
    assert_eq!(lost[0].attempt, 1);
    let again = bus.pull(&queue, 1, LEASE * 5).await.unwrap();
    assert_eq!((keys(&again), again[0].attempt), (vec!["lost"], 2));
    for _ in 0..4 {
        tokio::time::sleep(LEASE / 2).await;
        again[0].lease.extend().await.unwrap();
        assert!(bus.pull(&queue, 1, Duration::ZERO).await.unwrap().is_empty(), "an extended lease holds");
    }
    again[0].lease.ack().await.unwrap();
    tokio::time::sleep(LEASE + SECOND / 2).await;
    assert!(bus.pull(&queue, 1, Duration::ZERO).await.unwrap().is_empty(), "what is acked stays away");
}

async fn delayed_tasks_wait(bus: &dyn Bus) {
    let queue = queue(bus, "delay", 100).await;
    bus.publish(&queue, task("slow", "job1")).await.unwrap();
    bus.publish(&queue, task("fast", "job1")).await.unwrap();
    let got = gather(bus, &queue, 2).await;
    let handed_back = Instant::now();
    got[0].lease.nak(SECOND).await.unwrap();
    got[1].lease.nak(Duration::ZERO).await.unwrap();
    let fast = bus.pull(&queue, 2, SECOND / 2).await.unwrap();
    assert_eq!((keys(&fast), fast[0].attempt), (vec!["fast"], 2));
    let slow = bus.pull(&queue, 2, SECOND * 5).await.unwrap();
    assert_eq!(keys(&slow), ["slow"]);
    assert!(handed_back.elapsed() >= SECOND * 9 / 10);
    for delivery in fast.iter().chain(&slow) {
        let _ = delivery.lease.ack().await;
    }
}

async fn terminated_tasks_are_gone(bus: &dyn Bus) {
    let queue = queue(bus, "terminate", 100).await;
    bus.publish(&queue, task("bad", "job1")).await.unwrap();
    let got = bus.pull(&queue, 1, SECOND).await.unwrap();
    got[0].lease.terminate("for the test").await.unwrap();
    assert!(bus.pull(&queue, 1, LEASE + SECOND / 2).await.unwrap().is_empty());
    settles(bus, &queue, |depth| depth.ready == 0).await;
}

async fn jobs_are_purged(bus: &dyn Bus) {
    let queue = queue(bus, "purge", 100).await;
    for index in 0..6 {
        let job = if index % 2 == 0 { "even" } else { "odd" };
        bus.publish(&queue, task(&format!("k{index}"), job)).await.unwrap();
    }
    assert_eq!(bus.purge(&queue, "even").await.unwrap(), 3);
    assert_eq!(bus.purge(&queue, "even").await.unwrap(), 0);
    assert_eq!(keys(&gather(bus, &queue, 3).await), ["k1", "k3", "k5"]);
}

async fn values_are_created_once_and_swapped(bus: &dyn Bus) {
    let key = new_job_id();
    let (bucket, value) = (Bucket::Jobs, |text: &'static str| Bytes::from_static(text.as_bytes()));
    assert_eq!(bus.get(bucket, &key).await.unwrap(), None);
    let first = bus.create(bucket, &key, value("one"), None).await.unwrap().unwrap();
    assert_eq!(bus.create(bucket, &key, value("two"), None).await.unwrap(), None);
    let entry = bus.get(bucket, &key).await.unwrap().unwrap();
    assert_eq!((entry.key.as_str(), &entry.value[..], entry.revision), (key.as_str(), &b"one"[..], first));
    let second = bus.swap(bucket, &key, value("two"), first, None).await.unwrap().unwrap();
    assert!(second > first);
    assert_eq!(bus.swap(bucket, &key, value("three"), first, None).await.unwrap(), None, "a stale revision is refused");
    let third = bus.put(bucket, &key, value("three"), None).await.unwrap();
    assert!(third > second);
    assert!(bus.list(bucket).await.unwrap().iter().any(|entry| entry.key == key && &entry.value[..] == b"three"));
    assert_eq!(bus.get(Bucket::Signals, &key).await.unwrap(), None, "buckets are apart");
    bus.delete(bucket, &key).await.unwrap();
    bus.delete(bucket, &key).await.unwrap();
    assert_eq!(bus.get(bucket, &key).await.unwrap(), None);
    assert!(!bus.list(bucket).await.unwrap().iter().any(|entry| entry.key == key));
    assert_eq!(bus.swap(bucket, &key, value("four"), third, None).await.unwrap(), None);
    assert!(bus.create(bucket, &key, value("again"), None).await.unwrap().unwrap() > third);
    bus.delete(bucket, &key).await.unwrap();
}

async fn racing_swaps_lose_nothing(bus: &SharedBus) {
    let key = new_job_id();
    bus.create(Bucket::Jobs, &key, Bytes::from_static(b"0"), None).await.unwrap();
    let add = |bus: SharedBus, key: String| async move {
        for _ in 0..25 {
            loop {
                let entry = bus.get(Bucket::Jobs, &key).await.unwrap().unwrap();
                let number: u32 = std::str::from_utf8(&entry.value).unwrap().parse().unwrap();
                let next = Bytes::from((number + 1).to_string());
                if bus.swap(Bucket::Jobs, &key, next, entry.revision, None).await.unwrap().is_some() {
                    break;
                }
            }
        }
    };
    let tasks: Vec<_> = (0..4).map(|_| tokio::spawn(add(bus.clone(), key.clone()))).collect();
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(&bus.get(Bucket::Jobs, &key).await.unwrap().unwrap().value[..], b"100");
    bus.delete(Bucket::Jobs, &key).await.unwrap();
}

async fn values_expire(bus: &dyn Bus) {
    let (key, kept) = (new_job_id(), new_job_id());
    let value = Bytes::from_static(b"x");
    bus.create(Bucket::Workers, &key, value.clone(), Some(SECOND)).await.unwrap().unwrap();
    let mut revision = bus.create(Bucket::Workers, &kept, value.clone(), Some(SECOND * 2)).await.unwrap().unwrap();
    for _ in 0..4 {
        tokio::time::sleep(SECOND).await;
        revision = bus.swap(Bucket::Workers, &kept, value.clone(), revision, Some(SECOND * 3)).await.unwrap().unwrap();
    }
    assert_eq!(bus.get(Bucket::Workers, &key).await.unwrap(), None, "it has expired");
    assert!(bus.create(Bucket::Workers, &key, value, Some(SECOND)).await.unwrap().is_some(), "its key is free");
    bus.delete(Bucket::Workers, &kept).await.unwrap();
}

async fn watches_tell_everything(bus: &dyn Bus) {
    let (before, after, short) = (new_job_id(), new_job_id(), new_job_id());
    let value = Bytes::from_static(b"x");
    bus.put(Bucket::Models, &before, value.clone(), None).await.unwrap();
    let mut watch = bus.watch(Bucket::Models).await.unwrap();
    let next = async |watch: &mut futures::stream::BoxStream<'static, Change>| {
        tokio::time::timeout(SECOND * 10, watch.next()).await.unwrap().unwrap()
    };
    let mut seen = false;
    loop {
        match next(&mut watch).await {
            Change::Put(entry) => seen |= entry.key == before,
            Change::Current => break,
            Change::Gone { .. } => {}
        }
    }
    assert!(seen, "a watch begins with what there is");
    bus.put(Bucket::Models, &after, value.clone(), None).await.unwrap();
    bus.put(Bucket::Models, &short, value, Some(SECOND)).await.unwrap();
    bus.delete(Bucket::Models, &before).await.unwrap();
    let mut missing =
        vec![format!("put {after}"), format!("put {short}"), format!("gone {before}"), format!("gone {short}")];
    while !missing.is_empty() {
        let change = match next(&mut watch).await {
            Change::Put(entry) => format!("put {}", entry.key),
            Change::Gone { key } => format!("gone {key}"),
            Change::Current => panic!("current is told once"),
        };
        missing.retain(|wanted| *wanted != change);
    }
    bus.delete(Bucket::Models, &after).await.unwrap();
}

async fn objects_survive_the_round_trip(bus: &dyn Bus) {
    let mut state = 1u32;
    let mut noise = |length: usize| -> Bytes {
        let mut bytes = Vec::with_capacity(length);
        while bytes.len() < length {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            bytes.push((state >> 24) as u8);
        }
        bytes.into()
    };
    for length in [0, 1, 255 * 1024, 256 * 1024, 1024 * 1024 + 7, 32 * 1024 * 1024] {
        let bytes = noise(length);
        let hash = bus.put_object(bytes.clone(), None).await.unwrap();
        assert_eq!(hash, blake3::hash(&bytes).to_hex().as_str());
        assert_eq!(bus.put_object(bytes.clone(), None).await.unwrap(), hash, "storing again is fine");
        assert!(read_object(bus, &hash).await.unwrap().unwrap() == bytes, "{length} bytes come back");
        bus.delete_object(&hash).await.unwrap();
        bus.delete_object(&hash).await.unwrap();
        assert!(read_object(bus, &hash).await.unwrap().is_none());
    }
    let hash = bus.put_object(noise(10), Some(SECOND)).await.unwrap();
    tokio::time::sleep(SECOND * 3).await;
    assert!(read_object(bus, &hash).await.unwrap().is_none(), "an object expires");
}

async fn objects_stay_as_long_as_any_asked(bus: &dyn Bus) {
    let (long, short) = (Some(SECOND * 60), Some(SECOND));
    let mut stored = Vec::new();
    // In one chunk and in several, of content that nobody else stores.
    for length in [0, 2 * 1024 * 1024] {
        for (first, second) in [(long, short), (short, long), (None, short), (short, None)] {
            let bytes = Bytes::from([vec![0; length], new_job_id().into_bytes()].concat());
            let hash = bus.put_object(bytes.clone(), first).await.unwrap();
            assert_eq!(bus.put_object(bytes.clone(), second).await.unwrap(), hash);
            stored.push((hash, bytes, format!("{length} bytes for {first:?}, then for {second:?}")));
        }
    }
    tokio::time::sleep(SECOND * 3).await;
    for (hash, bytes, what) in stored {
        assert!(read_object(bus, &hash).await.unwrap() == Some(bytes), "{what}");
        bus.delete_object(&hash).await.unwrap();
    }
    // Deleted is deleted: it begins anew.
    let bytes = Bytes::from(new_job_id());
    let hash = bus.put_object(bytes.clone(), long).await.unwrap();
    bus.delete_object(&hash).await.unwrap();
    bus.put_object(bytes, short).await.unwrap();
    tokio::time::sleep(SECOND * 3).await;
    assert!(read_object(bus, &hash).await.unwrap().is_none(), "its time before is forgotten");
}

async fn events_reach_those_who_listen(bus: &dyn Bus) {
    let id = new_job_id();
    let mut one = bus.subscribe(&format!("events.contract.{id}.*")).await.unwrap();
    let mut all = bus.subscribe("events.contract.>").await.unwrap();
    bus.emit(&format!("events.contract.{id}"), Bytes::from_static(b"short")).await.unwrap();
    bus.emit(&format!("events.contract.{id}.a"), Bytes::from_static(b"body")).await.unwrap();
    let event = tokio::time::timeout(SECOND * 5, one.next()).await.unwrap().unwrap();
    assert_eq!((event.subject, &event.payload[..]), (format!("events.contract.{id}.a"), &b"body"[..]));
    let event = tokio::time::timeout(SECOND * 5, all.next()).await.unwrap().unwrap();
    assert_eq!(&event.payload[..], b"short");
}

async fn stored_jobs_are_told(bus: &dyn Bus) {
    let (id, other) = (new_job_id(), new_job_id());
    let mut events = bus.subscribe(&job_events(&id)).await.unwrap();
    bus.create(Bucket::Jobs, &other, Bytes::from_static(b"another's"), Some(SECOND * 60)).await.unwrap();
    let first = bus.create(Bucket::Jobs, &id, Bytes::from_static(b"one"), Some(SECOND * 60)).await.unwrap().unwrap();
    assert_eq!(bus.swap(Bucket::Jobs, &id, Bytes::from_static(b"refused"), first + 1, None).await.unwrap(), None);
    bus.emit(&job_passing(&id), Bytes::from_static(b"passing")).await.unwrap();
    assert!(bus.swap(Bucket::Jobs, &id, Bytes::from_static(b"two"), first, None).await.unwrap().is_some());
    let mut stored = Vec::new();
    while stored.len() < 2 {
        let event = tokio::time::timeout(SECOND * 5, events.next()).await.unwrap().unwrap();
        if is_stored_job(&event.subject) {
            assert_eq!(event.subject, job_stored(&id));
            stored.push(event.payload);
        } else {
            assert_eq!((event.subject, &event.payload[..]), (job_passing(&id), &b"passing"[..]));
        }
    }
    assert_eq!(stored, [&b"one"[..], b"two"], "each value once, in their order");
}

async fn limits_are_typed_errors(bus: &dyn Bus) {
    let queue = queue(bus, "limits", 10).await;
    let zeros = |length: usize| Bytes::from(vec![0; length]);
    let largest = NewTask { payload: zeros(MAX_MESSAGE), ..task("largest", "job1") };
    assert_eq!(bus.publish(&queue, largest).await.unwrap(), Published::Stored);
    let too_large = NewTask { payload: zeros(MAX_MESSAGE + 1), ..task("larger", "job1") };
    assert!(matches!(bus.publish(&queue, too_large).await, Err(Error::TooLarge { .. })));
    let key = new_job_id();
    assert!(bus.create(Bucket::Jobs, &key, zeros(MAX_VALUE), Some(SECOND)).await.unwrap().is_some());
    let value = bus.create(Bucket::Jobs, "x", zeros(MAX_VALUE + 1), None).await;
    assert!(matches!(value, Err(Error::TooLarge { .. })));
    assert!(matches!(bus.put_object(zeros(MAX_OBJECT + 1), None).await, Err(Error::TooLarge { .. })));
    assert!(matches!(bus.publish("contract.nowhere", task("k", "j")).await, Err(Error::Usage(_))));
    assert!(matches!(bus.pull("contract.nowhere", 1, Duration::ZERO).await, Err(Error::Usage(_))));
    for key in ["", "a b", "a..b", "a/b", "ä", "*", ">", ".a"] {
        assert!(matches!(bus.get(Bucket::Jobs, key).await, Err(Error::Usage(_))), "{key:?}");
    }
    for name in ["", "a b", "a..b", "A", "*"] {
        let spec = QueueSpec { name: name.to_owned(), capacity: 1, lease: LEASE };
        assert!(matches!(bus.declare(&spec).await, Err(Error::Usage(_))), "{name:?}");
    }
}
