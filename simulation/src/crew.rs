//! The workers: who forms a generation, how far the one that trains is, and what each would say.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use cluster::{Group, Participant, Progress, Step, StepPhase, Timestamp, WorkerId};

use crate::scenario::RANKS_PER_WORKER;

/// One life of a worker's process.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) participant: Participant,
    pub(crate) applied: Option<Step>,
    pub(crate) doing: Doing,
    /// Its trainer does nothing any more, since then; its process goes on beating.
    pub(crate) hangs: Option<Timestamp>,
}

/// What a trainer does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Doing {
    Nothing { since: Timestamp },
    Forming { since: Timestamp },
    Training,
}

/// A generation whose members train, or stand still because one is gone.
#[derive(Debug)]
pub(crate) struct Training {
    pub(crate) group: Group,
    pub(crate) since: Timestamp,
    pub(crate) base: Step,
    pub(crate) step: Duration,
    /// Since when no step can end.
    pub(crate) stalled: Option<Timestamp>,
    pub(crate) leave_asked: bool,
}

/// A generation whose members come together.
#[derive(Debug)]
pub(crate) struct Forming {
    pub(crate) group: Group,
    pub(crate) arrived: BTreeSet<WorkerId>,
}

#[derive(Debug, Default)]
pub(crate) struct Crew {
    pub(crate) workers: BTreeMap<WorkerId, Worker>,
    pub(crate) training: Option<Training>,
    pub(crate) forming: Option<Forming>,
}

impl Training {
    /// The step reached at a moment.
    pub(crate) fn reached(&self, now: Timestamp) -> Step {
        let end = self.stalled.map_or(now, |stalled| stalled.min(now));
        let steps = end.since(self.since).as_millis() / self.step.as_millis();
        Step(self.base.0 + u64::try_from(steps).expect("a run of less than ages"))
    }

    /// When a step is done, if nothing happens.
    pub(crate) fn ends(&self, step: Step) -> Timestamp {
        let steps = u32::try_from(step.0.saturating_sub(self.base.0)).unwrap_or(u32::MAX);
        self.since + self.step * steps
    }
}

/// The time of a step: as long as the worker with most virtual ranks takes.
pub(crate) fn step_time(full: Duration, workers: u32, members: usize) -> Duration {
    let members = u32::try_from(members).expect("a group is not that large");
    let most = (workers * RANKS_PER_WORKER).div_ceil(members);
    full * most / RANKS_PER_WORKER
}

impl Crew {
    /// No step of the generation that trains can end from now on.
    pub(crate) fn stall(&mut self, now: Timestamp) {
        if let Some(training) = &mut self.training {
            training.stalled.get_or_insert(now);
        }
    }

    pub(crate) fn trains(&self, worker: WorkerId) -> bool {
        self.training.as_ref().is_some_and(|training| training.group.rank_of(worker).is_some())
    }

    /// All members hold the step reached.
    pub(crate) fn settle(&mut self, now: Timestamp) -> Option<Step> {
        let training = self.training.as_ref()?;
        let reached = training.reached(now);
        for member in training.group.members.iter() {
            if let Some(worker) = self.workers.get_mut(&member.worker)
                && worker.doing == Doing::Training
            {
                worker.applied = Some(reached);
            }
        }
        Some(reached)
    }

    /// What a worker's heartbeat says.
    pub(crate) fn progress(&self, worker: &Worker, now: Timestamp) -> Progress {
        let training = self.training.as_ref();
        let stalled = training.and_then(|training| training.stalled);
        let (phase, since) = match (worker.hangs, worker.doing, stalled) {
            (Some(since), _, _) => (StepPhase::Compute, since),
            (None, Doing::Nothing { since }, _) => (StepPhase::Idle, since),
            (None, Doing::Forming { since }, _) => (StepPhase::Form, since),
            (None, Doing::Training, Some(since)) => (StepPhase::Reduce, since),
            (None, Doing::Training, None) => {
                let done = training.map(|training| training.ends(training.reached(now)));
                (StepPhase::Compute, done.unwrap_or(now))
            }
        };
        Progress {
            generation: worker.participant.generation().unwrap_or_default(),
            applied: worker.applied,
            phase,
            in_phase: now.since(since),
            resident_bytes: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_takes_as_long_as_its_most_loaded_worker() {
        let full = Duration::from_millis(1_000);
        assert_eq!(step_time(full, 8, 8), full);
        assert_eq!(step_time(full, 8, 7), Duration::from_millis(1_250));
        assert_eq!(step_time(full, 8, 4), Duration::from_millis(2_000));
    }
}
