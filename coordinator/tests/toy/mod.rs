//! The run that the tests of the coordinator share.

use std::{path::Path, time::Duration};

use cluster::{RunConfig, RunId, Step, Timeouts};
use coordinator::{Config, LogAt};

/// A run of four steps, whose checkpoints are in `checkpoints`.
pub(crate) fn config(log: LogAt, checkpoints: &Path) -> Config {
    Config {
        run: RunConfig {
            run: RunId::try_from("toy".to_owned()).unwrap(),
            virtual_ranks: 2,
            steps_total: Step(4),
            steps_per_epoch: 4,
            evaluate_every_epochs: 1,
            checkpoint_every_epochs: 1,
            checkpoint_every_steps: 0,
            checkpoint_every: Duration::ZERO,
            workers_expected: 1,
            workers_min: 1,
            workers_max: 2,
            timeouts: Timeouts::derived_from(Duration::from_secs(10)).unwrap(),
        },
        recipe: "seed = 1".to_owned(),
        token: "open sesame".to_owned(),
        log,
        checkpoints: checkpoints.display().to_string(),
        keep: checkpoint::Retention { newest: 2, every_steps: 0, best: true },
        software: "test".to_owned(),
    }
}
