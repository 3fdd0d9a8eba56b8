//! What is asked of a simulation, and what comes out.

use std::time::Duration;

use cluster::{InvalidConfig, RunConfig, RunId, Step, Timeouts};

use crate::world::World;

/// Virtual ranks of a worker when all are there, so that a missing one costs a fraction.
pub(crate) const RANKS_PER_WORKER: u32 = 4;
/// More workers than a generation's numbers are made for.
const WORKERS_MAX: u32 = 65_536;

/// A cluster and what befalls it.
#[derive(Debug, Clone, PartialEq)]
pub struct Scenario {
    /// Workers at the start; a lost one is replaced.
    pub workers: u32,
    /// How long it is watched.
    pub lasts: Duration,
    /// What happens is a function of this number.
    pub seed: u64,
    /// Mean time between two faults of one worker.
    pub mtbf: Duration,
    /// From the loss of a worker until its replacement is ready.
    pub repair: Duration,
    /// A step with all workers.
    pub step: Duration,
    /// Forming a generation: connections, and the state for those who lack it.
    pub form: Duration,
    /// Steps between two checkpoints.
    pub checkpoint_every: u64,
    /// The knob from which all waits follow.
    pub max_recovery: Duration,
}

/// What became of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Forecast {
    /// Time in steps that count, by wall time.
    pub goodput: f64,
    /// Steps done, by those of a run without faults.
    pub throughput_ratio: f64,
    /// Faults that struck.
    pub faults: u64,
    /// How often an invariant was looked at.
    pub invariants_checked: u64,
    /// Invariants that broke.
    pub violations: Vec<Violation>,
    /// Generations opened.
    pub generations: u64,
    /// Steps done.
    pub steps: u64,
    /// Steps computed more than once.
    pub repeated_steps: u64,
    /// From a loss until the next step began, at the median and at worst.
    pub recovery: Option<(Duration, Duration)>,
    /// Events played.
    pub events: u64,
}

/// An invariant that broke.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Its name.
    pub invariant: &'static str,
    /// What was found, and when.
    pub found: String,
}

/// A scenario that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Impossible {
    /// A number is out of range.
    #[error("{name} must be {limits}")]
    OutOfRange {
        /// Its name.
        name: &'static str,
        /// What it may be.
        limits: &'static str,
    },
    /// The rules cannot plan such a run.
    #[error(transparent)]
    Config(#[from] InvalidConfig),
}

/// Plays a scenario to its end.
///
/// # Errors
/// [`Impossible`] if a number makes no sense. That an invariant breaks is part of the forecast.
pub fn predict(scenario: &Scenario) -> Result<Forecast, Impossible> {
    Ok(World::new(scenario.clone(), scenario.config()?).run())
}

impl Scenario {
    fn config(&self) -> Result<RunConfig, Impossible> {
        let positive = |name, holds: bool| {
            let limits = "above 0";
            if holds { Ok(()) } else { Err(Impossible::OutOfRange { name, limits }) }
        };
        if !(1..=WORKERS_MAX).contains(&self.workers) {
            let limits = "between 1 and 65536";
            return Err(Impossible::OutOfRange { name: "the number of workers", limits });
        }
        positive("the time watched", !self.lasts.is_zero())?;
        positive("the time between faults", !self.mtbf.is_zero())?;
        positive("the steps between checkpoints", self.checkpoint_every > 0)?;
        if self.step < Duration::from_millis(RANKS_PER_WORKER.into()) {
            let limits = "at least 4 ms";
            return Err(Impossible::OutOfRange { name: "the time of a step", limits });
        }
        let virtual_ranks = self.workers * RANKS_PER_WORKER;
        let config = RunConfig {
            run: RunId::try_from("simulated".to_owned()).expect("the name is plain"),
            virtual_ranks,
            steps_total: Step(u64::MAX / 2), // It is watched, not finished.
            steps_per_epoch: u64::MAX / 4,
            evaluate_every_epochs: 0,
            checkpoint_every_epochs: 0,
            checkpoint_every_steps: self.checkpoint_every,
            checkpoint_every: Duration::ZERO,
            workers_expected: self.workers,
            workers_min: 1,
            workers_max: self.workers,
            timeouts: Timeouts::derived_from(self.max_recovery)?,
        };
        Ok(config.validated()?)
    }
}
