//! What can be typed after `efferent bench`.

use std::{path::PathBuf, str::FromStr, time::Duration};

use clap::{Args, Subcommand, ValueEnum};
use efferent_worker::sim::Curve;

use crate::{local::serve::Role, settings::table::Group};

/// Commands that measure.
#[derive(Debug, Subcommand)]
pub(crate) enum Do {
    /// Load a cluster of simulated workers, started and stopped by this command, and compare it with theory
    ///
    /// One nats-server, one coordinator, simulated brains and hands that take the times they are told to. Nothing they draw is worth seeing.
    Cluster(Cluster),
    /// Add and drain simulated hands as the coordinator advises, through a burst of requests
    ///
    /// Requests come at random: for a phase at the low rate, for one at the high rate, and again at the low one.
    Autoscale(Autoscale),
    /// A process of such a cluster; it ends with its standard input
    #[command(hide = true)]
    Part(Part),
}

/// Which settings matter to which of them.
pub(crate) const GROUPS: [(&str, &[Group]); 3] = [
    ("cluster", &[Group::Sim]),
    ("autoscale", &[Group::Sim]),
    (
        "part",
        &[
            Group::Model,
            Group::Device,
            Group::Coordinator,
            Group::Admin,
            Group::Queue,
            Group::Brain,
            Group::Hand,
            Group::Sim,
        ],
    ),
];

/// `efferent bench cluster`.
#[derive(Debug, Args)]
pub(crate) struct Cluster {
    /// Simulated brains. Each reads one prompt at a time.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) brains: u32,
    /// Simulated hands.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) hands: u32,
    /// Time a brain takes for a prompt.
    #[arg(long, value_name = "TIME", default_value = "5ms", value_parser = humantime::parse_duration)]
    pub(crate) brain_time: Duration,
    /// Time a hand takes for an image; or for a batch of images by its size, 1:500ms,4:722ms, and then it draws up to the largest together.
    #[arg(long, value_name = "TIME", default_value = "500ms")]
    pub(crate) hand_time: Curve,
    /// Denoising steps that make up an image.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) steps: u32,
    /// How long to measure, after warming up.
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = humantime::parse_duration)]
    pub(crate) duration: Duration,
    /// How long to warm up. Default: the time to fill every hand, and that of two requests, and 5 s.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub(crate) warm_up: Option<Duration>,
    /// When requests come: `saturate` keeps --in-flight of them open; `poisson:RATE` sends RATE a second at random, however many are open;
    /// `trace:FILE` sends them at the times in a file, seconds from the start, one a line.
    #[arg(long, value_name = "ARRIVALS", default_value = "saturate")]
    pub(crate) arrivals: Arrivals,
    /// Requests that `saturate` keeps open. Default: twice as many as brains and hands hold.
    #[arg(long, value_name = "N")]
    pub(crate) in_flight: Option<u32>,
    /// Seed of arrivals and prompts.
    #[arg(long, value_name = "SEED", default_value_t = 1)]
    pub(crate) seed: u64,
    /// Processes that the hands are spread over, or `hands` for one each.
    #[arg(long, value_name = "N", default_value = "4")]
    pub(crate) processes: Processes,
    /// The nats-server to start. Default: the one on PATH.
    #[arg(long, value_name = "FILE")]
    pub(crate) nats_server: Option<PathBuf>,
    /// How often nats-server syncs its files: `always` (what it acknowledged survives a power cut), or a time such as 2m.
    #[arg(long, value_name = "always|TIME", default_value = "always")]
    pub(crate) sync: Sync,
    /// Print the report as JSON.
    #[arg(long)]
    pub(crate) json: bool,
    /// Folder for report.json and plots (SVG).
    #[arg(short, long, value_name = "FOLDER")]
    pub(crate) output: Option<PathBuf>,
}

