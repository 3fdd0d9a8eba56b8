//! The training thread: forms a generation, agrees with its members on a state, makes steps.
//!
//! It obeys between two virtual ranks and waits for nobody but its peers.

mod beginning;
mod blame;
pub(crate) mod checkpoints;
mod device_step;
mod eval;
mod forming;
mod interrupted;
pub(crate) mod memory;
mod state;
mod step;
mod steps;

use std::{
    collections::BTreeSet,
    net::{SocketAddr, TcpListener},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc::Receiver,
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use cluster::{
    Evaluation, Generation, Group, Notice, Rank, RunId, Step, StepMetrics, StepPhase, Timestamp,
};
use collective::{AbortHandle, Exchange, ExchangeError, FormError, Mesh, MeshConfig, MeshListener};
use tokio::sync::mpsc::UnboundedSender;
use tracing::{error, info, warn};

use self::{
    blame::{culprit, missing, resolve},
    checkpoints::{share, share_bytes},
    eval::Evaluator,
    forming::Origin,
    interrupted::unreadable,
    memory::ShareMemory,
    step::Surroundings,
    steps::Steps,
};
pub use self::{
    checkpoints::{RestoreError, ShareBytes},
    interrupted::Interrupted,
    state::{SECTIONS, TrainState},
};
use crate::{
    device,
    feed::{self, Feed},
    progress::{Progress, Spent},
    setup::Setup,
};

/// A generation to form and to train in.
#[derive(Debug)]
pub struct Formation {
    /// Its members and where they start.
    pub group: Group,
    /// This worker's place.
    pub rank: Rank,
    /// Opens the connections between the members.
    pub secret: [u8; 32],
    /// What may be wanted of it while it lasts.
    pub orders: Arc<Orders>,
}

/// What the agent wants of the training thread in one generation.
#[derive(Debug)]
pub struct Orders {
    /// Stops it.
    pub abort: AbortHandle,
    leave: AtomicBool,
}

impl Orders {
    /// No wishes yet.
    ///
    /// # Errors
    /// If the process is out of file descriptors.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self { abort: AbortHandle::new()?, leave: AtomicBool::new(false) })
    }

    /// Asks all members, through the sum, to leave after the step in flight.
    pub fn leave(&self) {
        self.leave.store(true, Ordering::Release);
    }

    /// Between two pieces of work: whether to go on.
    fn check(&self) -> Result<(), Interrupted> {
        if self.abort.is_aborted() { Err(ExchangeError::Aborted.into()) } else { Ok(()) }
    }

    fn is_leaving(&self) -> bool {
        self.leave.load(Ordering::Acquire)
    }
}

/// The steps after which the state is to be kept.
#[derive(Debug, Default)]
pub struct KeepAt(Mutex<BTreeSet<Step>>);

impl KeepAt {
    /// Adds a step.
    pub fn add(&self, step: Step) {
        self.0.lock().expect("nothing panics under this lock").insert(step);
    }

    /// Whether the state after `step` is to be kept. Forgets it and all steps before.
    fn take(&self, step: Step) -> bool {
        let mut steps = self.0.lock().expect("nothing panics under this lock");
        let later = steps.split_off(&step.next());
        std::mem::replace(&mut *steps, later).contains(&step)
    }
}

/// What the training thread tells the agent.
#[derive(Debug)]
pub enum Told {
    /// Something for the rules.
    Notice(Notice),
    /// A share of a checkpoint to be put into the store.
    Share {
        /// The generation that it belongs to.
        generation: Generation,
        /// Its bytes.
        share: ShareBytes,
    },
}

/// What the training thread is started with.
#[derive(Debug)]
pub struct Trainer {
    /// The run.
    pub run: RunId,
    /// The recipe as TOML.
    pub recipe: String,
    /// The store of the checkpoints.
    pub checkpoints: String,
    /// The socket that the peers dial.
    pub socket: TcpListener,
    /// How long a generation may take to form.
    pub form_timeout: Duration,
    /// What it computes on and by.
    pub means: Means,
    /// What it does, for the agent to see.
    pub progress: Arc<Progress>,
    /// The steps after which the state is to be kept.
    pub keep: Arc<KeepAt>,
    /// Where it says what happened.
    pub told: UnboundedSender<Told>,
    /// Runs what is asynchronous.
    pub runtime: tokio::runtime::Handle,
}

/// What a worker computes on and by. Nothing of it changes bits, but the device.
#[derive(Debug, Clone, Copy)]
pub struct Means {
    /// The device.
    pub device: tch::Device,
    /// Threads that decode images.
    pub loaders: usize,
    /// What moves gradients between GPUs.
    pub transport: Transport,
    /// Whether a GPU is given a pass as one recorded graph.
    pub graph: bool,
    /// Damages the state after this step, to see that it is found. Of the CPU only.
    pub flip_after: Option<Step>,
}

