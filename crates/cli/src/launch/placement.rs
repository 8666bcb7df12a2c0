//! Who gets which device. Nothing here touches the host: a placement can be looked at before it is made.

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use efferent_proto::v1;
use efferent_worker::devices::{Cores, select::VISIBLE};
use serde::Serialize;

use crate::{
    exit::{Exit, Failure},
    launch::args::Mix,
    output,
    plan::Split,
    settings::{Local, local::Admin},
};

/// The admin port of the first worker, if none is named; the others follow it.
const ADMIN_PORT: u16 = 9091;

/// What there is to place workers on.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Pool {
    /// GPUs: one for each worker.
    Gpus(Vec<v1::Device>),
    /// Cores, to be split among the workers.
    Cores(Cores),
    /// A processor that all share.
    Shared,
}

/// What work takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Times {
    /// Of a brain, for a prompt.
    pub(crate) brain: Duration,
    /// Of a hand, for an image.
    pub(crate) hand: Duration,
}

/// Workers with their devices.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Placement {
    /// Brains first.
    pub(crate) workers: Vec<Worker>,
    /// Devices that no worker gets.
    pub(crate) idle: Vec<String>,
}

/// A worker to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Worker {
    /// `hand-3`: what its lines of the log are labelled with.
    pub(crate) name: String,
    /// `brain` or `hand`.
    pub(crate) role: &'static str,
    /// What it computes on, as `--device` takes it.
    pub(crate) device: String,
    /// What that is, for a person.
    pub(crate) about: String,
    /// Where its admin port is, as `--admin` takes it.
    pub(crate) admin: String,
    /// What is set for it besides.
    pub(crate) environment: BTreeMap<String, String>,
}

impl Placement {
    /// Places workers. `times` are needed for [`Mix::Auto`].
    ///
    /// # Errors
    /// If there are more workers than devices, or an automatic placement cannot be worked out.
    pub(crate) fn of(mix: Mix, times: Option<Times>, pool: &Pool, local: &Local) -> Result<Self, Failure> {
        let units = match pool {
            Pool::Gpus(gpus) => gpus.len(),
            Pool::Cores(cores) => cores.count(),
            Pool::Shared => usize::MAX,
        };
        let split = match (mix, times) {
            (Mix::Auto, Some(times)) => Some(best(units, times)?),
            _ => None,
        };
        let (brains, hands) = match (mix, split, pool) {
            (Mix::Counts { brains, hands }, ..) => (brains, hands),
            (Mix::Auto, Some((brains, hands)), Pool::Gpus(_)) => (brains, hands),
            // A process makes use of all its cores, and weights are in memory once for each process.
            (Mix::Auto, ..) => (1, 1),
        };
        let count = brains + hands;
        if count > units {
            let kind = if matches!(pool, Pool::Gpus(_)) { "GPUs" } else { "cores" };
            let hint = if kind == "cores" { "; with --devices cpu they share what there is" } else { "" };
            let message = format!("{count} workers need as many {kind}, and there are {units}{hint}");
            return Err(Failure::words(Exit::Config, message));
        }
        let shares = match (pool, split) {
            (Pool::Cores(cores), Some((of_brain, of_hand))) => cores.share(&[of_brain, of_hand]),
            // What does not come out even goes to hands first, which have more to do.
            (Pool::Cores(cores), None) => {
                let (each, over) = (cores.count() / count, cores.count() % count);
                let turn = |index: usize| if index < brains { hands + index } else { index - brains };
                let gets = |index: usize| each + usize::from(turn(index) < over);
                cores.share(&(0..count).map(gets).collect::<Vec<_>>())
            }
            _ => Vec::new(),
        };
        let mut workers = Vec::new();
        for index in 0..count {
            let (role, number) = if index < brains { ("brain", index) } else { ("hand", index - brains) };
            let name = format!("{role}-{number}");
            let mut environment = BTreeMap::new();
            let (device, about) = match pool {
                Pool::Gpus(gpus) => {
                    let gpu = &gpus[index];
                    // The worker then sees nothing but its own, by the one name that does not depend on who looks.
                    if !gpu.uuid.is_empty() {
                        environment.insert(VISIBLE.to_owned(), gpu.uuid.clone());
                    }
                    (gpu.device.clone(), about(gpu))
                }
                Pool::Cores(_) => (format!("cpu:{}", shares[index]), cores_about(shares[index].count())),
                Pool::Shared => ("cpu".to_owned(), "shared".to_owned()),
            };
            let profile = local.hand.profile.display().to_string();
            if role == "hand" && !profile.is_empty() {
                // Two that wrote to the same file would undo each other's.
                environment.insert("EFFERENT_HAND__PROFILE".to_owned(), format!("{profile}.{name}"));
            }
            workers.push(Worker { name, role, device, about, admin: admin(local.admin, index)?, environment });
        }
        let idle = match pool {
            Pool::Gpus(gpus) => gpus[count..].iter().map(|gpu| gpu.device.clone()).collect(),
            Pool::Cores(_) | Pool::Shared => Vec::new(),
        };
        Ok(Self { workers, idle })
    }

