//! Spans of ours to a collector of OpenTelemetry.

use std::{sync::OnceLock, time::SystemTime};

use opentelemetry::{
    InstrumentationScope, KeyValue,
    trace::{SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState},
};
use opentelemetry_otlp::{SpanExporter, WithExportConfig as _};
use opentelemetry_sdk::{
    Resource,
    trace::{BatchSpanProcessor, SpanData, SpanEvents, SpanLinks, SpanProcessor as _},
};

use super::Context;
use crate::telemetry::Error;

static PROCESSOR: OnceLock<BatchSpanProcessor> = OnceLock::new();

/// What sends spans to a collector, in batches, from a thread of its own. Dropping it sends those that wait.
#[derive(Debug)]
pub struct Exporter(());

impl Exporter {
    /// An exporter that tells the collector that the spans are those of `service`. Once a process, with a runtime around it. The collector need not
    /// be there: spans that cannot be sent are dropped.
    ///
    /// # Errors
    /// If the address is malformed, or there is an exporter.
    pub fn new(collector: &str, service: &str) -> Result<Self, Error> {
        let fault = |why: String| Error::Exporter { collector: collector.to_owned(), why };
        if tokio::runtime::Handle::try_current().is_err() {
            return Err(fault("there is no runtime to send them from".to_owned()));
        }
        let exporter = SpanExporter::builder().with_tonic().with_endpoint(collector).build();
        let exporter = exporter.map_err(|error| fault(error.to_string()))?;
        let mut processor = BatchSpanProcessor::builder(exporter).build();
        processor.set_resource(&Resource::builder().with_service_name(service.to_owned()).build());
        PROCESSOR.set(processor).map_err(|_| fault("spans of this process are exported already".to_owned()))?;
        Ok(Self(()))
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        if let Some(Err(error)) = PROCESSOR.get().map(|processor| processor.shutdown()) {
            tracing::warn!(%error, "the last spans could not be exported");
        }
    }
}

/// See [`Context::tell`].
pub(super) fn tell(
    context: &Context,
    name: &'static str,
    times: (SystemTime, SystemTime),
    about: &[(&'static str, &str)],
) {
    let Some(processor) = PROCESSOR.get() else { return };
    let span_id = |text: &str| SpanId::from_hex(text).unwrap_or(SpanId::INVALID);
    let flags = TraceFlags::new(u8::from_str_radix(&context.flags, 16).unwrap_or(0));
    if !flags.is_sampled() {
        return;
    }
    let trace_id = TraceId::from_hex(&context.trace_id).unwrap_or(TraceId::INVALID);
    processor.on_end(SpanData {
        span_context: SpanContext::new(trace_id, span_id(&context.span_id), flags, false, TraceState::default()),
        parent_span_id: context.parent.as_deref().map_or(SpanId::INVALID, span_id),
        parent_span_is_remote: true,
        span_kind: SpanKind::Internal,
        name: name.into(),
        start_time: times.0,
        end_time: times.1,
        attributes: about.iter().map(|(key, value)| KeyValue::new(*key, (*value).to_owned())).collect(),
        dropped_attributes_count: 0,
        events: SpanEvents::default(),
        links: SpanLinks::default(),
        status: Status::Unset,
        instrumentation_scope: InstrumentationScope::builder("efferent")
            .with_version(env!("CARGO_PKG_VERSION"))
            .build(),
    });
}
