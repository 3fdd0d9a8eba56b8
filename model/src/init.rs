//! Initial values, drawn from the run's seed on counter-based randomness.
//!
//! Each parameter has its own key (seed, name), so the values of one do not depend on which others exist, and
//! every machine draws the same bits: only IEEE arithmetic and functions compiled in are used.

use crate::draws::{Domain, fnv1a64, generator, uniform};

/// How a tensor starts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Init {
    Zeros,
    Ones,
    /// Uniform in `[-bound, bound)`.
    Uniform {
        bound: f64,
    },
    /// Normal with mean 0, clamped to `[-limit, limit]`.
    Normal {
        std: f64,
        limit: f64,
    },
}

impl Init {
    /// PyTorch's default for weights and biases of linear and convolution layers with `fan_in` inputs.
    pub(crate) fn fan_in(fan_in: i64) -> Init {
        Init::Uniform { bound: 1.0 / (fan_in as f64).sqrt() }
    }

    /// A normal distribution without limit.
    pub(crate) fn normal(std: f64) -> Init {
        Init::Normal { std, limit: f64::INFINITY }
    }
}

/// Fills `values` with the initial values of the parameter `name`.
pub(crate) fn fill(values: &mut [f32], init: Init, seed: u64, name: &str) {
    match init {
        Init::Zeros => values.fill(0.0),
        Init::Ones => values.fill(1.0),
        Init::Uniform { bound } => {
            let mut generator = generator(Domain::Init, [seed, fnv1a64(name), 0]);
            for value in values {
                *value = rounded(bound * (2.0 * uniform(&mut generator) - 1.0));
            }
        }
        Init::Normal { std, limit } => {
            let mut generator = generator(Domain::Init, [seed, fnv1a64(name), 0]);
            // Box and Muller: two uniform numbers make two normal ones.
            for pair in values.chunks_mut(2) {
                let radius = (-2.0 * libm::log(1.0 - uniform(&mut generator))).sqrt();
                let (sin, cos) = libm::sincos(std::f64::consts::TAU * uniform(&mut generator));
                for (value, direction) in pair.iter_mut().zip([cos, sin]) {
                    *value = rounded((std * radius * direction).clamp(-limit, limit));
                }
            }
        }
    }
}

/// The one rounding of a drawn value.
#[expect(clippy::cast_possible_truncation, reason = "initial values are f32 by definition")]
fn rounded(value: f64) -> f32 {
    value as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Mean and standard deviation of 100,000 values.
    fn moments(init: Init, seed: u64, name: &str) -> (f64, f64) {
        let mut values = vec![0.0; 100_000];
        fill(&mut values, init, seed, name);
        let count = values.len() as f64;
        let mean = values.iter().map(|value| f64::from(*value)).sum::<f64>() / count;
        let square = values.iter().map(|value| (f64::from(*value) - mean).powi(2)).sum::<f64>();
        (mean, (square / count).sqrt())
    }

    #[test]
    fn distributions_have_their_moments() {
        let (mean, std) = moments(Init::normal(0.02), 1, "latent");
        assert!(mean.abs() < 4.0 * 0.02 / 316.0, "mean {mean}");
        assert!((std / 0.02 - 1.0).abs() < 0.01, "std {std}");
        let (mean, std) = moments(Init::fan_in(49), 1, "dwc1_x2z.weight");
        assert!(mean.abs() < 4.0 / 7.0 / 3.0_f64.sqrt() / 316.0, "mean {mean}");
        assert!((std * 7.0 * 3.0_f64.sqrt() - 1.0).abs() < 0.01, "std {std}");
    }

    #[test]
    fn values_depend_on_seed_and_name_alone_and_a_prefix_stays_the_same() {
        let draw = |len: usize, seed: u64, name: &str| {
            let mut values = vec![0.0; len];
            fill(&mut values, Init::normal(1.0), seed, name);
            values
        };
        assert_eq!(draw(64, 1, "a"), draw(64, 1, "a"));
        assert_eq!(draw(64, 1, "a")[..32], draw(32, 1, "a"));
        assert_ne!(draw(64, 1, "a"), draw(64, 2, "a"));
        assert_ne!(draw(64, 1, "a"), draw(64, 1, "b"));
    }

    #[test]
    fn the_first_values_are_pinned() {
        let mut values = [0.0; 4];
        fill(&mut values, Init::normal(1.0), 0, "latent");
        assert_eq!(values.map(f32::to_bits), PINNED);
    }

    /// Changing these breaks every run that was started before.
    const PINNED: [u32; 4] = [3_216_951_133, 3_196_761_142, 3_213_118_075, 3_207_180_996];
}
