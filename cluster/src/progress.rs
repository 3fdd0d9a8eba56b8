//! Who keeps the others waiting: how long each phase takes, learnt from heartbeats, and who exceeds it.
//!
//! A worker whose heartbeats are healthy may be stuck all the same. Three rules find it, and none of
//! them blames a worker for being as slow as the others:
//!
//! * **The rear is at fault.** Members are ordered by how far they are (step, then phase). Only those
//!   furthest behind can be the culprit, and only if others, further on, wait for them.
//! * **Slow compared with its own kind.** It must be in its phase for longer than the deadline, which
//!   is three times the 99th percentile of that phase, and three times as long as the others took.
//! * **No culprit, no progress.** If all wait in a sum or an evaluation, none can be told from the
//!   others: they form a new generation, which the one that hangs cannot join.
//!
//! What was learnt is soft state: a coordinator that starts anew is patient until it knows better.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

use crate::{Progress, Report, Step, StepPhase, Timeouts, WorkerId};

/// Durations remembered of each phase.
const WINDOW: usize = 256;
/// With fewer, a phase is not known.
const WINDOW_MIN: usize = 3;
/// A phase is late after so many times its 99th percentile, and so many times what the others took.
const FACTOR: u32 = 3;
/// How often the patience with a generation that stands still is doubled at most.
const DOUBLINGS_MAX: u32 = 8;

/// How fast workers are, as far as is known.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Pace {
    took: BTreeMap<StepPhase, VecDeque<Duration>>,
    latest: BTreeMap<WorkerId, Progress>,
    /// Workers that have done a step in their life: the first one takes longer.
    warm: BTreeSet<WorkerId>,
    last_events: BTreeMap<WorkerId, String>,
    /// Generations that were given up for standing still since the last step.
    stalls: u32,
}

/// What is wrong with the progress of a generation.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Verdict {
    /// These members keep the others waiting, worst first.
    Stuck(Vec<Stuck>),
    /// Nobody moves, and nobody can be told from the others.
    Stalled {
        /// What they are in.
        phase: StepPhase,
        /// For how long at least.
        lasted: Duration,
    },
}

/// A member that keeps the others waiting.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Stuck {
    pub(crate) worker: WorkerId,
    pub(crate) progress: Progress,
    /// For how long it may be in its phase.
    pub(crate) deadline: Duration,
    /// How many members wait for it.
    pub(crate) waiting: usize,
}

impl Pace {
    /// Takes a heartbeat in.
    pub(crate) fn beat(&mut self, timeouts: &Timeouts, worker: WorkerId, progress: Progress) {
        let Some(before) = self.latest.insert(worker, progress) else { return };
        let is_same = before.phase == progress.phase
            && before.applied == progress.applied
            && before.in_phase <= progress.in_phase;
        if is_same {
            return;
        }
        // It ended between the two heartbeats.
        let took = self.took.entry(before.phase).or_default();
        if took.len() == WINDOW {
            took.pop_front();
        }
        took.push_back(before.in_phase + timeouts.heartbeat);
        if before.applied.is_some() && before.applied < progress.applied {
            self.warm.insert(worker);
            self.stalls = 0;
        }
    }

    /// Takes the news of a worker in, for those who want to know what it did last.
    pub(crate) fn said(&mut self, worker: WorkerId, report: &Report) {
        if let Some(event) = in_words(report) {
            self.last_events.insert(worker, event);
        }
    }

    /// The worker is gone.
    pub(crate) fn forget(&mut self, worker: WorkerId) {
        self.latest.remove(&worker);
        self.warm.remove(&worker);
        self.last_events.remove(&worker);
    }

    /// What a worker did last, in words.
    pub(crate) fn last_event(&self, worker: WorkerId) -> &str {
        self.last_events.get(&worker).map_or("it joined", String::as_str)
    }

    /// A generation was given up for standing still: if that was wrong, the next has more time.
    pub(crate) fn stalled(&mut self) {
        self.stalls = (self.stalls + 1).min(DOUBLINGS_MAX);
    }

