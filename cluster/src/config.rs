//! What the rules know of a run: limits that were validated once and never change while it lasts.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{RunId, Step};

/// The plan of a run as the rules see it. The recipe says the rest, and the rules never read it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunConfig {
    /// Name of the run.
    pub run: RunId,
    /// `V`: places that the global batch is split into.
    pub virtual_ranks: u32,
    /// The run is done after this many optimizer updates.
    pub steps_total: Step,
    /// Optimizer updates a pass over the data.
    pub steps_per_epoch: u64,
    /// Evaluate after every so many epochs; always at the end.
    pub evaluate_every_epochs: u64,
    /// Checkpoint after every so many epochs; always at the end.
    pub checkpoint_every_epochs: u64,
    /// Checkpoint after every so many steps as well; 0 for never.
    pub checkpoint_every_steps: u64,
    /// Checkpoint when none has been kept for so long as well; 0 for never.
    #[serde(default)]
    pub checkpoint_every: Duration,
    /// The first generation waits for so many workers, as long as `timeouts.gather` allows.
    pub workers_expected: u32,
    /// No generation is formed with fewer workers.
    pub workers_min: u32,
    /// Spare workers beyond so many stand by.
    pub workers_max: u32,
    /// All waits, derived from one knob.
    pub timeouts: Timeouts,
}

/// A run that cannot be planned: each problem is one sentence that names the field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", problems.join("\n"))]
pub struct InvalidConfig {
    /// What is wrong, all of it at once.
    pub problems: Vec<String>,
}

impl RunConfig {
    /// Checks that the numbers fit together.
    ///
    /// # Errors
    /// [`InvalidConfig`] with every problem found.
    pub fn validated(self) -> Result<Self, InvalidConfig> {
        let mut problems = Vec::new();
        let mut require = |holds: bool, problem: String| {
            if !holds {
                problems.push(problem);
            }
        };
        require(
            self.virtual_ranks >= 1,
            "virtual_ranks = 0: take at least 1 (the usual recipe has 8)".to_owned(),
        );
        require(
            self.workers_expected <= self.virtual_ranks,
            format!(
                "workers = {} is more than virtual_ranks = {}: a worker needs at least one virtual \
                 rank; start at most {} workers or set virtual_ranks higher in a new run",
                self.workers_expected, self.virtual_ranks, self.virtual_ranks
            ),
        );
        require(
            self.workers_min >= 1 && self.workers_min <= self.workers_expected,
            format!(
                "workers_min = {} must lie between 1 and workers = {}",
                self.workers_min, self.workers_expected
            ),
        );
        require(
            self.workers_max >= self.workers_expected,
            format!(
                "workers_max = {} is below workers = {}",
                self.workers_max, self.workers_expected
            ),
        );
        require(
            self.steps_per_epoch >= 1,
            "an epoch has no step: the training split is smaller than virtual_ranks x update_freq x \
             batch_size; set one of them lower"
                .to_owned(),
        );
        require(
            self.steps_total.0 >= 1,
            "the run has no step: set epochs or max_steps to at least 1".to_owned(),
        );
        if let Err(InvalidConfig { problems: of_waits }) = self.timeouts.validated() {
            problems.extend(of_waits);
        }
        if problems.is_empty() { Ok(self) } else { Err(InvalidConfig { problems }) }
    }

    /// Whether the state after `step` is evaluated.
    #[must_use]
    pub fn evaluates_at(&self, step: Step) -> bool {
        step == self.steps_total || self.ends_epochs(step, self.evaluate_every_epochs)
    }

    /// Whether the state after `step` is to be kept.
    #[must_use]
    pub fn checkpoints_at(&self, step: Step) -> bool {
        step == self.steps_total
            || self.ends_epochs(step, self.checkpoint_every_epochs)
            || (self.checkpoint_every_steps > 0
                && step.0 > 0
                && step.0.is_multiple_of(self.checkpoint_every_steps))
    }

    /// The first step from `from` on whose state is to be kept, if the run has one.
    #[must_use]
    pub fn next_checkpoint(&self, from: Step) -> Option<Step> {
        (from.0..=self.steps_total.0).map(Step).find(|&step| self.checkpoints_at(step))
    }

