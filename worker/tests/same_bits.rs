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
    train::{Formation, KeepAt, Orders, Told, Trainer},
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
    libtorch::init(1).unwrap();
    let sets = RECIPE.map(str::to_owned);
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    let (told_sender, told) = tokio::sync::mpsc::unbounded_channel();
    let trainer = Trainer {
        run: run(),
        recipe: recipe::built_in("digits", &sets).unwrap().to_toml(),
        checkpoints: checkpoints.display().to_string(),
        socket,
        form_timeout: Duration::from_secs(20),
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
    let count = u32::try_from(workers.len()).unwrap();
    let members = (0..).zip(workers).zip(balanced_blocks(4, count));
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
