//! The thread that prepares micro-batches ahead of the training thread.

use std::{
    ops::Range,
    sync::{
        Arc,
        mpsc::{self, Receiver, Sender, SyncSender},
    },
    thread::{self, JoinHandle},
};

use cluster::{Epoch, Step, VirtualRank};
use shards::{Batch, BatchPlan, Loader, Mixing, Normalize};
use tracing::warn;

use crate::setup::Setup;

/// Images and labels of one virtual rank for one forward.
#[derive(Debug, Default)]
pub(crate) struct MicroBatch {
    /// Normalised pixels, `[B, 3, S, S]`.
    pub(crate) images: Vec<f32>,
    /// Class indices, `[B]`.
    pub(crate) labels: Vec<i64>,
    /// Probabilities, `[B, K]`, where images are mixed; else empty.
    pub(crate) targets: Vec<f32>,
    /// Side of the images, `S`.
    pub(crate) size: usize,
}

/// The micro-batches of a block of virtual ranks from a step on, in the order they are trained on: of each
/// virtual rank all of the step.
///
/// Dropping it ends its thread.
#[derive(Debug)]
pub(crate) struct Feed {
    /// Taken when the feed is dropped, so that the thread sees it and ends.
    batches: Option<Receiver<Result<MicroBatch, shards::LoadError>>>,
    spent: Sender<MicroBatch>,
    thread: Option<JoinHandle<()>>,
}

/// What the thread works through.
struct Work {
    loader: Loader,
    normalize: Normalize,
    plan: BatchPlan,
    mixes: Option<Mixes>,
    block: Range<u32>,
    steps: Range<u64>,
    steps_per_epoch: u64,
    /// Micro-batches of a virtual rank a step.
    update_freq: u32,
}

/// What mixing needs to know.
struct Mixes {
    mixing: Mixing,
    seed: u64,
    classes: usize,
    smoothing: f64,
}

impl Feed {
    /// Starts to prepare what the virtual ranks of `block` need for the steps after `from`.
    ///
    /// # Errors
    /// If the system has no thread left.
    pub(crate) fn start(setup: &Setup, block: Range<u32>, from: Step) -> std::io::Result<Self> {
        let split = &setup.training;
        let work = Work {
            loader: Loader::new(Arc::clone(&split.dataset), split.transform.clone())
                .on_corrupt(setup.on_corrupt),
            normalize: split.transform.normalize(),
            plan: setup.batches,
            mixes: setup.mixing.map(|mixing| Mixes {
                mixing,
                seed: setup.recipe.seed,
                classes: setup.recipe.model.classes as usize,
                smoothing: setup.recipe.loss.smoothing,
            }),
            block,
            steps: from.0..setup.plan.steps_total.0,
            steps_per_epoch: setup.plan.steps_per_epoch,
            update_freq: setup.recipe.update_freq,
        };
        let (sender, batches) = mpsc::sync_channel(setup.recipe.data.prefetch as usize);
        let (spent, returned) = mpsc::channel();
        let thread = thread::Builder::new()
            .name("feed".to_owned())
            .spawn(move || work.carry_out(&sender, &returned))?;
        Ok(Self { batches: Some(batches), spent, thread: Some(thread) })
    }

    /// The next micro-batch.
    ///
    /// # Errors
    /// [`shards::LoadError`] names the sample that cannot be used.
    ///
    /// # Panics
    /// If more is asked for than the steps need.
    pub(crate) fn next(&mut self) -> Result<MicroBatch, shards::LoadError> {
        let batches = self.batches.as_ref().expect("it is only taken by drop");
        batches.recv().expect("the feed goes on to the last step")
    }

    /// Returns a micro-batch for its memory to be used again.
    pub(crate) fn give_back(&mut self, batch: MicroBatch) {
        drop(self.spent.send(batch)); // A thread that is done needs no memory.
    }
}

impl Work {
    fn carry_out(
        mut self,
        sender: &SyncSender<Result<MicroBatch, shards::LoadError>>,
        returned: &Receiver<MicroBatch>,
    ) {
        let mut pixels = Batch::new();
        for step in self.steps.clone() {
            let places = 0..self.update_freq;
            let of_rank = |rank| places.clone().map(move |place| (VirtualRank(rank), place));
            for (rank, place) in self.block.clone().flat_map(of_rank) {
                let reused = returned.try_recv().unwrap_or_default();
                let batch = self.micro_batch(Step(step), place, rank, &mut pixels, reused);
                let failed = batch.is_err();
                if sender.send(batch).is_err() || failed {
                    return; // Nobody wants more, or there is no more.
                }
            }
        }
    }

