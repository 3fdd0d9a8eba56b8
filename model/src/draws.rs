//! Counter-based random numbers: a pure function of a key, never a global state.
//!
//! Every use has its own 32-byte ChaCha8 key `[domain, a, b, c]` (little-endian words), so two uses never
//! share numbers and nothing depends on the order in which ranks, threads or steps run.

use rand_chacha::ChaCha8Rng;
use rand_core::{Rng, SeedableRng};
use tch::{Device, Kind, Tensor};

/// What a key is for. The text is the key's first word.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Domain {
    /// Initial values: `[seed, hash of the parameter's name, 0]`.
    Init,
    /// Dropout masks: `[seed, step, virtual rank]`, one stream a site.
    Dropout,
}

impl Domain {
    fn word(self) -> [u8; 8] {
        match self {
            Domain::Init => *b"init\0\0\0\0",
            Domain::Dropout => *b"dropout\0",
        }
    }
}

/// The generator of a key.
pub(crate) fn generator(domain: Domain, key: [u64; 3]) -> ChaCha8Rng {
    let mut bytes = [0; 32];
    let words = [domain.word(), key[0].to_le_bytes(), key[1].to_le_bytes(), key[2].to_le_bytes()];
    for (place, word) in bytes.chunks_exact_mut(8).zip(words) {
        place.copy_from_slice(&word);
    }
    ChaCha8Rng::from_seed(bytes)
}

/// A uniform number in `[0, 1)` with 53 random bits.
pub(crate) fn uniform(generator: &mut ChaCha8Rng) -> f64 {
    const SCALE: f64 = 1.0 / (1_u64 << 53) as f64;
    (generator.next_u64() >> 11) as f64 * SCALE
}

/// FNV-1a 64: a hash of names that stays the same for ever.
pub(crate) fn fnv1a64(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// Whose random numbers a training forward uses: those of one virtual rank's micro-batch of one step.
///
/// `step` counts over the whole run, so it says the epoch too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Draws {
    /// The run's seed.
    pub seed: u64,
    /// The micro-batch of the virtual rank, counted from 0 over the whole run: the optimizer update, if each
    /// takes one.
    pub step: u64,
    /// The micro-batch's place in the global batch.
    pub virtual_rank: u32,
}

impl Draws {
    /// Inverted dropout for one site: each element is 0 with probability `rate`, else `1 / (1 - rate)`.
    ///
    /// # Panics
    /// If `rate` is not in `[0, 1)`.
    pub(crate) fn dropout_mask(
        &self,
        site: Site,
        rate: f64,
        size: &[i64],
        options: (Kind, Device),
    ) -> Tensor {
        assert!((0.0..1.0).contains(&rate), "a dropout rate of {rate}");
        let mut generator =
            generator(Domain::Dropout, [self.seed, self.step, u64::from(self.virtual_rank)]);
        generator.set_stream(site.0);
        let count: i64 = size.iter().product();
        let kept = 1.0 / (1.0 - rate);
        // An element is dropped if its 32 bits, read as a fraction, lie below the rate.
        let values: Vec<f64> = (0..count)
            .map(|_| f64::from(generator.next_u32()) / 4_294_967_296.0)
            .map(|fraction| if fraction < rate { 0.0 } else { kept })
            .collect();
        Tensor::from_slice(&values).view(size).to_kind(options.0).to_device(options.1)
    }
}

/// A place in the network that draws random numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Site(u64);

impl Site {
    /// The site of a stable name.
    pub(crate) fn named(name: &str) -> Site {
        Site(fnv1a64(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DRAWS: Draws = Draws { seed: 1, step: 7, virtual_rank: 3 };

    fn mask(draws: Draws, site: &str) -> Vec<f32> {
        let mask =
            draws.dropout_mask(Site::named(site), 0.25, &[100, 100], (Kind::Float, Device::Cpu));
        libtorch::slice::<f32>(&mask).unwrap().to_vec()
    }

    #[test]
    fn a_mask_depends_on_every_part_of_its_key_and_on_nothing_else() {
        let reference = mask(DRAWS, "a");
        assert_eq!(reference, mask(DRAWS, "a"));
        assert_ne!(reference, mask(DRAWS, "b"));
        assert_ne!(reference, mask(Draws { seed: 2, ..DRAWS }, "a"));
        assert_ne!(reference, mask(Draws { step: 8, ..DRAWS }, "a"));
        assert_ne!(reference, mask(Draws { virtual_rank: 4, ..DRAWS }, "a"));
    }

    #[test]
    fn a_mask_drops_at_its_rate_and_keeps_the_mean() {
        let mask = mask(DRAWS, "a");
        let dropped = mask.iter().filter(|value| **value == 0.0).count();
        assert!((2300..2700).contains(&dropped), "{dropped} of 10000 dropped at 0.25");
        assert!(mask.iter().all(|value| *value == 0.0 || (*value - 4.0 / 3.0).abs() < 1e-6));
    }

    #[test]
    fn the_name_hash_is_fnv1a() {
        assert_eq!(fnv1a64("1/latent"), 0x6376_b83d_e09d_7527); // From the reference's fill rule.
    }
}
