//! `percheron eval`: what the weights of a checkpoint are worth, exit by exit and with dynamic inference.

mod chart;
mod scores;
pub(super) mod sets;

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Args, ValueEnum};
use cluster::Step;
use model::{
    Architecture, Cost, EXIT_NAMES, Network,
    dynamic::{self, Confidences, Measured},
};
use recipe::Recipe;
use serde::Serialize;

use self::{scores::Scores, sets::Images};
use super::{import, read_checkpoint, say};
use crate::{
    setup::architecture,
    train::TrainState,
    weights::{self, Which},
};

/// `percheron eval …`.
#[derive(Debug, Args)]
pub struct Arguments {
    /// The folder of a run or of an import, or a file of weights: an official .pth, or .safetensors.
    #[arg(long, value_name = "PATH")]
    checkpoint: PathBuf,
    /// The step of the checkpoint; the newest without it.
    #[arg(long)]
    step: Option<u64>,
    /// The dataset: a folder of shards, s3://BUCKET/PREFIX or builtin:digits [default: the recipe's].
    #[arg(long, value_name = "LOCATION")]
    data: Option<String>,
    /// The split that is evaluated [default: the recipe's].
    #[arg(long)]
    split: Option<String>,
    /// Evaluate the averaged weights.
    #[arg(long)]
    ema: bool,
    /// Images in a forward.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u64).range(1..=4096))]
    batch: u64,
    /// Threads inside an operation.
    #[arg(long, default_value_t = 1)]
    pub(super) threads: usize,
    /// What the thresholds of dynamic inference are solved on. Needs the recipe's training split.
    #[arg(long, value_enum, default_value_t = Calibration::Train)]
    calibration: Calibration,
    /// The most images that they are solved on.
    #[arg(long, default_value_t = 50_000, value_parser = clap::value_parser!(u64).range(1..))]
    calibration_images: u64,
    /// The costs of the exits, in 10⁹, four numbers in a file as the reference's flops.txt [default:
    /// counted, every multiply–accumulate that runs].
    #[arg(long, value_name = "FILE")]
    flops: Option<PathBuf>,
    /// Lay a value over the recipe, such as data.crop_fraction=0.9; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// The folder to write dynamic.txt, eval.json, dynamic.svg and confusion.svg to; made if it is not there.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Print one object and nothing else.
    #[arg(long)]
    json: bool,
}

/// What thresholds are solved on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Calibration {
    /// Training images in a seeded order, shown as in evaluation (the paper).
    Train,
    /// The first 101 batches of the first epoch, augmented (the reference's code).
    TrainAug101,
    /// No dynamic inference.
    Off,
}

/// Everything that is found out.
#[derive(Debug, Serialize)]
struct Evaluated {
    checkpoint: String,
    step: u64,
    model: String,
    weights: &'static str,
    data: String,
    split: String,
    samples: usize,
    loss: f64,
    exits: Vec<Exit>,
    classes: Vec<Class>,
    /// Of the exit merge: a row a label, a column an answer.
    confusion: Vec<Vec<u64>>,
    /// Samples that the thresholds were solved on.
    calibration_samples: usize,
    dynamic: Vec<Budget>,
}

#[derive(Debug, Serialize)]
struct Exit {
    name: &'static str,
    top1: f64,
    top5: f64,
    /// Multiply–accumulates of an image, or as the file of costs says.
    macs: f64,
}

#[derive(Debug, Serialize)]
struct Class {
    name: String,
    samples: u64,
    /// Of the exits.
    top1: [Option<f64>; 4],
}

#[derive(Debug, Serialize)]
struct Budget {
    budget: usize,
    thresholds: [f32; 4],
    accuracy: f64,
    mean_macs: f64,
    counts: [usize; 4],
    accuracy_of_exit: [Option<f64>; 4],
}

/// What is evaluated.
pub(super) struct Subject {
    pub(super) step: u64,
    pub(super) recipe: Recipe,
    pub(super) state: TrainState,
}

