//! What the pages show can be typed, and whatever asks a server can be told which.

#[cfg(feature = "local")]
use std::path::{Path, PathBuf};

use clap::Command;

use super::command;

/// Commands that ask no coordinator, by path; those below them neither.
const ALONE: [&str; 12] = [
    "up",
    "coordinator",
    "brain",
    "hand",
    "devices",
    "models fetch",
    "models inspect",
    "plan",
    "bench",
    "ready",
    "config",
    "completions",
];

/// Adds each command that can be given as it is, by path.
fn leaves<'a>(command: &'a Command, path: &str, found: &mut Vec<(String, &'a Command)>) {
    for below in command.get_subcommands() {
        let path = format!("{path} {}", below.get_name()).trim().to_owned();
        if ALONE.contains(&path.as_str()) {
            continue;
        }
        // Not those that only hold others, such as `batch`.
        if !below.is_subcommand_required_set() {
            found.push((path.clone(), below));
        }
        leaves(below, &path, found);
    }
}

#[test]
fn whatever_asks_a_server_can_be_told_which_and_on_whose_account() {
    let command = command();
    let mut found = Vec::new();
    leaves(&command, "", &mut found);
    assert!(found.len() >= 20 && found.iter().any(|(path, _)| path == "signal drop"), "{}", found.len());
    for (path, command) in found {
        for flag in ["server", "tenant"] {
            assert!(command.get_arguments().any(|arg| arg.get_long() == Some(flag)), "{path} knows no --{flag}");
        }
    }
}

/// The README and every page below `docs`.
#[cfg(feature = "local")]
fn pages() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let (mut folders, mut pages) = (vec![root.join("docs")], vec![root.join("README.md")]);
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            match entry.unwrap().path() {
                path if path.is_dir() => folders.push(path),
                path if path.extension().is_some_and(|extension| extension == "md") => pages.push(path),
                _ => {}
            }
        }
    }
    pages
}

/// The words of a line of a shell, as far as pages use it: quotes, and a comment at the end.
#[cfg(feature = "local")]
fn words(line: &str) -> Vec<String> {
    let (mut words, mut word, mut quote) = (Vec::new(), None::<String>, None);
    for letter in line.chars() {
        match (quote, letter) {
            (Some(open), letter) if letter == open => quote = None,
            (None, '\'' | '"') => {
                quote = Some(letter);
                word.get_or_insert_default();
            }
            (None, '#') if word.is_none() => break,
            (None, letter) if letter.is_whitespace() => words.extend(word.take()),
            (_, letter) => word.get_or_insert_default().push(letter),
        }
    }
    words.extend(word);
    words
}

/// The commands of ours in a line: itself, and what it puts into its own with `$(...)`.
#[cfg(feature = "local")]
fn commands(line: &str) -> Vec<String> {
    let line = line.trim().trim_start_matches("$ ");
    let is_ours = |line: &&str| ["efferent ", "target/release/efferent "].iter().any(|name| line.starts_with(name));
    let inner = line.split_once("$(").and_then(|(before, rest)| Some((before, rest.rsplit_once(')')?)));
    let Some((before, (inner, after))) = inner.filter(|_| is_ours(&line)) else {
        return Some(line).filter(is_ours).map(str::to_owned).into_iter().collect();
    };
    [vec![format!("{before}OUTPUT{after}")], commands(inner)].concat()
}

#[cfg(feature = "local")]
#[test]
fn every_command_that_a_page_shows_can_be_typed() {
    let mut count = 0;
    for page in pages() {
        let text = std::fs::read_to_string(&page).unwrap();
        let mut fenced = false;
        for line in text.lines() {
            fenced ^= line.starts_with("```");
            if !fenced && !line.starts_with("    ") {
                continue;
            }
            for shown in commands(line) {
                count += 1;
                let told = format!("{}: {shown}", page.display());
                let matches =
                    command().try_get_matches_from(words(&shown)).unwrap_or_else(|error| panic!("{told}: {error}"));
                // These end at once if they are told of no queue.
                if let Some((role @ ("coordinator" | "brain" | "hand"), args)) = matches.subcommand() {
                    assert!(args.contains_id("nats.url"), "{told}: {role} needs --nats");
                }
            }
        }
    }
    assert!(count >= 25, "{count} are found");
}