impl Default for Means {
    fn default() -> Self {
        let (loaders, transport, graph) = (1, Transport::Auto, true);
        Self { device: tch::Device::Cpu, loaders, transport, graph, flip_after: None }
    }
}

/// What moves gradients between workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Transport {
    /// NCCL between GPUs, else TCP.
    Auto,
    /// TCP, by way of the host's memory.
    Mesh,
    /// NCCL, which needs a GPU.
    Nccl,
}

/// An error with its causes, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// The wall clock, as the rules take it.
pub(crate) fn wall_clock() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

impl Trainer {
    /// Works through formations until there are no more. A newer one is sent only after the one before
    /// was aborted, or all have left it.
    pub fn run(self, formations: &Receiver<Formation>) {
        let mut training = match self.prepare() {
            Ok(training) => training,
            Err(reason) => return self.say(Notice::Failed { reason }),
        };
        self.progress.enter(StepPhase::Idle);
        self.say(Notice::Ready);
        while let Ok(formation) = formations.recv() {
            if let Err(interrupted) = training.take_part(&self, &formation) {
                training.interrupted(&self, &formation, &interrupted);
            }
            self.progress.set_applied(training.state.step());
            self.progress.enter(StepPhase::Idle);
        }
    }

    fn prepare(&self) -> Result<Training, String> {
        let setup = Setup::new(self.run.clone(), &self.recipe).map_err(|error| chain(&error))?;
        libtorch::cuda::enter(self.means.device)
            .map_err(|error| format!("--device {}: {error}", device::name(self.means.device)))?;
        let listen = || {
            let config = MeshConfig {
                // The coordinator aborts an exchange whose peer is lost; this is for a lost coordinator.
                stall_timeout: stall_timeout(self.form_timeout),
                handshake_timeout: self.form_timeout,
            };
            MeshListener::on(self.socket.try_clone()?, config)
        };
        let listener = listen().map_err(|error| format!("cannot listen for peers: {error}"))?;
        let mut state = TrainState::empty(
            &setup.architecture,
            setup.optimizer,
            setup.recipe.update_freq,
            self.means.device,
        );
        let part_bytes = u64::from(setup.recipe.checkpoint.part_mib) << 20;
        let layout = state
            .checkpoint_layout(part_bytes)
            .map_err(|error| format!("recipe, checkpoint.part_mib: {error}"))?;
        Ok(Training {
            steps: Steps::new(&setup, &mut state, self.means)?,
            evaluator: Evaluator::new(&setup),
            setup,
            listener,
            layout,
            memory: ShareMemory::default(),
            state,
            begun: Step(0),
            stopped_at: None,
            last: None,
            flip_after: self.means.flip_after,
        })
    }

    fn say(&self, notice: Notice) {
        drop(self.told.send(Told::Notice(notice))); // Without an agent the process is about to end.
    }
}

/// What lasts from generation to generation.
struct Training {
    setup: Setup,
    listener: MeshListener,
    layout: checkpoint::Layout,
    memory: ShareMemory,
    state: TrainState,
    steps: Steps,
    evaluator: Evaluator,
    /// The newest step that was begun.
    begun: Step,
    /// When the exchange of the generation before broke or was aborted.
    stopped_at: Option<Timestamp>,
    /// The figures of the newest step that was made here.
    last: Option<(Step, StepMetrics)>,
    /// As in [`Means`], until it is done.
    flip_after: Option<Step>,
}

