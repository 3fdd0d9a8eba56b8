//! libjpeg-turbo, through its TurboJPEG 3 interface.
//!
//! Decoding uses the accurate integer inverse DCT (`islow`) and smooth chroma upsampling, which are
//! the library's defaults and what Pillow uses, so the pixels are those of the reference pipeline.
//!
//! Each image has an instance of the library to itself, about a microsecond's work. A reused one keeps
//! the tables of the image before, and an image that lacks its own would be decoded with them: its
//! pixels would depend on what this thread happened to decode last. For the same reason a warning,
//! which leaves some pixels unwritten or guessed, is an error.
#![expect(
    unsafe_code,
    reason = "binds the C library libjpeg-turbo; every call is here or in `kernels`"
)]

use std::{
    ffi::{CStr, c_int},
    ptr::NonNull,
};

use turbojpeg_sys as tj;

mod baseline;
mod entropy;
mod kernels;

pub(crate) use baseline::Baseline;

use crate::image::Rect;

/// Larger images are refused before any memory is taken for them: 16,384 × 16,384.
pub const PIXELS_MAX: usize = 1 << 28;

/// A progressive image with more scans than this is refused: a small file could otherwise keep the
/// decoder busy for minutes.
const SCANS_MAX: c_int = 500;

/// What libjpeg-turbo finds wrong with an image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JpegError {
    /// The bytes are not an image that it can read.
    #[error("{0}")]
    Library(String),
    /// More pixels than [`PIXELS_MAX`].
    #[error("{width}x{height} pixels are more than this program accepts")]
    TooLarge {
        /// Columns by the header.
        width: usize,
        /// Rows by the header.
        height: usize,
    },
    /// The image could not be encoded.
    #[error("an image of {width}x{height} pixels cannot be a JPEG")]
    Unencodable {
        /// Columns.
        width: usize,
        /// Rows.
        height: usize,
    },
}

/// How far chroma is reduced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Chroma {
    /// Full resolution, 4:4:4.
    Full,
    /// Half the width, 4:2:2.
    HalfWidth,
    /// Half the width and height, 4:2:0.
    Half,
    /// There is no chroma.
    Grey,
    /// Any other.
    Other,
}

/// What the header of a JPEG says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Columns.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// Chroma sampling.
    pub chroma: Chroma,
    /// Four channels, CMYK or YCCK, instead of colour or grey.
    pub cmyk: bool,
}

/// Layout of decoded or source pixels, eight bits a channel, without gaps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pixels {
    /// `[height, width, 3]`.
    Rgb,
    /// `[height, width]`.
    Grey,
    /// `[height, width, 4]`, as stored.
    Cmyk,
}

impl Pixels {
    /// Bytes of a pixel.
    #[must_use]
    pub fn channels(self) -> usize {
        match self {
            Self::Rgb => 3,
            Self::Grey => 1,
            Self::Cmyk => 4,
        }
    }

    fn format(self) -> c_int {
        match self {
            Self::Rgb => tj::TJPF_TJPF_RGB,
            Self::Grey => tj::TJPF_TJPF_GRAY,
            Self::Cmyk => tj::TJPF_TJPF_CMYK,
        }
    }
}

/// A TurboJPEG instance.
#[derive(Debug)]
struct Instance(NonNull<std::ffi::c_void>);

impl Instance {
    fn new(kind: tj::TJINIT) -> Self {
        // SAFETY: takes a number by value; an unknown one gives a null pointer.
        let handle = unsafe { tj::tj3Init(as_int(kind)) };
        Self(NonNull::new(handle).expect("libjpeg-turbo finds memory for its state"))
    }

    fn set(&mut self, parameter: tj::TJPARAM, value: c_int) {
        // SAFETY: the handle is live until drop; the other arguments are numbers.
        let status = unsafe { tj::tj3Set(self.0.as_ptr(), as_int(parameter), value) };
        assert_eq!(status, 0, "parameter {parameter} takes {value}: {}", self.message());
    }

