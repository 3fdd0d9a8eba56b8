//! How the membership changes: who is lost, who is let go, and what opens a generation.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use super::{Coordinator, Formed, Phase};
use crate::{
    Generation, Member, Order, Progress, Rank, Record, StepPhase, Timestamp, Worker, WorkerId,
    blocks::balanced_blocks,
};

impl Coordinator {
    // ---- Workers go ------------------------------------------------------------------------

    /// The session alone is not the worker: it may come back before its lease is out, unless its
    /// peers have lost it as well.
    pub(super) fn session_closed(&mut self, now: Timestamp, worker: WorkerId) {
        let Some(known) = self.workers.find_mut(worker) else { return };
        known.session = false;
        let left = known.draining;
        let is_suspected = match &self.phase {
            Phase::Training { suspicion } => suspicion.is_some(),
            Phase::Forming { blamed, .. } => blamed.contains_key(&worker),
            Phase::Gathering { .. } | Phase::Ended => false,
        };
        if !self.is_member(worker) {
            let cause =
                if left { "it left as asked" } else { "its session closed while it stood by" };
            self.workers_lost(now, &[worker], cause);
        } else if is_suspected {
            self.workers_lost(now, &[worker], "its peers lost it and its session closed");
        }
    }

    /// A worker is gone: an exit, a silent lease, and a peer's report all end here.
    ///
    /// If a member of the newest generation is gone, its survivors get a new one at once, so that a
    /// late message of the lost worker carries an old one and is refused.
    pub(super) fn workers_lost(&mut self, now: Timestamp, lost: &[WorkerId], cause: &str) {
        let mut names = Vec::new();
        let mut trained = false;
        for &worker in lost {
            let Some(known) = self.workers.remove(worker) else {
                continue; // Its lease, its supervisor and its peers all report the same death.
            };
            self.pace.forget(worker);
            let name = known.name.clone();
            self.record(Record::WorkerLost { worker, name, cause: cause.to_owned() });
            let reason = format!("the run went on without this worker: {cause}");
            self.send(worker, Order::Refuse { reason });
            self.close(worker);
            trained |= self.ledger.holds_state(worker);
            if self.is_member(worker) {
                names.push(known.name);
            }
        }
        if !names.is_empty() {
            // A newcomer that dies before the others have left for it costs them nothing.
            let planned = !self.turned && !trained;
            self.open_generation(now, planned, &format!("{} was lost", names.join(", ")));
        } else if trained {
            // Without it the generation before can do no further step, whether it left as asked or died.
            self.members_turn(now);
        }
    }

    /// A worker says that its machine is broken. It is lost, as its next result cannot be trusted, and none of
    /// that machine is let in again. Others that are there already go on until they fail themselves.
    pub(super) fn node_faulty(&mut self, now: Timestamp, worker: WorkerId, reason: String) {
        let Some(known) = self.workers.find(worker) else { return };
        let (node, name) = (known.node.clone(), known.name.clone());
        let cause = format!("its machine is faulty: {reason}");
        if !node.is_empty() && !self.ledger.faulty.contains_key(&node) {
            self.record(Record::NodeMarked { node, name, reason });
        }
        self.workers_lost(now, &[worker], &cause);
    }

    pub(super) fn readmit(&mut self, node: String) {
        if self.ledger.faulty.contains_key(&node) {
            self.record(Record::NodeReadmitted { node });
        }
    }

    /// A worker is to leave without loss: with the next planned change, or at once if it has no part.
    ///
    /// If nobody stays, the state is kept soon: those who asked will not be waited for long.
    pub(super) fn drain(&mut self, worker: WorkerId) {
        let Some(known) = self.workers.find_mut(worker) else { return };
        let is_news = !std::mem::replace(&mut known.draining, true);
        if is_news && self.workers.iter().all(|(_, known)| known.draining) {
            self.keep_soon();
        }
        self.unsettled = true;
        if !self.is_member(worker) && !self.ledger.holds_state(worker) {
            self.send(worker, Order::Form(self.group()));
        }
    }

    /// More or fewer workers are to take part: with the next planned change.
    pub(super) fn resize(&mut self, workers: u32) {
        let is_possible = self.config.check_resize(workers).is_ok();
        let is_news = self.ledger.workers_wanted != Some(workers);
        if is_possible && is_news && self.ledger.outcome.is_none() {
            self.record(Record::Resized { workers });
        }
    }

