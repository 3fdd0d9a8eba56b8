//! From a decoded image to the `S` × `S` pixels that the network sees.

use cluster::Epoch;

use crate::{
    augment::{Augment, Crop, Decision, Draws, InvalidAugment},
    batch::Normalize,
    erase::Erasure,
    image::{self, CHANNELS, Rect, View},
    operation::truncate,
    rand_augment::color_jitter,
    resize::{Axis, Resizer},
};

/// Up to this size the evaluation transform takes an image that already has it as it is.
const SMALL: usize = 32;

/// From this size on the evaluation transform squashes the image instead of cropping it.
const LARGE: usize = 384;

/// What happens to each image between decoding and the batch. Makes `size` × `size` pixels.
#[derive(Debug, Clone, PartialEq)]
pub struct Transform {
    augment: Augment,
    size: usize,
    purpose: Purpose,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Purpose {
    Training { seed: u64 },
    Evaluation,
}

/// What a transform needs besides its arguments. One a thread; it keeps its buffers between images.
#[derive(Debug, Default)]
pub struct Scratch {
    resizer: Resizer,
    image: Vec<u8>,
}

impl Scratch {
    /// Without buffers yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// With a [scalar](Resizer::scalar) resizer, to check the others by.
    #[must_use]
    pub fn scalar() -> Self {
        Self { resizer: Resizer::scalar(), image: Vec::new() }
    }
}

/// An image that a transform cannot take.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TransformError {
    /// A padded crop does not enlarge.
    #[error(
        "an image of {width}x{height} pixels with a margin of {padding} is smaller than the crop of \
         {size}: use crop = \"random-resized\" or a larger padding"
    )]
    TooSmall {
        /// Columns of the image.
        width: usize,
        /// Rows of the image.
        height: usize,
        /// Width of the margin.
        padding: usize,
        /// Side of the crop.
        size: usize,
    },
}

impl Transform {
    /// The training transform: crop, resize and flip as `augment` says, drawn anew each epoch.
    ///
    /// # Errors
    /// [`InvalidAugment`] if a setting is out of range or `size` is 0.
    pub fn training(augment: &Augment, size: u32, seed: u64) -> Result<Self, InvalidAugment> {
        Self::new(augment, size, Purpose::Training { seed })
    }

    /// The evaluation transform, which leaves nothing to chance: the short side is resized to
    /// `size / crop_pct` and the centre taken. From 384 pixels on the whole image is squashed to
    /// `size` × `size` instead; up to 32, an image of that size is taken as it is.
    ///
    /// # Errors
    /// [`InvalidAugment`] if a setting is out of range or `size` is 0.
    pub fn evaluation(augment: &Augment, size: u32) -> Result<Self, InvalidAugment> {
        Self::new(augment, size, Purpose::Evaluation)
    }

    fn new(augment: &Augment, size: u32, purpose: Purpose) -> Result<Self, InvalidAugment> {
        augment.check()?;
        if !(1..=1 << 14).contains(&size) {
            let problems = vec![format!("image size {size} must be 1 to 16384 pixels")];
            return Err(InvalidAugment { problems });
        }
        Ok(Self { augment: augment.clone(), size: size as usize, purpose })
    }

    /// Side of the images that it makes, in pixels.
    #[must_use]
    pub fn size(&self) -> usize {
        self.size
    }

    /// The normalisation that its settings ask for.
    #[must_use]
    pub fn normalize(&self) -> Normalize {
        Normalize::new(self.augment.mean, self.augment.std)
    }

