//! A shard's bytes: a plain ustar archive that `tar` and every WebDataset reader understand.
//!
//! A sample is two members, `KEY.jpg` then `KEY.cls` (the class index in decimal). The archive ends
//! with two zero blocks and is not padded further. Nothing in it depends on the machine or the time
//! of packing, so equal samples make equal archives.

use std::{ops::Range, str};

/// Unit of a tar archive: headers are one block, member data is padded to whole blocks.
pub const BLOCK: u64 = 512;

/// Bytes of the two zero blocks that end an archive.
pub const TRAILER: u64 = 2 * BLOCK;

/// Most samples in a shard.
pub const SHARD_SAMPLES_MAX: usize = 2048;

/// A shard is closed before it grows past this, unless its first sample alone is larger.
pub const SHARD_BYTES_MAX: u64 = 256 << 20;

/// Extension of the member that holds a sample's image.
pub const IMAGE: &str = "jpg";

/// Extension of the member that holds a sample's class index.
pub const CLASS: &str = "cls";

/// A place where the bytes are not the archive that they should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TarError {
    /// A header or its data goes past the end of the file.
    #[error("the archive ends inside the member at offset {offset}")]
    Truncated {
        /// Offset of the member's header, in bytes.
        offset: u64,
    },
    /// The header's own checksum does not hold.
    #[error("the header at offset {offset} is damaged: its checksum does not hold")]
    Checksum {
        /// Offset of the header, in bytes.
        offset: u64,
    },
    /// A header field has no meaning here.
    #[error("the header at offset {offset} has an unusable {field}")]
    Field {
        /// Offset of the header, in bytes.
        offset: u64,
        /// Which field.
        field: &'static str,
    },
    /// The bytes between the last member and the end of the file are not two zero blocks.
    #[error("the archive does not end with two zero blocks at offset {offset}")]
    Trailer {
        /// Where they should begin, in bytes.
        offset: u64,
    },
}

/// One file of an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member<'a> {
    /// Its path in the archive.
    pub name: &'a str,
    /// Offset of its first data byte.
    pub offset: u64,
    /// Its data.
    pub data: &'a [u8],
}

impl<'a> Member<'a> {
    /// Key and extension: what stands before and after the first dot.
    #[must_use]
    pub fn key_and_extension(&self) -> (&'a str, &'a str) {
        self.name.split_once('.').unwrap_or((self.name, ""))
    }
}

/// The member whose header is at `offset` of `archive`; `None` at the closing zero blocks.
///
/// # Errors
/// [`TarError`] if the bytes there are neither a member nor the end of an archive.
pub fn member_at(archive: &[u8], offset: u64) -> Result<Option<Member<'_>>, TarError> {
    let header = slice(archive, offset..offset.saturating_add(BLOCK))
        .ok_or(TarError::Truncated { offset })?;
    if header.iter().all(|&byte| byte == 0) {
        let closed = archive.len() as u64 == offset + TRAILER
            && slice(archive, offset..offset + TRAILER)
                .is_some_and(|end| end.iter().all(|&b| b == 0));
        return if closed { Ok(None) } else { Err(TarError::Trailer { offset }) };
    }
    let (name, length) = parse_header(header, offset)?;
    let start = offset + BLOCK;
    let data = slice(archive, start..start.saturating_add(length))
        .ok_or(TarError::Truncated { offset })?;
    Ok(Some(Member { name, offset: start, data }))
}

/// The key of the sample whose image member has the header `header`, if it is one.
#[must_use]
pub fn key_in_header(header: &[u8]) -> Option<&str> {
    let (name, _) = parse_header(header, 0).ok()?;
    Some(name.split_once('.').map_or(name, |(key, _)| key))
}

fn parse_header(bytes: &[u8], offset: u64) -> Result<(&str, u64), TarError> {
    let unusable = |field| TarError::Field { offset, field };
    let block: &[u8; 512] = bytes.try_into().map_err(|_| TarError::Truncated { offset })?;
    let header = tar::Header::from_byte_slice(block);
    let stated = header.cksum().map_err(|_| TarError::Checksum { offset })?;
    if stated != checksum(block) {
        return Err(TarError::Checksum { offset });
    }
    if !header.entry_type().is_file() {
        return Err(unusable("type: only plain files belong in a shard"));
    }
    let name = block[..100].split(|&byte| byte == 0).next().unwrap_or_default();
    let name = str::from_utf8(name).map_err(|_| unusable("name: it is not UTF-8"))?;
    let length = header.entry_size().map_err(|_| unusable("size"))?;
    Ok((name, length))
}

