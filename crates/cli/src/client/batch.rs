//! `efferent batch`: many prompts from a file, pictures and a list of results into a folder.
//!
//! The folder is the memory, kept in [`results`](super::results): what it has is not fetched again, so a collection that was interrupted
//! goes on.

use std::{
    fs::File,
    io::Read as _,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use efferent_proto::{
    items, names,
    v1::{
        Batch, BatchHeader, BatchItem, BatchItems, BatchState, CancelBatchRequest, GenerateRequest, GetBatchRequest,
        GetImageRequest, ItemState, ListBatchResultsRequest, ListBatchesRequest, PutObjectRequest, RetryBatchRequest,
        SubmitBatchRequest, SubmitBatchResponse, WatchBatchRequest, batch_service_client::BatchServiceClient,
        object_service_client::ObjectServiceClient, submit_batch_request::Part,
    },
};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};
use tokio::{signal::ctrl_c, time::Instant};
use tonic::{Code, Status, transport::Channel};

use crate::{
    args,
    client::{Server, files, images, json, pictures, results::Results},
    exit::{Exit, Failure},
    output, settings,
};

/// Items of one message: below gRPC's usual limit of 4 MiB even if each is as long as allowed.
const ITEMS: usize = 256;
/// Bytes of a file in one message.
const PART: usize = 1024 * 1024;
/// How often a server that does not answer is asked again, a second apart.
const ATTEMPTS: u32 = 60;
/// Pauses between listings, in times of the last one. A listing begins at the first item that is missing, and tells all that ended after
/// it again: one slow item must not have a large batch listed at every change.
const PAUSE: u32 = 9;
/// Faults of a file that are told.
const MAX_TOLD: usize = 10;

fn client(channel: Channel) -> BatchServiceClient<Channel> {
    BatchServiceClient::new(channel).max_decoding_message_size(super::MAX_MESSAGE)
}

/// Submits a file, and collects what comes of it unless it shall only be submitted.
///
/// # Errors
/// If the file or the batch is refused, or as [`fetch`].
pub(crate) async fn submit(
    mut server: Server,
    args: &args::BatchSubmit,
    settings: &settings::Client,
) -> Result<(), Failure> {
    let name = args.file.display().to_string();
    let text = read(&args.file)?;
    let mut items = if args.as_file { Vec::new() } else { parse(&name, &text, &settings.model)? };
    pictures::put_all(&mut server, &mut items, args.file.parent().unwrap_or(Path::new(""))).await?;
    // Of the text itself: the same file again is the same batch.
    let key = match (&args.key, args.again) {
        (Some(key), _) => key.clone(),
        (None, true) => format!("cli-{}", names::new_job_id()),
        (None, false) => format!("cli-{}", blake3::hash(text.as_bytes()).to_hex()),
    };
    let header = BatchHeader {
        idempotency_key: key,
        name: args.name.clone().unwrap_or(name),
        all_or_nothing: args.all_or_nothing,
        tenant: settings.tenant.clone(),
        items_object: if args.as_file { put(&mut server, text.into_bytes()).await? } else { String::new() },
        model: settings.model.clone(),
    };
    let answer = send(&mut server, &header, &items).await?;
    for fault in answer.errors.iter().take(MAX_TOLD) {
        let message = fault.error.as_ref().map(|error| error.message.as_str()).unwrap_or_default();
        output::note(format_args!("item {}: {message}", fault.index));
    }
    let batch = answer.batch.unwrap_or_default();
    let known = if answer.existing { ", submitted before" } else { "" };
    output::note(format_args!("batch {}: {} items{known}", batch.batch_id, batch.item_count));
    if args.detach {
        return match args.json {
            true => output::line(batch_json(&batch)),
            false => output::line(&batch.batch_id),
        };
    }
    collect(server, &batch.batch_id, &args.output, args.json).await
}

/// A file's items, or what is wrong with its lines.
fn parse(name: &str, text: &str, model: &str) -> Result<Vec<GenerateRequest>, Failure> {
    let (mut items, mut faults) = (Vec::new(), Vec::new());
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        match items::parse(line, model) {
            Ok(item) => items.push(item),
            Err(error) => faults.push(format!("{name}:{}: {error}", number + 1)),
        }
    }
    if faults.is_empty() {
        return Ok(items);
    }
    let more = faults.len().saturating_sub(MAX_TOLD);
    faults.truncate(MAX_TOLD);
    let more = if more > 0 { format!("\nand {more} more") } else { String::new() };
    Err(Failure::words(Exit::Usage, format!("{}{more}", faults.join("\n"))))
}