pub(super) async fn run(arguments: Arguments) -> Result<()> {
    let Arguments { checkpoint, step, data, sets, .. } = &arguments;
    let subject = subject(checkpoint, *step, data.as_deref(), sets).await?;
    let which = if arguments.ema { Which::Averaged } else { Which::Live };
    check_finite(&subject.state, which)?;
    let architecture = architecture(&subject.recipe)?;
    let macs = costs(&arguments, &architecture)?;
    let network = match which {
        Which::Live => subject.state.network(),
        Which::Averaged => subject.state.averaged(),
    };
    let images = Images::open(&subject.recipe, arguments.split.as_deref())?;
    let scores = images.validation(network, arguments.batch)?;
    let (solved_on, rows, lines) = dynamic_rows(&arguments, &images, network, &scores, macs)?;
    let evaluated = Evaluated {
        checkpoint: arguments.checkpoint.display().to_string(),
        step: subject.step,
        model: subject.recipe.model.name.clone(),
        weights: if arguments.ema { "averaged" } else { "live" },
        data: subject.recipe.data.location.clone(),
        split: images.split().to_owned(),
        samples: scores.samples(),
        loss: scores.loss(),
        exits: exits(&scores, macs),
        classes: classes(&scores, images.classes()),
        confusion: scores.confusion().to_vec(),
        calibration_samples: solved_on,
        dynamic: rows,
    };
    if let Some(out) = &arguments.out {
        write(out, &evaluated, &lines).with_context(|| format!("--out {}", out.display()))?;
    }
    if arguments.json {
        say(&serde_json::to_string(&evaluated)?);
    } else {
        tell(&evaluated);
    }
    Ok(())
}

/// Weights and their recipe, from a file or from the folder of a run, with `sets` laid over the recipe.
pub(super) async fn subject(
    checkpoint: &Path,
    step: Option<u64>,
    data: Option<&str>,
    sets: &[String],
) -> Result<Subject> {
    let mut sets = sets.to_vec();
    if let Some(data) = data {
        sets.push(format!("data.location={}", toml::Value::String(data.to_owned())));
    }
    if checkpoint.is_file() {
        let (recipe, state) = import::load(checkpoint, &sets)?;
        let step = state.step().map_or(0, |step| step.0);
        return Ok(Subject { step, recipe, state });
    }
    let held = read_checkpoint(checkpoint, step.map(Step)).await?;
    let recipe = Recipe::from_toml("of the checkpoint", &held.recipe.to_toml(), &sets)?;
    ensure!(
        recipe.model == held.recipe.model,
        "--set: the network of the checkpoint is as it is: {:?}",
        held.recipe.model
    );
    Ok(Subject { step: held.manifest.step.0, recipe, state: held.state })
}

/// Refuses weights that are no numbers: all that is computed with them would be none either.
pub(super) fn check_finite(state: &TrainState, which: Which) -> Result<()> {
    for (name, array) in weights::named(state, which) {
        let Some(values) = array.to_f32() else { continue };
        let odd = values.iter().filter(|value| !value.is_finite()).count();
        ensure!(
            odd == 0,
            "the weights cannot be used: {odd} of {} values of {name} are not finite (NaN or infinite); \
             take an earlier checkpoint with --step",
            values.len()
        );
    }
    Ok(())
}

/// The cost of each exit, in multiply–accumulates.
fn costs(arguments: &Arguments, architecture: &Architecture) -> Result<[f64; 4]> {
    let Some(file) = &arguments.flops else {
        return Ok(Cost::of(architecture).macs.map(|macs| macs as f64));
    };
    let in_file = || format!("--flops {}", file.display());
    let text = fs::read_to_string(file).with_context(in_file)?;
    let numbers =
        text.split(|c: char| c.is_whitespace() || c == ',').filter(|word| !word.is_empty());
    let numbers =
        numbers.map(str::parse::<f64>).collect::<Result<Vec<_>, _>>().with_context(in_file)?;
    let Ok(costs) = <[f64; 4]>::try_from(numbers) else {
        bail!("{}: it must have four numbers, the cost of each exit in 10⁹", in_file());
    };
    Ok(costs.map(|cost| cost * 1e9))
}

