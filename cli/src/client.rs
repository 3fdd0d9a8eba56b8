//! The way to a coordinator: watching a run, asking for a change, telling it that a process ended.

use std::time::Duration;

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

/// A coordinator, reached when it is needed and again when it was away. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    service: ClusterServiceClient<Channel>,
    run: RunId,
    token: MetadataValue<Ascii>,
}

impl Client {
    /// `address` is `host:port`. Nothing is sent yet.
    pub(crate) fn new(address: &str, run: RunId, token: &str) -> Result<Self> {
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .with_context(|| format!("coordinator address {address:?}"))?
            .connect_timeout(CONNECT_MAX)
            .tcp_nodelay(true);
        let service = ClusterServiceClient::new(endpoint.connect_lazy())
            .max_decoding_message_size(MESSAGE_BYTES_MAX);
        let token = token.parse().context("the token has characters that no token has")?;
        Ok(Self { service, run, token })
    }

    /// The event log from entry `from` on, and how far the workers are.
    pub(crate) async fn watch(&self, from: u64) -> Result<Streaming<v1::WatchResponse>, Status> {
        let request = v1::WatchRequest { run: self.run.to_string(), from_sequence: from };
        let response = self.service.clone().watch(self.with_token(request)).await?;
        Ok(response.into_inner())
    }

    /// Says that a worker's process has ended.
    pub(crate) async fn report_exit(&self, worker: WorkerId, how: &str) -> Result<(), Status> {
        let run = self.run.to_string();
        let request = v1::ReportExitRequest { run, worker: worker.0, how: how.to_owned() };
        self.service.clone().report_exit(self.with_token(request)).await?;
        Ok(())
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
        let mut service = self.service.clone();
        answered(timeout(ANSWER_MAX, service.drain(self.with_token(request))).await).map(drop)
    }

    /// Lets so many workers take part.
    pub(crate) async fn resize(&self, workers: u32) -> Result<()> {
        let request = v1::ResizeRequest { run: self.run.to_string(), workers };
        let mut service = self.service.clone();
        answered(timeout(ANSWER_MAX, service.resize(self.with_token(request))).await).map(drop)
    }

    /// Has the state kept soon; returns the step.
    pub(crate) async fn checkpoint(&self) -> Result<Step> {
        let request = v1::CheckpointRequest { run: self.run.to_string() };
        let mut service = self.service.clone();
        let answer = timeout(ANSWER_MAX, service.checkpoint(self.with_token(request))).await;
        Ok(Step(answered(answer)?.step))
    }

    /// Has workers of a machine let in again.
    pub(crate) async fn readmit(&self, node: &str) -> Result<()> {
        let request = v1::ReadmitRequest { run: self.run.to_string(), node: node.to_owned() };
        let mut service = self.service.clone();
        answered(timeout(ANSWER_MAX, service.readmit(self.with_token(request))).await).map(drop)
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
