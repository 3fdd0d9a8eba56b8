//! The world of one seed: what is to happen, in order of time, and to whom.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use cluster::{Event, Generation, Outcome, Record, Report, Step, Timestamp, WorkerId};

use crate::{
    chance::Chance,
    host::{Inside, Worker},
    invariants::{Failure, Watch},
    network::{Down, Session, Up},
    office::Office,
    plan::{Fault, Plan},
    trainer::Mesh,
};

/// When it all begins.
const START: Timestamp = Timestamp(1_000_000);
/// How long a run may take once nothing goes wrong any more, beside its steps.
const LIVENESS_BOUND: Duration = Duration::from_secs(40);

/// A bug put into the world on purpose, to show that an invariant can fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tamper {
    Nothing,
    /// The host announces generations that it has not made durable.
    AnnouncesBeforeDurable,
    /// The host loses the records of steps.
    LosesSteps,
    /// The host never calls the coordinator at its deadlines.
    MissesDeadlines,
    /// The host lets reports of an older generation pass as news.
    PassesOldNews,
    /// A worker adds wrongly, once in a while.
    AddsWrongly,
    /// The lowest step wins when a generation forms.
    LowestStepWins,
    /// Members that are ordered into a new generation go on in the old one as well.
    KeepsTraining,
}

/// Something that is to happen.
#[derive(Debug, Clone)]
pub(crate) enum Happening {
    Up { session: u64, message: Up },
    Down { session: u64, message: Down },
    SessionEndSeen { session: u64 },
    Inside { worker: WorkerId, what: Inside },
    Thaw { worker: WorkerId },
    Exited { worker: WorkerId },
    Committed { life: u64, step: Step, failed: bool },
    Requested { worker: WorkerId },
    Alarm { life: u64 },
    CoordinatorStart,
    CoordinatorWake,
    Arrival,
    NextFault,
    Quiet,
}

pub(crate) struct World {
    pub(crate) now: Timestamp,
    pub(crate) plan: Plan,
    pub(crate) tamper: Tamper,
    pub(crate) chance: Chance,
    agenda: BTreeMap<(Timestamp, u64), Happening>,
    planned: u64,
    /// What is durable.
    pub(crate) log: Vec<Record>,
    /// Committed checkpoints, by step: the state.
    pub(crate) store: BTreeMap<Step, u64>,
    pub(crate) office: Office,
    pub(crate) sessions: BTreeMap<u64, Session>,
    pub(crate) workers: BTreeMap<WorkerId, Worker>,
    /// Workers that ever lived.
    pub(crate) births: u64,
    pub(crate) meshes: BTreeMap<Generation, Mesh>,
    pub(crate) watch: Watch,
    pub(crate) quiet: Option<Timestamp>,
    /// What happened last, and how much of it is kept.
    story: VecDeque<String>,
    story_max: usize,
}

/// What a run of the simulation came to.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Summary {
    pub(crate) events: u64,
    pub(crate) generations: u64,
    pub(crate) repeated: u64,
    /// Virtual time from the last fault to the end of the run.
    pub(crate) settled_ms: u64,
}

/// Runs one seed to its end.
///
/// # Errors
/// The invariant that broke, with the last `story` events.
pub(crate) fn simulate(seed: u64, tamper: Tamper, story: usize) -> Result<Summary, Failure> {
    // Only a seed that fails is told: it happens once more, word by word.
    World::new(seed, tamper, 0).run().or_else(|_| World::new(seed, tamper, story).run())
}

