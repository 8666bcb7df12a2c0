//! Several models in one worker, loaded as they are asked for.

use std::process::Command;

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
async fn models_take_turns_in_memory_that_holds_one_of_them() {
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
    // All at once, twice over, though one at a time fits.
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
    assert!(loaded >= 5 && unloaded + 1 == loaded, "{loaded} loaded, {unloaded} let go of");
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
