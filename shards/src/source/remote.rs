//! Files that are far away, read in blocks through the cache of this machine.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use bytes::{Bytes, BytesMut};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use tokio::task::spawn_blocking;

use crate::{
    cache::{Cache, Key, Settings},
    digest::Sha256,
    source::{
        SourceError,
        s3::{Bucket, IN_FLIGHT, Object, Traffic, count},
    },
};

/// Files are read in blocks of this length; the last of a file is shorter. Some 40 images of ImageNet, so
/// that neighbours come together.
pub(super) const BLOCK_BYTES: u64 = 4 << 20;

/// The files of a location. Usable from any thread.
#[derive(Debug)]
pub(crate) struct Remote {
    location: String,
    bucket: Bucket,
    cache: Arc<Cache>,
}

/// A file whose digest and length are known, so that its blocks can be kept.
#[derive(Debug)]
pub(crate) struct RemoteFile {
    remote: Arc<Remote>,
    name: String,
    digest: Sha256,
    length: u64,
    /// Blocks whose entries this process has checked.
    checked: Vec<AtomicBool>,
}

impl Remote {
    pub(crate) fn open(
        location: &str,
        variables: &[(String, String)],
    ) -> Result<Self, SourceError> {
        let bucket = Bucket::open(location, variables)?;
        let cache = Arc::new(Cache::open(Settings::from_variables(variables)?)?);
        Ok(Self { location: location.trim_end_matches('/').to_owned(), bucket, cache })
    }

    pub(crate) fn traffic(&self) -> &Traffic {
        &self.bucket.traffic
    }

    fn display(&self, name: &str) -> String {
        format!("{}/{name}", self.location)
    }

    fn unread(&self, name: &str, error: object_store::Error) -> SourceError {
        SourceError::unread(self.display(name), error)
    }

    fn unwritten(&self, name: &str, source: object_store::Error) -> SourceError {
        SourceError::Write { file: self.display(name), source }
    }

    pub(super) fn length(&self, name: &str) -> Result<u64, SourceError> {
        let found = self.bucket.wait(self.bucket.length(name));
        found.map_err(|error| self.unread(name, error))
    }

    pub(super) fn range(
        &self,
        name: &str,
        range: std::ops::Range<u64>,
    ) -> Result<Bytes, SourceError> {
        let found = self.bucket.wait(self.bucket.range(name, range));
        found.map_err(|error| self.unread(name, error))
    }

    /// Every file.
    pub(crate) fn list(&self) -> Result<Vec<Object>, SourceError> {
        self.bucket.wait(self.bucket.list()).map_err(|error| self.unread("", error))
    }

    /// Parts of files, several at a time, in this order. They are not kept.
    pub(crate) fn read_objects<'a>(
        &self,
        parts: impl IntoIterator<Item = (&'a Object, std::ops::Range<u64>)>,
    ) -> Vec<Result<Vec<u8>, SourceError>> {
        let reads = parts.into_iter().map(|(object, range)| async move {
            let mut whole = Vec::new();
            let mut at = range.start;
            while at < range.end {
                let piece = at..range.end.min(at + BLOCK_BYTES);
                let length = piece.end - piece.start;
                let read = self.bucket.range_at(&object.path, piece).await;
                let bytes = read.map_err(|error| self.unread(&object.name, error))?;
                if bytes.len() as u64 != length {
                    return Err(SourceError::Short { file: self.display(&object.name) });
                }
                whole.extend_from_slice(&bytes);
                at += length;
            }
            Ok(whole)
        });
        self.bucket.wait(stream::iter(reads).buffered(IN_FLIGHT).collect())
    }

    /// Writes a file; replaces what was there.
    pub(super) fn put(&self, name: &str, bytes: Bytes) -> Result<(), SourceError> {
        let written = self.bucket.wait(self.bucket.put(name, bytes));
        written.map_err(|error| self.unwritten(name, error))
    }

