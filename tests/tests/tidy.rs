//! Invariants of the source tree: who may import whom, how long a file may be, that every family is listed, that manifests name
//! what there is.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    process::Command,
};

use efferent_proto::names;
use serde_json::Value;

/// Lines a source file may have. Longer ones hide what they hold.
const MAX_LINES: usize = 600;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().expect("the repository")
}

/// Every package of the workspace with those of the workspace it needs to be built (not those its tests need).
fn imports() -> BTreeMap<String, BTreeSet<String>> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let output = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .expect("cargo metadata");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let name = |value: &Value| value["name"].as_str().expect("a name").to_owned();
    let packages = metadata["packages"].as_array().expect("packages");
    let ours: BTreeSet<String> = packages.iter().map(name).collect();
    let needs = |package: &Value| {
        let all = package["dependencies"].as_array().expect("dependencies").iter();
        let built = all.filter(|dependency| dependency["kind"].as_str() != Some("dev"));
        built.map(name).filter(|dependency| ours.contains(dependency)).collect()
    };
    packages.iter().map(|package| (name(package), needs(package))).collect()
}

#[test]
fn imports_go_one_way() {
    let allowed: BTreeMap<&str, &[&str]> = BTreeMap::from([
        ("efferent-proto", [].as_slice()),
        ("efferent-bus", &["efferent-proto"]),
        ("efferent-service", &["efferent-proto", "efferent-bus"]),
        ("efferent-worker", &["efferent-proto", "efferent-bus", "efferent-service"]),
        // No tensors in the control plane.
        ("efferent-coordinator", &["efferent-proto", "efferent-bus", "efferent-service"]),
        // Brains and hands meet in the control signal alone.
        ("efferent-brain", &["efferent-proto", "efferent-bus", "efferent-service", "efferent-worker"]),
        ("efferent-hand", &["efferent-proto", "efferent-bus", "efferent-service", "efferent-worker"]),
    ]);
    let imports = imports();
    for (package, allowed) in &allowed {
        let found = imports.get(*package).unwrap_or_else(|| panic!("{package} is not in the workspace"));
        let extra: Vec<_> = found.iter().filter(|import| !allowed.contains(&import.as_str())).collect();
        assert!(extra.is_empty(), "{package} may not import {extra:?}");
    }
    let free = ["efferent-cli", "efferent", "efferent-tests"];
    for (package, found) in &imports {
        assert!(
            allowed.contains_key(package.as_str()) || free.contains(&package.as_str()),
            "{package} has no rule here"
        );
        assert!(!found.contains("efferent-tests"), "{package} may not import the tests");
    }
}

/// Every file of the source tree.
fn files() -> Vec<PathBuf> {
    let made = |name: &str| name.starts_with('.') || ["target", "out", "__pycache__"].contains(&name);
    let (mut folders, mut files) = (vec![root()], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.file_name().and_then(|name| name.to_str()).is_none_or(made) {
                continue;
            }
            if path.is_dir() { folders.push(path) } else { files.push(path) }
        }
    }
    assert!(files.len() > 50, "the tree is found");
    files
}

#[test]
fn files_are_short() {
    let sources = files().into_iter().filter(|path| {
        path.extension().is_some_and(|extension| ["rs", "py", "proto", "md"].iter().any(|known| extension == *known))
    });
    let lines = |path: &PathBuf| std::fs::read_to_string(path).expect("UTF-8").lines().count();
    let long: Vec<_> = sources.map(|path| (lines(&path), path)).filter(|(lines, _)| *lines > MAX_LINES).collect();
    assert!(long.is_empty(), "over {MAX_LINES} lines: {long:?}");
}

