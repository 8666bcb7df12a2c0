//! Machines' clocks that differ and jump: deadlines, leases and delays go by the bus's time.
//!
//! A small library in C, preloaded, shows a process another wall clock; it is compiled here, and where that is not possible the tests say that they were skipped.

#![expect(clippy::print_stderr, reason = "what could not be tested is to be read")]

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, SystemTime},
};

use efferent_proto::{
    time::{proto_duration, system_time},
    v1::{GenerateRequest, JobState},
};
use efferent_tests::{
    calls::{all, durable, generate, job, kind, request, until},
    processes::{Cluster, connect},
};
use tempfile::TempDir;

const HOUR: i64 = 3600;
const DAY: i64 = 24 * HOUR;

const SETTINGS: &[(&str, &str)] = &[
    ("EFFERENT_MODEL", "sim"),
    ("EFFERENT_LEDGER__LEASE", "2s"),
    ("EFFERENT_SIM__EMBED", "5ms"),
    ("EFFERENT_SIM__STEP", "20ms"),
    ("EFFERENT_LOG", "warn"),
];

/// Wall clocks that are set by these tests.
struct Clocks {
    folder: TempDir,
    library: PathBuf,
}

impl Clocks {
    /// None, having said so, where a library cannot be compiled or preloaded.
    fn new() -> Option<Self> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let library = folder.path().join("set_clock.so");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clocks/set_clock.c");
        let mut compiler = Command::new("cc");
        compiler.args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(&source).arg("-ldl");
        let compiled = cfg!(target_os = "linux") && compiler.status().is_ok_and(|status| status.success());
        if !compiled {
            eprintln!("SKIPPED, NOT TESTED: needs Linux and a C compiler");
        }
        compiled.then_some(Self { folder, library })
    }

    /// Has a process's clock be off by this many seconds, from now on.
    fn set(&self, name: &str, seconds: i64) {
        std::fs::write(self.folder.path().join(name), seconds.to_ne_bytes()).expect("writes");
    }

    /// Has a process started through a command that gives it this clock.
    fn with<T>(&self, name: &str, start: impl FnOnce(&[&str]) -> T) -> T {
        let preload = format!("LD_PRELOAD={}", self.library.display());
        let file = format!("SET_CLOCK_FILE={}", self.folder.path().join(name).display());
        start(&["env", &preload, &file])
    }
}

/// How far a moment is from now, by this machine's clock.
fn off(moment: SystemTime) -> Duration {
    moment.duration_since(SystemTime::now()).unwrap_or_else(|error| error.duration())
}

fn patient(prompt: &str, steps: u32, deadline: Duration) -> GenerateRequest {
    GenerateRequest { steps: Some(steps), deadline: Some(proto_duration(deadline)), ..request(prompt) }
}

#[tokio::test(flavor = "multi_thread")]
async fn machines_whose_clocks_differ_by_hours_keep_each_others_deadlines() {
    let Some(clocks) = Clocks::new() else { return };
    for (name, seconds) in [("coordinator", 2 * HOUR), ("other", -5 * HOUR), ("brain", -3 * HOUR), ("hand", DAY)] {
        clocks.set(name, seconds);
    }
    let cluster = Cluster::start(SETTINGS);
    let (coordinator, url) = clocks.with("coordinator", |through| cluster.coordinator_through(through));
    let (other, other_url) = clocks.with("other", |through| cluster.coordinator_through(through));
    let brain = clocks.with("brain", |through| cluster.role_through(through, "brain", &[]).0);
    let hand = clocks.with("hand", |through| cluster.role_through(through, "hand", &[]).0);
    let warned = cluster.log().matches("the server's clock differs").count();
    assert_eq!(warned, 4, "each was shown another time: {}", cluster.log());

    let mut client = connect(&url).await;
    let events = generate(&mut client, patient("a cat", 10, Duration::from_secs(30))).await;
    assert_eq!(durable(&events, 0).last(), Some(&"done"), "{events:?}");
    let ended = job(&mut client, &events[0].job_id).await;
    assert!(off(system_time(&ended.created_at.expect("a moment"))) < Duration::from_secs(20), "{ended:?}");
    assert!(off(system_time(&ended.finished_at.expect("a moment"))) < Duration::from_secs(20), "{ended:?}");

    // A deadline that passes while the hand is paused is kept, though its clock and the coordinator's are far apart.
    hand.signal("STOP");
    let began = std::time::Instant::now();
    let events = generate(&mut client, patient("a long road", 10, Duration::from_secs(3))).await;
    hand.signal("CONT");
    assert_eq!(events.last().map(kind), Some("failed"));
    assert!((2..12).contains(&began.elapsed().as_secs()), "{:?}", began.elapsed());
    let mut elsewhere = connect(&other_url).await;
    assert_eq!(job(&mut elsewhere, &events[0].job_id).await.state(), JobState::Expired);

    // While it is drawn, clocks are set again; the lease is kept, and neither coordinator takes the job for expired.
    let mut events =
        client.generate(patient("a dog", 150, Duration::from_secs(300))).await.expect("accepted").into_inner();
    let mut seen = until(&mut events, "rendering").await;
    for (name, seconds) in [("coordinator", -DAY), ("other", 3 * DAY), ("brain", DAY), ("hand", -DAY)] {
        clocks.set(name, seconds);
    }
    let id = seen[0].job_id.clone();
    assert_eq!(job(&mut elsewhere, &id).await.state(), JobState::Rendering);
    tokio::time::sleep(Duration::from_secs(1)).await;
    clocks.set("hand", 2 * DAY);
    seen.extend(all(events).await);
    assert_eq!(durable(&seen, 0).last(), Some(&"done"), "{seen:?}");
    assert_eq!(hand.counter("efferent_redeliveries_total"), 0);

    for process in [coordinator, other, brain, hand] {
        assert!(process.terminate(), "{}", cluster.log());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_process_on_its_own_queue_goes_on_when_its_clock_is_set() {
    let Some(clocks) = Clocks::new() else { return };
    clocks.set("up", 0);
    let cluster = Cluster::start(SETTINGS);
    let home = tempfile::tempdir().expect("a temporary folder");
    let (up, url) = clocks.with("up", |through| cluster.up_through(through, home.path()));
    let mut client = connect(&url).await;
    for (number, seconds) in [DAY, -DAY, 0].into_iter().enumerate() {
        let wanted = patient(&format!("picture {number}"), 60, Duration::from_secs(30));
        let mut events = client.generate(wanted).await.expect("accepted").into_inner();
        let mut seen = until(&mut events, "rendering").await;
        clocks.set("up", seconds);
        seen.extend(all(events).await);
        assert_eq!(durable(&seen, 0).last(), Some(&"done"), "{seen:?}");
        let ended = job(&mut client, &seen[0].job_id).await;
        assert!(off(system_time(&ended.finished_at.expect("a moment"))) < Duration::from_secs(20), "{ended:?}");
    }
    assert_eq!(up.counter("efferent_redeliveries_total"), 0);
    assert!(up.terminate(), "{}", cluster.log());
}
