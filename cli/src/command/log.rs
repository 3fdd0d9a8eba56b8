//! `percheron log`: the event log of a run, as it is or as it grows.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result};
use clap::Args;
use cluster::{Record, Timestamp};
use coordinator::Entry;
use serde::Serialize;

use crate::{history::Source, print, tale};

/// How often the log is looked at again while it is followed.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(200);

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The folder of the run, or the URL of its event log.
    #[arg(value_name = "RUN_DIR|URL")]
    run_dir: PathBuf,
    /// Go on with what is appended, until the run has ended.
    #[arg(long)]
    follow: bool,
    /// Print a line of JSON a record: sequence, at_ms (since the Unix epoch) and record.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Line<'a> {
    sequence: u64,
    at_ms: u64,
    record: &'a Record,
}

pub(crate) async fn run(arguments: Arguments) -> Result<ExitCode> {
    let source = Source::of(&arguments.run_dir).await?;
    let (mut next, mut began) = (1, None);
    loop {
        let entries = source.read(next).await?.entries;
        let mut has_ended = false;
        for entry in &entries {
            let began = *began.get_or_insert(entry.at);
            print::out(&line(entry, began, arguments.json)?);
            has_ended = entry.record.ends_the_run();
            next = entry.sequence + 1;
        }
        if !arguments.follow || has_ended {
            return Ok(ExitCode::SUCCESS);
        }
        tokio::time::sleep(FOLLOW_INTERVAL).await;
    }
}

fn line(entry: &Entry, began: Timestamp, json: bool) -> Result<String> {
    let Entry { sequence, at, record } = entry;
    if json {
        let line = Line { sequence: *sequence, at_ms: at.0, record };
        return serde_json::to_string(&line).context("a record cannot be written");
    }
    let since = at.0.saturating_sub(began.0);
    let (seconds, ms) = (since / 1000, since % 1000);
    Ok(format!("{sequence:>6}  {seconds:>6}.{ms:03} s  {}", tale::of(record)))
}
