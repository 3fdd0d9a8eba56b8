//! What there is to pack: the images of a source, their names and their classes.
//!
//! A source is one of
//!
//! * an image folder, one folder a class: a class's index is the place of its name in sorted order;
//! * WebDataset tars, a folder of them or one: `KEY.jpg` with `KEY.cls`. The classes' names are the
//!   lines of `classes.txt` in the folder, or else the indices;
//! * ImageNet's training tar, or any tar of tars: one tar a class, named for it; or a folder of these;
//! * a tar of an image folder, in which an image's class is the folder it is in;
//! * a tar of images, as ImageNet's validation tar, with a text file beside it (`NAME.txt` for
//!   `NAME.tar`) that has a line `FILE CLASS` for each image;
//! * a file of raw pixels, as MNIST's and CIFAR's: see `raw`.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    fs::{self, File},
    io::{self, BufReader, Read, Seek, SeekFrom},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use super::{
    PackError,
    raw::{self, RawPixels},
};
use crate::format;

/// File extensions that are taken, in lower case. What a file is, its first bytes decide.
const EXTENSIONS: [&str; 3] = ["jpg", "jpeg", "png"];

/// Names of classes where a source has them.
const CLASSES_FILE: &str = "classes.txt";

/// One image of a source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SourceFile {
    /// Its path inside the source.
    pub(crate) name: String,
    pub(crate) label: u32,
    pub(crate) length: u64,
    /// The file that has its bytes.
    file: PathBuf,
    /// Where in that file they begin.
    offset: u64,
    /// What the bytes are if they are no encoded image.
    pub(crate) raw: Option<RawPixels>,
}

impl SourceFile {
    /// An image that is raw pixels in a file of many.
    pub(super) fn raw(
        name: String,
        label: u32,
        file: PathBuf,
        offset: u64,
        length: u64,
        pixels: RawPixels,
    ) -> Self {
        Self { name, label, length, file, offset, raw: Some(pixels) }
    }

    /// The path that a message names: for a member of a tar, as if the tar were a folder.
    pub(crate) fn path(&self, source: &Path) -> PathBuf {
        source.join(&self.name)
    }

    /// The file that has its bytes.
    pub(crate) fn file(&self) -> &Path {
        &self.file
    }

    /// Where in that file they begin.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    pub(crate) fn read(&self) -> Result<Vec<u8>, PackError> {
        let unread = |source| PackError::Read { path: self.file.clone(), source };
        let length =
            usize::try_from(self.length).map_err(|_| unread(io::ErrorKind::FileTooLarge.into()))?;
        let mut bytes = vec![0; length];
        let file = File::open(&self.file).map_err(unread)?;
        file.read_exact_at(&mut bytes, self.offset).map_err(unread)?;
        Ok(bytes)
    }
}

/// Class names and images, in an order that depends on the source alone.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Listing {
    pub(crate) classes: Vec<String>,
    pub(crate) files: Vec<SourceFile>,
}

pub(crate) fn scan(source: &Path) -> Result<Listing, PackError> {
    check_nearness(source)?;
    if let Some(listing) = raw::scan(source)? {
        return Ok(listing);
    }
    if source.is_file() {
        return scan_tars(source, &[source.to_owned()]);
    }
    let tars = tars_in(source)?;
    if tars.is_empty() { scan_folder(source) } else { scan_tars(source, &tars) }
}

/// The tars of a folder, all of which have to be of WebDataset's kind.
pub(crate) fn scan_webdataset(folder: &Path) -> Result<Listing, PackError> {
    check_nearness(folder)?;
    let listing = webdataset(folder, &list_tars(folder, &tars_in(folder)?)?)?;
    if listing.files.is_empty() {
        return Err(PackError::NoClasses(folder.to_owned()));
    }
    Ok(listing)
}

