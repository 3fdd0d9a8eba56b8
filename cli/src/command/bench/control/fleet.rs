//! Workers that say what a worker says, each over a connection of its own, and do not train.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use cluster::{
    Fingerprint, Generation, Hello, Progress, Report, Step, StepMetrics, StepPhase, Timestamp,
    WorkerId,
};
use prost::Message as _;
use proto::{
    MESSAGE_BYTES_MAX, TOKEN_HEADER,
    v1::{
        self, cluster_service_client::ClusterServiceClient, session_request::Kind as Said,
        session_response::Kind as Told, watch_response,
    },
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinSet,
    time::{MissedTickBehavior, interval, sleep},
};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Request, Streaming, transport::Endpoint};

use super::office::Door;
use crate::client::Client;

/// Connections that are opened at the same time.
const OPENING_MAX: usize = 64;
/// Odd, so no two numbers meet.
const SCATTER: u64 = 0x9e37_79b9_7f4a_7c15;
/// A generation that takes longer is a failure.
const GENERATION_MAX: Duration = Duration::from_secs(60);

/// How long a generation took from its cause.
#[derive(Debug, Clone, Copy)]
pub(super) struct Measured {
    /// Until its last member had been told.
    pub(super) told: Duration,
    /// Until all had said that they formed it and the log said so.
    pub(super) formed: Duration,
    /// Bytes of all that was said to the workers meanwhile.
    pub(super) bytes: u64,
}

/// What all workers have said so far.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Tally {
    reports: u64,
    bytes: u64,
}

impl Tally {
    /// Reports and bytes since then.
    pub(super) fn since(self, then: Self) -> (f64, f64) {
        ((self.reports - then.reports) as f64, (self.bytes - then.bytes) as f64)
    }
}

/// What the workers share: they are one process, and nobody trains.
#[derive(Debug)]
struct Board {
    /// Who was told of which generation, and when the last of them was.
    told: Mutex<BTreeMap<u64, (u32, Instant)>>,
    /// Steps are made only while a generation trains, as all must hold the same state when it forms.
    steps: Mutex<Steps>,
    reports: AtomicU64,
    heard_bytes: AtomicU64,
    told_bytes: AtomicU64,
    /// Where the log is: the newest generation that formed, and when it was heard of.
    formed: watch::Sender<(u64, Instant)>,
}

#[derive(Debug)]
struct Steps {
    trains: bool,
    step: u64,
    interval: Duration,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The workers.
#[derive(Debug)]
pub(super) struct Fleet {
    door: Door,
    client: Client,
    board: Arc<Board>,
    /// Dropping one ends its worker; the oldest is first and stays.
    workers: Vec<(WorkerId, oneshot::Sender<()>)>,
    running: JoinSet<Result<()>>,
    next: u64,
    generation: u64,
}

impl Fleet {
    /// Connects so many workers, and waits until they form the first generation.
    pub(super) async fn gather(
        door: Door,
        workers: u32,
        step: Duration,
    ) -> Result<(Self, Measured)> {
        let (formed, _) = watch::channel((0, Instant::now()));
        let board = Arc::new(Board {
            told: Mutex::default(),
            steps: Mutex::new(Steps { trains: false, step: 0, interval: step }),
            reports: AtomicU64::new(0),
            heard_bytes: AtomicU64::new(0),
            told_bytes: AtomicU64::new(0),
            formed,
        });
        let client = Client::new(&door.address, door.run.clone(), &door.token)?;
        let mut fleet = Self {
            door,
            client,
            board,
            workers: Vec::new(),
            running: JoinSet::new(),
            next: 1,
            generation: 0,
        };
        fleet.running.spawn(follow(fleet.client.clone(), Arc::clone(&fleet.board)));
        let mut opening = JoinSet::new();
        let mut last = Instant::now();
        for number in 0..workers {
            if number == 0 {
                let opened = open(fleet.door.clone(), fleet.take_number()).await?;
                fleet.man(opened); // The oldest: it is rank 0, and it stays.
                continue;
            }
            opening.spawn(open(fleet.door.clone(), fleet.take_number()));
            last = Instant::now();
            if opening.len() >= OPENING_MAX {
                let opened = opening.join_next().await.context("somebody is opening")?;
                fleet.man(opened.context("a worker of the benchmark has panicked")??);
            }
        }
        while let Some(opened) = opening.join_next().await {
            fleet.man(opened.context("a worker of the benchmark has panicked")??);
        }
        let first = fleet.next_generation(last, 0).await.context("the first generation")?;
        Ok((fleet, first))
    }

    fn take_number(&mut self) -> u64 {
        let number = self.next;
        self.next += 1;
        number
    }

