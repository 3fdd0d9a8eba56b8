//! Which samples a step sees: a pure function of (seed, epoch, step, virtual rank).
//!
//! Nothing is stored and nothing is sent. Whoever knows the run's seed can say which samples any
//! virtual rank takes at any step, so failures and resizes can neither lose nor repeat one.

use std::{num::NonZeroU32, ops::Range};

use cluster::{Epoch, Step, VirtualRank};
use serde::{Deserialize, Serialize};

/// Rounds of the Feistel network: three passes over each half.
const ROUNDS: usize = 6;

/// Keeps the order of an epoch apart from other uses of the same seed.
const ORDER_DOMAIN: u64 = u64::from_le_bytes(*b"order/v1");

/// The same for the two levels of an order by blocks.
const BLOCK_DOMAIN: u64 = u64::from_le_bytes(*b"block/v1");
const WINDOW_DOMAIN: u64 = u64::from_le_bytes(*b"windo/v1");

/// A permutation of `0..size` that is computed, not stored: a keyed Feistel network over the next
/// power of two, walked until it lands inside (Black and Rogaway, "Ciphers with arbitrary finite
/// domains", 2002, method 2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Permutation {
    size: u64,
    bits_left: u32,
    bits_right: u32,
    keys: [u64; ROUNDS],
}

impl Permutation {
    /// The permutation of `0..size` chosen by `key`, all of whose words count.
    pub(crate) fn new(size: u64, key: &[u64]) -> Self {
        let bits = (u64::BITS - size.saturating_sub(1).leading_zeros()).max(2);
        let seed = key.iter().fold(0, |state, &word| mix(state ^ word));
        let keys = std::array::from_fn(|round| mix(seed ^ (round as u64 + 1)));
        Self { size, bits_left: bits / 2, bits_right: bits - bits / 2, keys }
    }

    /// Where `position` is sent.
    ///
    /// # Panics
    /// If `position` is not below the size.
    pub(crate) fn at(&self, position: u64) -> u64 {
        assert!(position < self.size, "position {position} of a permutation of {}", self.size);
        // The network permutes at most twice `size` values, so following its cycle from a value
        // inside comes back inside, after one extra turn on average at worst.
        let mut value = self.network(position);
        while value >= self.size {
            value = self.network(value);
        }
        value
    }

    fn network(&self, value: u64) -> u64 {
        let (mut width, mut other) = (self.bits_left, self.bits_right);
        let (mut left, mut right) = (value >> other, value & mask(other));
        for key in self.keys {
            (left, right) = (right, left ^ (mix(right ^ key) & mask(width)));
            (width, other) = (other, width);
        }
        (left << other) | right
    }
}

fn mask(bits: u32) -> u64 {
    (1 << bits) - 1
}

/// The finaliser of SplitMix64 after its increment (Steele, Lea and Flood, 2014): every input bit
/// reaches every output bit.
pub(crate) fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// How an epoch mixes the samples.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Shuffle {
    /// Any sample can be anywhere: for data that is held where it is read.
    #[default]
    Full,
    /// Neighbours stay near each other, so that they can be read together: blocks of neighbouring
    /// samples in random order, and within each window of so many blocks the samples in random order.
    ///
    /// Class balance is that of the full order if the samples were shuffled when they were packed.
    /// Two samples of one block meet in a batch more often; from 2,048 blocks a window on, rarely.
    Blocks {
        /// Samples of a block.
        block: NonZeroU32,
        /// Blocks of a window.
        window: NonZeroU32,
    },
}

/// The order of one epoch: a permutation of the samples, keyed by (seed, epoch).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Order {
    samples: u64,
    kind: OrderKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum OrderKind {
    Full(Permutation),
    Blocks {
        /// Of the blocks.
        blocks: Permutation,
        block: u64,
        /// Samples of a window.
        window: u64,
        seed: u64,
        epoch: Epoch,
    },
}

impl Order {
    /// The order in which `epoch` visits `samples` samples. Takes no memory and no time to make.
    #[must_use]
    pub fn new(samples: u64, seed: u64, epoch: Epoch) -> Self {
        let permutation = Permutation::new(samples, &[ORDER_DOMAIN, seed, epoch.0]);
        Self { samples, kind: OrderKind::Full(permutation) }
    }