/// Has a server keep a file. Its hash.
pub(crate) async fn put(server: &mut Server, file: Vec<u8>) -> Result<String, Failure> {
    let file = Bytes::from(file);
    let mut attempts = 0;
    loop {
        let file = file.clone();
        let parts: Vec<_> = (0..file.len())
            .step_by(PART)
            .map(|start| PutObjectRequest { data: file.slice(start..(start + PART).min(file.len())) })
            .collect();
        let mut objects = ObjectServiceClient::new(server.connect().await?);
        match objects.put_object(tokio_stream::iter(parts)).await {
            Ok(answer) => return Ok(answer.into_inner().hash),
            Err(status) => again(server, &status, &mut attempts).await?,
        }
    }
}

fn read(path: &Path) -> Result<String, Failure> {
    let mut text = String::new();
    let read = match path == Path::new("-") {
        true => std::io::stdin().lock().read_to_string(&mut text),
        false => File::open(path).and_then(|mut file| file.read_to_string(&mut text)),
    };
    let context = |error| anyhow::Error::new(error).context(format!("cannot read {}", path.display()));
    read.map_err(|error| Failure::new(Exit::File, context(error)))?;
    Ok(text)
}

/// Sends a batch; again, whole, if the server goes away meanwhile.
async fn send(
    server: &mut Server,
    header: &BatchHeader,
    items: &[GenerateRequest],
) -> Result<SubmitBatchResponse, Failure> {
    let mut attempts = 0;
    loop {
        let header = SubmitBatchRequest { part: Some(Part::Header(header.clone())) };
        let parts: Vec<_> = items
            .chunks(ITEMS)
            .map(|items| SubmitBatchRequest { part: Some(Part::Items(BatchItems { items: items.to_vec() })) })
            .collect();
        let parts = tokio_stream::iter(std::iter::once(header).chain(parts));
        match client(server.connect().await?).submit_batch(parts).await {
            Ok(answer) => return Ok(answer.into_inner()),
            Err(status) => again(server, &status, &mut attempts).await?,
        }
    }
}

/// Waits before another attempt, if the failure is one of those that pass.
async fn again(server: &mut Server, status: &Status, attempts: &mut u32) -> Result<(), Failure> {
    *attempts += 1;
    if !matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Cancelled) || *attempts >= ATTEMPTS {
        return Err(Failure::status(status));
    }
    server.turn_away();
    tokio::time::sleep(Duration::from_secs(1)).await;
    Ok(())
}

/// Collects a batch's results, also while it runs.
///
/// # Errors
/// If it is unknown, some of its items failed, a file cannot be written, or Ctrl-C is pressed (the batch goes on).
pub(crate) async fn fetch(server: Server, args: &args::BatchFetch) -> Result<(), Failure> {
    collect(server, &args.batch, &args.output, args.json).await
}

