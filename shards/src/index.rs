//! The sidecar index of a shard: where each sample is, what it is, and its checksum.
//!
//! `NAME-000000.idx`, little-endian: a header of 64 bytes, then 32 bytes a sample.
//!
//! ```text
//! header    0  magic       8 bytes  "PCHNIDX\n"
//!           8  version     u32      1
//!          12  count       u32      samples
//!          16  tar length  u64      bytes
//!          24  tar sha256  32 bytes
//!          56  reserved    u32      0
//!          60  crc32c      u32      of the whole file with this field left out
//! record    0  offset      u64      of the image's first byte in the tar
//!           8  length      u32      bytes
//!          12  label       u32      class index
//!          16  crc32c      u32      of the image's bytes
//!          20  width       u16      pixels
//!          22  height      u16      pixels
//!          24  flags       u16      see [`Flags`]
//!          26  reserved    6 bytes  0
//! ```

use crate::{digest::Sha256, format};

const MAGIC: &[u8; 8] = b"PCHNIDX\n";
const VERSION: u32 = 1;
const HEADER: usize = 64;
const RECORD: usize = 32;
const CRC_FIELD: usize = 60;

/// What is known of an image without decoding it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Flags(pub u16);

impl Flags {
    /// The two lowest bits: how far the chroma planes are reduced.
    const CHROMA: u16 = 0b11;
    /// Chroma at full resolution (4:4:4), or no chroma at all.
    pub const CHROMA_444: Self = Self(0);
    /// Chroma halved in width (4:2:2).
    pub const CHROMA_422: Self = Self(1);
    /// Chroma halved both ways (4:2:0).
    pub const CHROMA_420: Self = Self(2);
    /// Any other sampling.
    pub const CHROMA_OTHER: Self = Self(3);
    /// One grey channel.
    pub const GREY: Self = Self(1 << 2);
    /// A restart marker after each row of blocks.
    pub const RESTART_ROWS: Self = Self(1 << 3);
    /// The packer encoded the image anew; without this flag the source's bytes were kept.
    pub const RE_ENCODED: Self = Self(1 << 4);
    /// Four channels, CMYK or YCCK.
    pub const CMYK: Self = Self(1 << 5);

    const KNOWN: u16 = 0b11_1111;

    /// Both sets of flags.
    #[must_use]
    pub fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether every flag of `other` is set. Compare chroma with [`Self::chroma`] instead.
    #[must_use]
    pub fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// The chroma sampling alone.
    #[must_use]
    pub fn chroma(self) -> Self {
        Self(self.0 & Self::CHROMA)
    }
}

/// One sample of a shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    /// Offset of the image's first byte in the tar.
    pub offset: u64,
    /// Bytes of the image.
    pub length: u32,
    /// Class index.
    pub label: u32,
    /// Checksum of the image's bytes.
    pub crc32c: u32,
    /// Width in pixels.
    pub width: u16,
    /// Height in pixels.
    pub height: u16,
    /// What else is known of the image.
    pub flags: Flags,
}

/// The index of one shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Index {
    /// Length of the tar in bytes.
    pub tar_length: u64,
    /// Digest of the tar.
    pub tar_sha256: Sha256,
    /// The samples, in the tar's order.
    pub records: Vec<Record>,
}

/// What is wrong with the bytes of an index.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IndexError {
    /// The file does not start as an index does.
    #[error("field `magic` at offset 0: this is not a shard index")]
    Magic,
    /// Written by a newer version.
    #[error("field `version` at offset 8 is {0}, this program reads 1: use a newer program")]
    Version(u32),
    /// The file does not have the length that its header states.
    #[error("field `count` at offset 12 asks for a file of {expected} bytes, it has {found}")]
    Length {
        /// Bytes that the header and its records take.
        expected: u64,
        /// Bytes there are.
        found: u64,
    },
    /// The file is not what was written.
    #[error("field `crc32c` at offset 60 is {stated:08x}, the contents give {found:08x}")]
    Checksum {
        /// What the file says.
        stated: u32,
        /// What its bytes give.
        found: u32,
    },
    /// A record cannot be true.
    #[error("sample {sample} of the shard, record at offset {offset}: {problem}")]
    Record {
        /// Place in the shard.
        sample: u64,
        /// Offset of the record, in bytes.
        offset: u64,
        /// What is wrong.
        problem: &'static str,
    },
}

impl Index {
    /// Reads an index and checks everything that its own bytes can tell.
    ///
    /// # Errors
    /// [`IndexError`] names the first field that is wrong.
    pub fn parse(bytes: &[u8]) -> Result<Self, IndexError> {
        let (header, body) = bytes
            .split_at_checked(HEADER)
            .ok_or(IndexError::Length { expected: HEADER as u64, found: bytes.len() as u64 })?;
        if &header[..8] != MAGIC {
            return Err(IndexError::Magic);
        }
        let version = u32_at(header, 8);
        if version != VERSION {
            return Err(IndexError::Version(version));
        }
        let count = u32_at(header, 12);
        let expected = HEADER as u64 + u64::from(count) * RECORD as u64;
        if bytes.len() as u64 != expected {
            return Err(IndexError::Length { expected, found: bytes.len() as u64 });
        }
        let (stated, found) = (u32_at(header, CRC_FIELD), checksum(bytes));
        if stated != found {
            return Err(IndexError::Checksum { stated, found });
        }
        let tar_length = u64_at(header, 16);
        let tar_sha256 = Sha256(array_at(header, 24));
        let records = body
            .chunks_exact(RECORD)
            .enumerate()
            .map(|(sample, record)| parse_record(record, sample, tar_length))
            .collect::<Result<_, _>>()?;
        Ok(Self { tar_length, tar_sha256, records })
    }

