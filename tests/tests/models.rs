//! Several models in one worker, loaded as they are asked for.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex},
};

use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    http::{Method, StatusCode},
    response::{IntoResponse as _, Response},
};

use efferent_proto::v1::{
    GenerateRequest, ListModelsRequest, ListWorkersRequest, Size, WorkerRole, WorkerState,
    cluster_service_client::ClusterServiceClient,
};
use efferent_tests::{
    calls::{PATIENCE, generate, kind, request},
    checkpoints::folder,
    processes::{Cluster, Process, connect, efferent},
};
use futures::future::join_all;

const MODELS: [&str; 3] = ["sd15", "sd21", "z-image"];

fn path(model: &str) -> String {
    folder(model).display().to_string()
}

/// Memory that the weights of a model's hand take.
fn memory(model: &str) -> u64 {
    let told = Command::new(efferent()).args(["models", "inspect", &path(model), "--json"]).output().expect("runs");
    let told: serde_json::Value = serde_json::from_slice(&told.stdout).expect("is JSON");
    told["memory_bytes"]["hand"].as_u64().expect("a number")
}

/// A worker with all models.
fn worker(cluster: &Cluster, role: &str, memory: u64) -> Result<Process, String> {
    let (first, rest) = (path(MODELS[0]), [path(MODELS[1]), path(MODELS[2])].join(","));
    let memory = memory.to_string();
    let args = ["--model", &first, "--also", &rest, "--model-memory", &memory, "--model-patience", "300ms"];
    cluster.try_role(role, &args).map(|(process, _)| process)
}

fn wanted(model: &str, seed: u64) -> GenerateRequest {
    let side = if model == "z-image" { 32 } else { 16 };
    let size = Some(Size { width: side, height: side });
    GenerateRequest { model: model.to_owned(), steps: Some(2), seed: Some(seed), size, ..request("a cat") }
}

