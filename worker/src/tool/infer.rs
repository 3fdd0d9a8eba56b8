//! `percheron infer`: what images show, stage by stage: those that are sure early leave early.

pub(super) mod answers;
mod source;

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use model::{
    Architecture, Cost, EXIT_NAMES, Network,
    dynamic::{self, NEVER},
};
use recipe::Recipe;
use serde::Deserialize;
use shards::Dataset;

use self::{
    answers::{Form, Predictions},
    source::Source,
};
use super::{
    eval::{self, sets::Images},
    say,
};
use crate::{setup::architecture, weights::Which};

/// `percheron infer …`.
#[derive(Debug, Args)]
pub struct Arguments {
    /// An image, a folder of images, a tar of images, or a dataset of shards.
    source: String,
    /// The folder of a run or of an import, or a file of weights: an official .pth, or .safetensors.
    #[arg(long, value_name = "PATH")]
    checkpoint: PathBuf,
    /// The step of the checkpoint; the newest without it.
    #[arg(long)]
    step: Option<u64>,
    /// Answer with the averaged weights.
    #[arg(long)]
    ema: bool,
    /// The split of a dataset of shards [default: the recipe's that is evaluated].
    #[arg(long)]
    split: Option<String>,
    /// Early exit with the thresholds of this budget, from 0, cheap, to 32, expensive [default: all images take
    /// the last exit].
    #[arg(long, value_name = "B", conflicts_with = "thresholds")]
    #[arg(value_parser = clap::value_parser!(u64).range(0..33))]
    budget: Option<u64>,
    /// The eval.json of `percheron eval --out`, which has the thresholds of the budgets [default: they are solved
    /// anew on training images].
    #[arg(long, value_name = "FILE", requires = "budget")]
    solved: Option<PathBuf>,
    /// The most images that thresholds are solved on.
    #[arg(long, default_value_t = 2_048, value_parser = clap::value_parser!(u64).range(1..))]
    calibration_images: u64,
    /// Early exit with these confidences, from 0 to 1, of the exits early3, att and cnn; above 1 nobody leaves.
    #[arg(long, value_name = "T,T,T", value_delimiter = ',')]
    thresholds: Vec<f32>,
    /// A file with the names of the classes, one a line [default: those of the recipe's dataset, or numbers].
    #[arg(long, value_name = "FILE")]
    classes: Option<PathBuf>,
    /// The most likely classes that are told of an image.
    #[arg(long, value_name = "N", default_value_t = 5)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..))]
    top: u64,
    /// Images in a forward.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u64).range(1..=4096))]
    batch: u64,
    /// Threads inside an operation.
    #[arg(long, default_value_t = 1)]
    pub(super) threads: usize,
    /// Lay a value over the recipe, such as data.crop_fraction=0.9; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Print an object for each image, a line each, and nothing else.
    #[arg(long, conflicts_with = "csv")]
    json: bool,
    /// Print a table with commas, a row for each image, and nothing else.
    #[arg(long)]
    csv: bool,
}

/// What is read of an eval.json.
#[derive(Debug, Deserialize)]
pub(super) struct Solved {
    dynamic: Vec<SolvedBudget>,
}

#[derive(Debug, Deserialize)]
struct SolvedBudget {
    budget: u64,
    thresholds: [f32; 4],
}

pub(super) async fn run(arguments: Arguments) -> Result<()> {
    let Arguments { checkpoint, step, sets, ema, .. } = &arguments;
    let subject = eval::subject(checkpoint, *step, None, sets).await?;
    let which = if *ema { Which::Averaged } else { Which::Live };
    eval::check_finite(&subject.state, which)?;
    let network = match which {
        Which::Live => subject.state.network(),
        Which::Averaged => subject.state.averaged(),
    };
    let recipe = &subject.recipe;
    let mut source = Source::open(&arguments.source, arguments.split.as_deref(), recipe)?;
    let classes = class_names(arguments.classes.as_deref(), recipe)?;
    let thresholds = thresholds(&arguments, recipe, network)?;
    let network = subject.state.for_inference(&architecture(recipe)?, which);
    let form = match (arguments.json, arguments.csv) {
        (true, _) => Form::Json,
        (_, true) => Form::Csv,
        (false, false) => Form::Text,
    };
    let top = usize::try_from(arguments.top).unwrap_or(usize::MAX);
    let mut predictions = Predictions::new(form, classes, top)?;
    let batch = usize::try_from(arguments.batch).expect("a batch fits into memory");
    let progress = progress(source.len());
    for first in (0..source.len()).step_by(batch) {
        let range = first..source.len().min(first + batch);
        let images = source.read(range.clone())?;
        let answers = network.forward_early(&images, thresholds);
        let names = range.clone().map(|index| source.name(index)).collect::<Vec<_>>();
        progress.suspend(|| predictions.tell(&names, &answers))?;
        progress.inc(range.len() as u64);
    }
    let seconds = progress.elapsed().as_secs_f64();
    progress.finish_and_clear();
    if form == Form::Text {
        say(&summary(predictions.counts(), &architecture(recipe)?, seconds));
    }
    Ok(())
}

