//! The gRPC service: streams in, inputs out.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use cluster::WorkerId;
use proto::{
    MESSAGE_BYTES_MAX, TOKEN_HEADER,
    v1::{
        self,
        cluster_service_server::{ClusterService, ClusterServiceServer},
        session_request::Kind,
        watch_response,
    },
};
use tokio::{
    net::TcpListener,
    sync::{
        broadcast::{self, error::RecvError},
        mpsc, oneshot,
    },
};
use tokio_stream::{
    Stream, StreamExt,
    wrappers::{ReceiverStream, TcpListenerStream},
};
use tonic::{Request, Response, Status, Streaming, transport::Server};
use tracing::warn;

use crate::{
    Config,
    host::{Input, ORDERS_MAX, Session},
    metrics::Devices,
    watch::{Subscriber, entry_to_wire},
};

/// Connections whose peer does not answer pings for so long are dead.
const KEEPALIVE: Duration = Duration::from_secs(10);
/// Responses that a watcher may leave unread.
const WATCH_MAX: usize = 1024;
/// Watchers hear of liveness at most so often.
const LIVENESS_INTERVAL: Duration = Duration::from_millis(100);

struct Service {
    config: Arc<Config>,
    inputs: mpsc::Sender<Input>,
    subscriber: Subscriber,
    devices: Devices,
    sessions: AtomicU64,
}

/// Serves until `end` is closed.
pub(crate) async fn serve(
    config: Arc<Config>,
    listener: TcpListener,
    inputs: mpsc::Sender<Input>,
    (subscriber, devices): (Subscriber, Devices),
    end: oneshot::Receiver<()>,
) -> Result<(), tonic::transport::Error> {
    let service = ClusterServiceServer::new(Service {
        config,
        inputs,
        subscriber,
        devices,
        sessions: AtomicU64::new(0),
    })
    .max_decoding_message_size(MESSAGE_BYTES_MAX)
    .max_encoding_message_size(MESSAGE_BYTES_MAX);
    Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .tcp_nodelay(true)
        .add_service(service)
        .serve_with_incoming_shutdown(TcpListenerStream::new(listener), async {
            drop(end.await); // Closed when the host is done; nothing is ever sent.
        })
        .await
}

