//! Learning rate and weight decay as pure functions of the step: linear warm-up, then half a cosine.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

/// The rates of a run. Defaults are the published recipe of `reg800m_perceiver_t128`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ScheduleConfig {
    /// Passes over the data. Default 300.
    pub epochs: u64,
    /// Learning rate at the end of the warm-up, for the whole global batch. Default 1e-3.
    pub lr: f64,
    /// Learning rate that the cosine approaches. Default 1e-6.
    pub min_lr: f64,
    /// Epochs of linear warm-up from 0. Default 20.
    pub warmup_epochs: u64,
    /// Steps of warm-up, instead of `warmup_epochs`. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warmup_steps: Option<u64>,
    /// Weight decay at the start. Default 0.05.
    pub weight_decay: f64,
    /// Weight decay that a cosine approaches. Default: as at the start.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight_decay_end: Option<f64>,
}

impl Default for ScheduleConfig {
    fn default() -> ScheduleConfig {
        ScheduleConfig {
            epochs: 300,
            lr: 1e-3,
            min_lr: 1e-6,
            warmup_epochs: 20,
            warmup_steps: None,
            weight_decay: 0.05,
            weight_decay_end: None,
        }
    }
}

/// Rates that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the schedule cannot be followed: {}", problems.join("; "))]
pub struct ScheduleError {
    /// All problems found, each naming its field.
    pub problems: Vec<String>,
}

/// The rates of every step of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    learning_rate: Cosine,
    weight_decay: Cosine,
}

impl Schedule {
    /// The schedule of a run with `steps_per_epoch` updates in an epoch.
    ///
    /// # Errors
    /// [`ScheduleError`] with all problems at once.
    pub fn new(config: &ScheduleConfig, steps_per_epoch: u64) -> Result<Schedule, ScheduleError> {
        let mut problems = Vec::new();
        let mut require = |holds: bool, problem: String| {
            if !holds {
                problems.push(problem);
            }
        };
        let steps = config.epochs.checked_mul(steps_per_epoch).filter(|steps| *steps < 1 << 53);
        require(
            steps.is_some_and(|steps| steps > 0),
            format!(
                "epochs = {} times {steps_per_epoch} steps an epoch is no number of steps",
                config.epochs
            ),
        );
        let rates = [("lr", config.lr), ("min_lr", config.min_lr)];
        let decay_end = config.weight_decay_end.unwrap_or(config.weight_decay);
        let decays = [("weight_decay", config.weight_decay), ("weight_decay_end", decay_end)];
        for (field, value) in rates.into_iter().chain(decays) {
            require(value.is_finite() && value >= 0.0, format!("{field} = {value} is no rate"));
        }
        // The reference stops at an assertion here: it then has one rate more than steps.
        require(
            config.warmup_steps.is_none_or(|steps| steps > 0 && config.warmup_epochs > 0),
            "warmup_steps replaces warmup_epochs and needs both above 0: leave warmup_steps out or \
             set warmup_epochs"
                .to_owned(),
        );
        let steps = steps.unwrap_or(0);
        let warmup = config
            .warmup_steps
            .unwrap_or_else(|| config.warmup_epochs.saturating_mul(steps_per_epoch));
        require(
            warmup <= steps,
            format!(
                "warm-up takes {warmup} steps, and the run has only {steps}: lower warmup_epochs or warmup_steps"
            ),
        );
        if !problems.is_empty() {
            return Err(ScheduleError { problems });
        }
        Ok(Schedule {
            learning_rate: Cosine { start: config.lr, end: config.min_lr, warmup, steps },
            weight_decay: Cosine { start: config.weight_decay, end: decay_end, warmup: 0, steps },
        })
    }

    /// Updates in the whole run.
    pub fn steps(&self) -> u64 {
        self.learning_rate.steps
    }

    /// The learning rate of a step, counted from 0. The first of a warm-up is 0.
    ///
    /// # Panics
    /// If the run has no such step.
    pub fn learning_rate(&self, step: u64) -> f64 {
        self.learning_rate.at(step)
    }

    /// The weight decay of a step, counted from 0.
    ///
    /// # Panics
    /// If the run has no such step.
    pub fn weight_decay(&self, step: u64) -> f64 {
        self.weight_decay.at(step)
    }
}

/// `warmup` values from 0 to `start`, both included, then half a cosine towards `end`, which it does not reach.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Cosine {
    start: f64,
    end: f64,
    warmup: u64,
    steps: u64,
}

impl Cosine {
    fn at(&self, step: u64) -> f64 {
        assert!(step < self.steps, "step {step} of a run of {} steps", self.steps);
        if step < self.warmup {
            return match (step, self.warmup - 1) {
                (0, _) => 0.0,
                (step, last) if step == last => self.start,
                (step, last) => step as f64 * (self.start / last as f64),
            };
        }
        let (done, length) = ((step - self.warmup) as f64, (self.steps - self.warmup) as f64);
        self.end + 0.5 * (self.start - self.end) * (1.0 + libm::cos(PI * done / length))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_climbs_from_zero_stays_once_and_never_reaches_its_end() {
        let config = ScheduleConfig { epochs: 3, warmup_epochs: 1, ..ScheduleConfig::default() };
        let schedule = Schedule::new(&config, 4).unwrap();
        let rates: Vec<f64> = (0..12).map(|step| schedule.learning_rate(step)).collect();
        assert_eq!(rates[0], 0.0);
        assert_eq!(rates[3], 1e-3);
        assert_eq!(rates[4], 1e-3);
        assert!(rates[4..].windows(2).all(|pair| pair[1] < pair[0]));
        assert!(rates[11] > 1e-6);
        assert_eq!(schedule.weight_decay(7), 0.05);
    }

    #[test]
    fn a_warm_up_of_one_step_is_a_rate_of_zero() {
        let config = ScheduleConfig { epochs: 2, warmup_epochs: 1, ..ScheduleConfig::default() };
        let schedule = Schedule::new(&config, 1).unwrap();
        assert_eq!([0, 1].map(|step| schedule.learning_rate(step)), [0.0, 1e-3]);
    }

    #[test]
    fn impossible_schedules_are_refused_with_all_their_problems() {
        let config = ScheduleConfig {
            epochs: 1,
            warmup_epochs: 0,
            warmup_steps: Some(9),
            lr: f64::NAN,
            ..ScheduleConfig::default()
        };
        let error = Schedule::new(&config, 4).unwrap_err();
        assert_eq!(error.problems.len(), 3, "{error}");
        assert!(error.to_string().contains("lr = NaN"));
        assert!(error.to_string().contains("set warmup_epochs"));
        assert!(error.to_string().contains("9 steps, and the run has only 4"));
        assert!(Schedule::new(&ScheduleConfig::default(), 0).is_err());
    }
}
