//! Asking a coordinator.
//!
//! Read in this order: this file (where coordinators are), [`follow`] (a job's events, whatever breaks on the way), [`generate`]
//! (`efferent generate`), [`files`] (where pictures go), [`progress`] (what a person sees meanwhile), [`batch`]
//! (many prompts from a file), [`results`] (the folder that they go to), [`dead`] (jobs that were given up), [`signals`] (control signals that are kept), [`jobs`] and [`cluster`] (the small commands), [`json`] (what scripts see), [`ready`] (asking an admin port).

pub(crate) mod batch;
pub(crate) mod cluster;
pub(crate) mod dead;
pub(crate) mod files;
pub(crate) mod follow;
pub(crate) mod generate;
pub(crate) mod jobs;
pub(crate) mod json;
pub(crate) mod pictures;
pub(crate) mod progress;
pub(crate) mod ready;
pub(crate) mod results;
pub(crate) mod signals;
mod terminal;
pub(crate) mod top;

use std::time::Duration;

use efferent_proto::v1::{cluster_service_client::ClusterServiceClient, image_service_client::ImageServiceClient};
use tonic::transport::{Channel, Endpoint};

use crate::exit::{Exit, Failure};

/// Where `efferent up` listens if it is not told otherwise.
pub(crate) const USUAL: &str = "http://127.0.0.1:50051";
/// Most bytes of an answer: an event with an image of the largest size that is put into events (8 MiB), and room.
const MAX_MESSAGE: usize = 16 * 1024 * 1024;

/// Coordinators that share a cluster; any will do.
#[derive(Debug, Clone)]
pub(crate) struct Server {
    endpoints: Vec<Endpoint>,
    next: usize,
}

impl Server {
    /// Reads addresses, separated by commas.
    ///
    /// # Errors
    /// If one is not an address, or of a kind that is not spoken.
    pub(crate) fn parse(addresses: &str) -> Result<Self, Failure> {
        let endpoints = addresses.split(',').map(str::trim).filter(|address| !address.is_empty()).map(endpoint);
        let endpoints = endpoints.collect::<Result<Vec<_>, _>>()?;
        if endpoints.is_empty() {
            return Err(Failure::words(Exit::Config, "the server's address is empty"));
        }
        Ok(Self { endpoints, next: 0 })
    }

    /// Connects to the first that answers, beginning with the one after the last that was asked for.
    ///
    /// # Errors
    /// If none answers.
    pub(crate) async fn connect(&mut self) -> Result<Channel, Failure> {
        let mut refusals = Vec::new();
        for _ in 0..self.endpoints.len() {
            let endpoint = &self.endpoints[self.next % self.endpoints.len()];
            match endpoint.connect().await {
                Ok(channel) => return Ok(channel),
                Err(error) => {
                    let error = anyhow::Error::new(error);
                    refusals.push(format!("{}: {}", endpoint.uri(), error.root_cause()));
                    self.next += 1;
                }
            }
        }
        let refusals = refusals.join("; ");
        Err(Failure::words(Exit::Unavailable, format!("no server answers ({refusals}); `efferent up` starts one")))
    }

    /// Asks another one next time.
    pub(crate) fn turn_away(&mut self) {
        self.next += 1;
    }
}

fn endpoint(address: &str) -> Result<Endpoint, Failure> {
    let wrong = |why: &str| Failure::words(Exit::Config, format!("server address {address:?} {why}"));
    let uri = match address.split_once("://") {
        None => format!("http://{address}"),
        Some(("http" | "grpc", rest)) => format!("http://{rest}"),
        Some(_) => return Err(wrong("must begin with http://; nothing else is spoken")),
    };
    let endpoint = Endpoint::from_shared(uri).map_err(|_| wrong("is not of the form http://HOST:PORT"))?;
    if endpoint.uri().host().is_none_or(str::is_empty) {
        return Err(wrong("is not of the form http://HOST:PORT"));
    }
    Ok(endpoint
        .connect_timeout(Duration::from_secs(5))
        // A server that vanished without a word is noticed while nothing happens.
        .http2_keep_alive_interval(Duration::from_secs(20))
        .keep_alive_timeout(Duration::from_secs(10))
        .initial_stream_window_size(4 * 1024 * 1024)
        .initial_connection_window_size(16 * 1024 * 1024))
}

/// The image service of a coordinator.
pub(crate) fn images(channel: Channel) -> ImageServiceClient<Channel> {
    ImageServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE)
}

/// The cluster service of a coordinator.
pub(crate) fn cluster(channel: Channel) -> ClusterServiceClient<Channel> {
    ClusterServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_checked_before_anything_is_asked() {
        let server = Server::parse("localhost:1, http://10.0.0.1:50051,grpc://[::1]:7").unwrap();
        let uris: Vec<_> = server.endpoints.iter().map(|endpoint| endpoint.uri().to_string()).collect();
        assert_eq!(uris, ["http://localhost:1/", "http://10.0.0.1:50051/", "http://[::1]:7/"]);
        for bad in ["", " , ", "https://host:1", "http://", "http://a b:1", "nats://host"] {
            assert!(matches!(Server::parse(bad), Err(Failure::Told { exit: Exit::Config, .. })), "{bad}");
        }
    }
}
