//! The image operations of RandAugment and of the colour jitter, to the bit as Pillow 9.5 does them.
//!
//! One function an operation, on `[height, width, 3]` bytes in place. Those that move pixels are in
//! `warp.rs`.

use crate::{
    image::{CHANNELS, View},
    simd,
    warp::{self, Affine},
};

/// What is done to an image.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Operation {
    /// Each channel is stretched so that its darkest value becomes 0 and its lightest 255.
    AutoContrast,
    /// Each channel's histogram is made flat.
    Equalize,
    /// Every value becomes 255 less itself.
    Invert,
    /// Counter-clockwise about the centre.
    Rotate {
        /// Angle.
        degrees: f64,
    },
    /// Only the highest bits of each value are kept.
    Posterize {
        /// How many, 0 to 8. With 0 the image is black.
        bits: u32,
    },
    /// Values from a threshold on are inverted.
    Solarize {
        /// Lowest value that is inverted; none is with 256.
        threshold: u32,
    },
    /// Values below 128 are raised.
    SolarizeAdd {
        /// By how much, 0 to 128.
        add: u32,
    },
    /// Saturation: away from (above 1) or towards (below 1) grey.
    Color {
        /// 1 leaves the image as it is.
        factor: f64,
    },
    /// Away from or towards the image's mean grey.
    Contrast {
        /// 1 leaves the image as it is.
        factor: f64,
    },
    /// Away from or towards black.
    Brightness {
        /// 1 leaves the image as it is.
        factor: f64,
    },
    /// Away from or towards a smoothed image.
    Sharpness {
        /// 1 leaves the image as it is.
        factor: f64,
    },
    /// Rows move by a share of their number.
    ShearX {
        /// Columns a row.
        factor: f64,
    },
    /// Columns move by a share of their number.
    ShearY {
        /// Rows a column.
        factor: f64,
    },
    /// All columns move.
    TranslateX {
        /// Share of the width.
        fraction: f64,
    },
    /// All rows move.
    TranslateY {
        /// Share of the height.
        fraction: f64,
    },
}

impl Operation {
    /// Changes the image `pixels`, `[height, width, 3]` bytes. Where pixels from outside the image
    /// would be seen, `fill` is. `scratch` keeps its memory between calls.
    ///
    /// # Panics
    /// If `pixels` is not made of whole rows.
    pub fn apply(
        self,
        pixels: &mut [u8],
        width: usize,
        fill: [u8; CHANNELS],
        scratch: &mut Vec<u8>,
    ) {
        assert!(pixels.len().is_multiple_of(width * CHANNELS), "whole rows");
        simd::widest(|| match self {
            Self::AutoContrast => auto_contrast(pixels),
            Self::Equalize => equalize(pixels),
            Self::Invert => pixels.iter_mut().for_each(|value| *value = 255 - *value),
            Self::Posterize { bits } => posterize(pixels, bits),
            Self::Solarize { threshold } => solarize(pixels, threshold),
            Self::SolarizeAdd { add } => solarize_add(pixels, add),
            Self::Color { factor } => color(pixels, single(factor)),
            Self::Contrast { factor } => contrast(pixels, single(factor)),
            Self::Brightness { factor } => blend_with_value(pixels, 0, single(factor)),
            Self::Sharpness { factor } => sharpness(pixels, width, single(factor), scratch),
            Self::Rotate { .. }
            | Self::ShearX { .. }
            | Self::ShearY { .. }
            | Self::TranslateX { .. }
            | Self::TranslateY { .. } => self.move_pixels(pixels, width, fill, scratch),
        });
    }

    fn move_pixels(
        self,
        pixels: &mut [u8],
        width: usize,
        fill: [u8; CHANNELS],
        scratch: &mut Vec<u8>,
    ) {
        let height = pixels.len() / (width * CHANNELS);
        let Some(affine) = self.affine(width, height) else { return };
        scratch.clear();
        scratch.extend_from_slice(pixels);
        let source = View::new(scratch, width, height);
        warp::warp(source, affine, fill, pixels);
    }

