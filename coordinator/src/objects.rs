//! `ObjectService`: files that requests refer to.

use std::{sync::Arc, time::Instant};

use bytes::BytesMut;
use efferent_bus::{MAX_OBJECT, ledger::Ledger};
use efferent_proto::{
    ApiError,
    v1::{ErrorCode, PutObjectRequest, PutObjectResponse, object_service_server::ObjectService},
};
use futures::{Stream, StreamExt as _};
use tokio::sync::Semaphore;
use tonic::{Request, Response, Status, Streaming};

use crate::images::{count, unavailable};

/// Files that are taken in at once: each is in memory until it is stored.
const AT_ONCE: usize = 2;

/// The service.
#[derive(Debug, Clone)]
pub struct Objects {
    ledger: Ledger,
    places: Arc<Semaphore>,
}

impl Objects {
    /// A service on this store.
    pub fn new(ledger: Ledger) -> Self {
        Self { ledger, places: Arc::new(Semaphore::new(AT_ONCE)) }
    }

    async fn put(
        &self,
        mut parts: impl Stream<Item = Result<PutObjectRequest, Status>> + Unpin + Send,
    ) -> Result<PutObjectResponse, ApiError> {
        let _place = self.places.acquire().await;
        let mut file = BytesMut::new();
        while let Some(part) = parts.next().await {
            let data = part.map_err(|status| ApiError::from(&status))?.data;
            if file.len() + data.len() > MAX_OBJECT {
                let message = format!("the file is larger than {MAX_OBJECT} bytes");
                return Err(ApiError::new(ErrorCode::LimitExceeded, message)
                    .field("data")
                    .limit(format!("1..={MAX_OBJECT} bytes")));
            }
            file.extend_from_slice(&data);
        }
        if file.is_empty() {
            return Err(ApiError::new(ErrorCode::InvalidField, "the file is empty").field("data"));
        }
        let length = file.len() as u64;
        let retention = Some(self.ledger.options().retention);
        let hash = self.ledger.bus().put_object(file.freeze(), retention).await.map_err(unavailable)?;
        Ok(PutObjectResponse { hash, length })
    }
}

#[tonic::async_trait]
impl ObjectService for Objects {
    async fn put_object(
        &self,
        request: Request<Streaming<PutObjectRequest>>,
    ) -> Result<Response<PutObjectResponse>, Status> {
        let started = Instant::now();
        let outcome = self.put(request.into_inner()).await;
        count("PutObject", started, outcome).map(Response::new)
    }
}
