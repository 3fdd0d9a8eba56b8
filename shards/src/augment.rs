//! What training does to an image at random, and how the random choices are made.
//!
//! Every choice is drawn from a counter-based generator keyed by (run seed, epoch, sample id): never
//! by worker, rank or a global state, so a sample has the same pixels wherever it is prepared. Each
//! decision has a generator of its own, so an operation added later leaves the others' choices as
//! they are.

use cluster::Epoch;
use rand_chacha::ChaCha8Rng;
use rand_core::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

use crate::{erase::Erase, image::Rect, rand_augment::RandAugment};

/// Which part of a training image is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Crop {
    /// A random part of random size and aspect ratio, resized to the output (Inception's crop).
    #[default]
    RandomResized,
    /// The image with a black margin, and of that a random part of the output's size.
    Padded,
    /// The whole image, resized to the output.
    None,
}

/// Settings of the image transforms, as a recipe has them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Augment {
    /// Which part of a training image is taken: `"random-resized"`, `"padded"` or `"none"`.
    pub crop: Crop,
    /// Smallest and largest share of the image's area that a random resized crop takes.
    pub scale: [f64; 2],
    /// Smallest and largest aspect ratio (width / height) of a random resized crop.
    pub ratio: [f64; 2],
    /// Width of the margin of a padded crop, in pixels.
    pub padding: u32,
    /// Probability that a training image is mirrored left to right.
    pub flip_probability: f64,
    /// Operations after the flip, as timm writes them: `"rand-m9-mstd0.5-inc1"`. Off if not given.
    pub rand_augment: Option<RandAugment>,
    /// Strength of the brightness, contrast and saturation jitter after the flip; 0 is off. As in
    /// timm it is ignored where `rand_augment` is given.
    pub color_jitter: f64,
    /// The boxes that noise replaces in the normalised image. Off if not given.
    pub erase: Option<Erase>,
    /// Share of the resized image's short side that the evaluation crop takes.
    pub crop_pct: f64,
    /// Mean of red, green and blue that is subtracted, on the scale 0 to 1.
    pub mean: [f32; 3],
    /// Standard deviation of red, green and blue that is divided by, on the scale 0 to 1.
    pub std: [f32; 3],
}

impl Default for Augment {
    fn default() -> Self {
        Self {
            crop: Crop::RandomResized,
            scale: [0.08, 1.0],
            ratio: [3.0 / 4.0, 4.0 / 3.0],
            padding: 4,
            flip_probability: 0.5,
            rand_augment: None,
            color_jitter: 0.0,
            erase: None,
            crop_pct: 224.0 / 256.0,
            mean: [0.485, 0.456, 0.406],
            std: [0.229, 0.224, 0.225],
        }
    }
}

/// Settings that cannot be used: every problem, not only the first.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("image transform settings: {}", .problems.join("; "))]
pub struct InvalidAugment {
    /// One line a problem, each naming its field.
    pub problems: Vec<String>,
}

impl Augment {
    /// Checks that the settings can be used.
    ///
    /// # Errors
    /// [`InvalidAugment`] lists every field whose value is out of range.
    pub fn check(&self) -> Result<(), InvalidAugment> {
        let ordered = |[low, high]: [f64; 2]| 0.0 < low && low <= high && high.is_finite();
        let erase = self.erase.unwrap_or_default();
        let checks = [
            (ordered(self.scale) && self.scale[1] <= 1.0, "`scale` must be 0 < low <= high <= 1"),
            (ordered(self.ratio), "`ratio` must be 0 < low <= high"),
            (self.padding <= 1 << 16, "`padding` must be at most 65536"),
            ((0.0..=1.0).contains(&self.flip_probability), "`flip_probability` must be 0 to 1"),
            ((0.0..=100.0).contains(&self.color_jitter), "`color_jitter` must be 0 (off) to 100"),
            ((0.0..=1.0).contains(&erase.probability), "`erase.probability` must be 0 to 1"),
            (
                ordered(erase.area) && erase.area[1] <= 1.0,
                "`erase.area` must be 0 < low <= high <= 1",
            ),
            (ordered(erase.ratio), "`erase.ratio` must be 0 < low <= high"),
            ((1..=16).contains(&erase.count_max), "`erase.count_max` must be 1 to 16"),
            (0.0 < self.crop_pct && self.crop_pct <= 1.0, "`crop_pct` must be 0 < value <= 1"),
            (self.mean.iter().all(|mean| mean.is_finite()), "`mean` must be three numbers"),
            (self.std.iter().all(|std| *std > 0.0 && std.is_finite()), "`std` must be above 0"),
        ];
        let problems: Vec<String> =
            checks.iter().filter(|(holds, _)| !holds).map(|&(_, rule)| rule.to_owned()).collect();
        if problems.is_empty() { Ok(()) } else { Err(InvalidAugment { problems }) }
    }

