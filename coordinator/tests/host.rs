//! The host over real gRPC: who is let in, what is said, and that all ends when the run does.
#![expect(clippy::unwrap_used, reason = "a test: what cannot be unwrapped fails it")]

use std::{net::SocketAddr, path::Path, time::Duration};

use cluster::{Hello, Outcome, Report, Step, WorkerId};
use coordinator::{Config, EventLog, serve};
use proto::{
    TOKEN_HEADER,
    v1::{
        self, cluster_service_client::ClusterServiceClient, session_request::Kind as Said,
        session_response::Kind as Told, watch_response,
    },
};
use tokio::{net::TcpListener, sync::mpsc, task::JoinHandle, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Streaming, transport::Channel};

mod toy;

const PATIENCE: Duration = Duration::from_secs(20);

fn config(folder: &Path) -> Config {
    toy::config(folder.join("log.redb").into(), &folder.join("checkpoints"))
}

type Serving = JoinHandle<Result<Outcome, coordinator::StartError>>;

async fn start(folder: &Path) -> (SocketAddr, Serving) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (address, tokio::spawn(serve(config(folder), listener)))
}

async fn connect(address: SocketAddr) -> ClusterServiceClient<Channel> {
    ClusterServiceClient::connect(format!("http://{address}")).await.unwrap()
}

fn with_token<T>(message: T, token: &str) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert(TOKEN_HEADER, token.parse().unwrap());
    request
}

/// Opens a session as worker 7; both ends stay open until they are dropped.
async fn open(
    client: &mut ClusterServiceClient<Channel>,
    run: &str,
    token: &str,
) -> Result<(mpsc::Sender<v1::SessionRequest>, Streaming<v1::SessionResponse>), tonic::Status> {
    let (requests, receiver) = mpsc::channel(8);
    let hello = Hello {
        name: "worker-0".to_owned(),
        address: "127.0.0.1:1".to_owned(),
        node: "host-0".to_owned(),
        fingerprint: cluster::Fingerprint::default(),
        generation: None,
        applied: None,
        preparing: false,
    };
    let hello = v1::Hello::new(WorkerId(7), &hello, "test");
    let first = v1::SessionRequest { run: run.to_owned(), kind: Some(Said::Hello(hello)) };
    requests.send(first).await.unwrap();
    let responses = client.session(with_token(ReceiverStream::new(receiver), token)).await?;
    Ok((requests, responses.into_inner()))
}

async fn next(orders: &mut Streaming<v1::SessionResponse>) -> Option<Told> {
    let message = timeout(PATIENCE, orders.message()).await.expect("the coordinator answers");
    message.unwrap().map(|response| response.kind.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_token_and_a_wrong_run_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let (address, serving) = start(folder.path()).await;
    let mut client = connect(address).await;
    let refused = open(&mut client, "toy", "guess").await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    assert!(refused.message().contains("wrong token for run toy"), "{refused}");
    assert!(!refused.message().contains("sesame"), "{refused}");
    let refused = open(&mut client, "other", "open sesame").await.unwrap_err();
    assert!(refused.message().contains("serves run toy and not \"other\""), "{refused}");
    serving.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn when_a_run_ends_everybody_hears_of_it_and_no_open_stream_keeps_the_coordinator() {
    let folder = tempfile::tempdir().unwrap();
    let (address, serving) = start(folder.path()).await;
    let mut client = connect(address).await;
    let watch = v1::WatchRequest { run: "toy".to_owned(), from_sequence: 1 };
    let watch = client.watch(with_token(watch, "open sesame")).await;
    let mut watch = watch.unwrap().into_inner();
    let (requests, mut orders) = open(&mut client, "toy", "open sesame").await.unwrap();

    assert!(matches!(next(&mut orders).await, Some(Told::Welcome(w)) if w.recipe == "seed = 1"));
    let Some(Told::Form(group)) = next(&mut orders).await else { panic!("no generation") };
    assert_eq!((group.generation, group.members.len(), group.secret.len()), (1, 1, 32));

    let failed = Report::Failed { reason: "the loss is not finite".to_owned() };
    let report = Some(Said::Report(proto::report_to_wire(1, &failed)));
    requests.send(v1::SessionRequest { run: "toy".to_owned(), kind: report }).await.unwrap();
    let told = next(&mut orders).await;
    assert!(matches!(&told, Some(Told::Fail(f)) if f.reason.contains("not finite")), "{told:?}");
    assert!(matches!(next(&mut orders).await, Some(Told::Ack(ack)) if ack.sequence == 1));
    // The worker and the watcher stay: the end must not wait for them.
    assert_eq!(next(&mut orders).await, None, "the session ends");

    let mut sequence = 0;
    let mut last = String::new();
    while let Some(message) = timeout(PATIENCE, watch.message()).await.unwrap().unwrap() {
        if let Some(watch_response::Kind::Entry(entry)) = message.kind {
            sequence += 1;
            assert_eq!(entry.sequence, sequence, "entries come once and in order");
            last = entry.record;
        }
    }
    assert!(last.contains("run_failed"), "{last}");
    let outcome = timeout(PATIENCE, serving).await.expect("it ends").unwrap().unwrap();
    assert!(matches!(outcome, Outcome::Failed { reason } if reason.contains("worker-0")));
    let log = EventLog::open(&folder.path().join("log.redb")).unwrap();
    assert_eq!(log.last(), sequence, "the watcher saw the whole log");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_was_lost_beside_checkpoints_does_not_begin_the_run_anew() {
    let folder = tempfile::tempdir().unwrap();
    let manifest = folder.path().join("checkpoints").join(checkpoint::manifest_name(Step(30)));
    std::fs::create_dir_all(manifest.parent().unwrap()).unwrap();
    std::fs::write(&manifest, "{}").unwrap();
    let (_, serving) = start(folder.path()).await;
    let refused = timeout(PATIENCE, serving).await.unwrap().unwrap().unwrap_err().to_string();
    assert!(refused.contains("has no record") && refused.contains("up to step 30"), "{refused}");
    assert!(refused.contains("put the log back"), "{refused}");
}