    /// Where output pixels come from; `None` if the operation moves none.
    pub(crate) fn affine(self, width: usize, height: usize) -> Option<Affine> {
        let unmoved = Affine::UNMOVED;
        let (columns, rows) = (width as f64, height as f64);
        match self {
            Self::Rotate { degrees } => Affine::rotation(degrees, width, height),
            Self::ShearX { factor } => Some(Affine { b: factor, ..unmoved }),
            Self::ShearY { factor } => Some(Affine { d: factor, ..unmoved }),
            Self::TranslateX { fraction } => Some(Affine { c: fraction * columns, ..unmoved }),
            Self::TranslateY { fraction } => Some(Affine { f: fraction * rows, ..unmoved }),
            Self::AutoContrast
            | Self::Equalize
            | Self::Invert
            | Self::Posterize { .. }
            | Self::Solarize { .. }
            | Self::SolarizeAdd { .. }
            | Self::Color { .. }
            | Self::Contrast { .. }
            | Self::Brightness { .. }
            | Self::Sharpness { .. } => None,
        }
    }
}

/// Pillow takes factors in single precision.
#[expect(clippy::cast_possible_truncation, reason = "rounding is what is wanted")]
fn single(factor: f64) -> f32 {
    factor as f32
}

type Table = [u8; 256];

fn identity() -> Table {
    std::array::from_fn(|value| value.to_le_bytes()[0])
}

/// A table from a function of a value.
fn table(of: impl Fn(u8) -> u8) -> Table {
    identity().map(of)
}

#[inline(always)]
fn look_up(pixels: &mut [u8], tables: &[Table; CHANNELS]) {
    for pixel in pixels.as_chunks_mut::<CHANNELS>().0 {
        for (value, table) in pixel.iter_mut().zip(tables) {
            *value = table[usize::from(*value)];
        }
    }
}

#[inline(always)]
fn look_up_alike(pixels: &mut [u8], table: &Table) {
    for value in pixels {
        *value = table[usize::from(*value)];
    }
}

/// How often each value occurs, by channel.
#[inline(always)]
fn histograms(pixels: &[u8]) -> [[u32; 256]; CHANNELS] {
    let mut counts = [[0; 256]; CHANNELS];
    for pixel in pixels.as_chunks::<CHANNELS>().0 {
        for (&value, counts) in pixel.iter().zip(&mut counts) {
            counts[usize::from(value)] += 1;
        }
    }
    counts
}

#[inline(always)]
fn auto_contrast(pixels: &mut [u8]) {
    /// Pixels of a block, whose extremes are found lane by lane.
    const BLOCK: usize = 32 * CHANNELS;
    let (mut low, mut high) = ([u8::MAX; BLOCK], [0; BLOCK]);
    let (blocks, rest) = pixels.as_chunks::<BLOCK>();
    for block in blocks {
        for (lane, &value) in block.iter().enumerate() {
            low[lane] = low[lane].min(value);
            high[lane] = high[lane].max(value);
        }
    }
    for (lane, &value) in rest.iter().enumerate() {
        low[lane] = low[lane].min(value);
        high[lane] = high[lane].max(value);
    }
    let tables = std::array::from_fn(|channel| {
        let lanes = || (channel..BLOCK).step_by(CHANNELS);
        let low = lanes().map(|lane| low[lane]).min().unwrap_or(0);
        let high = lanes().map(|lane| high[lane]).max().unwrap_or(0);
        stretch(low, high)
    });
    look_up(pixels, &tables);
}

fn stretch(low: u8, high: u8) -> Table {
    if high <= low {
        return identity();
    }
    let scale = 255.0 / f64::from(high - low);
    let offset = -f64::from(low) * scale;
    table(|value| truncate(f64::from(value) * scale + offset))
}

/// Clipped to a byte, and what is behind the point dropped.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates")]
#[inline(always)]
pub(crate) fn truncate(value: f64) -> u8 {
    value as u8
}

fn equalize(pixels: &mut [u8]) {
    let tables = histograms(pixels).map(|counts| flatten(&counts));
    look_up(pixels, &tables);
}

fn flatten(counts: &[u32; 256]) -> Table {
    let pixels: u32 = counts.iter().sum();
    let last = counts.iter().rev().find(|&&count| count > 0).copied().unwrap_or(0);
    // All pixels alike give 0 too.
    let step = (pixels - last) / 255;
    if step == 0 {
        return identity();
    }
    let mut before = step / 2;
    std::array::from_fn(|value| {
        let level = (before / step).min(255);
        before += counts[value];
        level.to_le_bytes()[0]
    })
}

