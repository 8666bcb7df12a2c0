//! Figures of a run: pure functions of what was measured.

use std::{collections::BTreeMap, time::Duration};

use serde::Serialize;

use crate::{
    bench::{
        args::{self, Arrivals, Processes},
        load::Job,
        processes::{ProcessUsage, Usage},
        scrape::Histogram,
    },
    output,
};

/// Bars and points of plots.
const BINS: usize = 60;

/// The cluster in numbers that follow from what was asked for.
#[derive(Debug, Clone)]
pub(crate) struct Shape {
    brains: f64,
    hands: f64,
    brain_seconds: f64,
    /// Of the largest batch.
    hand_seconds: f64,
    /// Images that a hand draws together.
    pub(crate) batch: usize,
    /// Requests that a closed loop keeps open.
    pub(crate) in_flight: u32,
}

impl Shape {
    /// What these arguments ask for.
    pub(crate) fn of(args: &args::Cluster) -> Self {
        let batch = args.hand_time.largest();
        let images = args.hands.saturating_mul(u32::try_from(batch).unwrap_or(u32::MAX));
        // A brain holds two prompts: it computes one and has the next at hand.
        let held = images.saturating_add(args.brains.saturating_mul(2));
        Self {
            brains: f64::from(args.brains),
            hands: f64::from(args.hands),
            brain_seconds: args.brain_time.as_secs_f64(),
            hand_seconds: args.hand_time.at(batch).as_secs_f64(),
            batch,
            in_flight: args.in_flight.unwrap_or(held.saturating_mul(2)).max(1),
        }
    }

    /// Prompts a second that the brains can read; `None` if they take no time.
    fn brain_rate(&self) -> Option<f64> {
        (self.brain_seconds > 0.0).then(|| self.brains / self.brain_seconds)
    }

    /// Images a second that the hands can draw.
    fn hand_rate(&self) -> Option<f64> {
        (self.hand_seconds > 0.0).then(|| self.hands * self.batch as f64 / self.hand_seconds)
    }

    /// Images a second that the slower stage can do, and its name.
    fn capacity(&self) -> Option<(f64, &'static str)> {
        match (self.brain_rate(), self.hand_rate()) {
            (Some(brains), Some(hands)) if brains < hands => Some((brains, "brains")),
            (Some(brains), None) => Some((brains, "brains")),
            (_, hands) => hands.map(|rate| (rate, "hands")),
        }
    }

    /// The time until every hand has work, and that of two requests.
    pub(crate) fn fill_time(&self) -> Duration {
        let fill = self.brain_rate().map_or(0.0, |rate| self.hands * self.batch as f64 / rate);
        seconds(fill + 2.0 * (self.brain_seconds + self.hand_seconds))
    }

    /// The time that all open requests should take.
    pub(crate) fn drain_time(&self) -> Duration {
        let queue = self.capacity().map_or(0.0, |(rate, _)| f64::from(self.in_flight) / rate);
        seconds(2.0 * queue + self.brain_seconds + self.hand_seconds)
    }
}

fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::from_secs(24 * 3600))
}

/// What was measured.
pub(crate) struct Measured {
    /// The measured time, in seconds since the load began.
    pub(crate) begin: f64,
    pub(crate) end: f64,
    /// Every request, warming up included.
    pub(crate) jobs: Vec<Job>,
    /// At the begin and end of the measured time, and when every request had ended.
    pub(crate) before: Usage,
    pub(crate) after: Usage,
    pub(crate) last: Usage,
    /// Tasks in queues at the end.
    pub(crate) left: u64,
}

/// The report. Times are in seconds, rates per second.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) version: &'static str,
    /// Always: nothing was computed.
    pub(crate) simulated: bool,
    pub(crate) cluster: Setup,
    pub(crate) warm_up: f64,
    pub(crate) measured: f64,
    pub(crate) throughput: Throughput,
    pub(crate) stages: Vec<Stage>,
    pub(crate) latency: Spread,
    /// Latency without the stages' times: waiting, and what the path costs.
    pub(crate) beyond_stages: Spread,
    /// Of that, the mean without waiting for a brain or a hand: what the path costs.
    pub(crate) mean_overhead: f64,
    pub(crate) jobs: Jobs,
    pub(crate) processes: Vec<Process>,
    pub(crate) errors: BTreeMap<String, usize>,
    pub(crate) plots: Plots,
}

