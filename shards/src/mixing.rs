//! Mixup (arXiv:1710.09412) and CutMix (arXiv:1905.04899) as timm 0.4.12 applies them to a whole
//! batch: each image is mixed with the one at the mirrored place, and so are the labels.
//!
//! The draws are keyed by (seed, step, virtual rank), never by a worker. Mixing works on normalised
//! images, after erasing: a mean of two bytes is in general no byte.

use cluster::{Step, VirtualRank};
use serde::{Deserialize, Serialize};

use crate::{
    augment::{Draws, InvalidAugment},
    image::Rect,
};

/// Keeps these draws apart from other uses of the same seed.
const MIX_DOMAIN: u64 = u64::from_le_bytes(*b"mix/v1\0\0");

/// How often and how strongly batches are mixed. The default is: not at all.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Mixing {
    /// Both parameters of the beta distribution of mixup's share; 0 turns mixup off.
    pub mixup: f64,
    /// Both parameters of the beta distribution of CutMix's share; 0 turns CutMix off.
    pub cutmix: f64,
    /// Smallest and largest share of the image's sides that a CutMix box takes, instead of a drawn
    /// area. Turns CutMix on.
    pub cutmix_minmax: Option<[f64; 2]>,
    /// Probability that a batch is mixed at all.
    pub probability: f64,
    /// Probability that it is CutMix where both are on.
    pub switch_probability: f64,
}

impl Default for Mixing {
    fn default() -> Self {
        Self {
            mixup: 0.0,
            cutmix: 0.0,
            cutmix_minmax: None,
            probability: 1.0,
            switch_probability: 0.5,
        }
    }
}

/// How one batch is mixed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Mix {
    /// It is not.
    None,
    /// Each image is `lambda` of itself and the rest of its partner.
    Mixup {
        /// The image's own share.
        lambda: f64,
    },
    /// Each image shows its partner inside a box.
    Cutmix {
        /// The box.
        area: Rect,
        /// The image's own share: what is outside of the box.
        lambda: f64,
    },
}

impl Mixing {
    /// Checks that the settings can be used.
    ///
    /// # Errors
    /// [`InvalidAugment`] lists every field whose value is out of range.
    pub fn check(&self) -> Result<(), InvalidAugment> {
        let share = |value: f64| (0.0..=1.0).contains(&value);
        let strength = |value: f64| (0.0..=1e6).contains(&value);
        let minmax = self.cutmix_minmax.unwrap_or([0.5, 0.5]);
        let checks = [
            (strength(self.mixup), "`mixup` must be 0 (off) to 1000000"),
            (strength(self.cutmix), "`cutmix` must be 0 (off) to 1000000"),
            (
                0.0 < minmax[0] && minmax[0] <= minmax[1] && minmax[1] < 1.0,
                "`cutmix_minmax` must be 0 < low <= high < 1",
            ),
            (share(self.probability), "`probability` must be 0 to 1"),
            (share(self.switch_probability), "`switch_probability` must be 0 to 1"),
        ];
        let problems: Vec<String> =
            checks.iter().filter(|(holds, _)| !holds).map(|&(_, rule)| rule.to_owned()).collect();
        if problems.is_empty() { Ok(()) } else { Err(InvalidAugment { problems }) }
    }

    /// Whether batches are ever mixed. If so, their targets are soft and their size must be even.
    #[must_use]
    pub fn is_on(&self) -> bool {
        let any = self.mixup > 0.0 || self.cutmix > 0.0 || self.cutmix_minmax.is_some();
        any && self.probability > 0.0
    }

    /// How the batch of `virtual_rank` at `step` is mixed, whose images have the side `size`.
    #[must_use]
    pub fn draw(&self, seed: u64, step: Step, virtual_rank: VirtualRank, size: usize) -> Mix {
        let mut draws = Draws::keyed([MIX_DOMAIN, seed, step.0, u64::from(virtual_rank.0)]);
        let (mixed, switch) = (draws.unit() < self.probability, draws.unit());
        let cutmix = if self.cutmix_minmax.is_some() { 1.0 } else { self.cutmix };
        if !mixed || !self.is_on() {
            return Mix::None;
        }
        let use_cutmix = match (self.mixup > 0.0, cutmix > 0.0) {
            (true, true) => switch < self.switch_probability,
            (_, cutmix) => cutmix,
        };
        if !use_cutmix {
            return Mix::Mixup { lambda: draws.beta(self.mixup) };
        }
        let lambda = draws.beta(cutmix);
        match self.cutmix_minmax {
            Some(minmax) => Mix::cutmix(box_between(minmax, size, &mut draws), size),
            None => {
                let centre = (draws.at_most(size - 1), draws.at_most(size - 1));
                Mix::cutmix_about(centre, lambda, size, size)
            }
        }
    }
}