type Responses<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl ClusterService for Service {
    type SessionStream = Responses<v1::SessionResponse>;
    type WatchStream = Responses<v1::WatchResponse>;

    async fn session(
        &self,
        request: Request<Streaming<v1::SessionRequest>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        self.check_token(&request)?;
        let mut requests = request.into_inner();
        let first = requests
            .message()
            .await?
            .ok_or_else(|| Status::invalid_argument("the session ended before its hello"))?;
        self.check_run(&first.run)?;
        let Some(Kind::Hello(hello)) = first.kind else {
            return Err(Status::invalid_argument("the first message of a session must be a hello"));
        };
        let worker = WorkerId(hello.worker);
        let (orders, receiver) = mpsc::channel(ORDERS_MAX);
        let (open, cut) = oneshot::channel();
        let number = self.sessions.fetch_add(1, Ordering::Relaxed);
        let session = Session::new(number, orders, open);
        self.hand_in(Input::Opened { worker, hello: hello.into(), session }).await?;
        let (inputs, devices) = (self.inputs.clone(), self.devices.clone());
        tokio::spawn(pump((worker, number), requests, inputs, devices, cut));
        // Copied only when the connection has room for it.
        let orders = ReceiverStream::new(receiver).map(|order| Ok(Arc::unwrap_or_clone(order)));
        Ok(Response::new(Box::pin(orders)))
    }

    async fn report_exit(
        &self,
        request: Request<v1::ReportExitRequest>,
    ) -> Result<Response<v1::ReportExitResponse>, Status> {
        self.check_token(&request)?;
        let v1::ReportExitRequest { run, worker, how } = request.into_inner();
        self.check_run(&run)?;
        self.hand_in(Input::Exited { worker: WorkerId(worker), how }).await?;
        Ok(Response::new(v1::ReportExitResponse {}))
    }

    async fn drain(
        &self,
        request: Request<v1::DrainRequest>,
    ) -> Result<Response<v1::DrainResponse>, Status> {
        self.check_token(&request)?;
        let v1::DrainRequest { run, worker: name } = request.into_inner();
        self.check_run(&run)?;
        let (found, answer) = oneshot::channel();
        self.hand_in(Input::Drain { name: name.clone(), found }).await?;
        match answer.await {
            Ok(true) => Ok(Response::new(v1::DrainResponse {})),
            Ok(false) => Err(Status::not_found(format!("no worker is called {name:?}"))),
            Err(_) => Err(ending()),
        }
    }

    async fn resize(
        &self,
        request: Request<v1::ResizeRequest>,
    ) -> Result<Response<v1::ResizeResponse>, Status> {
        self.check_token(&request)?;
        let v1::ResizeRequest { run, workers } = request.into_inner();
        self.check_run(&run)?;
        let (answer, answered) = oneshot::channel();
        self.hand_in(Input::Resize { workers, answer }).await?;
        match answered.await {
            Ok(Ok(())) => Ok(Response::new(v1::ResizeResponse {})),
            Ok(Err(why)) => Err(Status::invalid_argument(why)),
            Err(_) => Err(ending()),
        }
    }

    async fn checkpoint(
        &self,
        request: Request<v1::CheckpointRequest>,
    ) -> Result<Response<v1::CheckpointResponse>, Status> {
        self.check_token(&request)?;
        self.check_run(&request.into_inner().run)?;
        let (answer, answered) = oneshot::channel();
        self.hand_in(Input::Checkpoint { answer }).await?;
        match answered.await {
            Ok(Some(step)) => Ok(Response::new(v1::CheckpointResponse { step: step.0 })),
            Ok(None) => Err(Status::failed_precondition("the run has no step left to keep")),
            Err(_) => Err(ending()),
        }
    }

    async fn readmit(
        &self,
        request: Request<v1::ReadmitRequest>,
    ) -> Result<Response<v1::ReadmitResponse>, Status> {
        self.check_token(&request)?;
        let v1::ReadmitRequest { run, node } = request.into_inner();
        self.check_run(&run)?;
        let (marked, answer) = oneshot::channel();
        self.hand_in(Input::Readmit { node: node.clone(), marked }).await?;
        match answer.await {
            Ok(true) => Ok(Response::new(v1::ReadmitResponse {})),
            Ok(false) => Err(Status::not_found(format!("no machine {node:?} is marked as faulty"))),
            Err(_) => Err(ending()),
        }
    }

    async fn watch(
        &self,
        request: Request<v1::WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        self.check_token(&request)?;
        let v1::WatchRequest { run, from_sequence } = request.into_inner();
        self.check_run(&run)?;
        let (responses, receiver) = mpsc::channel(WATCH_MAX);
        let (inputs, subscriber) = (self.inputs.clone(), self.subscriber.clone());
        tokio::spawn(follow(from_sequence.max(1), inputs, subscriber, responses));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver).map(Ok))))
    }
}

impl Service {
    fn check_token<T>(&self, request: &Request<T>) -> Result<(), Status> {
        let shown = request.metadata().get(TOKEN_HEADER).map(|value| value.as_bytes());
        let hash = |bytes: &[u8]| blake3::hash(bytes); // Compared in constant time.
        if shown.is_some_and(|shown| hash(shown) == hash(self.config.token.as_bytes())) {
            return Ok(());
        }
        let peer = request.remote_addr().map(|peer| peer.to_string()).unwrap_or_default();
        warn!(peer, "a connection with a wrong token was refused");
        Err(Status::unauthenticated(format!(
            "wrong token for run {}: use the token file of this run's directory",
            self.config.run.run
        )))
    }

    fn check_run(&self, run: &str) -> Result<(), Status> {
        if run == self.config.run.run.as_str() {
            return Ok(());
        }
        Err(Status::not_found(format!(
            "this coordinator serves run {} and not {run:?}: check the address",
            self.config.run.run
        )))
    }

