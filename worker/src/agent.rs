//! The worker's control plane: hosts the rules, speaks with the coordinator, starts and steers training.

mod ending;
mod outbox;
mod session;
pub(crate) mod upload;

use std::{
    collections::BTreeMap,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    sync::{Arc, mpsc as thread_channel},
    thread,
    time::Duration,
};

use checkpoint::Store;
use cluster::{
    Action, Exit, Fingerprint, Generation, Hello, Notice, Participant, Report, RunId, WorkerId,
};
use proto::v1::{self, session_request::Kind as Said, session_response::Kind as Heard};
use recipe::Recipe;
use tch::Device;
use tokio::{
    runtime::Handle,
    sync::{mpsc, watch},
    task::JoinSet,
    time::{Instant, Interval, MissedTickBehavior},
};
use tracing::{info, warn};

use self::{
    ending::Terminations,
    outbox::Outbox,
    session::{Address, Link, Target},
    upload::upload,
};
use crate::{
    health::{self, Watch},
    progress::Progress,
    train::{Formation, KeepAt, Means, Orders, Told, Trainer, chain},
};

/// Links that may wait for the agent.
const LINKS_MAX: usize = 64;
/// Before the coordinator has said how often it wants to hear from a worker.
const FIRST_HEARTBEAT: Duration = Duration::from_secs(1);
/// How long the end of a process waits for its last words to arrive.
const FAREWELL: Duration = Duration::from_secs(5);

/// What a worker is started with.
#[derive(Debug, Clone)]
pub struct Options {
    /// The coordinator, `http://host:port`; with those that stand by, separated by commas.
    pub coordinator: String,
    /// The run.
    pub run: RunId,
    /// The file with the run's token.
    pub token_file: PathBuf,
    /// For people.
    pub name: String,
    /// The machine that this worker is on.
    pub node: String,
    /// Where peers reach this worker.
    pub listen: SocketAddr,
    /// Intra-op threads that libtorch was started with.
    pub threads: u32,
    /// What it computes on and by.
    pub means: Means,
    /// Whether the end of standard input ends the worker.
    pub exit_with_stdin: bool,
}

/// A worker that could not start, or whose training thread is gone.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// A setting that cannot be used.
    #[error("{option}: {problem}")]
    Option {
        /// The option.
        option: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// The system refused something.
    #[error("cannot {attempt}")]
    System {
        /// What was attempted.
        attempt: &'static str,
        /// What it said.
        #[source]
        source: std::io::Error,
    },
    /// The training thread has panicked: a bug, whose text it has printed.
    #[error("the training thread has panicked; its message is above")]
    Panicked,
}

fn system(attempt: &'static str) -> impl Fn(std::io::Error) -> AgentError {
    move |source| AgentError::System { attempt, source }
}

/// Takes part in a run until it is over for this worker.
///
/// `fingerprint` is what can change this worker's bits.
///
/// # Errors
/// [`AgentError`].
pub async fn run(options: Options, fingerprint: Fingerprint) -> Result<Exit, AgentError> {
    let target = target(&options)?;
    let socket = TcpListener::bind(options.listen).map_err(system("listen for peers"))?;
    let address = socket.local_addr().map_err(system("read the listening address"))?;
    if address.ip().is_unspecified() {
        let problem = format!("{address} is no address that peers can dial: name one");
        return Err(AgentError::Option { option: "--listen", problem });
    }
    let worker = draw_worker_id().map_err(system("draw a worker id"))?;
    let hello = Hello {
        name: options.name.clone(),
        address: address.to_string(),
        node: options.node.clone(),
        fingerprint,
        generation: None,
        applied: None,
        preparing: true,
    };
    info!(%worker, name = options.name, %address, "worker started");

    let (greeting, greetings) = watch::channel(wire_hello(worker, &hello));
    let (links_sender, links) = mpsc::channel(LINKS_MAX);
    tokio::spawn(session::keep(target, greetings, links_sender));
    let (told_sender, told) = mpsc::unbounded_channel();
    let (fault, faults) = mpsc::unbounded_channel();
    let health = watch_device(options.means.device, fault);
    let mut agent = Agent {
        options,
        worker,
        participant: Participant::new(worker),
        hello,
        greeting,
        outbox: Outbox::default(),
        requests: None,
        progress: Arc::new(Progress::default()),
        keep: Arc::new(KeepAt::default()),
        told: Some(told_sender),
        socket: Some(socket),
        training: None,
        listener: proto::Listener::default(),
        secrets: BTreeMap::new(),
        uploads: JoinSet::new(),
        finished: None,
        exit: None,
        health,
    };
    agent.serve(links, told, faults).await
}

