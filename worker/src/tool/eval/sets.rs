//! The images that are evaluated, and those that thresholds are solved on.

use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use cluster::{Epoch, VirtualRank};
use model::{LossConfig, Network, confidences, dynamic::Confidences};
use recipe::Recipe;
use shards::{Batch, BatchPlan, Dataset, Loader, Normalize, Order, Transform};
use tch::Tensor;

use super::scores::Scores;
use crate::setup::{images, loss_config};

/// Batches of the training loader that the reference solves thresholds on (SPEC §12).
const BATCHES: u64 = 101;
/// Of the order in which training images are taken for calibration.
const SEED: u64 = u64::from_le_bytes(*b"eval/v1\0");

/// A recipe's dataset, as evaluation sees it.
pub(in crate::tool) struct Images<'r> {
    recipe: &'r Recipe,
    dataset: Arc<Dataset>,
    split: String,
}

impl<'r> Images<'r> {
    /// Opens the split, or the recipe's validation split.
    pub(in crate::tool) fn open(recipe: &'r Recipe, split: Option<&str>) -> Result<Self> {
        let location = &recipe.data.location;
        ensure!(
            !location.is_empty(),
            "say with --data where the images are: the checkpoint does not"
        );
        let split = split.unwrap_or(&recipe.data.validation).to_owned();
        let dataset = Arc::new(open(recipe, &split).context("--data")?);
        Ok(Self { recipe, dataset, split })
    }

    pub(in crate::tool) fn split(&self) -> &str {
        &self.split
    }

    pub(in crate::tool) fn classes(&self) -> &[String] {
        self.dataset.classes()
    }

    /// All exits on the split, each sample once.
    pub(super) fn validation(&self, network: &Network, batch: u64) -> Result<Scores> {
        let answers = self.recipe.model.classes as usize;
        let mut scores = Scores::new(self.classes().len(), answers);
        let loss = LossConfig { label_smoothing: 0.0, with_kd: false, ..loss_config(self.recipe) };
        let transform = self.shown_in_evaluation()?;
        let ids: Vec<u64> = (0..self.dataset.len()).collect();
        let mut reader = Reader::new(Arc::clone(&self.dataset), transform);
        for ids in ids.chunks(chunk(batch)) {
            let images = reader.read(ids, Epoch(0))?;
            scores.add(&network.forward_eval(&images), &reader.pixels.labels, &loss);
        }
        Ok(scores)
    }

    /// How sure the exits are of training images in a seeded order, shown as in evaluation.
    pub(in crate::tool) fn training(
        &self,
        network: &Network,
        batch: u64,
        most: u64,
    ) -> Result<Confidences> {
        let dataset = self.training_split()?;
        let order = Order::new(dataset.len(), SEED, Epoch(0));
        let ids: Vec<u64> = (0..dataset.len().min(most)).map(|place| order.sample(place)).collect();
        let mut reader = Reader::new(dataset, self.shown_in_evaluation()?);
        let mut sure = Confidences::default();
        for ids in ids.chunks(chunk(batch)) {
            see(network, &reader.read(ids, Epoch(0))?, &mut sure);
        }
        Ok(sure)
    }

    /// How sure the exits are of the first batches of training, augmented: what the reference solves on.
    pub(super) fn augmented(&self, network: &Network) -> Result<Confidences> {
        let recipe = self.recipe;
        let dataset = self.training_split()?;
        let augment = images::augment(recipe)?;
        let transform = Transform::training(&augment, recipe.model.input_size, recipe.seed)?;
        let plan = BatchPlan::new(dataset.len(), 1, recipe.batch_size, recipe.seed)?;
        let plan = plan.with_shuffle(images::shuffle(recipe));
        let mut reader = Reader::new(dataset, transform);
        let mut sure = Confidences::default();
        for step in 0..plan.steps_per_epoch().min(BATCHES) {
            let ids: Vec<u64> = plan.micro_batch(Epoch(0), step, VirtualRank(0)).collect();
            see(network, &reader.read(&ids, Epoch(0))?, &mut sure);
        }
        Ok(sure)
    }

    fn training_split(&self) -> Result<Arc<Dataset>> {
        let dataset = open(self.recipe, &self.recipe.data.train);
        Ok(Arc::new(dataset.context(
            "dynamic inference solves its thresholds on the training split; without one, say \
             --calibration off",
        )?))
    }

    fn shown_in_evaluation(&self) -> Result<Transform> {
        let augment = images::augment(self.recipe)?;
        Ok(Transform::evaluation(&augment, self.recipe.model.input_size)?)
    }
}

fn open(recipe: &Recipe, split: &str) -> Result<Dataset> {
    let dataset = Dataset::open(&recipe.data.location, split)?;
    let (found, classes) = (dataset.classes().len(), recipe.model.classes);
    ensure!(
        found <= classes as usize,
        "{}, split {split}: its labels are out of range, because it has {found} classes and the network \
         tells {classes} apart",
        recipe.data.location
    );
    Ok(dataset)
}

fn see(network: &Network, images: &Tensor, sure: &mut Confidences) {
    let exits = network.forward_eval(images);
    for (sure, logits) in sure.iter_mut().zip(exits.in_order()) {
        sure.extend(confidences(logits));
    }
}

fn chunk(batch: u64) -> usize {
    usize::try_from(batch).expect("a batch fits into memory")
}

/// Reads batches again and again into the same memory.
pub(in crate::tool) struct Reader {
    loader: Loader,
    normalize: Normalize,
    pixels: Batch,
    planes: Vec<f32>,
}

impl Reader {
    pub(in crate::tool) fn new(dataset: Arc<Dataset>, transform: Transform) -> Self {
        let normalize = transform.normalize();
        let loader = Loader::new(dataset, transform);
        Self { loader, normalize, pixels: Batch::new(), planes: Vec::new() }
    }

    /// `[B, 3, S, S]`; the labels are then in `pixels`.
    pub(in crate::tool) fn read(&mut self, ids: &[u64], epoch: Epoch) -> Result<Tensor> {
        self.loader.load(ids, epoch, &mut self.pixels)?;
        self.normalize.nchw(&self.pixels, &mut self.planes);
        Ok(tensor(&self.planes, self.pixels.size))
    }
}

/// Planes of images of `size` pixels as `[B, 3, S, S]`.
pub(in crate::tool) fn tensor(planes: &[f32], size: usize) -> Tensor {
    let side = i64::try_from(size).expect("a side fits");
    Tensor::from_slice(planes).view([-1, 3, side, side])
}