    /// Writes a file only if there is none of its name.
    pub(super) fn create(&self, name: &str, bytes: Bytes) -> Result<(), SourceError> {
        match self.bucket.wait(self.bucket.create(name, bytes)) {
            Err(object_store::Error::AlreadyExists { .. }) => {
                Err(SourceError::Exists { file: self.display(name) })
            }
            written => written.map_err(|error| self.unwritten(name, error)),
        }
    }

    /// Removes a file. One that is not there is no error.
    pub(super) fn remove(&self, name: &str) -> Result<(), SourceError> {
        let removed = self.bucket.wait(self.bucket.remove(name));
        removed.map_err(|error| self.unwritten(name, error))
    }

    /// Whether there is such a file with these bytes.
    pub(super) fn holds(
        &self,
        name: &str,
        length: u64,
        digest: Sha256,
    ) -> Result<bool, SourceError> {
        let held = self.bucket.wait(self.bucket.holds(name, length, digest));
        held.map_err(|error| self.unread(name, error))
    }

    /// Indexes and the lengths of their shards, several at a time: the index's name and digest, and the name of
    /// the shard.
    pub(super) fn read_indexes(
        self: &Arc<Self>,
        wanted: impl Iterator<Item = (String, Sha256, String)>,
    ) -> Result<Vec<(Bytes, u64)>, SourceError> {
        let reads = wanted.map(|(idx, digest, tar)| async move {
            let index = self.read_known(&idx, digest).await?;
            let length = self.bucket.length(&tar).await;
            Ok((index, length.map_err(|error| self.unread(&tar, error))?))
        });
        self.bucket.wait(stream::iter(reads).buffered(IN_FLIGHT).try_collect())
    }

    /// A whole file that should have this digest, which is for the caller to check.
    async fn read_known(
        self: &Arc<Self>,
        name: &str,
        digest: Sha256,
    ) -> Result<Bytes, SourceError> {
        let length = self.bucket.length(name).await.map_err(|error| self.unread(name, error))?;
        let file = RemoteFile::new(Arc::clone(self), name, digest, length);
        let bytes = file.whole().await?;
        if Sha256::of(&bytes) == digest {
            return Ok(bytes);
        }
        file.forget(0, length); // What came over the network may have been damaged there.
        file.whole().await.inspect(|_| file.forget(0, length))
    }

    /// A whole file, in blocks: none of them takes long enough to time out.
    pub(super) fn whole(&self, name: &str) -> Result<Bytes, SourceError> {
        let read = async {
            let length = self.bucket.length(name).await?;
            let ranges = (0..length.div_ceil(BLOCK_BYTES))
                .map(|block| block * BLOCK_BYTES..((block + 1) * BLOCK_BYTES).min(length));
            let reads = ranges.map(|range| self.bucket.range(name, range));
            let blocks = stream::iter(reads).buffered(IN_FLIGHT);
            let append = |mut whole: BytesMut, block: Bytes| async move {
                whole.extend_from_slice(&block);
                Ok(whole)
            };
            blocks.try_fold(BytesMut::new(), append).await
        };
        let whole = self.bucket.wait(read).map_err(|error| self.unread(name, error))?;
        Ok(whole.freeze())
    }
}

impl RemoteFile {
    pub(super) fn new(remote: Arc<Remote>, name: &str, digest: Sha256, length: u64) -> Self {
        let checked = (0..length.div_ceil(BLOCK_BYTES)).map(|_| AtomicBool::new(false)).collect();
        Self { remote, name: name.to_owned(), digest, length, checked }
    }

    fn key(&self, block: u64) -> Key {
        Key { file: self.digest, block }
    }

    /// Set by whoever has seen the entry's checksum hold.
    fn checked(&self, block: u64) -> Option<&AtomicBool> {
        self.checked.get(usize::try_from(block).ok()?)
    }

    /// Fills `bytes` from `offset` on, which must lie in the file.
    pub(super) fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<(), SourceError> {
        let mut at = offset;
        let mut rest = bytes;
        while !rest.is_empty() {
            let (block, within) = (at / BLOCK_BYTES, at % BLOCK_BYTES);
            let part = (BLOCK_BYTES - within).min(rest.len() as u64);
            let (now, later) =
                rest.split_at_mut(usize::try_from(part).expect("it is below a block"));
            self.read_in_block(block, within, now)?;
            at += part;
            rest = later;
        }
        Ok(())
    }

