//! `efferent bench autoscale`: hands that come and go as `GetStatus` advises, through a burst.
//!
//! The rule is the one of a Kubernetes autoscaler: up as soon as it is advised, down to the most that was advised within a stabilisation time.

use std::collections::VecDeque;

use efferent_proto::v1::WorkerRole;
use serde::Serialize;

use crate::{
    bench::{
        PATIENCE, args, file,
        load::{self, Job, Load},
        plot,
        processes::Cluster,
        report::Spread,
        status, wait_for_workers,
    },
    client::Server,
    exit::{Exit, Failure},
    local::serve,
    output,
    settings::Settings,
};

/// What happened. Times are in seconds since the load began, rates per second.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) simulated: bool,
    pub(crate) brain_time: f64,
    pub(crate) hand_time: f64,
    /// Requests a second before and after the burst, and in it.
    pub(crate) low: f64,
    pub(crate) high: f64,
    pub(crate) phase: f64,
    pub(crate) samples: Vec<Sample>,
    pub(crate) phases: Vec<Phase>,
    /// Times that hands were added, and drained.
    pub(crate) ups: usize,
    pub(crate) downs: usize,
    /// Times that a change went the other way than the one before: a burst needs one.
    pub(crate) reversals: usize,
    pub(crate) accepted: usize,
    pub(crate) succeeded: usize,
    /// Must be 0.
    pub(crate) lost: usize,
}

/// A look at the cluster.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Sample {
    pub(crate) at: f64,
    /// Live hands.
    pub(crate) hands: u32,
    /// As the coordinator advises.
    pub(crate) advised: u32,
    /// Hands that the rate of arrivals keeps busy all the time.
    pub(crate) needed: f64,
    pub(crate) backlog_seconds: f64,
}

/// A third of the run, by when requests came.
#[derive(Debug, Serialize)]
pub(crate) struct Phase {
    pub(crate) rate: f64,
    pub(crate) requests: usize,
    pub(crate) latency_p50: f64,
    pub(crate) latency_p99: f64,
    pub(crate) mean_hands: f64,
}

/// How many hands there should be, by what was advised of late.
#[derive(Debug)]
struct Rule {
    most: u32,
    stabilisation: f64,
    advice: VecDeque<(f64, u32)>,
}

impl Rule {
    fn wanted(&mut self, now: f64, advised: u32) -> u32 {
        self.advice.push_back((now, advised.clamp(1, self.most)));
        self.advice.retain(|(at, _)| *at > now - self.stabilisation);
        self.advice.iter().map(|(_, advised)| *advised).max().unwrap_or(1)
    }
}

/// Drives a cluster through a burst and prints the report.
///
/// # Errors
/// If the cluster cannot be started, breaks down, or the report cannot be written.
pub(crate) async fn run(settings: &Settings, args: &args::Autoscale) -> Result<(), Failure> {
    let shutdown = serve::signals()?;
    if let Some(folder) = &args.output {
        std::fs::create_dir_all(folder).map_err(|error| file(folder, error))?;
    }
    let mut cluster = Cluster::new(settings, &args.cluster())?;
    let outcome = tokio::select! {
        outcome = drive(&mut cluster, args) => outcome,
        () = shutdown.requested() => Err(Failure::words(Exit::Interrupted, "interrupted; the cluster is stopped")),
    };
    cluster.stop().await;
    let report = outcome?;
    if let Some(folder) = &args.output {
        let json = serde_json::to_string_pretty(&report).unwrap_or_default();
        for (name, text) in [("autoscale.json", json), ("autoscale.svg", plot::autoscale(&report))] {
            let path = folder.join(name);
            std::fs::write(&path, text).map_err(|error| file(&path, error))?;
        }
    }
    if args.json { output::line(serde_json::json!(report)) } else { output::line(report.table()) }
}

