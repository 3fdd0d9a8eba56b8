//! From sample ids to a batch.

use std::sync::Arc;

use cluster::Epoch;

use crate::{
    batch::Batch,
    dataset::{Dataset, ReadError},
    decode::Decoder,
    erase::Erasure,
    image::CHANNELS,
    jpeg::{Header, JpegError, Opened},
    transform::{Scratch, Transform, TransformError},
};

/// Reads, decodes and transforms samples. One a thread; it keeps its buffers between batches.
#[derive(Debug)]
pub struct Loader {
    dataset: Arc<Dataset>,
    transform: Transform,
    bytes: Vec<u8>,
    decoder: Decoder,
    scratch: Scratch,
}

/// A batch that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The sample cannot be read or is damaged.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The sample's bytes are as they were packed, but they are not an image.
    #[error("{sample} cannot be decoded")]
    Decode {
        /// The sample with its shard, key and offset.
        sample: String,
        /// What is wrong.
        #[source]
        source: JpegError,
    },
    /// The image does not suit the transform.
    #[error("{sample} cannot be transformed")]
    Transform {
        /// The sample with its shard, key and offset.
        sample: String,
        /// What is wrong.
        #[source]
        source: TransformError,
    },
}

impl Loader {
    /// A loader of its own for the calling thread.
    #[must_use]
    pub fn new(dataset: Arc<Dataset>, transform: Transform) -> Self {
        Self {
            dataset,
            transform,
            bytes: Vec::new(),
            decoder: Decoder::new(),
            scratch: Scratch::new(),
        }
    }

    /// The dataset that it reads.
    #[must_use]
    pub fn dataset(&self) -> &Arc<Dataset> {
        &self.dataset
    }

    /// The transform that it applies.
    #[must_use]
    pub fn transform(&self) -> &Transform {
        &self.transform
    }

    /// Fills `batch` with the samples of `ids`, in that order, as `epoch` sees them. The evaluation
    /// transform sees them alike in every epoch.
    ///
    /// # Errors
    /// [`LoadError`] names shard, key and offset of the first sample that cannot be used. `batch` then
    /// holds nothing of meaning.
    pub fn load(&mut self, ids: &[u64], epoch: Epoch, batch: &mut Batch) -> Result<(), LoadError> {
        let size = self.transform.size();
        batch.prepare(ids.len(), size);
        let slots = batch.images.chunks_exact_mut(size * size * CHANNELS);
        for ((place, &id), (pixels, label)) in
            ids.iter().enumerate().zip(slots.zip(&mut batch.labels))
        {
            *label = self.load_sample(id, epoch, pixels)?;
            if let Some((area, key)) = self.transform.erased(epoch, id) {
                batch.erasures.push(Erasure { image: place, area, key });
            }
        }
        Ok(())
    }

    fn load_sample(&mut self, id: u64, epoch: Epoch, pixels: &mut [u8]) -> Result<i64, LoadError> {
        let label = self.dataset.read_into(id, &mut self.bytes)?;
        let describe = || self.dataset.describe(id);
        let undecodable = |source| LoadError::Decode { sample: describe(), source };
        let image = Opened::new(&self.bytes).map_err(undecodable)?;
        let Header { width, height, .. } = image.header();
        let part = self.transform.part(width, height, epoch, id);
        let part = self.decoder.decode_part(image, part).map_err(undecodable)?;
        self.transform
            .apply_to_part(part, (width, height), epoch, id, &mut self.scratch, pixels)
            .map_err(|source| LoadError::Transform { sample: describe(), source })?;
        Ok(i64::from(label))
    }
}
