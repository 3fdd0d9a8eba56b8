//! The one task that owns the machine.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use checkpoint::{Retries, Store};
use cluster::{
    Command, Coordinator, Event, Generation, Hello, Order, Outcome, Record, Report, Step,
    Timestamp, WorkerId,
};
use proto::{Announcer, Told, v1};
use tokio::{
    net::TcpListener,
    sync::{mpsc, oneshot},
    time::sleep,
};
use tracing::{debug, info, warn};

use crate::{
    Config, Entry, LogError, StartError,
    commit::Committer,
    http,
    lease::Assurance,
    log::Log,
    metrics::{Devices, Metrics},
    rpc,
    watch::{self, Publisher, Subscriber},
};

/// Inputs that wait for the host at most; a sender beyond that waits.
const INPUTS_MAX: usize = 1024;
/// Inputs that share one sync of the log.
const BATCH_MAX: usize = 256;
/// Orders that a worker may leave unread before its session is cut.
pub(crate) const ORDERS_MAX: usize = 256;
/// Watchers are told of the workers no more often than this: with thousands it is work.
const LIVENESS_INTERVAL: Duration = Duration::from_millis(250);
/// How long the end of a run waits for sessions and watchers to have heard of it.
const FAREWELL: Duration = Duration::from_secs(3);

/// What the services hand to the host.
#[derive(Debug)]
pub(crate) enum Input {
    /// A worker opened a session.
    Opened { worker: WorkerId, hello: Hello, session: Session },
    /// A worker reported. Heartbeats have sequence 0.
    Said { worker: WorkerId, sequence: u64, report: Report },
    /// A session ended; only the worker's newest counts.
    Closed { worker: WorkerId, session: u64 },
    /// A supervisor saw a process end.
    Exited { worker: WorkerId, how: String },
    /// Somebody wants a worker, by name, to leave.
    Drain { name: String, found: oneshot::Sender<bool> },
    /// Somebody wants so many workers; the answer says why that cannot be.
    Resize { workers: u32, answer: oneshot::Sender<Result<(), String>> },
    /// Somebody wants the state kept; the answer is the step, if one is left to make.
    Checkpoint { answer: oneshot::Sender<Option<Step>> },
    /// Somebody says that a machine is whole again.
    Readmit { node: String, marked: oneshot::Sender<bool> },
    /// The entries of the log from a place on.
    Read { from: u64, entries: oneshot::Sender<Vec<Entry>> },
    /// Something the committer learnt.
    Cluster(Event),
}

/// The host's end of a session. Dropping it ends the session.
#[derive(Debug)]
pub(crate) struct Session {
    number: u64,
    orders: mpsc::Sender<Arc<v1::SessionResponse>>,
    told: Told,
    _open: oneshot::Sender<()>,
    heard: u64,
}

impl Session {
    /// `number` is unique in this process; the other end is cut when `open` is dropped.
    pub(crate) fn new(
        number: u64,
        orders: mpsc::Sender<Arc<v1::SessionResponse>>,
        open: oneshot::Sender<()>,
    ) -> Self {
        Self { number, orders, told: Told::default(), _open: open, heard: 0 }
    }
}

struct Host {
    config: Arc<Config>,
    coordinator: Coordinator,
    log: Log,
    assurance: Option<Assurance>,
    sessions: BTreeMap<WorkerId, Session>,
    publisher: Publisher,
    committer: Committer,
    welcome: v1::Welcome,
    announcer: Announcer,
    /// Workers whose reports have had their effect and who do not know it yet.
    unacknowledged: BTreeSet<WorkerId>,
    clock: Clock,
    /// Who asked for a checkpoint and has not been told its step.
    asked: Vec<oneshot::Sender<Option<Step>>>,
}

/// A coordinator that leads its run, and has said so in the log.
pub struct Leader {
    config: Arc<Config>,
    coordinator: Coordinator,
    log: Log,
    clock: Clock,
    /// What follows from its first records, which are durable.
    first: Vec<Command>,
    publisher: Publisher,
    subscriber: Subscriber,
    devices: Devices,
}

