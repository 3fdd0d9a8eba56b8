//! `cargo xtask bench histories`: the whole recipe with every number of workers and with faults. All
//! must end in one state. The tests do the same with a recipe of a few steps.

use anyhow::{Context, Result, ensure};

use super::figures::{Outcome, Training, train};
use crate::workspace::Workspace;

/// Workers at the start, and what happens to them.
const HISTORIES: [(u32, &str); 10] = [
    (1, ""),
    (2, ""),
    (3, ""),
    (4, ""),
    (3, "kill@60,join@90"),
    (2, "kill@31,join@40,kill@101,join@120"),
    (1, "kill@70,join@75,join@80"),
    (4, "stop@50,kill@90"),
    (3, "coordinator-kill@20,kill@80,coordinator-kill@120"),
    (2, "join@10,join@20,kill@66,stop@100,coordinator-kill@101,join@115"),
];

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// A recipe key to lay over `digits`, as for `percheron up`; may be given several times.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
}

pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<()> {
    let folder = tempfile::tempdir().context("cannot make a folder for the runs")?;
    let mut outcomes: Vec<Outcome> = Vec::new();
    for (number, (workers, chaos)) in HISTORIES.into_iter().enumerate() {
        let run_dir = folder.path().join(format!("history-{number}"));
        println!("history {}: {workers} workers, {}", number + 1, name(chaos));
        let training =
            Training { recipe: "digits", workers, chaos, sets: &arguments.sets, run_dir: &run_dir };
        outcomes.push(train(workspace, &training)?);
    }
    println!("\nworkers  faults -> state, generations, repeated steps, merge top-1 (weights, EMA)");
    for ((workers, chaos), outcome) in HISTORIES.into_iter().zip(&outcomes) {
        println!(
            "{workers}  {} -> {}, {}, {}, {:.2} %, {:.2} %",
            name(chaos),
            outcome.state_sha256,
            outcome.generations,
            outcome.repeated_steps,
            outcome.top1.merge,
            outcome.ema_top1.merge
        );
    }
    let first = outcomes.first().context("there are histories")?;
    let equal = outcomes.iter().all(|outcome| outcome.state_sha256 == first.state_sha256);
    ensure!(equal, "the states differ");
    println!("{} histories, one state", outcomes.len());
    Ok(())
}

fn name(chaos: &str) -> &str {
    if chaos.is_empty() { "undisturbed" } else { chaos }
}
