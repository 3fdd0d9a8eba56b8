//! What must hold after every event, by name.

use std::{collections::BTreeSet, fmt};

use cluster::{Generation, Ledger, Order, Outcome, Part, Record, Step, Timestamp, WorkerId};

use crate::{
    plan::Plan,
    trainer::{Meeting, State},
    world::World,
};

/// A broken invariant.
#[derive(Debug, Clone)]
pub(crate) struct Violation {
    pub(crate) invariant: &'static str,
    pub(crate) found: String,
}

/// A seed that broke an invariant, and what led there.
#[derive(Debug, Clone)]
pub(crate) struct Failure {
    pub(crate) seed: u64,
    pub(crate) violation: Violation,
    pub(crate) story: Vec<String>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seed, violation: Violation { invariant, found }, story } = self;
        writeln!(f, "seed {seed} breaks {invariant}: {found}")?;
        story.iter().try_for_each(|line| writeln!(f, "  {line}"))?;
        write!(
            f,
            "again: PERCHERON_SIM_SEED={seed} cargo test --release -p cluster --test simulation chosen"
        )
    }
}

/// What the invariants need to remember.
pub(crate) struct Watch {
    pub(crate) seed: u64,
    pub(crate) violation: Option<Violation>,
    /// How often an invariant was looked at.
    pub(crate) checks: u64,
    pub(crate) looked_at: BTreeSet<&'static str>,
    /// The steps of each epoch whose samples were counted as seen.
    seen: BTreeSet<(u64, u64)>,
    steps_per_epoch: u64,
    /// The fold of the durable log.
    pub(crate) durable: Ledger,
    /// Workers whose death can be seen by those that try to reach them.
    pub(crate) seen_dead: BTreeSet<WorkerId>,
    is_gentle: bool,
    /// The state after each step, computed by nobody else.
    reference: Vec<u64>,
    /// Generations that all members formed, with these.
    formed: Vec<(Generation, Vec<WorkerId>)>,
    /// Workers that the newest generation let go though they lived, with the step that must survive:
    /// the one they held; after a planned change the one before, as they may be the only ones to have
    /// applied the last if the exchange breaks while they leave.
    let_go: Vec<(WorkerId, Step)>,
}

impl Watch {
    pub(crate) fn new(seed: u64, plan: &Plan) -> Self {
        let mut state = State::default();
        let mut reference = vec![state.hash];
        for _ in 0..plan.config.steps_total.0 {
            state = state.next();
            reference.push(state.hash);
        }
        Self {
            seed,
            violation: None,
            checks: 0,
            looked_at: BTreeSet::new(),
            seen: BTreeSet::new(),
            steps_per_epoch: plan.config.steps_per_epoch,
            durable: Ledger::default(),
            seen_dead: BTreeSet::new(),
            is_gentle: plan.is_gentle(),
            reference,
            formed: Vec::new(),
            let_go: Vec::new(),
        }
    }

    pub(crate) fn require(
        &mut self,
        invariant: &'static str,
        holds: bool,
        found: impl FnOnce() -> String,
    ) {
        self.checks += 1;
        self.looked_at.insert(invariant);
        if !holds && self.violation.is_none() {
            self.violation = Some(Violation { invariant, found: found() });
        }
    }

    fn reference(&self, step: Step) -> Option<u64> {
        self.reference.get(usize::try_from(step.0).expect("it is small")).copied()
    }

    pub(crate) fn a_step_has_one_result(&mut self, state: State) {
        let holds = self.reference(state.step) == Some(state.hash);
        self.require("a_step_has_one_result", holds, || format!("{state:?}"));
    }

    pub(crate) fn a_checkpoint_is_one_state(&mut self, step: Step, parts: &[Part]) -> u64 {
        let state = self.reference(step).unwrap_or_default();
        let digest = format!("{state:016x}");
        let indices: Vec<_> = parts.iter().map(|part| part.index).collect();
        let holds = parts.iter().all(|part| part.digest == digest) && indices == [0, 1, 2, 3];
        self.require("a_checkpoint_is_one_state", holds, || format!("{step}: {parts:?}"));
        state
    }

    /// The data of a step is a function of its number, so samples are seen as often as steps count.
    fn each_sample_is_seen_once_an_epoch(&mut self, step: Step) {
        let place = ((step.0 - 1) / self.steps_per_epoch, (step.0 - 1) % self.steps_per_epoch);
        let is_new = self.seen.insert(place);
        let (epoch, at) = place;
        let before = self.seen.range((epoch.saturating_sub(1), 0)..(epoch, 0)).count() as u64;
        let is_whole = at > 0 || epoch == 0 || before == self.steps_per_epoch;
        self.require("each_sample_is_seen_once_an_epoch", is_new && is_whole, || {
            format!("step {step} of epoch {epoch}, after {before} steps of the one before")
        });
    }

