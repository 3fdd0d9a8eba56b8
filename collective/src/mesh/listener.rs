//! The one socket of a process that peers dial, and the threads that let them in.

use std::{
    io,
    net::{SocketAddr, TcpListener, TcpStream},
    sync::Arc,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use rustix::event::PollFlags;
use tracing::{debug, warn};

use super::{
    FormError, Group, Mesh, MeshConfig, forming,
    handshake::{self, OpenError},
    message::Refusal,
    parking::Parking,
    prepare,
    socket::{Impatience, Patience},
};
use crate::AbortHandle;

/// Connections in their handshake at once. One more is dropped; an honest dialer tries again.
const HANDSHAKES_MAX: usize = 256;

/// After an `accept` that failed for lack of descriptors or memory.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_millis(50);

/// Listens for the peers of every generation that this process takes part in.
///
/// Bound once; [`MeshListener::form`] is called for each generation. Dropping it closes the socket
/// and leaves the meshes alone.
#[derive(Debug)]
pub struct MeshListener {
    local_addr: SocketAddr,
    config: MeshConfig,
    parking: Arc<Parking>,
    closing: AbortHandle,
    accepting: Option<JoinHandle<()>>,
}

impl MeshListener {
    /// Listens on `address`; port 0 takes a free one.
    ///
    /// # Errors
    /// If the address cannot be bound, or a thread or descriptor cannot be had.
    pub fn bind(address: SocketAddr, config: MeshConfig) -> io::Result<Self> {
        Self::on(TcpListener::bind(address)?, config)
    }

    /// Takes over a socket that was bound before its patience was known. Who dialled it meanwhile
    /// has been waiting in its queue.
    ///
    /// # Errors
    /// If a thread or descriptor cannot be had.
    pub fn on(socket: TcpListener, config: MeshConfig) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let local_addr = socket.local_addr()?;
        let parking = Arc::new(Parking::default());
        let closing = AbortHandle::new()?;
        let door = Door { parking: Arc::clone(&parking), config, closing: closing.clone() };
        let accepting = thread::Builder::new()
            .name("mesh-accept".to_owned())
            .spawn(move || door.accept_all(&socket))?;
        Ok(Self { local_addr, config, parking, closing, accepting: Some(accepting) })
    }

    /// Where it listens.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Connects this process with all others of `group`.
    ///
    /// Peers that are not there yet are waited for until `deadline`. `abort` ends the formation from
    /// another thread, and later the exchanges of the mesh. A group of one needs no connection.
    ///
    /// # Errors
    /// [`FormError`]; other generations can be formed afterwards, and this one too unless it was
    /// formed before.
    ///
    /// # Panics
    /// If the group's rank is not in the group.
    pub fn form(
        &self,
        group: &Group,
        deadline: Instant,
        abort: &AbortHandle,
    ) -> Result<Mesh, FormError> {
        forming::form(&self.parking, self.config, group, deadline, abort)
    }
}

impl Drop for MeshListener {
    fn drop(&mut self) {
        self.closing.abort();
        self.parking.wake();
        if let Some(thread) = self.accepting.take()
            && thread.join().is_err()
        {
            warn!("the thread that accepts peers had panicked");
        }
    }
}

/// What the accepting threads need.
#[derive(Debug, Clone)]
struct Door {
    parking: Arc<Parking>,
    config: MeshConfig,
    closing: AbortHandle,
}

impl Door {
    fn accept_all(&self, socket: &TcpListener) {
        loop {
            // No deadline: a year is as good as none.
            let patience = self.patience(Duration::from_secs(365 * 24 * 3600));
            match patience.wait(socket, PollFlags::IN) {
                Ok(()) => {}
                Err(Impatience::Aborted) => return,
                Err(Impatience::Deadline) => continue,
                Err(Impatience::Io(error)) => return warn!(%error, "no more peers are accepted"),
            }
            match socket.accept() {
                Ok((stream, address)) => self.receive(stream, address),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    warn!(%error, "cannot accept a peer");
                    if patience.pause(PAUSE_AFTER_FAILURE).is_err() {
                        return;
                    }
                }
            }
        }
    }

    /// Opens a connection in a thread of its own, so that a silent dialer keeps nobody waiting.
    fn receive(&self, stream: TcpStream, address: SocketAddr) {
        if !self.parking.enter(HANDSHAKES_MAX) {
            return warn!(%address, "too many connections at once: one is dropped");
        }
        let door = self.clone();
        let opening = thread::Builder::new().name("mesh-open".to_owned()).spawn(move || {
            if let Err(error) = door.open(stream, address) {
                debug!(%address, %error, "a connection ended in its handshake");
            }
            door.parking.leave();
        });
        if let Err(error) = opening {
            warn!(%error, "cannot start a thread for a peer");
            self.parking.leave();
        }
    }

    fn open(&self, stream: TcpStream, address: SocketAddr) -> Result<(), Impatience> {
        prepare(&stream)?;
        let patience = self.patience(self.config.handshake_timeout);
        let mut rank = None;
        let opened = handshake::read_hello(&stream, patience).and_then(|(hello, bytes)| {
            rank = Some(hello.from);
            let secret = self.parking.secret_for(&hello, patience)?;
            // The wait may have used up the time; the rest is two messages.
            let patience = self.patience(self.config.handshake_timeout);
            handshake::accept(&stream, &bytes, &secret, patience)?;
            Ok(hello)
        });
        match opened {
            Ok(hello) => {
                // Welcomed first: a parked connection may be taken and used at once.
                handshake::welcome(&stream, patience)?;
                if !self.parking.park((hello.term, hello.generation), hello.from, stream) {
                    debug!(%address, rank = %hello.from, "a peer came too late");
                }
                Ok(())
            }
            Err(OpenError::Refused(refusal)) => {
                if refusal == Refusal::NotYet {
                    debug!(%address, "a peer came too early");
                } else {
                    warn!(%address, rank = rank.map(|rank| rank.0), %refusal, "a peer is refused");
                    self.parking.note_refusal(address, rank, &refusal);
                }
                handshake::refuse(&stream, &refusal, self.patience(self.config.handshake_timeout))
            }
            Err(OpenError::Ended(end)) => Err(end),
        }
    }

    fn patience(&self, timeout: Duration) -> Patience<'_> {
        Patience { deadline: Instant::now() + timeout, abort: &self.closing }
    }
}
