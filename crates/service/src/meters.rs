//! Every metric of ours: what Prometheus shows as its help text. `tests/tests/tidy.rs` checks that none is left out.

/// A metric's name and what it tells, with its labels.
type Meter = (&'static str, &'static str);

const COUNTERS: &[Meter] = &[
    (
        "efferent_requests_total",
        "Calls to a coordinator, by method and by the code they were answered with (OK or an error's code)",
    ),
    ("efferent_images_total", "Images recorded by this hand"),
    ("efferent_models_loaded_total", "Times that a worker with several models loaded one, by model"),
    ("efferent_models_unloaded_total", "Times that it let go of one to make room for another, by model"),
    (
        "efferent_results_duplicate_total",
        "Images that were dropped because an earlier attempt recorded them or the job was over",
    ),
    ("efferent_redeliveries_total", "Tasks this worker got that others had had before it, by queue"),
    ("efferent_tasks_failed_total", "Attempts at tasks that failed, by queue and class"),
    ("efferent_tasks_rescued_total", "Tasks that a NATS server had forgotten, and that were published again"),
    ("efferent_tasks_dropped_total", "Tasks dropped because the job was over or expired, by why"),
    ("efferent_dead_letters_total", "Jobs that were given up, by the queue of the task at fault and class"),
    (
        "efferent_signal_cache_total",
        "Prompts looked for among the cached control signals, by result (hit, miss; shared: missed and had from another brain)",
    ),
    ("efferent_quota_refusals_total", "Requests refused because a tenant had what it may, by quota"),
    ("efferent_hand_checkpoints_total", "Checkpoints of images that this hand stored"),
    ("efferent_hand_resumes_total", "Images that this hand went on with from a checkpoint"),
    ("efferent_hand_steps_saved_total", "Steps that this hand did not have to take again, thanks to checkpoints"),
    ("efferent_engine_panics_total", "Times that the engine panicked and was built anew"),
];

const GAUGES: &[Meter] = &[
    ("efferent_build_info", "1, by version"),
    ("efferent_queue_ready", "Tasks that wait, by queue, as a coordinator measured"),
    ("efferent_queue_leased", "Tasks that workers hold, by queue, as a coordinator measured"),
    (
        "efferent_queue_oldest_age_seconds",
        "Since when the oldest task has been in the queue, by queue, as a coordinator measured",
    ),
    ("efferent_stage_workers", "Live workers, by stage (brain or hand) and model, as a coordinator sees them"),
    (
        "efferent_stage_backlog_seconds",
        "Time until the stage's workers have done what waits in queues and batches, by stage and model",
    ),
    (
        "efferent_stage_utilisation",
        "Part of the time in which the stage's workers are at work, 0 to 1, by stage and model",
    ),
    (
        "efferent_stage_advised_workers",
        "Workers that would keep up with what comes and work off what waits within a minute, by stage and model",
    ),
    ("efferent_worker_in_flight", "Tasks that this worker holds"),
    ("efferent_worker_utilisation", "Part of the last seconds in which this worker was at work, 0 to 1"),
    ("efferent_hand_parked", "Images of the batch lane that are not advanced while interactive ones are"),
    ("efferent_hand_best_batch_size", "Samples that a hand best advances together, by shape, as measured"),
];

const HISTOGRAMS: &[Meter] = &[
    ("efferent_request_seconds", "Time from a call to its answer (of streams: to their start), by method"),
    ("efferent_queue_wait_seconds", "Time from a task's publication to its pull, by queue"),
    ("efferent_brain_batch_size", "Prompts that a brain embedded together"),
    ("efferent_brain_embed_seconds", "Time of a brain's forward pass"),
    ("efferent_brain_publish_seconds", "Time to publish a job's tasks for hands"),
    ("efferent_hand_signal_seconds", "Time to get a control signal that did not come with its task, by way"),
    ("efferent_hand_batch_size", "Samples that a hand advanced together"),
    ("efferent_hand_step_seconds", "Time of a step of a hand's batch"),
    ("efferent_hand_decode_seconds", "Time to decode an image"),
    ("efferent_hand_render_seconds", "Time from an image's joining the batch to its picture"),
];

/// Tells the recorder what each metric is.
pub(crate) fn describe() {
    for &(name, help) in COUNTERS {
        metrics::describe_counter!(name, help);
    }
    for &(name, help) in GAUGES {
        metrics::describe_gauge!(name, help);
    }
    for &(name, help) in HISTOGRAMS {
        metrics::describe_histogram!(name, help);
    }
}
