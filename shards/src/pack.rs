//! Packing an image folder into shards.
//!
//! `SRC` has one folder a class; a class's index is the place of its folder's name in sorted order.
//! The samples are always shuffled, by a recorded seed, so that any run of neighbours is a fair sample.
//! Files are written under temporary names and renamed, the manifest last: a split that has a manifest
//! is complete, and one that has none is packed again from the start.

use std::{
    ffi::OsStr,
    fs,
    io::{self, Cursor},
    path::{Path, PathBuf},
};

use crate::{
    dataset::{OpenError, check_split_name},
    digest::Sha256,
    format::{self, SHARD_BYTES_MAX, SHARD_SAMPLES_MAX},
    index::{Flags, Index, Record},
    jpeg::{self, Chroma, Header, JpegError, Pixels},
    manifest::{Manifest, Policy, Provenance, Shard, VERSION},
    plan::Permutation,
    source::{SourceError, Store},
};

/// Keeps the packing order apart from other uses of the same seed.
const PACK_DOMAIN: u64 = u64::from_le_bytes(*b"pack/v1\0");

/// File extensions that are taken, in lower case. What a file is, its first bytes decide.
const EXTENSIONS: [&str; 3] = ["jpg", "jpeg", "png"];

/// JPEG quality for images that are not JPEG, see [`Policy`].
const CONVERTED_QUALITY: u8 = 100;

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
    /// A class folder has nothing to pack.
    #[error(
        "class folder {} has no .jpg, .jpeg or .png file: remove the folder or add its images",
        .0.display()
    )]
    EmptyClass(PathBuf),
    /// A class folder's name cannot be written in the manifest.
    #[error("the name of class folder {} is not UTF-8: rename it", .0.display())]
    ClassName(PathBuf),
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

/// What is wrong with a source file.
#[derive(Debug, thiserror::Error)]
pub enum CorruptImage {
    /// It starts neither as a JPEG nor as a PNG does.
    #[error("it is neither JPEG nor PNG")]
    UnknownFormat,
    /// A JPEG that libjpeg-turbo cannot decode, or not without a warning.
    #[error("it is a damaged JPEG")]
    Jpeg(#[from] JpegError),
    /// A PNG that cannot be decoded.
    #[error("it is a damaged PNG")]
    Png(#[from] png::DecodingError),
    /// More pixels or bytes than a shard's index can state.
    #[error(
        "{width}x{height} pixels in {bytes} bytes: a side is above 65535 or the file too large"
    )]
    TooLarge {
        /// Columns.
        width: usize,
        /// Rows.
        height: usize,
        /// Length of the encoded image.
        bytes: usize,
    },
}

/// Packs the image folder `source` as a split of the dataset at `out`, and returns its manifest.
///
/// JPEG files are kept byte for byte after they have been decoded once as a check. PNG files are
/// converted, see [`Policy`]. Other files are ignored. Equal sources and options give equal files.
///
/// # Errors
/// [`PackError`]. A manifest that exists is never overwritten; after an error there is none.
pub fn pack(
    source: &Path,
    out: &str,
    options: &PackOptions,
    progress: &mut dyn FnMut(PackProgress),
) -> Result<Manifest, PackError> {
    check_split_name(&options.split)?;
    let (classes, files) = scan(source)?;
    let store = Store::create(out)?;
    let manifest_name = format!("{}.json", options.split);
    if store.length(&manifest_name).is_ok() {
        return Err(PackError::AlreadyPacked { manifest: store.display(&manifest_name) });
    }
    let mut packer = Packer::new(&store, &options.split);
    let skipped = packer.add_all(source, &files, options, progress)?;
    packer.close_shard()?;
    if packer.samples == 0 {
        return Err(PackError::NothingLeft { path: source.to_owned(), files: files.len() });
    }
    let manifest = Manifest {
        version: VERSION,
        split: options.split.clone(),
        samples: packer.samples,
        classes,
        provenance: Provenance {
            source: options.source.clone().unwrap_or_else(|| folder_name(source)),
            seed: options.seed,
            policy: Policy::KeepJpegConvertPngQuality100,
            converted: packer.converted,
            skipped,
            attribution: options.attribution.clone(),
            licence: options.licence.clone(),
        },
        shards: packer.shards,
    };
    match store.write_new(&manifest_name, manifest.encode()) {
        Err(SourceError::Exists { file }) => Err(PackError::AlreadyPacked { manifest: file }),
        written => Ok(written.map(|()| manifest)?),
    }
}

fn folder_name(folder: &Path) -> String {
    let name = folder.file_name().unwrap_or(folder.as_os_str());
    name.to_string_lossy().into_owned()
}

