//! One message each way between two ranks.
//!
//! Header, little-endian: generation (its low 32 bits) `u32`, exchange number `u32`, payload length
//! `u64`. An empty message has a header too, so each exchange is also a check that both sides are
//! in the same call.

use std::{
    io::{self, IoSlice, IoSliceMut, Read as _, Write as _},
    net::TcpStream,
};

use cluster::{Generation, Rank};
use rustix::event::{PollFd, PollFlags};

use crate::{ExchangeError, ProtocolFault};

const HEADER_BYTES: usize = 16;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Header {
    generation: u32,
    sequence: u32,
    length: u64,
}

impl Header {
    fn encode(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&self.generation.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[8..].copy_from_slice(&self.length.to_le_bytes());
        bytes
    }

    fn decode(bytes: [u8; HEADER_BYTES]) -> Self {
        let word = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let length = u64::from(word(8)) | u64::from(word(12)) << 32;
        Self { generation: word(0), sequence: word(4), length }
    }

    /// Whether `found` is this header, and if not, why not.
    fn check(self, found: Self) -> Result<(), ProtocolFault> {
        if found.generation != self.generation {
            let (expected, found) = (self.generation, found.generation);
            Err(ProtocolFault::Generation { expected, found })
        } else if found.sequence != self.sequence {
            Err(ProtocolFault::Sequence { expected: self.sequence, found: found.sequence })
        } else if found.length != self.length {
            Err(ProtocolFault::Length { expected: self.length, found: found.length })
        } else {
            Ok(())
        }
    }
}

/// The traffic of one exchange with one peer.
pub(super) struct Lane<'a> {
    rank: Rank,
    stream: &'a TcpStream,
    outgoing: Sending<'a>,
    incoming: Receiving<'a>,
}

struct Sending<'a> {
    header: [u8; HEADER_BYTES],
    payload: &'a [u8],
    sent: usize,
}

struct Receiving<'a> {
    expected: Header,
    header: [u8; HEADER_BYTES],
    payload: &'a mut [u8],
    received: usize,
}

impl<'a> Lane<'a> {
    pub(super) fn new(
        rank: Rank,
        stream: &'a TcpStream,
        (generation, sequence): (Generation, u32),
        payload: &'a [u8],
        room: &'a mut [u8],
    ) -> Self {
        let generation =
            u32::try_from(generation.0 & u64::from(u32::MAX)).expect("it is masked to 32 bits");
        let header = |length: usize| Header { generation, sequence, length: length as u64 };
        let expected = header(room.len());
        Self {
            rank,
            stream,
            outgoing: Sending { header: header(payload.len()).encode(), payload, sent: 0 },
            incoming: Receiving { expected, header: [0; HEADER_BYTES], payload: room, received: 0 },
        }
    }

    pub(super) fn rank(&self) -> Rank {
        self.rank
    }

    pub(super) fn is_done(&self) -> bool {
        self.outgoing.is_done() && self.incoming.is_done()
    }

    pub(super) fn poll_fd(&self) -> PollFd<'a> {
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::OUT, !self.outgoing.is_done());
        flags.set(PollFlags::IN, !self.incoming.is_done());
        PollFd::new(self.stream, flags)
    }

    /// Moves what `ready` allows, and says whether anything moved.
    pub(super) fn advance(&mut self, ready: PollFlags) -> Result<bool, ExchangeError> {
        // An error or a hang-up is reported by the read or write that meets it.
        let broken = ready.intersects(PollFlags::ERR | PollFlags::HUP | PollFlags::NVAL);
        let mut moved = false;
        if !self.incoming.is_done() && (broken || ready.contains(PollFlags::IN)) {
            moved |= self.settle(|lane| lane.incoming.advance(lane.stream))?;
            if self.incoming.received >= HEADER_BYTES {
                let found = Header::decode(self.incoming.header);
                self.incoming
                    .expected
                    .check(found)
                    .map_err(|fault| ExchangeError::Protocol { rank: self.rank, fault })?;
            }
        }
        if !self.outgoing.is_done() && (broken || ready.contains(PollFlags::OUT)) {
            moved |= self.settle(|lane| lane.outgoing.advance(lane.stream))?;
        }
        Ok(moved)
    }

    /// Whether bytes moved; a stream that would block is no error.
    fn settle(
        &mut self,
        advance: impl FnOnce(&mut Self) -> io::Result<usize>,
    ) -> Result<bool, ExchangeError> {
        let reason = match advance(self) {
            Ok(0) => "it closed the connection".to_owned(),
            Ok(_) => return Ok(true),
            Err(error) if is_momentary(&error) => return Ok(false),
            Err(error) => error.to_string(),
        };
        Err(ExchangeError::PeerLost { rank: self.rank, reason })
    }
}

impl Sending<'_> {
    fn is_done(&self) -> bool {
        self.sent == HEADER_BYTES + self.payload.len()
    }

    fn advance(&mut self, mut stream: &TcpStream) -> io::Result<usize> {
        let header = &self.header[self.sent.min(HEADER_BYTES)..];
        let payload = &self.payload[self.sent.saturating_sub(HEADER_BYTES)..];
        let sent = stream.write_vectored(&[IoSlice::new(header), IoSlice::new(payload)])?;
        self.sent += sent;
        Ok(sent)
    }
}

impl Receiving<'_> {
    fn is_done(&self) -> bool {
        self.received == HEADER_BYTES + self.payload.len()
    }

    fn advance(&mut self, mut stream: &TcpStream) -> io::Result<usize> {
        let header = &mut self.header[self.received.min(HEADER_BYTES)..];
        let payload = &mut self.payload[self.received.saturating_sub(HEADER_BYTES)..];
        let received =
            stream.read_vectored(&mut [IoSliceMut::new(header), IoSliceMut::new(payload)])?;
        self.received += received;
        Ok(received)
    }
}

fn is_momentary(error: &io::Error) -> bool {
    [io::ErrorKind::WouldBlock, io::ErrorKind::Interrupted].contains(&error.kind())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_the_wire_and_each_difference_has_its_name() {
        let header = Header { generation: 7, sequence: u32::MAX, length: 0x0102_0304_0506_0708 };
        assert_eq!(Header::decode(header.encode()), header);
        assert_eq!(header.check(header), Ok(()));
        let fault = |found| header.check(found).unwrap_err();
        assert_eq!(
            fault(Header { generation: 6, ..header }),
            ProtocolFault::Generation { expected: 7, found: 6 }
        );
        assert_eq!(
            fault(Header { sequence: 0, ..header }),
            ProtocolFault::Sequence { expected: u32::MAX, found: 0 }
        );
        assert_eq!(
            fault(Header { length: 1, ..header }),
            ProtocolFault::Length { expected: header.length, found: 1 }
        );
    }
}
