//! What the coordinator must never forget: the fold of its records.
//!
//! **Invariant**: the ledger changes only by [`Ledger::apply`], so replaying the log rebuilds it.

use crate::{Fingerprint, Generation, Member, Record, Step, Term};

/// The durable part of the coordinator's state.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Ledger {
    /// The newest leadership.
    pub term: Term,
    /// The newest generation; 0 before the first.
    pub generation: Generation,
    /// Its members by rank.
    pub members: Vec<Member>,
    /// Whether the generation before it was intact when it was opened.
    pub planned: bool,
    /// Whether all its members hold the same state.
    pub formed: bool,
    /// The newest generation that was formed, unless a loss has ended it: its results count.
    pub intact: Option<Generation>,
    /// The newest step whose result the run has adopted.
    pub canonical: Step,
    /// Steps computed more than once.
    pub repeated: u64,
    /// Steps whose checkpoint can be trusted, ascending.
    pub checkpoints: Vec<Step>,
    /// The newest step that was evaluated.
    pub evaluated: Option<Step>,
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
    /// Takes one record in.
    pub fn apply(&mut self, record: &Record) {
        match record {
            Record::TermStarted { term } => self.term = *term,
            Record::FingerprintFixed { fingerprint } => {
                self.fingerprint = Some(fingerprint.clone());
            }
            Record::GenerationOpened { generation, members, planned, .. } => {
                self.generation = *generation;
                self.members.clone_from(members);
                self.planned = *planned;
                self.formed = false;
                self.intact = self.intact.filter(|_| *planned);
            }
            Record::GenerationFormed { generation, repeated, .. } => {
                self.formed = true;
                self.intact = Some(*generation);
                self.repeated += repeated;
            }
            Record::StepAdopted { step, .. } => self.canonical = *step,
            Record::Evaluated { evaluation, .. } => self.evaluated = Some(evaluation.step),
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
            Record::RunCreated { .. }
            | Record::WorkerJoined { .. }
            | Record::WorkerRefused { .. }
            | Record::WorkerLost { .. }
            | Record::ExchangeLost { .. }
            | Record::CheckpointAbandoned { .. } => {}
        }
    }
}
