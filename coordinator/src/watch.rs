//! What people and programs that watch a run are told: the log as it grows, and who is alive.

use std::sync::Arc;

use cluster::Coordinator;
use proto::v1;
use tokio::sync::{broadcast, watch};

use crate::{Entry, metrics::Metrics};

/// Entries that a slow watcher may fall behind before it has to read the log again.
const BACKLOG: usize = 4096;

/// The sending side, owned by the host.
#[derive(Debug)]
pub(crate) struct Publisher {
    metrics: Arc<Metrics>,
    entries: broadcast::Sender<Arc<v1::LogEntry>>,
    liveness: watch::Sender<v1::Liveness>,
}

/// The receiving side, handed to each watcher.
#[derive(Debug, Clone)]
pub(crate) struct Subscriber {
    entries: broadcast::Sender<Arc<v1::LogEntry>>,
    liveness: watch::Receiver<v1::Liveness>,
}

pub(crate) fn channel(
    metrics: impl FnOnce(watch::Receiver<v1::Liveness>) -> Metrics,
) -> (Publisher, Subscriber) {
    let (entries, _) = broadcast::channel(BACKLOG);
    let (liveness, receiver) = watch::channel(v1::Liveness::default());
    let metrics = Arc::new(metrics(receiver.clone()));
    let subscriber = Subscriber { entries: entries.clone(), liveness: receiver };
    (Publisher { metrics, entries, liveness }, subscriber)
}

impl Publisher {
    /// Tells all watchers of new entries. That nobody watches is no error.
    pub(crate) fn entries(&self, entries: &[Entry]) {
        for entry in entries {
            self.metrics.observe(entry);
            if self.entries.receiver_count() > 0 {
                drop(self.entries.send(Arc::new(entry_to_wire(entry))));
            }
        }
    }

    /// What Prometheus is told.
    pub(crate) fn metrics(&self) -> Arc<Metrics> {
        Arc::clone(&self.metrics)
    }

    /// Tells all watchers how far the workers are.
    pub(crate) fn liveness(&self, coordinator: &Coordinator) {
        let workers = coordinator.workers().iter().map(|(worker, known)| v1::WorkerLiveness {
            worker: worker.0,
            name: known.name.clone(),
            session: known.session,
            progress: known.progress.as_ref().map(proto::heartbeat),
        });
        let liveness = v1::Liveness { term: coordinator.term().0, workers: workers.collect() };
        self.liveness.send_replace(liveness);
    }
}

impl Subscriber {
    pub(crate) fn entries(&self) -> broadcast::Receiver<Arc<v1::LogEntry>> {
        self.entries.subscribe()
    }

    pub(crate) fn liveness(&self) -> watch::Receiver<v1::Liveness> {
        self.liveness.clone()
    }
}

pub(crate) fn entry_to_wire(entry: &Entry) -> v1::LogEntry {
    let record = serde_json::to_string(&entry.record).expect("records hold only plain values");
    v1::LogEntry { sequence: entry.sequence, at_ms: entry.at.0, record }
}
