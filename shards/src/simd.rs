//! Resizing and moving pixels with AVX2: what `resize` and `warp` define, byte for byte.
//!
//! The functions are called only where [`is_available`] holds. On other processors the caller keeps to
//! the definition.
#![cfg_attr(
    target_arch = "x86_64",
    expect(
        unsafe_code,
        reason = "vector loads and stores take pointers; each is bounded by an assert"
    )
)]

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::{is_available, warp};
#[cfg(not(target_arch = "x86_64"))]
pub(crate) use nowhere::{is_available, resize_columns, resize_rows, warp};
#[cfg(target_arch = "x86_64")]
pub(crate) use resize::{resize_columns, resize_rows};

pub(crate) mod normalize;
#[cfg(target_arch = "x86_64")]
mod resize;

/// Runs `work`, compiled for the widest vectors that the processor has. Never changes a result: what
/// the compiler makes of integers and of IEEE arithmetic is the same for every width.
#[inline]
pub(crate) fn widest<R>(work: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    if is_available() {
        // SAFETY: AVX2 is there.
        return unsafe { avx2::run(work) };
    }
    work()
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;

    use crate::{
        image::{CHANNELS, View},
        warp::{Affine, Reads},
    };

    pub(crate) fn is_available() -> bool {
        is_x86_feature_detected!("avx2")
    }

    /// What is inlined into this function may use AVX2; what is not is none the worse.
    #[target_feature(enable = "avx2")]
    pub(super) fn run<R>(work: impl FnOnce() -> R) -> R {
        work()
    }

    /// `crate::warp::warp_scalar` with the red, green and blue of a pixel in the lanes of a vector.
    pub(crate) fn warp(
        source: View<'_>,
        affine: Affine,
        reads: Reads,
        fill: [u8; CHANNELS],
        target: &mut [u8],
    ) {
        assert!(is_available(), "chosen by whoever calls");
        let (width, height) = (source.width(), source.height());
        let stride = width * CHANNELS;
        assert_eq!(target.len(), stride * height, "bytes of the image");
        // The whole image in one piece: the kernels find rows by its width.
        let pixels = source.rows_on(0);
        assert!(pixels.len() == target.len(), "an image without gaps");
        for (y, row) in target.chunks_exact_mut(stride).enumerate() {
            // SAFETY: AVX2 is there, and `pixels` is `height` rows of `width` pixels.
            unsafe { warp_row(&source, pixels, &affine, reads, (y, fill), row) };
        }
    }

    /// # Safety
    /// The processor has AVX2. `pixels` are those of `source`, without gaps.
    #[target_feature(enable = "avx2")]
    unsafe fn warp_row(
        source: &View<'_>,
        pixels: &[u8],
        affine: &Affine,
        reads: Reads,
        (y, fill): (usize, [u8; CHANNELS]),
        target: &mut [u8],
    ) {
        let size = (source.width(), source.height());
        // Adding ones to a half is exact.
        let mut centre = [0.5, y as f64 + 0.5];
        for (x, out) in target.as_chunks_mut::<CHANNELS>().0.iter_mut().enumerate() {
            // SAFETY: the caller's duty.
            let inner = unsafe { inner_pixel(pixels, size, affine, reads, (x, y), centre) };
            *out = match inner {
                Some([red, green, blue, _]) => [red, green, blue],
                None => affine.pixel(source, reads, x, y).unwrap_or(fill),
            };
            centre[0] += 1.0;
        }
    }

    /// The pixel of the output at (`x`, `y`) if what it is made of lies well inside of the image.
    ///
    /// # Safety
    /// The processor has AVX2. `pixels` is `height` rows of `width` pixels without gaps.
    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn inner_pixel(
        pixels: &[u8],
        (width, height): (usize, usize),
        affine: &Affine,
        reads: Reads,
        (x, y): (usize, usize),
        centre: [f64; 2],
    ) -> Option<[u8; 4]> {
        let stride = width.wrapping_mul(CHANNELS);
        let start = pixels.as_ptr();
        let values = match reads {
            Reads::Row => {
                // Sixteen bytes are read for four pixels of three.
                let (first, at) = first_of_four(affine.column(centre), width, 2)?;
                let from = y.wrapping_mul(stride).wrapping_add(first.wrapping_mul(CHANNELS));
                // SAFETY: six pixels of this row follow from `first` on.
                unsafe { cubic_of_row(start.wrapping_add(from), at) }
            }
            Reads::Column => {
                if x + 1 >= width {
                    return None; // Four bytes are read for a pixel of three.
                }
                let (first, at) = first_of_four(affine.row(centre), height, 0)?;
                let from = first.wrapping_mul(stride).wrapping_add(x.wrapping_mul(CHANNELS));
                let from = start.wrapping_add(from);
                let four = [0, 1, 2, 3].map(|row: usize| {
                    let from = from.wrapping_add(row.wrapping_mul(stride));
                    // SAFETY: four rows follow from `first` on, and a pixel follows in each.
                    let pixel = unsafe { from.cast::<i32>().read_unaligned() };
                    _mm_cvtepu8_epi32(_mm_cvtsi32_si128(pixel))
                });
                cubic_of_pixels(four, at)
            }
            Reads::Square => {
                let (column, across) = first_of_four(affine.column(centre), width, 2)?;
                let (row, down) = first_of_four(affine.row(centre), height, 0)?;
                let from = row.wrapping_mul(stride).wrapping_add(column.wrapping_mul(CHANNELS));
                let from = start.wrapping_add(from);
                let four = [0, 1, 2, 3].map(|row: usize| {
                    let from = from.wrapping_add(row.wrapping_mul(stride));
                    // SAFETY: four rows follow from `row` on, and six pixels from `column` on in each.
                    unsafe { cubic_of_row(from, across) }
                });
                cubic(four, down)
            }
        };
        // Truncated towards zero, then clipped.
        let whole = _mm256_cvttpd_epi32(values);
        let bytes = _mm_packs_epi32(whole, whole);
        Some(_mm_cvtsi128_si32(_mm_packus_epi16(bytes, bytes)).to_le_bytes())
    }

    /// The first of the four positions about `position` and where between the second and the third it
    /// is, if all four and `more` after them are among the `length` there are.
    #[target_feature(enable = "avx2")]
    #[inline]
    #[expect(clippy::cast_sign_loss, reason = "checked")]
    fn first_of_four(position: f64, length: usize, more: usize) -> Option<(usize, f64)> {
        let position = position - 0.5;
        let floor = position.floor();
        let first = _mm_cvttsd_si32(_mm_set_sd(floor)).wrapping_sub(1);
        // Positions beyond the range of the conversion give its smallest number.
        let inside = first >= 0 && (first as usize).wrapping_add(4 + more) <= length;
        inside.then_some((first as usize, position - floor))
    }

    /// The cubic through four neighbours.
    ///
    /// # Safety
    /// The processor has AVX2, and `from` is good for 16 bytes.
    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn cubic_of_row(from: *const u8, at: f64) -> __m256d {
        // SAFETY: the caller's duty.
        let bytes = unsafe { _mm_loadu_si128(from.cast()) };
        let four = [
            _mm_cvtepu8_epi32(bytes),
            _mm_cvtepu8_epi32(_mm_srli_si128::<3>(bytes)),
            _mm_cvtepu8_epi32(_mm_srli_si128::<6>(bytes)),
            _mm_cvtepu8_epi32(_mm_srli_si128::<9>(bytes)),
        ];
        cubic_of_pixels(four, at)
    }

    /// The cubic through four pixels. Its coefficients are integers and as such exact.
    #[target_feature(enable = "avx2")]
    #[inline]
    fn cubic_of_pixels([v1, v2, v3, v4]: [__m128i; 4], at: f64) -> __m256d {
        let p2 = _mm_sub_epi32(v3, v1);
        let (rise, fall) = (_mm_sub_epi32(v1, v2), _mm_sub_epi32(v3, v4));
        let both = _mm_add_epi32(rise, fall);
        let p3 = _mm_add_epi32(rise, both);
        let p4 = _mm_sub_epi32(_mm_setzero_si128(), both);
        let [p1, p2, p3, p4] = [v2, p2, p3, p4].map(|integers| _mm256_cvtepi32_pd(integers));
        horner([p1, p2, p3, p4], at)
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    fn cubic([v1, v2, v3, v4]: [__m256d; 4], at: f64) -> __m256d {
        let p2 = _mm256_sub_pd(v3, v1);
        let rise = _mm256_sub_pd(v1, v2);
        let p3 = _mm256_sub_pd(_mm256_add_pd(_mm256_add_pd(rise, rise), v3), v4);
        let p4 = _mm256_add_pd(_mm256_sub_pd(_mm256_sub_pd(v2, v1), v3), v4);
        horner([v2, p2, p3, p4], at)
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    fn horner([p1, p2, p3, p4]: [__m256d; 4], at: f64) -> __m256d {
        let at = _mm256_set1_pd(at);
        let value = _mm256_add_pd(p3, _mm256_mul_pd(at, p4));
        let value = _mm256_add_pd(p2, _mm256_mul_pd(at, value));
        _mm256_add_pd(p1, _mm256_mul_pd(at, value))
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod nowhere {
    use crate::{
        image::View,
        resize::{Between, Taps},
        warp::{Affine, Reads},
    };

    pub(crate) fn is_available() -> bool {
        false
    }

    pub(crate) fn resize_rows(_: View<'_>, _: &Taps, _: &mut Between) {
        unreachable!("not available");
    }

    pub(crate) fn resize_columns(_: &Between, _: &Taps, _: usize, _: &mut [u8]) {
        unreachable!("not available");
    }

    pub(crate) fn warp(_: View<'_>, _: Affine, _: Reads, _: [u8; 3], _: &mut [u8]) {
        unreachable!("not available");
    }
}
