//! Baseline JPEG with full-resolution chroma, decoded by our own Huffman decoder and libjpeg-turbo's own
//! kernels: three in four images of ImageNet are of this kind.
//!
//! Blocks outside of the part that is asked for are only passed over. Whatever is not plain (another
//! kind of JPEG, restart markers, damage of any sort) is left to libjpeg-turbo.

use super::{
    entropy::{BLOCK, Bits, Kind, Odd, PADDING, Table, ZIGZAG, coefficients, difference},
    kernels::{SIDE, Strip, are_available},
};
use crate::image::Rect;

/// Components of a colour image.
const COMPONENTS: usize = 3;

/// Tables of each kind that a baseline image may have.
const TABLES: usize = 2;
const QUANTIZERS: usize = 4;

const END_OF_IMAGE: &[u8] = b"\xFF\xD9";

/// Decodes images of this kind. Keeps its buffers between images, and nothing else.
#[derive(Debug, Default)]
pub(crate) struct Baseline {
    dc: [Table; TABLES],
    ac: [Table; TABLES],
    /// The scan's bytes without stuffing.
    scan: Vec<u8>,
    strip: Strip,
}

/// What the headers say.
#[derive(Debug, Default)]
struct Frame {
    width: usize,
    height: usize,
    components: [Component; COMPONENTS],
    quantizers: [Option<[i16; BLOCK]>; QUANTIZERS],
    dc: [bool; TABLES],
    ac: [bool; TABLES],
}

#[derive(Debug, Clone, Copy, Default)]
struct Component {
    id: u8,
    quantizer: usize,
    dc: usize,
    ac: usize,
}

impl Baseline {
    /// Decodes the blocks about `part` into `pixels`, which is grown when it is too short, and returns
    /// the rectangle that they cover; it may go beyond the image's right and lower border. `None`: ask
    /// libjpeg-turbo. The caller knows that the image is YCbCr with full-resolution chroma.
    pub(super) fn decode(&mut self, jpeg: &[u8], part: Rect, pixels: &mut Vec<u8>) -> Option<Rect> {
        if !are_available() {
            return None;
        }
        self.try_decode(jpeg, part, pixels).ok()
    }

    fn try_decode(&mut self, jpeg: &[u8], part: Rect, pixels: &mut Vec<u8>) -> Result<Rect, Odd> {
        let (frame, scan) = self.read_headers(jpeg)?;
        if part.left + part.width > frame.width || part.top + part.height > frame.height {
            return Err(Odd);
        }
        let after = unstuff(scan, &mut self.scan);
        let columns = part.left / SIDE..(part.left + part.width).div_ceil(SIDE);
        let rows = part.top / SIDE..(part.top + part.height).div_ceil(SIDE);
        let (width, height) = (columns.len() * SIDE, rows.len() * SIDE);
        let bytes = width * height * 3;
        if pixels.len() < bytes {
            pixels.resize(bytes, 0);
        }
        self.strip.prepare(columns.len());
        let all_columns = frame.width.div_ceil(SIDE);
        let mut bits = Bits::new(&self.scan);
        let mut before = [0_i16; COMPONENTS];
        let mut block = [0; BLOCK];
        let [one, two, three] = frame.components;
        let planes = [(0, one), (1, two), (2, three)].map(|(plane, component)| {
            let table = frame.quantizers[component.quantizer].as_ref().ok_or(Odd)?;
            Ok((plane, &self.dc[component.dc], &self.ac[component.ac], table))
        });
        let [one, two, three] = planes;
        let planes = [one?, two?, three?];
        for row in 0..rows.end {
            for column in 0..all_columns {
                let kept = row >= rows.start && columns.contains(&column);
                for &(plane, dc, ac, table) in &planes {
                    let change = difference(&mut bits, dc)?;
                    before[plane] = before[plane].checked_add(change).ok_or(Odd)?;
                    if kept {
                        block.fill(0);
                        block[0] = before[plane];
                        coefficients::<true>(&mut bits, ac, &mut block)?;
                        self.strip.put(plane, column - columns.start, table, &block);
                    } else {
                        coefficients::<false>(&mut bits, ac, &mut block)?;
                    }
                }
            }
            if row >= rows.start {
                let line = SIDE * width * 3;
                let target = &mut pixels[(row - rows.start) * line..][..line];
                self.strip.write_rgb(width, target);
            }
        }
        // Below the last row the library looks at what follows the scan.
        let at_end = rows.end == frame.height.div_ceil(SIDE);
        match bits.left().ok_or(Odd)? {
            0..8 if after.starts_with(END_OF_IMAGE) => {}
            _ if !at_end => {}
            _ => return Err(Odd),
        }
        Ok(Rect { left: columns.start * SIDE, top: rows.start * SIDE, width, height })
    }

