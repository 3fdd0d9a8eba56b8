//! A batch of images, and their normalisation.

use crate::{
    erase::Erasure,
    image::CHANNELS,
    simd::normalize::{Division, normalize},
};

/// Images and labels of one micro-batch. A slot to be filled again and again: it keeps its memory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// Pixels, `[B, size, size, 3]` (NHWC), RGB, eight bits a channel.
    pub images: Vec<u8>,
    /// Class indices, `[B]`.
    pub labels: Vec<i64>,
    /// Side of the images in pixels.
    pub size: usize,
    /// Boxes that noise replaces when the images are normalised.
    pub erasures: Vec<Erasure>,
    /// Samples that were asked for and are damaged; another image and label stand in their place.
    pub skipped: Vec<Skipped>,
}

/// A damaged sample that was left out of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skipped {
    /// Its place in the batch.
    pub place: usize,
    /// Its id.
    pub sample: u64,
    /// Id of the sample that stands there instead.
    pub instead: u64,
    /// What is wrong with it, with shard, key and offset: a line for the log.
    pub fault: String,
}

impl Batch {
    /// An empty slot.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Number of images, `B`.
    #[must_use]
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether it has no image, as after the share of a virtual rank that has no sample.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// Makes room for `count` images of side `size`, whose pixels and labels are then to be written, and
    /// each of which loses at most `erasures_max` boxes.
    pub(crate) fn prepare(&mut self, count: usize, size: usize, erasures_max: usize) {
        self.size = size;
        self.images.resize(count * size * size * CHANNELS, 0);
        self.labels.resize(count, 0);
        self.skipped.clear();
        self.erasures.clear();
        self.erasures.reserve(count * erasures_max);
    }
}

/// `(v / 255 - mean) / std` in f32, as a table of its 256 possible results a channel.
#[derive(Debug, Clone, PartialEq)]
pub struct Normalize {
    table: [[f32; 256]; CHANNELS],
    /// What vectors compute the same by.
    divisions: Option<[Division; CHANNELS]>,
}

impl Normalize {
    /// For the mean and standard deviation of red, green and blue, on the scale 0 to 1.
    #[must_use]
    pub fn new(mean: [f32; CHANNELS], std: [f32; CHANNELS]) -> Self {
        let mut table = [[0.0; 256]; CHANNELS];
        for (channel, results) in table.iter_mut().enumerate() {
            for (value, result) in (0..=255_u8).zip(results) {
                *result = (f32::from(value) / 255.0 - mean[channel]) / std[channel];
            }
        }
        let division =
            |channel: usize| Division::exact(mean[channel], std[channel], &table[channel]);
        let divisions = match [division(0), division(1), division(2)] {
            [Some(red), Some(green), Some(blue)] => Some([red, green, blue]),
            [None, ..] | [_, None, _] | [.., None] => None,
        };
        Self { table, divisions }
    }

    /// The batch as the network takes it: `[B, 3, size, size]` (NCHW), f32, its boxes erased. `planes`
    /// keeps its memory between calls.
    pub fn nchw(&self, batch: &Batch, planes: &mut Vec<f32>) {
        planes.resize(batch.images.len(), 0.0);
        let pixels = batch.size * batch.size;
        if pixels == 0 {
            return;
        }
        let images = batch.images.chunks_exact(pixels * CHANNELS);
        for (image, planes) in images.zip(planes.chunks_exact_mut(pixels * CHANNELS)) {
            let (red, others) = planes.split_at_mut(pixels);
            let (green, blue) = others.split_at_mut(pixels);
            let done = match &self.divisions {
                Some(divisions) => {
                    normalize(image, [&mut *red, &mut *green, &mut *blue], divisions)
                }
                None => 0,
            };
            let (image, _) = image.as_chunks::<CHANNELS>();
            for (channel, plane) in [red, green, blue].into_iter().enumerate() {
                let table = &self.table[channel];
                for (result, pixel) in plane.iter_mut().zip(image).skip(done) {
                    *result = table[usize::from(pixel[channel])];
                }
            }
        }
        for erasure in &batch.erasures {
            let image = &mut planes[erasure.image * pixels * CHANNELS..][..pixels * CHANNELS];
            erasure.fill(image, batch.size);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pixels_become_planes() {
        let batch = Batch {
            images: vec![
                0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30,
                31,
            ],
            labels: vec![4, 5],
            size: 2,
            erasures: Vec::new(),
            skipped: Vec::new(),
        };
        let mut planes = Vec::new();
        Normalize::new([0.0; 3], [1.0 / 255.0; 3]).nchw(&batch, &mut planes);
        let rounded: Vec<f32> = planes.iter().map(|value| value.round()).collect();
        let first = [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11];
        let second = [20, 23, 26, 29, 21, 24, 27, 30, 22, 25, 28, 31];
        let expected: Vec<f32> =
            first.into_iter().chain(second).map(|v: u8| f32::from(v)).collect();
        assert_eq!(rounded, expected);
    }

    #[test]
    fn vectors_give_what_the_table_has() {
        let fast = Normalize::new([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]);
        let slow = Normalize { divisions: None, ..fast.clone() };
        for size in [1, 2, 3, 5, 8, 9, 16, 33] {
            let images = (0..3 * 2 * size * size).map(|at: usize| (at * 7 % 256).to_le_bytes()[0]);
            let images = images.collect();
            let batch = Batch { images, labels: vec![0; 2], size, ..Batch::new() };
            let (mut one, mut other) = (Vec::new(), Vec::new());
            fast.nchw(&batch, &mut one);
            slow.nchw(&batch, &mut other);
            let bits = |planes: &[f32]| planes.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&one), bits(&other), "side {size}");
        }
    }

    #[test]
    fn normalisation_is_division_in_f32() {
        let normalize = Normalize::new([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]);
        assert_eq!(normalize.table[0][0].to_bits(), ((0.0_f32 - 0.485) / 0.229).to_bits());
        assert_eq!(normalize.table[2][200], (200.0_f32 / 255.0 - 0.406) / 0.225);
    }
}
