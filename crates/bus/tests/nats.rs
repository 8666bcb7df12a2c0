//! The contract on JetStream, and what is left of it after a kill -9 of the server.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use async_nats::jetstream::{self, stream};
use bytes::Bytes;
use efferent_bus::{
    Bucket, Bus, Error, QueueSpec, SharedBus,
    contract::{self, free_port},
    nats::{Nats, Options, connect_patiently},
    read_object,
};

/// A server of its own on a free port, killed at the end.
struct Server {
    process: Child,
    port: u16,
    folder: PathBuf,
}

impl Server {
    fn start(folder: &Path, port: Option<u16>) -> Self {
        Self::start_with(folder, port.unwrap_or_else(free_port), "")
    }

    fn start_with(folder: &Path, port: u16, more: &str) -> Self {
        let tool = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/tools/nats-server");
        let program = if tool.exists() { tool } else { PathBuf::from("nats-server") };
        // Every acknowledged write is on disk: what a single server should be run with.
        let configuration = format!(
            "listen: 127.0.0.1:{port}\njetstream {{ store_dir: {:?}, sync_interval: always }}\n{more}",
            folder.join("store")
        );
        let file = folder.join("nats.conf");
        std::fs::write(&file, configuration).expect("writes");
        let process = Command::new(&program)
            .arg("-c")
            .arg(&file)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {}: {error} (`make tools` fetches it)", program.display()));
        Self { process, port, folder: folder.to_owned() }
    }

    async fn connect(&self, prefix: &str) -> Arc<Nats> {
        let url = format!("nats://127.0.0.1:{}", self.port);
        let options = Options { url, prefix: prefix.to_owned(), ..Options::default() };
        connect_patiently(options, Duration::from_secs(20)).await.expect("connects")
    }

