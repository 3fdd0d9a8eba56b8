//! The coordinator: events in, commands out.
//!
//! ```text
//!             enough workers              all members formed
//!  Gathering ----------------> Forming ----------------------> Training ---> Ended
//!      ^                        |  ^                             |
//!      | too few are left       |  | a member is lost (at once)  |
//!      +------------------------+  | or one joins or leaves      |
//!      |                           | (after a common step)       |
//!      +---------------------------+-----------------------------+
//! ```

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use crate::{
    Command, Event, Generation, Group, Hello, Ledger, Member, Membership, Order, Outcome, Part,
    Rank, Record, Report, RunConfig, Share, Step, StepMetrics, Term, Timestamp, WorkerId,
    blocks::balanced_blocks,
};

/// Decides who trains with whom and from where. See [`Coordinator::handle`].
#[derive(Debug, Clone, PartialEq)]
pub struct Coordinator {
    config: RunConfig,
    ledger: Ledger,
    workers: Membership,
    phase: Phase,
    saving: BTreeMap<Step, Saving>,
    checkpoint_at: Option<Step>,
    finished: BTreeMap<WorkerId, String>,
    step_time: Option<Duration>,
    commands: Vec<Command>,
}

/// What the coordinator waits for.
#[derive(Debug, Clone, PartialEq)]
pub enum Phase {
    /// Workers, to open a generation with.
    Gathering {
        /// When it began.
        since: Timestamp,
    },
    /// The members of the newest generation, to say that they hold the same state.
    Forming {
        /// Who has said so.
        formed: BTreeMap<WorkerId, Formed>,
        /// Whom members could not reach, with how often.
        blamed: BTreeMap<WorkerId, u32>,
        /// When those that have not said so are lost. Not yet known while the generation before is
        /// still in a step.
        deadline: Option<Timestamp>,
    },
    /// Nothing: the generation trains.
    Training {
        /// If an exchange broke and nobody is known to be dead: when to go on with all that are left.
        suspicion: Option<Timestamp>,
    },
    /// Nothing more.
    Ended,
}

/// What a member said when it had formed the generation.
#[derive(Debug, Clone, PartialEq)]
pub struct Formed {
    step: Step,
    digest: String,
    begun: Step,
    stopped_at: Option<Timestamp>,
    metrics: Option<StepMetrics>,
}

/// A checkpoint on its way: the parts that are in the store.
#[derive(Debug, Clone, PartialEq)]
struct Saving {
    generation: Generation,
    parts: BTreeMap<u32, Part>,
    committing: bool,
}

