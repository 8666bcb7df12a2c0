//! Whether the server is fit: its version, and that it took every setting that was asked of it.

use std::time::Duration;

use async_nats::jetstream::{
    self,
    context::{CreateStreamError, CreateStreamErrorKind},
    kv::Store,
    stream::{self, DiscardPolicy, Republish, StorageType, Stream},
};
use efferent_proto::names;

use super::{Options, fault};
use crate::{Bucket, Error, MAX_VALUE, Result};

/// The oldest server that refuses what it does not know, counts pending tasks right after a purge, and has per-message time-to-live.
const OLDEST_SERVER: (u32, u32) = (2, 12);
/// How long a deleted or expired key leaves a mark, so that watchers hear of it.
pub(super) const MARKER: Duration = Duration::from_secs(60);

pub(super) fn check_version(version: &str) -> Result<()> {
    let mut numbers = version.split(['.', '-']).map(|part| part.parse::<u32>().unwrap_or(0));
    let found = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if found >= OLDEST_SERVER {
        return Ok(());
    }
    Err(Error::Unfit(format!(
        "nats-server {version} is too old: {}.{} or later is needed (older ones silently ignore settings)",
        OLDEST_SERVER.0, OLDEST_SERVER.1
    )))
}

/// Makes or updates a stream, and compares what came back with what was asked.
pub(super) async fn make_stream(context: &jetstream::Context, config: stream::Config) -> Result<Stream> {
    let name = config.name.clone();
    let what = format!("making stream {name}");
    let got = match context.create_or_update_stream(config.clone()).await {
        Ok(info) => info.config,
        Err(error) if is_unfit(&error) => {
            return Err(Error::Unfit(format!("the NATS server cannot hold stream {name}: {error}")));
        }
        Err(error) => return Err(Error::unavailable(what, error)),
    };
    refuse_differences("stream", &name, &differences(&got, &config))?;
    context.get_stream(&name).await.map_err(fault(what))
}

/// Whether trying again is in vain: the server cannot hold such a stream, or has one of that name with settings that cannot be changed.
fn is_unfit(error: &CreateStreamError) -> bool {
    let refused = match error.kind() {
        CreateStreamErrorKind::JetStream(error) => error.error_code() == jetstream::ErrorCode::STREAM_INVALID_CONFIG,
        _ => false,
    };
    refused
        || ["insufficient resources", "JetStream not enabled", "not supported in non-clustered mode"]
            .iter()
            .any(|unfit| error.to_string().contains(unfit))
}

