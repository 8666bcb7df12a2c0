//! Work goes on while everything is killed and paused: processes, servers, links, the disk.
//!
//! In its short form this runs with the other tests. `make faults` runs the long one (EFFERENT_FAULTS=long). What happens follows from a number
//! that is printed: EFFERENT_FAULT_SEED=NUMBER has it again.

#![expect(clippy::print_stderr, reason = "what was done, and what could not be, is to be read")]

use std::{
    collections::HashSet,
    path::Path,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use efferent_bus::{
    SharedBus,
    ledger::{Ledger, Options, attempts::MAX_CRASHES},
    nats,
};
use efferent_proto::{
    ApiError,
    v1::{ErrorCode, GenerateRequest, GetImageRequest, JobState},
};
use efferent_tests::{
    calls::{self, all, durable, generate, job, kind, request, until, watch},
    faults::{Action, Battered, Fault, Scope, Target, plan, seed},
    load::{Front, Load, check, nobody_is_left, send},
    processes::{Cluster, Process, connect, efferent},
};
use serde_json::Value;

const SECOND: Duration = Duration::from_secs(1);
/// How long a task is leased in these tests. Pauses are longer.
const LEASE: Duration = Duration::from_secs(2);

const SETTINGS: &[(&str, &str)] = &[
    ("EFFERENT_MODEL", "sim"),
    ("EFFERENT_LEDGER__LEASE", "2s"),
    ("EFFERENT_SIM__EMBED", "5ms"),
    ("EFFERENT_SIM__STEP", "10ms"),
    ("EFFERENT_HAND__CHECKPOINT_AFTER", "300ms"),
    ("EFFERENT_HAND__CHECKPOINT_INTERVAL", "200ms"),
    ("EFFERENT_LOG", "warn"),
];

fn is_long() -> bool {
    std::env::var("EFFERENT_FAULTS").is_ok_and(|form| form == "long")
}

/// How many items a batch has, in the short form and in the long one.
fn items(short: usize, long: usize) -> usize {
    let told = std::env::var("EFFERENT_FAULT_ITEMS").ok();
    let told = told.map(|text| text.parse().expect("EFFERENT_FAULT_ITEMS is a number"));
    told.unwrap_or(if is_long() { long } else { short })
}

async fn ledger(cluster: &Cluster, replicas: usize) -> Ledger {
    let options = nats::Options { url: cluster.nats_url(), replicas, ..nats::Options::default() };
    let bus: SharedBus = nats::connect_patiently(options, SECOND * 30).await.expect("the server is there");
    Ledger::new(bus, Options { lease: LEASE, ..Options::default() })
}

/// Has a load worked off while a plan happens, then checks everything. Returns what was counted.
async fn ordeal(cluster: Cluster, scope: &Scope, faults: Vec<Fault>, load: &Load) {
    let started = Instant::now();
    let battered = Battered::start(cluster, scope).await;
    let ledger = ledger(&battered.cluster, if scope.servers > 1 { 3 } else { 1 }).await;
    let front = Front::new(battered.urls.clone());
    let enough = Arc::new(AtomicBool::new(false));
    let (mut sending, planned) = (
        tokio::spawn({
            let (front, load, enough) = (front.clone(), load.clone(), enough.clone());
            async move { send(&front, &load, enough).await }
        }),
        faults.len(),
    );
    let mut harvest = None;
    battered
        .suffer(faults, ledger.bus().clone(), async {
            harvest = Some((&mut sending).await);
        })
        .await;
    enough.store(true, Ordering::Relaxed);
    let suffered = started.elapsed();
    let harvest = match harvest {
        Some(harvest) => harvest,
        None => tokio::time::timeout(SECOND * 120 + SECOND * load.items as u32 / 20, &mut sending)
            .await
            .unwrap_or_else(|_| panic!("work does not end once the faults have\n{}", battered.cluster.log())),
    };
    let harvest = harvest.unwrap_or_else(|error| panic!("{error}\n{}", battered.cluster.log()));
    let worked = started.elapsed();
    let failed = check(&front, &ledger, load, &harvest).await;
    assert!(battered.stop().await, "all stop gracefully\n{}", battered.cluster.log());
    nobody_is_left(&ledger).await;
    let letters = ledger.letters().await.expect("letters");
    let tally = battered.tally.lock().expect("is not poisoned");
    eprintln!(
        "{} jobs ({} single, {} of a batch), {} ended with an error, {} dead letters; {} of {planned} faults: {:?}\n\
         images {}, redeliveries {}, duplicates suppressed {}, tasks dropped {}; calls that were asked again {}\n\
         checkpoints {}, images gone on with from one {}, steps saved by that {}\n\
         faults for {:.1} s, work over after {:.1} s, slowest request {:.1} s",
        harvest.jobs.len() + load.items,
        harvest.jobs.len(),
        load.items,
        failed,
        letters.len(),
        tally.faults.values().sum::<u64>(),
        tally.faults,
        tally.counter("efferent_images_total"),
        tally.counter("efferent_redeliveries_total"),
        tally.counter("efferent_results_duplicate_total"),
        tally.counter("efferent_tasks_dropped_total"),
        front.refusals.load(Ordering::Relaxed),
        tally.counter("efferent_hand_checkpoints_total"),
        tally.counter("efferent_hand_resumes_total"),
        tally.counter("efferent_hand_steps_saved_total"),
        suffered.as_secs_f64(),
        worked.as_secs_f64(),
        harvest.slowest.as_secs_f64(),
    );
    assert!(failed * 100 <= (harvest.jobs.len() + load.items) as u64, "{failed} jobs failed");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_accepted_is_lost_and_nothing_is_done_twice_whoever_dies() {
    // For as long as the batch takes, or nearly.
    let items = items(300, 5000);
    let length = if is_long() { (SECOND * 600).max(SECOND * items as u32 / 60) } else { SECOND * 20 };
    let scope = Scope {
        brains: 2,
        hands: 3,
        coordinators: 2,
        servers: 1,
        apart: (Duration::from_millis(300), Duration::from_millis(1500)),
        hits_servers: true,
        pauses: (LEASE + SECOND / 2, LEASE + SECOND * 3),
        length,
    };
    let load = Load { clients: 6, at_least: 150, items, steps: 6 };
    ordeal(Cluster::start(SETTINGS), &scope, plan(seed(), &scope), &load).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_of_three_servers_bears_the_loss_of_one() {
    let scope = Scope {
        brains: 1,
        hands: 2,
        coordinators: 2,
        servers: 3,
        apart: (SECOND * 4, SECOND * 8),
        hits_servers: true,
        pauses: (LEASE + SECOND, LEASE + SECOND * 3),
        length: if is_long() { SECOND * 300 } else { SECOND * 12 },
    };
    let mut faults = Vec::new();
    let mut at = SECOND * 3;
    // One after the other is killed and comes back.
    while at < scope.length {
        let server = faults.len() % 3;
        faults.push(Fault { at, target: Target::Server(server), action: Action::Kill, lasts: SECOND * 6 });
        at += SECOND * 16;
    }
    let items = if is_long() { 2000 } else { 150 };
    let load = Load { clients: 4, at_least: 60, items, steps: 4 };
    ordeal(Cluster::of_three(SETTINGS), &scope, faults, &load).await;
}

/// The command's answer.
fn command(url: &str, words: &[&str]) -> (bool, String) {
    let output = Command::new(efferent()).args(words).args(["--server", url]).output().expect("runs");
    (output.status.success(), String::from_utf8(output.stdout).expect("UTF-8"))
}

fn json(url: &str, words: &[&str]) -> Value {
    let (_, text) = command(url, words);
    serde_json::from_str(text.trim()).unwrap_or_else(|error| panic!("{words:?}: {text}: {error}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_poisonous_job_takes_down_so_many_workers_and_its_mates_finish() {
    let cluster = Cluster::start(&[SETTINGS, &[("EFFERENT_SIM__STEP", "30ms")]].concat());
    let _brain = cluster.role("brain", &[]);
    let mut hand = Some(cluster.role("hand", &[]).0);
    let (_coordinator, url) = cluster.coordinator();
    let mut client = connect(&url).await;
    let wanted = |seed| GenerateRequest { seed: Some(seed), steps: Some(40), ..request("a cat") };
    let poison = client.generate(wanted(0)).await.expect("accepted").into_inner();
    let mut mates = Vec::new();
    for seed in 1..4 {
        mates.push(client.generate(wanted(seed)).await.expect("accepted").into_inner());
    }
    let mut events = poison;
    let job_id = until(&mut events, "queued").await[0].job_id.clone();
    for _ in 0..MAX_CRASHES {
        // Whoever has begun with it dies.
        until(&mut events, "step").await;
        hand.take().expect("a hand").kill();
        events = watch(&mut client, &job_id, 100).await;
        hand = Some(cluster.role("hand", &[]).0);
    }
    for mate in mates {
        assert_eq!(durable(&all(mate).await, 0).last(), Some(&"done"), "{}", cluster.log());
    }
    assert_eq!(kind(all(watch(&mut client, &job_id, 0).await).await.last().expect("an end")), "failed");
    assert_eq!(job(&mut client, &job_id).await.error.expect("why").code(), ErrorCode::AttemptsExhausted);
    // What is left of it, for those who use the command.
    let list = json(&url, &["dead", "list", "--json"]);
    assert_eq!((&list["total"], &list["letters"][0]["job_id"]), (&Value::from(1), &Value::from(job_id.as_str())));
    let letter = json(&url, &["dead", "show", &job_id, "--json"]);
    assert_eq!((letter["class"].as_str(), letter["request"]["seed"].as_u64()), (Some("worker_lost"), Some(0)));
    let attempts = letter["attempts"].as_array().expect("a history");
    let workers: HashSet<_> = attempts.iter().filter_map(|attempt| attempt["worker_id"].as_str()).collect();
    assert_eq!((attempts.len() as u32, workers.len() as u32), (MAX_CRASHES, MAX_CRASHES), "{letter}");
    let (_, shown) = command(&url, &["dead", "show", &job_id]);
    assert!(shown.contains("worker_lost") && shown.contains("image 0") && shown.contains("a cat"), "{shown}");
    let (_, listed) = command(&url, &["dead", "list"]);
    assert!(listed.starts_with("JOB") && listed.contains(&job_id), "{listed}");
    let replay = json(&url, &["dead", "replay", &job_id, "--json"]);
    let again = replay["job_id"].as_str().expect("an id");
    assert_eq!(replay["existing"], Value::from(false));
    assert_eq!(command(&url, &["dead", "replay", &job_id]), (true, format!("{again}\n")));
    assert_eq!(durable(&all(watch(&mut client, again, 0).await).await, 0).last(), Some(&"done"));
    assert!(command(&url, &["dead", "drop", &job_id]).0);
    let error = json(&url, &["dead", "show", &job_id, "--json"]);
    assert_eq!((error["code"].as_str(), error["exit_code"].as_u64()), (Some("UNKNOWN_JOB"), Some(3)));
}

fn run(words: &[&str]) -> Result<(), String> {
    let output = Command::new(words[0]).args(&words[1..]).output().map_err(|error| format!("{}: {error}", words[0]))?;
    let said = || format!("{words:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    if output.status.success() { Ok(()) } else { Err(said()) }
}

/// Says so where it is seen, and leaves the test.
fn skipped(why: &str) {
    eprintln!("SKIPPED, NOT TESTED: {why}");
}

/// A network namespace that is joined to this machine by a link.
struct Island {
    name: String,
    link: String,
    host: String,
}

impl Island {
    /// # Errors
    /// If the machine does not allow it.
    fn make() -> Result<Self, String> {
        let number = std::process::id() % 250;
        let (name, link, far) = (format!("efferent{number}"), format!("eff{number}h"), format!("eff{number}n"));
        let (host, there) = (format!("10.199.{number}.1"), format!("10.199.{number}.2"));
        run(&["ip", "netns", "add", &name])?;
        let island = Self { name, link, host };
        run(&["ip", "link", "add", &island.link, "type", "veth", "peer", "name", &far, "netns", &island.name])?;
        run(&["ip", "address", "add", &format!("{}/24", island.host), "dev", &island.link])?;
        island.inside(&["ip", "address", "add", &format!("{there}/24"), "dev", &far])?;
        island.inside(&["ip", "link", "set", &far, "up"])?;
        island.inside(&["ip", "link", "set", "lo", "up"])?;
        island.set("up")?;
        Ok(island)
    }

    fn inside(&self, words: &[&str]) -> Result<(), String> {
        run(&[&["ip", "netns", "exec", &self.name], words].concat())
    }

    fn set(&self, state: &str) -> Result<(), String> {
        run(&["ip", "link", "set", &self.link, state])
    }

    /// Lets through so much in each second from here on, from this side.
    fn slow(&self, rate: &str) -> Result<(), String> {
        run(&[
            "tc", "qdisc", "add", "dev", &self.link, "root", "tbf", "rate", rate, "burst", "16kb", "latency", "500ms",
        ])
    }
}

impl Drop for Island {
    fn drop(&mut self) {
        let _ = run(&["ip", "link", "delete", &self.link]);
        let _ = run(&["ip", "netns", "delete", &self.name]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_is_cut_off_is_replaced_and_comes_back() {
    let island = match Island::make() {
        Ok(island) => island,
        Err(why) => return skipped(&why),
    };
    let settings = [SETTINGS, &[("EFFERENT_SIM__STEP", "50ms")]].concat();
    let cluster = Cluster::with_servers(&settings, "always", 1, &island.host);
    let _brain = cluster.role("brain", &[]);
    let (far, _) = cluster.role_through(&["ip", "netns", "exec", &island.name], "hand", &[]);
    let (_coordinator, url) = cluster.coordinator();
    let mut client = connect(&url).await;
    let wanted = GenerateRequest { steps: Some(40), ..request("a cat") };
    let mut events = client.generate(wanted.clone()).await.expect("accepted").into_inner();
    until(&mut events, "step").await;
    island.set("down").expect("the link is cut");
    // It draws on, and cannot tell anyone. After the lease another takes over.
    let near = cluster.role("hand", &[]).0;
    let events = all(events).await;
    assert_eq!(kind(events.last().expect("an end")), "done");
    let first = job(&mut client, &events[0].job_id).await;
    assert!(first.images[0].attempt > 1, "{first:?}");
    island.set("up").expect("the link is mended");
    // What the one that was cut off brings late changes nothing.
    tokio::time::sleep(LEASE * 2).await;
    assert_eq!(job(&mut client, &events[0].job_id).await, first);
    assert!(near.terminate());
    // It is back, and does the next.
    let ended = generate(&mut client, wanted.clone()).await;
    assert_eq!(durable(&ended, 0).last(), Some(&"done"));
    let second = job(&mut client, &ended[0].job_id).await;
    assert_eq!(second.images[0].hash, first.images[0].hash);
    match island.slow("200kbit") {
        Ok(()) => {
            let ended = generate(&mut client, wanted).await;
            assert_eq!(durable(&ended, 0).last(), Some(&"done"), "over a slow link");
        }
        Err(why) => skipped(&why),
    }
    drop(far);
}

/// A small file system in memory.
struct Disk<'a>(&'a Path);

impl<'a> Disk<'a> {
    /// # Errors
    /// If the machine does not allow it.
    fn mount(folder: &'a Path, size: &str) -> Result<Self, String> {
        let folder_name = folder.to_str().expect("UTF-8");
        run(&["mount", "-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs", folder_name]).map(|()| Self(folder))
    }

    /// Takes all the room that is left.
    fn fill(&self) {
        use std::io::Write as _;
        let mut file = std::fs::File::create(self.0.join("ballast")).expect("a file");
        for length in [65536, 4096, 1] {
            while file.write_all(&vec![1; length]).is_ok() {}
        }
    }

    fn make_room(&self) {
        std::fs::remove_file(self.0.join("ballast")).expect("it is there");
    }
}

impl Drop for Disk<'_> {
    fn drop(&mut self) {
        let _ = run(&["umount", "--lazy", self.0.to_str().expect("UTF-8")]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_said_and_nothing_accepted_is_lost() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let disk = match Disk::mount(folder.path(), "24m") {
        Ok(disk) => disk,
        Err(why) => return skipped(&why),
    };
    let cluster = Cluster::start(SETTINGS);
    let (up, url): (Process, String) = cluster.up_in(folder.path());
    let mut client = connect(&url).await;
    let before = generate(&mut client, request("before")).await;
    assert_eq!(durable(&before, 0).last(), Some(&"done"));
    disk.fill();
    // Some may still fit into what the database holds already.
    let mut accepted = Vec::new();
    let mut refusal = None;
    for number in 0..2000 {
        let wanted = GenerateRequest { idempotency_key: format!("full-{number}"), ..request("in between") };
        match client.generate(wanted).await {
            Ok(events) => accepted.push(events.into_inner()),
            Err(status) => {
                refusal = Some(ApiError::from(&status));
                break;
            }
        }
    }
    let refusal = refusal.expect("the disk is full");
    assert_eq!(refusal.code, ErrorCode::BusUnavailable, "{refusal:?}");
    assert!(refusal.message.contains("full") && refusal.retry_after.is_some(), "{refusal:?}");
    // What is there can be read, and it goes on when there is room.
    assert_eq!(job(&mut client, &before[0].job_id).await.state(), JobState::Succeeded);
    tokio::time::sleep(SECOND).await;
    disk.make_room();
    let ids: Vec<_> = {
        let mut ids = Vec::new();
        for events in accepted {
            ids.push(ended(&url, events).await);
        }
        ids
    };
    let after = generate(&mut client, request("after")).await;
    assert_eq!(durable(&after, 0).last(), Some(&"done"));
    for id in ids {
        let job = job(&mut client, &id).await;
        assert_eq!(job.state(), JobState::Succeeded, "{job:?}");
        let image = GetImageRequest { job_id: id, image_index: 0 };
        client.get_image(image).await.expect("the image is there");
    }
    assert!(up.terminate(), "{}", cluster.log());
}

/// Follows a job to its end, again if the stream breaks. Returns its id.
async fn ended(url: &str, mut events: tonic::Streaming<efferent_proto::v1::JobEvent>) -> String {
    let first = events.message().await.expect("accepted").expect("an event");
    let mut client = connect(url).await;
    let rest = calls::watch(&mut client, &first.job_id, 0).await;
    assert_eq!(kind(all(rest).await.last().expect("an end")), "done");
    first.job_id
}
