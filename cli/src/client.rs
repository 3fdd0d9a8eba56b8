//! The way to a coordinator: watching a run, asking for a change, telling it that a process ended.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use cluster::{RunId, Step, Timestamp, WorkerId};
use coordinator::Entry;
use proto::{
    MESSAGE_BYTES_MAX, TOKEN_HEADER,
    v1::{self, cluster_service_client::ClusterServiceClient},
};
use tokio::time::{error::Elapsed, timeout};
use tonic::{
    Code, Request, Response, Status, Streaming,
    metadata::{Ascii, MetadataValue},
    transport::{Channel, Endpoint},
};

use crate::run_dir::RunDir;

/// How long a coordinator may take to answer a person.
const ANSWER_MAX: Duration = Duration::from_secs(5);
/// How long a connection may take to stand.
const CONNECT_MAX: Duration = Duration::from_secs(3);
/// With several addresses, one that does not answer pings for so long is left for the next.
const KEEPALIVE_OF_SEVERAL: Duration = Duration::from_secs(1);

/// The coordinator of a run, wherever it listens: reached when it is needed and again when it was away. Cheap
/// to clone.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    places: Arc<[Place]>,
    /// Which of them answered last; its clones know it too.
    current: Arc<AtomicUsize>,
    run: RunId,
    token: MetadataValue<Ascii>,
}

/// One that leads or stands by.
#[derive(Debug)]
struct Place {
    address: String,
    service: ClusterServiceClient<Channel>,
}

impl Client {
    /// `addresses` are `host:port`, separated by commas. Nothing is sent yet.
    pub(crate) fn new(addresses: &str, run: RunId, token: &str) -> Result<Self> {
        let is_only = !addresses.contains(',');
        let place = |address: &str| {
            let mut endpoint = Endpoint::from_shared(format!("http://{address}"))
                .with_context(|| format!("coordinator address {address:?}"))?
                .connect_timeout(CONNECT_MAX)
                .tcp_nodelay(true);
            if !is_only {
                endpoint = endpoint
                    .http2_keep_alive_interval(KEEPALIVE_OF_SEVERAL)
                    .keep_alive_timeout(KEEPALIVE_OF_SEVERAL)
                    .keep_alive_while_idle(true);
            }
            let service = ClusterServiceClient::new(endpoint.connect_lazy())
                .max_decoding_message_size(MESSAGE_BYTES_MAX);
            Ok(Place { address: address.to_owned(), service })
        };
        let places = addresses.split(',').map(place).collect::<Result<_>>()?;
        let token = token.parse().context("the token has characters that no token has")?;
        Ok(Self { places, current: Arc::default(), run, token })
    }

    /// Which of the addresses answered last, from 0.
    pub(crate) fn leader(&self) -> usize {
        self.current.load(Ordering::Relaxed)
    }

    /// The address that answered last.
    pub(crate) fn address(&self) -> &str {
        &self.places[self.leader()].address
    }

    /// Asks whoever answers, beginning with who answered last.
    async fn ask<T, F: Future<Output = Result<Response<T>, Status>>>(
        &self,
        call: impl Fn(ClusterServiceClient<Channel>) -> F,
    ) -> Result<Response<T>, Status> {
        let first = self.leader();
        let mut answer = Err(Status::unavailable("no coordinator answers"));
        for turn in 0..self.places.len() {
            let place = (first + turn) % self.places.len();
            answer = call(self.places[place].service.clone()).await;
            if !matches!(&answer, Err(status) if is_away(status)) {
                self.current.store(place, Ordering::Relaxed);
                break;
            }
        }
        answer
    }

    /// The event log from entry `from` on, and how far the workers are.
    pub(crate) async fn watch(&self, from: u64) -> Result<Streaming<v1::WatchResponse>, Status> {
        let request = v1::WatchRequest { run: self.run.to_string(), from_sequence: from };
        let ask = |mut service: ClusterServiceClient<Channel>| {
            let request = self.with_token(request.clone());
            async move { service.watch(request).await }
        };
        Ok(self.ask(ask).await?.into_inner())
    }

