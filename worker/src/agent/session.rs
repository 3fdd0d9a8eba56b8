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

/// With several addresses, one that does not answer pings for so long is left for the next.
const KEEPALIVE_OF_SEVERAL: Duration = Duration::from_secs(1);

/// Where the coordinator is, and what it wants to see.
#[derive(Clone)]
pub(super) struct Target {
    /// Where it may be: its own address, and those of others that stand by.
    pub(super) addresses: Vec<Address>,
    /// The run.
    pub(super) run: String,
    /// The run's token.
    pub(super) token: MetadataValue<Ascii>,
}

/// One place where a coordinator may listen.
#[derive(Debug, Clone)]
pub(super) struct Address {
    /// `http://host:port`.
    pub(super) endpoint: Endpoint,
    /// For people.
    pub(super) text: String,
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
    let (mut seen, mut newest) = (false, 0);
    let mut pause = FIRST_PAUSE;
    let mut warned: Option<Instant> = None;
    let mut addresses = target.addresses.iter().cycle();
    let mut address = addresses.next().expect("there is at least one");
    loop {
        let greeting = hello.borrow().clone();
        let problem = match open(&target, address, greeting).await {
            Ok((requests, responses)) => {
                (seen, pause, warned) = (true, FIRST_PAUSE, None);
                if links.send(Link::Opened(requests)).await.is_err() {
                    return;
                }
                let problem = listen(responses, &mut newest, &links).await;
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
            let tried: Vec<_> = target.addresses.iter().map(|address| &*address.text).collect();
            let reason = format!(
                "no coordinator answers at {} ({problem}): check --coordinator",
                tried.join(" or ")
            );
            drop(links.send(Link::Rejected(reason)).await);
            return;
        }
        if warned.is_none_or(|at| at.elapsed() > WARN_INTERVAL) {
            warn!(coordinator = address.text, %problem, "no session with the coordinator");
            warned = Some(Instant::now());
        }
        address = addresses.next().expect("there is at least one");
        tokio::select! {
            () = links.closed() => return,
            () = tokio::time::sleep(pause) => {}
        }
        pause = (pause * 2).min(LONGEST_PAUSE / u32::try_from(target.addresses.len()).unwrap_or(1));
    }
}

type Opened = (mpsc::UnboundedSender<v1::SessionRequest>, Streaming<v1::SessionResponse>);

async fn open(target: &Target, address: &Address, hello: v1::Hello) -> Result<Opened, Status> {
    let is_only = target.addresses.len() == 1;
    let keepalive = if is_only { KEEPALIVE } else { KEEPALIVE_OF_SEVERAL };
    let endpoint = address
        .endpoint
        .clone()
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(keepalive)
        .keep_alive_timeout(keepalive)
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
    info!(coordinator = address.text, "session opened");
    Ok((requests, responses))
}

/// Hands on what the coordinator says, until it stops; returns why it did. One whose term is older than
/// the newest that was heard has been replaced and does not know it: nothing of it is handed on.
async fn listen(
    mut responses: Streaming<v1::SessionResponse>,
    newest: &mut u64,
    links: &mpsc::Sender<Link>,
) -> String {
    loop {
        match responses.message().await {
            Ok(Some(response)) if response.term < *newest => {
                return format!("its term {} is over: {newest} has begun", response.term);
            }
            Ok(Some(response)) => {
                *newest = response.term;
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