async fn drive(cluster: &mut Cluster, args: &args::Autoscale) -> Result<Report, Failure> {
    let mut server = Server::parse(&cluster.start().await?)?;
    let channel = server.connect().await?;
    wait_for_workers(&channel, args.brains + 1).await?;
    let phase = args.phase.as_secs_f64();
    let mut offsets = Vec::new();
    for (index, rate) in (0u32..).zip([args.low, args.high, args.low]) {
        let start = f64::from(index) * phase;
        offsets.extend(load::poisson(rate, args.seed + u64::from(index), phase).into_iter().map(|at| at + start));
    }
    let load = Load::start(channel.clone(), &args.cluster(), 0, Some(offsets), args.phase * 3);
    let mut rule =
        Rule { most: args.max_hands, stabilisation: args.stabilisation.as_secs_f64(), advice: VecDeque::new() };
    let (mut samples, mut changes) = (Vec::new(), Vec::new());
    let mut hands = 1;
    loop {
        cluster.run_for(args.interval).await?;
        let now = load.now();
        if now >= 3.0 * phase {
            break;
        }
        let stages = status(&channel).await?.stages;
        let stage = stages.into_iter().find(|stage| stage.role() == WorkerRole::Hand).unwrap_or_default();
        let in_burst = (phase..2.0 * phase).contains(&now);
        let rate = if in_burst { args.high } else { args.low };
        samples.push(Sample {
            at: now,
            hands: stage.workers,
            advised: stage.advised_workers,
            needed: rate * args.hand_time.as_secs_f64(),
            backlog_seconds: stage.backlog_seconds,
        });
        let wanted = rule.wanted(now, stage.advised_workers);
        if wanted != hands {
            changes.push(i64::from(wanted) - i64::from(hands));
            output::note(format_args!(
                "{now:5.0} s: {hands} hands, {} advised, {wanted} wanted",
                stage.advised_workers
            ));
            cluster.scale_hands(wanted).await?;
            hands = wanted;
        }
    }
    let jobs = tokio::select! {
        jobs = load.finish(PATIENCE + args.hand_time * 20) => jobs,
        failure = cluster.broken() => return Err(failure),
    };
    Ok(Report::new(args, samples, &changes, &jobs))
}

impl Report {
    fn new(args: &args::Autoscale, samples: Vec<Sample>, changes: &[i64], jobs: &[Job]) -> Self {
        let phase = args.phase.as_secs_f64();
        let rates = [args.low, args.high, args.low];
        let phases = rates.into_iter().zip(0..).map(|(rate, index)| {
            let (from, to) = (f64::from(index) * phase, f64::from(index + 1) * phase);
            let of = jobs.iter().filter(|job| (from..to).contains(&job.submitted));
            let mut latencies: Vec<f64> = of.filter_map(|job| Some(job.ended?.0 - job.submitted)).collect();
            let latency = Spread::of(&mut latencies);
            let looks: Vec<f64> = samples
                .iter()
                .filter(|sample| (from..to).contains(&sample.at))
                .map(|sample| f64::from(sample.hands))
                .collect();
            Phase {
                rate,
                requests: latencies.len(),
                latency_p50: latency.p50,
                latency_p99: latency.p99,
                mean_hands: looks.iter().sum::<f64>() / looks.len().max(1) as f64,
            }
        });
        let count = |wanted: fn(&Job) -> bool| jobs.iter().filter(|job| wanted(job)).count();
        Self {
            simulated: true,
            brain_time: args.brain_time.as_secs_f64(),
            hand_time: args.hand_time.as_secs_f64(),
            low: args.low,
            high: args.high,
            phase,
            phases: phases.collect(),
            samples,
            ups: changes.iter().filter(|change| **change > 0).count(),
            downs: changes.iter().filter(|change| **change < 0).count(),
            reversals: changes.windows(2).filter(|pair| pair[0].signum() != pair[1].signum()).count(),
            accepted: count(|job| job.accepted),
            succeeded: count(|job| job.ended.is_some_and(|(_, success)| success)),
            lost: count(|job| job.accepted && job.ended.is_none()),
        }
    }

    fn table(&self) -> String {
        let mut rows = vec![["PHASE", "RATE", "REQUESTS", "P50", "P99", "HANDS"].map(str::to_owned).to_vec()];
        for (name, phase) in ["before", "burst", "after"].into_iter().zip(&self.phases) {
            rows.push(vec![
                name.to_owned(),
                format!("{:.1}/s", phase.rate),
                phase.requests.to_string(),
                format!("{:.2} s", phase.latency_p50),
                format!("{:.2} s", phase.latency_p99),
                format!("{:.1}", phase.mean_hands),
            ]);
        }
        format!(
            "simulated: hands of {} s added and drained by advice\n\n{}\n\nhands added {} times, drained {} times, {} reversals; {} accepted, {} succeeded, {} lost",
            self.hand_time,
            output::table(&rows),
            self.ups,
            self.downs,
            self.reversals,
            self.accepted,
            self.succeeded,
            self.lost
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn up_at_once_and_down_when_it_is_sure() {
        let mut rule = Rule { most: 8, stabilisation: 30.0, advice: VecDeque::new() };
        assert_eq!(rule.wanted(0.0, 2), 2);
        assert_eq!(rule.wanted(10.0, 20), 8, "no more than there may be");
        assert_eq!(rule.wanted(20.0, 3), 8);
        assert_eq!(rule.wanted(39.0, 3), 8);
        assert_eq!(rule.wanted(41.0, 0), 3, "and one at least");
        assert_eq!(rule.wanted(80.0, 0), 1);
    }
}
