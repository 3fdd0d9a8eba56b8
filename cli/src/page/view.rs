//! What the page shows of a run: a fold of its log up to a record.

use std::collections::BTreeMap;

use cluster::{ExitScores, Ledger, Outcome, Record, WorkerId};
use coordinator::Entry;
use proto::v1::{self, Liveness};
use serde::Serialize;

use super::goodput::Goodput;
use crate::{
    incidents::{self, Incident},
    tale,
};

/// Points of a curve at most: more than a screen has room for.
const POINTS_MAX: usize = 800;
/// Lines of the log at most.
const LINES_MAX: usize = 200;

/// What does not change.
#[derive(Debug, Clone, Serialize)]
pub(super) struct About {
    pub(super) run: String,
    pub(super) location: String,
    /// TOML.
    pub(super) recipe: String,
}

/// A run at a moment. Times are milliseconds since the Unix epoch.
#[derive(Debug, Serialize)]
pub(super) struct View<'a> {
    about: &'a About,
    /// The newest record there is, and the newest that counts here.
    newest: u64,
    shown: u64,
    began_ms: u64,
    at_ms: u64,
    /// Whether a coordinator leads the run now.
    led: bool,
    outcome: Option<&'static str>,
    /// Why it failed, or the digest of its state.
    outcome_detail: Option<String>,
    term: u64,
    generation: u64,
    step: u64,
    steps_total: u64,
    steps_per_epoch: u64,
    repeated: u64,
    curve: Curve,
    evaluations: Vec<Scores>,
    generations: Vec<Opened>,
    lanes: Vec<Lane>,
    incidents: Vec<Incident>,
    checkpoints: Vec<Kept>,
    goodput: Goodput,
    goodput_total_ms: u64,
    workers: Vec<Live>,
    fingerprint: BTreeMap<String, String>,
    log: Vec<Line>,
}

/// Steps and their figures, column by column.
#[derive(Debug, Default, Serialize)]
struct Curve {
    step: Vec<u64>,
    at_ms: Vec<u64>,
    loss: Vec<f32>,
    learning_rate: Vec<f64>,
    gradient_norm: Vec<f32>,
    images_per_s: Vec<f64>,
}

/// Top-1 of the exits early3, att, cnn and merge, 0 to 1.
#[derive(Debug, Serialize)]
struct Scores {
    step: u64,
    epoch: u64,
    samples: u64,
    weights: [f64; 4],
    ema: [f64; 4],
}

#[derive(Debug, Serialize)]
struct Opened {
    generation: u64,
    at_ms: u64,
    formed_ms: Option<u64>,
    planned: bool,
    reason: String,
    members: usize,
}

/// A worker's life, and when it took part.
#[derive(Debug, Serialize)]
struct Lane {
    name: String,
    joined_ms: u64,
    lost_ms: Option<u64>,
    cause: Option<String>,
    /// Generations that it was a member of: from when to when.
    spans: Vec<(u64, u64, Option<u64>)>,
}

#[derive(Debug, Serialize)]
struct Kept {
    step: u64,
    at_ms: u64,
}

