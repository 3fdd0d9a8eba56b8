//! What `percheron-worker`, which links libtorch, does under the name of `percheron`.

use std::{ffi::OsString, os::unix::process::CommandExt as _, process::ExitCode};

use anyhow::{Context as _, Result};
use clap::Args;

use super::train::data::for_evaluation;
use crate::up::worker_program;

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Passed on as they are; --help shows what there is.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENT")]
    pub(super) arguments: Vec<OsString>,
}

/// `percheron worker`: a worker of a run.
pub(crate) fn run(arguments: Arguments) -> Result<ExitCode> {
    hand_over(None, "percheron worker", arguments)
}

/// `percheron TOOL`: what needs the network but no run.
pub(crate) fn run_tool(tool: &str, arguments: Arguments) -> Result<ExitCode> {
    hand_over(Some(tool), "percheron", arguments)
}

/// `percheron eval`: on shards, or on an image folder, which is packed first.
pub(crate) fn run_eval(arguments: Arguments) -> Result<ExitCode> {
    let arguments = for_evaluation(arguments.arguments)?;
    run_tool("eval", Arguments { arguments })
}

/// Becomes `percheron-worker`, which calls itself `name` in its help.
fn hand_over(tool: Option<&str>, name: &str, arguments: Arguments) -> Result<ExitCode> {
    let program = worker_program()?;
    let mut command = std::process::Command::new(&program);
    let error = command.arg0(name).args(tool).args(arguments.arguments).exec();
    Err(error).with_context(|| format!("cannot start {}", program.display()))
}
