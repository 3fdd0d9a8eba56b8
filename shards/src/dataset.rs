//! A packed split, open for reading: sample id to checked bytes.

use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;

use crate::{
    digest::Sha256,
    format,
    index::{Index, IndexError, Record},
    manifest::{Manifest, ManifestError, Shard},
    source::{Opened, SourceError, Store},
};

/// A packed split, open for reading from any number of threads.
///
/// Its indexes are held in memory, 32 bytes a sample; images are read when asked for.
#[derive(Debug)]
pub struct Dataset {
    store: Store,
    manifest: Manifest,
    indexes: Vec<Index>,
    shards: Vec<Opened>,
    read: Counters,
}

/// What has been read of a dataset, by all threads together. Numbers for a person: they are not in step
/// with each other while reads are under way.
#[derive(Debug, Default)]
struct Counters {
    samples: AtomicU64,
    bytes: AtomicU64,
}

/// How much has been read of a dataset since it was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Reads {
    /// Samples, each time they were read.
    pub samples: u64,
    /// Bytes of their images.
    pub bytes: u64,
    /// What a location that is far away has cost; nothing otherwise.
    pub remote: RemoteReads,
}

/// How much of a dataset has come from a bucket, and how much from the cache of this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RemoteReads {
    /// Bytes of shards and indexes that were fetched from the bucket.
    pub fetched_bytes: u64,
    /// Blocks that a batch, or the first sample read of them, found in the cache.
    pub cache_hits: u64,
    /// Blocks that were not there and had to be fetched.
    pub cache_misses: u64,
    /// Blocks that were fetched and could not be written to the cache.
    pub cache_unkept: u64,
    /// Requests that were made a second time because the first took unusually long.
    pub hedged: u64,
    /// Requests that were repeated because they had failed.
    pub retried: u64,
}

/// One sample as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// The encoded image; its checksum holds.
    pub image: Bytes,
    /// Class index, below the number of classes.
    pub label: u32,
}

/// A split that cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The name of the split cannot be part of a file name.
    #[error("split name {split:?} is not usable: take letters, digits, '-' and '_'")]
    SplitName {
        /// The name as given.
        split: String,
    },
    /// The location or one of its files cannot be read.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The location has no such split.
    #[error(
        "{location} has no split {split:?}: {split}.json is missing. A split whose packing was cut \
         short has none either: pack it again"
    )]
    NoSplit {
        /// The location as given.
        location: String,
        /// The split as given.
        split: String,
    },
    /// The manifest is damaged.
    #[error("manifest {file} is damaged: copy it again, or pack the split again")]
    Manifest {
        /// The file with its location.
        file: String,
        /// What is wrong with it.
        #[source]
        source: ManifestError,
    },
    /// The manifest is of another split, so the file was renamed.
    #[error("manifest {file}, field `split`: is {found:?}; a split cannot be renamed")]
    OtherSplit {
        /// The file with its location.
        file: String,
        /// The split that it describes.
        found: String,
    },
    /// An index is damaged.
    #[error("shard index {file} is damaged: copy it again, or pack the split again")]
    Index {
        /// The file with its location.
        file: String,
        /// What is wrong with it.
        #[source]
        source: IndexError,
    },
    /// An index is whole but not the one that the manifest names.
    #[error(
        "shard index {file} is not the one the manifest names, they differ in {field}: copy the \
         whole split again"
    )]
    OtherIndex {
        /// The file with its location.
        file: String,
        /// Where they differ.
        field: &'static str,
    },
    /// A label is not a place in the list of classes.
    #[error(
        "shard index {file}, sample {sample}: label {label} is not below the manifest's {classes} \
         classes: pack the split again"
    )]
    Label {
        /// The file with its location.
        file: String,
        /// Sample id.
        sample: u64,
        /// The label.
        label: u32,
        /// Number of classes.
        classes: usize,
    },
    /// A shard is cut short or has grown.
    #[error(
        "shard {file} has {found} bytes, its index says {expected}: it is {}; copy it again, or \
         pack the split again",
        if found < expected { "truncated" } else { "not the file that was indexed" }
    )]
    ShardLength {
        /// The file with its location.
        file: String,
        /// Bytes by the index.
        expected: u64,
        /// Bytes on disk.
        found: u64,
    },
}

