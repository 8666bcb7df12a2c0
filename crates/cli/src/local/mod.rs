//! What runs in this process: servers, workers, and `generate` without a server.
//!
//! Read in this order: [`locate`] (where model folders are), [`hub`] (those of Hugging Face's hub), [`download`] (which are not here yet), [`fetch`] (the brain's weights), [`devices`] (what is computed on), [`engines`] (from model folder to brain
//! and hand), [`serve`] (`up`, `coordinator`, `brain`, `hand`), [`private`] (`generate` on a queue of its own), [`models`] and [`inspect`] (the
//! commands on model folders).

pub(crate) mod devices;
pub(crate) mod download;
pub(crate) mod engines;
pub(crate) mod fetch;
pub(crate) mod hub;
pub(crate) mod inspect;
pub(crate) mod locate;
pub(crate) mod models;
pub(crate) mod private;
pub(crate) mod serve;

use efferent_service::telemetry::{self, Telemetry};

use crate::{
    exit::{Exit, Failure},
    settings::Settings,
};

/// Starts logs, metrics and traces; to be called inside the runtime.
///
/// # Errors
/// If the filter or an address is malformed.
pub(crate) fn telemetry(settings: &Settings, service: &str, usual_filter: &str) -> Result<Telemetry, Failure> {
    let mut options = settings.local.log.clone();
    if options.filter.is_empty() {
        options.filter = usual_filter.to_owned();
    }
    let telemetry = telemetry::init(&options, service).map_err(|error| Failure::new(Exit::Config, error))?;
    for name in &settings.strangers {
        tracing::warn!(name, "an environment variable looks like a setting and is none");
    }
    Ok(telemetry)
}
