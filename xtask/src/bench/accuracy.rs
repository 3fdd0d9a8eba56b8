//! `cargo xtask bench accuracy`: what networks learn from photographs of clothing, over several seeds.
//!
//! Each run trains by `percheron up` with one recipe, and is evaluated by `percheron eval`, weights and
//! average. What came out is kept in the output folder, so that a benchmark which is cut short goes on where it
//! was: a finished run is not made again, and one that was under way goes on from its newest checkpoint.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::clothing;
use crate::process;
use crate::workspace::Workspace;

/// The two programs that a run needs, copied before the first, so that a build meanwhile changes nothing.
const PROGRAMS: [&str; 2] = ["percheron", "percheron-worker"];
/// The budgets of dynamic inference that are shown, of 33.
const SHOWN: [usize; 5] = [0, 8, 16, 24, 32];

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Folder with train.tar and validation.tar.
    #[arg(long, value_name = "DIR")]
    images: PathBuf,
    /// The registered models that are trained.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "mobilenetV3_0x75_perceiver_t128,reg400m_perceiver_t32"
    )]
    models: Vec<String>,
    /// Each with the seeds from 1 to N.
    #[arg(long, value_name = "N", default_value_t = 3)]
    seeds: u64,
    /// Passes over the data, instead of the recipe's.
    #[arg(long)]
    epochs: Option<u64>,
    /// The recipe, a file; the model, the seed and the images are laid over it.
    #[arg(long, value_name = "PATH", default_value = "worker/recipes/clothing-short.toml")]
    recipe: PathBuf,
    /// A recipe key to lay over it as well; may be given several times.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Where results are kept [default: `accuracy` in the build folder].
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// One JSON object as the last line.
    #[arg(long)]
    json: bool,
}

/// A run, as it is kept in the output folder.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    model: String,
    seed: u64,
    sets: Vec<String>,
    steps: u64,
    seconds: u64,
    state_sha256: String,
    weights: Evaluated,
    average: Evaluated,
}

/// The last line of `percheron up --json`, as far as it is read here.
#[derive(Debug, Deserialize)]
struct Trained {
    steps: u64,
    state_sha256: String,
}

/// `percheron eval --json`, as far as it is read here.
#[derive(Debug, Serialize, Deserialize)]
struct Evaluated {
    samples: u64,
    loss: f64,
    exits: Vec<Exit>,
    dynamic: Vec<Budget>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Exit {
    name: String,
    top1: f64,
    top5: f64,
}

#[derive(Debug, Serialize, Deserialize)]
struct Budget {
    budget: usize,
    accuracy: f64,
    mean_macs: f64,
}

/// A mean over runs, and the standard deviation of a sample of them.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
struct Spread {
    mean: f64,
    sd: f64,
}

pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<()> {
    ensure!(arguments.seeds > 0, "--seeds: at least 1");
    let out = match &arguments.out {
        Some(out) => std::path::absolute(out)?,
        None => workspace.target.join("accuracy"),
    };
    fs::create_dir_all(&out).with_context(|| format!("--out {}", out.display()))?;
    let bench = Bench { workspace, arguments, out };
    bench.copy_programs()?;
    bench.pack()?;
    let mut runs = Vec::new();
    for seed in 1..=arguments.seeds {
        for model in &arguments.models {
            runs.push(bench.one(model, seed)?);
        }
    }
    println!("\n{}", table(&runs));
    if arguments.json {
        println!("{}", figures(&runs));
    }
    Ok(())
}

struct Bench<'a> {
    workspace: &'a Workspace,
    arguments: &'a Arguments,
    out: PathBuf,
}

