//! Trainers in threads, without a coordinator: one state for every number of workers, and after every
//! interruption.
#![expect(clippy::unwrap_used, reason = "a test: what cannot be unwrapped fails it")]

use std::{
    collections::BTreeSet,
    net::{SocketAddr, TcpListener},
    path::Path,
    sync::{Arc, mpsc},
    thread::{self, JoinHandle},
    time::Duration,
};

use cluster::{
    Generation, Group, Member, Notice, Rank, RunId, Step, Term, WorkerId, blocks::balanced_blocks,
};
use tokio::sync::mpsc::UnboundedReceiver;
use worker::{
    progress::Progress,
    train::{Formation, KeepAt, Means, Orders, Told, Trainer},
};

const RECIPE: [&str; 10] = [
    "virtual_ranks=4",
    "batch_size=4",
    "max_steps=4",
    "model.dropout=0.1",
    "evaluate_every_epochs=0",
    "schedule.warmup_epochs=0",
    "augment.aa=rand-m9-mstd0.5-inc1",
    "augment.reprob=0.5",
    "augment.mixup=0.8",
    "augment.cutmix=1.0",
];

/// A training thread, as its agent would see it.
struct Worker {
    address: SocketAddr,
    formations: mpsc::Sender<Formation>,
    told: UnboundedReceiver<Told>,
    thread: JoinHandle<()>,
}

fn run() -> RunId {
    RunId::try_from("toy".to_owned()).unwrap()
}

fn start(runtime: &tokio::runtime::Runtime, checkpoints: &Path) -> Worker {
    start_with(&RECIPE, runtime, checkpoints)
}

fn start_with(sets: &[&str], runtime: &tokio::runtime::Runtime, checkpoints: &Path) -> Worker {
    libtorch::init(1).unwrap();
    let sets: Vec<_> = sets.iter().map(|&set| set.to_owned()).collect();
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    let (told_sender, told) = tokio::sync::mpsc::unbounded_channel();
    let trainer = Trainer {
        run: run(),
        recipe: recipe::built_in("digits", &sets).unwrap().to_toml(),
        checkpoints: checkpoints.display().to_string(),
        socket,
        form_timeout: Duration::from_secs(20),
        means: Means::default(),
        progress: Arc::new(Progress::default()),
        keep: Arc::new(KeepAt::default()),
        told: told_sender,
        runtime: runtime.handle().clone(),
    };
    let (formations, receiver) = mpsc::channel();
    let thread = thread::spawn(move || trainer.run(&receiver));
    Worker { address, formations, told, thread }
}

impl Worker {
    /// Waits for what `wanted` takes out of the notices; a failure is not waited over.
    fn wait<T>(&mut self, wanted: impl Fn(&Notice) -> Option<T>) -> T {
        loop {
            match self.told.blocking_recv().expect("the training thread lives") {
                Told::Notice(Notice::Failed { reason }) => panic!("{reason}"),
                Told::Notice(notice) => {
                    if let Some(found) = wanted(&notice) {
                        return found;
                    }
                }
                Told::Share { .. } => {}
            }
        }
    }

    fn sha256(&mut self) -> String {
        self.wait(|notice| {
            let Notice::Finished { step: Step(4), state_sha256, .. } = notice else { return None };
            Some(state_sha256.clone())
        })
    }

    /// Waits for the last state, of one worker alone; returns its bytes.
    fn state(&mut self) -> Vec<u8> {
        loop {
            match self.told.blocking_recv().expect("the training thread lives") {
                Told::Notice(Notice::Failed { reason }) => panic!("{reason}"),
                Told::Notice(_) => {}
                Told::Share { share, .. } => {
                    return share.parts.into_iter().flat_map(|(_, bytes)| bytes).collect();
                }
            }
        }
    }

    /// Waits until the generation is formed; returns the step it starts from.
    fn formed(&mut self, number: u64) -> u64 {
        self.wait(|notice| {
            let Notice::Formed { generation, step, .. } = notice else { return None };
            (generation.0 == number).then_some(step.0)
        })
    }

    fn applied(&mut self, number: u64) {
        self.wait(|notice| {
            let Notice::StepApplied { step, .. } = notice else { return None };
            (step.0 == number).then_some(())
        });
    }

    fn end(self) {
        drop(self.formations);
        self.thread.join().unwrap();
    }
}

/// Forms a generation of `workers`; returns what steers each.
fn form(generation: u64, workers: &[&Worker]) -> Vec<Arc<Orders>> {
    form_over(4, generation, workers)
}

fn form_over(virtual_ranks: u32, generation: u64, workers: &[&Worker]) -> Vec<Arc<Orders>> {
    let count = u32::try_from(workers.len()).unwrap();
    let members = (0..).zip(workers).zip(balanced_blocks(virtual_ranks, count));
    let members = members.map(|((id, worker), block)| Member {
        worker: WorkerId(id),
        name: format!("worker-{id}"),
        address: worker.address.to_string(),
        block,
    });
    let group = Group {
        generation: Generation(generation),
        term: Term(1),
        members: members.collect(),
        planned: false,
        checkpoint: None,
        checkpoint_at: None,
        evaluated: None,
        last: false,
    };
    let send = |(rank, worker): (u32, &&Worker)| {
        let orders = Arc::new(Orders::new().unwrap());
        let (group, secret) = (group.clone(), [7; 32]);
        let formation = Formation { group, rank: Rank(rank), secret, orders: Arc::clone(&orders) };
        worker.formations.send(formation).unwrap();
        orders
    };
    (0..).zip(workers).map(send).collect()
}