impl std::fmt::Debug for Leader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Leader").field("term", &self.coordinator.term()).finish_non_exhaustive()
    }
}

/// Serves a run on `listener` until it has ended and everybody has heard of it.
///
/// # Errors
/// [`StartError`] if the log, the store or the network cannot be used, or another has taken the lead.
pub async fn serve(config: Config, listener: TcpListener) -> Result<Outcome, StartError> {
    Leader::begin(config).await?.serve(listener).await
}

impl Leader {
    /// Opens the log and begins a new term. If the log is shared and another leads, waits for it or
    /// refuses, as the lease says.
    ///
    /// # Errors
    /// As [`serve`].
    pub async fn begin(config: Config) -> Result<Self, StartError> {
        let began = Instant::now();
        let config = Arc::new(config);
        let (mut log, mut entries) = Log::open(&config.log).await?;
        loop {
            check_run(&config, &entries)?;
            if entries.is_empty() {
                check_nothing_kept(&config).await?;
            }
            let clock = Clock::not_before(entries.last().map(|entry| entry.at));
            let records = entries.iter().map(|entry| &entry.record);
            let (now, run) = (clock.now(), config.run.clone());
            let mut coordinator = Coordinator::restore_as(now, run, log.claimed(), records);
            // The first call carries out what `restore` decided: the new term becomes durable.
            let first = coordinator.handle(now, Event::DeadlineReached);
            // Who stood by until the end finds nothing to lead: the end stays the last word.
            let (first, appended) = if coordinator.ledger().outcome.is_some() {
                (Vec::new(), Ok(Vec::new()))
            } else {
                let records = records_of(&first);
                (first, log.append(now, &records).await)
            };
            let begun = match appended {
                Ok(begun) => begun,
                Err(LogError::Superseded { by, .. }) if by < log.claimed() => {
                    (log, entries) = log.reopen().await?; // The last word of the one before counts.
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            let devices = Devices::default();
            let (steps, heard) = (config.run.steps_total.0, devices.clone());
            let run = config.run.run.as_str();
            let metrics = |liveness| Metrics::new(run, steps, liveness, heard);
            let (publisher, subscriber) = watch::channel(metrics);
            publisher.entries(&entries);
            publisher.entries(&begun);
            let (term, elapsed_ms) = (coordinator.term(), began.elapsed().as_millis());
            info!(run = %config.run.run, %term, entries = entries.len(), elapsed_ms, "coordinating");
            return Ok(Self {
                config,
                coordinator,
                log,
                clock,
                first,
                publisher,
                subscriber,
                devices,
            });
        }
    }

    /// Serves until the run has ended and everybody has heard of it.
    ///
    /// # Errors
    /// As [`serve`].
    pub async fn serve(self, listener: TcpListener) -> Result<Outcome, StartError> {
        self.serve_with(listener, None).await
    }

    /// [`Leader::serve`], which also answers `/metrics` and `/healthz` over HTTP.
    ///
    /// # Errors
    /// As [`serve`].
    pub async fn serve_with(
        self,
        listener: TcpListener,
        http: Option<TcpListener>,
    ) -> Result<Outcome, StartError> {
        let Self { config, coordinator, log, clock, first, publisher, subscriber, devices } = self;
        let (inputs, receiver) = mpsc::channel(INPUTS_MAX);
        let (http_ended, http_end) = oneshot::channel();
        if let Some(http) = http {
            tokio::spawn(http::serve(http, publisher.metrics(), http_end));
        }
        let assurance = log.assurance();
        let host = Host {
            committer: Committer::new(Arc::clone(&config), inputs.clone(), assurance.clone())
                .await?,
            welcome: welcome(&config),
            announcer: Announcer::default(),
            unacknowledged: BTreeSet::new(),
            coordinator,
            log,
            assurance,
            sessions: BTreeMap::new(),
            publisher,
            clock,
            asked: Vec::new(),
            config: Arc::clone(&config),
        };
        let (ended, end) = oneshot::channel();
        let server = tokio::spawn(rpc::serve(
            Arc::clone(&config),
            listener,
            inputs,
            (subscriber, devices),
            end,
        ));
        let outcome = host.run(first, receiver).await?;
        drop((ended, http_ended));
        match server.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => warn!(error = %error, "the server did not stop in order"),
            Err(panic) => warn!(error = %panic, "the server did not stop in order"),
        }
        Ok(outcome)
    }
}

fn check_run(config: &Config, entries: &[Entry]) -> Result<(), StartError> {
    match entries.first().map(|entry| &entry.record) {
        Some(Record::RunCreated { config: found }) if found.run != config.run.run => {
            Err(StartError::OtherRun {
                log: config.log.to_string(),
                found: found.run.to_string(),
                wanted: config.run.run.to_string(),
            })
        }
        _ => Ok(()),
    }
}

/// A log without a record beside checkpoints has been lost: the run would silently begin anew.
async fn check_nothing_kept(config: &Config) -> Result<(), StartError> {
    let store = Store::create(&config.checkpoints)
        .map_err(|source| StartError::Store { location: config.checkpoints.clone(), source })?;
    let look = || checkpoint::committed_steps(&store);
    let committed = checkpoint::retrying(Retries::of("look for checkpoints"), look);
    match committed.await.map_err(|source| LogError::Store { source })?.first() {
        None => Ok(()),
        Some(&newest) => Err(StartError::Forgotten {
            log: config.log.to_string(),
            checkpoints: config.checkpoints.clone(),
            newest,
        }),
    }
}

fn welcome(config: &Config) -> v1::Welcome {
    let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    v1::Welcome {
        recipe: config.recipe.clone(),
        heartbeat_ms: millis(config.run.timeouts.heartbeat),
        form_ms: millis(config.run.timeouts.form),
        checkpoints: config.checkpoints.clone(),
        steps_total: config.run.steps_total.0,
        steps_per_epoch: config.run.steps_per_epoch,
    }
}

/// What opens the connections between the members of a generation: only those that the coordinator
/// told of it can know it.
pub(crate) fn generation_secret(config: &Config, generation: Generation) -> [u8; 32] {
    let key = blake3::derive_key("percheron 2026 peer connections", config.token.as_bytes());
    let text = format!("{}/{generation}", config.run.run);
    *blake3::keyed_hash(&key, text.as_bytes()).as_bytes()
}

impl Host {
    /// Takes inputs in until the run has ended; returns how.
    async fn run(
        mut self,
        first: Vec<Command>,
        mut inputs: mpsc::Receiver<Input>,
    ) -> Result<Outcome, StartError> {
        first.into_iter().for_each(|command| self.carry_out(command));
        let mut lost = self.assurance.clone();
        self.publisher.liveness(&self.coordinator);
        let mut published = Instant::now();
        let mut farewell: Option<Instant> = None;
        let mut batch = Vec::new();
        loop {
            if self.coordinator.ledger().outcome.is_some() {
                let end = *farewell.get_or_insert_with(|| Instant::now() + FAREWELL);
                if self.sessions.is_empty() || end <= Instant::now() {
                    break;
                }
            }
            let patience = self.patience(farewell);
            tokio::select! {
                biased; // What was said counts before what was not.
                count = inputs.recv_many(&mut batch, BATCH_MAX) => {
                    if count == 0 {
                        break;
                    }
                }
                () = sleep(patience) => {}
                error = replaced(&mut lost) => return Err(error),
            }
            let mut events: Vec<_> =
                batch.drain(..).filter_map(|input| self.event_of(input)).collect();
            events.push(Event::DeadlineReached);
            self.handle(events).await?;
            for answer in self.asked.drain(..) {
                answer.send(self.coordinator.next_kept()).ok(); // Whoever asked may be gone.
            }
            self.acknowledge();
            if published.elapsed() >= LIVENESS_INTERVAL {
                self.publisher.liveness(&self.coordinator);
                published = Instant::now();
            }
        }
        self.committer.finish().await;
        self.log.close().await;
        Ok(self.coordinator.ledger().outcome.clone().unwrap_or_else(|| Outcome::Failed {
            reason: "the coordinator was stopped before the run had ended".to_owned(),
        }))
    }

