//! `percheron guard`: a worker on a machine that may be taken away.

use std::{ffi::OsString, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::Result;
use clap::Args;
use tracing_subscriber::EnvFilter;

use crate::guard::{self, Cloud, Request};

pub(super) const AFTER_HELP: &str = "\
SIGTERM, SIGINT, SIGUSR1, SIGUSR2 and a cloud's notice all have the worker leave after its step: nothing is lost.

Ends with 0 if the run is finished or an operator let the worker go, 2 if it was refused and would be again, \
75 if it is to be started again (it was asked to stop, or no coordinator answered), else with what the \
worker ended with.";

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Ask this cloud whether the machine will be taken away.
    #[arg(long, value_enum, value_name = "CLOUD")]
    notice: Option<Cloud>,
    /// Ask at this address instead of the cloud's own.
    #[arg(long, value_name = "URL", requires = "notice")]
    notice_url: Option<String>,
    /// The event log of the run, or its folder: once the run is finished, no worker is started.
    #[arg(long, value_name = "DIR|URL")]
    log: Option<PathBuf>,
    /// A file with the coordinator's address, as `percheron coordinator --addr-file` writes it. It may move.
    #[arg(long, value_name = "FILE")]
    coordinator_file: Option<PathBuf>,
    /// Wait so long for a coordinator, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    patience: u64,
    /// For `percheron-worker`.
    #[arg(last = true, required = true, value_name = "ARGUMENT")]
    arguments: Vec<OsString>,
}

pub(crate) async fn run(arguments: Arguments) -> Result<ExitCode> {
    let filter =
        EnvFilter::try_from_env("PERCHERON_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let format = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false);
    format.with_writer(std::io::stderr).init();
    let Arguments { notice, notice_url, log, coordinator_file, patience, arguments } = arguments;
    let patience = Duration::from_secs(patience);
    let cloud = notice;
    let request = Request { cloud, notice_url, log, coordinator_file, patience, arguments };
    Ok(ExitCode::from(guard::run(request).await?))
}
