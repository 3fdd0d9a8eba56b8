//! Makes the built-in dataset anew: `cargo run --release -p shards --example make_digits [OUT]`.
//!
//! `OUT` is `shards/datasets/digits` by default; its old files are replaced. The same source gives the
//! same bytes, which a test checks.

mod digits;

use std::{env, error::Error, fs, path::PathBuf};

fn main() -> Result<(), Box<dyn Error>> {
    let dataset = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/datasets/digits"));
    let out = env::args_os().nth(1).map_or_else(|| dataset.clone(), PathBuf::from);
    let table = fs::read(dataset.join("digits.csv.gz"))?;
    let made = tempfile::tempdir()?;
    digits::make(&table, made.path())?;
    fs::create_dir_all(&out)?;
    for entry in fs::read_dir(made.path())? {
        let entry = entry?;
        fs::copy(entry.path(), out.join(entry.file_name()))?;
    }
    Ok(())
}
