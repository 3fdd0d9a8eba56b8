//! The threads that prepare micro-batches ahead of the training thread.

use std::{
    ops::Range,
    sync::{
        Arc,
        mpsc::{self, Receiver, Sender, SyncSender},
    },
    thread::{self, JoinHandle},
};

use cluster::{Epoch, Step, VirtualRank};
use shards::{Batch, BatchPlan, Erasure, Loader, Mix, Mixing, Normalize};
use tch::{Device, Tensor};
use tracing::warn;

use crate::setup::Setup;

/// Images and labels of one virtual rank for one forward.
#[derive(Debug, Default)]
pub(crate) struct MicroBatch {
    /// Normalised, erased and mixed pixels, `[B, 3, S, S]`; empty where the device does all that.
    pub(crate) images: Vec<f32>,
    /// What the device makes them of.
    pub(crate) pixels: Option<Pixels>,
    /// Class indices, `[B]`.
    pub(crate) labels: Vec<i64>,
    /// Probabilities, `[B, K]`, where images are mixed; else empty.
    pub(crate) targets: Vec<f32>,
    /// Side of the images, `S`.
    pub(crate) size: usize,
}

/// Decoded images, for a device to normalise, erase and mix.
#[derive(Debug)]
pub(crate) struct Pixels {
    /// `[B·S·S·3]` u8 in pinned memory of the host, RGB beside each other.
    pub(crate) bytes: Tensor,
    /// Boxes that noise replaces.
    pub(crate) erasures: Vec<Erasure>,
    /// How images are mixed.
    pub(crate) mix: Mix,
}

/// The micro-batches of a block of virtual ranks from a step on, in the order they are trained on: of each
/// virtual rank all of the step.
///
/// Several threads take turns, each with a micro-batch. Dropping it ends them.
#[derive(Debug)]
pub(crate) struct Feed {
    lanes: Vec<Lane>,
    /// Micro-batches handed out, and given back.
    taken: usize,
    returned: usize,
}

/// One thread of a feed.
#[derive(Debug)]
struct Lane {
    /// Taken when the feed is dropped, so that the thread sees it and ends.
    batches: Option<Receiver<Result<MicroBatch, shards::LoadError>>>,
    spent: Sender<MicroBatch>,
    thread: Option<JoinHandle<()>>,
}

/// How a feed works.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Means {
    /// Threads; at least one works.
    pub(crate) threads: usize,
    /// What the images are for: on a GPU it normalises, erases and mixes them itself.
    pub(crate) device: Device,
}

/// What a thread works through.
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
    /// This thread's turn of how many.
    turn: (usize, usize),
    device: Device,
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
    pub(crate) fn start(
        setup: &Setup,
        block: Range<u32>,
        from: Step,
        means: Means,
    ) -> std::io::Result<Self> {
        let threads = means.threads.max(1);
        let lane =
            |turn| Lane::start(setup, Work::new(setup, &block, from, (turn, threads), means));
        let lanes = (0..threads).map(lane).collect::<std::io::Result<_>>()?;
        Ok(Self { lanes, taken: 0, returned: 0 })
    }

    /// The next micro-batch.
    ///
    /// # Errors
    /// [`shards::LoadError`] names the sample that cannot be used.
    ///
    /// # Panics
    /// If more is asked for than the steps need.
    pub(crate) fn next(&mut self) -> Result<MicroBatch, shards::LoadError> {
        let lane = &self.lanes[self.taken % self.lanes.len()];
        self.taken += 1;
        let batches = lane.batches.as_ref().expect("it is only taken by drop");
        batches.recv().expect("the feed goes on to the last step")
    }

    /// Returns a micro-batch for its memory to be used again. The device must be done with it.
    pub(crate) fn give_back(&mut self, batch: MicroBatch) {
        let lane = &self.lanes[self.returned % self.lanes.len()];
        self.returned += 1;
        drop(lane.spent.send(batch)); // A thread that is done needs no memory.
    }
}

