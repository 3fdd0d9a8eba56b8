//! Both passes of resizing.
//!
//! A weight of 22 bits does not fit the processor's 16-bit multiplier. It is split into
//! `high * 2048 + low`; each part is multiplied by the pixels and summed for itself, in 32 bits and
//! without loss, and the two sums are put together at the end. Integer sums do not depend on their
//! order, so the result is the definition's.
//!
//! The kernels are compiled twice: for AVX2, where multiplying pairs and adding are two instructions, and
//! for the vector neural network instructions of AVX-512, where they are one. The latter's sums are the
//! same integers.

use std::{arch::x86_64::*, sync::LazyLock};

use super::is_available;
use crate::{
    image::{CHANNELS, View},
    resize::{Between, LOW_BITS, PRECISION_BITS, Taps},
};

/// Rows that share the loading of a weight.
const GROUP: usize = Between::GROUP;

/// Pixels that are multiplied at once, and so the multiple that weights are filled to.
const QUAD: usize = 4;

const HALF: i32 = 1 << (PRECISION_BITS - 1);
const SHIFT: i32 = PRECISION_BITS as i32;
const LOW_SHIFT: i32 = LOW_BITS as i32;

/// Whether the processor multiplies and adds in one instruction.
static FUSED: LazyLock<bool> = LazyLock::new(|| {
    is_x86_feature_detected!("avx512vnni") && is_x86_feature_detected!("avx512vl")
});

/// The horizontal pass: `target` has room for the rows of `source`.
pub(crate) fn resize_rows(source: View<'_>, taps: &Taps, target: &mut Between) {
    assert!(is_available(), "chosen by whoever calls");
    let fused = *FUSED;
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
        let mut rows: [&[u8]; GROUP] =
            std::array::from_fn(|row| source.rows_on((y + row).min(height - 1)));
        assert!(rows_out.len() == GROUP * *stride, "room for the group");
        if rows.iter().any(|row| row.len() < reach) {
            // The last rows of an image may end before a vector does: give them a longer end.
            tails.resize(GROUP * reach, 0);
            for (tail, row) in tails.chunks_exact_mut(reach).zip(rows) {
                let there = row.len().min(reach);
                tail[..there].copy_from_slice(&row[..there]);
            }
            rows = std::array::from_fn(|row| &tails[row * reach..][..reach]);
        }
        if fused {
            // SAFETY: the instructions are there; each row has `reach` bytes, the weights are whole
            // quads, and the group's output rows have one byte more than their pixels take.
            unsafe { vnni::group_of_rows(rows, taps, rows_out, *stride) };
        } else {
            // SAFETY: likewise.
            unsafe { avx2::group_of_rows(rows, taps, rows_out, *stride) };
        }
    }
}

/// The vertical pass: the first `bytes` bytes of the rows of `source` to rows of that length.
pub(crate) fn resize_columns(source: &Between, taps: &Taps, bytes: usize, target: &mut [u8]) {
    assert!(is_available(), "chosen by whoever calls");
    let fused = *FUSED;
    assert!(source.stride >= bytes.next_multiple_of(32), "whole vectors in a row");
    assert!(source.pixels.len() >= source.rows * source.stride, "all rows");
    let mut weights = 0;
    for (row, &(first, count)) in target.chunks_exact_mut(bytes).zip(&taps.spans) {
        assert!(count > 0 && first + count <= source.rows, "the rows are there");
        let quads = count.next_multiple_of(QUAD);
        let weight = (&taps.high[weights..][..quads], &taps.low[weights..][..quads]);
        weights += quads;
        let rows = &source.pixels[first * source.stride..][..count * source.stride];
        if fused {
            // SAFETY: the instructions are there; `rows` are `count` rows of `stride` bytes, which is
            // whole vectors, and the weights are filled to an even number.
            unsafe { vnni::row_of_columns(rows, source.stride, count, weight, row) };
        } else {
            // SAFETY: likewise.
            unsafe { avx2::row_of_columns(rows, source.stride, count, weight, row) };
        }
    }
}

