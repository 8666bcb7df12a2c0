//! One error for everything a caller can be told, and its total mapping to gRPC and back.

use std::{collections::HashMap, time::Duration};

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::{
    time,
    v1::{self, ErrorCode},
};

const DOMAIN: &str = "efferent";
/// Most bytes of each text of an error. It travels in headers, several times over, and clients take 8 KiB of headers or more; what the
/// caller sent and we repeat may be longer.
const MAX_TEXT: usize = 512;

/// What a caller is told: a code, words, and the field, limit and retry delay where they apply.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// Why.
    pub code: ErrorCode,
    /// In words.
    pub message: String,
    /// The request's field at fault, or empty.
    pub field: String,
    /// The limit or the offer not met, or empty.
    pub limit: String,
    /// After which time a retry makes sense.
    pub retry_after: Option<Duration>,
}

impl ApiError {
    /// An error with the code's usual retry delay, without field and limit.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: clipped(message.into()),
            field: String::new(),
            limit: String::new(),
            retry_after: default_retry(code),
        }
    }

    /// Names the field at fault.
    #[must_use]
    pub fn field(mut self, field: impl Into<String>) -> Self {
        self.field = field.into();
        self
    }

    /// Names the limit.
    #[must_use]
    pub fn limit(mut self, limit: impl Into<String>) -> Self {
        self.limit = clipped(limit.into());
        self
    }

    /// Sets the retry delay.
    #[must_use]
    pub fn retry_after(mut self, delay: Duration) -> Self {
        self.retry_after = Some(delay);
        self
    }

    /// The code's name without prefix: `LIMIT_EXCEEDED`.
    pub fn reason(&self) -> &'static str {
        reason(self.code)
    }
}

fn clipped(mut text: String) -> String {
    if text.len() > MAX_TEXT {
        text.truncate(text.floor_char_boundary(MAX_TEXT - 3));
        text.push_str("...");
    }
    text
}

fn reason(code: ErrorCode) -> &'static str {
    let name = code.as_str_name();
    name.strip_prefix("ERROR_CODE_").unwrap_or(name)
}

fn default_retry(code: ErrorCode) -> Option<Duration> {
    match code {
        ErrorCode::NoWorker => Some(Duration::from_secs(5)),
        ErrorCode::QueueFull | ErrorCode::TooManyRequests | ErrorCode::BusUnavailable => Some(Duration::from_secs(1)),
        ErrorCode::Stopping => Some(Duration::from_millis(100)),
        _ => None,
    }
}

/// The gRPC code of each error code. Total: a new code does not compile until it is mapped.
pub fn grpc_code(code: ErrorCode) -> Code {
    match code {
        ErrorCode::InvalidField | ErrorCode::LimitExceeded | ErrorCode::NotOffered => Code::InvalidArgument,
        ErrorCode::UnknownModel
        | ErrorCode::UnknownJob
        | ErrorCode::UnknownImage
        | ErrorCode::UnknownBatch
        | ErrorCode::UnknownSignal => Code::NotFound,
        ErrorCode::NoWorker | ErrorCode::BusUnavailable | ErrorCode::Stopping => Code::Unavailable,
        ErrorCode::QueueFull
        | ErrorCode::TooManyRequests
        | ErrorCode::QuotaExceeded
        | ErrorCode::DeadlineUnmeetable => Code::ResourceExhausted,
        ErrorCode::IdempotencyConflict => Code::AlreadyExists,
        ErrorCode::JobFinished | ErrorCode::BatchFinished | ErrorCode::SpaceMismatch => Code::FailedPrecondition,
        ErrorCode::Expired => Code::DeadlineExceeded,
        ErrorCode::Cancelled => Code::Cancelled,
        ErrorCode::AttemptsExhausted => Code::Aborted,
        ErrorCode::Engine | ErrorCode::Internal => Code::Internal,
        ErrorCode::Unspecified => Code::Unknown,
    }
}

impl From<ApiError> for Status {
    fn from(error: ApiError) -> Self {
        let mut metadata = HashMap::new();
        if !error.field.is_empty() {
            metadata.insert("field".to_owned(), error.field.clone());
        }
        if !error.limit.is_empty() {
            metadata.insert("limit".to_owned(), error.limit.clone());
        }
        let mut details = ErrorDetails::new();
        details.set_error_info(error.reason(), DOMAIN, metadata);
        if error.retry_after.is_some() {
            details.set_retry_info(error.retry_after);
        }
        if !error.field.is_empty() {
            details.add_bad_request_violation(&error.field, &error.message);
        }
        Status::with_error_details(grpc_code(error.code), error.message, details)
    }
}

impl From<&Status> for ApiError {
    /// Reads back what [`Status::from`] wrote; a status of other origin keeps its message under the nearest code.
    fn from(status: &Status) -> Self {
        let details = status.get_error_details();
        let info = details.error_info().filter(|info| info.domain == DOMAIN);
        let code = info.and_then(|info| ErrorCode::from_str_name(&format!("ERROR_CODE_{}", info.reason))).unwrap_or(
            match status.code() {
                Code::InvalidArgument | Code::OutOfRange => ErrorCode::InvalidField,
                Code::Unavailable => ErrorCode::BusUnavailable,
                Code::Cancelled => ErrorCode::Cancelled,
                Code::DeadlineExceeded => ErrorCode::Expired,
                Code::ResourceExhausted => ErrorCode::TooManyRequests,
                _ => ErrorCode::Internal,
            },
        );
        let metadata = |key: &str| info.and_then(|info| info.metadata.get(key).cloned()).unwrap_or_default();
        Self {
            code,
            message: status.message().to_owned(),
            field: metadata("field"),
            limit: metadata("limit"),
            retry_after: details.retry_info().and_then(|info| info.retry_delay),
        }
    }
}

impl From<ApiError> for v1::Error {
    fn from(error: ApiError) -> Self {
        Self {
            code: error.code.into(),
            message: error.message,
            field: error.field,
            limit: error.limit,
            retry_after: error.retry_after.map(time::proto_duration),
        }
    }
}

impl From<&v1::Error> for ApiError {
    fn from(error: &v1::Error) -> Self {
        Self {
            code: error.code(),
            message: error.message.clone(),
            field: error.field.clone(),
            limit: error.limit.clone(),
            retry_after: error.retry_after.as_ref().and_then(time::duration),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_survives_the_wire() {
        for number in 1.. {
            let Ok(code) = ErrorCode::try_from(number) else {
                assert!(number > 19, "codes are numbered without gaps");
                break;
            };
            let error = ApiError::new(code, "words").field("size.width").limit("96x96");
            let status = Status::from(error.clone());
            assert_ne!(status.code(), Code::Unknown, "{code:?}");
            assert_ne!(status.code(), Code::Ok, "{code:?}");
            assert_eq!(ApiError::from(&status), error);
            assert_eq!(ApiError::from(&v1::Error::from(error.clone())), error);
        }
    }
}
