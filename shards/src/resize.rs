//! Bicubic resizing, to the bit as Pillow 9.5 does it.
//!
//! Kernel a = -0.5, widened when shrinking (antialiased); weights in fixed point with 22 bits; the
//! horizontal pass first, eight bits between the passes; an axis whose size does not change is left
//! alone. The sums are integers, so any order of summation gives the same bytes: what this file
//! defines one pixel at a time, `simd.rs` computes sixteen bytes at a time where it can.

use std::ops::Range;

use crate::{
    image::{CHANNELS, View},
    simd,
};

/// Bits after the binary point of a weight: 32, less 8 of the pixel and 2 of headroom.
pub(crate) const PRECISION_BITS: u32 = 22;

/// Half the width of the kernel at unit scale.
const SUPPORT: f64 = 2.0;

/// Some neighbouring positions of an axis that is resized from `input` to `output` pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Axis {
    input: usize,
    output: usize,
    first: usize,
    length: usize,
}

impl Axis {
    /// All positions.
    ///
    /// # Panics
    /// If a length is 0.
    #[must_use]
    pub fn whole(input: usize, output: usize) -> Self {
        Self::part(input, output, 0..output)
    }

    /// The positions `range` of the resized axis.
    ///
    /// # Panics
    /// If a length is 0 or `range` is empty or not inside.
    #[must_use]
    pub fn part(input: usize, output: usize, range: Range<usize>) -> Self {
        assert!(input > 0 && output > 0, "an image has at least one pixel");
        assert!(range.start < range.end && range.end <= output, "{range:?} of {output}");
        Self { input, output, first: range.start, length: range.end - range.start }
    }

    /// The input positions that these output positions are made of.
    #[must_use]
    pub fn footprint(&self) -> Range<usize> {
        let last = self.first + self.length - 1;
        if self.is_unchanged() {
            return self.first..last + 1;
        }
        self.taps(self.first).0..self.taps(last).1
    }

    fn is_unchanged(&self) -> bool {
        self.input == self.output
    }

    fn scale(&self) -> f64 {
        self.input as f64 / self.output as f64
    }

    fn centre(&self, position: usize) -> f64 {
        (position as f64 + 0.5) * self.scale()
    }

    /// First input of an output position, and the one after its last.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the definition truncates, and every value is far below the type's limit"
    )]
    fn taps(&self, position: usize) -> (usize, usize) {
        let support = SUPPORT * self.scale().max(1.0);
        let centre = self.centre(position);
        let first = (centre - support + 0.5).max(0.0) as usize;
        (first, ((centre + support + 0.5) as usize).min(self.input))
    }
}

/// Resizes images. Keeps its buffers between images.
#[derive(Debug)]
pub struct Resizer {
    horizontal: Taps,
    vertical: Taps,
    between: Between,
    sums: Vec<i32>,
    /// Whether the processor has what `simd.rs` needs.
    vectors: bool,
}

impl Default for Resizer {
    fn default() -> Self {
        Self { vectors: simd::is_available(), ..Self::scalar() }
    }
}

/// The image between the two passes: rows that begin `stride` bytes apart, with room after the last.
#[derive(Debug, Default)]
pub(crate) struct Between {
    pub(crate) pixels: Vec<u8>,
    pub(crate) stride: usize,
    pub(crate) rows: usize,
    /// Copies of source rows that end too early for a vector.
    pub(crate) tails: Vec<u8>,
}

impl Between {
    /// Unused bytes after each row and after the last: what a vector may touch beyond them.
    pub(crate) const SLACK: usize = 32;

    /// Rows that are made together; there is room for whole groups.
    pub(crate) const GROUP: usize = 4;

    fn prepare(&mut self, width: usize, rows: usize) {
        self.stride = (width * CHANNELS).next_multiple_of(Self::SLACK) + Self::SLACK;
        self.rows = rows;
        let bytes = self.stride * rows.next_multiple_of(Self::GROUP);
        if self.pixels.len() < bytes {
            self.pixels.resize(bytes, 0);
        }
    }

    pub(crate) fn row(&self, y: usize) -> &[u8] {
        &self.pixels[y * self.stride..][..self.stride]
    }
}

impl Resizer {
    /// A resizer without buffers yet, as fast as the processor allows.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A resizer that uses no vector instructions: the definition that the others are checked by.
    #[must_use]
    pub fn scalar() -> Self {
        Self {
            horizontal: Taps::default(),
            vertical: Taps::default(),
            between: Between::default(),
            sums: Vec::new(),
            vectors: false,
        }
    }

    /// Resizes `source` to `width` × `height` into `target`, `[height, width, 3]` bytes.
    ///
    /// # Panics
    /// If the length of `target` is another, or a side is 0.
    pub fn resize(&mut self, source: View<'_>, width: usize, height: usize, target: &mut [u8]) {
        let horizontal = Axis::whole(source.width(), width);
        let vertical = Axis::whole(source.height(), height);
        self.resize_part(source, horizontal, vertical, target);
    }

