//! Disturbances on request: `--chaos kill@60,join@90`.

use std::str::FromStr;

use cluster::Step;

/// What is done to the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Deed {
    /// A worker is killed.
    Kill,
    /// A worker is started.
    Join,
    /// A worker is stopped as if its machine hung.
    Stop,
    /// The coordinator is killed.
    KillCoordinator,
}

/// A deed, and the step from whose adoption on it is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Disturbance {
    /// What.
    pub(crate) deed: Deed,
    /// When.
    pub(crate) step: Step,
}

/// All that is still to be done, the earliest first.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Chaos {
    pending: Vec<Disturbance>,
}

const FORMS: &str = "the valid forms are kill@STEP, join@STEP, stop@STEP and \
                     coordinator-kill@STEP, separated by commas, such as kill@60,join@90";

/// A `--chaos` that means nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum InvalidChaos {
    #[error("--chaos: {0:?} is not of the form WORD@STEP; {FORMS}")]
    Form(String),
    #[error("--chaos: unknown word {word:?} in {event:?}; {FORMS}")]
    Word { word: String, event: String },
    #[error("--chaos: {step:?} in {event:?} is not a step, a whole number from 1 on; {FORMS}")]
    Step { step: String, event: String },
}

impl FromStr for Chaos {
    type Err = InvalidChaos;

    fn from_str(spec: &str) -> Result<Self, InvalidChaos> {
        let mut pending = spec.split(',').map(disturbance).collect::<Result<Vec<_>, _>>()?;
        pending.sort_by_key(|disturbance| disturbance.step); // Stable: as written within a step.
        Ok(Self { pending })
    }
}

fn disturbance(event: &str) -> Result<Disturbance, InvalidChaos> {
    let event = event.trim();
    let (word, step) = event.split_once('@').ok_or_else(|| InvalidChaos::Form(event.to_owned()))?;
    let deed = match word {
        "kill" => Deed::Kill,
        "join" => Deed::Join,
        "stop" => Deed::Stop,
        "coordinator-kill" => Deed::KillCoordinator,
        _ => {
            return Err(InvalidChaos::Word { word: word.to_owned(), event: event.to_owned() });
        }
    };
    match step.parse() {
        Ok(step @ 1..) => Ok(Disturbance { deed, step: Step(step) }),
        Ok(0) | Err(_) => {
            Err(InvalidChaos::Step { step: step.to_owned(), event: event.to_owned() })
        }
    }
}

impl Chaos {
    /// Takes out what is due when `adopted` is the run's step. What needs a worker or the coordinator
    /// waits until there is one.
    pub(crate) fn due(
        &mut self,
        adopted: Step,
        workers: usize,
        has_coordinator: bool,
    ) -> Option<Disturbance> {
        let can_be_done = |deed| match deed {
            Deed::Kill | Deed::Stop => workers > 0,
            Deed::KillCoordinator => has_coordinator,
            Deed::Join => true,
        };
        let is_due = |d: &Disturbance| d.step <= adopted && can_be_done(d.deed);
        let place = self.pending.iter().position(is_due)?;
        Some(self.pending.remove(place))
    }

    /// What has not been done.
    pub(crate) fn rest(&self) -> &[Disturbance] {
        &self.pending
    }
}

/// Which of the workers that are there is hit: another one for each step, and the same each time.
pub(crate) fn victim(step: Step, live: &[u32]) -> Option<u32> {
    let count = u64::try_from(live.len()).expect("workers can be counted");
    let place = step.0.checked_rem(count)?;
    live.get(usize::try_from(place).expect("it is below the number of workers")).copied()
}

impl std::fmt::Display for Disturbance {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let word = match self.deed {
            Deed::Kill => "kill",
            Deed::Join => "join",
            Deed::Stop => "stop",
            Deed::KillCoordinator => "coordinator-kill",
        };
        write!(f, "{word}@{}", self.step)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chaos(spec: &str) -> Chaos {
        spec.parse().unwrap()
    }

    fn words(chaos: &Chaos) -> Vec<String> {
        chaos.rest().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn events_may_come_in_any_order_and_more_than_once() {
        let chaos = chaos("join@90, kill@60,coordinator-kill@5,kill@60,stop@7");
        let expected = ["coordinator-kill@5", "stop@7", "kill@60", "kill@60", "join@90"];
        assert_eq!(words(&chaos), expected);
    }

    #[test]
    fn what_means_nothing_is_named_with_the_forms_that_do() {
        let refusal = |spec: &str| spec.parse::<Chaos>().unwrap_err().to_string();
        for (spec, named) in [
            ("", "\"\" is not of the form WORD@STEP"),
            ("kill", "\"kill\" is not of the form WORD@STEP"),
            ("kill@5,,join@6", "\"\" is not of the form WORD@STEP"),
            ("crash@5", "unknown word \"crash\" in \"crash@5\""),
            ("kill@soon", "\"soon\" in \"kill@soon\" is not a step"),
            ("kill@-1", "\"-1\" in \"kill@-1\" is not a step"),
            ("join@0", "\"0\" in \"join@0\" is not a step"),
        ] {
            let refusal = refusal(spec);
            assert!(refusal.contains(named), "{refusal}");
            assert!(refusal.contains("coordinator-kill@STEP"), "{refusal}");
        }
    }

    #[test]
    fn an_event_is_due_once_from_its_step_on() {
        let mut chaos = chaos("kill@5,join@9");
        assert_eq!(chaos.due(Step(4), 3, true), None);
        let kill = Disturbance { deed: Deed::Kill, step: Step(5) };
        assert_eq!(chaos.due(Step(6), 3, true), Some(kill));
        assert_eq!(chaos.due(Step(6), 3, true), None);
        assert_eq!(words(&chaos), ["join@9"]);
    }

    #[test]
    fn a_kill_waits_for_somebody_to_kill_and_holds_up_nothing_else() {
        let mut chaos = chaos("kill@5,coordinator-kill@5,join@6");
        let join = Disturbance { deed: Deed::Join, step: Step(6) };
        assert_eq!(chaos.due(Step(6), 0, false), Some(join));
        assert_eq!(chaos.due(Step(6), 0, false), None);
        assert_eq!(chaos.due(Step(6), 1, false).unwrap().deed, Deed::Kill);
        assert_eq!(chaos.due(Step(6), 1, true).unwrap().deed, Deed::KillCoordinator);
    }

    #[test]
    fn the_victim_follows_from_the_step() {
        assert_eq!(victim(Step(60), &[0, 1, 2]), Some(0));
        assert_eq!(victim(Step(61), &[0, 2, 7]), Some(2));
        assert_eq!(victim(Step(61), &[]), None);
    }
}