    fn kill(&mut self) {
        self.process.kill().expect("SIGKILL");
        self.process.wait().expect("ends");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn contract() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let server = Server::start(folder.path(), None);
    let bus: SharedBus = server.connect("contract").await;
    contract::all(&bus).await;
}

/// The highest number of a block of a queue's storage, whose files are named 1.blk, 2.blk and so on.
fn newest_block(folder: &Path, queue: &str) -> u64 {
    let stream = format!("anchor-queue-{}", queue.replace('.', "_"));
    let blocks = folder.join("store/jetstream/$G/streams").join(stream).join("msgs");
    let number = |entry: std::io::Result<std::fs::DirEntry>| {
        entry.ok()?.file_name().to_str()?.strip_suffix(".blk")?.parse::<u64>().ok()
    };
    std::fs::read_dir(blocks).expect("blocks").filter_map(number).max().expect("a block")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_queue_that_is_emptied_again_and_again_stays_in_its_file() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let server = Server::start(folder.path(), None);
    let bus = server.connect("anchor").await;
    let queue = contract::queue(bus.as_ref(), "emptied", 2).await;
    for number in 0..40 {
        bus.publish(&queue, contract::task(&format!("task{number}"), "job")).await.expect("there is room");
        let [task] = &bus.pull(&queue, 2, Duration::from_secs(5)).await.expect("the bus is there")[..] else {
            panic!("one task, and never the anchor")
        };
        task.lease.ack().await.expect("the bus is there");
    }
    let depth = bus.depth(&queue).await.expect("the bus is there");
    assert_eq!((depth.ready, depth.leased, depth.oldest_age), (0, 0, None), "the anchor is no task");
    assert!(newest_block(folder.path(), &queue) <= 2, "a block was made for each task");
}

/// Copies a folder's files.
fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a folder");
    for entry in std::fs::read_dir(from).expect("is there") {
        let path = entry.expect("an entry").path();
        std::fs::copy(&path, to.join(path.file_name().expect("a name"))).expect("copies");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tasks_that_the_server_has_forgotten_are_given_out_after_all() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut server = Server::start(folder.path(), None);
    let bus = server.connect("forgotten").await;
    let queue = "hand.test.batch".to_owned();
    let spec = QueueSpec { name: queue.clone(), capacity: 9, lease: Duration::from_secs(2) };
    bus.declare(&spec).await.expect("declares");
    for number in 0..3 {
        bus.publish(&queue, contract::task(&format!("task{number}"), "job")).await.expect("there is room");
    }
    server.kill();
    let stream = format!("forgotten-queue-{}", queue.replace('.', "_"));
    let messages = folder.path().join("store/jetstream/$G/streams").join(stream).join("msgs");
    let kept = folder.path().join("kept");
    copy(&messages, &kept);
    let mut server = Server::start(folder.path(), Some(server.port));
    let bus = {
        drop(bus);
        server.connect("forgotten").await
    };
    bus.declare(&spec).await.expect("declares");
    let mut done = 0;
    while done < 3 {
        for task in bus.pull(&queue, 9, Duration::from_secs(5)).await.expect("the bus is there") {
            task.lease.ack().await.expect("the bus is there");
            done += 1;
        }
    }
    // The server writes down what its consumers have done a moment later.
    tokio::time::sleep(Duration::from_secs(1)).await;
    server.kill();
    // What was acknowledged is in the stream again, and its consumer knows better.
    std::fs::remove_dir_all(&messages).expect("removes");
    copy(&kept, &messages);
    let server = Server::start(folder.path(), Some(server.port));
    let bus = server.connect("forgotten").await;
    bus.declare(&spec).await.expect("declares");
    let now = bus.pull(&queue, 9, Duration::from_millis(500)).await.expect("the bus is there");
    assert_eq!(now.len(), 0, "else this tests nothing");
    let mut keys = Vec::new();
    let looked = async {
        while keys.len() < 3 {
            // As coordinators do all the time.
            bus.depth(&queue).await.expect("the bus is there");
            for task in bus.pull(&queue, 9, Duration::from_millis(200)).await.expect("the bus is there") {
                task.lease.ack().await.expect("the bus is there");
                keys.push(task.key);
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(30), looked).await.expect("they are given out");
    keys.sort();
    assert_eq!(keys, ["task0", "task1", "task2"]);
    let depth = bus.depth(&queue).await.expect("the bus is there");
    assert_eq!((depth.ready, depth.leased), (0, 0));
}

/// Three servers that keep three copies of everything.
fn three(folder: &Path) -> (Vec<Server>, Options) {
    let own: Vec<_> = (0..3).map(|_| free_port()).collect();
    let routes = own.iter().map(|port| format!("nats://127.0.0.1:{port}")).collect::<Vec<_>>().join(", ");
    let start = |(index, own): (usize, &u16)| {
        let folder = folder.join(index.to_string());
        std::fs::create_dir(&folder).expect("a folder");
        let cluster = format!("cluster {{ name: test, listen: 127.0.0.1:{own}, routes: [{routes}] }}");
        Server::start_with(&folder, free_port(), &format!("server_name: n{index}\n{cluster}\n"))
    };
    let servers: Vec<_> = own.iter().enumerate().map(start).collect();
    let url = servers.iter().map(|server| format!("nats://127.0.0.1:{}", server.port)).collect::<Vec<_>>().join(",");
    (servers, Options { url, replicas: 3, ..Options::default() })
}

#[tokio::test(flavor = "multi_thread")]
async fn contract_in_a_cluster_of_three() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (_servers, options) = three(folder.path());
    let bus: SharedBus = connect_patiently(options, Duration::from_secs(60)).await.expect("connects");
    contract::all(&bus).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn three_copies_on_one_server_are_refused() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let server = Server::start(folder.path(), None);
    server.connect("one").await;
    let url = format!("nats://127.0.0.1:{}", server.port);
    let refused = Nats::connect(Options { url, replicas: 3, prefix: "many".to_owned(), ..Options::default() }).await;
    assert!(matches!(&refused, Err(Error::Unfit(message)) if message.contains("replicas")), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_whose_settings_cannot_be_changed_is_refused_by_their_name() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let server = Server::start(folder.path(), None);
    server.connect("one").await;
    let url = format!("nats://127.0.0.1:{}", server.port);
    let client = async_nats::connect(&url).await.expect("connects");
    let other = stream::Config {
        name: "other-objects".to_owned(),
        subjects: vec!["other.object.>".to_owned()],
        deny_delete: true,
        ..Default::default()
    };
    jetstream::new(client).create_stream(other).await.expect("makes the stream");
    let refused = Nats::connect(Options { url, prefix: "other".to_owned(), ..Options::default() }).await;
    let named = |message: &str| message.contains("other-objects") && message.contains("deny message deletes");
    assert!(matches!(&refused, Err(Error::Unfit(message)) if named(message)), "{refused:?}");
}

/// How many bytes of a server's are still let through, and the pause that comes then.
type Stall = Arc<Mutex<Option<(usize, Duration)>>>;

/// A way to a server that stalls when it is told to.
async fn way(port: u16, stall: Stall) -> String {
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::{TcpListener, TcpStream},
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let url = format!("nats://{}", listener.local_addr().expect("an address"));
    let pause = move |read: usize| -> Option<Duration> {
        let mut stall = stall.lock().expect("nobody panicked");
        let (left, _) = stall.as_mut()?;
        *left = left.saturating_sub(read);
        if *left > 0 { None } else { stall.take().map(|(_, pause)| pause) }
    };
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let server = TcpStream::connect(("127.0.0.1", port)).await.expect("the server is there");
            let ((mut asked, mut answers), (mut answered, mut asks)) = (client.into_split(), server.into_split());
            tokio::spawn(async move { tokio::io::copy(&mut asked, &mut asks).await });
            let pause = pause.clone();
            tokio::spawn(async move {
                let mut bytes = vec![0; 64 * 1024];
                while let Ok(read @ 1..) = answered.read(&mut bytes).await {
                    if let Some(pause) = pause(read) {
                        tokio::time::sleep(pause).await;
                    }
                    if answers.write_all(&bytes[..read]).await.is_err() {
                        break;
                    }
                }
            });
        }
    });
    url
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_is_whole_or_an_error_when_the_server_stalls() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let server = Server::start(folder.path(), None);
    let bus = server.connect("stall").await;
    for number in 0..100 {
        let value = Bytes::from(vec![7; 100 * 1024]);
        bus.put(Bucket::Models, &format!("k{number}"), value, None).await.expect("stores");
    }
    let stall = Stall::default();
    let url = way(server.port, stall.clone()).await;
    let options = Options { url, prefix: "stall".to_owned(), ..Options::default() };
    let bus = connect_patiently(options, Duration::from_secs(20)).await.expect("connects");
    let list = async |pause: Duration| {
        *stall.lock().expect("nobody panicked") = Some((1_000_000, pause));
        bus.list(Bucket::Models).await.map(|entries| entries.len())
    };
    assert_eq!(list(Duration::from_millis(2500)).await.expect("lists"), 100, "a tenth came before the pause");
    let cut = list(Duration::from_secs(600)).await;
    assert!(matches!(cut, Err(Error::Unavailable { .. })), "{cut:?}");
}

