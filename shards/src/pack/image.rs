//! Whether a source file is a whole image, and what goes into a shard for it.

use std::io::Cursor;

use super::raw::{Layout, RawPixels, interleaved};
use crate::{
    index::{Flags, Record},
    jpeg::{self, Chroma, Header, JpegError, Pixels},
};

/// JPEG quality for images that are not JPEG, see [`Policy`](crate::manifest::Policy).
const CONVERTED_QUALITY: u8 = 100;

/// What files of the two formats begin with.
const JPEG: &[u8] = b"\xFF\xD8";
const PNG: &[u8] = b"\x89PNG";

/// What is wrong with a source file.
#[derive(Debug, thiserror::Error)]
pub enum CorruptImage {
    /// It starts neither as a JPEG nor as a PNG does.
    #[error("it is neither JPEG nor PNG")]
    UnknownFormat,
    /// A JPEG that libjpeg-turbo cannot decode, or not without a warning.
    #[error("it is a damaged JPEG")]
    Jpeg(#[from] JpegError),
    /// A PNG that cannot be decoded.
    #[error("it is a damaged PNG")]
    Png(#[from] png::DecodingError),
    /// One pixel: a placeholder of a web page, not a picture.
    #[error("it is a single pixel, which shows nothing")]
    SinglePixel,
    /// More pixels or bytes than a shard's index can state.
    #[error(
        "{width}x{height} pixels in {bytes} bytes: a side is above 65535 or the file too large"
    )]
    TooLarge {
        /// Columns.
        width: usize,
        /// Rows.
        height: usize,
        /// Length of the encoded image.
        bytes: usize,
    },
    /// More pixels than whoever asks wants to decode.
    #[error("{width}x{height} pixels, and at most {most} are decoded here")]
    TooManyPixels {
        /// Columns.
        width: usize,
        /// Rows.
        height: usize,
        /// The most pixels.
        most: usize,
    },
}

/// An image as it goes into a shard.
#[derive(Debug)]
pub(crate) struct Image {
    pub(crate) jpeg: Vec<u8>,
    pub(crate) length: u32,
    pub(crate) width: u16,
    pub(crate) height: u16,
    pub(crate) flags: Flags,
    /// Whether it was a PNG of 16 bits a channel, of which the upper eight are kept.
    pub(crate) deep: bool,
}

impl Image {
    /// Its line of the index, when its bytes begin at `offset` of the tar.
    pub(crate) fn record(&self, offset: u64, label: u32) -> Record {
        Record {
            offset,
            length: self.length,
            label,
            crc32c: crc32c::crc32c(&self.jpeg),
            width: self.width,
            height: self.height,
            flags: self.flags,
        }
    }
}

/// Checks source files by decoding them.
#[derive(Debug, Default)]
pub(crate) struct Checker {
    pixels: Vec<u8>,
}

impl Checker {
    /// `raw` says what the contents are if they are no encoded image.
    pub(crate) fn check(
        &mut self,
        contents: Vec<u8>,
        raw: Option<RawPixels>,
    ) -> Result<Image, CorruptImage> {
        if let Some(raw) = raw {
            self.check_jpeg(raw_to_jpeg(contents, raw)?, Flags::RE_ENCODED)
        } else if contents.starts_with(JPEG) {
            self.check_jpeg(contents, Flags::default())
        } else if contents.starts_with(PNG) {
            let (jpeg, depth) = png_to_jpeg(&contents)?;
            let image = self.check_jpeg(jpeg, Flags::RE_ENCODED)?;
            Ok(Image { deep: depth == png::BitDepth::Sixteen, ..image })
        } else {
            Err(CorruptImage::UnknownFormat)
        }
    }

    fn check_jpeg(&mut self, jpeg: Vec<u8>, flags: Flags) -> Result<Image, CorruptImage> {
        let header = jpeg::decode(&jpeg, &mut self.pixels)?;
        let too_large = CorruptImage::TooLarge {
            width: header.width,
            height: header.height,
            bytes: jpeg.len(),
        };
        let sides = (u16::try_from(header.width), u16::try_from(header.height));
        let (Ok(length), (Ok(width), Ok(height))) = (u32::try_from(jpeg.len()), sides) else {
            return Err(too_large);
        };
        if (width, height) == (1, 1) {
            return Err(CorruptImage::SinglePixel);
        }
        let flags = flags.with(flags_of(&header));
        Ok(Image { jpeg, length, width, height, flags, deep: false })
    }
}