    /// How many workers of `available` a generation takes, if an operator wants so many.
    #[must_use]
    pub fn workers_taken(&self, available: usize, wanted: Option<u32>) -> usize {
        let most = wanted.unwrap_or(self.workers_max).min(self.virtual_ranks);
        available.min(most as usize)
    }

    /// Whether the run may be resized to so many workers.
    ///
    /// # Errors
    /// [`InvalidConfig`] with the limits.
    pub fn check_resize(&self, workers: u32) -> Result<(), InvalidConfig> {
        let (least, most) = (self.workers_min, self.virtual_ranks);
        if (least..=most).contains(&workers) {
            return Ok(());
        }
        let problem = format!(
            "{workers} workers cannot be: take {least} (workers_min) to {most} (virtual_ranks)"
        );
        Err(InvalidConfig { problems: vec![problem] })
    }

    fn ends_epochs(&self, step: Step, every: u64) -> bool {
        every > 0 && step.0 > 0 && step.0.is_multiple_of(self.steps_per_epoch * every)
    }
}

/// Every wait of the system, derived from `max_recovery` so that they keep their order:
/// `heartbeat < suspicion < lease < form <= max_recovery`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timeouts {
    /// The knob: how long the loss of a worker may keep the others from training.
    pub max_recovery: Duration,
    /// A worker speaks at least so often.
    pub heartbeat: Duration,
    /// After a broken exchange with no culprit in sight, how long evidence is awaited.
    pub suspicion: Duration,
    /// A member that is silent for so long is lost.
    pub lease: Duration,
    /// Members that have not formed the new generation by then are lost.
    pub form: Duration,
    /// How long the first generation waits for all expected workers.
    pub gather: Duration,
}

/// One of the [`Timeouts`], for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wait {
    /// What it is called.
    pub name: &'static str,
    /// How long it is.
    pub lasts: Duration,
    /// What happens when it is over.
    pub purpose: &'static str,
}

impl Timeouts {
    /// Smallest `max_recovery` that leaves the shorter waits meaningful.
    pub const MAX_RECOVERY_MIN: Duration = Duration::from_secs(2);

    /// Derives all waits.
    ///
    /// # Errors
    /// [`InvalidConfig`] if `max_recovery` is below [`Timeouts::MAX_RECOVERY_MIN`].
    pub fn derived_from(max_recovery: Duration) -> Result<Self, InvalidConfig> {
        if max_recovery < Self::MAX_RECOVERY_MIN {
            return Err(InvalidConfig {
                problems: vec![format!(
                    "max_recovery = {max_recovery:?} is too short: take at least {:?}",
                    Self::MAX_RECOVERY_MIN
                )],
            });
        }
        Ok(Self {
            max_recovery,
            heartbeat: max_recovery / 40,
            suspicion: max_recovery / 20,
            lease: max_recovery / 5,
            form: max_recovery / 2,
            gather: (max_recovery * 6).max(Duration::from_secs(30)),
        })
    }

    /// Checks that the waits are in the order in which they have to run out.
    ///
    /// # Errors
    /// [`InvalidConfig`] with every pair that is not.
    pub fn validated(self) -> Result<Self, InvalidConfig> {
        let waits = self.explained();
        let pairs = waits.iter().zip(waits.iter().skip(1));
        let problems = pairs.filter(|(shorter, longer)| shorter.lasts > longer.lasts).map(
            |(shorter, longer)| {
                format!(
                    "{} = {:?} must not be longer than {} = {:?}: derive all waits from max_recovery",
                    shorter.name, shorter.lasts, longer.name, longer.lasts
                )
            },
        );
        let problems: Vec<_> = problems.collect();
        if problems.is_empty() { Ok(self) } else { Err(InvalidConfig { problems }) }
    }

