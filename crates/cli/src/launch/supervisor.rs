//! A process that is started again when it ends.

use std::{
    io,
    path::PathBuf,
    process::{ExitStatus, Stdio},
    time::Duration,
};

use efferent_service::{Shutdown, telemetry::Format};
use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    process::{Child, ChildStdin, Command},
    task::JoinSet,
    time::{Instant, sleep, timeout},
};

use crate::{
    exit::{Exit, Failure},
    launch::{label, placement::Worker},
    output,
    settings::Settings,
};

/// The pause before a worker is started again; it doubles with each time, up to the second.
const PAUSES: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));
/// A worker that ran for so long is started again as if for the first time.
const HEALTHY: Duration = Duration::from_secs(60);
/// How long to wait for a worker's last words. Someone else may still hold its output.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// What a launcher is told.
#[derive(Debug, Clone)]
pub(crate) struct Orders {
    /// Have workers finish what they have in hand.
    pub(crate) stop: Shutdown,
    /// End them at once.
    pub(crate) kill: Shutdown,
}

/// How it ended with a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    /// It was told to stop, and did; or it was about to be started again.
    Stopped,
    /// It was told to stop, and did not in time.
    Killed,
    /// To start it again is in vain: this is what it ended with.
    GivenUp(Exit),
}

impl Ending {
    /// What it ended with, if it was given up.
    pub(crate) fn given_up(&self) -> Option<Exit> {
        match self {
            Self::GivenUp(exit) => Some(*exit),
            Self::Stopped | Self::Killed => None,
        }
    }
}

/// Looks after one worker.
#[derive(Debug)]
pub(crate) struct Supervisor {
    name: String,
    program: PathBuf,
    args: Vec<String>,
    environment: Vec<(String, String)>,
    format: Format,
    grace: Duration,
    orders: Orders,
}

/// A worker that runs.
#[derive(Debug)]
struct Running {
    child: Child,
    /// The other end of its input. However this process ends, it is closed, and the worker stops.
    _leash: Option<ChildStdin>,
    words: JoinSet<()>,
}

impl Supervisor {
    /// For a worker with the launcher's settings, that may take `grace` to stop.
    ///
    /// # Errors
    /// If this program does not know where it lies.
    pub(crate) fn new(worker: &Worker, settings: &Settings, grace: Duration, orders: Orders) -> Result<Self, Failure> {
        let program = std::env::current_exe().map_err(|error| Failure::new(Exit::Failed, error))?;
        let args = [worker.role, "--device", &worker.device, "--admin", &worker.admin, "--stop-with-input"];
        let placed = worker.environment.iter().map(|(name, value)| (name.clone(), value.clone()));
        Ok(Self {
            name: worker.name.clone(),
            program,
            args: args.map(str::to_owned).to_vec(),
            environment: settings.flags.iter().cloned().chain(placed).collect(),
            format: settings.local.log.format,
            grace,
            orders,
        })
    }

    /// Keeps the worker running until it is told to stop, or it is in vain.
    pub(crate) async fn run(self) -> Ending {
        let worker = self.name.as_str();
        let mut pause = PAUSES.0;
        loop {
            let started = Instant::now();
            let ended = match self.start() {
                Ok(mut running) => {
                    tracing::info!(worker, pid = running.child.id(), "worker is started");
                    let ended = tokio::select! {
                        ended = running.child.wait() => ended,
                        () = self.orders.stop.requested() => return self.stop(running).await,
                    };
                    running.last_words().await;
                    ended
                }
                Err(error) => Err(error),
            };
            if let Some(exit) = ended.as_ref().ok().and_then(in_vain) {
                let code = exit as u8;
                tracing::error!(worker, code, "worker says that its configuration is wrong; it is not started again");
                return Ending::GivenUp(exit);
            }
            if started.elapsed() >= HEALTHY {
                pause = PAUSES.0;
            }
            let how = ended.map_or_else(|error| error.to_string(), |status| status.to_string());
            tracing::warn!(worker, how, pause = %humantime::format_duration(pause), "worker has ended; it is started again");
            tokio::select! {
                () = sleep(pause) => {}
                () = self.orders.stop.requested() => return Ending::Stopped,
            }
            pause = PAUSES.1.min(pause * 2);
        }
    }

