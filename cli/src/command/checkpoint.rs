//! `percheron checkpoint`: the state of a run that is on, kept on demand.

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use cluster::{Record, Step};
use proto::v1::watch_response::Kind;

use crate::{
    client::{self, Client},
    print,
    run_dir::RunDir,
};

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The folder of the run.
    #[arg(value_name = "RUN_DIR")]
    run_dir: PathBuf,
    /// Do not wait: say which step will be kept.
    #[arg(long)]
    no_wait: bool,
}

pub(crate) async fn run(arguments: Arguments) -> Result<ExitCode> {
    let client = Client::of(&RunDir::at(&arguments.run_dir)?)?;
    let step = client.checkpoint().await?;
    if arguments.no_wait {
        print::out(&format!("the state after step {step} will be kept"));
    } else {
        committed(&client, step).await?;
        print::out(&format!("the state after step {step} is kept"));
    }
    Ok(ExitCode::SUCCESS)
}

/// Follows the log until the checkpoint of `step` is committed.
async fn committed(client: &Client, step: Step) -> Result<()> {
    let watch = client.watch(1).await;
    let mut watch = watch.with_context(|| format!("whether step {step} is kept is not known"))?;
    let mut given_up = None;
    while let Some(message) = watch.message().await.context("the coordinator has gone")? {
        let Some(Kind::Entry(entry)) = message.kind else {
            // The first news of the workers comes after all that was in the log.
            if let Some(reason) = given_up.take() {
                bail!("the state after step {step} is not kept: {reason}; ask again");
            }
            continue;
        };
        let record = client::entry(&entry)?.record;
        if record == (Record::CheckpointCommitted { step }) {
            return Ok(());
        }
        if let Record::CheckpointAbandoned { step: other, reason } = record
            && other == step
        {
            given_up = Some(reason);
        }
    }
    bail!("the run has ended, and the state after step {step} is not kept")
}
