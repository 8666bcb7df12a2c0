//! What the program is told: defaults, then a TOML file, then the environment, then flags; later ones win.
//!
//! [`table`] lists every setting by key, flag and meaning; the types here give them types and defaults. Loading is one conversion:
//! [`load`] takes what the user typed and returns what the program needs, or says which value of which source is wrong. Nothing else
//! in this crate reads the environment for settings.

#[cfg(feature = "local")]
pub(crate) mod local;
pub(crate) mod table;

use std::{ffi::OsString, path::PathBuf};

use clap::{ArgMatches, parser::ValueSource};
use figment::{
    Figment, Metadata, Profile, Provider,
    providers::{Data, Serialized, Toml},
    value::{Dict, Map, Value},
};
use serde::{Deserialize, Serialize};

#[cfg(feature = "local")]
pub(crate) use local::Local;

const PREFIX: &str = "EFFERENT_";
/// The flag that names a configuration file. Not a setting, as it says where settings are.
pub(crate) const CONFIG: &str = "config";

/// Settings of client commands.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Client {
    /// Coordinators' addresses, separated by commas; empty for none.
    pub(crate) server: String,
    /// The model; empty to leave the choice to the server.
    pub(crate) model: String,
    /// On whose account; empty for the default one.
    pub(crate) tenant: String,
}

/// All settings, and where each came from.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    /// For client commands.
    pub(crate) client: Client,
    /// For what runs in this process.
    #[cfg(feature = "local")]
    pub(crate) local: Local,
    /// Variables that look like settings and are none. A client alone cannot know: they may be a server's.
    #[cfg_attr(not(any(feature = "local", test)), expect(dead_code, reason = "servers warn of them"))]
    pub(crate) strangers: Vec<String>,
    /// What was given by flags, as variables, so that processes that this one starts are told the same.
    #[cfg_attr(not(feature = "local"), expect(dead_code, reason = "a client starts no processes"))]
    pub(crate) flags: Vec<(String, String)>,
    figment: Figment,
}

/// Why the settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The configuration file cannot be read.
    #[error("cannot read the configuration file {}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// A value is malformed.
    #[error("{0}")]
    Value(String),
    /// A flag's value is malformed: a mistake in the command line, not in the configuration.
    #[error("{0}")]
    Flag(String),
    /// A key that is no setting.
    #[error("{key:?} in {origin} is not a setting; `efferent config` lists them")]
    Unknown {
        /// As given.
        key: String,
        /// The file or variable.
        origin: String,
    },
}

/// Settings from one variable or flag.
struct Layer {
    origin: String,
    values: Dict,
}

impl Provider for Layer {
    fn metadata(&self) -> Metadata {
        Metadata::named(self.origin.clone())
    }

    fn data(&self) -> figment::Result<Map<Profile, Dict>> {
        Ok(Profile::Default.collect(self.values.clone()))
    }
}

fn layer(origin: String, key: &str, value: Value) -> Layer {
    let nested = figment::util::nest(key, value);
    Layer { origin, values: nested.into_dict().unwrap_or_default() }
}

/// Defaults < file < environment < flags.
///
/// # Errors
/// The first value that is malformed or not a setting, and its source.
pub(crate) fn load(
    matches: &[&ArgMatches],
    environment: impl IntoIterator<Item = (OsString, OsString)>,
) -> Result<Settings, Error> {
    let environment: Vec<(String, String)> = environment
        .into_iter()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.to_string_lossy().into_owned())))
        .filter(|(name, _)| name.starts_with(PREFIX))
        .collect();
    let defaults = defaults();
    let default = |key: &str| defaults.find_value(key).ok();
    let mut figment = defaults.clone();
    if let Some(path) = file(matches, &environment)? {
        figment = figment.merge(Data::<Toml>::file_exact(path));
    }
    let mut strangers = Vec::new();
    for (name, text) in environment {
        if name == format!("{PREFIX}{}", CONFIG.to_uppercase()) {
            continue;
        }
        match table::all().find(|setting| setting.variable() == name) {
            Some(setting) => {
                let value = typed(default(setting.key).as_ref(), &text);
                figment = figment.merge(layer(format!("environment variable {name}"), setting.key, value));
            }
            // Orchestrators put variables like EFFERENT_PORT into containers; ours alone have sections.
            None if name.contains("__") && cfg!(feature = "local") => {
                return Err(Error::Unknown { key: name, origin: "the environment".to_owned() });
            }
            None => strangers.push(name),
        }
    }
    let mut flags = Vec::new();
    if let Some(path) = named_file(matches) {
        flags.push((format!("{PREFIX}{}", CONFIG.to_uppercase()), path.display().to_string()));
    }
    for setting in table::all() {
        let given = |matches: &&&ArgMatches| {
            matches.try_contains_id(setting.key).unwrap_or(false)
                && matches.value_source(setting.key) == Some(ValueSource::CommandLine)
        };
        if let Some(matches) = matches.iter().rev().find(given)
            && let Ok(Some(text)) = matches.try_get_one::<String>(setting.key)
        {
            let value = typed(default(setting.key).as_ref(), text);
            figment = figment.merge(layer(format!("flag --{}", setting.flag), setting.key, value));
            flags.push((setting.variable(), text.clone()));
        }
    }
    if cfg!(feature = "local") {
        check_keys(&figment, &defaults)?;
    }
    Ok(Settings {
        client: figment.extract().map_err(malformed)?,
        #[cfg(feature = "local")]
        local: figment.extract().map_err(malformed)?,
        strangers,
        flags,
        figment,
    })
}

