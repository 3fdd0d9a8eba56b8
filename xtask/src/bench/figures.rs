//! What the benchmarks share: a training run by command, and medians.

use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::process;
use crate::workspace::Workspace;

/// A run of `percheron up`.
pub(super) struct Training<'a> {
    pub(super) recipe: &'a str,
    pub(super) workers: u32,
    pub(super) chaos: &'a str,
    pub(super) sets: &'a [String],
    pub(super) run_dir: &'a Path,
}

/// The last line that `percheron up --json` prints, as far as the benchmarks read it.
#[derive(Debug, Deserialize)]
pub(super) struct Outcome {
    pub(super) steps: u64,
    pub(super) state_sha256: String,
    pub(super) top1: Top1,
    pub(super) ema_top1: Top1,
    pub(super) generations: u64,
    pub(super) repeated_steps: u64,
    pub(super) recovery_ms: Vec<u64>,
    pub(super) abort_ms: Vec<u64>,
    pub(super) images_per_s: f64,
    pub(super) step_ms_median: f64,
    pub(super) step_ms_by_100: Vec<(u64, f64)>,
    pub(super) worker_rss_bytes_max: u64,
    pub(super) worker_rss_bytes: Vec<(u64, u64)>,
}

/// Top-1 of the four exits, in percent.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Top1 {
    pub(super) early3: f64,
    pub(super) att: f64,
    pub(super) cnn: f64,
    pub(super) merge: f64,
}

/// Trains and returns what came out. Progress goes to the terminal.
pub(super) fn train(workspace: &Workspace, training: &Training<'_>) -> Result<Outcome> {
    let mut up = workspace.binary("percheron");
    up.args(["up", "--recipe", training.recipe, "--json", "--workers"]);
    up.arg(training.workers.to_string());
    if !training.chaos.is_empty() {
        up.args(["--chaos", training.chaos]);
    }
    for set in training.sets {
        up.args(["--set", set]);
    }
    let output = process::output(up.arg("--run-dir").arg(training.run_dir))?;
    let last = output.lines().last().context("`percheron up --json` printed nothing")?;
    serde_json::from_str(last).context("cannot understand the last line of `percheron up --json`")
}

/// The middle of some figures; of an even number, the mean of the two. Nothing of nothing.
pub(super) fn median(figures: &[u64]) -> Option<f64> {
    let mut sorted = figures.to_vec();
    sorted.sort_unstable();
    let middle = sorted.len() / 2;
    let upper = *sorted.get(middle)? as f64;
    let lower = if sorted.len().is_multiple_of(2) { sorted[middle - 1] as f64 } else { upper };
    Some(f64::midpoint(lower, upper))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_in_the_middle() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[5]), Some(5.0));
        assert_eq!(median(&[9, 1, 5]), Some(5.0));
        assert_eq!(median(&[9, 1, 5, 2]), Some(3.5));
    }
}
