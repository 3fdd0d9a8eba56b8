//! A worker's side: notices in, actions out.
//!
//! ```text
//!   Outside --Form--> Forming --formed--> Training --last step--> Finished
//!                      ^   ^                |  |
//!                      |   +--Form--+       |  +-- all left after a common step --> Left
//!                      |            |       +----- the exchange broke, or Hold ----> Broken
//!                      +------------+-- Form (from any of them)
//! ```

use crate::{
    Evaluation, Generation, Group, Order, Rank, Report, Share, Step, StepMetrics, Term, Timestamp,
    WorkerId,
};

/// Decides what a worker does next. See [`Participant::handle`].
#[derive(Debug, Clone, PartialEq)]
pub struct Participant {
    worker: WorkerId,
    term: Term,
    newest: Option<Generation>,
    state: State,
    leaving: bool,
    actions: Vec<Action>,
}

/// What a worker is in.
#[derive(Debug, Clone, PartialEq)]
pub enum State {
    /// No generation: it is new, or stands by.
    Outside,
    /// It connects to its peers and agrees with them on a state.
    Forming {
        /// The generation.
        group: Group,
    },
    /// It trains.
    Training {
        /// The generation.
        group: Group,
        /// What it said when it had formed it, to be said again to a coordinator that missed it.
        formed: Report,
        /// The generation for which all will leave this one after a common step.
        next: Option<Group>,
    },
    /// It has stopped, holds its state and waits for a generation.
    Broken {
        /// What it said when it stopped.
        lost: Option<Report>,
    },
    /// It left its generation together with the others, for one it has not heard of yet.
    Left,
    /// It has done the last step.
    Finished {
        /// What it said when it had formed the generation.
        formed: Report,
        /// What it said then.
        finished: Report,
    },
    /// It is about to exit.
    Gone,
}

/// Something that happened to a worker.
#[derive(Debug, Clone, PartialEq)]
pub enum Notice {
    /// The coordinator says something. `term` is the leadership under which it speaks.
    Ordered {
        /// The leadership.
        term: Term,
        /// What.
        order: Order,
    },
    /// The trainer is there, and can form a generation.
    Ready,
    /// The trainer formed a generation.
    Formed {
        /// Which.
        generation: Generation,
        /// The step it resumes from.
        step: Step,
        /// Digest of the state.
        digest: String,
        /// The newest step begun before.
        begun: Step,
        /// When it stopped in the generation before.
        stopped_at: Option<Timestamp>,
        /// The figures of the step resumed from, if it took part in it.
        metrics: Option<StepMetrics>,
    },
    /// The trainer could not form a generation.
    FormFailed {
        /// Which.
        generation: Generation,
        /// The peer at fault, if one is known.
        peer: Option<Rank>,
        /// Why.
        reason: String,
    },
    /// The trainer found the checkpoint to start from damaged.
    CheckpointDamaged {
        /// In which generation.
        generation: Generation,
        /// Of which step.
        step: Step,
        /// The object and what is wrong with it.
        reason: String,
    },
    /// The trainer found that the members' states differ, and gave its own up.
    Diverged {
        /// In which generation.
        generation: Generation,
        /// The step after which they compared them.
        step: Step,
        /// The step up to which what was kept can be trusted: until then they were equal.
        agreed: Step,
        /// Who differs from most, if most agree.
        odd: Option<Rank>,
        /// What was found.
        reason: String,
    },
    /// The trainer's exchange broke, and it stopped.
    ExchangeLost {
        /// In which generation.
        generation: Generation,
        /// The step it still holds.
        applied: Step,
        /// The peer at fault, if one is known.
        peer: Option<Rank>,
        /// Why.
        reason: String,
        /// When it stopped.
        at: Timestamp,
    },
    /// The trainer applied an optimizer update.
    StepApplied {
        /// In which generation.
        generation: Generation,
        /// The step reached.
        step: Step,
        /// Its figures.
        metrics: StepMetrics,
        /// When.
        at: Timestamp,
    },
    /// All left the generation after a common step, as rank 0 asked.
    LeftTogether {
        /// Which.
        generation: Generation,
    },
    /// The trainer evaluated the validation split.
    Evaluated {
        /// In which generation.
        generation: Generation,
        /// What came out.
        evaluation: Evaluation,
    },
    /// The share of a checkpoint is in the store, or could not be put there.
    ShareSaved {
        /// In which generation.
        generation: Generation,
        /// Of which step.
        step: Step,
        /// What was written, or why not.
        outcome: Result<Share, String>,
    },
    /// The trainer has done the last step.
    Finished {
        /// In which generation.
        generation: Generation,
        /// The last step.
        step: Step,
        /// SHA-256 of the whole state, hexadecimal.
        state_sha256: String,
    },
    /// The trainer cannot go on.
    Failed {
        /// What failed, and what to do.
        reason: String,
    },
    /// The machine is to be given up: leave without loss.
    StopRequested {
        /// Why.
        reason: String,
    },
}

