//! The one task that owns a run on this machine: it starts, disturbs, replaces and ends processes.

mod children;
mod ending;

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, anyhow, bail};
use cluster::{Outcome, Record, RunConfig, Step, Timestamp, WorkerId};
use coordinator::Entry;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    task::JoinHandle,
};

use self::children::{Seat, Worker};
use crate::{
    client::{self, Client},
    history, print,
    run_dir::{Lock, RunDir, coordinator_name},
    up::{
        chaos::{Chaos, Deed, Disturbance, victim},
        face::{Face, Position},
        means::Means,
        prepare::Prepared,
        process::End,
        report::{Report, Summary, worker_number},
        rules::{self, WorkerEnd, WorkerRules},
        watch::{self, News},
        words,
    },
};

/// Happenings that wait for the supervisor at most.
const HAPPENINGS_MAX: usize = 1024;
/// A worker that ends in order near the end of the run does so because the run is finished: the log is
/// about to say so.
const RELEASE_PATIENCE: Duration = Duration::from_secs(3);
/// How long a run that is to stop may take to keep its state.
const LAST_CHECKPOINT_MAX: Duration = Duration::from_secs(20);
/// A report to a coordinator that is away is tried again after so long.
const REPORT_RETRY: Duration = Duration::from_millis(100);

/// How supervising ended.
#[derive(Debug)]
pub(crate) enum Ending {
    /// The run is finished.
    Finished(Box<Summary>),
    /// Somebody wanted it to stop.
    Interrupted,
}

/// What the supervisor hears of.
#[derive(Debug)]
pub(crate) enum Happening {
    /// From the coordinator.
    News(News),
    /// A coordinator listens here, or will when it leads.
    Serving(u32, String),
    /// The process of a coordinator ended.
    CoordinatorEnded(u32, End),
    /// The time to start a coordinator again has come.
    CoordinatorDue(u32),
    /// The process of a worker ended.
    WorkerEnded(u32, End),
    /// The time to look for missing workers has come.
    WorkersDue,
    /// Somebody wants the run to stop.
    Interrupted,
    /// The state after this step is about to be kept, and then the run stops; none if that cannot be.
    LastKept(Option<Step>),
}

/// Whether the run is to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stopping {
    No,
    /// The coordinator has been asked to keep the state.
    Asked,
    /// When the state after this step is kept.
    After(Step),
}

/// Why the loop is left.
#[derive(Debug)]
enum Exit {
    Ended(Outcome),
    Interrupted,
    GaveUp(anyhow::Error),
}

#[derive(Debug)]
struct Supervisor {
    dir: RunDir,
    _lock: Lock,
    plan: RunConfig,
    token: String,
    means: Means,
    worker_program: std::path::PathBuf,
    report: Report,
    chaos: Chaos,
    face: Face,
    happenings: mpsc::Sender<Happening>,
    /// By seat; all that stand by can lead.
    seats: Vec<Seat>,
    client: Option<Client>,
    workers: BTreeMap<u32, Worker>,
    workers_next: u32,
    worker_rules: WorkerRules,
    ids: BTreeMap<u32, WorkerId>,
    /// Workers that ended before the log had said who they are, with how.
    unknown: BTreeMap<u32, String>,
    tasks: Vec<JoinHandle<()>>,
    stopping: Stopping,
}

/// Trains until the run has ended or somebody wants it to stop.
///
/// # Errors
/// Why the run failed or was given up. No process is left.
pub(crate) async fn supervise(prepared: Prepared) -> Result<Ending> {
    let Prepared { dir, lock, plan, token, standbys, means, .. } = prepared;
    let Prepared { chaos, json, worker_program, report, .. } = prepared;
    let workers = plan.workers_expected;
    let (happenings, mut receiver) = mpsc::channel(HAPPENINGS_MAX);
    let mut supervisor = Supervisor {
        face: Face::new(json, plan.steps_total.0, plan.steps_per_epoch),
        _lock: lock,
        worker_rules: WorkerRules::new(plan.workers_min),
        seats: (0..=standbys).map(|_| Seat::default()).collect(),
        client: None,
        workers: BTreeMap::new(),
        workers_next: 0,
        ids: BTreeMap::new(),
        unknown: BTreeMap::new(),
        tasks: Vec::new(),
        stopping: Stopping::No,
        dir,
        plan,
        token,
        means,
        worker_program,
        report,
        chaos,
        happenings,
    };
    supervisor.announce(workers);
    supervisor.listen_for_signals()?;
    let started = (0..=standbys).try_for_each(|seat| supervisor.start_coordinator(seat));
    let exit = match started {
        Ok(()) => supervisor.run(&mut receiver).await,
        Err(error) => Exit::GaveUp(error),
    };
    supervisor.end(exit, &mut receiver).await
}