/// What was asked for.
#[derive(Debug, Serialize)]
pub(crate) struct Setup {
    pub(crate) brains: u32,
    pub(crate) hands: u32,
    pub(crate) brain_time: f64,
    /// As it was given: a time, or times by batch size.
    pub(crate) hand_time: String,
    pub(crate) steps: u32,
    pub(crate) arrivals: String,
    /// For `saturate`.
    pub(crate) in_flight: Option<u32>,
    pub(crate) hand_processes: u32,
    pub(crate) sync: String,
    pub(crate) seed: u64,
    pub(crate) cores: usize,
}

/// What went through.
#[derive(Debug, Serialize)]
pub(crate) struct Throughput {
    /// Of the slower stage, or what was offered if that is less. Null if neither bounds it.
    pub(crate) theoretical: Option<f64>,
    /// What bounds it: brains, hands or arrivals.
    pub(crate) bound: Option<&'static str>,
    /// Requests that came, for open arrivals.
    pub(crate) offered: Option<f64>,
    /// Images, each counted by the part of its rendering that falls into the measured time, so that waves of hands that work in step
    /// do not count by chance.
    pub(crate) measured: f64,
    /// Ends that clients heard of in the measured time.
    pub(crate) ended: f64,
    /// Measured over theoretical.
    pub(crate) efficiency: Option<f64>,
}

/// A stage.
#[derive(Debug, Serialize)]
pub(crate) struct Stage {
    pub(crate) name: &'static str,
    pub(crate) workers: u32,
    /// Share of the time in which its engines computed.
    pub(crate) utilisation: f64,
    /// From a task's publication to its pull; quantiles by the buckets of the metric, so about.
    pub(crate) wait: Spread,
}

/// Some of a distribution.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub(crate) struct Spread {
    pub(crate) mean: f64,
    pub(crate) p50: f64,
    pub(crate) p90: f64,
    pub(crate) p99: f64,
}

impl Spread {
    pub(crate) fn of(values: &mut [f64]) -> Self {
        if values.is_empty() {
            return Self::default();
        }
        values.sort_by(f64::total_cmp);
        let at = |share: f64| values[((values.len() - 1) as f64 * share).round() as usize];
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        Self { mean, p50: at(0.5), p90: at(0.9), p99: at(0.99) }
    }

    fn about(histogram: &Histogram) -> Self {
        let at = |share| histogram.quantile(share);
        Self { mean: histogram.mean(), p50: at(0.5), p90: at(0.9), p99: at(0.99) }
    }
}

/// All requests of the run, warming up included.
#[derive(Debug, Serialize)]
pub(crate) struct Jobs {
    pub(crate) submitted: usize,
    pub(crate) refused: usize,
    pub(crate) accepted: usize,
    pub(crate) succeeded: usize,
    pub(crate) failed: usize,
    /// Accepted, and no end was heard of. Must be 0.
    pub(crate) lost: usize,
    /// Images or ends that came twice, or were recorded twice. Must be 0.
    pub(crate) duplicated: usize,
    /// Images that were drawn again and dropped because a record was there.
    pub(crate) duplicates_suppressed: usize,
    /// Tasks that another worker had had before.
    pub(crate) redelivered: usize,
    /// Tasks in queues when every request had ended. Must be 0.
    pub(crate) left_in_queues: u64,
}

/// Processor time of the processes of a kind in the measured time.
#[derive(Debug, Serialize)]
pub(crate) struct Process {
    pub(crate) name: &'static str,
    pub(crate) count: usize,
    /// Processor seconds a second.
    pub(crate) cores: f64,
    /// Processor seconds for each image.
    pub(crate) per_image: f64,
}

/// What plots are drawn from.
#[derive(Debug, Serialize)]
pub(crate) struct Plots {
    /// Seconds since the load began (middle of the interval), ends that clients heard of a second.
    pub(crate) throughput: Vec<(f64, f64)>,
    /// Upper bound of the bar, requests.
    pub(crate) latency: Vec<(f64, usize)>,
}

