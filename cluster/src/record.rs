//! What the event log holds. Status, incidents, audit and replay are views of these.

use serde::{Deserialize, Serialize};

use crate::{
    Evaluation, Fingerprint, Generation, Member, RunConfig, Step, StepMetrics, Term, Timestamp,
    WorkerId,
};

/// A decision or a fact, durable before its effect is visible.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Record {
    /// The run exists. Always the first record.
    RunCreated {
        /// Its plan.
        config: Box<RunConfig>,
    },
    /// A coordinator took the lead.
    TermStarted {
        /// Its term.
        term: Term,
    },
    /// The first worker fixed what can change the run's bits.
    FingerprintFixed {
        /// What all workers must agree on.
        fingerprint: Fingerprint,
    },
    /// A worker is ready to take part.
    WorkerJoined {
        /// Who.
        worker: WorkerId,
        /// For people.
        name: String,
        /// Where its peers reach it.
        address: String,
    },
    /// A worker was turned away.
    WorkerRefused {
        /// Who.
        worker: WorkerId,
        /// For people.
        name: String,
        /// Why.
        reason: String,
    },
    /// A worker is gone.
    WorkerLost {
        /// Who.
        worker: WorkerId,
        /// For people.
        name: String,
        /// How that was noticed.
        cause: String,
    },
    /// A worker's exchange broke and it stopped.
    ExchangeLost {
        /// Who says so.
        worker: WorkerId,
        /// In which generation.
        generation: Generation,
        /// Whom it blames, for people.
        peer: Option<String>,
        /// Why.
        reason: String,
        /// When it stopped, by its own clock.
        stopped_at: Timestamp,
    },
    /// A machine is broken: no worker of it is let in any more.
    NodeMarked {
        /// Its name.
        node: String,
        /// The worker there that noticed, for people.
        name: String,
        /// What was seen.
        reason: String,
    },
    /// An operator says that a marked machine is whole again.
    NodeReadmitted {
        /// Its name.
        node: String,
    },
    /// An operator wants so many workers to take part; more stand by.
    Resized {
        /// How many.
        workers: u32,
    },
    /// The membership changed. Durable before any worker hears of it.
    GenerationOpened {
        /// The new generation.
        generation: Generation,
        /// Its members by rank.
        members: Vec<Member>,
        /// Whether the one before was intact.
        planned: bool,
        /// Why.
        reason: String,
    },
    /// All members of a generation hold the same state.
    GenerationFormed {
        /// Which.
        generation: Generation,
        /// The step they resume from.
        step: Step,
        /// Digest of that state.
        digest: String,
        /// Steps that were begun or applied before and are computed once more.
        repeated: u64,
        /// When the last survivor of the generation before had stopped, by its own clock.
        stopped_at: Option<Timestamp>,
    },
    /// The run adopted the result of a step; its samples are consumed.
    StepAdopted {
        /// The step.
        step: Step,
        /// The generation that computed it.
        generation: Generation,
        /// Its figures, unless all who could report them are gone.
        metrics: Option<StepMetrics>,
        /// When it was applied, by the reporting worker's clock.
        applied_at: Option<Timestamp>,
    },
    /// The validation split was evaluated.
    Evaluated {
        /// In which generation.
        generation: Generation,
        /// What came out.
        evaluation: Evaluation,
    },
    /// A checkpoint can be trusted.
    CheckpointCommitted {
        /// Its step.
        step: Step,
    },
    /// A checkpoint was given up before it was complete, and the next one will be tried; or it was
    /// complete and has been taken away since.
    CheckpointAbandoned {
        /// Its step.
        step: Step,
        /// Why.
        reason: String,
    },
    /// The run is done.
    RunFinished {
        /// Its last step.
        step: Step,
        /// SHA-256 of the final state, hexadecimal.
        state_sha256: String,
    },
    /// The run cannot go on.
    RunFailed {
        /// Why, and what to do.
        reason: String,
    },
}

impl Record {
    /// Whether no other record follows it, whoever leads.
    #[must_use]
    pub fn ends_the_run(&self) -> bool {
        matches!(self, Self::RunFinished { .. } | Self::RunFailed { .. })
    }
}