#[tokio::test]
async fn a_server_that_is_not_there_is_an_error_in_time() {
    let options = Options { url: "nats://127.0.0.1:9".to_owned(), ..Options::default() };
    assert!(matches!(Nats::connect(options).await, Err(Error::Unavailable { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_accepted_is_lost_when_the_server_is_killed() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut server = Server::start(folder.path(), None);
    let bus = server.connect("crash").await;
    let queue = contract::queue(bus.as_ref(), "crash", 100_000).await;
    let hash = bus.put_object(Bytes::from(vec![7; 3_000_000]), None).await.expect("stores");
    let leased = {
        bus.publish(&queue, contract::task("leased", "job")).await.expect("publishes");
        bus.pull(&queue, 1, Duration::from_secs(5)).await.expect("pulls")
    };
    // Publish on and on; a kill and a restart come in between.
    let publisher = {
        let (bus, queue) = (bus.clone(), queue.clone());
        tokio::spawn(async move {
            let mut accepted = Vec::new();
            let mut failures = 0;
            let mut number = 0;
            let mut after = 0;
            while after < 50 {
                let key = format!("k{number}");
                let stored = bus.publish(&queue, contract::task(&key, "job")).await;
                let noted = match stored {
                    Ok(_) => bus.put(Bucket::Jobs, &key, Bytes::from_static(b"x"), None).await,
                    Err(error) => Err(error),
                };
                match noted {
                    Ok(_) => {
                        accepted.push(key);
                        number += 1;
                        after += u32::from(failures > 0);
                    }
                    // The same key again: it may have been stored.
                    Err(Error::Unavailable { .. }) => failures += 1,
                    Err(other) => panic!("{other:?}"),
                }
            }
            (accepted, failures)
        })
    };
    tokio::time::sleep(Duration::from_millis(400)).await;
    server.kill();
    tokio::time::sleep(Duration::from_millis(300)).await;
    let (port, folder) = (server.port, server.folder.clone());
    drop(server);
    let _server = Server::start(&folder, Some(port));
    let (accepted, failures) =
        tokio::time::timeout(Duration::from_secs(60), publisher).await.expect("in time").expect("no panic");
    assert!(failures > 0, "the kill came in between");
    for key in &accepted {
        assert!(bus.get(Bucket::Jobs, key).await.expect("reads").is_some(), "value {key} is lost");
    }
    assert_eq!(read_object(bus.as_ref(), &hash).await.expect("reads").expect("is there").len(), 3_000_000);
    drop(leased);
    let mut left = Vec::new();
    let until = tokio::time::Instant::now() + Duration::from_secs(20);
    while left.len() <= accepted.len() && tokio::time::Instant::now() < until {
        for delivery in bus.pull(&queue, 100, Duration::from_secs(1)).await.unwrap_or_default() {
            let _ = delivery.lease.ack().await;
            left.push(delivery.key);
        }
    }
    left.sort();
    left.dedup();
    let mut expected = accepted;
    expected.push("leased".to_owned());
    expected.sort();
    assert_eq!(left, expected, "each task is there, leased ones too");
}

/// Says that it is nats-server 2.9.10, and answers pings.
async fn old_server() -> String {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let url = format!("nats://{}", listener.local_addr().expect("an address"));
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let info = r#"{"server_id":"x","version":"2.9.10","go":"x","host":"127.0.0.1","port":4222,"headers":true,"max_payload":1048576,"proto":1,"jetstream":true}"#;
            let _ = stream.write_all(format!("INFO {info}\r\n").as_bytes()).await;
            let mut heard = [0; 4096];
            while let Ok(read @ 1..) = stream.read(&mut heard).await {
                if heard[..read].windows(4).any(|bytes| bytes == b"PING") {
                    let _ = stream.write_all(b"PONG\r\n").await;
                }
            }
        }
    });
    url
}

#[tokio::test]
async fn an_old_server_is_refused_by_its_version() {
    let options = Options { url: old_server().await, ..Options::default() };
    match Nats::connect(options).await {
        Err(Error::Unfit(message)) => assert!(message.contains("2.9.10") && message.contains("2.12"), "{message}"),
        other => panic!("{other:?}"),
    }
}
