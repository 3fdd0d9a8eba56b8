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
    let best = Placement::search(virtual_ranks, workers);
    let mut start = 0;
    best.sizes
        .iter()
        .map(|size| {
            start += size;
            start - size..start
        })
        .collect()
}

/// Block sizes from the left, with what they cost.
#[derive(Clone)]
struct Placement {
    largest_cover: usize,
    cover_total: usize,
    sizes: Vec<u32>,
}

impl Placement {
    /// Dynamic programming over (blocks placed, larger blocks among them).
    ///
    /// Exact for the largest cover, since it cannot shrink when a block is added. Among placements
    /// with the same largest cover, keeping the least total at each state is a heuristic; all that
    /// matters is that every machine takes the same one.
    fn search(virtual_ranks: u32, workers: u32) -> Self {
        let (small, larger) = (virtual_ranks / workers, virtual_ranks % workers);
        let empty = Self { largest_cover: 0, cover_total: 0, sizes: Vec::new() };
        let mut row: Vec<Option<Self>> = vec![None; larger as usize + 1];
        row[0] = Some(empty);
        for placed in 0..workers {
            let mut next: Vec<Option<Self>> = vec![None; larger as usize + 1];
            for (used, placement) in (0..).zip(&row) {
                let Some(placement) = placement else { continue };
                let start = placed * small + used;
                for extra in 0..=u32::from(used < larger) {
                    let grown = placement.with_block(virtual_ranks, start, small + extra);
                    let slot = &mut next[(used + extra) as usize];
                    if slot.as_ref().is_none_or(|held| grown.cost() < held.cost()) {
                        *slot = Some(grown);
                    }
                }
            }
            row = next;
        }
        row.pop().flatten().expect("`larger` of `workers` blocks can always be larger")
    }

    fn with_block(&self, virtual_ranks: u32, start: u32, size: u32) -> Self {
        let nodes = cover(virtual_ranks, &(start..start + size)).len();
        let mut sizes = self.sizes.clone();
        sizes.push(size);
        Self {
            largest_cover: self.largest_cover.max(nodes),
            cover_total: self.cover_total + nodes,
            sizes,
        }
    }

    fn cost(&self) -> (usize, usize) {
        (self.largest_cover, self.cover_total)
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
