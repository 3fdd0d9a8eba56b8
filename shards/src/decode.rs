//! From the bytes of a JPEG to RGB pixels, as the reference pipeline sees them.

use crate::{
    image::{Rect, View},
    jpeg::{Baseline, Header, JpegError, Opened},
};

/// Decodes JPEG images to RGB8, one at a time. Keeps its buffers between images.
///
/// Grey is replicated; CMYK is converted as Pillow does it; orientation tags are ignored.
#[derive(Debug)]
pub struct Decoder {
    stored: Vec<u8>,
    converted: Vec<u8>,
    /// For the usual kind of image; without it libjpeg-turbo decodes all.
    baseline: Option<Box<Baseline>>,
}

impl Default for Decoder {
    fn default() -> Self {
        Self { baseline: Some(Box::default()), ..Self::library() }
    }
}

impl Decoder {
    /// A decoder without buffers yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A decoder that leaves everything to libjpeg-turbo: what others are checked by.
    #[must_use]
    pub fn library() -> Self {
        Self { stored: Vec::new(), converted: Vec::new(), baseline: None }
    }

    /// The pixels of an image, `[height, width, 3]`, valid until the next call.
    ///
    /// # Errors
    /// [`JpegError`] says what libjpeg-turbo finds wrong.
    pub fn decode(&mut self, bytes: &[u8]) -> Result<View<'_>, JpegError> {
        let image = Opened::new(bytes)?;
        let Header { width, height, .. } = image.header();
        self.decode_part(image, Rect { left: 0, top: 0, width, height })
    }

    /// The pixels of a part of an image, `[part.height, part.width, 3]`, valid until the next call:
    /// those that [`Self::decode`] has there, but little more than the part is decoded.
    ///
    /// # Errors
    /// [`JpegError`] says what libjpeg-turbo finds wrong.
    ///
    /// # Panics
    /// If `part` is empty or not inside the image.
    pub fn decode_part(
        &mut self,
        mut image: Opened<'_>,
        part: Rect,
    ) -> Result<View<'_>, JpegError> {
        let held = match &mut self.baseline {
            Some(baseline) => image.decode_part_with(baseline, part, &mut self.stored)?,
            None => image.decode_part(part, &mut self.stored)?,
        };
        let pixels = held.width * held.height;
        let view = if image.header().cmyk {
            self.converted.clear();
            let (stored, _) = self.stored[..pixels * 4].as_chunks::<4>();
            self.converted.extend(stored.iter().flat_map(|&pixel| cmyk_to_rgb(pixel)));
            View::new(&self.converted, held.width, held.height)
        } else {
            View::new(&self.stored[..pixels * 3], held.width, held.height)
        };
        Ok(view.crop(Rect { left: part.left - held.left, top: part.top - held.top, ..part }))
    }
}

/// Pillow's conversion, after the inversion that Adobe's files need: with all four inverted,
/// a channel is `n - c * n / 255` for `n = 255 - k`. The product is rounded as Pillow rounds it.
fn cmyk_to_rgb([cyan, magenta, yellow, black]: [u8; 4]) -> [u8; 3] {
    let white = u32::from(black);
    [cyan, magenta, yellow].map(|stored| {
        let product = u32::from(255 - stored) * white + 128;
        let ink = (product + (product >> 8)) >> 8;
        u8::try_from(white - ink).expect("ink is at most white, and white at most 255")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inverted_cmyk_becomes_rgb() {
        assert_eq!(cmyk_to_rgb([255, 255, 255, 255]), [255, 255, 255]);
        assert_eq!(cmyk_to_rgb([0, 255, 255, 255]), [0, 255, 255]);
        assert_eq!(cmyk_to_rgb([10, 20, 30, 0]), [0, 0, 0]);
    }
}