impl Report {
    /// Works everything out.
    pub(crate) fn new(args: &args::Cluster, shape: &Shape, measured: &Measured) -> Self {
        let Measured { begin, end, jobs, before, after, last, left } = measured;
        let inside = |time: f64| (*begin..*end).contains(&time);
        let succeeded = jobs.iter().filter_map(|job| match job.ended {
            Some((ended, true)) if inside(ended) => Some((ended - job.submitted, ended)),
            _ => None,
        });
        let (mut latencies, ends): (Vec<f64>, Vec<f64>) = succeeded.unzip();
        let stage_seconds = shape.brain_seconds + shape.hand_seconds;
        let mut beyond: Vec<f64> = latencies.iter().map(|latency| latency - stage_seconds).collect();
        let (latency, beyond_stages) = (Spread::of(&mut latencies), Spread::of(&mut beyond));
        let stage = |name, workers, computing: &[&str]| stage(name, workers, computing, before, after);
        let stages = vec![
            stage("brain", args.brains, &["efferent_brain_embed_seconds_sum"]),
            stage("hand", args.hands, &["efferent_hand_step_seconds_sum", "efferent_hand_decode_seconds_sum"]),
        ];
        let waiting: f64 = stages.iter().map(|stage| stage.wait.mean).sum();
        let throughput = throughput(args, shape, jobs, ends.len(), (*begin, *end));
        let images = throughput.measured * (end - begin);
        Self {
            version: env!("CARGO_PKG_VERSION"),
            simulated: true,
            cluster: setup(args, shape),
            warm_up: *begin,
            measured: end - begin,
            throughput,
            mean_overhead: beyond_stages.mean - waiting,
            stages,
            plots: Plots { throughput: series(jobs), latency: bars(&latencies) },
            latency,
            beyond_stages,
            jobs: count(jobs, last, *left),
            processes: processes(before, after, images),
            errors: errors(jobs),
        }
    }

    /// The report for a person.
    pub(crate) fn table(&self) -> String {
        let time = |seconds: f64| match seconds {
            long if long >= 10.0 => format!("{long:.1} s"),
            middling if middling >= 1.0 => format!("{middling:.2} s"),
            short => format!("{:.1} ms", short * 1000.0),
        };
        let row = |cells: &[&str]| cells.iter().map(|cell| (*cell).to_owned()).collect::<Vec<_>>();
        let optional = |value: Option<f64>, digits: usize| {
            value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"))
        };
        let Setup { brains, hands, brain_time, hand_time, hand_processes, arrivals, sync, .. } = &self.cluster;
        let Throughput { theoretical, bound, offered, measured, ended, efficiency } = &self.throughput;
        let mut text = format!(
            "simulated: {brains} brains of {}, {hands} hands of {hand_time} in {hand_processes} processes; {arrivals}; sync {sync}; \
             measured for {:.0} s after {:.0} s\n\n",
            time(*brain_time),
            self.measured,
            self.warm_up
        );
        let bound = bound.map_or_else(|| "unbounded".to_owned(), |bound| format!("bound by {bound}"));
        text += &output::table(&[
            row(&["THROUGHPUT", "PER SECOND", ""]),
            row(&["theoretical", &optional(*theoretical, 3), &bound]),
            row(&["offered", &optional(*offered, 3), ""]),
            row(&["measured", &format!("{measured:.3}"), &format!("{ended:.3} ends heard of")]),
            row(&["efficiency", &optional(*efficiency, 4), "measured / theoretical"]),
        ]);
        let spread = |name: &str, spread: &Spread| {
            row(&[name, &time(spread.mean), &time(spread.p50), &time(spread.p90), &time(spread.p99)])
        };
        let mut rows = vec![row(&["TIME", "MEAN", "P50", "P90", "P99"]), spread("latency", &self.latency)];
        rows.push(spread("without stages", &self.beyond_stages));
        rows.extend(self.stages.iter().map(|stage| spread(&format!("wait for a {}", stage.name), &stage.wait)));
        rows.push(row(&["overhead", &time(self.mean_overhead)]));
        text += &format!("\n\n{}", output::table(&rows));
        let mut rows = vec![row(&["STAGE", "WORKERS", "BUSY"])];
        rows.extend(self.stages.iter().map(|stage| {
            row(&[stage.name, &stage.workers.to_string(), &format!("{:.2} %", stage.utilisation * 100.0)])
        }));
        text += &format!("\n\n{}", output::table(&rows));
        let mut rows = vec![row(&["PROCESSES", "COUNT", "CORES", "CPU PER IMAGE"])];
        rows.extend(self.processes.iter().map(|process| {
            let (count, cores) = (process.count.to_string(), format!("{:.3}", process.cores));
            row(&[process.name, &count, &cores, &time(process.per_image)])
        }));
        text += &format!("\n\n{}", output::table(&rows));
        let jobs = &self.jobs;
        text += &format!(
            "\n\n{} requests, {} refused, {} accepted: {} succeeded, {} failed, {} lost, {} duplicated ({} suppressed, {} redelivered), {} \
             left in queues",
            jobs.submitted,
            jobs.refused,
            jobs.accepted,
            jobs.succeeded,
            jobs.failed,
            jobs.lost,
            jobs.duplicated,
            jobs.duplicates_suppressed,
            jobs.redelivered,
            jobs.left_in_queues
        );
        for (error, count) in &self.errors {
            text += &format!("\n{count} x {error}");
        }
        text
    }
}