impl Training {
    /// Forms the generation and trains in it until all leave it, or the last step is done.
    fn take_part(&mut self, host: &Trainer, formation: &Formation) -> Result<(), Interrupted> {
        let Formation { group, rank, orders, .. } = formation;
        let generation = group.generation;
        host.progress.enter(StepPhase::Form);
        let mut peers = self.connect(host, formation)?;
        let digest = self.agree(host, group, &mut peers)?;
        self.say_formed(host, generation, digest);
        self.memory.prepare(share_bytes(&self.layout, *rank, peers.size()));
        let step = self.step();
        if group.last && step < self.setup.plan.steps_total {
            if step > Step(0) && group.checkpoint != Some(step) {
                self.save_share(host, generation, (*rank, peers.size()), true);
            }
            return Ok(()); // The rules let it go when the state is kept.
        }

        let blocks: Vec<_> = group.members.iter().map(|member| member.block.clone()).collect();
        self.steps.regroup(&blocks, *rank);
        self.steps.connect(&mut peers, &orders.abort, host.form_timeout)?;
        self.evaluator.sum_mut().regroup(&blocks, *rank);
        let block = blocks[rank.0 as usize].clone();
        let means = feed::Means { threads: host.means.loaders, device: host.means.device };
        let mut feed = Feed::start(&self.setup, block, self.step(), means)
            .map_err(|error| Interrupted::Fatal { reason: format!("no thread left: {error}") })?;
        let (mut evaluated, mut leave, agreed) = (group.evaluated, false, step);
        loop {
            let step = self.step();
            let is_last = step == self.setup.plan.steps_total;
            if self.setup.votes_at(step) && step > agreed {
                forming::vote(&mut peers, &mut self.state, |step| self.setup.voted_before(step))?;
            }
            if host.keep.take(step) || is_last {
                self.save_share(host, generation, (*rank, peers.size()), is_last);
            }
            if leave {
                host.say(Notice::LeftTogether { generation });
                return Ok(());
            }
            if self.setup.plan.evaluates_at(step) && evaluated < Some(step) {
                let evaluation = self.evaluate(host, orders, &mut peers)?;
                host.say(Notice::Evaluated { generation, evaluation });
                evaluated = Some(step);
            }
            if is_last {
                let state_sha256 = self.state.sha256();
                host.say(Notice::Finished { generation, step, state_sha256 });
                return Ok(());
            }
            leave = self.make_step(host, generation, orders, &mut feed, &mut peers)?;
        }
    }

    fn step(&self) -> Step {
        self.state.step().expect("the members have agreed on a state")
    }

    fn connect(&self, host: &Trainer, formation: &Formation) -> Result<Mesh, Interrupted> {
        let Formation { group, rank, secret, orders } = formation;
        let addresses: Result<Vec<SocketAddr>, Interrupted> =
            group.members.iter().map(|member| resolve(&member.name, &member.address)).collect();
        let group = collective::Group {
            run: host.run.clone(),
            term: group.term,
            generation: group.generation,
            rank: *rank,
            addresses: addresses?,
            secret: (*secret).into(),
        };
        // The coordinator gives up earlier, and then says so.
        let deadline = Instant::now() + host.form_timeout * 4;
        Ok(self.listener.form(&group, deadline, &orders.abort)?)
    }

    /// Comes to hold the state that the generation starts from; returns its digest.
    fn agree(
        &mut self,
        host: &Trainer,
        group: &Group,
        peers: &mut Mesh,
    ) -> Result<blake3::Hash, Interrupted> {
        let held = forming::all_gather(peers, &self.state)?;
        if self.setup.votes() {
            forming::check_equal(&held, &mut self.state, |step| self.setup.voted_before(step))?;
        }
        let digest = match forming::origin(&held, group.checkpoint) {
            Origin::Initial => {
                beginning::begin(&mut self.state, &self.setup.recipe)
                    .map_err(|error| Interrupted::Fatal { reason: chain(&error) })?;
                self.state.digest()
            }
            Origin::Checkpoint(step) => {
                info!(step = step.0, "the state is read from a checkpoint");
                let restoring =
                    checkpoints::restore(&host.checkpoints, step, &mut self.state, &self.layout);
                if let Err(error) = host.runtime.block_on(restoring) {
                    return Err(unreadable(host, error));
                }
                self.state.digest()
            }
            Origin::Members { step, digest, givers, takers } => {
                forming::hand_over(peers, &mut self.state, (step, digest), &givers, &takers)?;
                digest.into()
            }
        };
        host.progress.set_applied(self.state.step());
        Ok(digest)
    }

    fn say_formed(&mut self, host: &Trainer, generation: Generation, digest: blake3::Hash) {
        let step = self.step();
        let digest = digest.to_hex().to_string();
        let metrics = self.last.filter(|(made, _)| *made == step).map(|(_, metrics)| metrics);
        let (begun, stopped_at) = (self.begun, self.stopped_at.take());
        info!(%generation, step = step.0, "generation formed");
        host.say(Notice::Formed { generation, step, digest, begun, stopped_at, metrics });
    }

    /// Makes the next step; returns whether all are to leave the generation after it.
    fn make_step(
        &mut self,
        host: &Trainer,
        generation: Generation,
        orders: &Orders,
        feed: &mut Feed,
        peers: &mut Mesh,
    ) -> Result<bool, Interrupted> {
        let started = Instant::now();
        host.progress.take_spent();
        self.begun = self.step().next();
        let peers: &mut dyn Exchange = peers;
        let around =
            Surroundings { setup: &self.setup, orders, progress: &host.progress, feed, peers };
        let taken = self.steps.train_step(&mut self.state, around)?;
        host.progress.enter(StepPhase::Idle);
        let step = self.step();
        host.progress.set_applied(Some(step));
        if self.flip_after.take_if(|after| *after == step).is_some() {
            warn!(
                step = step.0,
                "a bit of this worker's state is flipped, as --flip-a-bit-after asks"
            );
            self.state.section_mut(0)[0] ^= 1;
        }
        let metrics = timed(taken.metrics, started.elapsed(), host.progress.take_spent());
        self.last = Some((step, metrics));
        host.say(Notice::StepApplied { generation, step, metrics, at: wall_clock() });
        Ok(taken.leave)
    }