    fn start(&self) -> io::Result<Running> {
        let mut command = Command::new(&self.program);
        command.args(&self.args).envs(self.environment.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // Ctrl-C reaches the launcher alone, which knows what to do about it.
        command.process_group(0).kill_on_drop(true);
        let mut child = command.spawn()?;
        // Taken out, because to wait for a child closes its input.
        let leash = child.stdin.take();
        let mut words = JoinSet::new();
        if let Some(stdout) = child.stdout.take() {
            let name = self.name.clone();
            words.spawn(async move {
                // Nobody may read ours; the worker goes on all the same.
                label::relay(stdout, &name, Format::Text, |line| drop(output::line(line))).await;
            });
        }
        if let Some(stderr) = child.stderr.take() {
            let (name, format) = (self.name.clone(), self.format);
            words.spawn(async move { label::relay(stderr, &name, format, output::note).await });
        }
        Ok(Running { child, _leash: leash, words })
    }

    /// Has a worker finish what it has in hand, as long as it may take.
    async fn stop(&self, mut running: Running) -> Ending {
        let worker = self.name.as_str();
        let pid = running.child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        if let Some(pid) = pid
            && let Err(error) = kill_process(pid, Signal::TERM)
        {
            tracing::warn!(worker, %error, "worker cannot be told to stop");
        }
        let ended = tokio::select! {
            ended = running.child.wait() => Some(ended),
            () = sleep(self.grace) => None,
            () = self.orders.kill.requested() => None,
        };
        let ending = match ended {
            Some(Ok(status)) => {
                tracing::info!(worker, how = %status, "worker has stopped");
                Ending::Stopped
            }
            Some(Err(_)) | None => {
                tracing::warn!(worker, "worker does not stop; it is killed");
                if let Err(error) = running.child.kill().await {
                    tracing::error!(worker, %error, "worker cannot be killed");
                }
                Ending::Killed
            }
        };
        running.last_words().await;
        ending
    }
}

impl Running {
    async fn last_words(mut self) {
        let words = async { while self.words.join_next().await.is_some() {} };
        let _ = timeout(LAST_WORDS, words).await;
    }
}

/// The exit code of a worker that says the same each time, whatever else changes.
fn in_vain(status: &ExitStatus) -> Option<Exit> {
    let is = |exit: &Exit| status.code() == Some(*exit as i32);
    [Exit::Usage, Exit::Config].into_iter().find(is)
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;

    use super::*;

    fn supervisor(script: &str, grace: Duration) -> Supervisor {
        Supervisor {
            name: "hand-0".to_owned(),
            program: "/bin/sh".into(),
            args: vec!["-c".to_owned(), script.to_owned()],
            environment: Vec::new(),
            format: Format::Text,
            grace,
            orders: Orders { stop: Shutdown::new(), kill: Shutdown::new() },
        }
    }

    /// What happens if workers are told to stop as soon as this one has made a file.
    async fn stopped(script: &str, grace: Duration, kill: bool) -> Ending {
        let folder = tempfile::tempdir().unwrap();
        let mark = folder.path().join("mark");
        let supervisor =
            supervisor(&format!("{script}; touch {}; while :; do sleep 0.05; done", mark.display()), grace);
        let orders = supervisor.orders.clone();
        let run = tokio::spawn(supervisor.run());
        while !mark.exists() {
            sleep(Duration::from_millis(5)).await;
        }
        orders.stop.trigger();
        if kill {
            orders.kill.trigger();
        }
        timeout(Duration::from_secs(20), run).await.unwrap().unwrap()
    }

    #[tokio::test]
    async fn a_wrong_configuration_is_not_tried_again() {
        assert_eq!(supervisor("exit 64", HEALTHY).run().await, Ending::GivenUp(Exit::Config));
        assert_eq!(supervisor("exit 2", HEALTHY).run().await, Ending::GivenUp(Exit::Usage));
        for status in [1, 4, 70, 69] {
            assert_eq!(in_vain(&ExitStatus::from_raw(status << 8)), None);
        }
        assert_eq!(in_vain(&ExitStatus::from_raw(9)), None, "kill -9");
    }

    #[tokio::test]
    async fn whoever_ends_is_started_again_after_a_pause() {
        let folder = tempfile::tempdir().unwrap();
        let mark = folder.path().join("mark");
        let started = Instant::now();
        let again = format!("test -e {mark} && exit 64; touch {mark}; kill -9 $$", mark = mark.display());
        assert_eq!(supervisor(&again, HEALTHY).run().await, Ending::GivenUp(Exit::Config));
        assert!(started.elapsed() >= PAUSES.0);
    }

    #[tokio::test]
    async fn a_stop_is_asked_for_and_then_enforced() {
        assert_eq!(stopped("trap 'exit 0' TERM", HEALTHY, false).await, Ending::Stopped);
        assert_eq!(stopped("trap '' TERM", Duration::from_millis(200), false).await, Ending::Killed);
        assert_eq!(stopped("trap '' TERM", HEALTHY, true).await, Ending::Killed);
    }
}
