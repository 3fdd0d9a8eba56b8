//! Resizing and moving pixels with AVX2: what `resize` and `warp` define, byte for byte.
//!
//! A weight of 22 bits does not fit the processor's 16-bit multiplier. It is split into
//! `high * 2048 + low`; each part is multiplied by the pixels and summed for itself, in 32 bits and
//! without loss, and the two sums are put together at the end. Integer sums do not depend on their
//! order, so the result is the definition's.
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
pub(crate) use avx2::{is_available, resize_columns, resize_rows, warp};
#[cfg(not(target_arch = "x86_64"))]
pub(crate) use nowhere::{is_available, resize_columns, resize_rows, warp};

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
        resize::{Between, LOW_BITS, PRECISION_BITS, Taps},
        warp::{Affine, Reads},
    };

    /// Rows that share the loading of a weight.
    const GROUP: usize = Between::GROUP;

    /// Pixels that are multiplied at once, and so the multiple that weights are filled to.
    const QUAD: usize = 4;

    const HALF: i32 = 1 << (PRECISION_BITS - 1);
    const SHIFT: i32 = PRECISION_BITS as i32;
    const LOW_SHIFT: i32 = LOW_BITS as i32;

    pub(crate) fn is_available() -> bool {
        is_x86_feature_detected!("avx2")
    }

    /// What is inlined into this function may use AVX2; what is not is none the worse.
    #[target_feature(enable = "avx2")]
    pub(super) fn run<R>(work: impl FnOnce() -> R) -> R {
        work()
    }

    /// The horizontal pass: `target` has room for the rows of `source`.
    pub(crate) fn resize_rows(source: View<'_>, taps: &Taps, target: &mut Between) {
        assert!(is_available(), "chosen by whoever calls");
        let height = source.height();
        // What the vectors of one row may touch: sixteen bytes from each quad's first pixel on.
        let reach = taps
            .spans
            .iter()
            .map(|&(first, count)| (first + count.next_multiple_of(QUAD) - QUAD) * CHANNELS + 16);
        let reach = reach.max().expect("an axis has positions");
        let weights: usize = taps.spans.iter().map(|span| span.1.next_multiple_of(QUAD)).sum();
        assert!(taps.high.len() == weights && taps.low.len() == weights, "whole quads of weights");
        let room = taps.spans.len() * CHANNELS + 1;
        assert!(target.rows == height && target.stride >= room, "room for a row and one byte");

        let Between { pixels, stride, tails, .. } = target;
        let groups = pixels.chunks_mut(*stride * GROUP).zip((0..height).step_by(GROUP));
        for (rows_out, y) in groups {
            let rows: [&[u8]; GROUP] =
                std::array::from_fn(|row| source.rows_on((y + row).min(height - 1)));
            assert!(rows_out.len() == GROUP * *stride, "room for the group");
            if rows.iter().all(|row| row.len() >= reach) {
                // SAFETY: AVX2 is there; each row has `reach` bytes, the weights are whole quads, and
                // the group's output rows have one byte more than their pixels take.
                unsafe { group_of_rows(rows, taps, rows_out, *stride) };
                continue;
            }
            // The last rows of an image may end before a vector does: give them a longer end.
            tails.resize(GROUP * reach, 0);
            for (tail, row) in tails.chunks_exact_mut(reach).zip(rows) {
                let there = row.len().min(reach);
                tail[..there].copy_from_slice(&row[..there]);
            }
            let rows = std::array::from_fn(|row| &tails[row * reach..][..reach]);
            // SAFETY: as above; each row now has `reach` bytes.
            unsafe { group_of_rows(rows, taps, rows_out, *stride) };
        }
    }

    /// # Safety
    /// The processor has AVX2. Each of `rows` reaches 16 bytes beyond the first pixel of every quad of
    /// `taps`, whose weights are whole quads. `target` has as many rows of `stride` bytes, each longer
    /// than its pixels.
    #[target_feature(enable = "avx2")]
    unsafe fn group_of_rows(rows: [&[u8]; GROUP], taps: &Taps, target: &mut [u8], stride: usize) {
        // Of four pixels, the first two go to the lower half and the others to the upper one, and there
        // a channel of one stands beside that of the next, each as 16 bits.
        let pairs = _mm256_setr_epi8(
            0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1, //
            6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1,
        );
        let spread = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
        let half = _mm_set1_epi32(HALF);
        let (mut high, mut low) = (taps.high.as_ptr(), taps.low.as_ptr());
        let mut out = target.as_mut_ptr();
        for &(first, taps) in &taps.spans {
            let mut sums_high = [_mm256_setzero_si256(); GROUP];
            let mut sums_low = [_mm256_setzero_si256(); GROUP];
            let mut offset = first.wrapping_mul(CHANNELS);
            for _ in 0..taps.div_ceil(QUAD) {
                // SAFETY: the weights are whole quads, and as many quads are taken as there are.
                let weights_high = unsafe { _mm_loadl_epi64(high.cast()) };
                // SAFETY: likewise.
                let weights_low = unsafe { _mm_loadl_epi64(low.cast()) };
                let weights_high =
                    _mm256_permutevar8x32_epi32(_mm256_castsi128_si256(weights_high), spread);
                let weights_low =
                    _mm256_permutevar8x32_epi32(_mm256_castsi128_si256(weights_low), spread);
                for row in 0..GROUP {
                    let from = rows[row].as_ptr().wrapping_add(offset);
                    // SAFETY: the row reaches 16 bytes beyond the first pixel of every quad.
                    let four = unsafe { _mm_loadu_si128(from.cast()) };
                    let four = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(four), pairs);
                    let by_high = _mm256_madd_epi16(four, weights_high);
                    let by_low = _mm256_madd_epi16(four, weights_low);
                    sums_high[row] = _mm256_add_epi32(sums_high[row], by_high);
                    sums_low[row] = _mm256_add_epi32(sums_low[row], by_low);
                }
                high = high.wrapping_add(QUAD);
                low = low.wrapping_add(QUAD);
                offset = offset.wrapping_add(QUAD * CHANNELS);
            }
            for row in 0..GROUP {
                let high = _mm256_slli_epi32::<LOW_SHIFT>(sums_high[row]);
                let sum = _mm256_add_epi32(high, sums_low[row]);
                let upper = _mm256_extracti128_si256::<1>(sum);
                let sum = _mm_add_epi32(_mm_add_epi32(_mm256_castsi256_si128(sum), upper), half);
                let sum = _mm_srai_epi32::<SHIFT>(sum);
                let bytes = _mm_packs_epi32(sum, sum);
                let pixel = _mm_cvtsi128_si32(_mm_packus_epi16(bytes, bytes));
                let to = out.wrapping_add(row.wrapping_mul(stride));
                // SAFETY: a row has room for its pixels and the one byte that is written beyond the
                // last; between pixels the next one overwrites it.
                unsafe { to.cast::<i32>().write_unaligned(pixel) };
            }
            out = out.wrapping_add(CHANNELS);
        }
    }

    /// The vertical pass: the first `bytes` bytes of the rows of `source` to rows of that length.
    pub(crate) fn resize_columns(source: &Between, taps: &Taps, bytes: usize, target: &mut [u8]) {
        assert!(is_available(), "chosen by whoever calls");
        assert!(source.stride >= bytes.next_multiple_of(32), "whole vectors in a row");
        assert!(source.pixels.len() >= source.rows * source.stride, "all rows");
        let mut weights = 0;
        for (row, &(first, count)) in target.chunks_exact_mut(bytes).zip(&taps.spans) {
            assert!(count > 0 && first + count <= source.rows, "the rows are there");
            let quads = count.next_multiple_of(QUAD);
            let high = &taps.high[weights..][..quads];
            let low = &taps.low[weights..][..quads];
            weights += quads;
            let rows = &source.pixels[first * source.stride..][..count * source.stride];
            let (whole, rest) = row.split_at_mut(bytes / 32 * 32);
            for (at, block) in (0..).step_by(32).zip(whole.as_chunks_mut::<32>().0) {
                // SAFETY: AVX2 is there; `rows` are `count` rows with 32 bytes from `at` on, and the
                // weights are filled to an even number.
                unsafe { block_of_columns(&rows[at..], source.stride, count, high, low, block) };
            }
            if !rest.is_empty() {
                let mut block = [0; 32];
                let at = bytes - rest.len();
                // SAFETY: as above; a row's unused bytes fill its last vector.
                unsafe {
                    block_of_columns(&rows[at..], source.stride, count, high, low, &mut block);
                };
                rest.copy_from_slice(&block[..rest.len()]);
            }
        }
    }

    /// # Safety
    /// The processor has AVX2. `rows` holds 32 bytes every `stride` bytes, `count` times; `high` and
    /// `low` have `count` weights, made even by a zero.
    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn block_of_columns(
        rows: &[u8],
        stride: usize,
        count: usize,
        high: &[i16],
        low: &[i16],
        target: &mut [u8; 32],
    ) {
        let zero = _mm256_setzero_si256();
        let mut sums_high = [zero; 4];
        let mut sums_low = [zero; 4];
        let mut from = rows.as_ptr();
        let (mut high, mut low) = (high.as_ptr(), low.as_ptr());
        let mut left = count;
        while left > 0 {
            // SAFETY: there is another row.
            let first = unsafe { _mm256_loadu_si256(from.cast()) };
            let second = if left > 1 {
                // SAFETY: and one more.
                unsafe { _mm256_loadu_si256(from.wrapping_add(stride).cast()) }
            } else {
                zero
            };
            // SAFETY: the number of weights is even.
            let pair_high = unsafe { high.cast::<i32>().read_unaligned() };
            // SAFETY: likewise.
            let pair_low = unsafe { low.cast::<i32>().read_unaligned() };
            let (weights_high, weights_low) =
                (_mm256_set1_epi32(pair_high), _mm256_set1_epi32(pair_low));
            let near = _mm256_unpacklo_epi8(first, second);
            let far = _mm256_unpackhi_epi8(first, second);
            let pairs = [
                _mm256_unpacklo_epi8(near, zero),
                _mm256_unpackhi_epi8(near, zero),
                _mm256_unpacklo_epi8(far, zero),
                _mm256_unpackhi_epi8(far, zero),
            ];
            for part in 0..4 {
                let by_high = _mm256_madd_epi16(pairs[part], weights_high);
                let by_low = _mm256_madd_epi16(pairs[part], weights_low);
                sums_high[part] = _mm256_add_epi32(sums_high[part], by_high);
                sums_low[part] = _mm256_add_epi32(sums_low[part], by_low);
            }
            from = from.wrapping_add(stride.wrapping_mul(2));
            high = high.wrapping_add(2);
            low = low.wrapping_add(2);
            left = left.saturating_sub(2);
        }
        let half = _mm256_set1_epi32(HALF);
        let finished = [0, 1, 2, 3].map(|part: usize| {
            let sum = _mm256_add_epi32(_mm256_slli_epi32::<LOW_SHIFT>(sums_high[part]), half);
            _mm256_srai_epi32::<SHIFT>(_mm256_add_epi32(sum, sums_low[part]))
        });
        let bytes = _mm256_packus_epi16(
            _mm256_packs_epi32(finished[0], finished[1]),
            _mm256_packs_epi32(finished[2], finished[3]),
        );
        // SAFETY: the target has 32 bytes.
        unsafe { _mm256_storeu_si256(target.as_mut_ptr().cast(), bytes) };
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
