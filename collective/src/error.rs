//! How an exchange fails, and who is to blame.

use std::{fmt, time::Duration};

use cluster::Rank;
use thiserror::Error;

/// Why an exchange could not go on.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ExchangeError {
    /// A peer's process or connection is gone.
    #[error("rank {rank} is lost: {reason}")]
    PeerLost {
        /// The peer.
        rank: Rank,
        /// What the transport said.
        reason: String,
    },
    /// [`AbortHandle::abort`](crate::AbortHandle::abort) was called.
    #[error("aborted")]
    Aborted,
    /// Nothing moved for too long.
    #[error("no byte moved for {after:?} while waiting for {ranks}")]
    TimedOut {
        /// The peers that still owed or were still owed bytes.
        ranks: RankList,
        /// The stall timeout.
        after: Duration,
    },
    /// A peer sent what it should not have, or it and this rank are not in the same call.
    #[error("rank {rank} is out of step: {fault}")]
    Protocol {
        /// The peer.
        rank: Rank,
        /// In what it differs.
        fault: ProtocolFault,
    },
}

/// In what a message differs from the one expected.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ProtocolFault {
    /// The message belongs to another generation (its low 32 bits are carried).
    #[error("its message is of generation {found}, expected {expected} (modulo 2^32)")]
    Generation {
        /// This side's.
        expected: u32,
        /// The peer's.
        found: u32,
    },
    /// The message belongs to another call.
    #[error("its message is of exchange {found}, expected {expected}")]
    Sequence {
        /// This side's.
        expected: u32,
        /// The peer's.
        found: u32,
    },
    /// The message has another length.
    #[error("its message has {found} bytes, expected {expected}")]
    Length {
        /// What this side has room for.
        expected: u64,
        /// What the peer announced.
        found: u64,
    },
}

/// Ranks in ascending order; prints as `ranks 1, 3`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RankList(pub Vec<Rank>);

impl fmt::Display for RankList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.len() == 1 { "rank " } else { "ranks " })?;
        for (index, rank) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            write!(f, "{comma}{rank}")?;
        }
        Ok(())
    }
}
