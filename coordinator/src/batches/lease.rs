//! Which coordinator dispatches: the one that holds a lease in the bus.
//!
//! The lease only keeps coordinators from doing the same work. That two that both believe to hold it do no harm is the compare-and-swap's affair.

use std::time::Duration;

use bytes::Bytes;
use efferent_bus::{Bucket, Result, SharedBus};

/// How long a lease outlives its holder.
const TIME_TO_LIVE: Duration = Duration::from_secs(5);
/// How often it is renewed, and how often the others look whether it is free.
pub(super) const RENEWAL: Duration = Duration::from_secs(1);

/// A lease that is held.
#[derive(Debug)]
pub(super) struct Lease {
    bus: SharedBus,
    name: &'static str,
    revision: u64,
}

impl Lease {
    /// Takes the lease if it is free.
    ///
    /// # Errors
    /// If the bus is unavailable.
    pub(super) async fn take(bus: &SharedBus, name: &'static str) -> Result<Option<Self>> {
        let revision = bus.create(Bucket::Leases, name, holder(), Some(TIME_TO_LIVE)).await?;
        Ok(revision.map(|revision| Self { bus: bus.clone(), name, revision }))
    }

    /// Holds it for another while. False if it is lost.
    ///
    /// # Errors
    /// If the bus is unavailable.
    pub(super) async fn renew(&mut self) -> Result<bool> {
        let renewed = self.bus.swap(Bucket::Leases, self.name, holder(), self.revision, Some(TIME_TO_LIVE)).await?;
        self.revision = renewed.unwrap_or(self.revision);
        Ok(renewed.is_some())
    }

    /// Lets it go, so that another need not wait; unless another has taken it meanwhile, who must keep it.
    pub(super) async fn release(self) {
        let standing = match self.bus.get(Bucket::Leases, self.name).await {
            Ok(standing) => standing,
            Err(error) => return tracing::debug!(%error, "a lease runs out by itself"),
        };
        if standing.is_some_and(|entry| entry.revision == self.revision)
            && let Err(error) = self.bus.delete(Bucket::Leases, self.name).await
        {
            tracing::debug!(%error, "a lease runs out by itself");
        }
    }
}

fn holder() -> Bytes {
    std::process::id().to_string().into()
}