    /// How long nothing may happen until the machine must be called again.
    fn patience(&self, farewell: Option<Instant>) -> Duration {
        let now = self.clock.now();
        let machine = self.coordinator.next_deadline().map(|deadline| deadline.since(now));
        let end = farewell.map(|end| end.saturating_duration_since(Instant::now()));
        machine.into_iter().chain(end).min().unwrap_or(Duration::from_secs(60))
    }

    /// Turns an input into what happened, for the machine; keeps the host's own books.
    fn event_of(&mut self, input: Input) -> Option<Event> {
        match input {
            Input::Opened { worker, hello, session } => {
                self.sessions.insert(worker, session);
                Some(Event::WorkerJoined { worker, hello })
            }
            Input::Said { worker, sequence, report } => {
                let session = self.sessions.get_mut(&worker)?;
                if sequence > session.heard {
                    session.heard = sequence;
                    self.unacknowledged.insert(worker);
                }
                Some(Event::Reported { worker, report })
            }
            Input::Closed { worker, session } => {
                if self.sessions.get(&worker).is_some_and(|newest| newest.number != session) {
                    return None; // It has opened another since.
                }
                self.sessions.remove(&worker); // Gone already if the host cut it.
                Some(Event::SessionClosed { worker })
            }
            Input::Exited { worker, how } => Some(Event::ProcessExited { worker, how }),
            Input::Drain { name, found } => {
                let worker = self.coordinator.workers().iter().find(|(_, w)| w.name == name);
                let worker = worker.map(|(id, _)| id);
                found.send(worker.is_some()).ok(); // Whoever asked may be gone.
                worker.map(|worker| Event::DrainRequested { worker })
            }
            Input::Resize { workers, answer } => {
                let checked = self.coordinator.config().check_resize(workers);
                let event = checked.is_ok().then_some(Event::ResizeRequested { workers });
                answer.send(checked.map_err(|error| error.to_string())).ok(); // As above.
                event
            }
            Input::Checkpoint { answer } => {
                self.asked.push(answer);
                Some(Event::CheckpointRequested)
            }
            Input::Readmit { node, marked } => {
                let is_marked = self.coordinator.ledger().faulty.contains_key(&node);
                marked.send(is_marked).ok(); // As above.
                is_marked.then_some(Event::NodeReadmitted { node })
            }
            Input::Read { from, entries } => {
                self.log.answer(from, entries);
                None
            }
            Input::Cluster(event) => Some(event),
        }
    }