fn target(options: &Options) -> Result<Target, AgentError> {
    let problem =
        |option: &'static str| move |problem: String| AgentError::Option { option, problem };
    let address = |text: &str| {
        let endpoint = tonic::transport::Endpoint::from_shared(text.to_owned())
            .map_err(|_| format!("{text:?} is not http://HOST:PORT"))?;
        Ok(Address { endpoint, text: text.to_owned() })
    };
    let addresses: Result<Vec<_>, String> = options.coordinator.split(',').map(address).collect();
    let addresses = addresses.map_err(problem("--coordinator"))?;
    let token = read_token(&options.token_file).map_err(problem("--token-file"))?;
    let token = token
        .parse()
        .map_err(|_| format!("{} holds more than a token", options.token_file.display()))
        .map_err(problem("--token-file"))?;
    Ok(Target { addresses, run: options.run.to_string(), token })
}

fn read_token(file: &Path) -> Result<String, String> {
    let text = std::fs::read_to_string(file)
        .map_err(|error| format!("cannot read {}: {error}", file.display()))?;
    let token = text.trim();
    if token.is_empty() {
        Err(format!("{} is empty", file.display()))
    } else {
        Ok(token.to_owned())
    }
}

/// 64 bits of the system's randomness: no two lives of a process share one.
fn draw_worker_id() -> std::io::Result<WorkerId> {
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(WorkerId(u64::from_le_bytes(bytes)))
}

fn wire_hello(worker: WorkerId, hello: &Hello) -> v1::Hello {
    v1::Hello::new(worker, hello, env!("CARGO_PKG_VERSION"))
}

/// The one task that owns the rules.
struct Agent {
    options: Options,
    worker: WorkerId,
    participant: Participant,
    hello: Hello,
    /// What the next session begins with.
    greeting: watch::Sender<v1::Hello>,
    outbox: Outbox,
    /// Where messages go while a session stands.
    requests: Option<mpsc::UnboundedSender<v1::SessionRequest>>,
    progress: Arc<Progress>,
    keep: Arc<KeepAt>,
    /// Until the training thread takes both: then only it can speak, and is heard to end.
    told: Option<mpsc::UnboundedSender<Told>>,
    socket: Option<TcpListener>,
    training: Option<TrainingThread>,
    /// Understands what the coordinator says.
    listener: proto::Listener,
    /// What opens the generations that were announced.
    secrets: BTreeMap<Generation, [u8; 32]>,
    uploads: JoinSet<Notice>,
    /// The end of training, which is said after the last upload.
    finished: Option<Notice>,
    exit: Option<Exit>,
    /// How the GPU is, if there is one and its driver says.
    health: Option<Watch>,
}

/// The training thread, as the agent sees it.
struct TrainingThread {
    recipe: String,
    store: Store,
    formations: thread_channel::Sender<Formation>,
    thread: thread::JoinHandle<()>,
    /// The newest formation that was sent there.
    current: Option<(Generation, Arc<Orders>)>,
}

