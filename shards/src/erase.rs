//! Random erasing (arXiv:1708.04896) as timm applies it in its mode `pixel`: a box of a normalised
//! image is filled with normal noise.
//!
//! The noise is a function of the box's key and a value's place in the box, so that whoever normalises
//! the batch, in whatever order, writes the same values.

use std::sync::LazyLock;

use serde::{Deserialize, Serialize};

use crate::{
    augment::{Draws, round_to_size},
    image::{CHANNELS, Rect},
    plan::mix,
};

/// How often boxes of an image are erased, and how large they are.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Erase {
    /// Probability that an image loses boxes.
    pub probability: f64,
    /// Smallest and largest share of the image's area that one box takes; each of several takes as
    /// much less.
    pub area: [f64; 2],
    /// Smallest and largest ratio of a box's height to its width.
    pub ratio: [f64; 2],
    /// Most boxes that an image loses: their number is drawn from 1 to this.
    pub count_max: u32,
}

impl Default for Erase {
    fn default() -> Self {
        Self { probability: 0.25, area: [0.02, 1.0 / 3.0], ratio: [0.3, 1.0 / 0.3], count_max: 1 }
    }
}

impl Erase {
    /// The boxes that image number `image` of a batch loses, whose side is `size`, added to `erasures`.
    pub(crate) fn draw(
        &self,
        image: usize,
        size: usize,
        draws: &mut Draws,
        erasures: &mut Vec<Erasure>,
    ) {
        if draws.unit() > self.probability {
            return;
        }
        let mut key = draws.word();
        // One box is the rule, and draws no number.
        let count =
            if self.count_max > 1 { 1 + draws.at_most(self.count_max as usize - 1) } else { 1 };
        for number in 0..count {
            if number > 0 {
                key = draws.word();
            }
            if let Some(area) = self.draw_box(size, count, draws) {
                erasures.push(Erasure { image, area, key });
            }
        }
    }

    fn draw_box(&self, size: usize, count: usize, draws: &mut Draws) -> Option<Rect> {
        const TRIES: usize = 10;
        for _ in 0..TRIES {
            let (area, ratio) = (draws.unit(), draws.unit());
            let (width, height) = self.box_size(size, count, area, ratio);
            if width < size && height < size {
                let top = draws.at_most(size - height);
                let left = draws.at_most(size - width);
                return Some(Rect { left, top, width, height });
            }
        }
        None
    }

    /// Width and height of one of `count` boxes that two numbers of `[0, 1)` choose; it may not fit.
    fn box_size(&self, size: usize, count: usize, area: f64, ratio: f64) -> (usize, usize) {
        let between = |[low, high]: [f64; 2], at: f64| low + (high - low) * at;
        let area = between(self.area, area) * (size * size) as f64 / count as f64;
        let ratio = libm::exp(between(self.ratio.map(libm::log), ratio));
        (round_to_size((area / ratio).sqrt()), round_to_size((area * ratio).sqrt()))
    }
}

/// A box of one image of a batch that noise replaces once the image is normalised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Erasure {
    /// The image's place in the batch.
    pub image: usize,
    /// Where the box lies.
    pub area: Rect,
    /// Which noise fills it, see [`noise`].
    pub key: u64,
}

impl Erasure {
    /// Fills the box in `planes`, the normalised image `[3, size, size]`. Its value at channel `c`, row
    /// `y` and column `x` of the box is `noise(key, (c * height + y) * width + x)`.
    ///
    /// # Panics
    /// If the box is not inside the image.
    pub fn fill(&self, planes: &mut [f32], size: usize) {
        let Rect { left, top, width, height } = self.area;
        assert!(left + width <= size && top + height <= size, "{:?} of {size}", self.area);
        let quantiles = &**QUANTILES;
        // The values of `noise` in order, each word made once.
        let (mut place, mut word) = (0_u64, 0_u64);
        for plane in planes.chunks_exact_mut(size * size).take(CHANNELS) {
            for row in plane.chunks_exact_mut(size).skip(top).take(height) {
                for value in &mut row[left..left + width] {
                    if place.is_multiple_of(VALUES_A_WORD) {
                        word = word_of(self.key, place / VALUES_A_WORD);
                    }
                    *value = chosen(quantiles, word);
                    word >>= 16;
                    place += 1;
                }
            }
        }
    }
}

