//! What can be typed after `efferent launch`.

use std::{str::FromStr, time::Duration};

use clap::Args;

use crate::settings::table::Group;

/// Which settings matter. A worker's device is the launcher's to choose.
pub(crate) const GROUPS: &[Group] = &[
    Group::Server,
    Group::Model,
    Group::Weights,
    Group::Host,
    Group::Admin,
    Group::Queue,
    Group::Brain,
    Group::Hand,
    Group::Sim,
];

/// `efferent launch`.
#[derive(Debug, Args)]
pub(crate) struct Launch {
    /// Workers to run: brain=1,hand=7; or auto for as many brains as keep the hands busy, by what work takes (--brain-time and --hand-time, or as
    /// the workers of --server measured).
    #[arg(long, value_name = "brain=N,hand=N|auto")]
    pub(crate) placement: Mix,
    /// Devices to run them on, written as --device of a worker: GPUs, one for each worker; cpu:0-7 to be split among them; cpu to be shared
    /// by all. Default: all GPUs, or if there are none all cores, split.
    #[arg(long, value_name = "DEVICES")]
    pub(crate) devices: Option<String>,
    /// Time a brain takes for a prompt, for auto.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, requires = "hand_time")]
    pub(crate) brain_time: Option<Duration>,
    /// Time a hand takes for an image, for auto.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, requires = "brain_time")]
    pub(crate) hand_time: Option<Duration>,
    /// Print who would get which device, and leave.
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Print it as JSON.
    #[arg(long, requires = "dry_run")]
    pub(crate) json: bool,
}

/// How many workers of each kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mix {
    /// As many as are named; at least one in all.
    Counts {
        /// Brains.
        brains: usize,
        /// Hands.
        hands: usize,
    },
    /// By what their work takes.
    Auto,
}

impl FromStr for Mix {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        let wrong = || format!("{text:?} is neither auto nor of the form brain=1,hand=7");
        let (mut brains, mut hands) = (None, None);
        for part in text.split(',') {
            let (role, count) = part.split_once('=').ok_or_else(wrong)?;
            let count = count.trim().parse::<usize>().map_err(|_| wrong())?;
            let kind = match role.trim() {
                "brain" => &mut brains,
                "hand" => &mut hands,
                _ => return Err(wrong()),
            };
            if kind.replace(count).is_some() {
                return Err(format!("{text:?} names {role} twice"));
            }
        }
        let (brains, hands) = (brains.unwrap_or(0), hands.unwrap_or(0));
        match brains + hands {
            0 => Err(format!("{text:?} has no worker")),
            1..=MOST => Ok(Self::Counts { brains, hands }),
            _ => Err(format!("{text:?} has more than {MOST} workers")),
        }
    }
}

/// More workers than any host has devices for.
const MOST: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mixes_are_read() {
        for (text, brains, hands) in [("brain=1,hand=7", 1, 7), ("hand=2", 0, 2), (" brain=3 , hand=0", 3, 0)] {
            assert_eq!(text.parse(), Ok(Mix::Counts { brains, hands }), "{text}");
        }
        assert_eq!("auto".parse(), Ok(Mix::Auto));
        for bad in ["", "brain", "brain=x", "brain=0,hand=0", "foot=1", "hand=1,hand=1", "hand=99999", "brain=-1"] {
            assert!(bad.parse::<Mix>().is_err(), "{bad}");
        }
    }
}