    /// For how long a worker may be in a phase.
    pub(crate) fn deadline(
        &self,
        timeouts: &Timeouts,
        worker: WorkerId,
        phase: StepPhase,
    ) -> Duration {
        if phase == StepPhase::Idle {
            return timeouts.first_step(); // How long others stood by says nothing.
        }
        let known = self.took.get(&phase).filter(|took| took.len() >= WINDOW_MIN);
        let learnt = known.map_or(Duration::ZERO, |took| percentile_99(took) * FACTOR);
        let floor = match (phase, known) {
            (StepPhase::Evaluate, None) => timeouts.first_evaluation(),
            (StepPhase::Evaluate, Some(_)) => timeouts.progress(),
            (_, None) => timeouts.first_step(),
            (_, Some(_)) if !self.warm.contains(&worker) => timeouts.first_step(),
            (_, Some(_)) => timeouts.progress(),
        };
        floor.max(learnt)
    }

    /// What a worker last said of its progress.
    pub(crate) fn latest(&self, worker: WorkerId) -> Option<&Progress> {
        self.latest.get(&worker)
    }

    /// For how long a worker has been in its phase, as far as is known.
    pub(crate) fn in_phase(&self, worker: WorkerId) -> Option<Duration> {
        self.latest.get(&worker).map(|progress| progress.in_phase)
    }

    /// Whether a worker is in its phase for longer than it may be.
    pub(crate) fn is_late(&self, timeouts: &Timeouts, worker: WorkerId) -> bool {
        let said = self.latest.get(&worker);
        said.is_some_and(|said| said.in_phase >= self.deadline(timeouts, worker, said.phase))
    }

    /// Whether members stand still, and because of whom. `is_formed`: they train; otherwise they form
    /// a generation, and a stand-still is not looked for.
    pub(crate) fn verdict(
        &self,
        timeouts: &Timeouts,
        members: &[WorkerId],
        is_formed: bool,
    ) -> Option<Verdict> {
        let known: Vec<_> =
            members.iter().filter_map(|&w| self.latest.get(&w).map(|p| (w, *p))).collect();
        let rear = known.iter().map(|(_, progress)| position(progress)).min()?;
        let stuck = self.stuck_at(timeouts, &known, rear);
        if !stuck.is_empty() {
            return Some(Verdict::Stuck(stuck));
        }
        let is_complete = is_formed && known.len() == members.len();
        self.stall(timeouts, &known).filter(|_| is_complete)
    }

    /// Those at the rear that exceed what is usual while others wait for them.
    fn stuck_at(
        &self,
        timeouts: &Timeouts,
        known: &[(WorkerId, Progress)],
        rear: (u64, u8),
    ) -> Vec<Stuck> {
        let mut stuck = Vec::new();
        let behind = known.iter().filter(|(_, progress)| position(progress) == rear);
        for &(worker, progress) in behind {
            if progress.in_phase < timeouts.progress() {
                continue;
            }
            // In a third of its time the others were where it is now.
            let waits = |other: &Progress| {
                position(other) > rear
                    && is_waiting(other.phase)
                    && other.in_phase * FACTOR >= progress.in_phase * (FACTOR - 1)
            };
            let waiting = known.iter().filter(|(_, other)| waits(other)).count();
            let computes_longer =
                |other: &Progress| !is_waiting(other.phase) && other.in_phase >= progress.in_phase;
            let is_excused =
                is_waiting(progress.phase) && known.iter().any(|(_, other)| computes_longer(other));
            let deadline = self.deadline(timeouts, worker, progress.phase);
            // What holds up most of them is rather something that they share.
            let is_minority = waiting * 2 >= known.len();
            let patience = if is_minority { deadline } else { deadline * FACTOR };
            if waiting > 0 && !is_excused && progress.in_phase >= patience {
                stuck.push(Stuck { worker, progress, deadline, waiting });
            }
        }
        stuck.sort_by_key(|one| std::cmp::Reverse(one.progress.in_phase));
        stuck
    }

