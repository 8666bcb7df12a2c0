//! The processes of a cluster: started here, ended here by their ids, whatever happens. If this process is killed, its parts notice that
//! their standard input ends.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use efferent_worker::sim::Curve;
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, Command},
};

use crate::{
    bench::{
        args::{self, PartRole, Processes},
        report::Shape,
        scrape::{self, Scrape},
    },
    exit::{Exit, Failure},
    settings::Settings,
};

/// How long a process may take until it is ready.
const START: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(50);
/// Most brains in a process.
const BRAINS: u32 = 32;
/// Clock ticks a second in which Linux counts processor time.
const TICKS: f64 = 100.0;

/// A cluster on this machine, with its files in a temporary folder.
pub(crate) struct Cluster {
    /// Ended in this order: workers before what they talk to.
    parts: Vec<Part>,
    nats: Option<Child>,
    nats_url: String,
    folder: TempDir,
    plan: Plan,
}

/// What is started.
struct Plan {
    nats_server: PathBuf,
    sync: String,
    program: PathBuf,
    coordinator: Vec<String>,
    workers: Vec<(PartRole, u32)>,
    costs: Vec<String>,
}

struct Part {
    role: PartRole,
    child: Child,
    lines: tokio::io::Lines<BufReader<tokio::process::ChildStdout>>,
    admin: String,
}

/// What processes used and measured up to a point in time.
pub(crate) struct Usage {
    /// Of each process.
    pub(crate) processes: Vec<ProcessUsage>,
}

/// What a process used and measured.
pub(crate) struct ProcessUsage {
    /// `nats-server`, `coordinator`, `brain`, `hand` or `load`.
    pub(crate) name: &'static str,
    pub(crate) at: Instant,
    pub(crate) cpu_seconds: f64,
    pub(crate) metrics: Scrape,
}

impl Cluster {
    /// Prepares a cluster. Nothing is started yet.
    ///
    /// # Errors
    /// If there is no nats-server, or no temporary folder.
    pub(crate) fn new(settings: &Settings, args: &args::Cluster) -> Result<Self, Failure> {
        let nats_server = find_nats_server(args.nats_server.as_deref())?;
        let failed = |error: std::io::Error| Failure::new(Exit::File, error);
        let folder = tempfile::Builder::new().prefix("efferent-bench-").tempdir().map_err(failed)?;
        // Everything else is as this command was told by file and environment.
        std::fs::write(folder.path().join("settings.toml"), settings.describe()).map_err(failed)?;
        let program = std::env::current_exe().map_err(failed)?;
        Ok(Self {
            parts: Vec::new(),
            nats: None,
            nats_url: String::new(),
            folder,
            plan: Plan::new(args, nats_server, program),
        })
    }

    /// Starts everything. Returns the coordinator's address.
    ///
    /// # Errors
    /// If a process does not get ready.
    pub(crate) async fn start(&mut self) -> Result<String, Failure> {
        self.nats_url = self.start_nats().await?;
        let coordinator = self.plan.coordinator.clone();
        self.spawn(PartRole::Coordinator, 1, &coordinator)?;
        let url = self.ready(0).await?;
        for (role, copies) in self.plan.workers.clone() {
            let costs = self.plan.costs.clone();
            self.spawn(role, copies, &costs)?;
        }
        for index in 1..self.parts.len() {
            self.ready(index).await?;
        }
        Ok(url)
    }

    /// Starts hands, or has them finish what they have and leave, until there are so many processes of them.
    ///
    /// # Errors
    /// If one does not get ready.
    pub(crate) async fn scale_hands(&mut self, wanted: u32) -> Result<(), Failure> {
        let there = self.parts.iter().filter(|part| matches!(part.role, PartRole::Hand)).count();
        let (first, costs) = (self.parts.len(), self.plan.costs.clone());
        for _ in there..wanted as usize {
            self.spawn(PartRole::Hand, 1, &costs)?;
        }
        for index in first..self.parts.len() {
            self.ready(index).await?;
        }
        for _ in wanted as usize..there {
            let Some(last) = self.parts.iter().rposition(|part| matches!(part.role, PartRole::Hand)) else { break };
            let mut child = self.parts.remove(last).child;
            drop(child.stdin.take());
            tokio::spawn(async move { child.wait().await });
        }
        Ok(())
    }