/// An image file of at most `pixels_max` pixels as it would lie in a shard, unchecked; of a JPEG nothing is read,
/// not even how many pixels it has.
pub(crate) fn as_jpeg(contents: Vec<u8>, pixels_max: usize) -> Result<Vec<u8>, CorruptImage> {
    if contents.starts_with(JPEG) {
        Ok(contents)
    } else if contents.starts_with(PNG) {
        let info = png::Decoder::new(Cursor::new(&contents)).read_info()?;
        within(pixels_max, info.info().width as usize, info.info().height as usize)?;
        Ok(png_to_jpeg(&contents)?.0)
    } else {
        Err(CorruptImage::UnknownFormat)
    }
}

/// Refuses an image of more pixels than `most`.
pub(crate) fn within(most: usize, width: usize, height: usize) -> Result<(), CorruptImage> {
    let is_within = width.checked_mul(height).is_some_and(|pixels| pixels <= most);
    if is_within { Ok(()) } else { Err(CorruptImage::TooManyPixels { width, height, most }) }
}

/// What an image's header says, as the flags of its record.
pub(crate) fn flags_of(header: &Header) -> Flags {
    let chroma = match header.chroma {
        Chroma::Full => Flags::CHROMA_444,
        Chroma::HalfWidth => Flags::CHROMA_422,
        Chroma::Half => Flags::CHROMA_420,
        Chroma::Grey => Flags::GREY,
        Chroma::Other => Flags::CHROMA_OTHER,
    };
    if header.cmyk { chroma.with(Flags::CMYK) } else { chroma }
}

/// Decodes a PNG to eight bits, drops its alpha and encodes it at the highest quality; also says how many bits
/// a channel had.
fn png_to_jpeg(contents: &[u8]) -> Result<(Vec<u8>, png::BitDepth), CorruptImage> {
    let mut decoder = png::Decoder::new(Cursor::new(contents));
    decoder.set_transformations(png::Transformations::EXPAND | png::Transformations::STRIP_16);
    let mut reader = decoder.read_info()?;
    let (width, height) = (reader.info().width as usize, reader.info().height as usize);
    let depth = reader.info().bit_depth;
    let Some(room) = reader.output_buffer_size().filter(|_| width * height <= jpeg::PIXELS_MAX)
    else {
        return Err(CorruptImage::TooLarge { width, height, bytes: contents.len() });
    };
    let mut decoded = vec![0; room];
    let frame = reader.next_frame(&mut decoded)?;
    decoded.truncate(frame.buffer_size());
    let (pixels, layout) = match frame.color_type {
        png::ColorType::Grayscale => (decoded, Pixels::Grey),
        png::ColorType::GrayscaleAlpha => (without_last_of(2, &decoded), Pixels::Grey),
        png::ColorType::Rgba => (without_last_of(4, &decoded), Pixels::Rgb),
        png::ColorType::Rgb | png::ColorType::Indexed => (decoded, Pixels::Rgb),
    };
    Ok((jpeg::encode(&pixels, width, height, layout, CONVERTED_QUALITY)?, depth))
}

/// Encodes raw pixels at the highest quality.
fn raw_to_jpeg(contents: Vec<u8>, raw: RawPixels) -> Result<Vec<u8>, CorruptImage> {
    let RawPixels { width, height, layout } = raw;
    let (pixels, kind) = match layout {
        Layout::Grey => (contents, Pixels::Grey),
        Layout::Planes => (interleaved(&contents), Pixels::Rgb),
    };
    Ok(jpeg::encode(&pixels, width, height, kind, CONVERTED_QUALITY)?)
}

/// Pixels of `channels` bytes without the last, which is alpha.
fn without_last_of(channels: usize, pixels: &[u8]) -> Vec<u8> {
    pixels.chunks_exact(channels).flat_map(|pixel| &pixel[..channels - 1]).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alpha_is_dropped() {
        assert_eq!(without_last_of(4, &[1, 2, 3, 4, 5, 6, 7, 8]), [1, 2, 3, 5, 6, 7]);
        assert_eq!(without_last_of(2, &[1, 2, 3, 4]), [1, 3]);
    }
}