    fn read_in_block(&self, block: u64, within: u64, bytes: &mut [u8]) -> Result<(), SourceError> {
        let is_checked = self.checked(block).is_some_and(|flag| flag.load(Ordering::Relaxed));
        if is_checked && self.remote.cache.read_at(self.key(block), within, bytes) {
            return Ok(());
        }
        let whole = self.remote.bucket.wait(self.block(block))?;
        let start = usize::try_from(within).expect("it is below a block");
        let found = whole.get(start..start + bytes.len());
        bytes.copy_from_slice(found.ok_or_else(|| self.short())?);
        Ok(())
    }

    /// A block that is asked for beyond the file's end, or comes too short.
    fn short(&self) -> SourceError {
        SourceError::Short { file: self.remote.display(&self.name) }
    }

    /// A block, from the cache or else from the store, and then kept.
    async fn block(&self, block: u64) -> Result<Bytes, SourceError> {
        let (cache, traffic) = (&self.remote.cache, self.remote.traffic());
        let start = block * BLOCK_BYTES;
        let end = (start + BLOCK_BYTES).min(self.length);
        let length = usize::try_from(end.saturating_sub(start)).expect("it is at most a block");
        let flag = self.checked(block).ok_or_else(|| self.short())?;
        if let Some(whole) = cache.load(self.key(block), length) {
            count(&traffic.hits, 1);
            flag.store(true, Ordering::Relaxed);
            return Ok(whole);
        }
        flag.store(false, Ordering::Relaxed);
        count(&traffic.misses, 1);
        let fetched = self.remote.bucket.range(&self.name, start..end).await;
        let fetched = fetched.map_err(|error| self.remote.unread(&self.name, error))?;
        count(&traffic.fetched_bytes, fetched.len() as u64);
        if fetched.len() != length {
            return Err(self.short());
        }
        let (cache, key, contents) = (Arc::clone(cache), self.key(block), fetched.clone());
        match spawn_blocking(move || cache.store(key, &contents)).await {
            Ok(Ok(())) => flag.store(true, Ordering::Relaxed),
            // Training goes on without it; it will be fetched again.
            Ok(Err(_)) | Err(_) => count(&traffic.unkept, 1),
        }
        Ok(fetched)
    }

    /// Forgets what is kept of some bytes, so that they are fetched anew.
    pub(super) fn forget(&self, offset: u64, length: u64) {
        for block in blocks_of(offset, length) {
            self.remote.cache.drop_entry(self.key(block));
            if let Some(flag) = self.checked(block) {
                flag.store(false, Ordering::Relaxed);
            }
        }
    }

    /// The whole file, through the cache.
    async fn whole(&self) -> Result<Bytes, SourceError> {
        let mut bytes = BytesMut::new();
        for block in 0..self.length.div_ceil(BLOCK_BYTES) {
            bytes.extend_from_slice(&self.block(block).await?);
        }
        Ok(bytes.freeze())
    }
}

/// The blocks that some bytes lie in.
pub(super) fn blocks_of(offset: u64, length: u64) -> std::ops::RangeInclusive<u64> {
    offset / BLOCK_BYTES..=(offset + length.max(1) - 1) / BLOCK_BYTES
}

/// Brings blocks into the cache, several at a time. What cannot be brought is left for the read that needs
/// it, which says so.
pub(super) fn prefetch(remote: &Remote, blocks: impl IntoIterator<Item = (Arc<RemoteFile>, u64)>) {
    let brought = blocks.into_iter().map(|(file, block)| async move {
        let is_checked = file.checked(block).is_some_and(|flag| flag.load(Ordering::Relaxed));
        if is_checked && remote.cache.touch(file.key(block)) {
            count(&remote.traffic().hits, 1);
        } else {
            file.block(block).await.ok(); // The read that needs it fails by itself.
        }
    });
    remote.bucket.wait(stream::iter(brought).buffer_unordered(IN_FLIGHT).for_each(|()| async {}));
}
