//! Models of Hugging Face's hub that are not on this machine: downloaded by its own library, into its own cache, where `hf download` would put them. So
//! what was begun is gone on with, a token is taken from where it usually is (`HF_TOKEN`, `hf auth login`), and mirrors (`HF_ENDPOINT`) serve.

use std::{
    io::IsTerminal as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde::Deserialize;

use super::hub::Id;
use crate::{
    exit::{Exit, Failure},
    output,
};

/// What is installed where Python has no such library.
const LIBRARY: &str = "huggingface_hub==2.4.0";
const SCRIPT: &str = include_str!("download.py");

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Answer {
    folder: Option<PathBuf>,
    error: Option<String>,
}

/// Downloads a model, or goes on with that. Returns its folder. Blocks.
///
/// # Errors
/// If there is no Python, no network, no such model, or none that may be had.
pub(crate) fn download(id: &Id<'_>, python: &str, home: &Path) -> Result<PathBuf, Failure> {
    let library = library(python, home)?;
    output::note(format_args!("fetching {id} from the hub"));
    let mut command = Command::new(python);
    command.args(["-c", SCRIPT, &id.repository(), id.revision()]).stdin(Stdio::null()).stderr(Stdio::inherit());
    command.envs(library.map(|folder| ("PYTHONPATH", folder)));
    if !std::io::stderr().is_terminal() {
        command.env("HF_HUB_DISABLE_PROGRESS_BARS", "1");
    }
    let output = command.output().map_err(|error| failed(format!("{python} cannot be started: {error}")))?;
    let answer: Answer = serde_json::from_slice(&output.stdout).unwrap_or_default();
    answer.folder.ok_or_else(|| {
        let error = answer.error.unwrap_or_else(|| "Python ended without an answer".to_owned());
        failed(format!("cannot fetch {id} from the hub: {error}"))
    })
}

fn failed(message: String) -> Failure {
    Failure::words(Exit::Fetch, message)
}

/// Where the library is, if it is not beside the configured Python's own: in a folder of ours, where pip puts it if it is not there yet.
fn library(python: &str, home: &Path) -> Result<Option<PathBuf>, Failure> {
    let has = |folder: Option<&Path>| {
        let mut command = Command::new(python);
        command.args(["-c", "import huggingface_hub"]).stderr(Stdio::null());
        command.envs(folder.map(|folder| ("PYTHONPATH", folder))).status().is_ok_and(|status| status.success())
    };
    if has(None) {
        return Ok(None);
    }
    let folder = home.join("tools").join("hub");
    if has(Some(&folder)) {
        return Ok(Some(folder));
    }
    output::note(format_args!("installing {LIBRARY} in {}", folder.display()));
    let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary=:all:", "--target"];
    let output = Command::new(python).args(pip).arg(&folder).arg(LIBRARY).stdin(Stdio::null()).output();
    let output = output.map_err(|error| failed(format!("{python} cannot be started: {error}")))?;
    if output.status.success() {
        return Ok(Some(folder));
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.lines().map(str::trim).rfind(|line| !line.is_empty()).unwrap_or("it said nothing");
    Err(failed(format!("pip cannot install the hub's library (`pip install huggingface_hub` does, too): {said}")))
}
