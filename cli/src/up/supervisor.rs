//! The one task that owns a run on this machine: it starts, disturbs, replaces and ends processes.

mod children;
mod ending;

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, anyhow, bail};
use cluster::{Outcome, Record, RunConfig, Timestamp, WorkerId};
use coordinator::Entry;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    task::JoinHandle,
};

use self::children::{Coordinator, Worker};
use crate::{
    client::{self, Client},
    history, print,
    run_dir::{Lock, RunDir},
    up::{
        chaos::{Chaos, Deed, Disturbance, victim},
        face::{Face, Position},
        means::Means,
        prepare::Prepared,
        process::End,
        report::{Report, Summary, worker_number},
        rules::{self, CoordinatorRules, WorkerEnd, WorkerRules},
        watch::{self, News},
        words,
    },
};

/// Happenings that wait for the supervisor at most.
const HAPPENINGS_MAX: usize = 1024;
/// A worker that ends in order near the end of the run does so because the run is finished: the log is
/// about to say so.
const RELEASE_PATIENCE: Duration = Duration::from_secs(3);
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
    /// The coordinator listens here.
    Serving(String),
    /// The coordinator's process ended.
    CoordinatorEnded(End),
    /// The time to start the coordinator again has come.
    CoordinatorDue,
    /// The process of a worker ended.
    WorkerEnded(u32, End),
    /// The time to look for missing workers has come.
    WorkersDue,
    /// Somebody wants the run to stop.
    Interrupted,
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
    coordinator: Option<Coordinator>,
    coordinator_rules: CoordinatorRules,
    address: Option<String>,
    client: Option<Client>,
    workers: BTreeMap<u32, Worker>,
    workers_next: u32,
    worker_rules: WorkerRules,
    ids: BTreeMap<u32, WorkerId>,
    /// Workers that ended before the log had said who they are, with how.
    unknown: BTreeMap<u32, String>,
    tasks: Vec<JoinHandle<()>>,
}

/// Trains until the run has ended or somebody wants it to stop.
///
/// # Errors
/// Why the run failed or was given up. No process is left.
pub(crate) async fn supervise(prepared: Prepared) -> Result<Ending> {
    let Prepared { dir, lock, plan, token, means, chaos, json, worker_program, report } = prepared;
    let workers = plan.workers_expected;
    let (happenings, mut receiver) = mpsc::channel(HAPPENINGS_MAX);
    let mut supervisor = Supervisor {
        face: Face::new(json, plan.steps_total.0, plan.steps_per_epoch),
        _lock: lock,
        worker_rules: WorkerRules::new(plan.workers_min),
        coordinator_rules: CoordinatorRules::default(),
        coordinator: None,
        address: None,
        client: None,
        workers: BTreeMap::new(),
        workers_next: 0,
        ids: BTreeMap::new(),
        unknown: BTreeMap::new(),
        tasks: Vec::new(),
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
    let exit = match supervisor.start_coordinator() {
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
            Happening::Serving(address) => self.serving(address)?,
            Happening::CoordinatorEnded(end) => return self.coordinator_ended(&end),
            Happening::CoordinatorDue => self.start_coordinator()?,
            Happening::WorkerEnded(number, end) => self.worker_ended(number, &end)?,
            Happening::WorkersDue => self.replace_workers()?,
            Happening::Interrupted => return Ok(Some(Exit::Interrupted)),
        }
        Ok(None)
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
        Ok(self.report.ledger().outcome.clone().map(Exit::Ended))
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

    fn coordinator_ended(&mut self, end: &End) -> Result<Option<Exit>> {
        let Some(coordinator) = self.coordinator.take() else { return Ok(None) };
        let how = rules::in_words(end.status);
        if end.status.code().is_some()
            && let Some(exit) = self.read_rest()?
        {
            return Ok(Some(exit));
        }
        let why = end.last_error.as_deref().unwrap_or(&how);
        let Some(delay) = self.coordinator_rules.ended(end.lived, coordinator.staged) else {
            let log = self.dir.process_log("coordinator");
            bail!("the coordinator cannot be kept up: {why}; see {}", log.display());
        };
        self.face.line(&format!("the coordinator ended ({why}) and is started again"));
        if delay.is_zero() {
            self.start_coordinator()?;
        } else {
            self.later(delay, Happening::CoordinatorDue);
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
            let (workers, coordinator) = (self.live_workers().len(), self.coordinator.is_some());
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
                let coordinator = self.coordinator.as_mut().expect("it was there just before");
                coordinator.kill();
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
