//! What scripts see: the wire's messages as JSON. Times are milliseconds since 1970, durations seconds, and enums their lower-case names.

use std::path::Path;

use efferent_proto::{
    time,
    v1::{
        Error, ErrorCode, GenerateRequest, GetStatusResponse, Image, ImageFormat, Job, JobEvent, JobState, Lane, Model,
        PictureSource, Quotation, Signal, Size, Worker, WorkerRole, WorkerState, job_event::Event,
        picture_source::Source,
    },
};
use serde_json::{Map, Value, json};

/// `ACCEPTED` of `JOB_STATE_ACCEPTED`, in lower case.
pub(crate) fn short(name: &str, prefix: &str) -> String {
    name.strip_prefix(prefix).unwrap_or(name).to_lowercase()
}

/// A job's state in a word.
pub(crate) fn state(state: JobState) -> String {
    short(state.as_str_name(), "JOB_STATE_")
}

/// A worker's state in a word.
pub(crate) fn worker_state(state: WorkerState) -> String {
    short(state.as_str_name(), "WORKER_STATE_")
}

/// A worker's role in a word.
pub(crate) fn role(role: WorkerRole) -> String {
    short(role.as_str_name(), "WORKER_ROLE_")
}

/// A file format in a word.
pub(crate) fn format(format: ImageFormat) -> String {
    short(format.as_str_name(), "IMAGE_FORMAT_")
}

/// Milliseconds since 1970.
pub(crate) fn ms(timestamp: Option<&prost_types::Timestamp>) -> Option<i64> {
    timestamp.map(|timestamp| time::unix_ms(time::system_time(timestamp)))
}

/// Seconds.
pub(crate) fn seconds(duration: Option<&prost_types::Duration>) -> Option<f64> {
    duration.and_then(time::duration).map(|duration| duration.as_secs_f64())
}

/// `96x96`.
pub(crate) fn size(size: &Size) -> String {
    format!("{}x{}", size.width, size.height)
}

/// The hash of a picture that a request refers to.
fn picture(source: Option<&PictureSource>) -> Option<&str> {
    match &source?.source {
        Some(Source::Hash(hash)) => Some(hash),
        _ => None,
    }
}

/// A request.
pub(crate) fn request(request: &GenerateRequest) -> Value {
    json!({
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "model": request.model,
        "size": request.size.as_ref().map(size),
        "steps": request.steps,
        "guidance_scale": request.guidance_scale,
        "guidance_rescale": request.guidance_rescale,
        "guidance_start": request.guidance_start,
        "guidance_stop": request.guidance_stop,
        "seed": request.seed,
        "image_count": request.image_count,
        "format": format(request.format()),
        "idempotency_key": request.idempotency_key,
        "deadline_seconds": seconds(request.deadline.as_ref()),
        "lane": short(Lane::as_str_name(&request.lane()), "LANE_"),
        "preview_interval": request.preview_interval,
        "sampler": request.sampler,
        "signal_id": Some(&request.signal_id).filter(|id| !id.is_empty()),
        "seeds": Some(&request.seeds).filter(|seeds| !seeds.is_empty()),
        "init_image": picture(request.init_image.as_ref()),
        "strength": request.strength,
        "mask": picture(request.mask.as_ref()),
        "reference_images": request.reference_images.iter().map(|source| picture(Some(source))).collect::<Vec<_>>(),
        "image_guidance_scale": request.image_guidance_scale,
    })
}

/// What is known of a control signal.
pub(crate) fn signal(signal: &Signal) -> Value {
    json!({
        "signal_id": signal.signal_id,
        "model": signal.model,
        "space": signal.space,
        "length": signal.length,
        "prompt": signal.prompt,
        "negative_prompt": signal.negative_prompt,
        "reference_images": signal.reference_images,
        "created_at_ms": ms(signal.created_at.as_ref()),
        "expires_at_ms": ms(signal.expires_at.as_ref()),
    })
}

