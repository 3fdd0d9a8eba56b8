//! At the end of a run, its log alone must prove it.

use cluster::{
    Record, Step, Timestamp,
    audit::{Samples, audit},
};

use crate::{tamper::Tamper, world::World};

/// A sample a step; one is left out an epoch.
struct OneAStep(u64);

impl Samples for OneAStep {
    fn count(&self) -> u64 {
        self.0 + 1
    }

    fn global_batch(&self) -> u64 {
        1
    }

    fn steps_per_epoch(&self) -> u64 {
        self.0
    }

    fn consumed_from(&self, step: Step, ids: &mut Vec<u64>) {
        ids.push(step.0 % self.0);
    }
}

impl World {
    /// Audits the log of a run that is over.
    pub(crate) fn prove(&mut self) {
        if self.tamper == Tamper::EditsTheLog {
            let is_step = |record: &Record| matches!(record, Record::StepAdopted { .. });
            self.log.remove(self.log.iter().position(is_step).expect("the run has steps"));
        }
        let config = &self.plan.config;
        let numbered = (1..).zip(&self.log).map(|(place, record)| (place, Timestamp(0), record));
        let found = audit(config, &OneAStep(config.steps_per_epoch), numbered).err();
        self.watch.require("the_log_proves_the_run", found.is_none(), || format!("{found:?}"));
    }
}
