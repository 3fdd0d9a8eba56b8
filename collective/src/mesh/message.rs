//! The fixed-size messages of the handshake. Numbers are little-endian.

use cluster::{Generation, Rank, RunId, Term};
use thiserror::Error;

const MAGIC: [u8; 8] = *b"PERCMESH";
const VERSION: u32 = 1;
/// Bytes of a nonce or a proof.
pub(super) const HASH: usize = 32;
/// A length and at most 64 letters.
const RUN_BYTES: usize = 1 + 64;
pub(super) const HELLO_BYTES: usize = 8 + 4 * 4 + 2 * 8 + HASH + RUN_BYTES;
/// A tag and its values.
pub(super) const REPLY_BYTES: usize = 1 + 2 * RUN_BYTES;

/// Why one process does not let another in.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Refusal {
    /// They are of different runs: an address was reused, or is wrong.
    #[error("a worker of run {dialer} dialled one of run {acceptor}")]
    WrongRun {
        /// The dialer's run.
        dialer: RunId,
        /// The acceptor's run.
        acceptor: RunId,
    },
    /// The dialer's generation is over.
    #[error("generation {generation} of term {term} has taken its place")]
    StaleGeneration {
        /// The acceptor's newest term.
        term: Term,
        /// The acceptor's newest generation.
        generation: Generation,
    },
    /// The acceptor's mesh of this generation is complete.
    #[error("the mesh of this generation is already formed there")]
    AlreadyFormed,
    /// The two do not share a secret.
    #[error("the two have different secrets for this generation")]
    WrongSecret,
    /// The two disagree about the group or their places in it.
    #[error("the process dialled is rank {rank} of {size}")]
    WrongPlace {
        /// The acceptor's rank.
        rank: Rank,
        /// The acceptor's number of ranks.
        size: u32,
    },
    /// The acceptor has not been told of this generation.
    #[error("it has not begun this generation")]
    NotYet,
    /// The two are builds that do not understand each other.
    #[error("it speaks version {version} of the peer protocol, this is version {VERSION}")]
    WrongVersion {
        /// The other's version.
        version: u32,
    },
    /// What was met is no worker.
    #[error("it does not speak the peer protocol")]
    NotAPeer,
}

/// Who dials whom, and for what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Hello {
    pub(super) run: RunId,
    pub(super) term: Term,
    pub(super) generation: Generation,
    pub(super) size: u32,
    pub(super) from: Rank,
    pub(super) to: Rank,
}

impl Hello {
    pub(super) fn encode(&self, nonce: [u8; HASH]) -> [u8; HELLO_BYTES] {
        let mut bytes = MAGIC.to_vec();
        for word in [VERSION, self.size, self.from.0, self.to.0] {
            bytes.extend(word.to_le_bytes());
        }
        for long in [self.term.0, self.generation.0] {
            bytes.extend(long.to_le_bytes());
        }
        bytes.extend(nonce);
        put_run(&mut bytes, &self.run);
        bytes.try_into().expect("the parts add up")
    }

    pub(super) fn decode(bytes: &[u8; HELLO_BYTES]) -> Result<Self, Refusal> {
        let mut reader = Reader(bytes);
        if reader.take() != MAGIC {
            return Err(Refusal::NotAPeer);
        }
        let version = reader.word();
        if version != VERSION {
            return Err(Refusal::WrongVersion { version });
        }
        let (size, from, to) = (reader.word(), Rank(reader.word()), Rank(reader.word()));
        let (term, generation) = (Term(reader.long()), Generation(reader.long()));
        let _nonce: [u8; HASH] = reader.take();
        let run = reader.run().ok_or(Refusal::NotAPeer)?;
        Ok(Self { run, term, generation, size, from, to })
    }
}

