//! RandAugment (arXiv:1909.13719) as timm 0.4.12 applies it, and the colour jitter that takes its
//! place where it is off: which operations an image gets, and how strongly.

use serde::{Deserialize, Serialize};

use crate::{augment::Draws, operation::Operation};

/// The scale of levels: settings and operations are at full strength here.
const LEVEL_MAX: f64 = 10.0;

/// How images are changed at random, between the flip and the normalisation.
///
/// Written as timm writes it, `rand-m9-mstd0.5-inc1`: magnitude 9 with a standard deviation of 0.5,
/// and operations that get stronger with the magnitude.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RandAugment {
    magnitude: f64,
    magnitude_std: f64,
    operations: u32,
}

/// Probability that an operation is applied after it has been chosen.
const APPLIED: f64 = 0.5;

/// Operations an image gets unless the setting says another number.
const OPERATIONS: u32 = 2;

/// A RandAugment setting that is not understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "augmentation {setting:?} is not supported: it must be like \"rand-m9-mstd0.5-inc1\", of \
     `rand` and mN (0 to 10), mstdN (0 to 100), nN (1 to 8) and inc1"
)]
pub struct UnknownRandAugment {
    /// The setting as given.
    pub setting: String,
}

impl RandAugment {
    /// That of the published recipes, `rand-m9-mstd0.5-inc1`.
    #[must_use]
    pub fn published() -> Self {
        Self { magnitude: 9.0, magnitude_std: 0.5, operations: OPERATIONS }
    }

    /// Understands the settings `rand-mN[-mstdN][-nN]-inc1`. Other policies and the weaker-going
    /// operations of `inc0` are refused.
    ///
    /// # Errors
    /// [`UnknownRandAugment`] repeats the setting.
    pub fn parse(setting: &str) -> Result<Self, UnknownRandAugment> {
        Self::understood(setting).ok_or_else(|| UnknownRandAugment { setting: setting.to_owned() })
    }

    fn understood(setting: &str) -> Option<Self> {
        let mut parts = setting.strip_prefix("rand-")?.split('-');
        let mut magnitude = None;
        let (mut magnitude_std, mut operations, mut increasing) = (None, None, None);
        parts.try_for_each(|part| {
            let digits = part.find(|c: char| c.is_ascii_digit())?;
            let (name, value) = part.split_at(digits);
            let slot = match name {
                "m" => &mut magnitude,
                "mstd" => &mut magnitude_std,
                "n" => &mut operations,
                "inc" => &mut increasing,
                _ => return None,
            };
            // A part that comes twice is a mistake.
            slot.is_none().then_some(())?;
            *slot = Some(value.parse::<f64>().ok()?);
            Some(())
        })?;
        let operations = match operations {
            None => OPERATIONS,
            Some(count) => (1..=8).find(|&whole| f64::from(whole) == count)?,
        };
        let magnitude = magnitude.filter(|level| (0.0..=LEVEL_MAX).contains(level))?;
        let magnitude_std = magnitude_std.unwrap_or(0.0);
        let usable = (0.0..=100.0).contains(&magnitude_std) && increasing == Some(1.0);
        usable.then_some(Self { magnitude, magnitude_std, operations })
    }

    /// The operations for one image, in the order they are applied.
    pub(crate) fn draw(self, draws: &mut Draws) -> impl Iterator<Item = Operation> {
        (0..self.operations).filter_map(move |_| {
            let kind = KINDS[draws.at_most(KINDS.len() - 1)];
            let applied = draws.unit() < APPLIED;
            let level =
                (self.magnitude + self.magnitude_std * draws.normal()).clamp(0.0, LEVEL_MAX);
            let negative = draws.unit() < 0.5;
            // What is not applied draws as much as what is, so each choice has its fixed place.
            applied.then(|| kind.at_level(level, negative))
        })
    }
}

impl TryFrom<String> for RandAugment {
    type Error = UnknownRandAugment;

    fn try_from(setting: String) -> Result<Self, Self::Error> {
        Self::parse(&setting)
    }
}

impl From<RandAugment> for String {
    fn from(setting: RandAugment) -> Self {
        let RandAugment { magnitude, magnitude_std, operations } = setting;
        let number = if operations == OPERATIONS { Self::new() } else { format!("-n{operations}") };
        format!("rand-m{magnitude}-mstd{magnitude_std}{number}-inc1")
    }
}

