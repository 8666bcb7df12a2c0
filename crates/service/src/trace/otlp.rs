//! Spans of ours to a collector of OpenTelemetry.

use opentelemetry::{
    Context as OtelContext,
    trace::{SpanContext, SpanId, TraceContextExt as _, TraceFlags, TraceId, TraceState, TracerProvider as _},
};
use opentelemetry_otlp::{SpanExporter, WithExportConfig as _};
use opentelemetry_sdk::{Resource, trace::SdkTracerProvider};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use tracing_subscriber::{
    Layer,
    filter::{LevelFilter, Targets},
    registry::LookupSpan,
};

use super::Context;
use crate::telemetry::Error;

/// What sends spans to a collector, in batches, from a thread of its own. Dropping it sends those that wait.
#[derive(Debug)]
pub struct Exporter(SdkTracerProvider);

impl Exporter {
    /// An exporter that tells the collector that the spans are those of `service`. Needs a runtime around it. The collector need not
    /// be there: spans that cannot be sent are dropped.
    ///
    /// # Errors
    /// If the address is malformed.
    pub fn new(collector: &str, service: &str) -> Result<Self, Error> {
        let fault = |why: String| Error::Exporter { collector: collector.to_owned(), why };
        if tokio::runtime::Handle::try_current().is_err() {
            return Err(fault("there is no runtime to send them from".to_owned()));
        }
        let exporter = SpanExporter::builder().with_tonic().with_endpoint(collector).build();
        let exporter = exporter.map_err(|error| fault(error.to_string()))?;
        let resource = Resource::builder().with_service_name(service.to_owned()).build();
        Ok(Self(SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build()))
    }

    /// What feeds it: spans of our crates from `info` up, whatever is logged.
    pub fn layer<S>(&self) -> impl Layer<S> + Send + Sync + use<S>
    where
        S: tracing::Subscriber + for<'span> LookupSpan<'span> + Send + Sync,
    {
        // Not of the libraries: the exporter's own calls would be exported, and so on.
        let ours = Targets::new().with_target("efferent", LevelFilter::INFO);
        tracing_opentelemetry::layer().with_tracer(self.0.tracer("efferent")).with_filter(ours)
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        if let Err(error) = self.0.shutdown() {
            tracing::warn!(%error, "the last spans could not be exported");
        }
    }
}

/// See [`super::adopt`]; `None` if nothing exports the span.
pub(super) fn adopt(span: &Span, parent: Option<&Context>) -> Option<Context> {
    if let Some(parent) = parent {
        let trace_id = TraceId::from_hex(&parent.trace_id).ok()?;
        let span_id = SpanId::from_hex(&parent.span_id).ok()?;
        let flags = TraceFlags::new(u8::from_str_radix(&parent.flags, 16).ok()?);
        let remote = SpanContext::new(trace_id, span_id, flags, true, TraceState::default());
        // Fails if there is no exporter, which is told below.
        let _ = span.set_parent(OtelContext::new().with_remote_span_context(remote));
    }
    let context = span.context();
    let made = context.span().span_context().clone();
    made.is_valid().then(|| Context {
        trace_id: made.trace_id().to_string(),
        span_id: made.span_id().to_string(),
        flags: format!("{:02x}", made.trace_flags().to_u8()),
    })
}