impl Agent {
    async fn serve(
        &mut self,
        mut links: mpsc::Receiver<Link>,
        mut told: mpsc::UnboundedReceiver<Told>,
        mut faults: mpsc::UnboundedReceiver<String>,
    ) -> Result<Exit, AgentError> {
        let mut terminations = Terminations::listen(self.options.exit_with_stdin)?;
        let mut heartbeat = every(FIRST_HEARTBEAT);
        while self.exit.is_none() {
            tokio::select! {
                Some(link) = links.recv() => {
                    if let Some(interval) = self.linked(link)? {
                        heartbeat = every(interval);
                    }
                }
                told = told.recv() => match told {
                    Some(told) => self.told(told)?,
                    // It would have said that it failed, and that would have ended this loop.
                    None => return Err(AgentError::Panicked),
                },
                Some(uploaded) = self.uploads.join_next() => {
                    self.notice(uploaded.expect("an upload does not panic"))?;
                    self.say_finished()?;
                }
                _ = heartbeat.tick() => self.beat(),
                Some(reason) = faults.recv() => {
                    warn!(reason, "this machine is faulty");
                    self.act(Action::Report(Report::NodeFaulty { reason }))?;
                }
                reason = terminations.next() => {
                    info!(reason, "this worker is asked to stop");
                    self.notice(Notice::StopRequested { reason })?;
                }
            }
        }
        self.abort_training();
        self.say_farewell(links).await?;
        self.join_training().await;
        Ok(self.exit.take().expect("the loop ends with an exit"))
    }

    /// The session said something. Returns the interval of heartbeats, when that is news.
    fn linked(&mut self, link: Link) -> Result<Option<Duration>, AgentError> {
        match link {
            Link::Opened(requests) => {
                self.requests = Some(requests);
                self.listener.session_opened();
                for report in self.outbox.unacknowledged().cloned().collect::<Vec<_>>() {
                    self.send(report);
                }
            }
            Link::Closed => self.requests = None,
            Link::Rejected(reason) => self.exit = Some(Exit::Refused(reason)),
            Link::Told(response) => return self.heard(response),
        }
        Ok(None)
    }

    fn heard(&mut self, response: v1::SessionResponse) -> Result<Option<Duration>, AgentError> {
        let mut interval = None;
        match &response.kind {
            Some(Heard::Ack(ack)) => self.outbox.acknowledge(ack.sequence),
            Some(Heard::Welcome(welcome)) => {
                interval = Some(Duration::from_millis(welcome.heartbeat_ms.max(1)));
                self.start_training(welcome)?;
            }
            Some(Heard::Form(group)) => {
                if let Ok(secret) = <[u8; 32]>::try_from(&group.secret[..]) {
                    self.secrets.insert(Generation(group.generation), secret);
                }
            }
            Some(
                Heard::CheckpointAt(_)
                | Heard::Hold(_)
                | Heard::Refuse(_)
                | Heard::Finish(_)
                | Heard::Fail(_)
                | Heard::Roster(_),
            )
            | None => {}
        }
        if self.exit.is_some() {
            return Ok(interval);
        }
        match self.listener.order(&response) {
            Ok(Some(order)) => {
                let term = cluster::Term(response.term);
                self.notice(Notice::Ordered { term, order })?;
            }
            Ok(None) => {}
            Err(error) => warn!(%error, "the coordinator says something unknown"),
        }
        Ok(interval)
    }

