//! How fast images are prepared: passes over images held in memory, and what each stage of them takes.
//!
//! The clock is an argument. Whoever measures gives the CPU time of the calling thread, which other
//! work on the machine does not lengthen as it does the time of day.

use cluster::Epoch;

use crate::{
    augment::{Augment, InvalidAugment},
    batch::{Batch, Normalize},
    decode::Decoder,
    erase::Erase,
    image::CHANNELS,
    jpeg::{JpegError, Opened},
    rand_augment::RandAugment,
    transform::{Scratch, Transform, TransformError},
};

/// Side of the images that are made, in pixels.
pub const SIZE: u32 = 224;

/// The stages of a pass, in the order of [`Pipeline::stages`].
pub const STAGES: [&str; 4] = ["decode", "resize", "augment", "normalize"];

/// What is done to each image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// A random resized crop and a flip.
    Crop,
    /// The same, RandAugment (`rand-m9-mstd0.5-inc1`) and random erasing.
    Full,
}

impl Work {
    fn augment(self) -> Augment {
        match self {
            Self::Crop => Augment::default(),
            Self::Full => Augment {
                rand_augment: Some(RandAugment::published()),
                erase: Some(Erase::default()),
                ..Augment::default()
            },
        }
    }
}

/// An image that cannot be prepared.
#[derive(Debug, thiserror::Error)]
pub enum MeasureError {
    /// It cannot be decoded.
    #[error("image {place} cannot be decoded")]
    Decode {
        /// Its place in the list.
        place: usize,
        /// What is wrong.
        #[source]
        source: JpegError,
    },
    /// It does not suit the transform.
    #[error("image {place} cannot be transformed")]
    Transform {
        /// Its place in the list.
        place: usize,
        /// What is wrong.
        #[source]
        source: TransformError,
    },
}

/// Prepares images one by one, as a loader does, and adds up what the stages take.
#[derive(Debug)]
pub struct Pipeline {
    transform: Transform,
    normalize: Normalize,
    decoder: Decoder,
    scratch: Scratch,
    batch: Batch,
    planes: Vec<f32>,
    /// Seconds of the [stages](STAGES) so far.
    pub stages: [f64; 4],
}

impl Pipeline {
    /// With buffers that are still to grow.
    ///
    /// # Panics
    /// Never: both kinds of work have usable settings.
    #[must_use]
    pub fn new(work: Work) -> Self {
        let usable: Result<Transform, InvalidAugment> =
            Transform::training(&work.augment(), SIZE, 1);
        let transform = usable.expect("both kinds of work have usable settings");
        let side = SIZE as usize;
        let images = vec![0; side * side * CHANNELS];
        Self {
            normalize: transform.normalize(),
            transform,
            decoder: Decoder::new(),
            scratch: Scratch::new(),
            batch: Batch { images, labels: vec![0], size: side, ..Batch::new() },
            planes: Vec::new(),
            stages: [0.0; 4],
        }
    }

    /// Prepares every file once, each with the draws of this epoch. `clock` gives seconds.
    ///
    /// # Errors
    /// [`MeasureError`] names the first that is no image.
    pub fn pass(
        &mut self,
        files: &[Vec<u8>],
        epoch: u64,
        clock: &mut dyn FnMut() -> f64,
    ) -> Result<(), MeasureError> {
        for (place, file) in files.iter().enumerate() {
            self.prepare(place, file, Epoch(epoch), clock)?;
        }
        Ok(())
    }

    fn prepare(
        &mut self,
        place: usize,
        file: &[u8],
        epoch: Epoch,
        clock: &mut dyn FnMut() -> f64,
    ) -> Result<(), MeasureError> {
        let undecodable = |source| MeasureError::Decode { place, source };
        let unsuitable = |source| MeasureError::Transform { place, source };
        let sample = place as u64;
        let start = clock();
        let image = Opened::new(file).map_err(undecodable)?;
        let whole = (image.header().width, image.header().height);
        let part = self.transform.part(whole.0, whole.1, epoch, sample);
        let part = self.decoder.decode_part(image, part).map_err(undecodable)?;
        let decoded = clock();
        let target = &mut self.batch.images;
        self.transform
            .shape(part, whole, epoch, sample, &mut self.scratch, target)
            .map_err(unsuitable)?;
        let shaped = clock();
        self.transform.change(epoch, sample, &mut self.scratch, target);
        self.batch.erasures.clear();
        self.transform.erase(epoch, sample, 0, &mut self.batch.erasures);
        let changed = clock();
        self.normalize.nchw(&self.batch, &mut self.planes);
        std::hint::black_box(&self.planes);
        let ends = [start, decoded, shaped, changed, clock()];
        for (stage, times) in self.stages.iter_mut().zip(ends.windows(2)) {
            *stage += times[1] - times[0];
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jpeg::{self, Pixels};

    #[test]
    fn the_stages_add_up_to_the_pass() {
        let pixels: Vec<u8> = (0..64 * 48 * 3).map(|at: u32| (at % 251).to_le_bytes()[0]).collect();
        let file = jpeg::encode(&pixels, 64, 48, Pixels::Rgb, 90).unwrap();
        let mut ticks = 0.0;
        let mut clock = || {
            ticks += 1.0;
            ticks
        };
        let mut pipeline = Pipeline::new(Work::Full);
        pipeline.pass(&[file.clone(), file], 0, &mut clock).unwrap();
        assert_eq!(pipeline.stages, [2.0; 4]);
    }

    #[test]
    fn what_is_no_image_is_named_by_its_place() {
        let mut pipeline = Pipeline::new(Work::Crop);
        let error = pipeline.pass(&[b"text".to_vec()], 0, &mut || 0.0).unwrap_err();
        assert!(matches!(error, MeasureError::Decode { place: 0, .. }), "{error}");
    }
}
