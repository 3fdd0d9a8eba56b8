//! Tries the audit on falsified copies of a run's records, in memory: what it proves is worth as much as what it
//! notices.

use anyhow::{Result, bail, ensure};
use cluster::{
    Record, RunConfig, Step, Timestamp,
    audit::{Samples, audit},
};

use super::Plan;

/// One record, with its place in the log and its time.
type Entry<'a> = (u64, Timestamp, &'a Record);

/// How many falsifications of each kind were noticed.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Noticed {
    pub(super) taken_away: usize,
    pub(super) doubled: usize,
    pub(super) changed: usize,
    pub(super) samples: usize,
}

/// A plan in which one step consumes a sample of its epoch that another has consumed already.
struct Swapped<'a> {
    plan: &'a Plan,
    at: Step,
    by: u64,
}

impl Samples for Swapped<'_> {
    fn count(&self) -> u64 {
        self.plan.count()
    }

    fn global_batch(&self) -> u64 {
        self.plan.global_batch()
    }

    fn steps_per_epoch(&self) -> u64 {
        self.plan.steps_per_epoch()
    }

    fn consumed_from(&self, step: Step, ids: &mut Vec<u64>) {
        self.plan.consumed_from(step, ids);
        if step == self.at
            && let Some(last) = ids.last_mut()
        {
            *last = self.by;
        }
    }
}

/// Falsifies the log at `places` of its records, spread evenly, in each way that there is.
///
/// # Errors
/// The first falsification that the audit does not notice, or places elsewhere.
pub(super) fn tamper(
    planned: &RunConfig,
    plan: &Plan,
    entries: &[Entry<'_>],
    places: usize,
) -> Result<Noticed> {
    let last = entries.len().saturating_sub(1);
    let stride = last.div_ceil(places.max(1)).max(1);
    let mut noticed = Noticed::default();
    for at in (0..last).step_by(stride) {
        let sequence = entries[at].0;
        let mut less = entries.to_vec();
        less.remove(at);
        expect(planned, plan, less, sequence, || format!("record {sequence} taken away"))?;
        noticed.taken_away += 1;
        let mut more = entries.to_vec();
        more.insert(at, entries[at]);
        expect(planned, plan, more, sequence + 1, || format!("record {sequence} doubled"))?;
        noticed.doubled += 1;
        let Some(false_record) = falsified(entries[at].2) else { continue };
        let mut other = entries.to_vec();
        other[at].2 = &false_record;
        expect(planned, plan, other, sequence, || format!("record {sequence} changed"))?;
        noticed.changed += 1;
        let Record::StepAdopted { step, .. } = entries[at].2 else { continue };
        if let Some(by) = consumed_earlier(plan, *step) {
            let data = Swapped { plan, at: Step(step.0 - 1), by };
            let what = || format!("a sample of step {step} exchanged for one used before");
            expect(planned, &data, entries.to_vec(), sequence, what)?;
            noticed.samples += 1;
        }
    }
    ensure!(noticed != Noticed::default(), "the log is too short: there is nothing to falsify");
    Ok(noticed)
}

fn expect(
    planned: &RunConfig,
    samples: &dyn Samples,
    entries: Vec<Entry<'_>>,
    sequence: u64,
    what: impl Fn() -> String,
) -> Result<()> {
    match audit(planned, samples, entries) {
        Err(found) if found.sequence == sequence => Ok(()),
        Err(found) => bail!("{}: the audit names another place: {found}", what()),
        Ok(_) => bail!("{}: the audit does not notice it", what()),
    }
}

/// The record with what the proof rests on changed; nothing for records that it does not rest on.
fn falsified(record: &Record) -> Option<Record> {
    let mut record = record.clone();
    match &mut record {
        Record::TermStarted { term } => *term = term.next(),
        Record::StepAdopted { step, .. } => *step = step.next(),
        Record::GenerationOpened { generation, .. } => *generation = generation.next(),
        Record::GenerationFormed { step, .. } => *step = Step(step.0 + 1_000_000),
        Record::RunCreated { .. }
        | Record::FingerprintFixed { .. }
        | Record::WorkerJoined { .. }
        | Record::WorkerRefused { .. }
        | Record::WorkerLost { .. }
        | Record::ExchangeLost { .. }
        | Record::NodeMarked { .. }
        | Record::NodeReadmitted { .. }
        | Record::Resized { .. }
        | Record::Evaluated { .. }
        | Record::CheckpointCommitted { .. }
        | Record::CheckpointAbandoned { .. }
        | Record::RunFinished { .. }
        | Record::RunFailed { .. } => return None,
    }
    Some(record)
}

/// A sample that the step before `step` consumed, if that belongs to the same epoch.
fn consumed_earlier(plan: &Plan, step: Step) -> Option<u64> {
    let from = step.0.checked_sub(2)?;
    if (step.0 - 1).is_multiple_of(plan.steps_per_epoch()) {
        return None;
    }
    let mut ids = Vec::new();
    plan.consumed_from(Step(from), &mut ids);
    ids.first().copied()
}