#[derive(Debug, PartialEq, Eq)]
struct SourceFile {
    path: PathBuf,
    label: u32,
}

/// Class names and files, both sorted by name.
fn scan(source: &Path) -> Result<(Vec<String>, Vec<SourceFile>), PackError> {
    let folders: Vec<PathBuf> =
        sorted_entries(source)?.into_iter().filter(|path| path.is_dir()).collect();
    if folders.is_empty() {
        return Err(PackError::NoClasses(source.to_owned()));
    }
    let mut classes = Vec::with_capacity(folders.len());
    let mut files = Vec::new();
    for (label, folder) in (0..).zip(&folders) {
        let name = folder.file_name().and_then(OsStr::to_str);
        classes.push(name.ok_or_else(|| PackError::ClassName(folder.clone()))?.to_owned());
        let before = files.len();
        collect_images(folder, label, &mut files)?;
        if files.len() == before {
            return Err(PackError::EmptyClass(folder.clone()));
        }
    }
    Ok((classes, files))
}

/// Images of a class folder and of the folders in it.
fn collect_images(folder: &Path, label: u32, files: &mut Vec<SourceFile>) -> Result<(), PackError> {
    for path in sorted_entries(folder)? {
        if path.is_dir() {
            collect_images(&path, label, files)?;
        } else if is_image(&path) {
            files.push(SourceFile { path, label });
        }
    }
    Ok(())
}

/// What a folder holds, by name, without hidden entries.
fn sorted_entries(folder: &Path) -> Result<Vec<PathBuf>, PackError> {
    let unread = |source| PackError::Read { path: folder.to_owned(), source };
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).map_err(unread)? {
        let path = entry.map_err(unread)?.path();
        let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes()[0] == b'.');
        if !hidden {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

fn is_image(path: &Path) -> bool {
    let extension = path.extension().and_then(OsStr::to_str).unwrap_or_default();
    EXTENSIONS.contains(&extension.to_ascii_lowercase().as_str())
}

fn read_file(path: &Path) -> Result<Vec<u8>, PackError> {
    fs::read(path).map_err(|source| PackError::Read { path: path.to_owned(), source })
}

/// An image as it goes into a shard.
#[derive(Debug)]
struct Image {
    jpeg: Vec<u8>,
    length: u32,
    width: u16,
    height: u16,
    flags: Flags,
}

/// Checks source files by decoding them.
#[derive(Debug, Default)]
struct Checker {
    pixels: Vec<u8>,
}

impl Checker {
    fn check(&mut self, contents: Vec<u8>) -> Result<Image, CorruptImage> {
        if contents.starts_with(b"\xFF\xD8") {
            self.check_jpeg(contents, Flags::default())
        } else if contents.starts_with(b"\x89PNG") {
            self.check_jpeg(png_to_jpeg(&contents)?, Flags::RE_ENCODED)
        } else {
            Err(CorruptImage::UnknownFormat)
        }
    }

    fn check_jpeg(&mut self, jpeg: Vec<u8>, flags: Flags) -> Result<Image, CorruptImage> {
        let header = jpeg::decode(&jpeg, &mut self.pixels)?;
        let too_large = CorruptImage::TooLarge {
            width: header.width,
            height: header.height,
            bytes: jpeg.len(),
        };
        let sides = (u16::try_from(header.width), u16::try_from(header.height));
        let (Ok(length), (Ok(width), Ok(height))) = (u32::try_from(jpeg.len()), sides) else {
            return Err(too_large);
        };
        let flags = flags.with(flags_of(&header));
        Ok(Image { jpeg, length, width, height, flags })
    }
}

/// What an image's header says, as the flags of its record.
pub(crate) fn flags_of(header: &Header) -> Flags {
    let chroma = match header.chroma {
        Chroma::Full => Flags::CHROMA_444,
        Chroma::HalfWidth => Flags::CHROMA_422,
        Chroma::Half => Flags::CHROMA_420,
        Chroma::Grey => Flags::GREY,
        Chroma::Other => Flags::CHROMA_OTHER,
    };
    if header.cmyk { chroma.with(Flags::CMYK) } else { chroma }
}

/// Decodes a PNG to eight bits, drops its alpha and encodes it at the highest quality.
fn png_to_jpeg(contents: &[u8]) -> Result<Vec<u8>, CorruptImage> {
    let mut decoder = png::Decoder::new(Cursor::new(contents));
    decoder.set_transformations(png::Transformations::EXPAND | png::Transformations::STRIP_16);
    let mut reader = decoder.read_info()?;
    let (width, height) = (reader.info().width as usize, reader.info().height as usize);
    let Some(room) = reader.output_buffer_size().filter(|_| width * height <= jpeg::PIXELS_MAX)
    else {
        return Err(CorruptImage::TooLarge { width, height, bytes: contents.len() });
    };
    let mut decoded = vec![0; room];
    let frame = reader.next_frame(&mut decoded)?;
    decoded.truncate(frame.buffer_size());
    let (pixels, layout) = match frame.color_type {
        png::ColorType::Grayscale => (decoded, Pixels::Grey),
        png::ColorType::GrayscaleAlpha => (without_last_of(2, &decoded), Pixels::Grey),
        png::ColorType::Rgba => (without_last_of(4, &decoded), Pixels::Rgb),
        png::ColorType::Rgb | png::ColorType::Indexed => (decoded, Pixels::Rgb),
    };
    Ok(jpeg::encode(&pixels, width, height, layout, CONVERTED_QUALITY)?)
}

/// Pixels of `channels` bytes without the last, which is alpha.
fn without_last_of(channels: usize, pixels: &[u8]) -> Vec<u8> {
    pixels.chunks_exact(channels).flat_map(|pixel| &pixel[..channels - 1]).copied().collect()
}

/// Writes shards, one after another. A shard is built in memory.
#[derive(Debug)]
struct Packer<'a> {
    store: &'a Store,
    split: &'a str,
    checker: Checker,
    archive: Vec<u8>,
    records: Vec<Record>,
    shards: Vec<Shard>,
    samples: u64,
    converted: u64,
}

