//! The way to a coordinator: watching a run, and telling it that a process ended.

use std::time::Duration;

use anyhow::{Context as _, Result};
use cluster::{RunId, Timestamp, WorkerId};
use coordinator::Entry;
use proto::{
    MESSAGE_BYTES_MAX, TOKEN_HEADER,
    v1::{self, cluster_service_client::ClusterServiceClient},
};
use tonic::{
    Code, Request, Status, Streaming,
    metadata::{Ascii, MetadataValue},
    transport::{Channel, Endpoint},
};

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

    fn with_token<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert(TOKEN_HEADER, self.token.clone());
        request
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
