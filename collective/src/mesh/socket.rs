//! Blocking calls on nonblocking sockets that a deadline or an abort ends.

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    os::fd::AsFd,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    net::{self, AddressFamily, SocketFlags, SocketType, sockopt},
};
use thiserror::Error;

use super::prepare;
use crate::AbortHandle;

/// How long a call may block, and what ends it early.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience<'a> {
    pub(super) deadline: Instant,
    pub(super) abort: &'a AbortHandle,
}

/// Why a call ended without having done its work.
#[derive(Debug, Error)]
pub(super) enum Impatience {
    #[error("aborted")]
    Aborted,
    #[error("timed out")]
    Deadline,
    #[error(transparent)]
    Io(#[from] io::Error),
}

pub(super) fn timespec(duration: Duration) -> Timespec {
    // Beyond the range is as good as for ever.
    let longest = Timespec { tv_sec: i64::MAX, tv_nsec: 0 };
    Timespec::try_from(duration).unwrap_or(longest)
}

impl Patience<'_> {
    /// Waits until `socket` is ready for `flags`, or broken.
    pub(super) fn wait(self, socket: &impl AsFd, flags: PollFlags) -> Result<(), Impatience> {
        let mut polled = [PollFd::new(self.abort, PollFlags::IN), PollFd::new(socket, flags)];
        loop {
            let left = self.deadline.saturating_duration_since(Instant::now());
            let woken = match poll(&mut polled, Some(&timespec(left))) {
                Err(rustix::io::Errno::INTR) => continue,
                other => other.map_err(io::Error::from)?,
            };
            if self.abort.is_aborted() {
                return Err(Impatience::Aborted);
            }
            if woken > 0 {
                return Ok(());
            }
            if left.is_zero() {
                return Err(Impatience::Deadline);
            }
        }
    }

    /// Waits out `pause`, unless the deadline or an abort comes before.
    pub(super) fn pause(self, pause: Duration) -> Result<(), Impatience> {
        let until = Instant::now() + pause;
        let ends_before_deadline = until < self.deadline;
        let patience = Patience { deadline: until.min(self.deadline), abort: self.abort };
        match patience.wait(&self.abort, PollFlags::IN) {
            Err(Impatience::Deadline) if ends_before_deadline => Ok(()),
            other => other,
        }
    }

    pub(super) fn connect(self, address: SocketAddr) -> Result<TcpStream, Impatience> {
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let socket = net::socket_with(
            family,
            SocketType::STREAM,
            SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
            None,
        )
        .map_err(io::Error::from)?;
        match net::connect(&socket, &address) {
            Ok(()) => {}
            Err(rustix::io::Errno::INPROGRESS) => {
                self.wait(&socket, PollFlags::OUT)?;
                sockopt::socket_error(&socket)
                    .map_err(io::Error::from)?
                    .map_err(io::Error::from)?;
            }
            Err(error) => return Err(io::Error::from(error).into()),
        }
        let stream = TcpStream::from(socket);
        prepare(&stream)?;
        // Dialing a free local port from that very port connects the socket to itself.
        if stream.local_addr()? == address {
            return Err(io::Error::from(io::ErrorKind::ConnectionRefused).into());
        }
        Ok(stream)
    }

    pub(super) fn write_all(
        self,
        mut stream: &TcpStream,
        mut bytes: &[u8],
    ) -> Result<(), Impatience> {
        while !bytes.is_empty() {
            match stream.write(bytes) {
                Ok(written) => bytes = &bytes[written..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.wait(stream, PollFlags::OUT)?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    pub(super) fn read_exact(
        self,
        mut stream: &TcpStream,
        mut room: &mut [u8],
    ) -> Result<(), Impatience> {
        while !room.is_empty() {
            match stream.read(room) {
                Ok(0) => {
                    let closed = "it closed the connection";
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, closed).into());
                }
                Ok(read) => room = &mut room[read..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.wait(stream, PollFlags::IN)?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}
