//! A coordinator on a table: its events come from the test, and its log is a list.

use std::{collections::BTreeMap, time::Duration};

use cluster::{
    Command, Coordinator, Evaluation, Event, ExitScores, Fingerprint, Generation, Group, Hello,
    Order, Part, Phase, Progress, Rank, Record, Report, RunConfig, RunId, Share, Step, StepMetrics,
    StepPhase, Timeouts, Timestamp, WorkerId,
};

pub(crate) const A: WorkerId = WorkerId(0xA);
pub(crate) const B: WorkerId = WorkerId(0xB);
pub(crate) const C: WorkerId = WorkerId(0xC);
pub(crate) const D: WorkerId = WorkerId(0xD);

/// Eight virtual ranks, 100 steps of which 40, 80 and 100 are kept; a lease of 2 s.
pub(crate) fn config(workers: u32) -> RunConfig {
    RunConfig {
        run: RunId::try_from("table".to_owned()).expect("the name is plain"),
        virtual_ranks: 8,
        steps_total: Step(100),
        steps_per_epoch: 20,
        evaluate_every_epochs: 1,
        checkpoint_every_epochs: 2,
        checkpoint_every_steps: 0,
        checkpoint_every: Duration::ZERO,
        workers_expected: workers,
        workers_min: 1,
        workers_max: 8,
        timeouts: Timeouts::derived_from(Duration::from_secs(10)).expect("it is long enough"),
    }
}

pub(crate) fn hello(worker: WorkerId) -> Hello {
    Hello {
        name: name(worker),
        address: format!("{worker}:1"),
        node: format!("host-{}", name(worker)),
        fingerprint: Fingerprint::default(),
        generation: None,
        applied: None,
        preparing: false,
    }
}

pub(crate) fn name(worker: WorkerId) -> String {
    char::from(b'A' + u8::try_from(worker.0 - 0xA).expect("they are few")).to_string()
}

pub(crate) struct Table {
    pub(crate) coordinator: Coordinator,
    pub(crate) log: Vec<Record>,
    pub(crate) now: Timestamp,
}

impl Table {
    pub(crate) fn new(config: RunConfig) -> Self {
        Self::restored(config, Vec::new(), Timestamp(0))
    }

    pub(crate) fn restored(config: RunConfig, log: Vec<Record>, now: Timestamp) -> Self {
        let coordinator = Coordinator::restore(now, config, &log);
        let mut table = Self { coordinator, log, now };
        table.handle(Event::DeadlineReached);
        table
    }

    /// The coordinator dies, and another takes over from its log.
    pub(crate) fn restart(self) -> Self {
        Self::restored(self.coordinator.config().clone(), self.log, self.now)
    }

    /// A run whose first generation trains, from step 0.
    pub(crate) fn training(members: &[WorkerId]) -> Self {
        Self::training_under(config(u32::try_from(members.len()).expect("they are few")), members)
    }

    pub(crate) fn training_under(config: RunConfig, members: &[WorkerId]) -> Self {
        let mut table = Self::new(config);
        for &member in members {
            table.join(member);
        }
        table.all_form(members, 0);
        table.is_training();
        table
    }

    pub(crate) fn handle(&mut self, event: Event) -> Vec<Command> {
        let commands = self.coordinator.handle(self.now, event);
        for command in &commands {
            if let Command::Append(record) = command {
                self.log.push(record.clone());
            }
        }
        commands
    }

    pub(crate) fn generation(&self) -> Generation {
        self.coordinator.ledger().generation
    }

    pub(crate) fn members(&self) -> Vec<WorkerId> {
        self.coordinator.ledger().members.iter().map(|member| member.worker).collect()
    }

    pub(crate) fn is_training(&self) {
        let phase = self.coordinator.phase();
        assert!(matches!(phase, Phase::Training { suspicion: None }), "{phase:?}");
    }

    pub(crate) fn wait_ms(&mut self, ms: u64) {
        self.now = self.now + Duration::from_millis(ms);
    }

    /// Time goes by as hosts see it: some workers beat, and deadlines are reached.
    pub(crate) fn pass_ms(&mut self, ms: u64, beating: &[WorkerId]) -> Vec<Command> {
        let mut all = Vec::new();
        for _ in 0..ms / 100 {
            self.wait_ms(100);
            for &worker in beating {
                all.extend(self.say(worker, beat(self.generation(), StepPhase::Compute)));
            }
            all.extend(self.handle(Event::DeadlineReached));
        }
        all
    }

    pub(crate) fn join(&mut self, worker: WorkerId) -> Vec<Command> {
        self.handle(Event::WorkerJoined { worker, hello: hello(worker) })
    }

    /// A worker opens a session again; it knows the newest generation.
    pub(crate) fn return_of(&mut self, worker: WorkerId) -> Vec<Command> {
        let generation = Some(self.generation());
        let hello = Hello { generation, ..hello(worker) };
        self.handle(Event::WorkerJoined { worker, hello })
    }