    /// Says that a worker's process has ended.
    pub(crate) async fn report_exit(&self, worker: WorkerId, how: &str) -> Result<(), Status> {
        let run = self.run.to_string();
        let request = v1::ReportExitRequest { run, worker: worker.0, how: how.to_owned() };
        let ask = |mut service: ClusterServiceClient<Channel>| {
            let request = self.with_token(request.clone());
            async move { service.report_exit(request).await }
        };
        self.ask(ask).await.map(drop)
    }

    /// The coordinator of the run in this folder, wherever it listens now.
    pub(crate) fn of(dir: &RunDir) -> Result<Self> {
        let Some(address) = dir.read_address() else {
            bail!(
                "run directory {dir} has no coordinator: start the run with `percheron up --run-dir`"
            );
        };
        Self::new(&address, dir.run()?, &dir.read_token()?)
    }

    /// Lets a worker, by name, leave without loss.
    pub(crate) async fn drain(&self, worker: &str) -> Result<()> {
        let request = v1::DrainRequest { run: self.run.to_string(), worker: worker.to_owned() };
        let ask = |mut service: ClusterServiceClient<Channel>| {
            let request = self.with_token(request.clone());
            async move { service.drain(request).await }
        };
        answered(timeout(ANSWER_MAX, self.ask(ask)).await).map(drop)
    }

    /// Lets so many workers take part.
    pub(crate) async fn resize(&self, workers: u32) -> Result<()> {
        let request = v1::ResizeRequest { run: self.run.to_string(), workers };
        let ask = |mut service: ClusterServiceClient<Channel>| {
            let request = self.with_token(request.clone());
            async move { service.resize(request).await }
        };
        answered(timeout(ANSWER_MAX, self.ask(ask)).await).map(drop)
    }

    /// Has the state kept soon; returns the step.
    pub(crate) async fn checkpoint(&self) -> Result<Step> {
        let request = v1::CheckpointRequest { run: self.run.to_string() };
        let ask = |mut service: ClusterServiceClient<Channel>| {
            let request = self.with_token(request.clone());
            async move { service.checkpoint(request).await }
        };
        Ok(Step(answered(timeout(ANSWER_MAX, self.ask(ask)).await)?.step))
    }

    /// Has workers of a machine let in again.
    pub(crate) async fn readmit(&self, node: &str) -> Result<()> {
        let request = v1::ReadmitRequest { run: self.run.to_string(), node: node.to_owned() };
        let ask = |mut service: ClusterServiceClient<Channel>| {
            let request = self.with_token(request.clone());
            async move { service.readmit(request).await }
        };
        answered(timeout(ANSWER_MAX, self.ask(ask)).await).map(drop)
    }

    fn with_token<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert(TOKEN_HEADER, self.token.clone());
        request
    }
}

/// What a person is told if the coordinator did not do as asked.
fn answered<T>(answer: Result<Result<Response<T>, Status>, Elapsed>) -> Result<T> {
    match answer {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) if status.code() == Code::Unavailable => {
            bail!("the coordinator cannot be reached: is the run still on? ({})", status.message())
        }
        Ok(Err(status)) => bail!("{}", status.message()),
        Err(_) => bail!("the coordinator did not answer within {} s", ANSWER_MAX.as_secs()),
    }
}

/// Whether nobody who leads was reached.
fn is_away(status: &Status) -> bool {
    matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Internal | Code::Cancelled)
}

/// Whether the coordinator is there and does not want to hear this, now or later.
pub(crate) fn is_final(status: &Status) -> bool {
    matches!(status.code(), Code::Unauthenticated | Code::NotFound | Code::Unimplemented)
}

/// An entry of the log from the wire.
pub(crate) fn entry(wire: &v1::LogEntry) -> Result<Entry> {
    let record = serde_json::from_str(&wire.record)
        .with_context(|| format!("entry {} of the event log", wire.sequence))?;
    Ok(Entry { sequence: wire.sequence, at: Timestamp(wire.at_ms), record })
}
