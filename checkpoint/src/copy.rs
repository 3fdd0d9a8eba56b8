//! A checkpoint in another store: a backup, or the start of a run elsewhere.

use cluster::Step;
use thiserror::Error;

use crate::{
    commit::{CommitError, Committed, commit},
    load::{Checkpoint, LoadError},
    manifest::ManifestFault,
    retry::{Retries, retrying},
    save::{SaveError, save_part},
    store::Store,
};

/// Why a checkpoint was not copied. Nothing that was committed has changed, here or there.
#[derive(Debug, Error)]
pub enum CopyError {
    /// It cannot be read.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A part was not written.
    #[error(transparent)]
    Save(#[from] SaveError),
    /// It was not committed in the other store.
    #[error(transparent)]
    Commit(#[from] CommitError),
}

/// Copies the checkpoint of `step`, checking every byte on the way. As when it is saved, the manifest
/// comes last, and one part is in memory. Copying it again finishes what was interrupted.
///
/// # Errors
/// [`CopyError`].
pub async fn copy(from: &Store, to: &Store, step: Step) -> Result<Committed, CopyError> {
    let checkpoint = Checkpoint::open(from, step).await?;
    let manifest = checkpoint.manifest();
    let layout = manifest
        .layout()
        .map_err(|fault| CommitError::Invalid { step, fault: ManifestFault::Layout(fault) })?;
    for part in &manifest.parts {
        let bytes = checkpoint.part(part).await?;
        let save = || save_part(to, &layout, step, part.index, bytes.clone());
        retrying(Retries::of("copy a part"), save).await?;
    }
    let commit = || commit(to, manifest);
    Ok(retrying(Retries::of("commit a copy"), commit).await?)
}