impl Bench<'_> {
    fn copy_programs(&self) -> Result<()> {
        let folder = self.out.join("programs");
        fs::create_dir_all(&folder)?;
        for name in PROGRAMS {
            let (from, to) = (self.workspace.target.join("release").join(name), folder.join(name));
            if !to.is_file() {
                fs::copy(&from, &to).with_context(|| format!("{}", from.display()))?;
            }
        }
        Ok(())
    }

    fn percheron(&self) -> Command {
        self.workspace.command(self.out.join("programs/percheron"))
    }

    fn data(&self) -> PathBuf {
        self.out.join("data")
    }

    fn pack(&self) -> Result<()> {
        let images = std::path::absolute(&self.arguments.images)?;
        for (tar, split) in clothing::SPLITS {
            if !self.data().join(format!("{split}.json")).is_file() {
                clothing::pack(self.workspace, &images.join(tar), &self.data(), split)?;
            }
        }
        Ok(())
    }

    /// The keys that are laid over the recipe.
    fn sets(&self, model: &str, seed: u64) -> Vec<String> {
        let mut sets = vec![
            format!("data.location={}", self.data().display()),
            format!("model.name={model}"),
            format!("seed={seed}"),
        ];
        sets.extend(self.arguments.epochs.map(|epochs| format!("epochs={epochs}")));
        sets.extend(self.arguments.sets.iter().cloned());
        sets
    }

    /// Trains and evaluates, unless that was done.
    fn one(&self, model: &str, seed: u64) -> Result<Kept> {
        let name = format!("{model}-seed{seed}");
        let file = self.out.join(format!("{name}.json"));
        let sets = self.sets(model, seed);
        if let Some(kept) = finished(&file)? {
            ensure!(
                kept.sets == sets,
                "{}: it was made with other settings ({}): choose another --out",
                file.display(),
                kept.sets.join(" ")
            );
            return Ok(kept);
        }
        let start = Instant::now();
        let run_dir = self.out.join(&name);
        let trained = self.train(&run_dir, &sets)?;
        let seconds = start.elapsed().as_secs();
        let evaluated = |ema: bool| self.evaluate(&run_dir, ema);
        let kept = Kept {
            model: model.to_owned(),
            seed,
            sets,
            steps: trained.steps,
            seconds,
            state_sha256: trained.state_sha256,
            weights: evaluated(false)?,
            average: evaluated(true)?,
        };
        let unfinished = file.with_extension("part");
        fs::write(&unfinished, serde_json::to_string_pretty(&kept)?)?;
        fs::rename(&unfinished, &file)?;
        fs::remove_dir_all(&run_dir)?; // Hundreds of megabytes of checkpoints.
        println!("{}", table(std::slice::from_ref(&kept)));
        Ok(kept)
    }

    fn train(&self, run_dir: &Path, sets: &[String]) -> Result<Trained> {
        let mut up = self.percheron();
        up.args(["up", "--json", "--workers", "1"]);
        if !run_dir.join("recipe.toml").is_file() {
            up.arg("--recipe").arg(&self.arguments.recipe);
            up.args(sets.iter().flat_map(|set| ["--set", set]));
        }
        let output = process::output(up.arg("--run-dir").arg(run_dir))?;
        let last = output.lines().last().context("`percheron up --json` printed nothing")?;
        serde_json::from_str(last).context("cannot understand `percheron up --json`")
    }

    fn evaluate(&self, run_dir: &Path, ema: bool) -> Result<Evaluated> {
        let mut eval = self.percheron();
        eval.args(["eval", "--json", "--checkpoint"]).arg(run_dir);
        if ema {
            eval.arg("--ema");
        }
        let output = process::output(&mut eval)?;
        serde_json::from_str(&output).context("cannot understand `percheron eval --json`")
    }
}

/// A run that is kept already.
fn finished(file: &Path) -> Result<Option<Kept>> {
    if !file.is_file() {
        return Ok(None);
    }
    let text = fs::read_to_string(file).with_context(|| file.display().to_string())?;
    let kept = serde_json::from_str(&text)
        .with_context(|| format!("{} is no result: remove it", file.display()))?;
    Ok(Some(kept))
}

fn spread(values: impl Iterator<Item = f64>) -> Spread {
    let values: Vec<f64> = values.collect();
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    Spread { mean, sd: if values.len() > 1 { (squares / (count - 1.0)).sqrt() } else { 0.0 } }
}

/// The runs of each model, models in their order of names.
fn by_model(runs: &[Kept]) -> BTreeMap<&str, Vec<&Kept>> {
    let mut models: BTreeMap<&str, Vec<&Kept>> = BTreeMap::new();
    for run in runs {
        models.entry(&run.model).or_default().push(run);
    }
    models
}

/// Top-1 of each exit, in percent.
fn exits(evaluated: &[&Evaluated]) -> Vec<(String, Spread)> {
    let Some(first) = evaluated.first() else { return Vec::new() };
    let exit = |(at, exit): (usize, &Exit)| {
        let top1 = evaluated.iter().map(|evaluated| evaluated.exits[at].top1 * 100.0);
        (exit.name.clone(), spread(top1))
    };
    first.exits.iter().enumerate().map(exit).collect()
}

