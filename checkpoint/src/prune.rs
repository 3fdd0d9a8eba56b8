//! Which checkpoints are no longer needed, and their deletion.

use cluster::Step;
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
}

impl Retention {
    /// The steps to delete, oldest first.
    ///
    /// `verified` are the steps whose checkpoints are known to be good: only they count, and only they
    /// are named, so that a damaged checkpoint never takes the place of a good one.
    #[must_use]
    pub fn prunable(&self, verified: &[Step]) -> Vec<Step> {
        let mut steps = verified.to_vec();
        steps.sort_unstable();
        steps.dedup();
        steps.truncate(steps.len().saturating_sub(self.newest.max(KEPT_MIN)));
        steps.retain(|step| self.every_steps == 0 || !step.0.is_multiple_of(self.every_steps));
        steps
    }
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
    use super::*;

    fn pruned(steps: &[u64], newest: usize, every_steps: u64) -> Vec<u64> {
        let steps: Vec<Step> = steps.iter().copied().map(Step).collect();
        let retention = Retention { newest, every_steps };
        retention.prunable(&steps).into_iter().map(|step| step.0).collect()
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
