//! Models that were downloaded from Hugging Face's hub, in the cache that its own tools keep: `hf download OWNER/NAME`.

use std::path::{Path, PathBuf};

/// The revision of a model that names none.
const USUAL: &str = "main";

/// A model of the hub: OWNER/NAME, or OWNER/NAME@REVISION (a branch, a tag or a commit).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Id<'a> {
    owner: &'a str,
    name: &'a str,
    revision: &'a str,
}

impl<'a> Id<'a> {
    /// Reads what may be one; a path of more or other parts is none.
    pub(crate) fn read(text: &'a str) -> Option<Self> {
        let (id, revision) = text.split_once('@').unwrap_or((text, USUAL));
        let (owner, name) = id.split_once('/')?;
        let plain = |part: &str| {
            !part.is_empty()
                && !part.starts_with('.')
                && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
        };
        // A tag may have slashes, a step to the folder above may not be in it.
        let named = !revision.is_empty() && revision.split('/').all(plain);
        (plain(owner) && plain(name) && named).then_some(Self { owner, name, revision })
    }

    /// OWNER/NAME
    pub(crate) fn repository(&self) -> String {
        format!("{}/{}", self.owner, self.name)
    }

    /// A branch, a tag or a commit.
    pub(crate) fn revision(&self) -> &str {
        self.revision
    }

    /// Its folder in a cache, if it is there.
    pub(crate) fn find(&self, cache: &Path) -> Option<PathBuf> {
        let Self { owner, name, revision } = self;
        let folder = cache.join(format!("models--{owner}--{name}"));
        let commit = std::fs::read_to_string(folder.join("refs").join(revision));
        let commit = commit.map_or_else(|_| (*revision).to_owned(), |commit| commit.trim().to_owned());
        // A reference is a file that anyone may have written.
        let snapshot = Some(commit).filter(|commit| commit.chars().all(|c| c.is_ascii_alphanumeric()))?;
        Some(folder.join("snapshots").join(snapshot)).filter(|folder| folder.is_dir())
    }
}

impl std::fmt::Display for Id<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.owner, self.name)?;
        if self.revision == USUAL { Ok(()) } else { write!(f, "@{}", self.revision) }
    }
}

/// Where downloads are kept: `HF_HUB_CACHE`, or `hub` in `HF_HOME`, which is `huggingface` in the user's cache folder if nothing else is said.
pub(crate) fn cache() -> Option<PathBuf> {
    let path = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let home = || Some(path("XDG_CACHE_HOME").or_else(|| Some(path("HOME")?.join(".cache")))?.join("huggingface"));
    path("HF_HUB_CACHE").or_else(|| Some(path("HF_HOME").or_else(home)?.join("hub")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_a_model_of_the_hub() {
        let id = Id::read("stabilityai/stable-diffusion-xl-base-1.0").unwrap();
        assert_eq!((id.owner, id.name, id.revision), ("stabilityai", "stable-diffusion-xl-base-1.0", "main"));
        assert_eq!(Id::read("a/b@v1").unwrap().revision, "v1");
        assert_eq!(Id::read("a/b@refs/pr/1").unwrap().revision, "refs/pr/1");
        for other in ["a", "a/b/c", "/a", "a/", "../b", "./b", "a b/c", "a/b@", "a/b@../c", "models/x/"] {
            assert_eq!(Id::read(other), None, "{other}");
        }
    }

    #[test]
    fn a_snapshot_by_branch_or_commit() {
        let cache = tempfile::tempdir().unwrap();
        let folder = cache.path().join("models--a--b");
        let snapshot = folder.join("snapshots/0123abcd");
        std::fs::create_dir_all(&snapshot).unwrap();
        std::fs::create_dir_all(folder.join("refs")).unwrap();
        let find = |text: &str| Id::read(text).unwrap().find(cache.path());
        assert_eq!(find("a/b"), None, "there is no reference yet");
        std::fs::write(folder.join("refs/main"), "0123abcd\n").unwrap();
        assert_eq!(find("a/b"), Some(snapshot.clone()));
        assert_eq!(find("a/b@0123abcd"), Some(snapshot));
        assert_eq!(find("a/b@other"), None);
        assert_eq!(find("a/c"), None);
        std::fs::write(folder.join("refs/main"), "../../x").unwrap();
        assert_eq!(find("a/b"), None);
    }
}