    /// Of all generations only the newest that stands, or one after it, may do a step that counts.
    fn one_generation_counts(&mut self, generation: Generation) {
        let newest = self.durable.intact;
        self.require("one_generation_counts", Some(generation) >= newest, || {
            format!("a step of generation {generation} counts though {newest:?} stands")
        });
    }

    pub(crate) fn no_committed_step_is_lost(&mut self, restored: &Ledger) {
        let (found, durable) = (restored.canonical, self.durable.canonical);
        self.require("no_committed_step_is_lost", found >= durable, || {
            format!("a new coordinator starts from step {found}, {durable} was committed")
        });
    }

    pub(crate) fn a_deadline_lies_ahead(&mut self, now: Timestamp, deadline: Option<Timestamp>) {
        let holds = deadline.is_none_or(|deadline| deadline > now);
        self.require("a_deadline_lies_ahead", holds, || format!("{deadline:?} at {now:?}"));
    }

    pub(crate) fn the_ledger_is_the_fold_of_the_log(&mut self, ledger: &Ledger) {
        let holds = *ledger == self.durable;
        let durable = self.durable.clone();
        self.require("the_ledger_is_the_fold_of_the_log", holds, || {
            format!("{ledger:?} is not {durable:?}")
        });
    }

    pub(crate) fn a_generation_is_durable_before_it_is_announced(&mut self, order: &Order) {
        let announced = match order {
            Order::Form(group) => group.generation,
            Order::CheckpointAt { generation, .. } | Order::Hold { generation } => *generation,
            Order::Welcome { .. }
            | Order::Refuse { .. }
            | Order::Finish { .. }
            | Order::Fail { .. } => return,
        };
        let durable = self.durable.generation;
        self.require(
            "a_generation_is_durable_before_it_is_announced",
            announced <= durable,
            || format!("{announced} is announced, {durable} is durable"),
        );
    }

    pub(crate) fn no_stale_report_changes_the_ledger(
        &mut self,
        holds: bool,
        worker: WorkerId,
        generation: Option<Generation>,
    ) {
        self.require("no_stale_report_changes_the_ledger", holds, || {
            format!("a report of {worker} in generation {generation:?} did")
        });
    }

    pub(crate) fn members_of_a_generation_do_the_same(
        &mut self,
        generation: Generation,
        theirs: Meeting,
        mine: Meeting,
    ) {
        self.require("members_of_a_generation_do_the_same", theirs == mine, || {
            format!("generation {generation} meets for {theirs:?} and for {mine:?}")
        });
    }

    /// Two generations that share a member never both train once the newer one stands.
    pub(crate) fn a_formed_generation_silences_older_ones(
        &mut self,
        generation: Generation,
        members: &[WorkerId],
    ) {
        let shares = |others: &Vec<WorkerId>| others.iter().any(|other| members.contains(other));
        let newer =
            self.formed.iter().find(|(formed, others)| *formed > generation && shares(others));
        let newer = newer.map(|(formed, _)| *formed);
        self.require("a_formed_generation_silences_older_ones", newer.is_none(), || {
            format!("generation {generation} trains on though {newer:?} stands")
        });
    }

    fn gentle_changes_lose_no_step(&mut self, record: &Record) {
        if let Record::GenerationFormed { repeated, .. } = record {
            let holds = *repeated == 0 || !self.is_gentle;
            self.require("gentle_changes_lose_no_step", holds, || format!("{record:?}"));
        }
    }
}

