//! Moving the pixels of an image by an affine map, to the bit as Pillow 9.5 does it.
//!
//! For each output pixel the map says where it comes from; cubic convolution with a = -1 reads four
//! columns of four rows there, in f64, and the result is clipped and truncated. Columns beyond the
//! image repeat its border; a row beyond it repeats the result of the row before.
//!
//! A map that keeps rows (or columns) leaves a fraction of exactly 0 in that direction, where the cubic
//! is exactly its second value: one row of four is enough.

use std::{f64, io::Write};

use crate::{
    image::{CHANNELS, View},
    operation::truncate,
    simd,
};

/// From an output position `(x, y)` to the position `(ax + by + c, dx + ey + f)` that it shows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Affine {
    pub(crate) a: f64,
    pub(crate) b: f64,
    pub(crate) c: f64,
    pub(crate) d: f64,
    pub(crate) e: f64,
    pub(crate) f: f64,
}

impl Affine {
    pub(crate) const UNMOVED: Self = Self { a: 1.0, b: 0.0, c: 0.0, d: 0.0, e: 1.0, f: 0.0 };

    /// A rotation about the centre of the image; `None` for a whole number of turns.
    pub(crate) fn rotation(degrees: f64, width: usize, height: usize) -> Option<Self> {
        let turned = degrees.rem_euclid(360.0);
        if turned == 0.0 {
            return None;
        }
        let angle = -turned.to_radians();
        let (sine, cosine) = (libm::sin(angle), libm::cos(angle));
        let [a, b, d, e] = [cosine, sine, -sine, cosine].map(to_fifteen_decimals);
        let (x, y) = (width as f64 / 2.0, height as f64 / 2.0);
        let c = a * -x + b * -y + 0.0 + x;
        let f = d * -x + e * -y + 0.0 + y;
        Some(Self { a, b, c, d, e, f })
    }

    /// The column that the output shows at a position, which of a pixel is its centre.
    #[inline(always)]
    pub(crate) fn column(&self, [x, y]: [f64; 2]) -> f64 {
        self.a * x + self.b * y + self.c
    }

    /// The row likewise.
    #[inline(always)]
    pub(crate) fn row(&self, [x, y]: [f64; 2]) -> f64 {
        self.d * x + self.e * y + self.f
    }
}

/// The nearest number with fifteen decimals, found as Python does: by way of its decimal form.
fn to_fifteen_decimals(value: f64) -> f64 {
    let mut text = [0; 32];
    let mut rest = text.as_mut_slice();
    write!(rest, "{value:.15}").expect("a sine has at most 18 characters");
    let left = rest.len();
    let text = str::from_utf8(&text[..32 - left]).expect("digits are ASCII");
    text.parse().expect("a number that was just written")
}

/// Which four positions of an axis a value between them is made of, and where between them it is.
#[derive(Clone, Copy)]
struct Place {
    /// The second of the four.
    second: isize,
    fraction: f64,
}

impl Place {
    /// `None` outside of the image, `0.0..length`.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "at most a length in pixels")]
    fn at(position: f64, length: usize) -> Option<Self> {
        if !(position >= 0.0 && position < length as f64) {
            return None;
        }
        let position = position - 0.5;
        // From -0.5 on: truncation is the floor of what is one larger, less one.
        let second = (position + 1.0) as isize - 1;
        let second = if second as f64 > position { second - 1 } else { second };
        Some(Self { second, fraction: position - second as f64 })
    }

    /// The four columns, each brought into the image.
    #[inline(always)]
    fn columns(&self, width: usize) -> [usize; 4] {
        [-1, 0, 1, 2].map(|offset| clamp(self.second + offset, width))
    }

    /// The four rows: one beyond the image is the one before it.
    #[inline(always)]
    fn rows(&self, height: usize) -> [usize; 4] {
        let mut row = clamp(self.second - 1, height);
        let mut next = |offset: isize| {
            if let Some(inside) =
                usize::try_from(self.second + offset).ok().filter(|&row| row < height)
            {
                row = inside;
            }
            row
        };
        [clamp(self.second - 1, height), next(0), next(1), next(2)]
    }
}

#[inline(always)]
fn clamp(position: isize, length: usize) -> usize {
    usize::try_from(position).unwrap_or(0).min(length - 1)
}

/// Red, green, blue, and a fourth that makes a whole vector of them and is never looked at.
const LANES: usize = 4;

/// The cubic through four pixels. Its coefficients are integers and as such exact.
#[inline(always)]
fn cubic_of_pixels(values: [[i32; LANES]; 4], at: f64) -> [f64; LANES] {
    let [v1, v2, v3, v4] = values;
    std::array::from_fn(|lane| {
        let (v1, v2, v3, v4) = (v1[lane], v2[lane], v3[lane], v4[lane]);
        let p2 = f64::from(v3.wrapping_sub(v1));
        let rise = v1.wrapping_sub(v2);
        let fall = v3.wrapping_sub(v4);
        let p3 = f64::from(rise.wrapping_add(rise).wrapping_add(fall));
        let p4 = f64::from(0_i32.wrapping_sub(rise).wrapping_sub(fall));
        f64::from(v2) + at * (p2 + at * (p3 + at * p4))
    })
}

#[inline(always)]
fn cubic(values: [[f64; LANES]; 4], at: f64) -> [f64; LANES] {
    let [v1, v2, v3, v4] = values;
    std::array::from_fn(|lane| {
        let (v1, v2, v3, v4) = (v1[lane], v2[lane], v3[lane], v4[lane]);
        let p2 = -v1 + v3;
        let p3 = 2.0 * (v1 - v2) + v3 - v4;
        let p4 = -v1 + v2 - v3 + v4;
        v2 + at * (p2 + at * (p3 + at * p4))
    })
}

