//! The `efferent` command.
//!
//! Read in this order: [`args`] (what can be typed), [`settings`] (defaults, file, environment, flags), [`client`] (asking a server),
//! [`local`] (serving, and `generate` without a server), [`launch`] (the workers of a host), [`bench`] (load on clusters of simulated workers), [`plan`], [`exit`] (exit codes and the one line that says why), [`output`].
//!
//! | exit code | meaning |
//! |---|---|
//! | 0 | done |
//! | 1 | the job failed, or an internal fault |
//! | 2 | malformed command line |
//! | 3 | refused: a field or limit of the request, a signal of another space, an unknown model, job, image, batch or signal |
//! | 4 | not available now (no server, no worker, queue full, a device that is held): trying again may help |
//! | 5 | the job was cancelled |
//! | 6 | the job's deadline passed |
//! | 64 | wrong configuration; nothing was started |
//! | 69 | weights could not be fetched |
//! | 70 | a worker's engine hung: it is to be started again |
//! | 74 | a file could not be read or written |
//! | 130 | Ctrl-C (in `generate`, the job is cancelled) |
//!
//! With the cargo feature `local` (the default) it serves as well as asks; without, it is a client that needs nothing of ours but the
//! wire. Deliberately absent: anything that a server decides. A request is checked there, not here.

mod args;
#[cfg(feature = "local")]
mod bench;
mod client;
mod exit;
#[cfg(feature = "local")]
mod launch;
#[cfg(feature = "local")]
mod local;
mod output;
mod plan;
mod settings;

use std::{path::Path, process::ExitCode, time::Duration};

use clap::{ArgMatches, FromArgMatches as _};

use crate::{
    args::{Cli, Do},
    client::{
        Server, batch, cluster, dead, files::Plan, follow::Follow, generate, jobs, progress::Progress, signals, top,
    },
    exit::{Exit, Failure},
    settings::Settings,
};

/// How long the process waits at its end for what runs in the background.
const FAREWELL: Duration = Duration::from_millis(100);

fn main() -> ExitCode {
    let matches = args::command().get_matches();
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let json = wants_json(&cli.command);
    match run(&cli.command, &matches) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(json),
    }
}

fn run(command: &Do, matches: &ArgMatches) -> Result<(), Failure> {
    let mut levels = vec![matches];
    while let Some((_, inner)) = levels.last().and_then(|last| last.subcommand()) {
        levels.push(inner);
    }
    let settings = settings::load(&levels, std::env::vars_os()).map_err(|error| match error {
        settings::Error::Flag(_) => Failure::new(Exit::Usage, error),
        _ => Failure::new(Exit::Config, error),
    })?;
    match command {
        Do::Config => output::line(settings.describe().trim_end()),
        Do::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut args::command(), "efferent", &mut script);
            output::bytes(&script)
        }
        Do::Ready { address } => client::ready::ask(address),
        Do::Plan(args) => plan::run(args),
        #[cfg(feature = "local")]
        Do::Devices(args) => local::devices::list(&settings.local, args.json),
        command => {
            #[cfg(feature = "local")]
            if computes(command, &settings) {
                local::devices::prepare(&settings)?;
            }
            let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
            let runtime = runtime.map_err(|error| Failure::new(Exit::Failed, error))?;
            let outcome = runtime.block_on(run_async(command, &settings));
            runtime.shutdown_timeout(FAREWELL);
            outcome
        }
    }
}