/// `efferent bench autoscale`.
#[derive(Debug, Args)]
pub(crate) struct Autoscale {
    /// Simulated brains. Each reads one prompt at a time.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) brains: u32,
    /// Most hands, each a process of its own. It begins with one.
    #[arg(long, value_name = "N", default_value_t = 24, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) max_hands: u32,
    /// Time a brain takes for a prompt.
    #[arg(long, value_name = "TIME", default_value = "5ms", value_parser = humantime::parse_duration)]
    pub(crate) brain_time: Duration,
    /// Time a hand takes for an image.
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = humantime::parse_duration)]
    pub(crate) hand_time: Duration,
    /// Requests a second before and after the burst.
    #[arg(long, value_name = "RATE", default_value_t = 2.0)]
    pub(crate) low: f64,
    /// Requests a second in the burst.
    #[arg(long, value_name = "RATE", default_value_t = 12.0)]
    pub(crate) high: f64,
    /// How long each of the three phases is.
    #[arg(long, value_name = "TIME", default_value = "2m", value_parser = humantime::parse_duration)]
    pub(crate) phase: Duration,
    /// How often the advice is asked for.
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = humantime::parse_duration)]
    pub(crate) interval: Duration,
    /// Hands are drained to the most that was advised within this time.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = humantime::parse_duration)]
    pub(crate) stabilisation: Duration,
    /// Seed of arrivals and prompts.
    #[arg(long, value_name = "SEED", default_value_t = 1)]
    pub(crate) seed: u64,
    /// The nats-server to start. Default: the one on PATH.
    #[arg(long, value_name = "FILE")]
    pub(crate) nats_server: Option<PathBuf>,
    /// Print the report as JSON.
    #[arg(long)]
    pub(crate) json: bool,
    /// Folder for autoscale.json and a plot (SVG).
    #[arg(short, long, value_name = "FOLDER")]
    pub(crate) output: Option<PathBuf>,
}

impl Autoscale {
    /// The cluster that it begins with.
    pub(crate) fn cluster(&self) -> Cluster {
        Cluster {
            brains: self.brains,
            hands: 1,
            brain_time: self.brain_time,
            hand_time: Curve::from(self.hand_time),
            steps: 4,
            duration: self.phase * 3,
            warm_up: None,
            // Sets how many streams may be open; requests come at times of their own.
            arrivals: Arrivals::Trace(PathBuf::new()),
            in_flight: Some(4096),
            seed: self.seed,
            processes: Processes::Hands,
            nats_server: self.nats_server.clone(),
            sync: Sync("always".to_owned()),
            json: self.json,
            output: None,
        }
    }
}

/// `efferent bench part`.
#[derive(Debug, Args)]
pub(crate) struct Part {
    /// What it is.
    pub(crate) role: PartRole,
    /// How many of them.
    pub(crate) copies: usize,
}

/// What a process of the cluster may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum PartRole {
    /// The front door
    Coordinator,
    /// Brains
    Brain,
    /// Hands
    Hand,
}

impl PartRole {
    /// As servers have it.
    pub(crate) fn role(self) -> Role {
        match self {
            Self::Coordinator => Role::Coordinator,
            Self::Brain => Role::Brain,
            Self::Hand => Role::Hand,
        }
    }
}

/// When requests come.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Arrivals {
    /// As soon as others end.
    Saturate,
    /// At random, so many a second.
    Poisson(f64),
    /// At the times in a file.
    Trace(PathBuf),
}

impl FromStr for Arrivals {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "saturate" => Ok(Self::Saturate),
            Some(("poisson", rate)) => match rate.parse::<f64>() {
                Ok(rate) if rate.is_finite() && rate > 0.0 => Ok(Self::Poisson(rate)),
                _ => Err(format!("{rate:?} is not a rate: poisson:12.5 means 12.5 requests a second")),
            },
            Some(("trace", file)) if !file.is_empty() => Ok(Self::Trace(file.into())),
            _ => Err("arrivals are saturate, poisson:RATE or trace:FILE".to_owned()),
        }
    }
}

/// How many processes the hands are spread over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Processes {
    /// So many.
    Count(u32),
    /// As many as hands.
    Hands,
}

impl FromStr for Processes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.parse()) {
            ("hands", _) => Ok(Self::Hands),
            (_, Ok(count)) if count > 0 => Ok(Self::Count(count)),
            _ => Err("processes are a number from 1, or `hands`".to_owned()),
        }
    }
}

/// How often nats-server syncs its files, in its own words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Sync(pub(crate) String);

impl FromStr for Sync {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let is_time = humantime::parse_duration(text).is_ok() && text.bytes().all(|byte| byte.is_ascii_alphanumeric());
        if text == "always" || is_time {
            Ok(Self(text.to_owned()))
        } else {
            Err("it syncs `always`, or after a time such as 10s".to_owned())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrivals_and_processes_are_read() {
        assert_eq!("poisson:2.5".parse(), Ok(Arrivals::Poisson(2.5)));
        assert_eq!("trace:a:b".parse(), Ok(Arrivals::Trace("a:b".into())));
        for bad in ["", "poisson", "poisson:0", "poisson:inf", "poisson:x", "trace:", "saturate:1"] {
            assert!(bad.parse::<Arrivals>().is_err(), "{bad}");
        }
        assert_eq!(("hands".parse(), "3".parse()), (Ok(Processes::Hands), Ok(Processes::Count(3))));
        assert!("0".parse::<Processes>().is_err() && "2m; x".parse::<Sync>().is_err() && "2m".parse::<Sync>().is_ok());
    }
}
