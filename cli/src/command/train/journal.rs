//! `log.jsonl`: an object an epoch, with the fields of the original's log.

use std::{path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};
use cluster::{ExitScores, Record, Step, StepMetrics};
use coordinator::Entry;
use recipe::Recipe;
use serde::Deserialize;
use serde_json::{Map, Value, json};

/// What `percheron model show` says.
#[derive(Debug, Deserialize)]
pub(in crate::command) struct Card {
    pub(in crate::command) parameters: u64,
    pub(in crate::command) macs: Macs,
}

#[derive(Debug, Deserialize)]
pub(in crate::command) struct Macs {
    pub(in crate::command) merge: u64,
}

/// Asks the worker's program about the network of a recipe.
pub(in crate::command) fn card(recipe: &Recipe, worker: &Path) -> Result<Card> {
    let tree = toml::Table::try_from(&recipe.model).context("the recipe cannot be written")?;
    let mut command = Command::new(worker);
    command.args(["model", "show", &recipe.model.name, "--json"]);
    for (key, value) in tree.iter().filter(|(key, _)| *key != "name") {
        command.args(["--option", &format!("{key}={value}")]);
    }
    let output = command.output().with_context(|| format!("cannot start {}", worker.display()))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}", said.trim().trim_start_matches("error: "));
    serde_json::from_slice(&output.stdout).context("what the worker says of its network")
}

/// The log of a run, from its event log.
pub(in crate::command) fn text(entries: &[Entry], recipe: &Recipe, parameters: u64) -> String {
    epochs(entries, recipe, parameters).iter().map(|line| format!("{line}\n")).collect()
}

/// The steps of an epoch so far.
#[derive(Debug, Default)]
struct Epoch {
    losses: f64,
    norms: f64,
    steps: u64,
    lr: f64,
}

/// An object for each evaluation, with the means over the steps since the one before. A step that was made
/// twice was adopted once.
fn epochs(entries: &[Entry], recipe: &Recipe, parameters: u64) -> Vec<Value> {
    let (mut epoch, mut last, mut lines) = (Epoch::default(), Step(0), Vec::new());
    for entry in entries {
        if let Record::StepAdopted { step, metrics, .. } = &entry.record {
            if let Some(metrics) = metrics.as_ref().filter(|_| *step > last) {
                epoch.add(metrics);
            }
            last = last.max(*step);
        } else if let Record::Evaluated { evaluation, .. } = &entry.record {
            let mut line = epoch.fields(recipe);
            scores(&mut line, "", &evaluation.weights);
            scores(&mut line, "_ema", &evaluation.ema);
            line.insert("epoch".to_owned(), evaluation.epoch.0.saturating_sub(1).into());
            line.insert("step".to_owned(), evaluation.step.0.into());
            line.insert("n_parameters".to_owned(), parameters.into());
            lines.push(Value::Object(line));
            epoch = Epoch::default();
        }
    }
    lines
}

impl Epoch {
    fn add(&mut self, metrics: &StepMetrics) {
        self.losses += f64::from(metrics.loss);
        self.norms += f64::from(metrics.gradient_norm);
        self.lr = metrics.learning_rate;
        self.steps += 1;
    }

    fn fields(&self, recipe: &Recipe) -> Map<String, Value> {
        let mean = |sum: f64| (self.steps > 0).then(|| sum / self.steps as f64);
        let mut fields = Map::new();
        for (name, value) in [
            ("train_lr", json!(self.lr)),
            ("train_min_lr", json!(self.lr)),
            ("train_loss", json!(mean(self.losses))),
            ("train_weight_decay", json!(recipe.optimizer.weight_decay)),
            ("train_grad_norm", json!(mean(self.norms))),
        ] {
            fields.insert(name.to_owned(), value);
        }
        fields
    }
}

/// In percent, as the original.
fn scores(line: &mut Map<String, Value>, suffix: &str, scores: &ExitScores) {
    line.insert(format!("test_loss{suffix}"), json!(scores.loss));
    for (exit, top1) in ExitScores::EXITS.iter().zip(scores.top1) {
        line.insert(format!("test_acc1_{exit}{suffix}"), json!(top1 * 100.0));
    }
}