    /// The part `horizontal` × `vertical` of a resized image, of which `source` has the pixels that
    /// this part is made of: the [footprint](Axis::footprint) of both. `target` is
    /// `[vertical positions, horizontal positions, 3]` bytes.
    ///
    /// # Panics
    /// If `source` or `target` has another size.
    pub fn resize_part(
        &mut self,
        source: View<'_>,
        horizontal: Axis,
        vertical: Axis,
        target: &mut [u8],
    ) {
        let width = horizontal.length;
        assert_eq!(target.len(), width * vertical.length * CHANNELS, "bytes of the resized image");
        assert_eq!(source.width(), horizontal.footprint().len(), "columns of the source");
        assert_eq!(source.height(), vertical.footprint().len(), "rows of the source");
        if horizontal.is_unchanged() && vertical.is_unchanged() {
            source.copy_to(target);
            return;
        }
        self.between.prepare(width, source.height());
        if horizontal.is_unchanged() {
            for (y, row) in self.between.pixels.chunks_exact_mut(self.between.stride).enumerate() {
                if y < source.height() {
                    row[..width * CHANNELS].copy_from_slice(source.row(y));
                }
            }
        } else {
            self.horizontal.compute(horizontal);
            if self.vectors {
                simd::resize_rows(source, &self.horizontal, &mut self.between);
            } else {
                resize_rows(source, &self.horizontal, &mut self.between);
            }
        }
        if vertical.is_unchanged() {
            for (y, row) in target.chunks_exact_mut(width * CHANNELS).enumerate() {
                row.copy_from_slice(&self.between.row(y)[..width * CHANNELS]);
            }
            return;
        }
        self.vertical.compute(vertical);
        if self.vectors {
            simd::resize_columns(&self.between, &self.vertical, width * CHANNELS, target);
        } else {
            resize_columns(&self.between, &self.vertical, width, &mut self.sums, target);
        }
    }
}

/// For each output position of an axis, which inputs it is made of and with what weights.
#[derive(Debug, Default)]
pub(crate) struct Taps {
    /// First input, counted from the footprint's, and number of inputs, of each output position.
    pub(crate) spans: Vec<(usize, usize)>,
    /// The weights of all positions, each position's filled with zeros to a multiple of four.
    weights: Vec<i32>,
    /// The same in two parts of 16 bits: `weight = high * 2048 + low`, and `0 <= low < 2048`.
    pub(crate) high: Vec<i16>,
    pub(crate) low: Vec<i16>,
    exact: Vec<f64>,
}

/// Bits of the low part of a weight.
pub(crate) const LOW_BITS: u32 = 11;

impl Taps {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the definition truncates, and a weight of 24 bits shifted by 11 has 13"
    )]
    fn compute(&mut self, axis: Axis) {
        self.spans.clear();
        self.weights.clear();
        let shrink = 1.0 / axis.scale().max(1.0);
        let origin = axis.taps(axis.first).0;
        for position in axis.first..axis.first + axis.length {
            let centre = axis.centre(position);
            let (first, end) = axis.taps(position);
            self.exact.clear();
            self.exact.extend((first..end).map(|tap| kernel((tap as f64 - centre + 0.5) * shrink)));
            let total: f64 = self.exact.iter().sum();
            self.spans.push((first - origin, end - first));
            self.weights.extend(self.exact.iter().map(|weight| {
                let fixed = weight / total * f64::from(1 << PRECISION_BITS);
                (fixed + 0.5_f64.copysign(fixed)) as i32
            }));
            self.weights.resize(self.weights.len().next_multiple_of(4), 0);
        }
        self.high.clear();
        self.high.extend(self.weights.iter().map(|weight| (weight >> LOW_BITS) as i16));
        self.low.clear();
        self.low.extend(self.weights.iter().map(|weight| (weight & ((1 << LOW_BITS) - 1)) as i16));
    }

    /// First input and weights of each output position, in order.
    fn iter(&self) -> impl Iterator<Item = (usize, &[i32])> {
        let mut rest = self.weights.as_slice();
        self.spans.iter().map(move |&(first, count)| {
            let (weights, after) = rest.split_at(count.next_multiple_of(4));
            rest = after;
            (first, &weights[..count])
        })
    }
}