impl Supervisor {
    async fn run(&mut self, receiver: &mut mpsc::Receiver<Happening>) -> Exit {
        loop {
            let happening = receiver.recv().await.expect("the supervisor holds a sender itself");
            match self.take(happening) {
                Ok(None) => {}
                Ok(Some(exit)) => return exit,
                Err(error) => return Exit::GaveUp(error),
            }
        }
    }

    fn take(&mut self, happening: Happening) -> Result<Option<Exit>> {
        match happening {
            Happening::News(News::Entry(entry)) => return self.entry(&entry),
            Happening::News(News::Liveness(liveness)) => self.report.heard(&liveness),
            Happening::News(News::Lost(error)) => {
                return Err(error.context("the run cannot be followed"));
            }
            Happening::Serving(seat, address) => self.serving(seat, address)?,
            Happening::CoordinatorEnded(seat, end) => return self.coordinator_ended(seat, &end),
            Happening::CoordinatorDue(seat) => self.start_coordinator(seat)?,
            Happening::WorkerEnded(number, end) => self.worker_ended(number, &end)?,
            Happening::WorkersDue => self.replace_workers()?,
            Happening::Interrupted => return Ok(self.interrupted()),
            Happening::LastKept(step) => return Ok(self.last_kept(step)),
        }
        Ok(None)
    }

    /// The state is kept before the processes end; whoever asks again does not want to wait for it.
    fn interrupted(&mut self) -> Option<Exit> {
        let ledger = self.report.ledger();
        let is_kept = ledger.checkpoints.last().is_some_and(|&kept| kept >= ledger.canonical);
        let is_idle = is_kept || ledger.canonical == Step(0) || self.workers.is_empty();
        let client = self.client.clone().filter(|_| !is_idle && self.stopping == Stopping::No);
        let Some(client) = client else { return Some(Exit::Interrupted) };
        self.stopping = Stopping::Asked;
        self.face.line("the state is kept before the run stops; once more to stop at once");
        let happenings = self.happenings.clone();
        self.tasks.push(tokio::spawn(async move {
            let step = client.checkpoint().await.ok();
            happenings.send(Happening::LastKept(step)).await.ok(); // It may have stopped meanwhile.
        }));
        self.later(LAST_CHECKPOINT_MAX, Happening::LastKept(None));
        None
    }

    fn last_kept(&mut self, step: Option<Step>) -> Option<Exit> {
        let Some(step) = step else {
            self.face.line("the state could not be kept before the run stops");
            return Some(Exit::Interrupted);
        };
        self.stopping = Stopping::After(step);
        self.stops_now().then_some(Exit::Interrupted)
    }

    /// Whether the run was to stop after a checkpoint that is there, or will not be.
    fn stops_now(&self) -> bool {
        let Stopping::After(step) = self.stopping else { return false };
        let ledger = self.report.ledger();
        ledger.checkpoints.last().is_some_and(|&kept| kept >= step)
    }

    fn announce(&self, workers: u32) {
        let Self { plan, dir, report, .. } = self;
        let many = if workers == 1 { "1 worker".to_owned() } else { format!("{workers} workers") };
        self.face.line(&format!(
            "run {}: {} steps, {} an epoch, on {many}; kept in {dir}",
            plan.run,
            print::grouped(plan.steps_total.0),
            print::grouped(plan.steps_per_epoch)
        ));
        if report.last() > 0 {
            let step = report.ledger().checkpoints.last().copied().unwrap_or_default();
            self.face.line(&format!("it goes on from step {step}, the newest that was kept"));
        }
    }

    fn listen_for_signals(&mut self) -> Result<()> {
        for kind in [SignalKind::interrupt(), SignalKind::terminate()] {
            let mut signals = signal(kind).context("signals cannot be listened for")?;
            let happenings = self.happenings.clone();
            self.tasks.push(tokio::spawn(async move {
                while signals.recv().await.is_some() {
                    if happenings.send(Happening::Interrupted).await.is_err() {
                        return;
                    }
                }
            }));
        }
        Ok(())
    }

    // ---- The log ---------------------------------------------------------------------------

