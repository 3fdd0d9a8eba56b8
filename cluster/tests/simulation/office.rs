//! The coordinator's host: one process at a time, over a log that outlives it.

use std::collections::{BTreeMap, VecDeque};

use cluster::{
    Command, Coordinator, Event, Generation, Order, Progress, Record, Report, Step, StepPhase,
    Timestamp, WorkerId,
};

use crate::{
    network::{Down, Up},
    plan::Fault,
    tamper::Tamper,
    world::{Happening, World},
};

#[derive(Default)]
pub(crate) struct Office {
    /// Which process this is.
    pub(crate) life: u64,
    pub(crate) coordinator: Option<Coordinator>,
    /// The newest session of each worker.
    current: BTreeMap<WorkerId, u64>,
    /// What waits while the process is stopped.
    asleep: Option<VecDeque<Happening>>,
    alarm: Option<Timestamp>,
    /// Parts that are in the store, as the manifest to be committed names them.
    committing: BTreeMap<(u64, Step), u64>,
}

impl Office {
    pub(crate) fn is_up(&self) -> bool {
        self.coordinator.is_some()
    }
}

impl World {
    pub(crate) fn start_coordinator(&mut self) {
        self.office.life += 1;
        let config = self.plan.config.clone();
        let log = self.readable_log();
        let coordinator = Coordinator::restore(self.now, config, &log);
        self.watch.no_committed_step_is_lost(coordinator.ledger());
        self.office.coordinator = Some(coordinator);
        self.tell(|| "the coordinator starts".to_owned());
        self.event(Event::DeadlineReached);
    }

    /// What a new coordinator reads.
    fn readable_log(&self) -> Vec<Record> {
        let mut log = self.log.clone();
        let is_step = |record: &Record| matches!(record, Record::StepAdopted { .. });
        let last = log.iter().rposition(is_step).filter(|_| self.tamper == Tamper::ForgetsTheTail);
        if let Some(last) = last {
            log.remove(last);
        }
        if self.tamper == Tamper::ForgetsTheTerms {
            log.retain(|record| !matches!(record, Record::TermStarted { .. }));
        }
        log
    }

    pub(crate) fn crash_coordinator(&mut self) {
        if self.office.coordinator.take().is_none() {
            return;
        }
        self.tell(|| "the coordinator dies".to_owned());
        let life = self.office.life;
        let sessions: Vec<_> = self.workers.values().filter_map(|worker| worker.session).collect();
        self.office.current.clear();
        self.office.asleep = None;
        self.office.alarm = None;
        self.office.committing.clear();
        self.office.life += 1; // Nothing that was meant for the dead one reaches the next.
        let sessions = sessions.into_iter().filter(|session| self.sessions[session].life == life);
        for session in sessions.collect::<Vec<_>>() {
            self.send_down(session, Down::End);
        }
        let long = self.chance.percent(30);
        let down = self.chance.between(if long { 2_000..=12_000 } else { 50..=1_000 });
        self.after(down, Happening::CoordinatorStart);
    }

    pub(crate) fn put_coordinator_to_sleep(&mut self) {
        if self.office.asleep.is_none() && self.office.is_up() {
            self.office.asleep = Some(VecDeque::new());
            let ms = self.chance.between(50..=15_000);
            self.tell(|| format!("the coordinator sleeps for {ms} ms"));
            self.after(ms, Happening::CoordinatorWake);
        }
    }

    pub(crate) fn wake_coordinator(&mut self) {
        let waiting = self.office.asleep.take();
        self.tell(|| "the coordinator wakes".to_owned());
        for happening in waiting.into_iter().flatten() {
            self.at_the_office(happening);
        }
    }

