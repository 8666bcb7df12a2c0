//! Large control signals on their way to hands: kept for a while where hands can fetch them over gRPC, which takes a part of the time that the object
//! store takes. That gets every one of them too, for retries and for hands that cannot reach this brain.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use bytes::Bytes;
use efferent_proto::internal::{
    FetchChunk, FetchRequest,
    signal_transfer_server::{SignalTransfer, SignalTransferServer},
};
use futures::stream::{self, Iter};
use moka::sync::Cache;
use serde::{Deserialize, Serialize};
use tokio::{net::TcpListener, task::AbortHandle};
use tokio_stream::{StreamExt as _, wrappers::TcpListenerStream};
use tonic::{Request, Response, Status};

/// Bytes of a message.
const CHUNK: usize = 1024 * 1024;
/// Bytes that may be under way without the hand's having said that they arrived.
const WINDOW: u32 = 16 * 1024 * 1024;
/// How long a signal is kept at most: a hand that comes later finds it in the object store.
const KEEP: Duration = Duration::from_secs(600);

/// Where a brain serves large control signals.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Serve {
    /// At the address that the bus sees this machine under, on a port of the system's choice.
    #[default]
    Auto,
    /// Nowhere: hands go to the object store.
    Off,
    /// There.
    At(SocketAddr),
}

impl TryFrom<String> for Serve {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match text.as_str() {
            "" | "auto" => Ok(Self::Auto),
            "off" => Ok(Self::Off),
            address => address
                .parse()
                .map(Self::At)
                .map_err(|_| format!("{address:?} is neither an address (IP:PORT) nor auto nor off")),
        }
    }
}

impl From<Serve> for String {
    fn from(serve: Serve) -> Self {
        match serve {
            Serve::Auto => "auto".to_owned(),
            Serve::Off => "off".to_owned(),
            Serve::At(address) => address.to_string(),
        }
    }
}

/// Signals that are served until this is dropped.
#[derive(Debug)]
pub struct Shelf {
    signals: Cache<String, Bytes>,
    address: SocketAddr,
    server: AbortHandle,
}

impl Shelf {
    /// Serves up to `bytes` of signals. `None` if that is not wanted or not possible; the log says which.
    pub async fn open(serve: Serve, seen_as: Option<IpAddr>, bytes: u64) -> Option<Self> {
        let address = match (serve, seen_as) {
            (Serve::At(address), _) => address,
            (Serve::Auto, Some(ip)) => SocketAddr::new(ip, 0),
            (Serve::Off, _) | (Serve::Auto, None) => return None,
        };
        let listener = match TcpListener::bind(address).await {
            Ok(listener) => listener,
            Err(error) => {
                tracing::warn!(%address, %error, "cannot serve control signals here; hands get large ones from the object store");
                return None;
            }
        };
        let mut address = listener.local_addr().unwrap_or(address);
        // Hands cannot dial "every address".
        if let (true, Some(ip)) = (address.ip().is_unspecified(), seen_as) {
            address.set_ip(ip);
        }
        let weigh = |_: &String, signal: &Bytes| u32::try_from(signal.len()).unwrap_or(u32::MAX);
        let signals = Cache::builder().max_capacity(bytes).weigher(weigh).time_to_live(KEEP).build();
        let incoming = TcpListenerStream::new(listener).map(|stream| {
            stream.inspect(|stream| {
                let _ = stream.set_nodelay(true);
            })
        });
        let serving = tonic::transport::Server::builder()
            .http2_keepalive_interval(Some(Duration::from_secs(30)))
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(WINDOW)
            .add_service(SignalTransferServer::new(Transfer(signals.clone())))
            .serve_with_incoming(incoming);
        let server = tokio::spawn(async move {
            if let Err(error) = serving.await {
                tracing::warn!(%error, "control signals are no longer served; hands get large ones from the object store");
            }
        });
        tracing::debug!(%address, "large control signals are served");
        Some(Self { signals, address, server: server.abort_handle() })
    }

    /// Keeps a signal for hands to fetch. Returns where.
    pub fn put(&self, hash: String, encoded: Bytes) -> String {
        self.signals.insert(hash, encoded);
        self.address.to_string()
    }
}

impl Drop for Shelf {
    fn drop(&mut self) {
        self.server.abort();
    }
}

#[derive(Debug, Clone)]
struct Transfer(Cache<String, Bytes>);

#[tonic::async_trait]
impl SignalTransfer for Transfer {
    type FetchStream = Iter<std::vec::IntoIter<Result<FetchChunk, Status>>>;

    async fn fetch(&self, request: Request<FetchRequest>) -> Result<Response<Self::FetchStream>, Status> {
        let hash = request.into_inner().hash;
        let Some(signal) = self.0.get(&hash) else { return Err(Status::not_found("no signal of this hash is here")) };
        let chunks = (0..signal.len().div_ceil(CHUNK)).map(|index| {
            let end = ((index + 1) * CHUNK).min(signal.len());
            Ok(FetchChunk { data: signal.slice(index * CHUNK..end) })
        });
        Ok(Response::new(stream::iter(chunks.collect::<Vec<_>>())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_to_serve_is_read_and_written_alike() {
        for text in ["auto", "off", "10.1.2.3:7000", "[::1]:7000"] {
            assert_eq!(String::from(Serve::try_from(text.to_owned()).unwrap()), text);
        }
        assert_eq!(Serve::try_from(String::new()), Ok(Serve::Auto));
        assert!(Serve::try_from("brain-0:7000".to_owned()).unwrap_err().contains("brain-0:7000"));
    }

    #[tokio::test]
    async fn nothing_is_served_where_that_cannot_be() {
        assert!(Shelf::open(Serve::Off, Some([127, 0, 0, 1].into()), 1 << 20).await.is_none());
        assert!(Shelf::open(Serve::Auto, None, 1 << 20).await.is_none());
        // A documentation address, which no machine has.
        assert!(Shelf::open(Serve::Auto, Some([192, 0, 2, 1].into()), 1 << 20).await.is_none());
    }
}