    fn micro_batch(
        &mut self,
        step: Step,
        place: u32,
        rank: VirtualRank,
        pixels: &mut Batch,
        mut batch: MicroBatch,
    ) -> Result<MicroBatch, shards::LoadError> {
        let epoch = Epoch(step.0 / self.steps_per_epoch);
        let step_in_epoch = step.0 % self.steps_per_epoch;
        let in_epoch = step_in_epoch * u64::from(self.update_freq) + u64::from(place);
        let ids: Vec<u64> = self.plan.micro_batch(epoch, in_epoch, rank).collect();
        self.loader.load(&ids, epoch, pixels)?;
        for skipped in &pixels.skipped {
            let (sample, instead) = (skipped.sample, skipped.instead);
            warn!(sample, instead, step = step.0, error = %skipped.fault, "damaged sample skipped");
        }
        self.normalize.nchw(pixels, &mut batch.images);
        batch.labels.clone_from(&pixels.labels);
        batch.size = pixels.size;
        batch.targets.clear();
        if let Some(Mixes { mixing, seed, classes, smoothing }) = &self.mixes {
            let number = Step(step.0 * u64::from(self.update_freq) + u64::from(place));
            let mix = mixing.draw(*seed, number, rank, batch.size);
            mix.images(&mut batch.images, batch.labels.len(), batch.size, batch.size);
            mix.targets(&batch.labels, *classes, *smoothing, &mut batch.targets);
        }
        Ok(batch)
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.batches = None;
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed, and met the training thread in `next`.
            drop(thread.join());
        }
    }
}

#[cfg(test)]
mod tests {
    use cluster::RunId;

    use super::*;

    const STEPS: u64 = 6;
    const BATCH: u64 = 4;

    fn setup() -> Setup {
        let sets = [
            format!("max_steps={STEPS}"),
            format!("batch_size={BATCH}"),
            "virtual_ranks=4".to_owned(),
            "evaluate_every_epochs=0".to_owned(),
            "augment.aa=rand-m9-mstd0.5-inc1".to_owned(),
            "augment.reprob=0.5".to_owned(),
            "augment.mixup=0.8".to_owned(),
            "augment.cutmix=1.0".to_owned(),
        ];
        let recipe = recipe::built_in("digits", &sets).unwrap().to_toml();
        Setup::new(RunId::try_from("toy".to_owned()).unwrap(), &recipe).unwrap()
    }

    /// All micro-batches of a block from a step on.
    fn batches(setup: &Setup, block: Range<u32>, from: u64) -> Vec<MicroBatch> {
        let count = (STEPS - from) * u64::from(block.end - block.start);
        let mut feed = Feed::start(setup, block, Step(from)).unwrap();
        (0..count).map(|_| feed.next().unwrap()).collect()
    }

    #[test]
    fn a_resume_or_join_at_any_step_prepares_what_is_trained_on_and_nothing_else() {
        let setup = setup();
        let unbroken = batches(&setup, 0..4, 0);
        for from in 0..STEPS {
            for block in [0..4, 0..1, 1..3, 3..4] {
                let before = setup.training.dataset.reads().samples;
                let found = batches(&setup, block.clone(), from);
                let read = setup.training.dataset.reads().samples - before;
                assert_eq!(read, found.len() as u64 * BATCH, "from step {from}");
                // And it is what a run without interruption and with other workers trains on.
                let steps = unbroken[usize::try_from(from).unwrap() * 4..].chunks(4);
                let ranks = block.start as usize..block.end as usize;
                let expected = steps.flat_map(|step| &step[ranks.clone()]);
                for (found, expected) in found.iter().zip(expected) {
                    assert!(found.images == expected.images && found.targets == expected.targets);
                }
            }
        }
    }

    #[test]
    fn mixed_targets_are_probabilities() {
        let setup = setup();
        for batch in batches(&setup, 0..4, 0) {
            let rows = batch.targets.chunks(setup.recipe.model.classes as usize);
            assert_eq!(rows.len(), batch.labels.len());
            for (row, &label) in rows.zip(&batch.labels) {
                assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-5);
                assert!(row[usize::try_from(label).unwrap()] > 0.0);
            }
        }
    }
}