/// An image's record; the bytes themselves are left out.
pub(crate) fn image(image: &Image) -> Value {
    json!({
        "image_index": image.image_index,
        "hash": image.hash,
        "length": image.length,
        "format": format(image.format()),
        "size": image.size.as_ref().map(size),
        "seed": image.seed,
        "worker_id": image.worker_id,
        "attempt": image.attempt,
        "render_seconds": seconds(image.render_time.as_ref()),
        "model_revision": image.model_revision,
    })
}

/// An error.
pub(crate) fn error(error: &Error) -> Value {
    json!({
        "code": short(ErrorCode::as_str_name(&error.code()), "ERROR_CODE_").to_uppercase(),
        "message": error.message,
        "field": Some(&error.field).filter(|field| !field.is_empty()),
        "limit": Some(&error.limit).filter(|limit| !limit.is_empty()),
        "retry_after_seconds": seconds(error.retry_after.as_ref()),
    })
}

/// An event; an image's with the path of its file, if it was written to one.
pub(crate) fn event(event: &JobEvent, path: Option<&Path>) -> Value {
    let (name, fields) = match &event.event {
        Some(Event::Accepted(accepted)) => (
            "accepted",
            json!({
                "request": accepted.request.as_ref().map(request),
                "expires_at_ms": ms(accepted.expires_at.as_ref()),
                "existing": accepted.existing,
            }),
        ),
        Some(Event::Queued(queued)) => ("queued", json!({ "depth": queued.depth })),
        Some(Event::Conditioning(conditioning)) => ("conditioning", json!({ "worker_id": conditioning.worker_id })),
        Some(Event::Rendering(rendering)) => ("rendering", json!({ "worker_id": rendering.worker_id })),
        Some(Event::Step(step)) => {
            ("step", json!({ "image_index": step.image_index, "step": step.step, "steps": step.steps }))
        }
        Some(Event::Preview(preview)) => (
            "preview",
            json!({
                "image_index": preview.image_index,
                "step": preview.step,
                "steps": preview.steps,
                "length": preview.png.len(),
            }),
        ),
        Some(Event::Image(rendered)) => {
            let mut fields = image(rendered);
            fields["path"] = json!(path.map(|path| path.display().to_string()));
            ("image", fields)
        }
        Some(Event::Encoded(encoded)) => ("encoded", json!({ "signal_id": encoded.signal_id })),
        Some(Event::Done(done)) => {
            ("done", json!({ "image_count": done.image_count, "total_seconds": seconds(done.total_time.as_ref()) }))
        }
        Some(Event::Failed(failed)) => {
            ("failed", json!({ "state": state(failed.state()), "error": failed.error.as_ref().map(error) }))
        }
        Some(Event::Detached(detached)) => ("detached", json!({ "after": detached.after })),
        None => ("unknown", json!({})),
    };
    let mut object = Map::new();
    object.insert("event".to_owned(), json!(name));
    object.insert("job_id".to_owned(), json!(event.job_id));
    object.insert("number".to_owned(), json!(event.number));
    object.insert("time_ms".to_owned(), json!(ms(event.time.as_ref())));
    if let Value::Object(fields) = fields {
        object.extend(fields);
    }
    Value::Object(object)
}

/// A job.
pub(crate) fn job(job: &Job) -> Value {
    json!({
        "job_id": job.job_id,
        "state": state(job.state()),
        "request": job.request.as_ref().map(request),
        "created_at_ms": ms(job.created_at.as_ref()),
        "expires_at_ms": ms(job.expires_at.as_ref()),
        "finished_at_ms": ms(job.finished_at.as_ref()),
        "images": job.images.iter().map(image).collect::<Vec<_>>(),
        "error": job.error.as_ref().map(error),
        "last_event": job.last_event,
    })
}

