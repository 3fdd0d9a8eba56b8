//! A worker's host: carries notices, actions, reports and orders for the real [`Participant`].

use std::collections::VecDeque;

use cluster::{
    Action, Exit, Fingerprint, Generation, Hello, Notice, Participant, Progress, Report, Timestamp,
    WorkerId,
};

use crate::{
    network::{Down, Up},
    plan::Fault,
    tamper::Tamper,
    trainer::{Trainer, Work},
    world::{Happening, World},
};

/// How long an exiting process waits for what it said to be acknowledged.
const FAREWELL_MS: u64 = 2_000;

/// One life of a process.
pub(crate) struct Worker {
    pub(crate) participant: Participant,
    pub(crate) trainer: Trainer,
    pub(crate) session: Option<u64>,
    /// Reports that are not acknowledged yet, in order.
    outbox: VecDeque<(u64, Report)>,
    said: u64,
    /// What waits while the process is frozen.
    pub(crate) backlog: Option<Vec<Happening>>,
    /// Whether it ever was: then the time of a phase is no measure of its work.
    pub(crate) was_frozen: bool,
    is_ready: bool,
    /// Asked to leave, by a person or a signal.
    pub(crate) told_to_leave: bool,
    exit: Option<Exit>,
    /// Between the agent and the trainer, both ways, nothing overtakes.
    to_trainer: Timestamp,
    from_trainer: Timestamp,
}

/// Something that happens inside a process.
#[derive(Debug, Clone)]
pub(crate) enum Inside {
    Connect,
    SessionLost {
        session: u64,
    },
    Beat,
    Noticed(Notice),
    Acted(Action),
    /// A piece of the trainer's work is done, unless it has turned to another since.
    Worked {
        token: u64,
        work: Work,
    },
    StopRequested,
    ExitNow,
}

impl Worker {
    pub(crate) fn is_exiting(&self) -> bool {
        self.exit.is_some()
    }
}

impl World {
    pub(crate) fn start_worker(&mut self) -> WorkerId {
        self.births += 1;
        let worker = WorkerId(self.births);
        self.tell(|| format!("worker {worker} starts"));
        let process = Worker {
            participant: Participant::new(worker),
            trainer: Trainer::default(),
            session: None,
            outbox: VecDeque::new(),
            said: 0,
            backlog: None,
            was_frozen: false,
            is_ready: false,
            told_to_leave: false,
            exit: None,
            to_trainer: self.now,
            from_trainer: self.now,
        };
        self.workers.insert(worker, process);
        self.after(0, Happening::Inside { worker, what: Inside::Connect });
        self.after(0, Happening::Inside { worker, what: Inside::Beat });
        let preparing = self.chance.between(0..=1_500);
        self.after(preparing, Happening::Inside { worker, what: Inside::Noticed(Notice::Ready) });
        worker
    }

    /// The process dies in the middle of what it does.
    pub(crate) fn crash(&mut self, worker: WorkerId) {
        // A machine that loses its power sends no farewell: neither peers nor the coordinator see it.
        let is_seen = self.chance.percent(80);
        self.tell(|| format!("worker {worker} dies, seen: {is_seen}"));
        self.end_process(worker, is_seen);
        if is_seen && self.chance.percent(60) {
            let delay = self.chance.between(0..=50);
            self.after(delay, Happening::Exited { worker });
        }
        if self.chance.percent(80) && self.births < 24 {
            let delay = self.chance.between(200..=5_000);
            self.after(delay, Happening::Arrival);
        }
    }

    fn end_process(&mut self, worker: WorkerId, is_seen: bool) {
        self.leave_mesh(worker, is_seen);
        if is_seen {
            self.watch.seen_dead.insert(worker);
        }
        let process = self.workers.remove(&worker).expect("it lived until now");
        if let Some(session) = process.session {
            self.worker_end_gone(session, is_seen);
        }
    }

    pub(crate) fn inside(&mut self, worker: WorkerId, what: Inside) {
        match what {
            Inside::Connect => self.connect(worker),
            Inside::SessionLost { session } => self.session_lost(worker, session),
            Inside::Beat => self.beat(worker),
            Inside::Noticed(notice) => self.noticed(worker, notice),
            Inside::Acted(action) => self.acted(worker, action),
            Inside::Worked { token, work } => self.worked(worker, token, work),
            Inside::StopRequested => {
                self.noticed(worker, Notice::StopRequested { reason: "SIGTERM".to_owned() });
            }
            Inside::ExitNow => self.exit_now(worker),
        }
        let now = self.now;
        if let Some(process) = self.workers.get_mut(&worker) {
            process.trainer.note_phase(now);
        }
    }

    pub(crate) fn process(&mut self, worker: WorkerId) -> &mut Worker {
        self.workers.get_mut(&worker).expect("it lives")
    }

    // ---- The session -----------------------------------------------------------------------

