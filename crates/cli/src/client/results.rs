//! A folder with a batch's pictures and the list of its results, `results.jsonl`.
//!
//! Items that failed are asked for again, as they may have been given another try; of several lines for an item the last one counts.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{File, OpenOptions},
    io::{BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
};

use efferent_proto::v1::{BatchItem, ItemState};
use serde_json::{Value, json};

use crate::{
    client::json,
    exit::{Exit, Failure},
};

/// The list of results.
const RESULTS: &str = "results.jsonl";

/// The folder.
pub(crate) struct Results {
    /// The batch.
    pub(crate) id: String,
    /// Where its pictures go.
    pub(crate) folder: PathBuf,
    /// Its list.
    pub(crate) path: PathBuf,
    file: File,
    /// Items that have ended and are not asked for again.
    written: BTreeSet<u64>,
    /// All below it have.
    pub(crate) first_missing: u64,
    /// Jobs of the items that failed, as their last lines say: another try is another job.
    failed: BTreeMap<u64, String>,
}

impl Results {
    /// A folder, with what it has of a batch.
    ///
    /// # Errors
    /// If it cannot be read and written, or has another batch's results.
    pub(crate) fn open(folder: &Path, id: &str) -> Result<Self, Failure> {
        let path = folder.join(RESULTS);
        let wrong = |error: std::io::Error| {
            Failure::new(Exit::File, anyhow::Error::new(error).context(format!("cannot use {}", path.display())))
        };
        std::fs::create_dir_all(folder).map_err(wrong)?;
        let mut file = OpenOptions::new().read(true).append(true).create(true).open(&path).map_err(wrong)?;
        let (mut written, mut failed) = (BTreeSet::new(), BTreeMap::new());
        let mut whole = true;
        for line in BufReader::new(&file).split(b'\n') {
            // The last line may have been cut off.
            let Ok(value) = serde_json::from_slice::<Value>(&line.map_err(wrong)?) else {
                whole = false;
                continue;
            };
            if value["batch_id"] != id {
                let message = format!("{} belongs to another batch, {}", path.display(), value["batch_id"]);
                return Err(Failure::words(Exit::Usage, message));
            }
            let Some(index) = value["index"].as_u64() else { continue };
            if value["state"] == item_state(ItemState::Failed) {
                failed.insert(index, value["job_id"].as_str().unwrap_or_default().to_owned());
            } else {
                failed.remove(&index);
                written.insert(index);
            }
        }
        if !whole {
            file.write_all(b"\n").map_err(wrong)?;
        }
        let (id, folder) = (id.to_owned(), folder.to_owned());
        let mut results = Self { id, folder, path, file, written, first_missing: 0, failed };
        results.advance();
        Ok(results)
    }

    fn advance(&mut self) {
        while self.written.remove(&self.first_missing) {
            self.first_missing += 1;
        }
    }

    /// The first item that is missing, or failed when last heard of.
    pub(crate) fn first_open(&self) -> u64 {
        let failed = self.failed.first_key_value().map_or(u64::MAX, |(index, _)| *index);
        failed.min(self.first_missing)
    }

    /// Whether what became of an item is written.
    pub(crate) fn has(&self, item: &BatchItem) -> bool {
        match self.failed.get(&item.index) {
            // A job that is no longer kept has no id.
            Some(job) => item.state() == ItemState::Failed && (item.job_id == *job || item.job_id.is_empty()),
            None => item.index < self.first_missing || self.written.contains(&item.index),
        }
    }

    /// It need not be asked for again.
    pub(crate) fn heard(&mut self, index: u64) {
        if index >= self.first_missing {
            self.written.insert(index);
            self.advance();
        }
    }

    /// Items that need not be asked for again.
    pub(crate) fn count(&self) -> u64 {
        self.first_missing + self.written.len() as u64
    }

