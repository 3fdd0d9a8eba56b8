//! `cargo xtask webdataset`: that the Python library webdataset reads our shards.
//!
//! The shards are those of the built-in digits. Needs the network once, for the library, unless
//! `--python` names a Python that has it; so it is no part of `cargo xtask ci`.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

use crate::workspace::Workspace;
use crate::{process, setup};

const LIBRARY: [&str; 2] = ["webdataset==1.0.2", "numpy==1.26.4"];
const SCRIPT: &str = include_str!("webdataset.py");

/// The built-in shards and how many samples each has.
const SHARDS: [(&str, usize); 2] = [("train-000000.tar", 1437), ("val-000000.tar", 360)];

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// A Python that has the library; one is set up in the cache if not given.
    #[arg(long, value_name = "PROGRAM")]
    python: Option<PathBuf>,
}

pub(crate) fn run(workspace: &Workspace, options: &Options) -> Result<()> {
    let python = match &options.python {
        Some(python) => python.clone(),
        None => setup::python_with(workspace, "webdataset", "import webdataset", &LIBRARY)?,
    };
    for (shard, samples) in SHARDS {
        let path = workspace.root.join("shards/datasets/digits").join(shard);
        let mut reader = workspace.command(&python);
        let seen = process::output(reader.args(["-c", SCRIPT]).arg(path))?;
        check(&seen, samples).with_context(|| format!("webdataset reads {shard} otherwise"))?;
        println!("webdataset: {shard}, {samples} samples");
    }
    Ok(())
}

/// Every sample once, in order, with an image and a class of a digit.
fn check(seen: &str, samples: usize) -> Result<()> {
    let mut count = 0;
    for line in seen.lines() {
        let mut words = line.split(' ');
        let key = words.next().unwrap_or_default();
        let mut number = || words.next().and_then(|word| word.parse::<usize>().ok());
        let (class, bytes) = (number(), number());
        ensure!(key.starts_with(&format!("{count:08}-")), "sample {count} has the key {key}");
        ensure!(class.is_some_and(|class| class < 10), "sample {key} has the class {class:?}");
        ensure!(bytes.is_some_and(|bytes| bytes > 100), "sample {key} has {bytes:?} bytes");
        count += 1;
    }
    ensure!(count == samples, "{count} samples, {samples} were expected");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_with_a_reading_is_said() {
        assert!(check("00000000-a 3 700\n00000001-b 9 800\n", 2).is_ok());
        let message = |seen: &str| check(seen, 1).unwrap_err().to_string();
        assert_eq!(message(""), "0 samples, 1 were expected");
        assert_eq!(message("00000001-b 9 800"), "sample 0 has the key 00000001-b");
        assert!(message("00000000-b 10 800").contains("the class Some(10)"));
        assert!(message("00000000-b 1").contains("None bytes"));
    }
}
