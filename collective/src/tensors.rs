//! The sum over virtual ranks of tensors on a device: the tree of [`crate::Reduction`], operation for operation, so
//! that equal vectors give equal bits on the host and on every device.

use std::ops::Range;

use cluster::Rank;
use tch::{Device, Kind, Tensor};

use crate::{
    Exchange, ExchangeError,
    plan::{Plan, deepest},
    slice_of,
};

/// Moves rows of floats on a device between ranks, as [`Exchange`] moves bytes of the host.
pub trait TensorExchange {
    /// This rank.
    fn rank(&self) -> Rank;

    /// How many ranks there are, this one included.
    fn size(&self) -> u32;

    /// Sends `outgoing[p]` to rank `p` and overwrites `incoming[p]` with what it sent here; what is at the own
    /// place is not moved. All are f32, of one axis and contiguous, on one device, and may be empty.
    ///
    /// # Errors
    /// As [`Exchange::all_to_all`].
    fn all_to_all(
        &mut self,
        outgoing: &[Tensor],
        incoming: &mut [Tensor],
    ) -> Result<(), ExchangeError>;

    /// Adds all ranks' `row` in place, in an order that may depend on the number of ranks.
    ///
    /// # Errors
    /// As [`Exchange::all_to_all`].
    fn sum(&mut self, row: &mut Tensor) -> Result<(), ExchangeError>;
}

/// Tensors by way of host memory: for devices without a transport of their own.
#[expect(missing_debug_implementations, reason = "it is a borrow of any exchange")]
pub struct Staged<'a>(pub &'a mut dyn Exchange);

impl Staged<'_> {
    fn move_rows(
        &mut self,
        outgoing: &[Vec<f32>],
        incoming: &mut [Vec<f32>],
    ) -> Result<(), ExchangeError> {
        let out: Vec<&[u8]> = outgoing.iter().map(|row| bytemuck::cast_slice(row)).collect();
        let mut into: Vec<&mut [u8]> =
            incoming.iter_mut().map(|row| bytemuck::cast_slice_mut(row)).collect();
        self.0.all_to_all(&out, &mut into)
    }
}

impl TensorExchange for Staged<'_> {
    fn rank(&self) -> Rank {
        self.0.rank()
    }

    fn size(&self) -> u32 {
        self.0.size()
    }

    fn all_to_all(
        &mut self,
        outgoing: &[Tensor],
        incoming: &mut [Tensor],
    ) -> Result<(), ExchangeError> {
        let me = self.rank().0 as usize;
        let others = |rank: usize, row: &Tensor| if rank == me { Vec::new() } else { host(row) };
        let out: Vec<_> = outgoing.iter().enumerate().map(|(to, row)| others(to, row)).collect();
        let lengths = incoming.iter().enumerate();
        let mut into: Vec<Vec<f32>> = lengths
            .map(|(from, row)| vec![0.0; if from == me { 0 } else { row.numel() }])
            .collect();
        self.move_rows(&out, &mut into)?;
        for (row, values) in incoming.iter_mut().zip(&into).filter(|(_, values)| !values.is_empty())
        {
            tch::no_grad(|| row.copy_(&Tensor::from_slice(values)));
        }
        Ok(())
    }

    /// Each rank sends all to all, and every one adds in the order of ranks.
    fn sum(&mut self, row: &mut Tensor) -> Result<(), ExchangeError> {
        let (me, size) = (self.rank().0 as usize, self.size() as usize);
        let own = host(row);
        let other = |rank: usize| if rank == me { Vec::new() } else { own.clone() };
        let out: Vec<_> = (0..size).map(other).collect();
        let mut into: Vec<_> = out.iter().map(|values| vec![0.0; values.len()]).collect();
        self.move_rows(&out, &mut into)?;
        into[me] = own;
        let sum =
            into.iter().map(|values| Tensor::from_slice(values)).reduce(|sum, next| sum + next);
        tch::no_grad(|| row.copy_(&sum.expect("there is at least this rank")));
        Ok(())
    }
}

/// The floats of a row on any device.
fn host(row: &Tensor) -> Vec<f32> {
    let row = row.detach().to_device(Device::Cpu).contiguous();
    libtorch::slice::<f32>(&row).expect("a contiguous row of floats on the host").to_vec()
}

/// As [`crate::Reduction`], of tensors.
#[derive(Debug)]
pub struct TensorReduction {
    virtual_ranks: u32,
    len: i64,
    device: Device,
    plan: Plan,
    leaves_pushed: usize,
    depth: usize,
    held: Vec<Tensor>,
}

