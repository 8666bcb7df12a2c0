//! A request is one trace: what a collector of OpenTelemetry is told by coordinator, brain and hand.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use efferent_proto::v1::GenerateRequest;
use efferent_tests::{
    calls::{all, request},
    processes::{Cluster, connect},
};
use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::any_value::Value,
    trace::v1::Span,
};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

/// Keeps what it is told, with the name of the service that tells it.
#[derive(Debug, Clone, Default)]
struct Collector(Arc<Mutex<Vec<(String, Span)>>>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let mut kept = self.0.lock().expect("is not poisoned");
        for resource in request.into_inner().resource_spans {
            let attributes = resource.resource.map(|resource| resource.attributes).unwrap_or_default();
            let name = attributes.into_iter().find(|attribute| attribute.key == "service.name");
            let name = match name.and_then(|name| name.value).and_then(|value| value.value) {
                Some(Value::StringValue(name)) => name,
                other => panic!("a service has a name: {other:?}"),
            };
            let spans = resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
            kept.extend(spans.map(|span| (name.clone(), span)));
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_is_one_trace_across_all_processes() {
    let collector = Collector::default();
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    let serving = tonic::transport::Server::builder().add_service(TraceServiceServer::new(collector.clone()));
    tokio::spawn(serving.serve_with_incoming(TcpListenerStream::new(listener)));

    let cluster =
        Cluster::start(&[("EFFERENT_MODEL", "sim"), ("EFFERENT_OTLP", &url), ("OTEL_BSP_SCHEDULE_DELAY", "100")]);
    let (_brain, _) = cluster.role("brain", &[]);
    let (_hand, _) = cluster.role("hand", &[]);
    let (_coordinator, address) = cluster.coordinator();
    let mut client = connect(&address).await;
    let (trace_id, caller) = ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7");
    let mut wanted = Request::new(GenerateRequest { image_count: Some(2), ..request("a red apple") });
    let header = format!("00-{trace_id}-{caller}-01").parse().expect("a header");
    wanted.metadata_mut().insert("traceparent", header);
    all(client.generate(wanted).await.expect("accepted").into_inner()).await;

    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    // Generate, accept, a wait and the work of the brain, two waits and the work of the hand.
    let complete = async {
        loop {
            let spans = collector.0.lock().expect("is not poisoned").clone();
            let ours: Vec<_> = spans.into_iter().filter(|(_, span)| hex(&span.trace_id) == trace_id).collect();
            if ours.len() >= 8 {
                return ours;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let spans = tokio::time::timeout(Duration::from_secs(20), complete).await.expect("all spans arrive");
    let count = |service: &str, name: &str| {
        spans.iter().filter(|(of, span)| of == &format!("efferent-{service}") && span.name == name).count()
    };
    for (service, name, times) in [
        ("coordinator", "Generate", 1),
        ("coordinator", "accept", 1),
        ("brain", "wait for a brain", 1),
        ("brain", "brain", 1),
        ("hand", "wait for a hand", 2),
        ("hand", "hand", 2),
    ] {
        assert_eq!(count(service, name), times, "{service}: {name}");
    }
    let parents: HashMap<String, String> =
        spans.iter().map(|(_, span)| (hex(&span.span_id), hex(&span.parent_span_id))).collect();
    let roots: HashSet<&String> = parents.values().filter(|parent| !parents.contains_key(*parent)).collect();
    assert_eq!(roots, HashSet::from([&caller.to_owned()]), "every span leads to the caller's");
    let of = |name: &str| spans.iter().map(|(_, span)| span).find(|span| span.name == name).expect("is there");
    assert_eq!(hex(&of("hand").parent_span_id), hex(&of("brain").span_id));
    assert_eq!(hex(&of("brain").parent_span_id), hex(&of("Generate").span_id));
    for (_, span) in &spans {
        assert!(span.start_time_unix_nano <= span.end_time_unix_nano, "{}", span.name);
    }
}
