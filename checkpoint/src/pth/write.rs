//! Writing: pickle protocol 2 and a zip archive whose members are stored as they are.

use std::{
    fs::{self, OpenOptions},
    io::{self, BufWriter, Write},
    path::Path,
};

use zip::{CompressionMethod, ZipWriter, result::ZipError, write::SimpleFileOptions};

use super::{Array, PthError, PthFault, Value};

/// Writes `value` so that `torch.load(weights_only=True)` reads it. Lists stay lists.
///
/// # Errors
/// [`PthError`] if the file is there already, or cannot be written; a half-written one is removed.
pub fn write(path: &Path, value: &Value) -> Result<(), PthError> {
    let failed = |source| PthError {
        path: path.to_owned(),
        fault: PthFault::Io { attempt: "written", source },
    };
    let file = OpenOptions::new().write(true).create_new(true).open(path).map_err(failed)?;
    match write_archive(BufWriter::new(file), value) {
        Ok(()) => Ok(()),
        Err(error) => {
            let error = match fs::remove_file(path) {
                Ok(()) => error,
                Err(removal) => io::Error::other(format!("{error}; and it stays there: {removal}")),
            };
            Err(failed(error))
        }
    }
}

fn write_archive(file: BufWriter<fs::File>, value: &Value) -> io::Result<()> {
    let mut description = Description { bytes: vec![0x80, 2], arrays: Vec::new() };
    description.value(value);
    description.bytes.push(b'.');
    let Description { bytes, arrays } = description;

    let mut archive = ZipWriter::new(file);
    let options =
        SimpleFileOptions::default().compression_method(CompressionMethod::Stored).large_file(true);
    let mut member = |name: &str, bytes: &[u8]| -> io::Result<()> {
        archive.start_file(format!("archive/{name}"), options).map_err(io_error)?;
        archive.write_all(bytes)
    };
    member("data.pkl", &bytes)?;
    member("byteorder", b"little")?;
    for (key, array) in arrays.iter().enumerate() {
        member(&format!("data/{key}"), &array.bytes)?;
    }
    member("version", b"3\n")?;
    let file = archive.finish().map_err(io_error)?;
    file.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()
}

fn io_error(error: ZipError) -> io::Error {
    if let ZipError::Io(error) = error { error } else { io::Error::other(error) }
}

/// A pickle in the making, and the arrays it refers to by their place.
struct Description<'v> {
    bytes: Vec<u8>,
    arrays: Vec<&'v Array>,
}

impl<'v> Description<'v> {
    fn value(&mut self, value: &'v Value) {
        match value {
            Value::None => self.bytes.push(b'N'),
            Value::Bool(value) => self.bytes.push(if *value { 0x88 } else { 0x89 }),
            Value::Int(value) => self.int(*value),
            Value::Float(value) => {
                self.bytes.push(b'G');
                self.bytes.extend(value.to_be_bytes());
            }
            Value::Text(text) => self.text(text),
            Value::Bytes(bytes) => {
                // Protocol 2 has no bytes; they are the one thing of protocol 3 that is used.
                self.bytes.push(b'B');
                self.length(bytes.len());
                self.bytes.extend(bytes);
            }
            Value::List(items) => {
                self.bytes.extend(b"](");
                items.iter().for_each(|item| self.value(item));
                self.bytes.push(b'e');
            }
            Value::Dict(items) => {
                self.bytes.extend(b"}(");
                for (key, value) in items {
                    self.value(key);
                    self.value(value);
                }
                self.bytes.push(b'u');
            }
            Value::Array(array) => self.array(array),
        }
    }

    fn array(&mut self, array: &'v Array) {
        let key = self.arrays.len();
        self.arrays.push(array);
        let elements = array.bytes.len() / array.dtype.bytes();
        self.global("torch._utils _rebuild_tensor_v2");
        self.bytes.extend(b"((");
        self.text("storage");
        self.global(array.dtype.storage());
        self.text(&key.to_string());
        self.text("cpu");
        self.int(i64::try_from(elements).expect("no memory holds more elements"));
        self.bytes.extend(b"tQ");
        self.int(0);
        self.sizes(&array.shape);
        self.sizes(&row_major(&array.shape));
        self.bytes.push(0x89); // No gradient is wanted.
        self.global("collections OrderedDict");
        self.bytes.extend(b")RtR");
    }

    fn sizes(&mut self, sizes: &[u64]) {
        self.bytes.push(b'(');
        for &size in sizes {
            self.int(i64::try_from(size).expect("no memory holds more elements"));
        }
        self.bytes.push(b't');
    }

    fn global(&mut self, name: &str) {
        self.bytes.push(b'c');
        self.bytes.extend(name.replace(' ', "\n").bytes());
        self.bytes.push(b'\n');
    }

    fn int(&mut self, value: i64) {
        if let Ok(value) = i32::try_from(value) {
            self.bytes.push(b'J');
            self.bytes.extend(value.to_le_bytes());
        } else {
            self.bytes.extend([0x8a, 8]);
            self.bytes.extend(value.to_le_bytes());
        }
    }

    fn text(&mut self, text: &str) {
        self.bytes.push(b'X');
        self.length(text.len());
        self.bytes.extend(text.bytes());
    }

    fn length(&mut self, length: usize) {
        let length = u32::try_from(length).expect("names and notes are short");
        self.bytes.extend(length.to_le_bytes());
    }
}

/// Strides of a row-major array, in elements.
fn row_major(shape: &[u64]) -> Vec<u64> {
    let mut strides = vec![1; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis] * shape[axis].max(1);
    }
    strides
}
