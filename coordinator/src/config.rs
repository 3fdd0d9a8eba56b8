//! What a coordinator process is started with, and what can keep it from starting.

use std::{net::SocketAddr, path::PathBuf};

use checkpoint::Retention;
use cluster::RunConfig;

use crate::LogError;

/// The settings of a coordinator process.
#[derive(Clone)]
pub struct Config {
    /// The plan of the run.
    pub run: RunConfig,
    /// The recipe as TOML, handed to each worker.
    pub recipe: String,
    /// What a worker or a person must show. Never printed.
    pub token: String,
    /// The file of the event log.
    pub log: PathBuf,
    /// The store that holds the checkpoints: a folder, or a URL.
    pub checkpoints: String,
    /// Which checkpoints are kept.
    pub keep: Retention,
    /// Software version, written into manifests.
    pub software: String,
}

impl std::fmt::Debug for Config {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Config")
            .field("run", &self.run)
            .field("token", &"(secret)")
            .field("log", &self.log)
            .field("checkpoints", &self.checkpoints)
            .finish_non_exhaustive()
    }
}

/// A coordinator that could not start, or had to give up.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The event log.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The log belongs to another run, or to the same run planned otherwise.
    #[error("event log {}: it belongs to run {found} and not to run {wanted}; choose another run directory", path.display())]
    OtherRun {
        /// The log.
        path: PathBuf,
        /// The run in the log.
        found: String,
        /// The run asked for.
        wanted: String,
    },
    /// The store of the checkpoints.
    #[error("cannot use {location} for checkpoints")]
    Store {
        /// The store.
        location: String,
        /// Why.
        #[source]
        source: checkpoint::OpenError,
    },
    /// The store of the checkpoints does not answer, or does not keep its contract.
    #[error(transparent)]
    Contract(#[from] checkpoint::ContractError),
    /// The network.
    #[error("cannot serve on {address}")]
    Serve {
        /// Where.
        address: SocketAddr,
        /// Why.
        #[source]
        source: tonic::transport::Error,
    },
}
