//! Where a run's time went. The classes share the time from the first record to the last among them, to the
//! millisecond.

use cluster::{Ledger, Record, StepMetrics};
use coordinator::Entry;
use serde::Serialize;

/// Milliseconds of wall time by what they were spent on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub(super) struct Goodput {
    /// Forward, backward and the update of steps that count.
    pub(super) train: u64,
    /// Waiting for images.
    pub(super) load: u64,
    /// The sum over the virtual ranks.
    pub(super) communicate: u64,
    /// Evaluation between two steps.
    pub(super) evaluate: u64,
    /// Between two steps of which the first was kept.
    pub(super) checkpoint: u64,
    /// From the last step before a disturbance to the first word of it: that work is done again.
    pub(super) detect: u64,
    /// From there to the generation that goes on, and what its first step took longer than its figures say.
    pub(super) recover: u64,
    /// All else: before the first step, and what steps do between their phases.
    pub(super) idle: u64,
}

impl Goodput {
    /// The time that all classes share.
    pub(super) fn total(&self) -> u64 {
        let Self { train, load, communicate, evaluate, checkpoint, detect, recover, idle } = self;
        train + load + communicate + evaluate + checkpoint + detect + recover + idle
    }

    /// Of a log, or of its beginning.
    pub(super) fn of(entries: &[Entry]) -> Self {
        let mut fold = Fold::default();
        let Some(first) = entries.first() else { return fold.spent };
        fold.until = first.at.0;
        for entry in entries {
            fold.take(entry);
        }
        let last = entries.iter().map(|entry| entry.at.0).max().unwrap_or(first.at.0);
        let rest = last.saturating_sub(fold.until);
        match fold.disturbed {
            Some(noticed) => {
                let (unnoticed, noticed) = split(rest, noticed.saturating_sub(fold.until));
                fold.spent.detect += unnoticed;
                fold.spent.recover += noticed;
            }
            None if fold.is_evaluated => fold.spent.evaluate += rest,
            None => fold.spent.idle += rest,
        }
        fold.spent
    }
}

#[derive(Debug, Default)]
struct Fold {
    ledger: Ledger,
    spent: Goodput,
    /// All time before this moment is accounted for, in milliseconds since the Unix epoch.
    until: u64,
    has_stepped: bool,
    /// When the first word of a disturbance came since the last step.
    disturbed: Option<u64>,
    is_evaluated: bool,
    is_kept: bool,
}

impl Fold {
    fn take(&mut self, entry: &Entry) {
        let record = &entry.record;
        if self.has_stepped && self.ledger.is_disturbed_by(record) {
            self.disturbed.get_or_insert(entry.at.0);
        } else if let Record::StepAdopted { metrics, applied_at, .. } = record {
            let at = applied_at.map_or(entry.at.0, |at| at.0);
            self.stepped(at, metrics.unwrap_or_default());
        }
        self.is_evaluated |= matches!(record, Record::Evaluated { .. });
        self.is_kept |= matches!(record, Record::CheckpointCommitted { .. });
        self.ledger.apply(record);
    }

    fn stepped(&mut self, at: u64, metrics: StepMetrics) {
        let passed = at.saturating_sub(self.until);
        let left = self.share_step(passed, &metrics);
        let class = if let Some(noticed) = self.disturbed {
            let (unnoticed, rest) = split(left, noticed.saturating_sub(self.until));
            self.spent.detect += unnoticed;
            self.spent.recover += rest;
            None
        } else if !self.has_stepped {
            Some(&mut self.spent.idle)
        } else if self.is_evaluated {
            Some(&mut self.spent.evaluate)
        } else if self.is_kept {
            Some(&mut self.spent.checkpoint)
        } else {
            Some(&mut self.spent.idle)
        };
        if let Some(class) = class {
            *class += left;
        }
        self.until = self.until.max(at);
        self.has_stepped = true;
        self.disturbed = None;
        (self.is_evaluated, self.is_kept) = (false, false);
    }

    /// Gives the phases of a step their part of `passed`; returns what is left of it.
    fn share_step(&mut self, passed: u64, metrics: &StepMetrics) -> u64 {
        let mut left = passed;
        let mut give = |ms: f32| {
            let given = whole(ms).min(left);
            left -= given;
            given
        };
        self.spent.train += give(metrics.compute_ms + metrics.update_ms);
        self.spent.communicate += give(metrics.reduce_ms);
        self.spent.load += give(metrics.load_ms);
        left
    }
}

/// The first `first` of `time`, and the rest.
fn split(time: u64, first: u64) -> (u64, u64) {
    let first = first.min(time);
    (first, time - first)
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a phase takes less")]
fn whole(ms: f32) -> u64 {
    ms.round().max(0.0) as u64
}

#[cfg(test)]
mod tests {
    use cluster::{Generation, Member, Step, Timestamp, WorkerId};

    use super::*;

    fn log(records: Vec<(u64, Record)>) -> Vec<Entry> {
        let entry = |(sequence, (at, record))| Entry { sequence, at: Timestamp(at), record };
        (1..).zip(records).map(entry).collect()
    }

    fn step(step: u64) -> Record {
        let metrics = StepMetrics {
            step_ms: 100.0,
            load_ms: 5.0,
            compute_ms: 70.0,
            reduce_ms: 15.0,
            update_ms: 5.0,
            ..StepMetrics::default()
        };
        Record::StepAdopted {
            step: Step(step),
            generation: Generation(1),
            metrics: Some(metrics),
            applied_at: None,
        }
    }

    #[test]
    fn every_millisecond_is_in_one_class() {
        let lost =
            Record::WorkerLost { worker: WorkerId(1), name: "a".to_owned(), cause: "c".to_owned() };
        let member = Member {
            worker: WorkerId(1),
            name: "a".to_owned(),
            address: String::new(),
            block: 0..1,
        };
        let opened = Record::GenerationOpened {
            generation: Generation(1),
            members: vec![member],
            planned: false,
            reason: "a test".to_owned(),
        };
        let stood_by =
            Record::WorkerLost { worker: WorkerId(2), name: "b".to_owned(), cause: "c".to_owned() };
        let entries = log(vec![
            (1000, Record::CheckpointCommitted { step: Step(0) }),
            (1000, opened),
            (3000, step(1)),
            (3100, step(2)),
            (3200, stood_by),
            (3350, lost),
            (4000, step(3)),
            (4010, Record::CheckpointCommitted { step: Step(3) }),
            (4150, step(4)),
            (4400, Record::RunFailed { reason: "a test".to_owned() }),
        ]);
        let found = Goodput::of(&entries);
        let expected = Goodput {
            train: 4 * 75,
            load: 4 * 5,
            communicate: 4 * 15,
            evaluate: 0,
            checkpoint: 55,
            detect: 250,
            recover: 900 - 95 - 250,
            idle: 2000 - 95 + 5 + 250,
        };
        assert_eq!(found, expected);
        assert_eq!(found.total(), 3400);
        for end in 0..entries.len() {
            let part = &entries[..end];
            let wall = part.last().map_or(0, |last| last.at.0 - 1000);
            assert_eq!(Goodput::of(part).total(), wall, "after {end} records");
        }
    }

    #[test]
    fn a_step_never_counts_for_more_than_the_time_that_passed() {
        let found = Goodput::of(&log(vec![(0, step(1)), (30, step(2))]));
        assert_eq!((found.train, found.total()), (30, 30));
    }
}
