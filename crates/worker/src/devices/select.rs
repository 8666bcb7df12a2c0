//! From what is written to what is there.

use efferent_proto::v1;

use super::{
    Error, Inventory, Spec,
    inventory::{GpuInfo, Processor},
    spec::Gpu,
};

/// What CUDA shows to a process, set from outside: UUIDs or numbers, separated by commas.
pub const VISIBLE: &str = "CUDA_VISIBLE_DEVICES";

/// Where devices are looked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    /// Its GPUs.
    pub inventory: Inventory,
    /// Its processor.
    pub processor: Processor,
    /// What [`VISIBLE`] says, if it is set.
    pub visible: Option<String>,
}

/// Devices that are there, all of one kind.
#[derive(Debug, Clone, PartialEq)]
pub struct Devices {
    /// Of what kind.
    pub kind: Kind,
    /// At least one; for a processor exactly one.
    pub list: Vec<Device>,
}

/// Kinds of devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// The processor, or cores of it.
    Cpu(Option<super::Cores>),
    /// NVIDIA's GPUs.
    Cuda,
    /// Apple's GPU.
    Metal,
}

/// A device.
#[derive(Debug, Clone, PartialEq)]
pub struct Device {
    /// By which number the kind's library opens it.
    pub ordinal: usize,
    /// As the cluster hears of it.
    pub described: v1::Device,
}

/// A GPU that this process can see; what is not known of it is empty.
struct Seen<'a> {
    uuid: String,
    gpu: Option<&'a GpuInfo>,
}

impl Devices {
    /// Finds them on a host.
    ///
    /// # Errors
    /// [`Error::Absent`] if one is not there, [`Error::Malformed`] if two are the same.
    pub fn find(spec: &Spec, host: &Host) -> Result<Self, Error> {
        match spec {
            Spec::Cpu(cores) => {
                let Processor { name, memory_bytes, cores: allowed } = &host.processor;
                let device = cores.as_ref().map_or_else(|| "cpu".to_owned(), |cores| format!("cpu:{cores}"));
                if cores.as_ref().is_some_and(|cores| !allowed.contains(cores)) {
                    return Err(Error::Absent { device, why: format!("this process may run on cores {allowed}") });
                }
                let described = v1::Device {
                    device,
                    name: name.clone(),
                    memory_bytes: *memory_bytes,
                    cores: cores.as_ref().unwrap_or(allowed).count() as u32,
                    ..Default::default()
                };
                Ok(Self { kind: Kind::Cpu(cores.clone()), list: vec![Device { ordinal: 0, described }] })
            }
            Spec::Metal(number) => {
                let described = v1::Device { device: format!("metal:{number}"), ..Default::default() };
                Ok(Self { kind: Kind::Metal, list: vec![Device { ordinal: *number, described }] })
            }
            Spec::Cuda(gpus) => {
                let seen = host.seen();
                let mut list: Vec<Device> = Vec::new();
                for gpu in gpus {
                    let device = find(gpu, &seen, host)?;
                    if list.iter().any(|known| known.ordinal == device.ordinal) {
                        let text = gpus.iter().map(|gpu| format!("cuda:{gpu}")).collect::<Vec<_>>().join(",");
                        let why = format!("names {} twice", device.described.device);
                        return Err(Error::Malformed { text, why });
                    }
                    list.push(device);
                }
                Ok(Self { kind: Kind::Cuda, list })
            }
        }
    }

    /// As the cluster hears of them.
    pub fn described(&self) -> Vec<v1::Device> {
        self.list.iter().map(|device| device.described.clone()).collect()
    }

    /// Variables that must be set before a process that computes on them is started, because libraries read them as they are loaded. (`is_set`
    /// tells what the user set: that counts.)
    pub fn environment(&self, is_set: impl Fn(&str) -> bool) -> Vec<(&'static str, String)> {
        match &self.kind {
            // Candle goes by the machine's cores, not by the process's.
            Kind::Cpu(Some(cores)) if !is_set("RAYON_NUM_THREADS") => {
                vec![("RAYON_NUM_THREADS", cores.count().to_string())]
            }
            // So that CUDA's numbers are those of the inventory. By default the fastest GPU is CUDA's first.
            Kind::Cuda if !is_set("CUDA_DEVICE_ORDER") => vec![("CUDA_DEVICE_ORDER", "PCI_BUS_ID".to_owned())],
            _ => Vec::new(),
        }
    }

