//! All that can happen to the coordinator.

use std::{fmt, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{Epoch, Fingerprint, Generation, Rank, Step, Timestamp, WorkerId};

/// Something that happened. The host turns sessions, exits and its own clock into these.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A worker opened a session: a new one, or a member that comes back after an interruption.
    WorkerJoined {
        /// Who.
        worker: WorkerId,
        /// What it says of itself.
        hello: Hello,
    },
    /// A worker says something in its session.
    Reported {
        /// Who.
        worker: WorkerId,
        /// What.
        report: Report,
    },
    /// A session ended. The worker may be dead, or about to open another.
    SessionClosed {
        /// Whose.
        worker: WorkerId,
    },
    /// The supervisor of a worker saw its process end.
    ProcessExited {
        /// Who.
        worker: WorkerId,
        /// Exit code or signal, in words.
        how: String,
    },
    /// An operator wants a worker to leave without loss.
    DrainRequested {
        /// Who.
        worker: WorkerId,
    },
    /// An operator wants so many workers to take part.
    ResizeRequested {
        /// How many; more stand by.
        workers: u32,
    },
    /// An operator says that a machine that was marked as faulty is whole again.
    NodeReadmitted {
        /// Its name.
        node: String,
    },
    /// An operator wants the state to be kept soon.
    CheckpointRequested,
    /// The manifest of a checkpoint is in the store and was read back.
    CheckpointCommitted {
        /// Its step.
        step: Step,
    },
    /// A checkpoint could not be committed.
    CheckpointFailed {
        /// Its step.
        step: Step,
        /// Why.
        reason: String,
    },
    /// The moment that `next_deadline` named has come.
    DeadlineReached,
}

/// How a worker introduces itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// For people: `worker-2`, or a host and process id.
    pub name: String,
    /// Where its peers reach it, `host:port`.
    pub address: String,
    /// The machine it runs on; empty if it does not say.
    pub node: String,
    /// What can change its bits.
    pub fingerprint: Fingerprint,
    /// The newest generation it was ordered into, if any.
    pub generation: Option<Generation>,
    /// The step its state is at, if it holds one.
    pub applied: Option<Step>,
    /// Whether its trainer is still being made, so that it cannot form a generation yet.
    pub preparing: bool,
}

/// What a worker tells the coordinator.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Report {
    /// I am alive, and this is how far I am.
    Heartbeat(Progress),
    /// My trainer is there: from now on I can form a generation.
    Ready,
    /// The generation stands and its members hold the same state.
    Formed {
        /// Which.
        generation: Generation,
        /// The step they resume from.
        step: Step,
        /// Digest of the state (blake3, hexadecimal).
        digest: String,
        /// The newest step this worker had begun before.
        begun: Step,
        /// When it stopped in the generation before, by its own clock.
        stopped_at: Option<Timestamp>,
        /// The figures of the step resumed from, if this worker took part in it.
        metrics: Option<StepMetrics>,
    },
    /// The generation could not be formed.
    FormFailed {
        /// Which.
        generation: Generation,
        /// The peer at fault, if one is known.
        peer: Option<Rank>,
        /// Why.
        reason: String,
    },
    /// The exchange with the peers broke: this worker has stopped and waits for a new generation.
    ExchangeLost {
        /// In which generation.
        generation: Generation,
        /// The step this worker still holds.
        applied: Step,
        /// The peer at fault, if one is known.
        peer: Option<Rank>,
        /// Why.
        reason: String,
        /// When this worker stopped, by its own clock.
        at: Timestamp,
    },
    /// An optimizer update has been applied. Only rank 0 says so; its peers' heartbeats agree.
    StepApplied {
        /// In which generation.
        generation: Generation,
        /// The step reached.
        step: Step,
        /// Its figures.
        metrics: StepMetrics,
        /// When it was applied, by the worker's own clock.
        at: Timestamp,
    },
    /// The validation split has been evaluated.
    Evaluated {
        /// In which generation.
        generation: Generation,
        /// What came out.
        evaluation: Evaluation,
    },
    /// This worker's share of a checkpoint is in the store.
    ShareWritten {
        /// In which generation.
        generation: Generation,
        /// What was written.
        share: Share,
    },
    /// This worker's share of a checkpoint could not be written.
    ShareFailed {
        /// In which generation.
        generation: Generation,
        /// Of which step.
        step: Step,
        /// Why.
        reason: String,
    },
    /// The checkpoint that the generation was to start from is damaged, and set aside: this worker has no
    /// state and waits for a new generation.
    CheckpointDamaged {
        /// In which generation.
        generation: Generation,
        /// Of which step.
        step: Step,
        /// The object and what is wrong with it.
        reason: String,
    },
    /// The members hold different states after the same step. None of them has a usable one any more, and this worker
    /// waits for a new generation.
    Diverged {
        /// In which generation.
        generation: Generation,
        /// The step after which they compared them.
        step: Step,
        /// The step up to which what was kept can be trusted: until then they were equal.
        agreed: Step,
        /// Who differs from most, if most agree.
        odd: Option<Rank>,
        /// What was found.
        reason: String,
    },
    /// The last step is applied, evaluated and written.
    Finished {
        /// In which generation.
        generation: Generation,
        /// The last step.
        step: Step,
        /// SHA-256 of the whole state, hexadecimal.
        state_sha256: String,
    },
    /// This worker wants to leave without loss (it was told to stop).
    Leaving {
        /// Why.
        reason: String,
    },
    /// This worker's machine is broken: what it computes from now on is not to be trusted.
    NodeFaulty {
        /// What was seen.
        reason: String,
    },
    /// This worker cannot go on, and neither could another in its place.
    Failed {
        /// What failed, and what to do.
        reason: String,
    },
}

