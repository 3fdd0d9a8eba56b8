//! The sum over ranks, to the same bits whatever the number of ranks.
//!
//! [`Exchange`] moves bytes between the ranks of one generation; [`Reduction`] adds vectors with it
//! along a fixed tree over virtual ranks, and [`TensorReduction`] tensors on a device. Transports:
//! [`MeshListener`] forms a TCP [`Mesh`] between processes, [`nccl`] connects their GPUs, [`local`]
//! threads of one process for tests.
//!
//! **Invariant**: an exchange that failed stays failed. What a peer has received is then unknown, so
//! the only way on is a new generation, with a new exchange.

mod abort;
mod error;
pub mod local;
mod mesh;
pub mod nccl;
mod plan;
mod tensors;
mod tree;

use cluster::Rank;

pub use crate::{
    abort::AbortHandle,
    error::{ExchangeError, ProtocolFault, RankList},
    mesh::{
        FormError, Group, Mesh, MeshConfig, MeshListener, MissingPeer, Refusal, RefusedPeer, Secret,
    },
    tensors::{Staged, TensorExchange, TensorReduction},
    tree::Reduction,
};

/// Moves bytes between the ranks `0..size` of one generation.
///
/// Every rank makes the same calls in the same order. A call returns when this rank's part is done;
/// the others may still be busy with theirs.
pub trait Exchange: Send {
    /// This rank.
    fn rank(&self) -> Rank;

    /// How many ranks there are, this one included.
    fn size(&self) -> u32;

    /// Sends `outgoing[p]` to rank `p` and fills `incoming[p]` with what rank `p` sent here.
    ///
    /// Both sides know the sizes beforehand; they may differ from pair to pair and may be 0. The
    /// message to oneself is copied.
    ///
    /// # Errors
    /// [`ExchangeError`], and from then on the same error at every call. The contents of `incoming`
    /// are then unspecified.
    ///
    /// # Panics
    /// If there are not `size` messages each way, or the two to oneself differ in length.
    fn all_to_all(
        &mut self,
        outgoing: &[&[u8]],
        incoming: &mut [&mut [u8]],
    ) -> Result<(), ExchangeError>;

    /// What ends a blocked call of this exchange from another thread.
    fn abort_handle(&self) -> AbortHandle;

    /// Gives every rank the `data` of `root`; all must pass the same length.
    ///
    /// The root deals out a slice to each rank and the ranks pass them on, so that nobody sends more
    /// than about twice the data, however many ranks there are.
    ///
    /// # Errors
    /// As [`Exchange::all_to_all`].
    ///
    /// # Panics
    /// If `root` is not one of the ranks.
    fn broadcast(&mut self, root: Rank, data: &mut [u8]) -> Result<(), ExchangeError> {
        let (size, me) = (self.size() as usize, self.rank().0 as usize);
        let root = root.0 as usize;
        assert!(root < size, "root {root} is not one of {size} ranks");
        if size == 1 {
            return Ok(());
        }

        let dealt = data.len();
        if me == root {
            let outgoing: Vec<&[u8]> = (0..size)
                .map(|to| if to == me { &[][..] } else { &data[slice_of(dealt, to, size)] })
                .collect();
            let mut nothing: Vec<&mut [u8]> = (0..size).map(|_| &mut [][..]).collect();
            self.all_to_all(&outgoing, &mut nothing)?;
        } else {
            let nothing = vec![&[][..]; size];
            let mut incoming: Vec<&mut [u8]> = (0..size).map(|_| &mut [][..]).collect();
            incoming[root] = &mut data[slice_of(dealt, me, size)];
            self.all_to_all(&nothing, &mut incoming)?;
        }

        // Everyone passes its slice on to all but the root, which has them all.
        let mut own: &[u8] = &[];
        let mut incoming: Vec<&mut [u8]> = Vec::with_capacity(size);
        for (from, slice) in slices_mut(data, size).enumerate() {
            if from == me {
                own = slice;
                incoming.push(&mut []);
            } else if me == root {
                incoming.push(&mut []);
            } else {
                incoming.push(slice);
            }
        }
        let outgoing: Vec<&[u8]> =
            (0..size).map(|to| if to == me || to == root { &[][..] } else { own }).collect();
        self.all_to_all(&outgoing, &mut incoming)
    }
}

/// The `index`-th of `count` slices of `0..len`, whose sizes differ by at most one.
fn slice_of(len: usize, index: usize, count: usize) -> std::ops::Range<usize> {
    // Through u128, since the product of a large state and a rank may not fit.
    let cut = |at: usize| {
        usize::try_from(len as u128 * at as u128 / count as u128).expect("it is at most `len`")
    };
    cut(index)..cut(index + 1)
}

/// `data` as `count` disjoint slices, cut as by [`slice_of`].
fn slices_mut<T>(data: &mut [T], count: usize) -> impl Iterator<Item = &mut [T]> {
    let len = data.len();
    let mut rest = data;
    (0..count).map(move |index| {
        let (slice, after) =
            std::mem::take(&mut rest).split_at_mut(slice_of(len, index, count).len());
        rest = after;
        slice
    })
}

/// Checks a caller's messages of one `all_to_all` and copies the one to itself.
///
/// # Panics
/// As [`Exchange::all_to_all`] says.
fn take_own_message(rank: Rank, size: u32, outgoing: &[&[u8]], incoming: &mut [&mut [u8]]) {
    let (me, size) = (rank.0 as usize, size as usize);
    assert!(
        outgoing.len() == size && incoming.len() == size,
        "{} messages out and {} in for {size} ranks",
        outgoing.len(),
        incoming.len(),
    );
    assert_eq!(outgoing[me].len(), incoming[me].len(), "the message to oneself keeps its length");
    incoming[me].copy_from_slice(outgoing[me]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_cover_everything_once_and_are_balanced() {
        for (len, count) in [(0, 3), (1, 3), (10, 3), (12, 4), (5, 7)] {
            let mut data: Vec<usize> = (0..len).collect();
            let cuts: Vec<Vec<usize>> = slices_mut(&mut data, count).map(|s| s.to_vec()).collect();
            assert_eq!(cuts.concat(), (0..len).collect::<Vec<_>>());
            let sizes = cuts.iter().map(Vec::len);
            assert!(sizes.clone().max().unwrap() - sizes.min().unwrap() <= 1);
        }
    }
}
