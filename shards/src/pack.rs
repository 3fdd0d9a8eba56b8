//! Packing images into shards.
//!
//! The samples are always shuffled, by a recorded seed, so that any run of neighbours is a fair sample.
//! Files appear whole, in a folder by renaming, and the manifest last: a split that has a manifest
//! is complete. One that was cut short is taken up after its last whole shard, with the same result.

use std::{
    io,
    path::{Path, PathBuf},
};

use crate::{
    dataset::{OpenError, check_split_name},
    digest::Sha256,
    format::{self, SHARD_BYTES_MAX, SHARD_SAMPLES_MAX},
    index::{Flags, Index, Record},
    manifest::{Manifest, Policy, Provenance, Shard, VERSION},
    plan::Permutation,
    source::{SourceError, Store},
};

mod image;
mod raw;
mod resume;
pub(crate) mod scan;
pub(crate) mod tree;

pub use image::CorruptImage;
use image::Image;
pub(crate) use image::{Checker, as_jpeg, flags_of, within};
use resume::Journal;
use scan::{Listing, SourceFile};
use tree::Tree;

/// Keeps the packing order apart from other uses of the same seed.
const PACK_DOMAIN: u64 = u64::from_le_bytes(*b"pack/v1\0");

/// Files of the source that are read at a time: in a bucket each would else cost a round trip.
pub(crate) const READ_AHEAD: usize = 64;

/// Longest part of a source file's name that a key repeats.
const KEY_STEM_MAX: usize = 64;

/// What to do with a source file that is not a whole image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnCorrupt {
    /// Stop with an error that names it; nothing can then be opened.
    #[default]
    Fail,
    /// Leave it out and name it in the manifest.
    Skip,
}

/// Settings of [`pack()`].
#[derive(Debug, Clone, Default)]
pub struct PackOptions {
    /// Name of the split, `train` or `val`: letters, digits, `-` and `_`.
    pub split: String,
    /// Seed of the order in which the samples are packed.
    pub seed: u64,
    /// What to do with a corrupt source file.
    pub on_corrupt: OnCorrupt,
    /// What the manifest says was packed; the source folder's name if not given.
    pub source: Option<String>,
    /// Who is to be named when the data is used.
    pub attribution: Option<String>,
    /// Terms under which the data may be used.
    pub licence: Option<String>,
}

/// How far packing is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackProgress {
    /// Source files dealt with.
    pub files: u64,
    /// Source files in all.
    pub files_total: u64,
    /// Bytes of the images packed so far.
    pub bytes: u64,
}