    fn evaluate(
        &mut self,
        host: &Trainer,
        orders: &Orders,
        peers: &mut Mesh,
    ) -> Result<Evaluation, Interrupted> {
        self.evaluator.evaluate(&self.state, &self.setup, orders, &host.progress, peers)
    }

    /// Copies this worker's share and hands it over; the store is the agent's affair.
    fn save_share(
        &self,
        host: &Trainer,
        generation: Generation,
        place: (Rank, u32),
        indispensable: bool,
    ) {
        host.progress.enter(StepPhase::Checkpoint);
        let (step, memory) = (self.step(), &self.memory);
        let Some(share) = share(&self.state, &self.layout, place, memory, indispensable) else {
            let reason = "the checkpoints before are still on their way to the store".to_owned();
            warn!(%generation, step = step.0, %reason, "checkpoint left out");
            return host.say(Notice::ShareSaved { generation, step, outcome: Err(reason) });
        };
        drop(host.told.send(Told::Share { generation, share })); // As in `say`.
    }

    /// Says why a generation ended early, unless it was this worker that was told to stop.
    fn interrupted(&mut self, host: &Trainer, formation: &Formation, interrupted: &Interrupted) {
        let at = wall_clock();
        self.stopped_at.get_or_insert(at);
        let generation = formation.group.generation;
        let (peer, reason) = match interrupted {
            Interrupted::Form(FormError::Aborted)
            | Interrupted::Exchange(ExchangeError::Aborted) => {
                return info!(%generation, "stopped, as told");
            }
            Interrupted::Fatal { reason } => {
                return host.say(Notice::Failed { reason: reason.clone() });
            }
            Interrupted::Checkpoint { step, reason } => {
                warn!(%generation, step = step.0, %reason, "checkpoint damaged");
                let (step, reason) = (*step, reason.clone());
                return host.say(Notice::CheckpointDamaged { generation, step, reason });
            }
            Interrupted::Diverged { step, agreed, odd, reason } => {
                error!(%generation, reason);
                retract_untrusted(host, formation.rank, *agreed, *odd);
                let (step, agreed, odd, reason) = (*step, *agreed, *odd, reason.clone());
                return host.say(Notice::Diverged { generation, step, agreed, odd, reason });
            }
            Interrupted::Form(error) => (missing(error), chain(error)),
            Interrupted::Forming { reason } => (None, reason.clone()),
            Interrupted::Exchange(error) => (culprit(error), error.to_string()),
        };
        warn!(%generation, %reason, "stopped");
        // The rules take the one that fits: they know whether the generation was formed.
        host.say(Notice::FormFailed { generation, peer, reason: reason.clone() });
        if let Some(applied) = self.state.step() {
            host.say(Notice::ExchangeLost { generation, applied, peer, reason, at });
        }
    }
}

/// One of the members that is not to blame takes the checkpoints away that cannot be trusted, so that they can be written
/// again.
fn retract_untrusted(host: &Trainer, rank: Rank, agreed: Step, odd: Option<Rank>) {
    let first = if odd == Some(Rank(0)) { Rank(1) } else { Rank(0) };
    if rank == first
        && let Err(error) = host.runtime.block_on(checkpoints::retract(&host.checkpoints, agreed))
    {
        warn!(error = chain(&error), "checkpoints that cannot be trusted are still in the store");
    }
}

/// How long an exchange may stand still, if a generation may take `form_timeout` to form.
fn stall_timeout(form_timeout: Duration) -> Duration {
    (form_timeout * 12).max(Duration::from_secs(60))
}

fn timed(metrics: StepMetrics, elapsed: Duration, spent: Spent) -> StepMetrics {
    let ms = |duration: Duration| duration.as_secs_f32() * 1000.0;
    StepMetrics {
        step_ms: ms(elapsed),
        load_ms: ms(spent.load),
        compute_ms: ms(spent.compute),
        reduce_ms: ms(spent.reduce),
        update_ms: ms(spent.update),
        ..metrics
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_kept_once_and_steps_that_have_passed_are_forgotten() {
        let keep = KeepAt::default();
        for step in [3, 5, 9] {
            keep.add(Step(step));
        }
        assert!(!keep.take(Step(4)));
        assert!(keep.take(Step(5)));
        assert!(!keep.take(Step(5)));
        assert!(keep.take(Step(9)));
    }
}
