//! What a coordinator process is started with, and what can keep it from starting.

use std::{io, net::SocketAddr, path::PathBuf, time::Duration};

use checkpoint::Retention;
use cluster::{RunConfig, Step, Term};

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
    /// Where the event log is.
    pub log: LogAt,
    /// The store that holds the checkpoints: a folder, or a URL.
    pub checkpoints: String,
    /// Which checkpoints are kept.
    pub keep: Retention,
    /// Software version, written into manifests.
    pub software: String,
}

/// Where an event log is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogAt {
    /// In an embedded database on this machine.
    File(PathBuf),
    /// In an object store, so that a coordinator can start on any node.
    Shared {
        /// A folder that all nodes see, or a URL.
        location: String,
        /// How its leader is found.
        lease: Lease,
    },
}

impl From<PathBuf> for LogAt {
    fn from(path: PathBuf) -> Self {
        Self::File(path)
    }
}

/// How the leader of a run is found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// Who this is. Who comes under the name of the last leader says that that one is dead.
    pub holder: String,
    /// A leader that is not heard of for so long is replaced.
    pub lasts: Duration,
    /// Whether to wait while another leads. Otherwise that is an error.
    pub standby: bool,
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
    Log(LogError),
    /// The log belongs to another run, or to the same run planned otherwise.
    #[error(
        "event log {log}: it belongs to run {found} and not to run {wanted}; choose another run directory"
    )]
    OtherRun {
        /// The log.
        log: String,
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
    /// There are checkpoints, and the log does not know of them.
    #[error(
        "event log {log} has no record, but {checkpoints} has checkpoints up to step {newest}: put the log \
         back, or keep the checkpoints of a new run elsewhere"
    )]
    Forgotten {
        /// The log.
        log: String,
        /// The store of the checkpoints.
        checkpoints: String,
        /// The newest of them.
        newest: Step,
    },
    /// Another coordinator leads the run.
    #[error(
        "{location}: {holder} leads this run (term {term}); say --standby to wait for it to end"
    )]
    Led {
        /// The store with the lease.
        location: String,
        /// Who leads.
        holder: String,
        /// Since which term.
        term: Term,
    },
    /// Another coordinator leads the run by now. Nothing more was written.
    #[error(
        "another coordinator has taken the lead (term {by}): this one has been replaced and ends"
    )]
    Superseded {
        /// Its term, or that of one before it.
        by: Term,
    },
    /// The system gives no randomness.
    #[error("cannot read /dev/urandom")]
    Chance {
        /// Why.
        #[source]
        source: io::Error,
    },
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

impl From<LogError> for StartError {
    fn from(error: LogError) -> Self {
        match error {
            LogError::Superseded { by, .. } => Self::Superseded { by },
            other @ (LogError::InUse { .. }
            | LogError::Database { .. }
            | LogError::Damaged { .. }
            | LogError::DamagedObject { .. }
            | LogError::Store { .. }
            | LogError::Gap { .. }
            | LogError::Create { .. }) => Self::Log(other),
        }
    }
}

impl std::fmt::Display for LogAt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::Shared { location, .. } => f.write_str(location),
        }
    }
}
