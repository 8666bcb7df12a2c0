//! What large control signals cost on their way from brain to hand: `cargo bench -p efferent-tests --bench signals`.
//!
//! Requests through simulated engines that take no time, one after the other, each with another prompt, so that each signal is made, sent and stored
//! anew. Signals of 100 kB, 1.18 MB (256 tokens x 2304 channels, bf16) and 8 MB go inline in the task, from the brain over a gRPC stream while it stores them,
//! or through the object store; the ways take turns, each in a cluster of its own. What a way costs is the time on top of requests whose signals are a few bytes.

#![expect(clippy::print_stdout, clippy::unwrap_used, reason = "a bench prints, and fails by panicking")]

use std::time::{Duration, Instant};

use efferent_proto::v1::GenerateRequest;
use efferent_tests::{
    calls::{Client, generate, kind, request},
    processes::{Cluster, Process, connect},
};

const ROUNDS: usize = 20;
const PER_ROUND: usize = 10;

/// Name, bytes of a signal, flags of the brain.
const WAYS: [(&str, usize, &[&str]); 8] = [
    ("a few bytes, inline", 0, &[]),
    ("100 kB, inline", 100_000, &[]),
    ("100 kB, served", 100_000, &["--inline-bytes", "0"]),
    ("100 kB, stored", 100_000, &["--inline-bytes", "0", "--serve", "off"]),
    ("1.18 MB, served", 1_180_000, &[]),
    ("1.18 MB, stored", 1_180_000, &["--serve", "off"]),
    ("8 MB, served", 8_000_000, &[]),
    ("8 MB, stored", 8_000_000, &["--serve", "off"]),
];

struct Way {
    client: Client,
    times: Vec<Duration>,
    _cluster: Cluster,
    hand: Process,
    _others: [Process; 2],
}

impl Way {
    async fn start(bytes: usize, flags: &[&str]) -> Self {
        let cluster = Cluster::with_sync(&[("EFFERENT_MODEL", "sim")], "2m");
        let bytes = bytes.to_string();
        let flags: Vec<&str> = ["--sim-signal-bytes", &bytes].into_iter().chain(flags.iter().copied()).collect();
        let (brain, _) = cluster.role("brain", &flags);
        let (hand, _) = cluster.role("hand", &[]);
        let (coordinator, url) = cluster.coordinator();
        Self { client: connect(&url).await, times: Vec::new(), _cluster: cluster, hand, _others: [brain, coordinator] }
    }
}

#[tokio::main]
async fn main() {
    println!("{} requests each, one after the other, in turns of {PER_ROUND}; milliseconds", ROUNDS * PER_ROUND);
    println!("{:24} {:>8} {:>8} {:>12} {:>18}", "", "p50", "p99", "on top, p50", "hand's fetch, mean");
    let mut ways = Vec::new();
    for (_, bytes, flags) in WAYS {
        ways.push(Way::start(bytes, flags).await);
    }
    for round in 0..=ROUNDS {
        for way in &mut ways {
            for index in 0..PER_ROUND {
                let prompt = format!("cat {round} {index}");
                let wanted = GenerateRequest { steps: Some(1), seed: None, inline_images: true, ..request(&prompt) };
                let started = Instant::now();
                let events = generate(&mut way.client, wanted).await;
                way.times.push(started.elapsed());
                assert_eq!(kind(events.last().unwrap()), "done");
            }
            if round == 0 {
                // Warming up.
                way.times.clear();
            }
        }
    }
    let ms = |time: Duration| time.as_secs_f64() * 1000.0;
    let mut least = None;
    for ((name, ..), way) in WAYS.iter().zip(&mut ways) {
        way.times.sort_unstable();
        let at = |share: usize| ms(way.times[(way.times.len() * share / 100).min(way.times.len() - 1)]);
        let least = *least.get_or_insert(at(50));
        let fetch =
            way.hand.mean("efferent_hand_signal_seconds").map_or_else(String::new, |s| format!("{:.2}", s * 1e3));
        println!("{name:24} {:8.2} {:8.2} {:12.2} {fetch:>18}", at(50), at(99), at(50) - least);
    }
}
