//! `efferent launch`: the workers of a host, each a process of its own with devices of its own.
//!
//! Read in this order: [`args`] (what can be typed), this file (the run), [`placement`] (who gets which device), [`supervisor`] (a process that
//! is started again when it ends), [`label`] (whose line of the log it is). Deliberately absent: queues and models. A launcher knows of
//! its workers only whether they run, and its own end is noticed by them, not by anybody else.

pub(crate) mod args;
mod label;
mod placement;
mod supervisor;

use std::time::Duration;

use efferent_proto::{
    v1::{Model, WorkerRole},
    work,
};
use efferent_service::Shutdown;
use efferent_worker::devices::{Cores, Devices, Inventory, Spec, select::Host, spec::Gpu};
use tokio::{
    signal::unix::{SignalKind, signal},
    task::JoinSet,
};

use crate::{
    client::{Server, cluster},
    exit::{Exit, Failure},
    launch::{
        args::{Launch, Mix},
        placement::{Placement, Pool, Times},
        supervisor::{Ending, Orders, Supervisor},
    },
    local::{devices, serve},
    output,
    settings::Settings,
};

/// What workers have beyond their own grace periods, to say goodbye.
const FAREWELL: Duration = Duration::from_secs(5);

/// Places workers on this host's devices, and keeps them running until it is told to stop.
///
/// # Errors
/// If there is no such placement; if all workers were given up; if some had to be killed at the end.
pub(crate) async fn run(settings: &Settings, args: &Launch) -> Result<(), Failure> {
    let local = &settings.local;
    let inventory = Inventory::read(&local.inventory).map_err(devices::failure)?;
    let (pool, found) = pool(args, &Host::here(inventory))?;
    let times = match (args.placement, args.brain_time, args.hand_time) {
        (Mix::Counts { .. }, ..) => None,
        (Mix::Auto, Some(brain), Some(hand)) => Some(Times { brain, hand }),
        (Mix::Auto, ..) => Some(measured(settings).await?),
    };
    let placement = Placement::of(args.placement, times, &pool, local)?;
    if args.dry_run {
        return match args.json {
            true => output::line(serde_json::json!(placement)),
            false => output::line(placement.table()),
        };
    }
    serve::needs_queue(local, "launch")?;
    if let Some(found) = found {
        devices::check_build(&found)?;
    }
    output::line(placement.table())?;
    let orders = Orders { stop: Shutdown::new(), kill: Shutdown::new() };
    obey_signals(&orders)?;
    let grace = local.brain.grace.max(local.hand.grace) + FAREWELL;
    let mut workers = JoinSet::new();
    for worker in &placement.workers {
        let supervisor = Supervisor::new(worker, settings, grace, orders.clone())?;
        workers.spawn(supervisor.run());
    }
    conclude(workers.join_all().await)
}

/// What the workers' ends mean for the launcher's.
fn conclude(endings: Vec<Ending>) -> Result<(), Failure> {
    let given_up: Vec<Exit> = endings.iter().filter_map(Ending::given_up).collect();
    let killed = endings.iter().filter(|ending| **ending == Ending::Killed).count();
    match given_up.first() {
        Some(exit) if given_up.len() == endings.len() => {
            Err(Failure::words(*exit, "every worker was given up: what each said of its configuration is above"))
        }
        _ if killed > 0 => {
            Err(Failure::words(Exit::Failed, format!("workers that did not stop in time and were killed: {killed}")))
        }
        _ => Ok(()),
    }
}

/// The first SIGINT or SIGTERM has workers finish what they have in hand, the second ends them at once.
fn obey_signals(orders: &Orders) -> Result<(), Failure> {
    let fault = |error| Failure::new(Exit::Failed, anyhow::Error::new(error).context("cannot listen for signals"));
    let mut interrupt = signal(SignalKind::interrupt()).map_err(fault)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(fault)?;
    let orders = orders.clone();
    tokio::spawn(async move {
        for order in [&orders.stop, &orders.kill] {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            order.trigger();
        }
    });
    Ok(())
}