    fn entry(&mut self, entry: &Entry) -> Result<Option<Exit>> {
        if entry.sequence <= self.report.last() {
            return Ok(None); // Read from the file already.
        }
        self.report.apply(entry);
        if let Some(line) = words::describe(&entry.record, self.report.ledger()) {
            self.face.line(&line);
        }
        match &entry.record {
            Record::WorkerJoined { worker, name, .. } => self.worker_joined(*worker, name),
            Record::WorkerLost { name, .. } => self.worker_lost(name),
            Record::StepAdopted { step, metrics, .. } => {
                self.worker_rules.step_adopted();
                self.face.step(&Position {
                    step: *step,
                    generation: self.report.ledger().generation.0,
                    workers: self.report.ledger().members.len(),
                    metrics: *metrics,
                });
                self.disturb()?;
            }
            Record::Resized { workers } => self.resized(*workers)?,
            Record::RunCreated { .. }
            | Record::TermStarted { .. }
            | Record::FingerprintFixed { .. }
            | Record::WorkerRefused { .. }
            | Record::NodeMarked { .. }
            | Record::NodeReadmitted { .. }
            | Record::ExchangeLost { .. }
            | Record::GenerationOpened { .. }
            | Record::GenerationFormed { .. }
            | Record::Evaluated { .. }
            | Record::CheckpointCommitted { .. }
            | Record::CheckpointAbandoned { .. }
            | Record::RunFinished { .. }
            | Record::RunFailed { .. } => {}
        }
        let ended = self.report.ledger().outcome.clone().map(Exit::Ended);
        Ok(ended.or_else(|| self.stops_now().then_some(Exit::Interrupted)))
    }

    /// Learns who a worker is; if it has ended meanwhile, the coordinator is told now.
    fn worker_joined(&mut self, worker: WorkerId, name: &str) {
        let number = worker_number(name);
        if number < self.workers_next {
            self.ids.insert(number, worker);
            if let Some(how) = self.unknown.remove(&number) {
                self.report_exit(worker, how);
            }
        }
    }

    /// A worker that hangs on request has been given up: now it can go.
    fn worker_lost(&mut self, name: &str) {
        if let Some(worker) = self.workers.get_mut(&worker_number(name))
            && worker.stopped
        {
            worker.kill();
        }
    }

    // ---- Processes end ---------------------------------------------------------------------

    fn worker_ended(&mut self, number: u32, end: &End) -> Result<()> {
        let Some(worker) = self.workers.remove(&number) else { return Ok(()) };
        let how = rules::in_words(end.status);
        match self.ids.get(&number) {
            Some(&id) => self.report_exit(id, how.clone()),
            None => drop(self.unknown.insert(number, how.clone())),
        }
        let ended = WorkerEnd::of(end.status, worker.staged);
        let why = end.last_error.as_deref().unwrap_or(&how);
        match ended {
            WorkerEnd::Refused => self.face.line(&format!("worker-{number} was refused: {why}")),
            WorkerEnd::Failed => self.face.line(&format!("worker-{number} failed: {why}")),
            WorkerEnd::Released | WorkerEnd::Staged => {}
        }
        if self.worker_rules.worker_ended(ended) {
            bail!(
                "{} workers in a row have ended without a step of progress, the last with: {why}; \
                 see {}",
                rules::FAILURES_MAX,
                self.dir.process_log(&format!("worker-{number}")).display()
            );
        }
        if ended == WorkerEnd::Released {
            self.later(RELEASE_PATIENCE, Happening::WorkersDue);
            return Ok(());
        }
        self.replace_workers()
    }

    fn replace_workers(&mut self) -> Result<()> {
        for _ in 0..self.worker_rules.missing(self.live_workers().len()) {
            let number = self.start_worker()?;
            self.face.line(&format!("worker-{number} is started: too few are left"));
        }
        Ok(())
    }

    /// Starts the workers that are missing for the new number. Those that are too many leave by
    /// themselves when they are let go.
    fn resized(&mut self, workers: u32) -> Result<()> {
        if self.client.is_none() {
            return Ok(()); // From a time before this start, which knows the number.
        }
        let live = self.live_workers().len();
        for _ in 0..self.worker_rules.resized(live, workers) {
            let number = self.start_worker()?;
            self.face.line(&format!("worker-{number} is started: {workers} are to take part"));
        }
        Ok(())
    }