impl Settings {
    /// Every setting with its value, where that came from, and what it means, as a configuration file.
    pub(crate) fn describe(&self) -> String {
        let mut text = String::new();
        for setting in table::all() {
            let value = self.figment.find_value(setting.key).map_or_else(|_| "\"\"".to_owned(), |value| toml(&value));
            let origin = match self.figment.find_metadata(setting.key) {
                Some(metadata) => match metadata.source.as_ref().and_then(|source| source.file_path()) {
                    Some(path) => format!("file {}", path.display()),
                    None if metadata.name.starts_with("flag") || metadata.name.starts_with("environment") => {
                        metadata.name.to_string()
                    }
                    None => "default".to_owned(),
                },
                None => "default".to_owned(),
            };
            text += &format!("# {} [--{}, {}]\n", setting.help, setting.flag, setting.variable());
            text += &format!("{} = {value}  # {origin}\n", setting.key);
        }
        text
    }
}

/// A setting's default, as help texts show it; `None` if it has none.
pub(crate) fn shown_default(key: &str) -> Option<String> {
    match defaults().find_value(key).ok()? {
        Value::String(_, text) if text.is_empty() => None,
        Value::String(_, text) => Some(text),
        value => Some(toml(&value)),
    }
}

fn defaults() -> Figment {
    let figment = Figment::from(Serialized::defaults(Client::default()));
    #[cfg(feature = "local")]
    let figment = figment.merge(Serialized::defaults(Local::default()));
    figment
}

/// The configuration file: the one that is named, or the user's if there is one.
fn file(matches: &[&ArgMatches], environment: &[(String, String)]) -> Result<Option<PathBuf>, Error> {
    let variable =
        environment.iter().find(|(name, _)| name == "EFFERENT_CONFIG").map(|(_, value)| PathBuf::from(value));
    if let Some(path) = named_file(matches).cloned().or(variable) {
        // Opened here because a missing file would count as an empty one.
        std::fs::File::open(&path).map_err(|source| Error::File { path: path.clone(), source })?;
        return Ok(Some(path));
    }
    Ok(user_folder("XDG_CONFIG_HOME", ".config").map(|folder| folder.join("config.toml")).filter(|path| path.is_file()))
}

/// The configuration file that a flag names.
fn named_file<'a>(matches: &[&'a ArgMatches]) -> Option<&'a PathBuf> {
    matches.iter().rev().find_map(|matches| matches.try_get_one::<PathBuf>(CONFIG).ok().flatten())
}

/// `efferent` in a folder of the user's, by the XDG convention.
fn user_folder(variable: &str, below_home: &str) -> Option<PathBuf> {
    let named = std::env::var_os(variable).map(PathBuf::from).filter(|path| path.is_absolute());
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(below_home));
    named.or_else(home).map(|folder| folder.join("efferent"))
}

/// Text as the type that the setting has, so that a model called `123` stays a name.
fn typed(default: Option<&Value>, text: &str) -> Value {
    match default {
        Some(Value::Bool(..) | Value::Num(..)) => text.parse().unwrap_or_else(|_| Value::from(text)),
        _ => Value::from(text),
    }
}

