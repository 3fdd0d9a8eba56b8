//! `percheron page`: a run in the browser.

use std::{net::SocketAddr, path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::Args;

use crate::{history::Source, page};

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The folder of the run, or the URL of its event log.
    #[arg(value_name = "RUN_DIR|URL")]
    run_dir: PathBuf,
    /// Where to listen: an address of this machine alone. Port 0 takes a free one.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8030")]
    listen: SocketAddr,
}

pub(crate) async fn run(arguments: Arguments) -> Result<ExitCode> {
    page::serve(Source::of(&arguments.run_dir).await?, arguments.listen).await?;
    Ok(ExitCode::SUCCESS)
}