#[tokio::test(flavor = "multi_thread")]
async fn models_take_turns_in_memory_that_does_not_hold_them_all() {
    let cluster = Cluster::start(&[]);
    let largest = MODELS.map(memory).into_iter().max().expect("three");
    let brain = worker(&cluster, "brain", 0).expect("starts");
    let hand = worker(&cluster, "hand", largest).expect("starts");
    let (_coordinator, url) = cluster.coordinator();
    let client = connect(&url).await;
    let mut about = ClusterServiceClient::connect(url).await.expect("answers");
    // Nothing is loaded, and everything is offered.
    let offered = async {
        loop {
            let models = about.list_models(ListModelsRequest {}).await.expect("models").into_inner().models;
            if models.len() == MODELS.len() && models.iter().all(|m| m.live_brains == 1 && m.live_hands == 1) {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, offered).await.expect("all models are offered");
    assert_eq!(hand.counter("efferent_models_loaded_total"), 0);
    // All at once, twice over, though the largest fits only alone.
    for round in 0..2 {
        let ends = MODELS.into_iter().flat_map(|model| [(model, 1), (model, 2)]).map(|(model, seed)| {
            let mut client = client.clone();
            async move {
                let events = generate(&mut client, wanted(model, seed + 10 * round)).await;
                kind(events.last().expect("events"))
            }
        });
        assert!(join_all(ends).await.into_iter().all(|end| end == "done"), "{}", cluster.log());
    }
    let (loaded, unloaded) =
        (hand.counter("efferent_models_loaded_total"), hand.counter("efferent_models_unloaded_total"));
    assert!(loaded >= 4 && (1..=2).contains(&(loaded - unloaded)), "{loaded} loaded, {unloaded} let go of");
    assert_eq!(brain.counter("efferent_models_loaded_total"), 3, "its memory holds all");
    let workers = about.list_workers(ListWorkersRequest {}).await.expect("workers").into_inner().workers;
    let count = |role, state| workers.iter().filter(|w| w.role() == role && w.state() == state).count();
    assert_eq!((count(WorkerRole::Hand, WorkerState::Standby), count(WorkerRole::Brain, WorkerState::Ready)), (1, 3));
    assert!(count(WorkerRole::Hand, WorkerState::Ready) <= 2, "one, and one that has just left");
    for process in [hand, brain] {
        assert!(process.terminate(), "{}", cluster.log());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_never_fits_is_refused_with_both_numbers() {
    let cluster = Cluster::start(&[]);
    let largest = MODELS.map(memory).into_iter().max().expect("three");
    worker(&cluster, "hand", largest - 1).expect_err("does not start");
    let told = cluster.log();
    assert!(told.contains(&largest.to_string()) && told.contains(&(largest - 1).to_string()), "{told}");
    let path = path(MODELS[0]);
    cluster.try_role("hand", &["--model", &path, "--also", &path]).expect_err("does not start");
    let told = cluster.log();
    assert!(told.contains("twice"), "{told}");
}

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// What the hub has beside the checkpoint's files, and nobody wants.
const MORE: [&str; 3] = ["v1-5-pruned.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors", "unet/model.onnx"];

/// Hugging Face's hub with one model, as far as its library asks.
#[derive(Clone)]
struct Hub {
    folder: PathBuf,
    files: Arc<Vec<String>>,
    asked: Arc<Mutex<Vec<String>>>,
}

fn json(value: &serde_json::Value) -> Response {
    ([("content-type", "application/json")], value.to_string()).into_response()
}

impl Hub {
    fn of(folder: PathBuf) -> Self {
        fn walk(root: &Path, at: &Path, found: &mut Vec<String>) {
            for entry in std::fs::read_dir(at).expect("is there").flatten() {
                match entry.path() {
                    path if path.is_dir() => walk(root, &path, found),
                    path => found.push(path.strip_prefix(root).expect("is below").display().to_string()),
                }
            }
        }
        let mut files = MORE.map(str::to_owned).to_vec();
        walk(&folder, &folder, &mut files);
        Self { folder, files: Arc::new(files), asked: Arc::default() }
    }

    async fn answer(State(hub): State<Self>, request: Request) -> Response {
        let token = request.headers().get("authorization").and_then(|value| value.to_str().ok()).unwrap_or_default();
        let path = request.uri().path().to_owned();
        if token != "Bearer hf_test" {
            return (StatusCode::UNAUTHORIZED, [("x-error-code", "GatedRepo")]).into_response();
        }
        if path.starts_with("/api/models/tiny/sd/tree/") {
            let file = |path: &String| serde_json::json!({"type": "file", "path": path, "size": 1, "oid": COMMIT});
            return json(&hub.files.iter().map(file).collect());
        }
        if path.starts_with("/api/models/tiny/sd/revision/") || path == "/api/models/tiny/sd" {
            let siblings: Vec<_> = hub.files.iter().map(|file| serde_json::json!({"rfilename": file})).collect();
            return json(&serde_json::json!({"id": "tiny/sd", "sha": COMMIT, "siblings": siblings}));
        }
        let Some(file) = path.strip_prefix(&format!("/tiny/sd/resolve/{COMMIT}/")) else {
            return (StatusCode::NOT_FOUND, [("x-error-code", "RepoNotFound")]).into_response();
        };
        let Ok(bytes) = std::fs::read(hub.folder.join(file)) else { return StatusCode::NOT_FOUND.into_response() };
        if request.method() == Method::GET {
            hub.asked.lock().expect("is not poisoned").push(file.to_owned());
        }
        let tag = format!("\"{}\"", blake3::hash(&bytes).to_hex());
        let headers = [("x-repo-commit", COMMIT), ("etag", &tag), ("content-length", &bytes.len().to_string())];
        let body = if request.method() == Method::HEAD { Body::empty() } else { bytes.into() };
        (headers, body).into_response()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_of_the_hub_is_fetched_and_found() {
    let hub = Hub::of(folder("sd15"));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    let router = Router::new().fallback(Hub::answer).with_state(hub.clone());
    tokio::spawn(async move { axum::serve(listener, router).await });
    let home = tempfile::tempdir().expect("a temporary folder");
    let run = |token: &str, args: &[&str]| {
        let mut command = Command::new(efferent());
        command.args(args).env("EFFERENT_HOME", home.path().join("ours")).env("HF_HOME", home.path().join("hub"));
        command.env("HF_ENDPOINT", &url).env("HF_TOKEN", token).env_remove("HF_HUB_CACHE");
        tokio::task::spawn_blocking(move || command.output().expect("runs"))
    };
    let told = |output: &std::process::Output| String::from_utf8_lossy(&output.stderr).into_owned();
    // Offline, without a token, of another name: refused, with the reason.
    let offline = run("hf_test", &["models", "fetch", "tiny/sd", "--offline"]).await.expect("runs");
    assert_eq!(offline.status.code(), Some(64), "{}", told(&offline));
    let gated = run("hf_other", &["models", "fetch", "tiny/sd"]).await.expect("runs");
    assert!(gated.status.code() == Some(69) && told(&gated).contains("cannot fetch tiny/sd"), "{}", told(&gated));
    let unknown = run("hf_test", &["models", "fetch", "tiny/other@v2"]).await.expect("runs");
    assert!(unknown.status.code() == Some(69) && told(&unknown).contains("tiny/other@v2"), "{}", told(&unknown));
    let fetched = run("hf_test", &["models", "fetch", "tiny/sd"]).await.expect("runs");
    assert!(fetched.status.success(), "{}", told(&fetched));
    let asked = hub.asked.lock().expect("is not poisoned").clone();
    assert!(MORE.iter().all(|file| !asked.iter().any(|asked| asked == file)), "{asked:?}");
    assert!(asked.iter().any(|file| file == "unet/diffusion_pytorch_model.safetensors"), "{asked:?}");
    // Once it is here, nothing is asked.
    let picture = home.path().join("cat.png");
    let args = ["generate", "a cat", "--model", "tiny/sd", "--offline", "--steps", "2", "--no-show", "-o"];
    let drawn = run("", &[&args[..], &[picture.to_str().expect("UTF-8")]].concat()).await.expect("runs");
    assert!(drawn.status.success() && picture.exists(), "{}", told(&drawn));
}
