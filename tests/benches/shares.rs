//! Two tenants, and how well estimates foretell: `cargo bench -p efferent-tests --bench shares`.
//!
//! Eight simulated hands of half a second, a process each. One tenant submits a batch of 100,000 items, another one of 50 while it goes on: how long submission
//! takes, what it makes the coordinator hold, and when the last of the 50 is there, beside the time that half of the hands would need for them. Then
//! requests of 1 to 8 steps come at random, at half and at nine tenths of what the hands can do, and in bursts: each is quoted before it is sent.

#![expect(clippy::print_stdout, clippy::unwrap_used, reason = "a bench prints, and fails by panicking")]

use std::time::{Duration, Instant};

use efferent_proto::{
    time,
    v1::{BatchHeader, CancelBatchRequest, GenerateRequest, GetBatchRequest},
};
use efferent_tests::{
    batches::{self, end, id, items, key, submit},
    calls::{generate, kind, request},
    processes::{Cluster, Process, connect},
};

const HANDS: usize = 8;
const HAND_TIME: Duration = Duration::from_millis(500);
const LARGE: usize = 100_000;
const SMALL: usize = 50;
/// A step of the requests that are quoted.
const STEP: Duration = Duration::from_millis(100);

/// Numbers that look random and are the same each time.
struct Dice(u64);

impl Dice {
    /// The next one, in 0..1.
    fn roll(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// The time until the next of so many a second.
    fn pause(&mut self, rate: f64) -> Duration {
        Duration::from_secs_f64(-(1.0 - self.roll()).ln() / rate)
    }
}

fn workers(step: Duration) -> (Cluster, Vec<Process>, String) {
    let step = format!("{}ms", step.as_millis());
    let cluster = Cluster::start(&[
        ("EFFERENT_MODEL", "sim"),
        ("EFFERENT_SIM__EMBED", "2ms"),
        ("EFFERENT_SIM__STEP", &step),
        ("EFFERENT_LOG", "warn"),
    ]);
    let mut processes = vec![cluster.role("brain", &[]).0];
    processes.extend((0..HANDS).map(|_| cluster.role("hand", &["--max-images", "1"]).0));
    let (coordinator, url) = cluster.coordinator();
    processes.insert(0, coordinator);
    (cluster, processes, url)
}

/// The most memory that a process held, in MiB.
fn peak(process: &Process) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.pid())).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or_default();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or_default() / 1024
}

async fn two_tenants() {
    let (cluster, processes, url) = workers(HAND_TIME);
    let mut client = batches::Client::connect(url).await.unwrap();
    let of = |tenant: &str| BatchHeader { tenant: tenant.to_owned(), ..key("") };
    let started = Instant::now();
    let alone = id(&submit(&mut client, of("small"), &items(SMALL)).await.unwrap());
    end(&mut client, &alone).await;
    println!("{SMALL} items alone on {HANDS} hands of {HAND_TIME:?}: {:.1} s", started.elapsed().as_secs_f64());

    let (before, wanted) = (peak(&processes[0]), items(LARGE));
    let started = Instant::now();
    let large = id(&submit(&mut client, of("large"), &wanted).await.unwrap());
    let took = started.elapsed().as_secs_f64();
    let stored = client.get_batch(GetBatchRequest { batch_id: large.clone() }).await.unwrap().into_inner();
    assert_eq!(stored.item_count, LARGE as u64);
    println!(
        "{LARGE} items submitted in {took:.1} s; the coordinator held {} MiB at most, {before} before",
        peak(&processes[0])
    );

    let done = async |client: &mut batches::Client| {
        client.get_batch(GetBatchRequest { batch_id: large.clone() }).await.unwrap().into_inner().succeeded
    };
    tokio::time::sleep(Duration::from_secs(20)).await;
    let (before, started) = (done(&mut client).await, Instant::now());
    tokio::time::sleep(Duration::from_secs(10)).await;
    let rate = (done(&mut client).await - before) as f64 / started.elapsed().as_secs_f64();
    let theory = HANDS as f64 / HAND_TIME.as_secs_f64();
    println!("the large batch alone: {rate:.1} items/s of {theory:.1}");

    let (before, started) = (done(&mut client).await, Instant::now());
    let small = id(&submit(&mut client, of("small"), &items(SMALL)).await.unwrap());
    end(&mut client, &small).await;
    let took = started.elapsed().as_secs_f64();
    let meanwhile = done(&mut client).await - before;
    let share = SMALL as f64 / (theory / 2.0);
    println!(
        "{SMALL} items of another tenant beside it: the last after {took:.1} s; half of the hands need {share:.1} s ({:.2} times that); {meanwhile} of the large batch meanwhile",
        took / share
    );
    client.cancel_batch(CancelBatchRequest { batch_id: large }).await.unwrap();
    println!("the coordinator held {} MiB at most in all", peak(&processes[0]));
    stop(&cluster, processes);
}

