//! nats-server and `efferent` as processes of their own, killed at the end by their id.

use std::{
    collections::HashMap,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, MutexGuard, mpsc},
    time::Duration,
};

use efferent_bus::{
    SharedBus,
    contract::free_port,
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

/// A process that is killed when it goes out of scope.
#[derive(Debug)]
pub struct Process {
    child: Child,
    admin: Option<String>,
}

impl Process {
    fn new(child: Child) -> Self {
        Self { child, admin: None }
    }

    /// Its id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Ends it at once, as `kill -9` does.
    pub fn kill(mut self) {
        self.child.kill().expect("SIGKILL");
        self.child.wait().expect("it ends");
    }

    /// Sends it a signal: `TERM`, `STOP`, `CONT`.
    pub fn signal(&self, name: &str) {
        let told = Command::new("kill").arg(format!("-{name}")).arg(self.pid().to_string()).status().expect("kill");
        assert!(told.success());
    }

    /// Asks it to stop, as Kubernetes does, and waits for its end. Returns whether it reported success.
    pub fn terminate(self) -> bool {
        self.signal("TERM");
        self.code() == Some(0)
    }

    /// Waits until it ends by itself. Returns its exit code.
    pub fn code(mut self) -> Option<i32> {
        let started = std::time::Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("its state") {
                return status.code();
            }
            assert!(started.elapsed() < PATIENCE, "it does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The sum of a counter of its, over all labels, as its admin port tells.
    pub fn counter(&self, name: &str) -> u64 {
        let metrics = self.metrics().unwrap_or_default();
        let values = metrics.lines().filter(|line| line.starts_with(name)).filter_map(|line| line.rsplit(' ').next());
        values.filter_map(|value| value.parse::<f64>().ok()).sum::<f64>() as u64
    }

    /// The mean of a histogram of its, over all labels; none if nothing was told.
    pub fn mean(&self, name: &str) -> Option<f64> {
        let metrics = self.metrics().unwrap_or_default();
        let sum = |suffix: &str| -> f64 {
            let name = format!("{name}_{suffix}");
            let values =
                metrics.lines().filter(|line| line.starts_with(&name)).filter_map(|line| line.rsplit(' ').next());
            values.filter_map(|value| value.parse::<f64>().ok()).sum()
        };
        let count = sum("count");
        (count > 0.0).then(|| sum("sum") / count)
    }

    fn metrics(&self) -> std::io::Result<String> {
        let address = self.admin.as_ref().ok_or(std::io::ErrorKind::NotFound)?;
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        write!(stream, "GET /metrics HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One nats-server or three that form a cluster, with their stores in a temporary folder, and `efferent` processes on them.
#[derive(Debug)]
pub struct Cluster {
    folder: TempDir,
    host: String,
    /// A port for clients and one for each other.
    ports: Vec<(u16, u16)>,
    servers: Mutex<HashMap<usize, Process>>,
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
        Self::with_servers(settings, sync, 1, "127.0.0.1")
    }

    /// Starts three servers that keep three copies of everything. A copy on another server is what an acknowledgement stands for, so the
    /// files are synced now and then only.
    pub fn of_three(settings: &[(&str, &str)]) -> Self {
        let replicas = [("EFFERENT_NATS__REPLICAS", "3")];
        Self::with_servers(&[settings, &replicas].concat(), "2m", 3, "127.0.0.1")
    }

    /// Starts so many servers that listen at this address.
    pub fn with_servers(settings: &[(&str, &str)], sync: &'static str, count: usize, host: &str) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let settings = settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let ports = (0..count).map(|_| (free_port(), free_port())).collect();
        let cluster = Self { folder, host: host.to_owned(), ports, servers: Mutex::default(), settings, sync };
        (0..count).for_each(|index| cluster.start_server(index));
        cluster
    }

    /// Starts a nats-server (again).
    pub fn start_server(&self, index: usize) {
        let tool = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tools/nats-server");
        let program = if tool.exists() { tool } else { PathBuf::from("nats-server") };
        let (port, own) = self.ports[index];
        let store = self.folder.path().join(format!("nats-{index}"));
        let mut configuration = format!(
            "server_name: n{index}\nlisten: {}:{port}\njetstream {{ store_dir: {store:?}, sync_interval: {} }}\n",
            self.host, self.sync
        );
        if self.ports.len() > 1 {
            let routes: Vec<_> = self.ports.iter().map(|(_, port)| format!("nats://{}:{port}", self.host)).collect();
            let routes = routes.join(", ");
            configuration += &format!("cluster {{ name: test, listen: {}:{own}, routes: [{routes}] }}\n", self.host);
        }
        let file = self.folder.path().join(format!("nats-{index}.conf"));
        std::fs::write(&file, configuration).expect("writes");
        let child = Command::new(&program).arg("-c").arg(&file).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let child = child
            .unwrap_or_else(|error| panic!("cannot start {}: {error} (`make tools` fetches it)", program.display()));
        self.servers().insert(index, Process::new(child));
    }

    fn servers(&self) -> MutexGuard<'_, HashMap<usize, Process>> {
        self.servers.lock().expect("is not poisoned")
    }

    /// `kill -9` of a nats-server.
    pub fn kill_server(&self, index: usize) {
        self.servers().remove(&index).expect("the server runs").kill();
    }

    /// Sends a nats-server a signal.
    pub fn signal_server(&self, index: usize, signal: &str) {
        self.servers()[&index].signal(signal);
    }

    /// Where the servers listen.
    pub fn nats_url(&self) -> String {
        let urls: Vec<_> = self.ports.iter().map(|(port, _)| format!("nats://{}:{port}", self.host)).collect();
        urls.join(",")
    }

    /// The cluster's bus, to look at what it holds.
    pub async fn bus(&self) -> SharedBus {
        let options = nats::Options { url: self.nats_url(), ..Default::default() };
        Arc::new(Nats::connect(options).await.expect("the server runs"))
    }

    /// Starts `efferent ROLE ARGS` on the cluster's queue and waits until it is ready. Returns its standard output so far too.
    pub fn role(&self, role: &str, args: &[&str]) -> (Process, Vec<String>) {
        self.role_through(&[], role, args)
    }

    /// Likewise.
    ///
    /// # Errors
    /// If it ends before it is ready: the server went away just then, and whoever looks after processes starts it again.
    pub fn try_role(&self, role: &str, args: &[&str]) -> Result<(Process, Vec<String>), String> {
        self.run(&[], role, &[&["--nats", &self.nats_url()], args].concat())
    }

    /// Starts it through a command that runs another: in a network namespace, say.
    pub fn role_through(&self, through: &[&str], role: &str, args: &[&str]) -> (Process, Vec<String>) {
        let started = self.run(through, role, &[&["--nats", &self.nats_url()], args].concat());
        started.unwrap_or_else(|why| panic!("{why}\n{}", self.log()))
    }

    /// Starts `efferent launch ARGS` on the cluster's queue. Its workers need not be ready yet.
    pub fn launch(&self, args: &[&str]) -> Process {
        let url = self.nats_url();
        let started = self.run(&[], "launch", &[&["--nats", &url], args].concat());
        started.unwrap_or_else(|why| panic!("{why}\n{}", self.log())).0
    }

    /// Starts `efferent up` on a queue of its own in a folder. Returns its URL too.
    pub fn up(&self) -> (Process, String) {
        self.up_in(&self.folder.path().join("home"))
    }

    /// Starts `efferent up` on a queue of its own in this folder. Returns its URL too.
    pub fn up_in(&self, home: &Path) -> (Process, String) {
        self.up_through(&[], home)
    }

    /// Likewise, through a command that runs another.
    pub fn up_through(&self, through: &[&str], home: &Path) -> (Process, String) {
        let home = home.to_str().expect("UTF-8");
        let started = self.run(through, "up", &["--listen", "127.0.0.1:0", "--home", home]);
        let (process, lines) = started.unwrap_or_else(|why| panic!("{why}\n{}", self.log()));
        (process, url(&lines))
    }

    fn run(&self, through: &[&str], role: &str, args: &[&str]) -> Result<(Process, Vec<String>), String> {
        let program = efferent();
        let program = program.to_str().expect("UTF-8");
        let words = [through, &[program, role, "--admin", "127.0.0.1:0"], args].concat();
        let mut command = Command::new(words[0]);
        command.args(&words[1..]);
        // They are the tests' affair.
        command.env_remove("EFFERENT_FAULTS").env_remove("EFFERENT_FAULT_SEED");
        command.envs(self.settings.iter().map(|(name, value)| (name, value)));
        let log = std::fs::File::options().append(true).create(true).open(self.folder.path().join("log"));
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log.expect("a log")).spawn();
        let mut child = child.expect("starts");
        let output = BufReader::new(child.stdout.take().expect("is piped"));
        let mut process = Process::new(child);
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
        while !seen.last().is_some_and(|line: &String| line.contains("admin")) {
            let line = lines.recv_timeout(PATIENCE);
            seen.push(line.map_err(|_| format!("{role} is not ready: {seen:?}"))?);
        }
        let admin = seen.last().and_then(|line| line.split("http://").nth(1)).and_then(|rest| rest.split('/').next());
        process.admin = admin.map(str::to_owned);
        Ok((process, seen))
    }

    /// Starts a coordinator. Returns its URL too.
    pub fn coordinator(&self) -> (Process, String) {
        self.coordinator_through(&[])
    }

    /// Likewise, through a command that runs another.
    pub fn coordinator_through(&self, through: &[&str]) -> (Process, String) {
        let (process, lines) = self.role_through(through, "coordinator", &["--listen", "127.0.0.1:0"]);
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