/// What there is to place workers on: as it was typed, or else the host's GPUs, or else its cores. With the GPUs as they were found.
fn pool(args: &Launch, host: &Host) -> Result<(Pool, Option<Devices>), Failure> {
    let spec = match (&args.devices, host.gpus()) {
        (Some(text), _) => text.parse().map_err(devices::failure)?,
        (None, 0) => Spec::Cpu(Some(host.processor.cores.clone())),
        (None, gpus) => Spec::Cuda((0..gpus).map(Gpu::Number).collect()),
    };
    match &spec {
        Spec::Cpu(None) => Ok((Pool::Shared, None)),
        // Whether this process may run on them shows when it comes to that; a dry run may be meant for another host.
        Spec::Cpu(Some(cores)) if args.dry_run => Ok((Pool::Cores(cores.clone()), None)),
        Spec::Cpu(Some(_)) | Spec::Metal(_) | Spec::Cuda(_) => {
            let found = Devices::find(&spec, host).map_err(devices::failure)?;
            let pool = match spec {
                Spec::Cpu(cores) => Pool::Cores(cores.unwrap_or_else(Cores::default)),
                Spec::Metal(_) | Spec::Cuda(_) => Pool::Gpus(found.described()),
            };
            Ok((pool, Some(found)))
        }
    }
}

/// What an image at default settings takes, as the live workers of a server measured.
async fn measured(settings: &Settings) -> Result<Times, Failure> {
    let named = settings.client.server.as_str();
    let wanting = |what: &str| {
        let message = format!("--placement auto goes by what work takes: {what}; or give --brain-time and --hand-time");
        Failure::words(Exit::Usage, message)
    };
    if named.is_empty() {
        return Err(wanting("name a --server whose workers have measured it"));
    }
    let workers = cluster::workers(&mut Server::parse(named)?).await?;
    let wanted = settings.client.model.as_str();
    let served = |model: &&Model| wanted.is_empty() || model.name == wanted;
    let Some(model) = workers.iter().flat_map(|worker| &worker.models).find(served).cloned() else {
        return Err(wanting("the server has no workers of the model"));
    };
    let mean = |role| {
        let of_role = workers
            .iter()
            .filter(|worker| worker.role() == role && worker.models.iter().any(|known| known.name == model.name));
        let times: Vec<f64> = of_role.filter_map(|worker| Some(worker.time.as_ref()?.busy_seconds_per_unit)).collect();
        (!times.is_empty()).then(|| times.iter().sum::<f64>() / times.len() as f64)
    };
    let units = model.sizes.first().map_or(0.0, |size| work::image_units(size, model.default_steps));
    let seconds = |time: Option<f64>, units: f64| time.and_then(|time| Duration::try_from_secs_f64(time * units).ok());
    match (seconds(mean(WorkerRole::Brain), 1.0), seconds(mean(WorkerRole::Hand), units)) {
        (Some(brain), Some(hand)) if !brain.is_zero() && !hand.is_zero() => Ok(Times { brain, hand }),
        _ => Err(wanting("the server's workers have not measured it yet")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_launcher_fails_when_nobody_is_left_to_look_after() {
        let exit = |endings: &[Ending]| match conclude(endings.to_vec()) {
            Ok(()) => None,
            Err(Failure::Told { exit, .. }) => Some(exit),
            Err(Failure::Pipe) => panic!("is told"),
        };
        let given_up = Ending::GivenUp(Exit::Config);
        assert_eq!(exit(&[given_up, given_up]), Some(Exit::Config));
        assert_eq!(exit(&[given_up, Ending::Stopped]), None);
        assert_eq!(exit(&[given_up, Ending::Killed]), Some(Exit::Failed));
        assert_eq!(exit(&[Ending::Stopped]), None);
    }
}
