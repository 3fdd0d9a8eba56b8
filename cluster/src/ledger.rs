//! What the coordinator must never forget: the fold of its records.
//!
//! **Invariant**: the ledger changes only by [`Ledger::apply`], so replaying the log rebuilds it.

use std::collections::BTreeMap;

use crate::{Evaluation, Fingerprint, Generation, Member, Record, Step, Term, WorkerId};

/// The durable part of the coordinator's state.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Ledger {
    /// The newest leadership.
    pub term: Term,
    /// The newest generation; 0 before the first.
    pub generation: Generation,
    /// The leadership that opened it.
    pub opened_in: Term,
    /// Its members by rank.
    pub members: Vec<Member>,
    /// Whether the generation before it was intact when it was opened.
    pub planned: bool,
    /// Whether all its members hold the same state.
    pub formed: bool,
    /// The newest generation that was formed, unless a loss has ended it: its results count.
    pub intact: Option<Generation>,
    /// The members of the intact generation: whoever holds the newest state is among them.
    pub intact_members: Vec<Member>,
    /// Members of the newest generation that have been lost since it was opened.
    pub lost: Vec<WorkerId>,
    /// The newest step whose result the run has adopted.
    pub canonical: Step,
    /// The newest step that was adopted from a generation before the newest.
    pub inherited: Step,
    /// Steps computed more than once.
    pub repeated: u64,
    /// Steps whose checkpoint can be trusted, ascending.
    pub checkpoints: Vec<Step>,
    /// The newest of them when the newest generation was opened: all its members are told the same.
    pub checkpoint_offered: Option<Step>,
    /// The newest step that was evaluated.
    pub evaluated: Option<Step>,
    /// What the evaluations came to, by step.
    pub evaluations: Vec<Evaluation>,
    /// The newest step that had been evaluated when the newest generation was opened.
    pub evaluated_before: Option<Step>,
    /// How many workers are to take part, if an operator has said so.
    pub workers_wanted: Option<u32>,
    /// Machines that no worker is let in from, and what was seen there.
    pub faulty: BTreeMap<String, String>,
    /// What all workers must agree on.
    pub fingerprint: Option<Fingerprint>,
    /// How the run ended.
    pub outcome: Option<Outcome>,
}

/// The end of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It reached its last step.
    Finished {
        /// The last step.
        step: Step,
        /// SHA-256 of the final state, hexadecimal.
        state_sha256: String,
    },
    /// It could not go on.
    Failed {
        /// Why, and what to do.
        reason: String,
    },
}

impl Ledger {
    /// Whether a worker belongs to the intact generation.
    #[must_use]
    pub fn holds_state(&self, worker: WorkerId) -> bool {
        self.intact_members.iter().any(|member| member.worker == worker)
    }

    /// Whether a record, which is the next, tells that training cannot go on as it did: a member is lost, an exchange
    /// broke, or the generation before was given up. The first generation disturbs nothing.
    #[must_use]
    pub fn is_disturbed_by(&self, record: &Record) -> bool {
        match record {
            Record::WorkerLost { worker, .. } => {
                let is_member = self.members.iter().any(|member| member.worker == *worker);
                is_member && self.outcome.is_none()
            }
            Record::GenerationOpened { generation, planned, .. } => !planned && generation.0 > 1,
            Record::ExchangeLost { .. } => true,
            Record::RunCreated { .. }
            | Record::TermStarted { .. }
            | Record::FingerprintFixed { .. }
            | Record::WorkerJoined { .. }
            | Record::WorkerRefused { .. }
            | Record::NodeMarked { .. }
            | Record::NodeReadmitted { .. }
            | Record::Resized { .. }
            | Record::GenerationFormed { .. }
            | Record::StepAdopted { .. }
            | Record::Evaluated { .. }
            | Record::CheckpointCommitted { .. }
            | Record::CheckpointAbandoned { .. }
            | Record::RunFinished { .. }
            | Record::RunFailed { .. } => false,
        }
    }

    /// Takes one record in.
    pub fn apply(&mut self, record: &Record) {
        match record {
            Record::TermStarted { term } => self.term = *term,
            Record::FingerprintFixed { fingerprint } => {
                self.fingerprint = Some(fingerprint.clone());
            }
            Record::GenerationOpened { generation, members, planned, .. } => {
                self.generation = *generation;
                self.opened_in = self.term;
                self.members.clone_from(members);
                self.planned = *planned;
                self.formed = false;
                self.lost.clear();
                self.inherited = self.canonical;
                self.checkpoint_offered = self.checkpoints.last().copied();
                self.evaluated_before = self.evaluated;
                if !planned {
                    self.intact = None;
                    self.intact_members.clear();
                }
            }
            Record::GenerationFormed { generation, repeated, .. } => {
                self.formed = true;
                self.intact = Some(*generation);
                self.intact_members.clone_from(&self.members);
                self.repeated += repeated;
            }
            Record::WorkerLost { worker, .. } => {
                if self.members.iter().any(|member| member.worker == *worker) {
                    self.lost.push(*worker);
                }
            }
            Record::StepAdopted { step, generation, .. } => {
                self.canonical = *step;
                if *generation < self.generation {
                    self.inherited = *step;
                }
            }
            Record::Evaluated { evaluation, .. } => {
                self.evaluated = Some(evaluation.step);
                self.evaluations.push(evaluation.clone());
            }
            Record::CheckpointCommitted { step } => {
                if let Err(place) = self.checkpoints.binary_search(step) {
                    self.checkpoints.insert(place, *step);
                }
            }
            Record::RunFinished { step, state_sha256 } => {
                let state_sha256 = state_sha256.clone();
                self.outcome = Some(Outcome::Finished { step: *step, state_sha256 });
            }
            Record::RunFailed { reason } => {
                self.outcome = Some(Outcome::Failed { reason: reason.clone() });
            }
            Record::NodeMarked { node, reason, .. } => {
                self.faulty.insert(node.clone(), reason.clone());
            }
            Record::NodeReadmitted { node } => {
                self.faulty.remove(node);
            }
            Record::Resized { workers } => self.workers_wanted = Some(*workers),
            Record::CheckpointAbandoned { step, .. } => {
                self.checkpoints.retain(|kept| kept != step);
            }
            Record::RunCreated { .. }
            | Record::WorkerJoined { .. }
            | Record::WorkerRefused { .. }
            | Record::ExchangeLost { .. } => {}
        }
    }
}
