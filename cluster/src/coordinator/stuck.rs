//! What follows when members keep others waiting: they are lost by name, or all form anew.

use std::time::Duration;

use super::{Coordinator, Phase};
use crate::{
    Timestamp, WorkerId,
    progress::{Stuck, Verdict},
};

impl Coordinator {
    /// Looks, once a heartbeat, for members that are alive and do not get on.
    pub(super) fn look_for_the_stuck(&mut self, now: Timestamp) {
        if now < self.pace_checked_after {
            return;
        }
        let (watched, trains) = match &self.phase {
            Phase::Training { suspicion: None } => (self.member_ids(), true),
            // Until they have left it, what counts is the generation before.
            Phase::Forming { .. } if !self.turned => {
                (self.ledger.intact_members.iter().map(|member| member.worker).collect(), true)
            }
            // Whoever hangs in the formation seems to be ahead of those that train already, until the
            // formation's own deadline; and nobody is late to turn who was told a moment ago.
            Phase::Forming { formed, .. } if !formed.is_empty() || !self.had_time_to_turn(now) => {
                return;
            }
            Phase::Forming { .. } => (self.member_ids(), false),
            Phase::Training { suspicion: Some(_) } | Phase::Gathering { .. } | Phase::Ended => {
                return;
            }
        };
        self.pace_checked_after = now + self.config.timeouts.heartbeat;
        match self.pace.verdict(&self.config.timeouts, &watched, trains) {
            None => {}
            Some(Verdict::Stuck(stuck)) => {
                let cause: Vec<_> =
                    stuck.iter().map(|one| self.blame(one, watched.len())).collect();
                let cause = cause.join("; ");
                let workers: Vec<_> = stuck.iter().map(|one| one.worker).collect();
                let is_forming = matches!(self.phase, Phase::Forming { .. });
                let holds_up = is_forming && !self.turned;
                self.workers_lost(now, &workers, &cause);
                if holds_up && self.ledger.intact.is_some() {
                    self.open_generation(now, false, "a worker was stuck on its way out");
                }
            }
            Some(Verdict::Stalled { phase, lasted }) => {
                self.pace.stalled();
                let reason = format!("no member got on for {lasted:?}: all were in {phase}");
                self.open_generation(now, false, &reason);
            }
        }
    }

    /// Members that have been in their phase for longer than is usual, and since before the newest
    /// generation was opened: if all of them hang, nobody is left to complain.
    pub(super) fn unmoved_members(&self) -> Vec<WorkerId> {
        let (timeouts, allowance) = (&self.config.timeouts, self.form_allowance());
        let is_unmoved = |&worker: &WorkerId| {
            self.pace.is_late(timeouts, worker)
                && self.pace.in_phase(worker).is_some_and(|lasted| lasted >= allowance)
        };
        self.member_ids().into_iter().filter(is_unmoved).collect()
    }

    fn had_time_to_turn(&self, now: Timestamp) -> bool {
        now.since(self.opened) >= self.config.timeouts.progress()
    }

    fn blame(&self, stuck: &Stuck, members: usize) -> String {
        let Stuck { worker, progress, deadline, waiting } = stuck;
        let rank = self.rank_text(*worker);
        let step = progress.applied.map_or_else(String::new, |step| format!(" after step {step}"));
        format!(
            "{} ({rank}) made no progress: in {} for {:?}{step}, where {deadline:?} is allowed, while \
             {waiting} of {members} members waited for it; its last event: {}",
            self.name(*worker),
            progress.phase,
            progress.in_phase,
            self.pace.last_event(*worker),
        )
    }

    /// Why a worker that fell silent is lost, with what it did when it was last heard.
    pub(super) fn silence(&self, worker: WorkerId, lease: Duration) -> String {
        let was_in = self.pace.latest(worker).map_or_else(String::new, |progress| {
            let applied = progress.applied;
            let step = applied.map_or_else(String::new, |step| format!(" after step {step}"));
            format!("it was in {}{step}; ", progress.phase)
        });
        format!(
            "it said nothing for {lease:?} ({}, {}); {was_in}its last event: {}",
            self.name(worker),
            self.rank_text(worker),
            self.pace.last_event(worker),
        )
    }

    fn rank_text(&self, worker: WorkerId) -> String {
        let members = &self.ledger.members;
        match members.iter().position(|member| member.worker == worker) {
            Some(rank) => format!("rank {rank}"),
            None if self.ledger.holds_state(worker) => "on its way out".to_owned(),
            None => "without a rank".to_owned(),
        }
    }
}
