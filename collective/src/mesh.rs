//! TCP between the ranks of one generation: a connection a pair, one poll loop an exchange.
//!
//! [`MeshListener`] is bound once a process and forms one [`Mesh`] a generation. A connection is
//! opened with a mutual proof of the generation's secret (`handshake.rs`); after that every message
//! has a 16-byte header that is checked (`frame.rs`). Payloads are neither encrypted nor signed.

mod forming;
mod frame;
mod handshake;
mod listener;
mod message;
mod parking;
mod socket;

use std::{
    io,
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use cluster::{Generation, Rank, RunId, Term};
use rustix::event::{PollFd, PollFlags, poll};

use self::frame::Lane;
pub use self::{
    forming::{FormError, MissingPeer, RefusedPeer},
    handshake::Secret,
    listener::MeshListener,
    message::Refusal,
};
use crate::{AbortHandle, Exchange, ExchangeError, RankList, take_own_message};

/// How patient a mesh is. The worker derives both from its run's `max_recovery`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MeshConfig {
    /// An exchange fails after no byte has moved for this long.
    pub stall_timeout: Duration,
    /// A connection that has not been let in after this long is dropped; its dialer tries again.
    pub handshake_timeout: Duration,
}

/// The members of one generation, as the coordinator announced them.
#[derive(Debug, Clone)]
pub struct Group {
    /// The run.
    pub run: RunId,
    /// The coordinator's term.
    pub term: Term,
    /// The generation.
    pub generation: Generation,
    /// This process's rank.
    pub rank: Rank,
    /// Where each rank listens, in order of rank; the own one is not used.
    pub addresses: Vec<SocketAddr>,
    /// Shared by the members of this generation only.
    pub secret: Secret,
}

impl Group {
    /// How many ranks there are.
    #[must_use]
    pub fn size(&self) -> u32 {
        u32::try_from(self.addresses.len()).expect("ranks are counted in u32")
    }
}

/// The connections of one rank to all others of its generation. Dropping it closes them.
#[derive(Debug)]
pub struct Mesh {
    rank: Rank,
    generation: Generation,
    /// By rank; none for this one.
    peers: Vec<Option<TcpStream>>,
    sequence: u32,
    stall_timeout: Duration,
    abort: AbortHandle,
    failure: Option<ExchangeError>,
}

impl Mesh {
    fn new(
        group: &Group,
        peers: Vec<Option<TcpStream>>,
        stall_timeout: Duration,
        abort: AbortHandle,
    ) -> Self {
        Self {
            rank: group.rank,
            generation: group.generation,
            peers,
            sequence: 0,
            stall_timeout,
            abort,
            failure: None,
        }
    }

    /// The generation whose ranks this connects.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.generation
    }

    fn run(&self, outgoing: &[&[u8]], incoming: &mut [&mut [u8]]) -> Result<(), ExchangeError> {
        let mut lanes: Vec<Lane<'_>> = (0..)
            .zip(&self.peers)
            .zip(outgoing.iter().zip(incoming))
            .filter_map(|((rank, peer), (out, room))| {
                let peer = peer.as_ref()?;
                Some(Lane::new(Rank(rank), peer, (self.generation, self.sequence), out, room))
            })
            .collect();
        let mut moved = Instant::now();
        loop {
            let busy: Vec<usize> = (0..lanes.len()).filter(|&at| !lanes[at].is_done()).collect();
            if busy.is_empty() {
                return Ok(());
            }
            let ready = self.wait(&lanes, &busy, moved)?;
            for (at, ready) in busy.into_iter().zip(ready) {
                if lanes[at].advance(ready)? {
                    moved = Instant::now();
                }
            }
        }
    }

    /// Waits until a lane of `busy` can move, and says what each can do.
    fn wait(
        &self,
        lanes: &[Lane<'_>],
        busy: &[usize],
        moved: Instant,
    ) -> Result<Vec<PollFlags>, ExchangeError> {
        let mut polled: Vec<PollFd<'_>> = vec![PollFd::new(&self.abort, PollFlags::IN)];
        polled.extend(busy.iter().map(|&at| lanes[at].poll_fd()));
        loop {
            let left = self.stall_timeout.saturating_sub(moved.elapsed());
            let woken = match poll(&mut polled, Some(&socket::timespec(left))) {
                Err(rustix::io::Errno::INTR) => continue,
                // Only a wrong descriptor or a lack of kernel memory is left.
                other => other.expect("poll on descriptors that are held open"),
            };
            if self.abort.is_aborted() {
                return Err(ExchangeError::Aborted);
            }
            if woken > 0 {
                return Ok(polled[1..].iter().map(PollFd::revents).collect());
            }
            if moved.elapsed() >= self.stall_timeout {
                let ranks = RankList(busy.iter().map(|&at| lanes[at].rank()).collect());
                return Err(ExchangeError::TimedOut { ranks, after: self.stall_timeout });
            }
        }
    }
}

impl Exchange for Mesh {
    fn rank(&self) -> Rank {
        self.rank
    }

    fn size(&self) -> u32 {
        u32::try_from(self.peers.len()).expect("ranks are counted in u32")
    }

    fn all_to_all(
        &mut self,
        outgoing: &[&[u8]],
        incoming: &mut [&mut [u8]],
    ) -> Result<(), ExchangeError> {
        take_own_message(self.rank, self.size(), outgoing, incoming);
        if let Some(failure) = &self.failure {
            return Err(failure.clone());
        }
        let result = if self.abort.is_aborted() {
            Err(ExchangeError::Aborted)
        } else {
            self.run(outgoing, incoming)
        };
        self.failure = result.clone().err();
        self.sequence = self.sequence.wrapping_add(1);
        result
    }

    fn abort_handle(&self) -> AbortHandle {
        self.abort.clone()
    }
}

/// A nonblocking stream without delay, as lanes and handshakes need it.
fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nonblocking(true)?;
    stream.set_nodelay(true)?;
    Ok(())
}
