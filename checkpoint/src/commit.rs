//! The conditional put that makes a checkpoint, and that a fenced log can be built on.
//!
//! What a conditional put reports cannot be trusted when a connection breaks or a server answers with an
//! error late: the object may have been written though the put says "failed", or "already exists" of
//! one's own write. So whatever it says, the object is read back, and what is there decides.

use std::collections::BTreeMap;

use bytes::Bytes;
use cluster::Step;
use object_store::{PutMode, path::Path};
use thiserror::Error;
use tracing::{debug, info, warn};

use crate::{
    layout::{folder_name, manifest_name, part_name},
    manifest::{Difference, Manifest, ManifestFault},
    quarantine::quarantine_name,
    store::{Store, StoreError},
};

/// The outcome of [`create`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Created {
    /// The object has the caller's bytes.
    Ours,
    /// The object was there before, with these other bytes.
    Before(Bytes),
}

/// Creates an object unless it is there already, and reads it back.
///
/// The bytes must differ from those of all other writers, by a nonce for instance: else one's own
/// write cannot be told from another's.
///
/// # Errors
/// [`StoreError`]: the object may still appear later, if a write is under way. Trying again with the
/// same bytes is safe.
pub async fn create(store: &Store, name: &str, bytes: Bytes) -> Result<Created, StoreError> {
    let put = store.put(name, bytes.clone(), PutMode::Create).await;
    let read = match store.read(name).await {
        // Bits that changed on the way back must not make it another's write.
        Ok(found) if found != bytes => store.read(name).await,
        read => read,
    };
    match read {
        Ok(found) if found == bytes => {
            if let Err(error) = put {
                debug!(object = store.object(name), %error, "a put had succeeded though it failed");
            }
            Ok(Created::Ours)
        }
        Ok(found) => Ok(Created::Before(found)),
        Err(unread) => Err(put.err().unwrap_or(unread)),
    }
}

/// How a checkpoint came to be committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Committed {
    /// By this call.
    Now,
    /// Before, with the same content; see [`Manifest::difference`].
    Before,
}

/// Why a checkpoint was not committed. Nothing was overwritten.
#[derive(Debug, Error)]
pub enum CommitError {
    /// The manifest's own values do not fit.
    #[error("the manifest of step {step} cannot be written: {fault}")]
    Invalid {
        /// The step.
        step: Step,
        /// What is wrong.
        fault: ManifestFault,
    },
    /// A part is not there.
    #[error("{object} is not there: save it again before the commit")]
    PartMissing {
        /// The part.
        object: String,
    },
    /// A part has another length than the manifest says.
    #[error("{object} has {found} bytes, expected {expected}: save it again before the commit")]
    PartLength {
        /// The part.
        object: String,
        /// What the manifest says.
        expected: u64,
        /// What is there.
        found: u64,
    },
    /// The step is committed with other content.
    #[error(
        "{object} is there with other content ({difference}): this run is not the one that wrote it, or \
         its bits have changed"
    )]
    Different {
        /// The manifest.
        object: String,
        /// In what it differs.
        difference: Difference,
    },
    /// What is at the manifest's place cannot be read, and is left: another version wrote it, or it does not
    /// keep what is written.
    #[error("{object} is there and cannot be read: {fault}; remove it, or restore it")]
    Damaged {
        /// The manifest.
        object: String,
        /// What is wrong.
        fault: ManifestFault,
    },
    /// The store did not answer, or said no.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl CommitError {
    /// Whether the same call may succeed later.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Store(error) => error.is_transient(),
            Self::Invalid { .. }
            | Self::PartMissing { .. }
            | Self::PartLength { .. }
            | Self::Different { .. }
            | Self::Damaged { .. } => false,
        }
    }
}

/// Makes a checkpoint of parts that have been saved: checks that they are there, creates the manifest
/// and reads it back.
///
/// # Errors
/// [`CommitError`]. A call that ended with a transient error may be repeated.
pub async fn commit(store: &Store, manifest: &Manifest) -> Result<Committed, CommitError> {
    let step = manifest.step;
    manifest.check().map_err(|fault| CommitError::Invalid { step, fault })?;
    check_parts(store, manifest).await?;

    let name = manifest_name(step);
    let committed = match create(store, &name, manifest.to_json().into()).await? {
        Created::Ours => {
            info!(step = step.0, parts = manifest.parts.len(), "checkpoint committed");
            Ok(Committed::Now)
        }
        Created::Before(found) => {
            let object = store.object(&name);
            match Manifest::parse(&found) {
                Err(fault @ ManifestFault::Format { .. }) => {
                    Err(CommitError::Damaged { object, fault })
                }
                Err(fault) => replace(store, manifest, found, &fault).await,
                Ok(found) => match manifest.difference(&found) {
                    Some(difference) => Err(CommitError::Different { object, difference }),
                    None => Ok(Committed::Before),
                },
            }
        }
    };
    if committed.is_ok() {
        // Its parts were saved again just now, and with that compared.
        store.delete(&store.path(&quarantine_name(step))).await?;
    }
    committed
}

/// Puts a manifest in the place of one that cannot be read, so that its step is a checkpoint again. What
/// was there is kept beside it.
async fn replace(
    store: &Store,
    manifest: &Manifest,
    found: Bytes,
    fault: &ManifestFault,
) -> Result<Committed, CommitError> {
    let name = manifest_name(manifest.step);
    warn!(object = store.object(&name), %fault, "a damaged manifest is written again");
    store.put(&format!("{name}.damaged"), found, PutMode::Overwrite).await?;
    let bytes = Bytes::from(manifest.to_json());
    store.put(&name, bytes, PutMode::Overwrite).await?;
    let object = store.object(&name);
    match Manifest::parse(&store.read(&name).await?) {
        Err(fault) => Err(CommitError::Damaged { object, fault }),
        // Another may have healed it at the same time: what counts is what it says.
        Ok(written) => match manifest.difference(&written) {
            Some(difference) => Err(CommitError::Different { object, difference }),
            None => Ok(Committed::Now),
        },
    }
}

/// Whether every part is there with its length; one listing.
async fn check_parts(store: &Store, manifest: &Manifest) -> Result<(), CommitError> {
    let sizes: BTreeMap<Path, u64> =
        store.list(&folder_name(manifest.step)).await?.into_iter().collect();
    for part in &manifest.parts {
        let name = part_name(manifest.step, part.index);
        let object = store.object(&name);
        match sizes.get(&store.path(&name)) {
            None => return Err(CommitError::PartMissing { object }),
            Some(&found) if found != part.bytes => {
                return Err(CommitError::PartLength { object, expected: part.bytes, found });
            }
            Some(_) => {}
        }
    }
    Ok(())
}
