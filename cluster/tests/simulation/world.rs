//! The world of one seed: what is to happen, in order of time, and to whom.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
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
    tamper::Tamper,
    trainer::Mesh,
};

/// When it all begins.
const START: Timestamp = Timestamp(1_000_000);
/// How long a run may take once nothing goes wrong any more, beside its steps.
const LIVENESS_BOUND: Duration = Duration::from_secs(60);

/// Something that is to happen.
#[derive(Debug, Clone)]
pub(crate) enum Happening {
    Up { session: u64, message: Up },
    Down { session: u64, message: Down },
    SessionEndSeen { session: u64 },
    Inside { worker: WorkerId, what: Inside },
    Thaw { worker: WorkerId },
    Healed { session: u64, survives: bool },
    Exited { worker: WorkerId },
    Committed { life: u64, step: Step, failed: bool },
    Requested { worker: WorkerId },
    Resized { workers: u32 },
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
    /// Until when all machines have too much to do.
    overload: Timestamp,
    pub(crate) faults: u64,
    /// What happened last, and how much of it is kept.
    story: VecDeque<String>,
    story_max: usize,
}

/// What a run of the simulation came to.
#[derive(Debug, Clone, Default)]
pub(crate) struct Summary {
    pub(crate) seeds: u64,
    pub(crate) events: u64,
    /// Faults that struck.
    pub(crate) faults: u64,
    /// How often an invariant was looked at.
    pub(crate) checks: u64,
    pub(crate) generations: u64,
    pub(crate) repeated: u64,
    /// Virtual time from the last fault to the end of the run.
    pub(crate) settled_ms: u64,
    /// The names of the invariants that were looked at.
    pub(crate) looked_at: BTreeSet<&'static str>,
}

impl Summary {
    pub(crate) fn add(&mut self, other: &Self) {
        self.seeds += other.seeds;
        self.events += other.events;
        self.faults += other.faults;
        self.checks += other.checks;
        self.generations += other.generations;
        self.repeated += other.repeated;
        self.settled_ms = self.settled_ms.max(other.settled_ms);
        self.looked_at.extend(&other.looked_at);
    }
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
            overload: START,
            faults: 0,
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
            seeds: 1,
            events,
            faults: self.faults,
            checks: self.watch.checks,
            looked_at: self.watch.looked_at.clone(),
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
            | Happening::Resized { .. }
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
            Happening::Healed { session, survives } => self.heal(session, survives),
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
        if let (Tamper::ReportsFalseDeaths, Some(worker)) = (self.tamper, victim) {
            self.after(0, Happening::Exited { worker });
        }
        let fault = self.chance.pick(&self.plan.faults.clone());
        self.faults += u64::from(fault.is_some() && victim.is_some());
        match (fault, victim) {
            (Some(Fault::Crash), Some(worker)) => self.crash(worker),
            (Some(Fault::Freeze), Some(worker)) => self.freeze(worker),
            (Some(Fault::CutSession), Some(worker)) => self.cut_session_of(worker),
            (Some(Fault::OneWay), Some(worker)) => self.block_one_way(worker),
            (Some(Fault::Glitch), _) => self.glitch(),
            (Some(Fault::Hang), Some(worker)) => self.hang(worker),
            (Some(Fault::Slow), Some(worker)) => {
                let until = self.now + Duration::from_millis(self.chance.between(500..=20_000));
                self.process(worker).trainer.slow_until = until;
            }
            (Some(Fault::Overload), _) => {
                self.overload = self.now + Duration::from_millis(self.chance.between(500..=20_000));
            }
            (Some(Fault::CoordinatorCrash), _) => self.crash_coordinator(),
            (Some(Fault::CoordinatorSleep), _) => self.put_coordinator_to_sleep(),
            (Some(Fault::Join), _) if alive.len() < 10 && self.births < 24 => {
                self.after(0, Happening::Arrival);
            }
            (Some(Fault::Drain), Some(worker)) => {
                self.workers.get_mut(&worker).expect("the victim lives").told_to_leave = true;
                self.after(0, Happening::Requested { worker });
            }
            (Some(Fault::Resize), _) => {
                let most = u64::from(self.plan.config.virtual_ranks);
                let workers = self.chance.between(u64::from(self.plan.config.workers_min)..=most);
                let workers = u32::try_from(workers).expect("it is small");
                self.after(0, Happening::Resized { workers });
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
            frozen.was_frozen = true;
            let long = self.chance.percent(50);
            let ms = self.chance.between(if long { 2_000..=9_000 } else { 10..=700 });
            self.tell(|| format!("{worker} is frozen for {ms} ms"));
            self.after(ms, Happening::Thaw { worker });
        }
    }

    /// The trainer does nothing any more, and the process goes on beating. One at a time: if all
    /// trainers hang after their last step, no rule finds them yet.
    fn hang(&mut self, worker: WorkerId) {
        if self.workers.len() < 2 || self.workers.values().any(|other| other.trainer.hangs) {
            return;
        }
        self.tell(|| format!("the trainer of {worker} hangs"));
        self.process(worker).trainer.hangs = true;
        if self.births < 24 {
            let delay = self.chance.between(200..=5_000);
            self.after(delay, Happening::Arrival);
        }
    }

    /// How many times longer than usual this worker computes.
    pub(crate) fn slowness(&mut self, worker: WorkerId) -> u64 {
        if self.quiet.is_some() {
            return 1;
        }
        let now = self.now;
        let is_slow = now < self.process(worker).trainer.slow_until;
        1 + u64::from(now < self.overload) + u64::from(is_slow)
    }

    /// Nothing goes wrong from now on, and there are enough workers.
    fn become_quiet(&mut self) {
        self.quiet = Some(self.now);
        self.tell(|| "nothing goes wrong from now on".to_owned());
        let frozen: Vec<_> = self.workers.keys().copied().collect();
        frozen.into_iter().for_each(|worker| self.thaw(worker));
        let stays = |worker: &&Worker| {
            !worker.told_to_leave && !worker.is_exiting() && !worker.trainer.hangs
        };
        let staying = self.workers.values().filter(stays).count() as u64;
        for _ in staying..u64::from(self.plan.config.workers_expected) {
            self.after(0, Happening::Arrival);
        }
    }

    pub(crate) fn is_late(&self) -> bool {
        let steps = Duration::from_millis(self.plan.step_ms) * 2;
        let steps = steps * u32::try_from(self.plan.config.steps_total.0).expect("it is small");
        // Whoever hangs in the first step or the first evaluation is found late, one after another.
        let timeouts = self.plan.config.timeouts;
        let hangs = self.plan.has(Fault::Hang);
        let hangs = if hangs { timeouts.first_evaluation() * 4 } else { Duration::ZERO };
        self.quiet.is_some_and(|quiet| self.now.since(quiet) > LIVENESS_BOUND + steps + hangs)
    }

    /// The fault strikes, where it can strike and this is such a moment.
    pub(crate) fn strikes(&mut self, fault: Fault, percent: u64) -> bool {
        let strikes = self.quiet.is_none() && self.plan.has(fault) && self.chance.percent(percent);
        self.faults += u64::from(strikes);
        strikes
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
