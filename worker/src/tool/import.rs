//! `percheron import`: a file of weights becomes a checkpoint.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use checkpoint::{
    Manifest, Store,
    pth::{self, Array, Dtype, Value},
};
use clap::Args;
use cluster::{Epoch, Generation, Rank, RunId, Term};
use recipe::Recipe;
use safetensors::SafeTensors;

use super::empty_state;
use crate::{
    train::{self, TrainState, wall_clock},
    weights::{self, Misfit, Which, text},
};

/// Where the official files and their relatives keep the weights, in the order they are looked for.
const LIVE_KEYS: [&str; 3] = ["model", "state_dict", "module"];
const AVERAGED_KEYS: [&str; 2] = ["model_ema", "state_dict_ema"];

#[derive(Debug, Args)]
pub struct Arguments {
    /// A file of torch.save in the official layout, or .safetensors.
    file: PathBuf,
    /// The recipe whose network the weights are of: a built-in name or a file.
    #[arg(long)]
    recipe: String,
    /// A key of the recipe to change, as key=value; may be given several times.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Take the weights from this key of the file, instead of looking for them.
    #[arg(long)]
    key: Option<String>,
    /// The folder to make; it must be empty or not there yet.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

pub(super) async fn run(arguments: Arguments) -> Result<()> {
    let out = &arguments.out;
    if fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_some()) {
        bail!("--out {}: it is not empty; choose another folder", out.display());
    }
    let recipe = Recipe::load(&arguments.recipe, &arguments.sets)?;
    let content = read(&arguments.file)?;
    let mut state = empty_state(&recipe)?;
    let taken = fill(&mut state, &content, arguments.key.as_deref())
        .with_context(|| arguments.file.display().to_string())?;
    save(&state, &recipe, out).await?;
    tracing::info!(
        weights = taken.live,
        averaged = taken.averaged,
        moments = taken.moments,
        step = state.step().map(|step| step.0),
        out = %out.display(),
        "imported"
    );
    Ok(())
}

/// Which keys of the file were used.
struct Taken {
    live: String,
    averaged: String,
    moments: bool,
}

fn read(file: &Path) -> Result<Value> {
    if file.extension().is_none_or(|extension| extension != "safetensors") {
        return Ok(pth::read(file)?);
    }
    let name = || file.display().to_string();
    let bytes = fs::read(file).with_context(name)?;
    let tensors = SafeTensors::deserialize(&bytes).with_context(name)?;
    let mut items = Vec::new();
    for (name, view) in tensors.iter() {
        let dtype = match view.dtype() {
            safetensors::Dtype::F16 => Dtype::F16,
            safetensors::Dtype::BF16 => Dtype::Bf16,
            safetensors::Dtype::F32 => Dtype::F32,
            safetensors::Dtype::F64 => Dtype::F64,
            safetensors::Dtype::I64 => Dtype::I64,
            safetensors::Dtype::I32 => Dtype::I32,
            other => bail!("{}: {name} holds {other:?}; floats are expected", file.display()),
        };
        let shape = view.shape().iter().map(|&size| size as u64).collect();
        let array = Array { dtype, shape, bytes: view.data().to_vec() };
        items.push((text(name), Value::Array(array)));
    }
    Ok(Value::Dict(items))
}

/// Fills the state from what the file holds.
fn fill(state: &mut TrainState, content: &Value, key: Option<&str>) -> Result<Taken> {
    let (live_key, live) = find(content, key, &LIVE_KEYS).with_context(|| match key {
        Some(key) => format!("it has no tensors under {key:?}"),
        None => format!("it has no tensors under {} or at the top", LIVE_KEYS.join(", ")),
    })?;
    let batches =
        weights::fill(state, Which::Live, &live).map_err(|error| misfit(&live_key, &error))?;
    let averaged = AVERAGED_KEYS.iter().find_map(|key| Some((*key, content.get(key)?.arrays()?)));
    let (averaged_key, averaged) = match averaged.filter(|_| key.is_none()) {
        Some((key, averaged)) => (key.to_owned(), averaged),
        None => (live_key.clone(), live),
    };
    let averaged_batches = weights::fill(state, Which::Averaged, &averaged)
        .map_err(|error| misfit(&averaged_key, &error))?;
    let optimizer = content.get("optimizer").filter(|_| key.is_none());
    let updates = match optimizer {
        Some(optimizer) => {
            weights::fill_moments(state, optimizer).map_err(|error| misfit("optimizer", &error))?
        }
        None => None,
    };
    let updates = updates.or(batches).unwrap_or(0);
    weights::set_counters(state, updates, averaged_batches.unwrap_or(updates));
    state.mend();
    Ok(Taken { live: live_key, averaged: averaged_key, moments: optimizer.is_some() })
}

type Arrays<'v> = Vec<(&'v str, &'v Array)>;

fn find<'v>(content: &'v Value, key: Option<&str>, keys: &[&str]) -> Option<(String, Arrays<'v>)> {
    if let Some(key) = key {
        return Some((key.to_owned(), content.get(key)?.arrays()?));
    }
    let below = keys.iter().find_map(|key| Some(((*key).to_owned(), content.get(key)?.arrays()?)));
    below.or_else(|| Some(("the top".to_owned(), content.arrays()?)))
}

/// All names that do not fit, in one line; of very many, the first.
fn misfit(key: &str, misfit: &Misfit) -> anyhow::Error {
    const SHOWN: usize = 20;
    let Misfit { problems } = misfit;
    let shown = problems[..problems.len().min(SHOWN)].join("; ");
    let more = problems.len().saturating_sub(SHOWN);
    let more = if more == 0 { String::new() } else { format!("; and {more} more") };
    anyhow::anyhow!(
        "{key} does not fit the recipe's network: {shown}{more}; name the recipe it was trained with, \
         or set its model.* keys"
    )
}

async fn save(state: &TrainState, recipe: &Recipe, out: &Path) -> Result<()> {
    let location = out.to_str().context("--out: the path is not UTF-8")?;
    let store = Store::create(location).context("--out")?;
    let layout = state.checkpoint_layout(u64::from(recipe.checkpoint.part_mib) << 20)?;
    let share = train::share(state, layout.clone(), Rank(0), 1);
    let mut parts = Vec::new();
    for (index, bytes) in share.parts {
        parts.push(checkpoint::save_part(&store, &layout, share.step, index, bytes).await?);
    }
    let facts = libtorch::fingerprint(tch::Device::Cpu, libtorch::Precision::F32)?;
    let manifest = Manifest {
        run: RunId::try_from("imported".to_owned())?,
        step: share.step,
        epoch: Epoch(0), // Of no run: the images it was trained on are not known.
        term: Term(0),
        generation: Generation(0),
        sections: layout.sections().to_vec(),
        part_bytes: layout.part_bytes(),
        parts,
        state_sha256: Some(state.sha256()),
        recipe: recipe.to_toml(),
        fingerprint: facts.into_iter().collect::<BTreeMap<_, _>>(),
        software: format!("percheron {}", env!("CARGO_PKG_VERSION")),
        created: wall_clock(),
        nonce: blake3::hash(state.sha256().as_bytes()).to_hex().to_string(),
    };
    checkpoint::commit(&store, &manifest).await?;
    Ok(())
}
