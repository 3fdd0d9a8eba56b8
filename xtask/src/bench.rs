//! `cargo xtask bench NAME`: benchmarks on the release binaries.
//!
//! `percheron bench` measures what one process can measure by itself, and gets every name that is
//! not known here. A benchmark that drives a whole cluster from outside, or compares us with somebody
//! else's program, is a variant of [`Benchmark`] and a file below `bench/`.

use std::ffi::OsString;

use anyhow::Result;

use crate::workspace::Workspace;
use crate::{process, setup, test};

mod data;

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Benchmark {
    /// Images a core prepares in a second, ours and a Python pipeline's.
    Data(data::Options),
    /// Any other name, with its arguments, is one of `percheron bench`.
    #[command(external_subcommand)]
    OfPercheron(Vec<OsString>),
}

pub(crate) fn run(workspace: &Workspace, benchmark: &Benchmark) -> Result<()> {
    match benchmark {
        Benchmark::Data(options) => data::run(workspace, options),
        Benchmark::OfPercheron(arguments) => {
            workspace.check_program()?;
            setup::run(workspace)?;
            test::build(workspace)?;
            process::run(workspace.binary("percheron").arg("bench").args(arguments))
        }
    }
}
