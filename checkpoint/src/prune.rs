//! Which checkpoints are no longer needed, and their deletion.

use cluster::Step;
use tracing::info;

use crate::{
    layout::{folder_name, manifest_name},
    store::{Store, StoreError},
};

/// Never fewer are kept: the newest may turn out to be damaged.
const KEPT_MIN: usize = 2;

/// The steps to delete so that the `newest` ones stay, and two at least; oldest first.
///
/// `verified` are the steps whose checkpoints are known to be good: only they count, and only they are
/// named, so that a damaged checkpoint never takes the place of a good one.
#[must_use]
pub fn prunable(verified: &[Step], newest: usize) -> Vec<Step> {
    let mut steps = verified.to_vec();
    steps.sort_unstable();
    steps.dedup();
    steps.truncate(steps.len().saturating_sub(newest.max(KEPT_MIN)));
    steps
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

    fn pruned(steps: &[u64], newest: usize) -> Vec<u64> {
        let steps: Vec<Step> = steps.iter().copied().map(Step).collect();
        prunable(&steps, newest).into_iter().map(|step| step.0).collect()
    }

    #[test]
    fn the_newest_stay_and_two_at_least() {
        assert_eq!(pruned(&[40, 10, 30, 20], 3), [10]);
        assert_eq!(pruned(&[10, 20, 30, 40], 2), [10, 20]);
        assert_eq!(pruned(&[10, 20, 30, 40], 0), [10, 20]);
        assert!(pruned(&[10, 20, 30, 40], 9).is_empty());
        assert!(pruned(&[10, 10, 20], 1).is_empty());
        assert!(pruned(&[10], 1).is_empty());
        assert!(pruned(&[], 1).is_empty());
    }
}
