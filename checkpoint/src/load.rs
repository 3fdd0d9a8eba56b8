//! Finding, checking and reading checkpoints.

use std::{error::Error, fmt, ops::Range};

use cluster::Step;
use object_store::{GetOptions, ObjectStore as _};
use thiserror::Error as ThisError;

use tracing::warn;

use crate::{
    layout::{CHECKPOINTS, manifest_name, part_name},
    manifest::{Digest, Manifest, ManifestFault, PartRecord},
    quarantine::{MARKER, steps_with},
    save::digest,
    store::{Store, StoreError},
};

/// A committed checkpoint: its manifest has been read and fits together.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    store: Store,
    manifest: Manifest,
}

/// What is wrong with a checkpoint.
#[derive(Debug, ThisError)]
pub enum Fault {
    /// There is no manifest.
    #[error("{object} is not there, so the step was never committed")]
    NotCommitted {
        /// The manifest.
        object: String,
    },
    /// The manifest cannot be read.
    #[error("{object} is damaged: {fault}")]
    Manifest {
        /// The manifest.
        object: String,
        /// What is wrong.
        fault: ManifestFault,
    },
    /// The manifest is of another step.
    #[error("{object} is of step {found}, expected step {expected}")]
    OtherStep {
        /// The manifest.
        object: String,
        /// The step of its folder.
        expected: Step,
        /// The step it names.
        found: Step,
    },
    /// A part is not there.
    #[error("{object} is not there, expected {expected} bytes")]
    PartMissing {
        /// The part.
        object: String,
        /// Its size.
        expected: u64,
    },
    /// A part has another length.
    #[error("{object} has {found} bytes, expected {expected}")]
    PartLength {
        /// The part.
        object: String,
        /// Its size.
        expected: u64,
        /// The size of what is there.
        found: u64,
    },
    /// A part has other bytes.
    #[error("{object} has the BLAKE3 digest {found}, expected {expected}")]
    PartDigest {
        /// The part.
        object: String,
        /// Its digest.
        expected: Digest,
        /// The digest of what is there.
        found: Digest,
    },
    /// The store did not answer, or said no.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Fault {
    /// Whether it is the checkpoint that is at fault, and not the way to it.
    #[must_use]
    pub fn is_damage(&self) -> bool {
        !matches!(self, Self::Store(_))
    }
}

/// A checkpoint that cannot be used, and what to do about it.
#[derive(Debug)]
pub struct LoadError {
    /// The step.
    pub step: Step,
    /// What is wrong.
    pub fault: Fault,
    /// The newest other checkpoint whose parts are all as they should be.
    pub intact: Option<Step>,
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { step, fault, intact } = self;
        write!(f, "checkpoint of step {step} cannot be used: {fault}")?;
        match intact {
            Some(intact) => write!(
                f,
                "; restore the object from a copy (the checkpoint of step {intact} is intact)"
            ),
            None if fault.is_damage() => {
                f.write_str("; restore the object: no other checkpoint is intact")
            }
            None => f.write_str("; try again when the store answers"),
        }
    }
}

impl Error for LoadError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.fault.source() // The fault's own text is in this one's.
    }
}

/// The steps that have a manifest and are not quarantined, newest first.
///
/// # Errors
/// [`StoreError`].
pub async fn committed_steps(store: &Store) -> Result<Vec<Step>, StoreError> {
    let listed = store.list(CHECKPOINTS).await?;
    let aside = steps_with(store, &listed, MARKER);
    let mut steps = steps_with(store, &listed, "manifest.json");
    steps.retain(|step| aside.binary_search(step).is_err());
    steps.reverse();
    Ok(steps)
}

/// The newest committed step whose every byte is as it should be, `except` left aside.
///
/// # Errors
/// [`StoreError`] if the store does not answer; damage is passed over.
pub async fn newest_intact(
    store: &Store,
    except: Option<Step>,
) -> Result<Option<Step>, StoreError> {
    for step in committed_steps(store).await? {
        if Some(step) == except {
            continue;
        }
        let verified = match read_manifest(store, step).await {
            Ok(manifest) => read_parts(store, &manifest, &mut |_, _| {}).await,
            Err(fault) => Err(fault),
        };
        match verified {
            Ok(()) => return Ok(Some(step)),
            Err(Fault::Store(error)) => return Err(error),
            Err(fault) => warn!(%step, %fault, "a checkpoint is damaged"),
        }
    }
    Ok(None)
}

