//! The sum over virtual ranks has the same bits, whoever hosts them and however they are connected.

use std::ops::Range;

use crate::transports::{self, Connect, PATIENT, on_threads};
use cluster::{Rank, blocks::balanced_blocks};
use collective::{AbortHandle, Exchange, ExchangeError, Reduction};
use proptest::prelude::*;

/// Floats of both signs over 80 binary orders of magnitude, so that each order of additions shows.
fn leaf(seed: u64, virtual_rank: u32, len: usize) -> Vec<f32> {
    let mut state = seed ^ u64::from(virtual_rank).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (0..len)
        .map(|_| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut bits = state;
            bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            let sign_and_fraction = u32::try_from(bits >> 32).unwrap() & 0x807f_ffff;
            let exponent = 87 + u32::try_from(bits & 0xffff).unwrap() % 80;
            f32::from_bits(sign_and_fraction | exponent << 23)
        })
        .collect()
}

/// The definition: left half plus right half, the left one a power of two wide.
fn reference(seed: u64, node: Range<u32>, len: usize) -> Vec<f32> {
    let width = node.end - node.start;
    if width == 1 {
        return leaf(seed, node.start, len);
    }
    let mut half = 1;
    while half * 2 < width {
        half *= 2;
    }
    let left = reference(seed, node.start..node.start + half, len);
    let right = reference(seed, node.start + half..node.end, len);
    left.iter().zip(&right).map(|(left, right)| left + right).collect()
}

fn bits(vector: &[f32]) -> Vec<u32> {
    vector.iter().map(|value| value.to_bits()).collect()
}

fn push_leaves(reduction: &mut Reduction, seed: u64) {
    for virtual_rank in reduction.block() {
        let vector = leaf(seed, virtual_rank, reduction.len());
        reduction.leaf().copy_from_slice(&vector);
        reduction.push();
    }
}

/// Two steps on `connect`ed ranks, each compared with the reference.
fn check(connect: Connect, virtual_ranks: u32, blocks: &[Range<u32>], len: usize, seed: u64) {
    let size = u32::try_from(blocks.len()).unwrap();
    let expected: Vec<Vec<u32>> =
        [seed, seed + 1].map(|seed| bits(&reference(seed, 0..virtual_ranks, len))).into();
    on_threads(connect(size, PATIENT), |mut exchange| {
        let mut reduction = Reduction::new(virtual_ranks, blocks, exchange.rank(), len);
        for (step, expected) in (seed..).zip(&expected) {
            push_leaves(&mut reduction, step);
            let sum = reduction.finish(exchange.as_mut()).unwrap();
            assert!(bits(sum) == *expected, "V={virtual_ranks}, blocks {blocks:?}, length {len}");
        }
    });
}

fn check_all_sizes(connect: Connect) {
    for virtual_ranks in 1..=17 {
        for size in 1..=virtual_ranks {
            check(connect, virtual_ranks, &balanced_blocks(virtual_ranks, size), 333, 7);
        }
    }
}

#[test]
fn every_number_of_local_ranks_gives_the_same_bits() {
    check_all_sizes(transports::local);
}

#[test]
fn every_number_of_mesh_ranks_gives_the_same_bits() {
    check_all_sizes(transports::mesh);
}

/// Any contiguous blocks, empty ones among them.
fn blocks() -> impl Strategy<Value = (u32, Vec<Range<u32>>)> {
    (1u32..=17).prop_flat_map(|v| (Just(v), prop::collection::vec(0..=v, 0..6))).prop_map(
        |(v, mut cuts)| {
            cuts.extend([0, v]);
            cuts.sort_unstable();
            (v, cuts.windows(2).map(|pair| pair[0]..pair[1]).collect())
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_blocks_and_any_length_give_the_same_bits(
        (virtual_ranks, blocks) in blocks(),
        len in prop_oneof![0usize..9, 2000..5000usize],
        seed: u32,
    ) {
        check(transports::local, virtual_ranks, &blocks, len, seed.into());
    }
}

#[test]
fn the_order_of_additions_shows_in_these_vectors() {
    let len = 333;
    let mut in_order = vec![0.0; len];
    for virtual_rank in 0..8 {
        for (sum, value) in in_order.iter_mut().zip(leaf(7, virtual_rank, len)) {
            *sum += value;
        }
    }
    assert_ne!(bits(&in_order), bits(&reference(7, 0..8, len)));
}

/// An exchange whose every call fails.
struct Broken;

impl Exchange for Broken {
    fn rank(&self) -> Rank {
        Rank(0)
    }

    fn size(&self) -> u32 {
        2
    }

    fn all_to_all(&mut self, _: &[&[u8]], _: &mut [&mut [u8]]) -> Result<(), ExchangeError> {
        Err(ExchangeError::Aborted)
    }

    fn abort_handle(&self) -> AbortHandle {
        AbortHandle::new().unwrap()
    }
}

#[test]
fn a_failed_step_is_repeated_by_another_number_of_ranks_with_the_same_bits() {
    let (virtual_ranks, len, seed) = (8, 5000, 3);
    let expected = bits(&reference(seed, 0..virtual_ranks, len));
    let mut reduction = Reduction::new(virtual_ranks, &balanced_blocks(8, 2), Rank(0), len);
    push_leaves(&mut reduction, seed);
    assert_eq!(reduction.finish(&mut Broken), Err(ExchangeError::Aborted));
    // Half a block is pushed, then the step is given up.
    reduction.leaf().fill(f32::NAN);
    reduction.push();
    reduction.reset();
    push_leaves(&mut reduction, seed);
    assert_eq!(reduction.finish(&mut Broken), Err(ExchangeError::Aborted));

    reduction.regroup(std::slice::from_ref(&(0..virtual_ranks)), Rank(0));
    push_leaves(&mut reduction, seed);
    let mut alone = transports::local(1, PATIENT).pop().unwrap();
    assert!(bits(reduction.finish(alone.as_mut()).unwrap()) == expected);

    let blocks = balanced_blocks(virtual_ranks, 3);
    on_threads(transports::local(3, PATIENT), |mut exchange| {
        let mut reduction = Reduction::new(virtual_ranks, &balanced_blocks(8, 8), Rank(7), len);
        reduction.regroup(&blocks, exchange.rank());
        push_leaves(&mut reduction, seed);
        assert!(bits(reduction.finish(exchange.as_mut()).unwrap()) == expected);
    });
}
