//! Chance as an argument: SplitMix64 (Steele, Lea and Flood, 2014), seeded by a number that is printed.

use std::{ops::RangeInclusive, time::Duration};

/// A stream of draws that depends on its seed alone.
#[derive(Debug, Clone)]
pub(crate) struct Chance(u64);

impl Chance {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn between(&mut self, range: RangeInclusive<u64>) -> u64 {
        range.start() + self.next() % (range.end() - range.start() + 1)
    }

    /// A time that is exponentially distributed around `mean`.
    pub(crate) fn exponential(&mut self, mean: Duration) -> Duration {
        // 53 bits make a float in (0, 1] exactly.
        let unit = ((self.next() >> 11) + 1) as f64 / (1_u64 << 53) as f64;
        mean.mul_f64(-unit.ln())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponential_times_have_their_mean() {
        let mut chance = Chance::new(1);
        let mean = Duration::from_secs(100);
        let sum: Duration = (0..10_000).map(|_| chance.exponential(mean)).sum();
        assert!((sum / 10_000).abs_diff(mean) < Duration::from_secs(3), "{:?}", sum / 10_000);
    }
}