impl Erasure {
    /// The values that fill the box, `[3, height, width]`.
    #[must_use]
    pub fn values(&self) -> Vec<f32> {
        let count = CHANNELS * self.area.height * self.area.width;
        (0..count as u64).map(|place| noise(self.key, place)).collect()
    }
}

/// Values that one random word makes.
const VALUES_A_WORD: u64 = 4;

/// Value number `place` of the noise with `key`: one of the 65,536 [quantiles](QUANTILES) of the
/// standard normal distribution, each as likely as the others.
///
/// The word for four values is output number `place / 4` of SplitMix64 (Steele, Lea and Flood, 2014)
/// seeded with `key`; its lowest 16 bits choose the first value.
#[must_use]
#[inline]
pub fn noise(key: u64, place: u64) -> f32 {
    let word = word_of(key, place / VALUES_A_WORD);
    chosen(&QUANTILES, word >> (16 * (place % VALUES_A_WORD)))
}

#[inline]
fn word_of(key: u64, number: u64) -> u64 {
    const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;
    mix(key.wrapping_add(number.wrapping_mul(GOLDEN)))
}

/// The quantile that the lowest bits choose.
#[inline]
fn chosen(quantiles: &[f32], word: u64) -> f32 {
    quantiles[usize::try_from(word & 0xFFFF).expect("16 bits")]
}

/// The standard normal distribution's quantiles at `(i + 0.5) / 65536`, 256 KiB.
///
/// Found by Newton's method from one to the next. `libm` is part of the program, so the values do not
/// depend on the system.
pub static QUANTILES: LazyLock<Box<[f32]>> = LazyLock::new(|| {
    const COUNT: usize = 1 << 16;
    let mut quantiles = vec![0.0; COUNT].into_boxed_slice();
    let mut x = 0.0;
    for upper in 0..COUNT / 2 {
        let above = 0.5 - (upper as f64 + 0.5) / COUNT as f64;
        x = quantile(above, x);
        quantiles[COUNT / 2 + upper] = single(x);
        quantiles[COUNT / 2 - 1 - upper] = -single(x);
    }
    quantiles
});

/// Where the standard normal distribution has the probability `above` above it, from a guess below.
fn quantile(above: f64, guess: f64) -> f64 {
    use std::f64::consts::{FRAC_1_SQRT_2, PI};
    let mut x = guess;
    // From the next quantile three steps give all digits; eight also when the steps are widest.
    for _ in 0..8 {
        let density = libm::exp(-x * x / 2.0) / (2.0 * PI).sqrt();
        x += (libm::erfc(x * FRAC_1_SQRT_2) / 2.0 - above) / density;
    }
    x
}

#[expect(clippy::cast_possible_truncation, reason = "rounding is what is wanted")]
fn single(value: f64) -> f32 {
    value as f32
}

#[cfg(test)]
mod tests {
    use cluster::Epoch;

    use super::*;
    use crate::augment::Decision;

    #[test]
    fn noise_is_fixed_for_all_time() {
        let values: Vec<f32> = (0..6).map(|place| noise(7, place)).collect();
        assert_eq!(values, NOISE_OF_7);
    }

    const NOISE_OF_7: [f32; 6] =
        [-1.606_614_1, -0.389_571_22, 1.187_033_9, -0.279_778, -0.256_266_9, 1.685_440_2];

    #[test]
    fn quantiles_are_those_of_the_normal_distribution() {
        let near = |place: usize, expected: f32| {
            let found = QUANTILES[place];
            assert!((found - expected).abs() < 2e-4, "{place}: {found}");
        };
        // Tables: 0.975 at 1.95996, 0.999 at 3.09023, 0.75 at 0.67449.
        near(63_897, 1.959_96);
        near(65_470, 3.090_23);
        near(49_152, 0.674_49);
        assert_eq!(QUANTILES[0], -QUANTILES[65_535]);
        assert!((4.2..4.4).contains(&QUANTILES[65_535]));
        assert!(QUANTILES.is_sorted());
    }

