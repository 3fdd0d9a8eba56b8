//! The trainers, modelled: a state is a step and a hash chain of steps, and a generation meets for
//! its formation, each sum and each evaluation. A meeting succeeds only if all members reach it, but
//! a member may still lose what the others got.

use std::collections::BTreeSet;

use cluster::{
    Action, Epoch, Evaluation, ExitScores, Generation, Group, Notice, Part, Rank, Share, Step,
    StepMetrics, StepPhase, Timestamp, WorkerId,
};

use crate::{
    chance::mix,
    host::Inside,
    plan::Fault,
    tamper::Tamper,
    world::{Happening, World},
};

/// Parts of a checkpoint, whatever the number of workers.
const PARTS: u32 = 4;

/// What a worker holds: the optimizer's state after a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(crate) struct State {
    pub(crate) step: Step,
    pub(crate) hash: u64,
}

impl State {
    pub(crate) fn next(self) -> Self {
        Self { step: self.step.next(), hash: mix(self.hash ^ mix(self.step.0 + 1)) }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Doing {
    #[default]
    Idle,
    Forming,
    Computing,
    Summing,
    Updating,
    Evaluating,
    /// The last step is done; its share is on its way.
    Ending,
}

#[derive(Default)]
pub(crate) struct Trainer {
    pub(crate) state: Option<State>,
    doing: Doing,
    group: Option<Group>,
    rank: Rank,
    /// Grows whenever the trainer turns to something else, so that old timers mean nothing.
    token: u64,
    begun: Step,
    stopped_at: Option<Timestamp>,
    /// States to keep.
    keep: BTreeSet<Step>,
    uploading: BTreeSet<(Generation, Step)>,
    leave_asked: bool,
    leaves: bool,
    /// What waits for the end of the optimizer update, which nothing interrupts.
    queued: Vec<Action>,
    /// It does nothing any more.
    pub(crate) hangs: bool,
    pub(crate) slow_until: Timestamp,
    /// The token of what it does, and since when.
    noted: (u64, Timestamp),
}

/// A piece of a trainer's work.
#[derive(Debug, Clone)]
pub(crate) enum Work {
    Reached,
    Formed(State),
    /// Members have not come to the formation in time.
    Waited,
    Computed,
    Summed {
        leaves: bool,
    },
    Evaluated,
    Updated,
    Lost(Option<Rank>),
    Uploaded {
        generation: Generation,
        step: Step,
        outcome: Result<Share, String>,
    },
}

/// What the members of a generation come together for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Meeting {
    Form,
    Sum(Step),
    Evaluate(Step),
}

/// The connections between the members of a generation.
pub(crate) struct Mesh {
    pub(crate) members: Vec<WorkerId>,
    arrived: BTreeSet<WorkerId>,
    meeting: Meeting,
    /// Members whose connections are seen to be closed.
    gone: BTreeSet<WorkerId>,
    /// A connection that broke by itself.
    torn: Option<(WorkerId, WorkerId)>,
}

impl Trainer {
    pub(crate) fn phase(&self) -> StepPhase {
        match self.doing {
            Doing::Idle | Doing::Ending => StepPhase::Idle,
            Doing::Forming => StepPhase::Form,
            Doing::Computing => StepPhase::Compute,
            Doing::Summing => StepPhase::Reduce,
            Doing::Updating => StepPhase::Update,
            Doing::Evaluating => StepPhase::Evaluate,
        }
    }

    /// Since when it does what it does.
    pub(crate) fn phase_since(&self) -> Timestamp {
        self.noted.1
    }

    pub(crate) fn note_phase(&mut self, now: Timestamp) {
        if self.noted.0 != self.token {
            self.noted = (self.token, now);
        }
    }

    fn turn_to(&mut self, doing: Doing) -> u64 {
        self.doing = doing;
        self.token += 1;
        self.token
    }

    pub(crate) fn stop(&mut self) {
        self.turn_to(Doing::Idle);
        self.queued.clear();
    }

    fn generation(&self) -> Option<Generation> {
        self.group.as_ref().map(|group| group.generation)
    }
}

impl World {
    fn trainer(&mut self, worker: WorkerId) -> &mut Trainer {
        &mut self.process(worker).trainer
    }

