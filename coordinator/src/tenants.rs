//! On whose account work is done: shares, and limits that keep one tenant from taking what others need.

use std::{
    collections::{BTreeMap, HashMap},
    str::FromStr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use efferent_proto::{ApiError, names, v1::ErrorCode};
use serde::{Deserialize, Serialize};

/// What a tenant may have. A single request in the batch lane is not an item of a batch: it goes to the queue at once, has no part in the shares,
/// and of these limits only `rate` and the open streams of `running` hold for it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Terms {
    /// Share of the hands when several tenants' batches wait, in proportion to the others'. Default 1.
    pub weight: f64,
    /// Most items that wait in its batches when one is submitted. A coordinator submits one after the other, so that they do not go over it
    /// together; other coordinators may at the same moment. Items that get another try are not refused.
    pub queued: u64,
    /// Most items of its batches that are worked on at once; and apart from those, most event streams it has open at a coordinator.
    pub running: usize,
    /// Most requests a second at a coordinator; so many may come at once. A batch counts as one.
    pub rate: f64,
}

impl Default for Terms {
    fn default() -> Self {
        Self { weight: 1.0, queued: u64::MAX, running: usize::MAX, rate: f64::INFINITY }
    }
}

/// Everyone's terms. Written as `studio weight=4 queued=200000; * running=64 rate=20`: names are separated by semicolons, `*` stands for
/// whoever is not named.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Tenants {
    named: BTreeMap<String, Terms>,
    others: Terms,
    text: String,
}

impl Tenants {
    /// A tenant's terms.
    pub fn terms(&self, tenant: &str) -> Terms {
        self.named.get(tenant).copied().unwrap_or(self.others)
    }
}

impl FromStr for Terms {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut terms = Self::default();
        for pair in text.split_whitespace() {
            let wrong = |why: &str| format!("{pair:?} {why}");
            let (key, value) = pair.split_once('=').ok_or_else(|| wrong("is not KEY=VALUE"))?;
            let number: f64 = value.parse().map_err(|_| wrong("has no number"))?;
            if !(number.is_finite() && number > 0.0) {
                return Err(wrong("must be above 0"));
            }
            match key {
                "weight" => terms.weight = number,
                "queued" => terms.queued = number as u64,
                "running" => terms.running = (number as usize).max(1),
                "rate" => terms.rate = number,
                _ => return Err(wrong("is not one of weight, queued, running, rate")),
            }
        }
        Ok(terms)
    }
}

impl TryFrom<String> for Tenants {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let mut tenants = Self { text: text.clone(), ..Self::default() };
        for entry in text.split(';').map(str::trim).filter(|entry| !entry.is_empty()) {
            let (name, terms) = entry.split_once(char::is_whitespace).unwrap_or((entry, ""));
            let terms = terms.parse()?;
            match name {
                "*" => tenants.others = terms,
                name if names::is_name(name) => drop(tenants.named.insert(name.to_owned(), terms)),
                name => return Err(format!("{name:?} is not a tenant's name: 1 to 64 of a-z, 0-9, - and _")),
            }
        }
        Ok(tenants)
    }
}

impl From<Tenants> for String {
    fn from(tenants: Tenants) -> Self {
        tenants.text
    }
}

/// The tenant of a request or batch.
///
/// # Errors
/// If it is not a name.
pub fn named(tenant: &str) -> Result<&str, ApiError> {
    match tenant {
        "" => Ok(names::DEFAULT_TENANT),
        name if names::is_name(name) => Ok(name),
        _ => {
            let message = "tenant must be 1 to 64 of a-z, 0-9, - and _";
            Err(ApiError::new(ErrorCode::InvalidField, message).field("tenant"))
        }
    }
}

/// A quota that is used up.
pub(crate) fn over(tenant: &str, quota: &str, limit: impl ToString, message: String, retry: Duration) -> ApiError {
    metrics::counter!("efferent_quota_refusals_total", "quota" => quota.to_owned()).increment(1);
    ApiError::new(ErrorCode::QuotaExceeded, format!("tenant {tenant}: {message}"))
        .field(quota)
        .limit(limit.to_string())
        .retry_after(retry)
}

/// What this coordinator admits. Clones share it.
#[derive(Debug, Clone)]
pub struct Gate {
    tenants: Tenants,
    used: Arc<Mutex<HashMap<String, Used>>>,
}

#[derive(Debug)]
struct Used {
    streams: usize,
    /// Requests that may come now, and since when that is so.
    allowed: f64,
    since: Instant,
}

/// A stream that counts until it is dropped.
#[derive(Debug)]
pub struct Stream {
    tenant: String,
    used: Arc<Mutex<HashMap<String, Used>>>,
}

impl Drop for Stream {
    fn drop(&mut self) {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(used) = used.get_mut(&self.tenant) {
            used.streams -= 1;
        }
    }
}

/// Tenants of which this much is remembered before those that are idle are forgotten.
const REMEMBERED: usize = 10_000;

