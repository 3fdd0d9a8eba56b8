//! The files that a source is made of, on this machine or in a bucket.
//!
//! A file in a bucket has the path `s3://BUCKET/KEY`, so that the same code names, sorts and joins both.
//! Errors of a bucket travel in [`io::Error`]s, and are taken out again by [`PackError::unread`].

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom},
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::PackError;
use crate::{
    digest::Sha256,
    source::{Location, Object, Remote, SourceError},
};

/// A tar's headers are found in pieces of this length: one header of a local file, …
const LOCAL_PIECE: u64 = 8 << 10;
/// … and some 40 images of ImageNet in a bucket, where a request costs as much as a few megabytes.
const REMOTE_PIECE: u64 = 4 << 20;

/// Files and folders below one path.
#[derive(Debug)]
pub(crate) struct Tree {
    root: PathBuf,
    place: Place,
}

#[derive(Debug)]
enum Place {
    Local,
    /// Every object below the root's folder, by path.
    Bucket(Arc<Remote>, BTreeMap<PathBuf, Object>),
}

impl Tree {
    /// The files of a folder, or one file: a path, `file://PATH` or `s3://BUCKET/PREFIX`. A bucket is listed here.
    pub(crate) fn open(source: &Path, variables: &[(String, String)]) -> Result<Self, PackError> {
        let Some(location) = source.to_str() else {
            return Ok(Self { root: source.to_owned(), place: Place::Local });
        };
        match Location::parse(location).map_err(PackError::Source)? {
            Location::Folder(path) => Ok(Self { root: PathBuf::from(path), place: Place::Local }),
            Location::Bucket => Self::list(location.trim_end_matches('/'), variables),
            Location::Builtin(_) => Err(PackError::Builtin(location.to_owned())),
        }
    }

    /// What is under a prefix; or, if nothing is, what lies beside the object of that name.
    fn list(location: &str, variables: &[(String, String)]) -> Result<Self, PackError> {
        let found = Self::list_below(location, location, variables)?;
        if !found.is_empty() {
            return Ok(found);
        }
        let parent = location.rsplit_once('/').map_or(location, |(parent, _)| parent);
        if parent.len() > "s3://".len() {
            let found = Self::list_below(location, parent, variables)?;
            if found.is_file(&found.root) {
                return Ok(found);
            }
        }
        Err(PackError::NoObjects(location.to_owned()))
    }

    fn list_below(
        root: &str,
        folder: &str,
        variables: &[(String, String)],
    ) -> Result<Self, PackError> {
        let remote = Remote::open(folder, variables).map_err(PackError::Source)?;
        let objects = remote.list().map_err(PackError::Source)?;
        let folder = Path::new(folder);
        let objects = objects.into_iter().map(|object| (folder.join(&object.name), object));
        let place = Place::Bucket(Arc::new(remote), objects.collect());
        Ok(Self { root: PathBuf::from(root), place })
    }

    fn is_empty(&self) -> bool {
        matches!(&self.place, Place::Bucket(_, objects) if objects.is_empty())
    }

    /// The path that all others begin with.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn is_file(&self, path: &Path) -> bool {
        match &self.place {
            Place::Local => path.is_file(),
            Place::Bucket(_, objects) => objects.contains_key(path),
        }
    }

    pub(crate) fn is_dir(&self, path: &Path) -> bool {
        match &self.place {
            Place::Local => path.is_dir(),
            Place::Bucket(_, objects) => below(objects, path).next().is_some(),
        }
    }

    /// What a folder holds, by name, without hidden entries.
    pub(crate) fn entries(&self, folder: &Path) -> io::Result<Vec<PathBuf>> {
        let mut paths = match &self.place {
            Place::Local => fs::read_dir(folder)?
                .map(|entry| entry.map(|entry| entry.path()))
                .collect::<io::Result<Vec<_>>>()?,
            Place::Bucket(_, objects) => below(objects, folder)
                .filter_map(|(path, _)| path.strip_prefix(folder).ok()?.components().next())
                .map(|name| folder.join(name))
                .collect(),
        };
        paths.retain(|path| {
            path.file_name().is_some_and(|name| !name.as_encoded_bytes().starts_with(b"."))
        });
        paths.sort();
        paths.dedup();
        Ok(paths)
    }

    /// Bytes of a file.
    pub(crate) fn length(&self, path: &Path) -> io::Result<u64> {
        match &self.place {
            Place::Local => Ok(fs::metadata(path)?.len()),
            Place::Bucket(_, objects) => Ok(object(objects, path)?.length),
        }
    }

    /// Some bytes of a file.
    pub(crate) fn read(&self, path: &Path, range: Range<u64>) -> io::Result<Vec<u8>> {
        match &self.place {
            Place::Local => {
                let length = usize::try_from(range.end.saturating_sub(range.start))
                    .map_err(|_| io::ErrorKind::FileTooLarge)?;
                let mut bytes = vec![0; length];
                File::open(path)?.read_exact_at(&mut bytes, range.start)?;
                Ok(bytes)
            }
            Place::Bucket(remote, objects) => {
                let read = remote.read_objects([(object(objects, path)?, range)]);
                read.into_iter().next().expect("an answer a request").map_err(io::Error::other)
            }
        }
    }

    /// A whole file.
    pub(crate) fn read_whole(&self, path: &Path) -> io::Result<Vec<u8>> {
        match &self.place {
            Place::Local => fs::read(path),
            Place::Bucket(..) => self.read(path, 0..self.length(path)?),
        }
    }

    /// Parts of files, in this order; in a bucket several are asked for at a time.
    pub(crate) fn read_many<'a>(
        &self,
        parts: impl Iterator<Item = (&'a Path, Range<u64>)>,
    ) -> Vec<io::Result<Vec<u8>>> {
        match &self.place {
            Place::Local => parts.map(|(path, range)| self.read(path, range)).collect(),
            Place::Bucket(remote, objects) => {
                let parts = parts.map(|(path, range)| Ok((object(objects, path)?, range)));
                match parts.collect::<io::Result<Vec<_>>>() {
                    Ok(parts) => {
                        let read = remote.read_objects(parts);
                        read.into_iter().map(|read| read.map_err(io::Error::other)).collect()
                    }
                    Err(missing) => vec![Err(missing)],
                }
            }
        }
    }

    /// The digest of a whole file.
    pub(crate) fn sha256(&self, path: &Path) -> io::Result<Sha256> {
        match &self.place {
            Place::Local => Sha256::of_reader(File::open(path)?),
            Place::Bucket(..) => {
                let length = self.length(path)?;
                Sha256::of_reader(Section::new(self, path, 0, length))
            }
        }
    }
}

