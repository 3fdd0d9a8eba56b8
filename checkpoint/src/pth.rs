//! Files of `torch.save`, without torch and without running what a pickle asks for.
//!
//! A file is a zip archive: `PREFIX/data.pkl` says what there is, `PREFIX/data/KEY` holds the storages.
//! [`read`] makes [`Value`]s of it, [`write()`] writes values so that `torch.load(weights_only=True)` reads
//! them. The official checkpoints are such files.

mod array;
mod pickle;
mod write;

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, BufReader, Read as _},
    path::{Path, PathBuf},
};

use thiserror::Error;
use zip::{ZipArchive, result::ZipError};

use self::pickle::{Id, Node, Pickle};
pub use self::{
    array::{Array, Dtype},
    write::write,
};

/// The description of an archive may be so large; that of a large network has a few megabytes.
const PICKLE_BYTES_MAX: u64 = 256 << 20;
/// How deep values may lie in each other.
const DEPTH_MAX: usize = 64;

/// What such a file holds.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Nothing.
    None,
    /// Yes or no.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// A number.
    Float(f64),
    /// Text.
    Text(String),
    /// Bytes.
    Bytes(Vec<u8>),
    /// Values in order. A tuple is one too.
    List(Vec<Value>),
    /// Keys and values, in order. The attributes of an object are one too.
    Dict(Vec<(Value, Value)>),
    /// A tensor.
    Array(Array),
}

/// A file that cannot be read or written.
#[derive(Debug, Error)]
#[error("{}", path.display())]
pub struct PthError {
    /// The file.
    pub path: PathBuf,
    /// Why.
    #[source]
    pub fault: PthFault,
}

/// What is wrong with such a file.
#[derive(Debug, Error)]
pub enum PthFault {
    /// The file system refused something.
    #[error("cannot be {attempt}: {source}")]
    Io {
        /// What was attempted: `read` or `written`.
        attempt: &'static str,
        /// What it said.
        source: io::Error,
    },
    /// It is not a zip archive.
    #[error(
        "it is not a zip archive, so torch older than 1.6 wrote it, or it is damaged; load it with \
         torch and save it again"
    )]
    NotZip,
    /// The archive is damaged.
    #[error("the archive is damaged: {0}")]
    Zip(String),
    /// The archive lacks a member.
    #[error("the archive has no {member}")]
    Missing {
        /// The member.
        member: String,
    },
    /// The numbers are in another byte order.
    #[error("its byte order is {0:?}; only little-endian files can be read")]
    ByteOrder(String),
    /// The description is damaged, or uses what `torch.save` does not.
    #[error("its data.pkl is damaged: byte {at}: {found}")]
    Pickle {
        /// Where.
        at: usize,
        /// What is there.
        found: String,
    },
    /// The description wants something to be called that is not on the list of what is known.
    #[error(
        "its data.pkl asks for {name:?} to be called, and nothing of a file is run here; load it with \
         torch, keep only tensors, numbers and text, and save it again"
    )]
    Refused {
        /// Module and name.
        name: String,
    },
    /// A tensor reaches beyond its storage.
    #[error("a tensor of shape {shape:?} does not fit its storage of {bytes} bytes")]
    Storage {
        /// The tensor's shape.
        shape: Vec<u64>,
        /// The storage's size.
        bytes: usize,
    },
    /// Values in values in values.
    #[error("its values are nested too deeply, or hold themselves")]
    TooDeep,
}

impl Value {
    /// The value of a text key of a dictionary.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&Value> {
        let Self::Dict(items) = self else { return None };
        items.iter().find(|(name, _)| matches!(name, Self::Text(t) if t == key)).map(|(_, v)| v)
    }

    /// The entries of a dictionary of tensors, in order; none if there is anything else in it.
    #[must_use]
    pub fn arrays(&self) -> Option<Vec<(&str, &Array)>> {
        let Self::Dict(items) = self else { return None };
        let mut entries = Vec::with_capacity(items.len());
        for (name, value) in items {
            let (Self::Text(name), Self::Array(array)) = (name, value) else { return None };
            entries.push((name.as_str(), array));
        }
        (!entries.is_empty()).then_some(entries)
    }
}

/// Reads a file of `torch.save`. Nothing in it is run.
///
/// # Errors
/// [`PthError`] names the file and what is wrong with it.
pub fn read(path: &Path) -> Result<Value, PthError> {
    read_archive(path).map_err(|fault| PthError { path: path.to_owned(), fault })
}