    /// The part of a `width` × `height` image that the transform looks at. What lies outside need
    /// not be decoded.
    #[must_use]
    pub fn part(&self, width: usize, height: usize, epoch: Epoch, sample: u64) -> Rect {
        match (self.purpose, self.augment.crop) {
            (Purpose::Training { seed }, Crop::RandomResized) => {
                let mut draws = Draws::new(Decision::Crop, seed, epoch, sample);
                self.augment.random_resized_crop(width, height, &mut draws)
            }
            (Purpose::Training { .. }, Crop::Padded | Crop::None) => {
                Rect { left: 0, top: 0, width, height }
            }
            (Purpose::Evaluation, _) => {
                let (horizontal, vertical) = self.evaluation_axes(width, height);
                let (columns, rows) = (horizontal.footprint(), vertical.footprint());
                Rect {
                    left: columns.start,
                    top: rows.start,
                    width: columns.len(),
                    height: rows.len(),
                }
            }
        }
    }

    /// Transforms `image` into `target`, `[size, size, 3]` bytes.
    ///
    /// The result depends on the image, the settings, the seed, `epoch` and `sample`, on nothing else;
    /// for evaluation not on `epoch` and `sample` either.
    ///
    /// # Errors
    /// [`TransformError`] if the image is too small for a padded crop.
    ///
    /// # Panics
    /// If the length of `target` is another.
    pub fn apply(
        &self,
        image: View<'_>,
        epoch: Epoch,
        sample: u64,
        scratch: &mut Scratch,
        target: &mut [u8],
    ) -> Result<(), TransformError> {
        let whole = (image.width(), image.height());
        let part = image.crop(self.part(whole.0, whole.1, epoch, sample));
        self.apply_to_part(part, whole, epoch, sample, scratch, target)
    }

    /// Transforms an image of which only [`Self::part`] is at hand, and whose width and height are
    /// `whole`: the same as [`Self::apply`] of the whole image.
    ///
    /// # Errors
    /// [`TransformError`] if the image is too small for a padded crop.
    ///
    /// # Panics
    /// If the length of `target` is another.
    pub fn apply_to_part(
        &self,
        part: View<'_>,
        whole: (usize, usize),
        epoch: Epoch,
        sample: u64,
        scratch: &mut Scratch,
        target: &mut [u8],
    ) -> Result<(), TransformError> {
        self.shape(part, whole, epoch, sample, scratch, target)?;
        self.change(epoch, sample, scratch, target);
        Ok(())
    }

    /// The first half of [`Self::apply_to_part`]: the crop, resized and perhaps mirrored.
    pub(crate) fn shape(
        &self,
        part: View<'_>,
        whole: (usize, usize),
        epoch: Epoch,
        sample: u64,
        scratch: &mut Scratch,
        target: &mut [u8],
    ) -> Result<(), TransformError> {
        let seed = match self.purpose {
            Purpose::Evaluation => {
                let (horizontal, vertical) = self.evaluation_axes(whole.0, whole.1);
                scratch.resizer.resize_part(part, horizontal, vertical, target);
                return Ok(());
            }
            Purpose::Training { seed } => seed,
        };
        match self.augment.crop {
            Crop::RandomResized | Crop::None => {
                scratch.resizer.resize(part, self.size, self.size, target);
            }
            Crop::Padded => {
                let mut draws = Draws::new(Decision::Crop, seed, epoch, sample);
                self.padded_crop(part, &mut draws, target)?;
            }
        }
        let mut flip = Draws::new(Decision::Flip, seed, epoch, sample);
        if flip.unit() < self.augment.flip_probability {
            image::flip(target, self.size);
        }
        Ok(())
    }

    /// The boxes that noise replaces once image number `place` of a batch is normalised, added to
    /// `erasures`.
    pub fn erase(&self, epoch: Epoch, sample: u64, place: usize, erasures: &mut Vec<Erasure>) {
        if let (Purpose::Training { seed }, Some(erase)) = (self.purpose, self.augment.erase) {
            let mut draws = Draws::new(Decision::Erase, seed, epoch, sample);
            erase.draw(place, self.size, &mut draws, erasures);
        }
    }

    /// Most boxes that an image loses.
    #[must_use]
    pub fn erasures_max(&self) -> usize {
        match (self.purpose, self.augment.erase) {
            (Purpose::Training { .. }, Some(erase)) => erase.count_max as usize,
            (Purpose::Training { .. }, None) | (Purpose::Evaluation, _) => 0,
        }
    }