async fn collect(server: Server, id: &str, folder: &Path, json: bool) -> Result<(), Failure> {
    let results = Results::open(folder, id)?;
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    let shape = "{bar:30} {pos}/{len} {msg} {elapsed}, {eta} left";
    bar.set_style(ProgressStyle::with_template(shape).unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.enable_steady_tick(Duration::from_millis(200));
    let mut collection = Collection { server, results, bar, attempts: 0 };
    let collected = tokio::select! {
        collected = collection.run() => collected,
        _ = ctrl_c() => {
            let rest = format!("efferent batch fetch {id} -o {}", folder.display());
            Err(Failure::words(Exit::Interrupted, format!("interrupted; the batch goes on, and `{rest}` collects the rest")))
        }
    };
    collection.bar.finish_and_clear();
    let batch = collected?;
    if json {
        output::line(batch_json(&batch))?;
    } else {
        output::line(collection.results.path.display())?;
    }
    match batch.item_count - batch.succeeded {
        0 => Ok(()),
        _ if batch.state() == BatchState::Cancelled => {
            Err(Failure::words(Exit::Cancelled, format!("batch {id} was cancelled: {}", sums(&batch))))
        }
        _ => Err(Failure::words(Exit::Failed, format!("batch {id}: {}", sums(&batch)))),
    }
}

/// Why following stopped.
enum Broken {
    Server(Status),
    Here(Failure),
}

impl From<Status> for Broken {
    fn from(status: Status) -> Self {
        Self::Server(status)
    }
}

impl From<Failure> for Broken {
    fn from(failure: Failure) -> Self {
        Self::Here(failure)
    }
}

fn is_over(batch: &Batch) -> bool {
    matches!(batch.state(), BatchState::Ended | BatchState::Cancelled)
}

/// A batch whose results are being collected.
struct Collection {
    server: Server,
    results: Results,
    bar: ProgressBar,
    /// Failures since the server last told what was asked of it.
    attempts: u32,
}

impl Collection {
    /// Follows the batch to its end, whatever breaks on the way.
    async fn run(&mut self) -> Result<Batch, Failure> {
        loop {
            match self.follow().await {
                Ok(batch) => return Ok(batch),
                Err(Broken::Server(status)) => again(&mut self.server, &status, &mut self.attempts).await?,
                Err(Broken::Here(failure)) => return Err(failure),
            }
        }
    }

    /// Follows the batch to its end and fetches what has ended meanwhile.
    async fn follow(&mut self) -> Result<Batch, Broken> {
        let channel = match self.server.connect().await {
            Ok(channel) => channel,
            // Never reached at all: whoever typed the address wants to know at once.
            Err(failure) if self.attempts == 0 => return Err(failure.into()),
            Err(_) => return Err(Status::unavailable("no server answers").into()),
        };
        let request = WatchBatchRequest { batch_id: self.results.id.clone() };
        let mut states = client(channel.clone()).watch_batch(request).await?.into_inner();
        let mut last: Option<Batch> = None;
        // Whether something may have ended that was not listed, and when it may be.
        let (mut stale, mut due) = (false, Instant::now());
        loop {
            tokio::select! {
                batch = states.message() => {
                    let Some(batch) = batch? else { break };
                    self.bar.set_length(batch.item_count);
                    self.bar.set_message(format!("{} running, {} failed", batch.running, batch.failed));
                    (stale, last) = (true, Some(batch));
                }
                () = tokio::time::sleep_until(due), if stale => {}
            }
            let over = last.as_ref().is_some_and(is_over);
            if over || Instant::now() >= due {
                // What failed since this began may have been given another try, too.
                let start = if over { self.results.first_open() } else { self.results.first_missing };
                let took = self.list(&channel, start).await?;
                (stale, due) = (false, Instant::now() + took * PAUSE);
            }
        }
        last.filter(is_over).ok_or_else(|| Status::unavailable("the batch's states ended before the batch").into())
    }

    /// Fetches what has ended and is not here, from an item on. How long the listing took, pictures left out.
    async fn list(&mut self, channel: &Channel, start: u64) -> Result<Duration, Broken> {
        let wanted = [ItemState::Succeeded, ItemState::Failed, ItemState::Cancelled].map(|state| state as i32);
        let request = ListBatchResultsRequest { batch_id: self.results.id.clone(), start, states: wanted.to_vec() };
        let (begun, mut fetching) = (Instant::now(), Duration::ZERO);
        let mut items = client(channel.clone()).list_batch_results(request).await?.into_inner();
        while let Some(item) = items.message().await? {
            if self.results.has(&item) {
                self.results.heard(item.index);
            } else {
                let begun = Instant::now();
                let paths = pictures(channel, &item, &self.results).await?;
                self.results.add(&item, &paths)?;
                fetching += begun.elapsed();
                self.attempts = 0;
            }
            self.bar.set_position(self.results.count());
        }
        self.attempts = 0;
        Ok(begun.elapsed().saturating_sub(fetching))
    }
}

/// Fetches an item's pictures into files.
async fn pictures(channel: &Channel, item: &BatchItem, results: &Results) -> Result<Vec<PathBuf>, Broken> {
    let mut paths = Vec::new();
    // By what was asked for: what another try draws replaces what came of the one that failed.
    let several = item.request.as_ref().is_some_and(|request| request.image_count() > 1 || request.seeds.len() > 1);
    for image in &item.images {
        let request = GetImageRequest { job_id: item.job_id.clone(), image_index: image.image_index };
        let mut chunks = images(channel.clone()).get_image(request).await?.into_inner();
        let mut data = Vec::new();
        while let Some(chunk) = chunks.message().await? {
            data.extend_from_slice(&chunk.data);
        }
        let extension = json::format(image.format()).replace("jpeg", "jpg");
        let number = if several { format!("-{}", image.image_index + 1) } else { String::new() };
        let path = results.folder.join(format!("{:06}{number}.{extension}", item.index));
        files::write(&path, &data)?;
        paths.push(path);
    }
    Ok(paths)
}

fn sums(batch: &Batch) -> String {
    let Batch { item_count, succeeded, failed, cancelled, .. } = batch;
    format!("{succeeded} of {item_count} succeeded, {failed} failed, {cancelled} cancelled")
}

fn batch_json(batch: &Batch) -> Value {
    json!({
        "batch_id": batch.batch_id,
        "name": batch.name,
        "tenant": batch.tenant,
        "retries": batch.retries,
        "state": json::short(batch.state().as_str_name(), "BATCH_STATE_"),
        "item_count": batch.item_count,
        "running": batch.running,
        "succeeded": batch.succeeded,
        "failed": batch.failed,
        "cancelled": batch.cancelled,
        "created_at_ms": json::ms(batch.created_at.as_ref()),
        "finished_at_ms": json::ms(batch.finished_at.as_ref()),
    })
}

/// Prints a batch.
///
/// # Errors
/// If it is unknown.
pub(crate) async fn show(mut server: Server, args: &args::Batch) -> Result<(), Failure> {
    let request = GetBatchRequest { batch_id: args.batch.clone() };
    let answer = client(server.connect().await?).get_batch(request).await;
    print(&answer.map_err(|status| Failure::status(&status))?.into_inner(), args.json)
}

/// Cancels a batch.
///
/// # Errors
/// If it is unknown or has ended.
pub(crate) async fn cancel(mut server: Server, args: &args::Batch) -> Result<(), Failure> {
    let request = CancelBatchRequest { batch_id: args.batch.clone() };
    let answer = client(server.connect().await?).cancel_batch(request).await;
    print(&answer.map_err(|status| Failure::status(&status))?.into_inner(), args.json)
}

/// Batches of a server, the newest first; of one tenant, or of all if its name is empty.
///
/// # Errors
/// If it cannot be asked.
pub(crate) async fn batches(server: &mut Server, tenant: &str, limit: u32) -> Result<Vec<Batch>, Failure> {
    let request = ListBatchesRequest { tenant: tenant.to_owned(), limit };
    let answer = client(server.connect().await?).list_batches(request).await;
    Ok(answer.map_err(|status| Failure::status(&status))?.into_inner().batches)
}

/// Prints batches.
///
/// # Errors
/// If the server cannot be asked.
pub(crate) async fn list(mut server: Server, tenant: &str, as_json: bool) -> Result<(), Failure> {
    let batches = batches(&mut server, tenant, 0).await?;
    if as_json {
        return output::line(json!({ "batches": batches.iter().map(batch_json).collect::<Vec<_>>() }));
    }
    output::line(table(&batches))
}

/// Batches as a table.
pub(crate) fn table(batches: &[Batch]) -> String {
    let heads = ["BATCH", "TENANT", "STATE", "ITEMS", "RUNNING", "DONE", "FAILED", "NAME"];
    let mut rows = vec![heads.map(str::to_owned).to_vec()];
    rows.extend(batches.iter().map(|batch| {
        let state = json::short(batch.state().as_str_name(), "BATCH_STATE_");
        let numbers = [batch.item_count, batch.running, batch.succeeded, batch.failed].map(|number| number.to_string());
        let mut row = vec![batch.batch_id.clone(), batch.tenant.clone(), state];
        row.extend(numbers);
        row.push(batch.name.clone());
        row
    }));
    output::table(&rows)
}

/// Gives failed items another try.
///
/// # Errors
/// If it is unknown or was cancelled.
pub(crate) async fn retry(mut server: Server, args: &args::Batch) -> Result<(), Failure> {
    let request = RetryBatchRequest { batch_id: args.batch.clone() };
    let answer = client(server.connect().await?).retry_batch(request).await;
    let answer = answer.map_err(|status| Failure::status(&status))?.into_inner();
    output::note(format_args!("{} items are tried again", answer.items));
    print(&answer.batch.unwrap_or_default(), args.json)
}

fn print(batch: &Batch, json: bool) -> Result<(), Failure> {
    if json {
        return output::line(batch_json(batch));
    }
    let state = json::short(batch.state().as_str_name(), "BATCH_STATE_");
    output::line(format_args!("{}  {state}  {} running, {}", batch.batch_id, batch.running, sums(batch)))
}