fn read_archive(path: &Path) -> Result<Value, PthFault> {
    let reading = |source| PthFault::Io { attempt: "read", source };
    let file = File::open(path).map_err(reading)?;
    let mut archive = ZipArchive::new(BufReader::new(file)).map_err(|error| {
        let is_other = matches!(error, ZipError::InvalidArchive(_));
        if is_other { PthFault::NotZip } else { damaged(&error) }
    })?;
    let names = archive.file_names().filter_map(|name| Some(name.ok()?.into_owned()));
    let description = names.into_iter().find(|name| is_description(name));
    let description =
        description.ok_or_else(|| PthFault::Missing { member: "data.pkl".to_owned() })?;
    let prefix = description.strip_suffix("data.pkl").expect("it ends so").to_owned();
    let order = format!("{prefix}byteorder");
    if archive.index_for_name(&order).is_some() {
        let order = String::from_utf8_lossy(&member(&mut archive, &order, 64)?).into_owned();
        if order != "little" {
            return Err(PthFault::ByteOrder(order));
        }
    }
    let bytes = member(&mut archive, &description, PICKLE_BYTES_MAX)?;
    let pickle = pickle::read(&bytes)?;
    let mut values =
        Values { archive, prefix, pickle: &pickle, storages: BTreeMap::new(), made: 0 };
    values.value(pickle.root, 0)
}

fn is_description(name: &str) -> bool {
    name == "data.pkl" || name.ends_with("/data.pkl")
}

fn member(
    archive: &mut ZipArchive<BufReader<File>>,
    name: &str,
    bytes_max: u64,
) -> Result<Vec<u8>, PthFault> {
    let file = match archive.by_name(name) {
        Ok(file) => file,
        Err(ZipError::FileNotFound) => return Err(PthFault::Missing { member: name.to_owned() }),
        Err(error) => return Err(damaged(&error)),
    };
    let mut bytes = Vec::new();
    // The size that the archive states is only believed as far as there are bytes.
    file.take(bytes_max)
        .read_to_end(&mut bytes)
        .map_err(|error| PthFault::Zip(error.to_string()))?;
    Ok(bytes)
}

fn damaged(error: &ZipError) -> PthFault {
    PthFault::Zip(error.to_string())
}

/// Turns the nodes of a pickle into values.
struct Values<'p> {
    archive: ZipArchive<BufReader<File>>,
    prefix: String,
    pickle: &'p Pickle,
    /// Those that were read; views share them.
    storages: BTreeMap<String, Vec<u8>>,
    /// Values made so far: a pickle that holds one thing a million times over is no checkpoint.
    made: usize,
}

impl Values<'_> {
    fn value(&mut self, id: Id, depth: usize) -> Result<Value, PthFault> {
        self.made += 1;
        if depth > DEPTH_MAX || self.made > 4 * self.pickle.nodes.len() {
            return Err(PthFault::TooDeep);
        }
        let pickle = self.pickle;
        Ok(match &pickle.nodes[id] {
            Node::None => Value::None,
            Node::Bool(value) => Value::Bool(*value),
            Node::Int(value) => Value::Int(*value),
            Node::Float(value) => Value::Float(*value),
            Node::Text(text) => Value::Text(text.clone()),
            Node::Bytes(bytes) => Value::Bytes(bytes.clone()),
            Node::List(items) | Node::Tuple(items) => {
                let items = items.iter().map(|&item| self.value(item, depth + 1));
                Value::List(items.collect::<Result<_, _>>()?)
            }
            Node::Dict(items) => {
                let mut pairs = Vec::with_capacity(items.len());
                for &(key, value) in items {
                    pairs.push((self.value(key, depth + 1)?, self.value(value, depth + 1)?));
                }
                Value::Dict(pairs)
            }
            Node::Object(None) => Value::Dict(Vec::new()),
            Node::Object(Some(attributes)) => self.value(*attributes, depth + 1)?,
            Node::Tensor(tensor) => {
                let class = &tensor.class;
                let dtype = Dtype::of_storage(class)
                    .ok_or_else(|| PthFault::Refused { name: class.clone() })?;
                let storage = self.storage(&tensor.key)?;
                let (shape, strides) = (&tensor.shape, &tensor.strides);
                Value::Array(array::gather(storage, dtype, tensor.offset, shape, strides)?)
            }
            Node::Global(name) => return Err(PthFault::Refused { name: name.clone() }),
            Node::Storage { class, .. } => return Err(PthFault::Refused { name: class.clone() }),
        })
    }

    fn storage(&mut self, key: &str) -> Result<&[u8], PthFault> {
        if !self.storages.contains_key(key) {
            let name = format!("{}data/{key}", self.prefix);
            let bytes = member(&mut self.archive, &name, u64::MAX)?;
            self.storages.insert(key.to_owned(), bytes);
        }
        Ok(&self.storages[key])
    }
}

#[cfg(test)]
mod tests;