#[inline(always)]
fn posterize(pixels: &mut [u8], bits: u32) {
    let mask = 0xFF_u32.checked_shl(8_u32.saturating_sub(bits)).unwrap_or(0).to_le_bytes()[0];
    pixels.iter_mut().for_each(|value| *value &= mask);
}

#[inline(always)]
fn solarize(pixels: &mut [u8], threshold: u32) {
    let Ok(threshold) = u8::try_from(threshold) else { return };
    for value in pixels {
        *value = if *value < threshold { *value } else { 255 - *value };
    }
}

#[inline(always)]
fn solarize_add(pixels: &mut [u8], add: u32) {
    let add = u8::try_from(add).unwrap_or(u8::MAX);
    for value in pixels {
        *value = if *value < 128 { value.saturating_add(add) } else { *value };
    }
}

/// `from` at 0, `to` at 1, and beyond 1 on the same line.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates")]
#[inline(always)]
fn blend(from: i32, to: i32, factor: f32) -> u8 {
    // Both and their difference are below 2^24: exact in f32.
    (from as f32 + factor * (to - from) as f32) as u8
}

fn blend_with_value(pixels: &mut [u8], value: u8, factor: f32) {
    look_up_alike(pixels, &table(|pixel| blend(value.into(), pixel.into(), factor)));
}

/// Pillow's luma of a pixel.
#[inline(always)]
fn grey([red, green, blue]: [u8; CHANNELS]) -> i32 {
    let [red, green, blue] = [red, green, blue].map(i32::from);
    (19_595 * red + 38_470 * green + 7_471 * blue + 32_768) >> 16
}

#[inline(always)]
fn color(pixels: &mut [u8], factor: f32) {
    for pixel in pixels.as_chunks_mut::<CHANNELS>().0 {
        let grey = grey(*pixel);
        *pixel = pixel.map(|value| blend(grey, value.into(), factor));
    }
}

#[inline(always)]
fn contrast(pixels: &mut [u8], factor: f32) {
    let (colours, _) = pixels.as_chunks::<CHANNELS>();
    let total: i64 = colours.iter().map(|&pixel| i64::from(grey(pixel))).sum();
    let mean = truncate(total as f64 / colours.len() as f64 + 0.5);
    blend_with_value(pixels, mean, factor);
}

