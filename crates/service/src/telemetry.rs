//! Logs, metrics and traces of a process.

use std::sync::OnceLock;

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use serde::{Deserialize, Serialize};
use tracing_subscriber::{EnvFilter, Layer as _, layer::SubscriberExt as _, util::SubscriberInitExt as _};

use crate::{meters, trace};

/// How a process tells what it does.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// Which log lines to write, in the form of `tracing`'s directives ("info", "efferent_hand=debug,warn"). Default "info".
    pub filter: String,
    /// Form of log lines. Default `text`.
    pub format: Format,
    /// Collector of OpenTelemetry that gets traces (OTLP over gRPC): `http://host:4317`. Empty for none, which is the default.
    pub otlp: String,
}

/// Form of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

impl Default for Options {
    fn default() -> Self {
        Self { filter: "info".to_owned(), format: Format::Text, otlp: String::new() }
    }
}

/// Why telemetry could not be started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The filter is malformed.
    #[error("log filter {filter:?} is malformed")]
    Filter {
        /// As given.
        filter: String,
        /// The cause.
        #[source]
        source: tracing_subscriber::filter::ParseError,
    },
    /// Traces cannot be exported.
    #[error("traces cannot be exported to {collector:?}: {why}")]
    Exporter {
        /// As given.
        collector: String,
        /// Why not.
        why: String,
    },
    /// A logger or a metrics recorder is installed already.
    #[error("telemetry is installed already: {0}")]
    Installed(String),
}

/// What keeps telemetry going. Dropping it sends the spans that still wait.
#[derive(Debug)]
pub struct Telemetry {
    /// What `/metrics` is rendered from.
    pub metrics: PrometheusHandle,
    #[expect(dead_code, reason = "held for what its drop does")]
    exporter: Option<trace::Exporter>,
}

/// Starts logs (to stderr), metrics and, if asked for, the export of traces as those of `service`. Once a process, and with an
/// exporter inside a runtime.
///
/// # Errors
/// If the filter or the collector's address is malformed, or telemetry was started before.
pub fn init(options: &Options, service: &str) -> Result<Telemetry, Error> {
    let filter = EnvFilter::try_new(&options.filter)
        .map_err(|source| Error::Filter { filter: options.filter.clone(), source })?;
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let lines = match options.format {
        Format::Text => lines.boxed(),
        Format::Json => lines.json().flatten_event(true).boxed(),
    };
    let exporter = match options.otlp.as_str() {
        "" => None,
        collector => Some(trace::Exporter::new(collector, service)?),
    };
    let registry = tracing_subscriber::registry().with(lines.with_filter(filter));
    registry.try_init().map_err(|error| Error::Installed(error.to_string()))?;
    Ok(Telemetry { metrics: metrics()?, exporter })
}

/// Starts metrics without logs; the same recorder each time.
///
/// # Errors
/// If another library's recorder is installed.
pub fn metrics() -> Result<PrometheusHandle, Error> {
    static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();
    if let Some(handle) = HANDLE.get() {
        return Ok(handle.clone());
    }
    // From a no-op stage on a fast machine to a long render on a slow one.
    let seconds: Vec<f64> = (-12..=8).map(|exponent| 2f64.powi(exponent)).collect();
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &seconds)
        .and_then(|builder| {
            builder.set_buckets_for_metric(Matcher::Suffix("_batch_size".to_owned()), &[1., 2., 4., 8., 16., 32., 64.])
        })
        .and_then(PrometheusBuilder::install_recorder)
        .map_err(|error| Error::Installed(error.to_string()))?;
    meters::describe();
    metrics::gauge!("efferent_build_info", "version" => env!("CARGO_PKG_VERSION")).set(1.0);
    Ok(HANDLE.get_or_init(|| handle).clone())
}
