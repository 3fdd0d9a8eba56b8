//! Virtual time: what happens next, the coordinator's host, and what goes wrong.

use std::{
    cmp::Reverse,
    collections::{BTreeSet, BinaryHeap},
    time::Duration,
};

use cluster::{
    Action, Command, Coordinator, Event, Exit, Fingerprint, Generation, Hello, Notice, Order, Part,
    Participant, Phase, Rank, Record, Report, RunConfig, Share, Step, StepMetrics, Term, Timestamp,
    WorkerId,
};

use crate::{
    chance::Chance,
    crew::{Crew, Doing, Forming, Training, Worker, step_time},
    scenario::{Forecast, Scenario},
    watch::Watch,
};

/// When it all begins.
const START: Timestamp = Timestamp(1_000_000);
/// Longest delay of a message, in milliseconds.
const DELAY_MS: u64 = 5;
/// Parts of a checkpoint.
const PARTS: u32 = 16;

/// Something that is to happen.
#[derive(Debug)]
enum Happening {
    Down { worker: WorkerId, term: Term, order: Order },
    Up { worker: WorkerId, report: Report },
    Exited { worker: WorkerId },
    Closed { worker: WorkerId },
    Lost { worker: WorkerId, generation: Generation, peer: Option<Rank> },
    Arrival,
    Formed { generation: Generation },
    Waited { generation: Generation },
    LeaveTogether { generation: Generation },
    CheckpointDue { generation: Generation, step: Step },
    Committed { step: Step },
    CoordinatorStart,
    Tick,
    Fault,
}

pub(crate) struct World {
    scenario: Scenario,
    config: RunConfig,
    chance: Chance,
    now: Timestamp,
    end: Timestamp,
    agenda: BinaryHeap<Reverse<(Timestamp, u64)>>,
    happenings: std::collections::BTreeMap<u64, Happening>,
    planned: u64,
    coordinator: Option<Coordinator>,
    log: Vec<Record>,
    /// What was said while there was no coordinator.
    unheard: Vec<(WorkerId, Report)>,
    crew: Crew,
    births: u64,
    ticking: bool,
    watch: Watch,
    faults: u64,
    last_fault: Timestamp,
    down_since: Option<Timestamp>,
    recoveries: Vec<Duration>,
    /// The newest step that was ever done, and the time spent in steps that count.
    best: Step,
    useful: Duration,
    repeated: u64,
}

impl World {
    pub(crate) fn new(scenario: Scenario, config: RunConfig) -> Self {
        let mut world = Self {
            chance: Chance::new(scenario.seed),
            now: START,
            end: START + scenario.lasts,
            agenda: BinaryHeap::new(),
            happenings: std::collections::BTreeMap::new(),
            planned: 0,
            coordinator: None,
            log: Vec::new(),
            unheard: Vec::new(),
            crew: Crew::default(),
            births: 0,
            ticking: false,
            watch: Watch::default(),
            faults: 0,
            last_fault: START,
            down_since: None,
            recoveries: Vec::new(),
            best: Step(0),
            useful: Duration::ZERO,
            repeated: 0,
            config,
            scenario,
        };
        world.after(Duration::ZERO, Happening::CoordinatorStart);
        for _ in 0..world.scenario.workers {
            let delay = world.chance.between(1..=2_000);
            world.after(Duration::from_millis(delay), Happening::Arrival);
        }
        world.plan_fault();
        world
    }

    pub(crate) fn run(mut self) -> Forecast {
        let mut events = 0;
        while let Some(Reverse((at, number))) = self.agenda.pop() {
            if at > self.end || !self.watch.violations.is_empty() {
                break;
            }
            self.now = at;
            events += 1;
            let happening = self.happenings.remove(&number).expect("it was planned");
            self.happen(happening);
        }
        self.now = self.end;
        self.settle();
        let undisturbed = self.scenario.lasts.as_secs_f64() / self.scenario.step.as_secs_f64();
        self.recoveries.sort_unstable();
        let median = self.recoveries.get(self.recoveries.len() / 2).copied();
        Forecast {
            goodput: self.useful.as_secs_f64() / self.scenario.lasts.as_secs_f64(),
            throughput_ratio: self.best.0 as f64 / undisturbed,
            faults: self.faults,
            invariants_checked: self.watch.checks,
            violations: self.watch.violations,
            generations: self.log.iter().filter(|r| is_opening(r)).count() as u64,
            steps: self.best.0,
            repeated_steps: self.repeated,
            recovery: median.zip(self.recoveries.last().copied()),
            events,
        }
    }

