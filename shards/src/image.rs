//! Pixels in memory: rows of RGB, eight bits a channel.

/// Bytes of a pixel.
pub const CHANNELS: usize = 3;

/// A rectangle of an RGB8 image that someone else holds. Copying it copies no pixels.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    pixels: &'a [u8],
    stride: usize,
    width: usize,
    height: usize,
}

/// Where a rectangle lies in an image, in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rect {
    /// Columns to its left.
    pub left: usize,
    /// Rows above it.
    pub top: usize,
    /// Its columns.
    pub width: usize,
    /// Its rows.
    pub height: usize,
}

impl<'a> View<'a> {
    /// A whole image, `[height, width, 3]` bytes without gaps.
    ///
    /// # Panics
    /// If the length of `pixels` is another, or a side is 0.
    #[must_use]
    pub fn new(pixels: &'a [u8], width: usize, height: usize) -> Self {
        assert!(width > 0 && height > 0, "an image has at least one pixel");
        assert_eq!(pixels.len(), width * height * CHANNELS, "bytes of a {width}x{height} image");
        Self { pixels, stride: width * CHANNELS, width, height }
    }

    /// Columns.
    #[must_use]
    pub fn width(&self) -> usize {
        self.width
    }

    /// Rows.
    #[must_use]
    pub fn height(&self) -> usize {
        self.height
    }

    /// The part of this view inside `rect`.
    ///
    /// # Panics
    /// If `rect` is empty or does not lie inside.
    #[must_use]
    pub fn crop(&self, rect: Rect) -> Self {
        assert!(rect.width > 0 && rect.height > 0, "{rect:?} is empty");
        let inside = rect.left + rect.width <= self.width && rect.top + rect.height <= self.height;
        assert!(inside, "{rect:?} is not inside {}x{}", self.width, self.height);
        let start = rect.top * self.stride + rect.left * CHANNELS;
        Self {
            pixels: &self.pixels[start..],
            stride: self.stride,
            width: rect.width,
            height: rect.height,
        }
    }

    /// The `width` × 3 bytes of row `y`.
    ///
    /// # Panics
    /// If there is no such row.
    #[must_use]
    #[inline]
    pub fn row(&self, y: usize) -> &'a [u8] {
        assert!(y < self.height, "row {y} of {}", self.height);
        &self.pixels[y * self.stride..][..self.width * CHANNELS]
    }

    /// Everything from row `y` on to the end of the memory that the view looks at: at least the row,
    /// and further pixels of the image it is part of.
    pub(crate) fn rows_on(&self, y: usize) -> &'a [u8] {
        assert!(y < self.height, "row {y} of {}", self.height);
        &self.pixels[y * self.stride..]
    }

    /// Copies the pixels, row by row, to `target`, `[height, width, 3]` bytes without gaps.
    ///
    /// # Panics
    /// If the length of `target` is another.
    pub fn copy_to(&self, target: &mut [u8]) {
        assert_eq!(target.len(), self.width * self.height * CHANNELS, "bytes of the copy");
        for (y, row) in target.chunks_exact_mut(self.width * CHANNELS).enumerate() {
            row.copy_from_slice(self.row(y));
        }
    }
}

/// Mirrors an image in place, left to right. `pixels` is `[height, width, 3]` bytes.
///
/// # Panics
/// If `pixels` is not made of whole rows.
pub fn flip(pixels: &mut [u8], width: usize) {
    assert!(pixels.len().is_multiple_of(width * CHANNELS), "whole rows");
    for row in pixels.chunks_exact_mut(width * CHANNELS) {
        let (pixels, _) = row.as_chunks_mut::<CHANNELS>();
        pixels.reverse();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crop_of_a_crop_is_a_crop() {
        let pixels: Vec<u8> = (0..5 * 4 * 3).collect();
        let image = View::new(&pixels, 5, 4);
        let crop = image.crop(Rect { left: 1, top: 1, width: 3, height: 3 });
        let inner = crop.crop(Rect { left: 1, top: 1, width: 2, height: 1 });
        assert_eq!(inner.row(0), &pixels[(2 * 5 + 2) * 3..][..6]);
    }

    #[test]
    fn a_flip_mirrors_each_row() {
        let mut pixels = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12];
        flip(&mut pixels, 2);
        assert_eq!(pixels, [4, 5, 6, 1, 2, 3, 10, 11, 12, 7, 8, 9]);
    }
}