/// A side effect. The host carries them out in order.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Tell the coordinator, now or when it is back.
    Report(Report),
    /// Let the trainer form this generation as this rank, then train in it.
    Form {
        /// The generation.
        group: Group,
        /// This worker's place.
        rank: Rank,
    },
    /// Let the trainer stop at once: whatever this generation is doing will not succeed.
    Abort {
        /// The generation.
        generation: Generation,
    },
    /// Ask all members, through the sum, to leave this generation after the step in flight.
    LeaveAfterStep {
        /// The generation.
        generation: Generation,
    },
    /// Keep the state after this step, beside those named before: a peer may reach the next one first.
    CheckpointAt {
        /// The step.
        step: Step,
    },
    /// End the process, after all that was said has arrived.
    Exit(Exit),
}

/// How a worker ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// The run is done.
    Finished,
    /// It was let go without loss.
    Released,
    /// It is not wanted; why, and what to do.
    Refused(String),
    /// The run cannot go on; why, and what to do.
    Failed(String),
}

impl Participant {
    /// A worker that belongs to no generation yet.
    #[must_use]
    pub fn new(worker: WorkerId) -> Self {
        Self {
            worker,
            term: Term(0),
            newest: None,
            state: State::Outside,
            leaving: false,
            actions: Vec::new(),
        }
    }

    /// Takes one notice in. Notices of a generation that is over change nothing.
    pub fn handle(&mut self, notice: Notice) -> Vec<Action> {
        if matches!(self.state, State::Gone) {
            return Vec::new(); // What a trainer says while it is torn down is not news.
        }
        match notice {
            Notice::Ordered { term, order } => self.ordered(term, order),
            Notice::Ready => self.report(Report::Ready),
            Notice::Formed { generation, step, digest, begun, stopped_at, metrics } => {
                let formed =
                    Report::Formed { generation, step, digest, begun, stopped_at, metrics };
                self.formed(generation, formed);
            }
            Notice::FormFailed { generation, peer, reason } => {
                if self.forms(generation) {
                    let lost = Report::FormFailed { generation, peer, reason };
                    self.broken(Some(lost));
                }
            }
            Notice::CheckpointDamaged { generation, step, reason } => {
                if self.forms(generation) {
                    self.broken(Some(Report::CheckpointDamaged { generation, step, reason }));
                }
            }
            Notice::Diverged { generation, step, agreed, odd, reason } => {
                let lost = Report::Diverged { generation, step, agreed, odd, reason };
                if self.forms(generation) {
                    self.broken(Some(lost));
                } else {
                    self.exchange_lost(generation, lost);
                }
            }
            Notice::ExchangeLost { generation, applied, peer, reason, at } => {
                let lost = Report::ExchangeLost { generation, applied, peer, reason, at };
                self.exchange_lost(generation, lost);
            }
            Notice::StepApplied { generation, step, metrics, at } => {
                if self.rank_in(generation) == Some(Rank(0)) {
                    self.report(Report::StepApplied { generation, step, metrics, at });
                }
            }
            Notice::LeftTogether { generation } => self.left_together(generation),
            Notice::Evaluated { generation, evaluation } => {
                if self.rank_in(generation) == Some(Rank(0)) {
                    self.report(Report::Evaluated { generation, evaluation });
                }
            }
            Notice::ShareSaved { generation, step, outcome } => self.report(match outcome {
                Ok(share) => Report::ShareWritten { generation, share },
                Err(reason) => Report::ShareFailed { generation, step, reason },
            }),
            Notice::Finished { generation, step, state_sha256 } => {
                self.finished(generation, Report::Finished { generation, step, state_sha256 });
            }
            Notice::Failed { reason } => {
                self.report(Report::Failed { reason: reason.clone() });
                self.exit(Exit::Failed(reason));
            }
            Notice::StopRequested { reason } => {
                self.leaving = true;
                match self.state {
                    State::Outside | State::Gone => self.exit(Exit::Released),
                    State::Forming { .. }
                    | State::Training { .. }
                    | State::Broken { .. }
                    | State::Left
                    | State::Finished { .. } => self.report(Report::Leaving { reason }),
                }
            }
        }
        std::mem::take(&mut self.actions)
    }

    /// The newest generation this worker was ordered into, for its greeting.
    #[must_use]
    pub fn generation(&self) -> Option<Generation> {
        self.newest
    }

    /// What it is in.
    #[must_use]
    pub fn state(&self) -> &State {
        &self.state
    }