    /// The agent asks the trainer for something.
    pub(crate) fn acted(&mut self, worker: WorkerId, action: Action) {
        let caught = self.quiet.is_none() && self.chance.percent(5);
        let tamper = self.tamper;
        if self.process(worker).is_exiting() || self.trainer(worker).hangs {
            return;
        }
        let trainer = self.trainer(worker);
        if trainer.doing == Doing::Updating {
            let aborts = matches!(action, Action::Abort { generation }
                if trainer.generation() == Some(generation));
            if aborts && caught {
                trainer.state = None; // Half an update is no state.
                self.stopped(worker);
                return;
            }
            trainer.queued.push(action);
            return;
        }
        match action {
            Action::Form { group, rank } => self.form(worker, group, rank),
            Action::Abort { generation } => {
                if trainer.generation() == Some(generation) {
                    self.stopped(worker);
                }
            }
            Action::LeaveAfterStep { generation } => {
                if tamper == Tamper::LeavesAtOnce {
                    return self.lost(worker, None);
                }
                trainer.leave_asked |= trainer.generation() == Some(generation);
            }
            Action::CheckpointAt { step } => {
                trainer.keep.insert(step);
            }
            Action::Report(_) | Action::Exit(_) => unreachable!("they are the agent's"),
        }
    }

    fn form(&mut self, worker: WorkerId, group: Group, rank: Rank) {
        self.leave_mesh(worker, true);
        let trainer = self.trainer(worker);
        trainer.keep.extend(group.checkpoint_at);
        trainer.group = Some(group);
        trainer.rank = rank;
        (trainer.leave_asked, trainer.leaves) = (false, false);
        trainer.turn_to(Doing::Forming);
        let slow = self.chance.percent(10);
        let delay = self.chance.between(if slow { 20..=500 } else { 1..=20 });
        self.work(worker, delay, Work::Reached);
    }

    fn work(&mut self, worker: WorkerId, delay: u64, work: Work) {
        let token = self.trainer(worker).token;
        self.after(delay, Happening::Inside { worker, what: Inside::Worked { token, work } });
    }

    pub(crate) fn worked(&mut self, worker: WorkerId, token: u64, work: Work) {
        let trainer = self.trainer(worker);
        if let Work::Uploaded { generation, step, outcome } = work {
            trainer.uploading.remove(&(generation, step));
            self.notify(worker, Notice::ShareSaved { generation, step, outcome });
            return self.end_if_done(worker);
        }
        if token != trainer.token || trainer.hangs {
            return;
        }
        let state = trainer.state.unwrap_or_default();
        match work {
            Work::Reached => self.arrive(worker, Meeting::Form),
            Work::Formed(state) => self.formed(worker, state),
            Work::Waited => self.waited(worker),
            Work::Computed => {
                trainer.turn_to(Doing::Summing);
                self.arrive(worker, Meeting::Sum(state.step.next()));
            }
            Work::Summed { leaves } => {
                trainer.leaves = leaves;
                trainer.turn_to(Doing::Updating);
                let delay = self.chance.between(1..=self.plan.step_ms.div_ceil(5));
                self.work(worker, delay, Work::Updated);
            }
            Work::Updated => self.updated(worker),
            Work::Evaluated => {
                let generation = trainer.generation().expect("it evaluates in a generation");
                let evaluation = self.evaluation(state.step);
                self.notify(worker, Notice::Evaluated { generation, evaluation });
                self.go_on(worker);
            }
            Work::Lost(peer) => self.lost(worker, peer),
            Work::Uploaded { .. } => unreachable!("it was taken out above"),
        }
    }

    fn formed(&mut self, worker: WorkerId, state: State) {
        let metrics = self.metrics(state.step);
        let is_wrong = self.tamper == Tamper::FormsWrongly && self.chance.percent(10);
        let wrong = u64::from(is_wrong);
        let trainer = self.trainer(worker);
        let generation = trainer.generation().expect("it forms a generation");
        let took_part = trainer.state == Some(state) && state.step > Step(0);
        let notice = Notice::Formed {
            generation,
            step: state.step,
            digest: format!("{:016x}", state.hash ^ wrong),
            begun: trainer.begun,
            stopped_at: trainer.stopped_at.take(),
            metrics: took_part.then_some(metrics),
        };
        trainer.state = Some(state);
        trainer.begun = state.step;
        self.watch.a_step_has_one_result(state);
        self.notify(worker, notice);
        if self.tamper == Tamper::KeepsTraining {
            self.meet_in_the_old_generation(worker, generation);
        }
        let group = self.trainer(worker).group.clone().expect("it forms a generation");
        if group.checkpoint_at == Some(state.step) {
            self.upload(worker);
        }
        if group.last && state.step < self.plan.config.steps_total {
            if state.step > Step(0) && group.checkpoint != Some(state.step) {
                self.upload(worker);
            }
            self.trainer(worker).turn_to(Doing::Idle);
            return;
        }
        let is_due = self.plan.config.evaluates_at(state.step);
        if is_due && group.evaluated < Some(state.step) {
            self.evaluate(worker);
        } else {
            self.go_on(worker);
        }
    }

