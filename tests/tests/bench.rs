//! `efferent bench cluster`: a small cluster is measured, and nothing is left of one, however it ends.

#![cfg(target_os = "linux")]

use std::{
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
};

use efferent_tests::processes::efferent;
use serde_json::Value;
use tempfile::TempDir;

fn bench(folder: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(efferent());
    command.args(["bench", "cluster", "--brains", "1", "--hands", "3", "--brain-time", "2ms", "--hand-time", "40ms"]);
    let tool = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tools/nats-server");
    if tool.exists() {
        command.arg("--nats-server").arg(tool);
    }
    command.args(more).env("TMPDIR", folder).stdin(Stdio::null());
    command
}

/// Processes that were told of this folder, and what is in it.
fn left(folder: &Path) -> Vec<String> {
    let name = folder.to_str().expect("UTF-8");
    let processes = std::fs::read_dir("/proc").expect("processes").filter_map(|entry| {
        let line = std::fs::read_to_string(entry.ok()?.path().join("cmdline")).ok()?;
        line.contains(name).then(|| line.replace('\0', " "))
    });
    let files =
        std::fs::read_dir(folder).expect("a folder").map(|entry| format!("{:?}", entry.expect("a file").path()));
    processes.chain(files).collect()
}

#[test]
fn a_small_cluster_is_measured() {
    let (folder, results) = (TempDir::new().expect("a folder"), TempDir::new().expect("a folder"));
    let output = results.path().join("report");
    let flags = ["--duration", "3s", "--warm-up", "1s", "--processes", "2", "--sync", "2m", "--sim-failures", "0.05"];
    let mut command = bench(folder.path(), &flags);
    let finished = command.args(["--json", "-o"]).arg(&output).output().expect("runs");
    assert!(finished.status.success(), "{}", String::from_utf8_lossy(&finished.stderr));
    let report: Value = serde_json::from_slice(&finished.stdout).expect("JSON");
    assert_eq!(report["simulated"], true);
    assert!((report["throughput"]["theoretical"].as_f64().expect("a number") - 75.0).abs() < 1e-9);
    let efficiency = report["throughput"]["efficiency"].as_f64().expect("a number");
    assert!((0.2..1.02).contains(&efficiency), "{report:#}");
    let jobs = &report["jobs"];
    assert!(jobs["succeeded"].as_u64() > Some(30) && jobs["succeeded"] == jobs["accepted"], "{jobs}");
    assert!(jobs["redelivered"].as_u64() > Some(0), "attempts fail: {jobs}");
    for none in ["lost", "duplicated", "failed", "left_in_queues"] {
        assert_eq!(jobs[none], 0, "{none}: {jobs}");
    }
    let hands = report["processes"].as_array().expect("a list").iter().find(|process| process["name"] == "hand");
    assert_eq!(hands.expect("hands")["count"], 2);
    for (file, begins) in [("report.json", "{"), ("throughput.svg", "<svg"), ("latency.svg", "<svg")] {
        assert!(std::fs::read_to_string(output.join(file)).expect("is written").starts_with(begins), "{file}");
    }
    assert_eq!(left(folder.path()), Vec::<String>::new());
}

#[test]
fn nothing_is_left_after_an_interruption() {
    let folder = TempDir::new().expect("a folder");
    let mut command = bench(folder.path(), &["--duration", "10m"]);
    let mut child: Child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("starts");
    let mut lines = BufReader::new(child.stderr.take().expect("is piped")).lines();
    let measuring = lines.by_ref().map_while(Result::ok).find(|line| line.contains("measuring"));
    assert!(measuring.is_some() && left(folder.path()).len() > 4, "{:?}", left(folder.path()));
    let told = Command::new("kill").arg("-INT").arg(child.id().to_string()).status().expect("kill");
    assert!(told.success());
    assert_eq!(child.wait().expect("ends").code(), Some(130));
    assert_eq!(left(folder.path()), Vec::<String>::new());
}

#[test]
fn a_server_that_is_not_there_is_told_how_to_get() {
    let folder = TempDir::new().expect("a folder");
    let finished =
        Command::new(efferent()).args(["bench", "cluster", "--nats-server", "/nowhere/nats-server"]).output();
    let finished = finished.expect("runs");
    assert_eq!(finished.status.code(), Some(64));
    assert!(String::from_utf8_lossy(&finished.stderr).contains("make tools"));
    assert_eq!(left(folder.path()), Vec::<String>::new());
}