    async fn start_nats(&mut self) -> Result<String, Failure> {
        let folder = self.folder.path();
        let configuration = format!(
            "host: 127.0.0.1\nport: -1\nports_file_dir: {folder:?}\njetstream {{ store_dir: {:?}, sync_interval: {} }}\n",
            folder.join("nats"),
            self.plan.sync,
        );
        let file = folder.join("nats.conf");
        std::fs::write(&file, configuration).map_err(|error| Failure::new(Exit::File, error))?;
        let mut command = Command::new(&self.plan.nats_server);
        command.arg("-c").arg(&file).stdin(Stdio::null()).stdout(Stdio::null()).stderr(self.log()?);
        let child = self.nats.insert(launch(&mut command)?);
        let name = self.plan.nats_server.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let ports = folder.join(format!("{name}_{}.ports", child.id().unwrap_or_default()));
        let started = Instant::now();
        loop {
            let told = std::fs::read(&ports).ok().and_then(|text| serde_json::from_slice(&text).ok());
            let told = told.and_then(|ports: serde_json::Value| ports["nats"][0].as_str().map(str::to_owned));
            if let Some(url) = told {
                return Ok(url);
            }
            let ended = child.try_wait().ok().flatten();
            if ended.is_some() || started.elapsed() > START {
                return Err(self.breakdown("nats-server does not get ready"));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    fn log(&self) -> Result<Stdio, Failure> {
        let log = std::fs::File::options().append(true).create(true).open(self.folder.path().join("log"));
        log.map(Stdio::from).map_err(|error| Failure::new(Exit::File, error))
    }

    fn spawn(&mut self, role: PartRole, copies: u32, more: &[String]) -> Result<(), Failure> {
        let mut command = Command::new(&self.plan.program);
        command.arg("--config").arg(self.folder.path().join("settings.toml"));
        command.args(["bench", "part", role.role().name(), &copies.to_string()]);
        command
            .args(["--model", "sim", "--device", "cpu", "--admin", "127.0.0.1:0", "--nats", &self.nats_url])
            .args(more);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(self.log()?);
        let mut child = launch(&mut command)?;
        let Some(stdout) = child.stdout.take() else { return Err(self.breakdown("a process has no output")) };
        self.parts.push(Part { role, child, lines: BufReader::new(stdout).lines(), admin: String::new() });
        Ok(())
    }

    /// Waits until a part is ready. Returns the address of its gRPC port, if it has one.
    async fn ready(&mut self, index: usize) -> Result<String, Failure> {
        let part = &mut self.parts[index];
        let name = part.role.role().name();
        let reading = async {
            let mut url = String::new();
            // The admin port is told of last.
            while part.admin.is_empty() {
                let line = part.lines.next_line().await.ok().flatten()?;
                let words: Vec<&str> = line.split_whitespace().collect();
                match words.as_slice() {
                    ["ready", "grpc", address] => url = (*address).to_owned(),
                    ["ready", "admin", address, ..] => {
                        let address = address.trim_start_matches("http://").split('/').next();
                        part.admin = address.unwrap_or_default().to_owned();
                    }
                    _ => {}
                }
            }
            Some(url)
        };
        match tokio::time::timeout(START, reading).await {
            Ok(Some(url)) => Ok(url),
            _ => Err(self.breakdown(&format!("a {name} does not get ready"))),
        }
    }

    /// Lets it run, and notices if a process ends.
    ///
    /// # Errors
    /// If one does.
    pub(crate) async fn run_for(&mut self, time: Duration) -> Result<(), Failure> {
        tokio::select! {
            () = tokio::time::sleep(time) => Ok(()),
            failure = self.broken() => Err(failure),
        }
    }

    /// Waits until a process ends though none was told to.
    pub(crate) async fn broken(&mut self) -> Failure {
        loop {
            tokio::time::sleep(Duration::from_millis(500)).await;
            let parts = self.parts.iter_mut().map(|part| (part.role.role().name(), &mut part.child));
            let mut all = parts.chain(self.nats.iter_mut().map(|nats| ("nats-server", nats)));
            let ended = all.find_map(|(name, child)| child.try_wait().ok().flatten().map(|status| (name, status)));
            if let Some((name, status)) = ended {
                return self.breakdown(&format!("a {name} has ended ({status})"));
            }
        }
    }

    /// A failure with the last words of the log.
    fn breakdown(&self, what: &str) -> Failure {
        let log = std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
        let last: Vec<&str> = log.lines().rev().filter(|line| !line.trim().is_empty()).take(3).collect();
        let last: Vec<&str> = last.into_iter().rev().collect();
        Failure::words(Exit::Failed, format!("{what}; last in its log: {}", last.join(" | ")))
    }

    /// What every process used and measured so far.
    ///
    /// # Errors
    /// If one does not answer.
    pub(crate) async fn usage(&self) -> Result<Usage, Failure> {
        let mut processes = vec![ProcessUsage::of("load", Some(std::process::id()), Scrape::default())];
        processes.push(ProcessUsage::of("nats-server", self.nats.as_ref().and_then(Child::id), Scrape::default()));
        for part in &self.parts {
            let name = part.role.role().name();
            let metrics = scrape::fetch(&part.admin).await.map_err(|error| {
                let error = anyhow::Error::new(error).context(format!("a {name} does not tell its metrics"));
                Failure::new(Exit::Failed, error)
            })?;
            processes.push(ProcessUsage::of(name, part.child.id(), metrics));
        }
        Ok(Usage { processes })
    }

    /// Ends every process and waits for its end; the folder goes with the cluster.
    pub(crate) async fn stop(mut self) {
        for part in &mut self.parts {
            let _ = part.child.start_kill();
        }
        for part in &mut self.parts {
            let _ = part.child.wait().await;
        }
        if let Some(nats) = &mut self.nats {
            let _ = nats.kill().await;
        }
    }
}

impl ProcessUsage {
    fn of(name: &'static str, id: Option<u32>, metrics: Scrape) -> Self {
        let cpu_seconds = id.and_then(cpu_seconds).unwrap_or_default();
        Self { name, at: Instant::now(), cpu_seconds, metrics }
    }
}

impl Plan {
    fn new(args: &args::Cluster, nats_server: PathBuf, program: PathBuf) -> Self {
        let shape = Shape::of(args);
        let queue = shape.in_flight.max(4096).to_string();
        let flags = |pairs: &[(&str, String)]| -> Vec<String> {
            pairs.iter().flat_map(|(flag, value)| [format!("--{flag}"), value.clone()]).collect()
        };
        let time = |time: Duration| humantime::format_duration(time).to_string();
        let step: Curve = args.hand_time.split(args.steps);
        let coordinator = flags(&[
            ("listen", "127.0.0.1:0".to_owned()),
            ("max-streams", (shape.in_flight * 4).max(65_536).to_string()),
            ("brain-queue", queue.clone()),
        ]);
        let costs = flags(&[
            ("brain-queue", queue),
            ("sim-embed", time(args.brain_time)),
            ("sim-token", time(Duration::ZERO)),
            ("sim-step", step.to_string()),
            ("sim-image", time(Duration::ZERO)),
            ("sim-batch", shape.batch.to_string()),
            ("max-prompts", "1".to_owned()),
        ]);
        let hand_processes = match args.processes {
            Processes::Hands => args.hands,
            Processes::Count(count) => count.min(args.hands),
        };
        let brains = spread(args.brains, args.brains.div_ceil(BRAINS)).map(|copies| (PartRole::Brain, copies));
        let hands = spread(args.hands, hand_processes).map(|copies| (PartRole::Hand, copies));
        Self {
            nats_server,
            sync: args.sync.0.clone(),
            program,
            coordinator,
            workers: brains.chain(hands).collect(),
            costs,
        }
    }
}

/// So many workers over so many processes, as evenly as can be.
fn spread(workers: u32, processes: u32) -> impl Iterator<Item = u32> {
    (0..processes).map(move |index| workers / processes + u32::from(index < workers % processes))
}

fn launch(command: &mut Command) -> Result<Child, Failure> {
    let program = command.as_std().get_program().to_owned();
    command.kill_on_drop(true).spawn().map_err(|error| {
        let error = anyhow::Error::new(error).context(format!("cannot start {}", Path::new(&program).display()));
        Failure::new(Exit::Failed, error)
    })
}

fn find_nats_server(named: Option<&Path>) -> Result<PathBuf, Failure> {
    let missing = |what: String| {
        let message = format!("{what}: `make tools` puts one into target/tools; --nats-server FILE names it");
        Failure::words(Exit::Config, message)
    };
    if let Some(path) = named {
        return match path.is_file() {
            true => std::path::absolute(path).map_err(|error| Failure::new(Exit::Config, error)),
            false => Err(missing(format!("there is no {}", path.display()))),
        };
    }
    let folders = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&folders).map(|folder| folder.join("nats-server")).find(|path| path.is_file());
    found.ok_or_else(|| missing("there is no nats-server on PATH".to_owned()))
}

/// Processor time that a process has used, where the system tells it as Linux does.
fn cpu_seconds(id: u32) -> Option<f64> {
    let text = std::fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    // The name in parentheses may hold spaces; user and system time are the 12th and 13th after it.
    let (_, rest) = text.rsplit_once(')')?;
    let ticks = rest.split_whitespace().skip(11).take(2).map(str::parse::<f64>);
    Some(ticks.sum::<Result<f64, _>>().ok()? / TICKS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_are_spread_evenly() {
        assert_eq!(spread(10, 4).collect::<Vec<_>>(), [3, 3, 2, 2]);
        assert_eq!(spread(3, 3).collect::<Vec<_>>(), [1, 1, 1]);
    }

    #[test]
    fn a_missing_server_is_told_how_to_get() {
        let Err(Failure::Told { exit, error }) = find_nats_server(Some(Path::new("/nowhere"))) else {
            panic!("is missing")
        };
        assert_eq!(exit, Exit::Config);
        assert!(error.to_string().contains("/nowhere") && error.to_string().contains("make tools"), "{error}");
    }

    #[test]
    fn processor_time_is_read() {
        assert!(cpu_seconds(std::process::id()).is_some_and(|seconds| seconds < 1e6) || !cfg!(target_os = "linux"));
    }
}
