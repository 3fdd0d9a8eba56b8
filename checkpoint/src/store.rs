//! Where a run's objects are, and errors that say which of them.

use std::{
    fmt, io,
    path::{Path as FolderPath, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use futures::TryStreamExt as _;
use object_store::{
    ObjectStore, ObjectStoreExt as _, PutMode, PutOptions, local::LocalFileSystem, path::Path,
};
use thiserror::Error;

use crate::s3;

/// An object store and the prefix of one run in it. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    objects: Arc<dyn ObjectStore>,
    prefix: Path,
    location: String,
}

/// Why a location cannot be used.
#[derive(Debug, Error)]
pub enum OpenError {
    /// The folder is not there or cannot be made.
    #[error("cannot open folder {}", folder.display())]
    Folder {
        /// The folder.
        folder: PathBuf,
        /// What the file system said.
        source: io::Error,
    },
    /// The path leads to something else.
    #[error("{} is not a folder", folder.display())]
    NotAFolder {
        /// The path.
        folder: PathBuf,
    },
    /// The store could not be set up.
    #[error("cannot open {location}")]
    Store {
        /// The location.
        location: String,
        /// What the store said.
        source: object_store::Error,
    },
    /// The location is of a kind that this build does not know.
    #[error(
        "cannot open {location}: give a folder, file:// and an absolute path, or s3://BUCKET/PREFIX"
    )]
    Unsupported {
        /// The location.
        location: String,
    },
}

/// An operation on an object that the store did not carry out, or did not confirm.
#[derive(Debug, Error)]
#[error("cannot {attempt} {object}: {}", root_of(cause))]
pub struct StoreError {
    /// What was attempted.
    pub attempt: &'static str,
    /// The object, with the store's location.
    pub object: String,
    /// What the store said.
    pub cause: object_store::Error,
}

/// What is at the bottom of an error, in a line: the layers above it repeat it, and each other.
fn root_of(error: &object_store::Error) -> String {
    let mut root: &dyn std::error::Error = error;
    while let Some(source) = root.source() {
        root = source;
    }
    let text = root.to_string();
    // The bodies of answers are XML.
    let text = text.split(['\n', '<']).next().unwrap_or_default();
    text.trim_end_matches([':', ' ']).to_owned()
}

impl StoreError {
    /// Whether the object is not there.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self.cause, object_store::Error::NotFound { .. })
    }

    /// Whether an object that was to be created is there already.
    pub(crate) fn is_there(&self) -> bool {
        matches!(self.cause, object_store::Error::AlreadyExists { .. })
    }

    /// Whether the store does not know what was asked of it.
    pub(crate) fn is_unknown_to_the_store(&self) -> bool {
        matches!(
            self.cause,
            object_store::Error::NotImplemented { .. } | object_store::Error::NotSupported { .. }
        )
    }

    /// Whether the same attempt may succeed later.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        matches!(
            self.cause,
            object_store::Error::Generic { .. } | object_store::Error::JoinError { .. }
        )
    }
}

