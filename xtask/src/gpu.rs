//! `cargo xtask gpu`: builds the programs, and runs what only a GPU can tell where there is one.
//!
//! A machine with a GPU often has no Rust, so everything that is needed lies in one folder: the stripped programs
//! (libtorch comes from that machine's PyTorch), and `checks.py` beside this file, which runs them.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;

use crate::workspace::Workspace;
use crate::{process, setup, test};

const PROGRAMS: [&str; 2] = ["percheron", "percheron-worker"];

#[derive(Debug, Clone, Args)]
pub(crate) struct Options {
    /// Where to put the programs.
    #[arg(long, value_name = "DIR", default_value = "target/gpu")]
    out: PathBuf,
    /// Images to train on: a folder with train.tar and validation.tar in WebDataset's layout.
    #[arg(long, value_name = "DIR")]
    images: Option<PathBuf>,
}

pub(crate) fn run(workspace: &Workspace, options: &Options) -> Result<()> {
    setup::run(workspace)?;
    test::build(workspace)?;
    let out = workspace.root.join(&options.out);
    fs::create_dir_all(&out).with_context(|| format!("cannot make {}", out.display()))?;
    for name in PROGRAMS {
        let program = workspace.binary(name);
        let mut strip = workspace.command("strip");
        process::run(strip.arg("-o").arg(out.join(name)).arg(program.get_program()))?;
    }
    let mut checks = vec!["xtask/src/gpu/checks.py".to_owned(), options.out.display().to_string()];
    if let Some(images) = &options.images {
        checks.extend(["--images".to_owned(), images.display().to_string()]);
    }
    if has_gpu(workspace) {
        return process::run(
            workspace.command("python3").args(&checks).current_dir(&workspace.root),
        );
    }
    println!(
        "gpu: this machine has none. Where there is one, with PyTorch of the same version, run in a copy of this \
         folder with {}:\n\n    python3 {}",
        options.out.display(),
        checks.join(" ")
    );
    Ok(())
}

/// Whether the driver names a GPU.
fn has_gpu(workspace: &Workspace) -> bool {
    Path::new("/dev/nvidiactl").exists()
        && process::answers(workspace.command("nvidia-smi").arg("--list-gpus"))
}
