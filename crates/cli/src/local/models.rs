//! `efferent models` without a server, and `efferent models fetch`.

use efferent_worker::pipeline::Pipeline;
use serde_json::json;

use crate::{
    exit::Failure,
    local::{
        engines,
        fetch::Fetched,
        locate::{self, SIM},
    },
    output,
    settings::Settings,
};

/// Prints the model folders on this machine.
///
/// # Errors
/// If nobody reads the output.
pub(crate) fn list(settings: &Settings, as_json: bool) -> Result<(), Failure> {
    let shelves = locate::shelves(&settings.local.models);
    let mut objects = Vec::new();
    let mut rows = vec![["NAME", "WEIGHTS", "FOLDER", "DESCRIPTION"].map(str::to_owned).to_vec()];
    for folder in locate::all(&shelves) {
        let shown = folder.display().to_string();
        match Pipeline::open(&folder) {
            Ok(pipeline) => {
                let weights = pipeline.brain_weights(&settings.local.home).unwrap_or_else(|| folder.clone());
                let state = if weights.exists() { "there" } else { "to be fetched" };
                rows.push(vec![
                    pipeline.name().to_owned(),
                    state.to_owned(),
                    shown.clone(),
                    pipeline.description().to_owned(),
                ]);
                objects.push(json!({
                    "name": pipeline.name(),
                    "folder": shown,
                    "description": pipeline.description(),
                    "brain_weights": weights.display().to_string(),
                    "brain_weights_present": weights.exists(),
                    "error": null,
                }));
            }
            Err(error) => {
                rows.push(vec!["?".to_owned(), "-".to_owned(), shown.clone(), error.to_string()]);
                objects.push(json!({ "name": null, "folder": shown, "error": error.to_string() }));
            }
        }
    }
    if as_json {
        return output::line(json!({ "models": objects }));
    }
    if objects.is_empty() {
        let places: Vec<_> = shelves.iter().map(|shelf| shelf.display().to_string()).collect();
        output::note(format_args!("no model folder in {}", places.join(", ")));
    }
    output::line(output::table(&rows))
}

/// Fetches a brain's weights and prints where they are.
///
/// # Errors
/// If the model is not found, or the weights cannot be had.
pub(crate) fn fetch(settings: &Settings, name: Option<&str>) -> Result<(), Failure> {
    let name = name.unwrap_or(&settings.client.model);
    if name == SIM {
        output::note("simulated engines have no weights");
        return Ok(());
    }
    let pipeline = engines::open_or_fetch(settings, name)?;
    if engines::fetch_weights(&pipeline, settings)? == Fetched::Present {
        output::note("the weights are there and right");
    }
    output::line(pipeline.brain_weights(&settings.local.home).unwrap_or_else(|| pipeline.folder().to_owned()).display())
}
