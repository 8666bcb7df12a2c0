//! Settings of what runs in this process: servers, workers, and `generate` without a server.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use efferent_bus::{ledger, nats};
use efferent_service::telemetry;
use efferent_worker::sim::Curve;
use serde::{Deserialize, Serialize};

/// See the table in [`super::table`] for what each does.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Local {
    pub(crate) home: PathBuf,
    pub(crate) models: String,
    pub(crate) also: String,
    pub(crate) model_memory: u64,
    #[serde(with = "humantime_serde")]
    pub(crate) model_patience: Duration,
    pub(crate) offline: bool,
    pub(crate) python: String,
    pub(crate) device: String,
    pub(crate) dtype: String,
    pub(crate) device_locks: PathBuf,
    pub(crate) inventory: PathBuf,
    pub(crate) listen: SocketAddr,
    pub(crate) admin: Admin,
    pub(crate) log: telemetry::Options,
    pub(crate) nats: nats::Options,
    pub(crate) ledger: Ledger,
    pub(crate) coordinator: efferent_coordinator::Options,
    pub(crate) brain: efferent_brain::Options,
    pub(crate) hand: efferent_hand::Options,
    pub(crate) sim: Sim,
}

impl Default for Local {
    fn default() -> Self {
        Self {
            // Without a home of the user's (some containers) the working folder serves.
            home: super::user_folder("XDG_CACHE_HOME", ".cache").unwrap_or_else(|| PathBuf::from(".efferent")),
            models: String::new(),
            also: String::new(),
            model_memory: 0,
            model_patience: Duration::from_secs(2),
            offline: false,
            python: "python3".to_owned(),
            device: "cpu".to_owned(),
            dtype: "auto".to_owned(),
            device_locks: PathBuf::new(),
            inventory: PathBuf::new(),
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 50051)),
            admin: Admin::Usual,
            log: telemetry::Options { filter: String::new(), ..Default::default() },
            nats: nats::Options { url: String::new(), ..Default::default() },
            ledger: Ledger::default(),
            coordinator: Default::default(),
            brain: Default::default(),
            hand: Default::default(),
            sim: Sim::default(),
        }
    }
}

/// Where the admin port is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) enum Admin {
    /// At the command's usual port.
    Usual,
    /// Nowhere.
    Off,
    /// There.
    At(SocketAddr),
}

impl Admin {
    /// The address, if there is to be one.
    pub(crate) fn address(self, usual_port: u16) -> Option<SocketAddr> {
        match self {
            Self::Usual => Some(SocketAddr::from((Ipv4Addr::LOCALHOST, usual_port))),
            Self::Off => None,
            Self::At(address) => Some(address),
        }
    }
}

impl TryFrom<String> for Admin {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match text.as_str() {
            "" => Ok(Self::Usual),
            "off" => Ok(Self::Off),
            address => address
                .parse()
                .map(Self::At)
                .map_err(|_| format!("{address:?} is neither an address (HOST:PORT) nor off")),
        }
    }
}

impl From<Admin> for String {
    fn from(admin: Admin) -> Self {
        match admin {
            Admin::Usual => String::new(),
            Admin::Off => "off".to_owned(),
            Admin::At(address) => address.to_string(),
        }
    }
}

/// What every process of a cluster must agree on: [`ledger::Options`], as it is written in files.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Ledger {
    #[serde(with = "humantime_serde")]
    pub(crate) retention: Duration,
    pub(crate) brain_queue: u64,
    pub(crate) hand_queue: u64,
    #[serde(with = "humantime_serde")]
    pub(crate) lease: Duration,
}

impl Default for Ledger {
    fn default() -> Self {
        let ledger::Options { retention, brain_queue, hand_queue, lease } = ledger::Options::default();
        Self { retention, brain_queue, hand_queue, lease }
    }
}

impl Ledger {
    /// As the ledger takes it.
    pub(crate) fn options(&self) -> ledger::Options {
        let Self { retention, brain_queue, hand_queue, lease } = *self;
        ledger::Options { retention, brain_queue, hand_queue, lease }
    }
}

/// What simulated engines cost, and how often they fail.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Sim {
    #[serde(with = "humantime_serde")]
    pub(crate) embed: Duration,
    #[serde(with = "humantime_serde")]
    pub(crate) token: Duration,
    pub(crate) signal_bytes: usize,
    pub(crate) step: Curve,
    pub(crate) pixel_power: f64,
    #[serde(with = "humantime_serde")]
    pub(crate) image: Duration,
    pub(crate) jitter: Share,
    pub(crate) failures: Share,
    pub(crate) crashes: Share,
    pub(crate) hangs: Share,
    pub(crate) max_batch: usize,
}

impl Default for Sim {
    fn default() -> Self {
        Self {
            embed: Duration::ZERO,
            token: Duration::ZERO,
            signal_bytes: 0,
            step: Curve::default(),
            pixel_power: 0.0,
            image: Duration::ZERO,
            jitter: Share::default(),
            failures: Share::default(),
            crashes: Share::default(),
            hangs: Share::default(),
            max_batch: 8,
        }
    }
}

/// From 0 for none to 1 for all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "f64", into = "f64")]
pub(crate) struct Share(pub(crate) f64);

impl TryFrom<f64> for Share {
    type Error = String;

    fn try_from(share: f64) -> Result<Self, String> {
        if (0.0..=1.0).contains(&share) { Ok(Self(share)) } else { Err(format!("{share} is not between 0 and 1")) }
    }
}

impl From<Share> for f64 {
    fn from(share: Share) -> Self {
        share.0
    }
}
