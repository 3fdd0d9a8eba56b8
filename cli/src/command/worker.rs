//! `percheron worker`: hands over to `percheron-worker`, which links libtorch.

use std::{ffi::OsString, os::unix::process::CommandExt as _, process::ExitCode};

use anyhow::{Context as _, Result};
use clap::Args;

use crate::up::worker_program;

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Passed on as they are; `percheron worker --help` shows what there is.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENT")]
    arguments: Vec<OsString>,
}

pub(crate) fn run(arguments: Arguments) -> Result<ExitCode> {
    let program = worker_program()?;
    let error = std::process::Command::new(&program).args(arguments.arguments).exec();
    Err(error).with_context(|| format!("cannot start {}", program.display()))
}
