//! Damaged checkpoints are set aside by a marker beside their manifest. Nothing of them is deleted, and
//! from then on they are not counted as checkpoints. Saving the step again restores it and lifts the
//! quarantine.

use bytes::Bytes;
use cluster::Step;
use object_store::{PutMode, path::Path};
use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::{
    layout::{CHECKPOINTS, folder_name, step_of_folder},
    store::{Store, StoreError},
};

pub(crate) const MARKER: &str = "quarantined.json";

/// What the marker says, for people.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Marker {
    reason: String,
}

/// The name of a step's marker, below the run's prefix.
#[must_use]
pub fn quarantine_name(step: Step) -> String {
    format!("{}/{MARKER}", folder_name(step))
}

/// Sets the checkpoint of `step` aside because of `reason`. Doing it again changes nothing.
///
/// # Errors
/// [`StoreError`].
pub async fn quarantine(store: &Store, step: Step, reason: &str) -> Result<(), StoreError> {
    let marker = Marker { reason: reason.to_owned() };
    let json = serde_json::to_vec(&marker).expect("it is plain text");
    match store.put(&quarantine_name(step), Bytes::from(json), PutMode::Create).await {
        Ok(()) => {
            warn!(step = step.0, reason, "checkpoint quarantined");
            Ok(())
        }
        Err(error) if error.is_there() => Ok(()),
        Err(error) => Err(error),
    }
}

/// The steps whose checkpoints are set aside, ascending.
///
/// # Errors
/// [`StoreError`].
pub async fn quarantined_steps(store: &Store) -> Result<Vec<Step>, StoreError> {
    let listed = store.list(CHECKPOINTS).await?;
    Ok(steps_with(store, &listed, MARKER))
}

/// The steps in whose folders a listing of all checkpoints has a file of this name, ascending.
pub(crate) fn steps_with(store: &Store, listed: &[(Path, u64)], file_name: &str) -> Vec<Step> {
    let named = listed.iter().filter(|(path, _)| path.filename() == Some(file_name));
    let mut steps: Vec<Step> = named.filter_map(|(path, _)| step_of_object(store, path)).collect();
    steps.sort_unstable();
    steps
}

/// The step of an object in its checkpoint's folder; nothing for what this crate did not put there.
pub(crate) fn step_of_object(store: &Store, path: &Path) -> Option<Step> {
    let name: Vec<_> = path.prefix_match(&store.path(CHECKPOINTS))?.collect();
    let [step, _] = name.as_slice() else { return None };
    step_of_folder(step.as_ref())
}