impl World {
    fn new(seed: u64, tamper: Tamper, story_max: usize) -> Self {
        let mut chance = Chance::new(seed);
        let plan = Plan::drawn(&mut chance);
        let mut world = Self {
            now: START,
            tamper,
            chance,
            agenda: BTreeMap::new(),
            planned: 0,
            log: Vec::new(),
            store: BTreeMap::new(),
            office: Office::default(),
            sessions: BTreeMap::new(),
            workers: BTreeMap::new(),
            births: 0,
            meshes: BTreeMap::new(),
            watch: Watch::new(seed, &plan),
            quiet: None,
            story: VecDeque::new(),
            story_max,
            plan,
        };
        let plan = world.plan.clone();
        world.tell(|| format!("{plan:?}"));
        world.after(0, Happening::CoordinatorStart);
        for _ in 0..world.plan.workers {
            let delay = world.chance.between(0..=3_000);
            world.after(delay, Happening::Arrival);
        }
        if !world.plan.faults.is_empty() {
            world.after(1_000, Happening::NextFault);
        }
        world.after(world.plan.quiet_ms, Happening::Quiet);
        world
    }

    fn run(mut self) -> Result<Summary, Failure> {
        let mut events = 0;
        while let Some(((at, _), happening)) = self.agenda.pop_first() {
            self.now = at;
            events += 1;
            self.happen(happening);
            self.watch_over();
            if self.is_over() {
                self.prove();
            }
            if let Some(violation) = self.watch.violation.take() {
                let story = self.story.into();
                return Err(Failure { seed: self.watch.seed, violation, story });
            }
            if self.is_over() {
                break;
            }
        }
        let ledger = &self.watch.durable;
        let end = self.quiet.unwrap_or(self.now);
        Ok(Summary {
            events,
            generations: ledger.generation.0,
            repeated: ledger.repeated,
            settled_ms: u64::try_from(self.now.since(end).as_millis()).unwrap_or(u64::MAX),
        })
    }

    fn is_over(&self) -> bool {
        matches!(self.watch.durable.outcome, Some(Outcome::Finished { .. }))
            && self.office.is_up()
            && self.workers.is_empty()
    }

    pub(crate) fn after(&mut self, delay_ms: u64, happening: Happening) -> Timestamp {
        self.at(self.now + Duration::from_millis(delay_ms), happening)
    }

    pub(crate) fn at(&mut self, at: Timestamp, happening: Happening) -> Timestamp {
        self.planned += 1;
        self.agenda.insert((at, self.planned), happening);
        at
    }