    /// Writes an item down, after its pictures.
    ///
    /// # Errors
    /// If the list cannot be written.
    pub(crate) fn add(&mut self, item: &BatchItem, paths: &[PathBuf]) -> Result<(), Failure> {
        let files = paths.iter().filter_map(|path| path.file_name()).map(|name| name.to_string_lossy());
        let images: Vec<_> = item
            .images
            .iter()
            .zip(files)
            .map(|(image, file)| {
                let mut value = json::image(image);
                value["file"] = json!(file);
                value
            })
            .collect();
        let request = item.request.clone().unwrap_or_default();
        let line = json!({
            "batch_id": self.id,
            "index": item.index,
            "state": item_state(item.state()),
            "prompt": request.prompt,
            "job_id": item.job_id,
            "images": images,
            "error": item.error.as_ref().map(json::error),
        });
        let written = self.file.write_all(format!("{line}\n").as_bytes());
        let context = |error| anyhow::Error::new(error).context(format!("cannot write {}", self.path.display()));
        written.map_err(|error| Failure::new(Exit::File, context(error)))?;
        match item.state() {
            ItemState::Failed => self.failed.insert(item.index, item.job_id.clone()),
            _ => self.failed.remove(&item.index),
        };
        self.heard(item.index);
        Ok(())
    }
}

fn item_state(state: ItemState) -> String {
    json::short(state.as_str_name(), "ITEM_STATE_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_remembers_what_it_has_of_its_batch() {
        let folder = tempfile::tempdir().unwrap();
        let add = |results: &mut Results, index| {
            results.add(&BatchItem { index, ..BatchItem::default() }, &[]).unwrap();
        };
        let mut results = Results::open(folder.path(), "one").unwrap();
        for index in [0, 1, 3] {
            add(&mut results, index);
        }
        let has = |results: &Results, index| results.has(&BatchItem { index, ..BatchItem::default() });
        assert_eq!((results.first_missing, results.count(), has(&results, 2), has(&results, 3)), (2, 3, false, true));
        drop(results);
        // Cut off while a line was written.
        OpenOptions::new().append(true).open(folder.path().join(RESULTS)).unwrap().write_all(b"{\"index\": 2").unwrap();
        let mut results = Results::open(folder.path(), "one").unwrap();
        assert_eq!((results.first_missing, results.count()), (2, 3));
        add(&mut results, 2);
        drop(results);
        assert_eq!(Results::open(folder.path(), "one").unwrap().first_missing, 4);
        assert!(Results::open(folder.path(), "two").is_err());
    }

    #[test]
    fn what_failed_is_asked_for_again_and_its_last_line_counts() {
        let folder = tempfile::tempdir().unwrap();
        let item = |index, state: ItemState, job: &str| {
            let mut item = BatchItem { index, job_id: job.to_owned(), ..BatchItem::default() };
            item.set_state(state);
            item
        };
        let mut results = Results::open(folder.path(), "one").unwrap();
        for (index, state) in [(0, ItemState::Succeeded), (1, ItemState::Failed), (2, ItemState::Succeeded)] {
            results.add(&item(index, state, "first"), &[]).unwrap();
        }
        assert_eq!((results.first_missing, results.first_open()), (3, 1), "listed anew when all is over");
        drop(results);
        let mut results = Results::open(folder.path(), "one").unwrap();
        assert_eq!((results.first_missing, results.count()), (1, 2), "listed anew from there");
        let (same, forgotten) = (item(1, ItemState::Failed, "first"), item(1, ItemState::Failed, ""));
        assert!(results.has(&same) && results.has(&forgotten) && results.has(&item(2, ItemState::Succeeded, "first")));
        results.heard(1);
        assert_eq!((results.first_missing, results.first_open()), (3, 1));
        for state in [ItemState::Failed, ItemState::Succeeded] {
            let tried = item(1, state, "second");
            assert!(!results.has(&tried), "{state:?}");
        }
        results.add(&item(1, ItemState::Succeeded, "second"), &[]).unwrap();
        drop(results);
        let results = Results::open(folder.path(), "one").unwrap();
        assert_eq!((results.first_missing, results.first_open()), (3, 3));
        assert_eq!(std::fs::read_to_string(folder.path().join(RESULTS)).unwrap().lines().count(), 4);
    }
}