impl Store {
    /// Opens a location that exists: a folder, `file://` with an absolute path, or `s3://BUCKET/PREFIX`,
    /// for which endpoint and credentials are taken from the environment as the AWS tools do.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(location: &str) -> Result<Self, OpenError> {
        Self::open_with(location, bucket::environment())
    }

    /// As [`Store::open`], with these environment variables.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open_with(
        location: &str,
        variables: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, OpenError> {
        if is_s3(location) {
            return s3::open(location, variables);
        }
        let folder = folder_of(location)?;
        let metadata = folder
            .metadata()
            .map_err(|source| OpenError::Folder { folder: folder.clone(), source })?;
        if !metadata.is_dir() {
            return Err(OpenError::NotAFolder { folder });
        }
        // Written objects and their names are on disk when a put returns.
        let objects = LocalFileSystem::new_with_prefix(&folder)
            .map_err(|source| OpenError::Store { location: location.to_owned(), source })?
            .with_fsync(true)
            .with_automatic_cleanup(true);
        Ok(Self::new(Arc::new(objects), Path::default(), location))
    }

    /// As [`Store::open`], and makes the folder if it is not there.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn create(location: &str) -> Result<Self, OpenError> {
        if is_s3(location) {
            return Self::open(location); // A prefix is there when an object is.
        }
        let folder = folder_of(location)?;
        std::fs::create_dir_all(&folder).map_err(|source| OpenError::Folder { folder, source })?;
        Self::open(location)
    }

    /// The objects of `objects` below `prefix`; errors call it `location`.
    #[must_use]
    pub fn new(objects: Arc<dyn ObjectStore>, prefix: Path, location: &str) -> Self {
        Self { objects, prefix, location: location.trim_end_matches('/').to_owned() }
    }

    /// Where it is, for people.
    #[must_use]
    pub fn location(&self) -> &str {
        &self.location
    }

    /// The underlying store.
    #[must_use]
    pub fn objects(&self) -> &Arc<dyn ObjectStore> {
        &self.objects
    }

    /// The path of the object `name`, whose parts are separated by `/`, in the underlying store.
    #[must_use]
    pub fn path(&self, name: &str) -> Path {
        self.prefix.parts().chain(Path::from(name).parts()).collect()
    }

    /// What people call the object `name`.
    #[must_use]
    pub fn object(&self, name: &str) -> String {
        format!("{}/{name}", self.location)
    }

    /// The bytes of an object.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn read(&self, name: &str) -> Result<Bytes, StoreError> {
        let read = async { self.objects.get(&self.path(name)).await?.bytes().await };
        read.await.map_err(|source| self.error("read", name, source))
    }

    /// The paths and sizes of all objects in a folder and below.
    pub(crate) async fn list(&self, folder: &str) -> Result<Vec<(Path, u64)>, StoreError> {
        let objects = self.objects.list(Some(&self.path(folder)));
        let listed = objects.map_ok(|object| (object.location, object.size)).try_collect().await;
        listed.map_err(|source| self.error("list", folder, source))
    }

    /// Deletes an object; one that is not there is no error.
    pub(crate) async fn delete(&self, path: &Path) -> Result<(), StoreError> {
        match self.objects.delete(path).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(source) => {
                let name: Path = path.prefix_match(&self.prefix).into_iter().flatten().collect();
                Err(self.error("delete", name.as_ref(), source))
            }
        }
    }

    pub(crate) async fn put(
        &self,
        name: &str,
        bytes: Bytes,
        mode: PutMode,
    ) -> Result<(), StoreError> {
        let options = PutOptions::from(mode);
        match self.objects.put_opts(&self.path(name), bytes.into(), options).await {
            Ok(_) => Ok(()),
            Err(source) => Err(self.error("write", name, source)),
        }
    }

    pub(crate) fn error(
        &self,
        attempt: &'static str,
        name: &str,
        cause: object_store::Error,
    ) -> StoreError {
        StoreError { attempt, object: self.object(name), cause }
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").field("location", &self.location).finish_non_exhaustive()
    }
}

fn is_s3(location: &str) -> bool {
    location.starts_with("s3://")
}

fn folder_of(location: &str) -> Result<PathBuf, OpenError> {
    let unsupported = || OpenError::Unsupported { location: location.to_owned() };
    let folder = match location.split_once("://") {
        // A path with escapes could mean two folders.
        Some(("file", path)) if path.starts_with('/') && !path.contains('%') => path,
        Some(_) => return Err(unsupported()),
        None if location.is_empty() => return Err(unsupported()),
        None => location,
    };
    Ok(FolderPath::new(folder).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_opened_is_named() {
        let error = |location| Store::open(location).unwrap_err().to_string();
        assert_eq!(error("/no/such/folder"), "cannot open folder /no/such/folder");
        assert!(error("s3:///run").starts_with("cannot open s3:///run: give a folder"));
        assert!(error("gs://bucket/run").starts_with("cannot open gs://bucket/run: give a folder"));
        assert!(error("file://host/x").starts_with("cannot open file://host/x: give a folder"));
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().to_str().unwrap();
        assert_eq!(error(path), format!("{path} is not a folder"));
    }

    #[test]
    fn a_name_is_placed_below_the_prefix() {
        let objects = Arc::new(object_store::memory::InMemory::new());
        let store = Store::new(objects, Path::from("runs/digits"), "memory:///runs/digits/");
        assert_eq!(store.path("a/b").as_ref(), "runs/digits/a/b");
        assert_eq!(store.object("a/b"), "memory:///runs/digits/a/b");
    }
}
