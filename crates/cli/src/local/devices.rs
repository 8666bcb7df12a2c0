//! From the setting `device` to devices that this process holds, and `efferent devices`.

use std::{os::unix::process::CommandExt as _, process::Command};

use candle_core::Device;
use efferent_worker::devices::{
    self, Claim, Claims, Devices, Holder, Inventory, Kind, Spec, inventory::Processor, select::Host,
};
use serde_json::json;

use crate::{
    exit::{Exit, Failure},
    output,
    settings::{Local, Settings},
};

/// Devices that are this process's until it is dropped.
#[derive(Debug)]
pub(crate) struct Held {
    /// What they are.
    pub(crate) devices: Devices,
    /// What engines compute on; at least one.
    pub(crate) opened: Vec<Device>,
    #[expect(dead_code, reason = "held for what its drop does")]
    claim: Claim,
}

/// The failure that an error of devices is.
pub(crate) fn failure(error: devices::Error) -> Failure {
    let exit = match &error {
        // Its holder may be about to end: an old worker that makes way for a new one.
        devices::Error::Held { .. } => Exit::Unavailable,
        devices::Error::Claims { .. } => Exit::File,
        _ => Exit::Config,
    };
    Failure::new(exit, error)
}

/// Makes the process fit for its devices: its environment, from which libraries learn how many threads to start, and the cores that it
/// stays on. To be called before other threads are started, which inherit the cores. Replaces the process by itself if the environment
/// has to change, as that cannot safely be done from within.
///
/// # Errors
/// If a device is malformed or not there.
pub(crate) fn prepare(settings: &Settings) -> Result<(), Failure> {
    let devices = find(&settings.local)?;
    check_build(&devices)?;
    let wanted = devices.environment(|name| std::env::var_os(name).is_some());
    if !wanted.is_empty() {
        let fault = |error| Failure::new(Exit::Failed, anyhow::Error::new(error).context("cannot start anew"));
        let mut words = std::env::args_os();
        let mut command = Command::new(std::env::current_exe().map_err(fault)?);
        if let Some(name) = words.next() {
            command.arg0(name);
        }
        return Err(fault(command.args(words).envs(wanted).exec()));
    }
    if let Kind::Cpu(Some(cores)) = &devices.kind {
        cores.stay().map_err(failure)?;
    }
    Ok(())
}

/// Claims the devices for this process, as this role, and opens them.
///
/// # Errors
/// If a device is malformed, not there, or held by another worker.
pub(crate) fn take(local: &Local, role: &str) -> Result<Held, Failure> {
    let devices = find(local)?;
    check_build(&devices)?;
    let names = devices.described().into_iter().map(|device| device.device).collect();
    let holder = Holder { role: role.to_owned(), pid: std::process::id(), devices: names };
    let claim = Claims::in_folder(&local.device_locks).take(&devices.claims(), &holder).map_err(failure)?;
    let opened = open(&devices)?;
    if role != "brain" && opened.len() > 2 {
        tracing::warn!(devices = ?holder.devices, "a hand computes on two devices at most; the others are idle");
    }
    Ok(Held { devices, opened, claim })
}

fn find(local: &Local) -> Result<Devices, Failure> {
    let spec: Spec = local.device.parse().map_err(failure)?;
    // Loading the driver's library takes a moment, and only GPUs are found by it.
    let inventory = match spec {
        Spec::Cuda(_) => Inventory::read(&local.inventory).map_err(failure)?,
        Spec::Cpu(_) | Spec::Metal(_) => Inventory::default(),
    };
    Devices::find(&spec, &Host::here(inventory)).map_err(failure)
}

/// Refuses devices that this build cannot compute on.
///
/// # Errors
/// If so.
pub(crate) fn check_build(devices: &Devices) -> Result<(), Failure> {
    let (kind, built) = match devices.kind {
        Kind::Cpu(_) => return Ok(()),
        Kind::Cuda => ("cuda", cfg!(feature = "cuda")),
        Kind::Metal => ("metal", cfg!(feature = "metal")),
    };
    if built {
        return Ok(());
    }
    let device = devices.list.first().map(|device| device.described.device.clone()).unwrap_or_default();
    Err(Failure::words(Exit::Config, format!("device {device:?} needs a build with --features {kind}")))
}

