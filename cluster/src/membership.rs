//! The workers that the coordinator knows: who is there, since when, and how fresh the news is.

use std::{collections::BTreeMap, time::Duration};

use crate::{Hello, Member, Progress, Timestamp, WorkerId};

/// A worker that is alive as far as the coordinator knows.
#[derive(Debug, Clone, PartialEq)]
pub struct Worker {
    /// For people.
    pub name: String,
    /// Where its peers reach it.
    pub address: String,
    /// The machine it runs on; empty if it has not said so.
    pub node: String,
    /// Order of arrival, so that older workers keep the lower ranks.
    pub arrival: u64,
    /// When it last said something.
    pub heard: Timestamp,
    /// Whether its session is open, as far as is known: a restored member counts as connected until
    /// its lease is out.
    pub session: bool,
    /// Whether it cannot form a generation yet, so that nobody should wait for it.
    pub preparing: bool,
    /// Whether it was asked, or asks, to leave.
    pub draining: bool,
    /// What it last said of its progress.
    pub progress: Option<Progress>,
}

/// All workers that are alive, by identity.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Membership {
    workers: BTreeMap<WorkerId, Worker>,
    arrivals: u64,
    /// Nobody was heard before this moment: looking at all of them can wait until it is too long ago.
    heard_since: Timestamp,
}

impl Membership {
    /// A worker, if it is known.
    #[must_use]
    pub fn find(&self, worker: WorkerId) -> Option<&Worker> {
        self.workers.get(&worker)
    }

    /// A worker to be updated, if it is known.
    pub fn find_mut(&mut self, worker: WorkerId) -> Option<&mut Worker> {
        self.workers.get_mut(&worker)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (WorkerId, &Worker)> {
        self.workers.iter().map(|(&id, worker)| (id, worker))
    }

    /// A newcomer opened a session.
    pub fn arrive(&mut self, now: Timestamp, worker: WorkerId, hello: &Hello) {
        let Hello { name, address, node, preparing, .. } = hello.clone();
        self.insert(now, worker, (name, address, node), preparing);
    }

    /// A member of a restored generation, which has yet to come back.
    pub fn expect(&mut self, now: Timestamp, member: &Member) {
        let Member { name, address, .. } = member.clone();
        self.insert(now, member.worker, (name, address, String::new()), false);
    }

    fn insert(
        &mut self,
        now: Timestamp,
        worker: WorkerId,
        (name, address, node): (String, String, String),
        preparing: bool,
    ) {
        self.arrivals += 1;
        let arrival = self.arrivals;
        let (session, draining, progress) = (true, false, None);
        let heard = now;
        let held =
            Worker { name, address, node, arrival, heard, session, preparing, draining, progress };
        if self.workers.is_empty() {
            self.heard_since = now;
        }
        self.heard_since = self.heard_since.min(now);
        self.workers.insert(worker, held);
    }

    /// Forgets a worker; `None` if it was not known.
    pub fn remove(&mut self, worker: WorkerId) -> Option<Worker> {
        self.workers.remove(&worker)
    }

    /// All of them, oldest first.
    #[must_use]
    pub fn oldest_first(&self) -> Vec<(WorkerId, &Worker)> {
        let mut workers: Vec<_> = self.iter().collect();
        workers.sort_by_key(|(_, worker)| worker.arrival);
        workers
    }

    /// Counts no silence until now, as nobody could be heard: the coordinator was not running.
    pub fn forgive(&mut self, now: Timestamp) {
        for worker in self.workers.values_mut() {
            worker.heard = now;
        }
    }

    /// A moment before which no worker's silence becomes too long.
    #[must_use]
    pub fn next_expiry(&self, lease: Duration) -> Option<Timestamp> {
        (!self.workers.is_empty()).then(|| self.heard_since + lease)
    }

    /// The workers that have been silent for `lease` or longer.
    pub fn expired(&mut self, now: Timestamp, lease: Duration) -> Vec<WorkerId> {
        if self.heard_since + lease > now {
            return Vec::new();
        }
        let stays = |worker: &Worker| worker.heard + lease > now;
        let heard = self.workers.values().filter(|worker| stays(worker)).map(|w| w.heard);
        self.heard_since = heard.min().unwrap_or(now);
        self.iter().filter(|(_, worker)| !stays(worker)).map(|(id, _)| id).collect()
    }
}
