//! The session with the coordinator: opened again and again for as long as the worker lives.

use std::time::{Duration, Instant};

use proto::{
    MESSAGE_BYTES_MAX, TOKEN_HEADER,
    v1::{self, cluster_service_client::ClusterServiceClient, session_request::Kind},
};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{
    Code, Request, Status, Streaming,
    metadata::{Ascii, MetadataValue},
    transport::{Channel, Endpoint},
};
use tracing::{info, warn};

const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// A coordinator that does not answer pings for so long is away.
const KEEPALIVE: Duration = Duration::from_secs(5);
/// One who has never been there after this long has another address.
const NEVER_SEEN: Duration = Duration::from_secs(60);
const WARN_INTERVAL: Duration = Duration::from_secs(10);

/// Where the coordinator is, and what it wants to see.
#[derive(Clone)]
pub(super) struct Target {
    /// `http://host:port`.
    pub(super) endpoint: Endpoint,
    /// For people.
    pub(super) address: String,
    /// The run.
    pub(super) run: String,
    /// The run's token.
    pub(super) token: MetadataValue<Ascii>,
}

/// What the session has to say.
#[derive(Debug)]
pub(super) enum Link {
    /// It stands; this is where messages to the coordinator go.
    Opened(mpsc::UnboundedSender<v1::SessionRequest>),
    /// The coordinator says something.
    Told(v1::SessionResponse),
    /// It has ended; it will be opened again.
    Closed,
    /// It will never be opened; why.
    Rejected(String),
}

/// Keeps a session open; ends when nobody listens, or when the coordinator will not have this worker.
pub(super) async fn keep(
    target: Target,
    hello: watch::Receiver<v1::Hello>,
    links: mpsc::Sender<Link>,
) {
    let started = Instant::now();
    let mut seen = false;
    let mut pause = FIRST_PAUSE;
    let mut warned: Option<Instant> = None;
    loop {
        let greeting = hello.borrow().clone();
        let problem = match open(&target, greeting).await {
            Ok((requests, responses)) => {
                (seen, pause, warned) = (true, FIRST_PAUSE, None);
                if links.send(Link::Opened(requests)).await.is_err() {
                    return;
                }
                let problem = listen(responses, &links).await;
                if links.send(Link::Closed).await.is_err() {
                    return;
                }
                problem
            }
            Err(status) if is_final(&status) => {
                drop(links.send(Link::Rejected(status.message().to_owned())).await);
                return;
            }
            Err(status) => status.message().to_owned(),
        };
        if !seen && started.elapsed() > NEVER_SEEN {
            let reason = format!(
                "no coordinator answers at {} ({problem}): check --coordinator",
                target.address
            );
            drop(links.send(Link::Rejected(reason)).await);
            return;
        }
        if warned.is_none_or(|at| at.elapsed() > WARN_INTERVAL) {
            warn!(coordinator = target.address, %problem, "no session with the coordinator");
            warned = Some(Instant::now());
        }
        tokio::select! {
            () = links.closed() => return,
            () = tokio::time::sleep(pause) => {}
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

type Opened = (mpsc::UnboundedSender<v1::SessionRequest>, Streaming<v1::SessionResponse>);

async fn open(target: &Target, hello: v1::Hello) -> Result<Opened, Status> {
    let endpoint = target
        .endpoint
        .clone()
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE)
        .keep_alive_while_idle(true);
    let channel: Channel =
        endpoint.connect().await.map_err(|error| Status::unavailable(error.to_string()))?;
    let mut client = ClusterServiceClient::new(channel)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let (requests, receiver) = mpsc::unbounded_channel();
    let first = v1::SessionRequest { run: target.run.clone(), kind: Some(Kind::Hello(hello)) };
    requests.send(first).map_err(|_| Status::internal("the stream was dropped"))?;
    let mut request = Request::new(UnboundedReceiverStream::new(receiver));
    request.metadata_mut().insert(TOKEN_HEADER, target.token.clone());
    let responses = client.session(request).await?.into_inner();
    info!(coordinator = target.address, "session opened");
    Ok((requests, responses))
}

/// Hands on what the coordinator says, until it stops; returns why it did.
async fn listen(
    mut responses: Streaming<v1::SessionResponse>,
    links: &mpsc::Sender<Link>,
) -> String {
    loop {
        match responses.message().await {
            Ok(Some(response)) => {
                if links.send(Link::Told(response)).await.is_err() {
                    return "this worker is ending".to_owned();
                }
            }
            Ok(None) => return "the coordinator ended the session".to_owned(),
            Err(status) => return status.message().to_owned(),
        }
    }
}

/// Whether to try again would only meet the same answer.
fn is_final(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::Unauthenticated
            | Code::PermissionDenied
            | Code::NotFound
            | Code::InvalidArgument
            | Code::Unimplemented
    )
}