fn stop(cluster: &Cluster, processes: Vec<Process>) {
    for process in processes {
        assert!(process.terminate(), "{}", cluster.log());
    }
}

/// Sends requests as they come, each quoted before; the ratios of what was foretold and what it took.
async fn quoted(url: &str, dice: &mut Dice, arrivals: Vec<Duration>) {
    let mut tasks = tokio::task::JoinSet::new();
    for (number, pause) in arrivals.into_iter().enumerate() {
        tokio::time::sleep(pause).await;
        let mut client = connect(url).await;
        let steps = 1 + (dice.roll() * 8.0) as u32;
        let wanted = GenerateRequest { steps: Some(steps), ..request(&format!("request {number}")) };
        let quotation = client.quote(wanted.clone()).await.unwrap().into_inner();
        let started = Instant::now();
        tasks.spawn(async move {
            let events = generate(&mut client, wanted).await;
            assert_eq!(events.last().map(kind), Some("done"));
            let foretold = quotation.finish_in.as_ref().and_then(time::duration).unwrap_or_default();
            (foretold.as_secs_f64(), started.elapsed().as_secs_f64())
        });
    }
    let pairs = tasks.join_all().await;
    let sorted = |value: &dyn Fn(&(f64, f64)) -> f64| {
        let mut values: Vec<f64> = pairs.iter().map(value).collect();
        values.sort_by(f64::total_cmp);
        values
    };
    let at = |values: &[f64], share: f64| values[((values.len() - 1) as f64 * share) as usize];
    let (took, ratio) = (sorted(&|pair| pair.1), sorted(&|pair| pair.0 / pair.1));
    let off = sorted(&|pair| (pair.0 - pair.1).abs());
    println!(
        "{:4} requests: took p50 {:.2} s, p99 {:.2} s; foretold over taken p10 {:.2}, p50 {:.2}, p90 {:.2}; off by p50 {:.2} s, p90 {:.2} s",
        pairs.len(),
        at(&took, 0.5),
        at(&took, 0.99),
        at(&ratio, 0.1),
        at(&ratio, 0.5),
        at(&ratio, 0.9),
        at(&off, 0.5),
        at(&off, 0.9),
    );
}

#[tokio::main]
async fn main() {
    two_tenants().await;
    let (cluster, processes, url) = workers(STEP);
    let mut dice = Dice(1);
    // Requests have 4.5 steps on average. The first ones let the workers measure themselves.
    let most = HANDS as f64 / (4.5 * STEP.as_secs_f64());
    for (name, rate, count) in
        [("warming up", 0.5, 100), ("half of what they can do", 0.5, 400), ("nine tenths", 0.9, 600)]
    {
        print!("{name}: ");
        let arrivals = (0..count).map(|_| dice.pause(most * rate)).collect();
        quoted(&url, &mut dice, arrivals).await;
    }
    print!("bursts of 40: ");
    let arrivals =
        (0..200).map(|number| if number % 40 == 0 { Duration::from_secs(6) } else { Duration::ZERO }).collect();
    quoted(&url, &mut dice, arrivals).await;
    stop(&cluster, processes);
}