/// The confidences at which images leave.
fn thresholds(arguments: &Arguments, recipe: &Recipe, network: &Network) -> Result<[f32; 4]> {
    if let Some(budget) = arguments.budget {
        return match &arguments.solved {
            Some(file) => solved(file, budget),
            None => {
                let images = Images::open(recipe, Some(&recipe.data.train)).context(
                    "--budget: its thresholds are solved on training images; give those that \
                     `percheron eval --out` solved as --solved FILE, or --thresholds",
                )?;
                let sure =
                    images.training(network, arguments.batch, arguments.calibration_images)?;
                let shares = dynamic::budgets();
                let shares = shares[usize::try_from(budget).expect("a budget is below 33")];
                Ok(dynamic::thresholds(&sure, shares))
            }
        };
    }
    match arguments.thresholds[..] {
        [] => Ok([NEVER; 4]),
        [early3, att, cnn] => {
            let all = [early3, att, cnn];
            ensure!(
                all.iter().all(|threshold| *threshold >= 0.0),
                "--thresholds {all:?}: each must be a number from 0"
            );
            Ok([early3, att, cnn, f32::NEG_INFINITY])
        }
        ref other => bail!(
            "--thresholds: three numbers are needed, of early3, att and cnn, and {} are given",
            other.len()
        ),
    }
}

fn solved(file: &Path, budget: u64) -> Result<[f32; 4]> {
    Solved::read(file)?.of(budget).with_context(|| in_file(file))
}

fn in_file(file: &Path) -> String {
    format!("--solved {}", file.display())
}

impl Solved {
    /// Reads an eval.json, whose path is that of `--solved`.
    pub(super) fn read(file: &Path) -> Result<Self> {
        let text = fs::read_to_string(file).with_context(|| in_file(file))?;
        serde_json::from_str(&text).with_context(|| in_file(file))
    }

    /// The thresholds of a budget.
    pub(super) fn of(&self, budget: u64) -> Result<[f32; 4]> {
        let found = self.dynamic.iter().find(|row| row.budget == budget);
        let found = found.with_context(|| {
            format!("it has no budget {budget}: evaluate without --calibration off")
        })?;
        Ok(found.thresholds)
    }
}

/// What the classes are called: as a file says, as the dataset says, or by their numbers.
pub(super) fn class_names(file: Option<&Path>, recipe: &Recipe) -> Result<Vec<String>> {
    let count = recipe.model.classes as usize;
    if let Some(file) = file {
        let in_file = || format!("--classes {}", file.display());
        let text = fs::read_to_string(file).with_context(in_file)?;
        let names: Vec<String> = text.lines().map(str::to_owned).collect();
        ensure!(
            names.len() == count,
            "{}: it has {} lines, and the network tells {count} classes apart",
            in_file(),
            names.len()
        );
        return Ok(names);
    }
    let data = &recipe.data;
    let dataset = [&data.validation, &data.train]
        .into_iter()
        .find_map(|split| Dataset::open(&data.location, split).ok());
    let named = dataset.map_or_else(Vec::new, |dataset| dataset.classes().to_vec());
    let name = |class: usize| named.get(class).cloned().unwrap_or_else(|| class.to_string());
    Ok((0..count).map(name).collect())
}

fn progress(images: usize) -> ProgressBar {
    let style = ProgressStyle::with_template(
        "{wide_bar} {human_pos} of {human_len} images, {per_sec}, {eta} left",
    );
    ProgressBar::new(images as u64).with_style(style.expect("the template is well formed"))
}

fn summary(counts: [u64; 4], architecture: &Architecture, seconds: f64) -> String {
    let images = counts.iter().sum::<u64>();
    let macs = Cost::of(architecture).macs;
    let total: f64 = counts.iter().zip(macs).map(|(&count, macs)| count as f64 * macs as f64).sum();
    let exits = EXIT_NAMES.iter().zip(counts).map(|(name, count)| format!("{name} {count}"));
    format!(
        "{images} images in {seconds:.1} s; exits: {}; {:.1} M MACs an image",
        exits.collect::<Vec<_>>().join(", "),
        total / images.max(1) as f64 / 1e6
    )
}
