//! `percheron export`: the weights of a checkpoint for other programs.

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use checkpoint::pth::{self, Value};
use clap::{Args, ValueEnum};
use cluster::Step;
use recipe::Recipe;
use serde::Serialize;

use super::{Checkpointed, options, read_checkpoint, say, tensor_file};
use crate::{
    train::TrainState,
    weights::{self, Which, text},
};

/// `percheron export …`.
#[derive(Debug, Args)]
pub struct Arguments {
    /// The folder of a run, or one that `import` made.
    #[arg(long, value_name = "DIR")]
    checkpoint: PathBuf,
    /// The step of the checkpoint; the newest without it.
    #[arg(long)]
    step: Option<u64>,
    /// What to write.
    #[arg(long, value_enum)]
    format: Format,
    /// Write the averaged weights, and only them.
    #[arg(long)]
    ema: bool,
    /// The file to write; it must not be there yet [default: RUN-step-N.FORMAT, or RUN-step-N-ema.FORMAT].
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Print one line of JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// The official layout, for `torch.load`: `model`, `model_ema`, `optimizer`, `epoch` and `args`; with
    /// --ema `model` and `args`.
    Pth,
    /// Named tensors of one set of weights.
    Safetensors,
}

/// What was written.
#[derive(Debug, Serialize)]
struct Exported {
    run: String,
    step: u64,
    weights: &'static str,
    tensors: usize,
    out: String,
}

pub(super) async fn run(arguments: Arguments) -> Result<()> {
    let there = |out: &PathBuf| format!("--out {}: it is there already", out.display());
    if let Some(out) = arguments.out.as_ref().filter(|out| out.exists()) {
        bail!("{}; choose another name", there(out));
    }
    let held = read_checkpoint(&arguments.checkpoint, arguments.step.map(Step)).await?;
    let out = arguments.out.unwrap_or_else(|| default_name(&held, arguments.format, arguments.ema));
    if out.exists() {
        bail!("{}; say another name", there(&out));
    }
    let which = if arguments.ema { Which::Averaged } else { Which::Live };
    let named = weights::named(&held.state, which);
    let tensors = named.len();
    let written = match arguments.format {
        Format::Pth if arguments.ema => {
            let averaged = vec![(text("model"), dictionary(&held.state, which)), args(&held)];
            pth::write(&out, &Value::Dict(averaged)).map_err(Into::into)
        }
        Format::Pth => pth::write(&out, &official(&held)).map_err(Into::into),
        Format::Safetensors => tensor_file::write(&out, &named),
    };
    written.with_context(|| format!("--out {}", out.display()))?;
    let exported = Exported {
        run: held.manifest.run.to_string(),
        step: held.manifest.step.0,
        weights: if arguments.ema { "averaged" } else { "live" },
        tensors,
        out: out.display().to_string(),
    };
    if arguments.json {
        say(&serde_json::to_string(&exported)?);
    } else {
        let Exported { run, step, weights, tensors, out } = &exported;
        say(&format!("{out}: the {weights} weights of {run} at step {step}, {tensors} tensors"));
    }
    Ok(())
}

fn default_name(held: &Checkpointed, format: Format, ema: bool) -> PathBuf {
    let extension = match format {
        Format::Pth => "pth",
        Format::Safetensors => "safetensors",
    };
    let average = if ema { "-ema" } else { "" };
    let manifest = &held.manifest;
    PathBuf::from(format!("{}-step-{}{average}.{extension}", manifest.run, manifest.step.0))
}

fn dictionary(state: &TrainState, which: Which) -> Value {
    let named = weights::named(state, which).into_iter();
    Value::Dict(named.map(|(name, array)| (text(&name), Value::Array(array))).collect())
}

/// The options of the reference that make the network again: what `import` reads.
fn args(held: &Checkpointed) -> (Value, Value) {
    (text("args"), Value::Dict(options::of(&held.recipe)))
}

/// The official dictionary. Without the images the length of an epoch is not known; then there is no
/// `epoch`.
fn official(held: &Checkpointed) -> Value {
    let Checkpointed { recipe, state, manifest } = held;
    let mut items = vec![
        (text("model"), dictionary(state, Which::Live)),
        (text("model_ema"), dictionary(state, Which::Averaged)),
        (text("optimizer"), weights::optimizer(state, recipe)),
    ];
    items.extend(last_epoch(recipe, manifest.step).map(|last| (text("epoch"), Value::Int(last))));
    items.push(args(held));
    Value::Dict(items)
}

/// The number of the last epoch that is done, counted from 0.
fn last_epoch(recipe: &Recipe, step: Step) -> Option<i64> {
    let samples = crate::setup::training_samples(recipe).ok()?; // The images may be elsewhere.
    let epochs = step.0.checked_div(recipe.steps_per_epoch(samples))?;
    Some(epochs.checked_sub(1)?.cast_signed())
}
