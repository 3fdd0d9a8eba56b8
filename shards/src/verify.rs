//! Checking every byte of a packed split.

use std::str;

use crate::{
    dataset::{Dataset, OpenError},
    digest::Sha256,
    format::{self, Member, TarError},
    index::Record,
    jpeg::{self, JpegError},
    manifest::{Policy, Shard},
    pack::flags_of,
    source::SourceError,
};

/// The first fault of a split.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The split cannot even be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A shard cannot be read.
    #[error(transparent)]
    Read(#[from] SourceError),
    /// A shard is not an archive.
    #[error("shard {shard} is damaged: copy it again, or pack the split again")]
    Tar {
        /// The file with its location.
        shard: String,
        /// What is wrong, and where.
        #[source]
        source: TarError,
    },
    /// A sample is not what the index says.
    #[error(
        "shard {shard} is damaged at sample {sample} (key {key}, offset {offset}): copy it again, or \
         pack the split again"
    )]
    Sample {
        /// The file with its location.
        shard: String,
        /// Sample id.
        sample: u64,
        /// The sample's key in the archive.
        key: String,
        /// Offset of the image in the shard, in bytes.
        offset: u64,
        /// What is wrong.
        #[source]
        problem: SampleFault,
    },
    /// Every sample is right, but other bytes of the archive changed.
    #[error(
        "shard {shard} is damaged outside its samples' contents: its sha256 is {found}, the manifest \
         says {expected}; copy it again"
    )]
    Digest {
        /// The file with its location.
        shard: String,
        /// By the manifest.
        expected: Sha256,
        /// Of the file.
        found: Sha256,
    },
}

/// How a sample differs from its record.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SampleFault {
    /// The archive's next member is another.
    #[error("expected the member {expected} here, found {found}")]
    Member {
        /// Name or kind of the member that must follow.
        expected: String,
        /// What follows.
        found: String,
    },
    /// The image lies elsewhere or has another length.
    #[error("the index places {length} bytes at {offset}")]
    Place {
        /// Offset by the index, in bytes.
        offset: u64,
        /// Length by the index, in bytes.
        length: u32,
    },
    /// The image's bytes changed.
    #[error("crc32c is {found:08x}, the index says {expected:08x}")]
    Checksum {
        /// By the index.
        expected: u32,
        /// Of the bytes.
        found: u32,
    },
    /// The class member says another class.
    #[error("its class is {found:?}, the index says {expected}")]
    Label {
        /// By the index.
        expected: u32,
        /// By the archive.
        found: String,
    },
    /// The image's own header says something else.
    #[error("its JPEG header differs from the index in {field}")]
    Header {
        /// `size` or `flags`.
        field: &'static str,
    },
    /// The image's own header cannot be read.
    #[error("its JPEG header cannot be read")]
    Jpeg(#[source] JpegError),
}

/// What was checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VerifyReport {
    /// Shards read.
    pub shards: u64,
    /// Samples checked.
    pub samples: u64,
    /// Bytes of the archives.
    pub bytes: u64,
}

/// Reads every byte of the split `split` at `location` and checks it against the index and manifest.
///
/// `progress` is told after each shard what has been checked so far.
///
/// # Errors
/// [`VerifyError`] is the first fault, with its place.
pub fn verify(
    location: &str,
    split: &str,
    progress: &mut dyn FnMut(VerifyReport),
) -> Result<VerifyReport, VerifyError> {
    verify_dataset(&Dataset::open(location, split)?, progress)
}

/// [`verify()`] of a split that is open.
///
/// # Errors
/// As [`verify()`].
pub fn verify_dataset(
    dataset: &Dataset,
    progress: &mut dyn FnMut(VerifyReport),
) -> Result<VerifyReport, VerifyError> {
    let policy = dataset.manifest().provenance.policy;
    let mut report = VerifyReport::default();
    for (shard, index) in dataset.manifest().shards.iter().zip(dataset.indexes()) {
        let file = dataset.store().display(&shard.tar());
        let read_and_check = || {
            let archive = dataset.store().read(&shard.tar())?;
            verify_shard(&file, &archive, shard, &index.records, policy)
        };
        match read_and_check() {
            // What comes over the network may have been damaged there.
            Err(_) if dataset.store().remote().is_some() => read_and_check()?,
            checked => checked?,
        }
        report.shards += 1;
        report.samples += shard.samples;
        report.bytes += index.tar_length;
        progress(report);
    }
    Ok(report)
}

fn verify_shard(
    file: &str,
    archive: &[u8],
    shard: &Shard,
    records: &[Record],
    policy: Policy,
) -> Result<(), VerifyError> {
    match policy {
        Policy::KeepJpegConvertPngQuality100 => verify_members(file, archive, shard, records)?,
        Policy::KeepTars => verify_images(file, archive, shard, records)?,
    }
    let (expected, found) = (shard.tar_sha256, Sha256::of(archive));
    if expected != found {
        return Err(VerifyError::Digest { shard: file.to_owned(), expected, found });
    }
    Ok(())
}