    pub(crate) fn close(&mut self, worker: WorkerId) -> Vec<Command> {
        self.handle(Event::SessionClosed { worker })
    }

    pub(crate) fn exit(&mut self, worker: WorkerId) -> Vec<Command> {
        self.handle(Event::ProcessExited { worker, how: "signal 9".to_owned() })
    }

    pub(crate) fn drain(&mut self, worker: WorkerId) -> Vec<Command> {
        self.handle(Event::DrainRequested { worker })
    }

    pub(crate) fn say(&mut self, worker: WorkerId, report: Report) -> Vec<Command> {
        self.handle(Event::Reported { worker, report })
    }

    pub(crate) fn form(&mut self, worker: WorkerId, step: u64) -> Vec<Command> {
        self.say(worker, formed(self.generation(), step))
    }

    pub(crate) fn all_form(&mut self, members: &[WorkerId], step: u64) {
        for &member in members {
            self.form(member, step);
        }
    }

    /// Rank 0 of the newest generation applies a step.
    pub(crate) fn apply(&mut self, step: u64) -> Vec<Command> {
        self.say(self.members()[0], applied(self.generation(), step))
    }

    pub(crate) fn finish(&mut self, worker: WorkerId, digest: &str) -> Vec<Command> {
        let (generation, step) = (self.generation(), Step(100));
        self.say(worker, Report::Finished { generation, step, state_sha256: digest.to_owned() })
    }
}

pub(crate) fn beat(generation: Generation, phase: StepPhase) -> Report {
    let in_phase = Duration::ZERO;
    Report::Heartbeat(Progress { generation, applied: None, phase, in_phase, resident_bytes: 0 })
}

pub(crate) fn formed(generation: Generation, step: u64) -> Report {
    Report::Formed {
        generation,
        step: Step(step),
        digest: format!("state-{step}"),
        begun: Step(step),
        stopped_at: None,
        metrics: None,
    }
}

pub(crate) fn applied(generation: Generation, step: u64) -> Report {
    let metrics = StepMetrics { step_ms: 100.0, ..StepMetrics::default() };
    Report::StepApplied { generation, step: Step(step), metrics, at: Timestamp(0) }
}

pub(crate) fn lost(generation: Generation, peer: Option<u32>) -> Report {
    Report::ExchangeLost {
        generation,
        applied: Step(0),
        peer: peer.map(Rank),
        reason: "connection reset".to_owned(),
        at: Timestamp(0),
    }
}

pub(crate) fn form_failed(generation: Generation, peer: Option<u32>) -> Report {
    let reason = "connection refused".to_owned();
    Report::FormFailed { generation, peer: peer.map(Rank), reason }
}

pub(crate) fn leaving() -> Report {
    Report::Leaving { reason: "SIGTERM".to_owned() }
}

/// A share of a checkpoint of four parts.
pub(crate) fn share(generation: Generation, step: u64, parts: &[u32]) -> Report {
    let part = |&index| Part { index, bytes: 1, digest: format!("state-{step}-{index}") };
    let share = Share {
        step: Step(step),
        parts: parts.iter().map(part).collect(),
        parts_total: 4,
        part_bytes: 1,
        sections: vec![("parameters".to_owned(), 4)],
    };
    Report::ShareWritten { generation, share }
}

pub(crate) fn evaluated(generation: Generation, step: u64) -> Report {
    let (weights, ema) = (ExitScores::default(), ExitScores::default());
    let epoch = cluster::Epoch(step / 20);
    let evaluation = Evaluation { step: Step(step), epoch, samples: 1, weights, ema };
    Report::Evaluated { generation, evaluation }
}

/// Who is ordered into which group.
pub(crate) fn forms(commands: &[Command]) -> BTreeMap<WorkerId, Group> {
    let form = |command: &Command| {
        let Command::Send { worker, order: Order::Form(group) } = command else { return None };
        Some((*worker, group.clone()))
    };
    commands.iter().filter_map(form).collect()
}

/// All that is said to a worker.
pub(crate) fn said_to(commands: &[Command], whom: WorkerId) -> Vec<Order> {
    let said = |command: &Command| {
        let Command::Send { worker, order } = command else { return None };
        (*worker == whom).then(|| order.clone())
    };
    commands.iter().filter_map(said).collect()
}

pub(crate) fn records(commands: &[Command]) -> Vec<Record> {
    let record = |command: &Command| {
        let Command::Append(record) = command else { return None };
        Some(record.clone())
    };
    commands.iter().filter_map(record).collect()
}

/// Whom the coordinator gave up.
pub(crate) fn losses(commands: &[Command]) -> Vec<WorkerId> {
    let lost = |record: Record| {
        let Record::WorkerLost { worker, .. } = record else { return None };
        Some(worker)
    };
    records(commands).into_iter().filter_map(lost).collect()
}
