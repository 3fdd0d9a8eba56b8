//! What the run has to show: steps adopted, states kept, and its end.

use std::collections::{BTreeMap, BTreeSet};

use super::{Coordinator, Phase, Saving};
use crate::{
    Command, Generation, Order, Outcome, Rank, Record, Share, Step, StepMetrics, Timestamp,
    WorkerId,
};

/// So often the workers go back together because their states differ, before the run is given up.
const DIVERGENCES_MAX: u32 = 3;

impl Coordinator {
    /// Takes the results up to `step` as the run's. Figures are known for the last of them only.
    pub(super) fn adopt(
        &mut self,
        generation: Generation,
        step: Step,
        metrics: Option<StepMetrics>,
        applied_at: Option<Timestamp>,
    ) {
        while self.ledger.canonical < step {
            let next = self.ledger.canonical.next();
            let is_last = next == step;
            self.record(Record::StepAdopted {
                step: next,
                generation,
                metrics: metrics.filter(|_| is_last),
                applied_at: applied_at.filter(|_| is_last),
            });
        }
        if self.checkpoint_at.is_some_and(|at| at <= step) {
            self.rename_checkpoint(step.next());
        }
    }

    // ---- Checkpoints -----------------------------------------------------------------------

    /// Names the next state to keep, and tells the members if that is news.
    fn rename_checkpoint(&mut self, from: Step) {
        let next = self.next_checkpoint(from);
        if next == self.checkpoint_at {
            return;
        }
        self.checkpoint_at = next;
        if let Some(step) = next {
            let generation = self.ledger.generation;
            for worker in self.member_ids() {
                self.send(worker, Order::CheckpointAt { generation, step });
            }
        }
    }

    pub(super) fn next_checkpoint(&self, from: Step) -> Option<Step> {
        let is_kept = |step: &Step| self.ledger.checkpoints.binary_search(step).is_ok();
        let mut planned = self.config.next_checkpoint(from);
        while let Some(step) = planned.filter(is_kept) {
            planned = self.config.next_checkpoint(step.next());
        }
        let also = self.keep_also.filter(|step| *step >= from && !is_kept(step));
        planned.into_iter().chain(also).min()
    }

    /// Names a step soon to come as one to keep, unless one is named already that comes as soon.
    pub(super) fn keep_soon(&mut self) {
        if self.ledger.outcome.is_some() {
            return;
        }
        let canonical = self.ledger.canonical;
        let soon =
            Step(canonical.0.saturating_add(self.steps_ahead())).min(self.config.steps_total);
        let is_named = self.checkpoint_at.is_some_and(|at| at > canonical && at <= soon);
        if !is_named && soon > canonical {
            self.keep_also = Some(soon);
            self.rename_checkpoint(canonical.next());
        }
    }

    /// Steps that the members may make until all of them have heard of an order: those that are not
    /// reported yet, and those of a heartbeat.
    fn steps_ahead(&self) -> u64 {
        let heartbeat = self.config.timeouts.heartbeat.as_millis();
        let made = self.step_time.map_or(0, |step| heartbeat / step.as_millis().max(1));
        u64::try_from(made).unwrap_or(u64::MAX).saturating_add(2)
    }

    /// Keeps the state if none has been kept for as long as the plan allows.
    pub(super) fn keep_in_time(&mut self, now: Timestamp) {
        let every = self.config.checkpoint_every;
        let is_time = !every.is_zero() && now.since(self.unkept_since) >= every;
        if is_time && matches!(self.phase, Phase::Training { .. }) {
            self.unkept_since = now;
            self.keep_soon();
        }
    }

    pub(super) fn share_written(&mut self, generation: Generation, share: Share) {
        let committed = self.ledger.checkpoints.binary_search(&share.step).is_ok();
        // A share may be longer on its way than its generation lasts.
        let is_awaited = self.saving.get(&share.step).is_some_and(|s| s.generation == generation);
        if committed || !(self.is_current(generation) || is_awaited) {
            return;
        }
        let saving = self.saving.entry(share.step).or_insert_with(|| Saving {
            generation,
            parts: BTreeMap::new(),
            committing: false,
        });
        for part in share.parts {
            let held = saving.parts.entry(part.index).or_insert_with(|| part.clone());
            if *held != part {
                let step = share.step;
                let index = part.index;
                return self.fail(&format!(
                    "two workers wrote different bytes for part {index} of checkpoint {step}: the \
                     state is not the same everywhere; compare their logs and machines"
                ));
            }
        }
        if !saving.committing && saving.parts.len() == share.parts_total as usize {
            saving.committing = true;
            let parts = saving.parts.values().cloned().collect();
            self.commands.push(Command::CommitCheckpoint {
                generation: saving.generation,
                step: share.step,
                parts,
                part_bytes: share.part_bytes,
                sections: share.sections,
            });
        }
    }

    pub(super) fn checkpoint_committed(&mut self, now: Timestamp, step: Step) {
        if self.ledger.checkpoints.binary_search(&step).is_ok() {
            return;
        }
        if self.saving.remove(&step).is_none() {
            return; // It was given up meanwhile, as its state cannot be trusted.
        }
        self.record(Record::CheckpointCommitted { step });
        self.unkept_since = now;
        self.unsettled |= self.ledger.last;
        self.abandon(|older, _| older < step, "a newer one was complete first");
        self.finish_if_complete(now);
    }

