//! From a packed split back to an image folder.

use std::{
    fs, io,
    path::{Component, Path, PathBuf},
};

use crate::dataset::{Dataset, OpenError, ReadError};

/// A split that cannot be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// The split cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A sample is damaged.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// A class's name cannot be the name of a folder.
    #[error("class {name:?} cannot be a folder: its name has to be one part of a path")]
    ClassName {
        /// The name.
        name: String,
    },
    /// A file or folder cannot be made, or is already there.
    #[error("{} cannot be written", .path.display())]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Writes every sample of the split `split` at `location` to `out/CLASS/KEY.jpg`, as it is stored, and
/// returns how many there are. `progress` is told after each sample. Files are never overwritten.
///
/// # Errors
/// [`UnpackError`] names what cannot be read or written.
pub fn unpack(
    location: &str,
    split: &str,
    out: &Path,
    progress: &mut dyn FnMut(u64),
) -> Result<u64, UnpackError> {
    let dataset = Dataset::open(location, split)?;
    let mut folders = Vec::with_capacity(dataset.classes().len());
    for class in dataset.classes() {
        let mut parts = Path::new(class).components();
        let single = matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None));
        if !single {
            return Err(UnpackError::ClassName { name: class.clone() });
        }
        let path = out.join(class);
        fs::create_dir_all(&path)
            .map_err(|source| UnpackError::Write { path: path.clone(), source })?;
        folders.push(path);
    }
    let mut image = Vec::new();
    for sample in 0..dataset.len() {
        let label = dataset.read_into(sample, &mut image)?;
        let path = folders[label as usize].join(file_name(&dataset.key_of(sample)));
        let unwritten = |source| UnpackError::Write { path: path.clone(), source };
        let mut file = fs::File::create_new(&path).map_err(unwritten)?;
        io::Write::write_all(&mut file, &image).map_err(unwritten)?;
        progress(sample + 1);
    }
    Ok(dataset.len())
}

/// A key may be a path in a foreign archive.
fn file_name(key: &str) -> String {
    let plain = |c: char| if c == '/' || c == '\0' { '_' } else { c };
    format!("{}.jpg", key.chars().map(plain).collect::<String>())
}