impl TensorReduction {
    /// Plans the sum over `virtual_ranks` rows of `len` floats on `device` by one rank.
    #[must_use]
    pub fn new(virtual_ranks: u32, len: usize, device: Device) -> Self {
        let len = i64::try_from(len).expect("no memory holds more floats");
        let everything = 0..virtual_ranks;
        let everything = std::slice::from_ref(&everything);
        let mut reduction = Self {
            virtual_ranks,
            len,
            device,
            plan: Plan::new(virtual_ranks, everything, Rank(0)),
            leaves_pushed: 0,
            depth: 0,
            held: Vec::new(),
        };
        reduction.regroup(everything, Rank(0));
        reduction
    }

    /// Plans anew for another generation and drops what was pushed.
    ///
    /// # Panics
    /// As [`crate::Reduction::new`].
    pub fn regroup(&mut self, blocks: &[Range<u32>], rank: Rank) {
        self.plan = Plan::new(self.virtual_ranks, blocks, rank);
        self.reset();
        let row = || Tensor::zeros([self.len], (Kind::Float, self.device));
        let count = deepest(&self.plan.local_merges).max(1);
        self.held.resize_with(count, row);
    }

    /// The virtual ranks whose rows are pushed here, in this order.
    #[must_use]
    pub fn block(&self) -> Range<u32> {
        self.plan.block.clone()
    }

    /// Where the next hosted virtual rank's row goes, to be filled and then pushed.
    ///
    /// # Panics
    /// If all of the block was pushed.
    pub fn leaf(&mut self) -> &mut Tensor {
        assert!(self.leaves_pushed < self.plan.local_merges.len(), "all leaves were pushed");
        &mut self.held[self.depth]
    }

    /// Takes the row in [`TensorReduction::leaf`] into the sum.
    ///
    /// # Panics
    /// If all of the block was pushed.
    pub fn push(&mut self) {
        assert!(self.leaves_pushed < self.plan.local_merges.len(), "all leaves were pushed");
        self.depth += 1;
        for _ in 0..self.plan.local_merges[self.leaves_pushed] {
            let (left, right) = self.held[..self.depth].split_at_mut(self.depth - 1);
            add(&mut left[self.depth - 2], &right[0]);
            self.depth -= 1;
        }
        self.leaves_pushed += 1;
    }

    /// Drops what was pushed, to begin the step again.
    pub fn reset(&mut self) {
        (self.leaves_pushed, self.depth) = (0, 0);
    }

    /// Adds the rows of all ranks and returns the sum. With one rank nothing is exchanged.
    ///
    /// # Errors
    /// As [`Exchange::all_to_all`]; what was pushed is then dropped.
    ///
    /// # Panics
    /// If not all of the block was pushed, or `exchange` is of another group than the plan.
    pub fn finish(&mut self, exchange: &mut dyn TensorExchange) -> Result<&Tensor, ExchangeError> {
        assert_eq!(self.leaves_pushed, self.plan.local_merges.len(), "leaves are missing");
        let ranks = self.plan.cover_sizes.len();
        assert_eq!(
            (exchange.rank(), exchange.size() as usize),
            (self.plan.rank, ranks),
            "another group"
        );
        self.reset();
        if ranks > 1 {
            let received = self.exchange_nodes(exchange)?;
            self.sum_own_slice(received);
            self.gather(exchange)?;
        }
        Ok(&self.held[0])
    }

    /// A rank's slice of a row.
    fn slice(&self, row: &Tensor, rank: usize) -> Tensor {
        let len = usize::try_from(self.len).expect("it is not negative");
        let slice = slice_of(len, rank, self.plan.cover_sizes.len());
        let index = |at: usize| i64::try_from(at).expect("it is within the row");
        row.narrow(0, index(slice.start), index(slice.len()))
    }

    fn nothing(&self) -> Tensor {
        Tensor::zeros([0], (Kind::Float, self.device))
    }

    /// Sends each rank its slice of the own nodes; returns the own slice of all others' nodes, by rank.
    fn exchange_nodes(
        &self,
        exchange: &mut dyn TensorExchange,
    ) -> Result<Vec<Vec<Tensor>>, ExchangeError> {
        let (ranks, me) = (self.plan.cover_sizes.len(), self.plan.rank.0 as usize);
        let own_nodes = &self.held[..self.plan.cover_sizes[me]];
        let mut received: Vec<Vec<Tensor>> = (0..ranks).map(|_| Vec::new()).collect();
        let rounds = self.plan.cover_sizes.iter().copied().max().unwrap_or(0);
        for round in 0..rounds {
            let out = |to: usize| match own_nodes.get(round) {
                Some(node) if to != me => self.slice(node, to),
                Some(_) | None => self.nothing(),
            };
            let into = |from: usize| {
                let comes = from != me && round < self.plan.cover_sizes[from];
                if comes { self.slice(&self.held[0], me).empty_like() } else { self.nothing() }
            };
            let outgoing: Vec<Tensor> = (0..ranks).map(out).collect();
            let mut incoming: Vec<Tensor> = (0..ranks).map(into).collect();
            exchange.all_to_all(&outgoing, &mut incoming)?;
            for (from, node) in incoming.into_iter().enumerate() {
                if from != me && round < self.plan.cover_sizes[from] {
                    received[from].push(node);
                }
            }
        }
        Ok(received)
    }

