//! What disturbed a run: a fold of its event log.
//!
//! An incident begins with the first record that tells of it and is over when the next step is adopted
//! from a generation that formed since. What it cost is the time between the step before it and that
//! one, less the time that a step takes.

use cluster::{Generation, Ledger, Record, Timestamp};
use coordinator::Entry;
use serde::Serialize;

/// Something that kept the run from its next step, or from a checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Incident {
    /// The first record that tells of it.
    pub(crate) sequence: u64,
    /// When that was written, in milliseconds since the Unix epoch.
    pub(crate) at_ms: u64,
    /// The newest step that had been adopted.
    pub(crate) step: u64,
    /// What happened, one clause a record.
    pub(crate) what: Vec<String>,
    /// Who said so first.
    pub(crate) noticed_by: String,
    /// From the first word of it to the next adopted step, in milliseconds; nothing while it lasts.
    pub(crate) recovery_ms: Option<u64>,
    /// Steps that were computed once more.
    pub(crate) repeated_steps: u64,
    /// What the run lost, in milliseconds; nothing while it lasts.
    pub(crate) cost_ms: Option<u64>,
}

#[derive(Debug, Default)]
struct Fold {
    ledger: Ledger,
    done: Vec<Incident>,
    open: Option<Open>,
    /// When the newest step was applied, and how long it took, in milliseconds.
    stepped: Option<(Timestamp, u64)>,
}

#[derive(Debug)]
struct Open {
    incident: Incident,
    /// The step that ends it is of this generation or a later one.
    over_from: Generation,
}

/// The incidents of a log, in their order; the last may still last.
pub(crate) fn of(entries: &[Entry]) -> Vec<Incident> {
    let mut fold = Fold::default();
    for entry in entries {
        fold.take(entry);
        fold.ledger.apply(&entry.record);
    }
    fold.done.extend(fold.open.map(|open| open.incident));
    fold.done
}

impl Fold {
    fn take(&mut self, entry: &Entry) {
        match &entry.record {
            Record::TermStarted { term } if term.0 > 1 => {
                let generation = self.ledger.generation;
                let what = format!("a new coordinator took the lead (term {term})");
                self.tell(entry, what, "the supervisor of the coordinator", generation);
            }
            Record::WorkerLost { name, cause, .. } => {
                if self.ledger.is_disturbed_by(&entry.record) {
                    let what = format!("{name} was lost: {cause}");
                    self.tell(entry, what, noticed_by(cause), self.ledger.generation.next());
                }
            }
            Record::ExchangeLost { worker, peer, reason, .. } => {
                let member = self.ledger.members.iter().find(|member| member.worker == *worker);
                let name = member.map_or_else(|| worker.to_string(), |member| member.name.clone());
                let peer = peer.as_deref().unwrap_or("a peer");
                let what = format!("{name} lost {peer}: {reason}");
                self.tell(entry, what, &name, self.ledger.generation.next());
            }
            Record::GenerationOpened { generation, planned: false, reason, .. } => {
                if let Some(open) = &mut self.open {
                    open.over_from = *generation;
                } else if generation.0 > 1 {
                    let what = format!("generation {generation} was opened: {reason}");
                    self.tell(entry, what, "the coordinator", *generation);
                }
            }
            Record::GenerationFormed { repeated, .. } => {
                if let Some(open) = &mut self.open {
                    open.incident.repeated_steps += repeated;
                }
            }
            Record::StepAdopted { generation, metrics, applied_at, .. } => {
                let at = applied_at.unwrap_or(entry.at);
                self.stepped(*generation, at, metrics.map(|metrics| metrics.step_ms));
            }
            Record::CheckpointAbandoned { step, reason } => {
                let what = format!("the checkpoint of step {step} was given up: {reason}");
                self.aside(entry, what, "the coordinator");
            }
            Record::WorkerRefused { name, reason, .. } => {
                self.aside(entry, format!("{name} was refused: {reason}"), "the coordinator");
            }
            Record::NodeMarked { node, name, reason } => {
                self.aside(entry, format!("machine {node} was marked as faulty: {reason}"), name);
            }
            Record::NodeReadmitted { node } => {
                self.aside(entry, format!("machine {node} was readmitted"), "an operator");
            }
            Record::RunFailed { reason } => {
                let over_from = self.ledger.generation.next();
                self.tell(entry, format!("the run failed: {reason}"), "the coordinator", over_from);
            }
            Record::TermStarted { .. }
            | Record::RunCreated { .. }
            | Record::FingerprintFixed { .. }
            | Record::WorkerJoined { .. }
            | Record::Resized { .. }
            | Record::GenerationOpened { .. }
            | Record::Evaluated { .. }
            | Record::CheckpointCommitted { .. }
            | Record::RunFinished { .. } => {}
        }
    }

    /// Adds to the incident that lasts, or begins one.
    fn tell(&mut self, entry: &Entry, what: String, by: &str, over_from: Generation) {
        if let Some(open) = &mut self.open {
            open.over_from = open.over_from.max(over_from);
            return open.incident.what.push(what);
        }
        let incident = self.incident(entry, what, by);
        self.open = Some(Open { incident, over_from });
    }

    /// Something that cost no step.
    fn aside(&mut self, entry: &Entry, what: String, by: &str) {
        if let Some(open) = &mut self.open {
            return open.incident.what.push(what);
        }
        let incident = self.incident(entry, what, by);
        self.done.push(Incident { recovery_ms: Some(0), cost_ms: Some(0), ..incident });
    }

