//! Dynamic loss scaling for f16 (Micikevicius et al., "Mixed Precision Training", arXiv:1710.03740, §3.2), with
//! the rules and constants of PyTorch's `GradScaler` (SPEC §9). Pure: no tensors.
//!
//! f16 has 5 bits of exponent, so small gradients vanish in it. The loss is multiplied by the scale before
//! backward and the summed gradients are divided by it after. The scale grows until something overflows.
//! bf16 has the exponent of f32 and needs none of this.

/// The scale of a fresh run.
pub const INITIAL_SCALE: f32 = 65_536.0;

/// Good updates in a row after which the scale doubles.
pub const GROWTH_INTERVAL: u32 = 2000;

/// The scale of the loss, and how it came about: a part of a run's state.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LossScale {
    scale: f32,
    /// Updates in a row whose gradients were finite, since the scale last changed.
    good: u32,
}

/// What is to be done with the gradients of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// They are finite: update.
    Apply,
    /// They overflowed: leave parameters and moments as they are. The average is updated all the same.
    Skip,
}

impl Default for LossScale {
    fn default() -> LossScale {
        LossScale { scale: INITIAL_SCALE, good: 0 }
    }
}

impl LossScale {
    /// The state that [`LossScale::parts`] told, to go on from a checkpoint. `None` if there is no such state.
    pub fn from_parts(scale: f32, good: u32) -> Option<LossScale> {
        let holds = scale.is_normal() && scale > 0.0 && good < GROWTH_INTERVAL;
        holds.then_some(LossScale { scale, good })
    }

    /// The scale, and the good updates in a row since it last changed.
    pub fn parts(&self) -> (f32, u32) {
        (self.scale, self.good)
    }

    /// What to multiply the loss by.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// What to multiply the summed gradients by. Exact: the scale is a power of two.
    pub fn unscale(&self) -> f32 {
        self.scale.recip()
    }

    /// Hears whether the summed gradients of a step are finite; says what to do, and sets the next step's scale:
    /// halved after an overflow, doubled after [`GROWTH_INTERVAL`] good steps while that stays finite.
    pub fn judge(&mut self, finite: bool) -> Verdict {
        if !finite {
            let halved = self.scale * 0.5;
            // Below the smallest normal number nothing is gained, and the reciprocal is infinite.
            self.scale = if halved.is_normal() { halved } else { self.scale };
            self.good = 0;
            return Verdict::Skip;
        }
        self.good += 1;
        if self.good == GROWTH_INTERVAL {
            let doubled = self.scale * 2.0;
            self.scale = if doubled.is_finite() { doubled } else { self.scale };
            self.good = 0;
        }
        Verdict::Apply
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(scale: LossScale, finite: bool, times: u32) -> LossScale {
        (0..times).fold(scale, |mut scale, _| {
            scale.judge(finite);
            scale
        })
    }

    #[test]
    fn an_overflow_halves_the_scale_and_skips_the_update() {
        let mut scale = after(LossScale::default(), true, 5);
        assert_eq!(scale.judge(false), Verdict::Skip);
        assert_eq!(scale.parts(), (32_768.0, 0));
        assert_eq!(scale.judge(true), Verdict::Apply);
        assert_eq!(scale.parts(), (32_768.0, 1));
        assert_eq!(scale.scale() * scale.unscale(), 1.0);
    }

    #[test]
    fn good_updates_in_a_row_double_the_scale_and_an_overflow_starts_the_count_anew() {
        let nearly = after(LossScale::default(), true, GROWTH_INTERVAL - 1);
        assert_eq!(nearly.scale(), INITIAL_SCALE);
        assert_eq!(after(nearly, true, 1).parts(), (2.0 * INITIAL_SCALE, 0));
        let again = after(after(nearly, false, 1), true, GROWTH_INTERVAL - 1);
        assert_eq!(again.parts(), (INITIAL_SCALE / 2.0, GROWTH_INTERVAL - 1));
    }

    #[test]
    fn the_scale_stays_a_power_of_two_whose_reciprocal_is_finite() {
        let least = after(LossScale::default(), false, 1000);
        assert!(least.scale() > 0.0 && least.unscale().is_finite());
        let most = after(LossScale::default(), true, 200 * GROWTH_INTERVAL);
        assert!(most.scale().is_finite() && most.unscale() > 0.0);
        assert_eq!(after(most, true, GROWTH_INTERVAL).parts(), (most.scale(), 0));
    }

    #[test]
    fn it_goes_on_from_its_parts_and_refuses_what_it_never_says() {
        let scale = after(LossScale::default(), true, 7);
        let (value, good) = scale.parts();
        assert_eq!(LossScale::from_parts(value, good), Some(scale));
        for wrong in [(0.0, 0), (-1.0, 0), (f32::NAN, 0), (f32::INFINITY, 0), (1.0, 2000)] {
            assert_eq!(LossScale::from_parts(wrong.0, wrong.1), None);
        }
    }
}
