//! Workers with devices of their own, and the launcher that looks after them, as processes over a real nats-server.

use std::{
    collections::BTreeMap,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use efferent_proto::v1::{
    GenerateRequest, ListWorkersRequest, Worker, WorkerRole, WorkerState, cluster_service_client::ClusterServiceClient,
};
use efferent_tests::{
    calls::{PATIENCE, all, durable, generate, request, until},
    processes::{Cluster, connect, efferent},
};

/// Short leases, so that work is taken from the dead soon.
const LEASE: (&str, &str) = ("EFFERENT_LEDGER__LEASE", "2s");
const SIM: (&str, &str) = ("EFFERENT_MODEL", "sim");

/// Cores that this test may run on.
fn cores() -> Vec<usize> {
    let cores = efferent_worker::devices::Cores::allowed().expect("the system tells");
    cores.iter().collect()
}

/// What the system says of each thread of a process: the cores that it may run on.
fn cores_of_threads(pid: u32) -> Vec<String> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).expect("it runs");
    let status =
        |task: std::io::Result<std::fs::DirEntry>| std::fs::read_to_string(task.ok()?.path().join("status")).ok();
    let cores = |status: String| {
        let line = status.lines().find(|line| line.starts_with("Cpus_allowed_list"))?.to_owned();
        Some(line.split_whitespace().last()?.to_owned())
    };
    tasks.filter_map(status).filter_map(cores).collect()
}

fn is_alive(pid: u32) -> bool {
    // One that has ended and is not waited for yet (its launcher is gone) counts as dead.
    let status = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !matches!(status.rsplit(") ").next().and_then(|rest| rest.chars().next()), None | Some('Z'))
}

async fn workers(url: &str) -> Vec<Worker> {
    let mut client = ClusterServiceClient::connect(url.to_owned()).await.expect("it listens");
    client.list_workers(ListWorkersRequest {}).await.expect("it answers").into_inner().workers
}

