//! `cargo xtask tensorboard`: that TensorBoard reads what `percheron curves` writes.
//!
//! A short run loses a worker and its coordinator on the way. The Python library tensorboard must then read each
//! step once, in order, with the loss and the rate that the event log has, and each evaluation. Needs the network
//! once, for the library, unless `--python` names a Python that has it; so it is no part of `cargo xtask ci`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::workspace::Workspace;
use crate::{process, setup, test};

const LIBRARY: [&str; 2] = ["tensorboard==2.19.0", "setuptools==80.9.0"];
const SCRIPT: &str = include_str!("tensorboard.py");
const STEPS: u64 = 12;

/// Of each step, and of each evaluation: tags and where the event log has their values.
const STEP_TAGS: [(&str, &str); 3] =
    [("loss/loss", "/loss"), ("opt/lr", "/learning_rate"), ("opt/grad_norm", "/gradient_norm")];
const EVALUATION_TAGS: [(&str, &str, f64); 4] = [
    ("perf/test_acc1_early3", "/weights/top1/0", 100.0),
    ("perf/test_acc1_merge", "/weights/top1/3", 100.0),
    ("perf/test_acc1_merge_ema", "/ema/top1/3", 100.0),
    ("perf/test_loss", "/weights/loss", 1.0),
];

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// A Python that has the library; one is set up in the cache if not given.
    #[arg(long, value_name = "PROGRAM")]
    python: Option<PathBuf>,
}

/// The values of a tag, as (step, value).
type Scalars = BTreeMap<String, Vec<(u64, f64)>>;

pub(crate) fn run(workspace: &Workspace, options: &Options) -> Result<()> {
    test::build(workspace)?;
    let python = match &options.python {
        Some(python) => python.clone(),
        None => setup::python_with(workspace, "tensorboard", "import tensorboard", &LIBRARY)?,
    };
    let folder = tempfile::tempdir().context("there is no room for temporary files")?;
    let percheron = |words: &[&str]| {
        let mut percheron = workspace.binary("percheron");
        process::output(percheron.current_dir(folder.path()).args(words))
    };
    let steps = format!("max_steps={STEPS}");
    let up = ["up", "--recipe", "digits", "--run-dir", "run", "--workers", "2"];
    let sets = ["--set", &steps, "--set", "batch_size=2"];
    percheron(&[&up[..], &sets, &["--chaos", "kill@4,coordinator-kill@8"]].concat())?;
    percheron(&["curves", "run"])?;
    let log = percheron(&["log", "run", "--json"])?;

    let mut reader = workspace.command(&python);
    let seen =
        process::output(reader.args(["-c", SCRIPT]).arg(folder.path().join("run/tensorboard")))?;
    let count = check(&scalars(&seen)?, &log)?;
    println!("tensorboard: {STEPS} steps once each, {count} values as the event log has them");
    Ok(())
}

fn scalars(seen: &str) -> Result<Scalars> {
    let mut scalars = Scalars::new();
    for line in seen.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let [tag, step, value] = words[..] else { anyhow::bail!("not understood: {line:?}") };
        let point = (step.parse().context("a step")?, value.parse().context("a value")?);
        scalars.entry(tag.to_owned()).or_default().push(point);
    }
    Ok(scalars)
}

/// Compares what was read with the lines of `percheron log --json`; returns how many values are equal.
fn check(scalars: &Scalars, log: &str) -> Result<usize> {
    let records: Vec<Value> = log
        .lines()
        .map(|line| serde_json::from_str(line).context("a line of the event log"))
        .collect::<Result<_>>()?;
    let (mut steps, mut evaluations) = (BTreeMap::new(), BTreeMap::new());
    for record in records.iter().map(|line| &line["record"]) {
        let step_of = |figures: &Value| figures["step"].as_u64().context("a step of the log");
        match record["kind"].as_str() {
            Some("step_adopted") => {
                steps.entry(step_of(record)?).or_insert(&record["metrics"]);
            }
            Some("evaluated") => {
                let evaluation = &record["evaluation"];
                evaluations.entry(step_of(evaluation)?).or_insert(evaluation);
            }
            Some(_) | None => {}
        }
    }
    ensure!(steps.keys().copied().eq(1..=STEPS), "the log adopts the steps {:?}", steps.keys());
    ensure!(!evaluations.is_empty(), "the log has no evaluation");
    let mut count = 0;
    let step_tags = STEP_TAGS.map(|(tag, place)| (tag, place, 1.0, &steps));
    let evaluation_tags =
        EVALUATION_TAGS.map(|(tag, place, scale)| (tag, place, scale, &evaluations));
    for (tag, place, scale, known) in step_tags.into_iter().chain(evaluation_tags) {
        let read = scalars.get(tag).with_context(|| format!("{tag} is not there"))?;
        let at: Vec<u64> = read.iter().map(|(step, _)| *step).collect();
        ensure!(at.iter().eq(known.keys()), "{tag} is of the steps {at:?}");
        for ((step, value), figures) in read.iter().zip(known.values()) {
            let logged = figures.pointer(place).and_then(Value::as_f64);
            let logged =
                logged.with_context(|| format!("the log has no {place} of step {step}"))?;
            let near = (value - logged * scale).abs() <= 1e-6 * value.abs().max(1e-6);
            ensure!(near, "{tag} of step {step} is {value}, in the log {}", logged * scale);
            count += 1;
        }
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log() -> String {
        let step = |step: u64| {
            format!(
                "{{\"record\":{{\"kind\":\"step_adopted\",\"step\":{step},\"metrics\":{{\"loss\":2.5,\
                 \"learning_rate\":0.1,\"gradient_norm\":1.0}}}}}}\n"
            )
        };
        let scores = "{\"top1\":[0.5,0.5,0.5,0.5],\"loss\":2.0}";
        let evaluated = format!(
            "{{\"record\":{{\"kind\":\"evaluated\",\"evaluation\":{{\"step\":{STEPS},\"weights\":{scores},\
             \"ema\":{scores}}}}}}}"
        );
        (1..=STEPS).map(step).collect::<String>() + &evaluated
    }

    fn seen() -> String {
        let mut lines = String::new();
        for (tag, value) in [("loss/loss", "2.5"), ("opt/lr", "0.1"), ("opt/grad_norm", "1.0")] {
            lines.extend((1..=STEPS).map(|step| format!("{tag} {step} {value}\n")));
        }
        for (tag, _, scale) in EVALUATION_TAGS.map(|(tag, place, scale)| (tag, place, scale)) {
            lines += &format!("{tag} {STEPS} {}\n", if scale > 1.0 { "50.0" } else { "2.0" });
        }
        lines
    }

    #[test]
    fn a_step_too_few_too_many_or_of_another_value_is_told() {
        let check = |seen: &str| check(&scalars(seen).unwrap(), &log());
        let whole = 3 * usize::try_from(STEPS).unwrap() + 4;
        assert_eq!(check(&seen()).unwrap(), whole);
        let problem = |seen: &str| check(seen).unwrap_err().to_string();
        let repeated = seen().replacen("loss/loss 3 2.5", "loss/loss 2 2.5\nloss/loss 3 2.5", 1);
        assert!(problem(&repeated).contains("loss/loss is of the steps [1, 2, 2, 3"));
        assert!(problem(&seen().replacen("opt/lr 5 0.1", "opt/lr 5 0.2", 1)).contains("step 5"));
        assert!(problem(&seen().replace("opt/grad_norm", "other")).contains("is not there"));
    }
}