    /// The order of `epoch` under this shuffle.
    ///
    /// # Panics
    /// If there are more than 2^62 samples.
    #[must_use]
    pub fn shuffled(shuffle: Shuffle, samples: u64, seed: u64, epoch: Epoch) -> Self {
        let Shuffle::Blocks { block, window } = shuffle else {
            return Self::new(samples, seed, epoch);
        };
        assert!(samples <= 1 << 62, "{samples} samples");
        let block = u64::from(block.get());
        // A window of all blocks is the largest there is use for.
        let count = samples.div_ceil(block);
        let window = u64::from(window.get()).min(count.max(1)) * block;
        let blocks = Permutation::new(count, &[BLOCK_DOMAIN, seed, epoch.0]);
        Self { samples, kind: OrderKind::Blocks { blocks, block, window, seed, epoch } }
    }

    /// The sample id at `position`. Each id of `0..samples` is at exactly one position.
    ///
    /// # Panics
    /// If `position` is not below the number of samples.
    #[must_use]
    pub fn sample(&self, position: u64) -> u64 {
        match self.kind {
            OrderKind::Full(permutation) => permutation.at(position),
            OrderKind::Blocks { blocks, block, window, seed, epoch } => {
                assert!(position < self.samples, "position {position} of {}", self.samples);
                let all = blocks.size * block;
                // The last block may be short. All orders blocks as if it were not, and what it lacks
                // is skipped by following the cycle, as a permutation of another size does it.
                let mut at = position;
                loop {
                    let number = at / window;
                    let size = window.min(all - number * window);
                    let key = [WINDOW_DOMAIN, seed, epoch.0, number];
                    let within = Permutation::new(size, &key).at(at % window);
                    let chosen = blocks.at((number * window + within) / block);
                    at = chosen * block + within % block;
                    if at < self.samples {
                        return at;
                    }
                }
            }
        }
    }
}

/// Numbers from which no whole training step can be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// A count that must be at least 1 is 0.
    #[error("{field} is 0: it must be at least 1")]
    Zero {
        /// `virtual_ranks` or `micro_batch`.
        field: &'static str,
    },
    /// The whole dataset is smaller than one global batch, so an epoch would have no step.
    #[error(
        "{samples} samples do not fill one global batch of {virtual_ranks} virtual ranks × \
         {micro_batch} samples: lower virtual_ranks or micro_batch"
    )]
    TooFewSamples {
        /// Samples in the dataset.
        samples: u64,
        /// Virtual ranks of the run.
        virtual_ranks: u32,
        /// Samples a virtual rank takes in a step.
        micro_batch: u32,
    },
}

/// How training divides the samples of an epoch into steps and virtual ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchPlan {
    samples: u64,
    virtual_ranks: u32,
    micro_batch: u32,
    seed: u64,
    shuffle: Shuffle,
}

impl BatchPlan {
    /// A plan over `samples` samples: each step takes `virtual_ranks` × `micro_batch` of them.
    ///
    /// # Errors
    /// [`PlanError`] if a count is 0 or an epoch would not have a single whole step.
    pub fn new(
        samples: u64,
        virtual_ranks: u32,
        micro_batch: u32,
        seed: u64,
    ) -> Result<Self, PlanError> {
        if virtual_ranks == 0 {
            return Err(PlanError::Zero { field: "virtual_ranks" });
        }
        if micro_batch == 0 {
            return Err(PlanError::Zero { field: "micro_batch" });
        }
        let plan = Self { samples, virtual_ranks, micro_batch, seed, shuffle: Shuffle::Full };
        if plan.steps_per_epoch() == 0 {
            return Err(PlanError::TooFewSamples { samples, virtual_ranks, micro_batch });
        }
        Ok(plan)
    }

    /// The same plan with samples mixed in another way.
    #[must_use]
    pub fn with_shuffle(self, shuffle: Shuffle) -> Self {
        Self { shuffle, ..self }
    }

    /// Samples that one step takes over all virtual ranks.
    #[must_use]
    pub fn global_batch(&self) -> u64 {
        u64::from(self.virtual_ranks) * u64::from(self.micro_batch)
    }