impl Lane {
    fn start(setup: &Setup, work: Work) -> std::io::Result<Self> {
        let (sender, batches) = mpsc::sync_channel(setup.recipe.data.prefetch as usize);
        let (spent, returned) = mpsc::channel();
        let thread = thread::Builder::new()
            .name("feed".to_owned())
            .spawn(move || work.carry_out(&sender, &returned))?;
        Ok(Self { batches: Some(batches), spent, thread: Some(thread) })
    }
}

impl Work {
    fn new(
        setup: &Setup,
        block: &Range<u32>,
        from: Step,
        turn: (usize, usize),
        means: Means,
    ) -> Self {
        let split = &setup.training;
        Self {
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
            block: block.clone(),
            steps: from.0..setup.plan.steps_total.0,
            steps_per_epoch: setup.plan.steps_per_epoch,
            update_freq: setup.recipe.update_freq,
            turn,
            device: means.device,
        }
    }

    fn carry_out(
        mut self,
        sender: &SyncSender<Result<MicroBatch, shards::LoadError>>,
        returned: &Receiver<MicroBatch>,
    ) {
        let mut pixels = Batch::new();
        let (turn, turns) = self.turn;
        let (block, places) = (self.block.clone(), 0..self.update_freq);
        let of_rank = |rank| places.clone().map(move |place| (VirtualRank(rank), place));
        let of_step =
            |step| block.clone().flat_map(of_rank).map(move |(rank, place)| (step, rank, place));
        for (step, rank, place) in self.steps.clone().flat_map(of_step).skip(turn).step_by(turns) {
            let reused = returned.try_recv().unwrap_or_default();
            let batch = self.micro_batch(Step(step), place, rank, &mut pixels, reused);
            let failed = batch.is_err();
            if sender.send(batch).is_err() || failed {
                return; // Nobody wants more, or there is no more.
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
        batch.labels.clone_from(&pixels.labels);
        batch.size = pixels.size;
        batch.targets.clear();
        if self.device == Device::Cpu {
            self.normalize.nchw(pixels, &mut batch.images);
        } else {
            batch.pixels = Some(self.pinned(pixels, batch.pixels.take()));
        }
        if let Some(Mixes { mixing, seed, classes, smoothing }) = &self.mixes {
            let number = Step(step.0 * u64::from(self.update_freq) + u64::from(place));
            let mix = mixing.draw(*seed, number, rank, batch.size);
            match &mut batch.pixels {
                Some(pixels) => pixels.mix = mix,
                None => mix.images(&mut batch.images, batch.labels.len(), batch.size, batch.size),
            }
            mix.targets(&batch.labels, *classes, *smoothing, &mut batch.targets);
        }
        Ok(batch)
    }

    /// The decoded images in memory that the device reads by itself; that of `reused` if it fits.
    fn pinned(&self, batch: &Batch, reused: Option<Pixels>) -> Pixels {
        let fits = |pixels: &Pixels| pixels.bytes.numel() == batch.images.len();
        let bytes = match reused.filter(fits) {
            Some(Pixels { mut bytes, .. }) => {
                let room = libtorch::slice_mut::<u8>(&mut bytes);
                room.expect("it is a row of bytes on the host").copy_from_slice(&batch.images);
                bytes
            }
            None => Tensor::from_slice(&batch.images).pin_memory(self.device),
        };
        Pixels { bytes, erasures: batch.erasures.clone(), mix: Mix::None }
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        for lane in &mut self.lanes {
            lane.batches = None;
        }
        for thread in self.lanes.iter_mut().filter_map(|lane| lane.thread.take()) {
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
        let means = Means { threads: 1 + usize::try_from(from).unwrap() % 3, device: Device::Cpu };
        let mut feed = Feed::start(setup, block, Step(from), means).unwrap();
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