#[test]
fn every_number_of_workers_and_every_interruption_ends_in_one_state() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let start = || start(&runtime, folder.path());
    let mut states = BTreeSet::new();

    for count in [1, 3, 4] {
        let mut workers: Vec<Worker> = (0..count).map(|_| start()).collect();
        form(1, &workers.iter().collect::<Vec<_>>());
        for worker in &mut workers {
            states.insert(worker.sha256());
        }
        workers.into_iter().for_each(Worker::end);
    }
    assert_eq!(states.len(), 1, "1, 3 and 4 workers");

    // Two workers are interrupted after step 2; one goes on with a newcomer.
    let (mut old, mut lost, mut new) = (start(), start(), start());
    let orders = form(1, &[&old, &lost]);
    lost.formed(1);
    old.applied(2);
    orders.iter().for_each(|orders| orders.abort.abort());
    lost.end();
    form(2, &[&new, &old]);
    let resumed = new.formed(2);
    assert!((2..4).contains(&resumed), "the highest step wins: {resumed}");
    states.extend([new.sha256(), old.sha256()]);
    assert_eq!(states.len(), 1, "after an interruption");
    old.end();
    new.end();

    // All leave together after a step, as a planned change wants.
    let (mut first, mut second) = (start(), start());
    let orders = form(1, &[&first]);
    first.applied(1);
    orders[0].leave();
    first.wait(|notice| matches!(notice, Notice::LeftTogether { .. }).then_some(()));
    form(2, &[&first, &second]);
    assert!(second.formed(2) < 4);
    states.extend([first.sha256(), second.sha256()]);
    assert_eq!(states.len(), 1, "after a planned change");
    first.end();
    second.end();
}

/// Runs `sets` on `count` workers; returns the digest of the final state.
fn digest_of(runtime: &tokio::runtime::Runtime, sets: &[&str], ranks: u32, count: u32) -> String {
    let folder = tempfile::tempdir().unwrap();
    let mut workers: Vec<Worker> =
        (0..count).map(|_| start_with(sets, runtime, folder.path())).collect();
    form_over(ranks, 1, &workers.iter().collect::<Vec<_>>());
    let digests: BTreeSet<String> = workers.iter_mut().map(Worker::sha256).collect();
    workers.into_iter().for_each(Worker::end);
    assert_eq!(digests.len(), 1, "the workers differ");
    digests.into_iter().next().unwrap()
}

#[test]
fn several_micro_batches_an_update_end_in_one_state_for_every_number_of_workers() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let sets = [&RECIPE[..], &["virtual_ranks=3", "update_freq=2"]].concat();
    let digests: BTreeSet<String> =
        (1..=3).map(|count| digest_of(&runtime, &sets, 3, count)).collect();
    assert_eq!(digests.len(), 1, "1, 2 and 3 workers");
}

#[test]
fn two_micro_batches_of_one_virtual_rank_are_one_of_two_but_for_running_statistics() {
    // The same samples in the same order, half of each loss, two gradients added: without dropout and
    // mixing, whose draws differ, the updates are equal to the bit. Running statistics go through both
    // micro-batches.
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let state = |ranks: u32, update_freq: u32| {
        let (ranks_set, freq_set) =
            (format!("virtual_ranks={ranks}"), format!("update_freq={update_freq}"));
        let more = ["model.dropout=0.0", "augment.mixup=0.0", "augment.cutmix=0.0"];
        let sizes = ["bn_buffers=rank0", "max_steps=2", &ranks_set, &freq_set];
        let sets = [&RECIPE[..], &more, &sizes].concat();
        let mut worker = start_with(&sets, &runtime, folder.path());
        form_over(ranks, 1, &[&worker]);
        let state = worker.state();
        worker.end();
        state
    };
    let (accumulated, summed) = (state(1, 2), state(2, 1));

    let recipe = recipe::built_in("digits", &[]).unwrap();
    let layout = model::Layout::of(&worker::setup::architecture(&recipe).unwrap());
    // params, exp_avg, exp_avg_sq, ema_params; then ema_buffers, buffers, two counters.
    let learned = 4 * layout.param_len() * size_of::<f32>();
    let (buffers, counters) = (2 * layout.buffer_len() * size_of::<f32>(), 2 * size_of::<u64>());
    assert_eq!(accumulated.len(), learned + buffers + counters);
    assert!(accumulated[..learned] == summed[..learned], "the updates differ");
    assert!(accumulated[learned..] != summed[learned..], "the running statistics do not");
    assert_eq!(accumulated[accumulated.len() - 16..][..8], 2_u64.to_le_bytes(), "2 updates");
}

#[test]
fn bf16_steps_end_in_one_state_that_is_not_that_of_f32() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let small = ["virtual_ranks=2", "model.dropout=0.0"];
    let digest = |precision: &str, count: u32| {
        let sets = [&RECIPE[..], &small, &[precision]].concat();
        digest_of(&runtime, &sets, 2, count)
    };
    let short = digest("precision=bf16", 1);
    assert_eq!(short, digest("precision=bf16", 2), "1 and 2 workers");
    assert_ne!(short, digest("precision=f32", 1));
}