    fn updated(&mut self, worker: WorkerId) {
        let wrong = self.tamper == Tamper::AddsWrongly && self.chance.percent(3);
        let trainer = self.trainer(worker);
        let generation = trainer.generation().expect("it trains in a generation");
        let mut state = trainer.state.expect("it trains").next();
        state.hash ^= u64::from(wrong);
        trainer.state = Some(state);
        trainer.turn_to(Doing::Idle);
        self.watch.a_step_has_one_result(state);
        let (metrics, at) = (self.metrics(state.step), self.now);
        self.notify(worker, Notice::StepApplied { generation, step: state.step, metrics, at });
        if self.trainer(worker).keep.contains(&state.step) {
            self.upload(worker);
        }
        let queued = std::mem::take(&mut self.trainer(worker).queued);
        for action in queued {
            self.acted(worker, action);
        }
        let trainer = self.trainer(worker);
        if trainer.generation() != Some(generation) || trainer.doing != Doing::Idle {
            return; // It was ordered elsewhere while it updated.
        }
        if trainer.leaves {
            trainer.group = None;
            self.notify(worker, Notice::LeftTogether { generation });
        } else if self.plan.config.evaluates_at(state.step) && !self.skips_evaluation() {
            self.evaluate(worker);
        } else {
            self.go_on(worker);
        }
    }

    fn skips_evaluation(&mut self) -> bool {
        self.tamper == Tamper::SkipsEvaluations && self.chance.percent(30)
    }

    fn evaluate(&mut self, worker: WorkerId) {
        let trainer = self.trainer(worker);
        trainer.turn_to(Doing::Evaluating);
        let step = trainer.state.expect("it was evaluated after a step").step;
        self.arrive(worker, Meeting::Evaluate(step));
    }

    fn go_on(&mut self, worker: WorkerId) {
        let total = self.plan.config.steps_total;
        let trainer = self.trainer(worker);
        let step = trainer.state.expect("it has formed").step;
        if step == total {
            trainer.turn_to(Doing::Ending);
            return self.end_if_done(worker);
        }
        trainer.begun = step.next();
        trainer.turn_to(Doing::Computing);
        let mean = self.plan.step_ms;
        let delay = self.chance.between(mean / 2..=mean + mean / 2) * self.slowness(worker);
        self.work(worker, delay, Work::Computed);
    }

    fn end_if_done(&mut self, worker: WorkerId) {
        let trainer = self.trainer(worker);
        let (Doing::Ending, Some(state)) = (trainer.doing, trainer.state) else { return };
        let generation = trainer.generation().expect("it ends in a generation");
        if !trainer.uploading.contains(&(generation, state.step)) {
            trainer.turn_to(Doing::Idle);
            let wrong = u64::from(self.tamper == Tamper::EndsWrongly);
            let state_sha256 = format!("{:016x}", state.hash ^ wrong);
            self.notify(worker, Notice::Finished { generation, step: state.step, state_sha256 });
        }
    }