    /// Lets the machine handle events, makes its records durable, then lets the rest take effect.
    async fn handle(&mut self, events: Vec<Event>) -> Result<(), StartError> {
        if let Some(assurance) = &mut self.assurance {
            assurance.assured().await?; // It may have slept, and another may lead.
        }
        let now = self.clock.now();
        let commands: Vec<_> =
            events.into_iter().flat_map(|event| self.coordinator.handle(now, event)).collect();
        let records = records_of(&commands);
        if !records.is_empty() {
            let entries = self.log.append(now, &records).await?;
            entries.iter().for_each(tell);
            self.publisher.entries(&entries);
        }
        for command in commands {
            self.carry_out(command);
        }
        Ok(())
    }

    fn carry_out(&mut self, command: Command) {
        match command {
            Command::Append(_) => {} // Durable by now.
            Command::Send { worker, order } => self.send(worker, order),
            Command::Close { worker } => drop(self.sessions.remove(&worker)),
            Command::CommitCheckpoint { generation, step, parts, part_bytes, sections } => {
                let term = self.coordinator.term();
                let fingerprint = self.coordinator.ledger().fingerprint.clone().unwrap_or_default();
                self.committer.commit(
                    (term, generation, step),
                    fingerprint,
                    parts,
                    (part_bytes, sections),
                    self.coordinator.ledger().evaluations.clone(),
                    self.clock.now(),
                );
            }
        }
    }