    /// Steps in an epoch. The tail that does not fill a global batch is dropped; since every epoch
    /// has its own order, other samples are dropped in the next.
    #[must_use]
    pub fn steps_per_epoch(&self) -> u64 {
        self.samples / self.global_batch()
    }

    /// The epoch that the update after `step` belongs to, and its place in that epoch.
    #[must_use]
    pub fn position(&self, step: Step) -> (Epoch, u64) {
        (Epoch(step.0 / self.steps_per_epoch()), step.0 % self.steps_per_epoch())
    }

    /// The ids of the `micro_batch` samples of one virtual rank, in the order they enter the batch.
    ///
    /// # Panics
    /// If `step_in_epoch` or `virtual_rank` is out of range: both come from this plan's own numbers.
    pub fn micro_batch(
        &self,
        epoch: Epoch,
        step_in_epoch: u64,
        virtual_rank: VirtualRank,
    ) -> impl ExactSizeIterator<Item = u64> + use<> {
        let steps = self.steps_per_epoch();
        assert!(step_in_epoch < steps, "step {step_in_epoch} of an epoch of {steps}");
        let ranks = self.virtual_ranks;
        assert!(virtual_rank.0 < ranks, "virtual rank {virtual_rank} of {ranks}");
        let order = Order::shuffled(self.shuffle, self.samples, self.seed, epoch);
        let first = step_in_epoch * self.global_batch()
            + u64::from(virtual_rank.0) * u64::from(self.micro_batch);
        (0..self.micro_batch).map(move |place| order.sample(first + u64::from(place)))
    }
}