/// How far a worker is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// The newest generation it was ordered into.
    pub generation: Generation,
    /// The step its state is at, if it holds one.
    pub applied: Option<Step>,
    /// What it does.
    pub phase: StepPhase,
    /// For how long it has been doing that.
    pub in_phase: Duration,
    /// Resident memory of its process, in bytes.
    pub resident_bytes: u64,
}

/// What a worker does at a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StepPhase {
    /// It waits for a generation.
    Idle,
    /// It forms a generation.
    Form,
    /// It waits for images.
    Load,
    /// Forward and backward of its virtual ranks.
    Compute,
    /// The sum over the virtual ranks.
    Reduce,
    /// The optimizer update.
    Update,
    /// The validation split.
    Evaluate,
    /// The copy of its share of a checkpoint.
    Checkpoint,
}

impl fmt::Display for StepPhase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Idle => "idle",
            Self::Form => "form",
            Self::Load => "load",
            Self::Compute => "compute",
            Self::Reduce => "reduce",
            Self::Update => "update",
            Self::Evaluate => "evaluate",
            Self::Checkpoint => "checkpoint",
        })
    }
}

/// The figures of one optimizer update, over the global batch.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct StepMetrics {
    /// Mean loss.
    pub loss: f32,
    /// L2 norm of the mean gradient, before clipping.
    pub gradient_norm: f32,
    /// Learning rate used.
    pub learning_rate: f64,
    /// Images in the global batch.
    pub images: u64,
    /// Wall time of the step on the reporting worker, in milliseconds.
    pub step_ms: f32,
    /// Part of it spent waiting for images.
    pub load_ms: f32,
    /// Part of it spent in forward and backward.
    pub compute_ms: f32,
    /// Part of it spent in the sum over the virtual ranks.
    pub reduce_ms: f32,
    /// Part of it spent in the optimizer update.
    pub update_ms: f32,
}

/// Results on the validation split, each sample counted once.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// The step evaluated.
    pub step: Step,
    /// Epochs completed by then.
    pub epoch: Epoch,
    /// Samples evaluated.
    pub samples: u64,
    /// Of the weights.
    pub weights: ExitScores,
    /// Of their exponential moving average.
    pub ema: ExitScores,
}

/// Scores in the order of the exits: early3, att, cnn, merge.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct ExitScores {
    /// Top-1 accuracy of each exit, `0..=1`.
    pub top1: [f64; 4],
    /// Mean loss over the samples (hard labels, without self-distillation).
    pub loss: f64,
}

impl ExitScores {
    /// Names of the exits, in their order everywhere.
    pub const EXITS: [&str; 4] = ["early3", "att", "cnn", "merge"];
}

/// One worker's share of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// The step whose state it is.
    pub step: Step,
    /// The parts written.
    pub parts: Vec<Part>,
    /// How many parts the whole checkpoint has.
    pub parts_total: u32,
    /// Size of all parts but the last, in bytes.
    pub part_bytes: u64,
    /// What the concatenated parts hold: name and bytes, in order.
    pub sections: Vec<(String, u64)>,
}

/// One object of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// Its place, from 0.
    pub index: u32,
    /// Its size.
    pub bytes: u64,
    /// Its blake3 digest, hexadecimal.
    pub digest: String,
}
