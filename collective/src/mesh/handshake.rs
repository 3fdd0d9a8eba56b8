//! The opening of a connection: each side proves to the other that it knows the secret.
//!
//! ```text
//! dialer                                              acceptor
//!   hello: run, term, generation, ranks, nonce  ->
//!                     <-  go on, challenge: nonce, proof      (or a refusal)
//!   answer: proof     ->                                      (or "your proof is wrong")
//!                     <-  welcome                             (or a refusal)
//! ```
//!
//! A proof is a keyed BLAKE3 hash over the prover's side, the whole hello and the acceptor's nonce, so
//! it fits no other run, term, generation, pair of ranks or connection. All messages have fixed sizes.

use std::{fmt, io, net::TcpStream};

use rustix::rand::{GetRandomFlags, getrandom};
use thiserror::Error;

use super::{
    message::{HASH, HELLO_BYTES, Hello, REPLY_BYTES, Refusal, decode_reply, encode_reply},
    socket::{Impatience, Patience},
};

/// What the members of one generation share. Its bytes are never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret([u8; 32]);

impl From<[u8; 32]> for Secret {
    fn from(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// How an opening fails.
#[derive(Debug, Error)]
pub(super) enum OpenError {
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error(transparent)]
    Ended(#[from] Impatience),
}

/// A hello as it was received, which the proofs are over.
pub(super) struct HelloBytes([u8; HELLO_BYTES]);

/// The dialer's part.
pub(super) fn dial(
    stream: &TcpStream,
    hello: &Hello,
    secret: &Secret,
    patience: Patience<'_>,
) -> Result<(), OpenError> {
    let hello = hello.encode(nonce()?);
    patience.write_all(stream, &hello)?;
    read_reply(stream, patience)?;
    let (mut nonce, mut proof) = ([0; HASH], [0; HASH]);
    patience.read_exact(stream, &mut nonce)?;
    patience.read_exact(stream, &mut proof)?;

    if prove(secret, Side::Acceptor, &hello, &nonce) != blake3::Hash::from(proof) {
        patience.write_all(stream, &encode_reply(Some(&Refusal::WrongSecret)))?;
        return Err(Refusal::WrongSecret.into());
    }
    patience.write_all(stream, &encode_reply(None))?;
    patience.write_all(stream, prove(secret, Side::Dialer, &hello, &nonce).as_bytes())?;
    read_reply(stream, patience)
}

/// The acceptor's part, up to the hello.
pub(super) fn read_hello(
    stream: &TcpStream,
    patience: Patience<'_>,
) -> Result<(Hello, HelloBytes), OpenError> {
    let mut bytes = [0; HELLO_BYTES];
    patience.read_exact(stream, &mut bytes)?;
    Ok((Hello::decode(&bytes)?, HelloBytes(bytes)))
}

/// The acceptor's part, once it knows the secret. The last word, [`welcome`], is the caller's.
pub(super) fn accept(
    stream: &TcpStream,
    hello: &HelloBytes,
    secret: &Secret,
    patience: Patience<'_>,
) -> Result<(), OpenError> {
    let nonce = nonce()?;
    let mut challenge = encode_reply(None).to_vec();
    challenge.extend(nonce);
    challenge.extend(prove(secret, Side::Acceptor, &hello.0, &nonce).as_bytes());
    patience.write_all(stream, &challenge)?;

    read_reply(stream, patience)?;
    let mut proof = [0; HASH];
    patience.read_exact(stream, &mut proof)?;
    if prove(secret, Side::Dialer, &hello.0, &nonce) != blake3::Hash::from(proof) {
        return Err(Refusal::WrongSecret.into());
    }
    Ok(())
}

/// Lets the dialer in.
pub(super) fn welcome(stream: &TcpStream, patience: Patience<'_>) -> Result<(), Impatience> {
    patience.write_all(stream, &encode_reply(None))
}

/// Tells the dialer why it is not let in.
pub(super) fn refuse(
    stream: &TcpStream,
    refusal: &Refusal,
    patience: Patience<'_>,
) -> Result<(), Impatience> {
    patience.write_all(stream, &encode_reply(Some(refusal)))
}

fn read_reply(stream: &TcpStream, patience: Patience<'_>) -> Result<(), OpenError> {
    let mut bytes = [0; REPLY_BYTES];
    patience.read_exact(stream, &mut bytes)?;
    Ok(decode_reply(&bytes)?)
}

#[derive(Debug, Clone, Copy)]
enum Side {
    Dialer = 1,
    Acceptor = 2,
}

fn prove(secret: &Secret, side: Side, hello: &[u8], nonce: &[u8; HASH]) -> blake3::Hash {
    // `blake3::Hash` compares in constant time.
    blake3::Hasher::new_keyed(&secret.0)
        .update(&[side as u8])
        .update(hello)
        .update(nonce)
        .finalize()
}

fn nonce() -> Result<[u8; HASH], Impatience> {
    let mut bytes = [0; HASH];
    let mut filled = 0;
    while filled < HASH {
        let flags = GetRandomFlags::empty();
        filled += getrandom(&mut bytes[filled..], flags).map_err(io::Error::from)?;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proof_fits_one_side_one_hello_one_nonce_and_one_secret() {
        let secret = Secret::from([1; 32]);
        let proof = prove(&secret, Side::Dialer, b"hello", &[2; HASH]);
        assert_eq!(proof, prove(&secret, Side::Dialer, b"hello", &[2; HASH]));
        assert_ne!(proof, prove(&secret, Side::Acceptor, b"hello", &[2; HASH]));
        assert_ne!(proof, prove(&secret, Side::Dialer, b"hullo", &[2; HASH]));
        assert_ne!(proof, prove(&secret, Side::Dialer, b"hello", &[3; HASH]));
        assert_ne!(proof, prove(&Secret::from([2; 32]), Side::Dialer, b"hello", &[2; HASH]));
    }

    #[test]
    fn a_secret_does_not_show_its_bytes() {
        assert_eq!(format!("{:?}", Secret::from([7; 32])), "Secret(..)");
    }
}
