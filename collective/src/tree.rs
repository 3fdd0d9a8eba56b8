//! The sum over virtual ranks in one fixed binary tree, whoever hosts them.
//!
//! A worker adds what lies inside its block of virtual ranks along the tree; what is left is a few
//! nodes a worker. Each rank then owns a slice of the vector: it is sent that slice of every node,
//! adds them along the rest of the tree, and sends the sum to all. Only IEEE additions of equal
//! shapes, left operand first, so the bits depend neither on the number of ranks nor on the
//! transport (`docs/decisions/0003-fixed-tree.md`).
//!
//! ```text
//!            0..8                  V = 8, N = 3: blocks 0..3, 3..6, 6..8
//!        0..4    4..8              covers 0..2 2..3 | 3..4 4..6 | 6..8
//!     0..2 2..4 4..6 6..8
//!     0  1 2  3 4  5 6  7
//! ```

use std::{fmt, ops::Range};

use bytemuck::{cast_slice, cast_slice_mut};
use cluster::Rank;

use crate::{
    Exchange, ExchangeError,
    plan::{Plan, deepest},
    slice_of, slices_mut,
};

/// Floats of a slice that are taken through the rest of the tree at once: a few of them per level
/// fit in the first-level cache.
const PIECE: usize = 2048;

/// The sum over all virtual ranks of one vector each, to the same bits for every number of ranks.
///
/// All buffers are kept between steps. For each step: fill [`Reduction::leaf`] and call
/// [`Reduction::push`] once a hosted virtual rank, in order, then [`Reduction::finish`].
///
/// Vectors cross the wire in the machine's byte order: all workers of a run have the same one, as
/// their fingerprints are equal.
pub struct Reduction {
    virtual_ranks: u32,
    len: usize,
    plan: Plan,
    leaves_pushed: usize,
    /// Partial sums not yet merged are `held[..depth]`; in the end they are the own cover.
    depth: usize,
    held: Vec<Vec<f32>>,
    /// This rank's slice of the nodes of all other ranks, node after node, left to right.
    inbox: Vec<f32>,
    /// Partial sums of one piece.
    pieces: Vec<[f32; PIECE]>,
}

impl Reduction {
    /// Plans the sum over `virtual_ranks` vectors of `len` floats for `rank`, which hosts
    /// `blocks[rank]` of them.
    ///
    /// # Panics
    /// If `blocks` do not follow each other from 0 to `virtual_ranks`, or `rank` has none.
    #[must_use]
    pub fn new(virtual_ranks: u32, blocks: &[Range<u32>], rank: Rank, len: usize) -> Self {
        let mut reduction = Self {
            virtual_ranks,
            len,
            plan: Plan::new(virtual_ranks, blocks, rank),
            leaves_pushed: 0,
            depth: 0,
            held: Vec::new(),
            inbox: Vec::new(),
            pieces: Vec::new(),
        };
        reduction.regroup(blocks, rank);
        reduction
    }

    /// Plans anew for another generation and drops what was pushed. Buffers are kept as far as they
    /// still fit.
    ///
    /// # Panics
    /// As [`Reduction::new`].
    pub fn regroup(&mut self, blocks: &[Range<u32>], rank: Rank) {
        self.plan = Plan::new(self.virtual_ranks, blocks, rank);
        self.reset();

        let held = deepest(&self.plan.local_merges).max(1);
        self.held.resize_with(held, || vec![0.0; self.len]);
        let foreign = self.plan.final_merges.len() - self.plan.cover_sizes[rank.0 as usize];
        self.inbox.resize(foreign * self.slice(rank.0 as usize).len(), 0.0);
        self.pieces.resize(deepest(&self.plan.final_merges), [0.0; PIECE]);
    }

    /// Floats in the vector.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the vector has no floats.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The virtual ranks whose vectors are pushed here, in this order.
    #[must_use]
    pub fn block(&self) -> Range<u32> {
        self.plan.block.clone()
    }

    /// Where the next hosted virtual rank's vector goes. What it holds before is unspecified: fill
    /// all of it, then call [`Reduction::push`].
    ///
    /// # Panics
    /// If all of the block was pushed.
    pub fn leaf(&mut self) -> &mut [f32] {
        assert!(self.leaves_pushed < self.plan.local_merges.len(), "{self:?} has all its leaves");
        &mut self.held[self.depth]
    }

    /// Takes the vector in [`Reduction::leaf`] into the sum.
    ///
    /// # Panics
    /// If all of the block was pushed.
    pub fn push(&mut self) {
        assert!(self.leaves_pushed < self.plan.local_merges.len(), "{self:?} has all its leaves");
        self.depth += 1;
        for _ in 0..self.plan.local_merges[self.leaves_pushed] {
            let (left, right) = self.held[..self.depth].split_at_mut(self.depth - 1);
            add(&mut left[self.depth - 2], &right[0]);
            self.depth -= 1;
        }
        self.leaves_pushed += 1;
    }

    /// Adds the vectors of all ranks and returns the sum. The next step can begin afterwards.
    ///
    /// With one rank nothing is exchanged.
    ///
    /// # Errors
    /// As [`Exchange::all_to_all`]; what was pushed is then dropped, as by [`Reduction::reset`].
    ///
    /// # Panics
    /// If not all of the block was pushed, or `exchange` is of another group than the plan.
    pub fn finish(&mut self, exchange: &mut dyn Exchange) -> Result<&[f32], ExchangeError> {
        assert_eq!(self.leaves_pushed, self.plan.local_merges.len(), "{self:?} lacks leaves");
        let ranks = self.plan.cover_sizes.len();
        assert_eq!(exchange.rank(), self.plan.rank, "the plan is for another rank");
        assert_eq!(exchange.size() as usize, ranks, "the plan is for another number of ranks");
        self.reset();
        if ranks > 1 {
            self.exchange_nodes(exchange)?;
            self.sum_own_slice();
            self.gather(exchange)?;
        }
        Ok(&self.held[0])
    }

