//! `percheron bench`: what one process can measure by itself.

use std::{ffi::OsString, os::unix::process::CommandExt as _, process::ExitCode};

use anyhow::{Context as _, Result};
use clap::{Args, Subcommand};

use crate::up::worker_program;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// CPU time and memory of a training step on one process: `percheron bench step --model NAME`.
    #[command(disable_help_flag = true, disable_version_flag = true)]
    Step(Arguments),
}

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Passed on to `percheron-worker bench-step`; `percheron bench step --help` shows what there is.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENT")]
    arguments: Vec<OsString>,
}

pub(crate) fn run(command: Command) -> Result<ExitCode> {
    let Command::Step(Arguments { arguments }) = command;
    let program = worker_program()?;
    let error = std::process::Command::new(&program).arg("bench-step").args(arguments).exec();
    Err(error).with_context(|| format!("cannot start {}", program.display()))
}
