//! `percheron export`: the weights of a checkpoint for other programs.

use std::{collections::BTreeMap, fs, path::PathBuf};

use anyhow::{Context as _, Result, bail};
use checkpoint::pth::{self, Array, Dtype, Value};
use clap::{Args, ValueEnum};
use cluster::Step;
use safetensors::tensor::TensorView;

use super::read_checkpoint;
use crate::{
    train::TrainState,
    weights::{self, Which, text},
};

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
    /// The file to write; it must not be there yet.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Format {
    /// The official layout: `model`, `model_ema`, `optimizer`, `epoch`.
    Pth,
    /// Named tensors of one set of weights.
    Safetensors,
}

pub(super) async fn run(arguments: Arguments) -> Result<()> {
    let out = &arguments.out;
    if out.exists() {
        bail!("--out {}: it is there already; choose another name", out.display());
    }
    let step = arguments.step.map(Step);
    let (recipe, state) = read_checkpoint(&arguments.checkpoint, step).await?;
    let which = if arguments.ema { Which::Averaged } else { Which::Live };
    match arguments.format {
        Format::Pth => {
            let samples = crate::setup::training_samples(&recipe).ok();
            let epoch = samples.map(|samples| recipe.steps_per_epoch(samples));
            pth::write(out, &official(&state, arguments.ema, epoch))?;
        }
        Format::Safetensors => write_safetensors(out, weights::named(&state, which))?,
    }
    Ok(())
}

/// The official dictionary. `steps_per_epoch` is not known if the images are not there; then there is no
/// epoch.
fn official(state: &TrainState, only_averaged: bool, steps_per_epoch: Option<u64>) -> Value {
    let dictionary = |which: Which| {
        let named = weights::named(state, which).into_iter();
        Value::Dict(named.map(|(name, array)| (text(&name), Value::Array(array))).collect())
    };
    if only_averaged {
        return Value::Dict(vec![(text("model"), dictionary(Which::Averaged))]);
    }
    let mut items = vec![
        (text("model"), dictionary(Which::Live)),
        (text("model_ema"), dictionary(Which::Averaged)),
        (text("optimizer"), weights::optimizer(state)),
    ];
    let step = state.step().expect("it was restored").0;
    if let Some(epochs) = steps_per_epoch.and_then(|steps| step.checked_div(steps))
        && let Some(last) = epochs.checked_sub(1)
    {
        items.push((text("epoch"), Value::Int(last.cast_signed())));
    }
    Value::Dict(items)
}

fn write_safetensors(out: &PathBuf, named: Vec<(String, Array)>) -> Result<()> {
    let mut views = BTreeMap::new();
    for (name, array) in &named {
        let dtype = match array.dtype {
            Dtype::F32 => safetensors::Dtype::F32,
            Dtype::I64 => safetensors::Dtype::I64,
            other => bail!("{name} holds {other:?}, which no state does"),
        };
        let shape = array.shape.iter().map(|&size| usize::try_from(size));
        let view = TensorView::new(dtype, shape.collect::<Result<_, _>>()?, &array.bytes)?;
        views.insert(name.clone(), view);
    }
    let bytes = safetensors::serialize(views, None)?;
    let mut file = fs::OpenOptions::new().write(true).create_new(true).open(out);
    let file =
        file.as_mut().map_err(|error| anyhow::anyhow!("--out {}: {error}", out.display()))?;
    std::io::Write::write_all(file, &bytes).with_context(|| format!("--out {}", out.display()))?;
    file.sync_all().with_context(|| format!("--out {}", out.display()))
}