async fn run_async(command: &Do, settings: &Settings) -> Result<(), Failure> {
    #[cfg(feature = "local")]
    {
        use local::serve::{self, Role};
        if let Do::Bench(bench::args::Do::Part(args)) = command {
            return bench::part(settings, args).await;
        }
        let role = match command {
            Do::Up => Some(Role::Up),
            Do::Coordinator => Some(Role::Coordinator),
            Do::Brain(_) => Some(Role::Brain),
            Do::Hand(_) => Some(Role::Hand),
            _ => None,
        };
        if let Some(role) = role {
            let telemetry = local::telemetry(settings, &format!("efferent-{}", role.name()), "info")?;
            let shutdown = serve::signals()?;
            if let Do::Brain(worker) | Do::Hand(worker) = command
                && worker.stop_with_input
            {
                tokio::spawn(serve::end_with_input(shutdown.clone()));
            }
            return serve::run_until(shutdown, settings, role, 1, &telemetry).await;
        }
        if let Do::Launch(args) = command {
            let _telemetry = local::telemetry(settings, "efferent-launch", "info")?;
            return launch::run(settings, args).await;
        }
    }
    #[cfg(feature = "local")]
    let _telemetry = local::telemetry(settings, "efferent-cli", "warn")?;
    let named = settings.client.server.as_str();
    let server = || Server::parse(if named.is_empty() { client::USUAL } else { named });
    match command {
        Do::Generate(args) => generate(args, settings).await,
        Do::Encode(args) => signals::encode(server()?, args, &settings.client).await,
        Do::Signal(args::SignalDo::Show(args)) => signals::show(server()?, args).await,
        Do::Signal(args::SignalDo::Drop(args)) => signals::drop(server()?, args).await,
        Do::Models(args) => match &args.command {
            #[cfg(feature = "local")]
            Some(args::ModelsDo::Fetch { name }) => local::models::fetch(settings, name.as_deref()),
            #[cfg(feature = "local")]
            Some(args::ModelsDo::Inspect { name, json }) => {
                local::inspect::inspect(settings, name.as_deref(), *json || args.json)
            }
            #[cfg(feature = "local")]
            None if named.is_empty() => local::models::list(settings, args.json),
            _ => cluster::list_models(server()?, args.json).await,
        },
        #[cfg(feature = "local")]
        Do::Bench(bench::args::Do::Cluster(args)) => bench::cluster(settings, args).await,
        #[cfg(feature = "local")]
        Do::Bench(bench::args::Do::Autoscale(args)) => bench::autoscale::run(settings, args).await,
        Do::Workers(args) => cluster::list_workers(server()?, args.json).await,
        Do::Status(args) => cluster::show_status(server()?, args.json).await,
        Do::Top { once } => top::run(server()?, *once).await,
        Do::Watch(args) => jobs::watch(server()?, args).await,
        Do::Job(args) => jobs::show(server()?, args).await,
        Do::Cancel(args) => jobs::cancel(server()?, args).await,
        Do::Image(args) => jobs::image(server()?, args).await,
        Do::Batch(args::BatchDo::Submit(args)) => batch::submit(server()?, args, &settings.client).await,
        Do::Batch(args::BatchDo::Fetch(args)) => batch::fetch(server()?, args).await,
        Do::Batch(args::BatchDo::Show(args)) => batch::show(server()?, args).await,
        Do::Batch(args::BatchDo::Cancel(args)) => batch::cancel(server()?, args).await,
        Do::Batch(args::BatchDo::List(args)) => batch::list(server()?, &settings.client.tenant, args.json).await,
        Do::Batch(args::BatchDo::Retry(args)) => batch::retry(server()?, args).await,
        Do::Dead(args::DeadDo::List(args)) => dead::list(server()?, args).await,
        Do::Dead(args::DeadDo::Show(args)) => dead::show(server()?, args).await,
        Do::Dead(args::DeadDo::Replay(args)) => dead::replay(server()?, args).await,
        Do::Dead(args::DeadDo::Drop(args)) => dead::drop(server()?, args).await,
        other => Err(Failure::words(Exit::Failed, format!("{other:?} has no place here"))),
    }
}

async fn generate(args: &args::Generate, settings: &Settings) -> Result<(), Failure> {
    let title = args.prompt.as_deref().or(args.signal.as_deref()).unwrap_or_default();
    let count = if args.seeds.is_empty() { args.count } else { args.seeds.len() as u32 };
    let plan = Plan::new(title, args.output.as_deref().map(Path::new), args.format, count)?;
    let pictures = !args.no_show && !args.json && !plan.is_stdout();
    let progress = Progress::new("starting", pictures);
    let named = settings.client.server.as_str();
    #[cfg(feature = "local")]
    if named.is_empty() || args.local {
        if args.detach || args.quote || args.signal.is_some() {
            let message = "--detach needs a --server that goes on with the job, --quote one that knows its workers, and --signal one that keeps signals";
            return Err(Failure::words(Exit::Usage, message));
        }
        return local::private::run(settings, args, &plan, progress).await;
    }
    let mut server = Server::parse(if named.is_empty() { client::USUAL } else { named })?;
    let request = generate::request(&mut server, args, &settings.client, &plan).await?;
    if args.quote {
        progress.clear();
        return generate::quote(server, request, args.json).await;
    }
    generate::run(Follow::submit(server, request), args, &plan, progress, std::future::pending()).await
}

/// Whether a command has engines in this process.
#[cfg(feature = "local")]
fn computes(command: &Do, settings: &Settings) -> bool {
    match command {
        Do::Up | Do::Brain(_) | Do::Hand(_) => true,
        Do::Generate(args) => args.local || settings.client.server.is_empty(),
        _ => false,
    }
}

/// Whether stdout is for scripts, so that failures must be told there too.
fn wants_json(command: &Do) -> bool {
    match command {
        Do::Generate(args) => args.json && args.output.as_deref() != Some(Path::new("-")),
        Do::Encode(args) => args.json,
        Do::Signal(args::SignalDo::Show(args) | args::SignalDo::Drop(args)) => args.json,
        Do::Models(args) => args.json,
        Do::Plan(args) => args.json,
        #[cfg(feature = "local")]
        Do::Bench(bench::args::Do::Cluster(args)) => args.json,
        #[cfg(feature = "local")]
        Do::Bench(bench::args::Do::Autoscale(args)) => args.json,
        #[cfg(feature = "local")]
        Do::Launch(args) => args.json,
        #[cfg(feature = "local")]
        Do::Devices(args) => args.json,
        Do::Workers(args) | Do::Status(args) => args.json,
        Do::Watch(args) => args.json,
        Do::Job(args) | Do::Cancel(args) => args.json,
        Do::Batch(args::BatchDo::Submit(args)) => args.json,
        Do::Batch(args::BatchDo::Fetch(args)) => args.json,
        Do::Batch(args::BatchDo::List(args)) => args.json,
        Do::Batch(args::BatchDo::Show(args) | args::BatchDo::Cancel(args) | args::BatchDo::Retry(args)) => args.json,
        Do::Dead(args::DeadDo::List(args)) => args.json,
        Do::Dead(args::DeadDo::Show(args) | args::DeadDo::Replay(args) | args::DeadDo::Drop(args)) => args.json,
        _ => false,
    }
}
