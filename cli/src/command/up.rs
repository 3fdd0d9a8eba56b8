//! `percheron up`: a whole run on this machine.

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Result};
use clap::Args;

use crate::{
    print,
    run_dir::STANDBYS_MAX,
    up::{Ending, Request, Start, Summary, prepare, supervise, words},
};

pub(super) const AFTER_HELP: &str = "\
The folder of the run holds its recipe, its event log, its checkpoints and, in logs/, what coordinator \
and workers write. Ctrl-C keeps the state and stops a run, once more stops it at once; the same command with \
--run-dir goes on from the newest checkpoint, and the result has the same bits.

Ends with 0 if the run is finished, 130 if it was stopped, 2 for wrong usage, else 1.";

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// A built-in recipe (see `percheron recipe list`) or a file. May be left out if --run-dir holds a
    /// run: then its own recipe is taken.
    #[arg(long, value_name = "NAME|PATH")]
    recipe: Option<String>,
    /// How many workers to start; at most the recipe's virtual_ranks.
    #[arg(long, value_name = "N", default_value_t = 1)]
    workers: u32,
    /// The folder of the run. One that holds a run of the same recipe goes on from its newest
    /// checkpoint [default: the first free of runs/NAME-001, runs/NAME-002, ...].
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// Where a new run keeps its checkpoints: s3://BUCKET/PREFIX, with endpoint and credentials from the
    /// environment as the AWS tools have them, or another folder. A run stays with what it began with
    /// [default: the folder of the run].
    #[arg(long, value_name = "LOCATION")]
    checkpoints: Option<String>,
    /// Where a new run keeps its event log: s3://BUCKET/PREFIX, or a folder that other nodes see, so that
    /// `percheron coordinator --log` can go on with the run from any of them. A run stays with what it began
    /// with [default: a database in the folder of the run].
    #[arg(long, value_name = "LOCATION")]
    log: Option<String>,
    /// How many more coordinators to start beside the one that leads: one of them takes over when it is silent.
    /// Needs an event log in a store (--log).
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(..=i64::from(STANDBYS_MAX)))]
    standbys: u32,
    /// Lay a value over the recipe, such as `seed=7` or `ema.decay=0.99`; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Disturb the run when it reaches a step: kill@STEP, join@STEP, stop@STEP (a worker hangs) and
    /// coordinator-kill@STEP, separated by commas, such as kill@60,join@90.
    #[arg(long, value_name = "SPEC")]
    chaos: Option<String>,
    /// If the newest checkpoint of --run-dir is damaged, set it aside (nothing is deleted) and go on from
    /// the newest intact one. Without this, `up` refuses and names the damaged object.
    #[arg(long)]
    quarantine: bool,
    /// What the workers compute on, in turn: cpu, or GPUs such as cuda:0,cuda:1.
    #[arg(long = "device", value_name = "LIST", value_delimiter = ',')]
    devices: Vec<String>,
    /// What moves gradients between GPUs: nccl, or mesh by way of the host [default: nccl].
    #[arg(long, value_name = "NAME", value_parser = ["nccl", "mesh"])]
    transport: Option<String>,
    /// Print the result as one line of JSON; what happens on the way goes to the standard error.
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(arguments: Arguments) -> Result<ExitCode> {
    let Arguments { recipe, workers, run_dir, checkpoints, sets, chaos, quarantine, json, .. } =
        arguments;
    let Arguments { devices, transport, log, standbys, .. } = arguments;
    let ready = None;
    let asked = Request {
        recipe,
        ready,
        workers,
        run_dir,
        checkpoints,
        log,
        standbys,
        sets,
        chaos,
        json,
        quarantine,
        devices,
        transport,
    };
    Ok(carry_out(asked).await?.0)
}

/// Trains as asked; returns what the process ends with, and the folder of a run that is finished.
pub(super) async fn carry_out(request: Request) -> Result<(ExitCode, Option<PathBuf>)> {
    let json = request.json;
    let ending = match prepare(request).await? {
        Start::Finished(summary) => Ending::Finished(summary),
        Start::Run(prepared) => supervise(*prepared).await?,
    };
    match ending {
        Ending::Finished(summary) => {
            show(&summary, json)?;
            Ok((ExitCode::SUCCESS, Some(PathBuf::from(&summary.run_dir))))
        }
        Ending::Interrupted => Ok((ExitCode::from(130), None)),
    }
}

fn show(summary: &Summary, json: bool) -> Result<()> {
    if json {
        print::out(&serde_json::to_string(summary).context("the result cannot be written")?);
    } else {
        words::sum_up(summary).iter().for_each(|line| print::out(line));
    }
    Ok(())
}