    /// For a person.
    pub(crate) fn table(&self) -> String {
        let mut rows = vec![["WORKER", "DEVICE", "WHAT", "ADMIN", "ENVIRONMENT"].map(str::to_owned).to_vec()];
        rows.extend(self.workers.iter().map(|worker| {
            let environment: Vec<String> =
                worker.environment.iter().map(|(name, value)| format!("{name}={value}")).collect();
            let Worker { name, device, about, admin, .. } = worker.clone();
            vec![name, device, about, admin, environment.join(" ")]
        }));
        let mut text = output::table(&rows);
        if !self.idle.is_empty() {
            text += &format!("\nidle: {}", self.idle.join(", "));
        }
        text
    }
}

/// Brains and hands for so many GPUs, or cores of a brain and a hand.
fn best(units: usize, times: Times) -> Result<(usize, usize), Failure> {
    // A shared processor is not split.
    let units = if units == usize::MAX { 2 } else { units };
    let split = Split::best(units as u64, times.brain, times.hand).ok_or_else(|| {
        let message = "--placement auto needs at least 2 devices, and times above 0 for brain and hand";
        Failure::words(Exit::Usage, message)
    })?;
    Ok((split.brains as usize, split.hands as usize))
}

fn about(gpu: &v1::Device) -> String {
    match gpu.memory_bytes {
        0 => gpu.name.clone(),
        bytes => format!("{}, {:.1} GiB", gpu.name, bytes as f64 / f64::from(1 << 30)),
    }
}

fn cores_about(count: usize) -> String {
    if count == 1 { "1 core".to_owned() } else { format!("{count} cores") }
}