impl Coordinator {
    /// A run that has no record yet, or the run that `records` tell of, under a new term.
    ///
    /// The first commands make the new term durable; they are returned by the first `handle`.
    #[must_use]
    pub fn restore<'a>(
        now: Timestamp,
        config: RunConfig,
        records: impl IntoIterator<Item = &'a Record>,
    ) -> Self {
        let mut ledger = Ledger::default();
        let mut is_new = true;
        for record in records {
            ledger.apply(record);
            is_new = false;
        }
        let mut workers = Membership::default();
        for member in &ledger.members {
            workers.expect(now, member);
        }
        let phase = if ledger.outcome.is_some() {
            Phase::Ended
        } else if ledger.members.is_empty() {
            Phase::Gathering { since: now }
        } else if ledger.formed {
            Phase::Training { suspicion: None }
        } else {
            let deadline = Some(now + config.timeouts.form + config.timeouts.gather);
            Phase::Forming { formed: BTreeMap::new(), blamed: BTreeMap::new(), deadline }
        };
        let term = ledger.term.next();
        let mut coordinator = Self {
            config,
            ledger,
            workers,
            phase,
            saving: BTreeMap::new(),
            checkpoint_at: None,
            finished: BTreeMap::new(),
            step_time: None,
            commands: Vec::new(),
        };
        coordinator.checkpoint_at = coordinator.next_checkpoint(coordinator.ledger.canonical);
        if is_new {
            let config = Box::new(coordinator.config.clone());
            coordinator.record(Record::RunCreated { config });
        }
        coordinator.record(Record::TermStarted { term });
        coordinator
    }

    /// Takes one event in. The host carries the commands out in order and calls again, with
    /// [`Event::DeadlineReached`], no later than [`Coordinator::next_deadline`].
    ///
    /// Duplicate and stale input is not an error: it changes nothing.
    pub fn handle(&mut self, now: Timestamp, event: Event) -> Vec<Command> {
        self.forgive_own_sleep(now);
        match event {
            Event::WorkerJoined { worker, hello } => self.worker_joined(now, worker, &hello),
            Event::Reported { worker, report } => self.reported(now, worker, report),
            Event::SessionClosed { worker } => self.session_closed(now, worker),
            Event::ProcessExited { worker, how } => self.workers_lost(now, &[worker], &how),
            Event::DrainRequested { worker } => self.drain(worker),
            Event::CheckpointCommitted { step } => self.checkpoint_committed(step),
            Event::CheckpointFailed { step, reason } => self.checkpoint_failed(step, &reason),
            Event::DeadlineReached => {}
        }
        self.deadlines_passed(now);
        self.reconsider_membership(now);
        std::mem::take(&mut self.commands)
    }

    /// When `handle` must be called again even if nothing happens.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Timestamp> {
        let phase = match &self.phase {
            Phase::Gathering { since } => {
                let waits = !self.workers.eligible().is_empty();
                waits.then(|| *since + self.config.timeouts.gather)
            }
            Phase::Forming { deadline, .. } => *deadline,
            Phase::Training { suspicion } => *suspicion,
            Phase::Ended => return None,
        };
        let lease = self.workers.next_expiry(self.config.timeouts.lease);
        phase.into_iter().chain(lease).min()
    }

    /// What was decided and is durable once the commands have been carried out.
    #[must_use]
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// What it waits for.
    #[must_use]
    pub fn phase(&self) -> &Phase {
        &self.phase
    }

    /// The workers it believes alive.
    #[must_use]
    pub fn workers(&self) -> &Membership {
        &self.workers
    }

    /// The plan it was made with.
    #[must_use]
    pub fn config(&self) -> &RunConfig {
        &self.config
    }

    // ---- Workers come and go ---------------------------------------------------------------

    fn worker_joined(&mut self, now: Timestamp, worker: WorkerId, hello: &Hello) {
        let run = self.ledger.fingerprint.as_ref();
        if let Some(mismatch) = run.and_then(|run| run.admits(&hello.fingerprint).err()) {
            return self.refuse(worker, &hello.name, &mismatch.to_string());
        }
        if let Some(outcome) = self.ledger.outcome.clone() {
            self.send(worker, Order::Welcome { term: self.ledger.term });
            return self.tell_outcome(worker, &outcome);
        }
        if self.ledger.fingerprint.is_none() {
            let fingerprint = hello.fingerprint.clone();
            self.record(Record::FingerprintFixed { fingerprint });
        }
        self.send(worker, Order::Welcome { term: self.ledger.term });
        match self.workers.find_mut(worker) {
            Some(known) => {
                known.session = true;
                known.heard = now;
                self.catch_up(worker, hello);
            }
            None => {
                self.workers.arrive(now, worker, hello);
                let (name, address) = (hello.name.clone(), hello.address.clone());
                self.record(Record::WorkerJoined { worker, name, address });
            }
        }
    }

    /// Tells a worker that comes back what it may have missed.
    fn catch_up(&mut self, worker: WorkerId, hello: &Hello) {
        if !self.is_member(worker) {
            return;
        }
        if hello.generation < Some(self.ledger.generation) {
            self.send(worker, Order::Form(self.group()));
        } else if let Some(step) = self.checkpoint_at {
            let generation = self.ledger.generation;
            self.send(worker, Order::CheckpointAt { generation, step });
        }
    }

    fn refuse(&mut self, worker: WorkerId, name: &str, reason: &str) {
        let (name, reason) = (name.to_owned(), reason.to_owned());
        self.record(Record::WorkerRefused { worker, name, reason: reason.clone() });
        self.send(worker, Order::Refuse { reason });
        self.commands.push(Command::Close { worker });
    }

    /// The session alone is not the worker: it may come back before its lease is out, unless its
    /// peers have lost it as well.
    fn session_closed(&mut self, now: Timestamp, worker: WorkerId) {
        let Some(known) = self.workers.find_mut(worker) else { return };
        known.session = false;
        let suspected = matches!(self.phase, Phase::Training { suspicion: Some(_) });
        let left = known.draining;
        if !self.is_member(worker) {
            let cause =
                if left { "it left as asked" } else { "its session closed while it stood by" };
            self.workers_lost(now, &[worker], cause);
        } else if suspected {
            self.workers_lost(now, &[worker], "its peers lost it and its session closed");
        }
    }

    /// A worker is gone: an exit, a silent lease, and a peer's report all end here.
    ///
    /// If a member of the running generation is gone, its survivors get a new generation at once, so
    /// that a late message of the lost worker carries an old one and is refused.
    fn workers_lost(&mut self, now: Timestamp, lost: &[WorkerId], cause: &str) {
        let mut names = Vec::new();
        let mut only_newcomers = true;
        for &worker in lost {
            let Some(known) = self.workers.remove(worker) else {
                continue; // Its lease, its supervisor and its peers all report the same death.
            };
            let name = known.name.clone();
            self.record(Record::WorkerLost { worker, name, cause: cause.to_owned() });
            let reason = format!("the run went on without this worker: {cause}");
            self.send(worker, Order::Refuse { reason });
            self.commands.push(Command::Close { worker });
            if self.is_member(worker) {
                only_newcomers &= known.progress.is_none_or(|progress| progress.applied.is_none());
                names.push(known.name);
            }
        }
        if !names.is_empty() {
            // A newcomer that dies before the others have left for it costs them nothing.
            let nobody_waits = matches!(self.phase, Phase::Forming { deadline: None, .. });
            let planned = nobody_waits && only_newcomers;
            self.open_generation(now, planned, &format!("{} was lost", names.join(", ")));
        }
    }

    fn drain(&mut self, worker: WorkerId) {
        if let Some(known) = self.workers.find_mut(worker) {
            known.draining = true;
        }
    }

    // ---- Reports ---------------------------------------------------------------------------

    fn reported(&mut self, now: Timestamp, worker: WorkerId, report: Report) {
        let Some(known) = self.workers.find_mut(worker) else { return };
        known.heard = now;
        match report {
            Report::Heartbeat(progress) => {
                known.progress = Some(progress);
                if progress.generation == self.ledger.generation {
                    self.start_form_deadline(now);
                }
            }
            Report::Formed { generation, step, digest, begun, stopped_at, metrics } => {
                let said = Formed { step, digest, begun, stopped_at, metrics };
                self.formed(now, worker, generation, said);
            }
            Report::FormFailed { generation, peer, reason } => {
                self.form_failed(now, worker, generation, peer, &reason);
            }
            Report::ExchangeLost { generation, peer, reason, at, .. } => {
                self.exchange_lost(now, worker, generation, peer, reason, at);
            }
            Report::StepApplied { generation, step, metrics, at } => {
                if self.is_current(generation) {
                    self.step_time = Duration::try_from_secs_f32(metrics.step_ms / 1e3).ok();
                    self.adopt(generation, step, Some(metrics), Some(at));
                }
            }
            Report::Evaluated { generation, evaluation } => {
                let is_news = self.ledger.evaluated < Some(evaluation.step);
                if self.is_current(generation) && is_news {
                    self.record(Record::Evaluated { generation, evaluation });
                }
            }
            Report::ShareWritten { generation, share } => self.share_written(generation, share),
            Report::ShareFailed { generation, step, reason } => {
                if self.saving.get(&step).is_none_or(|saving| saving.generation == generation) {
                    self.checkpoint_failed(step, &reason);
                }
            }
            Report::Finished { generation, step, state_sha256 } => {
                let is_last = step == self.config.steps_total;
                if is_last && generation == self.ledger.generation && self.is_member(worker) {
                    self.finished.insert(worker, state_sha256);
                    self.finish_if_complete();
                }
            }
            Report::Leaving { .. } => self.drain(worker),
            Report::Failed { reason } => {
                let name = self.name(worker);
                self.fail(&format!("{name}: {reason}"));
            }
        }
    }

    fn formed(&mut self, now: Timestamp, worker: WorkerId, generation: Generation, said: Formed) {
        if generation != self.ledger.generation || !self.is_member(worker) {
            return;
        }
        self.start_form_deadline(now);
        let Phase::Forming { formed, .. } = &mut self.phase else { return };
        formed.insert(worker, said);
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
        let repeated = begun.max(self.ledger.canonical).0.saturating_sub(step.0);
        let stopped_at = formed.values().filter_map(|f| f.stopped_at).max();
        self.record(Record::GenerationFormed { generation, step, digest, repeated, stopped_at });
        let metrics = formed.values().find_map(|f| f.metrics);
        self.adopt(generation, step, metrics, None);
        self.phase = Phase::Training { suspicion: None };
    }

    fn form_failed(
        &mut self,
        now: Timestamp,
        worker: WorkerId,
        generation: Generation,
        peer: Option<Rank>,
        reason: &str,
    ) {
        if generation != self.ledger.generation || !self.is_member(worker) {
            return;
        }
        let Phase::Forming { blamed, .. } = &mut self.phase else { return };
        if let Some(peer) = peer.and_then(|rank| self.ledger.members.get(rank.0 as usize)) {
            *blamed.entry(peer.worker).or_default() += 1;
        }
        let blamed: Vec<_> = blamed.keys().copied().collect();
        self.start_form_deadline(now);
        let gone: Vec<_> = blamed.into_iter().filter(|&suspect| self.is_cut_off(suspect)).collect();
        self.workers_lost(now, &gone, &format!("its peers could not reach it: {reason}"));
    }

    fn exchange_lost(
        &mut self,
        now: Timestamp,
        worker: WorkerId,
        generation: Generation,
        peer: Option<Rank>,
        reason: String,
        stopped_at: Timestamp,
    ) {
        if generation != self.ledger.generation || !self.is_member(worker) {
            return; // The news that ended it came first.
        }
        let peer = peer.and_then(|rank| self.ledger.members.get(rank.0 as usize)).cloned();
        let blamed = peer.as_ref().map(|peer| peer.name.clone());
        self.record(Record::ExchangeLost { worker, generation, peer: blamed, reason, stopped_at });
        let Phase::Training { suspicion } = &mut self.phase else { return };
        suspicion.get_or_insert(now + self.config.timeouts.suspicion);
        if let Some(peer) = peer
            && self.is_cut_off(peer.worker)
        {
            self.workers_lost(now, &[peer.worker], "its peers lost it and its session is closed");
        }
    }

    /// Takes the results up to `step` as the run's. Figures are known for the last of them only.
    fn adopt(
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

    fn next_checkpoint(&self, from: Step) -> Option<Step> {
        let mut step = self.config.next_checkpoint(from)?;
        while self.ledger.checkpoints.binary_search(&step).is_ok() {
            step = self.config.next_checkpoint(step.next())?;
        }
        Some(step)
    }

    fn share_written(&mut self, generation: Generation, share: Share) {
        let committed = self.ledger.checkpoints.binary_search(&share.step).is_ok();
        if committed || !self.is_current(generation) {
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

    fn checkpoint_committed(&mut self, step: Step) {
        if self.ledger.checkpoints.binary_search(&step).is_ok() {
            return;
        }
        self.record(Record::CheckpointCommitted { step });
        self.saving.remove(&step);
        self.abandon(|older| older < step, "a newer one was complete first");
        self.finish_if_complete();
    }

    fn checkpoint_failed(&mut self, step: Step, reason: &str) {
        self.saving.remove(&step);
        self.record(Record::CheckpointAbandoned { step, reason: reason.to_owned() });
        if step == self.config.steps_total {
            self.fail(&format!("the final checkpoint could not be written: {reason}"));
        }
    }

    fn abandon(&mut self, which: impl Fn(Step) -> bool, reason: &str) {
        let given_up: Vec<_> = self.saving.keys().copied().filter(|&step| which(step)).collect();
        for step in given_up {
            self.saving.remove(&step);
            self.record(Record::CheckpointAbandoned { step, reason: reason.to_owned() });
        }
    }

    // ---- The end ---------------------------------------------------------------------------

    fn finish_if_complete(&mut self) {
        let step = self.config.steps_total;
        let kept = self.ledger.checkpoints.binary_search(&step).is_ok();
        let all_said = self.finished.len() == self.ledger.members.len();
        if !kept || !all_said || self.ledger.outcome.is_some() {
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

    fn fail(&mut self, reason: &str) {
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

    fn tell_outcome(&mut self, worker: WorkerId, outcome: &Outcome) {
        let order = match outcome.clone() {
            Outcome::Finished { step, state_sha256 } => Order::Finish { step, state_sha256 },
            Outcome::Failed { reason } => Order::Fail { reason },
        };
        self.send(worker, order);
    }

    // ---- Time and membership ---------------------------------------------------------------

    fn deadlines_passed(&mut self, now: Timestamp) {
        if matches!(self.phase, Phase::Ended) {
            return;
        }
        let lease = self.config.timeouts.lease;
        let silent = self.workers.expired(now, lease);
        self.workers_lost(now, &silent, &format!("it said nothing for {lease:?}"));
        match &self.phase {
            Phase::Forming { deadline: Some(deadline), formed, blamed } if *deadline <= now => {
                let late = self.late_members(formed, blamed);
                if late.is_empty() {
                    self.open_generation(now, false, "the generation could not be formed in time");
                }
                self.workers_lost(now, &late, "it did not form the generation in time");
            }
            Phase::Training { suspicion: Some(deadline) } if *deadline <= now => {
                let members = self.member_ids().into_iter();
                let gone: Vec<_> = members.filter(|&worker| self.is_cut_off(worker)).collect();
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
    }

    /// A coordinator that was called later than it asked to be was not running, and heard nobody.
    fn forgive_own_sleep(&mut self, now: Timestamp) {
        if let Some(deadline) = self.next_deadline() {
            let lag = now.since(deadline);
            if lag > self.config.timeouts.suspicion {
                self.workers.forgive(lag);
            }
        }
    }

    /// Whom to go on without when a generation is not formed in time: those that did not form it if
    /// some did, otherwise whom most could not reach.
    fn late_members(
        &self,
        formed: &BTreeMap<WorkerId, Formed>,
        blamed: &BTreeMap<WorkerId, u32>,
    ) -> Vec<WorkerId> {
        if formed.is_empty() {
            let most = blamed.iter().max_by_key(|&(worker, count)| (*count, *worker));
            return most.map(|(&worker, _)| worker).into_iter().collect();
        }
        self.member_ids().into_iter().filter(|worker| !formed.contains_key(worker)).collect()
    }

    /// Opens a generation when the one that should be differs from the one that is.
    fn reconsider_membership(&mut self, now: Timestamp) {
        match &self.phase {
            Phase::Gathering { since } => {
                let available = self.workers.eligible().len();
                let patience_is_out = *since + self.config.timeouts.gather <= now;
                let enough = available >= self.config.workers_expected as usize
                    || (available >= self.config.workers_min as usize
                        && (patience_is_out || self.ledger.generation > Generation(0)));
                if enough && available > 0 {
                    self.open_generation(now, false, "enough workers are there");
                }
            }
            Phase::Training { suspicion: None } => {
                let wanted = self.next_members();
                let members: BTreeSet<_> = self.member_ids().into_iter().collect();
                let joining: Vec<_> = wanted.iter().filter(|w| !members.contains(w)).collect();
                let leaving: Vec<_> = members.iter().filter(|w| !wanted.contains(w)).collect();
                let reason = match (joining.first(), leaving.first()) {
                    (None, None) => return,
                    (Some(&&worker), _) => format!("{} joins", self.name(worker)),
                    (None, Some(&&worker)) => format!("{} leaves", self.name(worker)),
                };
                if wanted.len() >= self.config.workers_min as usize {
                    self.open_generation(now, true, &reason);
                }
            }
            Phase::Training { suspicion: Some(_) } | Phase::Forming { .. } | Phase::Ended => {}
        }
    }

    fn next_members(&self) -> Vec<WorkerId> {
        let mut eligible = self.workers.eligible();
        eligible.truncate(self.config.workers_taken(eligible.len()));
        eligible
    }

    /// Opens the next generation with all that are there, or holds the survivors if they are too few.
    fn open_generation(&mut self, now: Timestamp, planned: bool, reason: &str) {
        if matches!(self.phase, Phase::Ended) {
            return;
        }
        let before = self.member_ids();
        let wanted = self.next_members();
        self.finished.clear();
        if !planned {
            self.abandon(|_| true, "the generation that wrote it ended");
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
            let known = self.workers.find(worker).expect("only known workers are eligible");
            Member { worker, name: known.name.clone(), address: known.address.clone(), block }
        });
        let members: Vec<_> = members.collect();
        let generation = self.ledger.generation.next();
        let reason = reason.to_owned();
        self.checkpoint_at = self.next_checkpoint(self.ledger.canonical);
        self.record(Record::GenerationOpened { generation, members, planned, reason });
        let deadline = (!planned).then(|| now + self.form_allowance());
        self.phase = Phase::Forming { formed: BTreeMap::new(), blamed: BTreeMap::new(), deadline };
        let told: BTreeSet<_> = before.into_iter().chain(wanted).collect();
        for worker in told {
            self.send(worker, Order::Form(self.group()));
        }
    }

    /// A member has turned to the new generation, so from now on the others are waited for.
    fn start_form_deadline(&mut self, now: Timestamp) {
        let allowance = self.form_allowance();
        if let Phase::Forming { deadline: deadline @ None, .. } = &mut self.phase {
            *deadline = Some(now + allowance);
        }
    }

    /// How long forming may take: a worker turns to it only between two micro-batches.
    fn form_allowance(&self) -> Duration {
        let step = self.step_time.unwrap_or(self.config.timeouts.gather);
        self.config.timeouts.form + step * 2
    }

    // ---- Small questions -------------------------------------------------------------------

    fn group(&self) -> Group {
        Group {
            generation: self.ledger.generation,
            members: self.ledger.members.clone(),
            planned: self.ledger.planned,
            checkpoint: self.ledger.checkpoints.last().copied(),
            checkpoint_at: self.checkpoint_at,
            evaluated: self.ledger.evaluated,
        }
    }

    /// Whether results of `generation` still count: those of the newest, and of the intact one before
    /// it as long as its members have not left it.
    fn is_current(&self, generation: Generation) -> bool {
        generation == self.ledger.generation || Some(generation) == self.ledger.intact
    }

    fn is_member(&self, worker: WorkerId) -> bool {
        self.ledger.members.iter().any(|member| member.worker == worker)
    }

    fn is_cut_off(&self, worker: WorkerId) -> bool {
        self.workers.find(worker).is_none_or(|known| !known.session)
    }

    fn member_ids(&self) -> Vec<WorkerId> {
        self.ledger.members.iter().map(|member| member.worker).collect()
    }

    fn name(&self, worker: WorkerId) -> String {
        let member = || self.ledger.members.iter().find(|member| member.worker == worker);
        let known = self.workers.find(worker).map(|known| known.name.clone());
        known.or_else(|| member().map(|m| m.name.clone())).unwrap_or_else(|| worker.to_string())
    }

    fn record(&mut self, record: Record) {
        self.ledger.apply(&record);
        self.commands.push(Command::Append(record));
    }

    fn send(&mut self, worker: WorkerId, order: Order) {
        self.commands.push(Command::Send { worker, order });
    }

    /// The leadership under which this coordinator speaks.
    #[must_use]
    pub fn term(&self) -> Term {
        self.ledger.term
    }
}
