//! Models of Hugging Face's hub that are not on this machine: downloaded by its own library, into its own cache, where `hf download` would put them. So
//! what was begun is gone on with, a token is taken from where it usually is (`HF_TOKEN`, `hf auth login`), and mirrors (`HF_ENDPOINT`) serve.

use std::{
    fs,
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
    let python = library(python, home)?;
    output::note(format_args!("fetching {id} from the hub"));
    let mut command = Command::new(&python);
    command.args(["-c", SCRIPT, &id.repository(), id.revision()]).stdin(Stdio::null()).stderr(Stdio::inherit());
    if !std::io::stderr().is_terminal() {
        command.env("HF_HUB_DISABLE_PROGRESS_BARS", "1");
    }
    let output =
        command.output().map_err(|error| failed(format!("{} cannot be started: {error}", python.display())))?;
    let answer: Answer = serde_json::from_slice(&output.stdout).unwrap_or_default();
    answer.folder.ok_or_else(|| {
        let error = answer.error.unwrap_or_else(|| "Python ended without an answer".to_owned());
        failed(format!("cannot fetch {id} from the hub: {error}"))
    })
}

fn failed(message: String) -> Failure {
    Failure::words(Exit::Fetch, message)
}

/// A Python with the library: the configured one, or one in a folder of ours.
fn library(python: &str, home: &Path) -> Result<PathBuf, Failure> {
    let has = |python: &Path| {
        let tried = Command::new(python).args(["-c", "import huggingface_hub"]).stderr(Stdio::null()).status();
        tried.is_ok_and(|status| status.success())
    };
    if has(Path::new(python)) {
        return Ok(PathBuf::from(python));
    }
    let folder = home.join("tools").join("hub");
    let ours = folder.join("bin").join("python");
    if has(&ours) {
        return Ok(ours);
    }
    output::note(format_args!("installing {LIBRARY} in {}", folder.display()));
    let made = fs::create_dir_all(&folder);
    made.map_err(|error| failed(format!("cannot make {}: {error}", folder.display())))?;
    let run = |program: &Path, args: &[&str], what: &str| {
        let output = Command::new(program).args(args).stdin(Stdio::null()).output();
        let output = output.map_err(|error| failed(format!("{} cannot be started: {error}", program.display())))?;
        let said = String::from_utf8_lossy(&output.stderr);
        let said = said.lines().map(str::trim).rfind(|line| !line.is_empty()).unwrap_or("it said nothing");
        if output.status.success() { Ok(()) } else { Err(failed(format!("{what}: {said}"))) }
    };
    let place = folder.display().to_string();
    run(Path::new(python), &["-m", "venv", &place], "cannot make a place for the hub's library")?;
    let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary=:all:", LIBRARY];
    run(
        &ours,
        &pip,
        "cannot install the hub's library; `pip install huggingface_hub` for the Python in use does, too",
    )?;
    Ok(ours)
}