    fn value(&mut self, parameter: tj::TJPARAM) -> c_int {
        // SAFETY: the handle is live until drop; the other argument is a number.
        unsafe { tj::tj3Get(self.0.as_ptr(), as_int(parameter)) }
    }

    fn check(&mut self, status: c_int) -> Result<(), JpegError> {
        if status == 0 { Ok(()) } else { Err(JpegError::Library(self.message())) }
    }

    /// The message of the last failed call.
    fn message(&mut self) -> String {
        // SAFETY: the handle is live until drop.
        let text = unsafe { tj::tj3GetErrorStr(self.0.as_ptr()) };
        // SAFETY: the library returns a NUL-terminated string that it owns and that stays as it is
        // until the next call on this instance; it is copied here, before any.
        let text = unsafe { CStr::from_ptr(text) };
        text.to_string_lossy().into_owned()
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        // SAFETY: made by `tj3Init` and destroyed nowhere else.
        unsafe { tj::tj3Destroy(self.0.as_ptr()) }
    }
}

/// The library declares its constants unsigned and its parameters signed.
fn as_int(constant: u32) -> c_int {
    c_int::try_from(constant).expect("the library's constants are small")
}

/// Reads the header of an image.
///
/// # Errors
/// [`JpegError`] if the bytes are not a JPEG or it is too large.
pub fn header(jpeg: &[u8]) -> Result<Header, JpegError> {
    Ok(Opened::new(jpeg)?.header)
}

/// Decodes an image into `pixels`, which is grown when it is too short, in the layout
/// [`Pixels::Cmyk`] if the header says so and [`Pixels::Rgb`] if not (grey is replicated).
///
/// # Errors
/// [`JpegError`] if the bytes are not a JPEG, or it is too large or damaged in any way.
pub fn decode(jpeg: &[u8], pixels: &mut Vec<u8>) -> Result<Header, JpegError> {
    let mut image = Opened::new(jpeg)?;
    image.decode(pixels)?;
    Ok(image.header)
}

/// An image whose header has been read.
#[derive(Debug)]
pub struct Opened<'a> {
    instance: Instance,
    jpeg: &'a [u8],
    header: Header,
    /// One of the library's `TJSAMP` constants.
    sampling: c_int,
}

impl<'a> Opened<'a> {
    /// Reads the header of `jpeg`.
    ///
    /// # Errors
    /// [`JpegError`] if the bytes are not a JPEG or it is too large.
    pub fn new(jpeg: &'a [u8]) -> Result<Self, JpegError> {
        let mut instance = decompressor();
        let (header, sampling) = read_header(&mut instance, jpeg)?;
        Ok(Self { instance, jpeg, header, sampling })
    }

    /// What the header says.
    #[must_use]
    pub fn header(&self) -> Header {
        self.header
    }

    /// Decodes the whole image, see [`decode`].
    ///
    /// # Errors
    /// [`JpegError`] if the image is damaged in any way.
    pub fn decode(&mut self, pixels: &mut Vec<u8>) -> Result<(), JpegError> {
        let (width, height) = (self.header.width, self.header.height);
        self.decompress(Rect { left: 0, top: 0, width, height }, pixels)
    }

    /// Decodes the rows and columns of blocks that `part` needs, and returns which rectangle of the
    /// image `pixels` then holds: one around `part`, or the whole image if it can only be decoded
    /// whole. Every pixel of `part` is that of [`Self::decode`], to the bit.
    ///
    /// What the library knows only by reading on, damage below `part` for one, stays unseen.
    ///
    /// # Errors
    /// [`JpegError`] if the image is damaged in any way that can be seen.
    ///
    /// # Panics
    /// If `part` is empty or not inside the image.
    pub fn decode_part(&mut self, part: Rect, pixels: &mut Vec<u8>) -> Result<Rect, JpegError> {
        let Header { width, height, .. } = self.header;
        assert!(part.width > 0 && part.height > 0, "{part:?} is empty");
        let inside = part.left + part.width <= width && part.top + part.height <= height;
        assert!(inside, "{part:?} is not inside {width}x{height}");
        let whole = Rect { left: 0, top: 0, width, height };
        let region = self.region(part).unwrap_or(whole);
        if region != whole && self.decompress(region, pixels).is_ok() {
            return Ok(region);
        }
        // The library refuses some rare kinds of JPEG in parts; and if this one is damaged, the
        // message is to be the same whatever part was asked for.
        self.decompress(whole, pixels)?;
        Ok(whole)
    }