#[inline(always)]
fn to_pixel(values: [f64; LANES]) -> [u8; CHANNELS] {
    [truncate(values[0]), truncate(values[1]), truncate(values[2])]
}

#[inline(always)]
fn widen([red, green, blue]: [u8; CHANNELS]) -> [i32; LANES] {
    [red.into(), green.into(), blue.into(), 0]
}

/// The four pixels of `row` around a place.
#[inline(always)]
fn four_of_row(row: &[[u8; CHANNELS]], place: Place) -> [[i32; LANES]; 4] {
    let first = usize::try_from(place.second - 1).unwrap_or(usize::MAX);
    if let Some(four) = row.get(first..).and_then(|row| row.first_chunk::<4>()) {
        return four.map(widen);
    }
    place.columns(row.len()).map(|column| widen(row[column]))
}

#[inline(always)]
fn pixels_of<'a>(source: &View<'a>, y: usize) -> &'a [[u8; CHANNELS]] {
    source.row(y).as_chunks::<CHANNELS>().0
}

/// What an affine map lets a pixel be made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reads {
    /// Four pixels of one row: the map keeps rows.
    Row,
    /// Four pixels of one column: the map keeps columns.
    Column,
    /// Four rows of four pixels.
    Square,
}

impl Affine {
    /// The least that has to be read.
    pub(crate) fn reads(&self) -> Reads {
        if self.d == 0.0 && self.e == 1.0 && self.f == 0.0 {
            Reads::Row
        } else if self.a == 1.0 && self.b == 0.0 && self.c == 0.0 {
            Reads::Column
        } else {
            Reads::Square
        }
    }

    /// What the output shows at (`x`, `y`); `None` if that is from outside of the image.
    #[inline(always)]
    pub(crate) fn pixel(
        &self,
        source: &View<'_>,
        reads: Reads,
        x: usize,
        y: usize,
    ) -> Option<[u8; CHANNELS]> {
        let (width, height) = (source.width(), source.height());
        let centre = [x as f64 + 0.5, y as f64 + 0.5];
        let values = match reads {
            Reads::Row => {
                let place = Place::at(self.column(centre), width)?;
                cubic_of_pixels(four_of_row(pixels_of(source, y), place), place.fraction)
            }
            Reads::Column => {
                let place = Place::at(self.row(centre), height)?;
                let four = place.rows(height).map(|row| widen(pixels_of(source, row)[x]));
                cubic_of_pixels(four, place.fraction)
            }
            Reads::Square => {
                let column = Place::at(self.column(centre), width)?;
                let row = Place::at(self.row(centre), height)?;
                let of_row = |row: usize| {
                    let four = four_of_row(pixels_of(source, row), column);
                    cubic_of_pixels(four, column.fraction)
                };
                cubic(row.rows(height).map(of_row), row.fraction)
            }
        };
        Some(to_pixel(values))
    }
}

/// Moves the pixels of `source` to `target`, an image of the same size.
pub(crate) fn warp(source: View<'_>, affine: Affine, fill: [u8; CHANNELS], target: &mut [u8]) {
    let reads = affine.reads();
    if simd::is_available() {
        simd::warp(source, affine, reads, fill, target);
    } else {
        warp_scalar(source, affine, reads, fill, target);
    }
}

/// The definition, or one of its two shortcuts, pixel by pixel.
pub(crate) fn warp_scalar(
    source: View<'_>,
    affine: Affine,
    reads: Reads,
    fill: [u8; CHANNELS],
    target: &mut [u8],
) {
    let width = source.width();
    for (y, row) in target.chunks_exact_mut(width * CHANNELS).enumerate() {
        for (x, out) in row.as_chunks_mut::<CHANNELS>().0.iter_mut().enumerate() {
            *out = affine.pixel(&source, reads, x, y).unwrap_or(fill);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_lies_between_its_second_and_third_neighbour() {
        let place = |position| Place::at(position, 10).map(|place| (place.second, place.fraction));
        assert_eq!(place(0.0), Some((-1, 0.5)));
        assert_eq!(place(0.5), Some((0, 0.0)));
        assert_eq!(place(9.75), Some((9, 0.25)));
        assert_eq!(place(10.0), None);
        assert_eq!(place(-0.01), None);
        assert_eq!(place(f64::NAN), None);
        // Adding one must not round a place just below a pixel up to it.
        let below = 3.5_f64.next_down();
        assert_eq!(place(below), Some((2, below - 0.5 - 2.0)));
    }

    #[test]
    fn rows_beyond_the_image_repeat_the_row_before() {
        let rows = |second| Place { second, fraction: 0.0 }.rows(5);
        assert_eq!(rows(-1), [0, 0, 0, 1]);
        assert_eq!(rows(0), [0, 0, 1, 2]);
        assert_eq!(rows(4), [3, 4, 4, 4]);
        assert_eq!(Place { second: 4, fraction: 0.0 }.columns(5), [3, 4, 4, 4]);
    }

    #[test]
    fn decimals_are_rounded_as_python_rounds_them() {
        assert_eq!(to_fifteen_decimals(0.891_006_524_188_367_8), 0.891_006_524_188_368);
        assert_eq!(to_fifteen_decimals(-0.453_990_499_739_546_8), -0.453_990_499_739_547);
        assert_eq!(to_fifteen_decimals(6.1e-17), 0.0);
    }
}
