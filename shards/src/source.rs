//! Where the files of a dataset are: a folder, or the program itself.
//!
//! A location is one of
//!
//! * `PATH` or `file://PATH`: a folder of the local file system;
//! * `builtin:digits`: the handwritten digits that are part of this crate (`datasets/digits`).
//!
//! Both do their work on the calling thread, so nothing here needs an async runtime.

use std::{
    fmt,
    fs::{self, File},
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path as FilePath, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use futures::executor::block_on;
use object_store::{
    ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload, local::LocalFileSystem,
    memory::InMemory, path::Path,
};

/// The dataset that the program carries, file by file.
const DIGITS: [(&str, &[u8]); 6] = [
    ("train.json", include_bytes!("../datasets/digits/train.json")),
    ("train-000000.idx", include_bytes!("../datasets/digits/train-000000.idx")),
    ("train-000000.tar", include_bytes!("../datasets/digits/train-000000.tar")),
    ("val.json", include_bytes!("../datasets/digits/val.json")),
    ("val-000000.idx", include_bytes!("../datasets/digits/val-000000.idx")),
    ("val-000000.tar", include_bytes!("../datasets/digits/val-000000.tar")),
];

/// A location that cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// There is no such folder.
    #[error(
        "there is no dataset folder {location}: give the folder that \
         `percheron shards pack SRC --out {location}` wrote, or `builtin:digits`"
    )]
    NoFolder {
        /// The location as given.
        location: String,
    },
    /// The folder cannot be made.
    #[error("folder {location} cannot be made")]
    CreateFolder {
        /// The location as given.
        location: String,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// Nothing is built in under this name.
    #[error("there is no built-in dataset {name:?}: there is only `builtin:digits`")]
    NoBuiltin {
        /// What follows `builtin:`.
        name: String,
    },
    /// The program is not a place to write to.
    #[error("{location} cannot be written: give a folder")]
    ReadOnly {
        /// The location as given.
        location: String,
    },
    /// A scheme without a reader.
    #[error("location {location} is of an unknown kind: give a folder or `builtin:digits`")]
    UnknownScheme {
        /// The location as given.
        location: String,
    },
    /// There is no such file.
    #[error("file {file} is missing")]
    Missing {
        /// The file with its location.
        file: String,
    },
    /// There already is such a file.
    #[error("file {file} already exists")]
    Exists {
        /// The file with its location.
        file: String,
    },
    /// The file cannot be read.
    #[error("file {file} cannot be read")]
    Read {
        /// The file with its location.
        file: String,
        /// Why not.
        #[source]
        source: object_store::Error,
    },
    /// The file cannot be written.
    #[error("file {file} cannot be written")]
    Write {
        /// The file with its location.
        file: String,
        /// Why not.
        #[source]
        source: object_store::Error,
    },
}

/// The files at one location. Usable from any thread.
#[derive(Clone)]
pub(crate) struct Store {
    location: String,
    objects: Arc<dyn ObjectStore>,
    shortcut: Shortcut,
}

/// How the files can be reached without the object store, which allocates for each read.
#[derive(Debug, Clone)]
enum Shortcut {
    Folder(PathBuf),
    Builtin(&'static [(&'static str, &'static [u8])]),
}

/// A file that is read again and again.
#[derive(Debug)]
pub(crate) enum Opened {
    /// Opened for each read: a dataset may have more shards than a process may have open files.
    File(PathBuf),
    Builtin(&'static [u8]),
}

impl Opened {
    /// Fills `bytes` from `offset` on. `None` if that cannot be done, for whatever reason: the
    /// store's own read says which.
    pub(crate) fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Option<()> {
        match self {
            Self::File(path) => File::open(path).ok()?.read_exact_at(bytes, offset).ok(),
            Self::Builtin(contents) => {
                let rest = contents.get(usize::try_from(offset).ok()?..)?;
                bytes.copy_from_slice(rest.get(..bytes.len())?);
                Some(())
            }
        }
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Store").field(&self.location).finish()
    }
}

impl Store {
    /// For reading. The location must exist.
    pub(crate) fn open(location: &str) -> Result<Self, SourceError> {
        match Location::parse(location)? {
            Location::Folder(path) => Self::folder(location, path),
            Location::Builtin("digits") => Ok(Self::builtin(location, &DIGITS)),
            Location::Builtin(name) => Err(SourceError::NoBuiltin { name: name.to_owned() }),
        }
    }

    /// For writing. A folder that does not exist is made.
    pub(crate) fn create(location: &str) -> Result<Self, SourceError> {
        let Location::Folder(path) = Location::parse(location)? else {
            return Err(SourceError::ReadOnly { location: location.to_owned() });
        };
        fs::create_dir_all(path).map_err(|source| SourceError::CreateFolder {
            location: location.to_owned(),
            source,
        })?;
        Self::folder(location, path)
    }

    fn folder(location: &str, path: &str) -> Result<Self, SourceError> {
        let missing = || SourceError::NoFolder { location: location.to_owned() };
        if !FilePath::new(path).is_dir() {
            return Err(missing());
        }
        let objects = LocalFileSystem::new_with_prefix(path).map_err(|_| missing())?;
        // What a renamed file says must be on the disk before the manifest names it.
        let objects = Arc::new(objects.with_fsync(true));
        let shortcut = Shortcut::Folder(PathBuf::from(path));
        Ok(Self { location: path.trim_end_matches('/').to_owned(), objects, shortcut })
    }

