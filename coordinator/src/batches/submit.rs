//! From a stream of items to a stored batch.

use std::{collections::HashMap, time::Duration};

use efferent_bus::{
    ledger::batches::{CHUNK_ITEMS, Stored, batch_id, is_over},
    read_object,
};
use efferent_proto::{
    ApiError,
    internal::{BatchRecord, IdempotencyRecord},
    items, names, time,
    v1::{
        Batch, BatchHeader, BatchState, ErrorCode, GenerateRequest, ItemError, SubmitBatchRequest, SubmitBatchResponse,
        picture_source::Source, submit_batch_request::Part,
    },
    work,
};
use futures::{Stream, StreamExt as _, stream::FuturesUnordered};
use tonic::Status;

use super::Batches;
use crate::{
    directory,
    images::unavailable,
    scale, tenants,
    validate::{self, MAX_KEY_BYTES},
};

/// Most items of a batch.
const MAX_ITEMS: u64 = 1_000_000;
/// Most bytes of a batch's name.
const MAX_NAME_BYTES: usize = 200;
/// Items at fault that are told.
const MAX_TOLD: usize = 1000;
/// Chunks on their way to the store at once.
const WINDOW: usize = 8;

impl Batches {
    /// Stores what comes, chunk by chunk, and sets the batch going.
    pub(super) async fn submit(
        &self,
        mut parts: impl Stream<Item = Result<SubmitBatchRequest, Status>> + Unpin + Send,
    ) -> Result<SubmitBatchResponse, ApiError> {
        let first = parts.next().await.transpose().map_err(|status| ApiError::from(&status))?;
        let Some(Part::Header(header)) = first.and_then(|request| request.part) else {
            return Err(invalid("header", "the first message of a batch must be its header"));
        };
        check(&header)?;
        let tenant = tenants::named(&header.tenant)?;
        self.gate.request(tenant)?;
        let (mut record, existing) = self.begin(&header).await?;
        let id = batch_id(&record).to_owned();
        let submitted = record.batch.as_ref().is_some_and(|batch| batch.state() != BatchState::Submitting);
        let most = if submitted { u64::MAX } else { self.room(tenant).await? };
        let mut intake = Intake::new(self, id.clone(), &header, tenant, most);
        if !header.items_object.is_empty() {
            self.read_items(&header.items_object, &mut intake).await?;
        }
        while let Some(part) = parts.next().await {
            match part.map_err(|status| ApiError::from(&status))?.part {
                Some(Part::Items(_)) if !header.items_object.is_empty() => {
                    return Err(invalid("items", "a batch has a file of items or messages with items, not both"));
                }
                Some(Part::Items(items)) => {
                    for item in items.items {
                        intake.take(Ok(item)).await?;
                    }
                }
                _ => return Err(invalid("items", "after its header, a batch has items only")),
            }
        }
        let sums = intake.end().await?;
        if sums.count == 0 {
            return Err(invalid("items", "a batch needs at least one item"));
        }
        if existing && submitted {
            if record.content != sums.content {
                return Err(conflict(&id));
            }
            return Ok(SubmitBatchResponse { batch: record.batch, errors: sums.errors, existing });
        }
        if header.all_or_nothing && !sums.errors.is_empty() {
            // What is stored of it expires by itself.
            let fault = sums.errors[0].error.clone().unwrap_or_default();
            let message = format!("item {}: {}", sums.errors[0].index, fault.message);
            return Err(ApiError { message, ..ApiError::from(&fault) });
        }
        // One at a time: the room that there was at the beginning may have been taken by batches submitted meanwhile.
        let _turn = match self.gate.terms(tenant).queued {
            u64::MAX => None,
            _ => Some(self.going.lock().await),
        };
        let (batch, revision) =
            self.ledger.batch(&id).await.map_err(unavailable)?.ok_or_else(|| super::unknown(&id))?;
        record = batch;
        record.chunk_count = sums.chunks;
        record.content = sums.content;
        record.units = sums.units;
        let batch = record.batch.get_or_insert_default();
        if batch.state() == BatchState::Submitting {
            let most = self.room(tenant).await?;
            if sums.count > most {
                return Err(no_room(tenant, most));
            }
            batch.set_state(BatchState::Running);
            (batch.item_count, batch.failed) = (sums.count, sums.failed);
            if self.ledger.swap_batch(&record, revision).await.map_err(unavailable)?.is_none() {
                // The same submission a second time, and quicker.
                record = self.ledger.batch(&id).await.map_err(unavailable)?.ok_or_else(|| super::unknown(&id))?.0;
            }
        }
        self.wake().await;
        tracing::info!(batch_id = id, items = sums.count, failed = sums.failed, "batch submitted");
        Ok(SubmitBatchResponse { batch: record.batch, errors: sums.errors, existing })
    }