    fn send(&mut self, worker: WorkerId, order: Order) {
        let Some(session) = self.sessions.get_mut(&worker) else {
            return; // It will be told when it comes back.
        };
        debug!(%worker, ?order, "order");
        let secret = |generation| generation_secret(&self.config, generation);
        let run = self.config.run.run.as_str();
        let term = self.coordinator.term();
        let is_read = if let Order::Form(group) = &order {
            let secret = || secret(group.generation);
            let said = self.announcer.announce(&mut session.told, (run, term.0), group, secret);
            said.iter().all(|response| session.orders.try_send(Arc::clone(response)).is_ok())
        } else {
            let response = proto::order_to_response(run, term, order, &self.welcome, secret);
            session.orders.try_send(Arc::new(response)).is_ok()
        };
        if !is_read {
            warn!(%worker, "a worker does not read its orders; its session is cut");
            self.sessions.remove(&worker);
        }
    }

    /// Lets workers forget what has had its effect.
    fn acknowledge(&mut self) {
        let (run, term) = (self.config.run.run.to_string(), self.coordinator.term().0);
        self.unacknowledged.retain(|worker| {
            let Some(session) = self.sessions.get(worker) else { return false };
            let kind = Some(v1::session_response::Kind::Ack(v1::Ack { sequence: session.heard }));
            let response = v1::SessionResponse { run: run.clone(), term, kind };
            session.orders.try_send(Arc::new(response)).is_err()
        });
    }
}

fn records_of(commands: &[Command]) -> Vec<Record> {
    let record = |command: &Command| match command {
        Command::Append(record) => Some(record.clone()),
        Command::Send { .. } | Command::Close { .. } | Command::CommitCheckpoint { .. } => None,
    };
    commands.iter().filter_map(record).collect()
}

/// Returns when another leads.
async fn replaced(assurance: &mut Option<Assurance>) -> StartError {
    match assurance {
        Some(assurance) => assurance.lost().await,
        None => std::future::pending().await,
    }
}

/// The log in words, for the process's own log.
fn tell(entry: &Entry) {
    match &entry.record {
        Record::GenerationOpened { generation, members, planned, reason } => {
            let workers = members.len();
            info!(%generation, workers, planned, reason, "generation opened");
        }
        Record::GenerationFormed { generation, step, repeated, .. } => {
            info!(%generation, %step, repeated, "generation formed");
        }
        Record::WorkerJoined { worker, name, .. } => info!(%worker, name, "worker joined"),
        Record::WorkerLost { worker, name, cause } => warn!(%worker, name, cause, "worker lost"),
        Record::WorkerRefused { worker, name, reason } => {
            warn!(%worker, name, reason, "worker refused");
        }
        Record::NodeMarked { node, name, reason } => {
            warn!(node, name, reason, "machine marked as faulty");
        }
        Record::NodeReadmitted { node } => info!(node, "machine readmitted"),
        Record::ExchangeLost { worker, generation, peer, reason, .. } => {
            let peer = peer.as_deref().unwrap_or("unknown");
            info!(%worker, %generation, peer, reason, "exchange lost");
        }
        Record::CheckpointCommitted { step } => info!(%step, "checkpoint committed"),
        Record::Resized { workers } => info!(workers, "resized"),
        Record::CheckpointAbandoned { step, reason } => {
            warn!(%step, reason, "checkpoint abandoned");
        }
        Record::RunFinished { step, .. } => info!(%step, "run finished"),
        Record::RunFailed { reason } => warn!(reason, "run failed"),
        Record::RunCreated { .. }
        | Record::TermStarted { .. }
        | Record::FingerprintFixed { .. }
        | Record::StepAdopted { .. }
        | Record::Evaluated { .. } => debug!(record = ?entry.record, "recorded"),
    }
}

/// The Unix epoch's milliseconds, by a clock that does not run backwards.
#[derive(Debug, Clone)]
struct Clock {
    origin: Timestamp,
    started: Instant,
}

impl Clock {
    fn not_before(earliest: Option<Timestamp>) -> Self {
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let origin = Timestamp(u64::try_from(unix.as_millis()).unwrap_or(u64::MAX));
        Self { origin: origin.max(earliest.unwrap_or_default()), started: Instant::now() }
    }

    fn now(&self) -> Timestamp {
        self.origin + self.started.elapsed()
    }
}
