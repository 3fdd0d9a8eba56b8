//! Writing to a bucket. An object appears whole or not at all, and carries the digest of its bytes, by which
//! whoever goes on after an answer that got lost, or after a kill, knows that it is there.
//!
//! The parts of an upload that was killed stay with the store until it removes them (S3: a lifecycle rule that
//! aborts incomplete multipart uploads).

use bytes::Bytes;
use object_store::{
    Attribute, Attributes, BackoffConfig, Error, GetOptions, ObjectStore as _, ObjectStoreExt as _,
    PutMode, PutMultipartOptions, PutOptions, RetryConfig, WriteMultipart, aws::AmazonS3Builder,
    path::Path,
};

use super::{ATTEMPTS, BACKOFF_FIRST, BACKOFF_MAX, Bucket};
use crate::digest::Sha256;

/// Objects that are longer go up in parts of this length: one takes [`bucket`]'s time-out at 0.3 MiB/s.
const PART_BYTES: usize = 8 << 20;
/// Parts under way at a time.
const PARTS: usize = 4;
/// Metadata of each object: the sha256 of its bytes in hex.
const DIGEST: &str = "percheron-sha256";

/// Requests that write are repeated as those that read. Objects are removed one by one, which every server can.
pub(super) fn settings(builder: AmazonS3Builder) -> AmazonS3Builder {
    let backoff =
        BackoffConfig { init_backoff: BACKOFF_FIRST, max_backoff: BACKOFF_MAX, base: 2.0 };
    let max_retries = ATTEMPTS as usize - 1;
    let retries = RetryConfig { backoff, max_retries, ..RetryConfig::default() };
    builder.with_retry(retries).with_disable_bulk_delete(true)
}

impl Bucket {
    /// Writes an object; replaces what was there.
    pub(in crate::source) async fn put(&self, name: &str, bytes: Bytes) -> Result<(), Error> {
        let (path, length, digest) = (self.path(name), bytes.len() as u64, Sha256::of(&bytes));
        let sent = if bytes.len() > PART_BYTES {
            self.put_in_parts(&path, bytes, digest).await
        } else {
            let options = PutOptions { attributes: attributes(digest), ..PutOptions::default() };
            self.uploads.put_opts(&path, bytes.into(), options).await.map(drop)
        };
        self.settled(sent, name, length, digest).await
    }

    /// Writes an object only if there is none of its name.
    pub(in crate::source) async fn create(&self, name: &str, bytes: Bytes) -> Result<(), Error> {
        let (path, length, digest) = (self.path(name), bytes.len() as u64, Sha256::of(&bytes));
        self.healed(|| async {
            let (mode, attributes) = (PutMode::Create, attributes(digest));
            let options = PutOptions { mode, attributes, ..PutOptions::default() };
            let sent = self.uploads.put_opts(&path, bytes.clone().into(), options).await;
            self.settled(sent.map(drop), name, length, digest).await
        })
        .await
    }

    /// Whether there is such an object with these bytes.
    pub(in crate::source) async fn holds(
        &self,
        name: &str,
        length: u64,
        digest: Sha256,
    ) -> Result<bool, Error> {
        let path = self.path(name);
        let head =
            || self.objects.get_opts(&path, GetOptions { head: true, ..GetOptions::default() });
        match self.healed(head).await {
            Ok(found) => {
                let stated = found.attributes.get(&Attribute::Metadata(DIGEST.into()));
                let is_same = stated.is_some_and(|stated| stated.as_ref() == digest.to_string());
                Ok(is_same && found.meta.size == length)
            }
            Err(Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Removes an object. One that is not there is no error.
    pub(in crate::source) async fn remove(&self, name: &str) -> Result<(), Error> {
        match self.uploads.delete(&self.path(name)).await {
            Ok(()) | Err(Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn put_in_parts(&self, path: &Path, bytes: Bytes, digest: Sha256) -> Result<(), Error> {
        let options = PutMultipartOptions {
            attributes: attributes(digest),
            ..PutMultipartOptions::default()
        };
        let upload = self.uploads.put_multipart_opts(path, options).await?;
        let mut parts = WriteMultipart::new_with_chunk_size(upload, PART_BYTES);
        for start in (0..bytes.len()).step_by(PART_BYTES) {
            if let Err(error) = parts.wait_for_capacity(PARTS).await {
                parts.abort().await.ok(); // A store that cannot be reached keeps the parts.
                return Err(error);
            }
            parts.put(bytes.slice(start..(start + PART_BYTES).min(bytes.len())));
        }
        parts.finish().await.map(drop)
    }

    /// A write has been done if its object is there, whatever was answered.
    async fn settled(
        &self,
        sent: Result<(), Error>,
        name: &str,
        length: u64,
        digest: Sha256,
    ) -> Result<(), Error> {
        match sent {
            Err(_) if self.holds(name, length, digest).await.is_ok_and(|is_there| is_there) => {
                Ok(())
            }
            sent => sent,
        }
    }
}

fn attributes(digest: Sha256) -> Attributes {
    let key = Attribute::Metadata(DIGEST.into());
    Attributes::from_iter([(key, digest.to_string())])
}
