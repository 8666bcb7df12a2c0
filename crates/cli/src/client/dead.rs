//! `dead`: jobs that were given up.

use efferent_proto::v1::{
    Attempt, DeadLetter, DropDeadRequest, FailureClass, ListDeadRequest, ReplayDeadRequest, ShowDeadRequest,
    dead_service_client::DeadServiceClient,
};
use serde_json::{Value, json};
use tonic::transport::Channel;

use crate::{
    args,
    client::{MAX_MESSAGE, Server, json},
    exit::Failure,
    output,
};

fn client(channel: Channel) -> DeadServiceClient<Channel> {
    DeadServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE)
}

fn class(class: FailureClass) -> String {
    json::short(class.as_str_name(), "FAILURE_CLASS_")
}

fn time(timestamp: Option<&prost_types::Timestamp>) -> String {
    let time = timestamp.map(efferent_proto::time::system_time).unwrap_or(std::time::UNIX_EPOCH);
    humantime::format_rfc3339_seconds(time).to_string()
}

/// Prints dead letters, the newest first.
///
/// # Errors
/// If the server cannot be asked.
pub(crate) async fn list(mut server: Server, args: &args::DeadList) -> Result<(), Failure> {
    let answer = client(server.connect().await?).list(ListDeadRequest { limit: args.limit }).await;
    let answer = answer.map_err(|status| Failure::status(&status))?.into_inner();
    if args.json {
        let letters: Vec<_> = answer.letters.iter().map(letter_json).collect();
        return output::line(json!({ "total": answer.total, "letters": letters }));
    }
    if answer.letters.is_empty() {
        return output::line("no dead letters");
    }
    let heading = ["JOB", "GIVEN UP", "CLASS", "ATTEMPTS", "REPLAYED AS", "ERROR"].map(str::to_owned);
    let rows = answer.letters.iter().map(|letter| {
        vec![
            letter.job_id.clone(),
            time(letter.time.as_ref()),
            class(letter.class()),
            letter.attempts.len().to_string(),
            if letter.replayed_as.is_empty() { "-".to_owned() } else { letter.replayed_as.clone() },
            letter.error.as_ref().map(|error| error.message.clone()).unwrap_or_default(),
        ]
    });
    output::line(output::table(&std::iter::once(heading.to_vec()).chain(rows).collect::<Vec<_>>()))?;
    if answer.total > answer.letters.len() as u64 {
        output::note(format_args!("the newest {} of {}; --limit shows more", answer.letters.len(), answer.total));
    }
    Ok(())
}

/// Prints a dead letter with its history.
///
/// # Errors
/// If there is none.
pub(crate) async fn show(mut server: Server, args: &args::Job) -> Result<(), Failure> {
    let request = ShowDeadRequest { job_id: args.job.clone() };
    let answer = client(server.connect().await?).show(request).await;
    let letter = answer.map_err(|status| Failure::status(&status))?.into_inner();
    if args.json {
        return output::line(letter_json(&letter));
    }
    output::line(format_args!("{}  given up {}", letter.job_id, time(letter.time.as_ref())))?;
    output::line(format_args!("  class    {}", class(letter.class())))?;
    output::line(format_args!("  error    {}", letter.error.as_ref().map_or("", |error| error.message.as_str())))?;
    let request = letter.request.clone().unwrap_or_default();
    output::line(format_args!("  prompt   {:?}", request.prompt))?;
    let size = request.size.as_ref().map(json::size).unwrap_or_default();
    output::line(format_args!(
        "  request  model {}, {size}, {} steps, {} images, seed {}",
        request.model,
        request.steps(),
        request.image_count(),
        request.seed()
    ))?;
    if !letter.replayed_as.is_empty() {
        output::line(format_args!("  replayed as {}", letter.replayed_as))?;
    }
    let heading = ["TASK", "ATTEMPT", "WORKER", "TIME", "CLASS", "ERROR"].map(str::to_owned);
    let rows = letter.attempts.iter().map(|attempt| {
        vec![
            task(attempt),
            attempt.number.to_string(),
            if attempt.worker_id.is_empty() { "unknown".to_owned() } else { attempt.worker_id.clone() },
            time(attempt.time.as_ref()),
            class(attempt.class()),
            attempt.error.clone(),
        ]
    });
    output::line(output::table(&std::iter::once(heading.to_vec()).chain(rows).collect::<Vec<_>>()))
}

/// `brain` or `image 3`.
fn task(attempt: &Attempt) -> String {
    match attempt.task.split_once('.') {
        Some((_, image)) => format!("image {image}"),
        None => "brain".to_owned(),
    }
}

/// Makes a job of a dead one's request, and prints its id.
///
/// # Errors
/// If there is no such letter, or its request cannot be accepted now.
pub(crate) async fn replay(mut server: Server, args: &args::Job) -> Result<(), Failure> {
    let request = ReplayDeadRequest { job_id: args.job.clone() };
    let answer = client(server.connect().await?).replay(request).await;
    let answer = answer.map_err(|status| Failure::status(&status))?.into_inner();
    if args.json {
        return output::line(json!({ "job_id": answer.job_id, "existing": answer.existing }));
    }
    if answer.existing {
        output::note("it was replayed before");
    }
    output::line(answer.job_id)
}

/// Removes a dead letter.
///
/// # Errors
/// If the server cannot be asked.
pub(crate) async fn drop(mut server: Server, args: &args::Job) -> Result<(), Failure> {
    let request = DropDeadRequest { job_id: args.job.clone() };
    client(server.connect().await?).drop(request).await.map_err(|status| Failure::status(&status))?;
    match args.json {
        true => output::line(json!({ "job_id": args.job, "dropped": true })),
        false => output::line(format_args!("{}  dropped", args.job)),
    }
}

fn letter_json(letter: &DeadLetter) -> Value {
    let attempt = |attempt: &Attempt| {
        json!({
            "queue": attempt.queue,
            "task": attempt.task,
            "number": attempt.number,
            "worker_id": Some(&attempt.worker_id).filter(|id| !id.is_empty()),
            "time_ms": json::ms(attempt.time.as_ref()),
            "class": class(attempt.class()),
            "error": attempt.error,
        })
    };
    json!({
        "job_id": letter.job_id,
        "time_ms": json::ms(letter.time.as_ref()),
        "class": class(letter.class()),
        "error": letter.error.as_ref().map(json::error),
        "request": letter.request.as_ref().map(json::request),
        "attempts": letter.attempts.iter().map(attempt).collect::<Vec<_>>(),
        "replayed_as": Some(&letter.replayed_as).filter(|id| !id.is_empty()),
    })
}
