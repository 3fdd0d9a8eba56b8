//! Where the files of a dataset are: a folder, a bucket, or the program itself.
//!
//! A location is one of
//!
//! * `PATH` or `file://PATH`: a folder of the local file system;
//! * `s3://BUCKET/PREFIX`: S3, or any store that speaks its protocol, read through a cache on this machine;
//! * `builtin:digits`: the handwritten digits that are part of this crate (`datasets/digits`).
//!
//! All wait on the calling thread; the network is served by a thread of its own.

mod remote;
mod s3;

use std::{
    collections::HashSet,
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

use self::remote::{RemoteFile, blocks_of, prefetch};
pub(crate) use self::{remote::Remote, s3::Object};
use crate::{cache, digest::Sha256};

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
    #[error("{location} cannot be written to: give a folder or s3://BUCKET/PREFIX")]
    ReadOnly {
        /// The location as given.
        location: String,
    },
    /// A scheme without a reader.
    #[error(
        "location {location} is of an unknown kind: give a folder, s3://BUCKET/PREFIX or `builtin:digits`"
    )]
    UnknownScheme {
        /// The location as given.
        location: String,
    },
    /// It begins as a bucket does, but names none.
    #[error("location {location} is not s3://BUCKET/PREFIX")]
    NoBucket {
        /// The location as given.
        location: String,
    },
    /// The `AWS_...` variables contradict each other or lack something.
    #[error("{location} cannot be opened with these AWS_... variables")]
    Settings {
        /// The location as given.
        location: String,
        /// What is wrong with them.
        #[source]
        source: object_store::Error,
    },
    /// The thread that serves the network cannot be started.
    #[error("no thread can be started to read {location}")]
    Threads {
        /// The location as given.
        location: String,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// A variable of the cache.
    #[error("environment variable {variable}: is {value:?}; {problem}")]
    Variable {
        /// Its name.
        variable: &'static str,
        /// What it is.
        value: String,
        /// What to do.
        problem: &'static str,
    },
    /// The cache cannot be used.
    #[error(
        "cache folder {folder} cannot be used: set {} to a folder that can be written to",
        cache::FOLDER
    )]
    Cache {
        /// The folder.
        folder: String,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The file ends before the bytes that its index promises.
    #[error("file {file} is shorter than it was")]
    Short {
        /// The file with its location.
        file: String,
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

impl SourceError {
    fn unread(file: String, error: object_store::Error) -> Self {
        if matches!(error, object_store::Error::NotFound { .. }) {
            Self::Missing { file }
        } else {
            Self::Read { file, source: error }
        }
    }
}

/// The files at one location. Usable from any thread.
#[derive(Debug, Clone)]
pub(crate) struct Store {
    location: String,
    place: Place,
}

#[derive(Debug, Clone)]
enum Place {
    Local(Arc<dyn ObjectStore>, Shortcut),
    Remote(Arc<Remote>),
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
    Remote(Arc<RemoteFile>),
}

impl Opened {
    /// Fills `bytes` from `offset` on. Whether that could be done: if not, for whatever reason, the store's
    /// own read says which.
    pub(crate) fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<bool, SourceError> {
        match self {
            Self::File(path) => {
                Ok(File::open(path).is_ok_and(|file| file.read_exact_at(bytes, offset).is_ok()))
            }
            Self::Builtin(contents) => {
                let start = usize::try_from(offset).unwrap_or(usize::MAX);
                let rest = contents.get(start..).and_then(|rest| rest.get(..bytes.len()));
                Ok(rest.map(|found| bytes.copy_from_slice(found)).is_some())
            }
            Self::Remote(file) => file.read_at(offset, bytes).map(|()| true),
        }
    }

    /// Forgets copies of these bytes that may be worse than what they are copies of. Whether there are any.
    pub(crate) fn forget(&self, offset: u64, length: u64) -> bool {
        match self {
            Self::File(_) | Self::Builtin(_) => false,
            Self::Remote(file) => {
                file.forget(offset, length);
                true
            }
        }
    }
}

impl Store {
    /// For reading. The location must exist.
    pub(crate) fn open(
        location: &str,
        variables: &[(String, String)],
    ) -> Result<Self, SourceError> {
        match Location::parse(location)? {
            Location::Folder(path) => Self::folder(location, path),
            Location::Bucket => {
                let place = Place::Remote(Arc::new(Remote::open(location, variables)?));
                Ok(Self { location: location.trim_end_matches('/').to_owned(), place })
            }
            Location::Builtin("digits") => Ok(Self::builtin(location, &DIGITS)),
            Location::Builtin(name) => Err(SourceError::NoBuiltin { name: name.to_owned() }),
        }
    }

    /// For writing. A folder that does not exist is made; a prefix of a bucket is there when an object is.
    pub(crate) fn create(
        location: &str,
        variables: &[(String, String)],
    ) -> Result<Self, SourceError> {
        let path = match Location::parse(location)? {
            Location::Folder(path) => path,
            Location::Bucket => return Self::open(location, variables),
            Location::Builtin(_) => {
                return Err(SourceError::ReadOnly { location: location.to_owned() });
            }
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
        let place = Place::Local(objects, Shortcut::Folder(PathBuf::from(path)));
        Ok(Self { location: path.trim_end_matches('/').to_owned(), place })
    }

    fn builtin(location: &str, files: &'static [(&'static str, &'static [u8])]) -> Self {
        let objects = InMemory::new();
        for &(name, bytes) in files {
            let payload = PutPayload::from_static(bytes);
            block_on(objects.put(&Path::from(name), payload)).expect("memory takes every file");
        }
        let place = Place::Local(Arc::new(objects), Shortcut::Builtin(files));
        Self { location: location.to_owned(), place }
    }

    /// How messages name a file: with its location.
    pub(crate) fn display(&self, name: &str) -> String {
        format!("{}/{name}", self.location)
    }

    /// The far place that this is, if it is one.
    pub(crate) fn remote(&self) -> Option<&Remote> {
        match &self.place {
            Place::Local(..) => None,
            Place::Remote(remote) => Some(remote),
        }
    }

    /// A file that will be read again and again. `digest` and `length`, in bytes, must be its own.
    pub(crate) fn opened(&self, name: &str, digest: Sha256, length: u64) -> Opened {
        match &self.place {
            Place::Local(_, Shortcut::Folder(folder)) => Opened::File(folder.join(name)),
            Place::Local(_, Shortcut::Builtin(files)) => {
                let file = files.iter().find(|(known, _)| *known == name);
                Opened::Builtin(file.map_or(&[], |(_, contents)| contents))
            }
            Place::Remote(remote) => {
                Opened::Remote(Arc::new(RemoteFile::new(Arc::clone(remote), name, digest, length)))
            }
        }
    }

    /// Makes ready to read these parts of files, offset and length in bytes, if they are far away.
    pub(crate) fn prefetch<'a>(&self, parts: impl Iterator<Item = (&'a Opened, u64, u64)>) {
        let Place::Remote(remote) = &self.place else { return };
        let mut seen = HashSet::new();
        let mut blocks = Vec::new(); // In the order in which they are needed.
        for (opened, offset, length) in parts {
            let Opened::Remote(file) = opened else { continue };
            let new = blocks_of(offset, length)
                .filter(|&block| seen.insert((Arc::as_ptr(file), block)))
                .map(|block| (Arc::clone(file), block));
            blocks.extend(new);
        }
        prefetch(remote, blocks);
    }

    /// Length of a file in bytes.
    pub(crate) fn length(&self, name: &str) -> Result<u64, SourceError> {
        match &self.place {
            Place::Local(objects, _) => {
                let found = block_on(objects.head(&Path::from(name)));
                found.map(|found| found.size).map_err(|error| self.unread(name, error))
            }
            Place::Remote(remote) => remote.length(name),
        }
    }

    /// A whole file.
    pub(crate) fn read(&self, name: &str) -> Result<Bytes, SourceError> {
        let path = Path::from(name);
        match &self.place {
            Place::Local(objects, _) => block_on(async { objects.get(&path).await?.bytes().await })
                .map_err(|error| self.unread(name, error)),
            Place::Remote(remote) => remote.whole(name),
        }
    }

    /// Indexes, whose digests are for the caller to check, and the lengths of their shards in bytes: the index's
    /// name and digest, and the name of the shard.
    pub(crate) fn read_indexes(
        &self,
        wanted: impl Iterator<Item = (String, Sha256, String)>,
    ) -> Result<Vec<(Bytes, u64)>, SourceError> {
        match &self.place {
            Place::Local(..) => {
                wanted.map(|(idx, _, tar)| Ok((self.read(&idx)?, self.length(&tar)?))).collect()
            }
            Place::Remote(remote) => remote.read_indexes(wanted),
        }
    }

    /// Whether there is such a file with these bytes.
    pub(crate) fn holds(
        &self,
        name: &str,
        length: u64,
        digest: Sha256,
    ) -> Result<bool, SourceError> {
        match &self.place {
            Place::Local(..) => match self.read(name) {
                Ok(bytes) => Ok(bytes.len() as u64 == length && Sha256::of(&bytes) == digest),
                Err(SourceError::Missing { .. }) => Ok(false),
                Err(error) => Err(error),
            },
            Place::Remote(remote) => remote.holds(name, length, digest),
        }
    }

    /// Some bytes of a file.
    pub(crate) fn read_range(&self, name: &str, range: Range<u64>) -> Result<Bytes, SourceError> {
        match &self.place {
            Place::Local(objects, _) => block_on(objects.get_range(&Path::from(name), range))
                .map_err(|error| self.unread(name, error)),
            Place::Remote(remote) => remote.range(name, range),
        }
    }

    /// Writes a file so that it appears whole; replaces what was there.
    pub(crate) fn write(&self, name: &str, bytes: Vec<u8>) -> Result<(), SourceError> {
        match &self.place {
            Place::Local(objects, _) => self.put(objects, name, bytes, PutMode::Overwrite),
            Place::Remote(remote) => remote.put(name, bytes.into()),
        }
    }

    /// Writes a file so that it appears whole, and only if its name is free.
    pub(crate) fn write_new(&self, name: &str, bytes: Vec<u8>) -> Result<(), SourceError> {
        match &self.place {
            Place::Local(objects, _) => self.put(objects, name, bytes, PutMode::Create),
            Place::Remote(remote) => remote.create(name, bytes.into()),
        }
    }

    /// Removes a file. One that is not there is no error.
    pub(crate) fn remove(&self, name: &str) -> Result<(), SourceError> {
        let objects = match &self.place {
            Place::Local(objects, _) => objects,
            Place::Remote(remote) => return remote.remove(name),
        };
        match block_on(objects.delete(&Path::from(name))) {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(source) => Err(SourceError::Write { file: self.display(name), source }),
        }
    }

    fn put(
        &self,
        objects: &Arc<dyn ObjectStore>,
        name: &str,
        bytes: Vec<u8>,
        mode: PutMode,
    ) -> Result<(), SourceError> {
        let options = PutOptions { mode, ..PutOptions::default() };
        let path = Path::from(name);
        let file = self.display(name);
        match block_on(objects.put_opts(&path, PutPayload::from(bytes), options)) {
            Ok(_) => Ok(()),
            Err(object_store::Error::AlreadyExists { .. }) => Err(SourceError::Exists { file }),
            Err(source) => Err(SourceError::Write { file, source }),
        }
    }

    fn unread(&self, name: &str, error: object_store::Error) -> SourceError {
        SourceError::unread(self.display(name), error)
    }
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Location<'a> {
    Folder(&'a str),
    Bucket,
    Builtin(&'a str),
}

impl<'a> Location<'a> {
    pub(crate) fn parse(location: &'a str) -> Result<Self, SourceError> {
        if let Some(name) = location.strip_prefix("builtin:") {
            Ok(Self::Builtin(name))
        } else if let Some(path) = location.strip_prefix("file://") {
            Ok(Self::Folder(path))
        } else if location.starts_with("s3://") {
            Ok(Self::Bucket)
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
        assert_eq!(Location::parse("s3://bucket/data").unwrap(), Location::Bucket);
        let error = Location::parse("gs://bucket/data").unwrap_err().to_string();
        assert!(error.contains("gs://bucket/data is of an unknown kind"), "{error}");
        let error = Store::create("builtin:digits", &[]).unwrap_err().to_string();
        assert!(error.contains("builtin:digits cannot be written to: give a folder"), "{error}");
    }

    #[test]
    fn a_missing_folder_says_how_to_make_one() {
        let error = Store::open("no/such/folder", &[]).unwrap_err().to_string();
        assert!(error.contains("percheron shards pack SRC --out no/such/folder"), "{error}");
        let error = Store::open("builtin:faces", &[]).unwrap_err().to_string();
        assert!(error.contains("builtin:digits"), "{error}");
    }

    #[test]
    fn a_new_file_never_replaces_an_old_one() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::create(folder.path().join("new").to_str().unwrap(), &[]).unwrap();
        store.write_new("a.json", b"one".to_vec()).unwrap();
        let error = store.write_new("a.json", b"two".to_vec()).unwrap_err();
        assert!(matches!(error, SourceError::Exists { .. }));
        assert_eq!(store.read("a.json").unwrap(), "one");
        store.write("a.json", b"three".to_vec()).unwrap();
        assert_eq!(store.length("a.json").unwrap(), 5);
        assert_eq!(store.read_range("a.json", 1..3).unwrap(), "hr");
    }
}
