//! The `efferent` command as a process of its own, as people and scripts run it, beside a server with simulated engines.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use bytes::Bytes;
use efferent_bus::{Bucket, contract::free_port};
use efferent_hand::families::sim;
use efferent_proto::{
    ApiError,
    v1::{ErrorCode, Signal},
};
use efferent_tests::{
    calls::PATIENCE,
    local::{Cluster, Coordinator, Service},
    processes::efferent,
};
use efferent_worker::{
    engine::{EngineError, EngineSpec, Hand, RenderRequest, Sample},
    thread::Factory,
};
use image::RgbImage;
use serde_json::Value;
use tempfile::TempDir;

/// The seed that a moody hand fails at.
const UNLUCKY: u64 = 13;

/// A simulated hand that fails at a seed until it is well.
struct Moody {
    inner: Box<dyn Hand>,
    is_well: Arc<AtomicBool>,
}

impl Hand for Moody {
    fn spec(&self) -> &EngineSpec {
        self.inner.spec()
    }

    fn begin(&mut self, request: &RenderRequest) -> Result<Sample, EngineError> {
        if request.seed == UNLUCKY && !self.is_well.load(Ordering::Relaxed) {
            // Not one that is tried again.
            return Err(ApiError::new(ErrorCode::Engine, "not today").into());
        }
        self.inner.begin(request)
    }

    fn step(&mut self, batch: &mut [&mut Sample]) -> Vec<Result<(), EngineError>> {
        self.inner.step(batch)
    }

    fn preview(&mut self, sample: &Sample) -> Result<RgbImage, EngineError> {
        self.inner.preview(sample)
    }

    fn finish(&mut self, sample: Sample) -> Result<RgbImage, EngineError> {
        self.inner.finish(sample)
    }

    fn checkpoint(&self, sample: &Sample) -> Result<Bytes, EngineError> {
        self.inner.checkpoint(sample)
    }

    fn resume(&mut self, request: &RenderRequest, from: &[u8]) -> Result<Sample, EngineError> {
        self.inner.resume(request, from)
    }
}

/// A hand whose steps take this long.
fn paced(per_step: Duration) -> Factory<dyn Hand> {
    sim::factory(sim::Cost { per_step: per_step.into(), max_batch: 4, ..Default::default() })
}

fn moody(is_well: &Arc<AtomicBool>) -> Factory<dyn Hand> {
    let (mut inner, is_well) = (paced(Duration::ZERO), is_well.clone());
    Box::new(move || Ok(Box::new(Moody { inner: inner()?, is_well: is_well.clone() })))
}

/// How the command ended, and what it wrote.
#[derive(Debug)]
struct Told {
    code: Option<i32>,
    out: String,
    err: String,
}

impl Told {
    fn of(output: Output) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        Self { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
    }

    /// Every line, as JSON.
    fn objects(&self) -> Vec<Value> {
        objects(&self.out)
    }
}

fn objects(lines: &str) -> Vec<Value> {
    lines.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}"))).collect()
}

/// A folder to run the command in, where nothing is set but what a test sets, and a server.
struct Desk {
    folder: TempDir,
    cluster: Cluster,
    coordinator: Coordinator,
    _workers: (Service, Service),
}

impl Desk {
    async fn new(hand: Factory<dyn Hand>) -> Self {
        let cluster = Cluster::new().await;
        let coordinator = cluster.coordinator().await;
        let workers = (cluster.quick_brain().await, cluster.hand(hand).await);
        Self { folder: tempfile::tempdir().unwrap(), cluster, coordinator, _workers: workers }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn picture(&self, name: &str) -> RgbImage {
        image::open(self.path(name)).unwrap().to_rgb8()
    }

    /// The command, not told of the server.
    fn command(&self, words: &[&str]) -> Command {
        bare(self.folder.path(), words)
    }

    fn run(&self, words: &[&str]) -> Told {
        Told::of(self.command(words).output().unwrap())
    }

    /// Asks the server.
    fn ask(&self, words: &[&str]) -> Told {
        self.run(&[words, &["--server", &self.coordinator.url]].concat())
    }

    /// What the server's answer to a question that goes well is.
    fn get(&self, words: &[&str]) -> String {
        let told = self.ask(words);
        assert_eq!(told.code, Some(0), "{words:?}: {told:?}");
        told.out.trim().to_owned()
    }

    fn json(&self, words: &[&str]) -> Value {
        serde_json::from_str(&self.get(&[words, &["--json"]].concat())).unwrap()
    }

    /// Asks the server, in the background.
    fn start(&self, words: &[&str]) -> Child {
        let mut command = self.command(words);
        command.args(["--server", &self.coordinator.url]).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().unwrap()
    }

    /// What `results.jsonl` says of each item, its last line, and how many lines it has.
    fn results(&self) -> (BTreeMap<u64, Value>, usize) {
        let lines = objects(&std::fs::read_to_string(self.path("results/results.jsonl")).unwrap());
        let count = lines.len();
        (lines.into_iter().map(|line| (line["index"].as_u64().unwrap(), line)).collect(), count)
    }
}

fn bare(folder: &Path, words: &[&str]) -> Command {
    let mut command = Command::new(efferent());
    command.args(words).current_dir(folder).stdin(Stdio::null());
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("EFFERENT_")) {
        command.env_remove(name);
    }
    command.env("HOME", folder).env("XDG_CONFIG_HOME", folder.join("settings"));
    command
}