/// An archive of somebody else's: only its images are ours to understand.
fn verify_images(
    file: &str,
    archive: &[u8],
    shard: &Shard,
    records: &[Record],
) -> Result<(), VerifyError> {
    for (sample, record) in (shard.first..).zip(records) {
        let Record { offset, length, .. } = *record;
        let header = offset - format::BLOCK;
        let problem = format::slice(archive, offset..offset + u64::from(length))
            .ok_or(SampleFault::Place { offset, length })
            .and_then(|image| check_image(image, record))
            .err();
        if let Some(problem) = problem {
            let key = key_at(archive, header);
            return Err(VerifyError::Sample {
                shard: file.to_owned(),
                sample,
                key,
                offset,
                problem,
            });
        }
    }
    Ok(())
}

/// An archive of ours: image, class, image, class, and the end.
fn verify_members(
    file: &str,
    archive: &[u8],
    shard: &Shard,
    records: &[Record],
) -> Result<(), VerifyError> {
    let mut walk = Walk { archive, at: 0 };
    for (sample, record) in (shard.first..).zip(records) {
        let header = walk.at;
        walk.sample(record).map_err(|fault| match fault {
            Fault::Tar(source) => VerifyError::Tar { shard: file.to_owned(), source },
            Fault::Sample(problem) => VerifyError::Sample {
                shard: file.to_owned(),
                sample,
                key: key_at(archive, header),
                offset: record.offset,
                problem,
            },
        })?;
    }
    let end = format::member_at(archive, walk.at)
        .and_then(|member| member.map_or(Ok(()), |_| Err(TarError::Trailer { offset: walk.at })));
    end.map_err(|source| VerifyError::Tar { shard: file.to_owned(), source })
}

fn key_at(archive: &[u8], header: u64) -> String {
    let member = format::member_at(archive, header).ok().flatten();
    member.map_or("unreadable", |member| member.key_and_extension().0).to_owned()
}

enum Fault {
    Tar(TarError),
    Sample(SampleFault),
}

impl From<TarError> for Fault {
    fn from(error: TarError) -> Self {
        Self::Tar(error)
    }
}

impl From<SampleFault> for Fault {
    fn from(fault: SampleFault) -> Self {
        Self::Sample(fault)
    }
}

/// A walk over an archive, from header to header.
struct Walk<'a> {
    archive: &'a [u8],
    at: u64,
}

impl<'a> Walk<'a> {
    /// Checks the two members of the next sample against its record.
    fn sample(&mut self, record: &Record) -> Result<(), Fault> {
        let image = self.member(&format!("KEY.{}", format::IMAGE))?;
        let (key, extension) = image.key_and_extension();
        if extension != format::IMAGE {
            return Err(unexpected(format!("KEY.{}", format::IMAGE), image.name).into());
        }
        self.image(&image, record)?;
        let expected = format!("{key}.{}", format::CLASS);
        let class = self.member(&expected)?;
        if class.name != expected {
            return Err(unexpected(expected, class.name).into());
        }
        let label = str::from_utf8(class.data).ok().and_then(|text| text.parse().ok());
        if label != Some(record.label) {
            let found = String::from_utf8_lossy(class.data).into_owned();
            return Err(SampleFault::Label { expected: record.label, found }.into());
        }
        Ok(())
    }

    fn member(&mut self, expected: &str) -> Result<Member<'a>, Fault> {
        let member = format::member_at(self.archive, self.at)?
            .ok_or_else(|| unexpected(expected.to_owned(), "the end of the archive"))?;
        self.at = format::next_header(member.offset, member.data.len() as u64);
        Ok(member)
    }

    fn image(&mut self, image: &Member<'_>, record: &Record) -> Result<(), SampleFault> {
        let Record { offset, length, .. } = *record;
        if image.offset != offset || image.data.len() as u64 != u64::from(length) {
            return Err(SampleFault::Place { offset, length });
        }
        check_image(image.data, record)
    }
}

fn check_image(image: &[u8], record: &Record) -> Result<(), SampleFault> {
    let found = crc32c::crc32c(image);
    if found != record.crc32c {
        return Err(SampleFault::Checksum { expected: record.crc32c, found });
    }
    let header = jpeg::header(image).map_err(SampleFault::Jpeg)?;
    let size = (usize::from(record.width), usize::from(record.height));
    if (header.width, header.height) != size {
        return Err(SampleFault::Header { field: "size" });
    }
    let seen = flags_of(&header);
    if !record.flags.has(seen) || record.flags.chroma() != seen.chroma() {
        return Err(SampleFault::Header { field: "flags" });
    }
    Ok(())
}

fn unexpected(expected: String, found: &str) -> SampleFault {
    SampleFault::Member { expected, found: found.to_owned() }
}
