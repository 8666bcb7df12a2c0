//! nats-server and `efferent` as processes of their own, killed at the end by their id.

use std::{
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, mpsc},
    time::Duration,
};

use efferent_bus::{
    SharedBus,
    nats::{self, Nats},
};
use tempfile::TempDir;

use crate::calls::{Client, PATIENCE};

/// The `efferent` binary that was built with these tests.
pub fn efferent() -> PathBuf {
    let tests = std::env::current_exe().expect("a path");
    let binary = tests.ancestors().nth(2).expect("target/release/deps/test").join("efferent");
    assert!(binary.is_file(), "{} is missing: `cargo build --release` makes it", binary.display());
    binary
}

/// A free port of the loopback interface.
pub fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port").port()
}

/// A process that is killed when it goes out of scope.
#[derive(Debug)]
pub struct Process(Child);

impl Process {
    /// Ends it at once, as `kill -9` does.
    pub fn kill(mut self) {
        self.0.kill().expect("SIGKILL");
        self.0.wait().expect("it ends");
    }

    /// Asks it to stop, as Kubernetes does, and waits for its end. Returns whether it reported success.
    pub fn terminate(mut self) -> bool {
        let told = Command::new("kill").arg("-TERM").arg(self.0.id().to_string()).status().expect("kill");
        assert!(told.success());
        let started = std::time::Instant::now();
        loop {
            if let Some(status) = self.0.try_wait().expect("its state") {
                return status.success();
            }
            assert!(started.elapsed() < PATIENCE, "it does not stop");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A nats-server with its store in a temporary folder, and `efferent` processes on it.
#[derive(Debug)]
pub struct Cluster {
    folder: TempDir,
    port: u16,
    server: Option<Process>,
    settings: Vec<(String, String)>,
    sync: &'static str,
}

impl Cluster {
    /// Starts nats-server so that what it acknowledges is on the disk. `settings` are environment variables of every process.
    pub fn start(settings: &[(&str, &str)]) -> Self {
        Self::with_sync(settings, "always")
    }

    /// Starts nats-server that syncs its files this often: `always`, or a time such as `2m`, which is its default.
    pub fn with_sync(settings: &[(&str, &str)], sync: &'static str) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let settings = settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let mut cluster = Self { folder, port: free_port(), server: None, settings, sync };
        cluster.start_server();
        cluster
    }

    /// Starts nats-server (again).
    pub fn start_server(&mut self) {
        let tool = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tools/nats-server");
        let program = if tool.exists() { tool } else { PathBuf::from("nats-server") };
        let configuration = format!(
            "listen: 127.0.0.1:{}\njetstream {{ store_dir: {:?}, sync_interval: {} }}\n",
            self.port,
            self.folder.path().join("nats"),
            self.sync
        );
        let file = self.folder.path().join("nats.conf");
        std::fs::write(&file, configuration).expect("writes");
        let child = Command::new(&program).arg("-c").arg(&file).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        self.server =
            Some(Process(child.unwrap_or_else(|error| {
                panic!("cannot start {}: {error} (`make tools` fetches it)", program.display())
            })));
    }

    /// `kill -9` of nats-server.
    pub fn kill_server(&mut self) {
        self.server.take().expect("the server runs").kill();
    }

    /// Where nats-server listens.
    pub fn nats_url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    /// The cluster's bus, to look at what it holds.
    pub async fn bus(&self) -> SharedBus {
        let options = nats::Options { url: self.nats_url(), ..Default::default() };
        Arc::new(Nats::connect(options).await.expect("the server runs"))
    }

    /// Starts `efferent ROLE ARGS` on the cluster's queue and waits until it is ready. Returns its standard output so far too.
    pub fn role(&self, role: &str, args: &[&str]) -> (Process, Vec<String>) {
        self.command(role, &[&["--nats", &self.nats_url()], args].concat())
    }

    /// Starts `efferent up` on a queue of its own in a folder. Returns its URL too.
    pub fn up(&self) -> (Process, String) {
        let home = self.folder.path().join("home");
        let home = home.to_str().expect("UTF-8");
        let (process, lines) = self.command("up", &["--listen", "127.0.0.1:0", "--home", home]);
        (process, url(&lines))
    }

    fn command(&self, role: &str, args: &[&str]) -> (Process, Vec<String>) {
        let mut command = Command::new(efferent());
        command.arg(role).args(["--admin", "off"]).args(args);
        command.envs(self.settings.iter().map(|(name, value)| (name, value)));
        let log = std::fs::File::options().append(true).create(true).open(self.folder.path().join("log"));
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log.expect("a log")).spawn();
        let mut child = child.expect("starts");
        let output = BufReader::new(child.stdout.take().expect("is piped"));
        let process = Process(child);
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        // The last line of those that say what is ready.
        let mut seen = Vec::new();
        while !seen.last().is_some_and(|line: &String| line.contains("queue")) {
            let line = lines.recv_timeout(PATIENCE);
            seen.push(line.unwrap_or_else(|_| panic!("{role} is not ready: {seen:?}\n{}", self.log())));
        }
        (process, seen)
    }

    /// Starts a coordinator. Returns its URL too.
    pub fn coordinator(&self) -> (Process, String) {
        let (process, lines) = self.role("coordinator", &["--listen", "127.0.0.1:0"]);
        (process, url(&lines))
    }

    /// What the processes logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }
}

fn url(lines: &[String]) -> String {
    let url = lines.iter().find_map(|line| line.split_whitespace().find(|word| word.starts_with("http://")));
    url.expect("it says where it listens").to_owned()
}

/// A client of a coordinator at `url`.
pub async fn connect(url: &str) -> Client {
    Client::connect(url.to_owned()).await.expect("it listens")
}