    /// Takes this rank's slice through the rest of the tree, into `held[0]`.
    fn sum_own_slice(&mut self, received: Vec<Vec<Tensor>>) {
        let me = self.plan.rank.0 as usize;
        let mut merges = self.plan.final_merges.iter();
        let mut sums: Vec<Tensor> = Vec::new();
        for (rank, mut nodes) in received.into_iter().enumerate() {
            if rank == me {
                let own = self.held[..self.plan.cover_sizes[me]].iter();
                nodes = own.map(|node| self.slice(node, me).copy()).collect();
            }
            for node in nodes {
                sums.push(node);
                for _ in 0..*merges.next().expect("there is an entry a node") {
                    let right = sums.pop().expect("a merge has two sides");
                    add(sums.last_mut().expect("a merge has two sides"), &right);
                }
            }
        }
        let sum = sums.pop().expect("the tree has a root");
        let mut place = self.slice(&self.held[0], me);
        tch::no_grad(|| place.copy_(&sum));
    }

    /// Sends the own slice of the sum to all, and receives theirs.
    fn gather(&mut self, exchange: &mut dyn TensorExchange) -> Result<(), ExchangeError> {
        let (ranks, me) = (self.plan.cover_sizes.len(), self.plan.rank.0 as usize);
        let own = self.slice(&self.held[0], me);
        let unless_own = |rank: usize, row: Tensor| if rank == me { self.nothing() } else { row };
        let outgoing: Vec<_> = (0..ranks).map(|to| unless_own(to, own.shallow_clone())).collect();
        let mut incoming: Vec<_> =
            (0..ranks).map(|from| unless_own(from, self.slice(&self.held[0], from))).collect();
        exchange.all_to_all(&outgoing, &mut incoming)
    }
}

/// `left + right`, in place of `left`.
fn add(left: &mut Tensor, right: &Tensor) {
    drop(tch::no_grad(|| left.g_add_(right)));
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use cluster::blocks;

    use super::*;
    use crate::{Reduction, local};

    const LEN: usize = 1_003;

    /// A virtual rank's row, of magnitudes that make every order of additions visible.
    fn row(virtual_rank: u32) -> Vec<f32> {
        let wave = |at: usize| {
            let angle = f64::from(virtual_rank) * 1.7 + at as f64 * 0.37;
            angle.sin() * 10_f64.powi(i32::try_from(at % 9).unwrap() - 4)
        };
        #[expect(clippy::cast_possible_truncation, reason = "rounding is wanted")]
        (0..LEN).map(|at| wave(at) as f32).collect()
    }

    fn on_host(virtual_ranks: u32) -> Vec<f32> {
        let everything = 0..virtual_ranks;
        let mut sum =
            Reduction::new(virtual_ranks, std::slice::from_ref(&everything), Rank(0), LEN);
        for rank in everything {
            sum.leaf().copy_from_slice(&row(rank));
            sum.push();
        }
        let mut alone = local::group(1, Duration::from_secs(60)).unwrap().pop().unwrap();
        sum.finish(&mut alone).unwrap().to_vec()
    }

    #[test]
    fn tensors_add_to_the_bits_of_the_host_for_every_number_of_ranks() {
        libtorch::init(1).unwrap();
        for virtual_ranks in [1_u32, 6, 8] {
            let expected = on_host(virtual_ranks);
            for ranks in 1..=virtual_ranks {
                let blocks = blocks::balanced_blocks(virtual_ranks, ranks);
                let group = local::group(ranks, Duration::from_secs(60)).unwrap();
                let sums: Vec<Vec<f32>> = std::thread::scope(|scope| {
                    let blocks = &blocks;
                    let work = |(rank, mut peers): (u32, local::LocalRank)| {
                        scope.spawn(move || {
                            let mut sum = TensorReduction::new(virtual_ranks, LEN, Device::Cpu);
                            sum.regroup(blocks, Rank(rank));
                            for leaf in sum.block() {
                                sum.leaf().copy_(&Tensor::from_slice(&row(leaf)));
                                sum.push();
                            }
                            host(sum.finish(&mut Staged(&mut peers)).unwrap())
                        })
                    };
                    let threads: Vec<_> = (0..).zip(group).map(work).collect();
                    threads.into_iter().map(|thread| thread.join().unwrap()).collect()
                });
                for sum in sums {
                    let bits =
                        |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                    assert_eq!(bits(&sum), bits(&expected), "V = {virtual_ranks}, N = {ranks}");
                }
            }
        }
    }
}