    /// The same as [`Self::decode_part`], faster where the image is of the usual kind.
    pub(crate) fn decode_part_with(
        &mut self,
        baseline: &mut Baseline,
        part: Rect,
        pixels: &mut Vec<u8>,
    ) -> Result<Rect, JpegError> {
        let plain = self.sampling == tj::TJSAMP_TJSAMP_444
            && self.instance.value(tj::TJPARAM_TJPARAM_COLORSPACE) == as_int(tj::TJCS_TJCS_YCbCr)
            && self.instance.value(tj::TJPARAM_TJPARAM_PROGRESSIVE) == 0;
        match plain.then(|| baseline.decode(self.jpeg, part, pixels)).flatten() {
            Some(held) => Ok(held),
            None => self.decode_part(part, pixels),
        }
    }

    /// The smallest rectangle around `part` that the library can cut out without changing a pixel
    /// of `part`. It cuts between columns of blocks only; and where chroma is reduced, smooth
    /// upsampling looks at the neighbours, which must not be cut off.
    fn region(&self, part: Rect) -> Option<Rect> {
        const CONTEXT_ROWS: usize = 2;
        let (block, reduced) = match self.sampling {
            tj::TJSAMP_TJSAMP_444 | tj::TJSAMP_TJSAMP_GRAY => (8, false),
            tj::TJSAMP_TJSAMP_440 | tj::TJSAMP_TJSAMP_441 => (8, true),
            tj::TJSAMP_TJSAMP_422 | tj::TJSAMP_TJSAMP_420 => (16, true),
            tj::TJSAMP_TJSAMP_411 => (32, true),
            _ => return None,
        };
        let (columns, rows) = if reduced { (block, CONTEXT_ROWS) } else { (0, 0) };
        let left = (part.left / block * block).saturating_sub(columns);
        let right = (part.left + part.width).next_multiple_of(block) + columns;
        let top = part.top.saturating_sub(rows);
        let bottom = (part.top + part.height + rows).min(self.header.height);
        let width = right.min(self.header.width) - left;
        Some(Rect { left, top, width, height: bottom - top })
    }

    /// Decodes `region`, whose left side is between two columns of blocks.
    fn decompress(&mut self, region: Rect, pixels: &mut Vec<u8>) -> Result<(), JpegError> {
        let layout = if self.header.cmyk { Pixels::Cmyk } else { Pixels::Rgb };
        self.set_region(region)?;
        let bytes = region.width * region.height * layout.channels();
        if pixels.len() < bytes {
            pixels.resize(bytes, 0);
        }
        let (jpeg, target) = (self.jpeg, pixels.as_mut_ptr());
        let handle = self.instance.0.as_ptr();
        // SAFETY: the handle is a live decompressor; the pointer to `jpeg` is good for its length.
        // The header has been read from these bytes and the region set inside its size, so that
        // without scaling, and with pitch 0 for rows without gaps, `bytes` bytes are written, which
        // `target` has room for.
        let status = unsafe {
            tj::tj3Decompress8(handle, jpeg.as_ptr(), length(jpeg), target, 0, layout.format())
        };
        self.instance.check(status)
    }