    // ---- Generations form and break --------------------------------------------------------

    pub(super) fn formed(
        &mut self,
        now: Timestamp,
        worker: WorkerId,
        generation: Generation,
        said: Formed,
    ) {
        if !self.is_member(worker) {
            return;
        }
        if generation < self.ledger.generation && Some(generation) > self.ledger.intact {
            return self.formed_after_all(now);
        }
        if generation != self.ledger.generation {
            return;
        }
        self.members_turn(now);
        let patience = now + self.config.timeouts.suspicion;
        let Phase::Forming { formed, deadline, .. } = &mut self.phase else { return };
        formed.insert(worker, said);
        // Where one has formed it, all have met: the news of the others is on its way.
        *deadline = Some(deadline.map_or(patience, |deadline| deadline.max(patience)));
        if formed.len() < self.ledger.members.len() {
            return;
        }
        let formed = std::mem::take(formed);
        let states: BTreeSet<_> = formed.values().map(|f| (f.step, f.digest.clone())).collect();
        let Some((step, digest)) = states.first().filter(|_| states.len() == 1).cloned() else {
            let shown: Vec<_> = formed
                .iter()
                .map(|(w, f)| format!("{} {} {}", self.name(*w), f.step, f.digest))
                .collect();
            return self.fail(&format!(
                "the members of generation {generation} hold different states: {}",
                shown.join(", ")
            ));
        };
        let begun = formed.values().map(|f| f.begun).max().unwrap_or_default();
        let repeated = begun.max(self.ledger.inherited).0.saturating_sub(step.0);
        let stopped_at = formed.values().filter_map(|f| f.stopped_at).max();
        // A coordinator that finds the generation formed must find its step adopted as well.
        let metrics = formed.values().find_map(|f| f.metrics);
        self.adopt(generation, step, metrics, None);
        self.record(Record::GenerationFormed { generation, step, digest, repeated, stopped_at });
        self.troubled_since = None;
        let is_broken = !self.stopped.is_empty(); // It broke before the last had said it stood.
        let suspicion = is_broken.then(|| now + self.config.timeouts.suspicion);
        self.phase = Phase::Training { suspicion };
        self.finish_if_complete(now);
    }

    /// A generation that was given up for the loss of a newcomer had been formed with it before: its
    /// members wait for a common step that the newcomer cannot do any more.
    fn formed_after_all(&mut self, now: Timestamp) {
        if self.ledger.intact.is_some() && matches!(self.phase, Phase::Forming { .. }) {
            self.open_generation(now, false, "the lost newcomer had been training already");
        }
    }

    pub(super) fn form_failed(
        &mut self,
        now: Timestamp,
        worker: WorkerId,
        generation: Generation,
        peer: Option<Rank>,
        reason: &str,
    ) {
        if generation == self.ledger.generation && self.is_member(worker) {
            let cause = format!("its peers could not reach it: {reason}");
            self.member_stopped(now, worker, peer, &cause);
        }
    }

    pub(super) fn exchange_lost(
        &mut self,
        now: Timestamp,
        worker: WorkerId,
        generation: Generation,
        peer: Option<Rank>,
        reason: String,
        stopped_at: Timestamp,
    ) {
        let is_known = self.stopped.contains(&worker);
        if generation != self.ledger.generation || !self.is_member(worker) || is_known {
            return; // The news that ended it came first.
        }
        let blamed = peer.and_then(|rank| self.ledger.members.get(rank.0 as usize));
        let peer_name = blamed.map(|peer| peer.name.clone());
        let record =
            Record::ExchangeLost { worker, generation, peer: peer_name, reason, stopped_at };
        self.record(record);
        self.member_stopped(now, worker, peer, "its peers lost it and its session is closed");
    }

    /// A member has stopped, so its generation is over: without whom to go on is decided as soon as
    /// there is evidence, or when none has come for a while.
    fn member_stopped(
        &mut self,
        now: Timestamp,
        worker: WorkerId,
        peer: Option<Rank>,
        cause: &str,
    ) {
        if !self.stopped.insert(worker) {
            return; // Said twice.
        }
        self.turned |= self.ledger.holds_state(worker);
        let patience = now + self.config.timeouts.suspicion;
        let peer = peer.and_then(|rank| self.ledger.members.get(rank.0 as usize));
        let peer = peer.map(|peer| peer.worker);
        match &mut self.phase {
            Phase::Training { suspicion } => {
                suspicion.get_or_insert(patience);
            }
            Phase::Forming { blamed, deadline, .. } => {
                self.troubled_since.get_or_insert(now);
                *deadline = Some(deadline.map_or(patience, |deadline| deadline.min(patience)));
                if let Some(peer) = peer {
                    *blamed.entry(peer).or_default() += 1;
                }
            }
            Phase::Gathering { .. } | Phase::Ended => return,
        }
        if let Some(peer) = peer
            && self.is_cut_off(peer)
        {
            self.workers_lost(now, &[peer], cause);
        }
    }