/// A sample that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// There is no such sample.
    #[error("there is no sample {sample}: the split has {samples}")]
    NoSample {
        /// The id asked for.
        sample: u64,
        /// Number of samples.
        samples: u64,
    },
    /// The shard cannot be read.
    #[error("sample {sample} at offset {offset} of its shard")]
    Source {
        /// Sample id.
        sample: u64,
        /// Offset of the image in the shard, in bytes.
        offset: u64,
        /// Which file, and why not.
        #[source]
        source: SourceError,
    },
    /// The bytes are not those that were packed.
    #[error(
        "shard {shard} is damaged at sample {sample} (key {key}, offset {offset}, {length} bytes): \
         crc32c is {found:08x}, the index says {expected:08x}; copy the shard again"
    )]
    Checksum {
        /// The shard's file with its location.
        shard: String,
        /// Sample id.
        sample: u64,
        /// The sample's key in the archive.
        key: String,
        /// Offset of the image in the shard, in bytes.
        offset: u64,
        /// Bytes of the image.
        length: u32,
        /// By the index.
        expected: u32,
        /// Of the bytes.
        found: u32,
    },
}

impl Dataset {
    /// Opens the split `split` at `location`: `DIR` with `SPLIT.json` in it, `s3://BUCKET/PREFIX` with it, or
    /// `builtin:digits`. The process's environment says how to reach a bucket: [`Dataset::open_with`].
    ///
    /// Every index is read and checked against the manifest, and every shard must have the length
    /// its index states. The images themselves are checked when they are read.
    ///
    /// # Errors
    /// [`OpenError`] names the first file that is missing, damaged or of another split.
    pub fn open(location: &str, split: &str) -> Result<Self, OpenError> {
        Self::open_with(location, split, &bucket::environment().collect::<Vec<_>>())
    }

    /// [`Dataset::open`] with the variables of another environment than the process's.
    ///
    /// A bucket needs those of the AWS tools (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`,
    /// `AWS_REGION`, `AWS_ENDPOINT_URL`, and those of roles). What is fetched is kept in the folder
    /// `PERCHERON_DATA_CACHE` (by default `percheron/data` in the user's cache), up to `PERCHERON_DATA_CACHE_GIB`
    /// (by default 100).
    ///
    /// # Errors
    /// As [`Dataset::open`].
    pub fn open_with(
        location: &str,
        split: &str,
        variables: &[(String, String)],
    ) -> Result<Self, OpenError> {
        check_split_name(split)?;
        let store = Store::open(location, variables)?;
        let manifest = read_manifest(&store, location, split)?;
        let wanted =
            manifest.shards.iter().map(|shard| (shard.idx(), shard.idx_sha256, shard.tar()));
        let indexes = (0..)
            .zip(store.read_indexes(wanted)?)
            .map(|(shard, (idx, length))| check_index(&store, &manifest, shard, &idx, length))
            .collect::<Result<Vec<_>, _>>()?;
        let opened = |(shard, index): (&Shard, &Index)| {
            store.opened(&shard.tar(), shard.tar_sha256, index.tar_length)
        };
        let shards = manifest.shards.iter().zip(&indexes).map(opened).collect();
        Ok(Self { store, manifest, indexes, shards, read: Counters::default() })
    }

    /// Number of samples, at least 1.
    #[expect(clippy::len_without_is_empty, reason = "a split is never empty")]
    #[must_use]
    pub fn len(&self) -> u64 {
        self.manifest.samples
    }

