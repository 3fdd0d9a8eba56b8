//! The event log of a run, wherever it is kept.

use std::{fs::File, io::Read as _};

use checkpoint::Store;
use cluster::{Record, Timestamp};
use tokio::sync::oneshot;
use tracing::warn;

use crate::{
    Entry, EventLog, LogAt, LogError, StartError,
    journal::{self, Journal},
    lease::{self, Assurance, Held},
};

/// The log, open for appending.
#[derive(Debug)]
pub(crate) enum Log {
    /// In this machine's file, whose lock keeps others out.
    File(EventLog),
    /// In the run's store, under a lease.
    Shared { journal: Journal, lease: Held },
}

impl Log {
    /// Opens the log for the one who leads: for a shared one, waits for the lease.
    pub(crate) async fn open(at: &LogAt) -> Result<(Self, Vec<Entry>), StartError> {
        match at {
            LogAt::File(path) => {
                let log = EventLog::open(path)?;
                let entries = log.read_from(1)?;
                Ok((Self::File(log), entries))
            }
            LogAt::Shared { location, lease } => {
                let store = Store::create(location)
                    .map_err(|source| StartError::Store { location: location.clone(), source })?;
                store.check_contract().await?;
                let nonce = draw_nonce()?;
                let lease = lease::take(store.clone(), lease, nonce.clone()).await?;
                let (journal, entries) = Journal::open(store, lease.term, nonce).await?;
                Ok((Self::Shared { journal, lease }, entries))
            }
        }
    }

    /// Appends, and returns when it is durable.
    pub(crate) async fn append(
        &mut self,
        at: Timestamp,
        records: &[Record],
    ) -> Result<Vec<Entry>, LogError> {
        match self {
            Self::File(log) => tokio::task::block_in_place(|| log.append(at, records)),
            Self::Shared { journal, .. } => journal.append(at, records).await,
        }
    }

    /// Answers a watcher; what it takes is not the host's time.
    pub(crate) fn answer(&self, from: u64, entries: oneshot::Sender<Vec<Entry>>) {
        match self {
            Self::File(log) => answer(log.read_from(from), entries),
            Self::Shared { journal, .. } => {
                let store = journal.store().clone();
                tokio::spawn(async move { answer(journal::read(&store, from).await, entries) });
            }
        }
    }

    /// What says whether this process still leads, if others could.
    pub(crate) fn assurance(&self) -> Option<Assurance> {
        match self {
            Self::File(_) => None,
            Self::Shared { lease, .. } => Some(lease.assurance()),
        }
    }

    /// The term that was claimed; a file has none.
    pub(crate) fn claimed(&self) -> cluster::Term {
        match self {
            Self::File(_) => cluster::Term::default(),
            Self::Shared { lease, .. } => lease.term,
        }
    }

    /// Reads a shared log once more, after somebody's last word came in between.
    pub(crate) async fn reopen(self) -> Result<(Self, Vec<Entry>), LogError> {
        match self {
            Self::File(log) => {
                let entries = log.read_from(1)?;
                Ok((Self::File(log), entries))
            }
            Self::Shared { journal, lease } => {
                let (journal, entries) = journal.reopen().await?;
                Ok((Self::Shared { journal, lease }, entries))
            }
        }
    }

    /// The leader goes in order.
    pub(crate) async fn close(self) {
        match self {
            Self::File(_) => {}
            Self::Shared { lease, .. } => lease.release().await,
        }
    }
}

fn answer(found: Result<Vec<Entry>, LogError>, entries: oneshot::Sender<Vec<Entry>>) {
    match found {
        Ok(found) => drop(entries.send(found)), // The watcher may be gone.
        Err(error) => warn!(%error, "a watcher could not be served"),
    }
}

/// 128 bits of the system's randomness, in hexadecimal.
fn draw_nonce() -> Result<String, StartError> {
    let mut bytes = [0; 16];
    let drawn = File::open("/dev/urandom").and_then(|mut chance| chance.read_exact(&mut bytes));
    drawn.map_err(|source| StartError::Chance { source })?;
    Ok(hex::encode(bytes))
}
