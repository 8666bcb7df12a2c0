//! `watch`, `job`, `cancel`, `image`.

use std::path::Path;

use efferent_proto::v1::{CancelJobRequest, GetJobRequest, Job, JobEvent, JobState, job_event::Event};
use tokio::signal::ctrl_c;

use crate::{
    args,
    client::{
        Server, files,
        follow::{Follow, is_final},
        generate, images, json,
    },
    exit::{Exit, Failure},
    output,
};

/// Prints a job's events until it ends; the exit code tells how it ended.
///
/// # Errors
/// If the job is unknown, ended without all images, or Ctrl-C is pressed (the job goes on).
pub(crate) async fn watch(server: Server, args: &args::Watch) -> Result<(), Failure> {
    let mut follow = Follow::watch(server, args.job.clone(), args.after);
    let pressed = ctrl_c();
    tokio::pin!(pressed);
    loop {
        let event = tokio::select! {
            event = follow.next() => event?,
            _ = &mut pressed => return Err(Failure::words(Exit::Interrupted, format!("interrupted; job {} goes on", args.job))),
        };
        let Some(event) = event else { break };
        if args.json {
            output::line(json::event(&event, None))?;
        } else {
            output::line(describe(&event))?;
        }
        if matches!(event.event, Some(Event::Done(_) | Event::Failed(_))) {
            return generate::outcome(&event);
        }
    }
    // Everything up to the end had been heard before: the record tells how it ended.
    let job = get(&mut follow, &args.job).await?;
    match (job.state(), &job.error) {
        (JobState::Succeeded, _) => Ok(()),
        (state, error) => {
            Err(Failure::job(&args.job, state, &error.clone().as_ref().unwrap_or(&Default::default()).into()))
        }
    }
}

/// An event in a line.
fn describe(event: &JobEvent) -> String {
    let text = match &event.event {
        Some(Event::Accepted(accepted)) => {
            let request = accepted.request.clone().unwrap_or_default();
            format!("accepted: {:?}, model {}, seed {}", request.prompt, request.model, request.seed())
        }
        Some(Event::Queued(queued)) => format!("waiting for a brain, {} in the queue", queued.depth),
        Some(Event::Conditioning(conditioning)) => format!("brain {} reads the prompt", conditioning.worker_id),
        Some(Event::Rendering(rendering)) => format!("hand {} draws", rendering.worker_id),
        Some(Event::Step(step)) => format!("image {}: step {} of {}", step.image_index, step.step, step.steps),
        Some(Event::Preview(preview)) => {
            format!("image {}: preview at step {} of {}", preview.image_index, preview.step, preview.steps)
        }
        Some(Event::Image(image)) => {
            format!("image {}: {} bytes, seed {}", image.image_index, image.length, image.seed)
        }
        Some(Event::Encoded(encoded)) => format!("the control signal is kept as {}", encoded.signal_id),
        Some(Event::Done(done)) => format!("done: {} images", done.image_count),
        Some(Event::Failed(failed)) => json::state(failed.state()).to_string(),
        Some(Event::Detached(_)) | None => "an event that this version does not know".to_owned(),
    };
    format!("{:>3}  {text}", event.number)
}

async fn get(follow: &mut Follow, job_id: &str) -> Result<Job, Failure> {
    let request = GetJobRequest { job_id: job_id.to_owned() };
    let answer = follow.client().await?.get_job(request).await;
    answer.map(tonic::Response::into_inner).map_err(|status| Failure::status(&status))
}

/// Prints a job.
///
/// # Errors
/// If it is unknown.
pub(crate) async fn show(server: Server, args: &args::Job) -> Result<(), Failure> {
    let job = get(&mut Follow::watch(server, args.job.clone(), 0), &args.job).await?;
    if args.json {
        return output::line(json::job(&job));
    }
    let request = job.request.clone().unwrap_or_default();
    output::line(format_args!("{}  {}", job.job_id, json::state(job.state())))?;
    output::line(format_args!("  prompt   {:?}", request.prompt))?;
    let size = request.size.as_ref().map(json::size).unwrap_or_default();
    output::line(format_args!(
        "  drawn    model {}, {size}, {} steps of {}, guidance {}, seed {}",
        request.model,
        request.steps(),
        request.sampler,
        request.guidance_scale(),
        request.seed()
    ))?;
    output::line(format_args!("  images   {} of {}", job.images.len(), request.image_count()))?;
    if let Some(error) = job.error.as_ref().filter(|_| is_final(job.state())) {
        output::line(format_args!("  error    {}", error.message))?;
    }
    Ok(())
}

/// Cancels a job.
///
/// # Errors
/// If it is unknown or has ended otherwise.
pub(crate) async fn cancel(mut server: Server, args: &args::Job) -> Result<(), Failure> {
    let request = CancelJobRequest { job_id: args.job.clone() };
    let answer = images(server.connect().await?).cancel_job(request).await;
    let answer = answer.map_err(|status| Failure::status(&status))?.into_inner();
    let job = answer.job.unwrap_or_default();
    if args.json {
        return output::line(serde_json::json!({ "job": json::job(&job), "purged": answer.purged }));
    }
    output::line(format_args!("{}  {}, {} waiting tasks removed", job.job_id, json::state(job.state()), answer.purged))
}

/// Fetches an image into a file.
///
/// # Errors
/// If it is not there, or the file cannot be written.
pub(crate) async fn image(server: Server, args: &args::Image) -> Result<(), Failure> {
    let mut follow = Follow::watch(server, args.job.clone(), 0);
    let (_, data) = generate::fetch(&mut follow, &args.job, args.index).await?;
    if args.output == Path::new("-") {
        return output::bytes(&data);
    }
    files::write(&args.output, &data)?;
    output::line(args.output.display())
}
