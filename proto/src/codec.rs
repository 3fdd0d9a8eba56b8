//! How messages become bytes: by prost, with buffers for messages of some hundred bytes.
//!
//! A session of a worker is open for days and says little. The usual 8 KB in each direction, and 32 KB that
//! are filled before anything is sent, are most of what a coordinator of thousands of workers would hold.

use std::marker::PhantomData;

use prost::Message;
use tonic::codec::{BufferSettings, Codec};
use tonic_prost::{ProstDecoder, ProstEncoder};

/// Allocated at a time, in bytes; a longer message gets what it needs.
const BUFFER: usize = 512;
/// Sent as soon as so many bytes have gathered.
const SEND_AT: usize = 4 << 10;

/// Says `T`, hears `U`.
#[derive(Debug)]
pub(crate) struct SmallBuffers<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for SmallBuffers<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> Codec for SmallBuffers<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = ProstDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstEncoder::new(BufferSettings::new(BUFFER, SEND_AT))
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstDecoder::new(BufferSettings::new(BUFFER, SEND_AT))
    }
}
