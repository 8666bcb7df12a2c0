//! Pictures that requests refer to: from files to a server's object store.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use efferent_proto::{
    names,
    v1::{GenerateRequest, PictureSource, picture_source::Source},
    work,
};

use crate::{
    client::{Server, batch},
    exit::{Exit, Failure},
};

/// Has a server keep a file, if there is one to keep.
///
/// # Errors
/// If it cannot be read, or the server does not take it.
pub(crate) async fn put(server: &mut Server, path: Option<&Path>) -> Result<Option<PictureSource>, Failure> {
    let Some(path) = path else { return Ok(None) };
    let context = |error| anyhow::Error::new(error).context(format!("cannot read {}", path.display()));
    let file = std::fs::read(path).map_err(|error| Failure::new(Exit::File, context(error)))?;
    let hash = batch::put(server, file).await?;
    Ok(Some(PictureSource { source: Some(Source::Hash(hash)) }))
}

/// Has a server keep several files.
///
/// # Errors
/// As [`put`].
pub(crate) async fn put_each(server: &mut Server, paths: &[PathBuf]) -> Result<Vec<PictureSource>, Failure> {
    let mut kept = Vec::new();
    for path in paths {
        kept.extend(put(server, Some(path)).await?);
    }
    Ok(kept)
}

/// Has a server keep the files that items name instead of hashes, each once, and puts their hashes there. Their paths start at `folder`.
///
/// # Errors
/// As [`put`].
pub(crate) async fn put_all(server: &mut Server, items: &mut [GenerateRequest], folder: &Path) -> Result<(), Failure> {
    let mut known: HashMap<PathBuf, PictureSource> = HashMap::new();
    for source in items.iter_mut().flat_map(work::pictures_mut) {
        let Some(Source::Hash(named)) = &source.source else { continue };
        if names::is_hash(named) {
            continue;
        }
        let path = folder.join(named);
        if !known.contains_key(&path)
            && let Some(kept) = put(server, Some(&path)).await?
        {
            known.insert(path.clone(), kept);
        }
        if let Some(kept) = known.get(&path) {
            *source = kept.clone();
        }
    }
    Ok(())
}
