//! Which partial sums exist where, and in which order they are merged: the same for sums on the host and on a
//! device.

use std::ops::Range;

use cluster::{
    Rank,
    blocks::{self, Node},
};

/// One rank's part in the sum along the tree.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) rank: Rank,
    /// The virtual ranks that it hosts.
    pub(crate) block: Range<u32>,
    /// Merges that follow each local leaf, left to right.
    pub(crate) local_merges: Vec<u32>,
    /// Merges that follow each node of all covers, left to right.
    pub(crate) final_merges: Vec<u32>,
    /// How many nodes each rank brings.
    pub(crate) cover_sizes: Vec<usize>,
}

impl Plan {
    /// Of `rank`, which hosts `blocks[rank]` of `virtual_ranks`.
    ///
    /// # Panics
    /// If `blocks` do not follow each other from 0 to `virtual_ranks`, or `rank` has none.
    pub(crate) fn new(virtual_ranks: u32, blocks: &[Range<u32>], rank: Rank) -> Self {
        let end = blocks.iter().fold(0, |at, block| {
            assert!(block.start == at && block.end >= at, "blocks {blocks:?} do not follow");
            block.end
        });
        assert_eq!(end, virtual_ranks, "blocks {blocks:?} do not end with the last one");
        let block = blocks.get(rank.0 as usize).expect("the rank has a block").clone();
        let covers: Vec<Vec<Node>> =
            blocks.iter().map(|block| blocks::cover(virtual_ranks, block)).collect();
        let leaves: Vec<Node> = block.clone().map(|leaf| leaf..leaf + 1).collect();
        Self {
            rank,
            local_merges: merges(virtual_ranks, &block, &leaves),
            final_merges: merges(virtual_ranks, &(0..virtual_ranks), &covers.concat()),
            cover_sizes: covers.iter().map(Vec::len).collect(),
            block,
        }
    }
}

/// How many pairs are merged right after each of `sources`, when these come left to right and every
/// tree node inside `within` is merged as soon as it can be.
fn merges(virtual_ranks: u32, within: &Range<u32>, sources: &[Node]) -> Vec<u32> {
    fn walk(node: Node, within: &Range<u32>, sources: &[Node], merges: &mut Vec<u32>) {
        if sources.get(merges.len()) == Some(&node) {
            merges.push(0);
        } else if node.start < within.end && within.start < node.end {
            let middle = blocks::split(&node);
            walk(node.start..middle, within, sources, merges);
            walk(middle..node.end, within, sources, merges);
            if within.start <= node.start && node.end <= within.end {
                *merges.last_mut().expect("the node has leaves") += 1;
            }
        }
    }
    let mut merges = Vec::with_capacity(sources.len());
    walk(0..virtual_ranks, within, sources, &mut merges);
    debug_assert_eq!(merges.len(), sources.len());
    merges
}

/// The most partial sums that are alive at once under a schedule of [`merges`].
pub(crate) fn deepest(merges: &[u32]) -> usize {
    let (mut depth, mut deepest) = (0usize, 0);
    for &merged in merges {
        depth += 1;
        deepest = deepest.max(depth);
        depth -= merged as usize;
    }
    deepest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lone_worker_of_eight_holds_four_vectors_and_ends_with_one() {
        let merges = merges(8, &(0..8), &(0..8).map(|v| v..v + 1).collect::<Vec<_>>());
        assert_eq!(merges, [0, 1, 0, 2, 0, 1, 0, 3]);
        assert_eq!(deepest(&merges), 4);
    }

    #[test]
    fn a_block_across_the_middle_is_not_merged_over_it() {
        let merges = merges(8, &(3..6), &[3..4, 4..5, 5..6]);
        assert_eq!(merges, [0, 0, 1]);
    }

    #[test]
    fn the_rest_of_the_tree_starts_from_the_covers() {
        let covers = [0..2, 2..3, 3..4, 4..6, 6..8];
        assert_eq!(merges(8, &(0..8), &covers), [0, 0, 2, 0, 2]);
    }
}