    /// The first welcome brings the recipe, and training can be prepared.
    fn start_training(&mut self, welcome: &v1::Welcome) -> Result<(), AgentError> {
        if let Some(training) = &self.training {
            if training.recipe != welcome.recipe {
                self.exit = Some(Exit::Refused(
                    "the coordinator has another recipe than before: start new workers".to_owned(),
                ));
            }
            return Ok(());
        }
        let threads = Recipe::from_toml("of the run", &welcome.recipe, &[]).map(|r| r.threads);
        let store = Store::open(&welcome.checkpoints);
        let store = match (threads, store) {
            (Ok(threads), Ok(store)) if threads == self.options.threads => store,
            (Ok(threads), Ok(_)) => {
                self.exit = Some(Exit::Refused(format!(
                    "recipe, threads = {threads}: this worker computes with {}; start it with \
                     --threads {threads}",
                    self.options.threads
                )));
                return Ok(());
            }
            (Err(error), _) => {
                self.exit = Some(Exit::Refused(error.to_string()));
                return Ok(());
            }
            (_, Err(error)) => {
                let reason = format!("the checkpoints cannot be reached: {}", chain(&error));
                self.exit = Some(Exit::Refused(reason));
                return Ok(());
            }
        };
        let trainer = Trainer {
            run: self.options.run.clone(),
            recipe: welcome.recipe.clone(),
            checkpoints: welcome.checkpoints.clone(),
            socket: self.socket.take().expect("training is started once"),
            form_timeout: Duration::from_millis(welcome.form_ms.max(1)),
            means: self.options.means,
            progress: Arc::clone(&self.progress),
            keep: Arc::clone(&self.keep),
            told: self.told.take().expect("training is started once"),
            runtime: Handle::current(),
        };
        let (formations, receiver) = thread_channel::channel();
        let thread = thread::Builder::new()
            .name("train".to_owned())
            .spawn(move || trainer.run(&receiver))
            .map_err(system("start the training thread"))?;
        let recipe = welcome.recipe.clone();
        self.training = Some(TrainingThread { recipe, store, formations, thread, current: None });
        Ok(())
    }

    /// The training thread said something.
    fn told(&mut self, told: Told) -> Result<(), AgentError> {
        match told {
            Told::Share { generation, share } => {
                let store = self.training.as_ref().expect("it speaks").store.clone();
                self.uploads.spawn(upload(store, generation, share));
                Ok(())
            }
            Told::Notice(notice @ Notice::Finished { .. }) => {
                self.finished = Some(notice);
                self.say_finished()
            }
            Told::Notice(notice) => self.notice(notice),
        }
    }

    /// The end is said after the last share is in the store.
    fn say_finished(&mut self) -> Result<(), AgentError> {
        if self.uploads.is_empty()
            && let Some(finished) = self.finished.take()
        {
            self.notice(finished)?;
        }
        Ok(())
    }

    fn notice(&mut self, notice: Notice) -> Result<(), AgentError> {
        let is_ready = self.hello.preparing && matches!(notice, Notice::Ready);
        for action in self.participant.handle(notice) {
            self.act(action)?;
        }
        let generation = self.participant.generation();
        if is_ready || self.hello.generation != generation {
            self.hello.preparing &= !is_ready;
            self.hello.generation = generation;
            self.hello.applied = self.progress.now().0;
            self.greeting.send_replace(wire_hello(self.worker, &self.hello));
        }
        Ok(())
    }

    fn act(&mut self, action: Action) -> Result<(), AgentError> {
        match action {
            Action::Report(report) => {
                let wire = self.outbox.push(&report);
                self.send(wire);
            }
            Action::Form { group, rank } => {
                if let Some(step) = group.checkpoint_at {
                    self.keep.add(step);
                }
                let generation = group.generation;
                let Some(secret) = self.secrets.get(&generation).copied() else {
                    warn!(%generation, "a generation came without its secret");
                    return Ok(());
                };
                self.secrets = self.secrets.split_off(&generation);
                let orders = Arc::new(Orders::new().map_err(system("open a pipe"))?);
                let training = self.training.as_mut().expect("a welcome came first");
                training.current = Some((generation, Arc::clone(&orders)));
                let formation = Formation { group, rank, secret, orders };
                // A thread that has just ended is heard to end.
                drop(training.formations.send(formation));
            }
            Action::Abort { generation } => {
                if let Some(orders) = self.orders(generation) {
                    orders.abort.abort();
                }
            }
            Action::LeaveAfterStep { generation } => {
                if let Some(orders) = self.orders(generation) {
                    orders.leave();
                }
            }
            Action::CheckpointAt { step } => self.keep.add(step),
            Action::Exit(exit) => self.exit = Some(exit),
        }
        Ok(())
    }

    /// What steers the training thread in a generation, while that is the newest it was given.
    fn orders(&self, generation: Generation) -> Option<&Orders> {
        let (newest, orders) = self.training.as_ref()?.current.as_ref()?;
        (*newest == generation).then_some(orders.as_ref())
    }