    /// The second half of [`Self::apply_to_part`]: RandAugment, or the colour jitter where that is off.
    pub(crate) fn change(
        &self,
        epoch: Epoch,
        sample: u64,
        scratch: &mut Scratch,
        target: &mut [u8],
    ) {
        let Purpose::Training { seed } = self.purpose else { return };
        let mut draws = Draws::new(Decision::Operations, seed, epoch, sample);
        let fill = self.augment.mean.map(|mean| truncate((f64::from(mean) * 255.0).round()));
        if let Some(setting) = self.augment.rand_augment {
            for operation in setting.draw(&mut draws) {
                operation.apply(target, self.size, fill, &mut scratch.image);
            }
        } else if self.augment.color_jitter > 0.0 {
            for operation in color_jitter(self.augment.color_jitter, &mut draws) {
                operation.apply(target, self.size, fill, &mut scratch.image);
            }
        }
    }

    fn padded_crop(
        &self,
        image: View<'_>,
        draws: &mut Draws,
        target: &mut [u8],
    ) -> Result<(), TransformError> {
        let (width, height, size) = (image.width(), image.height(), self.size);
        let padding = self.augment.padding as usize;
        let room = |side: usize| (side + 2 * padding).checked_sub(size);
        let (Some(rows), Some(columns)) = (room(height), room(width)) else {
            return Err(TransformError::TooSmall { width, height, padding, size });
        };
        let (top, left) = (draws.at_most(rows), draws.at_most(columns));
        target.fill(0);
        // Which columns of the crop lie in the image, and where those begin in it.
        let (start, end) = overlap(left, size, padding, width);
        for (y, row) in target.chunks_exact_mut(size * CHANNELS).enumerate() {
            let inside = (top + y).checked_sub(padding).filter(|&y| y < height);
            if let (Some(source), true) = (inside, start < end) {
                let first = left + start - padding;
                let pixels = &image.row(source)[first * CHANNELS..][..(end - start) * CHANNELS];
                row[start * CHANNELS..end * CHANNELS].copy_from_slice(pixels);
            }
        }
        Ok(())
    }

    /// Columns and rows of the resized image that evaluation takes.
    fn evaluation_axes(&self, width: usize, height: usize) -> (Axis, Axis) {
        let size = self.size;
        let as_is = size <= SMALL && (width, height) == (size, size);
        if as_is || size >= LARGE {
            return (Axis::whole(width, size), Axis::whole(height, size));
        }
        let (columns, rows) = self.evaluation_size(width, height);
        let left = half_to_even(columns - size);
        let top = half_to_even(rows - size);
        (Axis::part(width, columns, left..left + size), Axis::part(height, rows, top..top + size))
    }

    /// Sides after resizing: the short one is `size / crop_pct`, both truncated.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the definition truncates; sides in pixels are far below the type's limit"
    )]
    fn evaluation_size(&self, width: usize, height: usize) -> (usize, usize) {
        let short = (self.size as f64 / self.augment.crop_pct) as usize;
        let long = |long: usize, by: usize| ((short * long) as f64 / by as f64) as usize;
        if width <= height { (short, long(height, width)) } else { (long(width, height), short) }
    }
}

/// Half of an even or odd length, rounded to the even neighbour if it is not whole.
fn half_to_even(length: usize) -> usize {
    let half = length / 2;
    if length.is_multiple_of(2) { half } else { half + half % 2 }
}