/// A folder that cannot be packed.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// The name of the split is not usable.
    #[error(transparent)]
    Split(#[from] OpenError),
    /// The destination cannot be written.
    #[error(transparent)]
    Destination(#[from] SourceError),
    /// The source cannot be read.
    #[error(transparent)]
    Source(SourceError),
    /// The source is packed already.
    #[error(
        "source {0} is packed already: `percheron shards unpack {0} --out DIR` writes its images"
    )]
    Builtin(String),
    /// Nothing is in the bucket under this name.
    #[error("source {0} has no objects: give the prefix of class folders or of tars, or one tar")]
    NoObjects(String),
    /// The destination already has this split.
    #[error(
        "{manifest} already exists and is not overwritten: choose another --out or --split, or \
         remove that split's files first"
    )]
    AlreadyPacked {
        /// The manifest with its location.
        manifest: String,
    },
    /// The source is not a folder of class folders.
    #[error("{} has no class folders: it must have one folder a class, with images in it", .0.display())]
    NoClasses(PathBuf),
    /// A source without images.
    #[error("{} has no .jpg, .jpeg or .png file", .0.display())]
    NoImages(PathBuf),
    /// A class folder has nothing to pack.
    #[error(
        "class folder {} has no .jpg, .jpeg or .png file: remove the folder or add its images",
        .0.display()
    )]
    EmptyClass(PathBuf),
    /// A class folder's name cannot be written in the manifest.
    #[error("the name of class folder {} is not UTF-8: rename it", .0.display())]
    ClassName(PathBuf),
    /// A file of raw pixels or labels that is not what its name says.
    #[error("{} is not {format}", .path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What it should be.
        format: &'static str,
    },
    /// A tar of images without their classes.
    #[error(
        "{} has images but neither .cls files nor class folders nor class tars: put a file {} beside \
         it with a line `FILE CLASS` for each image",
        .tar.display(), .labels.display()
    )]
    NoLabels {
        /// The tar.
        tar: PathBuf,
        /// The file that could say their classes.
        labels: PathBuf,
    },
    /// An image whose class nothing says.
    #[error("{} has no class: neither a .cls file nor a line in the text file names it", .image.display())]
    NoLabel {
        /// The tar and its member.
        image: PathBuf,
    },
    /// A .cls file that is no class index.
    #[error("{} is not a class index in decimal", .member.display())]
    Label {
        /// The tar and its member.
        member: PathBuf,
    },
    /// A label beyond the list of class names.
    #[error("{} names {classes} classes, but an image has the class {label}", .names.display())]
    TooFewClasses {
        /// The list of class names.
        names: PathBuf,
        /// How many there are.
        classes: usize,
        /// The largest class index.
        label: u32,
    },
    /// An image that cannot be used as it is, where nothing may be changed.
    #[error("{} is not a JPEG: tars can be indexed where they lie only if all images are; pack them", .path.display())]
    NotJpeg {
        /// The tar and its member.
        path: PathBuf,
    },
    /// A tar whose name cannot be written in a manifest.
    #[error("{}: the name of a tar has letters, digits, '-', '_' and '.': rename it", .0.display())]
    TarName(PathBuf),
    /// A folder or file of the source cannot be read.
    #[error("{} cannot be read", .path.display())]
    Read {
        /// The folder or file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A source file is not a whole image.
    #[error(
        "{} is corrupt: repair or remove it, or let the packer skip such files",
        .path.display()
    )]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: CorruptImage,
    },
    /// Every source file was corrupt and skipped.
    #[error("none of the {files} files of {} is a whole image", .path.display())]
    NothingLeft {
        /// The source folder.
        path: PathBuf,
        /// Files found in it.
        files: usize,
    },
}

impl PackError {
    /// What a file's error means, which a bucket has put into an [`io::Error`].
    pub(crate) fn unread(path: &Path, error: io::Error) -> Self {
        match error.downcast::<SourceError>() {
            Ok(error) => Self::Source(error),
            Err(source) => Self::Read { path: path.to_owned(), source },
        }
    }
}

/// Packs `source` as a split of the dataset at `out`, and returns its manifest. A source is an image
/// folder, WebDataset tars, or ImageNet's own tars: see `pack/scan.rs` for the kinds.
///
/// JPEG files are kept byte for byte after they have been decoded once as a check. PNG files are
/// converted, see [`Policy`]. Other files are ignored. Equal sources and options give equal files,
/// whether packing was cut short on the way or not.
///
/// `source` and `out` are each a path or `s3://BUCKET/PREFIX`; a folder `out` is made. The process's environment says how to reach a bucket:
/// [`Dataset::open_with`](crate::Dataset::open_with) names the variables.
///
/// # Errors
/// [`PackError`]. A manifest that exists is never overwritten; after an error there is none.
pub fn pack(
    source: &Path,
    out: &str,
    options: &PackOptions,
    progress: &mut dyn FnMut(PackProgress),
) -> Result<Manifest, PackError> {
    let variables: Vec<_> = bucket::environment().collect();
    pack_with(source, out, options, &variables, progress)
}

