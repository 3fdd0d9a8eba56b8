//! `cargo xtask bench NAME`: benchmarks on the release binaries.
//!
//! `percheron bench` measures what one process can measure by itself, and gets every name that is
//! not known here. A benchmark that drives a whole cluster from outside is a variant of
//! [`Benchmark`] and a file below `bench/`.

use std::ffi::OsString;

use anyhow::Result;

use crate::workspace::Workspace;
use crate::{process, setup, test};

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Benchmark {
    /// Any other name, with its arguments, is one of `percheron bench`.
    #[command(external_subcommand)]
    OfPercheron(Vec<OsString>),
}

pub(crate) fn run(workspace: &Workspace, benchmark: &Benchmark) -> Result<()> {
    setup::run(workspace)?;
    test::build(workspace)?;
    match benchmark {
        Benchmark::OfPercheron(arguments) => {
            process::run(workspace.binary("percheron").arg("bench").args(arguments))
        }
    }
}
