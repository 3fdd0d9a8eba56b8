//! `percheron drain`, `resize` and `readmit`: who takes part in a run that is on.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::Args;

use crate::{client::Client, print, run_dir::RunDir};

/// `percheron drain`.
#[derive(Debug, Args)]
pub(crate) struct Drain {
    /// The folder of the run.
    #[arg(value_name = "RUN_DIR")]
    run_dir: PathBuf,
    /// The worker's name, such as worker-2 (see `percheron status`).
    #[arg(value_name = "WORKER")]
    worker: String,
}

/// `percheron resize`.
#[derive(Debug, Args)]
pub(crate) struct Resize {
    /// The folder of the run.
    #[arg(value_name = "RUN_DIR")]
    run_dir: PathBuf,
    /// How many workers take part from now on; more stand by.
    #[arg(value_name = "N")]
    workers: u32,
}

/// `percheron readmit`.
#[derive(Debug, Args)]
pub(crate) struct Readmit {
    /// The folder of the run.
    #[arg(value_name = "RUN_DIR")]
    run_dir: PathBuf,
    /// The machine's name (see `percheron incidents`).
    #[arg(value_name = "NODE")]
    node: String,
}

pub(crate) async fn drain(arguments: Drain) -> Result<ExitCode> {
    let Drain { run_dir, worker } = arguments;
    Client::of(&RunDir::at(&run_dir)?)?.drain(&worker).await?;
    print::out(&format!("{worker} leaves after a step that all have done"));
    Ok(ExitCode::SUCCESS)
}

pub(crate) async fn resize(arguments: Resize) -> Result<ExitCode> {
    let Resize { run_dir, workers } = arguments;
    Client::of(&RunDir::at(&run_dir)?)?.resize(workers).await?;
    print::out(&format!("the run goes on with {workers} workers, as soon as they are there"));
    Ok(ExitCode::SUCCESS)
}

pub(crate) async fn readmit(arguments: Readmit) -> Result<ExitCode> {
    let Readmit { run_dir, node } = arguments;
    Client::of(&RunDir::at(&run_dir)?)?.readmit(&node).await?;
    print::out(&format!("workers of machine {node} are let in again"));
    Ok(ExitCode::SUCCESS)
}
