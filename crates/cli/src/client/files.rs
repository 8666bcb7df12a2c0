//! Where pictures go.

use std::{
    ffi::OsStr,
    io::Write as _,
    path::{Path, PathBuf},
};

use crate::{
    args::Format,
    exit::{Exit, Failure},
    output,
};

/// Longest part of a file's name that is made of the prompt.
const MAX_SLUG: usize = 48;

/// Where the pictures of a request go, and in which format.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    target: Target,
    /// The format to ask for.
    pub(crate) format: Format,
    slug: String,
    count: u32,
}

#[derive(Debug, Clone)]
enum Target {
    /// Into a folder, named after prompt and seed.
    Named(PathBuf),
    File(PathBuf),
    Stdout,
}

impl Plan {
    /// Decides from what was typed.
    ///
    /// # Errors
    /// If the format cannot be told or is told twice differently, or the folder is not there: before any work is done.
    pub(crate) fn new(
        prompt: &str,
        output: Option<&Path>,
        format: Option<Format>,
        count: u32,
    ) -> Result<Self, Failure> {
        let usage = |message: String| Failure::words(Exit::Usage, message);
        let target = match output {
            None => Target::Named(PathBuf::new()),
            Some(path) if path == Path::new("-") => Target::Stdout,
            Some(path) if path.is_dir() => Target::Named(path.to_owned()),
            Some(path) => Target::File(path.to_owned()),
        };
        let mut chosen = format.unwrap_or(Format::Png);
        match &target {
            Target::File(path) => {
                let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
                if path.file_name().is_none() || folder.is_some_and(|folder| !folder.is_dir()) {
                    return Err(Failure::words(Exit::File, format!("there is no folder for {}", path.display())));
                }
                if let Some(extension) = path.extension().and_then(OsStr::to_str) {
                    match (Format::of_extension(extension), format) {
                        (Some(named), Some(given)) if named != given => {
                            return Err(usage(
                                format!("{} does not fit --format {given:?}", path.display()).to_lowercase(),
                            ));
                        }
                        (Some(named), _) => chosen = named,
                        (None, Some(_)) => {}
                        (None, None) => {
                            let message =
                                format!("no format is called .{extension}; name one with --format png|jpeg|webp");
                            return Err(usage(message));
                        }
                    }
                }
            }
            Target::Stdout if count != 1 => return Err(usage("only one image fits on stdout".to_owned())),
            Target::Stdout | Target::Named(_) => {}
        }
        Ok(Self { target, format: chosen, slug: slug(prompt), count })
    }

    /// Whether the picture itself is written to stdout, so that nothing else may be.
    pub(crate) fn is_stdout(&self) -> bool {
        matches!(self.target, Target::Stdout)
    }

    /// Writes a picture, whole or not at all, and returns where it is; `None` if it went to stdout.
    ///
    /// # Errors
    /// If it cannot be written.
    pub(crate) fn write(&self, image_index: u32, seed: u64, data: &[u8]) -> Result<Option<PathBuf>, Failure> {
        let path = match &self.target {
            Target::Stdout => return output::bytes(data).map(|()| None),
            Target::Named(folder) => folder.join(format!("{}-{seed}.{}", self.slug, self.format.extension())),
            Target::File(path) if self.count == 1 => path.clone(),
            Target::File(path) => numbered(path, image_index + 1),
        };
        write(&path, data)?;
        Ok(Some(path))
    }
}

/// Writes a file, whole or not at all.
///
/// # Errors
/// If it cannot be written.
pub(crate) fn write(path: &Path, data: &[u8]) -> Result<(), Failure> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.part", std::process::id()));
    let part = path.with_file_name(name);
    let written = std::fs::File::create(&part)
        .and_then(|mut file| file.write_all(data))
        .and_then(|()| std::fs::rename(&part, path));
    written.map_err(|error| {
        let _ = std::fs::remove_file(&part);
        Failure::new(Exit::File, anyhow::Error::new(error).context(format!("cannot write {}", path.display())))
    })
}

/// `apple.png` -> `apple-2.png`.
fn numbered(path: &Path, number: u32) -> PathBuf {
    let mut name = path.file_stem().unwrap_or_default().to_owned();
    name.push(format!("-{number}"));
    if let Some(extension) = path.extension() {
        name.push(".");
        name.push(extension);
    }
    path.with_file_name(name)
}

/// A prompt as part of a file's name: letters and digits of any script, joined by dashes.
fn slug(prompt: &str) -> String {
    let mut slug = String::new();
    for word in prompt.to_lowercase().split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()) {
        if slug.len() + word.len() >= MAX_SLUG {
            break;
        }
        if !slug.is_empty() {
            slug.push('-');
        }
        slug.push_str(word);
    }
    if slug.is_empty() { "image".to_owned() } else { slug }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_made_of_prompt_and_seed() {
        for (prompt, wanted) in [
            ("A red apple, to the left!", "a-red-apple-to-the-left"),
            ("../../etc/passwd", "etc-passwd"),
            ("\n", "image"),
            ("猫 und Hund", "猫-und-hund"),
            (&"x".repeat(500), "image"),
            (&"word ".repeat(50), "word-word-word-word-word-word-word-word-word"),
        ] {
            assert_eq!(slug(prompt), wanted);
        }
    }

    #[test]
    fn the_format_is_told_once() {
        let format = |output: &str, format| Plan::new("p", Some(Path::new(output)), format, 1).map(|plan| plan.format);
        assert_eq!(format("a.JPG", None).unwrap(), Format::Jpeg);
        assert_eq!(format("a", None).unwrap(), Format::Png);
        assert_eq!(format("a.dat", Some(Format::Webp)).unwrap(), Format::Webp);
        for (output, given, exit) in [
            ("a.png", Some(Format::Jpeg), Exit::Usage),
            ("a.gif", None, Exit::Usage),
            ("/nowhere/a.png", None, Exit::File),
            ("..", Some(Format::Png), Exit::Usage),
        ] {
            match format(output, given) {
                Err(Failure::Told { exit: told, .. }) => assert_eq!(told, exit, "{output}"),
                // A folder is a fine target.
                other => assert!(output == ".." && other.is_ok(), "{output}"),
            }
        }
        assert!(Plan::new("p", Some(Path::new("-")), None, 2).is_err());
    }

    #[test]
    fn several_images_are_numbered_and_whole() {
        let folder = tempfile::tempdir().unwrap();
        let plan = Plan::new("a cat", Some(&folder.path().join("x.png")), None, 2).unwrap();
        let path = plan.write(1, 8, b"data").unwrap().unwrap();
        assert_eq!(path, folder.path().join("x-2.png"));
        let plan = Plan::new("a cat", Some(folder.path()), None, 1).unwrap();
        assert_eq!(plan.write(0, 8, b"data").unwrap().unwrap(), folder.path().join("a-cat-8.png"));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2, "no part is left behind");
        assert!(write(&folder.path().join("no/such"), b"").is_err());
    }
}
