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
//!
//! Each is on this machine or in a bucket: see `tree`.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    io,
    ops::Range,
    path::{Path, PathBuf},
};

use super::{
    PackError,
    raw::{self, RawPixels},
    tree::{Section, Tree},
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

    /// Where in that file they are.
    fn range(&self) -> Range<u64> {
        self.offset..self.offset.saturating_add(self.length)
    }
}

/// The bytes of images, in their order; from a bucket several come at a time.
pub(crate) fn read_many(
    tree: &Tree,
    files: &[&SourceFile],
) -> impl Iterator<Item = Result<Vec<u8>, PackError>> + use<> {
    let read = tree.read_many(files.iter().map(|file| (file.file(), file.range())));
    let paths: Vec<PathBuf> = files.iter().map(|file| file.file.clone()).collect();
    read.into_iter()
        .zip(paths)
        .map(|(read, path)| read.map_err(|error| PackError::unread(&path, error)))
}

/// Class names and images, in an order that depends on the source alone.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Listing {
    pub(crate) classes: Vec<String>,
    pub(crate) files: Vec<SourceFile>,
}

pub(crate) fn scan(tree: &Tree) -> Result<Listing, PackError> {
    if let Some(listing) = raw::scan(tree)? {
        return Ok(listing);
    }
    if tree.is_file(tree.root()) {
        return scan_tars(tree, &[tree.root().to_owned()]);
    }
    let tars = tars_in(tree)?;
    if tars.is_empty() { scan_folder(tree) } else { scan_tars(tree, &tars) }
}

/// The tars of a folder, all of which have to be of WebDataset's kind.
pub(crate) fn scan_webdataset(tree: &Tree) -> Result<Listing, PackError> {
    let listing = webdataset(tree, &list_tars(tree, &tars_in(tree)?)?)?;
    if listing.files.is_empty() {
        return Err(PackError::NoClasses(tree.root().to_owned()));
    }
    Ok(listing)
}

fn tars_in(tree: &Tree) -> Result<Vec<PathBuf>, PackError> {
    let is_tar = |path: &PathBuf| has_extension(path, "tar") && tree.is_file(path);
    Ok(entries(tree, tree.root())?.into_iter().filter(is_tar).collect())
}

/// The images of a source of which nobody says the class: a file, a folder, a tar.
pub(crate) fn scan_unlabelled(tree: &Tree) -> Result<Vec<SourceFile>, PackError> {
    let root = tree.root();
    let mut files = Vec::new();
    if tree.is_dir(root) {
        collect_images(tree, root, 0, &mut files)?;
    } else if has_extension(root, "tar") {
        for tar in list_tars(tree, &[root.to_owned()])? {
            let images = tar.files.iter().filter(|member| is_image(&member.name));
            files.extend(images.map(|member| tar.file(member, 0)));
        }
    } else {
        let length = tree.length(root).map_err(|error| PackError::unread(root, error))?;
        let name = root.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let file = root.to_owned();
        files.push(SourceFile { name, label: 0, length, file, offset: 0, raw: None });
    }
    if files.is_empty() { Err(PackError::NoImages(root.to_owned())) } else { Ok(files) }
}

fn entries(tree: &Tree, folder: &Path) -> Result<Vec<PathBuf>, PackError> {
    tree.entries(folder).map_err(|error| PackError::unread(folder, error))
}

/// An image folder.
fn scan_folder(tree: &Tree) -> Result<Listing, PackError> {
    let folders: Vec<PathBuf> =
        entries(tree, tree.root())?.into_iter().filter(|path| tree.is_dir(path)).collect();
    if folders.is_empty() {
        return Err(PackError::NoClasses(tree.root().to_owned()));
    }
    let mut listing = Listing { classes: Vec::with_capacity(folders.len()), files: Vec::new() };
    for (label, folder) in (0..).zip(&folders) {
        let name = folder.file_name().and_then(OsStr::to_str);
        let name = name.ok_or_else(|| PackError::ClassName(folder.clone()))?;
        listing.classes.push(name.to_owned());
        let before = listing.files.len();
        collect_images(tree, folder, label, &mut listing.files)?;
        if listing.files.len() == before {
            return Err(PackError::EmptyClass(folder.clone()));
        }
    }
    Ok(listing)
}