/// Presses Ctrl-C.
fn interrupt(child: &Child) {
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
}

/// What events are, in order.
fn kinds(events: &[Value]) -> Vec<&str> {
    events.iter().map(|event| event["event"].as_str().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn pictures_go_to_files_and_events_to_scripts() {
    let desk = Desk::new(paced(Duration::ZERO)).await;
    assert_eq!(desk.get(&["generate", "a cat", "--seed", "7", "-o", "cat.png"]), "cat.png");
    let cat = desk.picture("cat.png");
    assert_eq!(cat.dimensions(), (64, 64));
    assert_eq!(desk.get(&["generate", "A red apple!", "--seed", "7"]), "a-red-apple-7.png");
    let two = desk.get(&["generate", "a cat", "-n", "2", "--seed", "7", "-o", "two.webp", "--tenant", "studio"]);
    let mut two: Vec<_> = two.lines().collect();
    two.sort_unstable();
    assert_eq!(two, ["two-1.webp", "two-2.webp"]);
    assert!(desk.picture("two-1.webp") == cat && desk.picture("two-2.webp") != cat, "the seeds count up");

    let told = desk.ask(&["generate", "a cat", "--seed", "7", "-o", "again.png", "--json"]);
    let events = told.objects();
    let kinds = kinds(&events);
    assert_eq!((told.code, kinds[0], kinds[kinds.len() - 1]), (Some(0), "accepted", "done"), "{told:?}");
    let image = events.iter().find(|event| event["event"] == "image").unwrap();
    assert!(image["path"] == "again.png" && image["seed"] == 7, "{image}");
    assert!(events.iter().all(|event| event["job_id"] == events[0]["job_id"]), "{told:?}");
    assert!(desk.picture("again.png") == cat);
    // A picture on stdout, and nothing else.
    let output = desk.command(&["generate", "a cat", "-o", "-", "--server", &desk.coordinator.url]).output().unwrap();
    assert_eq!(image::load_from_memory(&output.stdout).unwrap().to_rgb8().dimensions(), (64, 64));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_goes_on_by_itself_and_can_be_asked_for() {
    let desk = Desk::new(paced(Duration::from_millis(10))).await;
    let job = desk.get(&["generate", "a cat", "--seed", "7", "--detach"]);
    let watched = desk.get(&["watch", &job]);
    assert!(watched.contains("accepted: \"a cat\", model sim, seed 7"), "{watched}");
    assert!(watched.lines().last().unwrap().ends_with("done: 1 images"), "{watched}");
    let again = desk.ask(&["watch", &job, "--json"]);
    assert_eq!(kinds(&again.objects()), ["accepted", "queued", "conditioning", "rendering", "image", "done"]);
    let last = again.objects().last().unwrap()["number"].to_string();
    assert_eq!(desk.get(&["watch", &job, "--after", &last]), "", "all is told");
    assert_eq!(desk.get(&["image", &job, "-o", "cat.png"]), "cat.png");
    assert_eq!(desk.picture("cat.png").dimensions(), (64, 64));
    assert_eq!(desk.json(&["job", &job])["state"], "succeeded");

    for (words, reason) in [
        (["image", &job, "7", "-o", "other.png"].as_slice(), "UNKNOWN_IMAGE"),
        (&["cancel", &job], "JOB_FINISHED"),
        (&["watch", "nonesuch"], "UNKNOWN_JOB"),
        (&["job", "01ARZ3NDEKTSV4RRFFQ69G5FAV"], "UNKNOWN_JOB"),
    ] {
        let told = desk.ask(words);
        assert!(told.code == Some(3) && told.err.contains(reason), "{words:?}: {told:?}");
    }
    assert!(!desk.path("other.png").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_can_be_stopped() {
    let desk = Desk::new(paced(Duration::from_millis(50))).await;
    // Before anything is measured, no deadline is refused.
    let told = desk.ask(&["generate", "a cat", "--steps", "150", "--deadline", "500ms"]);
    assert!(told.code == Some(6) && told.err.contains("expired"), "{told:?}");
    let job = desk.get(&["generate", "a cat", "--steps", "150", "--detach"]);
    assert_eq!(desk.json(&["cancel", &job])["job"]["state"], "cancelled");
    let told = desk.ask(&["watch", &job]);
    assert!(told.code == Some(5) && told.err.contains("was cancelled"), "{told:?}");
    assert_eq!(desk.get(&["cancel", &job]), format!("{job}  cancelled, 0 waiting tasks removed"), "twice is once");
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_cancels_the_job() {
    let desk = Desk::new(paced(Duration::from_millis(50))).await;
    let mut child = desk.start(&["generate", "a cat", "--steps", "150", "--json"]);
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let job = loop {
        let event: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
        if event["event"] == "step" {
            break event["job_id"].as_str().unwrap().to_owned();
        }
    };
    interrupt(&child);
    let rest: Vec<_> = lines.map_while(Result::ok).collect();
    let told = Told::of(child.wait_with_output().unwrap());
    assert!(told.code == Some(130) && told.err.contains(&format!("job {job} is cancelled")), "{told:?}");
    let last: Value = serde_json::from_str(rest.last().unwrap()).unwrap();
    assert!(last["event"] == "error" && last["exit_code"] == 130, "{last}");
    assert_eq!(desk.json(&["job", &job])["state"], "cancelled");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_is_made_shown_rendered_and_dropped() {
    let desk = Desk::new(paced(Duration::ZERO)).await;
    let signal = desk.get(&["encode", "a red apple", "--model", "sim", "--tenant", "studio"]);
    assert_eq!(desk.json(&["encode", "a red apple"])["signal_id"], signal.as_str(), "equal prompts have one");
    let written = desk.get(&["generate", "--signal", &signal, "--seeds", "7,12", "-o", "apple.png"]);
    let mut files: Vec<_> = written.lines().collect();
    files.sort_unstable();
    assert_eq!(files, ["apple-1.png", "apple-2.png"]);
    desk.get(&["generate", "a red apple", "--seed", "12", "-o", "prompted.png"]);
    assert!(desk.picture("apple-2.png") == desk.picture("prompted.png"));
    let shown = desk.json(&["signal", "show", &signal]);
    assert!(shown["prompt"] == "a red apple" && shown["model"] == "sim", "{shown}");
    assert!(desk.get(&["signal", "show", &signal]).contains("\"a red apple\""));
    for _ in 0..2 {
        desk.get(&["signal", "drop", &signal]);
    }
    for words in [["signal", "show", &signal].as_slice(), &["generate", "--signal", &signal]] {
        let told = desk.ask(words);
        assert!(told.code == Some(3) && told.err.contains("UNKNOWN_SIGNAL"), "{words:?}: {told:?}");
    }

    let id = "0".repeat(64);
    let (model, space) = ("other".to_owned(), "other/8/x/rms".to_owned());
    let foreign = Signal { signal_id: id.clone(), model, space, ..Signal::default() };
    desk.cluster.ledger.keep_signal(foreign, PATIENCE).await.unwrap();
    let told = desk.ask(&["generate", "--signal", &id, "--model", "sim"]);
    assert!(told.code == Some(3) && told.err.contains("SPACE_MISMATCH"), "{told:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn exit_codes_are_those_that_help_tells() {
    let desk = Desk::new(moody(&Arc::default())).await;
    for (words, code, reason) in [
        (["--seed", "13"].as_slice(), 1, "not today (ENGINE)"),
        (&["--stepz", "1"], 2, "--stepz"),
        (&["-o", "cat.gif"], 2, ".gif"),
        (&["--model", "nonesuch"], 3, "UNKNOWN_MODEL"),
        (&["--steps", "9999"], 3, "LIMIT_EXCEEDED, field steps, limit 1..=150"),
        (&["--tenant", "No Such"], 3, "field tenant"),
        (&["-o", "no/such/folder.png"], 74, "there is no folder"),
        (&["--config", "no-such.toml"], 64, "no-such.toml"),
    ] {
        let told = desk.ask(&[&["generate", "a cat"], words].concat());
        assert!(told.code == Some(code) && told.err.contains(reason) && told.out.is_empty(), "{words:?}: {told:?}");
    }
    let told = desk.ask(&["generate", "a cat", "--seed", "13", "--json"]);
    let events = told.objects();
    assert_eq!(kinds(&events[events.len() - 2..]), ["failed", "error"]);
    let error = events.last().unwrap();
    assert!(told.code == Some(1) && error["exit_code"] == 1 && error["code"] == "ENGINE", "{told:?}");

    let nowhere = format!("127.0.0.1:{}", free_port());
    for (server, code, reason) in [(nowhere.as_str(), 4, "no server answers"), ("nats://host:4222", 64, "http://")] {
        for words in [["generate", "a cat"].as_slice(), &["encode", "a cat"], &["status"], &["batch", "list"]] {
            let told = desk.run(&[words, &["--server", server]].concat());
            assert!(told.code == Some(code) && told.err.contains(reason), "{words:?}: {told:?}");
        }
    }
    // A server without workers.
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator().await;
    let told = desk.run(&["generate", "a cat", "--server", &coordinator.url]);
    assert!(told.code == Some(4) && told.err.contains("NO_WORKER"), "{told:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_collects_what_another_try_makes_and_nothing_twice() {
    let is_well = Arc::default();
    let desk = Desk::new(moody(&is_well)).await;
    let items = [1, UNLUCKY, 3].map(|seed| format!("{{\"prompt\": \"a cat\", \"seed\": {seed}}}\n"));
    std::fs::write(desk.path("prompts.jsonl"), items.concat()).unwrap();
    let submit = ["batch", "submit", "prompts.jsonl", "-o", "results"];
    let told = desk.ask(&submit);
    assert!(told.code == Some(1) && told.err.contains("2 of 3 succeeded, 1 failed"), "{told:?}");
    let states = |results: &BTreeMap<u64, Value>| -> Vec<String> {
        results.values().map(|line| line["state"].as_str().unwrap().to_owned()).collect()
    };
    let (first, lines) = desk.results();
    assert_eq!((states(&first), lines), (["succeeded", "failed", "succeeded"].map(str::to_owned).to_vec(), 3));
    // The same again: nothing is new. What is there already is not fetched, though somebody took it away.
    std::fs::remove_file(desk.path("results/000000.png")).unwrap();
    let told = desk.ask(&submit);
    assert!(told.code == Some(1) && told.err.contains("submitted before"), "{told:?}");
    assert_eq!(desk.results(), (first.clone(), 3));

    is_well.store(true, Ordering::Relaxed);
    let batch = first[&0]["batch_id"].as_str().unwrap();
    assert_eq!(desk.json(&["batch", "retry", batch])["retries"], 1);
    assert_eq!(desk.get(&["batch", "fetch", batch, "-o", "results"]), "results/results.jsonl");
    let (last, lines) = desk.results();
    assert_eq!((states(&last), lines), (vec!["succeeded".to_owned(); 3], 4), "the last line counts");
    assert_eq!((&last[&0], &last[&2]), (&first[&0], &first[&2]));
    assert_ne!(last[&1]["job_id"], first[&1]["job_id"]);
    assert_eq!(last[&1]["images"][0]["file"], "000001.png");
    desk.picture("results/000001.png");
    assert!(!desk.path("results/000000.png").exists());
    assert_eq!(desk.get(&submit), "results/results.jsonl", "all is there");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_was_interrupted_goes_on() {
    let desk = Desk::new(paced(Duration::from_millis(50))).await;
    let count = 40;
    let items = (0..count).map(|seed| format!("{{\"prompt\": \"a cat\", \"seed\": {seed}}}\n"));
    std::fs::write(desk.path("prompts.jsonl"), items.collect::<String>()).unwrap();
    let submit = ["batch", "submit", "prompts.jsonl", "-o", "results"];
    let child = desk.start(&submit);
    let started = Instant::now();
    while std::fs::metadata(desk.path("results/results.jsonl")).map_or(0, |file| file.len()) == 0 {
        assert!(started.elapsed() < PATIENCE, "nothing is collected");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    interrupt(&child);
    let told = Told::of(child.wait_with_output().unwrap());
    assert!(told.code == Some(130) && told.err.contains("the batch goes on"), "{told:?}");
    let (before, _) = desk.results();
    let written = |index: &u64| -> SystemTime {
        std::fs::metadata(desk.path(&format!("results/{index:06}.png"))).unwrap().modified().unwrap()
    };
    let times: Vec<_> = before.keys().map(written).collect();

    assert_eq!(desk.get(&submit), "results/results.jsonl");
    let (after, lines) = desk.results();
    assert_eq!((after.len(), lines), (count, count), "each item once");
    assert_eq!(before.keys().map(written).collect::<Vec<_>>(), times, "nothing is fetched twice");
    let jobs = desk.cluster.ledger.bus().list(Bucket::Jobs).await.unwrap();
    assert_eq!(jobs.len(), count, "nothing is drawn twice");
}

#[test]
fn completions_are_printed() {
    let folder = tempfile::tempdir().unwrap();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let told = Told::of(bare(folder.path(), &["completions", shell]).output().unwrap());
        assert_eq!((told.code, told.err.as_str()), (Some(0), ""), "{shell}");
        assert!(["generate", "replay", "tenant"].iter().all(|word| told.out.contains(word)), "{shell}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_is_read_before_the_environment_and_flags_and_checked() {
    let desk = Desk::new(paced(Duration::ZERO)).await;
    for (text, key) in [
        ("colour = \"red\"\n", "\"colour\" in wrong.toml"),
        ("[hand]\nwings = 2\n", "\"hand.wings\" in wrong.toml"),
        ("listen = 7\n", "listen"),
        ("server = \n", "wrong.toml"),
    ] {
        std::fs::write(desk.path("wrong.toml"), text).unwrap();
        let told = desk.ask(&["status", "--config", "wrong.toml"]);
        assert!(told.code == Some(64) && told.err.contains(key), "{text:?}: {told:?}");
    }
    let told = Told::of(desk.command(&["status"]).env("EFFERENT_HAND__WINGS", "2").output().unwrap());
    assert!(told.code == Some(64) && told.err.contains("\"EFFERENT_HAND__WINGS\""), "{told:?}");

    // File, environment, flag: the later one counts, and `config` tells which it was.
    std::fs::write(desk.path("some.toml"), "model = \"of-file\"\n").unwrap();
    let all = ["--config", "some.toml", "--model", "of-flag"];
    let (none, file) = (&all[..0], &all[..2]);
    for (flags, variable, wanted) in [
        (none, None, "model = \"\"  # default"),
        (file, None, "model = \"of-file\"  # file"),
        (file, Some("of-env"), "model = \"of-env\"  # environment variable EFFERENT_MODEL"),
        (&all[..], Some("of-env"), "model = \"of-flag\"  # flag --model"),
    ] {
        let mut command = desk.command(&[&["config"], flags].concat());
        command.envs(variable.map(|value| ("EFFERENT_MODEL", value)));
        let told = Told::of(command.output().unwrap());
        assert!(told.out.lines().any(|line| line.starts_with(wanted)), "{wanted}: {told:?}");
    }
    // What is printed is a file that says the same.
    std::fs::write(desk.path("all.toml"), desk.run(&["config"]).out).unwrap();
    assert_eq!(desk.get(&["models", "--config", "all.toml"]).lines().count(), 2);

    // The user's own file is found, and so is one that a variable names.
    let nowhere = format!("127.0.0.1:{}", free_port());
    let (url, nowhere) = (desk.coordinator.url.as_str(), nowhere.as_str());
    std::fs::create_dir_all(desk.path("settings/efferent")).unwrap();
    std::fs::write(desk.path("settings/efferent/config.toml"), format!("server = {url:?}\n")).unwrap();
    std::fs::write(desk.path("nowhere.toml"), format!("server = {nowhere:?}\n")).unwrap();
    for (words, variables, code) in [
        (["workers"].as_slice(), [].as_slice(), 0),
        (&["workers"], &[("EFFERENT_CONFIG", "nowhere.toml")], 4),
        (&["workers"], &[("EFFERENT_CONFIG", "nowhere.toml"), ("EFFERENT_SERVER", url)], 0),
        (&["workers"], &[("EFFERENT_SERVER", nowhere)], 4),
        (&["workers", "--server", url], &[("EFFERENT_SERVER", nowhere)], 0),
    ] {
        let told = Told::of(desk.command(words).envs(variables.iter().copied()).output().unwrap());
        assert_eq!(told.code, Some(code), "{words:?} {variables:?}: {told:?}");
    }
}