#[derive(Debug, Serialize)]
struct Live {
    name: String,
    session: bool,
    phase: Option<String>,
    in_phase_ms: Option<u64>,
    step: Option<u64>,
    resident_bytes: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Line {
    sequence: u64,
    at_ms: u64,
    text: String,
}

/// What the fold gathers beside the ledger.
#[derive(Debug, Default)]
struct Fold {
    ledger: Ledger,
    plan: (u64, u64),
    steps: Vec<(u64, u64, cluster::StepMetrics)>,
    evaluations: Vec<Scores>,
    generations: Vec<Opened>,
    lanes: Vec<Lane>,
    /// The newest lane of each worker.
    lane_of: BTreeMap<WorkerId, usize>,
    checkpoints: Vec<Kept>,
}

impl<'a> View<'a> {
    /// The run after `entries`, of which `newest` is known; `liveness` is of now.
    pub(super) fn of(
        about: &'a About,
        entries: &[Entry],
        newest: Option<&Entry>,
        liveness: Option<&Liveness>,
    ) -> Self {
        let mut fold = Fold::default();
        for entry in entries {
            fold.take(entry);
            fold.ledger.apply(&entry.record);
        }
        let Fold { ledger, plan, steps, evaluations, generations, lanes, checkpoints, .. } = fold;
        let goodput = Goodput::of(entries);
        let (outcome, outcome_detail) = match ledger.outcome {
            Some(Outcome::Finished { state_sha256, .. }) => (Some("finished"), Some(state_sha256)),
            Some(Outcome::Failed { reason }) => (Some("failed"), Some(reason)),
            None => (None, None),
        };
        let last = entries.last();
        let tail = entries.len().saturating_sub(LINES_MAX);
        let line = |entry: &Entry| Line {
            sequence: entry.sequence,
            at_ms: entry.at.0,
            text: tale::of(&entry.record),
        };
        Self {
            about,
            newest: newest.map_or(0, |entry| entry.sequence),
            shown: last.map_or(0, |entry| entry.sequence),
            began_ms: entries.first().map_or(0, |entry| entry.at.0),
            at_ms: last.map_or(0, |entry| entry.at.0),
            led: liveness.is_some(),
            outcome,
            outcome_detail,
            term: ledger.term.0,
            generation: ledger.generation.0,
            step: ledger.canonical.0,
            steps_total: plan.0,
            steps_per_epoch: plan.1,
            repeated: ledger.repeated,
            curve: Curve::of(&steps),
            evaluations,
            generations,
            lanes,
            incidents: incidents::of(entries),
            checkpoints,
            goodput_total_ms: goodput.total(),
            goodput,
            workers: liveness.map(live).unwrap_or_default(),
            fingerprint: ledger.fingerprint.map(|found| found.0).unwrap_or_default(),
            log: entries[tail..].iter().map(line).collect(),
        }
    }
}

impl Fold {
    fn take(&mut self, entry: &Entry) {
        let at_ms = entry.at.0;
        match &entry.record {
            Record::RunCreated { config } => {
                self.plan = (config.steps_total.0, config.steps_per_epoch);
            }
            Record::WorkerJoined { worker, name, .. } => self.lane(*worker, name, at_ms),
            Record::WorkerLost { worker, cause, .. } => self.lost(*worker, cause, at_ms),
            Record::GenerationOpened { generation, members, planned, reason } => {
                self.lanes.iter_mut().for_each(|lane| lane.end_span(at_ms));
                for member in members {
                    if !self.lane_of.contains_key(&member.worker) {
                        self.lane(member.worker, &member.name, at_ms);
                    }
                    let lane = self.lane_of[&member.worker];
                    self.lanes[lane].spans.push((generation.0, at_ms, None));
                }
                self.generations.push(Opened {
                    generation: generation.0,
                    at_ms,
                    formed_ms: None,
                    planned: *planned,
                    reason: reason.clone(),
                    members: members.len(),
                });
            }
            Record::GenerationFormed { generation, .. } => {
                let opened = self.generations.iter_mut().rev();
                let mut opened = opened.filter(|opened| opened.generation == generation.0);
                if let Some(opened) = opened.next() {
                    opened.formed_ms = Some(at_ms);
                }
            }
            Record::StepAdopted { step, metrics: Some(metrics), applied_at, .. } => {
                let at_ms = applied_at.map_or(at_ms, |at| at.0);
                self.steps.push((step.0, at_ms, *metrics));
            }
            Record::Evaluated { evaluation, .. } => {
                let ExitScores { top1: weights, .. } = evaluation.weights;
                self.evaluations.push(Scores {
                    step: evaluation.step.0,
                    epoch: evaluation.epoch.0,
                    samples: evaluation.samples,
                    weights,
                    ema: evaluation.ema.top1,
                });
            }
            Record::CheckpointCommitted { step } => {
                self.checkpoints.push(Kept { step: step.0, at_ms });
            }
            Record::CheckpointAbandoned { step, .. } => {
                self.checkpoints.retain(|kept| kept.step != step.0);
            }
            Record::RunFinished { .. } | Record::RunFailed { .. } => {
                self.lanes.iter_mut().for_each(|lane| lane.end_span(at_ms));
            }
            Record::StepAdopted { metrics: None, .. }
            | Record::TermStarted { .. }
            | Record::FingerprintFixed { .. }
            | Record::WorkerRefused { .. }
            | Record::NodeMarked { .. }
            | Record::NodeReadmitted { .. }
            | Record::ExchangeLost { .. }
            | Record::Resized { .. } => {}
        }
    }

    fn lost(&mut self, worker: WorkerId, cause: &str, at_ms: u64) {
        if let Some(&lane) = self.lane_of.get(&worker) {
            let lane = &mut self.lanes[lane];
            lane.lost_ms = Some(at_ms);
            lane.cause = Some(cause.to_owned());
            lane.end_span(at_ms);
        }
    }

