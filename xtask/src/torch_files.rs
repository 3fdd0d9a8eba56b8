//! `cargo xtask torch-files`: that PyTorch reads what `percheron export` writes, and the other way round.
//!
//! A run of two steps is exported, read by `torch.load(weights_only=True)` and the library safetensors, saved
//! again by `torch.save` in the official layout and imported: the state must have the digest of the run.
//! The Python that has both libraries must be named, because torch for Python has gigabytes; so this is no part
//! of `cargo xtask ci`.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::workspace::Workspace;
use crate::{process, test};

const SCRIPT: &str = include_str!("torch_files.py");

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// A Python that has torch and safetensors.
    #[arg(long, value_name = "PROGRAM")]
    python: PathBuf,
}

/// What is needed of what `percheron … --json` prints last.
#[derive(Debug, Deserialize)]
struct Said {
    state_sha256: String,
}

pub(crate) fn run(workspace: &Workspace, options: &Options) -> Result<()> {
    test::build(workspace)?;
    let folder = tempfile::tempdir().context("there is no room for temporary files")?;
    let percheron = |words: &[&str]| {
        let mut percheron = workspace.binary("percheron");
        process::output(percheron.current_dir(folder.path()).args(words).arg("--json"))
    };
    let up = ["up", "--recipe", "digits", "--run-dir", "run"];
    let sets =
        ["--set", "max_steps=2", "--set", "batch_size=2", "--set", "evaluate_every_epochs=0"];
    let trained = said(&percheron(&[&up[..], &sets].concat())?)?;
    let export = ["export", "--checkpoint", "run", "--format"];
    percheron(&[&export[..], &["pth", "--out", "run.pth"]].concat())?;
    percheron(&[&export[..], &["safetensors", "--ema", "--out", "run.safetensors"]].concat())?;

    let mut python = workspace.command(&options.python);
    let files = ["run.pth", "run.safetensors", "torch.pth"];
    let tensors =
        process::output(python.current_dir(folder.path()).args(["-c", SCRIPT]).args(files))?;
    let imported = said(&percheron(&["import", "torch.pth", "--out", "again"])?)?;
    ensure!(
        imported.state_sha256 == trained.state_sha256,
        "the state that torch saved has the digest {}, that of the run has {}",
        imported.state_sha256,
        trained.state_sha256
    );
    println!("torch: {} tensors, moments and averages, the same bits back", tensors.trim());
    Ok(())
}

fn said(lines: &str) -> Result<Said> {
    let last = lines.lines().last().unwrap_or_default();
    serde_json::from_str(last).with_context(|| format!("cannot understand {last:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_line_is_what_counts() {
        let lines = "{\"step\":1}\n{\"run\":\"a\",\"state_sha256\":\"00ff\"}\n";
        assert_eq!(said(lines).unwrap().state_sha256, "00ff");
        assert!(said("").is_err());
    }
}