/// An operation whose strength is not yet chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// See [`Operation::AutoContrast`].
    AutoContrast,
    /// See [`Operation::Equalize`].
    Equalize,
    /// See [`Operation::Invert`].
    Invert,
    /// See [`Operation::Rotate`].
    Rotate,
    /// See [`Operation::Posterize`].
    Posterize,
    /// See [`Operation::Solarize`].
    Solarize,
    /// See [`Operation::SolarizeAdd`].
    SolarizeAdd,
    /// See [`Operation::Color`].
    Color,
    /// See [`Operation::Contrast`].
    Contrast,
    /// See [`Operation::Brightness`].
    Brightness,
    /// See [`Operation::Sharpness`].
    Sharpness,
    /// See [`Operation::ShearX`].
    ShearX,
    /// See [`Operation::ShearY`].
    ShearY,
    /// See [`Operation::TranslateX`].
    TranslateX,
    /// See [`Operation::TranslateY`].
    TranslateY,
}

/// What RandAugment chooses from, each as likely as the others. The order is part of every run's
/// pixels.
pub const KINDS: [Kind; 15] = [
    Kind::AutoContrast,
    Kind::Equalize,
    Kind::Invert,
    Kind::Rotate,
    Kind::Posterize,
    Kind::Solarize,
    Kind::SolarizeAdd,
    Kind::Color,
    Kind::Contrast,
    Kind::Brightness,
    Kind::Sharpness,
    Kind::ShearX,
    Kind::ShearY,
    Kind::TranslateX,
    Kind::TranslateY,
];