    fn connect(&mut self, worker: WorkerId) {
        if !self.office.is_up() {
            let patience = self.chance.between(50..=200);
            self.after(patience, Happening::Inside { worker, what: Inside::Connect });
            return;
        }
        let session = self.open_session(worker);
        let process = self.process(worker);
        process.session = Some(session);
        let hello = Hello {
            name: format!("worker-{worker}"),
            address: format!("10.0.0.{}:1", worker.0),
            node: String::new(),
            fingerprint: Fingerprint::default(),
            generation: process.participant.generation(),
            applied: process.trainer.state.map(|state| state.step),
            preparing: !process.is_ready,
        };
        let again: Vec<_> = process.outbox.iter().cloned().collect();
        self.send_up(session, Up::Hello(hello));
        for (sequence, report) in again {
            self.send_up(session, Up::Report(sequence, report));
        }
    }

    fn session_lost(&mut self, worker: WorkerId, session: u64) {
        if self.process(worker).session == Some(session) {
            self.process(worker).session = None;
            let patience = self.chance.between(20..=200);
            self.after(patience, Happening::Inside { worker, what: Inside::Connect });
        }
    }

    pub(crate) fn received(&mut self, worker: WorkerId, session: u64, message: Down) {
        if self.is_cut(session) || self.process(worker).session != Some(session) {
            return;
        }
        match message {
            Down::Order(term, order) => self.noticed(worker, Notice::Ordered { term, order }),
            Down::Ack(sequence) => {
                let process = self.process(worker);
                process.outbox.retain(|(said, _)| *said > sequence);
                if process.exit.is_some() && process.outbox.is_empty() {
                    self.exit_now(worker);
                }
            }
            Down::End => self.session_lost(worker, session),
        }
    }

    fn beat(&mut self, worker: WorkerId) {
        let heartbeat = self.plan.config.timeouts.heartbeat;
        let next = u64::try_from(heartbeat.as_millis()).expect("it is short");
        self.after(next, Happening::Inside { worker, what: Inside::Beat });
        let (now, tamper) = (self.now, self.tamper);
        let process = self.process(worker);
        let since = process.trainer.phase_since();
        let since = if tamper == Tamper::HidesHangs { now } else { since };
        let progress = Progress {
            generation: process.participant.generation().unwrap_or(Generation(0)),
            applied: process.trainer.state.map(|state| state.step),
            phase: process.trainer.phase(),
            in_phase: now.since(since),
            resident_bytes: 0,
        };
        if let Some(session) = process.session {
            self.send_up(session, Up::Report(0, Report::Heartbeat(progress)));
        }
    }

    // ---- The agent -------------------------------------------------------------------------

    fn noticed(&mut self, worker: WorkerId, notice: Notice) {
        self.process(worker).is_ready |= matches!(notice, Notice::Ready);
        self.tell(|| format!("{worker} notices {notice:?}"));
        let actions = self.process(worker).participant.handle(notice);
        for action in actions {
            self.tell(|| format!("  {worker} does {action:?}"));
            match action {
                Action::Report(report) => self.report(worker, report),
                Action::Exit(exit) => self.exit(worker, exit),
                action @ (Action::Form { .. }
                | Action::Abort { .. }
                | Action::LeaveAfterStep { .. }
                | Action::CheckpointAt { .. }) => {
                    let delay = self.chance.between(0..=3);
                    let process = self.workers.get_mut(&worker).expect("it lives");
                    let at = Timestamp(self.now.0 + delay).max(process.to_trainer);
                    process.to_trainer = at;
                    self.at(at, Happening::Inside { worker, what: Inside::Acted(action) });
                }
            }
        }
    }

    /// The trainer tells the agent something.
    pub(crate) fn notify(&mut self, worker: WorkerId, notice: Notice) {
        let delay = self.chance.between(0..=3);
        let process = self.workers.get_mut(&worker).expect("it lives");
        let at = Timestamp(self.now.0 + delay).max(process.from_trainer);
        process.from_trainer = at;
        self.at(at, Happening::Inside { worker, what: Inside::Noticed(notice) });
    }

    fn report(&mut self, worker: WorkerId, report: Report) {
        let process = self.process(worker);
        process.said += 1;
        let sequence = process.said;
        process.outbox.push_back((sequence, report.clone()));
        if let Some(session) = process.session {
            self.send_up(session, Up::Report(sequence, report));
        }
    }

    fn exit(&mut self, worker: WorkerId, exit: Exit) {
        self.leave_mesh(worker, true);
        let process = self.process(worker);
        process.trainer.stop();
        process.exit = Some(exit);
        let patience = if process.outbox.is_empty() { 1 } else { FAREWELL_MS };
        self.after(patience, Happening::Inside { worker, what: Inside::ExitNow });
    }

    fn exit_now(&mut self, worker: WorkerId) {
        let exit = self.process(worker).exit.clone();
        self.tell(|| format!("worker {worker} exits: {exit:?}"));
        self.end_process(worker, true);
        let is_refused = matches!(exit, Some(Exit::Refused(_)));
        let returns = self.births < 24 && self.plan.has(Fault::Crash);
        if is_refused && (returns || self.quiet.is_some()) {
            let delay = self.chance.between(200..=5_000);
            self.after(delay, Happening::Arrival);
        }
    }
}