    fn man(&mut self, opened: Opened) {
        let (stays, ends) = oneshot::channel();
        self.workers.push((opened.worker, stays));
        self.running.spawn(live(opened, Arc::clone(&self.board), ends));
    }

    /// The process of a worker ends, and its supervisor says so.
    pub(super) async fn lose(&mut self) -> Result<Measured> {
        let before = self.stop_training();
        let at = self.workers.len() / 2;
        let (worker, stays) = self.workers.remove(at.max(1));
        let began = Instant::now();
        drop(stays);
        self.client.report_exit(worker, "killed by the benchmark").await?;
        self.next_generation(began, before).await
    }

    /// A worker joins.
    pub(super) async fn join(&mut self) -> Result<Measured> {
        let before = self.stop_training();
        let began = Instant::now();
        let opened = open(self.door.clone(), self.take_number()).await?;
        self.man(opened);
        self.next_generation(began, before).await
    }

    fn stop_training(&self) -> u64 {
        lock(&self.board.steps).trains = false;
        self.board.told_bytes.load(Relaxed)
    }

    /// Waits until all have formed the next generation.
    async fn next_generation(&mut self, began: Instant, bytes_before: u64) -> Result<Measured> {
        self.generation += 1;
        let generation = self.generation;
        let mut formed = self.board.formed.subscribe();
        let patience = sleep(GENERATION_MAX);
        tokio::pin!(patience);
        let heard = loop {
            tokio::select! {
                forms = formed.wait_for(|(newest, _)| *newest >= generation) => {
                    break forms.context("the log ended")?.1;
                }
                // One that was to end has ended; others that do say why.
                Some(ended) = self.running.join_next() => {
                    ended.context("a worker of the benchmark has panicked")??;
                }
                () = &mut patience => bail!("it did not form within {GENERATION_MAX:?}"),
            }
        };
        let (count, last) = lock(&self.board.told).remove(&generation).unwrap_or((0, heard));
        let members = u32::try_from(self.workers.len()).expect("workers can be counted");
        if count != members {
            bail!("{count} of {members} workers were told of generation {generation}");
        }
        lock(&self.board.steps).trains = true;
        let bytes = self.board.told_bytes.load(Relaxed) - bytes_before;
        Ok(Measured { told: last - began, formed: heard - began, bytes })
    }

    /// What was said so far.
    pub(super) fn said(&self) -> Tally {
        let Board { reports, heard_bytes, .. } = &*self.board;
        Tally { reports: reports.load(Relaxed), bytes: heard_bytes.load(Relaxed) }
    }

    /// Workers that are still there.
    pub(super) fn alive(&self) -> u32 {
        let open = self.workers.iter().filter(|(_, stays)| !stays.is_closed()).count();
        u32::try_from(open).expect("workers can be counted")
    }
}

/// A session that stands.
#[derive(Debug)]
struct Opened {
    worker: WorkerId,
    run: String,
    requests: mpsc::UnboundedSender<v1::SessionRequest>,
    responses: Streaming<v1::SessionResponse>,
}

async fn open(door: Door, number: u64) -> Result<Opened> {
    let Door { address, run, token } = door;
    let endpoint = Endpoint::from_shared(format!("http://{address}"))?.tcp_nodelay(true);
    let channel = endpoint.connect().await.context("cannot connect to the coordinator")?;
    let mut client =
        ClusterServiceClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let worker = WorkerId(number.wrapping_mul(SCATTER)); // As little alike as those that are drawn.
    let hello = Hello {
        name: format!("worker-{number}"),
        address: format!("10.{}.{}.{}:7000", number >> 16, (number >> 8) & 255, number & 255),
        node: String::new(),
        fingerprint: Fingerprint::default(),
        generation: None,
        applied: None,
        preparing: false,
    };
    let hello = v1::Hello::new(worker, &hello, env!("CARGO_PKG_VERSION"));
    let (requests, receiver) = mpsc::unbounded_channel();
    let first = v1::SessionRequest { run: run.to_string(), kind: Some(Said::Hello(hello)) };
    requests.send(first).context("the stream was dropped")?;
    let mut request = Request::new(UnboundedReceiverStream::new(receiver));
    let token = token.parse().context("the token has characters that no token has")?;
    request.metadata_mut().insert(TOKEN_HEADER, token);
    let responses = client.session(request).await.context("no session")?.into_inner();
    Ok(Opened { worker, run: run.to_string(), requests, responses })
}

/// A worker's life, until somebody drops the other end of `ends`.
async fn live(opened: Opened, board: Arc<Board>, mut ends: oneshot::Receiver<()>) -> Result<()> {
    let Opened { worker, run, requests, mut responses } = opened;
    let mut speaker = Speaker { run, requests, sequence: 0, board: Arc::clone(&board) };
    let mut generation = Generation(0);
    let mut heartbeat = interval(Duration::from_secs(60));
    let mut step = interval(lock(&board.steps).interval);
    step.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let response = tokio::select! {
            biased; // Whoever is to end does not hear what is said of its end.
            _ = &mut ends => return Ok(()),
            response = responses.message() => response.with_context(|| format!("worker {worker}"))?,
            _ = heartbeat.tick() => { speaker.beat(generation)?; continue }
            _ = step.tick(), if worker == WorkerId(SCATTER) => { speaker.step(generation)?; continue }
        };
        let response = response.with_context(|| format!("worker {worker}: its session ended"))?;
        board.told_bytes.fetch_add(response.encoded_len() as u64, Relaxed);
        match response.kind {
            Some(Told::Welcome(welcome)) => {
                // They do not all speak at the same moment.
                let every = Duration::from_millis(welcome.heartbeat_ms.max(1));
                let share = u32::try_from(worker.0 % 64).expect("it is below 64");
                let start = tokio::time::Instant::now() + every * share / 64;
                heartbeat = tokio::time::interval_at(start, every);
                heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
            }
            Some(Told::Form(group)) => {
                generation = Generation(group.generation);
                let mut told = lock(&board.told);
                let (count, last) = told.entry(group.generation).or_insert((0, Instant::now()));
                (*count, *last) = (*count + 1, Instant::now());
                drop(told);
                speaker.formed(generation)?;
            }
            Some(Told::Refuse(refuse)) => bail!("worker {worker} was refused: {}", refuse.reason),
            Some(Told::Fail(fail)) => bail!("worker {worker}: the run failed: {}", fail.reason),
            Some(
                Told::CheckpointAt(_)
                | Told::Hold(_)
                | Told::Finish(_)
                | Told::Ack(_)
                | Told::Roster(_),
            )
            | None => {}
        }
    }
}

