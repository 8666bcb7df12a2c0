//! Sets of a processor's cores, and staying on them.

use std::{collections::BTreeSet, fmt, io, str::FromStr};

use super::Error;

/// More than any machine has, and what the operating system's masks hold.
const MOST: usize = 1024;

/// Cores by number; at least one if it was read.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Cores(BTreeSet<usize>);

impl Cores {
    /// Those that this process may run on.
    ///
    /// # Errors
    /// If the operating system does not tell.
    pub fn allowed() -> io::Result<Self> {
        system::allowed()
    }

    /// Keeps the calling thread, and every thread that it starts from now on, on these cores. To be called before there are others.
    ///
    /// # Errors
    /// If the process may not run on any of them, or the operating system cannot do it.
    pub fn stay(&self) -> Result<(), Error> {
        system::stay(self).map_err(|source| Error::Cores { cores: self.clone(), source })
    }

    /// How many.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// In rising order.
    pub fn iter(&self) -> impl Iterator<Item = usize> {
        self.0.iter().copied()
    }

    /// Whether all of these are among them.
    pub fn contains(&self, others: &Self) -> bool {
        others.0.is_subset(&self.0)
    }

    /// Neighbouring cores for each of several parts, as many as it is to have. What is over is left out; what is missing too.
    pub fn share(&self, counts: &[usize]) -> Vec<Self> {
        let mut rest = self.iter();
        counts.iter().map(|count| rest.by_ref().take(*count).collect()).collect()
    }
}

impl FromIterator<usize> for Cores {
    fn from_iter<T: IntoIterator<Item = usize>>(cores: T) -> Self {
        Self(cores.into_iter().collect())
    }
}

impl FromStr for Cores {
    /// Why not, as the end of a sentence.
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut cores = BTreeSet::new();
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (Ok(first), Ok(last)) = (first.trim().parse::<usize>(), last.trim().parse::<usize>()) else {
                return Err(format!("must name cores by number or range (0-3 or 0,2), not {part:?}"));
            };
            if first > last {
                return Err(format!("has a range that falls: {part}"));
            }
            if last >= MOST {
                return Err(format!("names core {last}, beyond the last possible one, {}", MOST - 1));
            }
            for core in first..=last {
                if !cores.insert(core) {
                    return Err(format!("names core {core} twice"));
                }
            }
        }
        Ok(Self(cores))
    }
}

impl fmt::Display for Cores {
    /// As it is read: `0-2,5`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut ranges: Vec<(usize, usize)> = Vec::new();
        for core in self.iter() {
            match ranges.last_mut() {
                Some((_, last)) if *last + 1 == core => *last = core,
                _ => ranges.push((core, core)),
            }
        }
        let range = |(first, last): &(usize, usize)| match first == last {
            true => first.to_string(),
            false => format!("{first}-{last}"),
        };
        f.write_str(&ranges.iter().map(range).collect::<Vec<_>>().join(","))
    }
}

#[cfg(target_os = "linux")]
mod system {
    use std::io;

    use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

    use super::{Cores, MOST};

    pub(super) fn allowed() -> io::Result<Cores> {
        let set = sched_getaffinity(None)?;
        Ok((0..MOST.min(CpuSet::MAX_CPU)).filter(|core| set.is_set(*core)).collect())
    }

    pub(super) fn stay(cores: &Cores) -> io::Result<()> {
        let mut set = CpuSet::new();
        cores.iter().for_each(|core| set.set(core));
        Ok(sched_setaffinity(None, &set)?)
    }
}

#[cfg(not(target_os = "linux"))]
mod system {
    use std::io;

    use super::Cores;

    pub(super) fn allowed() -> io::Result<Cores> {
        Ok((0..std::thread::available_parallelism()?.get()).collect())
    }

    pub(super) fn stay(_: &Cores) -> io::Result<()> {
        Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "this operating system does not keep a process on cores; say cpu",
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_is_written_as_it_is_read() {
        for text in ["0", "0-3", "0,2", "0-1,4,6-7"] {
            assert_eq!(text.parse::<Cores>().unwrap().to_string(), text);
        }
        assert_eq!("3,1,2".parse::<Cores>().unwrap().to_string(), "1-3");
        assert_eq!("0-3,8".parse::<Cores>().unwrap().count(), 5);
    }

    #[test]
    fn cores_are_shared_out_to_neighbours() {
        let cores: Cores = "0-7".parse().unwrap();
        let shares: Vec<String> = cores.share(&[1, 4, 3]).iter().map(Cores::to_string).collect();
        assert_eq!(shares, ["0", "1-4", "5-7"]);
        assert_eq!(cores.share(&[9, 1])[1], Cores::default());
    }

    #[test]
    fn a_thread_stays_where_it_is_told_to() {
        let all = Cores::allowed().unwrap();
        let last: Cores = all.iter().last().into_iter().collect();
        assert!(all.contains(&last));
        // A thread of its own: the others of this process go on as they did.
        let kept = std::thread::spawn(move || {
            last.stay().unwrap();
            let inherited = std::thread::spawn(|| Cores::allowed().unwrap()).join().unwrap();
            assert_eq!(inherited, last);
            std::thread::available_parallelism().unwrap().get()
        });
        assert_eq!(kept.join().unwrap(), 1);
        let nowhere: Cores = "1000-1023".parse().unwrap();
        assert!(matches!(nowhere.stay(), Err(Error::Cores { .. })));
    }
}
