//! Who hosts which virtual ranks, and the fixed tree that the sum over them follows.
//!
//! Both are here, and not in `collective`, because the coordinator decides the blocks and every
//! worker must agree on them to the last bit.

use std::ops::Range;

/// A node of the reduction tree: the half-open range of virtual ranks that it sums.
pub type Node = Range<u32>;

/// Where a node of the tree is cut: at the largest power of two below its width.
///
/// # Panics
/// If the node has fewer than two leaves.
#[must_use]
pub fn split(node: &Node) -> u32 {
    let width = node.end - node.start;
    assert!(width >= 2, "a leaf is not split");
    node.start + width.next_power_of_two() / 2
}

/// The largest tree nodes that lie inside `block`, left to right: what its host can add up alone.
#[must_use]
pub fn cover(virtual_ranks: u32, block: &Range<u32>) -> Vec<Node> {
    let mut nodes = Vec::new();
    collect_cover(0..virtual_ranks, block, &mut nodes);
    nodes
}

fn collect_cover(node: Node, block: &Range<u32>, nodes: &mut Vec<Node>) {
    let inside = block.start <= node.start && node.end <= block.end;
    let apart = block.end <= node.start || node.end <= block.start;
    if apart || node.is_empty() {
    } else if inside {
        nodes.push(node);
    } else {
        let middle = split(&node);
        collect_cover(node.start..middle, block, nodes);
        collect_cover(middle..node.end, block, nodes);
    }
}

/// Splits `virtual_ranks` over `workers`: contiguous blocks whose sizes differ by at most one.
///
/// Among the ways to place the larger blocks, the one whose largest cover is smallest is taken, since
/// each node of a cover travels on its own (`docs/decisions/0003-fixed-tree.md`).
///
/// # Panics
/// If `workers` is 0 or above `virtual_ranks`: the coordinator never forms such a generation.
#[must_use]
pub fn balanced_blocks(virtual_ranks: u32, workers: u32) -> Vec<Range<u32>> {
    assert!((1..=virtual_ranks).contains(&workers), "each worker hosts at least one virtual rank");
    let mut start = 0;
    block_sizes(virtual_ranks, workers)
        .into_iter()
        .map(|size| {
            start += size;
            start - size..start
        })
        .collect()
}

/// What the blocks placed so far cost: the largest cover, then all covers.
type Cost = (usize, usize);

/// Block sizes from the left, by dynamic programming over (blocks placed, larger blocks among them).
///
/// Exact for the largest cover, since it cannot shrink when a block is added. Among placements with
/// the same largest cover, keeping the least total at each state is a heuristic; all that matters is
/// that every machine takes the same one.
fn block_sizes(virtual_ranks: u32, workers: u32) -> Vec<u32> {
    let (small, larger) = (virtual_ranks / workers, virtual_ranks % workers);
    let mut row: Vec<Option<Cost>> = vec![None; larger as usize + 1];
    row[0] = Some((0, 0));
    // Whether the block placed last is a larger one, on the best way to each state.
    let mut is_larger: Vec<Vec<bool>> = Vec::with_capacity(workers as usize);
    for placed in 0..workers {
        let mut next: Vec<Option<Cost>> = vec![None; larger as usize + 1];
        let mut lasts = vec![false; larger as usize + 1];
        for (used, cost) in (0..).zip(&row) {
            let Some((largest, total)) = *cost else { continue };
            if larger - used > workers - placed {
                continue; // The larger ones that are left do not fit any more.
            }
            let start = placed * small + used;
            for extra in 0..=u32::from(used < larger) {
                let nodes = cover_len(0..virtual_ranks, &(start..start + small + extra));
                let grown = (largest.max(nodes), total + nodes);
                let at = (used + extra) as usize;
                if next[at].is_none_or(|held| grown < held) {
                    (next[at], lasts[at]) = (Some(grown), extra == 1);
                }
            }
        }
        row = next;
        is_larger.push(lasts);
    }
    let mut left = larger;
    let from_the_right = is_larger.iter().rev().map(|lasts| {
        let extra = u32::from(lasts[left as usize]);
        left -= extra;
        small + extra
    });
    let mut sizes: Vec<_> = from_the_right.collect();
    sizes.reverse();
    sizes
}

/// How many nodes [`cover`] has.
fn cover_len(node: Node, block: &Range<u32>) -> usize {
    let inside = block.start <= node.start && node.end <= block.end;
    let apart = block.end <= node.start || node.end <= block.start;
    if apart || node.is_empty() {
        0
    } else if inside {
        1
    } else {
        let middle = split(&node);
        cover_len(node.start..middle, block) + cover_len(middle..node.end, block)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_tree_splits_at_the_largest_power_of_two_below_the_width() {
        assert_eq!(split(&(0..8)), 4);
        assert_eq!(split(&(0..6)), 4);
        assert_eq!(split(&(4..6)), 5);
        assert_eq!(split(&(0..5)), 4);
    }

    #[test]
    fn three_workers_of_eight_virtual_ranks_need_two_messages_at_most() {
        let blocks = balanced_blocks(8, 3);
        assert_eq!(blocks.iter().map(|block| cover(8, block).len()).max(), Some(2));
    }

    #[test]
    fn thousands_of_workers_are_placed_in_a_moment() {
        let blocks = balanced_blocks(16_384, 4_095);
        let largest = blocks.iter().map(|block| cover(16_384, block).len()).max();
        assert!(largest <= Some(4), "{largest:?}");
        assert!(
            blocks.iter().all(|block| cover_len(0..16_384, block) == cover(16_384, block).len())
        );
    }

    proptest! {
        #[test]
        fn blocks_and_covers_partition_the_virtual_ranks(v in 1u32..200, n in 1u32..200) {
            prop_assume!(n <= v);
            let blocks = balanced_blocks(v, n);
            prop_assert_eq!(blocks.len(), n as usize);
            let mut at = 0;
            for block in &blocks {
                prop_assert_eq!(block.start, at);
                prop_assert!(block.end - block.start >= v / n && block.end - block.start <= v.div_ceil(n));
                at = block.end;
                let mut node_at = block.start;
                for node in cover(v, block) {
                    prop_assert_eq!(node.start, node_at);
                    node_at = node.end;
                }
                prop_assert_eq!(node_at, block.end);
            }
            prop_assert_eq!(at, v);
        }
    }
}