    /// All waits, shortest first, and what each is for.
    #[must_use]
    pub fn explained(&self) -> [Wait; 9] {
        let wait = |name, lasts, purpose| Wait { name, lasts, purpose };
        [
            wait("heartbeat", self.heartbeat, "a worker speaks at least so often"),
            wait(
                "suspicion",
                self.suspicion,
                "a broken exchange without a culprit: evidence is awaited for so long",
            ),
            wait("lease", self.lease, "a member that is silent for so long is lost"),
            wait("form", self.form, "members that have not formed a generation by then are lost"),
            wait(
                "progress",
                self.progress(),
                "a member that keeps the others waiting in a phase for so long, and three times its \
                 usual time, is lost",
            ),
            wait(
                "max_recovery",
                self.max_recovery,
                "the knob: how long a loss may keep the others from training",
            ),
            wait("gather", self.gather, "the first generation waits for all workers for so long"),
            wait(
                "first_step",
                self.first_step(),
                "as progress, in the first step of a worker's life",
            ),
            wait(
                "first_evaluation",
                self.first_evaluation(),
                "as progress, in the first evaluation of the run",
            ),
        ]
    }

    /// A member that keeps the others waiting in one phase for so long is stuck, unless the phase is
    /// known to take longer.
    #[must_use]
    pub fn progress(&self) -> Duration {
        self.form
    }

    /// The same while nobody knows how long a phase takes, and in the first step of a worker's life.
    #[must_use]
    pub fn first_step(&self) -> Duration {
        self.gather
    }

    /// The same for the first evaluation: it goes over a whole split.
    #[must_use]
    pub fn first_evaluation(&self) -> Duration {
        self.gather * 10
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn config(workers: u32) -> RunConfig {
        RunConfig {
            run: RunId::try_from("toy".to_owned()).unwrap(),
            virtual_ranks: 8,
            steps_total: Step(100),
            steps_per_epoch: 20,
            evaluate_every_epochs: 1,
            checkpoint_every_epochs: 2,
            checkpoint_every_steps: 0,
            checkpoint_every: Duration::ZERO,
            workers_expected: workers,
            workers_min: 1,
            workers_max: 8,
            timeouts: Timeouts::derived_from(Duration::from_secs(10)).unwrap(),
        }
    }

    #[test]
    fn all_problems_are_reported_at_once() {
        let wrong = RunConfig { workers_min: 0, steps_total: Step(0), ..config(9) };
        let problems = wrong.validated().unwrap_err().problems;
        assert_eq!(problems.len(), 4, "{problems:#?}");
        assert!(problems[0].contains("workers = 9 is more than virtual_ranks = 8"));
    }

    #[test]
    fn waits_keep_their_order() {
        for seconds in [2, 10, 60, 3600] {
            let t = Timeouts::derived_from(Duration::from_secs(seconds)).unwrap();
            assert!(t.heartbeat < t.suspicion && t.suspicion < t.lease && t.lease < t.form);
            assert!(t.form <= t.progress() && t.progress() <= t.max_recovery);
            assert!(t.max_recovery < t.first_step() && t.first_step() < t.first_evaluation());
            assert_eq!(t.validated(), Ok(t));
        }
        assert!(Timeouts::derived_from(Duration::from_secs(1)).is_err());
    }

    #[test]
    fn waits_out_of_order_are_named_at_start() {
        let timeouts = Timeouts::derived_from(Duration::from_secs(10)).unwrap();
        let timeouts = Timeouts { lease: Duration::from_secs(7), ..timeouts };
        let problems = RunConfig { timeouts, ..config(1) }.validated().unwrap_err().problems;
        assert_eq!(
            problems,
            ["lease = 7s must not be longer than form = 5s: derive all waits from max_recovery"]
        );
    }

    #[test]
    fn checkpoints_fall_on_epoch_ends_and_on_the_last_step() {
        let config = RunConfig { steps_total: Step(95), ..config(1) };
        let kept: Vec<_> = (0..=95).filter(|&s| config.checkpoints_at(Step(s))).collect();
        assert_eq!(kept, [40, 80, 95]);
        assert_eq!(config.next_checkpoint(Step(41)), Some(Step(80)));
        assert_eq!(config.next_checkpoint(Step(96)), None);
    }
}
