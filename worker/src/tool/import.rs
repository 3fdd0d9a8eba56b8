//! `percheron import`: a file of weights becomes a checkpoint.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use checkpoint::{
    Manifest, Store,
    pth::{self, Array, Value},
};
use clap::Args;
use cluster::{Epoch, Generation, Rank, RunId, Term};
use recipe::Recipe;
use serde::Serialize;

use super::{empty_state, options, say, tensor_file};
use crate::{
    train::{TrainState, checkpoints, memory::ShareMemory, wall_clock},
    weights::{self, Misfit, Which},
};

/// Where the official files and their relatives keep the weights, in the order they are looked for.
const LIVE_KEYS: [&str; 3] = ["model", "state_dict", "module"];
const AVERAGED_KEYS: [&str; 2] = ["model_ema", "state_dict_ema"];

/// A classifier that every network has; it has as many rows as there are classes.
const CLASSIFIER: &str = "early_classifier3.weight";

/// `percheron import …`.
#[derive(Debug, Args)]
pub struct Arguments {
    /// A file of torch.save in the official layout, or .safetensors. Nothing in it is run.
    file: PathBuf,
    /// The recipe whose network the weights are of, a built-in name or a file [default: what the args in
    /// the file say].
    #[arg(long, value_name = "NAME|PATH")]
    recipe: Option<String>,
    /// Lay a value over the recipe, such as model.name=reg800m_perceiver_t128; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Take the weights, and only them, from this key of the file [default: the first there is of model,
    /// state_dict, module and the top].
    #[arg(long)]
    key: Option<String>,
    /// The folder to make; it must be empty or not there yet.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Print one line of JSON.
    #[arg(long)]
    json: bool,
}

/// What was taken.
#[derive(Debug, Serialize)]
struct Imported {
    /// The key that the weights came from.
    weights: String,
    /// The key that their averages came from.
    averaged: String,
    /// Whether the moments of the optimizer came along; else they are 0.
    moments: bool,
    step: u64,
    model: String,
    state_sha256: String,
    out: String,
}

pub(super) async fn run(arguments: Arguments) -> Result<()> {
    let out = &arguments.out;
    if fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_some()) {
        bail!("--out {}: it is not empty; choose another folder", out.display());
    }
    let in_file = || arguments.file.display().to_string();
    let content = read(&arguments.file)?;
    let key = arguments.key.as_deref();
    let recipe = match &arguments.recipe {
        Some(name) => Recipe::load(name, &arguments.sets)?,
        None => own_recipe(&content, key, &arguments.sets).with_context(in_file)?,
    };
    let mut state = empty_state(&recipe)?;
    let taken = fill(&mut state, &content, key, recipe.update_freq.into()).with_context(in_file)?;
    let state_sha256 = state.sha256();
    save(&state, &state_sha256, &recipe, out).await?;
    let imported = Imported {
        weights: taken.live,
        averaged: taken.averaged,
        moments: taken.moments,
        step: state.step().expect("it was mended").0,
        model: recipe.model.name,
        state_sha256,
        out: out.display().to_string(),
    };
    if arguments.json {
        say(&serde_json::to_string(&imported)?);
    } else {
        tell(&imported);
    }
    Ok(())
}

fn tell(imported: &Imported) {
    let Imported { weights, averaged, moments, step, model, state_sha256, out } = imported;
    let moments = if *moments { "from optimizer" } else { "0: the file has none" };
    say(&format!("{out}: a checkpoint of step {step} of {model}"));
    say(&format!("  weights      from {weights}"));
    say(&format!("  averages     from {averaged}"));
    say(&format!("  moments      {moments}"));
    say(&format!("  state sha256 {state_sha256}"));
}

/// Which keys of the file were used.
struct Taken {
    live: String,
    averaged: String,
    moments: bool,
}

pub(super) fn read(file: &Path) -> Result<Value> {
    if file.extension().is_some_and(|extension| extension == "safetensors") {
        return tensor_file::read(file).with_context(|| file.display().to_string());
    }
    Ok(pth::read(file)?)
}

/// The recipe that the file itself tells of.
fn own_recipe(content: &Value, key: Option<&str>, sets: &[String]) -> Result<Recipe> {
    let nothing = Value::Dict(Vec::new());
    let args = content.get("args").unwrap_or(&nothing);
    let rows = |(_, arrays): (String, Arrays<'_>)| {
        let (_, classifier) = arrays.iter().find(|(name, _)| name.ends_with(CLASSIFIER))?;
        classifier.shape.first().copied()
    };
    let classes = find(content, key, &LIVE_KEYS).and_then(rows);
    options::recipe(args, classes, sets)
}

/// Fills the state from what the file holds.
///
/// Each virtual rank made `update_freq` forwards an update.
fn fill(
    state: &mut TrainState,
    content: &Value,
    key: Option<&str>,
    update_freq: u64,
) -> Result<Taken> {
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
    let updates = updates.or(batches.map(|batches| batches / update_freq)).unwrap_or(0);
    let averaged_batches = averaged_batches.unwrap_or(updates * update_freq);
    weights::set_counters(state, updates, averaged_batches);
    state.mend();
    Ok(Taken { live: live_key, averaged: averaged_key, moments: optimizer.is_some() })
}

/// The weights of a file, in memory, and the recipe that its args make, with `sets` laid over it.
pub(super) fn load(file: &Path, sets: &[String]) -> Result<(Recipe, TrainState)> {
    let in_file = || file.display().to_string();
    let content = read(file)?;
    let recipe = own_recipe(&content, None, sets).with_context(in_file)?;
    let mut state = empty_state(&recipe)?;
    fill(&mut state, &content, None, recipe.update_freq.into()).with_context(in_file)?;
    Ok((recipe, state))
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
        "{key} does not fit the network: {shown}{more}; name the recipe that it was trained with by \
         --recipe, or set its model.* keys by --set"
    )
}

async fn save(state: &TrainState, sha256: &str, recipe: &Recipe, out: &Path) -> Result<()> {
    let location = out.to_str().context("--out: the path is not UTF-8")?;
    let store = Store::create(location).context("--out")?;
    let layout = state.checkpoint_layout(u64::from(recipe.checkpoint.part_mib) << 20)?;
    let (memory, alone) = (ShareMemory::default(), (Rank(0), 1));
    let share = checkpoints::share(state, &layout, alone, &memory, true);
    let share = share.expect("what is indispensable is always copied");
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
        state_sha256: Some(sha256.to_owned()),
        recipe: recipe.to_toml(),
        fingerprint: facts.into_iter().collect::<BTreeMap<_, _>>(),
        software: format!("percheron {}", env!("CARGO_PKG_VERSION")),
        created: wall_clock(),
        nonce: blake3::hash(sha256.as_bytes()).to_hex().to_string(),
    };
    checkpoint::commit(&store, &manifest).await?;
    Ok(())
}