#[test]
fn every_family_is_listed() {
    for worker in ["worker-brain", "worker-hand"] {
        let folder = root().join(worker).join("src/families");
        let list = std::fs::read_to_string(folder.join("mod.rs")).expect("the list");
        for entry in std::fs::read_dir(&folder).expect("families") {
            let path = entry.expect("an entry").path();
            let name = path.file_stem().and_then(|stem| stem.to_str()).expect("a name").to_owned();
            // Simulated engines are asked for by another way: no model folder can name them.
            if name == "mod" || name == "sim" {
                continue;
            }
            assert!(list.contains(&format!("\"{name}\"")), "{worker}: {name} is not in FAMILIES");
        }
    }
}

#[test]
fn crates_and_folders_open_with_a_map() {
    for path in files() {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if matches!(name, "lib.rs" | "mod.rs") {
            let text = std::fs::read_to_string(&path).expect("UTF-8");
            assert!(text.starts_with("//!"), "{} does not say what it is", path.display());
        }
    }
}

#[test]
fn manifests_name_what_there_is() {
    let read =
        |path: &str| std::fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"));
    let (described, backend) = (read("crates/service/src/meters.rs"), read("crates/bus/src/nats/mod.rs"));
    // As the backend spells them.
    assert!(backend.contains(r#"format!("{}-queue-{}", self.options.prefix, spec.name.replace('.', "_"))"#));
    let pipeline: Value = serde_json::from_str(&read("models/pictogram/pipeline.json")).expect("JSON");
    let [brain, hand] = ["brain", "hand"].map(|part| pipeline[part]["name"].as_str().expect("a name"));
    let queues = names::LANES.map(|lane| [names::brain_queue(brain, lane), names::hand_queue(hand, lane)]);
    let prefix = efferent_bus::nats::Options::default().prefix;
    let made: Vec<_> =
        queues.iter().flatten().map(|queue| format!("{prefix}-queue-{}", queue.replace('.', "_"))).collect();
    let (mut metrics, mut streams, mut consumers) = (0, 0, 0);
    for path in files().into_iter().filter(|path| path.starts_with(root().join("deploy/kubernetes"))) {
        let text = std::fs::read_to_string(&path).expect("UTF-8");
        for word in text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_')) {
            if word.starts_with("efferent_") {
                assert!(described.contains(&format!("\"{word}\"")), "{word} of {} is no metric", path.display());
                metrics += 1;
            }
        }
        for line in text.lines().map(str::trim) {
            if let Some(stream) = line.strip_prefix("stream: ") {
                assert!(made.iter().any(|name| name == stream), "{stream} of {} is not among {made:?}", path.display());
                streams += 1;
            }
            if let Some(consumer) = line.strip_prefix("consumer: ") {
                assert!(backend.contains(&format!("const CONSUMER: &str = \"{consumer}\";")), "{consumer}");
                consumers += 1;
            }
        }
    }
    assert!(metrics > 1 && streams > 1 && consumers > 1, "they are found");
}

#[test]
fn every_metric_is_described() {
    let described = std::fs::read_to_string(root().join("crates/service/src/meters.rs")).expect("the list");
    let mut found = 0;
    for path in files().into_iter().filter(|path| path.extension().is_some_and(|extension| extension == "rs")) {
        let text = std::fs::read_to_string(&path).expect("UTF-8");
        for kind in ["counter!(\"", "gauge!(\"", "histogram!(\""] {
            for rest in text.split(&format!("metrics::{kind}")).skip(1) {
                let name = rest.split('"').next().unwrap_or_default();
                assert!(described.contains(&format!("\"{name}\"")), "{name} of {} is not in meters.rs", path.display());
                found += 1;
            }
        }
    }
    assert!(found > 15, "metrics are found");
    let documented = std::fs::read_to_string(root().join("docs/metrics.md")).expect("the page");
    let mut names = described.split('"').filter(|text| text.starts_with("efferent_") && !text.contains(' '));
    assert!(names.clone().count() > 20, "names are found");
    let missing = names.find(|name| !documented.contains(&format!("`{name}`")));
    assert_eq!(missing, None, "is not in docs/metrics.md");
}
