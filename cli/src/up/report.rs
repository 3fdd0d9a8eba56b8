//! What a run has to show: a fold of its event log, and of what the supervisor did to it.

use std::collections::BTreeMap;

use cluster::{
    Evaluation, ExitScores, Generation, Ledger, Outcome, Record, RunConfig, Step, StepMetrics,
    Timestamp,
};
use coordinator::Entry;
use proto::v1;
use serde::Serialize;

/// Resident memory is sampled after every so many steps.
const RSS_STEPS: u64 = 100;

/// The log so far, and what was measured beside it.
#[derive(Debug, Default)]
pub(crate) struct Report {
    ledger: Ledger,
    plan: Option<RunConfig>,
    last: u64,
    evaluation: Option<Evaluation>,
    generations: u64,
    images: u64,
    times: Times,
    losses: Vec<Loss>,
    memory: Memory,
}

/// Wall times of the steps adopted, in milliseconds.
#[derive(Debug, Default)]
struct Times {
    step: Vec<f32>,
    /// Median of each hundred steps, by the last of them.
    step_by_100: Vec<(u64, f64)>,
    load: Vec<f32>,
    compute: Vec<f32>,
    reduce: Vec<f32>,
    update: Vec<f32>,
}

/// A worker that was taken from the run on purpose, and how the run got over it.
#[derive(Debug)]
struct Loss {
    worker: String,
    at: Timestamp,
    generation: Generation,
    state: LossState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LossState {
    /// No generation without it has formed.
    Open,
    /// One has; when the last survivor had stopped in the one before.
    Formed { stopped_at: Option<Timestamp> },
    /// It has made a step.
    Over { stopped_at: Option<Timestamp>, at: Timestamp },
}

#[derive(Debug, Default)]
struct Memory {
    bytes_max: u64,
    due: Option<Step>,
    samples: Vec<(u64, u64)>,
}

/// The figures at the end, as `--json` prints them.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Summary {
    pub(crate) run: String,
    pub(crate) steps: u64,
    pub(crate) state_sha256: String,
    pub(crate) top1: Option<Top1>,
    pub(crate) ema_top1: Option<Top1>,
    pub(crate) generations: u64,
    pub(crate) repeated_steps: u64,
    pub(crate) recovery_ms: Vec<u64>,
    pub(crate) images_per_s: Option<f64>,
    pub(crate) abort_ms: Vec<u64>,
    pub(crate) run_dir: String,
    pub(crate) step_ms_median: Option<f64>,
    pub(crate) step_ms_by_100: Vec<(u64, f64)>,
    pub(crate) phase_ms_median: Phases,
    pub(crate) worker_rss_bytes_max: u64,
    pub(crate) worker_rss_bytes: Vec<(u64, u64)>,
}

/// Top-1 accuracy of the exits, in percent.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Top1 {
    pub(crate) early3: f64,
    pub(crate) att: f64,
    pub(crate) cnn: f64,
    pub(crate) merge: f64,
}

/// Medians of the parts of a step, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Phases {
    load: Option<f64>,
    compute: Option<f64>,
    reduce: Option<f64>,
    update: Option<f64>,
}

impl Report {
    /// The report on a log as it is.
    pub(crate) fn of(entries: &[Entry]) -> Self {
        let mut report = Self::default();
        entries.iter().for_each(|entry| report.apply(entry));
        report
    }

    /// Takes the next entry of the log in; one that it has is passed over.
    pub(crate) fn apply(&mut self, entry: &Entry) {
        if entry.sequence <= self.last {
            return;
        }
        self.last = entry.sequence;
        self.ledger.apply(&entry.record);
        match &entry.record {
            Record::RunCreated { config } => self.plan = Some((**config).clone()),
            Record::GenerationOpened { .. } => self.generations += 1,
            Record::GenerationFormed { generation, stopped_at, .. } => {
                self.generation_formed(*generation, *stopped_at);
            }
            Record::StepAdopted { step, metrics, applied_at, .. } => {
                self.step_adopted(*step, *metrics, applied_at.unwrap_or(entry.at));
            }
            Record::Evaluated { evaluation, .. } => self.evaluation = Some(evaluation.clone()),
            Record::TermStarted { .. }
            | Record::FingerprintFixed { .. }
            | Record::WorkerJoined { .. }
            | Record::WorkerRefused { .. }
            | Record::NodeMarked { .. }
            | Record::NodeReadmitted { .. }
            | Record::WorkerLost { .. }
            | Record::ExchangeLost { .. }
            | Record::CheckpointCommitted { .. }
            | Record::CheckpointAbandoned { .. }
            | Record::Resized { .. }
            | Record::RunFinished { .. }
            | Record::RunFailed { .. } => {}
        }
    }

    /// A worker was taken from the run on purpose. If it trains, the time until the run is over it is
    /// measured.
    pub(crate) fn worker_taken(&mut self, worker: &str, at: Timestamp) {
        if self.ledger.members.iter().any(|member| member.name == worker) {
            self.losses.push(Loss {
                worker: worker.to_owned(),
                at,
                generation: self.ledger.generation,
                state: LossState::Open,
            });
        }
    }

