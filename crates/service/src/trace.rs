//! Trace context that travels through queue messages, in the W3C form (`traceparent`), so that the log lines of coordinator, brain
//! and hand about one request carry one trace id, and so do those of a caller that sends its own.
//!
//! Each context is a span: a piece of work, or a wait in a queue. With the cargo feature `otlp` and a collector ([`Exporter`]), [`Context::tell`] sends it there when
//! it is over; without, contexts lead through the logs all the same.

#[cfg(feature = "otlp")]
mod otlp;

use std::{
    collections::BTreeMap,
    hash::{BuildHasher as _, RandomState},
    time::SystemTime,
};

/// Name of the header.
pub const HEADER: &str = "traceparent";

/// Where a piece of work belongs: a trace, and the span that caused it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Context {
    /// 32 hex digits.
    pub trace_id: String,
    /// 16 hex digits.
    pub span_id: String,
    /// 2 hex digits.
    flags: String,
    /// The span that this one is a part of, as far as it is known here.
    parent: Option<String>,
}

impl Context {
    /// A new trace.
    pub fn root() -> Self {
        Self {
            trace_id: format!("{:016x}{:016x}", random(), random()),
            span_id: format!("{:016x}", random()),
            flags: "01".to_owned(),
            parent: None,
        }
    }

    /// Reads a header's value; `None` if it is not of version 00 or malformed.
    pub fn parse(value: &str) -> Option<Self> {
        let mut parts = value.trim().split('-');
        let (version, trace_id, span_id, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let hex =
            |text: &str, length| text.len() == length && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        let given = |text: &str| text.bytes().any(|b| b != b'0');
        (version == "00"
            && parts.next().is_none()
            && hex(trace_id, 32)
            && hex(span_id, 16)
            && hex(flags, 2)
            && given(trace_id)
            && given(span_id))
        .then(|| Self {
            trace_id: trace_id.to_owned(),
            span_id: span_id.to_owned(),
            flags: flags.to_owned(),
            parent: None,
        })
    }

    /// The context in a message's headers.
    pub fn given(headers: &BTreeMap<String, String>) -> Option<Self> {
        headers.get(HEADER).and_then(|value| Self::parse(value))
    }

    /// The context in a message's headers, or a new trace.
    pub fn of(headers: &BTreeMap<String, String>) -> Self {
        Self::given(headers).unwrap_or_else(Self::root)
    }

    /// A span that is a part of this one.
    #[must_use]
    pub fn child(&self) -> Self {
        Self { span_id: format!("{:016x}", random()), parent: Some(self.span_id.clone()), ..self.clone() }
    }

    /// Sends it to the collector, if there is one: it is over.
    pub fn tell(&self, name: &'static str, began: SystemTime, ended: SystemTime, about: &[(&'static str, &str)]) {
        #[cfg(feature = "otlp")]
        otlp::tell(self, name, (began, ended), about);
        #[cfg(not(feature = "otlp"))]
        let _ = (name, began, ended, about);
    }

    /// A header's value.
    pub fn value(&self) -> String {
        format!("00-{}-{}-{}", self.trace_id, self.span_id, self.flags)
    }

    /// Headers that carry it.
    pub fn headers(&self) -> BTreeMap<String, String> {
        BTreeMap::from([(HEADER.to_owned(), self.value())])
    }
}

#[cfg(feature = "otlp")]
pub use otlp::Exporter;

/// What sends spans to a collector; this build has none (cargo feature `otlp`).
#[cfg(not(feature = "otlp"))]
#[derive(Debug)]
pub enum Exporter {}

#[cfg(not(feature = "otlp"))]
impl Exporter {
    /// Refuses: without the feature there is no exporter.
    ///
    /// # Errors
    /// Always.
    pub fn new(collector: &str, _service: &str) -> Result<Self, crate::telemetry::Error> {
        let why = "this program was built without the cargo feature `otlp`".to_owned();
        Err(crate::telemetry::Error::Exporter { collector: collector.to_owned(), why })
    }
}

/// Ids need to differ, not to be secret: the standard library's randomly keyed hasher is enough.
fn random() -> u64 {
    RandomState::new().hash_one(std::thread::current().id()).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn survives_a_message_and_refuses_nonsense() {
        let context = Context::root();
        assert_eq!(Context::of(&context.headers()), context);
        assert_ne!(Context::root().trace_id, context.trace_id);
        assert_eq!(context.child().trace_id, context.trace_id);
        for bad in [
            "",
            "00",
            "00-0-0-0",
            "01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            &context.value().replace('-', "_"),
        ] {
            assert_eq!(Context::parse(bad), None, "{bad}");
        }
    }
}