/// The border of one pixel has no smoothed counterpart and stays.
#[inline(always)]
fn sharpness(pixels: &mut [u8], width: usize, factor: f32, scratch: &mut Vec<u8>) {
    let stride = width * CHANNELS;
    if width < 3 || pixels.len() < 3 * stride {
        return;
    }
    scratch.clear();
    scratch.extend_from_slice(pixels);
    let inner = stride - 2 * CHANNELS;
    let rows = pixels.chunks_exact_mut(stride).skip(1);
    for (row, window) in rows.zip(scratch.windows(3 * stride).step_by(stride)) {
        // The nine neighbours of the inner pixels, as slices of equal length.
        let near = |row: usize, column: usize| &window[row * stride + column * CHANNELS..][..inner];
        let ([a, b, c], [d, e, f]) =
            ([near(0, 0), near(0, 1), near(0, 2)], [near(1, 0), near(1, 1), near(1, 2)]);
        let [g, h, i] = [near(2, 0), near(2, 1), near(2, 2)];
        for (at, value) in row[CHANNELS..][..inner].iter_mut().enumerate() {
            let ring = [a, b, c, d, f, g, h, i];
            let ring: i32 = ring.iter().map(|row| i32::from(row[at])).fold(0, i32::wrapping_add);
            let centre = i32::from(e[at]);
            // The weighted mean, rounded: it is never half-way, since 13 is odd.
            let smooth = ring.wrapping_add(5 * centre).wrapping_mul(2).wrapping_add(13) / 26;
            *value = blend(smooth, centre, factor);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::warp::Reads;

    const FILL: [u8; 3] = [124, 116, 104];

    fn applied(operation: Operation, pixels: &[u8], width: usize) -> Vec<u8> {
        let mut pixels = pixels.to_vec();
        operation.apply(&mut pixels, width, FILL, &mut Vec::new());
        pixels
    }

    #[test]
    fn posterising_to_no_bits_gives_black() {
        assert_eq!(applied(Operation::Posterize { bits: 0 }, &[255, 7, 9], 1), [0; 3]);
        assert_eq!(applied(Operation::Posterize { bits: 1 }, &[255, 7, 129], 1), [128, 0, 128]);
    }

    #[test]
    fn solarising_from_256_on_changes_nothing() {
        assert_eq!(applied(Operation::Solarize { threshold: 256 }, &[0, 7, 255], 1), [0, 7, 255]);
        assert_eq!(applied(Operation::Solarize { threshold: 7 }, &[0, 7, 255], 1), [0, 248, 0]);
    }

    #[test]
    fn auto_contrast_stretches_each_channel() {
        let pixels = [10, 0, 5, 20, 255, 5];
        assert_eq!(applied(Operation::AutoContrast, &pixels, 2), [0, 0, 5, 255, 255, 5]);
    }

    #[test]
    fn a_translation_by_whole_pixels_moves_them() {
        let pixels: Vec<u8> = (0..4 * 2 * 3).map(|at| at * 9).collect();
        let moved = applied(Operation::TranslateX { fraction: 0.25 }, &pixels, 4);
        assert_eq!(moved[..9], pixels[3..12]);
        assert_eq!(moved[9..12], FILL);
        let moved = applied(Operation::TranslateY { fraction: -0.5 }, &pixels, 4);
        assert_eq!(moved[12..], pixels[..12]);
        assert_eq!(moved[..3], FILL);
    }

    #[test]
    fn a_full_turn_is_none() {
        let pixels: Vec<u8> = (0..6 * 5 * 3).map(|at| at * 2).collect();
        assert_eq!(applied(Operation::Rotate { degrees: 360.0 }, &pixels, 6), pixels);
        let back = applied(Operation::Rotate { degrees: 180.0 }, &pixels, 6);
        let (reversed, _) = pixels.as_chunks::<3>();
        let reversed: Vec<u8> = reversed.iter().rev().flatten().copied().collect();
        assert_eq!(back, reversed);
    }

    fn any_operation() -> impl Strategy<Value = Operation> {
        (0usize..15, 0.0..=10.0_f64, any::<bool>()).prop_map(|(kind, level, negative)| {
            crate::rand_augment::KINDS[kind].at_level(level, negative)
        })
    }

    proptest! {
        #[test]
        fn a_factor_of_one_changes_nothing(pixels in prop::collection::vec(any::<u8>(), 36..=36)) {
            for operation in [
                Operation::Color { factor: 1.0 },
                Operation::Contrast { factor: 1.0 },
                Operation::Brightness { factor: 1.0 },
                Operation::Sharpness { factor: 1.0 },
                Operation::ShearX { factor: 0.0 },
                Operation::ShearY { factor: 0.0 },
                Operation::TranslateX { fraction: 0.0 },
                Operation::Rotate { degrees: 0.0 },
            ] {
                prop_assert_eq!(&applied(operation, &pixels, 4), &pixels);
            }
        }

        #[test]
        fn any_operation_takes_any_size(
            operation in any_operation(), width in 1usize..9, height in 1usize..9, value: u8,
        ) {
            let pixels: Vec<u8> =
                (0..width * height * 3).map(|at| value.wrapping_mul(at.to_le_bytes()[0])).collect();
            prop_assert_eq!(applied(operation, &pixels, width).len(), pixels.len());
        }

        #[test]
        fn shortcuts_and_vectors_agree_with_the_definition(
            operation in any_operation(), width in 1usize..40, height in 1usize..30, seed: u8,
        ) {
            let pixels: Vec<u8> = (0..width * height * 3)
                .map(|at| (at * at + usize::from(seed)).to_le_bytes()[0])
                .collect();
            let Some(affine) = operation.affine(width, height) else { return Ok(()) };
            let mut expected = vec![0; pixels.len()];
            let source = View::new(&pixels, width, height);
            warp::warp_scalar(source, affine, Reads::Square, FILL, &mut expected);
            prop_assert!(applied(operation, &pixels, width) == expected);
        }
    }
}
