//! `cargo xtask bench clothing`: photographs, packed, checked and trained on with the whole recipe.
//!
//! The photographs are not part of the repository: `--images` names a folder that has `train.tar` and
//! `validation.tar`, image folders in tars.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::figures::{Outcome, Training, train};
use crate::process;
use crate::workspace::Workspace;

/// The tars, and the splits that are made of them.
pub(super) const SPLITS: [(&str, &str); 2] = [("train.tar", "train"), ("validation.tar", "val")];

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Folder with train.tar and validation.tar.
    #[arg(long, value_name = "DIR")]
    images: PathBuf,
    /// How many workers train.
    #[arg(long, default_value_t = 1)]
    workers: u32,
    /// A recipe key to lay over `clothing`, as for `percheron up`; may be given several times.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// One JSON object as the last line.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<()> {
    let images = std::path::absolute(&arguments.images)?;
    let folder = tempfile::tempdir().context("cannot make a folder for the run")?;
    let data = folder.path().join("data");
    for (tar, split) in SPLITS {
        pack(workspace, &images.join(tar), &data, split)?;
    }
    process::run(workspace.binary("percheron").args(["shards", "verify"]).arg(&data))?;

    let mut sets = vec![format!("data.location={}", data.display())];
    sets.extend(arguments.sets.iter().cloned());
    let start = Instant::now();
    let outcome = train(
        workspace,
        &Training {
            recipe: "clothing",
            workers: arguments.workers,
            chaos: "",
            sets: &sets,
            run_dir: &folder.path().join("run"),
        },
    )?;
    println!("{}", summary(&outcome, start.elapsed().as_secs()));
    if arguments.json {
        println!("{}", figures(&outcome, start.elapsed().as_secs()));
    }
    Ok(())
}

pub(super) fn pack(workspace: &Workspace, tar: &Path, data: &Path, split: &str) -> Result<()> {
    ensure!(tar.is_file(), "there is no {}", tar.display());
    let mut pack = workspace.binary("percheron");
    pack.args(["shards", "pack"]).arg(tar).arg("--out").arg(data).args(["--split", split]);
    process::run(&mut pack)
}

fn summary(outcome: &Outcome, seconds: u64) -> String {
    let [weights, averaged] = [&outcome.top1, &outcome.ema_top1].map(|top1| {
        format!(
            "early3 {:.1}, att {:.1}, cnn {:.1}, merge {:.1}",
            top1.early3, top1.att, top1.cnn, top1.merge
        )
    });
    format!(
        "\n{} steps in {seconds} s, {:.1} images/s\ntop-1 on the validation split, in percent\n  \
         weights  {weights}\n  average  {averaged}\nstate {}",
        outcome.steps, outcome.images_per_s, outcome.state_sha256
    )
}

fn figures(outcome: &Outcome, seconds: u64) -> String {
    serde_json::json!({
        "steps": outcome.steps,
        "seconds": seconds,
        "images_per_s": outcome.images_per_s,
        "top1": outcome.top1,
        "ema_top1": outcome.ema_top1,
        "state_sha256": outcome.state_sha256,
    })
    .to_string()
}