    // ---- Time ------------------------------------------------------------------------------

    pub(super) fn deadlines_passed(&mut self, now: Timestamp) {
        if matches!(self.phase, Phase::Ended) {
            return;
        }
        let lease = self.config.timeouts.lease;
        let silent = self.workers.expired(now, lease);
        // Whoever falls silent on its way out has not left, and keeps the others in its step.
        let is_in_step = |worker: &WorkerId| !self.turned && self.ledger.holds_state(*worker);
        let holds_up = silent.iter().any(is_in_step) && matches!(self.phase, Phase::Forming { .. });
        let causes: Vec<_> = silent.iter().map(|&worker| self.silence(worker, lease)).collect();
        self.workers_lost(now, &silent, &causes.join("; "));
        if holds_up && self.ledger.intact.is_some() {
            self.open_generation(now, false, "a worker fell silent on its way out");
        }
        match &self.phase {
            Phase::Forming { deadline: Some(deadline), formed, blamed } if *deadline <= now => {
                let late = self.late_members(now, formed, blamed);
                if late.is_empty() {
                    let planned = !self.turned;
                    self.open_generation(
                        now,
                        planned,
                        "the generation could not be formed in time",
                    );
                } else {
                    self.troubled_since = None;
                    self.workers_lost(now, &late, "it did not form the generation in time");
                }
            }
            Phase::Training { suspicion: Some(deadline) } if *deadline <= now => {
                let gone = self.cut_off_members();
                if gone.is_empty() {
                    self.open_generation(now, false, "an exchange broke and all members are there");
                }
                self.workers_lost(now, &gone, "its peers lost it and its session is closed");
            }
            Phase::Gathering { .. }
            | Phase::Forming { .. }
            | Phase::Training { .. }
            | Phase::Ended => {}
        }
        self.look_for_the_stuck(now);
    }

    /// A coordinator that was not called for longer than it asked was not running, and heard nobody:
    /// all waits begin anew.
    pub(super) fn forgive_own_sleep(&mut self, now: Timestamp) {
        if now.since(self.called) <= self.config.timeouts.heartbeat * 2 {
            return;
        }
        self.workers.forgive(now);
        self.pace_checked_after = now + self.config.timeouts.lease;
        let suspicion = self.config.timeouts.suspicion;
        let form = if self.stopped.is_empty() { self.form_allowance() } else { suspicion };
        match &mut self.phase {
            Phase::Forming { deadline: Some(deadline), .. } => {
                *deadline = (*deadline).max(now + form);
            }
            Phase::Training { suspicion: Some(deadline) } => *deadline = now + suspicion,
            Phase::Gathering { .. }
            | Phase::Forming { .. }
            | Phase::Training { .. }
            | Phase::Ended => {}
        }
    }

    /// Whom to go on without when a generation is not formed in time.
    ///
    /// If nobody has complained, those that did not form it although others did; if nobody did, those
    /// that have not even turned to it. If members have
    /// stopped, those that are cut off; if there are none, it is tried again with all, until the
    /// trouble has lasted so long that whom most could not reach has to go.
    fn late_members(
        &self,
        now: Timestamp,
        formed: &BTreeMap<WorkerId, Formed>,
        blamed: &BTreeMap<WorkerId, u32>,
    ) -> Vec<WorkerId> {
        let Some(since) = self.troubled_since.filter(|_| !self.stopped.is_empty()) else {
            let late = self.member_ids().into_iter().filter(|worker| !formed.contains_key(worker));
            return if formed.is_empty() { self.unmoved_members() } else { late.collect() };
        };
        let gone = self.cut_off_members();
        let is_hopeless = now.since(since) >= self.config.timeouts.form;
        if gone.is_empty() && is_hopeless {
            let most = blamed.iter().max_by_key(|&(worker, count)| (*count, *worker));
            return most.map(|(&worker, _)| worker).into_iter().collect();
        }
        gone
    }