    /// Everything before the scan, and the scan.
    fn read_headers<'a>(&mut self, jpeg: &'a [u8]) -> Result<(Frame, &'a [u8]), Odd> {
        let mut frame = Frame::default();
        let mut seen = false;
        let mut rest = jpeg.strip_prefix(b"\xFF\xD8").ok_or(Odd)?;
        loop {
            let (&[0xFF, marker, high, low], _) = rest.split_first_chunk::<4>().ok_or(Odd)? else {
                return Err(Odd);
            };
            let length = usize::from(u16::from_be_bytes([high, low]));
            let segment = rest.get(4..2 + length).ok_or(Odd)?;
            rest = &rest[2 + length..];
            match marker {
                0xC0 if !seen => {
                    seen = true;
                    frame.read_frame(segment)?;
                }
                0xC4 => self.read_tables(&mut frame, segment)?,
                0xDB => frame.read_quantizers(segment)?,
                0xDA if seen => {
                    frame.read_scan(segment)?;
                    return Ok((frame, rest));
                }
                // Application data and comments; libjpeg-turbo has read what they mean.
                0xE0..=0xEF | 0xFE => {}
                _ => return Err(Odd),
            }
        }
    }

    fn read_tables(&mut self, frame: &mut Frame, mut segment: &[u8]) -> Result<(), Odd> {
        while let Some((&[class], rest)) = segment.split_first_chunk::<1>() {
            let (counts, rest) = rest.split_first_chunk::<16>().ok_or(Odd)?;
            let total: usize = counts.iter().map(|&count| usize::from(count)).sum();
            let symbols = rest.get(..total).ok_or(Odd)?;
            let number = usize::from(class & 15);
            if number >= TABLES {
                return Err(Odd);
            }
            match class >> 4 {
                0 => {
                    self.dc[number].set(Kind::Dc, counts, symbols)?;
                    frame.dc[number] = true;
                }
                1 => {
                    self.ac[number].set(Kind::Ac, counts, symbols)?;
                    frame.ac[number] = true;
                }
                _ => return Err(Odd),
            }
            segment = &rest[total..];
        }
        Ok(())
    }
}

impl Frame {
    fn read_frame(&mut self, segment: &[u8]) -> Result<(), Odd> {
        let (&[precision, h1, h0, w1, w0, count], parts) =
            segment.split_first_chunk::<6>().ok_or(Odd)?;
        if precision != 8 || usize::from(count) != COMPONENTS || parts.len() != 3 * COMPONENTS {
            return Err(Odd);
        }
        self.height = usize::from(u16::from_be_bytes([h1, h0]));
        self.width = usize::from(u16::from_be_bytes([w1, w0]));
        for (component, &[id, sampling, quantizer]) in
            self.components.iter_mut().zip(parts.as_chunks::<3>().0)
        {
            if sampling != 0x11 || usize::from(quantizer) >= QUANTIZERS {
                return Err(Odd);
            }
            *component = Component { id, quantizer: usize::from(quantizer), dc: 0, ac: 0 };
        }
        if self.width == 0 || self.height == 0 { Err(Odd) } else { Ok(()) }
    }

    fn read_quantizers(&mut self, mut segment: &[u8]) -> Result<(), Odd> {
        while let Some((&[number], rest)) = segment.split_first_chunk::<1>() {
            let (steps, rest) = rest.split_first_chunk::<BLOCK>().ok_or(Odd)?;
            let table = self.quantizers.get_mut(usize::from(number)).ok_or(Odd)?;
            let mut natural = [0; BLOCK];
            for (&place, &step) in ZIGZAG.iter().zip(steps) {
                natural[usize::from(place)] = i16::from(step);
            }
            *table = Some(natural);
            segment = rest;
        }
        Ok(())
    }

    /// One scan has all components, in the frame's order, whole.
    fn read_scan(&mut self, segment: &[u8]) -> Result<(), Odd> {
        let (&[count], rest) = segment.split_first_chunk::<1>().ok_or(Odd)?;
        let (parts, end) = rest.split_at_checked(2 * COMPONENTS).ok_or(Odd)?;
        if usize::from(count) != COMPONENTS || end != [0, 63, 0] {
            return Err(Odd);
        }
        for (component, &[id, tables]) in self.components.iter_mut().zip(parts.as_chunks::<2>().0) {
            let (dc, ac) = (usize::from(tables >> 4), usize::from(tables & 15));
            let there = |tables: &[bool; TABLES], number| tables.get(number) == Some(&true);
            if id != component.id || !there(&self.dc, dc) || !there(&self.ac, ac) {
                return Err(Odd);
            }
            (component.dc, component.ac) = (dc, ac);
        }
        Ok(())
    }
}

