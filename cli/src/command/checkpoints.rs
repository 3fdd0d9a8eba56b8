//! `percheron checkpoints`: what is kept of a run, whether it is intact, and what may be deleted.

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Result, bail};
use checkpoint::{
    Checkpoint, LoadError, Retention, Store, committed_steps, prune, quarantined_steps,
    unfinished_steps,
};
use clap::{Args, Subcommand};
use cluster::{Evaluation, Ledger, Step};
use recipe::Recipe;
use serde::Serialize;
use shards::Dataset;

use crate::{history, print, run_dir::RunDir};

/// Never fewer intact checkpoints are left.
const LEFT_MIN: usize = 2;

/// `percheron checkpoints …`.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show what is kept.
    List(List),
    /// Read every byte of every checkpoint and check it.
    Verify(Folder),
    /// Delete what the recipe's [checkpoint] section does not keep, and what cut short saves left.
    Prune(Prune),
    /// Copy a checkpoint to another folder or bucket, checking every byte.
    Copy(Copy),
    /// Delete one checkpoint; two intact ones always stay.
    Rm(Remove),
}

#[derive(Debug, Args)]
pub(crate) struct Folder {
    /// The folder of the run.
    #[arg(value_name = "RUN_DIR")]
    run_dir: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct List {
    #[command(flatten)]
    folder: Folder,
    /// Print a line of JSON a checkpoint: step, state, epoch, bytes, parts, created_ms (since the Unix
    /// epoch).
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Prune {
    #[command(flatten)]
    folder: Folder,
    /// Only say what would be deleted.
    #[arg(long)]
    dry_run: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Remove {
    #[command(flatten)]
    folder: Folder,
    /// The step of the checkpoint.
    #[arg(value_name = "STEP")]
    step: u64,
}

#[derive(Debug, Args)]
pub(crate) struct Copy {
    #[command(flatten)]
    folder: Folder,
    /// Where to: a folder, or s3://BUCKET/PREFIX.
    #[arg(value_name = "LOCATION")]
    to: String,
    /// The step of the checkpoint; the newest without it.
    #[arg(long)]
    step: Option<u64>,
}

/// A line of the list.
#[derive(Debug, Serialize)]
struct Line {
    step: u64,
    /// `committed`, `quarantined` or `damaged` (its manifest cannot be read).
    state: &'static str,
    epoch: Option<u64>,
    bytes: Option<u64>,
    parts: Option<usize>,
    created_ms: Option<u64>,
}

pub(crate) async fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::List(List { folder, json }) => list(&folder.open()?.1, json).await,
        Command::Verify(folder) => verify(&folder.open()?.1).await,
        Command::Prune(Prune { folder, dry_run }) => {
            let (recipe, store) = folder.open()?;
            let history = history::read(&RunDir::at(&folder.run_dir)?, 1).await?;
            let mut ledger = Ledger::default();
            history.entries.iter().for_each(|entry| ledger.apply(&entry.record));
            delete_unneeded(&recipe, &store, &ledger.evaluations, dry_run).await
        }
        Command::Copy(Copy { folder, to, step }) => {
            copy_to(&folder.open()?.1, &to, step.map(Step)).await
        }
        Command::Rm(Remove { folder, step }) => remove(&folder.open()?.1, Step(step)).await,
    }
}

impl Folder {
    fn open(&self) -> Result<(Box<Recipe>, Store)> {
        let dir = RunDir::at(&self.run_dir)?;
        let recipe = history::require_run(&dir)?;
        Ok((recipe, Store::open(&dir.checkpoints()?)?))
    }
}

/// What a recipe keeps.
pub(super) fn retention(recipe: &Recipe, steps_per_epoch: u64) -> Retention {
    let every_steps = recipe.checkpoint.keep_every_epochs.saturating_mul(steps_per_epoch);
    let recipe::Checkpoint { keep, keep_best: best, .. } = recipe.checkpoint;
    Retention { newest: keep as usize, every_steps, best }
}

async fn list(store: &Store, json: bool) -> Result<ExitCode> {
    let mut lines = Vec::new();
    for step in committed_steps(store).await? {
        let opened = Checkpoint::open(store, step).await;
        let manifest = opened.as_ref().ok().map(Checkpoint::manifest);
        lines.push(Line {
            step: step.0,
            state: if manifest.is_some() { "committed" } else { "damaged" },
            epoch: manifest.map(|manifest| manifest.epoch.0),
            bytes: manifest.map(|manifest| manifest.parts.iter().map(|part| part.bytes).sum()),
            parts: manifest.map(|manifest| manifest.parts.len()),
            created_ms: manifest.map(|manifest| manifest.created.0),
        });
    }
    let aside = |step: Step| Line {
        step: step.0,
        state: "quarantined",
        epoch: None,
        bytes: None,
        parts: None,
        created_ms: None,
    };
    lines.extend(quarantined_steps(store).await?.into_iter().map(aside));
    lines.sort_by_key(|line| line.step);
    for line in &lines {
        if json {
            print::out(&serde_json::to_string(line).context("a line cannot be written")?);
        } else {
            print::out(&line.text());
        }
    }
    Ok(ExitCode::SUCCESS)
}

impl Line {
    fn text(&self) -> String {
        let Self { step, state, epoch, bytes, parts, .. } = self;
        match (epoch, bytes, parts) {
            (Some(epoch), Some(bytes), Some(parts)) => {
                let bytes = print::grouped(*bytes);
                format!("step {step}: {state}, epoch {epoch}, {bytes} bytes in {parts} parts")
            }
            _ => format!("step {step}: {state}"),
        }
    }
}

/// Reads a checkpoint; nothing is returned if it is intact.
///
/// # Errors
/// If the store does not answer.
async fn check(store: &Store, step: Step) -> Result<Option<LoadError>> {
    let checked = match Checkpoint::open(store, step).await {
        Ok(checkpoint) => checkpoint.verify().await,
        Err(error) => Err(error),
    };
    match checked {
        Err(error) if !error.fault.is_damage() => Err(error.into()),
        checked => Ok(checked.err()),
    }
}

async fn verify(store: &Store) -> Result<ExitCode> {
    let (mut intact, mut damaged) = (0, 0);
    for step in committed_steps(store).await? {
        match check(store, step).await? {
            None => {
                intact += 1;
                print::out(&format!("step {step}: intact"));
            }
            Some(LoadError { fault, .. }) => {
                damaged += 1;
                print::out(&format!("step {step}: damaged: {fault}"));
            }
        }
    }
    if damaged > 0 {
        bail!("{damaged} of {} checkpoints are damaged", intact + damaged);
    }
    print::out(&format!("{intact} checkpoints, all intact"));
    Ok(ExitCode::SUCCESS)
}

/// The steps whose checkpoints are intact, to the last byte.
async fn intact_steps(store: &Store) -> Result<Vec<Step>> {
    let mut intact = Vec::new();
    for step in committed_steps(store).await? {
        if check(store, step).await?.is_none() {
            intact.push(step);
        }
    }
    Ok(intact)
}

async fn delete_unneeded(
    recipe: &Recipe,
    store: &Store,
    evaluations: &[Evaluation],
    dry_run: bool,
) -> Result<ExitCode> {
    let samples = Dataset::open(&recipe.data.location, &recipe.data.train)
        .context("key \"data.train\"")?
        .len();
    let keep = retention(recipe, recipe.steps_per_epoch(samples));
    let unneeded = keep.prunable(&intact_steps(store).await?, evaluations);
    let unneeded = unneeded.into_iter().map(|step| (step, "its checkpoint is not kept"));
    let unfinished = unfinished_steps(store).await?;
    let unfinished = unfinished.into_iter().map(|step| (step, "its save was cut short"));
    let unneeded: Vec<_> = unneeded.chain(unfinished).collect();
    let verb = if dry_run { "would be deleted" } else { "is deleted" };
    for (step, why) in &unneeded {
        if !dry_run {
            prune(store, *step).await?;
        }
        print::out(&format!("step {step} {verb}: {why}"));
    }
    print::out(&format!("{} in all", unneeded.len()));
    Ok(ExitCode::SUCCESS)
}

async fn copy_to(store: &Store, location: &str, step: Option<Step>) -> Result<ExitCode> {
    let step = match step {
        Some(step) => step,
        None => {
            let newest = committed_steps(store).await?.first().copied();
            newest.with_context(|| format!("{} holds no checkpoint", store.location()))?
        }
    };
    let to = Store::create(location)?;
    to.check_contract().await?;
    checkpoint::copy(store, &to, step).await?;
    print::out(&format!("the checkpoint of step {step} is copied to {}", to.location()));
    Ok(ExitCode::SUCCESS)
}

async fn remove(store: &Store, step: Step) -> Result<ExitCode> {
    let aside = quarantined_steps(store).await?.contains(&step);
    if !aside && !committed_steps(store).await?.contains(&step) {
        bail!("there is no checkpoint of step {step} (see `percheron checkpoints list`)");
    }
    let mut left = intact_steps(store).await?;
    left.retain(|other| *other != step);
    if left.len() < LEFT_MIN {
        bail!(
            "the checkpoint of step {step} stays: {} intact ones would be left, and {LEFT_MIN} are the \
             least",
            left.len()
        );
    }
    prune(store, step).await?;
    print::out(&format!("the checkpoint of step {step} is deleted"));
    Ok(ExitCode::SUCCESS)
}
