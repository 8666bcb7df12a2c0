//! What a coordinator does with bytes that no client of ours would send, and what clients that know nothing of ours find.

use std::time::Duration;

use bytes::{Buf as _, BufMut as _, Bytes};
use efferent_proto::v1::{ErrorCode, image_service_client::ImageServiceClient};
use efferent_tests::{
    calls::{durable, generate, request},
    local::Cluster,
};
use prost::Message as _;
use tokio_stream::StreamExt as _;
use tonic::{
    Code, Request, Status,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    transport::Channel,
};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

/// Sends bytes as they are.
#[derive(Debug, Clone, Copy)]
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;
    fn encoder(&mut self) -> Self {
        Self
    }
    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;
    fn encode(&mut self, item: Bytes, target: &mut EncodeBuf<'_>) -> Result<(), Status> {
        target.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;
    fn decode(&mut self, source: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(source.copy_to_bytes(source.remaining())))
    }
}

/// Calls Generate with any bytes: the status, if it is refused.
async fn send(channel: &Channel, bytes: Vec<u8>) -> Result<(), Status> {
    let mut client = tonic::client::Grpc::new(channel.clone());
    client.ready().await.expect("is ready");
    let path = "/efferent.v1.ImageService/Generate".parse().expect("a path");
    client.server_streaming(Request::new(Bytes::from(bytes)), path, Raw).await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_messages_are_refused_and_the_next_is_served() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator().await;
    let _workers = (cluster.quick_brain().await, cluster.sim_hand(Duration::ZERO).await);
    let channel = coordinator.channel().await;
    let good = request("a cat").encode_to_vec();
    let invalid_utf8 = vec![0x0a, 3, b'a', 0xff, 0xfe];
    let length_over_end = vec![0x0a, 200, 1, b'a'];
    let huge_length = vec![0x0a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01];
    let truncated = good[..good.len() - 1].to_vec();
    let endless_varint = vec![0x28; 40];
    let wrong_type = vec![0x0d, 1, 2, 3, 4];
    for bytes in [invalid_utf8, length_over_end, huge_length, truncated, endless_varint, wrong_type] {
        let status = send(&channel, bytes.clone()).await.expect_err("is refused");
        assert!(matches!(status.code(), Code::InvalidArgument | Code::Internal), "{bytes:x?}: {status:?}");
        assert!(!status.message().is_empty());
    }
    // More than a message may have.
    let status = send(&channel, request(&"x".repeat(5 << 20)).encode_to_vec()).await.expect_err("is refused");
    assert!(matches!(status.code(), Code::OutOfRange | Code::ResourceExhausted), "{status:?}");
    // Unknown fields are for newer servers: not an error.
    let mut newer = good;
    newer.extend_from_slice(&[0xfa, 0x3f, 2, b'h', b'i']);
    send(&channel, newer).await.expect("is accepted");
    let mut client = ImageServiceClient::new(channel);
    assert_eq!(durable(&generate(&mut client, request("a dog")).await, 0).last(), Some(&"done"));
}

#[tokio::test(flavor = "multi_thread")]
async fn health_and_reflection_are_served() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator().await;
    let channel = coordinator.channel().await;
    let mut health = HealthClient::new(channel.clone());
    for service in [
        "",
        "efferent.v1.ImageService",
        "efferent.v1.BatchService",
        "efferent.v1.ObjectService",
        "efferent.v1.DeadService",
        "efferent.v1.ClusterService",
    ] {
        let request = HealthCheckRequest { service: service.to_owned() };
        let status = health.check(request).await.expect("is known").into_inner().status();
        assert_eq!(status, ServingStatus::Serving, "{service:?}");
    }
    let wanted = MessageRequest::ListServices(String::new());
    let ask = ServerReflectionRequest { message_request: Some(wanted), ..Default::default() };
    let mut reflection = ServerReflectionClient::new(channel);
    let answers = reflection.server_reflection_info(tokio_stream::once(ask)).await.expect("is served");
    let answer = answers.into_inner().next().await.expect("an answer").expect("no error");
    let Some(MessageResponse::ListServicesResponse(list)) = answer.message_response else { panic!("{answer:?}") };
    let names: Vec<_> = list.service.iter().map(|service| service.name.as_str()).collect();
    for wanted in
        ["efferent.v1.ImageService", "efferent.v1.SignalService", "efferent.v1.ClusterService", "grpc.health.v1.Health"]
    {
        assert!(names.contains(&wanted), "{names:?}");
    }
}

#[test]
fn every_error_keeps_what_it_says_on_the_wire() {
    for number in 1..=24 {
        let code = ErrorCode::try_from(number).expect("a code");
        let error = efferent_proto::ApiError::new(code, "why").field("prompt").limit("1..=5");
        let error = error.retry_after(Duration::from_millis(1500));
        let status = Status::from(error.clone());
        assert!(!matches!(status.code(), Code::Ok | Code::Unknown), "{code:?}");
        assert_eq!(efferent_proto::ApiError::from(&status), error);
    }
    assert!(ErrorCode::try_from(25).is_err(), "a new code belongs into this test");
    // What callers sent is repeated in errors, which travel in headers: only so much of it.
    let long =
        efferent_proto::ApiError::new(ErrorCode::UnknownJob, "\u{e9}".repeat(100_000)).limit("x".repeat(100_000));
    assert!(long.message.len() <= 512 && long.limit.len() <= 512 && long.message.ends_with("..."));
}