/// The images of a source of which nobody says the class: a file, a folder, a tar.
pub(crate) fn scan_unlabelled(source: &Path) -> Result<Vec<SourceFile>, PackError> {
    check_nearness(source)?;
    let mut files = Vec::new();
    if source.is_dir() {
        collect_images(source, source, 0, &mut files)?;
    } else if has_extension(source, "tar") {
        for tar in list_tars(source, &[source.to_owned()])? {
            let images = tar.files.iter().filter(|member| is_image(&member.name));
            files.extend(images.map(|member| tar.file(member, 0)));
        }
    } else {
        let unread = |error| PackError::Read { path: source.to_owned(), source: error };
        let length = fs::metadata(source).map_err(unread)?.len();
        let name = source.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let file = source.to_owned();
        files.push(SourceFile { name, label: 0, length, file, offset: 0, raw: None });
    }
    if files.is_empty() { Err(PackError::NoImages(source.to_owned())) } else { Ok(files) }
}

/// Packing reads a source in another order than that of its files, which a bucket is too slow for.
fn check_nearness(source: &Path) -> Result<(), PackError> {
    let is_far = source.to_str().is_some_and(|source| source.contains("://"));
    if is_far { Err(PackError::RemoteSource(source.to_owned())) } else { Ok(()) }
}

fn tars_in(folder: &Path) -> Result<Vec<PathBuf>, PackError> {
    let is_tar = |path: &PathBuf| path.is_file() && has_extension(path, "tar");
    Ok(sorted_entries(folder)?.into_iter().filter(is_tar).collect())
}

/// An image folder.
fn scan_folder(source: &Path) -> Result<Listing, PackError> {
    let folders: Vec<PathBuf> =
        sorted_entries(source)?.into_iter().filter(|path| path.is_dir()).collect();
    if folders.is_empty() {
        return Err(PackError::NoClasses(source.to_owned()));
    }
    let mut listing = Listing { classes: Vec::with_capacity(folders.len()), files: Vec::new() };
    for (label, folder) in (0..).zip(&folders) {
        let name = folder.file_name().and_then(OsStr::to_str);
        let name = name.ok_or_else(|| PackError::ClassName(folder.clone()))?;
        listing.classes.push(name.to_owned());
        let before = listing.files.len();
        collect_images(source, folder, label, &mut listing.files)?;
        if listing.files.len() == before {
            return Err(PackError::EmptyClass(folder.clone()));
        }
    }
    Ok(listing)
}

/// Images of a class folder and of the folders in it.
fn collect_images(
    source: &Path,
    folder: &Path,
    label: u32,
    files: &mut Vec<SourceFile>,
) -> Result<(), PackError> {
    for path in sorted_entries(folder)? {
        if path.is_dir() {
            collect_images(source, &path, label, files)?;
        } else if is_image(&path) {
            let unread = |source| PackError::Read { path: path.clone(), source };
            let length = fs::metadata(&path).map_err(unread)?.len();
            let name = path.strip_prefix(source).unwrap_or(&path).display().to_string();
            files.push(SourceFile { name, label, length, file: path, offset: 0, raw: None });
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

fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|found| found.eq_ignore_ascii_case(extension))
}

fn is_image(path: &Path) -> bool {
    EXTENSIONS.into_iter().any(|extension| has_extension(path, extension))
}

/// A plain file in a tar.
#[derive(Debug, Clone, PartialEq, Eq)]
struct TarFile {
    name: PathBuf,
    /// Of its first byte in the outermost file.
    offset: u64,
    length: u64,
}

/// The plain files of a tar, in its order, found by its headers alone.
fn list_tar(tar: &Path) -> io::Result<Vec<TarFile>> {
    let length = fs::metadata(tar)?.len();
    list_section(tar, 0, length)
}

/// The plain files of a tar that is itself a part of a file.
fn list_section(file: &Path, start: u64, length: u64) -> io::Result<Vec<TarFile>> {
    let section = Section { file: File::open(file)?, start, length, at: 0 };
    let mut archive = tar::Archive::new(BufReader::new(section));
    let mut members = Vec::new();
    for entry in archive.entries_with_seek()? {
        let entry = entry?;
        let kind = entry.header().entry_type();
        if kind.is_file() {
            let name = entry.path()?.into_owned();
            let (offset, size) = (start + entry.raw_file_position(), entry.size());
            if offset.checked_add(size).is_none_or(|end| end > start + length) {
                let message = format!("{} goes past the end of the tar", name.display());
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, message));
            }
            members.push(TarFile { name, offset, length: size });
        }
    }
    Ok(members)
}

/// A part of a file, read as if it were one.
struct Section {
    file: File,
    start: u64,
    length: u64,
    at: u64,
}

