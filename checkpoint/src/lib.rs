//! The durable state of a run: named byte sections in fixed parts, and a manifest that makes them a
//! checkpoint.
//!
//! ```text
//! <run>/checkpoints/step-0000000176/part-00000 …     put by the workers, each its share
//!                                  /manifest.json    put last, by a conditional create
//! ```
//!
//! A worker [`save_part`]s, the coordinator [`commit`]s what it was told, a worker opens a
//! [`Checkpoint`] and reads it, and [`prune`] deletes what [`Retention`] names. What is found damaged is
//! set aside ([`quarantine`]).
//!
//! [`pth`] is another matter: it reads and writes files of `torch.save`, for weights that come from or go
//! to other programs: `percheron import` and `export`.
//!
//! **Invariants**: a step without a manifest is no checkpoint. A committed manifest that can be read is never
//! overwritten, nor is a part of it by other bytes. The bytes of a part depend on the state only, not on
//! how many workers wrote it.

mod commit;
mod copy;
mod layout;
mod load;
mod manifest;
mod objects;
mod prune;
pub mod pth;
mod quarantine;
mod retry;
mod s3;
mod save;
mod store;

pub use crate::{
    commit::{CommitError, Committed, Created, commit, create},
    copy::{CopyError, copy},
    layout::{Layout, LayoutError, Piece, Section, manifest_name, part_name},
    load::{Checkpoint, Fault, LoadError, committed_steps, newest_intact},
    manifest::{Difference, Digest, FORMAT, Manifest, ManifestFault, PartRecord},
    prune::{Retention, prune, unfinished_steps},
    quarantine::{quarantine, quarantine_name, quarantined_steps},
    retry::{Retries, Transient, retrying},
    s3::ContractError,
    save::{SaveError, save_part},
    store::{OpenError, Store, StoreError},
};
