//! Every setting: its key in files and (in capitals, after `EFFERENT_`) in the environment, its flag, and what it does.
//!
//! Flags, help texts, the environment's names and `efferent config` are all made from this table, so that they cannot disagree.
//! Defaults are not in it: they are those of the types in [`super`].

/// Settings that belong together. A command takes the flags of some groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Group {
    /// Which server to ask.
    Server,
    /// Which model.
    Model,
    /// Where things are kept, and logs.
    #[cfg(feature = "local")]
    Process,
    /// Where models and weights come from, and what they are kept as.
    #[cfg(feature = "local")]
    Weights,
    /// What to compute on.
    #[cfg(feature = "local")]
    Device,
    /// What a host has to compute on.
    #[cfg(feature = "local")]
    Host,
    /// The coordinator's port and habits.
    #[cfg(feature = "local")]
    Coordinator,
    /// The admin port.
    #[cfg(feature = "local")]
    Admin,
    /// The queue's server, and what all processes on it must agree on.
    #[cfg(feature = "local")]
    Queue,
    /// The brain worker's habits.
    #[cfg(feature = "local")]
    Brain,
    /// The hand worker's habits.
    #[cfg(feature = "local")]
    Hand,
    /// What simulated engines cost.
    #[cfg(feature = "local")]
    Sim,
}

impl Group {
    /// Its heading in `--help`.
    pub(crate) fn heading(self) -> &'static str {
        match self {
            Self::Server => "Server",
            Self::Model => "Model",
            #[cfg(feature = "local")]
            Self::Process => "Process",
            #[cfg(feature = "local")]
            Self::Weights | Self::Device => "Model",
            #[cfg(feature = "local")]
            Self::Host => "Host",
            #[cfg(feature = "local")]
            Self::Coordinator => "Coordinator",
            #[cfg(feature = "local")]
            Self::Admin => "Process",
            #[cfg(feature = "local")]
            Self::Queue => "Queue",
            #[cfg(feature = "local")]
            Self::Brain => "Brain",
            #[cfg(feature = "local")]
            Self::Hand => "Hand",
            #[cfg(feature = "local")]
            Self::Sim => "Simulated engines (with --model sim)",
        }
    }
}

/// A setting.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Setting {
    /// Its group.
    pub(crate) group: Group,
    /// Dotted key in the configuration file.
    pub(crate) key: &'static str,
    /// Its flag, without the dashes.
    pub(crate) flag: &'static str,
    /// A word for its value in help texts.
    pub(crate) value: &'static str,
    /// What it does, with unit.
    pub(crate) help: &'static str,
}

const fn setting(
    group: Group,
    key: &'static str,
    flag: &'static str,
    value: &'static str,
    help: &'static str,
) -> Setting {
    Setting { group, key, flag, value, help }
}

impl Setting {
    /// The environment variable that sets it.
    pub(crate) fn variable(&self) -> String {
        let short = match self.key {
            "nats.url" => "nats",
            "log.filter" => "log",
            "log.format" => "log_format",
            "log.otlp" => "otlp",
            key => return format!("EFFERENT_{}", key.replace('.', "__").to_uppercase()),
        };
        format!("EFFERENT_{}", short.to_uppercase())
    }
}

/// Every setting of this build.
pub(crate) fn all() -> impl Iterator<Item = &'static Setting> {
    let settings = CLIENT.iter();
    #[cfg(feature = "local")]
    let settings = settings.chain(LOCAL);
    settings
}

const CLIENT: &[Setting] = &[
    setting(
        Group::Server,
        "server",
        "server",
        "URL",
        "Coordinators to ask, http://HOST:PORT, separated by commas; if one breaks off, the next is asked. `generate` and `models` \
         work in this process if none is given; other commands then ask http://127.0.0.1:50051",
    ),
    setting(
        Group::Server,
        "tenant",
        "tenant",
        "NAME",
        "On whose account requests and batches are: shares and quotas go by it",
    ),
    setting(
        Group::Model,
        "model",
        "model",
        "NAME",
        "Model: a name, or (without --server) a model folder, or OWNER/NAME[@REVISION] of the hub if `hf download` has it. If none is given, a server picks the only model it serves; without a \
         server it is pictogram. `sim` stands for simulated engines, which draw no pictures worth seeing",
    ),
];