    /// From a heartbeat: a member of the intact generation has left it for the newest one.
    pub(super) fn heard_progress(&mut self, now: Timestamp, worker: WorkerId, progress: Progress) {
        let has_left = match progress.phase {
            StepPhase::Form => true,
            // Between two steps it is idle for a moment, and at the end until its share is written.
            StepPhase::Idle => progress.in_phase >= self.config.timeouts.first_step(),
            StepPhase::Load
            | StepPhase::Compute
            | StepPhase::Reduce
            | StepPhase::Update
            | StepPhase::Evaluate
            | StepPhase::Checkpoint => false,
        };
        let has_turned = has_left && progress.generation == self.ledger.generation;
        if has_turned && self.ledger.holds_state(worker) {
            self.members_turn(now);
        }
    }

    /// The generation before is over, so from now on the members of the newest are waited for.
    fn members_turn(&mut self, now: Timestamp) {
        self.turned = true;
        let allowance = self.form_allowance();
        if let Phase::Forming { deadline: deadline @ None, .. } = &mut self.phase {
            *deadline = Some(now + allowance);
        }
    }

    /// How long forming may take: a worker turns to it only between two micro-batches.
    pub(super) fn form_allowance(&self) -> Duration {
        let step = self.step_time.unwrap_or(self.config.timeouts.gather);
        self.config.timeouts.form + step * 2
    }

    // ---- The next generation ---------------------------------------------------------------

    /// Opens a generation when the one that should be differs from the one that is.
    pub(super) fn reconsider_membership(&mut self, now: Timestamp) {
        match &self.phase {
            Phase::Gathering { since } => {
                let available = self.available();
                let patience_is_out = *since + self.config.timeouts.gather <= now;
                let expected = self.config.workers_expected;
                let expected = self.ledger.workers_wanted.map_or(expected, |n| n.min(expected));
                let enough = available >= expected as usize
                    || (available >= self.config.workers_min as usize
                        && (patience_is_out || self.ledger.generation > Generation(0)));
                if enough {
                    self.open_generation(now, false, "enough workers are there");
                }
            }
            Phase::Training { suspicion: None } if self.unsettled => {
                self.unsettled = false;
                let wanted: BTreeSet<_> = self.next_members(true).into_iter().collect();
                let members: BTreeSet<_> = self.member_ids().into_iter().collect();
                let joining = wanted.difference(&members).next();
                let leaving = members.difference(&wanted).next();
                let reason = match (joining, leaving) {
                    (None, None) => return,
                    (Some(&worker), _) => format!("{} joins", self.name(worker)),
                    (None, Some(&worker)) => format!("{} leaves", self.name(worker)),
                };
                self.open_generation(now, true, &reason);
            }
            Phase::Training { .. } | Phase::Forming { .. } | Phase::Ended => {}
        }
    }

    /// How many would belong to a generation that is opened at once. Thousands of workers arrive one by
    /// one, so this is not found by ordering them.
    pub(super) fn available(&self) -> usize {
        let has_part = |worker| self.is_member(worker) || self.ledger.holds_state(worker);
        let workers = self.workers.iter();
        let can_take_part = |worker: &Worker| !worker.draining && !worker.preparing;
        let wanted = workers.filter(|(id, worker)| can_take_part(worker) || has_part(*id)).count();
        self.config.workers_taken(wanted, self.ledger.workers_wanted)
    }

    /// Who belongs to the next generation, oldest first.
    ///
    /// A worker that wants to leave stays until a planned change in which enough others stay and one
    /// of them holds the state too: otherwise the newest state would leave with it.
    pub(super) fn next_members(&self, planned: bool) -> Vec<WorkerId> {
        // Nobody waits for one that cannot form a generation yet.
        let workers = self.workers.oldest_first();
        let workers: Vec<_> = workers.into_iter().filter(|(_, w)| !w.preparing).collect();
        let holds = |worker: &WorkerId| self.ledger.holds_state(*worker);
        let has_part = |worker: &WorkerId| self.is_member(*worker) || holds(worker);
        let staying = || workers.iter().filter(|(_, worker)| !worker.draining);
        let can_let_go = planned
            && staying().count() >= self.config.workers_min as usize
            && staying().any(|(worker, _)| holds(worker));
        let wanted = workers.iter().filter(|(id, w)| !w.draining || (!can_let_go && has_part(id)));
        let mut wanted: Vec<_> = wanted.map(|(worker, _)| *worker).collect();
        let mut places = self.config.workers_taken(wanted.len(), self.ledger.workers_wanted);
        if !(planned && self.ledger.formed) {
            let bound = self.may_hold_the_newest(planned);
            let most = self.config.virtual_ranks as usize;
            wanted.sort_by_key(|worker| !bound.contains(worker));
            places = places.max(wanted.iter().filter(|w| bound.contains(w)).count()).min(most);
        }
        let spare = wanted.split_off(places);
        // Among so few there must be one that holds the state, as long as anybody does.
        let holder = spare.into_iter().find(holds).filter(|_| !wanted.iter().any(holds));
        if let (Some(holder), Some(last)) = (holder, wanted.last_mut()) {
            *last = holder;
        }
        wanted
    }

