//! Objects as files, named by their hash.

use std::{
    fs,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use tokio::io::AsyncReadExt as _;

use crate::{Error, Result};

const CHUNK: usize = 256 * 1024;

pub(super) fn object_path(folder: &Path, hash: &str) -> PathBuf {
    folder.join("objects").join(hash.get(..2).unwrap_or("__")).join(hash)
}

/// Writes a file so that it is there in full or not at all, whenever the power goes.
pub(super) fn write_durably(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    use std::io::Write as _;
    if fs::metadata(path).is_ok_and(|metadata| metadata.len() == bytes.len() as u64) {
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