    fn set_region(&mut self, region: Rect) -> Result<(), JpegError> {
        let Header { width, height, .. } = self.header;
        let side = |side: usize| c_int::try_from(side).expect("a JPEG has at most 65,535 a side");
        let (x, y, w, h) = if region == (Rect { left: 0, top: 0, width, height }) {
            (0, 0, 0, 0) // The library's way to say: no region.
        } else {
            (side(region.left), side(region.top), side(region.width), side(region.height))
        };
        let handle = self.instance.0.as_ptr();
        // SAFETY: the handle is a live decompressor; the region is passed by value, and one that does
        // not suit the image is refused.
        let status = unsafe { tj::tj3SetCroppingRegion(handle, tj::tjregion { x, y, w, h }) };
        self.instance.check(status)
    }
}

fn decompressor() -> Instance {
    let mut instance = Instance::new(tj::TJINIT_TJINIT_DECOMPRESS);
    instance.set(tj::TJPARAM_TJPARAM_STOPONWARNING, 1);
    instance.set(tj::TJPARAM_TJPARAM_SCANLIMIT, SCANS_MAX);
    instance
}

/// The header and the library's constant for its chroma sampling.
fn read_header(instance: &mut Instance, jpeg: &[u8]) -> Result<(Header, c_int), JpegError> {
    let handle = instance.0.as_ptr();
    // SAFETY: the handle is a live decompressor and the pointer is good for `jpeg.len()` bytes,
    // which the library only reads, during the call.
    let status = unsafe { tj::tj3DecompressHeader(handle, jpeg.as_ptr(), length(jpeg)) };
    instance.check(status)?;
    let mut side = |parameter| usize::try_from(instance.value(parameter)).unwrap_or(0);
    let width = side(tj::TJPARAM_TJPARAM_JPEGWIDTH);
    let height = side(tj::TJPARAM_TJPARAM_JPEGHEIGHT);
    if width == 0 || height == 0 {
        return Err(JpegError::Library("there are tables but no image".to_owned()));
    }
    if width * height > PIXELS_MAX {
        return Err(JpegError::TooLarge { width, height });
    }
    let space = instance.value(tj::TJPARAM_TJPARAM_COLORSPACE);
    let cmyk = space == as_int(tj::TJCS_TJCS_CMYK) || space == as_int(tj::TJCS_TJCS_YCCK);
    let sampling = instance.value(tj::TJPARAM_TJPARAM_SUBSAMP);
    let chroma = match sampling {
        tj::TJSAMP_TJSAMP_444 => Chroma::Full,
        tj::TJSAMP_TJSAMP_422 => Chroma::HalfWidth,
        tj::TJSAMP_TJSAMP_420 => Chroma::Half,
        tj::TJSAMP_TJSAMP_GRAY => Chroma::Grey,
        _ => Chroma::Other,
    };
    Ok((Header { width, height, chroma, cmyk }, sampling))
}

/// A length in the library's type.
fn length(bytes: &[u8]) -> tj::size_t {
    bytes.len() as tj::size_t
}

/// Encodes an image as a baseline JPEG with optimal Huffman tables, without chroma subsampling.
///
/// `source` is `[height, width, channels]`; `quality` is 1 to 100. Equal input gives equal bytes.
///
/// # Errors
/// [`JpegError::Unencodable`] if a side is 0 or above 65,535.
///
/// # Panics
/// If the length of `source` is not that of the image, or `quality` is out of range.
pub fn encode(
    source: &[u8],
    width: usize,
    height: usize,
    layout: Pixels,
    quality: u8,
) -> Result<Vec<u8>, JpegError> {
    let sampling = match layout {
        Pixels::Grey => tj::TJSAMP_TJSAMP_GRAY,
        Pixels::Rgb | Pixels::Cmyk => tj::TJSAMP_TJSAMP_444,
    };
    encode_as(source, (width, height), layout, quality, Scheme { sampling, progressive: false })
}

/// What [`encode`] leaves out and tests need.
#[derive(Debug, Clone, Copy)]
struct Scheme {
    /// One of the library's `TJSAMP` constants.
    sampling: c_int,
    progressive: bool,
}