    /// If all wait in a sum or an evaluation for too long, or none has moved for ages: which, and for how long.
    fn stall(&self, timeouts: &Timeouts, known: &[(WorkerId, Progress)]) -> Option<Verdict> {
        let is_late = |&(worker, progress): &(WorkerId, Progress)| {
            if progress.in_phase < timeouts.progress() {
                return false; // The most common case is the cheapest.
            }
            let deadline = self.deadline(timeouts, worker, progress.phase);
            progress.in_phase >= deadline * 2_u32.pow(self.stalls)
        };
        let is_meeting = |phase| matches!(phase, StepPhase::Reduce | StepPhase::Evaluate);
        let all_wait = known.iter().all(|one| is_meeting(one.1.phase) && is_late(one));
        // If all hang, nobody waits: then nothing takes longer than the first evaluation may.
        let longest = timeouts.first_evaluation() * 2_u32.pow(self.stalls);
        let is_over =
            |progress: &Progress| position(progress).0 < u64::MAX && progress.in_phase >= longest;
        let all = all_wait || known.iter().all(|(_, progress)| is_over(progress));
        let shortest = known.iter().map(|(_, p)| p).min_by_key(|p| p.in_phase)?;
        all.then_some(Verdict::Stalled { phase: shortest.phase, lasted: shortest.in_phase })
    }
}

/// How far a worker is. Whoever waits for a generation is ahead of all that are in one.
fn position(progress: &Progress) -> (u64, u8) {
    let place = match progress.phase {
        StepPhase::Idle | StepPhase::Form => return (u64::MAX, 0),
        StepPhase::Checkpoint => 0,
        StepPhase::Evaluate => 1,
        StepPhase::Load | StepPhase::Compute => 2, // They alternate.
        StepPhase::Reduce => 3,
        StepPhase::Update => 4,
    };
    (progress.applied.unwrap_or(Step(0)).0, place)
}

/// Whether a worker in this phase may do nothing but wait for others.
fn is_waiting(phase: StepPhase) -> bool {
    match phase {
        StepPhase::Idle | StepPhase::Form | StepPhase::Reduce | StepPhase::Evaluate => true,
        StepPhase::Load | StepPhase::Compute | StepPhase::Update | StepPhase::Checkpoint => false,
    }
}

/// The smallest duration that 99 of 100 do not exceed (nearest rank).
fn percentile_99(took: &VecDeque<Duration>) -> Duration {
    let mut sorted: Vec<_> = took.iter().copied().collect();
    sorted.sort_unstable();
    let rank = (sorted.len() * 99).div_ceil(100);
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or_default()
}

fn in_words(report: &Report) -> Option<String> {
    Some(match report {
        Report::Heartbeat(_) => return None,
        Report::Formed { generation, step, .. } => {
            format!("it formed generation {generation} at step {step}")
        }
        Report::FormFailed { generation, .. } => {
            format!("it could not form generation {generation}")
        }
        Report::ExchangeLost { generation, .. } => {
            format!("it lost the exchange of generation {generation}")
        }
        Report::StepApplied { step, .. } => format!("it applied step {step}"),
        Report::Evaluated { evaluation, .. } => format!("it evaluated step {}", evaluation.step),
        Report::ShareWritten { share, .. } => {
            format!("it wrote its share of checkpoint {}", share.step)
        }
        Report::ShareFailed { step, .. } => {
            format!("it could not write its share of checkpoint {step}")
        }
        Report::CheckpointDamaged { step, .. } => {
            format!("it found checkpoint {step} damaged")
        }
        Report::Diverged { step, .. } => format!("it found that states differ after step {step}"),
        Report::Finished { step, .. } => format!("it did the last step, {step}"),
        Report::NodeFaulty { .. } => "it found its machine faulty".to_owned(),
        Report::Ready => "it was ready to train".to_owned(),
        Report::Leaving { .. } => "it asked to leave".to_owned(),
        Report::Failed { .. } => "it failed".to_owned(),
    })
}

#[cfg(test)]
#[path = "progress/tests.rs"]
mod tests;
