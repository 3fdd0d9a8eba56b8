//! Bicubic resizing, to the bit as Pillow 9.5 does it.
//!
//! Kernel a = -0.5, widened when shrinking (antialiased); weights in fixed point with 22 bits; the
//! horizontal pass first, eight bits between the passes; an axis whose size does not change is left
//! alone. The sums are integers, so any order of summation gives the same bytes.

use crate::image::{CHANNELS, View};

/// Bits after the binary point of a weight: 32, less 8 of the pixel and 2 of headroom.
const PRECISION_BITS: u32 = 22;

/// Half the width of the kernel at unit scale.
const SUPPORT: f64 = 2.0;

/// Resizes images. Keeps its buffers between images.
#[derive(Debug, Default)]
pub struct Resizer {
    horizontal: Taps,
    vertical: Taps,
    between: Vec<u8>,
    sums: Vec<i32>,
}

impl Resizer {
    /// A resizer without buffers yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Resizes `source` to `width` × `height` into `target`, `[height, width, 3]` bytes.
    ///
    /// # Panics
    /// If the length of `target` is another, or a side is 0.
    pub fn resize(&mut self, source: View<'_>, width: usize, height: usize, target: &mut [u8]) {
        assert_eq!(target.len(), width * height * CHANNELS, "bytes of the resized image");
        assert!(width > 0 && height > 0, "an image has at least one pixel");
        match (source.width() == width, source.height() == height) {
            (true, true) => source.copy_to(target),
            (false, true) => {
                self.horizontal.compute(source.width(), width);
                resize_rows(source, &self.horizontal, target);
            }
            (true, false) => {
                self.vertical.compute(source.height(), height);
                resize_columns(source, &self.vertical, &mut self.sums, target);
            }
            (false, false) => {
                self.horizontal.compute(source.width(), width);
                self.vertical.compute(source.height(), height);
                self.between.resize(source.height() * width * CHANNELS, 0);
                resize_rows(source, &self.horizontal, &mut self.between);
                let between = View::new(&self.between, width, source.height());
                resize_columns(between, &self.vertical, &mut self.sums, target);
            }
        }
    }
}

/// For each output position of an axis, which inputs it is made of and with what weights.
#[derive(Debug, Default)]
struct Taps {
    /// First input and number of inputs.
    spans: Vec<(usize, usize)>,
    /// The weights of all positions, one after another.
    weights: Vec<i32>,
    exact: Vec<f64>,
}

impl Taps {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the definition truncates, and every value is far below the types' limits"
    )]
    fn compute(&mut self, input: usize, output: usize) {
        self.spans.clear();
        self.weights.clear();
        let scale = input as f64 / output as f64;
        let filter_scale = scale.max(1.0);
        let support = SUPPORT * filter_scale;
        for position in 0..output {
            let centre = (position as f64 + 0.5) * scale;
            let first = (centre - support + 0.5).max(0.0) as usize;
            let end = ((centre + support + 0.5) as usize).min(input);
            self.exact.clear();
            self.exact.extend(
                (first..end).map(|tap| kernel((tap as f64 - centre + 0.5) * (1.0 / filter_scale))),
            );
            let total: f64 = self.exact.iter().sum();
            self.spans.push((first, end - first));
            self.weights.extend(self.exact.iter().map(|weight| {
                let fixed = weight / total * f64::from(1 << PRECISION_BITS);
                (fixed + 0.5_f64.copysign(fixed)) as i32
            }));
        }
    }

    /// First input and weights of each output position, in order.
    fn iter(&self) -> impl Iterator<Item = (usize, &[i32])> {
        let mut rest = self.weights.as_slice();
        self.spans.iter().map(move |&(first, count)| {
            let (weights, after) = rest.split_at(count);
            rest = after;
            (first, weights)
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

fn resize_rows(source: View<'_>, taps: &Taps, target: &mut [u8]) {
    let width = taps.spans.len();
    for (y, row) in target.chunks_exact_mut(width * CHANNELS).enumerate() {
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

fn resize_columns(source: View<'_>, taps: &Taps, sums: &mut Vec<i32>, target: &mut [u8]) {
    let bytes = source.width() * CHANNELS;
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
    }
}