fn setup(args: &args::Cluster, shape: &Shape) -> Setup {
    let (arrivals, in_flight) = match &args.arrivals {
        Arrivals::Saturate => ("saturate".to_owned(), Some(shape.in_flight)),
        Arrivals::Poisson(rate) => (format!("poisson:{rate}"), None),
        Arrivals::Trace(path) => (format!("trace:{}", path.display()), None),
    };
    let hand_processes = match args.processes {
        Processes::Hands => args.hands,
        Processes::Count(count) => count.min(args.hands),
    };
    Setup {
        brains: args.brains,
        hands: args.hands,
        brain_time: args.brain_time.as_secs_f64(),
        hand_time: args.hand_time.to_string(),
        steps: args.steps,
        arrivals,
        in_flight,
        hand_processes,
        sync: args.sync.0.clone(),
        seed: args.seed,
        cores: std::thread::available_parallelism().map_or(0, usize::from),
    }
}

fn throughput(args: &args::Cluster, shape: &Shape, jobs: &[Job], ended: usize, (begin, end): (f64, f64)) -> Throughput {
    let time = end - begin;
    let offered = (args.arrivals != Arrivals::Saturate)
        .then(|| jobs.iter().filter(|job| (begin..end).contains(&job.submitted)).count() as f64 / time);
    let (theoretical, bound) = match (shape.capacity(), offered) {
        (Some((capacity, _)), Some(offered)) if offered < capacity => (Some(offered), Some("arrivals")),
        (None, Some(offered)) => (Some(offered), Some("arrivals")),
        (Some((capacity, stage)), _) => (Some(capacity), Some(stage)),
        (None, None) => (None, None),
    };
    let rendered = jobs.iter().filter_map(|job| job.rendered);
    let measured = rendered.map(|(at, spent)| share_inside(at, spent, begin, end)).sum::<f64>() / time;
    let efficiency = theoretical.filter(|rate| *rate > 0.0).map(|theoretical| measured / theoretical);
    Throughput { theoretical, bound, offered, measured, ended: ended as f64 / time, efficiency }
}

/// The part of a piece of work, `spent` long and over `at`, that lies in a window.
fn share_inside(at: f64, spent: f64, begin: f64, end: f64) -> f64 {
    if spent <= 0.0 {
        return f64::from(u8::from((begin..end).contains(&at)));
    }
    ((at.min(end) - (at - spent).max(begin)) / spent).clamp(0.0, 1.0)
}

/// Processes before and after, in pairs.
fn pairs<'a>(before: &'a Usage, after: &'a Usage) -> impl Iterator<Item = (&'a ProcessUsage, &'a ProcessUsage)> {
    before.processes.iter().zip(&after.processes)
}