    /// Something reaches the coordinator's host.
    pub(crate) fn at_the_office(&mut self, happening: Happening) {
        if let Some(waiting) = &mut self.office.asleep {
            waiting.push_back(happening);
            return;
        }
        if !self.office.is_up() {
            return;
        }
        match happening {
            Happening::Up { session, message } => self.heard(session, message),
            Happening::SessionEndSeen { session } => {
                let Some(link) = self.sessions.get(&session) else { return };
                let worker = link.worker;
                if self.office.current.get(&worker) == Some(&session) {
                    self.office.current.remove(&worker);
                    self.event(Event::SessionClosed { worker });
                }
            }
            Happening::Exited { worker } => {
                self.event(Event::ProcessExited { worker, how: "signal 9".to_owned() });
            }
            Happening::Requested { worker } => {
                self.event(Event::DrainRequested { worker });
            }
            Happening::Resized { workers } => {
                self.event(Event::ResizeRequested { workers });
            }
            Happening::Committed { life, step, failed } if life == self.office.life => {
                self.committed(step, failed);
            }
            Happening::Alarm { life } if life == self.office.life => {
                self.office.alarm = None;
                let coordinator = self.office.coordinator.as_ref().expect("the office is up");
                if coordinator.next_deadline().is_some_and(|deadline| deadline <= self.now) {
                    self.event(Event::DeadlineReached);
                } else {
                    self.set_alarm();
                }
            }
            Happening::Committed { .. } | Happening::Alarm { .. } => {} // Of another life.
            Happening::Down { .. }
            | Happening::Inside { .. }
            | Happening::Thaw { .. }
            | Happening::Healed { .. }
            | Happening::CoordinatorStart
            | Happening::CoordinatorWake
            | Happening::Arrival
            | Happening::NextFault
            | Happening::Quiet => unreachable!("it happens elsewhere"),
        }
    }

    fn heard(&mut self, session: u64, message: Up) {
        let link = &self.sessions[&session];
        if self.is_cut(session) || link.life != self.office.life {
            return;
        }
        let worker = link.worker;
        match message {
            Up::Hello(hello) => {
                self.office.current.insert(worker, session);
                self.event(Event::WorkerJoined { worker, hello });
            }
            Up::Report(sequence, report) => {
                if self.office.current.get(&worker) != Some(&session) {
                    return;
                }
                if sequence > 0 && self.strikes(Fault::Duplicate, 3) {
                    let delay = self.chance.between(0..=3_000);
                    let message = Up::Report(sequence, report.clone());
                    self.after(delay, Happening::Up { session, message });
                }
                let is_done = self.reported(worker, report);
                if is_done && sequence > 0 && self.office.current.get(&worker) == Some(&session) {
                    self.send_down(session, Down::Ack(sequence));
                }
            }
        }
    }

    /// Hands a report in, and checks that an outdated one has no more effect than a heartbeat.
    fn reported(&mut self, worker: WorkerId, report: Report) -> bool {
        let coordinator = self.office.coordinator.as_ref().expect("the office is up");
        let ledger = coordinator.ledger();
        let said = generation_of(&report);
        // That a generation stood after all is news even if it was given up for a lost newcomer.
        let stood = matches!(report, Report::Formed { .. }) && ledger.intact.is_some();
        let counts = |g| Some(g) == ledger.intact || (stood && Some(g) > ledger.intact);
        let is_stale = said.is_some_and(|g| g < ledger.generation && !counts(g));
        let unmoved = is_stale.then(|| {
            let mut unmoved = coordinator.clone();
            let progress = Progress {
                generation: Generation(0),
                applied: None,
                phase: StepPhase::Idle,
                in_phase: std::time::Duration::ZERO,
                resident_bytes: 0,
            };
            let report = Report::Heartbeat(progress);
            unmoved.handle(self.now, Event::Reported { worker, report });
            unmoved.ledger().clone()
        });
        let newest = ledger.generation;
        let report = if is_stale && self.tamper == Tamper::PassesOldNews {
            relabelled(report, newest)
        } else {
            report
        };
        let worker = self.mistaken(worker, &report);
        let is_done = self.event(Event::Reported { worker, report });
        if let (Some(unmoved), Some(coordinator)) = (unmoved, &self.office.coordinator) {
            let is_same = unmoved == *coordinator.ledger();
            self.watch.no_stale_report_changes_the_ledger(is_same, worker, said);
        }
        is_done
    }