#[cfg(feature = "local")]
const LOCAL: &[Setting] = &[
    setting(
        Group::Process,
        "home",
        "home",
        "FOLDER",
        "Where fetched weights (brains/) and the embedded queue (data/) are kept",
    ),
    setting(
        Group::Process,
        "log.filter",
        "log",
        "FILTER",
        "Log lines on stderr, in the form of tracing's directives: info, efferent_hand=debug,warn. If none is given: warn for client \
         commands, info for servers",
    ),
    setting(Group::Process, "log.format", "log-format", "FORMAT", "Form of log lines: text or json"),
    setting(
        Group::Process,
        "log.otlp",
        "otlp",
        "URL",
        "OpenTelemetry collector that gets traces (OTLP over gRPC, http://HOST:4317). None if not given",
    ),
    setting(
        Group::Weights,
        "models",
        "models",
        "FOLDERS",
        "Folders of model folders, separated by colons, searched before ./models, models/ and ../share/efferent/models beside the \
         program, and models/ of its source tree",
    ),
    setting(
        Group::Weights,
        "offline",
        "offline",
        "true|false",
        "Never fetch the brain's weights: fail if they are missing",
    ),
    setting(Group::Weights, "python", "python", "PROGRAM", "Python whose pip fetches the brain's weights"),
    setting(
        Group::Weights,
        "dtype",
        "dtype",
        "TYPE|PART=TYPE,...",
        "What weights are kept as in memory: auto (as the files have them), f32, f16 or bf16, for all parts of a model or by name, bf16,vae=f32; \
         `efferent models inspect` names them. Only matrices, and what is computed between layers is f32 throughout",
    ),
    setting(
        Group::Device,
        "device",
        "device",
        "DEVICE",
        "What to compute on, claimed for this process alone: cpu:0-3 or cpu:0,2 for cores of its own; cuda:0, cuda:GPU-<uuid> or several, \
         cuda:0,cuda:1, in builds with --features cuda; metal in builds with --features metal; cpu for a processor that is shared",
    ),
    setting(
        Group::Device,
        "also",
        "also",
        "MODEL,...",
        "Models that a worker serves besides --model. It then loads each when it is asked for, and lets go of what was used longest ago when memory runs short",
    ),
    setting(
        Group::Device,
        "model_memory",
        "model-memory",
        "BYTES",
        "Most bytes of models that a brain, and a hand, with several keeps loaded; 0 for four fifths of what can be had at its start",
    ),
    setting(
        Group::Device,
        "model_patience",
        "model-patience",
        "TIME",
        "How long work for a model waits at most for workers that have it loaded, and for models that are in use where it is not",
    ),
    setting(
        Group::Host,
        "device_locks",
        "device-locks",
        "FOLDER",
        "Where devices are claimed, the same for all workers of a host. If none is given: efferent-devices in the folder for temporary files",
    ),
    setting(
        Group::Host,
        "inventory",
        "inventory",
        "FILE",
        "What GPUs the host has (JSON, as `efferent devices --json` prints). If none is given, NVIDIA's driver is asked, if there is one",
    ),
    setting(Group::Coordinator, "listen", "listen", "HOST:PORT", "Address of the gRPC port; port 0 picks a free one"),
    setting(
        Group::Coordinator,
        "coordinator.max_streams",
        "max-streams",
        "N",
        "Most event streams open at once; more are refused",
    ),
    setting(
        Group::Coordinator,
        "coordinator.default_deadline",
        "default-deadline",
        "TIME",
        "Deadline of requests that name none",
    ),
    setting(
        Group::Coordinator,
        "coordinator.measure_interval",
        "measure-interval",
        "TIME",
        "How often queue depths are measured for /metrics",
    ),
    setting(
        Group::Coordinator,
        "coordinator.grace",
        "coordinator-grace",
        "TIME",
        "How long a stop waits for calls in progress",
    ),
    setting(
        Group::Coordinator,
        "coordinator.tenants",
        "tenants",
        "TERMS",
        "Shares and quotas, such as 'studio weight=4 queued=200000; * running=64 rate=20': weight in the sharing of hands among batches, most \
         items waiting in batches, most items of batches running and (apart) streams open at a coordinator, most requests a second at a \
         coordinator; * stands for tenants that are not named",
    ),
    setting(
        Group::Admin,
        "admin",
        "admin",
        "HOST:PORT",
        "Address of the admin port (/healthz, /readyz, /metrics); port 0 picks a free one; off for none. If none is given: \
         127.0.0.1, port 9090 for up and coordinator, 9091 for brain, 9092 for hand",
    ),
    setting(
        Group::Queue,
        "nats.url",
        "nats",
        "URL",
        "NATS servers with JetStream (2.12 or newer), nats://HOST:4222, separated by commas. `up` uses the embedded queue if none \
         is given",
    ),
    setting(
        Group::Queue,
        "nats.credentials",
        "nats-credentials",
        "FILE",
        "Credentials for NATS (.creds). None if not given",
    ),
    setting(
        Group::Queue,
        "nats.prefix",
        "nats-prefix",
        "NAME",
        "What names of streams, buckets and subjects start with: clusters with other prefixes share a server without meeting",
    ),
    setting(Group::Queue, "nats.replicas", "nats-replicas", "N", "Copies of every stream in a NATS cluster: 1, 3 or 5"),
    setting(Group::Queue, "nats.timeout", "nats-timeout", "TIME", "How long a call to NATS waits for an answer"),
    setting(
        Group::Queue,
        "ledger.retention",
        "retention",
        "TIME",
        "How long jobs, results, images and idempotency keys are kept after their last change. The same in every process of a cluster",
    ),
    setting(
        Group::Queue,
        "ledger.brain_queue",
        "brain-queue",
        "TASKS",
        "Most tasks that wait for a brain, for each brain and lane; more are refused. The same in every process of a cluster",
    ),
    setting(
        Group::Queue,
        "ledger.hand_queue",
        "hand-queue",
        "TASKS",
        "Most tasks that wait for a hand, for each hand and lane. The same in every process of a cluster",
    ),
    setting(
        Group::Queue,
        "ledger.lease",
        "lease",
        "TIME",
        "After which time a task is taken from a worker that is not heard of. The same in every process of a cluster",
    ),
    setting(Group::Brain, "brain.max_prompts", "max-prompts", "N", "Most prompts a brain takes at once"),
    setting(
        Group::Brain,
        "brain.batch_wait",
        "batch-wait",
        "TIME",
        "How long a brain waits for more prompts when the batch before had several. Alone, a prompt never waits",
    ),
    setting(
        Group::Brain,
        "brain.cache_bytes",
        "cache-bytes",
        "BYTES",
        "Bytes of control signals that a brain keeps in memory",
    ),
    setting(
        Group::Brain,
        "brain.share",
        "share",
        "TIME",
        "How long control signals stay where the other brains of the cluster find them; 0 shares none",
    ),
    setting(
        Group::Brain,
        "brain.inline_bytes",
        "inline-bytes",
        "BYTES",
        "Control signals of up to this many bytes travel in the tasks of hands, at most 917504; larger ones are fetched",
    ),
    setting(
        Group::Brain,
        "brain.serve",
        "serve",
        "IP:PORT",
        "Where hands fetch larger control signals: an address, auto for the one that NATS sees and a free port, or off for the object store only",
    ),
    setting(
        Group::Brain,
        "brain.serve_bytes",
        "serve-bytes",
        "BYTES",
        "Bytes of control signals that a brain keeps for hands to fetch",
    ),
    setting(
        Group::Brain,
        "brain.grace",
        "brain-grace",
        "TIME",
        "How long a brain that is told to stop waits for work in hand",
    ),
    setting(
        Group::Brain,
        "brain.step_timeout",
        "brain-step-timeout",
        "TIME",
        "How long a brain may take for a batch; after that it counts as hung, and its process ends with code 70. 0s for as long as it likes",
    ),
    setting(
        Group::Hand,
        "hand.max_images",
        "max-images",
        "N",
        "Most images a hand takes at once, and most interactive ones while batch work has all places; 0 for as many as are best computed \
         together, as measured",
    ),
    setting(
        Group::Hand,
        "hand.grace",
        "hand-grace",
        "TIME",
        "How long a hand that is told to stop waits for images in hand; what is not done by then goes back to the queue",
    ),
    setting(
        Group::Hand,
        "hand.tile_above",
        "tile-above",
        "PIXELS",
        "Pictures of more pixels are decoded, and encoded, in overlapping tiles, which takes less memory; 0 for those alone that memory does not suffice for",
    ),
    setting(
        Group::Hand,
        "hand.profile",
        "profile",
        "FILE",
        "Where a hand keeps its times of steps by shape and batch size, which say how many images it computes together. Without a file they \
         are measured anew after each start",
    ),
    setting(
        Group::Hand,
        "hand.checkpoint_after",
        "checkpoint-after",
        "TIME",
        "Images that take a hand longer than this are checkpointed, so that another hand can go on with them",
    ),
    setting(
        Group::Hand,
        "hand.checkpoint_interval",
        "checkpoint-interval",
        "TIME",
        "How often a hand checkpoints them; 0s for never but at a stop",
    ),
    setting(
        Group::Hand,
        "hand.step_timeout",
        "step-timeout",
        "TIME",
        "How long a hand may take for a step; after that it counts as hung, and its process ends with code 70. 0s for as long as it likes",
    ),
    setting(Group::Sim, "sim.embed", "sim-embed", "TIME", "Time a simulated brain takes for a batch"),
    setting(Group::Sim, "sim.token", "sim-token", "TIME", "Time a simulated brain takes for a token, on top"),
    setting(
        Group::Sim,
        "sim.signal_bytes",
        "sim-signal-bytes",
        "BYTES",
        "Bytes of a simulated control signal, on top of a few",
    ),
    setting(
        Group::Sim,
        "sim.step",
        "sim-step",
        "TIME",
        "Time a simulated hand takes for a step of a batch; by the batch's size, with straight lines between: 1:100ms,4:144ms",
    ),
    setting(
        Group::Sim,
        "sim.pixel_power",
        "sim-pixels",
        "POWER",
        "Power of a picture's pixels, relative to the smallest size, that a simulated step's time grows with: 0 for not at all, 1 for \
         in proportion",
    ),
    setting(Group::Sim, "sim.image", "sim-image", "TIME", "Time a simulated hand takes for decoding an image"),
    setting(
        Group::Sim,
        "sim.jitter",
        "sim-jitter",
        "SHARE",
        "Share, 0 to 1, by which simulated work takes longer or shorter, as prompt and seed have it; the mean stays",
    ),
    setting(
        Group::Sim,
        "sim.failures",
        "sim-failures",
        "SHARE",
        "Share, 0 to 1, of attempts at an image that a simulated hand fails half-way; they are tried again",
    ),
    setting(
        Group::Sim,
        "sim.crashes",
        "sim-crashes",
        "SHARE",
        "Share, 0 to 1, of attempts at an image over which a simulated hand's engine panics half-way; they are tried again",
    ),
    setting(
        Group::Sim,
        "sim.hangs",
        "sim-hangs",
        "SHARE",
        "Share, 0 to 1, of attempts at an image over which a simulated hand's engine hangs half-way",
    ),
    setting(Group::Sim, "sim.max_batch", "sim-batch", "N", "Most images a simulated hand steps at once"),
];