fn stage(name: &'static str, workers: u32, computing: &[&str], before: &Usage, after: &Usage) -> Stage {
    let (mut busy, mut wait) = (0.0, Histogram::default());
    let queue = format!("queue=\"{name}.");
    for (before, after) in pairs(before, after).filter(|(before, _)| before.name == name) {
        let time = after.at.duration_since(before.at).as_secs_f64();
        let spent = |usage: &ProcessUsage| computing.iter().map(|meter| usage.metrics.sum(meter, "")).sum::<f64>();
        busy += (spent(after) - spent(before)) / time;
        let waits = |usage: &ProcessUsage| usage.metrics.histogram("efferent_queue_wait_seconds", &queue);
        wait.add_difference(&waits(before), &waits(after));
    }
    Stage { name, workers, utilisation: busy / f64::from(workers), wait: Spread::about(&wait) }
}

fn processes(before: &Usage, after: &Usage, images: f64) -> Vec<Process> {
    let mut processes: Vec<Process> = Vec::new();
    for (before, after) in pairs(before, after) {
        let spent = after.cpu_seconds - before.cpu_seconds;
        let cores = spent / after.at.duration_since(before.at).as_secs_f64();
        let per_image = if images > 0.0 { spent / images } else { 0.0 };
        match processes.iter_mut().find(|process| process.name == before.name) {
            Some(process) => {
                process.count += 1;
                process.cores += cores;
                process.per_image += per_image;
            }
            None => processes.push(Process { name: before.name, count: 1, cores, per_image }),
        }
    }
    processes
}

fn count(jobs: &[Job], last: &Usage, left_in_queues: u64) -> Jobs {
    let count = |wanted: fn(&Job) -> bool| jobs.iter().filter(|job| wanted(job)).count();
    let told = |name: &str| last.processes.iter().map(|process| process.metrics.sum(name, "")).sum::<f64>() as usize;
    let succeeded = count(|job| job.ended.is_some_and(|(_, success)| success));
    let twice = count(|job| job.images > 1 || job.ends > 1);
    let recorded = told("efferent_images_total");
    Jobs {
        submitted: jobs.len(),
        refused: count(|job| !job.accepted && job.error.is_some()),
        accepted: count(|job| job.accepted),
        succeeded,
        failed: count(|job| job.ended.is_some_and(|(_, success)| !success)),
        lost: count(|job| job.accepted && job.ended.is_none()),
        duplicated: twice + recorded.saturating_sub(count(|job| job.images > 0)),
        duplicates_suppressed: told("efferent_results_duplicate_total"),
        redelivered: told("efferent_redeliveries_total"),
        left_in_queues,
    }
}

fn errors(jobs: &[Job]) -> BTreeMap<String, usize> {
    let mut errors = BTreeMap::new();
    for error in jobs.iter().filter_map(|job| job.error.as_ref()) {
        *errors.entry(error.clone()).or_default() += 1;
    }
    errors
}

/// Ends a second over the whole run.
fn series(jobs: &[Job]) -> Vec<(f64, f64)> {
    let ends: Vec<f64> = jobs.iter().filter_map(|job| job.ended.map(|(at, _)| at)).collect();
    let width = (ends.iter().copied().fold(0.0, f64::max) / BINS as f64).max(1.0);
    histogram(&ends, width).into_iter().map(|(bound, count)| (bound - width / 2.0, count as f64 / width)).collect()
}

/// Bars over sorted latencies; the last one holds the longest 0.5 % too.
fn bars(sorted: &[f64]) -> Vec<(f64, usize)> {
    let Some(&long) = sorted.get((sorted.len() as f64 * 0.995) as usize) else { return Vec::new() };
    let capped: Vec<f64> = sorted.iter().map(|value| value.min(long)).collect();
    histogram(&capped, (long / BINS as f64).max(1e-6))
}

fn histogram(values: &[f64], width: f64) -> Vec<(f64, usize)> {
    let mut bars: Vec<(f64, usize)> = Vec::new();
    for value in values {
        let index = (value / width).max(0.0) as usize;
        while bars.len() <= index {
            bars.push(((bars.len() + 1) as f64 * width, 0));
        }
        bars[index].1 += 1;
    }
    bars
}

#[cfg(test)]
mod tests {
    use clap::{Args as _, Command, FromArgMatches as _};

