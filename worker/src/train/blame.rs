//! Where peers are, and which of them is to blame.

use std::net::{SocketAddr, ToSocketAddrs as _};

use cluster::Rank;
use collective::{ExchangeError, FormError};

use super::Interrupted;

/// The address that a member announced.
pub(super) fn resolve(name: &str, address: &str) -> Result<SocketAddr, Interrupted> {
    let unknown = |why: String| Interrupted::Forming {
        reason: format!("the address {address} of {name} is unknown here: {why}"),
    };
    let mut found = address.to_socket_addrs().map_err(|error| unknown(error.to_string()))?;
    found.next().ok_or_else(|| unknown("it has no address".to_owned()))
}

/// Whom an exchange blames.
pub(super) fn culprit(error: &ExchangeError) -> Option<Rank> {
    match error {
        ExchangeError::PeerLost { rank, .. } | ExchangeError::Protocol { rank, .. } => Some(*rank),
        ExchangeError::TimedOut { ranks, .. } => ranks.0.first().copied(),
        ExchangeError::Aborted => None,
    }
}

/// Whom a formation missed.
pub(super) fn missing(error: &FormError) -> Option<Rank> {
    match error {
        FormError::Refused { rank, .. } => Some(*rank),
        FormError::Deadline { missing, .. } => missing.first().map(|peer| peer.rank),
        FormError::Aborted | FormError::Stale { .. } | FormError::System { .. } => None,
    }
}