    /// Takes the items of a file.
    async fn read_items(&self, hash: &str, intake: &mut Intake<'_>) -> Result<(), ApiError> {
        let unknown = || {
            let message = format!("no object {hash:?} is kept; PutObject keeps one");
            ApiError::new(ErrorCode::InvalidField, message).field("items_object")
        };
        if !(hash.len() == 64 && hash.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))) {
            return Err(unknown());
        }
        // It is held whole until its items are stored, so not by everyone at once.
        let _turn = self.files.acquire().await;
        let file = read_object(self.ledger.bus().as_ref(), hash).await.map_err(unavailable)?.ok_or_else(unknown)?;
        let lines = file.split(|byte| *byte == b'\n').zip(1..).filter(|(line, _)| !line.trim_ascii().is_empty());
        for (line, number) in lines {
            let parsed = match str::from_utf8(line) {
                Ok(line) => items::parse(line, ""),
                Err(_) => Err("is not UTF-8".to_owned()),
            };
            let wrong =
                |why| ApiError::new(ErrorCode::InvalidField, format!("line {number}: {why}")).field("items_object");
            intake.take(parsed.map_err(wrong)).await?;
        }
        Ok(())
    }

    /// How many more items may wait in a tenant's batches.
    async fn room(&self, tenant: &str) -> Result<u64, ApiError> {
        let most = self.gate.terms(tenant).queued;
        if most == u64::MAX {
            return Ok(most);
        }
        let batches = self.ledger.batches().await.map_err(unavailable)?;
        let mine =
            batches.iter().filter_map(|(record, _)| record.batch.as_ref()).filter(|batch| batch.tenant == tenant);
        Ok(most.saturating_sub(mine.filter(|batch| !is_over(batch.state())).map(scale::waiting).sum()))
    }

    /// The batch that the key names, or a new one.
    async fn begin(&self, header: &BatchHeader) -> Result<(BatchRecord, bool), ApiError> {
        let mut id = names::new_job_id();
        if !header.idempotency_key.is_empty() {
            // Batches and jobs do not share keys.
            let key = format!("batch/{}", header.idempotency_key);
            let claim = IdempotencyRecord { job_id: id, request_hash: Vec::new().into() };
            id = self.ledger.claim_key(&key, claim).await.map_err(unavailable)?.job_id;
            if let Some((record, _)) = self.ledger.batch(&id).await.map_err(unavailable)? {
                return Ok((record, true));
            }
        }
        let mut batch = Batch {
            batch_id: id,
            name: header.name.clone(),
            tenant: tenants::named(&header.tenant)?.to_owned(),
            created_at: Some(time::timestamp(self.ledger.now())),
            ..Batch::default()
        };
        batch.set_state(BatchState::Submitting);
        let record = BatchRecord { batch: Some(batch), ..BatchRecord::default() };
        self.ledger.create_batch(&record).await.map_err(unavailable)?;
        Ok((record, false))
    }
}

fn invalid(field: &str, message: &str) -> ApiError {
    ApiError::new(ErrorCode::InvalidField, message).field(field)
}

fn no_room(tenant: &str, most: u64) -> ApiError {
    let message = format!("only {most} more items may wait in its batches now");
    tenants::over(tenant, "queued", most, message, Duration::from_secs(60))
}

fn conflict(id: &str) -> ApiError {
    let message = format!("the idempotency key was used for other items, batch {id}");
    ApiError::new(ErrorCode::IdempotencyConflict, message).field("idempotency_key")
}

fn check(header: &BatchHeader) -> Result<(), ApiError> {
    for (field, length, most) in
        [("idempotency_key", header.idempotency_key.len(), MAX_KEY_BYTES), ("name", header.name.len(), MAX_NAME_BYTES)]
    {
        if length > most {
            let message = format!("{field} has {length} bytes, over the limit of {most}");
            return Err(ApiError::new(ErrorCode::LimitExceeded, message)
                .field(field)
                .limit(format!("0..={most} bytes")));
        }
    }
    Ok(())
}

/// Items on their way into chunks.
struct Intake<'a> {
    batches: &'a Batches,
    id: String,
    /// Whether one fault is the end, so that it need not be stored.
    strict: bool,
    /// Of items that name none.
    model: &'a str,
    tenant: &'a str,
    /// How many more items the tenant may have waiting.
    most: u64,
    items: Vec<GenerateRequest>,
    refused: Vec<ItemError>,
    sums: Sums,
    storing: FuturesUnordered<Storing<'a>>,
    hashes: Vec<Option<String>>,
}

type Storing<'a> = futures::future::BoxFuture<'a, (u64, efferent_bus::Result<Stored>)>;

