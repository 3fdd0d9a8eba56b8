//! Normalisation of eight pixels at a time.
//!
//! `(v / 255 - mean) / std` in single precision has two divisions, which take long. A quotient is found
//! instead by multiplying with the reciprocal and correcting the result once by its remainder, which a
//! fused multiplication and addition has exactly. That is nearly always the rounded quotient; whether it
//! is for all 256 values, [`Division::exact`] tries out beforehand.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use crate::image::CHANNELS;

/// What a channel is divided by and what is taken from it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Division {
    mean: f32,
    std: f32,
}

/// Pixels at a time.
pub(crate) const EIGHT: usize = 8;

/// Bytes that are read for eight pixels: two loads of sixteen, twelve apart.
pub(crate) const READ: usize = 28;

const LARGEST: f32 = 255.0;

impl Division {
    /// For this mean and standard deviation, if the processor has what it takes and the results are
    /// those of `table`, all of them.
    pub(crate) fn exact(mean: f32, std: f32, table: &[f32; 256]) -> Option<Self> {
        let here = Self { mean, std };
        let same = (0..=255_u8)
            .zip(table)
            .all(|(value, expected)| here.of(f32::from(value)).to_bits() == expected.to_bits());
        (is_available() && same).then_some(here)
    }

    /// What the vectors compute, one at a time.
    fn of(self, value: f32) -> f32 {
        let share = quotient(value, LARGEST, 1.0 / LARGEST);
        quotient(share - self.mean, self.std, 1.0 / self.std)
    }
}

fn quotient(value: f32, by: f32, reciprocal: f32) -> f32 {
    let near = value * reciprocal;
    let rest = (-near).mul_add(by, value);
    rest.mul_add(reciprocal, near)
}

#[cfg(target_arch = "x86_64")]
fn is_available() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
}

#[cfg(not(target_arch = "x86_64"))]
fn is_available() -> bool {
    false
}

/// Normalises the first pixels of an image to planes, and says how many: whole eights that have
/// [`READ`] bytes from their first on.
///
/// # Panics
/// If a plane is shorter than the image.
#[cfg(target_arch = "x86_64")]
pub(crate) fn normalize(
    image: &[u8],
    planes: [&mut [f32]; CHANNELS],
    divisions: &[Division; CHANNELS],
) -> usize {
    let pixels = image.len() / CHANNELS;
    assert!(planes.iter().all(|plane| plane.len() >= pixels), "room for every pixel");
    let eights = (image.len() + EIGHT * CHANNELS).saturating_sub(READ) / (EIGHT * CHANNELS);
    let eights = eights.min(pixels / EIGHT);
    // SAFETY: a division is only made where AVX2 and FMA are; the last of the eights begins READ bytes
    // or more before the image's end, and each plane has room for all of them.
    unsafe { eights_of_pixels(image, planes, divisions, eights) };
    eights * EIGHT
}

#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn normalize(_: &[u8], _: [&mut [f32]; CHANNELS], _: &[Division; CHANNELS]) -> usize {
    0
}

/// # Safety
/// The processor has AVX2 and FMA. `image` has [`READ`] bytes from the first pixel of each of `eights` on,
/// and each plane has `eights * 8` values.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn eights_of_pixels(
    image: &[u8],
    planes: [&mut [f32]; CHANNELS],
    divisions: &[Division; CHANNELS],
    eights: usize,
) {
    // Four pixels are in each half; a channel's bytes become 32-bit numbers.
    let first = _mm256_setr_epi8(
        0, -1, -1, -1, 3, -1, -1, -1, 6, -1, -1, -1, 9, -1, -1, -1, //
        0, -1, -1, -1, 3, -1, -1, -1, 6, -1, -1, -1, 9, -1, -1, -1,
    );
    let ones = _mm256_setr_epi32(1, 1, 1, 1, 1, 1, 1, 1);
    // Only the lowest byte of a number has an index that is not negative.
    let second = _mm256_add_epi32(first, ones);
    let places = [first, second, _mm256_add_epi32(second, ones)];
    let mut from = image.as_ptr();
    let mut to = planes.map(<[f32]>::as_mut_ptr);
    for _ in 0..eights {
        // SAFETY: 28 bytes follow.
        let lower = unsafe { _mm_loadu_si128(from.cast()) };
        // SAFETY: likewise.
        let upper = unsafe { _mm_loadu_si128(from.wrapping_add(12).cast()) };
        let both = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(lower), upper);
        for channel in 0..CHANNELS {
            let values = _mm256_cvtepi32_ps(_mm256_shuffle_epi8(both, places[channel]));
            let Division { mean, std } = divisions[channel];
            let share = quotients(values, LARGEST);
            let results = quotients(_mm256_sub_ps(share, _mm256_set1_ps(mean)), std);
            // SAFETY: the plane has room for eight more.
            unsafe { _mm256_storeu_ps(to[channel], results) };
            to[channel] = to[channel].wrapping_add(EIGHT);
        }
        from = from.wrapping_add(EIGHT * CHANNELS);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
#[inline]
fn quotients(values: __m256, by: f32) -> __m256 {
    let (by, reciprocal) = (_mm256_set1_ps(by), _mm256_set1_ps(1.0 / by));
    let near = _mm256_mul_ps(values, reciprocal);
    let rest = _mm256_fnmadd_ps(near, by, values);
    _mm256_fmadd_ps(rest, reciprocal, near)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usual_settings_can_be_computed_exactly() {
        let settings = [(0.485, 0.229), (0.456, 0.224), (0.406, 0.225), (0.5, 0.5), (0.0, 1.0)];
        for (mean, std) in settings {
            let values: [u8; 256] = std::array::from_fn(|value| value.to_le_bytes()[0]);
            let table = values.map(|value| (f32::from(value) / 255.0 - mean) / std);
            let division = Division { mean, std };
            for (value, expected) in values.into_iter().zip(table) {
                assert_eq!(division.of(value.into()).to_bits(), expected.to_bits(), "{value}");
            }
        }
    }
}
