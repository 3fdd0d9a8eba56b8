//! What a packing that was cut short has finished, so that the next takes it up.
//!
//! `SPLIT.partial` is written after each shard and removed after the manifest. It is only trusted if it
//! is of the same source with the same settings: then the shards to come are the same too, since
//! nothing but these decides their bytes.

use serde::{Deserialize, Serialize};

use super::{OnCorrupt, PackError, PackOptions, scan::Listing};
use crate::{
    digest::Sha256,
    index::Index,
    manifest::Shard,
    source::{SourceError, Store},
};

/// How far a packing is, at the end of a shard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Journal {
    /// Of the source and the settings.
    pub(super) fingerprint: Sha256,
    /// Place in the packing order of the first file that is in no finished shard.
    pub(super) place: u64,
    pub(super) samples: u64,
    pub(super) bytes: u64,
    pub(super) converted: u64,
    pub(super) cmyk: u64,
    #[serde(default)]
    pub(super) deep: u64,
    pub(super) skipped: Vec<String>,
    pub(super) shards: Vec<Shard>,
}

impl Journal {
    pub(super) fn new(fingerprint: Sha256) -> Self {
        Self {
            fingerprint,
            place: 0,
            samples: 0,
            bytes: 0,
            converted: 0,
            cmyk: 0,
            deep: 0,
            skipped: Vec::new(),
            shards: Vec::new(),
        }
    }

    /// The journal of a packing of the same source with the same settings, if its shards are there.
    pub(super) fn load(store: &Store, split: &str, fingerprint: Sha256) -> Result<Self, PackError> {
        let fresh = Self::new(fingerprint);
        let bytes = match store.read(&name(split)) {
            Err(SourceError::Missing { .. }) => return Ok(fresh),
            read => read?,
        };
        // A journal that cannot be understood is of another version: its work is done again.
        let Ok(journal) = serde_json::from_slice::<Self>(&bytes) else { return Ok(fresh) };
        if journal.fingerprint != fingerprint {
            return Ok(fresh);
        }
        for shard in &journal.shards {
            if !is_there(store, shard)? {
                return Ok(fresh);
            }
        }
        Ok(journal)
    }

    pub(super) fn save(&self, store: &Store, split: &str) -> Result<(), PackError> {
        let bytes = serde_json::to_vec(self).expect("every field has a JSON form");
        Ok(store.write(&name(split), bytes)?)
    }

    pub(super) fn remove(store: &Store, split: &str) -> Result<(), PackError> {
        Ok(store.remove(&name(split))?)
    }
}

fn name(split: &str) -> String {
    format!("{split}.partial")
}

/// Whether a shard's files are those that were packed, and not another packing's.
fn is_there(store: &Store, shard: &Shard) -> Result<bool, SourceError> {
    let bytes = match store.read(&shard.idx()) {
        Err(SourceError::Missing { .. }) => return Ok(false),
        read => read?,
    };
    let Ok(index) = Index::parse(&bytes) else { return Ok(false) };
    Ok(Sha256::of(&bytes) == shard.idx_sha256
        && index.tar_sha256 == shard.tar_sha256
        && store.holds(&shard.tar(), index.tar_length, shard.tar_sha256)?)
}

/// Of everything that decides what is packed: a file that was exchanged for another of the same name and
/// length is the one change that it does not see.
pub(super) fn fingerprint(listing: &Listing, options: &PackOptions) -> Sha256 {
    let mut text = Vec::new();
    let mut add = |part: &[u8]| {
        text.extend_from_slice(&(part.len() as u64).to_le_bytes());
        text.extend_from_slice(part);
    };
    add(options.split.as_bytes());
    add(&options.seed.to_le_bytes());
    add(match options.on_corrupt {
        OnCorrupt::Fail => b"fail",
        OnCorrupt::Skip => b"skip",
    });
    for class in &listing.classes {
        add(class.as_bytes());
    }
    for file in &listing.files {
        add(file.name.as_bytes());
        add(&file.label.to_le_bytes());
        add(&file.length.to_le_bytes());
    }
    Sha256::of(&text)
}