/// The cubic convolution kernel with a = -0.5 (Keys, 1981).
fn kernel(distance: f64) -> f64 {
    const A: f64 = -0.5;
    let x = distance.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

/// Half a unit of the last place kept, so that the final shift rounds.
const HALF: i32 = 1 << (PRECISION_BITS - 1);

/// The weights' absolute values add up to less than 2, so a sum stays below 2 * 255 * 2^22 < 2^31:
/// wrapping arithmetic never wraps here, and lets the compiler vectorise.
fn accumulate(sum: i32, weight: i32, value: u8) -> i32 {
    sum.wrapping_add(weight.wrapping_mul(i32::from(value)))
}

#[expect(clippy::cast_sign_loss, reason = "clamped to 0..=255")]
fn to_byte(sum: i32) -> u8 {
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

fn resize_rows(source: View<'_>, taps: &Taps, target: &mut Between) {
    let stride = target.stride;
    for (y, row) in target.pixels.chunks_exact_mut(stride).take(source.height()).enumerate() {
        let (pixels, _) = source.row(y).as_chunks::<CHANNELS>();
        let (row, _) = row.as_chunks_mut::<CHANNELS>();
        for (out, (first, weights)) in row.iter_mut().zip(taps.iter()) {
            let mut sums = [HALF; CHANNELS];
            for (pixel, &weight) in pixels[first..].iter().zip(weights) {
                for (sum, &value) in sums.iter_mut().zip(pixel) {
                    *sum = accumulate(*sum, weight, value);
                }
            }
            *out = sums.map(to_byte);
        }
    }
}

fn resize_columns(
    source: &Between,
    taps: &Taps,
    width: usize,
    sums: &mut Vec<i32>,
    target: &mut [u8],
) {
    let bytes = width * CHANNELS;
    for (row, (first, weights)) in target.chunks_exact_mut(bytes).zip(taps.iter()) {
        sums.clear();
        sums.resize(bytes, HALF);
        for (y, &weight) in (first..).zip(weights) {
            for (sum, &value) in sums.iter_mut().zip(source.row(y)) {
                *sum = accumulate(*sum, weight, value);
            }
        }
        for (out, &sum) in row.iter_mut().zip(&*sums) {
            *out = to_byte(sum);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::image::Rect;

    fn resized(pixels: &[u8], from: (usize, usize), to: (usize, usize)) -> Vec<u8> {
        let mut target = vec![0; to.0 * to.1 * CHANNELS];
        Resizer::new().resize(View::new(pixels, from.0, from.1), to.0, to.1, &mut target);
        target
    }

    fn grey(values: &[u8]) -> Vec<u8> {
        values.iter().flat_map(|&value| [value; 3]).collect()
    }

    #[test]
    fn doubling_a_step_overshoots_as_bicubic_does() {
        // Weights at quarter positions: -9/128, 29/128 ... of the kernel, worked out by hand.
        let row = resized(&grey(&[0, 0, 255, 255]), (4, 1), (8, 1));
        assert_eq!(row, grey(&[0, 0, 0, 52, 203, 255, 255, 255]));
    }

    #[test]
    fn halving_averages_with_negative_lobes() {
        let row = resized(&grey(&[0, 0, 0, 255, 255, 255]), (6, 1), (3, 1));
        assert_eq!(row[3..6], [128; 3]);
        let column = resized(&grey(&[0, 0, 0, 255, 255, 255]), (1, 6), (1, 3));
        assert_eq!(column, row);
    }

    #[test]
    fn the_same_size_is_a_copy() {
        let pixels: Vec<u8> = (0..90).collect();
        assert_eq!(resized(&pixels, (6, 5), (6, 5)), pixels);
    }

    proptest! {
        #[test]
        fn a_plain_image_stays_plain(
            value: u8, from in (1usize..40, 1usize..40), to in (1usize..40, 1usize..40),
        ) {
            let pixels = vec![value; from.0 * from.1 * 3];
            prop_assert!(resized(&pixels, from, to).iter().all(|&byte| byte == value));
        }

        #[test]
        fn vectors_compute_what_the_definition_says(
            from in (1usize..90, 1usize..60), to in (1usize..70, 1usize..50), seed: u32,
        ) {
            let mut state = seed;
            let pixels: Vec<u8> = (0..from.0 * from.1 * 3)
                .map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    // Many extremes, so that sums overshoot.
                    let value = state.to_le_bytes()[3];
                    if value < 60 { 0 } else if value > 200 { 255 } else { value }
                })
                .collect();
            let mut expected = vec![0; to.0 * to.1 * 3];
            let source = View::new(&pixels, from.0, from.1);
            Resizer::scalar().resize(source, to.0, to.1, &mut expected);
            prop_assert!(resized(&pixels, from, to) == expected);
        }

        #[test]
        fn a_part_is_the_part_of_the_whole(
            from in (1usize..60, 1usize..60), to in (2usize..40, 2usize..40),
            start in (any::<prop::sample::Index>(), any::<prop::sample::Index>()),
        ) {
            let pixels: Vec<u8> =
                (0..from.0 * from.1 * 3).map(|at| (at * 37 % 251).to_le_bytes()[0]).collect();
            let whole = resized(&pixels, from, to);
            let (left, top) = (start.0.index(to.0), start.1.index(to.1));
            let axes =
                (Axis::part(from.0, to.0, left..to.0), Axis::part(from.1, to.1, top..to.1));
            let (columns, rows) = (axes.0.footprint(), axes.1.footprint());
            let needed = Rect {
                left: columns.start, top: rows.start, width: columns.len(), height: rows.len(),
            };
            let mut part = vec![0; (to.0 - left) * (to.1 - top) * 3];
            let source = View::new(&pixels, from.0, from.1).crop(needed);
            Resizer::new().resize_part(source, axes.0, axes.1, &mut part);
            let rect = Rect { left, top, width: to.0 - left, height: to.1 - top };
            let mut expected = vec![0; part.len()];
            View::new(&whole, to.0, to.1).crop(rect).copy_to(&mut expected);
            prop_assert!(part == expected);
        }
    }
}