    /// Whom the host takes a report to come from.
    fn mistaken(&self, worker: WorkerId, report: &Report) -> WorkerId {
        let is_beat = matches!(report, Report::Heartbeat(_));
        if self.tamper != Tamper::BlamesAnother || !is_beat {
            return worker;
        }
        let hangs = |other: &WorkerId| self.workers.get(other).is_some_and(|w| w.trainer.hangs);
        let others = || self.office.current.keys().copied();
        match (others().find(hangs), others().find(|other| !hangs(other))) {
            (Some(one), Some(other)) if worker == one => other,
            (Some(one), Some(other)) if worker == other => one,
            _ => worker,
        }
    }

    fn committed(&mut self, step: Step, failed: bool) {
        let Some(state) = self.office.committing.remove(&(self.office.life, step)) else { return };
        if failed {
            let reason = "the store said no".to_owned();
            self.event(Event::CheckpointFailed { step, reason });
        } else {
            self.store.insert(step, state);
            self.event(Event::CheckpointCommitted { step });
        }
    }

    /// Calls the machine and carries out what it asks for; false if the process died on the way.
    pub(crate) fn coordinator_handles(&mut self, event: Event) -> bool {
        if self.tamper == Tamper::MissesDeadlines && matches!(event, Event::DeadlineReached) {
            self.office.alarm = None;
            return true;
        }
        let stands = self.tamper == Tamper::StopsTheClock && self.log.len() > 20;
        let now = if stands { Timestamp(self.now.0 - 60_000) } else { self.now };
        let coordinator = self.office.coordinator.as_mut().expect("the office is up");
        let is_deadline = matches!(event, Event::DeadlineReached);
        let commands = coordinator.handle(now, event);
        if is_deadline {
            let deadline = coordinator.next_deadline();
            self.watch.a_deadline_lies_ahead(self.now, deadline);
        }
        let writes = commands.iter().any(|command| matches!(command, Command::Append(_)));
        if writes && self.strikes(Fault::LogError, 2) {
            self.tell(|| "the log cannot be written".to_owned());
            self.crash_coordinator();
            return false;
        }
        let dies = commands.len() > 1 && self.strikes(Fault::CoordinatorCrash, 2);
        if dies {
            self.carry_out_some(commands);
            self.crash_coordinator();
            return false;
        }
        commands.into_iter().for_each(|command| self.carry_out(command));
        let coordinator = self.office.coordinator.as_ref().expect("it lives on");
        self.watch.the_ledger_is_the_fold_of_the_log(coordinator.ledger());
        self.set_alarm();
        true
    }

    /// Some of the commands, in order; a host may also make all records of a batch durable first.
    fn carry_out_some(&mut self, commands: Vec<Command>) {
        let (mut first, mut then) = (commands, Vec::new());
        if self.chance.percent(50) {
            (first, then) =
                first.into_iter().partition(|command| matches!(command, Command::Append(_)));
        }
        first.append(&mut then);
        let done = self.chance.between(0..=first.len() as u64 - 1);
        for (command, _) in first.into_iter().zip(0..done) {
            self.carry_out(command);
        }
    }

    fn carry_out(&mut self, command: Command) {
        match command {
            Command::Append(record) => self.append(record),
            Command::Send { worker, order } => {
                self.watch.a_generation_is_durable_before_it_is_announced(&order);
                if self.tamper == Tamper::KeepsTheEnd && matches!(order, Order::Finish { .. }) {
                    return;
                }
                if let Some(&session) = self.office.current.get(&worker) {
                    self.tell(|| format!("  to {worker}: {order:?}"));
                    let coordinator = self.office.coordinator.as_ref().expect("the office is up");
                    let term = coordinator.term();
                    self.send_down(session, Down::Order(term, order));
                }
            }
            Command::Close { worker } => {
                if let Some(session) = self.office.current.remove(&worker) {
                    self.send_down(session, Down::End);
                }
            }
            Command::CommitCheckpoint { step, parts, .. } => {
                let state = self.watch.a_checkpoint_is_one_state(step, &parts);
                let life = self.office.life;
                self.office.committing.insert((life, step), state);
                let is_last = step == self.plan.config.steps_total;
                let failed = !is_last && self.strikes(Fault::StoreError, 30);
                let delay = self.chance.between(1..=800);
                self.after(delay, Happening::Committed { life, step, failed });
            }
        }
    }