/// A model.
pub(crate) fn model(model: &Model) -> Value {
    json!({
        "name": model.name,
        "description": model.description,
        "revision": model.revision,
        "brain": model.brain,
        "hand": model.hand,
        "brain_family": model.brain_family,
        "hand_family": model.hand_family,
        "space": model.space,
        "sizes": model.sizes.iter().map(size).collect::<Vec<_>>(),
        "size_range": model.size_range.map(|range| json!({
            "multiple": range.multiple,
            "min_side": range.min_side,
            "max_side": range.max_side,
            "max_pixels": range.max_pixels,
        })),
        "samplers": model.samplers,
        "default_steps": model.default_steps,
        "max_steps": model.max_steps,
        "default_guidance_scale": model.default_guidance_scale,
        "max_guidance_scale": model.max_guidance_scale,
        "max_image_count": model.max_image_count,
        "max_prompt_tokens": model.max_prompt_tokens,
        "negative_prompt": model.negative_prompt,
        "image_to_image": model.image_to_image,
        "inpainting": model.inpainting,
        "guidance_rescale": model.guidance_rescale,
        "guidance_range": model.guidance_range,
        "inpainting_only": model.inpainting_only,
        "max_reference_images": model.max_reference_images,
        "default_image_guidance_scale": model.default_image_guidance_scale,
        "live_brains": model.live_brains,
        "live_hands": model.live_hands,
    })
}

/// A worker.
pub(crate) fn worker(worker: &Worker) -> Value {
    json!({
        "id": worker.id,
        "role": role(worker.role()),
        "state": worker_state(worker.state()),
        "models": worker.models.iter().map(|model| &model.name).collect::<Vec<_>>(),
        "devices": worker.devices,
        "hardware": worker.hardware.iter().map(|device| json!({
            "device": device.device,
            "uuid": device.uuid,
            "name": device.name,
            "memory_bytes": device.memory_bytes,
            "cores": device.cores,
        })).collect::<Vec<_>>(),
        "in_flight": worker.in_flight,
        "capacity": worker.capacity,
        "host": worker.host,
        "pid": worker.pid,
        "version": worker.version,
        "started_at_ms": ms(worker.started_at.as_ref()),
        "simulated": worker.simulated,
        "time": worker.time.map(|time| json!({
            "seconds_per_unit": time.seconds_per_unit,
            "busy_seconds_per_unit": time.busy_seconds_per_unit,
            "utilisation": time.utilisation,
        })),
    })
}

/// How long a request would take.
pub(crate) fn quotation(quotation: &Quotation) -> Value {
    json!({
        "start_in_seconds": seconds(quotation.start_in.as_ref()),
        "finish_in_seconds": seconds(quotation.finish_in.as_ref()),
        "brain_backlog_seconds": quotation.brain_backlog_seconds,
        "hand_backlog_seconds": quotation.hand_backlog_seconds,
        "hand_seconds": quotation.hand_seconds,
        "measured": quotation.measured,
    })
}

/// A coordinator's status.
pub(crate) fn status(status: &GetStatusResponse) -> Value {
    let queues = status.queues.iter().map(|queue| {
        json!({
            "name": queue.name,
            "ready": queue.ready,
            "leased": queue.leased,
            "capacity": queue.capacity,
            "oldest_age_seconds": queue.oldest_age_seconds,
        })
    });
    let stages = status.stages.iter().map(|stage| {
        json!({
            "role": role(stage.role()),
            "model": stage.model,
            "workers": stage.workers,
            "capacity": stage.capacity,
            "in_flight": stage.in_flight,
            "utilisation": stage.utilisation,
            "backlog_seconds": stage.backlog_seconds,
            "advised_workers": stage.advised_workers,
        })
    });
    json!({
        "stages": stages.collect::<Vec<_>>(),
        "version": status.version,
        "bus": status.bus,
        "workers": status.workers,
        "started_at_ms": ms(status.started_at.as_ref()),
        "open_streams": status.open_streams,
        "queues": queues.collect::<Vec<_>>(),
    })
}