    /// Writes this worker's share of the state in the background.
    fn upload(&mut self, worker: WorkerId) {
        let tamper = self.tamper;
        let trainer = self.trainer(worker);
        let state = trainer.state.expect("there is a state to keep");
        let group = trainer.group.as_ref().expect("it is in a generation");
        let (generation, step) = (group.generation, state.step);
        let ranks = u32::try_from(group.members.len()).expect("they are few");
        let parts = (0..PARTS).filter(|index| index % ranks == trainer.rank.0);
        let is_wrong = tamper == Tamper::WritesWrongly && trainer.rank == Rank(0);
        let digest = format!("{:016x}", state.hash ^ u64::from(is_wrong));
        let share = Share {
            step,
            parts: parts.map(|index| Part { index, bytes: 1, digest: digest.clone() }).collect(),
            parts_total: PARTS,
            part_bytes: 1,
            sections: Vec::new(),
        };
        trainer.uploading.insert((generation, step));
        let fails = step < self.plan.config.steps_total && self.strikes(Fault::StoreError, 10);
        let outcome = if fails { Err("the store said no".to_owned()) } else { Ok(share) };
        let delay = self.chance.between(5..=1_000);
        self.work(worker, delay, Work::Uploaded { generation, step, outcome });
    }

    /// The exchange broke under this worker.
    fn lost(&mut self, worker: WorkerId, peer: Option<Rank>) {
        let at = self.now;
        let trainer = self.trainer(worker);
        let Some(generation) = trainer.generation() else { return };
        let forming = trainer.doing == Doing::Forming;
        let applied = trainer.state.unwrap_or_default().step;
        let reason = "connection reset by peer".to_owned();
        self.stopped(worker);
        self.notify(
            worker,
            if forming {
                Notice::FormFailed { generation, peer, reason }
            } else {
                Notice::ExchangeLost { generation, applied, peer, reason, at }
            },
        );
    }

    fn stopped(&mut self, worker: WorkerId) {
        self.leave_mesh(worker, true);
        let now = self.now;
        let trainer = self.trainer(worker);
        trainer.turn_to(Doing::Idle);
        trainer.stopped_at = Some(now);
    }

    fn metrics(&self, step: Step) -> StepMetrics {
        let short = |n: u64| f32::from(u16::try_from(n).expect("it is small"));
        StepMetrics {
            loss: short(step.0),
            images: 1,
            step_ms: short(self.plan.step_ms),
            ..Default::default()
        }
    }

    fn evaluation(&self, step: Step) -> Evaluation {
        Evaluation {
            step,
            epoch: Epoch(step.0 / self.plan.config.steps_per_epoch),
            samples: 1,
            weights: ExitScores::default(),
            ema: ExitScores::default(),
        }
    }

    // ---- Meetings --------------------------------------------------------------------------

    fn arrive(&mut self, worker: WorkerId, meeting: Meeting) {
        let group = self.trainer(worker).group.clone().expect("it is in a generation");
        let members: Vec<_> = group.members.iter().map(|member| member.worker).collect();
        let mesh = self.meshes.entry(group.generation).or_insert_with(|| Mesh {
            members,
            arrived: BTreeSet::new(),
            meeting,
            gone: BTreeSet::new(),
            torn: None,
        });
        let torn_from = match mesh.torn {
            Some((a, b)) if a == worker => Some(b),
            Some((a, b)) if b == worker => Some(a),
            Some(_) | None => None,
        };
        let missing = mesh.members.iter().find(|member| {
            **member != worker
                && (mesh.gone.contains(member) || self.watch.seen_dead.contains(member))
        });
        if let Some(&peer) = torn_from.as_ref().or(missing) {
            let rank = group.rank_of(peer);
            let delay = self.chance.between(0..=50);
            return self.work(worker, delay, Work::Lost(rank));
        }
        if mesh.arrived.is_empty() {
            mesh.meeting = meeting;
        }
        self.watch.members_of_a_generation_do_the_same(group.generation, mesh.meeting, meeting);
        mesh.arrived.insert(worker);
        if mesh.arrived.len() == mesh.members.len() {
            self.meet(group.generation);
        } else if meeting == Meeting::Form {
            let patience = self.plan.config.timeouts.form.as_millis();
            let patience = u64::try_from(patience).expect("it is short");
            self.work(worker, patience, Work::Waited);
        }
    }

    /// A formation has lasted for too long: whoever has not come is named.
    fn waited(&mut self, worker: WorkerId) {
        let group = self.trainer(worker).group.clone().expect("it forms a generation");
        let mesh = &self.meshes[&group.generation];
        let missing = mesh.members.iter().find(|member| !mesh.arrived.contains(member));
        let missing = missing.and_then(|&member| group.rank_of(member));
        self.lost(worker, missing);
    }

