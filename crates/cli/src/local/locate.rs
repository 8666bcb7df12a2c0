//! Where model folders are.

use std::path::{Path, PathBuf};

use efferent_worker::pipeline::{self, MANIFEST, diffusers::INDEX};

use super::hub;
use crate::exit::{Exit, Failure};

/// The model that ships.
pub(crate) const USUAL: &str = "pictogram";
/// Stands for simulated engines instead of a model folder.
pub(crate) const SIM: &str = "sim";
/// The source tree that this program was made from, for those who run it from there.
const SOURCE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models");

/// Folders that hold model folders, in the order in which they are searched: `configured` (separated by colons) first.
pub(crate) fn shelves(configured: &str) -> Vec<PathBuf> {
    let mut shelves: Vec<PathBuf> =
        std::env::split_paths(configured).filter(|path| !path.as_os_str().is_empty()).collect();
    shelves.push(PathBuf::from("models"));
    if let Some(folder) = std::env::current_exe().ok().as_deref().and_then(Path::parent) {
        shelves.push(folder.join("models"));
        if let Some(prefix) = folder.parent() {
            shelves.push(prefix.join("share/efferent/models"));
        }
    }
    shelves.push(PathBuf::from(SOURCE));
    shelves
}

/// The folder of a model: a path, a name on the shelves, or a model of the hub that was downloaded.
///
/// # Errors
/// If there is none; says where it was looked for.
pub(crate) fn find(model: &str, shelves: &[PathBuf]) -> Result<PathBuf, Failure> {
    let model = if model.is_empty() { USUAL } else { model };
    let is_path = model.contains(['/', '\\']) || model.starts_with('.') || pipeline::is_model(Path::new(model));
    let places: Vec<PathBuf> = match is_path {
        true => vec![PathBuf::from(model)],
        false => shelves.iter().map(|shelf| shelf.join(model)).collect(),
    };
    if let Some(found) = places.iter().find(|place| pipeline::is_model(place)) {
        return Ok(found.clone());
    }
    if let (Some(id), Some(cache)) = (hub::Id::read(model), hub::cache()) {
        if let Some(found) = id.find(&cache) {
            return Ok(found);
        }
        if !places.iter().any(|place| place.exists()) {
            let cache = cache.display();
            let message = format!(
                "{model} is neither a folder nor in the download cache {cache}; `efferent models fetch {model}` fetches it from the hub"
            );
            return Err(Failure::words(Exit::Config, message));
        }
    }
    let looked: Vec<_> = places.iter().map(|place| place.display().to_string()).collect();
    let message = format!("no model folder {model:?} (with a {MANIFEST} or {INDEX}); looked at {}", looked.join(", "));
    Err(Failure::words(Exit::Config, message))
}

/// The model of the hub that a name stands for, where it stands for nothing on this machine.
pub(crate) fn of_hub(model: &str) -> Option<hub::Id<'_>> {
    hub::Id::read(model).filter(|_| !Path::new(model).exists())
}

/// Every model folder on the shelves; of several with one name the first, which is the one that is found.
pub(crate) fn all(shelves: &[PathBuf]) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = Vec::new();
    for shelf in shelves {
        let Ok(entries) = std::fs::read_dir(shelf) else { continue };
        let mut folders: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
        folders.sort();
        for folder in folders.into_iter().filter(|folder| pipeline::is_model(folder)) {
            if !found.iter().any(|known| known.file_name() == folder.file_name()) {
                found.push(folder);
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_a_path_or_a_name_on_a_shelf() {
        let shelf = tempfile::tempdir().unwrap();
        let folder = shelf.path().join("mine");
        std::fs::create_dir(&folder).unwrap();
        let shelves = [PathBuf::from("/nowhere"), shelf.path().to_owned()];
        let Err(Failure::Told { exit, error }) = find("mine", &shelves) else { panic!("there is no manifest yet") };
        assert_eq!(exit, Exit::Config);
        assert!(error.to_string().contains("looked at /nowhere/mine, "), "{error}");
        std::fs::write(folder.join(MANIFEST), "{}").unwrap();
        assert_eq!(find("mine", &shelves).unwrap(), folder);
        assert_eq!(find(folder.to_str().unwrap(), &[]).unwrap(), folder);
        assert_eq!(all(&shelves), [folder]);
        assert!(find("/nowhere/mine", &shelves).is_err());
        let Err(Failure::Told { error, .. }) = find("nobody/nothing@v1", &shelves) else { panic!("it is not there") };
        assert!(error.to_string().contains("`efferent models fetch nobody/nothing@v1` fetches it"), "{error}");
    }
}
