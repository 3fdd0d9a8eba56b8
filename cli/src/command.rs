//! The subcommands.

mod audit;
mod bench;
mod change;
mod checkpoint;
mod checkpoints;
pub(crate) mod coordinator;
mod curves;
mod explain;
mod guard;
mod incidents;
mod log;
mod page;
mod recipe;
mod shards;
mod simulate;
mod slurm;
mod status;
mod train;
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
    /// Train by the original's own command line: its flags under their own names.
    #[command(disable_help_flag = true, disable_version_flag = true)]
    Train(train::Arguments),
    /// Show how far a run is.
    Status(status::Arguments),
    /// Prove from its log that a run consumed every sample once and made every step in order.
    Audit(audit::Arguments),
    /// Show the event log of a run.
    Log(log::Arguments),
    /// Write how a run has learnt: TensorBoard's events, log.jsonl and a picture, into its folder.
    Curves(curves::Arguments),
    /// Show what disturbed a run, who noticed, and what it cost.
    Incidents(incidents::Arguments),
    /// Show a run in the browser: live, or as it was at any record of its log.
    #[command(visible_alias = "replay")]
    Page(page::Arguments),
    /// Have a run that is on keep its state now, and wait until it is in the store.
    Checkpoint(checkpoint::Arguments),
    /// List, verify and delete the checkpoints of a run.
    #[command(subcommand)]
    Checkpoints(checkpoints::Command),
    /// Let a worker of a run leave without loss.
    Drain(change::Drain),
    /// Let more or fewer workers take part in a run that is on.
    Resize(change::Resize),
    /// Let workers of a machine in again that was marked as faulty.
    Readmit(change::Readmit),
    /// Predict how a run gets on while machines fail, with the real rules in virtual time.
    #[command(after_help = simulate::AFTER_HELP)]
    Simulate(simulate::Arguments),
    /// Say why things are as they are.
    #[command(subcommand)]
    Explain(explain::Command),
    /// Pack, index, verify, unpack and describe datasets.
    #[command(subcommand)]
    Shards(shards::Command),
    /// Show recipes.
    #[command(subcommand)]
    Recipe(recipe::Command),
    /// Make a checkpoint of a file of weights: an official .pth, or .safetensors.
    #[command(disable_help_flag = true, disable_version_flag = true)]
    Import(worker::Arguments),
    /// Write the weights of a checkpoint as .pth or .safetensors.
    #[command(disable_help_flag = true, disable_version_flag = true)]
    Export(worker::Arguments),
    /// Evaluate a checkpoint: every exit, every class, and dynamic inference at 33 budgets.
    #[command(disable_help_flag = true, disable_version_flag = true)]
    Eval(worker::Arguments),
    /// Tell what images show: five classes each, with early exit at a budget.
    #[command(disable_help_flag = true, disable_version_flag = true)]
    Infer(worker::Arguments),
    /// Answer what images show, over HTTP and gRPC: batches of requests, early exit at a budget of each, and a page.
    #[command(disable_help_flag = true, disable_version_flag = true)]
    Serve(worker::Arguments),
    /// List the registered models, or show one: parameters, multiply–accumulates, stages, channels.
    #[command(disable_help_flag = true, disable_version_flag = true)]
    Model(worker::Arguments),
    /// Measure what this machine can do.
    #[command(subcommand)]
    Bench(bench::Command),
    /// Coordinate a run: one small process without torch (`up` starts it by itself).
    #[command(after_help = coordinator::AFTER_HELP)]
    Coordinator(coordinator::Arguments),
    /// Run a worker: all arguments go to `percheron-worker` (`up` starts them by itself). With `--devices all`, or a
    /// list such as cuda:0,cuda:1, runs one a device, and another in the place of one that fails.
    #[command(disable_help_flag = true, disable_version_flag = true)]
    Worker(worker::Arguments),
    /// Train on a Slurm cluster.
    #[command(subcommand)]
    Slurm(slurm::Command),
    /// Run a worker on a machine that may be taken away, and say whether to start it again.
    #[command(after_help = guard::AFTER_HELP)]
    Guard(guard::Arguments),
}

impl Command {
    /// Does it; returns what the process ends with.
    pub(crate) fn run(self) -> Result<ExitCode> {
        match self {
            Self::Up(arguments) => in_runtime(up::run(arguments)),
            Self::Train(arguments) => train::run(&arguments),
            Self::Status(arguments) => in_runtime(status::run(arguments)),
            Self::Audit(arguments) => in_runtime(audit::run(arguments)),
            Self::Log(arguments) => in_runtime(log::run(arguments)),
            Self::Curves(arguments) => in_runtime(curves::run(arguments)),
            Self::Incidents(arguments) => in_runtime(incidents::run(arguments)),
            Self::Page(arguments) => in_runtime(page::run(arguments)),
            Self::Checkpoint(arguments) => in_runtime(checkpoint::run(arguments)),
            Self::Checkpoints(command) => in_runtime(checkpoints::run(command)),
            Self::Drain(arguments) => in_runtime(change::drain(arguments)),
            Self::Resize(arguments) => in_runtime(change::resize(arguments)),
            Self::Readmit(arguments) => in_runtime(change::readmit(arguments)),
            Self::Simulate(arguments) => simulate::run(&arguments),
            Self::Explain(command) => explain::run(command),
            Self::Shards(command) => shards::run(command),
            Self::Recipe(command) => recipe::run(command),
            Self::Import(arguments) => worker::run_tool("import", arguments),
            Self::Export(arguments) => worker::run_tool("export", arguments),
            Self::Eval(arguments) => worker::run_eval(arguments),
            Self::Infer(arguments) => worker::run_tool("infer", arguments),
            Self::Serve(arguments) => worker::run_tool("serve", arguments),
            Self::Model(arguments) => worker::run_tool("model", arguments),
            Self::Bench(command) => bench::run(command),
            Self::Coordinator(arguments) => in_runtime(coordinator::run(arguments)),
            Self::Worker(arguments) => worker::run(arguments),
            Self::Slurm(command) => in_runtime(slurm::run(command)),
            Self::Guard(arguments) => in_runtime(guard::run(arguments)),
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
