//! `cargo xtask bench recovery`: from `kill -9` of a worker to the abort of the others, and to the next
//! committed step.

use anyhow::{Context, Result, ensure};

use super::figures::{Training, median, train};
use crate::workspace::Workspace;

/// Steps from a kill to the next, with a worker that joins in between.
const PERIOD: u64 = 8;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// How many workers to kill, one after the other.
    #[arg(long, default_value_t = 20)]
    kills: u64,
    /// How many workers train.
    #[arg(long, default_value_t = 3)]
    workers: u32,
    /// Print one object as the last line.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<()> {
    ensure!(arguments.kills > 0 && arguments.workers > 1, "nobody would be left, or nobody killed");
    let folder = tempfile::tempdir().context("cannot make a folder for the run")?;
    let steps = (arguments.kills + 1) * PERIOD;
    let sets = [
        format!("max_steps={steps}"),
        format!("epochs={}", steps), // More than enough; max_steps ends the run.
        "evaluate_every_epochs=0".to_owned(),
        "checkpoint.every_epochs=0".to_owned(),
    ];
    let faults = (1..=arguments.kills)
        .map(|kill| format!("kill@{},join@{}", kill * PERIOD, kill * PERIOD + PERIOD / 2));
    let outcome = train(
        workspace,
        &Training {
            recipe: "digits",
            workers: arguments.workers,
            chaos: &faults.collect::<Vec<_>>().join(","),
            sets: &sets,
            run_dir: &folder.path().join("recovery"),
        },
    )?;
    let summary = |figures: &[u64]| {
        let middle = median(figures).context("no kill was measured")?;
        let most = figures.iter().max().context("no kill was measured")?;
        anyhow::Ok((middle, *most))
    };
    let (abort, abort_max) = summary(&outcome.abort_ms)?;
    let (next, next_max) = summary(&outcome.recovery_ms)?;
    let step = outcome.step_ms_median;
    println!("\n{} kills of one of {} workers", outcome.recovery_ms.len(), arguments.workers);
    println!(
        "  kill to abort of all others    median {abort:.0} ms, most {abort_max} ms (goal 250)"
    );
    println!(
        "  kill to the next committed step  median {next:.0} ms, most {next_max} ms (goal 1000 + \
         a step of {step:.0} ms)"
    );
    if arguments.json {
        let figures = serde_json::json!({
            "kills": outcome.recovery_ms.len(), "workers": arguments.workers,
            "abort_ms_median": abort, "abort_ms_max": abort_max,
            "next_step_ms_median": next, "next_step_ms_max": next_max,
            "step_ms_median": step, "abort_ms": outcome.abort_ms, "next_step_ms": outcome.recovery_ms,
        });
        println!("{figures}");
    }
    Ok(())
}
