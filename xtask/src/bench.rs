//! `cargo xtask bench NAME`: benchmarks on the release binaries.
//!
//! `percheron bench` measures what one process can measure by itself, and gets every name that is
//! not known here. A benchmark that drives a whole cluster from outside, or compares us with somebody
//! else's program, is a variant of [`Benchmark`] and a file below `bench/`.

mod data;
mod figures;
mod histories;
mod recovery;
mod steady;
mod step_against;

use std::ffi::OsString;

use anyhow::Result;

use crate::workspace::Workspace;
use crate::{process, setup, test};

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Benchmark {
    /// Kill workers of a run, and measure how fast the others stop and go on.
    Recovery(recovery::Arguments),
    /// Train for long, and see whether memory or step time grow.
    Steady(steady::Arguments),
    /// Train the whole recipe with every number of workers and with faults: one state.
    Histories(histories::Arguments),
    /// Time a training step, in turns with other builds of the worker or with PyTorch.
    StepAgainst(step_against::Arguments),
    /// Images a core prepares in a second, ours and a Python pipeline's.
    Data(data::Options),
    /// Any other name, with its arguments, is one of `percheron bench`.
    #[command(external_subcommand)]
    OfPercheron(Vec<OsString>),
}

pub(crate) fn run(workspace: &Workspace, benchmark: &Benchmark) -> Result<()> {
    if let Benchmark::Data(options) = benchmark {
        return data::run(workspace, options); // It needs no torch.
    }
    setup::run(workspace)?;
    test::build(workspace)?;
    match benchmark {
        Benchmark::Recovery(arguments) => recovery::run(workspace, arguments),
        Benchmark::Steady(arguments) => steady::run(workspace, arguments),
        Benchmark::Histories(arguments) => histories::run(workspace, arguments),
        Benchmark::StepAgainst(arguments) => step_against::run(workspace, arguments),
        Benchmark::Data(options) => data::run(workspace, options),
        Benchmark::OfPercheron(arguments) => {
            process::run(workspace.binary("percheron").arg("bench").args(arguments))
        }
    }
}