/// [`pack()`] with the variables of another environment than the process's.
///
/// # Errors
/// As [`pack()`].
pub fn pack_with(
    source: &Path,
    out: &str,
    options: &PackOptions,
    variables: &[(String, String)],
    progress: &mut dyn FnMut(PackProgress),
) -> Result<Manifest, PackError> {
    check_split_name(&options.split)?;
    let tree = Tree::open(source, variables)?;
    let listing = scan::scan(&tree)?;
    let store = Store::create(out, variables)?;
    let manifest_name = manifest_for(&store, &options.split)?;
    let fingerprint = resume::fingerprint(&listing, options);
    let done = Journal::load(&store, &options.split, fingerprint)?;
    if store.remote().is_some() {
        done.save(&store, &options.split)?; // What cannot be written is said before the work, not after it.
    }
    let mut packer = Packer::new(&store, &options.split, done);
    packer.add_all(&tree, &listing, options, progress)?;
    packer.close_shard()?;
    let done = packer.done;
    if done.samples == 0 {
        let files = listing.files.len();
        return Err(PackError::NothingLeft { path: tree.root().to_owned(), files });
    }
    let mut skipped = done.skipped;
    skipped.sort();
    let manifest = Manifest {
        version: VERSION,
        split: options.split.clone(),
        samples: done.samples,
        classes: listing.classes,
        provenance: Provenance {
            source: options.source.clone().unwrap_or_else(|| folder_name(tree.root())),
            seed: options.seed,
            policy: Policy::KeepJpegConvertPngQuality100,
            converted: done.converted,
            cmyk: done.cmyk,
            deep: done.deep,
            skipped,
            attribution: options.attribution.clone(),
            licence: options.licence.clone(),
        },
        shards: done.shards,
    };
    match store.write_new(&manifest_name, manifest.encode()) {
        Err(SourceError::Exists { file }) => {
            return Err(PackError::AlreadyPacked { manifest: file });
        }
        written => written?,
    }
    Journal::remove(&store, &options.split)?;
    Ok(manifest)
}

/// The name of a split's manifest, which must still be free.
pub(crate) fn manifest_for(store: &Store, split: &str) -> Result<String, PackError> {
    let name = format!("{split}.json");
    match store.length(&name) {
        Err(SourceError::Missing { .. }) => Ok(name),
        Err(error) => Err(error.into()),
        Ok(_) => Err(PackError::AlreadyPacked { manifest: store.display(&name) }),
    }
}

pub(crate) fn folder_name(folder: &Path) -> String {
    let name = folder.file_name().unwrap_or(folder.as_os_str());
    name.to_string_lossy().into_owned()
}

/// Writes shards, one after another. A shard is built in memory.
#[derive(Debug)]
struct Packer<'a> {
    store: &'a Store,
    split: &'a str,
    checker: Checker,
    archive: Vec<u8>,
    records: Vec<Record>,
    /// What has been packed, the shard at hand included.
    done: Journal,
}

impl<'a> Packer<'a> {
    fn new(store: &'a Store, split: &'a str, done: Journal) -> Self {
        let checker = Checker::default();
        Self { store, split, checker, archive: Vec::new(), records: Vec::new(), done }
    }

    /// Adds every file that is not done, in the order that the seed chooses.
    fn add_all(
        &mut self,
        tree: &Tree,
        listing: &Listing,
        options: &PackOptions,
        progress: &mut dyn FnMut(PackProgress),
    ) -> Result<(), PackError> {
        let files_total = listing.files.len() as u64;
        let order = Permutation::new(files_total, &[PACK_DOMAIN, options.seed]);
        let chosen = |place| {
            let chosen = usize::try_from(order.at(place)).expect("the order permutes the files");
            &listing.files[chosen]
        };
        let mut place = self.done.place;
        while place < files_total {
            let end = files_total.min(place + READ_AHEAD as u64);
            let files: Vec<_> = (place..end).map(chosen).collect();
            for (file, bytes) in files.iter().zip(scan::read_many(tree, &files)) {
                self.add_checked(tree, file, bytes?, place, options)?;
                place += 1;
                progress(PackProgress { files: place, files_total, bytes: self.done.bytes });
            }
        }
        Ok(())
    }

