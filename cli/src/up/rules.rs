//! What the supervisor decides when a process has ended. Pure: time is an argument.

use std::{process::ExitStatus, time::Duration};

use std::os::unix::process::ExitStatusExt as _;

/// Workers that end one after another without a step of progress before the run is given up.
pub(crate) const FAILURES_MAX: u32 = 5;
/// A coordinator that ends sooner than this has failed to start.
const COORDINATOR_LIFE_MIN: Duration = Duration::from_secs(5);
const DELAY_FIRST: Duration = Duration::from_millis(200);
const DELAY_MAX: Duration = Duration::from_secs(5);

/// How a worker ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WorkerEnd {
    /// It finished, or was let go.
    Released,
    /// The coordinator did not want it.
    Refused,
    /// It failed or was killed.
    Failed,
    /// It was killed on request.
    Staged,
}

impl WorkerEnd {
    /// From what its process ended with, by the contract of `percheron-worker`.
    pub(crate) fn of(status: ExitStatus, staged: bool) -> Self {
        match (staged, status.code()) {
            (true, _) => Self::Staged,
            (false, Some(0)) => Self::Released,
            (false, Some(2)) => Self::Refused,
            (false, _) => Self::Failed,
        }
    }
}

/// When a worker is started in the place of one that ended, and when that makes no sense any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct WorkerRules {
    workers_min: usize,
    failures: u32,
    /// Workers that are about to be let go, as an operator asked for fewer.
    let_go: usize,
}

impl WorkerRules {
    pub(crate) fn new(workers_min: u32) -> Self {
        Self { workers_min: workers_min as usize, failures: 0, let_go: 0 }
    }

    /// The run has made progress, so what failed before is no pattern.
    pub(crate) fn step_adopted(&mut self) {
        self.failures = 0;
    }

    /// Whether to give up, now that a worker ended like this.
    pub(crate) fn worker_ended(&mut self, end: WorkerEnd) -> bool {
        match end {
            WorkerEnd::Staged => {}
            WorkerEnd::Released if self.let_go > 0 => self.let_go -= 1,
            WorkerEnd::Released | WorkerEnd::Refused | WorkerEnd::Failed => self.failures += 1,
        }
        self.failures >= FAILURES_MAX
    }

    /// How many workers to start now that an operator wants so many and `live` are there. If that is
    /// fewer, the others are about to end in order, and that is no failure.
    pub(crate) fn resized(&mut self, live: usize, workers: u32) -> usize {
        let workers = workers as usize;
        self.let_go = live.saturating_sub(workers);
        workers.saturating_sub(live)
    }

    /// How many workers to start when `live` are there: only with fewer than the recipe's minimum does
    /// the run stand still.
    pub(crate) fn missing(&self, live: usize) -> usize {
        self.workers_min.saturating_sub(live)
    }
}

/// When the coordinator is started again.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct CoordinatorRules {
    failures: u32,
}

impl CoordinatorRules {
    /// How long to wait before starting it again, now that it ended after it `lived`; nothing to give
    /// up. `staged`: it was killed on request.
    pub(crate) fn ended(&mut self, lived: Duration, staged: bool) -> Option<Duration> {
        if staged || lived >= COORDINATOR_LIFE_MIN {
            self.failures = 0;
            return Some(Duration::ZERO);
        }
        self.failures += 1;
        let doublings = self.failures.min(10) - 1;
        (self.failures < FAILURES_MAX).then(|| (DELAY_FIRST * 2_u32.pow(doublings)).min(DELAY_MAX))
    }
}

/// Exit code or signal, in words that follow "it was lost:".
pub(crate) fn in_words(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("its process ended with exit code {code}"),
        (None, Some(signal)) => format!("killed by signal {signal}"),
        (None, None) => "its process ended".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exit_code_says_how_a_worker_ended() {
        let exited = |code: i32| ExitStatus::from_raw(code << 8);
        assert_eq!(WorkerEnd::of(exited(0), false), WorkerEnd::Released);
        assert_eq!(WorkerEnd::of(exited(2), false), WorkerEnd::Refused);
        assert_eq!(WorkerEnd::of(exited(1), false), WorkerEnd::Failed);
        assert_eq!(WorkerEnd::of(ExitStatus::from_raw(9), false), WorkerEnd::Failed);
        assert_eq!(WorkerEnd::of(ExitStatus::from_raw(9), true), WorkerEnd::Staged);
        assert_eq!(in_words(ExitStatus::from_raw(9)), "killed by signal 9");
        assert_eq!(in_words(exited(1)), "its process ended with exit code 1");
    }

    #[test]
    fn a_worker_is_replaced_only_when_too_few_are_left() {
        let rules = WorkerRules::new(2);
        assert_eq!([3, 2, 1, 0].map(|live| rules.missing(live)), [0, 0, 1, 2]);
    }

    #[test]
    fn workers_that_an_operator_let_go_are_no_failures() {
        let mut rules = WorkerRules::new(1);
        assert_eq!(rules.resized(2, 8), 6);
        assert_eq!(rules.resized(8, 2), 0);
        assert!((0..6).all(|_| !rules.worker_ended(WorkerEnd::Released)));
        let ended: Vec<_> = (0..5).map(|_| rules.worker_ended(WorkerEnd::Released)).collect();
        assert_eq!(ended, [false, false, false, false, true], "more than that are failures again");
    }

    #[test]
    fn the_fifth_failure_without_a_step_ends_it() {
        let mut rules = WorkerRules::new(1);
        let mut ended = |end| rules.worker_ended(end);
        assert!(!ended(WorkerEnd::Failed) && !ended(WorkerEnd::Refused));
        assert!(!ended(WorkerEnd::Failed) && !ended(WorkerEnd::Failed));
        assert!(!ended(WorkerEnd::Staged), "what was asked for is no failure");
        let mut fresh = rules.clone();
        fresh.step_adopted();
        assert!(!fresh.worker_ended(WorkerEnd::Failed));
        assert!(rules.worker_ended(WorkerEnd::Failed));
    }

    #[test]
    fn a_coordinator_that_lived_is_started_at_once_and_one_that_fails_to_start_is_given_up() {
        let mut rules = CoordinatorRules::default();
        let (long, short) = (Duration::from_secs(60), Duration::from_millis(50));
        assert_eq!(rules.ended(long, false), Some(Duration::ZERO));
        assert_eq!(rules.ended(short, true), Some(Duration::ZERO));
        let delays: Vec<_> = (0..4).map(|_| rules.ended(short, false).unwrap()).collect();
        assert!(delays.is_sorted() && delays[0] == DELAY_FIRST, "{delays:?}");
        assert_eq!(rules.ended(short, false), None);
    }
}