    /// The bytes of the index file.
    ///
    /// # Panics
    /// If there are more than `u32::MAX` records; a shard has at most 2,048.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let count = u32::try_from(self.records.len()).expect("a shard has at most 2,048 samples");
        let mut bytes = Vec::with_capacity(HEADER + self.records.len() * RECORD);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&count.to_le_bytes());
        bytes.extend_from_slice(&self.tar_length.to_le_bytes());
        bytes.extend_from_slice(&self.tar_sha256.0);
        bytes.extend_from_slice(&[0; 8]);
        for record in &self.records {
            bytes.extend_from_slice(&record.offset.to_le_bytes());
            bytes.extend_from_slice(&record.length.to_le_bytes());
            bytes.extend_from_slice(&record.label.to_le_bytes());
            bytes.extend_from_slice(&record.crc32c.to_le_bytes());
            bytes.extend_from_slice(&record.width.to_le_bytes());
            bytes.extend_from_slice(&record.height.to_le_bytes());
            bytes.extend_from_slice(&record.flags.0.to_le_bytes());
            bytes.extend_from_slice(&[0; 6]);
        }
        let crc = checksum(&bytes);
        bytes[CRC_FIELD..HEADER].copy_from_slice(&crc.to_le_bytes());
        bytes
    }
}

fn parse_record(bytes: &[u8], sample: usize, tar_length: u64) -> Result<Record, IndexError> {
    let record = Record {
        offset: u64_at(bytes, 0),
        length: u32_at(bytes, 8),
        label: u32_at(bytes, 12),
        crc32c: u32_at(bytes, 16),
        width: u16_at(bytes, 20),
        height: u16_at(bytes, 22),
        flags: Flags(u16_at(bytes, 24)),
    };
    let end = record.offset.checked_add(u64::from(record.length));
    let problem = if record.offset < format::BLOCK || !record.offset.is_multiple_of(format::BLOCK) {
        "`offset` is not where a tar member's data can begin"
    } else if record.length == 0 {
        "`length` is 0"
    } else if end.is_none_or(|end| end > tar_length) {
        "`offset` + `length` is past the end of the tar"
    } else if record.width == 0 || record.height == 0 {
        "`width` or `height` is 0"
    } else if record.flags.0 & !Flags::KNOWN != 0 {
        "`flags` has unknown bits"
    } else {
        return Ok(record);
    };
    let offset = (HEADER + sample * RECORD) as u64;
    Err(IndexError::Record { sample: sample as u64, offset, problem })
}

/// Of everything but the checksum field itself.
fn checksum(bytes: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&bytes[..CRC_FIELD]), &bytes[HEADER..])
}

fn array_at<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
    bytes[offset..offset + N].try_into().expect("the slice has N bytes")
}

fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes(array_at(bytes, offset))
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(array_at(bytes, offset))
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(array_at(bytes, offset))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn index() -> Index {
        let record = |sample: u32| Record {
            offset: 512 * u64::from(1 + 4 * sample),
            length: 700 + sample,
            label: sample % 3,
            crc32c: 0xDEAD_BEEF ^ sample,
            width: 32,
            height: 24,
            flags: Flags::CHROMA_420.with(Flags::RE_ENCODED),
        };
        Index {
            tar_length: 1 << 20,
            tar_sha256: Sha256::of(b"tar"),
            records: (0..5).map(record).collect(),
        }
    }

    #[test]
    fn an_index_reads_back_as_written() {
        let bytes = index().encode();
        assert_eq!(bytes.len(), 64 + 5 * 32);
        assert_eq!(Index::parse(&bytes), Ok(index()));
    }

    #[test]
    fn a_flip_of_any_bit_is_found() {
        let whole = index().encode();
        for at in 0..whole.len() {
            for bit in 0..8 {
                let mut damaged = whole.clone();
                damaged[at] ^= 1 << bit;
                assert!(Index::parse(&damaged).is_err(), "byte {at}, bit {bit}");
            }
        }
    }

    #[test]
    fn any_truncation_is_found() {
        let whole = index().encode();
        for length in 0..whole.len() {
            assert!(
                matches!(Index::parse(&whole[..length]), Err(IndexError::Length { .. })),
                "{length} bytes"
            );
        }
    }

    #[test]
    fn a_record_that_cannot_be_true_is_named() {
        let mut wrong = index();
        wrong.records[3].offset = u64::MAX - 511;
        let error = Index::parse(&wrong.encode()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "sample 3 of the shard, record at offset 160: `offset` + `length` is past the end of \
             the tar"
        );
    }

    proptest! {
        #[test]
        fn any_bytes_give_an_index_or_an_error(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..300), valid: bool,
        ) {
            if valid && bytes.len() >= HEADER {
                bytes.truncate(HEADER + (bytes.len() - HEADER) / RECORD * RECORD);
                let count = u32::try_from((bytes.len() - HEADER) / RECORD).unwrap();
                bytes[..8].copy_from_slice(MAGIC);
                bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
                bytes[12..16].copy_from_slice(&count.to_le_bytes());
                let crc = checksum(&bytes);
                bytes[CRC_FIELD..HEADER].copy_from_slice(&crc.to_le_bytes());
            }
            let _outcome = Index::parse(&bytes);
        }
    }
}