impl Read for Section {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.length.saturating_sub(self.at)).unwrap_or(usize::MAX);
        let room = buffer.len().min(left);
        let read = self.file.read_at(&mut buffer[..room], self.start + self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}

impl Seek for Section {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let (from, by) = match to {
            SeekFrom::Start(at) => (at, 0),
            SeekFrom::Current(by) => (self.at, by),
            SeekFrom::End(by) => (self.length, by),
        };
        self.at = from.checked_add_signed(by).ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}

/// One tar and what is in it.
struct Tar {
    path: PathBuf,
    /// Inside the source; empty if the tar is the source.
    name: String,
    files: Vec<TarFile>,
}

impl Tar {
    fn file(&self, member: &TarFile, label: u32) -> SourceFile {
        SourceFile {
            name: Path::new(&self.name).join(&member.name).display().to_string(),
            label,
            length: member.length,
            file: self.path.clone(),
            offset: member.offset,
            raw: None,
        }
    }

    fn unreadable(path: &Path) -> impl Fn(io::Error) -> PackError {
        move |source| PackError::Read { path: path.to_owned(), source }
    }
}

fn list_tars(source: &Path, paths: &[PathBuf]) -> Result<Vec<Tar>, PackError> {
    let mut tars = Vec::with_capacity(paths.len());
    for path in paths {
        let files = list_tar(path).map_err(Tar::unreadable(path))?;
        let name = path.strip_prefix(source).unwrap_or(path).display().to_string();
        tars.push(Tar { path: path.clone(), name, files });
    }
    Ok(tars)
}

fn scan_tars(source: &Path, paths: &[PathBuf]) -> Result<Listing, PackError> {
    let tars = list_tars(source, paths)?;
    let any = |holds: &dyn Fn(&Path) -> bool| {
        tars.iter().flat_map(|tar| &tar.files).any(|file| holds(&file.name))
    };
    let labels = |tar: &Tar| tar.path.with_extension("txt");
    let listing = if any(&|name| has_extension(name, format::CLASS)) {
        webdataset(source, &tars)?
    } else if any(&|name| has_extension(name, "tar")) {
        tars_of_tars(&tars)?
    } else if tars.iter().all(|tar| labels(tar).is_file()) {
        labelled(&tars, labels)?
    } else if source.is_dir() {
        by_class(tars)?
    } else {
        by_folder(&tars).ok_or_else(|| PackError::NoLabels {
            tar: source.to_owned(),
            labels: labels(&tars[0]),
        })?
    };
    if listing.files.is_empty() {
        return Err(PackError::NoClasses(source.to_owned()));
    }
    Ok(listing)
}

/// `KEY.jpg` with `KEY.cls`, in any order.
fn webdataset(source: &Path, tars: &[Tar]) -> Result<Listing, PackError> {
    let mut files = Vec::new();
    for tar in tars {
        let labels = read_labels(tar)?;
        for member in tar.files.iter().filter(|member| is_image(&member.name)) {
            let key = key_of(&member.name);
            let label = labels
                .get(&key)
                .ok_or_else(|| PackError::NoLabel { image: tar.path.join(&member.name) })?;
            files.push(tar.file(member, *label));
        }
    }
    let most = files.iter().map(|file| file.label).max().unwrap_or(0);
    let names = source.join(CLASSES_FILE);
    let classes = if names.is_file() {
        let text = fs::read_to_string(&names).map_err(Tar::unreadable(&names))?;
        let classes: Vec<String> = text.lines().map(str::to_owned).collect();
        if classes.len() <= most as usize {
            return Err(PackError::TooFewClasses { names, classes: classes.len(), label: most });
        }
        classes
    } else {
        (0..=most).map(|label| label.to_string()).collect()
    };
    Ok(Listing { classes, files })
}

/// The class indices of a WebDataset tar by key.
fn read_labels(tar: &Tar) -> Result<BTreeMap<String, u32>, PackError> {
    let unread = Tar::unreadable(&tar.path);
    let file = File::open(&tar.path).map_err(&unread)?;
    let mut labels = BTreeMap::new();
    for member in tar.files.iter().filter(|member| has_extension(&member.name, format::CLASS)) {
        let wrong = || PackError::Label { member: tar.path.join(&member.name) };
        // A class index is a few digits; anything longer is something else.
        let length = usize::try_from(member.length).ok().filter(|&length| length <= 32);
        let mut digits = vec![0; length.ok_or_else(wrong)?];
        file.read_exact_at(&mut digits, member.offset).map_err(&unread)?;
        let label = str::from_utf8(&digits).ok().and_then(|text| text.trim().parse().ok());
        labels.insert(key_of(&member.name), label.ok_or_else(wrong)?);
    }
    Ok(labels)
}

