//! Writing the parts of a checkpoint that is not committed yet.

use bytes::Bytes;
use cluster::Step;
use object_store::PutMode;
use thiserror::Error;
use tracing::{debug, warn};

use crate::{
    layout::{Layout, manifest_name, part_name},
    manifest::{Digest, Manifest, ManifestFault, PartRecord},
    store::{Store, StoreError},
};

/// Why a part was not saved.
#[derive(Debug, Error)]
pub enum SaveError {
    /// The part of a committed checkpoint has other bytes.
    #[error(
        "{object} belongs to a committed checkpoint and has other bytes ({found}, expected {expected}): \
         it is left alone"
    )]
    Committed {
        /// The part.
        object: String,
        /// The digest of the bytes to save.
        expected: Digest,
        /// The digest of the bytes that are there.
        found: Digest,
    },
    /// The store did not answer, or said no.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl SaveError {
    /// Whether the same call may succeed later.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Store(error) => error.is_transient(),
            Self::Committed { .. } => false,
        }
    }
}

/// Writes one part of the state after `step` and returns its record for the manifest.
///
/// The part appears as a whole or not at all. One that is there with the same bytes is left. One with
/// other bytes is replaced: it is what a save that was cut short left behind, or has been damaged. Only
/// when the step is committed with other bytes than those to save is it left, and this is an error.
///
/// # Errors
/// [`SaveError`]. A call that ended with a transient error may be repeated.
///
/// # Panics
/// If `layout` has no such part, or it has another length.
pub async fn save_part(
    store: &Store,
    layout: &Layout,
    step: Step,
    index: u32,
    bytes: Bytes,
) -> Result<PartRecord, SaveError> {
    let range = layout.part_range(index);
    let record_bytes = bytes.len() as u64;
    assert_eq!(record_bytes, range.end - range.start, "the length of part {index}");
    let blake3 = digest(bytes.clone()).await;
    let record = PartRecord { index, bytes: record_bytes, blake3 };

    let name = part_name(step, index);
    match store.put(&name, bytes.clone(), PutMode::Create).await {
        Ok(()) => return Ok(record),
        Err(error) if error.is_there() => {}
        Err(error) => return Err(error.into()),
    }
    let found = digest(store.read(&name).await?).await;
    if found == blake3 {
        debug!(step = step.0, part = index, "the part was there");
        return Ok(record);
    }
    match store.read(&manifest_name(step)).await {
        Err(error) if error.is_not_found() => {
            warn!(step = step.0, part = index, "a part that an unfinished save left is replaced");
        }
        Err(error) => return Err(error.into()),
        Ok(json) => match Manifest::parse(&json) {
            Ok(manifest) if manifest.parts.get(index as usize) == Some(&record) => {
                warn!(step = step.0, part = index, "a damaged part of a checkpoint is restored");
            }
            // No checkpoint either; its manifest is written again with the commit.
            Err(fault) if !matches!(fault, ManifestFault::Format { .. }) => {
                warn!(step = step.0, part = index, "a part beside a damaged manifest is replaced");
            }
            Ok(_) | Err(_) => {
                let object = store.object(&name);
                return Err(SaveError::Committed { object, expected: blake3, found });
            }
        },
    }
    store.put(&name, bytes, PutMode::Overwrite).await?;
    Ok(record)
}

/// The digest, without keeping the executor from its other work.
pub(crate) async fn digest(bytes: Bytes) -> Digest {
    let hashing = tokio::task::spawn_blocking(move || Digest::of(&bytes));
    hashing.await.expect("hashing does not panic")
}
