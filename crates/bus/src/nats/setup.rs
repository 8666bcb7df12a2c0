//! Whether the server is fit: its version, and that it took every setting that was asked of it.

use std::time::Duration;

use async_nats::jetstream::{
    self,
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
        Err(error)
            if ["insufficient resources", "JetStream not enabled", "not supported in non-clustered mode"]
                .iter()
                .any(|unfit| error.to_string().contains(unfit)) =>
        {
            return Err(Error::Unfit(format!("the NATS server cannot hold stream {name}: {error}")));
        }
        Err(error) => return Err(Error::unavailable(what, error)),
    };
    let differs = [
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
        ("duplicate_window", !config.duplicate_window.is_zero() && got.duplicate_window != config.duplicate_window),
        ("allow_msg_ttl", got.allow_message_ttl != config.allow_message_ttl),
        ("subject_delete_marker_ttl", got.subject_delete_marker_ttl != config.subject_delete_marker_ttl),
        ("allow_direct", got.allow_direct != config.allow_direct),
        ("allow_rollup_hdrs", got.allow_rollup != config.allow_rollup),
        ("republish", got.republish != config.republish),
    ];
    refuse_differences("stream", &name, &differs)?;
    context.get_stream(&name).await.map_err(fault(what))
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