/// The positions of a crop of `size` that begins at `start` of a padded axis, which lie in the image.
fn overlap(start: usize, size: usize, padding: usize, length: usize) -> (usize, usize) {
    let first = padding.saturating_sub(start).min(size);
    let end = (padding + length).saturating_sub(start).min(size);
    (first, end)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn picture(width: usize, height: usize) -> Vec<u8> {
        (0..width * height * 3).map(|at| u8::try_from(at * 7 % 251).unwrap()).collect()
    }

    fn apply(transform: &Transform, pixels: &[u8], width: usize, key: (u64, u64)) -> Vec<u8> {
        let mut target = vec![1; transform.size() * transform.size() * 3];
        let image = View::new(pixels, width, pixels.len() / 3 / width);
        transform.apply(image, Epoch(key.0), key.1, &mut Scratch::new(), &mut target).unwrap();
        target
    }

    #[test]
    fn the_same_key_gives_the_same_pixels_and_another_key_others() {
        let transform = Transform::training(&Augment::default(), 24, 5).unwrap();
        let pixels = picture(60, 40);
        let base = apply(&transform, &pixels, 60, (1, 2));
        assert_eq!(base, apply(&transform, &pixels, 60, (1, 2)));
        assert_ne!(base, apply(&transform, &pixels, 60, (2, 2)));
        assert_ne!(base, apply(&transform, &pixels, 60, (1, 3)));
        let other_seed = Transform::training(&Augment::default(), 24, 6).unwrap();
        assert_ne!(base, apply(&other_seed, &pixels, 60, (1, 2)));
    }

    #[test]
    fn a_padded_crop_is_the_image_moved_by_at_most_the_margin() {
        let augment =
            Augment { crop: Crop::Padded, padding: 2, flip_probability: 0.0, ..Augment::default() };
        let transform = Transform::training(&augment, 8, 5).unwrap();
        let pixels = picture(8, 8);
        let mut shifts = BTreeSet::new();
        for sample in 0..400 {
            let crop = apply(&transform, &pixels, 8, (0, sample));
            let shift = (-2..=2_isize)
                .flat_map(|dy| (-2..=2_isize).map(move |dx| (dy, dx)))
                .find(|&(dy, dx)| crop == moved(&pixels, dy, dx))
                .expect("the crop is the image moved");
            shifts.insert(shift);
        }
        assert_eq!(shifts.len(), 25);
    }

    /// The 8 × 8 image seen through a window moved by (`dy`, `dx`), black outside.
    fn moved(pixels: &[u8], dy: isize, dx: isize) -> Vec<u8> {
        let at = |y: isize, x: isize, channel: usize| {
            let inside = (0..8).contains(&y) && (0..8).contains(&x);
            if inside { pixels[(y * 8 + x).unsigned_abs() * 3 + channel] } else { 0 }
        };
        (0..8)
            .flat_map(|y| (0..8).flat_map(move |x| (0..3).map(move |channel| (y, x, channel))))
            .map(|(y, x, channel)| at(y + dy, x + dx, channel))
            .collect()
    }

    #[test]
    fn a_padded_crop_refuses_an_image_that_is_too_small() {
        let augment = Augment { crop: Crop::Padded, padding: 2, ..Augment::default() };
        let transform = Transform::training(&augment, 8, 5).unwrap();
        let pixels = picture(3, 9);
        let outcome = transform.apply(
            View::new(&pixels, 3, 9),
            Epoch(0),
            0,
            &mut Scratch::new(),
            &mut [0; 192],
        );
        let error = TransformError::TooSmall { width: 3, height: 9, padding: 2, size: 8 };
        assert_eq!(outcome, Err(error));
    }

    #[test]
    fn a_small_image_is_evaluated_as_it_is() {
        let transform = Transform::evaluation(&Augment::default(), 32).unwrap();
        let pixels = picture(32, 32);
        assert_eq!(apply(&transform, &pixels, 32, (0, 0)), pixels);
    }

    #[test]
    fn evaluation_sizes_truncate_as_the_reference_does() {
        let sides = |size, width, height| {
            let transform = Transform::evaluation(&Augment::default(), size).unwrap();
            transform.evaluation_size(width, height)
        };
        assert_eq!(sides(224, 451, 300), (384, 256));
        assert_eq!(sides(160, 451, 300), (273, 182));
        assert_eq!(sides(64, 64, 64), (73, 73));
        assert_eq!([4, 5, 6, 7, 9].map(half_to_even), [2, 2, 3, 4, 4]);
    }
}
