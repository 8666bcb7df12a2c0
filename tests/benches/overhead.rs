//! What the path costs when the engines cost nothing: `cargo bench -p efferent-tests --bench overhead` (or `make bench`).
//!
//! One request after the other through simulated engines that take no time (one step, a picture of 64 x 64), over nats-server as four processes and
//! over the embedded queue in one; between them, on the same server and as often, a bare loop of two hops: publish with acknowledgement, pull, publish
//! to a second queue, acknowledge the first twice, pull, answer. The three take turns, so that whatever else the machine does disturbs all alike.

#![expect(clippy::print_stdout, clippy::unwrap_used, reason = "a bench prints, and fails by panicking")]

use std::time::{Duration, Instant};

use async_nats::jetstream::{
    self,
    consumer::{PullConsumer, pull},
    stream,
};
use bytes::Bytes;
use efferent_proto::v1::GenerateRequest;
use efferent_tests::{
    calls::{Client, generate, kind, request},
    processes::{Cluster, connect},
};
use futures::StreamExt as _;

const ROUNDS: usize = 40;
const PER_ROUND: usize = 25;

#[tokio::main]
async fn main() {
    let count = ROUNDS * PER_ROUND;
    println!("{count} requests each, one after the other, in turns of {PER_ROUND}; milliseconds");
    println!("{:44} {:>8} {:>8} {:>8}", "", "p50", "p99", "mean");
    for sync in ["2m", "always"] {
        let cluster = Cluster::with_sync(&[("EFFERENT_MODEL", "sim")], sync);
        let _brain = cluster.role("brain", &[]);
        let _hand = cluster.role("hand", &[]);
        let (_coordinator, url) = cluster.coordinator();
        let (_up, embedded) = cluster.up();
        let (mut over_nats, mut embedded) = (connect(&url).await, connect(&embedded).await);
        let bare = Bare::start(&cluster.nats_url()).await;
        let mut times = [const { Vec::new() }; 3];
        for round in 0..=ROUNDS {
            for _ in 0..PER_ROUND {
                times[0].push(bare.trip().await);
            }
            for _ in 0..PER_ROUND {
                times[1].push(picture(&mut over_nats).await);
            }
            for _ in 0..PER_ROUND {
                times[2].push(picture(&mut embedded).await);
            }
            if round == 0 {
                // Warming up.
                times.iter_mut().for_each(Vec::clear);
            }
        }
        println!("nats-server with sync_interval: {sync}");
        let [bare, over_nats, embedded] = times;
        let bare = row("  bare two hops on JetStream", bare);
        let ours = row("  efferent over JetStream, four processes", over_nats);
        println!("  {:42} {:>8.1}", "ratio of the medians", ours / bare);
        row("  efferent on the embedded queue", embedded);
    }
}

/// Prints a row; the median in milliseconds.
fn row(name: &str, mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    let ms = |time: Duration| time.as_secs_f64() * 1000.0;
    let at = |share: usize| ms(times[(times.len() * share / 100).min(times.len() - 1)]);
    let mean = ms(times.iter().sum::<Duration>()) / times.len() as f64;
    println!("{name:44} {:8.2} {:8.2} {mean:8.2}", at(50), at(99));
    at(50)
}

async fn picture(client: &mut Client) -> Duration {
    let wanted = GenerateRequest { steps: Some(1), seed: None, inline_images: true, ..request("a cat") };
    let started = Instant::now();
    let events = generate(client, wanted).await;
    let time = started.elapsed();
    assert_eq!(kind(events.last().unwrap()), "done");
    time
}

/// Two hops with nothing around them.
struct Bare {
    client: async_nats::Client,
    context: jetstream::Context,
}

impl Bare {
    async fn start(url: &str) -> Self {
        let client = async_nats::connect(url).await.unwrap();
        let context = jetstream::new(client.clone());
        for (name, next) in [("a", Some("b")), ("b", None)] {
            let config = stream::Config {
                name: format!("bare-{name}"),
                subjects: vec![format!("bare.{name}")],
                retention: stream::RetentionPolicy::WorkQueue,
                ..Default::default()
            };
            let stream = context.create_stream(config).await.unwrap();
            let durable = pull::Config { durable_name: Some("bare".to_owned()), ..Default::default() };
            let consumer: PullConsumer = stream.create_consumer(durable).await.unwrap();
            // A connection of its own, as a process has.
            let (client, context) = (async_nats::connect(url).await.unwrap(), context.clone());
            tokio::spawn(async move {
                let mut messages = consumer.stream().max_messages_per_batch(1).messages().await.unwrap();
                while let Some(message) = messages.next().await {
                    let message = message.unwrap();
                    match next {
                        Some(next) => {
                            let subject = format!("bare.{next}");
                            context.publish(subject, message.payload.clone()).await.unwrap().await.unwrap();
                        }
                        None => {
                            let text = str::from_utf8(&message.payload).unwrap();
                            client.publish(text.trim().to_owned(), Bytes::new()).await.unwrap();
                        }
                    }
                    message.double_ack().await.unwrap();
                }
            });
        }
        Self { client, context }
    }

    async fn trip(&self) -> Duration {
        let inbox = self.client.new_inbox();
        let mut replies = self.client.subscribe(inbox.clone()).await.unwrap();
        let mut payload = inbox.into_bytes();
        payload.resize(1024, b' ');
        let started = Instant::now();
        self.context.publish("bare.a", payload.into()).await.unwrap().await.unwrap();
        replies.next().await.unwrap();
        started.elapsed()
    }
}
