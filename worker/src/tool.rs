//! What `percheron-worker` does beside training, for the commands of `percheron` that need the network.

mod eval;
mod export;
mod import;
mod infer;
mod models;
mod options;
mod serve;
mod tensor_file;

use std::{
    fs,
    io::{self, Write as _},
    path::Path,
};

use anyhow::{Context as _, Result, bail};
use checkpoint::{Checkpoint, Manifest, Store};
use clap::Subcommand;
use cluster::Step;
use recipe::Recipe;

use crate::{
    bench::{self, exits::Output},
    device,
    setup::{adamw, architecture},
    train::{TrainState, checkpoints},
};

/// A task.
#[derive(Debug, Subcommand)]
pub enum Tool {
    /// Make a checkpoint of a file of weights: an official .pth, or .safetensors.
    Import(import::Arguments),
    /// Write the weights of a checkpoint as .pth or .safetensors.
    Export(export::Arguments),
    /// Evaluate a checkpoint: exits, classes, dynamic inference.
    Eval(eval::Arguments),
    /// Tell what images show, with early exit.
    Infer(infer::Arguments),
    /// Answer what images show, over HTTP and gRPC, with early exit at a budget of each request.
    Serve(Box<serve::Arguments>),
    /// List the registered models, or show one.
    #[command(subcommand)]
    Model(models::Command),
    /// Name the GPUs that this machine shows, a line each.
    Devices,
    /// Measure CPU time and memory of a training step, on made images.
    #[command(bin_name = "percheron bench step")]
    BenchStep(bench::Options),
    /// Measure how long training waits for checkpoints, and what they cost beside it.
    #[command(bin_name = "percheron bench checkpoint")]
    BenchCheckpoint(bench::checkpoint::Options),
    /// Measure latency, throughput and memory of early exit, on made images.
    #[command(bin_name = "percheron bench exits")]
    BenchExits(bench::exits::Options),
}

impl Tool {
    /// Threads inside an operation of libtorch.
    #[must_use]
    pub fn threads(&self) -> usize {
        match self {
            Self::BenchStep(options) => options.threads,
            Self::BenchExits(options) => options.threads,
            Self::Eval(arguments) => arguments.threads,
            Self::Infer(arguments) => arguments.threads,
            Self::Serve(arguments) => arguments.threads,
            Self::Import(_)
            | Self::Export(_)
            | Self::Model(_)
            | Self::Devices
            | Self::BenchCheckpoint(_) => 1,
        }
    }

    /// Carries it out.
    ///
    /// # Errors
    /// What is wrong, with the file and what to do.
    pub async fn run(self) -> Result<()> {
        match self {
            Self::Import(arguments) => import::run(arguments).await,
            Self::Export(arguments) => export::run(arguments).await,
            Self::Eval(arguments) => eval::run(arguments).await,
            Self::Infer(arguments) => infer::run(arguments).await,
            Self::Serve(arguments) => serve::run(*arguments).await,
            Self::Model(command) => models::run(&command),
            Self::Devices => {
                let count = usize::try_from(tch::Cuda::device_count()).unwrap_or(0);
                (0..count).for_each(|number| say(&device::name(tch::Device::Cuda(number))));
                Ok(())
            }
            Self::BenchStep(options) => {
                let report = bench::run(&options)?;
                say(&if options.json { report.json() } else { report.to_string() });
                Ok(())
            }
            Self::BenchCheckpoint(options) => {
                // It has a runtime of its own, as a worker has.
                let is_json = options.json;
                let bench = move || bench::checkpoint::run(&options);
                let report = tokio::task::spawn_blocking(bench).await??;
                say(&if is_json { report.json() } else { report.text() });
                Ok(())
            }
            Self::BenchExits(options) => {
                say(&match bench::exits::run(&options)? {
                    Output::Report(report) if options.json => report.json(),
                    Output::Report(report) => report.to_string(),
                    Output::PeakMb(peak) => peak.to_string(),
                });
                Ok(())
            }
        }
    }
}

/// The content of a file of weights: of torch.save, or .safetensors. Nothing in it is run.
pub(crate) fn read_weights(file: &Path) -> Result<checkpoint::pth::Value> {
    import::read(file)
}

/// A line on the standard output, for people and scripts.
fn say(line: &str) {
    writeln!(io::stdout().lock(), "{line}").ok(); // The reader may be gone.
}

/// Memory for the state of a recipe's network.
fn empty_state(recipe: &Recipe) -> Result<TrainState> {
    let architecture = architecture(recipe)?;
    let device = tch::Device::Cpu;
    Ok(TrainState::empty(&architecture, adamw(recipe), recipe.update_freq, device))
}

/// A checkpoint in memory.
struct Checkpointed {
    manifest: Manifest,
    recipe: Recipe,
    state: TrainState,
}

/// Where the checkpoints of a run are: in its folder, unless its `run.toml` names another place.
fn location_of(folder: &Path) -> Result<String> {
    let location = folder.to_str().context("--checkpoint: the path is not UTF-8")?;
    let run = folder.join("run.toml");
    let text = match fs::read_to_string(&run) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(location.to_owned()),
        Err(error) => return Err(error).with_context(|| format!("{}", run.display())),
    };
    let run_file: toml::Table = text.parse().with_context(|| format!("{}", run.display()))?;
    match run_file.get("checkpoints") {
        None => Ok(location.to_owned()),
        Some(toml::Value::String(elsewhere)) => Ok(elsewhere.clone()),
        Some(other) => bail!("{}: checkpoints = {other} is no location", run.display()),
    }
}

/// Reads the newest checkpoint below a folder, or that of `step`.
async fn read_checkpoint(folder: &Path, step: Option<Step>) -> Result<Checkpointed> {
    let location = &location_of(folder)?;
    let store = Store::open(location).context("--checkpoint")?;
    let step = match step {
        Some(step) => step,
        None => {
            let newest = checkpoint::committed_steps(&store).await?.into_iter().max();
            newest.with_context(|| format!("--checkpoint {location}: there is none in it"))?
        }
    };
    let manifest = Checkpoint::open(&store, step).await?.manifest().clone();
    let origin = format!("of the checkpoint of step {step}");
    let recipe = Recipe::from_toml(&origin, &manifest.recipe, &[])?;
    let mut state = empty_state(&recipe)?;
    let layout = state.checkpoint_layout(manifest.part_bytes)?;
    checkpoints::restore(location, step, &mut state, &layout).await?;
    Ok(Checkpointed { manifest, recipe, state })
}