    pub(super) fn commit_failed(&mut self, step: Step, reason: &str) {
        if self.saving.get(&step).is_some_and(|saving| saving.committing) {
            self.checkpoint_failed(step, reason);
        }
    }

    pub(super) fn checkpoint_failed(&mut self, step: Step, reason: &str) {
        self.saving.remove(&step);
        self.record(Record::CheckpointAbandoned { step, reason: reason.to_owned() });
        if self.ledger.last && step == self.ledger.formed_from {
            (self.last_unkept, self.unsettled) = (true, true);
        }
        if step == self.config.steps_total {
            self.fail(&format!("the final checkpoint could not be written: {reason}"));
        }
    }

    /// A member of the newest generation could not read the checkpoint that it was to start from, twice.
    /// The one before is offered in a new generation.
    ///
    /// If it is the only one, nothing is forgotten, so that it may still be restored: the worker is
    /// refused, and never begins from nothing.
    pub(super) fn checkpoint_damaged(
        &mut self,
        now: Timestamp,
        worker: WorkerId,
        step: Step,
        reason: &str,
    ) {
        match self.ledger.checkpoints.as_slice() {
            [only] if *only == step => {
                let cause = format!("{reason}; restore it: no other checkpoint is intact");
                self.workers_lost(now, &[worker], &cause);
            }
            kept if kept.binary_search(&step).is_ok() => {
                let reason = format!("quarantined, for {reason}");
                self.record(Record::CheckpointAbandoned { step, reason });
                let reason = format!("the checkpoint of step {step} is damaged");
                self.open_generation(now, false, &reason);
            }
            _ => {} // It was not offered.
        }
    }

    /// The members hold different states. What was computed since they were last equal cannot be trusted, as gradients
    /// of a wrong state are in all of them: they go on from what was kept before. Whoever differs from most is lost.
    pub(super) fn diverged(
        &mut self,
        now: Timestamp,
        step: Step,
        agreed: Step,
        odd: Option<Rank>,
        reason: &str,
    ) {
        let why =
            format!("the states differed after step {step}, and were last equal after {agreed}");
        let untrusted = self.ledger.checkpoints.iter().filter(|kept| **kept > agreed);
        for step in untrusted.copied().collect::<Vec<_>>() {
            self.record(Record::CheckpointAbandoned { step, reason: why.clone() });
        }
        self.abandon(|saved, _| saved > agreed, &why);
        let odd = odd.and_then(|rank| self.ledger.members.get(rank.0 as usize));
        match odd.map(|member| member.worker) {
            Some(worker) => self.workers_lost(now, &[worker], reason),
            None => {
                self.divergences += 1;
                if self.divergences == DIVERGENCES_MAX {
                    return self.fail(&format!(
                        "{reason}; that has happened {DIVERGENCES_MAX} times, and with so few workers nobody can tell \
                         whose state is wrong: go on with three or more, or take the machines out one by one"
                    ));
                }
                self.open_generation(now, false, reason);
            }
        }
    }

    pub(super) fn abandon(&mut self, which: impl Fn(Step, &Saving) -> bool, reason: &str) {
        let given_up = self.saving.iter().filter(|&(&step, saving)| which(step, saving));
        let given_up: Vec<_> = given_up.map(|(&step, _)| step).collect();
        for step in given_up {
            self.saving.remove(&step);
            self.record(Record::CheckpointAbandoned { step, reason: reason.to_owned() });
        }
    }

    // ---- The end ---------------------------------------------------------------------------

    pub(super) fn finish_if_complete(&mut self, now: Timestamp) {
        let step = self.config.steps_total;
        let kept = self.ledger.checkpoints.binary_search(&step).is_ok();
        let all_said = self.finished.len() == self.ledger.members.len();
        if !all_said || !self.ledger.formed || self.ledger.outcome.is_some() {
            return;
        }
        if !kept {
            // Shares are written before the end is said; a coordinator that was restarted meanwhile
            // has not heard of all of them.
            if !self.saving.get(&step).is_some_and(|saving| saving.committing) {
                self.open_generation(now, false, "the final checkpoint has to be written again");
            }
            return;
        }
        let digests: BTreeSet<_> = self.finished.values().cloned().collect();
        let Some(state_sha256) = digests.first().filter(|_| digests.len() == 1).cloned() else {
            let said: Vec<_> =
                self.finished.iter().map(|(w, d)| format!("{} {d}", self.name(*w))).collect();
            return self.fail(&format!("the final states differ: {}", said.join(", ")));
        };
        self.record(Record::RunFinished { step, state_sha256 });
        self.end();
    }

    pub(super) fn fail(&mut self, reason: &str) {
        if self.ledger.outcome.is_none() {
            self.record(Record::RunFailed { reason: reason.to_owned() });
            self.end();
        }
    }

    fn end(&mut self) {
        self.phase = Phase::Ended;
        let outcome = self.ledger.outcome.clone().expect("the outcome was recorded just before");
        let everybody: Vec<_> = self.workers.iter().map(|(worker, _)| worker).collect();
        for worker in everybody {
            self.tell_outcome(worker, &outcome);
        }
    }

    pub(super) fn tell_outcome(&mut self, worker: WorkerId, outcome: &Outcome) {
        let order = match outcome.clone() {
            Outcome::Finished { step, state_sha256 } => Order::Finish { step, state_sha256 },
            Outcome::Failed { reason } => Order::Fail { reason },
        };
        self.send(worker, order);
    }
}