fn admin(base: Admin, index: usize) -> Result<String, Failure> {
    let Some(base) = base.address(ADMIN_PORT) else { return Ok("off".to_owned()) };
    let port = match base.port() {
        0 => Some(0),
        first => u16::try_from(index).ok().and_then(|index| first.checked_add(index)),
    };
    let port = port.ok_or_else(|| Failure::words(Exit::Config, format!("ports from {base} (--admin) run out")))?;
    Ok(SocketAddr::new(base.ip(), port).to_string())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use efferent_worker::devices::{Devices, Inventory, Spec, inventory::Processor, select::Host, spec::Gpu};

    use super::*;

    /// A host with eight GPUs.
    fn gpus(visible: Option<&str>, count: usize) -> Pool {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../worker/tests/data/eight-gpus.json");
        let inventory = Inventory::read(&file).unwrap();
        let processor = Processor { name: String::new(), memory_bytes: 0, cores: Cores::default() };
        let host = Host { inventory, processor, visible: visible.map(str::to_owned) };
        let spec = Spec::Cuda((0..count).map(Gpu::Number).collect());
        Pool::Gpus(Devices::find(&spec, &host).unwrap().described())
    }

    fn placed(mix: &str, times: Option<(u64, u64)>, pool: &Pool) -> Placement {
        let times =
            times.map(|(brain, hand)| Times { brain: Duration::from_millis(brain), hand: Duration::from_millis(hand) });
        Placement::of(mix.parse().unwrap(), times, pool, &Local::default()).unwrap_or_else(|error| panic!("{error:?}"))
    }

    fn devices(placement: &Placement) -> Vec<(&str, &str)> {
        placement.workers.iter().map(|worker| (worker.name.as_str(), worker.device.as_str())).collect()
    }

    #[test]
    fn each_worker_sees_a_gpu_of_its_own() {
        let pool = gpus(None, 8);
        let Pool::Gpus(all) = &pool else { panic!("GPUs") };
        let placement = placed("brain=1,hand=7", None, &pool);
        let names: Vec<&str> = placement.workers.iter().map(|worker| worker.name.as_str()).collect();
        assert_eq!(names, ["brain-0", "hand-0", "hand-1", "hand-2", "hand-3", "hand-4", "hand-5", "hand-6"]);
        for (worker, gpu) in placement.workers.iter().zip(all) {
            assert_eq!(worker.device, format!("cuda:{}", gpu.uuid));
            assert_eq!(worker.environment, BTreeMap::from([(VISIBLE.to_owned(), gpu.uuid.clone())]));
            // What the worker makes of it: the only GPU that it sees.
            let host = Host {
                inventory: Inventory::default(),
                processor: Processor { name: String::new(), memory_bytes: 0, cores: Cores::default() },
                visible: worker.environment.get(VISIBLE).cloned(),
            };
            assert_eq!(Devices::find(&worker.device.parse().unwrap(), &host).unwrap().list[0].ordinal, 0);
        }
        let admins: Vec<&str> = placement.workers.iter().map(|worker| worker.admin.as_str()).collect();
        assert_eq!((admins[0], admins[7]), ("127.0.0.1:9091", "127.0.0.1:9098"));
        assert_eq!(placement.workers[0].about, "NVIDIA H100 80GB HBM3, 79.6 GiB");
        assert!(placement.table().contains(&format!("CUDA_VISIBLE_DEVICES={}", all[7].uuid)), "{}", placement.table());
    }

    #[test]
    fn a_placement_is_within_what_the_launcher_sees() {
        let Pool::Gpus(all) = gpus(None, 8) else { panic!("GPUs") };
        let pool = gpus(Some("6,2,4"), 3);
        let placement = placed("hand=2", None, &pool);
        let wanted = [6, 2].map(|index| all[index].device.as_str());
        assert_eq!(devices(&placement), [("hand-0", wanted[0]), ("hand-1", wanted[1])]);
        assert_eq!(placement.idle, [all[4].device.as_str()]);
    }

    #[test]
    fn auto_is_the_plan() {
        let count = |times, pool: &Pool| {
            let placement = placed("auto", Some(times), pool);
            let brains = placement.workers.iter().filter(|worker| worker.role == "brain").count();
            (brains, placement.workers.len() - brains)
        };
        // 37 times the work: as few brains as there can be.
        assert_eq!(count((400, 15_000), &gpus(None, 8)), (1, 7));
        assert_eq!(count((100, 300), &gpus(None, 8)), (2, 6));
        assert_eq!(count((15_000, 400), &gpus(None, 8)), (7, 1));
        assert_eq!(count((1, 1), &gpus(None, 2)), (1, 1));
        assert_eq!(count((1, 1), &Pool::Shared), (1, 1));
        let cores = Pool::Cores("0-7".parse().unwrap());
        assert_eq!(devices(&placed("auto", Some((100, 300)), &cores)), [("brain-0", "cpu:0-1"), ("hand-0", "cpu:2-7")]);
        let Err(Failure::Told { exit, .. }) = Placement::of(
            Mix::Auto,
            Some(Times { brain: Duration::ZERO, hand: Duration::ZERO }),
            &cores,
            &Local::default(),
        ) else {
            panic!("is refused")
        };
        assert_eq!(exit, Exit::Usage);
    }

    #[test]
    fn cores_are_split_and_what_is_over_goes_to_hands() {
        let cores = Pool::Cores("0-7".parse().unwrap());
        let split = placed("brain=1,hand=2", None, &cores);
        assert_eq!(devices(&split), [("brain-0", "cpu:0-1"), ("hand-0", "cpu:2-4"), ("hand-1", "cpu:5-7")]);
        let brains = placed("brain=3", None, &cores);
        assert_eq!(devices(&brains), [("brain-0", "cpu:0-2"), ("brain-1", "cpu:3-5"), ("brain-2", "cpu:6-7")]);
        let many_hands = placed("brain=3,hand=2", None, &cores);
        assert_eq!(devices(&many_hands).last(), Some(&("hand-1", "cpu:6-7")));
        assert_eq!(devices(&placed("hand=2", None, &Pool::Shared)), [("hand-0", "cpu"), ("hand-1", "cpu")]);
    }

    #[test]
    fn more_workers_than_devices_are_refused() {
        for (pool, wanted) in [
            (gpus(None, 2), "3 workers need as many GPUs, and there are 2"),
            (Pool::Cores("0-1".parse().unwrap()), "and there are 2; with --devices cpu they share"),
        ] {
            let mix = Mix::Counts { brains: 1, hands: 2 };
            let Err(Failure::Told { exit, error }) = Placement::of(mix, None, &pool, &Local::default()) else {
                panic!("is refused")
            };
            assert_eq!(exit, Exit::Config);
            assert!(error.to_string().contains(wanted), "{error}");
        }
    }

    #[test]
    fn ports_and_profiles_are_not_shared() {
        let mut local = Local { admin: Admin::Off, ..Local::default() };
        local.hand.profile = "times.json".into();
        let mix = Mix::Counts { brains: 1, hands: 1 };
        let placement = Placement::of(mix, None, &Pool::Shared, &local).unwrap_or_else(|error| panic!("{error:?}"));
        assert_eq!(placement.workers[0].admin, "off");
        assert_eq!(placement.workers[0].environment, BTreeMap::new());
        assert_eq!(placement.workers[1].environment["EFFERENT_HAND__PROFILE"], "times.json.hand-0");
        let at = |port| Local { admin: Admin::At(SocketAddr::from(([0, 0, 0, 0], port))), ..Local::default() };
        let admin = |port| match Placement::of(mix, None, &Pool::Shared, &at(port)) {
            Ok(placement) => Some(placement.workers[1].admin.clone()),
            Err(_) => None,
        };
        assert_eq!(admin(0).as_deref(), Some("0.0.0.0:0"));
        assert_eq!(admin(7000).as_deref(), Some("0.0.0.0:7001"));
        assert_eq!(admin(u16::MAX), None);
    }
}
