//! `cargo xtask bench NAME`: benchmarks on the release binaries.
//!
//! `percheron bench` measures what one process can measure by itself, and gets every name that is
//! not known here. A benchmark that drives a whole cluster from outside, or compares us with somebody
//! else's program, is a variant of [`Benchmark`] and a file below `bench/`.

mod accuracy;
mod away;
mod checkpoint;
mod clothing;
mod data;
mod figures;
mod histories;
mod instructions;
mod reader;
mod recovery;
mod steady;
mod step_against;
mod tolerance;

use std::ffi::OsString;

use anyhow::Result;

use crate::workspace::Workspace;
use crate::{process, setup, test};

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Benchmark {
    /// Kill workers of a run, and measure how fast the others stop and go on.
    Recovery(recovery::Arguments),
    /// Take the coordinator away, replace it by one that stands by, stop it and let it go on.
    Away(away::Arguments),
    /// Train for long, and see whether memory or step time grow.
    Steady(steady::Arguments),
    /// Train the whole recipe with every number of workers and with faults: one state.
    Histories(histories::Arguments),
    /// How long training waits for checkpoints, and what they cost beside it.
    Checkpoint(checkpoint::Arguments),
    /// What being ready for faults costs while none comes, in CPU time.
    Tolerance(tolerance::Arguments),
    /// Pack photographs of clothing and train on them with the whole recipe.
    Clothing(clothing::Arguments),
    /// What networks learn from photographs of clothing, over several seeds.
    Accuracy(accuracy::Arguments),
    /// Time a training step, in turns with other builds of the worker or with PyTorch.
    StepAgainst(step_against::Arguments),
    /// Images a core prepares in a second, ours and a Python pipeline's.
    Data(data::Options),
    /// How many instructions an image takes, held to a limit.
    Instructions(instructions::Arguments),
    /// What reading a sample costs: finding it, reading it, checking it.
    Reader(reader::Arguments),
    /// Any other name, with its arguments, is one of `percheron bench`.
    #[command(external_subcommand)]
    OfPercheron(Vec<OsString>),
}

/// What CI holds to a limit: counts, which are the same on a busy machine.
pub(crate) fn check(workspace: &Workspace) -> Result<()> {
    instructions::run(workspace, &instructions::Arguments::default())
}

pub(crate) fn run(workspace: &Workspace, benchmark: &Benchmark) -> Result<()> {
    let without_torch =
        matches!(benchmark, Benchmark::Data(_) | Benchmark::Instructions(_) | Benchmark::Reader(_));
    if !without_torch {
        setup::run(workspace)?;
        test::build(workspace)?;
    }
    match benchmark {
        Benchmark::Recovery(arguments) => recovery::run(workspace, arguments),
        Benchmark::Away(arguments) => away::run(workspace, arguments),
        Benchmark::Steady(arguments) => steady::run(workspace, arguments),
        Benchmark::Histories(arguments) => histories::run(workspace, arguments),
        Benchmark::Checkpoint(arguments) => checkpoint::run(workspace, arguments),
        Benchmark::Tolerance(arguments) => tolerance::run(workspace, arguments),
        Benchmark::Clothing(arguments) => clothing::run(workspace, arguments),
        Benchmark::Accuracy(arguments) => accuracy::run(workspace, arguments),
        Benchmark::StepAgainst(arguments) => step_against::run(workspace, arguments),
        Benchmark::Data(options) => data::run(workspace, options),
        Benchmark::Instructions(arguments) => instructions::run(workspace, arguments),
        Benchmark::Reader(arguments) => reader::run(workspace, arguments),
        Benchmark::OfPercheron(arguments) => {
            process::run(workspace.binary("percheron").arg("bench").args(arguments))
        }
    }
}