impl Mix {
    /// CutMix with the box about the pixel (row, column) that leaves each image the share `lambda`, or
    /// more where the box is cut off at the border.
    #[must_use]
    pub fn cutmix_about(
        (row, column): (usize, usize),
        lambda: f64,
        height: usize,
        width: usize,
    ) -> Self {
        let area = box_around(row, column, lambda, height, width);
        Self::Cutmix { area, lambda: share_outside(area, height, width) }
    }

    fn cutmix(area: Rect, size: usize) -> Self {
        Self::Cutmix { area, lambda: share_outside(area, size, size) }
    }

    /// The share of each image's own label.
    #[must_use]
    pub fn lambda(&self) -> f64 {
        match *self {
            Self::None => 1.0,
            Self::Mixup { lambda } | Self::Cutmix { lambda, .. } => lambda,
        }
    }

    /// Mixes the normalised images `[count, channels, height, width]`, whose rows are `width` long.
    ///
    /// # Panics
    /// If `count` is odd and there is something to mix, or the images have another length.
    pub fn images(&self, images: &mut [f32], count: usize, height: usize, width: usize) {
        if *self == Self::None || count == 0 {
            return;
        }
        assert!(count.is_multiple_of(2), "a batch of {count} images has one without a partner");
        let length = images.len() / count;
        assert!(images.len() == count * length, "whole images");
        assert!(length.is_multiple_of(height * width), "whole planes of {height}x{width}");
        let (first, second) = images.split_at_mut(count / 2 * length);
        let partners = second.chunks_exact_mut(length).rev();
        for (image, partner) in first.chunks_exact_mut(length).zip(partners) {
            match *self {
                Self::None => {}
                Self::Mixup { lambda } => mix_values(image, partner, lambda),
                Self::Cutmix { area, .. } => swap_box(image, partner, area, height, width),
            }
        }
    }

    /// The targets `[count, classes]` of a batch with these labels: each row a mixture of the image's
    /// and its partner's smoothed label. `targets` keeps its memory between calls.
    ///
    /// # Panics
    /// If a label is not below `classes`.
    pub fn targets(&self, labels: &[i64], classes: usize, smoothing: f64, targets: &mut Vec<f32>) {
        let off = smoothing / classes as f64;
        let (on, off) = (single(1.0 - smoothing + off), single(off));
        let (own, others) = shares(self.lambda());
        targets.clear();
        targets.resize(labels.len() * classes, off * own + off * others);
        let rows = targets.chunks_exact_mut(classes);
        for (row, (&label, &partner)) in rows.zip(labels.iter().zip(labels.iter().rev())) {
            let [label, partner] = [label, partner]
                .map(|label| usize::try_from(label).expect("a label is the place of a class"));
            if label == partner {
                row[label] = on * own + on * others;
            } else {
                row[label] = on * own + off * others;
                row[partner] = off * own + on * others;
            }
        }
    }
}

/// Both shares in the precision of the images.
fn shares(lambda: f64) -> (f32, f32) {
    (single(lambda), single(1.0 - lambda))
}

#[expect(clippy::cast_possible_truncation, reason = "rounding is what is wanted")]
fn single(value: f64) -> f32 {
    value as f32
}

fn mix_values(image: &mut [f32], partner: &mut [f32], lambda: f64) {
    let (own, others) = shares(lambda);
    for (one, other) in image.iter_mut().zip(partner) {
        (*one, *other) = (*one * own + *other * others, *other * own + *one * others);
    }
}

fn swap_box(image: &mut [f32], partner: &mut [f32], area: Rect, height: usize, width: usize) {
    let planes = image.chunks_exact_mut(height * width);
    for (one, other) in planes.zip(partner.chunks_exact_mut(height * width)) {
        for y in area.top..area.top + area.height {
            let columns = y * width + area.left..y * width + area.left + area.width;
            one[columns.clone()].swap_with_slice(&mut other[columns]);
        }
    }
}

/// The box with the area `1 - lambda` about a pixel, cut off at the image's border. Both halves are
/// rounded down, so that a box of odd height loses a row.
fn box_around(row: usize, column: usize, lambda: f64, height: usize, width: usize) -> Rect {
    let share = (1.0 - lambda).sqrt();
    let (half_height, half_width) = (part(height, share) / 2, part(width, share) / 2);
    let (top, left) = (row.saturating_sub(half_height), column.saturating_sub(half_width));
    let bottom = (row + half_height).min(height);
    let right = (column + half_width).min(width);
    Rect { left, top, width: right - left, height: bottom - top }
}

/// A box whose sides are a share between two of the image's.
fn box_between([low, high]: [f64; 2], size: usize, draws: &mut Draws) -> Rect {
    let (low, high) = (part(size, low), part(size, high));
    let mut side = || low + draws.at_most(high.saturating_sub(low + 1));
    let (height, width) = (side(), side());
    let top = draws.at_most(size - height - 1);
    let left = draws.at_most(size - width - 1);
    Rect { left, top, width, height }
}

/// A share of a length, rounded down.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "at most a length in pixels"
)]
fn part(length: usize, share: f64) -> usize {
    (length as f64 * share) as usize
}