impl World {
    /// Looks at a record before it becomes durable.
    pub(crate) fn watch_record(&mut self, record: &Record) {
        self.watch.gentle_changes_lose_no_step(record);
        let durable = self.watch.durable.clone();
        let total = self.plan.config.steps_total;
        match record {
            Record::TermStarted { term } => {
                self.watch.require("terms_only_grow", *term > durable.term, || format!("{term}"));
            }
            Record::GenerationOpened { generation, members, planned, .. } => {
                let holds = *generation == durable.generation.next();
                self.watch.require("generations_only_grow", holds, || {
                    format!("{generation} after {}", durable.generation)
                });
                let stays = |worker| members.iter().any(|member| member.worker == worker);
                let known = durable.members.iter().map(|member| member.worker);
                let let_go = known.filter(|&w| !stays(w) && !durable.lost.contains(&w));
                let held = |w| self.workers.get(&w).and_then(|worker| worker.trainer.state);
                let owed = |state: State| Step(state.step.0.saturating_sub(u64::from(*planned)));
                let let_go = let_go.filter_map(|w| held(w).map(|state| (w, owed(state))));
                self.watch.let_go = let_go.collect();
            }
            Record::StepAdopted { step, generation, .. } => {
                self.watch.one_generation_counts(*generation);
                self.watch.each_sample_is_seen_once_an_epoch(*step);
                let holds = *step == durable.canonical.next();
                self.watch.require("canonical_steps_are_contiguous", holds, || {
                    format!("{step} after {}", durable.canonical)
                });
            }
            Record::RunFinished { step, state_sha256 } => {
                let reference = self.watch.reference(total).map(|hash| format!("{hash:016x}"));
                let holds = *step == total
                    && durable.canonical == total
                    && Some(state_sha256) == reference.as_ref()
                    && durable.checkpoints.last() == Some(&total)
                    && durable.evaluated == Some(total);
                self.watch.require("a_finished_run_is_the_undisturbed_one", holds, || {
                    format!("{record:?} with {durable:?}")
                });
            }
            Record::WorkerLost { worker, cause, .. } => {
                self.watch_loss(&durable, *worker, cause);
            }
            Record::RunFailed { reason } => {
                self.watch.require("no_run_fails", false, || reason.clone());
            }
            Record::RunCreated { .. }
            | Record::WorkerJoined { .. }
            | Record::FingerprintFixed { .. }
            | Record::WorkerRefused { .. }
            | Record::NodeMarked { .. }
            | Record::NodeReadmitted { .. }
            | Record::ExchangeLost { .. }
            | Record::GenerationFormed { .. }
            | Record::Evaluated { .. }
            | Record::CheckpointCommitted { .. }
            | Record::CheckpointAbandoned { .. }
            | Record::Resized { .. } => {}
        }
        let ended = durable.outcome.is_some();
        self.watch.durable.apply(record);
        let moved = self.watch.durable.canonical != durable.canonical
            || self.watch.durable.generation != durable.generation;
        self.watch
            .require("an_ended_run_stands_still", !(ended && moved), || format!("{record:?}"));
    }

    /// Looks at a loss before it becomes durable.
    fn watch_loss(&mut self, durable: &Ledger, worker: WorkerId, cause: &str) {
        // One that has no part yet may exit without a word.
        let has_part = durable.holds_state(worker);
        let lives = self.workers.get(&worker).is_some_and(|process| !process.is_exiting());
        let holds = !(has_part && lives && self.plan.is_calm());
        self.watch
            .require("nobody_who_lives_is_taken_for_dead", holds, || format!("{worker}: {cause}"));
        let process = self.workers.get(&worker);
        let hangs = process.is_none_or(|p| p.trainer.hangs || p.was_frozen);
        let holds = hangs || !cause.contains("made no progress");
        self.watch
            .require("only_the_stuck_are_called_stuck", holds, || format!("{worker}: {cause}"));
    }

    /// All members of a generation have compared what they hold.
    pub(crate) fn watch_formation(
        &mut self,
        generation: Generation,
        members: &[WorkerId],
        best: Option<State>,
    ) {
        let held = members.iter().filter_map(|w| {
            let state = self.workers.get(w).and_then(|worker| worker.trainer.state);
            state.map(|state| (*w, state.step))
        });
        let is_newest = generation == self.watch.durable.generation;
        let let_go = self.watch.let_go.iter().copied().filter(|_| is_newest);
        let step = best.map(|state| state.step);
        let lost = held.chain(let_go).find(|(_, held)| Some(*held) > step);
        self.watch.require("no_applied_step_is_lost", lost.is_none(), || {
            format!("generation {generation} resumes from {step:?}, but (worker, step): {lost:?}")
        });
        self.watch.formed.push((generation, members.to_vec()));
    }

    /// Looks at the world after each event.
    pub(crate) fn watch_over(&mut self) {
        let late = self.is_late();
        let phase = || {
            let coordinator = self.office.coordinator.as_ref();
            let phase = coordinator.map(|coordinator| format!("{:?}", coordinator.phase()));
            let doing = self.workers.iter().map(|(worker, process)| {
                format!("\n    {worker}: {:?}", process.participant.state())
            });
            format!("the coordinator: {phase:?}{}", doing.collect::<String>())
        };
        if late {
            let found = phase();
            let done = matches!(self.watch.durable.outcome, Some(Outcome::Finished { .. }));
            let name = if done { "every_worker_hears_of_the_end" } else { "every_run_finishes" };
            self.watch.require(name, false, || found);
        }
    }
}