/// Images of a class folder and of the folders in it.
fn collect_images(
    tree: &Tree,
    folder: &Path,
    label: u32,
    files: &mut Vec<SourceFile>,
) -> Result<(), PackError> {
    for path in entries(tree, folder)? {
        if tree.is_dir(&path) {
            collect_images(tree, &path, label, files)?;
        } else if is_image(&path) {
            let length = tree.length(&path).map_err(|error| PackError::unread(&path, error))?;
            let name = path.strip_prefix(tree.root()).unwrap_or(&path).display().to_string();
            files.push(SourceFile { name, label, length, file: path, offset: 0, raw: None });
        }
    }
    Ok(())
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
fn list_tar(tree: &Tree, tar: &Path) -> io::Result<Vec<TarFile>> {
    list_section(tree, tar, 0, tree.length(tar)?)
}

/// The plain files of a tar that is itself a part of a file.
fn list_section(tree: &Tree, file: &Path, start: u64, length: u64) -> io::Result<Vec<TarFile>> {
    let mut archive = tar::Archive::new(Section::new(tree, file, start, length));
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
}

fn list_tars(tree: &Tree, paths: &[PathBuf]) -> Result<Vec<Tar>, PackError> {
    let mut tars = Vec::with_capacity(paths.len());
    for path in paths {
        let files = list_tar(tree, path).map_err(|error| PackError::unread(path, error))?;
        let name = path.strip_prefix(tree.root()).unwrap_or(path).display().to_string();
        tars.push(Tar { path: path.clone(), name, files });
    }
    Ok(tars)
}

fn scan_tars(tree: &Tree, paths: &[PathBuf]) -> Result<Listing, PackError> {
    let tars = list_tars(tree, paths)?;
    let any = |holds: &dyn Fn(&Path) -> bool| {
        tars.iter().flat_map(|tar| &tar.files).any(|file| holds(&file.name))
    };
    let labels = |tar: &Tar| tar.path.with_extension("txt");
    let listing = if any(&|name| has_extension(name, format::CLASS)) {
        webdataset(tree, &tars)?
    } else if any(&|name| has_extension(name, "tar")) {
        tars_of_tars(tree, &tars)?
    } else if tars.iter().all(|tar| tree.is_file(&labels(tar))) {
        labelled(tree, &tars, labels)?
    } else if tree.is_dir(tree.root()) {
        by_class(tars)?
    } else {
        by_folder(&tars).ok_or_else(|| PackError::NoLabels {
            tar: tree.root().to_owned(),
            labels: labels(&tars[0]),
        })?
    };
    if listing.files.is_empty() {
        return Err(PackError::NoClasses(tree.root().to_owned()));
    }
    Ok(listing)
}

/// `KEY.jpg` with `KEY.cls`, in any order.
fn webdataset(tree: &Tree, tars: &[Tar]) -> Result<Listing, PackError> {
    let mut files = Vec::new();
    for tar in tars {
        let labels = read_labels(tree, tar)?;
        for member in tar.files.iter().filter(|member| is_image(&member.name)) {
            let key = key_of(&member.name);
            let label = labels
                .get(&key)
                .ok_or_else(|| PackError::NoLabel { image: tar.path.join(&member.name) })?;
            files.push(tar.file(member, *label));
        }
    }
    let most = files.iter().map(|file| file.label).max().unwrap_or(0);
    let names = tree.root().join(CLASSES_FILE);
    let classes = if tree.is_file(&names) {
        let text = read_text(tree, &names)?;
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

fn read_text(tree: &Tree, path: &Path) -> Result<String, PackError> {
    let bytes = tree.read_whole(path).map_err(|error| PackError::unread(path, error))?;
    String::from_utf8(bytes)
        .map_err(|_| PackError::Malformed { path: path.to_owned(), format: "a text in UTF-8" })
}

/// The class indices of a WebDataset tar by key.
fn read_labels(tree: &Tree, tar: &Tar) -> Result<BTreeMap<String, u32>, PackError> {
    let is_class = |member: &&TarFile| has_extension(&member.name, format::CLASS);
    let wrong = |member: &TarFile| PackError::Label { member: tar.path.join(&member.name) };
    // A class index is a few digits; anything longer is something else.
    if let Some(long) = tar.files.iter().filter(is_class).find(|member| member.length > 32) {
        return Err(wrong(long));
    }
    let part =
        |member: &TarFile| (tar.path.as_path(), member.offset..member.offset + member.length);
    let texts = tree.read_many(tar.files.iter().filter(is_class).map(part));
    let mut labels = BTreeMap::new();
    for (member, digits) in tar.files.iter().filter(is_class).zip(texts) {
        let digits = digits.map_err(|error| PackError::unread(&tar.path, error))?;
        let label = str::from_utf8(&digits).ok().and_then(|text| text.trim().parse().ok());
        labels.insert(key_of(&member.name), label.ok_or_else(|| wrong(member))?);
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
fn tars_of_tars(tree: &Tree, tars: &[Tar]) -> Result<Listing, PackError> {
    let mut inner = Vec::new();
    for tar in tars {
        for member in tar.files.iter().filter(|member| has_extension(&member.name, "tar")) {
            let files = list_section(tree, &tar.path, member.offset, member.length)
                .map_err(|error| PackError::unread(&tar.path.join(&member.name), error))?;
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
fn labelled(
    tree: &Tree,
    tars: &[Tar],
    labels: impl Fn(&Tar) -> PathBuf,
) -> Result<Listing, PackError> {
    let mut found = Vec::new();
    for tar in tars {
        let path = labels(tar);
        let text = read_text(tree, &path)?;
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
