//! What a worker computes on, and that nobody else on its host does.
//!
//! Read in this order: [`spec`] (how devices are written), [`cores`] (sets of a processor's cores, and staying on them), [`inventory`]
//! (what a host has), [`select`] (from what is written to what is there), [`claims`] (one worker for each device).
//!
//! Deliberately absent: candle's handles of devices (those are opened by whoever builds engines), and who gets which device
//! (`efferent launch`).

pub mod claims;
pub mod cores;
pub mod inventory;
pub mod select;
pub mod spec;

use std::path::PathBuf;

pub use claims::{Claim, Claims, Holder};
pub use cores::Cores;
pub use inventory::Inventory;
pub use select::{Devices, Kind};
pub use spec::Spec;

/// Why a worker does not get the device it is to compute on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// What is written names no device.
    #[error("device {text:?} {why}")]
    Malformed {
        /// As given.
        text: String,
        /// What is wrong with it.
        why: String,
    },
    /// The host has no such device, or this process may not use it.
    #[error("device {device:?} is not there: {why}")]
    Absent {
        /// Which.
        device: String,
        /// What is there instead.
        why: String,
    },
    /// Another worker of this host computes on it.
    #[error("device {device:?} is held by {holder} ({})", file.display())]
    Held {
        /// Which.
        device: String,
        /// Who holds it.
        holder: Holder,
        /// The lock.
        file: PathBuf,
    },
    /// Locks cannot be kept.
    #[error("cannot claim devices in {}", folder.display())]
    Claims {
        /// Where locks are to lie.
        folder: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The list of devices cannot be read.
    #[error("cannot read the inventory {}", path.display())]
    Inventory {
        /// Which.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The operating system does not keep a process on cores.
    #[error("cannot stay on cores {cores}")]
    Cores {
        /// Which.
        cores: Cores,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
}
