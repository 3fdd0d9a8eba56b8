//! From sample ids to a batch.

use std::{error::Error, sync::Arc};

use cluster::Epoch;
use serde::{Deserialize, Serialize};

use crate::{
    batch::{Batch, Skipped},
    dataset::{Dataset, ReadError},
    decode::Decoder,
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
    on_corrupt: OnCorruptSample,
}

/// What to do with a damaged sample when it is to be trained on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnCorruptSample {
    /// Stop with an error that names it.
    #[default]
    Fail,
    /// Take the next sample of the split that is whole in its place, with that sample's own draws, and
    /// [say so](Batch::skipped). Whoever reads the same files takes the same.
    SkipAndLog,
}

/// Damaged samples in a row after which a split is not worth reading on.
const SKIPPED_IN_A_ROW_MAX: u64 = 64;

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
    /// The sample is damaged, and so are all that could stand in its place.
    #[error(
        "no whole sample follows sample {sample}, which is damaged ({fault}): copy the split again"
    )]
    NothingWhole {
        /// Sample id.
        sample: u64,
        /// What is wrong with the sample itself.
        fault: String,
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

/// An error and what caused it, in one line.
fn with_causes(error: &dyn Error) -> String {
    let causes = std::iter::successors(Some(error), |&error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
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
            on_corrupt: OnCorruptSample::Fail,
        }
    }

    /// The same loader with another way to treat damaged samples.
    #[must_use]
    pub fn on_corrupt(self, on_corrupt: OnCorruptSample) -> Self {
        Self { on_corrupt, ..self }
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
        batch.prepare(ids.len(), size, self.transform.erasures_max());
        self.dataset.prefetch(ids);
        let slots = batch.images.chunks_exact_mut(size * size * CHANNELS);
        for ((place, &id), (pixels, label)) in
            ids.iter().enumerate().zip(slots.zip(&mut batch.labels))
        {
            let taken = match self.load_sample(id, epoch, pixels) {
                Ok(found) => {
                    *label = found;
                    id
                }
                Err(error) if self.skips(&error) => {
                    let (instead, found) = self.load_another(id, epoch, pixels, &error)?;
                    *label = found;
                    let fault = with_causes(&error);
                    batch.skipped.push(Skipped { place, sample: id, instead, fault });
                    instead
                }
                Err(error) => return Err(error),
            };
            self.transform.erase(epoch, taken, place, &mut batch.erasures);
        }
        Ok(())
    }

    /// Whether this is damage, and damage is to be skipped. A shard that cannot be read at all, or an
    /// image that does not suit the transform, is a matter for the operator.
    fn skips(&self, error: &LoadError) -> bool {
        match (self.on_corrupt, error) {
            (OnCorruptSample::Fail, _) => false,
            (OnCorruptSample::SkipAndLog, LoadError::Read(read)) => match read {
                ReadError::Checksum { .. } => true,
                ReadError::NoSample { .. } | ReadError::Source { .. } => false,
            },
            (OnCorruptSample::SkipAndLog, LoadError::Decode { .. }) => true,
            (
                OnCorruptSample::SkipAndLog,
                LoadError::Transform { .. } | LoadError::NothingWhole { .. },
            ) => false,
        }
    }

    /// The next whole sample after `id`, and its label.
    fn load_another(
        &mut self,
        id: u64,
        epoch: Epoch,
        pixels: &mut [u8],
        first: &LoadError,
    ) -> Result<(u64, i64), LoadError> {
        let samples = self.dataset.len();
        for further in 1..=SKIPPED_IN_A_ROW_MAX.min(samples - 1) {
            let other = (id + further) % samples;
            match self.load_sample(other, epoch, pixels) {
                Ok(label) => return Ok((other, label)),
                Err(error) if self.skips(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Err(LoadError::NothingWhole { sample: id, fault: with_causes(first) })
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