    fn ordered(&mut self, term: Term, order: Order) {
        if term < self.term {
            return; // A coordinator that has been replaced and does not know it yet.
        }
        self.term = term;
        match order {
            Order::Welcome { .. } => self.say_again(),
            Order::Form(group) => self.form(group),
            Order::CheckpointAt { generation, step } => {
                if Some(generation) == self.newest {
                    self.actions.push(Action::CheckpointAt { step });
                }
            }
            Order::Hold { generation } => {
                let is_active =
                    matches!(self.state, State::Forming { .. } | State::Training { .. });
                if Some(generation) == self.newest && is_active {
                    self.abort_current();
                    self.broken(None);
                }
            }
            Order::Refuse { reason } => self.refused(reason),
            Order::Finish { .. } => self.exit(Exit::Finished),
            Order::Fail { reason } => self.exit(Exit::Failed(reason)),
        }
    }

    /// A coordinator that was restarted knows what is durable, not what it was told since.
    fn say_again(&mut self) {
        if self.leaving {
            self.report(Report::Leaving { reason: "asked to stop".to_owned() });
        }
        match self.state.clone() {
            State::Training { formed, .. } => self.report(formed),
            State::Broken { lost: Some(lost) } => self.report(lost),
            State::Finished { formed, finished } => {
                self.report(formed);
                self.report(finished);
            }
            State::Outside
            | State::Forming { .. }
            | State::Broken { lost: None }
            | State::Left
            | State::Gone => {}
        }
    }

    fn form(&mut self, group: Group) {
        if self.newest >= Some(group.generation) {
            return; // Said twice, or overtaken.
        }
        self.newest = Some(group.generation);
        if let State::Training { group: current, next, .. } = &mut self.state
            && group.planned
            && !current.last
        // Then it makes no step to leave after.
        {
            let generation = current.generation;
            let leads = current.rank_of(self.worker) == Some(Rank(0));
            *next = Some(group);
            if leads {
                self.actions.push(Action::LeaveAfterStep { generation });
            }
            return;
        }
        self.abort_current();
        self.enter(group);
    }

    /// Turns to a generation, or leaves the run if it has no place in it.
    fn enter(&mut self, group: Group) {
        match group.rank_of(self.worker) {
            Some(rank) => {
                self.state = State::Forming { group: group.clone() };
                self.actions.push(Action::Form { group, rank });
            }
            None => self.exit(Exit::Released),
        }
    }

    fn abort_current(&mut self) {
        if let State::Forming { group } | State::Training { group, .. } = &self.state {
            self.actions.push(Action::Abort { generation: group.generation });
        }
    }

    fn formed(&mut self, generation: Generation, formed: Report) {
        if let State::Forming { group } = &self.state
            && group.generation == generation
        {
            let group = group.clone();
            self.state = State::Training { group, formed: formed.clone(), next: None };
            self.report(formed);
        }
    }

    fn exchange_lost(&mut self, generation: Generation, lost: Report) {
        let State::Training { group, next, .. } = &mut self.state else { return };
        if group.generation != generation {
            return;
        }
        match next.take() {
            Some(next) => self.enter(next), // The others left a moment before this one could.
            None => self.broken(Some(lost)),
        }
    }

    fn broken(&mut self, lost: Option<Report>) {
        self.state = State::Broken { lost: lost.clone() };
        if let Some(lost) = lost {
            self.report(lost);
        }
    }

    fn left_together(&mut self, generation: Generation) {
        let State::Training { group, next, .. } = &mut self.state else { return };
        if group.generation != generation {
            return;
        }
        match next.take() {
            Some(next) => self.enter(next),
            None => self.state = State::Left,
        }
    }

    fn finished(&mut self, generation: Generation, finished: Report) {
        let State::Training { group, formed, next } = &mut self.state else { return };
        if group.generation != generation {
            return;
        }
        let formed = formed.clone();
        match next.take() {
            Some(next) => self.enter(next), // It does the end once more, with the new ones.
            None => {
                self.state = State::Finished { formed, finished: finished.clone() };
                self.report(finished);
            }
        }
    }

    /// Turned away. The trainer stops at once, so that its peers need not wait for it.
    fn refused(&mut self, reason: String) {
        self.abort_current();
        let exit = if self.leaving { Exit::Released } else { Exit::Refused(reason) };
        self.exit(exit);
    }

    fn exit(&mut self, exit: Exit) {
        if !matches!(self.state, State::Gone) {
            self.state = State::Gone;
            self.actions.push(Action::Exit(exit));
        }
    }

    fn report(&mut self, report: Report) {
        self.actions.push(Action::Report(report));
    }

    fn forms(&self, generation: Generation) -> bool {
        matches!(&self.state, State::Forming { group } if group.generation == generation)
    }

    fn rank_in(&self, generation: Generation) -> Option<Rank> {
        match &self.state {
            State::Training { group, .. } if group.generation == generation => {
                group.rank_of(self.worker)
            }
            State::Outside
            | State::Forming { .. }
            | State::Training { .. }
            | State::Broken { .. }
            | State::Left
            | State::Finished { .. }
            | State::Gone => None,
        }
    }
}
