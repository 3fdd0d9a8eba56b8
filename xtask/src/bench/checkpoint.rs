//! `cargo xtask bench checkpoint`: the stall of a checkpoint and what its upload costs, in a fresh folder.

use std::ffi::OsString;

use anyhow::{Context, Result};

use crate::{process, workspace::Workspace};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// What goes on to `percheron bench checkpoint`, as --json or --workers 4. The store is a fresh folder
    /// unless --store names one.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<()> {
    let folder = tempfile::tempdir().context("cannot make a folder for the checkpoints")?;
    let mut bench = workspace.binary("percheron");
    bench.args(["bench", "checkpoint"]).args(&arguments.arguments);
    if !arguments.arguments.iter().any(|argument| argument == "--store") {
        bench.arg("--store").arg(folder.path());
    }
    process::run(&mut bench)
}