/// No refusal means "go on".
pub(super) fn encode_reply(refusal: Option<&Refusal>) -> [u8; REPLY_BYTES] {
    let mut bytes = vec![0];
    bytes[0] = match refusal {
        None => 1,
        Some(Refusal::WrongRun { dialer, acceptor }) => {
            put_run(&mut bytes, dialer);
            put_run(&mut bytes, acceptor);
            2
        }
        Some(Refusal::StaleGeneration { term, generation }) => {
            bytes.extend(term.0.to_le_bytes());
            bytes.extend(generation.0.to_le_bytes());
            3
        }
        Some(Refusal::AlreadyFormed) => 4,
        Some(Refusal::WrongSecret) => 5,
        Some(Refusal::WrongPlace { rank, size }) => {
            bytes.extend(rank.0.to_le_bytes());
            bytes.extend(size.to_le_bytes());
            6
        }
        Some(Refusal::NotYet) => 7,
        Some(Refusal::WrongVersion { .. }) => {
            bytes.extend(VERSION.to_le_bytes());
            8
        }
        Some(Refusal::NotAPeer) => 9,
    };
    bytes.resize(REPLY_BYTES, 0);
    bytes.try_into().expect("it was made that long")
}

pub(super) fn decode_reply(bytes: &[u8; REPLY_BYTES]) -> Result<(), Refusal> {
    let mut values = Reader(&bytes[1..]);
    Err(match bytes[0] {
        1 => return Ok(()),
        2 => match (values.run(), values.run()) {
            (Some(dialer), Some(acceptor)) => Refusal::WrongRun { dialer, acceptor },
            (Some(_) | None, _) => Refusal::NotAPeer,
        },
        3 => {
            let (term, generation) = (Term(values.long()), Generation(values.long()));
            Refusal::StaleGeneration { term, generation }
        }
        4 => Refusal::AlreadyFormed,
        5 => Refusal::WrongSecret,
        6 => Refusal::WrongPlace { rank: Rank(values.word()), size: values.word() },
        7 => Refusal::NotYet,
        8 => Refusal::WrongVersion { version: values.word() },
        _ => Refusal::NotAPeer,
    })
}

fn put_run(bytes: &mut Vec<u8>, run: &RunId) {
    let name = run.as_str().as_bytes();
    bytes.push(u8::try_from(name.len()).expect("a run's name has at most 64 letters"));
    bytes.extend(name);
    bytes.resize(bytes.len() + RUN_BYTES - 1 - name.len(), 0);
}

/// Takes values from the left of a message that is long enough.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (value, rest) = self.0.split_first_chunk().expect("the message is long enough");
        self.0 = rest;
        *value
    }

    fn word(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    fn long(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }

    fn run(&mut self) -> Option<RunId> {
        let [length] = self.take();
        let letters: [u8; RUN_BYTES - 1] = self.take();
        let name = std::str::from_utf8(letters.get(..usize::from(length))?).ok()?;
        RunId::try_from(name.to_owned()).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(name: &str) -> RunId {
        RunId::try_from(name.to_owned()).unwrap()
    }

    #[test]
    fn a_hello_survives_the_wire() {
        for name in ["a", &"x".repeat(64)] {
            let hello = Hello {
                run: run(name),
                term: Term(3),
                generation: Generation(u64::MAX),
                size: 9,
                from: Rank(8),
                to: Rank(0),
            };
            assert_eq!(Hello::decode(&hello.encode([7; HASH])), Ok(hello));
        }
    }

    #[test]
    fn what_is_no_hello_is_refused_and_not_believed() {
        assert_eq!(Hello::decode(&[0; HELLO_BYTES]), Err(Refusal::NotAPeer));
        let mut bytes = [0; HELLO_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8] = 9;
        assert_eq!(Hello::decode(&bytes), Err(Refusal::WrongVersion { version: 9 }));
        bytes[8] = 1;
        bytes[HELLO_BYTES - RUN_BYTES] = 255; // A name longer than its room.
        assert_eq!(Hello::decode(&bytes), Err(Refusal::NotAPeer));
    }

    #[test]
    fn every_refusal_survives_the_wire() {
        let refusals = [
            Refusal::WrongRun { dialer: run("digits"), acceptor: run(&"x".repeat(64)) },
            Refusal::StaleGeneration { term: Term(1), generation: Generation(2) },
            Refusal::AlreadyFormed,
            Refusal::WrongSecret,
            Refusal::WrongPlace { rank: Rank(1), size: 2 },
            Refusal::NotYet,
            Refusal::WrongVersion { version: VERSION },
            Refusal::NotAPeer,
        ];
        for refusal in refusals {
            assert_eq!(decode_reply(&encode_reply(Some(&refusal))), Err(refusal));
        }
        assert_eq!(decode_reply(&encode_reply(None)), Ok(()));
    }
}