fn encode_as(
    source: &[u8],
    (width, height): (usize, usize),
    layout: Pixels,
    quality: u8,
    Scheme { sampling, progressive }: Scheme,
) -> Result<Vec<u8>, JpegError> {
    assert_eq!(source.len(), width * height * layout.channels(), "bytes of the image");
    let unencodable = || JpegError::Unencodable { width, height };
    let side = |side: usize| c_int::from(u16::try_from(side).unwrap_or(0));
    let (columns, rows) = (side(width), side(height));
    // SAFETY: takes numbers by value.
    let room = unsafe { tj::tj3JPEGBufSize(columns, rows, sampling) };
    if columns == 0 || rows == 0 || room == 0 {
        return Err(unencodable());
    }
    let mut instance = Instance::new(tj::TJINIT_TJINIT_COMPRESS);
    instance.set(tj::TJPARAM_TJPARAM_QUALITY, c_int::from(quality));
    instance.set(tj::TJPARAM_TJPARAM_SUBSAMP, sampling);
    instance.set(tj::TJPARAM_TJPARAM_OPTIMIZE, 1);
    instance.set(tj::TJPARAM_TJPARAM_PROGRESSIVE, c_int::from(progressive));
    instance.set(tj::TJPARAM_TJPARAM_NOREALLOC, 1);
    let mut jpeg = vec![0; usize::try_from(room).map_err(|_| unencodable())?];
    let (mut target, mut used) = (jpeg.as_mut_ptr(), length(&jpeg));
    let handle = instance.0.as_ptr();
    // SAFETY: the handle is a live compressor; `source` holds `rows` rows of `columns` pixels of this
    // layout without gaps (pitch 0); `target` has the room that the library asks for at worst, and
    // with NOREALLOC set it is never replaced.
    let status = unsafe {
        tj::tj3Compress8(
            handle,
            source.as_ptr(),
            columns,
            0,
            rows,
            layout.format(),
            &raw mut target,
            &raw mut used,
        )
    };
    instance.check(status)?;
    jpeg.truncate(usize::try_from(used).expect("at most the room it had"));
    Ok(jpeg)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gradient() -> Vec<u8> {
        (0..24_u8).flat_map(|y| (0..40_u8).flat_map(move |x| [x * 6, y * 10, 128])).collect()
    }

    #[test]
    fn an_image_survives_encoding_at_full_quality() {
        let jpeg = encode(&gradient(), 40, 24, Pixels::Rgb, 100).unwrap();
        let mut pixels = Vec::new();
        let header = decode(&jpeg, &mut pixels).unwrap();
        let expected = Header { width: 40, height: 24, chroma: Chroma::Full, cmyk: false };
        assert_eq!(header, expected);
        let largest = pixels.iter().zip(gradient()).map(|(a, b)| a.abs_diff(b)).max();
        assert!(largest <= Some(3), "a pixel moved by {largest:?}");
    }

    #[test]
    fn grey_is_replicated() {
        let jpeg = encode(&[0, 80, 160, 240], 2, 2, Pixels::Grey, 100).unwrap();
        let mut pixels = Vec::new();
        let header = decode(&jpeg, &mut pixels).unwrap();
        assert_eq!(header.chroma, Chroma::Grey);
        let (pixels, _) = pixels.as_chunks::<3>();
        assert!(pixels.iter().all(|p| p[0] == p[1] && p[1] == p[2]), "{pixels:?}");
    }

    #[test]
    fn a_truncated_image_is_an_error() {
        let jpeg = encode(&gradient(), 40, 24, Pixels::Rgb, 90).unwrap();
        let error = decode(&jpeg[..jpeg.len() - 100], &mut Vec::new()).unwrap_err();
        assert!(error.to_string().contains("end of JPEG"), "{error}");
    }

    #[test]
    fn an_image_without_tables_is_not_decoded_with_those_of_another() {
        let whole = encode(&gradient(), 40, 24, Pixels::Rgb, 90).unwrap();
        let mut pixels = Vec::new();
        decode(&whole, &mut pixels).unwrap();
        // Cut out the first quantisation table: marker, length of 67, table.
        let at = whole.windows(4).position(|bytes| bytes == b"\xFF\xDB\x00\x43").unwrap();
        let bare = [&whole[..at], &whole[at + 69..]].concat();
        let error = decode(&bare, &mut pixels).unwrap_err();
        assert!(error.to_string().contains("table"), "{error}");
    }

    #[test]
    fn any_damage_is_an_error_or_the_same_pixels_each_time() {
        let jpeg = encode(&gradient(), 40, 24, Pixels::Rgb, 90).unwrap();
        let mut reused = vec![0xAA; 40 * 24 * 3];
        for at in 0..jpeg.len() {
            let mut damaged = jpeg.clone();
            damaged[at] ^= 0x55;
            let Ok(Header { width, height, .. }) = header(&damaged) else { continue };
            if width * height > 40 * 24 {
                continue; // A damaged side can ask for a gigabyte.
            }
            let mut fresh = Vec::new();
            let (first, second) = (decode(&damaged, &mut reused), decode(&damaged, &mut fresh));
            assert_eq!(first, second, "byte {at}");
            assert!(first.is_err() || reused.starts_with(&fresh), "byte {at}");
        }
        assert!(decode(&[], &mut reused).is_err());
    }

    /// An image with detail everywhere, in luma and in chroma.
    fn noise(width: usize, height: usize) -> Vec<u8> {
        let mut state = 1_u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state.to_le_bytes()[3]
        };
        (0..width * height * 3).map(|_| next()).collect()
    }

    /// Differing bytes between parts of `jpeg` and the same parts of the whole.
    fn check_parts(jpeg: &[u8], what: &str) {
        let mut whole = Vec::new();
        let Header { width, height, .. } = decode(jpeg, &mut whole).unwrap();
        let mut part_pixels = Vec::new();
        for at in 0..100_usize {
            let (left, top) = (at * 7 % width, at * 11 % height);
            let part = Rect {
                left,
                top,
                width: 1 + at * 13 % (width - left),
                height: 1 + at * 17 % (height - top),
            };
            let held = Opened::new(jpeg).unwrap().decode_part(part, &mut part_pixels).unwrap();
            for y in part.top..part.top + part.height {
                let row = |pixels: &[u8], frame: Rect| {
                    let start = (y - frame.top) * frame.width + part.left - frame.left;
                    pixels[start * 3..][..part.width * 3].to_vec()
                };
                let frame = Rect { left: 0, top: 0, width, height };
                assert!(row(&part_pixels, held) == row(&whole, frame), "{what}: {part:?}, row {y}");
            }
        }
    }

    #[test]
    fn a_part_is_the_part_of_the_whole() {
        let samplings = [
            tj::TJSAMP_TJSAMP_444,
            tj::TJSAMP_TJSAMP_422,
            tj::TJSAMP_TJSAMP_420,
            tj::TJSAMP_TJSAMP_GRAY,
            tj::TJSAMP_TJSAMP_440,
            tj::TJSAMP_TJSAMP_411,
            tj::TJSAMP_TJSAMP_441,
        ];
        for (width, height) in [(150, 90), (64, 128), (33, 47)] {
            let pixels = noise(width, height);
            for sampling in samplings {
                for progressive in [false, true] {
                    let scheme = Scheme { sampling, progressive };
                    let jpeg =
                        encode_as(&pixels, (width, height), Pixels::Rgb, 92, scheme).unwrap();
                    check_parts(&jpeg, &format!("{width}x{height} {scheme:?}"));
                }
            }
        }
    }

    #[test]
    fn a_part_needs_less_than_the_whole() {
        let jpeg = encode(&noise(160, 160), 160, 160, Pixels::Rgb, 90).unwrap();
        let part = Rect { left: 41, top: 50, width: 30, height: 20 };
        let held = Opened::new(&jpeg).unwrap().decode_part(part, &mut Vec::new()).unwrap();
        assert_eq!(held, Rect { left: 40, top: 50, width: 32, height: 20 });
    }
}