    fn lane(&mut self, worker: WorkerId, name: &str, joined_ms: u64) {
        self.lane_of.insert(worker, self.lanes.len());
        let name = name.to_owned();
        self.lanes.push(Lane { name, joined_ms, lost_ms: None, cause: None, spans: Vec::new() });
    }
}

impl Lane {
    fn end_span(&mut self, at_ms: u64) {
        if let Some((_, _, end @ None)) = self.spans.last_mut() {
            *end = Some(at_ms);
        }
    }
}

impl Curve {
    /// Every so many steps, and the last.
    fn of(steps: &[(u64, u64, cluster::StepMetrics)]) -> Self {
        let stride = steps.len().div_ceil(POINTS_MAX).max(1);
        let mut curve = Self::default();
        let last = steps.len().checked_sub(1);
        for (place, (step, at_ms, metrics)) in steps.iter().enumerate() {
            if place % stride != 0 && Some(place) != last {
                continue;
            }
            curve.step.push(*step);
            curve.at_ms.push(*at_ms);
            curve.loss.push(metrics.loss);
            curve.learning_rate.push(metrics.learning_rate);
            curve.gradient_norm.push(metrics.gradient_norm);
            curve.images_per_s.push(rate(metrics));
        }
        curve
    }
}

fn rate(metrics: &cluster::StepMetrics) -> f64 {
    let seconds = f64::from(metrics.step_ms) / 1e3;
    let images = u32::try_from(metrics.images).unwrap_or(u32::MAX);
    if seconds > 0.0 { f64::from(images) / seconds } else { 0.0 }
}

fn live(liveness: &Liveness) -> Vec<Live> {
    let of = |worker: &v1::WorkerLiveness| {
        let progress = worker.progress.as_ref();
        let known = progress.and_then(|beat| proto::progress(beat).ok());
        Live {
            name: worker.name.clone(),
            session: worker.session,
            phase: known.map(|known| known.phase.to_string()),
            in_phase_ms: progress.map(|beat| beat.in_phase_ms),
            step: progress.and_then(|beat| beat.applied),
            resident_bytes: progress.map(|beat| beat.resident_bytes),
        }
    };
    liveness.workers.iter().map(of).collect()
}

#[cfg(test)]
mod tests {
    use cluster::{Generation, Member, Step, StepMetrics, Term, Timestamp};

    use super::*;

    fn about() -> About {
        let text = |text: &str| text.to_owned();
        About { run: text("toy"), location: text("runs/toy"), recipe: text("name = \"toy\"") }
    }

    fn member(number: u64) -> Member {
        let name = format!("worker-{number}");
        Member { worker: WorkerId(number), name, address: String::new(), block: 0..1 }
    }

    fn opened(generation: u64, members: &[u64]) -> Record {
        let members = members.iter().copied().map(member).collect();
        let reason = "a test".to_owned();
        let generation = Generation(generation);
        Record::GenerationOpened { generation, members, planned: false, reason }
    }

    fn adopted(step: u64) -> Record {
        let metrics =
            StepMetrics { loss: 1.5, images: 32, step_ms: 100.0, ..StepMetrics::default() };
        let generation = Generation(1);
        Record::StepAdopted {
            step: Step(step),
            generation,
            metrics: Some(metrics),
            applied_at: None,
        }
    }

    fn history() -> Vec<Entry> {
        let joined = |number: u64| {
            let Member { worker, name, address, .. } = member(number);
            Record::WorkerJoined { worker, name, address }
        };
        let lost = Record::WorkerLost {
            worker: WorkerId(1),
            name: "worker-1".to_owned(),
            cause: "killed by signal 9".to_owned(),
        };
        let records = vec![
            (0, Record::TermStarted { term: Term(1) }),
            (10, joined(0)),
            (20, joined(1)),
            (30, opened(1, &[0, 1])),
            (200, adopted(1)),
            (300, lost),
            (301, opened(2, &[0])),
            (500, adopted(2)),
        ];
        let entry = |(sequence, (at, record))| Entry { sequence, at: Timestamp(at), record };
        (1..).zip(records).map(entry).collect()
    }

    fn at(count: usize) -> serde_json::Value {
        let (about, entries) = (about(), history());
        let view = View::of(&about, &entries[..count], entries.last(), None);
        serde_json::to_value(view).unwrap()
    }

    #[test]
    fn lanes_show_who_took_part_when() {
        let view = at(8);
        let lane = &view["lanes"][1];
        assert_eq!((&lane["name"], &lane["lost_ms"]), (&"worker-1".into(), &300.into()));
        assert_eq!(lane["spans"], serde_json::json!([[1, 30, 300]]));
        let other = serde_json::json!([[1, 30, 301], [2, 301, null]]);
        assert_eq!(view["lanes"][0]["spans"], other);
        assert_eq!(view["incidents"][0]["noticed_by"], "its supervisor");
        assert_eq!(view["curve"]["images_per_s"], serde_json::json!([320.0, 320.0]));
    }

    #[test]
    fn the_past_is_as_it_was() {
        let past = at(5);
        assert_eq!((&past["shown"], &past["newest"]), (&5.into(), &8.into()));
        assert_eq!((&past["step"], &past["generation"]), (&1.into(), &1.into()));
        assert_eq!(past["incidents"], serde_json::json!([]));
        assert_eq!(past["goodput_total_ms"], 200);
        assert_eq!(past["log"].as_array().unwrap().len(), 5);
        assert_eq!(at(0)["step"], 0);
    }

    #[test]
    fn a_long_curve_is_thinned_and_keeps_its_end() {
        let metrics = StepMetrics::default();
        let steps: Vec<_> = (1..=2000).map(|step| (step, step, metrics)).collect();
        let curve = Curve::of(&steps);
        assert!(curve.step.len() <= POINTS_MAX + 1, "{}", curve.step.len());
        assert_eq!((curve.step[0], curve.step.last()), (1, Some(&2000)));
    }
}