    /// Adds the file at `place` of the packing order if it is a whole image.
    fn add_checked(
        &mut self,
        tree: &Tree,
        file: &SourceFile,
        bytes: Vec<u8>,
        place: u64,
        options: &PackOptions,
    ) -> Result<(), PackError> {
        match self.checker.check(bytes, file.raw) {
            Ok(image) => {
                if self.is_full_for(&image) {
                    self.close_shard()?;
                    self.done.place = place;
                    self.done.save(self.store, self.split)?;
                }
                self.add(file, &image);
                Ok(())
            }
            Err(_) if options.on_corrupt == OnCorrupt::Skip => {
                self.done.skipped.push(file.name.clone());
                Ok(())
            }
            Err(fault) => Err(PackError::Corrupt { path: file.path(tree.root()), source: fault }),
        }
    }

    /// Whether the shard at hand has no room for another image.
    fn is_full_for(&self, image: &Image) -> bool {
        // Two headers, the padded image, the padded class index.
        let room = format::next_header(3 * format::BLOCK, u64::from(image.length));
        let grown = self.archive.len() as u64 + room + format::TRAILER;
        let full = self.records.len() == SHARD_SAMPLES_MAX || grown > SHARD_BYTES_MAX;
        full && !self.records.is_empty()
    }

    fn add(&mut self, file: &SourceFile, image: &Image) {
        let key = key(self.done.samples, Path::new(&file.name));
        let image_name = format!("{key}.{}", format::IMAGE);
        let offset = format::append_member(&mut self.archive, &image_name, &image.jpeg);
        let class_name = format!("{key}.{}", format::CLASS);
        format::append_member(&mut self.archive, &class_name, file.label.to_string().as_bytes());
        self.records.push(image.record(offset, file.label));
        self.done.samples += 1;
        self.done.bytes += u64::from(image.length);
        self.done.converted += u64::from(image.flags.has(Flags::RE_ENCODED));
        self.done.cmyk += u64::from(image.flags.has(Flags::CMYK));
        self.done.deep += u64::from(image.deep);
    }

    fn close_shard(&mut self) -> Result<(), PackError> {
        if self.records.is_empty() {
            return Ok(());
        }
        format::append_trailer(&mut self.archive);
        let archive = std::mem::take(&mut self.archive);
        let records = std::mem::take(&mut self.records);
        let samples = records.len() as u64;
        let tar_sha256 = Sha256::of(&archive);
        let index = Index { tar_length: archive.len() as u64, tar_sha256, records }.encode();
        let shard = Shard {
            name: format::shard_name(self.split, self.done.shards.len()),
            first: self.done.samples - samples,
            samples,
            tar_sha256,
            idx_sha256: Sha256::of(&index),
        };
        self.store.write(&shard.tar(), archive)?;
        self.store.write(&shard.idx(), index)?;
        self.done.shards.push(shard);
        Ok(())
    }
}

/// The sample's id, which makes it unique, and the source file's name, which makes it traceable.
/// WebDataset ends a key at the first dot, so it has none.
fn key(sample: u64, path: &Path) -> String {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let plain = |c: char| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' };
    let stem: String = stem.chars().map(plain).take(KEY_STEM_MAX).collect();
    format!("{sample:08}-{stem}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_short_and_without_dots() {
        assert_eq!(key(7, Path::new("a/n01440764_10026.JPEG")), "00000007-n01440764_10026");
        assert_eq!(key(8, Path::new("a/mein bild.v2.png")), "00000008-mein_bild_v2");
        let long = key(u64::MAX, Path::new(&"ü".repeat(200)));
        assert!(long.len() + ".jpg".len() <= 100, "{long}");
    }
}