    /// The part of a `width` × `height` image that a random resized crop takes.
    ///
    /// Up to ten tries of a random area and ratio; the first that fits is placed at random. If none
    /// fits, the largest part of allowed ratio, centred.
    pub(crate) fn random_resized_crop(
        &self,
        width: usize,
        height: usize,
        draws: &mut Draws,
    ) -> Rect {
        const TRIES: usize = 10;
        for _ in 0..TRIES {
            let (area, ratio) = (draws.unit(), draws.unit());
            let (w, h) = self.crop_size(width, height, area, ratio);
            if w <= width && h <= height && w > 0 && h > 0 {
                let top = draws.at_most(height - h);
                let left = draws.at_most(width - w);
                return Rect { left, top, width: w, height: h };
            }
        }
        self.fallback_crop(width, height)
    }

    /// Width and height of the crop that two numbers of `[0, 1)` choose; it may not fit.
    fn crop_size(&self, width: usize, height: usize, area: f64, ratio: f64) -> (usize, usize) {
        let between = |[low, high]: [f64; 2], at: f64| low + (high - low) * at;
        let area = (width * height) as f64 * between(self.scale, area);
        let ratio = libm::exp(between(self.ratio.map(libm::log), ratio));
        (round_to_size((area * ratio).sqrt()), round_to_size((area / ratio).sqrt()))
    }

    fn fallback_crop(&self, width: usize, height: usize) -> Rect {
        let [low, high] = self.ratio;
        let (w, h) = (width as f64, height as f64);
        let (crop_width, crop_height) = if w / h < low {
            (width, round_to_size(w / low).clamp(1, height))
        } else if w / h > high {
            (round_to_size(h * high).clamp(1, width), height)
        } else {
            (width, height)
        };
        Rect {
            left: (width - crop_width) / 2,
            top: (height - crop_height) / 2,
            width: crop_width,
            height: crop_height,
        }
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "lengths in pixels: not negative and far below the type's limit"
)]
pub(crate) fn round_to_size(length: f64) -> usize {
    length.round_ties_even() as usize
}

/// A decision about one sample in one epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Decision {
    /// Which part of the image is taken.
    Crop,
    /// Whether it is mirrored.
    Flip,
    /// Which operations of RandAugment or of the colour jitter it gets, and how strongly.
    Operations,
    /// Which box of it is erased, and by what noise.
    Erase,
}

impl Decision {
    /// First word of the generator's key. Changing one changes every run's pixels.
    fn domain(self) -> u64 {
        u64::from_le_bytes(match self {
            Self::Crop => *b"pix.crop",
            Self::Flip => *b"pix.flip",
            Self::Operations => *b"pix.oper",
            Self::Erase => *b"pix.eras",
        })
    }
}

/// The random numbers of one decision: ChaCha with 8 rounds, keyed by what is decided.
#[derive(Debug)]
pub(crate) struct Draws(ChaCha8Rng);

impl Draws {
    pub(crate) fn new(decision: Decision, seed: u64, epoch: Epoch, sample: u64) -> Self {
        Self::keyed([decision.domain(), seed, epoch.0, sample])
    }