fn exits(scores: &Scores, macs: [f64; 4]) -> Vec<Exit> {
    let [top1, top5] = [scores.top1(), scores.top5()];
    let exit = |exit: usize| Exit {
        name: EXIT_NAMES[exit],
        top1: top1[exit],
        top5: top5[exit],
        macs: macs[exit],
    };
    (0..4).map(exit).collect()
}

fn classes(scores: &Scores, names: &[String]) -> Vec<Class> {
    let class = |(class, name): (usize, &String)| {
        let (samples, top1) = scores.of_class(class);
        Class { name: name.clone(), samples, top1 }
    };
    names.iter().enumerate().map(class).collect()
}

/// The size of the set that thresholds were solved on, what each budget gives, and the reference's lines.
fn dynamic_rows(
    arguments: &Arguments,
    images: &Images<'_>,
    network: &Network,
    scores: &Scores,
    macs: [f64; 4],
) -> Result<(usize, Vec<Budget>, Vec<String>)> {
    let sure: Confidences = match arguments.calibration {
        Calibration::Off => return Ok((0, Vec::new(), Vec::new())),
        Calibration::Train => {
            images.training(network, arguments.batch, arguments.calibration_images)?
        }
        Calibration::TrainAug101 => images.augmented(network)?,
    };
    let (mut rows, mut lines) = (Vec::new(), Vec::new());
    for (budget, shares) in dynamic::budgets().into_iter().enumerate() {
        let thresholds = dynamic::thresholds(&sure, shares);
        let found = dynamic::measure(scores.confidences(), scores.correct(), thresholds, macs);
        lines.push(found.reference_line(macs.map(|cost| cost / 1e9)));
        let Measured { accuracy, mean_cost: mean_macs, counts, accuracy_of_exit, .. } = found;
        rows.push(Budget { budget, thresholds, accuracy, mean_macs, counts, accuracy_of_exit });
    }
    Ok((sure[0].len(), rows, lines))
}

fn write(out: &Path, evaluated: &Evaluated, lines: &[String]) -> Result<()> {
    fs::create_dir_all(out)?;
    fs::write(out.join("eval.json"), serde_json::to_string_pretty(evaluated)?)?;
    let names: Vec<&str> = evaluated.classes.iter().map(|class| class.name.as_str()).collect();
    fs::write(out.join("confusion.svg"), chart::confusion(&evaluated.confusion, &names))?;
    if !lines.is_empty() {
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        fs::write(out.join("dynamic.txt"), text)?;
        let curve: Vec<[f64; 2]> =
            evaluated.dynamic.iter().map(|row| [row.mean_macs, row.accuracy]).collect();
        let exits: Vec<(&str, [f64; 2])> =
            evaluated.exits.iter().map(|exit| (exit.name, [exit.macs, exit.top1])).collect();
        fs::write(out.join("dynamic.svg"), chart::curve(&curve, &exits))?;
    }
    Ok(())
}

fn tell(evaluated: &Evaluated) {
    let Evaluated { checkpoint, step, model, weights, data, split, samples, loss, .. } = evaluated;
    say(&format!("{checkpoint}, step {step}: the {weights} weights of {model}"));
    say(&format!("on split {split} of {data}: {samples} samples, loss {loss:.4}"));
    for Exit { name, top1, top5, macs } in &evaluated.exits {
        let [top1, top5, macs] = [top1 * 100.0, top5 * 100.0, macs / 1e6];
        say(&format!("  {name:<7} top-1 {top1:6.2} %  top-5 {top5:6.2} %  {macs:9.1} M MACs"));
    }
    if evaluated.dynamic.is_empty() {
        return;
    }
    say(&format!("dynamic inference, thresholds of {} images:", evaluated.calibration_samples));
    for Budget { budget, accuracy, mean_macs, counts, .. } in evaluated.dynamic.iter().step_by(4) {
        let (accuracy, macs) = (accuracy * 100.0, mean_macs / 1e6);
        say(&format!(
            "  budget {budget:>2}  {accuracy:6.2} %  {macs:9.1} M MACs  exits {counts:?}"
        ));
    }
}
