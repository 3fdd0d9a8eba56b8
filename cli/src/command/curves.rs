//! `percheron curves`: how a run has learnt, as files for others: TensorBoard's, the original's log, a picture.
//!
//! All are made anew from the event log, in which a step that was made twice is adopted once.

pub(super) mod events;
pub(super) mod picture;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, Result};
use clap::Args;
use cluster::{Evaluation, Record, Step, StepMetrics, Timestamp};
use coordinator::Entry;

use super::train::journal;
use crate::{
    history, print,
    run_dir::{RunDir, write_atomically},
    up::worker_program,
};

/// The folder of TensorBoard's files in that of a run.
const EVENTS: &str = "tensorboard";
const PICTURE: &str = "curves.svg";

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The folder of a run, which may still be on.
    #[arg(value_name = "RUN_DIR")]
    run_dir: PathBuf,
}

pub(crate) async fn run(arguments: Arguments) -> Result<ExitCode> {
    let dir = RunDir::at(&arguments.run_dir)?;
    for file in write(&dir, &worker_program()?).await? {
        print::out(&file.display().to_string());
    }
    Ok(ExitCode::SUCCESS)
}

/// Writes all of them into the folder of the run; returns which.
pub(super) async fn write(dir: &RunDir, worker: &Path) -> Result<Vec<PathBuf>> {
    let recipe = history::require_run(dir)?;
    let parameters = journal::card(&recipe, worker)?.parameters;
    let entries = history::read(dir, 1).await?.entries;
    let course = Course::of(&entries);
    let folder = Path::new(dir.location());
    let began = entries.first().map_or(Timestamp(0), |entry| entry.at);
    let events = folder.join(EVENTS);
    std::fs::create_dir_all(&events).with_context(|| events.display().to_string())?;
    let files = [
        (folder.join("log.jsonl"), journal::text(&entries, &recipe, parameters).into_bytes()),
        (events.join(events::file_name(began)), events::file(began, &course)),
        (folder.join(PICTURE), picture::svg(&course).into_bytes()),
    ];
    for (path, bytes) in &files {
        write_atomically(path, bytes, 0o644)?;
    }
    Ok(files.into_iter().map(|(path, _)| path).collect())
}

/// What a run has made: its steps, each once and in order, and its evaluations.
#[derive(Debug, Default, Clone)]
pub(super) struct Course {
    pub(super) steps: Vec<(Timestamp, Step, StepMetrics)>,
    pub(super) evaluations: Vec<(Timestamp, Evaluation)>,
}

impl Course {
    fn of(entries: &[Entry]) -> Self {
        let (mut course, mut last) = (Self::default(), Step(0));
        for Entry { at, record, .. } in entries {
            if let Record::StepAdopted { step, metrics, .. } = record {
                if let Some(metrics) = metrics.as_ref().filter(|_| *step > last) {
                    course.steps.push((*at, *step, *metrics));
                }
                last = last.max(*step);
            } else if let Record::Evaluated { evaluation, .. } = record {
                let is_new = |(_, known): &(Timestamp, Evaluation)| known.step < evaluation.step;
                if course.evaluations.last().is_none_or(is_new) {
                    course.evaluations.push((*at, evaluation.clone()));
                }
            }
        }
        course
    }
}

#[cfg(test)]
pub(super) mod tests {
    use cluster::{Epoch, ExitScores};

    use super::*;

    /// Three steps and an evaluation.
    pub(in crate::command) fn course() -> Course {
        let metrics = |loss: f32| StepMetrics {
            loss,
            gradient_norm: 1.5,
            learning_rate: 0.01,
            images: 32,
            step_ms: 1.0,
            load_ms: 0.0,
            compute_ms: 1.0,
            reduce_ms: 0.0,
            update_ms: 0.0,
        };
        let step = |at: u64, loss: f32| (Timestamp(at * 1000), Step(at), metrics(loss));
        let scores = |top1: f64| ExitScores { top1: [top1; 4], loss: 2.0 };
        let evaluation = Evaluation {
            step: Step(3),
            epoch: Epoch(1),
            samples: 10,
            weights: scores(0.5),
            ema: scores(0.25),
        };
        Course {
            steps: vec![step(1, 3.0), step(2, 2.5), step(3, 0.0)],
            evaluations: vec![(Timestamp(3500), evaluation)],
        }
    }

    fn adopted(step: u64, metrics: Option<StepMetrics>) -> Record {
        let generation = cluster::Generation(1);
        Record::StepAdopted { step: Step(step), generation, metrics, applied_at: None }
    }

    #[test]
    fn a_step_that_is_told_twice_counts_once() {
        let metrics = course().steps[0].2;
        let entry = |sequence: u64, step: u64| Entry {
            sequence,
            at: Timestamp(sequence),
            record: adopted(step, Some(metrics)),
        };
        let course = Course::of(&[entry(1, 1), entry(2, 2), entry(3, 2), entry(4, 1), entry(5, 3)]);
        let steps: Vec<u64> = course.steps.iter().map(|(_, step, _)| step.0).collect();
        assert_eq!(steps, [1, 2, 3]);
    }
}