impl Kind {
    /// The operation at a level of 0 to 10 (others count as the nearer of these), in the direction that is `negative` or not where there are
    /// two.
    #[must_use]
    pub fn at_level(self, level: f64, negative: bool) -> Operation {
        let share = level.clamp(0.0, LEVEL_MAX) / LEVEL_MAX;
        let signed = |value: f64| if negative { -value } else { value };
        let factor = 1.0 + signed(share * 0.9);
        match self {
            Self::AutoContrast => Operation::AutoContrast,
            Self::Equalize => Operation::Equalize,
            Self::Invert => Operation::Invert,
            Self::Rotate => Operation::Rotate { degrees: signed(share * 30.0) },
            Self::Posterize => {
                Operation::Posterize { bits: 4_u32.saturating_sub(whole(share * 4.0)) }
            }
            Self::Solarize => {
                Operation::Solarize { threshold: 256_u32.saturating_sub(whole(share * 256.0)) }
            }
            Self::SolarizeAdd => Operation::SolarizeAdd { add: whole(share * 110.0).min(128) },
            Self::Color => Operation::Color { factor },
            Self::Contrast => Operation::Contrast { factor },
            Self::Brightness => Operation::Brightness { factor },
            Self::Sharpness => Operation::Sharpness { factor },
            Self::ShearX => Operation::ShearX { factor: signed(share * 0.3) },
            Self::ShearY => Operation::ShearY { factor: signed(share * 0.3) },
            Self::TranslateX => Operation::TranslateX { fraction: signed(share * 0.45) },
            Self::TranslateY => Operation::TranslateY { fraction: signed(share * 0.45) },
        }
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates")]
fn whole(value: f64) -> u32 {
    value as u32
}

/// The colour jitter of torchvision for one image: brightness, contrast and saturation, each by a
/// factor of `1 - strength` to `1 + strength`, in random order.
pub(crate) fn color_jitter(strength: f64, draws: &mut Draws) -> [Operation; 3] {
    let mut factor = || (1.0 - strength).max(0.0) + draws.unit() * (strength + strength.min(1.0));
    let mut operations = [
        Operation::Brightness { factor: factor() },
        Operation::Contrast { factor: factor() },
        Operation::Color { factor: factor() },
    ];
    for place in (1..operations.len()).rev() {
        operations.swap(place, draws.at_most(place));
    }
    operations
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use cluster::Epoch;

    use super::*;
    use crate::augment::Decision;

    fn draws(sample: u64) -> Draws {
        Draws::new(Decision::Operations, 5, Epoch(1), sample)
    }

    #[test]
    fn the_recipes_setting_is_understood_and_written_back() {
        let setting = RandAugment::parse("rand-m9-mstd0.5-inc1").unwrap();
        let expected = RandAugment { magnitude: 9.0, magnitude_std: 0.5, operations: 2 };
        assert_eq!(setting, expected);
        assert_eq!(setting, RandAugment::published());
        assert_eq!(String::from(setting), "rand-m9-mstd0.5-inc1");
        let three = RandAugment::parse("rand-n3-m5-inc1").unwrap();
        assert_eq!(RandAugment::parse(&String::from(three)), Ok(three));
    }

    #[test]
    fn other_settings_are_refused() {
        let settings = [
            "",
            "rand",
            "rand-inc1",
            "rand-m9",
            "rand-m9-inc0",
            "rand-m11-inc1",
            "rand-m9-inc1-p1",
            "original-mstd0.5",
            "augmix-m5",
            "rand-m9-m8-inc1",
            "rand-m9-n0-inc1",
            "rand-m-inc1",
            "rand-m9-n2.5-inc1",
            "rand-m9-mstdinf-inc1",
        ];
        for setting in settings {
            let error = RandAugment::parse(setting).unwrap_err().to_string();
            assert!(error.contains(&format!("{setting:?}")), "{error}");
        }
    }

    #[test]
    fn operations_are_chosen_evenly_and_half_are_applied() {
        let setting = RandAugment::parse("rand-m9-mstd0.5-inc1").unwrap();
        let mut counts = BTreeMap::new();
        let mut applied = 0;
        for sample in 0..15_000 {
            for operation in setting.draw(&mut draws(sample)) {
                let name = format!("{operation:?}");
                let name = name.split_once(' ').map_or(name.as_str(), |(name, _)| name).to_owned();
                *counts.entry(name).or_insert(0_u32) += 1;
                applied += 1;
            }
        }
        assert!((14_600..15_400).contains(&applied), "{applied}");
        assert_eq!(counts.len(), 15);
        assert!(counts.values().all(|count| (880..1120).contains(count)), "{counts:?}");
    }

    #[test]
    fn levels_scatter_about_the_magnitude() {
        let setting = RandAugment::parse("rand-m9-mstd0.5-inc1").unwrap();
        let (mut sum, mut squares, mut count, mut negative) = (0.0, 0.0, 0.0, 0.0);
        for sample in 0..60_000 {
            for operation in setting.draw(&mut draws(sample)) {
                if let Operation::ShearX { factor } = operation {
                    let level = factor.abs() / 0.03;
                    (sum, squares) = (sum + level, squares + level * level);
                    count += 1.0;
                    negative += f64::from(u8::from(factor < 0.0));
                }
            }
        }
        let mean = sum / count;
        let deviation = (squares / count - mean * mean).sqrt();
        assert!((8.95..9.03).contains(&mean), "mean level {mean} of {count}");
        // A little below 0.5, since levels end at 10.
        assert!((0.46..0.51).contains(&deviation), "deviation {deviation}");
        assert!((0.47..0.53).contains(&(negative / count)));
    }

    #[test]
    fn jitter_stays_in_its_range_and_has_every_order() {
        let mut orders = BTreeMap::new();
        for sample in 0..600 {
            let operations = color_jitter(0.4, &mut draws(sample));
            let order = operations.map(|operation| match operation {
                Operation::Brightness { factor } => (0, factor),
                Operation::Contrast { factor } => (1, factor),
                Operation::Color { factor } => (2, factor),
                Operation::AutoContrast
                | Operation::Equalize
                | Operation::Invert
                | Operation::Rotate { .. }
                | Operation::Posterize { .. }
                | Operation::Solarize { .. }
                | Operation::SolarizeAdd { .. }
                | Operation::Sharpness { .. }
                | Operation::ShearX { .. }
                | Operation::ShearY { .. }
                | Operation::TranslateX { .. }
                | Operation::TranslateY { .. } => panic!("no jitter"),
            });
            assert!(order.iter().all(|(_, factor)| (0.6..=1.4).contains(factor)));
            *orders.entry(order.map(|(kind, _)| kind)).or_insert(0) += 1;
        }
        assert_eq!(orders.len(), 6);
        assert!(orders.values().all(|&count| count > 60), "{orders:?}");
    }
}