/// Accuracy in percent and cost in 10⁶ multiply–accumulates of the budgets that are shown.
fn curve(evaluated: &[&Evaluated]) -> Vec<(usize, Spread, Spread)> {
    let at = |budget: usize| {
        let rows = || evaluated.iter().filter_map(move |e| e.dynamic.get(budget));
        let accuracy = spread(rows().map(|row| row.accuracy * 100.0));
        (budget, accuracy, spread(rows().map(|row| row.mean_macs / 1e6)))
    };
    SHOWN.into_iter().map(at).collect()
}

fn table(runs: &[Kept]) -> String {
    let mut lines = Vec::new();
    let shown = |Spread { mean, sd }: &Spread| format!("{mean:.1} ± {sd:.1}");
    for (model, runs) in by_model(runs) {
        let seconds = spread(runs.iter().map(|run| run.seconds as f64));
        let steps = runs[0].steps;
        let count = runs.len();
        lines.push(format!("{model}: seeds {count}, {steps} steps, {} s a run", shown(&seconds)));
        for (what, evaluated) in sets_of_weights(&runs) {
            let exits = exits(&evaluated);
            let exits = exits.iter().map(|(name, top1)| format!("{name} {}", shown(top1)));
            lines.push(format!("  {what}  {}", exits.collect::<Vec<_>>().join(", ")));
            for (budget, accuracy, macs) in curve(&evaluated) {
                let (accuracy, macs) = (shown(&accuracy), shown(&macs));
                lines.push(format!("    budget {budget:>2}  {accuracy} %  {macs} M MACs"));
            }
        }
    }
    lines.join("\n")
}

fn sets_of_weights<'r>(runs: &[&'r Kept]) -> [(&'static str, Vec<&'r Evaluated>); 2] {
    [
        ("weights", runs.iter().map(|run| &run.weights).collect()),
        ("average", runs.iter().map(|run| &run.average).collect()),
    ]
}

fn figures(runs: &[Kept]) -> String {
    let models = by_model(runs).into_iter().map(|(model, runs)| {
        let weights = sets_of_weights(&runs).map(|(what, evaluated)| {
            let exits: BTreeMap<_, _> = exits(&evaluated).into_iter().collect();
            let dynamic = curve(&evaluated).into_iter().map(|(budget, accuracy, macs)| {
                serde_json::json!({ "budget": budget, "accuracy": accuracy, "mmacs": macs })
            });
            let dynamic: Vec<_> = dynamic.collect();
            (what, serde_json::json!({ "top1": exits, "dynamic": dynamic }))
        });
        (model, BTreeMap::from(weights))
    });
    serde_json::json!(models.collect::<BTreeMap<_, _>>()).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_is_of_a_sample() {
        assert_eq!(spread([4.0].into_iter()), Spread { mean: 4.0, sd: 0.0 });
        let Spread { mean, sd } = spread([1.0, 2.0, 3.0].into_iter());
        assert!((mean - 2.0).abs() < 1e-12 && (sd - 1.0).abs() < 1e-12, "{mean} {sd}");
    }

    fn evaluated(top1: f64) -> Evaluated {
        let exit = |name: &str| Exit { name: name.to_owned(), top1, top5: 1.0 };
        let row = |budget| Budget { budget, accuracy: top1, mean_macs: 2e6 };
        Evaluated {
            samples: 10,
            loss: 1.0,
            exits: ["early3", "merge"].map(exit).into(),
            dynamic: (0..33).map(row).collect(),
        }
    }

    #[test]
    fn a_table_has_means_over_seeds() {
        let kept = |seed: u64, top1: f64| Kept {
            model: "small".to_owned(),
            seed,
            sets: Vec::new(),
            steps: 7,
            seconds: 9,
            state_sha256: String::new(),
            weights: evaluated(top1),
            average: evaluated(0.5),
        };
        let table = table(&[kept(1, 0.4), kept(2, 0.6)]);
        assert!(table.contains("seeds 2, 7 steps"), "{table}");
        assert!(table.contains("weights  early3 50.0 ± 14.1, merge 50.0 ± 14.1"), "{table}");
        assert!(table.contains("average  early3 50.0 ± 0.0"), "{table}");
        assert!(table.contains("budget  8  50.0 ± 14.1 %  2.0 ± 0.0 M MACs"), "{table}");
    }

    #[test]
    fn a_damaged_result_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a.json");
        assert!(finished(&file).unwrap().is_none());
        fs::write(&file, "{").unwrap();
        assert!(
            finished(&file).unwrap_err().to_string().contains("a.json is no result: remove it")
        );
    }
}