#[derive(Debug, Default)]
struct Sums {
    count: u64,
    failed: u64,
    chunks: u64,
    errors: Vec<ItemError>,
    content: bytes::Bytes,
    units: HashMap<String, f64>,
}

impl<'a> Intake<'a> {
    fn new(batches: &'a Batches, id: String, header: &'a BatchHeader, tenant: &'a str, most: u64) -> Self {
        Self {
            batches,
            id,
            strict: header.all_or_nothing,
            model: &header.model,
            tenant,
            most,
            items: Vec::new(),
            refused: Vec::new(),
            sums: Sums::default(),
            storing: FuturesUnordered::new(),
            hashes: Vec::new(),
        }
    }

    /// Takes an item, or takes down that there is one that cannot be read.
    async fn take(&mut self, mut item: Result<GenerateRequest, ApiError>) -> Result<(), ApiError> {
        if let Ok(item) = &mut item
            && item.model.is_empty()
        {
            item.model = self.model.to_owned();
        }
        let index = self.sums.count;
        if index >= MAX_ITEMS {
            let message = format!("a batch has at most {MAX_ITEMS} items");
            return Err(ApiError::new(ErrorCode::LimitExceeded, message)
                .field("items")
                .limit(format!("1..={MAX_ITEMS}")));
        }
        if index >= self.most {
            return Err(no_room(self.tenant, self.most));
        }
        self.sums.count += 1;
        let checked = match &item {
            Ok(item) => self.batches.check_item(item),
            Err(error) => Err(error.clone()),
        };
        match checked {
            Ok(Some((model, units))) => *self.sums.units.entry(model).or_default() += units,
            Ok(None) => {}
            Err(error) => {
                self.sums.failed += 1;
                let error = ItemError { index, error: Some(error.into()) };
                if self.sums.errors.len() < MAX_TOLD {
                    self.sums.errors.push(error.clone());
                }
                self.refused.push(error);
            }
        }
        self.items.push(item.unwrap_or_default());
        if self.items.len() == CHUNK_ITEMS {
            self.flush().await?;
        }
        Ok(())
    }

    async fn flush(&mut self) -> Result<(), ApiError> {
        let (number, items) = (self.sums.chunks, std::mem::take(&mut self.items));
        let refused = std::mem::take(&mut self.refused);
        self.sums.chunks += 1;
        self.hashes.push(None);
        if self.strict && !self.sums.errors.is_empty() {
            return Ok(());
        }
        while self.storing.len() >= WINDOW {
            self.stored().await?;
        }
        let (ledger, id) = (&self.batches.ledger, self.id.clone());
        self.storing.push(Box::pin(async move { (number, ledger.store_chunk(&id, number, items, refused).await) }));
        Ok(())
    }

    async fn stored(&mut self) -> Result<(), ApiError> {
        let Some((number, stored)) = self.storing.next().await else { return Ok(()) };
        match stored.map_err(unavailable)? {
            Stored::Yes(hash) => self.hashes[number as usize] = Some(hash),
            Stored::Conflict => return Err(conflict(&self.id)),
        }
        Ok(())
    }

    async fn end(mut self) -> Result<Sums, ApiError> {
        if !self.items.is_empty() {
            self.flush().await?;
        }
        while !self.storing.is_empty() {
            self.stored().await?;
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.sums.count.to_le_bytes());
        for hash in self.hashes.iter().flatten() {
            hasher.update(hash.as_bytes());
        }
        self.sums.content = hasher.finalize().as_bytes().to_vec().into();
        Ok(self.sums)
    }
}

impl Batches {
    /// What is wrong with an item, as far as can be told before it is its turn; if nothing is, its model and units of work, if they are known.
    fn check_item(&self, item: &GenerateRequest) -> Result<Option<(String, f64)>, ApiError> {
        validate::syntax(item)?;
        if !item.idempotency_key.is_empty() {
            return Err(invalid("idempotency_key", "an item has no idempotency key of its own; the batch has one"));
        }
        if !item.tenant.is_empty() {
            return Err(invalid("tenant", "an item has no tenant of its own; the batch has one"));
        }
        for (field, source) in work::pictures(item) {
            if matches!(source.source, Some(Source::Data(_))) {
                return Err(invalid(field, "an item tells a picture by its hash: put it with ObjectService"));
            }
        }
        let model = match self.directory.choose(&item.model, directory::needs(item)) {
            Ok(model) => Some(model),
            // Workers may come later. What the model offers is known since it was first registered.
            Err(error) if error.code == ErrorCode::NoWorker => self.directory.known(&item.model),
            Err(error) => return Err(error),
        };
        let Some(model) = model else { return Ok(None) };
        validate::mended(item, &model)?;
        let request = validate::resolve(item.clone(), &model, self.images.default_deadline())?;
        Ok(Some((model.name, work::request_units(&request))))
    }
}
