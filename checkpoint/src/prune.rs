//! Which checkpoints are no longer needed, and their deletion.

use std::collections::BTreeSet;

use cluster::{Evaluation, ExitScores, Step};
use tracing::info;

use crate::{
    layout::{CHECKPOINTS, folder_name, manifest_name},
    load::committed_steps,
    quarantine::{MARKER, step_of_object, steps_with},
    store::{Store, StoreError},
};

/// Never fewer are kept: the newest may turn out to be damaged.
const KEPT_MIN: usize = 2;

/// What is kept of the checkpoints of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retention {
    /// So many of the newest; two at least.
    pub newest: usize,
    /// And for good those of steps that are multiples of this; 0 for none.
    pub every_steps: u64,
    /// And those that did best so far: of each exit, by the weights and by their average.
    pub best: bool,
}

impl Retention {
    /// So many good ones are there before any is deleted.
    #[must_use]
    pub fn good_min(&self) -> usize {
        self.newest.max(KEPT_MIN)
    }

    /// The steps to delete, oldest first.
    ///
    /// `verified` are the steps whose checkpoints are known to be good: only they count, and only they
    /// are named, so that a damaged checkpoint never takes the place of a good one. `evaluations` are those
    /// of the run, of these steps and others.
    #[must_use]
    pub fn prunable(&self, verified: &[Step], evaluations: &[Evaluation]) -> Vec<Step> {
        let mut steps = verified.to_vec();
        steps.sort_unstable();
        steps.dedup();
        let best = if self.best { best_of(&steps, evaluations) } else { BTreeSet::new() };
        steps.truncate(steps.len().saturating_sub(self.good_min()));
        steps.retain(|step| self.every_steps == 0 || !step.0.is_multiple_of(self.every_steps));
        steps.retain(|step| !best.contains(step));
        steps
    }
}

/// Of each exit the step with the highest top-1, by the weights and by their average; of equals the first,
/// as the reference does it.
fn best_of(steps: &[Step], evaluations: &[Evaluation]) -> BTreeSet<Step> {
    let kept: Vec<_> =
        evaluations.iter().filter(|e| steps.binary_search(&e.step).is_ok()).collect();
    let column = |exit: usize, which: fn(&Evaluation) -> &ExitScores| {
        let top1 = |e: &Evaluation| which(e).top1[exit];
        let better = |a: &&&Evaluation, b: &&&Evaluation| {
            top1(a).total_cmp(&top1(b)).then(b.step.cmp(&a.step))
        };
        kept.iter().max_by(better).map(|evaluation| evaluation.step)
    };
    let exits = 0..ExitScores::default().top1.len();
    exits
        .flat_map(|exit| [column(exit, |e| &e.weights), column(exit, |e| &e.ema)])
        .flatten()
        .collect()
}

/// The steps below the newest checkpoint of which there are objects and no manifest, ascending: saves
/// that were cut short, and will not be finished. What is quarantined is none of them.
///
/// # Errors
/// [`StoreError`].
pub async fn unfinished_steps(store: &Store) -> Result<Vec<Step>, StoreError> {
    let Some(newest) = committed_steps(store).await?.first().copied() else {
        return Ok(Vec::new());
    };
    let listed = store.list(CHECKPOINTS).await?;
    let mut steps: Vec<_> =
        listed.iter().filter_map(|(path, _)| step_of_object(store, path)).collect();
    steps.sort_unstable();
    steps.dedup();
    for complete in
        [steps_with(store, &listed, "manifest.json"), steps_with(store, &listed, MARKER)]
    {
        steps.retain(|step| complete.binary_search(step).is_err());
    }
    steps.retain(|step| *step < newest);
    Ok(steps)
}

/// Deletes the checkpoint of `step`: the manifest first, so that it is never one with parts missing.
/// Deleting it again finishes what was interrupted.
///
/// # Errors
/// [`StoreError`].
pub async fn prune(store: &Store, step: Step) -> Result<(), StoreError> {
    store.delete(&store.path(&manifest_name(step))).await?;
    let parts = store.list(&folder_name(step)).await?;
    for (part, _) in &parts {
        store.delete(part).await?;
    }
    info!(step = step.0, parts = parts.len(), "checkpoint deleted");
    Ok(())
}

#[cfg(test)]
mod tests {
    use cluster::Epoch;

    use super::*;

    fn pruned(steps: &[u64], newest: usize, every_steps: u64) -> Vec<u64> {
        let steps: Vec<Step> = steps.iter().copied().map(Step).collect();
        let retention = Retention { newest, every_steps, best: false };
        retention.prunable(&steps, &[]).into_iter().map(|step| step.0).collect()
    }

    fn evaluation(step: u64, weights: [f64; 4], ema: [f64; 4]) -> Evaluation {
        let scores = |top1| ExitScores { top1, loss: 1.0 };
        let (weights, ema) = (scores(weights), scores(ema));
        Evaluation { step: Step(step), epoch: Epoch(1), samples: 9, weights, ema }
    }

    #[test]
    fn the_best_of_each_exit_and_of_the_average_stay() {
        let steps = [10, 20, 30, 40, 50, 60, 70].map(Step);
        let evaluations = [
            evaluation(10, [0.9, 0.1, 0.1, 0.1], [0.1; 4]),
            evaluation(15, [1.0; 4], [1.0; 4]), // There is no checkpoint of it.
            evaluation(20, [0.2, 0.2, 0.2, 0.2], [0.1; 4]),
            evaluation(30, [0.1, 0.8, 0.8, 0.8], [0.1; 4]),
            evaluation(40, [0.9, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.7]),
            evaluation(60, [0.3; 4], [0.6, 0.6, 0.6, 0.6]),
        ];
        let retention = Retention { newest: 2, every_steps: 0, best: true };
        assert_eq!(retention.prunable(&steps, &evaluations), [Step(20), Step(50)]);
        let without = Retention { best: false, ..retention };
        assert_eq!(without.prunable(&steps, &evaluations), steps[..5]);
        assert_eq!(retention.prunable(&steps, &[]), steps[..5], "nothing was evaluated");
    }

    #[test]
    fn the_newest_stay_and_two_at_least() {
        assert_eq!(pruned(&[40, 10, 30, 20], 3, 0), [10]);
        assert_eq!(pruned(&[10, 20, 30, 40], 2, 0), [10, 20]);
        assert_eq!(pruned(&[10, 20, 30, 40], 0, 0), [10, 20]);
        assert!(pruned(&[10, 20, 30, 40], 9, 0).is_empty());
        assert!(pruned(&[10, 10, 20], 1, 0).is_empty());
        assert!(pruned(&[10], 1, 0).is_empty());
        assert!(pruned(&[], 1, 0).is_empty());
    }

    #[test]
    fn those_that_are_kept_for_good_stay_and_take_no_place_of_the_newest() {
        assert_eq!(pruned(&[10, 20, 30, 40, 50, 60], 2, 20), [10, 30]);
        assert_eq!(pruned(&[10, 20, 30, 40, 50, 60], 3, 40), [10, 20, 30]);
    }
}
