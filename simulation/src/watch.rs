//! What must hold after every call of the coordinator, by name.

use cluster::{Command, Coordinator, Generation, Ledger, Order, Record, Step, Timestamp};

use crate::scenario::Violation;

/// Violations that are kept: the first ones explain the rest.
const VIOLATIONS_MAX: usize = 10;

/// What the invariants need to remember.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    pub(crate) checks: u64,
    pub(crate) violations: Vec<Violation>,
    generation: Generation,
    canonical: Step,
    counted: Generation,
    formed: Option<(Generation, Step)>,
}

impl Watch {
    pub(crate) fn require(
        &mut self,
        now: Timestamp,
        invariant: &'static str,
        holds: bool,
        found: impl FnOnce() -> String,
    ) {
        self.checks += 1;
        if !holds && self.violations.len() < VIOLATIONS_MAX {
            let found = format!("at {} ms: {}", now.0, found());
            self.violations.push(Violation { invariant, found });
        }
    }

    /// Looks at what the coordinator asks for, in order.
    pub(crate) fn command(&mut self, now: Timestamp, command: &Command) {
        match command {
            Command::Append(record) => self.record(now, record),
            Command::Send { order: Order::Form(group), .. } => {
                let durable = self.generation;
                let holds = group.generation <= durable;
                let name = "a_generation_is_durable_before_it_is_announced";
                self.require(now, name, holds, || format!("{} after {durable}", group.generation));
            }
            Command::Send { .. } | Command::Close { .. } | Command::CommitCheckpoint { .. } => {}
        }
    }

    fn record(&mut self, now: Timestamp, record: &Record) {
        if let Record::GenerationOpened { generation, .. } = record {
            let before = std::mem::replace(&mut self.generation, *generation);
            self.require(now, "generations_only_grow", *generation == before.next(), || {
                format!("{generation} after {before}")
            });
        }
        if let Record::StepAdopted { step, generation, .. } = record {
            let before = std::mem::replace(&mut self.canonical, *step);
            self.require(now, "each_sample_is_seen_once", *step == before.next(), || {
                format!("step {step} after {before}")
            });
            let counted = std::mem::replace(&mut self.counted, *generation);
            self.require(now, "one_generation_counts", *generation >= counted, || {
                format!("a step of {generation} after one of {counted}")
            });
        }
        if let Record::RunFailed { reason } = record {
            self.require(now, "no_run_fails", false, || reason.clone());
        }
        if let Record::GenerationFormed { generation, step, .. } = record {
            let before = self.formed.replace((*generation, *step));
            let holds = before.is_none_or(|(g, s)| g < *generation && s <= *step);
            self.require(now, "no_applied_step_is_lost", holds, || {
                format!("generation {generation} resumes from {step} after {before:?}")
            });
        }
    }

    /// Looks at the coordinator after a deadline.
    pub(crate) fn deadline(&mut self, now: Timestamp, coordinator: &Coordinator) {
        let next = coordinator.next_deadline();
        let holds = next.is_none_or(|deadline| deadline > now);
        self.require(now, "a_deadline_lies_ahead", holds, || format!("{next:?}"));
    }

    /// Looks at a coordinator that starts from the log.
    pub(crate) fn restored(&mut self, now: Timestamp, ledger: &Ledger) {
        let (found, committed) = (ledger.canonical, self.canonical);
        self.require(now, "no_committed_step_is_lost", found == committed, || {
            format!("it starts from step {found}, {committed} was committed")
        });
        let generation = self.generation;
        self.require(
            now,
            "the_ledger_is_the_fold_of_the_log",
            ledger.generation == generation,
            || format!("it starts with generation {}, {generation} was opened", ledger.generation),
        );
    }

    /// The members of a generation have agreed on a state.
    pub(crate) fn formation(&mut self, now: Timestamp, held: Option<Step>, resumed: Step) {
        self.require(now, "the_highest_step_wins", held <= Some(resumed), || {
            format!("a member holds {held:?}, the generation resumes from {resumed}")
        });
    }

    /// Training has stood still for so long.
    pub(crate) fn standstill(&mut self, now: Timestamp, is_too_long: bool, phase: &str) {
        self.require(now, "training_goes_on_after_every_fault", !is_too_long, || phase.to_owned());
    }
}