    /// All members have come: the meeting succeeds, though not all may get to know.
    fn meet(&mut self, generation: Generation) {
        let mesh = self.meshes.get_mut(&generation).expect("somebody arrived");
        mesh.arrived.clear();
        let (meeting, members) = (mesh.meeting, mesh.members.clone());
        let states: Vec<_> = members.iter().filter_map(|&w| self.trainer(w).state).collect();
        let lowest_wins = matches!(self.tamper, Tamper::LowestStepWins);
        let best = if lowest_wins { states.iter().min() } else { states.iter().max() }.copied();
        match meeting {
            Meeting::Form => self.watch_formation(generation, &members, best),
            Meeting::Sum(_) => {
                self.watch.a_formed_generation_silences_older_ones(generation, &members)
            }
            Meeting::Evaluate(_) => {}
        }
        let leaves = self.trainer(members[0]).leave_asked;
        let unreadable = self.is_unreadable(meeting, best, &members);
        for worker in members {
            let group = self.trainer(worker).group.clone().expect("it has arrived");
            let work = match meeting {
                Meeting::Form => {
                    let kept = group.checkpoint.map(|step| State { step, hash: self.store[&step] });
                    Work::Formed(best.max(kept).unwrap_or_default())
                }
                Meeting::Sum(_) => Work::Summed { leaves },
                Meeting::Evaluate(_) => Work::Evaluated,
            };
            let delay = self.delay();
            self.work(worker, delay, if unreadable { Work::Lost(None) } else { work });
        }
    }

    /// Whether the checkpoint that the members would have to start from cannot be read.
    fn is_unreadable(
        &mut self,
        meeting: Meeting,
        best: Option<State>,
        members: &[WorkerId],
    ) -> bool {
        let group = self.trainer(members[0]).group.as_ref().expect("it has arrived");
        let needed = group.checkpoint > best.map(|state| state.step);
        meeting == Meeting::Form && needed && self.strikes(Fault::LoadError, 30)
    }

    /// This worker's connections close. The others see it unless its machine went with it.
    pub(crate) fn leave_mesh(&mut self, worker: WorkerId, is_seen: bool) {
        let trainer = self.trainer(worker);
        let Some(group) = trainer.group.take() else { return };
        let Some(mesh) = self.meshes.get_mut(&group.generation) else { return };
        mesh.arrived.remove(&worker);
        if !is_seen {
            return;
        }
        mesh.gone.insert(worker);
        for peer in mesh.members.clone() {
            let Some(process) = self.workers.get(&peer) else { continue };
            let doing = process.trainer.doing;
            let waits = matches!(doing, Doing::Forming | Doing::Summing | Doing::Evaluating);
            if process.trainer.generation() == Some(group.generation) && waits {
                let delay = self.chance.between(0..=50);
                self.work(peer, delay, Work::Lost(group.rank_of(worker)));
            }
        }
    }

    /// A connection of the newest generation breaks by itself.
    pub(crate) fn glitch(&mut self) {
        let Some((&generation, mesh)) = self.meshes.last_key_value() else { return };
        let members = mesh.members.clone();
        let (a, b) = (self.chance.pick(&members), self.chance.pick(&members));
        let (Some(a), Some(b)) = (a, b) else { return };
        if a == b {
            return;
        }
        self.tell(|| format!("the connection between {a} and {b} breaks"));
        self.meshes.get_mut(&generation).expect("it was found").torn = Some((a, b));
        for (one, other) in [(a, b), (b, a)] {
            let Some(process) = self.workers.get(&one) else { continue };
            let doing = process.trainer.doing;
            let waits = matches!(doing, Doing::Forming | Doing::Summing | Doing::Evaluating);
            if process.trainer.generation() == Some(generation) && waits {
                let group = process.trainer.group.clone().expect("it has a generation");
                let delay = self.chance.between(0..=50);
                self.work(one, delay, Work::Lost(group.rank_of(other)));
            }
        }
    }

    /// What [`Tamper::KeepsTraining`] does.
    fn meet_in_the_old_generation(&mut self, worker: WorkerId, newer: Generation) {
        let mut older = self.meshes.range_mut(..newer);
        let Some((&generation, mesh)) = older.next_back() else { return };
        mesh.arrived.insert(worker);
        if mesh.members.iter().all(|member| mesh.arrived.contains(member)) {
            let members = mesh.members.clone();
            self.watch.a_formed_generation_silences_older_ones(generation, &members);
        }
    }
}