    fn incident(&self, entry: &Entry, what: String, by: &str) -> Incident {
        Incident {
            sequence: entry.sequence,
            at_ms: entry.at.0,
            step: self.ledger.canonical.0,
            what: vec![what],
            noticed_by: by.to_owned(),
            recovery_ms: None,
            repeated_steps: 0,
            cost_ms: None,
        }
    }

    fn stepped(&mut self, generation: Generation, at: Timestamp, step_ms: Option<f32>) {
        let before = self.stepped;
        let usual = step_ms.map(whole_ms).or(before.map(|(_, usual)| usual)).unwrap_or(0);
        self.stepped = Some((at, usual));
        let Some(Open { mut incident, .. }) =
            self.open.take_if(|open| generation >= open.over_from && at.0 >= open.incident.at_ms)
        else {
            return;
        };
        let noticed = Timestamp(incident.at_ms);
        let (since, usual) = before.unwrap_or((noticed, usual));
        incident.recovery_ms = Some(at.0.saturating_sub(noticed.0));
        incident.cost_ms = Some(at.0.saturating_sub(since.0).saturating_sub(usual));
        self.done.push(incident);
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a step takes less")]
fn whole_ms(ms: f32) -> u64 {
    ms.round() as u64
}

/// Who noticed that a worker is gone, from the coordinator's words for it.
fn noticed_by(cause: &str) -> &'static str {
    if cause.starts_with("killed by") || cause.starts_with("its process ended") {
        "its supervisor"
    } else if cause.starts_with("it said nothing") {
        "its lease"
    } else if cause.starts_with("its peers") {
        "its peers"
    } else {
        "the coordinator"
    }
}

#[cfg(test)]
mod tests {
    use cluster::{Member, Step, StepMetrics, Term, WorkerId};

    use super::*;

    fn member(number: u64) -> Member {
        let name = format!("worker-{number}");
        Member { worker: WorkerId(number), name, address: String::new(), block: 0..1 }
    }

    fn opened(generation: u64, members: &[u64], planned: bool) -> Record {
        let members = members.iter().copied().map(member).collect();
        let reason = "a test".to_owned();
        Record::GenerationOpened { generation: Generation(generation), members, planned, reason }
    }

    fn formed(generation: u64, step: u64, repeated: u64) -> Record {
        Record::GenerationFormed {
            generation: Generation(generation),
            step: Step(step),
            digest: "d".to_owned(),
            repeated,
            stopped_at: None,
        }
    }

    fn stepped(step: u64, generation: u64) -> Record {
        let metrics = Some(StepMetrics { step_ms: 100.0, ..StepMetrics::default() });
        let generation = Generation(generation);
        Record::StepAdopted { step: Step(step), generation, metrics, applied_at: None }
    }

    fn lost(number: u64, cause: &str) -> Record {
        let Member { worker, name, .. } = member(number);
        Record::WorkerLost { worker, name, cause: cause.to_owned() }
    }

    fn log(records: Vec<(u64, Record)>) -> Vec<Entry> {
        let numbered = (1..).zip(records);
        numbered
            .map(|(sequence, (at, record))| Entry { sequence, at: Timestamp(at), record })
            .collect()
    }

    #[test]
    fn a_loss_is_over_with_the_first_step_of_the_generation_without_the_worker() {
        let found = of(&log(vec![
            (0, Record::TermStarted { term: Term(1) }),
            (0, opened(1, &[0, 1], false)),
            (10, formed(1, 0, 0)),
            (200, stepped(1, 1)),
            (250, lost(1, "killed by signal 9")),
            (251, opened(2, &[0], false)),
            (300, formed(2, 1, 1)),
            (450, stepped(2, 2)),
            (600, opened(3, &[0, 2], true)),
            (650, formed(3, 2, 0)),
            (700, stepped(3, 3)),
        ]));
        assert_eq!(found.len(), 1, "a planned change is none: {found:?}");
        let Incident { sequence, step, what, noticed_by, .. } = &found[0];
        assert_eq!((*sequence, *step, noticed_by.as_str()), (5, 1, "its supervisor"));
        assert_eq!(what[0], "worker-1 was lost: killed by signal 9");
        assert_eq!((found[0].recovery_ms, found[0].cost_ms), (Some(200), Some(150)));
        assert_eq!(found[0].repeated_steps, 1);
    }

    #[test]
    fn what_follows_from_each_other_is_one_incident_and_the_last_may_last() {
        let exchange = Record::ExchangeLost {
            worker: WorkerId(0),
            generation: Generation(1),
            peer: Some("worker-1".to_owned()),
            reason: "connection reset".to_owned(),
            stopped_at: Timestamp(240),
        };
        let found = of(&log(vec![
            (0, Record::TermStarted { term: Term(1) }),
            (0, opened(1, &[0, 1], false)),
            (10, formed(1, 0, 0)),
            (200, stepped(1, 1)),
            (240, exchange),
            (700, lost(1, "its peers lost it and its session is closed")),
            (701, opened(2, &[0], false)),
            (800, Record::TermStarted { term: Term(2) }),
        ]));
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0].what.len(), 3);
        assert_eq!(found[0].noticed_by, "worker-0");
        assert_eq!((found[0].recovery_ms, found[0].cost_ms), (None, None));
    }
}
