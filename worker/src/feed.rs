//! The thread that prepares micro-batches ahead of the training thread.

use std::{
    ops::Range,
    sync::{
        Arc,
        mpsc::{self, Receiver, Sender, SyncSender},
    },
    thread::{self, JoinHandle},
};

use cluster::{Step, VirtualRank};
use shards::{Batch, BatchPlan, Loader, Mixing, Normalize};
use tracing::warn;

use crate::setup::Setup;

/// Images and labels of one virtual rank in one step.
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

/// The micro-batches of a block of virtual ranks from a step on, in the order they are trained on.
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
            for rank in self.block.clone() {
                let reused = returned.try_recv().unwrap_or_default();
                let batch = self.micro_batch(Step(step), VirtualRank(rank), &mut pixels, reused);
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
        rank: VirtualRank,
        pixels: &mut Batch,
        mut batch: MicroBatch,
    ) -> Result<MicroBatch, shards::LoadError> {
        let (epoch, step_in_epoch) = self.plan.position(step);
        let ids: Vec<u64> = self.plan.micro_batch(epoch, step_in_epoch, rank).collect();
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
            let mix = mixing.draw(*seed, step, rank, batch.size);
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