    pub(crate) fn tell(&mut self, line: impl FnOnce() -> String) {
        if self.story_max == 0 {
            return;
        }
        if self.story.len() == self.story_max {
            self.story.pop_front();
        }
        self.story.push_back(format!("{:>8} ms  {}", self.now.0 - START.0, line()));
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Up { .. }
            | Happening::SessionEndSeen { .. }
            | Happening::Exited { .. }
            | Happening::Committed { .. }
            | Happening::Requested { .. }
            | Happening::Alarm { .. } => self.at_the_office(happening),
            Happening::CoordinatorStart => self.start_coordinator(),
            Happening::CoordinatorWake => self.wake_coordinator(),
            Happening::Down { session, ref message } => {
                let Some(worker) = self.sessions.get(&session).map(|session| session.worker) else {
                    return;
                };
                if self.defer(worker, &happening) {
                    return;
                }
                self.received(worker, session, message.clone());
            }
            Happening::Inside { worker, ref what } => {
                if !self.defer(worker, &happening) {
                    self.inside(worker, what.clone());
                }
            }
            Happening::Thaw { worker } => self.thaw(worker),
            Happening::Arrival => {
                if self.watch.durable.outcome.is_none() {
                    self.start_worker();
                }
            }
            Happening::NextFault => self.next_fault(),
            Happening::Quiet => self.become_quiet(),
        }
    }

    /// Keeps what happens to a frozen worker until it goes on.
    fn defer(&mut self, worker: WorkerId, happening: &Happening) -> bool {
        match self.workers.get_mut(&worker) {
            Some(Worker { backlog: Some(backlog), .. }) => {
                backlog.push(happening.clone());
                true
            }
            Some(_) => false,
            None => true, // Nobody is there any more.
        }
    }

    fn thaw(&mut self, worker: WorkerId) {
        let held = self.workers.get_mut(&worker).and_then(|worker| worker.backlog.take());
        self.tell(|| format!("{worker} goes on"));
        for happening in held.into_iter().flatten() {
            self.happen(happening);
        }
    }

    // ---- What goes wrong -------------------------------------------------------------------

    fn next_fault(&mut self) {
        if self.quiet.is_some() || self.watch.durable.outcome.is_some() {
            return;
        }
        let next = self.chance.between(1..=self.plan.fault_every_ms * 2);
        self.after(next, Happening::NextFault);
        let alive: Vec<_> = self.workers.keys().copied().collect();
        let victim = self.chance.pick(&alive);
        match (self.chance.pick(&self.plan.faults.clone()), victim) {
            (Some(Fault::Crash), Some(worker)) => self.crash(worker),
            (Some(Fault::Freeze), Some(worker)) => self.freeze(worker),
            (Some(Fault::CutSession), Some(worker)) => self.cut_session_of(worker),
            (Some(Fault::Glitch), _) => self.glitch(),
            (Some(Fault::CoordinatorCrash), _) => self.crash_coordinator(),
            (Some(Fault::CoordinatorSleep), _) => self.put_coordinator_to_sleep(),
            (Some(Fault::Join), _) if alive.len() < 10 && self.births < 24 => {
                self.after(0, Happening::Arrival);
            }
            (Some(Fault::Drain), Some(worker)) => {
                self.workers.get_mut(&worker).expect("the victim lives").told_to_leave = true;
                self.after(0, Happening::Requested { worker });
            }
            (Some(Fault::Stop), Some(worker)) => {
                self.workers.get_mut(&worker).expect("the victim lives").told_to_leave = true;
                self.after(0, Happening::Inside { worker, what: Inside::StopRequested });
            }
            _ => {} // Store errors strike when something is stored.
        }
    }

    fn freeze(&mut self, worker: WorkerId) {
        let frozen = self.workers.get_mut(&worker).expect("the victim lives");
        if frozen.backlog.is_none() {
            frozen.backlog = Some(Vec::new());
            let long = self.chance.percent(50);
            let ms = self.chance.between(if long { 2_000..=9_000 } else { 10..=700 });
            self.tell(|| format!("{worker} is frozen for {ms} ms"));
            self.after(ms, Happening::Thaw { worker });
        }
    }

    /// Nothing goes wrong from now on, and there are enough workers.
    fn become_quiet(&mut self) {
        self.quiet = Some(self.now);
        self.tell(|| "nothing goes wrong from now on".to_owned());
        let frozen: Vec<_> = self.workers.keys().copied().collect();
        frozen.into_iter().for_each(|worker| self.thaw(worker));
        let stays = |worker: &&Worker| !worker.told_to_leave && !worker.is_exiting();
        let staying = self.workers.values().filter(stays).count() as u64;
        for _ in staying..u64::from(self.plan.config.workers_expected) {
            self.after(0, Happening::Arrival);
        }
    }

    pub(crate) fn is_late(&self) -> bool {
        let steps = Duration::from_millis(self.plan.step_ms) * 2;
        let steps = steps * u32::try_from(self.plan.config.steps_total.0).expect("it is small");
        self.quiet.is_some_and(|quiet| self.now.since(quiet) > LIVENESS_BOUND + steps)
    }

    /// The fault strikes, where it can strike and this is such a moment.
    pub(crate) fn strikes(&mut self, fault: Fault, percent: u64) -> bool {
        self.quiet.is_none() && self.plan.has(fault) && self.chance.percent(percent)
    }

    pub(crate) fn delay(&mut self) -> u64 {
        let usual = self.plan.delay_ms;
        let spike = self.quiet.is_none() && !self.plan.is_calm() && self.chance.percent(1);
        if spike { self.chance.between(usual..=400) } else { self.chance.between(0..=usual) }
    }

    pub(crate) fn event(&mut self, event: Event) -> bool {
        if !matches!(event, Event::Reported { report: Report::Heartbeat(_), .. }) {
            self.tell(|| format!("event {event:?}"));
        }
        self.coordinator_handles(event)
    }
}