    fn after(&mut self, delay: Duration, happening: Happening) {
        self.at(self.now + delay, happening);
    }

    fn at(&mut self, at: Timestamp, happening: Happening) {
        self.planned += 1;
        self.happenings.insert(self.planned, happening);
        self.agenda.push(Reverse((at.max(self.now), self.planned)));
    }

    fn soon(&mut self, happening: Happening) {
        let delay = self.chance.between(1..=DELAY_MS);
        self.after(Duration::from_millis(delay), happening);
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Down { worker, term, order } => {
                self.notice(worker, Notice::Ordered { term, order });
            }
            Happening::Up { worker, report } if self.coordinator.is_none() => {
                self.unheard.push((worker, report));
            }
            Happening::Up { worker, report } => self.tell(Event::Reported { worker, report }),
            Happening::Exited { worker } => {
                self.tell(Event::ProcessExited { worker, how: "signal 9".to_owned() });
            }
            Happening::Closed { worker } => self.tell(Event::SessionClosed { worker }),
            Happening::Lost { worker, generation, peer } => self.lost(worker, generation, peer),
            Happening::Arrival => self.arrival(),
            Happening::Formed { generation } => self.formed(generation),
            Happening::Waited { generation } => self.waited(generation),
            Happening::LeaveTogether { generation } => self.leave_together(generation),
            Happening::CheckpointDue { generation, step } => self.checkpoint(generation, step),
            Happening::Committed { step } => self.tell(Event::CheckpointCommitted { step }),
            Happening::CoordinatorStart => self.start_coordinator(),
            Happening::Tick => self.tick(),
            Happening::Fault => self.fault(),
        }
    }

    // ---- The coordinator's host ------------------------------------------------------------

    fn start_coordinator(&mut self) {
        let coordinator = Coordinator::restore(self.now, self.config.clone(), &self.log);
        if !self.log.is_empty() {
            self.watch.restored(self.now, coordinator.ledger());
        }
        self.coordinator = Some(coordinator);
        self.tell(Event::DeadlineReached);
        let workers: Vec<_> = self.crew.workers.keys().copied().collect();
        workers.into_iter().for_each(|worker| self.hello(worker));
        for (worker, report) in std::mem::take(&mut self.unheard) {
            self.soon(Happening::Up { worker, report });
        }
    }

    fn hello(&mut self, worker: WorkerId) {
        let process = &self.crew.workers[&worker];
        let hello = Hello {
            name: format!("worker-{worker}"),
            address: format!("host-{worker}:1"),
            node: String::new(),
            fingerprint: Fingerprint::default(),
            generation: process.participant.generation(),
            applied: process.applied,
            preparing: false,
        };
        self.tell(Event::WorkerJoined { worker, hello });
    }

    /// Calls the rules and carries out what they ask for.
    fn tell(&mut self, event: Event) {
        let Some(coordinator) = &mut self.coordinator else { return };
        let term = coordinator.term();
        let is_deadline = matches!(event, Event::DeadlineReached);
        let commands = coordinator.handle(self.now, event);
        if is_deadline {
            self.watch.deadline(self.now, coordinator);
        }
        for command in commands {
            self.watch.command(self.now, &command);
            match command {
                Command::Append(record) => self.log.push(record),
                Command::Send { worker, order } => {
                    self.soon(Happening::Down { worker, term, order })
                }
                Command::Close { .. } => {} // What was said before it ends the process as well.
                Command::CommitCheckpoint { step, .. } => {
                    self.after(Duration::from_millis(500), Happening::Committed { step });
                }
            }
        }
        self.keep_ticking();
    }

    /// While anything is amiss the coordinator hears every heartbeat.
    fn keep_ticking(&mut self) {
        if !self.ticking && !self.is_calm() {
            self.ticking = true;
            self.after(self.config.timeouts.heartbeat, Happening::Tick);
        }
    }

    fn is_calm(&self) -> bool {
        let Some(coordinator) = &self.coordinator else { return true };
        let newest = coordinator.ledger().generation;
        matches!(coordinator.phase(), Phase::Training { suspicion: None })
            && self.crew.training.as_ref().is_some_and(|training| {
                training.stalled.is_none() && training.group.generation == newest
            })
    }

    fn tick(&mut self) {
        self.ticking = false;
        self.beats(None);
        self.tell(Event::DeadlineReached);
        let patience = self.config.timeouts.first_step() * 4 + self.scenario.repair;
        let is_too_long = !self.is_calm() && self.now.since(self.last_fault) > patience;
        let phase = self.coordinator.as_ref().map(|c| format!("{:?}", c.phase()));
        self.watch.standstill(self.now, is_too_long, &phase.unwrap_or_default());
        self.keep_ticking();
    }

    /// All workers beat: as they are, or as they were a while ago.
    fn beats(&mut self, earlier: Option<u64>) {
        if self.coordinator.is_none() {
            return;
        }
        let said = self.crew.workers.iter().map(|(&id, worker)| {
            let mut progress = self.crew.progress(worker, self.now);
            if let Some(steps) = earlier {
                progress.applied = progress.applied.map(|step| Step(step.0.saturating_sub(steps)));
            }
            (id, progress)
        });
        let said: Vec<_> = said.collect();
        for (worker, progress) in said {
            self.tell(Event::Reported { worker, report: Report::Heartbeat(progress) });
        }
    }

    // ---- The workers' hosts ----------------------------------------------------------------

    fn arrival(&mut self) {
        self.births += 1;
        let worker = WorkerId(self.births);
        let process = Worker {
            participant: Participant::new(worker),
            applied: None,
            doing: Doing::Nothing { since: self.now },
            hangs: None,
        };
        self.crew.workers.insert(worker, process);
        if self.coordinator.is_some() {
            self.hello(worker);
        }
    }

    fn notice(&mut self, worker: WorkerId, notice: Notice) {
        let Some(process) = self.crew.workers.get_mut(&worker) else { return };
        for action in process.participant.handle(notice) {
            self.act(worker, action);
        }
    }

    fn act(&mut self, worker: WorkerId, action: Action) {
        match action {
            Action::Report(report) => self.soon(Happening::Up { worker, report }),
            Action::Form { group, .. } => self.arrives(worker, group),
            Action::Abort { .. } => self.stops(worker),
            Action::LeaveAfterStep { generation } => {
                if let Some(training) = &mut self.crew.training
                    && training.group.generation == generation
                {
                    training.leave_asked = true;
                    let at = training.ends(training.reached(self.now).next());
                    self.at(at, Happening::LeaveTogether { generation });
                }
            }
            Action::CheckpointAt { step } => self.plan_checkpoint(worker, step),
            Action::Exit(exit) => {
                self.stops(worker);
                self.crew.workers.remove(&worker);
                self.soon(Happening::Closed { worker });
                if matches!(exit, Exit::Refused(_)) {
                    self.after(self.scenario.repair, Happening::Arrival);
                }
            }
        }
    }

    /// The trainer leaves what it is in; the generation that trains cannot go on without it.
    fn stops(&mut self, worker: WorkerId) {
        if self.crew.trains(worker) && self.crew.workers[&worker].doing == Doing::Training {
            self.settle();
            self.crew.stall(self.now);
        }
        if let Some(process) = self.crew.workers.get_mut(&worker)
            && process.hangs.is_none()
        {
            process.doing = Doing::Nothing { since: self.now };
        }
    }

    fn arrives(&mut self, worker: WorkerId, group: cluster::Group) {
        self.stops(worker);
        let process = self.crew.workers.get_mut(&worker).expect("it acts");
        if process.hangs.is_some() {
            return;
        }
        process.doing = Doing::Forming { since: self.now };
        let generation = group.generation;
        let newest = self.crew.forming.as_ref().map(|forming| forming.group.generation);
        if newest > Some(generation) {
            return;
        }
        if newest < Some(generation) {
            let arrived = BTreeSet::new();
            self.crew.forming = Some(Forming { group, arrived });
            self.after(self.config.timeouts.form, Happening::Waited { generation });
        }
        let forming = self.crew.forming.as_mut().expect("it forms");
        forming.arrived.insert(worker);
        if forming.arrived.len() == forming.group.members.len() {
            let usual = u64::try_from(self.scenario.form.as_millis()).unwrap_or(u64::MAX);
            let form = self.chance.between(usual..=usual + usual / 4);
            self.after(Duration::from_millis(form), Happening::Formed { generation });
        }
    }

    fn formed(&mut self, generation: Generation) {
        let Some(forming) = self.crew.forming.take_if(|f| f.group.generation == generation) else {
            return;
        };
        let workers = &self.crew.workers;
        let forms =
            |w: &WorkerId| workers.get(w).is_some_and(|w| matches!(w.doing, Doing::Forming { .. }));
        if !forming.arrived.iter().all(forms) {
            self.crew.forming = Some(forming); // Somebody died on the way: the others go on waiting.
            return;
        }
        let held = forming.arrived.iter().filter_map(|worker| workers[worker].applied).max();
        let base = held.max(forming.group.checkpoint).unwrap_or_default();
        self.watch.formation(self.now, held, base);
        self.repeated += self.best.0.saturating_sub(base.0);
        let members: Vec<_> = forming.group.members.iter().map(|member| member.worker).collect();
        let step = step_time(self.scenario.step, self.scenario.workers, members.len());
        let (since, checkpoint_at) = (self.now, forming.group.checkpoint_at);
        let (stalled, leave_asked) = (None, false);
        let group = forming.group;
        self.crew.training = Some(Training { group, since, base, step, stalled, leave_asked });
        self.recoveries.extend(self.down_since.take().map(|down| self.now.since(down)));
        for &worker in &members {
            let process = self.crew.workers.get_mut(&worker).expect("it forms");
            process.doing = Doing::Training;
            process.applied = Some(base);
            let (digest, stopped_at, metrics) = (base.to_string(), None, None);
            let (step, begun) = (base, base);
            let formed = Notice::Formed { generation, step, digest, begun, stopped_at, metrics };
            self.notice(worker, formed);
        }
        if let (Some(step), Some(&first)) = (checkpoint_at, members.first()) {
            self.plan_checkpoint(first, step);
        }
    }

    /// A formation has lasted for too long: some say whom they miss.
    fn waited(&mut self, generation: Generation) {
        let Some(forming) = &self.crew.forming else { return };
        if forming.group.generation != generation {
            return;
        }
        let workers = &self.crew.workers;
        let is_there = |w: &WorkerId| forming.arrived.contains(w) && workers.contains_key(w);
        let members: Vec<_> = forming.group.members.iter().map(|member| member.worker).collect();
        let missing = members.iter().position(|worker| !is_there(worker));
        let peer =
            missing.map(|rank| Rank(u32::try_from(rank).expect("a group is not that large")));
        for worker in members.into_iter().filter(is_there).take(3).collect::<Vec<_>>() {
            self.stops(worker);
            let reason = "a peer did not come".to_owned();
            self.notice(worker, Notice::FormFailed { generation, peer, reason });
        }
    }

    fn lost(&mut self, worker: WorkerId, generation: Generation, peer: Option<Rank>) {
        let Some(process) = self.crew.workers.get(&worker) else { return };
        if process.hangs.is_some() || process.doing != Doing::Training {
            return;
        }
        let (applied, at) = (process.applied.unwrap_or_default(), self.now);
        let reason = "connection reset by peer".to_owned();
        self.stops(worker);
        self.notice(worker, Notice::ExchangeLost { generation, applied, peer, reason, at });
    }

    fn leave_together(&mut self, generation: Generation) {
        let ready = |t: &mut Training| {
            t.group.generation == generation && t.leave_asked && t.stalled.is_none()
        };
        self.settle();
        let Some(training) = self.crew.training.take_if(ready) else { return };
        for member in training.group.members.iter() {
            if let Some(process) = self.crew.workers.get_mut(&member.worker) {
                process.doing = Doing::Nothing { since: self.now };
                self.notice(member.worker, Notice::LeftTogether { generation });
            }
        }
    }

    // ---- Steps and checkpoints -------------------------------------------------------------

    /// Counts the steps that have been done by now, and lets rank 0 report the newest.
    fn settle(&mut self) {
        let Some(reached) = self.crew.settle(self.now) else { return };
        let training = self.crew.training.as_ref().expect("it has reached a step");
        if reached <= self.best {
            return;
        }
        let new = u32::try_from(reached.0 - self.best.0).expect("a run of less than ages");
        self.useful += training.step * new;
        self.best = reached;
        let generation = training.group.generation;
        let first = training.group.members.first().map(|member| member.worker);
        let step_ms = training.step.as_secs_f32() * 1e3;
        let metrics = StepMetrics { step_ms, ..StepMetrics::default() };
        let (step, at) = (reached, self.now);
        if let Some(first) = first {
            self.notice(first, Notice::StepApplied { generation, step, metrics, at });
        }
    }

    fn plan_checkpoint(&mut self, worker: WorkerId, step: Step) {
        let Some(training) = &self.crew.training else { return };
        if training.group.rank_of(worker) == Some(Rank(0)) && training.stalled.is_none() {
            let (generation, at) = (training.group.generation, training.ends(step));
            self.at(at, Happening::CheckpointDue { generation, step });
        }
    }

    fn checkpoint(&mut self, generation: Generation, step: Step) {
        self.settle();
        let Some(training) = &self.crew.training else { return };
        if training.group.generation != generation || training.stalled.is_some() {
            return;
        }
        let members = training.group.members.iter().map(|member| member.worker);
        let writers: Vec<_> = members.take(PARTS as usize).collect();
        let ranks = u32::try_from(writers.len()).expect("they are few");
        for (rank, worker) in (0..).zip(writers) {
            let parts = (0..PARTS).filter(|index| index % ranks == rank);
            let part = |index| Part { index, bytes: 1, digest: step.to_string() };
            let parts = parts.map(part).collect();
            let (parts_total, part_bytes, sections) = (PARTS, 1, Vec::new());
            let outcome = Ok(Share { step, parts, parts_total, part_bytes, sections });
            self.notice(worker, Notice::ShareSaved { generation, step, outcome });
        }
    }

    // ---- What goes wrong -------------------------------------------------------------------

    fn plan_fault(&mut self) {
        let mean = self.scenario.mtbf / self.scenario.workers;
        let next = self.chance.exponential(mean).max(Duration::from_millis(1));
        self.after(next, Happening::Fault);
    }

    fn fault(&mut self) {
        self.plan_fault();
        let alive = self.crew.workers.len() as u64;
        if alive == 0 {
            return;
        }
        let at = usize::try_from(self.chance.between(0..=alive - 1)).expect("it is an index");
        let victim = self.crew.workers.keys().nth(at).copied().expect("it is one of them");
        let kind = self.chance.between(0..=99);
        self.settle();
        if self.is_calm() {
            self.beats(Some(1)); // What it has heard all the time, and time has leapt over.
            self.beats(None);
        }
        (self.faults, self.last_fault) = (self.faults + 1, self.now);
        match kind {
            0..=9 => {
                if self.coordinator.take().is_some() {
                    let down = Duration::from_millis(self.chance.between(200..=10_000));
                    self.after(down, Happening::CoordinatorStart);
                }
            }
            10..=19 => self.hang(victim),
            20..=34 => self.die(victim, false),
            _ => self.die(victim, true),
        }
        self.keep_ticking();
    }

    fn hang(&mut self, worker: WorkerId) {
        let is_training = self.crew.trains(worker);
        let process = self.crew.workers.get_mut(&worker).expect("the victim lives");
        process.hangs.get_or_insert(self.now);
        if is_training {
            self.crew.stall(self.now);
            self.down_since.get_or_insert(self.now);
        }
    }

    /// A process ends. If its machine went with it, neither its peers nor a supervisor see it.
    fn die(&mut self, worker: WorkerId, is_seen: bool) {
        let is_training = self.crew.trains(worker);
        self.crew.workers.remove(&worker);
        self.after(self.scenario.repair, Happening::Arrival);
        if is_training {
            self.crew.stall(self.now);
            self.down_since.get_or_insert(self.now);
        }
        if !is_seen {
            return;
        }
        self.soon(Happening::Exited { worker });
        let Some(training) = &self.crew.training else { return };
        let (generation, peer) = (training.group.generation, training.group.rank_of(worker));
        let members = training.group.members.iter().map(|member| member.worker);
        let others: Vec<_> = members.filter(|&other| other != worker).take(2).collect();
        for worker in others.into_iter().filter(|_| peer.is_some()) {
            self.soon(Happening::Lost { worker, generation, peer });
        }
    }
}

fn is_opening(record: &Record) -> bool {
    matches!(record, Record::GenerationOpened { .. })
}
