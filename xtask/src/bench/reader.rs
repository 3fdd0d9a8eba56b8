//! `cargo xtask bench reader`: what the way from a sample's number to its checked bytes costs.
//!
//! Packs the images of a folder, as one class, and has `percheron bench reader` read them.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

use crate::process;
use crate::workspace::Workspace;

/// Copies of each file: a processor's cache holds a few of them, an epoch's samples it does not.
const COPIES: usize = 8;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Folder of .jpg files.
    #[arg(long, value_name = "DIR")]
    images: PathBuf,
    /// Where to pack them to and read them from: s3://BUCKET/PREFIX, whose variables are in the environment
    /// [default: a folder].
    #[arg(long, value_name = "LOCATION")]
    out: Option<String>,
    /// One JSON object and nothing else.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<()> {
    let mut build = workspace.cargo(&["build"]);
    process::output(build.args(["--release", "-p", "cli", "--bin", "percheron"]))?;
    let folder = tempfile::tempdir().context("cannot make a folder for the dataset")?;
    let class = folder.path().join("images/all");
    fs::create_dir_all(&class)?;
    let mut files = 0;
    for entry in fs::read_dir(&arguments.images).context("the folder of the images")? {
        let path = entry?.path();
        let Some(name) = path.file_name().filter(|_| path.extension().is_some_and(|e| e == "jpg"))
        else {
            continue;
        };
        for copy in 0..COPIES {
            fs::copy(&path, class.join(format!("{copy}-{}", name.display())))?;
        }
        files += 1;
    }
    ensure!(files > 0, "the folder has no .jpg file");
    let in_folder = || folder.path().join("data").display().to_string();
    let data = arguments.out.clone().unwrap_or_else(in_folder);
    let mut pack = workspace.binary("percheron");
    pack.args(["shards", "pack"]).arg(folder.path().join("images")).arg("--out").arg(&data);
    process::output(&mut pack)?;
    let mut reader = workspace.binary("percheron");
    reader.args(["bench", "reader"]).arg(&data).args(arguments.json.then_some("--json"));
    print!("{}", process::output(&mut reader)?);
    Ok(())
}