    /// Class names; a label is a place in this list.
    #[must_use]
    pub fn classes(&self) -> &[String] {
        &self.manifest.classes
    }

    /// What the split is and where it comes from.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The indexes of the shards, in the manifest's order.
    #[must_use]
    pub fn indexes(&self) -> &[Index] {
        &self.indexes
    }

    /// How much has been read since this was opened.
    #[must_use]
    pub fn reads(&self) -> Reads {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let remote = self.store.remote().map_or_else(RemoteReads::default, |remote| {
            let traffic = remote.traffic();
            RemoteReads {
                fetched_bytes: count(&traffic.fetched_bytes),
                cache_hits: count(&traffic.hits),
                cache_misses: count(&traffic.misses),
                cache_unkept: count(&traffic.unkept),
                hedged: count(&traffic.hedged),
                retried: count(&traffic.retried),
            }
        });
        Reads { samples: count(&self.read.samples), bytes: count(&self.read.bytes), remote }
    }

    /// Reads a sample and checks its bytes.
    ///
    /// # Errors
    /// [`ReadError`] names shard, key and offset.
    pub fn read(&self, sample: u64) -> Result<Sample, ReadError> {
        let mut image = Vec::new();
        let label = self.read_into(sample, &mut image)?;
        Ok(Sample { image: image.into(), label })
    }

    /// Reads a sample's image into `image`, checks its bytes and returns its label. Allocates only to
    /// make `image` as long as the longest image it has held.
    ///
    /// # Errors
    /// [`ReadError`] names shard, key and offset. `image` then holds nothing of meaning.
    pub fn read_into(&self, sample: u64, image: &mut Vec<u8>) -> Result<u32, ReadError> {
        let (shard, record) = self
            .locate(sample)
            .ok_or(ReadError::NoSample { sample, samples: self.manifest.samples })?;
        let Record { offset, length, .. } = *record;
        let unread = |source| ReadError::Source { sample, offset, source };
        self.read_image(shard, record, image).map_err(unread)?;
        let mut found = crc32c::crc32c(image);
        if found != record.crc32c && self.shards[shard].forget(offset, length.into()) {
            self.read_image(shard, record, image).map_err(unread)?;
            found = crc32c::crc32c(image);
        }
        if found != record.crc32c {
            return Err(ReadError::Checksum {
                shard: self.store.display(&self.shard_file(shard)),
                sample,
                key: self.key(shard, offset),
                offset,
                length,
                expected: record.crc32c,
                found,
            });
        }
        self.read.samples.fetch_add(1, Ordering::Relaxed);
        self.read.bytes.fetch_add(u64::from(length), Ordering::Relaxed);
        Ok(record.label)
    }

    /// Makes ready to read these samples, where that takes time: in a bucket, several blocks are fetched at
    /// once. What cannot be made ready fails when it is read.
    pub fn prefetch(&self, samples: &[u64]) {
        if self.store.remote().is_some() {
            let located = samples.iter().filter_map(|&sample| self.locate(sample));
            let part = |(shard, record): (usize, &Record)| {
                (&self.shards[shard], record.offset, u64::from(record.length))
            };
            self.store.prefetch(located.map(part));
        }
    }

    /// The bytes of a sample's image, unchecked.
    fn read_image(
        &self,
        shard: usize,
        &Record { offset, length, .. }: &Record,
        image: &mut Vec<u8>,
    ) -> Result<(), SourceError> {
        image.resize(length as usize, 0);
        if !self.shards[shard].read_at(offset, image)? {
            let range = offset..offset + u64::from(length);
            let bytes = self.store.read_range(&self.shard_file(shard), range)?;
            image.clear();
            image.extend_from_slice(&bytes);
        }
        Ok(())
    }

    /// How messages name a sample: its shard, key and offset.
    pub(crate) fn describe(&self, sample: u64) -> String {
        let Some((shard, record)) = self.locate(sample) else {
            return format!("sample {sample}");
        };
        let file = self.store.display(&self.shard_file(shard));
        let key = self.key(shard, record.offset);
        format!("sample {sample} (shard {file}, key {key}, offset {})", record.offset)
    }