    async fn hand_in(&self, input: Input) -> Result<(), Status> {
        self.inputs.send(input).await.map_err(|_| ending())
    }
}

fn ending() -> Status {
    Status::unavailable("the coordinator is stopping")
}

/// Hands in what a worker says until its session ends.
async fn pump(
    (worker, session): (WorkerId, u64),
    mut requests: Streaming<v1::SessionRequest>,
    inputs: mpsc::Sender<Input>,
    devices: Devices,
    mut cut: oneshot::Receiver<()>,
) {
    loop {
        let message = tokio::select! {
            message = requests.message() => message,
            _ = &mut cut => break, // The host ended the session: its end was dropped.
        };
        let Ok(Some(v1::SessionRequest { kind: Some(Kind::Report(mut report)), .. })) = message
        else {
            break;
        };
        if let Some(v1::report::Kind::Heartbeat(beat)) = &mut report.kind
            && let Some(health) = beat.device.take()
        {
            devices.said(worker, health);
        }
        let sequence = report.sequence;
        match proto::report_from_wire(report) {
            Ok(report) => {
                if inputs.send(Input::Said { worker, sequence, report }).await.is_err() {
                    break;
                }
            }
            Err(error) => {
                warn!(%worker, error = %error, "a worker spoke nonsense; its session is cut");
                break;
            }
        }
    }
    devices.forget(worker);
    drop(inputs.send(Input::Closed { worker, session }).await); // The host may be gone as well.
}

/// Sends a watcher the log from `next` on, and liveness in between, until it goes or the host ends.
async fn follow(
    mut next: u64,
    inputs: mpsc::Sender<Input>,
    subscriber: Subscriber,
    responses: mpsc::Sender<v1::WatchResponse>,
) {
    let mut live = subscriber.entries();
    let mut liveness = subscriber.liveness();
    let mut tick = tokio::time::interval(LIVENESS_INTERVAL);
    let mut must_read = true;
    loop {
        if must_read {
            let (entries, answer) = oneshot::channel();
            if inputs.send(Input::Read { from: next, entries }).await.is_err() {
                return;
            }
            let Ok(entries) = answer.await else { return };
            for entry in entries {
                next = entry.sequence + 1;
                if send_entry(&responses, entry_to_wire(&entry)).await.is_err() {
                    return;
                }
            }
            must_read = false;
        }
        tokio::select! {
            entry = live.recv() => match entry {
                Ok(entry) if entry.sequence < next => {}
                Ok(entry) => {
                    must_read = entry.sequence > next;
                    if !must_read {
                        next += 1;
                        if send_entry(&responses, (*entry).clone()).await.is_err() {
                            return;
                        }
                    }
                }
                Err(RecvError::Lagged(_)) => must_read = true,
                Err(RecvError::Closed) => return,
            },
            _ = tick.tick() => {
                let Ok(changed) = liveness.has_changed() else {
                    return send_rest(&mut live, next, &responses).await; // The host has ended.
                };
                if changed {
                    let kind = watch_response::Kind::Liveness(liveness.borrow_and_update().clone());
                    if responses.send(v1::WatchResponse { kind: Some(kind) }).await.is_err() {
                        return;
                    }
                }
            }
            () = responses.closed() => return,
        }
    }
}

/// What the host had published and this watcher had not been sent yet when the host ended.
async fn send_rest(
    live: &mut broadcast::Receiver<Arc<v1::LogEntry>>,
    next: u64,
    responses: &mpsc::Sender<v1::WatchResponse>,
) {
    while let Ok(entry) = live.try_recv() {
        if entry.sequence >= next && send_entry(responses, (*entry).clone()).await.is_err() {
            return;
        }
    }
}

async fn send_entry(
    responses: &mpsc::Sender<v1::WatchResponse>,
    entry: v1::LogEntry,
) -> Result<(), mpsc::error::SendError<v1::WatchResponse>> {
    let kind = Some(watch_response::Kind::Entry(entry));
    responses.send(v1::WatchResponse { kind }).await
}
