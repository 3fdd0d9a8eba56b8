//! Why a generation ends early for a worker, and what libraries' errors mean there.

use cluster::{Rank, Step};
use collective::{ExchangeError, FormError};

use super::{
    Trainer, chain,
    checkpoints::{self, RestoreError},
};

/// Why a generation ended for this worker before its purpose was reached.
#[derive(Debug, thiserror::Error)]
pub enum Interrupted {
    /// The peers could not be connected.
    #[error(transparent)]
    Form(#[from] FormError),
    /// The members could not agree on a state.
    #[error("{reason}")]
    Forming {
        /// Why.
        reason: String,
    },
    /// The checkpoint to start from is damaged.
    #[error("{reason}")]
    Checkpoint {
        /// Its step.
        step: Step,
        /// The object and what is wrong with it.
        reason: String,
    },
    /// The connection to the peers broke.
    #[error(transparent)]
    Exchange(#[from] ExchangeError),
    /// The members hold different states.
    #[error("{reason}")]
    Diverged {
        /// The step after which they compared them.
        step: Step,
        /// The step after which they were equal, at the latest.
        agreed: Step,
        /// Who differs from most, if most agree.
        odd: Option<Rank>,
        /// What was found, and what follows.
        reason: String,
    },
    /// The run cannot go on, here or elsewhere.
    #[error("{reason}")]
    Fatal {
        /// Why, and what to do.
        reason: String,
    },
}

impl From<shards::LoadError> for Interrupted {
    fn from(error: shards::LoadError) -> Self {
        Self::Fatal { reason: chain(&error) }
    }
}

impl From<model::GradientError> for Interrupted {
    fn from(error: model::GradientError) -> Self {
        let text = chain(&error);
        let reason = if text.contains("out of memory") {
            let first = text.lines().next().unwrap_or_default();
            format!(
                "the GPU has too little memory for a micro-batch: lower batch_size and raise \
                 update_freq or virtual_ranks by the same factor, or choose precision = bf16 \
                 ({first})"
            )
        } else {
            text
        };
        Self::Fatal { reason }
    }
}

impl Interrupted {
    pub(super) fn not_finite(step: Step, loss: f32, norm: f64) -> Self {
        Self::Fatal {
            reason: format!(
                "step {}: the loss is {loss} and the gradient norm {norm}, so training has diverged; \
                 resume a checkpoint with a lower schedule.lr or a smaller optimizer.clip_grad in a \
                 new run",
                step.next()
            ),
        }
    }
}

/// What a checkpoint that cannot be read means: damage is for the rules to answer, a store that does not
/// answer may answer in the next generation, and all else is the end.
pub(super) fn unreadable(host: &Trainer, error: RestoreError) -> Interrupted {
    match error {
        RestoreError::Load(error) if error.fault.is_damage() => {
            let setting_aside = checkpoints::set_aside(&host.checkpoints, &error);
            match host.runtime.block_on(setting_aside) {
                Ok(reason) => Interrupted::Checkpoint { step: error.step, reason },
                Err(error) => Interrupted::Forming { reason: chain(&error) },
            }
        }
        RestoreError::Load(error) => Interrupted::Forming { reason: chain(&error) },
        error @ (RestoreError::Open(_)
        | RestoreError::Quarantine(_)
        | RestoreError::OtherSections { .. }) => Interrupted::Fatal { reason: chain(&error) },
    }
}
