//! Conversions between protobuf's and Rust's times.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Milliseconds since 1970 of a moment; 0 for moments before it.
pub fn unix_ms(time: SystemTime) -> i64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |d| i64::try_from(d.as_millis()).unwrap_or(i64::MAX))
}

/// The moment that lies `ms` milliseconds after the start of 1970; negative values count as 0.
pub fn from_unix_ms(ms: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(ms.try_into().unwrap_or(0))
}

/// Protobuf's form of a moment.
pub fn timestamp(time: SystemTime) -> prost_types::Timestamp {
    prost_types::Timestamp::from(time)
}

/// A moment from its protobuf form; moments that cannot be represented become the start of 1970.
pub fn system_time(timestamp: &prost_types::Timestamp) -> SystemTime {
    SystemTime::try_from(*timestamp).unwrap_or(UNIX_EPOCH)
}

/// Protobuf's form of a duration; durations beyond 10,000 years are cut there.
pub fn proto_duration(duration: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: duration.as_secs().min(315_576_000_000) as i64,
        nanos: duration.subsec_nanos() as i32,
    }
}

/// A duration from its protobuf form; `None` if it is negative or malformed.
pub fn duration(duration: &prost_types::Duration) -> Option<Duration> {
    Duration::try_from(*duration).ok()
}