    fn append(&mut self, record: Record) {
        let record = self.tampered(record);
        let is_step = matches!(record, Record::StepAdopted { .. });
        let is_generation = matches!(record, Record::GenerationOpened { .. });
        let is_lost = (is_step && self.tamper == Tamper::LosesSteps)
            || (is_generation && self.tamper == Tamper::AnnouncesBeforeDurable);
        if is_lost {
            return;
        }
        self.tell(|| format!("  record {record:?}"));
        self.watch_record(&record);
        self.log.push(record.clone());
        match (self.tamper, &record) {
            (Tamper::AdoptsTwice, Record::StepAdopted { .. }) => self.watch_record(&record),
            (Tamper::OpensAfterTheEnd, Record::RunFinished { .. }) => {
                let ledger = &self.watch.durable;
                let (generation, members) = (ledger.generation.next(), ledger.members.clone());
                let (planned, last, reason) = (false, false, "it goes on".to_owned());
                self.watch_record(&Record::GenerationOpened {
                    generation,
                    members,
                    planned,
                    last,
                    reason,
                });
            }
            _ => {}
        }
    }

    fn tampered(&self, record: Record) -> Record {
        match (self.tamper, record) {
            (Tamper::SkipsAStep, Record::StepAdopted { step, generation, metrics, applied_at }) => {
                Record::StepAdopted { step: step.next(), generation, metrics, applied_at }
            }
            (
                Tamper::AdoptsFromThePast,
                Record::StepAdopted { step, generation, metrics, applied_at },
            ) if self.watch.durable.intact == Some(generation) => {
                let generation = Generation(generation.0 - 1);
                Record::StepAdopted { step, generation, metrics, applied_at }
            }
            (
                Tamper::SkipsAGeneration,
                Record::GenerationOpened { generation, members, planned, last, reason },
            ) => {
                let generation = generation.next();
                Record::GenerationOpened { generation, members, planned, last, reason }
            }
            (_, record) => record,
        }
    }

    fn set_alarm(&mut self) {
        let coordinator = self.office.coordinator.as_ref().expect("the office is up");
        let Some(deadline) = coordinator.next_deadline() else { return };
        if self.office.alarm.is_none_or(|alarm| deadline < alarm) {
            self.office.alarm = Some(deadline);
            let life = self.office.life;
            let late = self.chance.between(0..=5);
            let at = Timestamp(deadline.max(self.now).0 + late);
            self.at(at, Happening::Alarm { life });
        }
    }
}

/// The generation that a report speaks of. Heartbeats only say that somebody is alive.
fn generation_of(report: &Report) -> Option<Generation> {
    match report {
        Report::Formed { generation, .. }
        | Report::FormFailed { generation, .. }
        | Report::ExchangeLost { generation, .. }
        | Report::StepApplied { generation, .. }
        | Report::Evaluated { generation, .. }
        | Report::ShareWritten { generation, .. }
        | Report::ShareFailed { generation, .. }
        | Report::CheckpointDamaged { generation, .. }
        | Report::Diverged { generation, .. }
        | Report::Finished { generation, .. } => Some(*generation),
        Report::Heartbeat(_)
        | Report::NodeFaulty { .. }
        | Report::Ready
        | Report::Leaving { .. }
        | Report::Failed { .. } => None,
    }
}

fn relabelled(report: Report, newest: Generation) -> Report {
    match report {
        Report::StepApplied { step, metrics, at, .. } => {
            Report::StepApplied { generation: newest, step, metrics, at }
        }
        Report::Finished { step, state_sha256, .. } => {
            Report::Finished { generation: newest, step, state_sha256 }
        }
        Report::Evaluated { evaluation, .. } => {
            Report::Evaluated { generation: newest, evaluation }
        }
        other @ (Report::Heartbeat(_)
        | Report::Ready
        | Report::Formed { .. }
        | Report::FormFailed { .. }
        | Report::ExchangeLost { .. }
        | Report::ShareWritten { .. }
        | Report::ShareFailed { .. }
        | Report::CheckpointDamaged { .. }
        | Report::Diverged { .. }
        | Report::NodeFaulty { .. }
        | Report::Leaving { .. }
        | Report::Failed { .. }) => other,
    }
}
