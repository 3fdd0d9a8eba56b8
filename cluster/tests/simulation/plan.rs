//! What a seed makes of a run: its size, its speed, and what will go wrong.

use std::time::Duration;

use cluster::{RunConfig, RunId, Step, Timeouts};

use crate::chance::Chance;

/// Something that the world does to the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Fault {
    /// A worker's process dies; its supervisor or its peers may or may not notice.
    Crash,
    /// A worker is stopped for a while, as by SIGSTOP.
    Freeze,
    /// A session breaks; what was in flight is lost.
    CutSession,
    /// For a while nothing passes in one direction of a session; then all of it, or the session breaks.
    OneWay,
    /// A report reaches the coordinator a second time, later.
    Duplicate,
    /// A trainer hangs for ever while its process goes on beating.
    Hang,
    /// A worker takes twice as long as the others for a while.
    Slow,
    /// All workers take twice as long for a while.
    Overload,
    /// A worker cannot read the checkpoint that a generation is to start from.
    LoadError,
    /// The log cannot be written: the coordinator ends before anything of a batch has taken effect.
    LogError,
    /// The connections between the members of a generation break.
    Glitch,
    /// The upload of a share or the commit of a manifest fails.
    StoreError,
    /// The coordinator dies between two commands and is started again from its log.
    CoordinatorCrash,
    /// The coordinator is stopped for a while.
    CoordinatorSleep,
    /// A worker arrives.
    Join,
    /// An operator drains a worker.
    Drain,
    /// A worker is told to stop.
    Stop,
    /// An operator wants another number of workers.
    Resize,
}

/// The faults after which nothing may be lost or computed twice.
const GENTLE: [Fault; 4] = [Fault::Join, Fault::Drain, Fault::Stop, Fault::Resize];

/// The faults after which nobody who lives may be taken for dead.
const CALM: [Fault; 12] = [
    Fault::Resize,
    Fault::Join,
    Fault::Drain,
    Fault::Stop,
    Fault::StoreError,
    Fault::CoordinatorCrash,
    Fault::CoordinatorSleep,
    Fault::Duplicate,
    Fault::Slow,
    Fault::Overload,
    Fault::LoadError,
    Fault::LogError,
];

const ALL: [Fault; 18] = [
    Fault::Resize,
    Fault::Crash,
    Fault::Freeze,
    Fault::CutSession,
    Fault::Glitch,
    Fault::StoreError,
    Fault::CoordinatorCrash,
    Fault::CoordinatorSleep,
    Fault::Join,
    Fault::Drain,
    Fault::Stop,
    Fault::OneWay,
    Fault::Duplicate,
    Fault::Hang,
    Fault::Slow,
    Fault::Overload,
    Fault::LoadError,
    Fault::LogError,
];

#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) config: RunConfig,
    /// Workers at the start.
    pub(crate) workers: u64,
    /// Mean time of a step, in milliseconds.
    pub(crate) step_ms: u64,
    /// Longest usual delay of a message, in milliseconds.
    pub(crate) delay_ms: u64,
    /// When faults stop, in milliseconds.
    pub(crate) quiet_ms: u64,
    /// Mean time between two faults, in milliseconds.
    pub(crate) fault_every_ms: u64,
    /// Which of them happen at all.
    pub(crate) faults: Vec<Fault>,
}

impl Plan {
    pub(crate) fn drawn(chance: &mut Chance) -> Self {
        let virtual_ranks = chance.between(3..=8);
        let expected = chance.between(1..=virtual_ranks.min(5));
        let step_ms = chance.between(20..=400);
        let steps_per_epoch = chance.between(4..=12);
        let narrow = |n: u64| u32::try_from(n).expect("it is small");
        let max_recovery = Duration::from_secs(chance.pick(&[2, 5, 10]).expect("there are three"));
        let config = RunConfig {
            run: RunId::try_from("simulated".to_owned()).expect("the name is plain"),
            virtual_ranks: narrow(virtual_ranks),
            steps_total: Step(chance.between(8..=60)),
            steps_per_epoch,
            evaluate_every_epochs: 1,
            checkpoint_every_epochs: chance.between(1..=2),
            checkpoint_every_steps: chance.pick(&[0, 3, 7]).expect("there are three"),
            checkpoint_every: Duration::from_secs(chance.pick(&[0, 0, 5]).expect("as above")),
            workers_expected: narrow(expected),
            workers_min: narrow(chance.between(1..=expected.min(2))),
            workers_max: narrow(chance.between(expected..=virtual_ranks)),
            timeouts: Timeouts::derived_from(max_recovery).expect("it is long enough"),
        };
        let kinds = match chance.between(0..=9) {
            0 => &GENTLE[..],
            1 => &CALM[..],
            _ => &ALL[..],
        };
        let faults = kinds.iter().copied().filter(|_| chance.percent(50)).collect();
        let workers = expected + chance.between(0..=1);
        let fault_every_ms = chance.between(150..=3_000);
        let quiet_ms = chance.between(5_000..=30_000);
        let delay_ms = chance.between(1..=20);
        let config = config.validated().expect("the plan fits together");
        Self { config, workers, step_ms, delay_ms, quiet_ms, fault_every_ms, faults }
    }

    pub(crate) fn is_gentle(&self) -> bool {
        self.faults.iter().all(|fault| GENTLE.contains(fault))
    }

    pub(crate) fn is_calm(&self) -> bool {
        self.faults.iter().all(|fault| CALM.contains(fault))
    }

    pub(crate) fn has(&self, fault: Fault) -> bool {
        self.faults.contains(&fault)
    }
}