    /// What is to be claimed: a name for the lock, and the device that it stands for. Nothing for a processor that is shared.
    pub fn claims(&self) -> Vec<(String, String)> {
        if let Kind::Cpu(cores) = &self.kind {
            return cores
                .iter()
                .flat_map(super::Cores::iter)
                .map(|core| (format!("cpu-{core}"), format!("cpu:{core}")))
                .collect();
        }
        let claim = |device: &Device| {
            let v1::Device { device: name, uuid, .. } = &device.described;
            (if uuid.is_empty() { name.replace(':', "-") } else { uuid.clone() }, name.clone())
        };
        self.list.iter().map(claim).collect()
    }
}

impl Host {
    /// This one, with GPUs of an inventory.
    pub fn here(inventory: Inventory) -> Self {
        Self { inventory, processor: Processor::of_host(), visible: std::env::var(VISIBLE).ok() }
    }

    /// How many GPUs this process can see, as far as is known.
    pub fn gpus(&self) -> usize {
        self.seen().len()
    }

    /// GPUs that this process can see, in the order in which CUDA numbers them.
    fn seen<'a>(&'a self) -> Vec<Seen<'a>> {
        let gpus = &self.inventory.gpus;
        let known = |gpu: &'a GpuInfo| Seen { uuid: gpu.uuid.clone(), gpu: Some(gpu) };
        let Some(visible) = &self.visible else { return gpus.iter().map(known).collect() };
        let entry = |entry: &str| {
            let number = entry.parse::<usize>().ok();
            let is_it = |gpu: &&GpuInfo| number.map_or(gpu.uuid.starts_with(entry), |number| gpu.index == number);
            match gpus.iter().find(is_it) {
                Some(gpu) => known(gpu),
                None if number.is_some() => Seen { uuid: String::new(), gpu: None },
                None => Seen { uuid: entry.to_owned(), gpu: None },
            }
        };
        visible.split(',').map(str::trim).filter(|entry| !entry.is_empty()).map(entry).collect()
    }
}