impl<'a> Packer<'a> {
    fn new(store: &'a Store, split: &'a str) -> Self {
        Self {
            store,
            split,
            checker: Checker::default(),
            archive: Vec::new(),
            records: Vec::new(),
            shards: Vec::new(),
            samples: 0,
            converted: 0,
        }
    }

    /// Adds every file, in the order that the seed chooses, and returns those that were left out.
    fn add_all(
        &mut self,
        source: &Path,
        files: &[SourceFile],
        options: &PackOptions,
        progress: &mut dyn FnMut(PackProgress),
    ) -> Result<Vec<String>, PackError> {
        let files_total = files.len() as u64;
        let order = Permutation::new(files_total, &[PACK_DOMAIN, options.seed]);
        let mut skipped = Vec::new();
        let mut bytes = 0;
        for place in 0..files_total {
            let chosen = usize::try_from(order.at(place)).expect("the order permutes the files");
            let file = &files[chosen];
            match self.checker.check(read_file(&file.path)?) {
                Ok(image) => {
                    bytes += u64::from(image.length);
                    self.add(file, &image)?;
                }
                Err(_) if options.on_corrupt == OnCorrupt::Skip => {
                    let path = file.path.strip_prefix(source).unwrap_or(&file.path);
                    skipped.push(path.display().to_string());
                }
                Err(fault) => {
                    return Err(PackError::Corrupt { path: file.path.clone(), source: fault });
                }
            }
            progress(PackProgress { files: place + 1, files_total, bytes });
        }
        skipped.sort();
        Ok(skipped)
    }

    fn add(&mut self, file: &SourceFile, image: &Image) -> Result<(), PackError> {
        // Two headers, the padded image, the padded class index.
        let room = format::next_header(3 * format::BLOCK, u64::from(image.length));
        let grown = self.archive.len() as u64 + room + format::TRAILER;
        let full = self.records.len() == SHARD_SAMPLES_MAX || grown > SHARD_BYTES_MAX;
        if full && !self.records.is_empty() {
            self.close_shard()?;
        }
        let key = key(self.samples, &file.path);
        let image_name = format!("{key}.{}", format::IMAGE);
        let offset = format::append_member(&mut self.archive, &image_name, &image.jpeg);
        let class_name = format!("{key}.{}", format::CLASS);
        format::append_member(&mut self.archive, &class_name, file.label.to_string().as_bytes());
        self.records.push(Record {
            offset,
            length: image.length,
            label: file.label,
            crc32c: crc32c::crc32c(&image.jpeg),
            width: image.width,
            height: image.height,
            flags: image.flags,
        });
        self.samples += 1;
        self.converted += u64::from(image.flags.has(Flags::RE_ENCODED));
        Ok(())
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
            name: format::shard_name(self.split, self.shards.len()),
            first: self.samples - samples,
            samples,
            tar_sha256,
            idx_sha256: Sha256::of(&index),
        };
        self.store.write(&shard.tar(), archive)?;
        self.store.write(&shard.idx(), index)?;
        self.shards.push(shard);
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

    #[test]
    fn alpha_is_dropped() {
        assert_eq!(without_last_of(4, &[1, 2, 3, 4, 5, 6, 7, 8]), [1, 2, 3, 5, 6, 7]);
        assert_eq!(without_last_of(2, &[1, 2, 3, 4]), [1, 3]);
    }
}