    /// Takes in how the workers are.
    pub(crate) fn heard(&mut self, liveness: &v1::Liveness) {
        let held = liveness.workers.iter().filter_map(|worker| {
            let bytes = worker.progress.as_ref()?.resident_bytes;
            (bytes > 0).then_some((worker_number(&worker.name), bytes))
        });
        let held: BTreeMap<_, _> = held.collect();
        let most = held.values().copied().max().unwrap_or(0);
        self.memory.bytes_max = self.memory.bytes_max.max(most);
        if let Some((_, &bytes)) = held.first_key_value()
            && let Some(step) = self.memory.due.take()
        {
            self.memory.samples.push((step.0, bytes));
        }
    }

    fn generation_formed(&mut self, formed: Generation, stopped_at: Option<Timestamp>) {
        let members = &self.ledger.members;
        for loss in self.losses.iter_mut().filter(|loss| loss.state == LossState::Open) {
            let is_without = !members.iter().any(|member| member.name == loss.worker);
            if formed > loss.generation && is_without {
                loss.state = LossState::Formed { stopped_at };
            }
        }
    }

    fn step_adopted(&mut self, step: Step, metrics: Option<StepMetrics>, at: Timestamp) {
        for loss in &mut self.losses {
            if let LossState::Formed { stopped_at } = loss.state {
                loss.state = LossState::Over { stopped_at, at };
            }
        }
        if step.0.is_multiple_of(RSS_STEPS) {
            self.memory.due = Some(step);
        }
        let Some(metrics) = metrics else { return };
        self.images += metrics.images;
        self.times.step.push(metrics.step_ms);
        if step.0.is_multiple_of(100) {
            let newest = &self.times.step[self.times.step.len().saturating_sub(100)..];
            self.times.step_by_100.extend(median(newest).map(|median| (step.0, median)));
        }
        self.times.load.push(metrics.load_ms);
        self.times.compute.push(metrics.compute_ms);
        self.times.reduce.push(metrics.reduce_ms);
        self.times.update.push(metrics.update_ms);
    }

    /// The place of the newest entry taken in.
    pub(crate) fn last(&self) -> u64 {
        self.last
    }

    pub(crate) fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// The plan that the run was begun with.
    pub(crate) fn plan(&self) -> Option<&RunConfig> {
        self.plan.as_ref()
    }

    pub(crate) fn evaluation(&self) -> Option<&Evaluation> {
        self.evaluation.as_ref()
    }

    /// The figures, once the run is finished.
    pub(crate) fn summary(&self, run: &str, run_dir: &str) -> Option<Summary> {
        let Some(Outcome::Finished { step, state_sha256 }) = &self.ledger.outcome else {
            return None;
        };
        let top1 = |scores: fn(&Evaluation) -> &ExitScores| {
            self.evaluation.as_ref().map(|evaluation| Top1::of(scores(evaluation)))
        };
        let seconds = self.times.step.iter().copied().map(f64::from).sum::<f64>() / 1e3;
        Some(Summary {
            run: run.to_owned(),
            steps: step.0,
            state_sha256: state_sha256.clone(),
            top1: top1(|evaluation| &evaluation.weights),
            ema_top1: top1(|evaluation| &evaluation.ema),
            generations: self.generations,
            repeated_steps: self.ledger.repeated,
            recovery_ms: self.losses.iter().filter_map(Loss::recovery_ms).collect(),
            images_per_s: (seconds > 0.0).then(|| rounded(as_f64(self.images) / seconds)),
            abort_ms: self.losses.iter().filter_map(Loss::abort_ms).collect(),
            run_dir: run_dir.to_owned(),
            step_ms_median: median(&self.times.step),
            step_ms_by_100: self.times.step_by_100.clone(),
            phase_ms_median: Phases {
                load: median(&self.times.load),
                compute: median(&self.times.compute),
                reduce: median(&self.times.reduce),
                update: median(&self.times.update),
            },
            worker_rss_bytes_max: self.memory.bytes_max,
            worker_rss_bytes: self.memory.samples.clone(),
        })
    }
}

impl Loss {
    /// From the loss to the first step of a generation without the worker.
    fn recovery_ms(&self) -> Option<u64> {
        let LossState::Over { at, .. } = self.state else { return None };
        Some(at.0.saturating_sub(self.at.0))
    }

    /// From the loss to the moment when the last survivor had stopped.
    fn abort_ms(&self) -> Option<u64> {
        let (LossState::Formed { stopped_at } | LossState::Over { stopped_at, .. }) = self.state
        else {
            return None;
        };
        stopped_at.map(|at| at.0.saturating_sub(self.at.0))
    }
}

impl Top1 {
    pub(crate) fn of(scores: &ExitScores) -> Self {
        let [early3, att, cnn, merge] = scores.top1.map(|top1| rounded(top1 * 100.0));
        Self { early3, att, cnn, merge }
    }
}

/// The number of a worker that is named `worker-NUMBER`; others come after those.
pub(crate) fn worker_number(name: &str) -> u32 {
    name.strip_prefix("worker-").and_then(|number| number.parse().ok()).unwrap_or(u32::MAX)
}

/// Four digits after the point: more say nothing.
fn rounded(value: f64) -> f64 {
    (value * 1e4).round() / 1e4
}

#[expect(clippy::cast_precision_loss, reason = "counts of images are far below 2^53")]
fn as_f64(count: u64) -> f64 {
    count as f64
}

fn median(values: &[f32]) -> Option<f64> {
    let mut values = values.to_vec();
    values.sort_by(f32::total_cmp);
    let upper = f64::from(*values.get(values.len() / 2)?);
    let lower = f64::from(values[(values.len() - 1) / 2]);
    Some(rounded(f64::midpoint(lower, upper)))
}

#[cfg(test)]
mod tests;
