//! Sources whose images are raw pixels, many in a file: MNIST's idx files and CIFAR's binary files.
//!
//! * MNIST: the file `…images-idx3-ubyte`, with `…labels-idx1-ubyte` beside it. Classes are the labels
//!   in decimal.
//! * CIFAR-10 and CIFAR-100: one of their `.bin` files, or their folder for all that is trained on. The
//!   names of the classes are those of `batches.meta.txt` or `fine_label_names.txt` beside them.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
};

use super::{
    PackError,
    scan::{Listing, SourceFile},
    tree::Tree,
};

/// How the pixels of one image lie in their file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RawPixels {
    pub(crate) width: usize,
    pub(crate) height: usize,
    pub(crate) layout: Layout,
}

/// The order of the bytes of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    /// `[height, width]`.
    Grey,
    /// `[3, height, width]`.
    Planes,
}

const IDX_IMAGES: &str = "images";
const IDX_LABELS: &str = "labels";

/// Bytes of a CIFAR image, after its one or two labels.
const CIFAR_SIDE: usize = 32;
const CIFAR_PIXELS: u64 = 3 * 32 * 32;

/// The images of a source if it is of one of these kinds.
pub(super) fn scan(tree: &Tree) -> Result<Option<Listing>, PackError> {
    let source = tree.root();
    if tree.is_file(source) {
        let name = source.file_name().and_then(OsStr::to_str).unwrap_or_default();
        if name.ends_with("idx3-ubyte") {
            return idx(tree, source, name).map(Some);
        }
        if name.ends_with(".bin") {
            let folder = source.parent().unwrap_or(Path::new(""));
            return cifar(tree, folder, &[source.to_owned()]).map(Some);
        }
        return Ok(None);
    }
    let of_ten = (1..=5).map(|number| source.join(format!("data_batch_{number}.bin")));
    let of_ten: Vec<PathBuf> = of_ten.filter(|path| tree.is_file(path)).collect();
    let of_hundred = source.join("train.bin");
    match (of_ten.is_empty(), tree.is_file(&of_hundred)) {
        (false, _) => cifar(tree, source, &of_ten).map(Some),
        (true, true) => cifar(tree, source, &[of_hundred]).map(Some),
        (true, false) => Ok(None),
    }
}

fn read(tree: &Tree, path: &Path) -> Result<Vec<u8>, PackError> {
    tree.read_whole(path).map_err(|error| PackError::unread(path, error))
}

/// The numbers at the start of an idx file: its sizes, after a magic number that says how many.
fn idx_sizes<const SIZES: usize>(path: &Path, bytes: &[u8]) -> Result<[usize; SIZES], PackError> {
    let malformed =
        || PackError::Malformed { path: path.to_owned(), format: "an idx file of bytes" };
    let (words, _) = bytes.get(..4 * (SIZES + 1)).ok_or_else(malformed)?.as_chunks::<4>();
    let mut words = words.iter().map(|&word| u32::from_be_bytes(word));
    let dimensions = u32::try_from(SIZES).expect("a few dimensions");
    if words.next() != Some(0x0800 | dimensions) {
        return Err(malformed());
    }
    let mut sizes = [0; SIZES];
    for (size, word) in sizes.iter_mut().zip(words) {
        *size = usize::try_from(word).map_err(|_| malformed())?;
    }
    let total = sizes.iter().try_fold(1_usize, |total, &size| total.checked_mul(size));
    let fits = total.and_then(|total| total.checked_add(4 * (SIZES + 1))) == Some(bytes.len());
    if fits && sizes.iter().all(|&size| size > 0) { Ok(sizes) } else { Err(malformed()) }
}

fn idx(tree: &Tree, images: &Path, name: &str) -> Result<Listing, PackError> {
    let beside = name.replacen(IDX_IMAGES, IDX_LABELS, 1).replace("idx3", "idx1");
    let labels = images.with_file_name(beside);
    let [count, height, width] = idx_sizes(images, &read(tree, images)?)?;
    let labels_bytes = read(tree, &labels)?;
    let [labelled] = idx_sizes(&labels, &labels_bytes)?;
    if labelled != count {
        return Err(PackError::Malformed { path: labels, format: "as many labels as images" });
    }
    let pixels = RawPixels { width, height, layout: Layout::Grey };
    let length = (width * height) as u64;
    let mut files = Vec::with_capacity(count);
    for (number, &label) in (0..).zip(&labels_bytes[8..]) {
        let name = format!("{number:06}");
        let offset = 16 + number * length;
        files.push(SourceFile::raw(name, label.into(), images.to_owned(), offset, length, pixels));
    }
    let most = labels_bytes[8..].iter().max().copied().unwrap_or(0);
    let classes = (0..=most).map(|label| label.to_string()).collect();
    Ok(Listing { classes, files })
}

fn cifar(tree: &Tree, folder: &Path, paths: &[PathBuf]) -> Result<Listing, PackError> {
    let pixels = RawPixels { width: CIFAR_SIDE, height: CIFAR_SIDE, layout: Layout::Planes };
    let mut files = Vec::new();
    let mut hundred = false;
    for path in paths {
        let malformed = || PackError::Malformed { path: path.clone(), format: "a file of CIFAR's" };
        let bytes = read(tree, path)?;
        let stem = path.file_stem().and_then(OsStr::to_str).unwrap_or_default();
        hundred = matches!(stem, "train" | "test");
        // CIFAR-100 has the coarse class and then the fine one, which is the one that is meant.
        let labels = if hundred { 2 } else { 1 };
        let record = labels + CIFAR_PIXELS;
        if bytes.is_empty() || !(bytes.len() as u64).is_multiple_of(record) {
            return Err(malformed());
        }
        let most = if hundred { 99 } else { 9 };
        let size = usize::try_from(record).expect("a few thousand bytes");
        for (number, record_bytes) in (0_u64..).zip(bytes.chunks_exact(size)) {
            let label = record_bytes[if hundred { 1 } else { 0 }];
            if label > most {
                return Err(malformed());
            }
            let name = format!("{stem}-{number:05}");
            let offset = number * record + labels;
            let file =
                SourceFile::raw(name, label.into(), path.clone(), offset, CIFAR_PIXELS, pixels);
            files.push(file);
        }
    }
    let (names, count) =
        if hundred { ("fine_label_names.txt", 100) } else { ("batches.meta.txt", 10) };
    let names = folder.join(names);
    let classes: Vec<String> = if tree.is_file(&names) {
        let text = read(tree, &names)?;
        let text = String::from_utf8_lossy(&text).into_owned();
        text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect()
    } else {
        (0..count).map(|label| label.to_string()).collect()
    };
    if classes.len() != count {
        return Err(PackError::Malformed { path: names, format: "a name a line for each class" });
    }
    Ok(Listing { classes, files })
}

/// Pixels of three planes, interleaved.
pub(super) fn interleaved(planes: &[u8]) -> Vec<u8> {
    let pixels = planes.len() / 3;
    (0..pixels).flat_map(|at| [planes[at], planes[pixels + at], planes[2 * pixels + at]]).collect()
}