/// The validation samples of one virtual rank: the `virtual_ranks` ranges partition `0..samples` and
/// their sizes differ by at most one. Empty if there are more virtual ranks than samples.
///
/// # Panics
/// If `virtual_rank` is not below `virtual_ranks`.
#[must_use]
pub fn evaluation(samples: u64, virtual_ranks: u32, virtual_rank: VirtualRank) -> Range<u64> {
    assert!(virtual_rank.0 < virtual_ranks, "virtual rank {virtual_rank} of {virtual_ranks}");
    let bound = |rank: u32| {
        let share = u128::from(samples) * u128::from(rank) / u128::from(virtual_ranks);
        u64::try_from(share).expect("rank <= virtual_ranks, so the share is at most `samples`")
    };
    bound(virtual_rank.0)..bound(virtual_rank.0 + 1)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn epoch_order(samples: u64, seed: u64, epoch: u64) -> Vec<u64> {
        let order = Order::new(samples, seed, Epoch(epoch));
        (0..samples).map(|position| order.sample(position)).collect()
    }

    fn is_permutation(order: &[u64]) -> bool {
        let distinct: BTreeSet<u64> = order.iter().copied().collect();
        distinct.len() == order.len() && distinct.last().is_none_or(|&id| id < order.len() as u64)
    }

    #[test]
    fn every_small_size_is_permuted() {
        for samples in 0..300 {
            assert!(is_permutation(&epoch_order(samples, 7, samples)), "{samples} samples");
        }
    }

    #[test]
    fn the_order_is_fixed_for_all_time() {
        // A run that resumes under a newer version must see the same samples.
        assert_eq!(epoch_order(10, 0, 0), [1, 9, 8, 4, 5, 3, 2, 0, 6, 7]);
        assert_eq!(epoch_order(10, 1, 2), [1, 8, 3, 4, 7, 6, 9, 2, 5, 0]);
    }

    #[test]
    fn a_huge_dataset_stays_a_bijection_where_it_is_sampled() {
        let samples = (1 << 40) - 12_345;
        let order = Order::new(samples, 3, Epoch(5));
        let ids: BTreeSet<u64> = (0..100_000).map(|position| order.sample(position)).collect();
        assert_eq!(ids.len(), 100_000);
        assert!(ids.iter().all(|&id| id < samples));
    }

    fn blocks(block: u32, window: u32) -> Shuffle {
        let some = |count| NonZeroU32::new(count).unwrap();
        Shuffle::Blocks { block: some(block), window: some(window) }
    }

    fn block_order(shuffle: Shuffle, samples: u64, seed: u64, epoch: u64) -> Vec<u64> {
        let order = Order::shuffled(shuffle, samples, seed, Epoch(epoch));
        (0..samples).map(|position| order.sample(position)).collect()
    }

    impl Permutation {
        /// What `at` sends to `value`, by running the network backwards.
        fn position_of(&self, value: u64) -> u64 {
            let back = |value: u64| {
                let (mut width, mut other) = (self.bits_left, self.bits_right);
                if !ROUNDS.is_multiple_of(2) {
                    (width, other) = (other, width);
                }
                let (mut left, mut right) = (value >> other, value & mask(other));
                for key in self.keys.iter().rev() {
                    (width, other) = (other, width);
                    (left, right) = (right ^ (mix(left ^ key) & mask(width)), left);
                }
                (left << other) | right
            };
            let mut position = back(value);
            while position >= self.size {
                position = back(position);
            }
            position
        }
    }

    #[test]
    fn the_order_by_blocks_is_fixed_for_all_time() {
        assert_eq!(block_order(blocks(3, 2), 14, 0, 0), BLOCKS_OF_3);
    }

    const BLOCKS_OF_3: [u64; 14] = [3, 4, 9, 5, 11, 10, 1, 8, 0, 13, 12, 2, 7, 6];

    #[test]
    fn a_window_holds_few_blocks() {
        let order = block_order(blocks(10, 4), 1000, 3, 1);
        for window in order.chunks(40) {
            let held: BTreeSet<u64> = window.iter().map(|id| id / 10).collect();
            assert_eq!(held.len(), 4);
        }
        let together = order.windows(2).filter(|pair| pair[0] / 10 == pair[1] / 10).count();
        assert!((180..300).contains(&together), "{together} of 999 neighbours; chance gives 231");
    }

    #[test]
    fn a_window_of_everything_is_a_full_shuffle() {
        let order = block_order(blocks(1, u32::MAX), 5000, 3, 1);
        assert!(is_permutation(&order));
        let rising = order.windows(2).filter(|pair| pair[0] < pair[1]).count();
        assert!((2400..2600).contains(&rising), "{rising} of 4999 steps rise");
    }

    #[test]
    fn a_shuffle_is_written_as_a_recipe_has_it() {
        let full: Shuffle = serde_json::from_str("\"full\"").unwrap();
        assert_eq!(full, Shuffle::default());
        let some = r#"{"blocks": {"block": 64, "window": 2048}}"#;
        assert_eq!(serde_json::from_str::<Shuffle>(some).unwrap(), blocks(64, 2048));
        assert!(
            serde_json::from_str::<Shuffle>(r#"{"blocks": {"block": 0, "window": 1}}"#).is_err()
        );
    }

    #[test]
    fn epochs_and_seeds_give_different_orders() {
        let base = epoch_order(1000, 1, 0);
        assert_ne!(base, epoch_order(1000, 1, 1));
        assert_ne!(base, epoch_order(1000, 2, 0));
        let agree = base.iter().zip(epoch_order(1000, 1, 1)).filter(|(a, b)| **a == *b).count();
        assert!(agree < 10, "{agree} of 1000 positions agree; chance gives one");
    }

    #[test]
    fn positions_are_spread_evenly() {
        // Mean id over each tenth of the order; the standard error of a mean is about 9 here.
        let order = epoch_order(10_000, 9, 4);
        for tenth in order.chunks(1000) {
            let mean = tenth.iter().sum::<u64>() / 1000;
            assert!((4_600..5_400).contains(&mean), "mean id {mean}");
        }
    }

    #[test]
    fn a_step_finds_its_epoch() {
        let plan = BatchPlan::new(1437, 8, 8, 0).unwrap();
        assert_eq!(plan.steps_per_epoch(), 22);
        assert_eq!(plan.position(Step(0)), (Epoch(0), 0));
        assert_eq!(plan.position(Step(21)), (Epoch(0), 21));
        assert_eq!(plan.position(Step(22)), (Epoch(1), 0));
        assert_eq!(plan.position(Step(50)), (Epoch(2), 6));
    }

    #[test]
    fn a_dataset_below_one_global_batch_is_refused() {
        let error = BatchPlan::new(63, 8, 8, 0).unwrap_err();
        assert!(error.to_string().contains("63 samples do not fill one global batch of 8"));
        assert_eq!(BatchPlan::new(9, 0, 1, 0), Err(PlanError::Zero { field: "virtual_ranks" }));
        assert_eq!(BatchPlan::new(9, 1, 0, 0), Err(PlanError::Zero { field: "micro_batch" }));
    }

    proptest! {
        #[test]
        fn any_size_is_permuted(samples in 1u64..5000, seed: u64, epoch: u64) {
            prop_assert!(is_permutation(&epoch_order(samples, seed, epoch)));
        }

        #[test]
        fn any_size_is_permuted_by_blocks(
            samples in 1u64..3000, block in 1u32..70, window in 1u32..70, seed: u64, epoch: u64,
        ) {
            let order = block_order(blocks(block, window), samples, seed, epoch);
            prop_assert!(is_permutation(&order));
        }

        #[test]
        fn a_permutation_of_any_size_can_be_undone(
            bits in 1u32..=40, below: u64, at: u64, seed: u64,
        ) {
            let size = (1 << bits) - below % (1 << (bits - 1));
            let permutation = Permutation::new(size, &[seed]);
            let position = at % size;
            let value = permutation.at(position);
            prop_assert!(value < size);
            prop_assert_eq!(permutation.position_of(value), position);
        }

        #[test]
        fn huge_orders_by_blocks_send_no_two_positions_to_one_sample(
            bits in 20u32..=40, below: u64, block in 1u32..300, window in 1u32..5000,
            start: u64, seed: u64,
        ) {
            let samples = (1 << bits) - below % (1 << (bits - 1));
            let order = Order::shuffled(blocks(block, window), samples, seed, Epoch(9));
            // A stretch, and as many positions spread over everything.
            let stretch = (0..500).map(|at| start.wrapping_add(at) % samples);
            let spread = (0..500).map(|at: u64| at * (samples / 500));
            let positions: BTreeSet<u64> = stretch.chain(spread).collect();
            let ids: BTreeSet<u64> = positions.iter().map(|&at| order.sample(at)).collect();
            prop_assert_eq!(ids.len(), positions.len());
            prop_assert!(ids.iter().all(|&id| id < samples));
        }

        #[test]
        fn each_sample_is_seen_at_most_once_an_epoch(
            samples in 1u64..3000, ranks in 1u32..20, batch in 1u32..20, seed: u64, epoch: u64,
            by_blocks: bool,
        ) {
            let Ok(plan) = BatchPlan::new(samples, ranks, batch, seed) else { return Ok(()) };
            let plan = if by_blocks { plan.with_shuffle(blocks(7, 5)) } else { plan };
            let mut seen = BTreeSet::new();
            for step in 0..plan.steps_per_epoch() {
                for rank in 0..ranks {
                    for id in plan.micro_batch(Epoch(epoch), step, VirtualRank(rank)) {
                        prop_assert!(id < samples);
                        prop_assert!(seen.insert(id), "sample {id} twice");
                    }
                }
            }
            prop_assert!(samples - (seen.len() as u64) < plan.global_batch());
        }

        #[test]
        fn a_global_batch_does_not_depend_on_how_it_is_divided(
            samples in 64u64..3000, seed: u64, epoch: u64,
        ) {
            let ids = |ranks: u32, batch: u32| -> Vec<u64> {
                let plan = BatchPlan::new(samples, ranks, batch, seed).unwrap();
                (0..ranks)
                    .flat_map(|rank| plan.micro_batch(Epoch(epoch), 0, VirtualRank(rank)))
                    .collect()
            };
            prop_assert_eq!(ids(8, 8), ids(64, 1));
            prop_assert_eq!(ids(8, 8), ids(1, 64));
        }

        #[test]
        fn evaluation_covers_each_sample_exactly_once(samples: u64, ranks in 1u32..200) {
            let mut next = 0;
            for rank in 0..ranks {
                let range = evaluation(samples, ranks, VirtualRank(rank));
                prop_assert_eq!(range.start, next);
                let size = range.end - range.start;
                let share = samples / u64::from(ranks);
                prop_assert!(size == share || size == share + 1);
                next = range.end;
            }
            prop_assert_eq!(next, samples);
        }
    }
}