    /// Drops what was pushed, to begin the step again.
    pub fn reset(&mut self) {
        self.leaves_pushed = 0;
        self.depth = 0;
    }

    fn slice(&self, rank: usize) -> Range<usize> {
        slice_of(self.len, rank, self.plan.cover_sizes.len())
    }

    /// Sends each rank its slice of the own nodes; one call a node of the largest cover.
    fn exchange_nodes(&mut self, exchange: &mut dyn Exchange) -> Result<(), ExchangeError> {
        let (ranks, me) = (self.plan.cover_sizes.len(), self.plan.rank.0 as usize);
        let own_nodes = self.plan.cover_sizes[me];
        let slice_len = self.slice(me).len();
        let mut inbox = &mut self.inbox[..];
        // By rank, what is still to be received from it.
        let mut rooms: Vec<&mut [f32]> = Vec::with_capacity(ranks);
        for (from, nodes) in self.plan.cover_sizes.iter().enumerate() {
            let floats = if from == me { 0 } else { nodes * slice_len };
            let (room, rest) = std::mem::take(&mut inbox).split_at_mut(floats);
            rooms.push(room);
            inbox = rest;
        }
        let rounds = self.plan.cover_sizes.iter().copied().max().unwrap_or(0);
        for round in 0..rounds {
            let outgoing: Vec<&[u8]> = (0..ranks)
                .map(|to| match self.held[..own_nodes].get(round) {
                    Some(node) if to != me => cast_slice(&node[slice_of(self.len, to, ranks)]),
                    Some(_) | None => &[],
                })
                .collect();
            let mut incoming: Vec<&mut [u8]> = Vec::with_capacity(ranks);
            for room in &mut rooms {
                let floats = slice_len.min(room.len());
                let (now, later) = std::mem::take(room).split_at_mut(floats);
                incoming.push(cast_slice_mut(now));
                *room = later;
            }
            exchange.all_to_all(&outgoing, &mut incoming)?;
        }
        Ok(())
    }

    /// Takes this rank's slice through the rest of the tree, piece by piece, into `held[0]`.
    fn sum_own_slice(&mut self) {
        let slice = self.slice(self.plan.rank.0 as usize);
        let mut start = 0;
        while start < slice.len() {
            let piece = start..slice.len().min(start + PIECE);
            self.sum_piece(&slice, &piece);
            // The piece's inputs have been read, so the sum may take the place of one of them.
            let whole = slice.start + piece.start..slice.start + piece.end;
            self.held[0][whole].copy_from_slice(&self.pieces[0][..piece.len()]);
            start = piece.end;
        }
    }

    fn sum_piece(&mut self, slice: &Range<usize>, piece: &Range<usize>) {
        let me = self.plan.rank.0 as usize;
        let mut merges = self.plan.final_merges.iter();
        let (mut depth, mut foreign) = (0, 0);
        for (rank, &nodes) in self.plan.cover_sizes.iter().enumerate() {
            for node in 0..nodes {
                let source = if rank == me {
                    &self.held[node][slice.start + piece.start..slice.start + piece.end]
                } else {
                    let at = foreign * slice.len();
                    foreign += 1;
                    &self.inbox[at + piece.start..at + piece.end]
                };
                let merges = *merges.next().expect("there is an entry a node");
                if merges == 0 {
                    self.pieces[depth][..piece.len()].copy_from_slice(source);
                    depth += 1;
                    continue;
                }
                add(&mut self.pieces[depth - 1][..piece.len()], source);
                for _ in 1..merges {
                    let (left, right) = self.pieces[..depth].split_at_mut(depth - 1);
                    add(&mut left[depth - 2][..piece.len()], &right[0][..piece.len()]);
                    depth -= 1;
                }
            }
        }
    }

    /// Sends the own slice of the sum to all, and receives theirs.
    fn gather(&mut self, exchange: &mut dyn Exchange) -> Result<(), ExchangeError> {
        let (ranks, me) = (self.plan.cover_sizes.len(), self.plan.rank.0 as usize);
        let mut own: &[u8] = &[];
        let mut incoming: Vec<&mut [u8]> = Vec::with_capacity(ranks);
        for (from, slice) in slices_mut(&mut self.held[0], ranks).enumerate() {
            if from == me {
                own = cast_slice(slice);
                incoming.push(&mut []);
            } else {
                incoming.push(cast_slice_mut(slice));
            }
        }
        let outgoing: Vec<&[u8]> =
            (0..ranks).map(|to| if to == me { &[][..] } else { own }).collect();
        exchange.all_to_all(&outgoing, &mut incoming)
    }
}

impl fmt::Debug for Reduction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reduction")
            .field("virtual_ranks", &self.virtual_ranks)
            .field("len", &self.len)
            .field("rank", &self.plan.rank)
            .field("block", &self.plan.block)
            .field("leaves_pushed", &self.leaves_pushed)
            .finish_non_exhaustive()
    }
}

/// `left + right`, in place of `left`.
fn add(left: &mut [f32], right: &[f32]) {
    for (left, right) in left.iter_mut().zip(right) {
        *left += right;
    }
}