/// The objects below a folder.
fn below<'a>(
    objects: &'a BTreeMap<PathBuf, Object>,
    folder: &'a Path,
) -> impl Iterator<Item = (&'a PathBuf, &'a Object)> {
    let from = objects.range(folder.to_owned()..);
    from.take_while(move |(path, _)| path.starts_with(folder))
        .filter(move |(path, _)| path.as_path() != folder)
}

fn object<'a>(objects: &'a BTreeMap<PathBuf, Object>, path: &Path) -> io::Result<&'a Object> {
    let missing = || SourceError::Missing { file: path.display().to_string() };
    objects.get(path).ok_or_else(|| io::Error::other(missing()))
}

/// A part of a file, read as if it were one, in pieces.
pub(super) struct Section<'a> {
    tree: &'a Tree,
    path: &'a Path,
    start: u64,
    length: u64,
    at: u64,
    piece: Vec<u8>,
    /// Where in the section the piece begins.
    piece_at: u64,
}

impl<'a> Section<'a> {
    pub(super) fn new(tree: &'a Tree, path: &'a Path, start: u64, length: u64) -> Self {
        Self { tree, path, start, length, at: 0, piece: Vec::new(), piece_at: 0 }
    }

    /// The bytes of the piece at hand from the present place on.
    fn ready(&self) -> &[u8] {
        let within = self.at.checked_sub(self.piece_at).and_then(|at| usize::try_from(at).ok());
        within.and_then(|within| self.piece.get(within..)).unwrap_or_default()
    }
}

impl Read for Section<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.ready().is_empty() && self.at < self.length {
            let piece = match self.tree.place {
                Place::Local => LOCAL_PIECE,
                Place::Bucket(..) => REMOTE_PIECE,
            };
            let end = (self.at + piece).min(self.length);
            self.piece = self.tree.read(self.path, self.start + self.at..self.start + end)?;
            self.piece_at = self.at;
        }
        let mut ready = self.ready();
        let read = ready.read(buffer)?;
        self.at += read as u64;
        Ok(read)
    }
}

impl Seek for Section<'_> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_section_reads_as_a_file_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bytes");
        let bytes: Vec<u8> = (0..100_000_u32).map(|number| (number % 251) as u8).collect();
        fs::write(&path, &bytes).unwrap();
        let tree = Tree::open(folder.path(), &[]).unwrap();
        let mut section = Section::new(&tree, &path, 1000, 50_000);
        let mut read = Vec::new();
        section.read_to_end(&mut read).unwrap();
        assert_eq!(read, bytes[1000..51_000]);
        let mut four = [0; 4];
        section.seek(SeekFrom::Start(9000)).unwrap();
        section.read_exact(&mut four).unwrap();
        section.seek(SeekFrom::Current(-9004)).unwrap();
        section.read_exact(&mut four).unwrap();
        assert_eq!(four, bytes[1000..1004]);
        assert_eq!(section.seek(SeekFrom::End(0)).unwrap(), 50_000);
        assert_eq!(section.read(&mut four).unwrap(), 0);
    }

    #[test]
    fn folders_of_a_bucket_are_what_their_objects_are_called() {
        let named = |name: &str| {
            let object = Object { name: name.to_owned(), path: name.into(), length: 1 };
            (Path::new("s3://b/p").join(name), object)
        };
        let objects =
            BTreeMap::from(["oak/2.jpg", "oak/1.jpg", "oak/.x", "ash/1.jpg", "t.tar"].map(named));
        let paths = |folder: &str| -> Vec<String> {
            below(&objects, Path::new(folder)).map(|(path, _)| path.display().to_string()).collect()
        };
        assert_eq!(paths("s3://b/p/oak").len(), 3);
        assert_eq!(paths("s3://b/p/t.tar"), Vec::<String>::new());
        assert_eq!(paths("s3://b/p/oa"), Vec::<String>::new());
        assert_eq!(paths("s3://b/p")[0], "s3://b/p/ash/1.jpg");
    }
}
