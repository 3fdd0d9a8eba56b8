//! libjpeg-turbo's own AVX2 kernels, called directly: the inverse DCT and the conversion to RGB.
//!
//! They are what the library itself runs on a processor with AVX2, so the pixels are its pixels.
#![expect(unsafe_code, reason = "binds functions of the C library libjpeg-turbo")]

use super::entropy::BLOCK;

/// Rows and columns of a block.
pub(super) const SIDE: usize = 8;

/// What a row of samples is a multiple of: the kernels read that much at a time.
pub(super) const ALIGNMENT: usize = 64;

/// Whether the kernels are there and this processor can run them.
pub(super) fn are_available() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avx2");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

#[cfg(target_arch = "x86_64")]
mod library {
    use std::ffi::{c_int, c_uint};

    // Of the static library that turbojpeg-sys builds; not part of its documented interface.
    #[expect(unreachable_pub, reason = "an import has no visibility of its own")]
    unsafe extern "C" {
        pub fn jsimd_idct_islow_avx2(
            table: *const i16,
            block: *const i16,
            rows: *const *mut u8,
            column: c_uint,
        );
        pub fn jsimd_ycc_extrgb_convert_avx2(
            width: c_uint,
            planes: *const *const *mut u8,
            row: c_uint,
            target: *const *mut u8,
            rows: c_int,
        );
    }
}

/// Eight rows of three planes: a row of blocks, decoded.
#[derive(Debug, Default)]
pub(super) struct Strip {
    samples: Vec<u8>,
    /// Samples of a row.
    stride: usize,
}

impl Strip {
    pub(super) const PLANES: usize = 3;

    /// Makes room for rows of `columns` blocks.
    pub(super) fn prepare(&mut self, columns: usize) {
        self.stride = (columns * SIDE).next_multiple_of(ALIGNMENT);
        let samples = Self::PLANES * SIDE * self.stride;
        if self.samples.len() < samples {
            self.samples.resize(samples, 0);
        }
    }

    /// Writes the samples of a block of `plane` at the given column of blocks.
    ///
    /// # Panics
    /// If the kernels are not available, or the place is not in the strip.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn put(
        &mut self,
        plane: usize,
        column: usize,
        table: &[i16; BLOCK],
        block: &[i16; BLOCK],
    ) {
        assert!(plane < Self::PLANES && (column + 1) * SIDE <= self.stride, "inside the strip");
        let rows = self.rows(plane);
        let left = u32::try_from(column * SIDE).expect("a JPEG has at most 65,535 columns");
        // SAFETY: AVX2 is there, or nobody could have asked for a strip; both arrays have the 64
        // values that are read; each of the eight pointers is good for `stride` bytes, and the eight
        // bytes from `left` on that are written lie in them by the assertion.
        unsafe {
            library::jsimd_idct_islow_avx2(table.as_ptr(), block.as_ptr(), rows.as_ptr(), left);
        }
    }

    /// The rows of a plane.
    fn rows(&mut self, plane: usize) -> [*mut u8; SIDE] {
        let samples = &mut self.samples[plane * SIDE * self.stride..][..SIDE * self.stride];
        let start = samples.as_mut_ptr();
        std::array::from_fn(|row| start.wrapping_add(row * self.stride))
    }

    /// Converts the first `width` samples of the eight rows to RGB, in `target` without gaps.
    ///
    /// # Panics
    /// If the kernels are not available, or there are fewer samples or bytes.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn write_rgb(&mut self, width: usize, target: &mut [u8]) {
        let bytes = width * 3;
        assert!(width <= self.stride && target.len() == SIDE * bytes, "eight rows of RGB");
        let planes = [0, 1, 2].map(|plane| self.rows(plane));
        let planes = [planes[0].as_ptr(), planes[1].as_ptr(), planes[2].as_ptr()];
        let start = target.as_mut_ptr();
        let rows: [*mut u8; SIDE] = std::array::from_fn(|row| start.wrapping_add(row * bytes));
        let columns = u32::try_from(width).expect("a JPEG has at most 65,535 columns");
        // SAFETY: AVX2 is there, or nobody could have asked for a strip; each plane has eight rows of
        // `stride` samples, a multiple of what is read at a time and at least `width`; each of the
        // eight rows of the target has room for the `bytes` bytes that are written.
        unsafe {
            library::jsimd_ycc_extrgb_convert_avx2(columns, planes.as_ptr(), 0, rows.as_ptr(), 8);
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    pub(super) fn put(&mut self, _: usize, _: usize, _: &[i16; BLOCK], _: &[i16; BLOCK]) {
        unreachable!("not available");
    }

    #[cfg(not(target_arch = "x86_64"))]
    pub(super) fn write_rgb(&mut self, _: usize, _: &mut [u8]) {
        unreachable!("not available");
    }
}