impl Checkpoint {
    /// Reads the manifest of `step`.
    ///
    /// # Errors
    /// [`LoadError`].
    pub async fn open(store: &Store, step: Step) -> Result<Self, LoadError> {
        let read = match read_manifest(store, step).await {
            Err(fault) if fault.is_damage() => {
                warn!(%fault, "a manifest is read again");
                read_manifest(store, step).await
            }
            read => read,
        };
        match read {
            Ok(manifest) => Ok(Self { store: store.clone(), manifest }),
            Err(fault) => Err(explain(store, step, fault).await),
        }
    }

    /// What it contains.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Reads the parts in order, checks each, and hands it to `sink` with its range of the state
    /// ([`Layout::pieces`](crate::Layout::pieces) says which sections that is). No more than one part
    /// is in memory.
    ///
    /// # Errors
    /// [`LoadError`]. What `sink` was given before is to be thrown away.
    pub async fn read(
        &self,
        sink: &mut (dyn FnMut(Range<u64>, &[u8]) + Send),
    ) -> Result<(), LoadError> {
        match read_parts(&self.store, &self.manifest, sink).await {
            Ok(()) => Ok(()),
            Err(fault) => Err(explain(&self.store, self.manifest.step, fault).await),
        }
    }

    /// The bytes of one of its parts, checked.
    pub(crate) async fn part(&self, part: &PartRecord) -> Result<bytes::Bytes, LoadError> {
        let step = self.manifest.step;
        match read_part_twice(&self.store, step, part).await {
            Ok(bytes) => Ok(bytes),
            Err(fault) => Err(explain(&self.store, step, fault).await),
        }
    }

    /// Reads and checks every part.
    ///
    /// # Errors
    /// [`LoadError`], for the first part that is not as it should be.
    pub async fn verify(&self) -> Result<(), LoadError> {
        self.read(&mut |_, _| {}).await
    }
}

async fn read_manifest(store: &Store, step: Step) -> Result<Manifest, Fault> {
    let name = manifest_name(step);
    let object = store.object(&name);
    let json = match store.read(&name).await {
        Ok(json) => json,
        Err(error) if error.is_not_found() => return Err(Fault::NotCommitted { object }),
        Err(error) => return Err(error.into()),
    };
    match Manifest::parse(&json) {
        Err(fault) => Err(Fault::Manifest { object, fault }),
        Ok(manifest) if manifest.step != step => {
            Err(Fault::OtherStep { object, expected: step, found: manifest.step })
        }
        Ok(manifest) => Ok(manifest),
    }
}

async fn read_parts(
    store: &Store,
    manifest: &Manifest,
    sink: &mut (dyn FnMut(Range<u64>, &[u8]) + Send),
) -> Result<(), Fault> {
    let mut start = 0;
    for part in &manifest.parts {
        let bytes = read_part_twice(store, manifest.step, part).await?;
        let end = start + part.bytes;
        sink(start..end, &bytes);
        start = end;
    }
    Ok(())
}

/// Neither TCP nor every client notices bits that change on the way: only twice is damage.
async fn read_part_twice(
    store: &Store,
    step: Step,
    part: &PartRecord,
) -> Result<bytes::Bytes, Fault> {
    match read_part(store, step, part).await {
        Err(fault @ Fault::PartDigest { .. }) => {
            warn!(%fault, "a part is read again");
            read_part(store, step, part).await
        }
        read => read,
    }
}

async fn read_part(store: &Store, step: Step, part: &PartRecord) -> Result<bytes::Bytes, Fault> {
    let name = part_name(step, part.index);
    let object = || store.object(&name);
    // The length first: a wrong object may be larger than memory.
    let read = match store.objects().get_opts(&store.path(&name), GetOptions::default()).await {
        Ok(read) => read,
        Err(object_store::Error::NotFound { .. }) => {
            return Err(Fault::PartMissing { object: object(), expected: part.bytes });
        }
        Err(source) => return Err(store.error("read", &name, source).into()),
    };
    let length = |found| Fault::PartLength { object: object(), expected: part.bytes, found };
    if read.meta.size != part.bytes {
        return Err(length(read.meta.size));
    }
    let bytes = read.bytes().await.map_err(|source| store.error("read", &name, source))?;
    if bytes.len() as u64 != part.bytes {
        return Err(length(bytes.len() as u64));
    }
    let found = digest(bytes.clone()).await;
    if found != part.blake3 {
        return Err(Fault::PartDigest { object: object(), expected: part.blake3, found });
    }
    Ok(bytes)
}

/// Looks for another checkpoint to use, when it is this one that is damaged.
async fn explain(store: &Store, step: Step, fault: Fault) -> LoadError {
    let mut intact = None;
    if fault.is_damage() {
        match newest_intact(store, Some(step)).await {
            Ok(found) => intact = found,
            Err(error) => warn!(%error, "cannot look for another checkpoint"),
        }
    }
    LoadError { step, fault, intact }
}
