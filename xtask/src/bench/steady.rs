//! `cargo xtask bench steady`: whether a worker's memory or the time of a step grow.

use anyhow::{Context, Result};

use super::figures::{Training, train};
use crate::workspace::Workspace;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Steps to train.
    #[arg(long, default_value_t = 1200)]
    steps: u64,
    /// How many workers train.
    #[arg(long, default_value_t = 2)]
    workers: u32,
    /// Print one object as the last line.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<()> {
    let folder = tempfile::tempdir().context("cannot make a folder for the run")?;
    let sets = [
        format!("max_steps={}", arguments.steps),
        format!("epochs={}", arguments.steps), // More than enough; max_steps ends the run.
        "virtual_ranks=2".to_owned(),
        "batch_size=4".to_owned(),
        "evaluate_every_epochs=1".to_owned(),
        "checkpoint.every_epochs=1".to_owned(),
    ];
    let outcome = train(
        workspace,
        &Training {
            recipe: "digits",
            workers: arguments.workers,
            chaos: "",
            sets: &sets,
            run_dir: &folder.path().join("steady"),
        },
    )?;
    println!("\n{} steps on {} workers", outcome.steps, arguments.workers);
    println!("  step   resident memory of a worker   step time (median of the 100 before)");
    for (step, bytes) in &outcome.worker_rss_bytes {
        let time = outcome.step_ms_by_100.iter().find(|(upto, _)| upto == step);
        let time = time.map_or_else(String::new, |(_, ms)| format!("{ms:.1} ms"));
        println!("  {step:>5}  {:>10.1} MiB               {time}", mib(*bytes));
    }
    println!(
        "  median step {:.1} ms, {:.1} images/s, most memory {:.1} MiB",
        outcome.step_ms_median,
        outcome.images_per_s,
        mib(outcome.worker_rss_bytes_max)
    );
    if arguments.json {
        let figures = serde_json::json!({
            "steps": outcome.steps, "workers": arguments.workers,
            "rss_bytes": outcome.worker_rss_bytes, "step_ms_by_100": outcome.step_ms_by_100,
            "step_ms_median": outcome.step_ms_median, "images_per_s": outcome.images_per_s,
            "rss_bytes_max": outcome.worker_rss_bytes_max,
        });
        println!("{figures}");
    }
    Ok(())
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