    fn builtin(location: &str, files: &'static [(&'static str, &'static [u8])]) -> Self {
        let objects = InMemory::new();
        for &(name, bytes) in files {
            let payload = PutPayload::from_static(bytes);
            block_on(objects.put(&Path::from(name), payload)).expect("memory takes every file");
        }
        let shortcut = Shortcut::Builtin(files);
        Self { location: location.to_owned(), objects: Arc::new(objects), shortcut }
    }

    /// How messages name a file: with its location.
    pub(crate) fn display(&self, name: &str) -> String {
        format!("{}/{name}", self.location)
    }

    /// A file that will be read again and again.
    pub(crate) fn opened(&self, name: &str) -> Opened {
        match &self.shortcut {
            Shortcut::Folder(folder) => Opened::File(folder.join(name)),
            Shortcut::Builtin(files) => {
                let file = files.iter().find(|(known, _)| *known == name);
                Opened::Builtin(file.map_or(&[], |(_, contents)| contents))
            }
        }
    }

    /// Length of a file in bytes.
    pub(crate) fn length(&self, name: &str) -> Result<u64, SourceError> {
        match block_on(self.objects.head(&Path::from(name))) {
            Ok(found) => Ok(found.size),
            Err(error) => Err(self.unread(name, error)),
        }
    }

    /// A whole file.
    pub(crate) fn read(&self, name: &str) -> Result<Bytes, SourceError> {
        let path = Path::from(name);
        block_on(async { self.objects.get(&path).await?.bytes().await })
            .map_err(|error| self.unread(name, error))
    }

    /// Some bytes of a file.
    pub(crate) fn read_range(&self, name: &str, range: Range<u64>) -> Result<Bytes, SourceError> {
        block_on(self.objects.get_range(&Path::from(name), range))
            .map_err(|error| self.unread(name, error))
    }

    /// Writes a file under a temporary name and renames it; replaces what was there.
    pub(crate) fn write(&self, name: &str, bytes: Vec<u8>) -> Result<(), SourceError> {
        self.put(name, bytes, PutMode::Overwrite)
    }

    /// Writes a file under a temporary name and gives it its own only if that is free.
    pub(crate) fn write_new(&self, name: &str, bytes: Vec<u8>) -> Result<(), SourceError> {
        self.put(name, bytes, PutMode::Create)
    }

    /// Removes a file. One that is not there is no error.
    pub(crate) fn remove(&self, name: &str) -> Result<(), SourceError> {
        match block_on(self.objects.delete(&Path::from(name))) {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(source) => Err(SourceError::Write { file: self.display(name), source }),
        }
    }

    fn put(&self, name: &str, bytes: Vec<u8>, mode: PutMode) -> Result<(), SourceError> {
        let options = PutOptions { mode, ..PutOptions::default() };
        let path = Path::from(name);
        let file = self.display(name);
        match block_on(self.objects.put_opts(&path, PutPayload::from(bytes), options)) {
            Ok(_) => Ok(()),
            Err(object_store::Error::AlreadyExists { .. }) => Err(SourceError::Exists { file }),
            Err(source) => Err(SourceError::Write { file, source }),
        }
    }

    fn unread(&self, name: &str, error: object_store::Error) -> SourceError {
        let file = self.display(name);
        if matches!(error, object_store::Error::NotFound { .. }) {
            SourceError::Missing { file }
        } else {
            SourceError::Read { file, source: error }
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Location<'a> {
    Folder(&'a str),
    Builtin(&'a str),
}

impl<'a> Location<'a> {
    fn parse(location: &'a str) -> Result<Self, SourceError> {
        if let Some(name) = location.strip_prefix("builtin:") {
            Ok(Self::Builtin(name))
        } else if let Some(path) = location.strip_prefix("file://") {
            Ok(Self::Folder(path))
        } else if location.contains("://") {
            Err(SourceError::UnknownScheme { location: location.to_owned() })
        } else {
            Ok(Self::Folder(location))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_location_is_a_folder_or_built_in() {
        assert_eq!(Location::parse("data/pets").unwrap(), Location::Folder("data/pets"));
        assert_eq!(Location::parse("file:///data").unwrap(), Location::Folder("/data"));
        assert_eq!(Location::parse("builtin:digits").unwrap(), Location::Builtin("digits"));
        let error = Location::parse("s3://bucket/data").unwrap_err().to_string();
        assert!(error.contains("s3://bucket/data is of an unknown kind"), "{error}");
    }

    #[test]
    fn a_missing_folder_says_how_to_make_one() {
        let error = Store::open("no/such/folder").unwrap_err().to_string();
        assert!(error.contains("percheron shards pack SRC --out no/such/folder"), "{error}");
        let error = Store::open("builtin:faces").unwrap_err().to_string();
        assert!(error.contains("builtin:digits"), "{error}");
    }

    #[test]
    fn a_new_file_never_replaces_an_old_one() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::create(folder.path().join("new").to_str().unwrap()).unwrap();
        store.write_new("a.json", b"one".to_vec()).unwrap();
        let error = store.write_new("a.json", b"two".to_vec()).unwrap_err();
        assert!(matches!(error, SourceError::Exists { .. }));
        assert_eq!(store.read("a.json").unwrap(), "one");
        store.write("a.json", b"three".to_vec()).unwrap();
        assert_eq!(store.length("a.json").unwrap(), 5);
        assert_eq!(store.read_range("a.json", 1..3).unwrap(), "hr");
    }
}