fn open(devices: &Devices) -> Result<Vec<Device>, Failure> {
    let open = |device: &efferent_worker::devices::select::Device| {
        let opened = match devices.kind {
            Kind::Cpu(_) => Ok(Device::Cpu),
            Kind::Cuda => Device::new_cuda(device.ordinal),
            Kind::Metal => Device::new_metal(device.ordinal),
        };
        opened.map_err(|error| {
            let what = format!("device {:?} cannot be opened", device.described.device);
            Failure::new(Exit::Config, anyhow::Error::new(error).context(what))
        })
    };
    devices.list.iter().map(open).collect()
}

/// Prints what this host has to compute on, and who does.
///
/// # Errors
/// If the inventory cannot be read.
pub(crate) fn list(local: &Local, as_json: bool) -> Result<(), Failure> {
    let inventory = Inventory::read(&local.inventory).map_err(failure)?;
    let claims = Claims::in_folder(&local.device_locks);
    let processor = Processor::of_host();
    // One holder of several cores is told of once.
    let mut cores: Vec<Holder> =
        processor.cores.iter().filter_map(|core| claims.holder(&format!("cpu-{core}"))).collect();
    cores.dedup();
    if as_json {
        let gpus: Vec<_> = inventory
            .gpus
            .iter()
            .map(|gpu| {
                json!({
                    "index": gpu.index,
                    "uuid": gpu.uuid,
                    "name": gpu.name,
                    "memory_bytes": gpu.memory_bytes,
                    "claimed_by": claims.holder(&gpu.uuid),
                })
            })
            .collect();
        let cpu = json!({
            "cores": processor.cores.to_string(),
            "name": processor.name,
            "memory_bytes": processor.memory_bytes,
            "claimed_by": cores,
        });
        return output::line(json!({ "gpus": gpus, "cpu": cpu }));
    }
    let memory = |bytes: u64| format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30));
    let held = |holders: &[Holder]| match holders {
        [] => "-".to_owned(),
        holders => holders.iter().map(Holder::to_string).collect::<Vec<_>>().join("; "),
    };
    let mut rows = vec![["DEVICE", "UUID", "NAME", "MEMORY", "CLAIMED BY"].map(str::to_owned).to_vec()];
    rows.extend(inventory.gpus.iter().map(|gpu| {
        let holder: Vec<Holder> = claims.holder(&gpu.uuid).into_iter().collect();
        let device = format!("cuda:{}", gpu.index);
        vec![device, gpu.uuid.clone(), gpu.name.clone(), memory(gpu.memory_bytes), held(&holder)]
    }));
    let cpu = format!("cpu:{}", processor.cores);
    rows.push(vec![cpu, "-".to_owned(), processor.name, memory(processor.memory_bytes), held(&cores)]);
    output::line(output::table(&rows))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn local(device: &str) -> Local {
        Local { device: device.to_owned(), ..Local::default() }
    }

    #[test]
    fn a_device_that_is_not_there_is_refused_with_the_reason() {
        let held = take(&local("cpu"), "hand").unwrap();
        assert_eq!(held.devices.described()[0].device, "cpu");
        for (text, wanted) in [
            ("cpu:1000", "is not there: this process may run on cores"),
            ("tpu", "of no kind"),
            ("", "of no kind"),
            ("cuda:x", "must be numbered"),
            #[cfg(not(feature = "cuda"))]
            ("cuda:0", "--features cuda"),
            #[cfg(not(feature = "metal"))]
            ("metal", "--features metal"),
        ] {
            let Err(Failure::Told { exit, error }) = take(&local(text), "hand") else { panic!("{text} is refused") };
            assert_eq!(exit, Exit::Config);
            assert!(error.to_string().contains(wanted), "{error}");
        }
    }

    #[test]
    fn cores_that_are_held_are_refused_for_now() {
        let folder = tempfile::tempdir().unwrap();
        let core = devices::Cores::allowed().unwrap().iter().next().unwrap();
        let local = Local { device_locks: folder.path().to_owned(), ..local(&format!("cpu:{core}")) };
        let _held = take(&local, "hand").unwrap();
        let Err(Failure::Told { exit, error }) = take(&local, "brain") else { panic!("is refused") };
        assert_eq!(exit, Exit::Unavailable);
        assert!(error.to_string().contains(&format!("is held by a hand (process {}", std::process::id())), "{error}");
    }
}