/// Sum of the header's bytes, with the checksum field itself read as spaces.
fn checksum(block: &[u8; 512]) -> u32 {
    let field = 148..156;
    (0..).zip(block).map(|(at, &byte)| if field.contains(&at) { 32 } else { u32::from(byte) }).sum()
}

pub(crate) fn slice(bytes: &[u8], range: Range<u64>) -> Option<&[u8]> {
    bytes.get(usize::try_from(range.start).ok()?..usize::try_from(range.end).ok()?)
}

/// Where the header after a member lies, whose data is at `offset` and `length` bytes long.
#[must_use]
pub fn next_header(offset: u64, length: u64) -> u64 {
    (offset + length).next_multiple_of(BLOCK)
}

/// Appends a member to an archive under construction and returns the offset of its data.
///
/// # Panics
/// If `name` is longer than the 100 bytes that ustar holds: the packer makes shorter ones.
pub fn append_member(archive: &mut Vec<u8>, name: &str, data: &[u8]) -> u64 {
    let mut header = tar::Header::new_ustar();
    header.set_path(name).expect("the packer's member names are short and relative");
    header.set_size(data.len() as u64);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_entry_type(tar::EntryType::Regular);
    header.set_cksum();
    archive.extend_from_slice(header.as_bytes());
    let offset = archive.len() as u64;
    archive.extend_from_slice(data);
    archive.resize(archive.len().next_multiple_of(512), 0);
    offset
}

/// Closes an archive with its two zero blocks.
pub fn append_trailer(archive: &mut Vec<u8>) {
    archive.resize(archive.len() + 1024, 0);
}

/// File name of shard `number` of a split.
#[must_use]
pub fn shard_name(split: &str, number: usize) -> String {
    format!("{split}-{number:06}")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn archive() -> Vec<u8> {
        let mut archive = Vec::new();
        append_member(&mut archive, "a.jpg", &[7; 600]);
        append_member(&mut archive, "a.cls", b"3");
        append_trailer(&mut archive);
        archive
    }

    #[test]
    fn an_archive_reads_back_member_by_member() {
        let archive = archive();
        let image = member_at(&archive, 0).unwrap().unwrap();
        assert_eq!((image.key_and_extension(), image.offset), (("a", "jpg"), 512));
        assert_eq!(image.data, [7; 600]);
        let class = member_at(&archive, next_header(512, 600)).unwrap().unwrap();
        assert_eq!((class.name, class.data), ("a.cls", b"3".as_slice()));
        assert_eq!(member_at(&archive, next_header(class.offset, 1)), Ok(None));
    }

    #[test]
    fn the_tar_library_reads_what_is_written() {
        let archive = archive();
        let mut reader = tar::Archive::new(archive.as_slice());
        let names: Vec<String> = reader
            .entries()
            .unwrap()
            .map(|entry| entry.unwrap().path().unwrap().display().to_string())
            .collect();
        assert_eq!(names, ["a.jpg", "a.cls"]);
    }

    #[test]
    fn damage_is_named_with_its_offset() {
        let mut damaged = archive();
        damaged[3] ^= 1;
        assert_eq!(member_at(&damaged, 0), Err(TarError::Checksum { offset: 0 }));
        let whole = archive();
        assert_eq!(member_at(&whole[..900], 0), Err(TarError::Truncated { offset: 0 }));
        let end = whole.len() as u64 - TRAILER;
        let short = &whole[..whole.len() - 1];
        assert_eq!(member_at(short, end), Err(TarError::Trailer { offset: end }));
        assert_eq!(member_at(&whole, u64::MAX), Err(TarError::Truncated { offset: u64::MAX }));
    }

    proptest! {
        #[test]
        fn any_bytes_give_a_member_or_an_error(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..2048), offset: u64, valid: bool,
        ) {
            if valid && bytes.len() >= 512 {
                let mut block = [0; 512];
                block.copy_from_slice(&bytes[..512]);
                bytes[148..156].copy_from_slice(format!("{:06o}\0 ", checksum(&block)).as_bytes());
            }
            let _outcome = member_at(&bytes, offset % 2048);
            let _outcome = member_at(&bytes, 0);
        }
    }
}