    /// Workers of which one may be the only one that holds the newest state, so that they are not let go
    /// before a generation stands: who of the members has applied the last step is not known for sure,
    /// and one that was given up and came back may hold more than those that went on without it.
    fn may_hold_the_newest(&self, planned: bool) -> BTreeSet<WorkerId> {
        let applied = |known: &Worker| known.progress.and_then(|progress| progress.applied);
        let best = self.workers.iter().filter_map(|(_, known)| applied(known)).max();
        let holds_best =
            |w: &WorkerId| best.is_some() && self.workers.find(*w).and_then(applied) == best;
        let mut bound: BTreeSet<_> = self.member_ids().into_iter().filter(holds_best).collect();
        if !planned {
            let ledger = &self.ledger;
            let is_last_known = ledger.intact.is_none();
            let in_step = if is_last_known { &ledger.members } else { &ledger.intact_members };
            bound.extend(in_step.iter().map(|member| member.worker));
        }
        bound
    }

    /// Opens the next generation with all that are there, or holds the survivors if they are too few.
    pub(super) fn open_generation(&mut self, now: Timestamp, planned: bool, reason: &str) {
        if matches!(self.phase, Phase::Ended) {
            return;
        }
        let is_known = |worker: &WorkerId| self.workers.find(*worker).is_some();
        let before: Vec<_> = self.member_ids().into_iter().filter(is_known).collect();
        let wanted = self.next_members(planned);
        self.finished.clear();
        if !planned {
            self.abandon(|_, saving| !saving.committing, "the generation that wrote it ended");
        }
        if wanted.len() < self.config.workers_min as usize {
            let generation = self.ledger.generation;
            for worker in before {
                self.send(worker, Order::Hold { generation });
            }
            self.phase = Phase::Gathering { since: now };
            return;
        }
        let blocks = balanced_blocks(
            self.config.virtual_ranks,
            u32::try_from(wanted.len()).expect("N <= V"),
        );
        let members = wanted.iter().zip(blocks).map(|(&worker, block)| {
            let known = self.workers.find(worker).expect("only known workers are wanted");
            Member { worker, name: known.name.clone(), address: known.address.clone(), block }
        });
        let members: Vec<_> = members.collect();
        let generation = self.ledger.generation.next();
        let reason = reason.to_owned();
        self.checkpoint_at = self.next_checkpoint(self.ledger.canonical);
        self.stopped.clear();
        self.opened = now;
        self.turned = !planned;
        self.record(Record::GenerationOpened { generation, members, planned, reason });
        let deadline = (!planned).then(|| now + self.form_allowance());
        self.phase = Phase::Forming { formed: BTreeMap::new(), blamed: BTreeMap::new(), deadline };
        let let_go: Vec<_> =
            before.iter().copied().filter(|&worker| !self.is_member(worker)).collect();
        for worker in let_go {
            // It leaves, so it is not taken again.
            self.workers.find_mut(worker).expect("it was a known member").draining = true;
        }
        let told: BTreeSet<_> = before.into_iter().chain(wanted).collect();
        let group = self.group();
        for worker in told {
            self.send(worker, Order::Form(group.clone()));
        }
    }

    /// Whether nobody is there in a worker's place: it is given up, or its session is closed.
    fn is_cut_off(&self, worker: WorkerId) -> bool {
        self.workers.find(worker).is_none_or(|known| !known.session)
    }

    fn cut_off_members(&self) -> Vec<WorkerId> {
        self.member_ids().into_iter().filter(|&worker| self.is_cut_off(worker)).collect()
    }
}
