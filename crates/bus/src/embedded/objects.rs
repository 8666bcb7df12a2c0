//! Objects as files, named by their hash.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use rusqlite::params;
use tokio::io::AsyncReadExt as _;

use super::{Embedded, database::after};
use crate::{Error, Result};

const CHUNK: usize = 256 * 1024;
/// How often an object is written whose file is removed before it is noted: each time, somebody has deleted it just then.
pub(super) const TRIES: u32 = 10;

impl Embedded {
    /// Notes an object whose file was written. False if the file is gone since: what was noted of the same bytes before was deleted or has expired.
    pub(super) async fn note_object(&self, hash: &str, length: u64, ttl: Option<Duration>) -> Result<bool> {
        let (name, path, until) = (hash.to_owned(), object_path(&self.inner.folder, hash), ttl.map(after));
        self.inner
            .call(
                || "storing an object".to_owned(),
                move |transaction, _| {
                    // Files are removed on this thread alone, and only those that are not noted.
                    if !is_there(&path, length) {
                        return Ok(false);
                    }
                    // The later of both; in SQL the larger of something and NULL, which is never, is NULL.
                    let statement = "INSERT INTO objects VALUES (?1, ?2, ?3)
                        ON CONFLICT (hash) DO UPDATE SET until = max(until, ?3)";
                    let length = i64::try_from(length).unwrap_or(i64::MAX);
                    transaction.prepare_cached(statement)?.execute(params![name, length, until])?;
                    Ok(true)
                },
            )
            .await
    }
}

pub(super) fn object_path(folder: &Path, hash: &str) -> PathBuf {
    folder.join("objects").join(hash.get(..2).unwrap_or("__")).join(hash)
}

fn is_there(path: &Path, length: u64) -> bool {
    fs::metadata(path).is_ok_and(|metadata| metadata.len() == length)
}

/// Writes a file so that it is there in full or not at all, whenever the power goes.
pub(super) fn write_durably(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    use std::io::Write as _;
    if is_there(path, bytes.len() as u64) {
        return Ok(());
    }
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let part = path.with_extension(format!("part{}", efferent_proto::names::new_job_id()));
    let write = || {
        let mut file = fs::File::create(&part)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&part, path)
    };
    write().inspect_err(|_| drop(fs::remove_file(&part)))?;
    fs::File::open(folder)?.sync_all()
}

pub(super) type Reading = Option<(tokio::fs::File, blake3::Hasher, String)>;

pub(super) async fn next_chunk(state: Reading) -> Option<(Result<Bytes>, Reading)> {
    let (mut file, mut hasher, hash) = state?;
    let mut chunk = vec![0; CHUNK];
    let mut filled = 0;
    while filled < CHUNK {
        match file.read(&mut chunk[filled..]).await {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) => return Some((Err(Error::unavailable(format!("reading object {hash}"), error)), None)),
        }
    }
    chunk.truncate(filled);
    hasher.update(&chunk);
    if filled == CHUNK {
        return Some((Ok(chunk.into()), Some((file, hasher, hash))));
    }
    if hasher.finalize().to_hex().as_str() != hash {
        let what = format!("object {hash} is damaged: its bytes have another hash");
        return Some((Err(Error::Unavailable { what, source: None }), None));
    }
    Some((Ok(chunk.into()), None))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Bus as _, read_object};

    const BYTES: &[u8] = b"the same bytes";

    #[tokio::test]
    async fn an_object_that_is_noted_while_it_is_deleted_keeps_its_file() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let bus = Embedded::open(folder.path()).await.expect("opens");
        let hash = bus.put_object(BYTES.into(), None).await.expect("stores");
        // Held until the others wait behind it, in this order: they are one transaction.
        let (release, released) = std::sync::mpsc::channel();
        let hold = bus.inner.call(|| "waiting".to_owned(), move |_, _| Ok(released.recv().is_ok()));
        let (delete, note) = (bus.delete_object(&hash), bus.note_object(&hash, BYTES.len() as u64, None));
        let release = async { release.send(()).expect("the thread waits") };
        let (held, deleted, noted, ()) = futures::join!(hold, delete, note, release);
        assert!(held.expect("waits"));
        deleted.expect("deletes");
        assert!(noted.expect("notes"), "the file was there");
        let read = read_object(&bus, &hash).await.expect("reads");
        assert_eq!(read.as_deref(), Some(BYTES), "what is noted has its file");
    }

    #[tokio::test]
    async fn an_object_whose_file_is_gone_is_not_noted() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let bus = Embedded::open(folder.path()).await.expect("opens");
        let hash = bus.put_object(BYTES.into(), None).await.expect("stores");
        bus.delete_object(&hash).await.expect("deletes");
        assert!(!object_path(folder.path(), &hash).exists(), "a deleted object's file is removed");
        // As if the file had been found, and the deletion had come in between.
        assert!(!bus.note_object(&hash, BYTES.len() as u64, None).await.expect("looks"));
        assert_eq!(bus.put_object(BYTES.into(), None).await.expect("stores"), hash);
        assert_eq!(read_object(&bus, &hash).await.expect("reads").as_deref(), Some(BYTES));
    }
}