/// The kernels for some instructions, with how they add the products of pairs to a sum.
macro_rules! kernels {
    ($name:ident, $features:literal, |$sum:ident, $pixels:ident, $weights:ident| $add:expr) => {
        mod $name {
            use super::*;

            #[target_feature(enable = $features)]
            #[inline]
            fn add($sum: __m256i, $pixels: __m256i, $weights: __m256i) -> __m256i {
                $add
            }

            /// # Safety
            /// The processor has these instructions. Each of `rows` reaches 16 bytes beyond the first
            /// pixel of every quad of `taps`, whose weights are whole quads. `target` has as many rows of
            /// `stride` bytes, each longer than its pixels.
            #[target_feature(enable = $features)]
            pub(super) unsafe fn group_of_rows(
                rows: [&[u8]; GROUP],
                taps: &Taps,
                target: &mut [u8],
                stride: usize,
            ) {
                // Of four pixels, the first two go to the lower half and the others to the upper one,
                // and there a channel of one stands beside that of the next, each as 16 bits.
                let pairs = _mm256_setr_epi8(
                    0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1, //
                    6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1,
                );
                let spread = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
                let (mut high, mut low) = (taps.high.as_ptr(), taps.low.as_ptr());
                let mut out = target.as_mut_ptr();
                for &(first, taps) in &taps.spans {
                    let mut sums_high = [_mm256_setzero_si256(); GROUP];
                    let mut sums_low = [_mm256_setzero_si256(); GROUP];
                    let mut offset = first.wrapping_mul(CHANNELS);
                    for _ in 0..taps.div_ceil(QUAD) {
                        // SAFETY: the weights are whole quads, and as many are taken as there are.
                        let weights_high = unsafe { _mm_loadl_epi64(high.cast()) };
                        // SAFETY: likewise.
                        let weights_low = unsafe { _mm_loadl_epi64(low.cast()) };
                        let [weights_high, weights_low] = [weights_high, weights_low].map(|four| {
                            _mm256_permutevar8x32_epi32(_mm256_castsi128_si256(four), spread)
                        });
                        for row in 0..GROUP {
                            let from = rows[row].as_ptr().wrapping_add(offset);
                            // SAFETY: the row reaches 16 bytes beyond the first pixel of every quad.
                            let four = unsafe { _mm_loadu_si128(from.cast()) };
                            let four = _mm256_broadcastsi128_si256(four);
                            let four = _mm256_shuffle_epi8(four, pairs);
                            sums_high[row] = add(sums_high[row], four, weights_high);
                            sums_low[row] = add(sums_low[row], four, weights_low);
                        }
                        high = high.wrapping_add(QUAD);
                        low = low.wrapping_add(QUAD);
                        offset = offset.wrapping_add(QUAD * CHANNELS);
                    }
                    let pixels = finished(sums_high, sums_low);
                    for row in 0..GROUP {
                        let to = out.wrapping_add(row.wrapping_mul(stride));
                        // SAFETY: a row has room for its pixels and the one byte that is written beyond
                        // the last; between pixels the next one overwrites it.
                        unsafe { to.cast::<i32>().write_unaligned(pixels[row]) };
                    }
                    out = out.wrapping_add(CHANNELS);
                }
            }

            /// The pixels of four rows from the sums of their halves.
            #[target_feature(enable = $features)]
            #[inline]
            fn finished(high: [__m256i; GROUP], low: [__m256i; GROUP]) -> [i32; GROUP] {
                let whole = [0, 1, 2, 3].map(|row: usize| {
                    _mm256_add_epi32(_mm256_slli_epi32::<LOW_SHIFT>(high[row]), low[row])
                });
                // Two rows share a vector once the halves of each are added.
                let two = [(0, 1), (2, 3)].map(|(one, other): (usize, usize)| {
                    let lower = _mm256_permute2x128_si256::<0x20>(whole[one], whole[other]);
                    let upper = _mm256_permute2x128_si256::<0x31>(whole[one], whole[other]);
                    let sum = _mm256_add_epi32(lower, upper);
                    _mm256_srai_epi32::<SHIFT>(_mm256_add_epi32(sum, _mm256_set1_epi32(HALF)))
                });
                let words = _mm256_packs_epi32(two[0], two[1]);
                let bytes = _mm256_packus_epi16(words, words);
                let (even, odd) =
                    (_mm256_castsi256_si128(bytes), _mm256_extracti128_si256::<1>(bytes));
                [
                    _mm_cvtsi128_si32(even),
                    _mm_cvtsi128_si32(odd),
                    _mm_extract_epi32::<1>(even),
                    _mm_extract_epi32::<1>(odd),
                ]
            }

            /// # Safety
            /// The processor has these instructions. `rows` holds `count` rows of `stride` bytes, in which
            /// whole vectors cover those of `target`; the weights are as many, made even by a zero.
            #[target_feature(enable = $features)]
            pub(super) unsafe fn row_of_columns(
                rows: &[u8],
                stride: usize,
                count: usize,
                weights: (&[i16], &[i16]),
                target: &mut [u8],
            ) {
                let (whole, rest) = target.as_chunks_mut::<32>();
                let mut from = rows.as_ptr();
                for block in whole {
                    // SAFETY: the caller's duty: 32 bytes of each row follow.
                    let bytes = unsafe { block_of_columns(from, stride, count, weights) };
                    // SAFETY: the block has 32 bytes.
                    unsafe { _mm256_storeu_si256(block.as_mut_ptr().cast(), bytes) };
                    from = from.wrapping_add(32);
                }
                if !rest.is_empty() {
                    let mut block = [0_u8; 32];
                    // SAFETY: a row's unused bytes fill its last vector.
                    let bytes = unsafe { block_of_columns(from, stride, count, weights) };
                    // SAFETY: the block has 32 bytes.
                    unsafe { _mm256_storeu_si256(block.as_mut_ptr().cast(), bytes) };
                    rest.copy_from_slice(&block[..rest.len()]);
                }
            }

            /// # Safety
            /// The processor has these instructions. `from` is good for 32 bytes every `stride` bytes,
            /// `count` times; there are as many weights of each kind, made even by a zero.
            #[target_feature(enable = $features)]
            #[inline]
            unsafe fn block_of_columns(
                from: *const u8,
                stride: usize,
                count: usize,
                weights: (&[i16], &[i16]),
            ) -> __m256i {
                let zero = _mm256_setzero_si256();
                let mut sums_high = [zero; 4];
                let mut sums_low = [zero; 4];
                let mut from = from;
                let (mut high, mut low) = (weights.0.as_ptr(), weights.1.as_ptr());
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
                        sums_high[part] = add(sums_high[part], pairs[part], weights_high);
                        sums_low[part] = add(sums_low[part], pairs[part], weights_low);
                    }
                    from = from.wrapping_add(stride.wrapping_mul(2));
                    high = high.wrapping_add(2);
                    low = low.wrapping_add(2);
                    left = left.saturating_sub(2);
                }
                let half = _mm256_set1_epi32(HALF);
                let finished = [0, 1, 2, 3].map(|part: usize| {
                    let sum = _mm256_slli_epi32::<LOW_SHIFT>(sums_high[part]);
                    let sum = _mm256_add_epi32(_mm256_add_epi32(sum, half), sums_low[part]);
                    _mm256_srai_epi32::<SHIFT>(sum)
                });
                _mm256_packus_epi16(
                    _mm256_packs_epi32(finished[0], finished[1]),
                    _mm256_packs_epi32(finished[2], finished[3]),
                )
            }
        }
    };
}

kernels!(avx2, "avx2", |sum, pixels, weights| _mm256_add_epi32(
    sum,
    _mm256_madd_epi16(pixels, weights)
));
kernels!(vnni, "avx2,avx512vnni,avx512vl", |sum, pixels, weights| _mm256_dpwssd_epi32(
    sum, pixels, weights
));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_to_add_products_give_the_same_sums() {
        if !is_available() || !*FUSED {
            return;
        }
        let weights: Vec<i16> = (0..4096_i16).map(|at| at.wrapping_mul(977) % 2048).collect();
        let pixels: Vec<u8> = (0..8 * 96_u32).map(|at| (at * 37 % 256).to_le_bytes()[0]).collect();
        for count in 1..=8 {
            let weight = (&weights[..8], &weights[100..108]);
            let (mut one, mut other) = ([0; 70], [0; 70]);
            // SAFETY: the instructions are there; there are eight rows of 96 bytes and eight weights.
            unsafe { avx2::row_of_columns(&pixels, 96, count, weight, &mut one) };
            // SAFETY: likewise.
            unsafe { vnni::row_of_columns(&pixels, 96, count, weight, &mut other) };
            assert_eq!(one, other, "{count} rows");
        }
    }
}
