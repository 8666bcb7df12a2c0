//! `efferent bench cluster`: a cluster of simulated workers under load, beside what theory promises of it.
//!
//! Read in this order: [`args`] (what can be typed), this file (the run), [`processes`] (the cluster), [`load`] (requests), [`scrape`]
//! (what processes measured themselves), [`report`] (figures), [`plot`] (pictures of them), [`autoscale`] (hands that come and go). Everything is started by this command, and
//! stopped by it, by id.

pub(crate) mod args;
pub(crate) mod autoscale;
mod load;
mod plot;
mod processes;
mod report;
mod scrape;

use std::{io, path::Path, time::Duration};

use efferent_proto::v1::{GetStatusRequest, GetStatusResponse};

use crate::{
    bench::{
        load::Load,
        processes::Cluster,
        report::{Measured, Report, Shape},
    },
    client::{self, Server},
    exit::{Exit, Failure},
    local::{self, serve},
    output,
    settings::Settings,
};

/// On top of the time to fill every hand, warming up takes this long.
const SETTLING: Duration = Duration::from_secs(5);
/// On top of the time they should take, requests that are open at the end have this long to end.
const PATIENCE: Duration = Duration::from_secs(60);

/// Measures a cluster and prints the report.
///
/// # Errors
/// If the cluster cannot be started, breaks down, or the report cannot be written.
pub(crate) async fn cluster(settings: &Settings, args: &args::Cluster) -> Result<(), Failure> {
    if let Some(folder) = &args.output {
        std::fs::create_dir_all(folder).map_err(|error| file(folder, error))?;
    }
    let offsets = load::offsets(args)?;
    let shutdown = serve::signals()?;
    let mut cluster = Cluster::new(settings, args)?;
    let outcome = tokio::select! {
        outcome = measure(&mut cluster, args, offsets) => outcome,
        () = shutdown.requested() => Err(Failure::words(Exit::Interrupted, "interrupted; the cluster is stopped")),
    };
    cluster.stop().await;
    let report = outcome?;
    if let Some(folder) = &args.output {
        let files = [
            ("report.json", serde_json::to_string_pretty(&report).unwrap_or_default()),
            ("throughput.svg", plot::throughput(&report)),
            ("latency.svg", plot::latency(&report)),
        ];
        for (name, text) in files {
            let path = folder.join(name);
            std::fs::write(&path, text).map_err(|error| file(&path, error))?;
        }
    }
    if args.json { output::line(serde_json::json!(report)) } else { output::line(report.table()) }
}

/// Serves as a part of such a cluster until whoever started it is gone.
///
/// # Errors
/// As any server.
pub(crate) async fn part(settings: &Settings, args: &args::Part) -> Result<(), Failure> {
    let telemetry = local::telemetry(settings, "efferent-bench", "warn")?;
    let shutdown = serve::signals()?;
    tokio::spawn(serve::end_with_input(shutdown.clone()));
    serve::run_until(shutdown, settings, args.role.role(), args.copies, &telemetry).await
}

async fn measure(cluster: &mut Cluster, args: &args::Cluster, offsets: Option<Vec<f64>>) -> Result<Report, Failure> {
    let shape = Shape::of(args);
    output::note(format_args!(
        "starting nats-server, a coordinator, {} simulated brains and {} simulated hands",
        args.brains, args.hands
    ));
    let mut server = Server::parse(&cluster.start().await?)?;
    let channel = server.connect().await?;
    wait_for_workers(&channel, args.brains + args.hands).await?;
    let warm_up = args.warm_up.unwrap_or_else(|| shape.fill_time() + SETTLING);
    output::note(format_args!(
        "warming up for {}, measuring for {}",
        humantime::format_duration(rounded(warm_up)),
        humantime::format_duration(args.duration)
    ));
    let load = Load::start(channel.clone(), args, shape.in_flight, offsets, warm_up + args.duration);
    cluster.run_for(warm_up).await?;
    let (begin, before) = (load.now(), cluster.usage().await?);
    cluster.run_for(args.duration).await?;
    let (end, after) = (load.now(), cluster.usage().await?);
    output::note("waiting for the requests that are open");
    let drain = shape.drain_time() + PATIENCE;
    let jobs = tokio::select! {
        jobs = load.finish(drain) => jobs,
        failure = cluster.broken() => return Err(failure),
    };
    let last = cluster.usage().await?;
    let left = tasks_left(&channel).await?;
    Ok(Report::new(args, &shape, &Measured { begin, end, jobs, before, after, last, left }))
}

fn rounded(time: Duration) -> Duration {
    Duration::from_millis(u64::try_from(time.as_millis()).unwrap_or(u64::MAX))
}

/// Waits until the coordinator knows of every worker.
async fn wait_for_workers(channel: &tonic::transport::Channel, wanted: u32) -> Result<(), Failure> {
    let started = tokio::time::Instant::now();
    loop {
        let known = status(channel).await?.workers;
        if known >= wanted {
            return Ok(());
        }
        if started.elapsed() > PATIENCE {
            let message = format!("the coordinator knows of {known} workers only, of {wanted} that are ready");
            return Err(Failure::words(Exit::Failed, message));
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn status(channel: &tonic::transport::Channel) -> Result<GetStatusResponse, Failure> {
    let answer = client::cluster(channel.clone()).get_status(GetStatusRequest {}).await;
    Ok(answer.map_err(|status| Failure::status(&status))?.into_inner())
}

/// Tasks that are still in a queue though every request has ended.
async fn tasks_left(channel: &tonic::transport::Channel) -> Result<u64, Failure> {
    let started = tokio::time::Instant::now();
    loop {
        let left = status(channel).await?.queues.iter().map(|queue| queue.ready + queue.leased).sum();
        // A client hears of the end before the task is acknowledged.
        if left == 0 || started.elapsed() > Duration::from_secs(5) {
            return Ok(left);
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

fn file(path: &Path, error: io::Error) -> Failure {
    Failure::new(Exit::File, anyhow::Error::new(error).context(format!("cannot write {}", path.display())))
}