/// Puts the bytes of a scan up to the next marker, without the zeros after bytes of 255, into `bytes`.
/// Returns what follows.
fn unstuff<'a>(scan: &'a [u8], bytes: &mut Vec<u8>) -> &'a [u8] {
    bytes.clear();
    bytes.reserve(scan.len() + PADDING);
    let mut rest = scan;
    while let Some(at) = memchr::memchr(0xFF, rest) {
        bytes.extend_from_slice(&rest[..at]);
        rest = &rest[at..];
        if rest.get(1) != Some(&0) {
            break;
        }
        bytes.push(0xFF);
        rest = &rest[2..];
    }
    if !rest.starts_with(&[0xFF]) {
        bytes.extend_from_slice(rest);
        rest = &[];
    }
    bytes.extend_from_slice(&[0; PADDING]);
    rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jpeg::{JpegError, Opened, Pixels, encode};

    /// An image with detail and with even parts.
    fn photo(width: usize, height: usize, noise: u32) -> Vec<u8> {
        let mut state = 7_u32;
        let mut random = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state >> 24
        };
        let mut pixels = Vec::with_capacity(width * height * 3);
        for y in 0..height {
            for x in 0..width {
                for channel in 1..=3 {
                    let smooth = (x * channel + y * (4 - channel)) % 256;
                    let rough = if x / 16 % 2 == 0 { random() % (noise + 1) } else { 0 };
                    pixels.push((smooth.to_le_bytes()[0]).wrapping_add(rough.to_le_bytes()[0]));
                }
            }
        }
        pixels
    }

    fn cut(pixels: &[u8], held: Rect, part: Rect) -> Vec<u8> {
        let rows = part.top - held.top..part.top + part.height - held.top;
        let start = |row: usize| (row * held.width + part.left - held.left) * 3;
        rows.flat_map(|row| pixels[start(row)..][..part.width * 3].to_vec()).collect()
    }

    /// What libjpeg-turbo makes of a part.
    fn by_library(jpeg: &[u8], part: Rect) -> Result<Vec<u8>, JpegError> {
        let mut pixels = Vec::new();
        let held = Opened::new(jpeg)?.decode_part(part, &mut pixels)?;
        Ok(cut(&pixels, held, part))
    }

    /// The same by the fast way, if that is taken.
    fn fast(baseline: &mut Baseline, jpeg: &[u8], part: Rect) -> Option<Vec<u8>> {
        let mut pixels = Vec::new();
        let held = baseline.decode(jpeg, part, &mut pixels)?;
        Some(cut(&pixels, held, part))
    }

    fn parts(width: usize, height: usize) -> impl Iterator<Item = Rect> {
        (0..24_usize).map(move |at| {
            let (left, top) = (at * 7 % width, at * 11 % height);
            let width = 1 + at * 13 % (width - left);
            Rect { left, top, width, height: 1 + at * 17 % (height - top) }
        })
    }

    #[test]
    fn pixels_are_the_librarys_for_every_size_and_quality() {
        if !are_available() {
            return;
        }
        let mut baseline = Baseline::default();
        for (width, height) in [(1, 1), (8, 8), (33, 47), (150, 90), (64, 128)] {
            for (quality, noise) in [(5, 255), (40, 60), (90, 0), (96, 255), (100, 255)] {
                let pixels = photo(width, height, noise);
                let jpeg = encode(&pixels, width, height, Pixels::Rgb, quality).unwrap();
                for part in parts(width, height) {
                    let found = fast(&mut baseline, &jpeg, part);
                    let expected = by_library(&jpeg, part).unwrap();
                    assert!(found == Some(expected), "{width}x{height}, {quality}: {part:?}");
                }
            }
        }
    }

    #[test]
    fn what_is_damaged_is_left_to_the_library_or_alike() {
        if !are_available() {
            return;
        }
        let (width, height) = (72, 56);
        let jpeg = encode(&photo(width, height, 200), width, height, Pixels::Rgb, 85).unwrap();
        let mut random = 1_u64;
        let mut below = |limit: usize| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            usize::try_from(random >> 33).unwrap() % limit
        };
        let (mut baseline, mut taken) = (Baseline::default(), 0);
        for case in 0..12_000 {
            let mut damaged = jpeg.clone();
            for _ in 0..=below(2) {
                // Headers, where a byte decides more, are damaged as often as the scan.
                let reach = if below(2) == 0 { damaged.len() } else { 700.min(damaged.len()) };
                damaged[below(reach)] = below(256).to_le_bytes()[0];
            }
            if below(8) == 0 {
                damaged.truncate(below(damaged.len()));
            }
            let Ok(opened) = Opened::new(&damaged) else { continue };
            let header = opened.header();
            let fits = (8..200).contains(&header.width) && (8..200).contains(&header.height);
            if !fits || header.cmyk {
                continue;
            }
            let (left, top) = (below(header.width - 7), below(header.height - 7));
            let width = 1 + below(header.width - left);
            let part = Rect { left, top, width, height: 1 + below(header.height - top) };
            // By the way that the decoder goes, which asks the library about colours first.
            let mut pixels = Vec::new();
            let held = Opened::new(&damaged)
                .unwrap()
                .decode_part_with(&mut baseline, part, &mut pixels)
                .map(|held| cut(&pixels, held, part));
            assert_eq!(held, by_library(&damaged, part), "case {case}: {part:?}");
            taken += u32::from(held.is_ok());
        }
        assert!(taken > 300, "{taken} of the damaged images were still images");
    }
}
