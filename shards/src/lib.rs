//! The data: images packed into shards, and the way from a shard to a batch. No torch.
//!
//! ```text
//!  image folder, tars --pack--> DIR/train.json  train-000000.tar  train-000000.idx  ...  <--verify
//!                              |
//!  plan: (seed, epoch, step, virtual rank) -> sample ids
//!                              |
//!  Dataset::read  ->  decode  ->  augment  ->  Batch, u8 [B, S, S, 3]  ->  Normalize, f32 [B, 3, S, S]
//!  (checked range     (the part   (keyed by (seed, epoch, sample id),      (erasing; then Mixing,
//!   of one shard)      it needs)    never by worker or rank)                 keyed by step and rank)
//! ```
//!
//! A *sample id* is the sample's place in the packed order, `0..Dataset::len()`. It is a plain `u64`
//! because most of what is done with it is arithmetic on ranges.
//!
//! Where to start: [`BatchPlan`] says which samples a step sees, [`Dataset`] finds their bytes and
//! [`Loader`] makes them a [`Batch`]. [`pack()`] and [`verify()`] write and check the files.
//!
//! **Invariants.** No bytes depend on a clock or a global random state: the same dataset, seed, epoch
//! and sample give the same bytes whoever asks. No sample leaves [`Dataset::read`] with a wrong
//! checksum. A parser given damaged bytes returns an error that names the place; it never panics.

mod adopt;
mod augment;
mod batch;
mod cache;
mod dataset;
pub mod decode;
mod digest;
pub mod erase;
pub mod format;
pub mod image;
pub mod index;
pub mod jpeg;
mod loader;
mod loose;
pub mod manifest;
pub mod measure;
pub mod mixing;
pub mod operation;
pub mod pack;
pub mod plan;
pub mod rand_augment;
pub mod resize;
mod simd;
mod source;
pub mod stats;
mod transform;
pub mod unpack;
pub mod verify;
mod warp;

pub use adopt::{index_tars, index_tars_with};
pub use augment::{Augment, Crop, InvalidAugment};
pub use batch::{Batch, Normalize, Skipped};
pub use dataset::{Dataset, OpenError, ReadError, Reads, RemoteReads, Sample};
pub use digest::Sha256;
pub use erase::{Erase, Erasure};
pub use loader::{LoadError, Loader, OnCorruptSample};
pub use loose::{LooseError, LooseImages, ShowError, Viewer};
pub use manifest::Manifest;
pub use mixing::{Mix, Mixing};
pub use pack::{PackError, PackOptions, pack, pack_with};
pub use plan::{BatchPlan, Order, PlanError, Shuffle, evaluation};
pub use rand_augment::RandAugment;
pub use source::SourceError;
pub use stats::{Stats, stats};
pub use transform::{Scratch, Transform, TransformError};
pub use unpack::{UnpackError, unpack};
pub use verify::{VerifyError, verify, verify_dataset};