/// What a worker says.
#[derive(Debug)]
struct Speaker {
    run: String,
    requests: mpsc::UnboundedSender<v1::SessionRequest>,
    sequence: u64,
    board: Arc<Board>,
}

impl Speaker {
    fn say(&self, sequence: u64, report: &Report) -> Result<()> {
        let kind = Some(Said::Report(proto::report_to_wire(sequence, report)));
        let request = v1::SessionRequest { run: self.run.clone(), kind };
        self.board.reports.fetch_add(1, Relaxed);
        self.board.heard_bytes.fetch_add(request.encoded_len() as u64, Relaxed);
        self.requests.send(request).context("the session ended")
    }

    fn beat(&self, generation: Generation) -> Result<()> {
        let step = lock(&self.board.steps).step;
        self.say(
            0,
            &Report::Heartbeat(Progress {
                generation,
                applied: Some(Step(step)),
                phase: StepPhase::Compute,
                in_phase: Duration::from_millis(10),
                resident_bytes: 1 << 30,
            }),
        )
    }

    fn formed(&mut self, generation: Generation) -> Result<()> {
        self.sequence += 1;
        let step = Step(lock(&self.board.steps).step);
        let (begun, digest) = (step, "0".repeat(64));
        let (stopped_at, metrics) = (None, None);
        self.say(
            self.sequence,
            &Report::Formed { generation, step, digest, begun, stopped_at, metrics },
        )
    }

    /// Rank 0 says what all have done.
    fn step(&mut self, generation: Generation) -> Result<()> {
        let board = Arc::clone(&self.board);
        let mut steps = lock(&board.steps);
        if !steps.trains {
            return Ok(());
        }
        steps.step += 1;
        self.sequence += 1;
        let metrics = StepMetrics { step_ms: 100.0, ..StepMetrics::default() };
        let (step, at) = (Step(steps.step), Timestamp(0));
        self.say(self.sequence, &Report::StepApplied { generation, step, metrics, at })
    }
}

/// Looks for generations in the log.
async fn follow(client: Client, board: Arc<Board>) -> Result<()> {
    let mut log = client.watch(1).await.context("the log cannot be followed")?;
    while let Some(message) = log.message().await.context("the log cannot be followed")? {
        let Some(watch_response::Kind::Entry(entry)) = message.kind else { continue };
        if !entry.record.contains("\"generation_formed\"") {
            continue; // The others are long, and tell nothing here.
        }
        if let cluster::Record::GenerationFormed { generation, .. } =
            crate::client::entry(&entry)?.record
        {
            board.formed.send_replace((generation.0, Instant::now()));
        }
    }
    bail!("the coordinator ended its log")
}