/// A WebDataset key: the path up to the first dot of its last part.
fn key_of(name: &Path) -> String {
    let file = name.file_name().unwrap_or_default().to_string_lossy();
    let stem = file.split_once('.').map_or(file.as_ref(), |(stem, _)| stem);
    name.with_file_name(stem).display().to_string()
}

/// One tar a class, inside other tars.
fn tars_of_tars(tars: &[Tar]) -> Result<Listing, PackError> {
    let mut inner = Vec::new();
    for tar in tars {
        for member in tar.files.iter().filter(|member| has_extension(&member.name, "tar")) {
            let files = list_section(&tar.path, member.offset, member.length)
                .map_err(Tar::unreadable(&tar.path.join(&member.name)))?;
            let name = tar.file(member, 0).name;
            inner.push(Tar { path: tar.path.clone(), name, files });
        }
    }
    by_class(inner)
}

/// One tar a class, named for it.
fn by_class(tars: Vec<Tar>) -> Result<Listing, PackError> {
    let mut classes = BTreeMap::new();
    for tar in tars {
        let class = Path::new(&tar.name).file_stem().and_then(OsStr::to_str).map(str::to_owned);
        let class = class.ok_or_else(|| PackError::ClassName(tar.path.clone()))?;
        let images = tar.files.iter().any(|member| is_image(&member.name));
        if !images || classes.contains_key(&class) {
            return Err(PackError::EmptyClass(tar.path.join(&tar.name)));
        }
        classes.insert(class, tar);
    }
    let mut files = Vec::new();
    for (label, tar) in (0..).zip(classes.values()) {
        let images = tar.files.iter().filter(|member| is_image(&member.name));
        files.extend(images.map(|member| tar.file(member, label)));
    }
    Ok(Listing { classes: classes.into_keys().collect(), files })
}

/// An image folder in a tar: an image's class is the folder that it is in. None if one is in no folder.
fn by_folder(tars: &[Tar]) -> Option<Listing> {
    let mut found = Vec::new();
    for tar in tars {
        for member in tar.files.iter().filter(|member| is_image(&member.name)) {
            let class = member.name.parent()?.file_name()?.to_str()?;
            found.push((class.to_owned(), tar.file(member, 0)));
        }
    }
    Some(in_sorted_classes(found))
}

/// Images without order, and text files that say their classes.
fn labelled(tars: &[Tar], labels: impl Fn(&Tar) -> PathBuf) -> Result<Listing, PackError> {
    let mut found = Vec::new();
    for tar in tars {
        let path = labels(tar);
        let text = fs::read_to_string(&path).map_err(Tar::unreadable(&path))?;
        let by_name: BTreeMap<&str, &str> =
            text.lines().filter_map(|line| line.trim().split_once(char::is_whitespace)).collect();
        for member in tar.files.iter().filter(|member| is_image(&member.name)) {
            let name = member.name.file_name().and_then(OsStr::to_str).unwrap_or_default();
            let class = by_name
                .get(name)
                .ok_or_else(|| PackError::NoLabel { image: tar.path.join(&member.name) })?;
            found.push((class.trim().to_owned(), tar.file(member, 0)));
        }
    }
    Ok(in_sorted_classes(found))
}

/// Images with their classes' names: a class's index is the place of its name in sorted order.
fn in_sorted_classes(found: Vec<(String, SourceFile)>) -> Listing {
    let classes: BTreeSet<&String> = found.iter().map(|(class, _)| class).collect();
    let classes: Vec<String> = classes.into_iter().cloned().collect();
    let mut files = Vec::with_capacity(found.len());
    for (class, mut file) in found {
        let label = classes.binary_search(&class).expect("every class is in the list of classes");
        file.label = u32::try_from(label).expect("no more classes than images, which have ids");
        files.push(file);
    }
    Listing { classes, files }
}
