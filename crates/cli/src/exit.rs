//! How the command ends: exit codes, and one line that says why.

use std::{error::Error as _, process::ExitCode};

use efferent_proto::{
    ApiError,
    v1::{ErrorCode, JobState},
};
use serde_json::json;
use tonic::Status;
use tonic_types::StatusExt as _;

use crate::output;

/// Exit codes other than 0. The numbers are part of the interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// The job failed, or something of ours is at fault.
    Failed = 1,
    /// The command line is malformed.
    Usage = 2,
    /// The request is refused: a field, a limit, a signal of another space, something unknown.
    Refused = 3,
    /// The server, a worker or the queue cannot be had now. Trying again may help.
    Unavailable = 4,
    /// The job was cancelled.
    Cancelled = 5,
    /// The job's deadline passed.
    Expired = 6,
    /// The configuration is wrong. Nothing was started.
    Config = 64,
    /// The brain's weights cannot be fetched.
    #[cfg_attr(
        not(any(feature = "local", test)),
        expect(dead_code, reason = "a client fetches nothing; the table tells of it all the same")
    )]
    Fetch = 69,
    /// The engine of a worker hung.
    #[cfg_attr(
        not(any(feature = "local", test)),
        expect(dead_code, reason = "a client computes nothing; the table tells of it all the same")
    )]
    Hung = 70,
    /// A file cannot be read or written.
    File = 74,
    /// Ctrl-C.
    Interrupted = 130,
}

/// The table in `--help`.
pub(crate) const HELP: &str = "\
Exit codes:
    0  done
    1  the job failed, or an internal fault
    2  malformed command line
    3  refused: a field or limit of the request, a signal of another space, an unknown model, job, image, batch or signal
    4  not available now (no server, no worker, queue full, a device that is held): trying again may help
    5  the job was cancelled
    6  the job's deadline passed
   64  wrong configuration (file, environment, model folder); nothing was started
   69  weights could not be fetched
   70  a worker's engine hung: it is to be started again
   74  a file could not be read or written
  130  Ctrl-C";

/// Why the command ends early.
#[derive(Debug)]
pub(crate) enum Failure {
    /// To be told to the caller.
    Told {
        /// The exit code.
        exit: Exit,
        /// Why.
        error: anyhow::Error,
    },
    /// Nobody reads our output any more: nothing to say, and no fault.
    Pipe,
}

impl Failure {
    /// A failure with an exit code.
    pub(crate) fn new(exit: Exit, error: impl Into<anyhow::Error>) -> Self {
        Self::Told { exit, error: error.into() }
    }

    /// A failure in words.
    pub(crate) fn words(exit: Exit, message: impl Into<String>) -> Self {
        Self::new(exit, anyhow::Error::msg(message.into()))
    }

    /// What a call was answered with, if not with what was asked for.
    pub(crate) fn status(status: &Status) -> Self {
        if is_ours(status) {
            return ApiError::from(status).into();
        }
        let mut causes = vec![format!("the server cannot be reached or broke off ({:?})", status.code())];
        if !status.message().is_empty() {
            causes.push(status.message().to_owned());
        }
        let mut source = status.source();
        while let Some(error) = source {
            causes.push(error.to_string());
            source = error.source();
        }
        // Transports tell the same cause several times over.
        causes.dedup();
        Self::words(Exit::Unavailable, causes.join(": "))
    }

    /// A job that ended without all of its images.
    pub(crate) fn job(job_id: &str, state: JobState, error: &ApiError) -> Self {
        let (exit, what) = match state {
            JobState::Cancelled => (Exit::Cancelled, "was cancelled"),
            JobState::Expired => (Exit::Expired, "expired"),
            _ => (exit_of(error.code), "failed"),
        };
        Self::new(exit, anyhow::Error::new(error.clone()).context(format!("job {job_id} {what}")))
    }

    /// Why, if it has this exit code.
    #[cfg(feature = "local")]
    pub(crate) fn why(&self, code: Exit) -> Option<String> {
        match self {
            Self::Told { exit, error } if *exit == code => Some(sentence(error)),
            _ => None,
        }
    }

    /// Tells it, and gives the process's exit code.
    pub(crate) fn report(&self, json: bool) -> ExitCode {
        let Self::Told { exit, error } = self else { return ExitCode::SUCCESS };
        output::note(format_args!("efferent: {}", sentence(error)));
        if json {
            let api = error.chain().find_map(|cause| cause.downcast_ref::<ApiError>());
            let object = json!({
                "event": "error",
                "exit_code": *exit as u8,
                "message": sentence(error),
                "code": api.map(ApiError::reason),
                "field": api.map(|api| &api.field).filter(|field| !field.is_empty()),
                "limit": api.map(|api| &api.limit).filter(|limit| !limit.is_empty()),
                "retry_after_seconds": api.and_then(|api| api.retry_after).map(|delay| delay.as_secs_f64()),
            });
            let _ = output::line(object);
        }
        ExitCode::from(*exit as u8)
    }
}

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        Self::new(exit_of(error.code), error)
    }
}

