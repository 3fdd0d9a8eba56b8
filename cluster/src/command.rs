//! All that the coordinator can ask for.

use std::{ops::Range, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::{Generation, Part, Rank, Record, Step, Term, WorkerId};

/// A side effect. The host carries them out in order; an append is durable before the next begins.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// Make a record durable.
    Append(Record),
    /// Tell a worker something.
    Send {
        /// Whom.
        worker: WorkerId,
        /// What.
        order: Order,
    },
    /// End a worker's session, after what was sent before.
    Close {
        /// Whose.
        worker: WorkerId,
    },
    /// Commit the manifest of a checkpoint whose parts are all in the store, then say
    /// `CheckpointCommitted` or `CheckpointFailed`.
    CommitCheckpoint {
        /// The generation that wrote it.
        generation: Generation,
        /// Its step.
        step: Step,
        /// All parts, by index.
        parts: Vec<Part>,
        /// Size of all parts but the last, in bytes.
        part_bytes: u64,
        /// What the concatenated parts hold: name and bytes, in order.
        sections: Vec<(String, u64)>,
    },
}

/// What the coordinator tells a worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Order {
    /// The session stands; speak at least once a heartbeat.
    Welcome {
        /// The leadership that answers.
        term: Term,
    },
    /// Form a new generation. Sent to its members and to those it lets go.
    Form(Group),
    /// Keep the state after this step.
    CheckpointAt {
        /// For the members of this generation.
        generation: Generation,
        /// A step still to come.
        step: Step,
    },
    /// Stop and keep the state: too few workers are left to go on.
    Hold {
        /// The generation to stop.
        generation: Generation,
    },
    /// Go, and do not come back as you are.
    Refuse {
        /// Why, and what to do.
        reason: String,
    },
    /// The run is done.
    Finish {
        /// Its last step.
        step: Step,
        /// SHA-256 of the final state, hexadecimal.
        state_sha256: String,
    },
    /// The run has failed.
    Fail {
        /// Why.
        reason: String,
    },
}

/// A generation: who belongs to it, and where it starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// Its number.
    pub generation: Generation,
    /// The leadership that opened it; a later one may be the one that says so.
    pub term: Term,
    /// Its members by rank, shared: each of them is told of all.
    pub members: Arc<[Member]>,
    /// Whether the generation before is intact: then its members leave it together, between two
    /// steps. Otherwise they abort it at once.
    pub planned: bool,
    /// The newest checkpoint, taken if no member holds a newer state.
    pub checkpoint: Option<Step>,
    /// The next state to keep.
    pub checkpoint_at: Option<Step>,
    /// The newest step that has been evaluated.
    pub evaluated: Option<Step>,
    /// Whether nobody stays: the members keep their state, train no more, and wait until they are let go. In the last
    /// step of the run it means nothing.
    pub last: bool,
}

impl Group {
    /// The place of a worker in this generation.
    #[must_use]
    pub fn rank_of(&self, worker: WorkerId) -> Option<Rank> {
        (0..).zip(self.members.iter()).find(|(_, m)| m.worker == worker).map(|(rank, _)| Rank(rank))
    }
}

/// A worker in a generation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Who.
    pub worker: WorkerId,
    /// For people.
    pub name: String,
    /// Where its peers reach it.
    pub address: String,
    /// The virtual ranks it hosts.
    pub block: Range<u32>,
}