    fn coordinator_ended(&mut self, number: u32, end: &End) -> Result<Option<Exit>> {
        let Some(coordinator) = self.seat(number).coordinator.take() else { return Ok(None) };
        let name = coordinator_name(number);
        let how = rules::in_words(end.status);
        if end.status.code().is_some()
            && let Some(exit) = self.read_rest()?
        {
            return Ok(Some(exit));
        }
        let why = end.last_error.as_deref().unwrap_or(&how);
        let Some(delay) = self.seat(number).rules.ended(end.lived, coordinator.staged) else {
            let log = self.dir.process_log(&name);
            bail!("the {name} cannot be kept up: {why}; see {}", log.display());
        };
        self.face.line(&format!("the {name} ended ({why}) and is started again"));
        if delay.is_zero() {
            self.start_coordinator(number)?;
        } else {
            self.later(delay, Happening::CoordinatorDue(number));
        }
        Ok(None)
    }

    /// A coordinator that ended by itself may have written more than it could tell.
    fn read_rest(&mut self) -> Result<Option<Exit>> {
        let (dir, from) = (self.dir.clone(), self.report.last() + 1);
        let read = async {
            match history::open_log(&dir).await? {
                Some(log) => log.read_from(from).await,
                None => Ok(Vec::new()),
            }
        };
        let runtime = tokio::runtime::Handle::current();
        let entries = match tokio::task::block_in_place(|| runtime.block_on(read)) {
            Ok(entries) => entries,
            Err(_) => return Ok(None), // If it cannot be used, the next coordinator will say why.
        };
        for entry in &entries {
            if let Some(exit) = self.entry(entry)? {
                return Ok(Some(exit));
            }
        }
        Ok(None)
    }

    // ---- Disturbances ----------------------------------------------------------------------

    fn disturb(&mut self) -> Result<()> {
        let adopted = self.report.ledger().canonical;
        loop {
            let (workers, coordinator) = (self.live_workers().len(), self.leader().is_some());
            let Some(disturbance) = self.chaos.due(adopted, workers, coordinator) else {
                return Ok(());
            };
            self.carry_out(disturbance)?;
        }
    }

    fn carry_out(&mut self, disturbance: Disturbance) -> Result<()> {
        let Disturbance { deed, step } = disturbance;
        let what = match deed {
            Deed::Join => format!("worker-{} is started", self.start_worker()?),
            Deed::KillCoordinator => {
                let number = self.leader().expect("it was there just before");
                let coordinator = self.seat(number).coordinator.as_mut();
                coordinator.expect("its seat is taken").kill();
                "the coordinator is killed".to_owned()
            }
            Deed::Kill | Deed::Stop => {
                let number = victim(step, &self.live_workers()).expect("a worker was there");
                let name = format!("worker-{number}");
                self.report.worker_taken(&name, unix_now());
                let worker = self.workers.get_mut(&number).expect("it is among the live ones");
                if deed == Deed::Kill {
                    worker.kill();
                    format!("{name} is killed")
                } else {
                    worker.stop();
                    format!("{name} is stopped")
                }
            }
        };
        self.face.line(&format!("chaos {disturbance}: {what}"));
        if matches!(deed, Deed::Stop) { self.replace_workers() } else { Ok(()) }
    }

    // ---- Small deeds -----------------------------------------------------------------------

    /// Tells the coordinator that a worker's process ended, however long that takes.
    fn report_exit(&mut self, worker: WorkerId, how: String) {
        let Some(client) = self.client.clone() else { return };
        self.tasks.retain(|task| !task.is_finished());
        self.tasks.push(tokio::spawn(async move {
            while let Err(status) = client.report_exit(worker, &how).await {
                if client::is_final(&status) {
                    return;
                }
                tokio::time::sleep(REPORT_RETRY).await;
            }
        }));
    }

    fn later(&mut self, delay: Duration, happening: Happening) {
        let happenings = self.happenings.clone();
        self.tasks.push(tokio::spawn(async move {
            tokio::time::sleep(delay).await;
            happenings.send(happening).await.ok(); // The run may have ended meanwhile.
        }));
    }

    /// Numbers of the workers that can make progress.
    fn live_workers(&self) -> Vec<u32> {
        let live = self.workers.iter().filter(|(_, worker)| !worker.stopped && !worker.staged);
        live.map(|(&number, _)| number).collect()
    }
}

/// The Unix epoch's milliseconds, which the workers' clocks count as well.
fn unix_now() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}