fn find(gpu: &Gpu, seen: &[Seen<'_>], host: &Host) -> Result<Device, Error> {
    let absent = |why: String| Error::Absent { device: format!("cuda:{gpu}"), why };
    let described = |ordinal: usize, seen: Option<&Seen<'_>>| {
        let uuid = seen.map(|seen| seen.uuid.clone()).unwrap_or_default();
        let info = seen.and_then(|seen| seen.gpu);
        let described = v1::Device {
            device: if uuid.is_empty() { format!("cuda:{ordinal}") } else { format!("cuda:{uuid}") },
            name: info.map(|info| info.name.clone()).unwrap_or_default(),
            memory_bytes: info.map_or(0, |info| info.memory_bytes),
            cores: 0,
            uuid,
        };
        Device { ordinal, described }
    };
    let sight = || match (&host.visible, seen.len()) {
        (Some(visible), count) => format!("{VISIBLE} shows {count} GPUs ({visible})"),
        (None, 0) => "NVIDIA's driver tells of no GPU".to_owned(),
        (None, count) => format!("the host has {count} GPUs, cuda:0 to cuda:{}", count - 1),
    };
    match gpu {
        Gpu::Number(number) => match seen.get(*number) {
            // Without the driver's list whoever opens the device finds out whether it is there.
            None if seen.is_empty() && host.visible.is_none() => Ok(described(*number, None)),
            None => Err(absent(sight())),
            known => Ok(described(*number, known)),
        },
        Gpu::Uuid(wanted) => {
            let mut fits = seen.iter().enumerate().filter(|(_, seen)| seen.uuid.starts_with(wanted.as_str()));
            match (fits.next(), fits.next()) {
                (Some((ordinal, seen)), None) => Ok(described(ordinal, Some(seen))),
                (Some(_), Some(_)) => Err(absent("the UUIDs of several GPUs begin so".to_owned())),
                (None, _) => Err(absent(sight())),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::devices::Cores;

    fn host(gpus: bool, visible: Option<&str>) -> Host {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/eight-gpus.json");
        let inventory = if gpus { Inventory::read(&file).unwrap() } else { Inventory::default() };
        let cores: Cores = "0-3".parse().unwrap();
        let processor = Processor { name: "a processor".to_owned(), memory_bytes: 1 << 30, cores };
        Host { inventory, processor, visible: visible.map(str::to_owned) }
    }

    fn found(text: &str, host: &Host) -> Result<Vec<(usize, String)>, String> {
        let devices = Devices::find(&text.parse().unwrap(), host).map_err(|error| error.to_string())?;
        Ok(devices.list.into_iter().map(|device| (device.ordinal, device.described.device)).collect())
    }

    #[test]
    fn gpus_are_found_by_number_and_by_uuid() {
        let host = host(true, None);
        let uuid = host.inventory.gpus[3].uuid.clone();
        let third = vec![(3, format!("cuda:{uuid}"))];
        assert_eq!(found("cuda:3", &host), Ok(third.clone()));
        assert_eq!(found(&format!("cuda:{uuid}"), &host), Ok(third.clone()));
        assert_eq!(found(&format!("cuda:{}", &uuid[..12]), &host), Ok(third));
        assert_eq!(
            found("cuda:0,cuda:7", &host).unwrap().iter().map(|(ordinal, _)| *ordinal).collect::<Vec<_>>(),
            [0, 7]
        );
        assert!(found("cuda:8", &host).unwrap_err().contains("the host has 8 GPUs, cuda:0 to cuda:7"));
        assert!(found("cuda:GPU-ffff", &host).unwrap_err().contains("is not there"));
        assert!(found(&format!("cuda:3,cuda:{uuid}"), &host).unwrap_err().contains("twice"));
        let devices = Devices::find(&"cuda:3".parse().unwrap(), &host).unwrap();
        assert_eq!(devices.claims(), [(uuid.clone(), format!("cuda:{uuid}"))]);
        let described = &devices.described()[0];
        assert_eq!((described.name.as_str(), described.memory_bytes), ("NVIDIA H100 80GB HBM3", 85_520_809_984));
        assert_eq!(devices.environment(|_| false), [("CUDA_DEVICE_ORDER", "PCI_BUS_ID".to_owned())]);
    }

    #[test]
    fn numbers_are_those_of_what_the_process_can_see() {
        let all = host(true, None).inventory.gpus;
        let visible = format!("{},2", all[5].uuid);
        let host = host(true, Some(&visible));
        assert_eq!(found("cuda:0", &host), Ok(vec![(0, format!("cuda:{}", all[5].uuid))]));
        assert_eq!(found("cuda:1", &host), Ok(vec![(1, format!("cuda:{}", all[2].uuid))]));
        assert_eq!(found(&format!("cuda:{}", all[2].uuid), &host), Ok(vec![(1, format!("cuda:{}", all[2].uuid))]));
        assert!(
            found(&format!("cuda:{}", all[0].uuid), &host).unwrap_err().contains("CUDA_VISIBLE_DEVICES shows 2 GPUs")
        );
    }

    #[test]
    fn a_host_whose_driver_tells_nothing_is_taken_at_its_word() {
        assert_eq!(found("cuda:1", &host(false, None)), Ok(vec![(1, "cuda:1".to_owned())]));
        assert_eq!(
            found("cuda:GPU-abc", &host(false, Some("GPU-abcdef"))),
            Ok(vec![(0, "cuda:GPU-abcdef".to_owned())])
        );
        assert!(found("cuda:GPU-abc", &host(false, None)).unwrap_err().contains("NVIDIA's driver tells of no GPU"));
        assert!(found("cuda:0", &host(false, Some(""))).unwrap_err().contains("shows 0 GPUs"));
    }

    #[test]
    fn cores_are_claimed_one_by_one_and_a_shared_processor_not_at_all() {
        let host = host(true, None);
        let devices = Devices::find(&"cpu:0,2-3".parse().unwrap(), &host).unwrap();
        let claims: Vec<String> = devices.claims().into_iter().map(|(_, device)| device).collect();
        assert_eq!(claims, ["cpu:0", "cpu:2", "cpu:3"]);
        assert_eq!(devices.environment(|_| false), [("RAYON_NUM_THREADS", "3".to_owned())]);
        assert_eq!(devices.environment(|name| name == "RAYON_NUM_THREADS"), []);
        assert_eq!(devices.described()[0].cores, 3);
        let shared = Devices::find(&"cpu".parse().unwrap(), &host).unwrap();
        assert_eq!((shared.claims(), shared.environment(|_| false)), (Vec::new(), Vec::new()));
        assert_eq!(
            found("cpu:3-4", &host).unwrap_err(),
            "device \"cpu:3-4\" is not there: this process may run on cores 0-3"
        );
    }
}
