//! The subcommands.

mod bench;
mod coordinator;
mod recipe;
mod shards;
mod status;
mod up;
mod worker;

use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::Subcommand;

/// What `percheron` can do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Train on this machine: start a coordinator and workers, supervise them, show how far they are.
    #[command(after_help = up::AFTER_HELP)]
    Up(up::Arguments),
    /// Show how far a run is.
    Status(status::Arguments),
    /// Pack, verify and inspect datasets.
    #[command(subcommand)]
    Shards(shards::Command),
    /// Show recipes.
    #[command(subcommand)]
    Recipe(recipe::Command),
    /// Measure this program on this machine.
    #[command(subcommand)]
    Bench(bench::Command),
    /// Coordinate a run: one small process without torch (`up` starts it by itself).
    #[command(after_help = coordinator::AFTER_HELP)]
    Coordinator(coordinator::Arguments),
    /// Run a worker: all arguments go to `percheron-worker` (`up` starts them by itself).
    #[command(disable_help_flag = true, disable_version_flag = true)]
    Worker(worker::Arguments),
}

impl Command {
    /// Does it; returns what the process ends with.
    pub(crate) fn run(self) -> Result<ExitCode> {
        match self {
            Self::Up(arguments) => in_runtime(up::run(arguments)),
            Self::Status(arguments) => in_runtime(status::run(arguments)),
            Self::Shards(command) => shards::run(command),
            Self::Recipe(command) => recipe::run(command),
            Self::Bench(command) => bench::run(command),
            Self::Coordinator(arguments) => in_runtime(coordinator::run(arguments)),
            Self::Worker(arguments) => worker::run(arguments),
        }
    }
}

fn in_runtime(work: impl Future<Output = Result<ExitCode>>) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.context("cannot start the runtime")?;
    let result = runtime.block_on(work);
    runtime.shutdown_background(); // Nothing that is still under way is waited for.
    result
}
