//! One generation's connections: this rank dials the lower ranks and is dialled by the higher ones.

use std::{
    fmt, io,
    net::SocketAddr,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use cluster::{Generation, Rank, Term};
use thiserror::Error;

use super::{
    Group, Mesh, MeshConfig,
    handshake::{self, OpenError},
    message::{Hello, Refusal},
    parking::{Parking, age},
    socket::{Impatience, Patience},
};
use crate::{AbortHandle, abort::Waker};

/// Between two attempts to dial a peer that is not there yet: short, as a formation is what stands
/// between a lost worker and the next step, and growing, as a peer may take seconds to start.
const FIRST_PAUSE: Duration = Duration::from_millis(2);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// Why a mesh could not be formed.
#[derive(Debug, Error)]
pub enum FormError {
    /// The abort handle was used.
    #[error("aborted")]
    Aborted,
    /// This process has formed, or has begun to form, a newer generation or this one.
    #[error(
        "generation {generation} of term {term} cannot be formed: this process has come to generation \
         {newest_generation} of term {newest_term}"
    )]
    Stale {
        /// The term asked for.
        term: Term,
        /// The generation asked for.
        generation: Generation,
        /// The newest term.
        newest_term: Term,
        /// The newest generation.
        newest_generation: Generation,
    },
    /// A peer does not let this rank in, and would not later.
    #[error("rank {rank} at {address} cannot be joined: {refusal}")]
    Refused {
        /// The peer.
        rank: Rank,
        /// Where it listens.
        address: SocketAddr,
        /// Why.
        refusal: Refusal,
    },
    /// Not all ranks were there in time.
    #[error("not complete after {waited:?}{}", Report { missing, refused })]
    Deadline {
        /// How long the formation went on.
        waited: Duration,
        /// The ranks without a connection.
        missing: Vec<MissingPeer>,
        /// Who dialled this rank and was not let in: the likely reason.
        refused: Vec<RefusedPeer>,
    },
    /// The operating system refused something.
    #[error("cannot {attempt}")]
    System {
        /// What was attempted.
        attempt: &'static str,
        /// What it said.
        source: io::Error,
    },
}

/// A rank without a connection when its formation ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MissingPeer {
    /// The rank.
    pub rank: Rank,
    /// Where it should listen.
    pub address: SocketAddr,
    /// What the last attempt met.
    pub problem: String,
}

/// A connection that was not let in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RefusedPeer {
    /// Where it came from.
    pub address: SocketAddr,
    /// The rank that it claimed, if it came to that.
    pub rank: Option<Rank>,
    /// Why.
    pub refusal: Refusal,
}

struct Report<'a> {
    missing: &'a [MissingPeer],
    refused: &'a [RefusedPeer],
}

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for MissingPeer { rank, address, problem } in self.missing {
            write!(f, "; rank {rank} at {address}: {problem}")?;
        }
        for RefusedPeer { address, rank, refusal } in self.refused {
            write!(f, "; refused {address}")?;
            if let Some(rank) = rank {
                write!(f, " (as rank {rank})")?;
            }
            write!(f, ": {refusal}")?;
        }
        Ok(())
    }
}

pub(super) fn form(
    parking: &Arc<Parking>,
    config: MeshConfig,
    group: &Group,
    deadline: Instant,
    abort: &AbortHandle,
) -> Result<Mesh, FormError> {
    assert!(group.rank.0 < group.size(), "rank {} is not in {group:?}", group.rank);
    parking.begin(group)?;
    // Ends the dialling threads, whatever ends the formation.
    let over = AbortHandle::new().map_err(|source| system("open a pipe", source))?;
    let waker: Waker = {
        let (parking, over) = (Arc::clone(parking), over.clone());
        Arc::new(move || {
            over.abort();
            parking.wake();
        })
    };
    abort.wake_at_abort(&waker);

    let patience = Patience { deadline, abort: &over };
    let peers = thread::scope(|scope| {
        for rank in (0..group.rank.0).map(Rank) {
            let dialling = thread::Builder::new()
                .name(format!("dial-rank-{rank}"))
                .spawn_scoped(scope, move || dial(parking, group, rank, patience));
            if let Err(source) = dialling {
                parking.reject(age(group), system("start a thread", source));
            }
        }
        let peers = parking.collect(group, deadline, abort);
        over.abort();
        peers
    })?;
    Ok(Mesh::new(group, peers, config.stall_timeout, abort.clone()))
}

/// Dials `rank` until it lets this one in, the formation is over, or there is no sense in it.
fn dial(parking: &Parking, group: &Group, rank: Rank, patience: Patience<'_>) {
    let address = group.addresses[rank.0 as usize];
    let mut pause = FIRST_PAUSE;
    loop {
        let problem = match dial_once(parking, group, rank, patience) {
            Ok(()) | Err(OpenError::Ended(Impatience::Aborted)) => return,
            Err(OpenError::Refused(refusal)) if refusal != Refusal::NotYet => {
                return parking.reject(age(group), FormError::Refused { rank, address, refusal });
            }
            Err(error @ (OpenError::Refused(_) | OpenError::Ended(_))) => error.to_string(),
        };
        parking.note_problem(age(group), rank, problem);
        if patience.pause(pause).is_err() {
            return; // The formation is over, and says so itself.
        }
        pause = LONGEST_PAUSE.min(pause * 2);
    }
}

fn dial_once(
    parking: &Parking,
    group: &Group,
    rank: Rank,
    patience: Patience<'_>,
) -> Result<(), OpenError> {
    let address = group.addresses[rank.0 as usize];
    let stream = patience.connect(address)?;
    parking.note_problem(age(group), rank, "it does not answer".to_owned());
    let hello = Hello {
        run: group.run.clone(),
        term: group.term,
        generation: group.generation,
        size: group.size(),
        from: group.rank,
        to: rank,
    };
    handshake::dial(&stream, &hello, &group.secret, patience)?;
    parking.park(age(group), rank, stream);
    Ok(())
}

fn system(attempt: &'static str, source: io::Error) -> FormError {
    FormError::System { attempt, source }
}
