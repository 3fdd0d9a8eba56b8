//! `percheron incidents`: what disturbed a run, who noticed, and what it cost.

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Result};
use clap::Args;

use crate::{
    history::Source,
    incidents::{self, Incident},
    print,
};

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The folder of the run, or the URL of its event log.
    #[arg(value_name = "RUN_DIR|URL")]
    run_dir: PathBuf,
    /// Print a line of JSON an incident. Times are in milliseconds.
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(arguments: Arguments) -> Result<ExitCode> {
    let source = Source::of(&arguments.run_dir).await?;
    let entries = source.read(1).await?.entries;
    let found = incidents::of(&entries);
    for incident in &found {
        if arguments.json {
            let line = serde_json::to_string(incident).context("an incident cannot be written")?;
            print::out(&line);
        } else {
            show(incident);
        }
    }
    if !arguments.json {
        let repeated: u64 = found.iter().map(|incident| incident.repeated_steps).sum();
        let cost: u64 = found.iter().filter_map(|incident| incident.cost_ms).sum();
        let count = found.len();
        print::out(&format!("{count} incidents; {repeated} steps repeated; {cost} ms lost"));
    }
    Ok(ExitCode::SUCCESS)
}

fn show(incident: &Incident) {
    let Incident { sequence, step, what, noticed_by, recovery_ms, repeated_steps, cost_ms, .. } =
        incident;
    print::out(&format!("record {sequence}, after step {step}: {}", what.join("; ")));
    let end = match (recovery_ms, cost_ms) {
        (Some(recovery), Some(cost)) => format!(
            "{recovery} ms until the next step, {repeated_steps} steps repeated, {cost} ms lost"
        ),
        _ => "not over yet".to_owned(),
    };
    print::out(&format!("    noticed by {noticed_by}; {end}"));
}