    pub(crate) fn keyed(words: [u64; 4]) -> Self {
        let mut key = [0; 32];
        for (bytes, word) in key.chunks_exact_mut(8).zip(words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        Self(ChaCha8Rng::from_seed(key))
    }

    /// Uniform in `[0, 1)`, a multiple of 2^-53.
    pub(crate) fn unit(&mut self) -> f64 {
        (self.0.next_u64() >> 11) as f64 * (1.0 / (1_u64 << 53) as f64)
    }

    /// From the standard normal distribution (Box and Muller, 1958).
    pub(crate) fn normal(&mut self) -> f64 {
        let radius = (-2.0 * libm::log(1.0 - self.unit())).sqrt();
        radius * libm::cos(std::f64::consts::TAU * self.unit())
    }

    /// From the gamma distribution of this shape and scale 1 (Marsaglia and Tsang, 2000).
    fn gamma(&mut self, shape: f64) -> f64 {
        if shape < 1.0 {
            let power = libm::pow(1.0 - self.unit(), 1.0 / shape);
            return self.gamma(shape + 1.0) * power;
        }
        let d = shape - 1.0 / 3.0;
        loop {
            let x = self.normal();
            let root = 1.0 + x / (9.0 * d).sqrt();
            let v = root * root * root;
            let bound = 0.5 * x * x + d - d * v + d * libm::log(v.max(f64::MIN_POSITIVE));
            if root > 0.0 && libm::log(1.0 - self.unit()) < bound {
                return d * v;
            }
        }
    }

    /// From the beta distribution with both parameters `shape`.
    pub(crate) fn beta(&mut self, shape: f64) -> f64 {
        let (one, other) = (self.gamma(shape), self.gamma(shape));
        // Of a very small shape both can be too small to tell apart: then all the weight is on one.
        if one + other > 0.0 { one / (one + other) } else { self.unit().round() }
    }

    /// 64 random bits.
    pub(crate) fn word(&mut self) -> u64 {
        self.0.next_u64()
    }

    /// A uniform integer of `0..=most`.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a product of a number below 1 and a length in pixels"
    )]
    pub(crate) fn at_most(&mut self, most: usize) -> usize {
        // The product can round up to `most + 1` only from 2^53 on; images are smaller.
        (self.unit() * (most + 1) as f64) as usize
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn draws(sample: u64) -> Draws {
        Draws::new(Decision::Crop, 1, Epoch(2), sample)
    }

    #[test]
    fn random_numbers_are_fixed_for_all_time() {
        // A run that resumes under a newer version must see the same pixels.
        let mut crop = draws(3);
        let mut flip = Draws::new(Decision::Flip, 1, Epoch(2), 3);
        assert_eq!(
            [crop.unit(), crop.unit(), flip.unit()],
            [0.88211029276903, 0.3262788001859095, 0.6546261581821723]
        );
    }

    #[test]
    fn every_part_of_the_key_matters() {
        let first = |decision, seed, epoch, sample| {
            Draws::new(decision, seed, Epoch(epoch), sample).unit().to_bits()
        };
        let base = first(Decision::Crop, 1, 2, 3);
        assert_ne!(base, first(Decision::Flip, 1, 2, 3));
        assert_ne!(base, first(Decision::Crop, 2, 2, 3));
        assert_ne!(base, first(Decision::Crop, 1, 3, 3));
        assert_ne!(base, first(Decision::Crop, 1, 2, 4));
    }

    #[test]
    fn crops_cover_the_image_evenly() {
        let mut left_total = 0;
        for sample in 0..4000 {
            let rect = Augment::default().random_resized_crop(100, 100, &mut draws(sample));
            left_total += 2 * rect.left + rect.width;
        }
        let centre = left_total as f64 / 8000.0;
        assert!((49.0..51.0).contains(&centre), "mean centre {centre}");
    }

    /// Image width and height, two uniform numbers, and the crop's width and height, from torchvision.
    #[test]
    fn crop_sizes_are_torchvisions() {
        let crops = [
            (500, 375, 0.6992282994025627, 0.01628736312685808, 320, 423),
            (375, 500, 0.24868866012367763, 0.15940524394921618, 218, 265),
        ];
        for (width, height, area, ratio, crop_width, crop_height) in crops {
            let size = Augment::default().crop_size(width, height, area, ratio);
            assert_eq!(size, (crop_width, crop_height));
        }
    }

    #[test]
    fn an_image_of_extreme_shape_is_cropped_at_its_centre() {
        let rect = Augment::default().fallback_crop(400, 50);
        assert_eq!(rect, Rect { left: 166, top: 0, width: 67, height: 50 });
        let rect = Augment::default().fallback_crop(50, 400);
        assert_eq!(rect, Rect { left: 0, top: 166, width: 50, height: 67 });
    }

    #[test]
    fn all_problems_are_reported_at_once() {
        let wrong = Augment { scale: [0.0, 1.0], std: [0.0; 3], ..Augment::default() };
        let message = wrong.check().unwrap_err().to_string();
        assert!(message.contains("`scale`") && message.contains("`std`"), "{message}");
        assert_eq!(Augment::default().check(), Ok(()));
    }

    #[test]
    fn settings_have_defaults_and_no_unknown_fields() {
        let some: Augment = serde_json::from_str(r#"{"crop": "padded", "padding": 2}"#).unwrap();
        assert_eq!(some, Augment { crop: Crop::Padded, padding: 2, ..Augment::default() });
        let error = serde_json::from_str::<Augment>(r#"{"flip": 0.5}"#).unwrap_err().to_string();
        assert!(error.contains("unknown field `flip`"), "{error}");
    }

    /// See `tests/reference.rs`; here because the decision is not public.
    #[test]
    fn crop_sizes_are_the_references_where_it_is_at_hand() {
        let path =
            concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/reference/golden/augment.json");
        let Ok(text) = std::fs::read_to_string(path) else {
            println!("nothing checked: there is no {path}");
            return;
        };
        let cases: serde_json::Value = serde_json::from_str(&text).unwrap();
        let augment = Augment::default();
        let number = |case: &serde_json::Value, field: &str| {
            usize::try_from(case[field].as_u64().unwrap()).unwrap()
        };
        for row in cases["crop_sampler"]["rows"].as_array().unwrap() {
            let unit = |field: &str| row[field].as_f64().unwrap();
            let (width, height) = (number(row, "width"), number(row, "height"));
            let size = augment.crop_size(width, height, unit("u_area"), unit("u_ratio"));
            assert_eq!(size, (number(row, "w"), number(row, "h")), "{row}");
        }
        for row in cases["crop_sampler"]["fallback"].as_array().unwrap() {
            let rect = augment.fallback_crop(number(row, "width"), number(row, "height"));
            let [left, top, width, height] = ["j", "i", "w", "h"].map(|field| number(row, field));
            assert_eq!(rect, Rect { left, top, width, height }, "{row}");
        }
    }

    proptest! {
        #[test]
        fn a_crop_lies_inside(width in 1usize..700, height in 1usize..700, sample: u64) {
            let rect = Augment::default().random_resized_crop(width, height, &mut draws(sample));
            prop_assert!(rect.width > 0 && rect.left + rect.width <= width);
            prop_assert!(rect.height > 0 && rect.top + rect.height <= height);
        }
    }
}