/// Whether a status was written by a coordinator, not by the transport on the way.
pub(crate) fn is_ours(status: &Status) -> bool {
    status.get_error_details().error_info().is_some_and(|info| info.domain == "efferent")
}

fn exit_of(code: ErrorCode) -> Exit {
    match code {
        ErrorCode::InvalidField
        | ErrorCode::LimitExceeded
        | ErrorCode::NotOffered
        | ErrorCode::SpaceMismatch
        | ErrorCode::UnknownModel
        | ErrorCode::UnknownJob
        | ErrorCode::UnknownImage
        | ErrorCode::UnknownBatch
        | ErrorCode::UnknownSignal
        | ErrorCode::IdempotencyConflict
        | ErrorCode::JobFinished
        | ErrorCode::BatchFinished => Exit::Refused,
        ErrorCode::NoWorker
        | ErrorCode::QueueFull
        | ErrorCode::TooManyRequests
        | ErrorCode::QuotaExceeded
        | ErrorCode::DeadlineUnmeetable
        | ErrorCode::BusUnavailable
        | ErrorCode::Stopping => Exit::Unavailable,
        ErrorCode::Cancelled => Exit::Cancelled,
        ErrorCode::Expired => Exit::Expired,
        ErrorCode::Engine | ErrorCode::AttemptsExhausted | ErrorCode::Internal | ErrorCode::Unspecified => Exit::Failed,
    }
}

/// One line: what happened, its causes, and for errors of the API the field, limit and delay.
fn sentence(error: &anyhow::Error) -> String {
    let mut parts: Vec<String> = Vec::new();
    for cause in error.chain() {
        let mut part = cause.to_string();
        if let Some(api) = cause.downcast_ref::<ApiError>() {
            part = format!("{part} ({})", details(api));
        }
        // Libraries repeat their causes, and some print a backtrace below the first line.
        let part = part.lines().next().unwrap_or_default().trim().to_owned();
        if !part.is_empty() && !parts.iter().any(|told| told.contains(&part)) {
            parts.push(part);
        }
    }
    parts.join(": ")
}

fn details(error: &ApiError) -> String {
    let mut details = vec![error.reason().to_owned()];
    if !error.field.is_empty() {
        details.push(format!("field {}", error.field));
    }
    if !error.limit.is_empty() {
        details.push(format!("limit {}", error.limit));
    }
    if let Some(delay) = error.retry_after {
        details.push(format!("try again after {}", humantime::format_duration(delay)));
    }
    details.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_line_with_field_limit_and_delay() {
        let error = ApiError::new(ErrorCode::LimitExceeded, "steps is 0").field("steps").limit("1..=100");
        let failure = Failure::from(error);
        let Failure::Told { exit, error } = &failure else { panic!("is told") };
        assert_eq!(*exit, Exit::Refused);
        assert_eq!(sentence(error), "steps is 0 (LIMIT_EXCEEDED, field steps, limit 1..=100)");

        let status = Status::from(ApiError::new(ErrorCode::NoWorker, "no live hand"));
        let Failure::Told { exit, error } = Failure::status(&status) else { panic!("is told") };
        assert_eq!(exit, Exit::Unavailable);
        assert_eq!(sentence(&error), "no live hand (NO_WORKER, try again after 5s)");

        let status = Status::from(ApiError::new(ErrorCode::SpaceMismatch, "another space").field("model"));
        assert!(matches!(Failure::status(&status), Failure::Told { exit: Exit::Refused, .. }));
    }

    #[test]
    fn the_transport_is_not_mistaken_for_the_server() {
        let status = Status::internal("h2 protocol error");
        assert!(!is_ours(&status));
        assert!(matches!(Failure::status(&status), Failure::Told { exit: Exit::Unavailable, .. }));
    }

    #[test]
    fn help_lists_every_code() {
        use Exit::{Cancelled, Config, Expired, Failed, Fetch, File, Hung, Interrupted, Refused, Unavailable, Usage};
        for exit in [Failed, Usage, Refused, Unavailable, Cancelled, Expired, Config, Fetch, Hung, File, Interrupted] {
            assert!(HELP.lines().any(|line| line.trim_start().starts_with(&format!("{}  ", exit as u8))), "{exit:?}");
        }
    }
}
