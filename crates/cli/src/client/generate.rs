//! `efferent generate`: submits a request, follows its job, writes its pictures.

use std::future::Future;

use efferent_proto::{
    ApiError, names, time,
    v1::{CancelJobRequest, GenerateRequest, GetImageRequest, Image, JobEvent, job_event::Event},
};
use tokio::signal::ctrl_c;

use crate::{
    args,
    client::{Server, files::Plan, follow::Follow, images, json, pictures, progress::Progress},
    exit::{Exit, Failure},
    output, settings,
};

/// How long to wait for a cancellation's answer after Ctrl-C.
const CANCEL_PATIENCE: std::time::Duration = std::time::Duration::from_secs(5);

/// The request that was typed; the files that it names are put into the server's object store.
///
/// # Errors
/// If a file cannot be read, or the server does not take it.
pub(crate) async fn request(
    server: &mut Server,
    args: &args::Generate,
    settings: &settings::Client,
    plan: &Plan,
) -> Result<GenerateRequest, Failure> {
    // A key of our own makes it safe to send the request again when an answer is lost.
    let key = args.idempotency_key.clone().unwrap_or_else(|| format!("cli-{}", names::new_job_id()));
    let mut request = GenerateRequest {
        prompt: args.prompt.clone().unwrap_or_default(),
        signal_id: args.signal.clone().unwrap_or_default(),
        seeds: args.seeds.clone(),
        negative_prompt: args.negative.clone().unwrap_or_default(),
        model: settings.model.clone(),
        tenant: settings.tenant.clone(),
        size: args.size,
        steps: args.steps,
        guidance_scale: args.guidance,
        guidance_rescale: args.guidance_rescale,
        guidance_start: args.guidance_range.map(|(start, _)| start),
        guidance_stop: args.guidance_range.map(|(_, stop)| stop),
        seed: args.seed,
        image_count: Some(args.count).filter(|_| args.seeds.is_empty()),
        idempotency_key: key,
        deadline: args.deadline.map(time::proto_duration),
        preview_interval: args.preview_interval,
        sampler: args.sampler.clone().unwrap_or_default(),
        inline_images: !args.detach,
        init_image: pictures::put(server, args.init_image.as_deref()).await?,
        strength: args.strength,
        mask: pictures::put(server, args.mask.as_deref()).await?,
        reference_images: pictures::put_each(server, &args.reference_images).await?,
        image_guidance_scale: args.image_guidance,
        ..Default::default()
    };
    request.set_format(plan.format.proto());
    request.set_lane(args.lane.proto());
    Ok(request)
}

/// Prints how long a request would take.
///
/// # Errors
/// If the server cannot be asked, or would refuse the request.
pub(crate) async fn quote(mut server: Server, request: GenerateRequest, as_json: bool) -> Result<(), Failure> {
    let answer = images(server.connect().await?).quote(request).await;
    let quotation = answer.map_err(|status| Failure::status(&status))?.into_inner();
    if as_json {
        return output::line(json::quotation(&quotation));
    }
    let seconds = |duration| json::seconds(duration).unwrap_or(0.0);
    let (start, finish) = (seconds(quotation.start_in.as_ref()), seconds(quotation.finish_in.as_ref()));
    let guess = if quotation.measured { "" } else { " (a guess: no worker has measured anything yet)" };
    output::line(format_args!("begins in about {start:.1} s, done in about {finish:.1} s{guess}"))
}

/// Follows a submitted job to its end and writes its pictures. `broken` ends it early: what should serve the job has failed.
///
/// # Errors
/// If the request is refused, the job ends without all images, a file cannot be written, or Ctrl-C is pressed (the job is
/// cancelled then).
pub(crate) async fn run(
    mut follow: Follow,
    args: &args::Generate,
    plan: &Plan,
    mut progress: Progress,
    broken: impl Future<Output = Failure>,
) -> Result<(), Failure> {
    // One for all events: one begun anew would not know of what was pressed while an event was told.
    let pressed = ctrl_c();
    tokio::pin!(broken, pressed);
    loop {
        let event = tokio::select! {
            event = follow.next() => event?,
            _ = &mut pressed => {
                progress.clear();
                return Err(interrupted(follow).await);
            }
            failure = &mut broken => return Err(failure),
        };
        let Some(event) = event else {
            return Err(Failure::words(Exit::Failed, "the job's events ended without telling how it ended"));
        };
        progress.event(&event);
        let path = match &event.event {
            Some(Event::Image(image)) => {
                let data = match image.data.is_empty() {
                    true => fetch(&mut follow, &event.job_id, image.image_index).await?.1,
                    false => image.data.to_vec(),
                };
                let path = plan.write(image.image_index, image.seed, &data)?;
                progress.show(&data);
                path
            }
            _ => None,
        };
        if args.json && !plan.is_stdout() {
            progress.aside(|| output::line(json::event(&event, path.as_deref())))?;
        } else if let Some(path) = path {
            progress.aside(|| output::line(path.display()))?;
        }
        match &event.event {
            Some(Event::Accepted(_)) if args.detach => {
                if !args.json {
                    output::line(&event.job_id)?;
                }
                return Ok(());
            }
            Some(Event::Done(_)) => return Ok(()),
            Some(Event::Failed(_)) => return outcome(&event),
            _ => {}
        }
    }
}

/// Success, or the failure that a job's last event tells of.
///
/// # Errors
/// If the event is `failed`.
pub(crate) fn outcome(event: &JobEvent) -> Result<(), Failure> {
    match &event.event {
        Some(Event::Failed(failed)) => {
            let error = ApiError::from(&failed.error.clone().unwrap_or_default());
            Err(Failure::job(&event.job_id, failed.state(), &error))
        }
        _ => Ok(()),
    }
}

/// An image's record and bytes.
///
/// # Errors
/// If it is not there, or the stream breaks.
pub(crate) async fn fetch(follow: &mut Follow, job_id: &str, image_index: u32) -> Result<(Image, Vec<u8>), Failure> {
    let status = |status| Failure::status(&status);
    let request = GetImageRequest { job_id: job_id.to_owned(), image_index };
    let mut chunks = follow.client().await?.get_image(request).await.map_err(status)?.into_inner();
    let (mut image, mut data) = (Image::default(), Vec::new());
    while let Some(chunk) = chunks.message().await.map_err(status)? {
        image = chunk.image.unwrap_or(image);
        data.extend_from_slice(&chunk.data);
    }
    if data.len() as u64 != image.length {
        let message = format!("image {image_index} has {} bytes, but {} were sent", image.length, data.len());
        return Err(Failure::words(Exit::Unavailable, message));
    }
    Ok((image, data))
}

/// Cancels the job; a second Ctrl-C does not wait for that.
async fn interrupted(mut follow: Follow) -> Failure {
    let Some(job_id) = follow.job().map(str::to_owned) else {
        return Failure::words(Exit::Interrupted, "interrupted before the job was accepted");
    };
    let cancel = async {
        let request = CancelJobRequest { job_id: job_id.clone() };
        follow.client().await?.cancel_job(request).await.map_err(|status| Failure::status(&status))
    };
    let told = tokio::select! {
        answer = tokio::time::timeout(CANCEL_PATIENCE, cancel) => match answer {
            Ok(Ok(_)) => "is cancelled",
            Ok(Err(_)) | Err(_) => "could not be cancelled",
        },
        _ = ctrl_c() => "may still run",
    };
    Failure::words(Exit::Interrupted, format!("interrupted; job {job_id} {told}"))
}