fn share_outside(area: Rect, height: usize, width: usize) -> f64 {
    1.0 - (area.height * area.width) as f64 / (height * width) as f64
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    const RECIPE: Mixing = Mixing {
        mixup: 0.8,
        cutmix: 1.0,
        cutmix_minmax: None,
        probability: 1.0,
        switch_probability: 0.5,
    };

    fn draw(mixing: &Mixing, step: u64) -> Mix {
        mixing.draw(1, Step(step), VirtualRank(2), 224)
    }

    #[test]
    fn nothing_is_mixed_unless_asked_for() {
        assert!(!Mixing::default().is_on());
        assert_eq!(draw(&Mixing::default(), 3), Mix::None);
        assert_eq!(draw(&Mixing { probability: 0.0, ..RECIPE }, 3), Mix::None);
    }

    #[test]
    fn the_draws_are_fixed_for_all_time() {
        assert_eq!([draw(&RECIPE, 0), draw(&RECIPE, 2)], FIXED);
        assert_ne!(draw(&RECIPE, 0), RECIPE.draw(1, Step(0), VirtualRank(3), 224));
        assert_ne!(draw(&RECIPE, 0), RECIPE.draw(2, Step(0), VirtualRank(2), 224));
    }

    const FIXED: [Mix; 2] = [
        Mix::Mixup { lambda: 0.018_374_686_700_982_995 },
        Mix::Cutmix {
            area: Rect { left: 71, top: 3, width: 144, height: 144 },
            lambda: 0.586_734_693_877_551_1,
        },
    ];

    #[test]
    fn shares_follow_the_beta_distribution() {
        let (mut cutmix, mut squares, mut mixups) = (0, 0.0, 0.0);
        for step in 0..20_000 {
            match draw(&RECIPE, step) {
                Mix::Mixup { lambda } => {
                    assert!((0.0..=1.0).contains(&lambda));
                    squares += (lambda - 0.5) * (lambda - 0.5);
                    mixups += 1.0;
                }
                Mix::Cutmix { .. } => cutmix += 1,
                Mix::None => panic!("always mixed"),
            }
        }
        assert!((9_700..10_300).contains(&cutmix), "{cutmix} of 20000");
        // Beta(a, a) has the variance 1 / (4 (2a + 1)), here 0.09615.
        let variance: f64 = squares / mixups;
        assert!((0.094..0.0985).contains(&variance), "{variance}");
        let strong = Mixing { mixup: 4.0, cutmix: 0.0, ..RECIPE };
        let total: f64 = (0..10_000).map(|step| (draw(&strong, step).lambda() - 0.5).powi(2)).sum();
        assert!((0.0267..0.0289).contains(&(total / 1e4)), "{total}"); // 1/36
    }

    #[test]
    fn a_box_of_given_size_lies_inside() {
        let mixing = Mixing { cutmix_minmax: Some([0.2, 0.6]), mixup: 0.0, ..RECIPE };
        for step in 0..500 {
            let Mix::Cutmix { area, lambda } = draw(&mixing, step) else { panic!("only CutMix") };
            assert!((44..134).contains(&area.width) && (44..134).contains(&area.height));
            assert!(area.left + area.width <= 224 && area.top + area.height <= 224);
            assert_eq!(lambda, share_outside(area, 224, 224));
        }
    }

    #[test]
    #[should_panic(expected = "has one without a partner")]
    fn an_odd_batch_cannot_be_mixed() {
        Mix::Mixup { lambda: 0.5 }.images(&mut [0.0; 3], 3, 1, 1);
    }

    #[test]
    fn all_problems_are_reported_at_once() {
        let wrong = Mixing { mixup: -1.0, probability: 2.0, ..RECIPE };
        let message = wrong.check().unwrap_err().to_string();
        assert!(message.contains("`mixup`") && message.contains("`probability`"), "{message}");
        assert_eq!(RECIPE.check(), Ok(()));
    }

    fn number(value: &Value) -> usize {
        usize::try_from(value.as_u64().unwrap()).unwrap()
    }

    #[test]
    fn boxes_are_the_references_where_it_is_at_hand() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/reference/golden/mixup.json");
        let Ok(text) = std::fs::read_to_string(path) else {
            println!("nothing checked: there is no {path}");
            return;
        };
        let cases: Value = serde_json::from_str(&text).unwrap();
        let rows = cases["bbox"].as_array().unwrap();
        for row in rows {
            let [height, width, cy, cx] = ["H", "W", "cy", "cx"].map(|field| number(&row[field]));
            let area = box_around(cy, cx, row["lam"].as_f64().unwrap(), height, width);
            let corners = [area.top, area.top + area.height, area.left, area.left + area.width];
            assert_eq!(corners, [0, 1, 2, 3].map(|at| number(&row["box"][at])), "{row}");
            let lambda = share_outside(area, height, width);
            assert_eq!(lambda, row["corrected_lam"].as_f64().unwrap(), "{row}");
        }
        assert_eq!(rows.len(), 60);
    }
}