    #[test]
    fn noise_has_the_moments_of_the_normal_distribution() {
        let mut powers = [0.0; 4];
        let count = 400_000;
        for place in 0..count {
            let value = f64::from(noise(99, place));
            for (sum, power) in powers.iter_mut().zip(1..) {
                *sum += value.powi(power);
            }
        }
        let [mean, variance, skew, kurtosis] = powers.map(|sum| sum / count as f64);
        assert!(mean.abs() < 0.006 && skew.abs() < 0.02, "{mean}, {skew}");
        assert!((0.99..1.01).contains(&variance), "{variance}");
        assert!((2.95..3.05).contains(&kurtosis), "{kurtosis}");
    }

    #[test]
    fn a_quarter_of_the_images_loses_a_box_that_fits() {
        let mut erased = 0;
        for sample in 0..8000 {
            let mut draws = Draws::new(Decision::Erase, 3, Epoch(1), sample);
            let mut boxes = Vec::new();
            Erase::default().draw(0, 64, &mut draws, &mut boxes);
            for Erasure { area, .. } in &boxes {
                assert!(area.left + area.width <= 64 && area.top + area.height <= 64);
                assert!(area.width < 64 && area.height < 64);
            }
            erased += boxes.len();
        }
        assert!((1850..2150).contains(&erased), "{erased} of 8000");
    }

    #[test]
    fn several_boxes_share_the_area_of_one() {
        let erase = Erase { probability: 1.0, count_max: 4, ..Erase::default() };
        let mut numbers = [0; 5];
        for sample in 0..2000 {
            let mut draws = Draws::new(Decision::Erase, 3, Epoch(1), sample);
            let mut boxes = Vec::new();
            erase.draw(7, 64, &mut draws, &mut boxes);
            let share = 64.0 * 64.0 / 3.0 / boxes.len() as f64;
            // Sides are rounded.
            assert!(
                boxes.iter().all(|one| (one.area.width * one.area.height) as f64 <= share + 40.0)
            );
            assert!(boxes.iter().all(|one| one.image == 7));
            assert!(boxes.windows(2).all(|two| two[0].key != two[1].key));
            numbers[boxes.len()] += 1;
        }
        assert!(numbers[1..].iter().all(|&count| (400..600).contains(&count)), "{numbers:?}");
    }

    #[test]
    fn only_the_box_is_filled() {
        let mut planes = vec![9.0; 3 * 16];
        let area = Rect { left: 1, top: 2, width: 2, height: 1 };
        Erasure { image: 0, area, key: 5 }.fill(&mut planes, 4);
        for (place, &value) in planes.iter().enumerate() {
            let (channel, inside) = (place / 16, [9, 10].contains(&(place % 16)));
            let number = channel * 2 + place % 16 % 8 - usize::from(inside);
            let expected = if inside { noise(5, number as u64) } else { 9.0 };
            assert_eq!(value, expected, "at {place}");
        }
    }

    /// See `tests/reference.rs`; here because the decision is not public.
    #[test]
    fn box_sizes_are_the_references_where_it_is_at_hand() {
        let path =
            concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/reference/golden/augment.json");
        let Ok(text) = std::fs::read_to_string(path) else {
            println!("nothing checked: there is no {path}");
            return;
        };
        let cases: serde_json::Value = serde_json::from_str(&text).unwrap();
        let rows = cases["erase_sampler"]["rows"].as_array().unwrap();
        for row in rows {
            let number = |field: &str| usize::try_from(row[field].as_u64().unwrap()).unwrap();
            let unit = |field: &str| row[field].as_f64().unwrap();
            let (size, erase) = (number("size"), Erase::default());
            let (width, height) = erase.box_size(size, 1, unit("u_area"), unit("u_ratio"));
            assert_eq!((height, width), (number("h"), number("w")), "{row}");
            assert_eq!(width < size && height < size, row["accepted"].as_bool().unwrap());
        }
        assert!(rows.len() > 20);
    }
}