    fn beat(&mut self) {
        // Before the first generation it is 0, which no generation has.
        let generation = self.participant.generation().unwrap_or_default();
        let (applied, phase, in_phase) = self.progress.now();
        let resident_bytes = resident_bytes();
        let progress = cluster::Progress { generation, applied, phase, in_phase, resident_bytes };
        let mut wire = proto::report_to_wire(0, &Report::Heartbeat(progress));
        if let Some(v1::report::Kind::Heartbeat(heartbeat)) = &mut wire.kind {
            heartbeat.device = self.health.as_ref().map(Watch::latest);
        }
        self.send(wire);
    }

    fn send(&mut self, report: v1::Report) {
        let Some(requests) = &self.requests else { return };
        let run = self.options.run.to_string();
        if requests.send(v1::SessionRequest { run, kind: Some(Said::Report(report)) }).is_err() {
            self.requests = None; // The session has ended; what counts is said again in the next.
        }
    }

    fn abort_training(&self) {
        if let Some((_, orders)) = self.training.as_ref().and_then(|t| t.current.as_ref()) {
            orders.abort.abort();
        }
    }

    /// Waits for the training thread: libtorch must not compute while the process is torn down.
    async fn join_training(&mut self) {
        let Some(training) = self.training.take() else { return };
        drop(training.formations);
        let joining = tokio::task::spawn_blocking(move || training.thread.join());
        match tokio::time::timeout(FAREWELL, joining).await {
            Ok(Ok(Ok(()))) => {}
            Ok(_) => warn!("the training thread has panicked"),
            Err(_) => warn!("the training thread does not stop"),
        }
    }

    /// Waits for uploads, and for what was said to arrive.
    async fn say_farewell(&mut self, mut links: mpsc::Receiver<Link>) -> Result<(), AgentError> {
        let deadline = Instant::now() + FAREWELL;
        while let Some(saved) = self.uploads.join_next().await {
            let notice = saved.expect("an upload does not panic");
            if let Notice::ShareSaved { generation, step, outcome } = notice {
                let report = match outcome {
                    Ok(share) => Report::ShareWritten { generation, share },
                    Err(reason) => Report::ShareFailed { generation, step, reason },
                };
                let wire = self.outbox.push(&report);
                self.send(wire);
            }
        }
        while !self.outbox.is_empty() {
            match tokio::time::timeout_at(deadline, links.recv()).await {
                Ok(Some(Link::Told(response))) => {
                    if let Some(Heard::Ack(ack)) = &response.kind {
                        self.outbox.acknowledge(ack.sequence);
                    }
                }
                Ok(Some(link @ Link::Opened(_))) => drop(self.linked(link)?),
                Ok(Some(Link::Closed)) => {
                    self.requests = None;
                    if matches!(self.exit, Some(Exit::Finished | Exit::Refused(_))) {
                        break; // The coordinator has heard enough and is gone.
                    }
                }
                Ok(Some(Link::Rejected(_)) | None) => break,
                Err(_) => {
                    warn!("the coordinator has not heard this worker's last words");
                    break;
                }
            }
        }
        Ok(())
    }
}

/// Watches the GPU that a worker computes on. One whose driver does not answer is trained on all the same.
fn watch_device(device: Device, fault: mpsc::UnboundedSender<String>) -> Option<Watch> {
    let watched = libtorch::cuda::bus_id(device).map_err(anyhow::Error::from).and_then(|bus_id| {
        let broken = move |what| drop(fault.send(what)); // The worker may be ending.
        bus_id
            .map(|id| Watch::start(None, &id, health::PERIOD, broken))
            .transpose()
            .map_err(Into::into)
    });
    watched.unwrap_or_else(|error| {
        warn!(error = format!("{error:#}"), "the GPU is not watched");
        None
    })
}

fn every(interval: Duration) -> Interval {
    let mut interval = tokio::time::interval(interval);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval
}

/// Resident memory of this process; 0 if the system does not say.
fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|rest| rest.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}
