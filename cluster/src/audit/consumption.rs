//! Which samples the adopted steps consumed: each of an epoch at most once, and by its end all but those
//! that fill no global batch.

use crate::{Epoch, Step};

/// The data plan of a run.
pub trait Samples {
    /// Samples in the training split; their ids are the numbers below.
    fn count(&self) -> u64;
    /// Samples that a step consumes.
    fn global_batch(&self) -> u64;
    /// Steps a pass over the data.
    fn steps_per_epoch(&self) -> u64;
    /// Adds the ids that the update from `step` to the next consumes, over all virtual ranks.
    fn consumed_from(&self, step: Step, ids: &mut Vec<u64>);
}

/// What was consumed in one epoch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EpochProof {
    /// Which.
    pub epoch: Epoch,
    /// Steps adopted in it.
    pub steps: u64,
    /// Samples consumed, each once.
    pub consumed: u64,
    /// Whether it is over.
    pub is_complete: bool,
    /// The samples that it left out, once it is over: they fill no global batch.
    pub left_out: Vec<u64>,
}

pub(super) struct Consumption<'a> {
    samples: &'a dyn Samples,
    /// By sample: the step that consumed it in the epoch under way; 0 for none.
    consumed_by: Vec<u64>,
    ids: Vec<u64>,
    epochs: Vec<EpochProof>,
}

impl<'a> Consumption<'a> {
    pub(super) fn new(samples: &'a dyn Samples) -> Self {
        Self { samples, consumed_by: Vec::new(), ids: Vec::new(), epochs: Vec::new() }
    }

    pub(super) fn global_batch(&self) -> u64 {
        self.samples.global_batch()
    }

    pub(super) fn steps_per_epoch(&self) -> u64 {
        self.samples.steps_per_epoch()
    }

    /// Takes in that `step` was adopted; those before it were.
    ///
    /// # Errors
    /// What was found and what was expected, if a sample is consumed twice, or is none.
    pub(super) fn consume(&mut self, step: Step) -> Result<(), (String, String)> {
        let (before, steps) = (Step(step.0 - 1), self.samples.steps_per_epoch());
        let (epoch, place) = (Epoch(before.0 / steps), before.0 % steps);
        let count = self.samples.count();
        if place == 0 {
            let length = usize::try_from(count).expect("the samples were opened on this machine");
            self.consumed_by.clear();
            self.consumed_by.resize(length, 0);
            self.epochs.push(EpochProof {
                epoch,
                steps: 0,
                consumed: 0,
                is_complete: false,
                left_out: Vec::new(),
            });
        }
        self.ids.clear();
        self.samples.consumed_from(before, &mut self.ids);
        let (found, expected) = (self.ids.len() as u64, self.samples.global_batch());
        if found != expected {
            return Err((
                format!("step {step} consumes {found} samples"),
                format!("{expected}, a global batch"),
            ));
        }
        for &id in &self.ids {
            let place = usize::try_from(id).ok().and_then(|id| self.consumed_by.get_mut(id));
            let Some(consumed_by) = place else {
                let found = format!("step {step} consumes sample {id}");
                return Err((found, format!("samples below {count}")));
            };
            if *consumed_by != 0 {
                return Err((
                    format!("step {step} consumes sample {id} of epoch {epoch}"),
                    format!("each once: step {consumed_by} has consumed it"),
                ));
            }
            *consumed_by = step.0;
        }
        let proof = self.epochs.last_mut().expect("the epoch's first step made it");
        proof.steps += 1;
        proof.consumed += found;
        if proof.steps == steps {
            proof.is_complete = true;
            let left_out = (0..).zip(&self.consumed_by).filter(|(_, step)| **step == 0);
            proof.left_out = left_out.map(|(id, _)| id).collect();
        }
        Ok(())
    }

    pub(super) fn into_epochs(self) -> Vec<EpochProof> {
        self.epochs
    }
}