/// Waits until the coordinator knows what is wanted of its workers.
async fn workers_when(url: &str, wanted: impl Fn(&[Worker]) -> bool) -> Vec<Worker> {
    let started = Instant::now();
    loop {
        let workers = workers(url).await;
        if wanted(&workers) {
            return workers;
        }
        assert!(started.elapsed() < PATIENCE, "{workers:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn has(workers: &[Worker], brains: usize, hands: usize) -> bool {
    let ready = |worker: &&Worker| worker.state() == WorkerState::Ready;
    let count = |role| workers.iter().filter(ready).filter(|worker| worker.role() == role).count();
    (count(WorkerRole::Brain), count(WorkerRole::Hand)) == (brains, hands)
}

/// Waits until a process is gone.
fn gone(pid: u32) {
    let started = Instant::now();
    while is_alive(pid) {
        assert!(started.elapsed() < PATIENCE, "process {pid} lives on");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Runs `efferent` to its end: its exit code, and what it wrote.
fn run(args: &[&str], settings: &[(&str, &str)]) -> (i32, String, String) {
    let output = Command::new(efferent()).args(args).envs(settings.iter().copied()).output().expect("starts");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_stays_on_its_cores_and_has_them_alone() {
    let locks = tempfile::tempdir().expect("a folder");
    let folder = locks.path().to_str().expect("UTF-8").to_owned();
    let cluster = Cluster::start(&[LEASE, SIM, ("EFFERENT_DEVICE_LOCKS", &folder)]);
    let core = *cores().last().expect("a core");
    let device = format!("cpu:{core}");
    let (hand, _) = cluster.role("hand", &["--device", &device]);
    let threads = cores_of_threads(hand.pid());
    assert!(threads.len() > 2 && threads.iter().all(|cores| *cores == core.to_string()), "{threads:?}");
    // The variable that sizes candle's products and rayon's pool.
    let environment = std::fs::read(format!("/proc/{}/environ", hand.pid())).expect("it runs");
    assert!(environment.split(|byte| *byte == 0).any(|variable| variable == b"RAYON_NUM_THREADS=1"));

    let url = cluster.nats_url();
    let settings = [SIM, ("EFFERENT_DEVICE_LOCKS", folder.as_str()), ("EFFERENT_NATS", url.as_str())];
    let (code, _, told) = run(&["brain", "--device", &device, "--admin", "off"], &settings);
    let words = format!("device \"{device}\" is held by a hand (process {}, on {device})", hand.pid());
    assert!(code == 4 && told.contains(&words), "{code} {told}");
    let (_, listed, _) = run(&["devices"], &settings);
    assert!(listed.contains(&format!("a hand (process {}, on {device})", hand.pid())), "{listed}");

    let (_coordinator, url) = cluster.coordinator();
    let known = workers_when(&url, |workers| has(workers, 0, 1)).await;
    let [hardware] = known[0].hardware.as_slice() else { panic!("{known:?}") };
    assert_eq!(
        (hardware.device.as_str(), hardware.cores, &known[0].devices),
        (device.as_str(), 1, &vec![device.clone()])
    );
    assert!(hardware.memory_bytes > 1 << 30);

    hand.kill();
    let (brain, _) = cluster.role("brain", &["--device", &device]);
    let shared = cluster.role("hand", &["--device", "cpu"]).0;
    assert!(brain.terminate() && shared.terminate(), "{}", cluster.log());
}

#[test]
fn a_device_that_is_malformed_or_absent_is_named() {
    for (device, words) in [
        ("cpu:x", "device \"cpu:x\" must name cores"),
        ("cpu:1000-1001", "device \"cpu:1000-1001\" is not there"),
        ("tpu", "device \"tpu\" is of no kind"),
        ("cuda:0,cuda:0", "names cuda:0 twice"),
    ] {
        let (code, _, told) = run(&["hand", "--nats", "nats://127.0.0.1:1", "--device", device], &[SIM]);
        assert!(code == 64 && told.contains(words), "{code} {told}");
    }
}

#[test]
fn a_dry_run_tells_who_gets_which_gpu() {
    let inventory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/worker/tests/data/eight-gpus.json");
    let inventory = inventory.to_str().expect("UTF-8");
    let gpus: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(inventory).expect("a file")).expect("JSON");
    let uuid = |index: usize| gpus["gpus"][index]["uuid"].as_str().expect("a UUID");
    for placement in [["brain=1,hand=7"].as_slice(), &["auto", "--brain-time", "400ms", "--hand-time", "15s"]] {
        let args = [&["launch", "--inventory", inventory, "--dry-run", "--json", "--placement"], placement].concat();
        let (code, told, error) = run(&args, &[]);
        assert_eq!(code, 0, "{error}");
        let told: serde_json::Value = serde_json::from_str(&told).expect("JSON");
        let workers = told["workers"].as_array().expect("workers");
        assert_eq!(workers.len(), 8);
        for (index, worker) in workers.iter().enumerate() {
            assert_eq!(worker["environment"]["CUDA_VISIBLE_DEVICES"], uuid(index));
            assert_eq!(worker["device"], format!("cuda:{}", uuid(index)));
            assert_eq!(worker["role"], if index == 0 { "brain" } else { "hand" });
        }
    }
    let (code, told, _) = run(&["launch", "--dry-run", "--placement", "brain=1,hand=2", "--devices", "cpu:0-7"], &[]);
    assert!(code == 0 && told.contains("hand-1   cpu:5-7"), "{told}");
    let (_, told, _) = run(&["devices", "--inventory", inventory], &[]);
    assert!(told.contains(uuid(5)) && told.contains("79.6 GiB"), "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_launcher_keeps_its_workers_running_and_leaves_none_behind() {
    let locks = tempfile::tempdir().expect("a folder");
    let folder = locks.path().to_str().expect("UTF-8").to_owned();
    let step = ("EFFERENT_SIM__STEP", "20ms");
    let cluster = Cluster::start(&[LEASE, SIM, step, ("EFFERENT_DEVICE_LOCKS", &folder)]);
    // Three workers have cores of their own where there are as many.
    let own = cores().len() >= 3;
    let devices = if own { format!("cpu:{}", join(&cores()[..3])) } else { "cpu".to_owned() };
    let launcher = cluster.launch(&["--placement", "brain=1,hand=2", "--devices", &devices]);
    let (_coordinator, url) = cluster.coordinator();
    let first = workers_when(&url, |workers| has(workers, 1, 2)).await;
    let mut client = connect(&url).await;
    let long = GenerateRequest { steps: Some(50), image_count: Some(2), ..request("a cat") };
    assert_eq!(durable(&generate(&mut client, long.clone()).await, 0).last(), Some(&"done"));

    // One that dies in the middle of a request comes back, and the request is finished.
    let mut events = client.generate(GenerateRequest { seed: Some(2), ..long }).await.expect("accepted").into_inner();
    let mut story = until(&mut events, "step").await;
    let victim = first.iter().find(|worker| worker.role() == WorkerRole::Hand).expect("a hand").pid;
    let others: Vec<u32> = first.iter().map(|worker| worker.pid).filter(|pid| *pid != victim).collect();
    kill(victim);
    story.extend(all(events).await);
    assert_eq!(durable(&story, 0).last(), Some(&"done"));
    let again =
        workers_when(&url, |workers| has(workers, 1, 2) && workers.iter().all(|worker| worker.pid != victim)).await;
    let pids: Vec<u32> = again.iter().map(|worker| worker.pid).collect();
    assert!(others.iter().all(|pid| pids.contains(pid)), "nobody else is disturbed: {others:?} {pids:?}");
    if own {
        let placed: BTreeMap<u32, &str> = again.iter().map(|worker| (worker.pid, worker.devices[0].as_str())).collect();
        for (pid, device) in placed {
            assert!(cores_of_threads(pid).iter().all(|cores| format!("cpu:{cores}") == device), "{device}");
        }
    }
    assert!(launcher.terminate(), "{}", cluster.log());
    pids.into_iter().for_each(gone);
    let log = cluster.log();
    for label in ["[brain-0] ", "[hand-0] ", "[hand-1] "] {
        assert!(log.lines().any(|line| line.starts_with(label) && line.contains("is ready")), "{label}: {log}");
    }
    assert!(log.contains("worker has ended; it is started again") && log.contains("signal: 9"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_end_with_their_launcher_even_if_it_is_killed() {
    let locks = tempfile::tempdir().expect("a folder");
    let folder = locks.path().to_str().expect("UTF-8").to_owned();
    let cluster = Cluster::start(&[LEASE, SIM, ("EFFERENT_LOG_FORMAT", "json"), ("EFFERENT_DEVICE_LOCKS", &folder)]);
    let two = &cores()[..cores().len().min(2)];
    let devices = if two.len() == 2 { format!("cpu:{}", join(two)) } else { "cpu".to_owned() };
    let launcher = cluster.launch(&["--placement", "brain=1,hand=1", "--devices", &devices]);
    let (_coordinator, url) = cluster.coordinator();
    let known = workers_when(&url, |workers| has(workers, 1, 1)).await;
    if let [first, second] = two {
        for (role, core) in [(WorkerRole::Brain, first), (WorkerRole::Hand, second)] {
            let worker = known.iter().find(|worker| worker.role() == role).expect("it is there");
            assert_eq!(worker.devices, [format!("cpu:{core}")]);
            let threads = cores_of_threads(worker.pid);
            assert!(threads.iter().all(|cores| *cores == core.to_string()), "{threads:?}");
        }
    }
    launcher.kill();
    known.iter().map(|worker| worker.pid).for_each(gone);
    workers_when(&url, <[Worker]>::is_empty).await;
    let log = cluster.log();
    let lines: Vec<serde_json::Value> = log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    assert!(lines.iter().any(|line| line["worker"] == "hand-0" && line["message"] == "hand is ready"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hand_that_hangs_ends_and_its_work_goes_elsewhere() {
    let cluster = Cluster::start(&[LEASE, SIM]);
    let _brain = cluster.role("brain", &[]);
    let (hung, _) = cluster.role("hand", &["--step-timeout", "1s", "--sim-hangs", "1"]);
    let (_coordinator, url) = cluster.coordinator();
    let mut client = connect(&url).await;
    let mut events = client.generate(request("a cat")).await.expect("accepted").into_inner();
    let story = until(&mut events, "rendering").await;
    assert_eq!(hung.code(), Some(70), "{}", cluster.log());
    let log = cluster.log();
    assert!(log.contains("the engine has not come back from a step for 1s"), "{log}");
    let _hand = cluster.role("hand", &[]);
    assert_eq!(durable(&[story, all(events).await].concat(), 0).last(), Some(&"done"));
}

#[test]
fn a_launcher_whose_workers_cannot_be_says_so_and_ends() {
    let settings = [("EFFERENT_NATS", "nats://127.0.0.1:1"), ("EFFERENT_MODEL", "no-such-model")];
    let args = ["launch", "--placement", "hand=2", "--devices", "cpu", "--admin", "off"];
    let (code, told, error) = run(&args, &settings);
    assert_eq!(code, 64, "{error}");
    assert!(told.contains("hand-1"), "{told}");
    assert!(error.contains("[hand-1] efferent: ") && error.contains("every worker was given up"), "{error}");
}

fn join(cores: &[usize]) -> String {
    cores.iter().map(usize::to_string).collect::<Vec<_>>().join(",")
}

fn kill(pid: u32) {
    assert!(Command::new("kill").args(["-9", &pid.to_string()]).status().expect("kill").success());
}
