//! What the training thread does at the moment: for heartbeats, and for the figures of a step.

use std::{
    sync::{Mutex, MutexGuard},
    time::{Duration, Instant},
};

use cluster::{Step, StepPhase};

/// Shared by the training thread, which writes it, and the agent, which reads it.
#[derive(Debug)]
pub struct Progress(Mutex<Inner>);

#[derive(Debug)]
struct Inner {
    applied: Option<Step>,
    phase: StepPhase,
    since: Instant,
    spent: Spent,
}

/// Time spent in the phases of a step.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Spent {
    /// Waiting for images.
    pub load: Duration,
    /// Forward and backward.
    pub compute: Duration,
    /// The sum over the virtual ranks.
    pub reduce: Duration,
    /// The optimizer update.
    pub update: Duration,
}

impl Default for Progress {
    fn default() -> Self {
        let idle = StepPhase::Idle;
        Self(Mutex::new(Inner {
            applied: None,
            phase: idle,
            since: Instant::now(),
            spent: Spent::default(),
        }))
    }
}

impl Progress {
    /// The training thread turns to something else.
    pub fn enter(&self, phase: StepPhase) {
        let mut inner = self.inner();
        let now = Instant::now();
        let elapsed = now - inner.since;
        match inner.phase {
            StepPhase::Load => inner.spent.load += elapsed,
            StepPhase::Compute => inner.spent.compute += elapsed,
            StepPhase::Reduce => inner.spent.reduce += elapsed,
            StepPhase::Update => inner.spent.update += elapsed,
            StepPhase::Idle | StepPhase::Form | StepPhase::Evaluate | StepPhase::Checkpoint => {}
        }
        inner.phase = phase;
        inner.since = now;
    }

    /// The state is now that after `step`; none: there is no usable one.
    pub fn set_applied(&self, step: Option<Step>) {
        self.inner().applied = step;
    }

    /// The step of the state, the phase, and for how long it has lasted.
    pub fn now(&self) -> (Option<Step>, StepPhase, Duration) {
        let inner = self.inner();
        (inner.applied, inner.phase, inner.since.elapsed())
    }

    /// The time spent in each phase since the last call. The phase that is going on is not counted.
    pub fn take_spent(&self) -> Spent {
        std::mem::take(&mut self.inner().spent)
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().expect("nothing panics under this lock")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_phases_of_a_step_are_counted_and_only_once() {
        let progress = Progress::default();
        progress.enter(StepPhase::Compute);
        progress.enter(StepPhase::Form);
        let spent = progress.take_spent();
        assert!(spent.compute > Duration::ZERO);
        assert_eq!(Spent { compute: Duration::ZERO, ..spent }, Spent::default());
        progress.enter(StepPhase::Idle);
        assert_eq!(progress.take_spent(), Spent::default());
        assert_eq!(progress.now().1, StepPhase::Idle);
    }
}
