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

mod change;
mod results;
mod stuck;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use crate::{
    Command, Event, Generation, Group, Hello, Ledger, Membership, Order, Part, Record, Report,
    RunConfig, Step, StepMetrics, Term, Timestamp, WorkerId, progress::Pace,
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
    /// A step that is kept beside those of the plan: somebody asked, or it is time.
    keep_also: Option<Step>,
    /// Whether the state that all wait for who want to leave could not be kept.
    last_unkept: bool,
    /// Since when no checkpoint has been committed or named by the clock.
    unkept_since: Timestamp,
    finished: BTreeMap<WorkerId, String>,
    /// When the newest generation was opened, or found open by this coordinator.
    opened: Timestamp,
    /// Whether a member of the generation before has left it for the newest: then no step of it is
    /// lost by aborting it.
    turned: bool,
    /// Members that have said that they stopped in the newest generation.
    stopped: BTreeSet<WorkerId>,
    /// Since when members have failed to form a generation although all seem to be there.
    troubled_since: Option<Timestamp>,
    step_time: Option<Duration>,
    /// How often the states differed and nobody could tell whose was wrong.
    divergences: u32,
    /// How fast workers are, and from when on that is looked at again.
    pace: Pace,
    pace_checked_after: Timestamp,
    /// Whether something has changed that decides who belongs to the next generation.
    unsettled: bool,
    /// When it was last called: it asks to be called once a heartbeat, so a gap is its own sleep.
    called: Timestamp,
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
        /// When those that have not said so are lost. Not known while the generation before is still
        /// in a step.
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
        Self::restore_as(now, config, Term::default(), records)
    }

    /// As [`Coordinator::restore`], for the holder of the lease of the term `claimed`. Terms that were
    /// claimed by others and never led are recorded as well, so that terms stay without gaps.
    #[must_use]
    pub fn restore_as<'a>(
        now: Timestamp,
        config: RunConfig,
        claimed: Term,
        records: impl IntoIterator<Item = &'a Record>,
    ) -> Self {
        let mut ledger = Ledger::default();
        let mut is_new = true;
        for record in records {
            ledger.apply(record);
            is_new = false;
        }
        let mut workers = Membership::default();
        for member in ledger.members.iter().filter(|m| !ledger.lost.contains(&m.worker)) {
            workers.expect(now, member);
        }
        // Those that were on their way out may keep the others in their last common step.
        for member in &ledger.intact_members {
            if !ledger.members.iter().any(|other| other.worker == member.worker) {
                workers.expect(now, member);
                workers.find_mut(member.worker).expect("it is expected").draining = true;
            }
        }
        let phase = if ledger.outcome.is_some() {
            Phase::Ended
        } else if ledger.members.is_empty() || !ledger.lost.is_empty() {
            Phase::Gathering { since: now }
        } else if ledger.formed {
            Phase::Training { suspicion: None }
        } else {
            let deadline = Some(now + config.timeouts.form + config.timeouts.gather);
            Phase::Forming { formed: BTreeMap::new(), blamed: BTreeMap::new(), deadline }
        };
        let turned = ledger.intact.is_none() || ledger.formed;
        let first = ledger.term.next();
        let last = first.max(claimed);
        let mut coordinator = Self {
            config,
            ledger,
            workers,
            phase,
            saving: BTreeMap::new(),
            checkpoint_at: None,
            keep_also: None,
            // What the members have kept since was said to the coordinator before.
            last_unkept: true,
            unkept_since: now,
            finished: BTreeMap::new(),
            opened: now,
            turned,
            stopped: BTreeSet::new(),
            troubled_since: None,
            step_time: None,
            divergences: 0,
            pace: Pace::default(),
            pace_checked_after: now,
            unsettled: true,
            called: now,
            commands: Vec::new(),
        };
        coordinator.checkpoint_at = coordinator.next_checkpoint(coordinator.ledger.canonical);
        if is_new {
            let config = Box::new(coordinator.config.clone());
            coordinator.record(Record::RunCreated { config });
        }
        for term in (first.0..=last.0).map(Term) {
            coordinator.record(Record::TermStarted { term });
        }
        coordinator
    }

    /// Takes one event in. The host carries the commands out in order and calls again, with
    /// [`Event::DeadlineReached`], no later than [`Coordinator::next_deadline`] but after all that it
    /// has heard by then: what was said counts before what was not.
    ///
    /// Duplicate and stale input is not an error: it changes nothing.
    pub fn handle(&mut self, now: Timestamp, event: Event) -> Vec<Command> {
        self.forgive_own_sleep(now);
        self.called = now;
        // Who belongs to the next generation does not depend on a heartbeat.
        let is_beat = matches!(&event, Event::Reported { report: Report::Heartbeat(_), .. });
        match event {
            Event::WorkerJoined { worker, hello } => self.worker_joined(now, worker, &hello),
            Event::Reported { worker, report } => self.reported(now, worker, report),
            Event::SessionClosed { worker } => self.session_closed(now, worker),
            Event::ProcessExited { worker, how } => self.workers_lost(now, &[worker], &how),
            Event::DrainRequested { worker } => self.drain(worker),
            Event::ResizeRequested { workers } => self.resize(workers),
            Event::NodeReadmitted { node } => self.readmit(node),
            Event::CheckpointRequested => self.keep_soon(),
            Event::CheckpointCommitted { step } => self.checkpoint_committed(now, step),
            Event::CheckpointFailed { step, reason } => self.commit_failed(step, &reason),
            Event::DeadlineReached => self.deadlines_passed(now),
        }
        if !is_beat {
            self.reconsider_membership(now);
            self.keep_in_time(now);
        }
        std::mem::take(&mut self.commands)
    }

    /// When `handle` must be called again even if nothing happens.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Timestamp> {
        let phase = match &self.phase {
            Phase::Gathering { since } => {
                // With fewer workers than that, nothing happens at any time.
                let enough = self.available() >= self.config.workers_min as usize;
                enough.then(|| *since + self.config.timeouts.gather)
            }
            Phase::Forming { deadline, .. } => *deadline,
            Phase::Training { suspicion } => *suspicion,
            Phase::Ended => return None,
        };
        let lease = self.workers.next_expiry(self.config.timeouts.lease);
        let watch = lease.map(|_| self.called + self.config.timeouts.heartbeat);
        phase.into_iter().chain(lease).chain(watch).min()
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

    /// The next step whose state is to be kept; nothing if no step is left to make.
    #[must_use]
    pub fn next_kept(&self) -> Option<Step> {
        let is_on = self.ledger.outcome.is_none();
        self.checkpoint_at.filter(|step| is_on && *step > self.ledger.canonical)
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
        let fault = self.ledger.faulty.get(&hello.node);
        if let Some(fault) = fault.filter(|_| self.workers.find(worker).is_none()) {
            let node = &hello.node;
            let reason = format!(
                "machine {node} is marked as faulty ({fault}): repair it, then say `percheron readmit RUN_DIR {node}`"
            );
            return self.refuse(worker, &hello.name, &reason);
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
                known.node.clone_from(&hello.node);
                self.unsettled |= known.preparing && !hello.preparing;
                known.preparing &= hello.preparing;
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
        let is_leaving = self.workers.find(worker).is_some_and(|known| known.draining);
        let is_told = self.is_member(worker) || is_leaving;
        if !is_told || matches!(self.phase, Phase::Gathering { .. }) {
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
        self.close(worker);
    }

    // ---- Reports ---------------------------------------------------------------------------

    fn reported(&mut self, now: Timestamp, worker: WorkerId, report: Report) {
        let Some(known) = self.workers.find_mut(worker) else { return };
        known.heard = now;
        if matches!(self.phase, Phase::Ended) {
            return;
        }
        self.pace.said(worker, &report);
        match report {
            Report::Heartbeat(progress) => {
                known.progress = Some(progress);
                self.pace.beat(&self.config.timeouts, worker, progress);
                self.heard_progress(now, worker, progress);
            }
            Report::Ready => {
                known.preparing = false;
                self.unsettled = true;
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
                // What is committed can be trusted, whoever wrote it.
                let is_committed = self.ledger.checkpoints.binary_search(&step).is_ok();
                if self.is_current(generation) && !is_committed {
                    self.checkpoint_failed(step, &reason);
                }
            }
            Report::CheckpointDamaged { generation, step, reason } => {
                if generation == self.ledger.generation && self.is_member(worker) {
                    self.checkpoint_damaged(now, worker, step, &reason);
                }
            }
            Report::Diverged { generation, step, agreed, odd, reason } => {
                if generation == self.ledger.generation && self.is_member(worker) {
                    self.diverged(now, step, agreed, odd, &reason);
                }
            }
            Report::Finished { generation, step, state_sha256 } => {
                let is_last = step == self.config.steps_total;
                if is_last && generation == self.ledger.generation && self.is_member(worker) {
                    self.finished.insert(worker, state_sha256);
                    self.finish_if_complete(now);
                }
            }
            Report::Leaving { .. } => self.drain(worker),
            Report::NodeFaulty { reason } => self.node_faulty(now, worker, reason),
            Report::Failed { reason } => {
                let name = self.name(worker);
                self.fail(&format!("{name}: {reason}"));
            }
        }
    }

    // ---- Small questions -------------------------------------------------------------------

    fn group(&self) -> Group {
        Group {
            generation: self.ledger.generation,
            term: self.ledger.opened_in,
            members: self.ledger.members.clone().into(),
            planned: self.ledger.planned,
            checkpoint: self.ledger.checkpoint_offered,
            checkpoint_at: self.checkpoint_at,
            evaluated: self.ledger.evaluated_before,
            last: self.ledger.last,
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

    fn member_ids(&self) -> Vec<WorkerId> {
        self.ledger.members.iter().map(|member| member.worker).collect()
    }

    fn name(&self, worker: WorkerId) -> String {
        let member = || self.ledger.members.iter().find(|member| member.worker == worker);
        let known = self.workers.find(worker).map(|known| known.name.clone());
        known.or_else(|| member().map(|m| m.name.clone())).unwrap_or_else(|| worker.to_string())
    }

    fn record(&mut self, record: Record) {
        self.unsettled |= concerns_membership(&record);
        self.ledger.apply(&record);
        self.commands.push(Command::Append(record));
    }

    fn send(&mut self, worker: WorkerId, order: Order) {
        self.commands.push(Command::Send { worker, order });
    }

    fn close(&mut self, worker: WorkerId) {
        self.commands.push(Command::Close { worker });
    }

    /// The leadership under which this coordinator speaks.
    #[must_use]
    pub fn term(&self) -> Term {
        self.ledger.term
    }
}

/// Whether a record may change who belongs to the next generation. Of the others there are thousands.
fn concerns_membership(record: &Record) -> bool {
    match record {
        Record::RunCreated { .. }
        | Record::TermStarted { .. }
        | Record::WorkerJoined { .. }
        | Record::WorkerLost { .. }
        | Record::Resized { .. }
        | Record::GenerationOpened { .. }
        | Record::GenerationFormed { .. } => true,
        Record::FingerprintFixed { .. }
        | Record::WorkerRefused { .. }
        | Record::ExchangeLost { .. }
        | Record::NodeMarked { .. }
        | Record::NodeReadmitted { .. }
        | Record::StepAdopted { .. }
        | Record::Evaluated { .. }
        | Record::CheckpointCommitted { .. }
        | Record::CheckpointAbandoned { .. }
        | Record::RunFinished { .. }
        | Record::RunFailed { .. } => false,
    }
}