/// Which settings of a stream are not as they were asked for.
fn differences(got: &stream::Config, config: &stream::Config) -> [(&'static str, bool); 15] {
    [
        ("subjects", got.subjects != config.subjects),
        ("retention", got.retention != config.retention),
        ("storage", got.storage != config.storage),
        ("replicas", got.num_replicas != config.num_replicas.max(1)),
        ("discard", got.discard != config.discard),
        ("max_msgs", config.max_messages > 0 && got.max_messages != config.max_messages),
        (
            "max_msgs_per_subject",
            config.max_messages_per_subject > 0 && got.max_messages_per_subject != config.max_messages_per_subject,
        ),
        ("max_msg_size", config.max_message_size > 0 && got.max_message_size != config.max_message_size),
        ("duplicate_window", !config.duplicate_window.is_zero() && got.duplicate_window != config.duplicate_window),
        ("allow_msg_ttl", got.allow_message_ttl != config.allow_message_ttl),
        ("subject_delete_marker_ttl", got.subject_delete_marker_ttl != config.subject_delete_marker_ttl),
        ("allow_direct", got.allow_direct != config.allow_direct),
        ("allow_rollup_hdrs", got.allow_rollup != config.allow_rollup),
        ("deny_delete", got.deny_delete != config.deny_delete),
        ("republish", got.republish != config.republish),
    ]
}

pub(super) fn refuse_differences(kind: &str, name: &str, differs: &[(&str, bool)]) -> Result<()> {
    let names: Vec<&str> = differs.iter().filter(|(_, differs)| *differs).map(|(name, _)| *name).collect();
    if names.is_empty() {
        return Ok(());
    }
    Err(Error::Unfit(format!("{kind} {name}: the NATS server did not take these settings: {}", names.join(", "))))
}

/// Makes or updates a key-value bucket. Copies of one answer reads only if there is a single one: in a cluster, a copy may be behind its leader, and
/// a value that was just written would not be found.
pub(super) async fn make_bucket(context: &jetstream::Context, options: &Options, bucket: Bucket) -> Result<Store> {
    let name = format!("{}-{}", options.prefix, bucket.name());
    let stored = names::job_stored("{{wildcard(1)}}");
    let republish = (bucket == Bucket::Jobs).then(|| Republish {
        source: format!("$KV.{name}.*"),
        destination: format!("{}.{stored}", options.prefix),
        headers_only: false,
    });
    let config = stream::Config {
        name: format!("KV_{name}"),
        republish,
        subjects: vec![format!("$KV.{name}.>")],
        storage: StorageType::File,
        discard: DiscardPolicy::New,
        num_replicas: options.replicas,
        max_messages_per_subject: 1,
        max_message_size: i32::try_from(MAX_VALUE + 4096).unwrap_or(i32::MAX),
        allow_rollup: true,
        deny_delete: true,
        allow_direct: options.replicas <= 1,
        allow_message_ttl: true,
        subject_delete_marker_ttl: Some(MARKER),
        ..Default::default()
    };
    make_stream(context, config).await?;
    context.get_key_value(&name).await.map_err(fault(format!("making bucket {name}")))
}

#[cfg(test)]
mod tests {
    use async_nats::jetstream::stream::RetentionPolicy;

    use super::*;

    #[test]
    fn a_setting_that_was_not_taken_is_refused_by_its_name() {
        let wanted = stream::Config {
            subjects: vec!["a.>".to_owned()],
            num_replicas: 1,
            max_messages: 10,
            max_messages_per_subject: 1,
            max_message_size: 1000,
            duplicate_window: MARKER,
            ..Default::default()
        };
        let refused = |got: &stream::Config| refuse_differences("stream", "test", &differences(got, &wanted));
        refused(&wanted).expect("all as asked");
        let republish = || Republish { source: "a".to_owned(), destination: "b".to_owned(), headers_only: false };
        let others = [
            ("subjects", stream::Config { subjects: Vec::new(), ..wanted.clone() }),
            ("retention", stream::Config { retention: RetentionPolicy::WorkQueue, ..wanted.clone() }),
            ("storage", stream::Config { storage: StorageType::Memory, ..wanted.clone() }),
            ("replicas", stream::Config { num_replicas: 3, ..wanted.clone() }),
            ("discard", stream::Config { discard: DiscardPolicy::New, ..wanted.clone() }),
            ("max_msgs", stream::Config { max_messages: -1, ..wanted.clone() }),
            ("max_msgs_per_subject", stream::Config { max_messages_per_subject: -1, ..wanted.clone() }),
            ("max_msg_size", stream::Config { max_message_size: -1, ..wanted.clone() }),
            ("duplicate_window", stream::Config { duplicate_window: MARKER * 2, ..wanted.clone() }),
            ("allow_msg_ttl", stream::Config { allow_message_ttl: true, ..wanted.clone() }),
            ("subject_delete_marker_ttl", stream::Config { subject_delete_marker_ttl: Some(MARKER), ..wanted.clone() }),
            ("allow_direct", stream::Config { allow_direct: true, ..wanted.clone() }),
            ("allow_rollup_hdrs", stream::Config { allow_rollup: true, ..wanted.clone() }),
            ("deny_delete", stream::Config { deny_delete: true, ..wanted.clone() }),
            ("republish", stream::Config { republish: Some(republish()), ..wanted.clone() }),
        ];
        assert_eq!(others.len(), differences(&wanted, &wanted).len(), "each setting has its turn");
        for (name, got) in others {
            match refused(&got) {
                Err(Error::Unfit(message)) => assert!(message.ends_with(&format!(": {name}")), "{message}"),
                other => panic!("{name}: {other:?}"),
            }
        }
    }
}