impl Gate {
    /// One that keeps to these terms.
    pub fn new(tenants: Tenants) -> Self {
        Self { tenants, used: Arc::default() }
    }

    /// A tenant's terms.
    pub fn terms(&self, tenant: &str) -> Terms {
        self.tenants.terms(tenant)
    }

    /// Admits a request.
    ///
    /// # Errors
    /// If the tenant's rate is used up; with the time after which it is not.
    pub fn request(&self, tenant: &str) -> Result<(), ApiError> {
        self.request_at(tenant, Instant::now())
    }

    fn request_at(&self, tenant: &str, now: Instant) -> Result<(), ApiError> {
        let rate = self.terms(tenant).rate;
        if rate.is_infinite() {
            return Ok(());
        }
        self.with(tenant, now, |used| {
            let passed = now.saturating_duration_since(used.since).as_secs_f64();
            // As many at once as come in a second, and one at least.
            (used.allowed, used.since) = ((used.allowed + passed * rate).min(rate.max(1.0)), now);
            if used.allowed >= 1.0 {
                used.allowed -= 1.0;
                return Ok(());
            }
            let retry = Duration::from_secs_f64((1.0 - used.allowed) / rate);
            Err(over(tenant, "rate", rate, format!("more than {rate} requests a second"), retry))
        })
    }

    /// Admits an event stream, which counts until it is dropped.
    ///
    /// # Errors
    /// If the tenant has as many open as it may.
    pub fn stream(&self, tenant: &str) -> Result<Stream, ApiError> {
        let most = self.terms(tenant).running;
        self.with(tenant, Instant::now(), |used| {
            if used.streams >= most {
                let message = format!("{most} requests are open at this coordinator");
                return Err(over(tenant, "running", most, message, Duration::from_secs(1)));
            }
            used.streams += 1;
            Ok(Stream { tenant: tenant.to_owned(), used: self.used.clone() })
        })
    }

    fn with<T>(&self, tenant: &str, now: Instant, change: impl FnOnce(&mut Used) -> T) -> T {
        let mut all = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() >= REMEMBERED && !all.contains_key(tenant) {
            // A bucket is full again after a second.
            let idle = |used: &Used| used.streams == 0 && now.duration_since(used.since) > Duration::from_secs(1);
            all.retain(|_, used| !idle(used));
        }
        let full = self.terms(tenant).rate.max(1.0);
        change(all.entry(tenant.to_owned()).or_insert(Used { streams: 0, allowed: full, since: now }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terms_are_read_and_told_again() {
        let text = "studio weight=4 queued=200000; * running=64 rate=20;";
        let tenants = Tenants::try_from(text.to_owned()).unwrap();
        assert_eq!(tenants.terms("studio"), Terms { weight: 4.0, queued: 200_000, ..Terms::default() });
        assert_eq!(tenants.terms("someone"), Terms { running: 64, rate: 20.0, ..Terms::default() });
        assert_eq!(String::from(tenants), text);
        for (wrong, why) in [
            ("A b=1", "not one of"),
            ("Studio weight=1", "not a tenant's name"),
            ("a weight", "KEY=VALUE"),
            ("a weight=0", "above 0"),
            ("a rate=NaN", "above 0"),
            ("a rate=x", "no number"),
        ] {
            let error = Tenants::try_from(wrong.to_owned()).unwrap_err();
            assert!(error.contains(why), "{wrong}: {error}");
        }
    }

    #[test]
    fn a_rate_is_kept_on_average_and_tells_when_to_come_again() {
        let gate = Gate::new(Tenants::try_from("a rate=2".to_owned()).unwrap());
        let start = Instant::now();
        let at = |seconds: f64| gate.request_at("a", start + Duration::from_secs_f64(seconds));
        assert!(at(0.0).is_ok() && at(0.0).is_ok());
        let refused = at(0.1).unwrap_err();
        assert_eq!((refused.code, refused.field.as_str()), (ErrorCode::QuotaExceeded, "rate"));
        let retry = refused.retry_after.unwrap().as_secs_f64();
        assert!((retry - 0.4).abs() < 1e-6, "{retry}");
        assert!(at(0.1 + retry + 1e-6).is_ok());
        let admitted = (0..1000).filter(|tenth| at(1.0 + f64::from(*tenth) / 10.0).is_ok()).count();
        assert!((199..=203).contains(&admitted), "{admitted} in 100 s");
        assert!(gate.request("b").is_ok(), "others are not touched");
    }

    #[test]
    fn streams_count_until_they_are_closed() {
        let gate = Gate::new(Tenants::try_from("* running=2".to_owned()).unwrap());
        let held = (gate.stream("a").unwrap(), gate.stream("a").unwrap());
        assert_eq!(gate.stream("a").unwrap_err().field, "running");
        assert!(gate.stream("b").is_ok());
        drop(held);
        assert!(gate.stream("a").is_ok());
    }
}