/// Refuses keys that are no settings, instead of ignoring them.
fn check_keys(figment: &Figment, defaults: &Figment) -> Result<(), Error> {
    let known = keys(defaults)?;
    for key in keys(figment)? {
        let section = format!("{key}.");
        if known.contains(&key) || known.iter().any(|known| known.starts_with(&section)) {
            continue;
        }
        let origin = match figment.find_metadata(&key) {
            Some(metadata) => match metadata.source.as_ref().and_then(|source| source.file_path()) {
                Some(path) => path.display().to_string(),
                None => metadata.name.to_string(),
            },
            None => "the configuration".to_owned(),
        };
        return Err(Error::Unknown { key, origin });
    }
    Ok(())
}

fn keys(figment: &Figment) -> Result<Vec<String>, Error> {
    fn walk(prefix: &str, dict: &Dict, keys: &mut Vec<String>) {
        for (name, value) in dict {
            match value {
                Value::Dict(_, inner) => walk(&format!("{prefix}{name}."), inner, keys),
                _ => keys.push(format!("{prefix}{name}")),
            }
        }
    }
    let mut found = Vec::new();
    walk("", &figment.extract::<Dict>().map_err(malformed)?, &mut found);
    Ok(found)
}

fn malformed(error: figment::Error) -> Error {
    let is_flag = error.metadata.as_ref().is_some_and(|metadata| metadata.name.starts_with("flag"));
    // A syntax error of TOML comes with a drawing of the line; its words are enough.
    let text = error.to_string();
    let words: Vec<&str> = text
        .lines()
        .filter(|line| !line.trim_start_matches(|c: char| c.is_ascii_digit() || c == ' ').starts_with('|'))
        .collect();
    let text = words.join(": ");
    if is_flag { Error::Flag(text) } else { Error::Value(text) }
}

/// A value as TOML spells it.
fn toml(value: &Value) -> String {
    match value {
        // TOML's basic strings have JSON's escapes.
        Value::String(_, text) => serde_json::Value::from(text.as_str()).to_string(),
        Value::Bool(_, value) => value.to_string(),
        Value::Num(_, number) => match (number.to_u128(), number.to_i128()) {
            (Some(number), _) => number.to_string(),
            (None, Some(number)) => number.to_string(),
            (None, None) => number.to_f64().map(|number| number.to_string()).unwrap_or_default(),
        },
        other => serde_json::to_string(other).unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_and_the_types_agree() {
        let mut listed: Vec<String> = table::all().map(|setting| setting.key.to_owned()).collect();
        let mut typed = keys(&defaults()).unwrap();
        listed.sort();
        typed.sort();
        assert_eq!(listed, typed);
        let mut flags: Vec<_> = table::all().map(|setting| setting.flag).collect();
        flags.sort_unstable();
        flags.dedup();
        assert_eq!(flags.len(), listed.len(), "flags differ");
    }

    #[test]
    fn the_environment_is_read_by_type_and_strangers_are_named() {
        let variables = [("EFFERENT_MODEL", "123"), ("EFFERENT_PORT", "tcp://10.0.0.1:80"), ("PATH", "/bin")];
        let variables = variables.map(|(name, value)| (OsString::from(name), OsString::from(value)));
        let settings = load(&[], variables).unwrap();
        assert_eq!(settings.client.model, "123");
        assert_eq!(settings.strangers, ["EFFERENT_PORT"]);
    }

    #[cfg(feature = "local")]
    #[test]
    fn flags_can_be_handed_on_as_variables() {
        let words = ["efferent", "hand", "--nats", "nats://n:4222", "--sim-step", "5ms", "--log-format=json"];
        let matches = crate::args::command().get_matches_from(words);
        let (_, hand) = matches.subcommand().unwrap();
        let settings = load(&[&matches, hand], []).unwrap();
        let mut flags = settings.flags.clone();
        flags.sort();
        let wanted =
            [("EFFERENT_LOG_FORMAT", "json"), ("EFFERENT_NATS", "nats://n:4222"), ("EFFERENT_SIM__STEP", "5ms")];
        assert_eq!(flags, wanted.map(|(name, value)| (name.to_owned(), value.to_owned())));
        let variables = flags.into_iter().map(|(name, value)| (OsString::from(name), OsString::from(value)));
        let heard = load(&[], variables).unwrap();
        assert_eq!(
            (heard.local.nats.url.as_str(), heard.local.sim.step.at(1)),
            ("nats://n:4222", std::time::Duration::from_millis(5))
        );
    }
}
