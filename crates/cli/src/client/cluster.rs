//! `models --server`, `workers`, `status`.

use efferent_proto::v1::{GetStatusRequest, GetStatusResponse, ListModelsRequest, ListWorkersRequest, Model, Worker};
use serde_json::json;

use crate::{
    client::{Server, cluster, json},
    exit::Failure,
    output,
};

/// Models of a server.
///
/// # Errors
/// If it cannot be asked.
pub(crate) async fn models(server: &mut Server) -> Result<Vec<Model>, Failure> {
    let answer = cluster(server.connect().await?).list_models(ListModelsRequest {}).await;
    Ok(answer.map_err(|status| Failure::status(&status))?.into_inner().models)
}

/// Prints the models of a server.
///
/// # Errors
/// If it cannot be asked.
pub(crate) async fn list_models(mut server: Server, as_json: bool) -> Result<(), Failure> {
    let models = models(&mut server).await?;
    if as_json {
        return output::line(json!({ "models": models.iter().map(json::model).collect::<Vec<_>>() }));
    }
    let mut rows = vec![row(["NAME", "BRAINS", "HANDS", "FAMILIES", "SIZES", "STEPS", "SAMPLERS", "DESCRIPTION"])];
    rows.extend(models.iter().map(|model| {
        let mut sizes: Vec<_> = model.sizes.iter().map(json::size).collect();
        sizes.extend(
            model.size_range.map(|range| format!("{}..{} by {}", range.min_side, range.max_side, range.multiple)),
        );
        vec![
            model.name.clone(),
            model.live_brains.to_string(),
            model.live_hands.to_string(),
            format!("{} -> {}", model.brain_family, model.hand_family),
            sizes.join(","),
            format!("{} (<= {})", model.default_steps, model.max_steps),
            model.samplers.join(","),
            model.description.clone(),
        ]
    }));
    output::line(output::table(&rows))
}

/// The live workers of a server.
///
/// # Errors
/// If it cannot be asked.
pub(crate) async fn workers(server: &mut Server) -> Result<Vec<Worker>, Failure> {
    let answer = cluster(server.connect().await?).list_workers(ListWorkersRequest {}).await;
    Ok(answer.map_err(|status| Failure::status(&status))?.into_inner().workers)
}

/// Prints the live workers of a server.
///
/// # Errors
/// If it cannot be asked.
pub(crate) async fn list_workers(mut server: Server, as_json: bool) -> Result<(), Failure> {
    let workers = workers(&mut server).await?;
    if as_json {
        return output::line(json!({ "workers": workers.iter().map(json::worker).collect::<Vec<_>>() }));
    }
    output::line(worker_table(&workers))
}

/// Workers as a table.
pub(crate) fn worker_table(workers: &[Worker]) -> String {
    let mut rows = vec![row(["ID", "ROLE", "STATE", "MODELS", "DEVICES", "IN HAND", "BUSY", "HOST", "PID"])];
    rows.extend(workers.iter().map(|worker| {
        let models: Vec<_> = worker.models.iter().map(|model| model.name.as_str()).collect();
        let simulated = if worker.simulated { " (simulated)" } else { "" };
        vec![
            worker.id.clone(),
            json::role(worker.role()),
            json::worker_state(worker.state()),
            format!("{}{simulated}", models.join(",")),
            worker.devices.join(","),
            format!("{} of {}", worker.in_flight, worker.capacity),
            worker.time.map_or_else(|| "-".to_owned(), |time| percent(time.utilisation)),
            worker.host.clone(),
            worker.pid.to_string(),
        ]
    }));
    output::table(&rows)
}

/// A server's status.
///
/// # Errors
/// If it cannot be asked.
pub(crate) async fn status(server: &mut Server) -> Result<GetStatusResponse, Failure> {
    let answer = cluster(server.connect().await?).get_status(GetStatusRequest {}).await;
    Ok(answer.map_err(|status| Failure::status(&status))?.into_inner())
}

/// Prints a server's status.
///
/// # Errors
/// If it cannot be asked.
pub(crate) async fn show_status(mut server: Server, as_json: bool) -> Result<(), Failure> {
    let status = status(&mut server).await?;
    if as_json {
        return output::line(json::status(&status));
    }
    output::line(status_text(&status))
}

/// A status as a person reads it.
pub(crate) fn status_text(status: &GetStatusResponse) -> String {
    let mut stages = vec![row(["STAGE", "MODEL", "WORKERS", "ADVISED", "IN HAND", "BUSY", "BACKLOG"])];
    stages.extend(status.stages.iter().map(|stage| {
        vec![
            json::role(stage.role()),
            stage.model.clone(),
            stage.workers.to_string(),
            stage.advised_workers.to_string(),
            format!("{} of {}", stage.in_flight, stage.capacity),
            percent(stage.utilisation),
            format!("{:.1} s", stage.backlog_seconds),
        ]
    }));
    let mut queues = vec![row(["QUEUE", "WAITING", "IN HAND", "CAPACITY", "OLDEST"])];
    queues.extend(status.queues.iter().map(|queue| {
        vec![
            queue.name.clone(),
            queue.ready.to_string(),
            queue.leased.to_string(),
            queue.capacity.to_string(),
            format!("{:.1} s", queue.oldest_age_seconds),
        ]
    }));
    format!(
        "version {}, queue {}, {} workers, {} open streams\n\n{}\n\n{}",
        status.version,
        status.bus,
        status.workers,
        status.open_streams,
        output::table(&stages),
        output::table(&queues)
    )
}

fn percent(part: f64) -> String {
    format!("{:.0} %", part * 100.0)
}

fn row<const N: usize>(cells: [&str; N]) -> Vec<String> {
    cells.map(str::to_owned).to_vec()
}