    use super::*;

    fn args(text: &str) -> args::Cluster {
        let words = std::iter::once("cluster").chain(text.split_whitespace());
        let matches = args::Cluster::augment_args(Command::new("cluster")).get_matches_from(words);
        args::Cluster::from_arg_matches(&matches).unwrap()
    }

    fn job(submitted: f64, ended: f64, spent: f64) -> Job {
        let (ended, rendered) = (Some((ended, true)), Some((ended, spent)));
        Job { submitted, accepted: true, ended, rendered, images: 1, ends: 1, ..Job::default() }
    }

    fn usage() -> Usage {
        Usage { processes: Vec::new() }
    }

    fn report(args: &args::Cluster, jobs: Vec<Job>, begin: f64, end: f64) -> Report {
        let (before, after, last) = (usage(), usage(), usage());
        Report::new(args, &Shape::of(args), &Measured { begin, end, jobs, before, after, last, left: 0 })
    }

    #[test]
    fn theory_is_the_slower_stage_or_what_is_offered() {
        let capacity = |text: &str| Shape::of(&args(text)).capacity();
        let (rate, stage) = capacity("--brains 21 --hands 779 --brain-time 400ms --hand-time 15s").unwrap();
        assert!((rate - 51.933).abs() < 0.001 && stage == "hands");
        assert_eq!(capacity("--brains 2 --hands 100 --brain-time 1s --hand-time 1s"), Some((2.0, "brains")));
        assert_eq!(capacity("--brain-time 0s --hand-time 0s"), None);
        assert_eq!(capacity("--hands 2 --brain-time 0s --hand-time 1:1s,4:2s"), Some((4.0, "hands")));
        let slow = args("--hands 1 --hand-time 1s --arrivals poisson:0.5");
        let jobs = vec![job(0.0, 1.0, 1.0), job(4.0, 5.0, 1.0)];
        let throughput = report(&slow, jobs, 0.0, 10.0).throughput;
        assert_eq!((throughput.theoretical, throughput.bound), (Some(0.2), Some("arrivals")));
        assert_eq!(throughput.efficiency, Some(1.0));
    }

    #[test]
    fn a_hand_that_never_rests_is_fully_efficient_wherever_the_window_lies() {
        let args = args("--hands 1 --brain-time 0s --hand-time 2s");
        let jobs: Vec<Job> = (0..50).map(|n| job(0.0, f64::from(n) * 2.0 + 2.0, 2.0)).collect();
        for begin in [10.0, 10.5, 11.9] {
            let throughput = report(&args, jobs.clone(), begin, begin + 31.0).throughput;
            assert!((throughput.efficiency.unwrap() - 1.0).abs() < 1e-9, "{throughput:?}");
        }
        // And half as efficient if it rests half the time.
        let rests: Vec<Job> = (0..50).map(|n| job(0.0, f64::from(n) * 4.0 + 2.0, 2.0)).collect();
        let throughput = report(&args, rests, 8.0, 48.0).throughput;
        assert!((throughput.efficiency.unwrap() - 0.5).abs() < 1e-9, "{throughput:?}");
    }

    #[test]
    fn what_is_lost_or_comes_twice_is_counted() {
        let args = args("--hands 1 --hand-time 1s");
        let lost = Job { accepted: true, ..Job::default() };
        let refused = Job { error: Some("full".to_owned()), ..Job::default() };
        let twice = Job { ends: 2, ..job(0.0, 1.0, 1.0) };
        let report = report(&args, vec![lost, refused, twice, job(0.0, 2.0, 1.0)], 0.0, 10.0);
        let jobs = &report.jobs;
        assert_eq!((jobs.submitted, jobs.refused, jobs.accepted, jobs.succeeded), (4, 1, 3, 2));
        assert_eq!((jobs.lost, jobs.duplicated), (1, 1));
        assert_eq!(report.errors.get("full"), Some(&1));
        assert!(report.table().contains("1 lost, 1 duplicated"));
        assert_eq!((report.latency.p50, report.latency.mean), (2.0, 1.5));
        assert_eq!(report.plots.latency.iter().map(|(_, count)| count).sum::<usize>(), 2);
    }
}