    /// The sample's key in its archive; "unreadable" if that is damaged, empty if there is no such sample.
    #[must_use]
    pub fn key_of(&self, sample: u64) -> String {
        self.locate(sample)
            .map_or_else(String::new, |(shard, record)| self.key(shard, record.offset))
    }

    pub(crate) fn store(&self) -> &Store {
        &self.store
    }

    fn locate(&self, sample: u64) -> Option<(usize, &Record)> {
        let shard = self.manifest.shard_of(sample)?;
        let place = usize::try_from(sample - self.manifest.shards[shard].first).ok()?;
        Some((shard, self.indexes[shard].records.get(place)?))
    }

    fn shard_file(&self, shard: usize) -> String {
        self.manifest.shards[shard].tar()
    }

    /// Read from the archive itself, since only a message needs it. The image may be what is damaged
    /// or its header, so there is not always one.
    fn key(&self, shard: usize, offset: u64) -> String {
        let header = offset.saturating_sub(format::BLOCK)..offset;
        self.store
            .read_range(&self.shard_file(shard), header)
            .ok()
            .and_then(|header| format::key_in_header(&header).map(str::to_owned))
            .unwrap_or_else(|| "unreadable".to_owned())
    }
}

/// Whether a split's name can be part of a file name.
pub(crate) fn check_split_name(split: &str) -> Result<(), OpenError> {
    let plain = |c: u8| c.is_ascii_alphanumeric() || c == b'-' || c == b'_';
    if split.is_empty() || split.len() > 64 || !split.bytes().all(plain) {
        return Err(OpenError::SplitName { split: split.to_owned() });
    }
    Ok(())
}

fn read_manifest(store: &Store, location: &str, split: &str) -> Result<Manifest, OpenError> {
    let name = format!("{split}.json");
    let file = store.display(&name);
    let bytes = match store.read(&name) {
        Err(SourceError::Missing { .. }) => {
            let (location, split) = (location.to_owned(), split.to_owned());
            return Err(OpenError::NoSplit { location, split });
        }
        read => read?,
    };
    match Manifest::parse(&bytes) {
        Ok(manifest) if manifest.split == split => Ok(manifest),
        Ok(manifest) => Err(OpenError::OtherSplit { file, found: manifest.split }),
        Err(source) => Err(OpenError::Manifest { file, source }),
    }
}

/// The index of a shard from its bytes. `found` is the length of the shard's file.
fn check_index(
    store: &Store,
    manifest: &Manifest,
    number: usize,
    bytes: &[u8],
    found: u64,
) -> Result<Index, OpenError> {
    let shard = &manifest.shards[number];
    let file = store.display(&shard.idx());
    let index =
        Index::parse(bytes).map_err(|source| OpenError::Index { file: file.clone(), source })?;
    if let Some(field) = disagreement(shard, &index, bytes) {
        return Err(OpenError::OtherIndex { file, field });
    }
    let classes = manifest.classes.len();
    for (sample, record) in (shard.first..).zip(&index.records) {
        if record.label as usize >= classes {
            return Err(OpenError::Label { file, sample, label: record.label, classes });
        }
    }
    let expected = index.tar_length;
    if expected != found {
        return Err(OpenError::ShardLength { file: store.display(&shard.tar()), expected, found });
    }
    Ok(index)
}

fn disagreement(shard: &Shard, index: &Index, bytes: &[u8]) -> Option<&'static str> {
    if index.records.len() as u64 != shard.samples {
        Some("`samples`")
    } else if index.tar_sha256 != shard.tar_sha256 {
        Some("`tar_sha256`")
    } else if Sha256::of(bytes) != shard.idx_sha256 {
        Some("`idx_sha256`")
    } else {
        None
    }
}
