//! Top-1 and loss of all exits on the validation split, for the weights and their average.
//!
//! The split is divided over the virtual ranks and the counts are summed along the same tree as the
//! gradients, so the figures are the same for every number of workers.

use std::sync::Arc;

use cluster::{Epoch, Evaluation, ExitScores, Step, StepPhase, VirtualRank};
use collective::{Exchange, Reduction};
use model::{LossConfig, Network, Targets, multi_exit};
use shards::{Batch, Loader, Normalize};
use tch::Device;

use super::{Interrupted, Orders, state::TrainState, step::tensors};
use crate::{feed::MicroBatch, progress::Progress, setup::Setup};

/// Images in a forward; the last of a virtual rank may have fewer.
const BATCH: u64 = 32;
/// Of each network: correct predictions of the four exits, and the summed loss.
const FIGURES: usize = 5;

/// What evaluates: buffers that are kept.
#[derive(Debug)]
pub(crate) struct Evaluator {
    /// Figures of the weights, figures of their average, samples.
    sum: Reduction,
    loader: Loader,
    normalize: Normalize,
    pixels: Batch,
    batch: MicroBatch,
}

impl Evaluator {
    pub(crate) fn new(setup: &Setup) -> Self {
        let everything = 0..setup.recipe.virtual_ranks;
        let rank = cluster::Rank(0);
        let split = &setup.validation;
        Self {
            sum: Reduction::new(everything.end, &[everything], rank, 2 * FIGURES + 1),
            loader: Loader::new(Arc::clone(&split.dataset), split.transform.clone()),
            normalize: split.transform.normalize(),
            pixels: Batch::new(),
            batch: MicroBatch::default(),
        }
    }

    /// The sum, to be planned anew for another generation.
    pub(crate) fn sum_mut(&mut self) -> &mut Reduction {
        &mut self.sum
    }

    /// Evaluates the state after its step.
    ///
    /// # Errors
    /// [`Interrupted`], as a step.
    pub(crate) fn evaluate(
        &mut self,
        state: &TrainState,
        setup: &Setup,
        orders: &Orders,
        progress: &Progress,
        peers: &mut dyn Exchange,
    ) -> Result<Evaluation, Interrupted> {
        progress.enter(StepPhase::Evaluate);
        let step = state.step().expect("only a state that was agreed on is evaluated");
        let samples = setup.validation.dataset.len();
        self.sum.reset();
        for rank in self.sum.block() {
            let share = shards::evaluation(samples, setup.recipe.virtual_ranks, VirtualRank(rank));
            let mut figures = [0.0_f64; 2 * FIGURES + 1];
            let mut next = share.start;
            while next < share.end {
                let end = share.end.min(next + BATCH);
                self.score(state, setup, orders, next..end, &mut figures)?;
                next = end;
            }
            for (leaf, figure) in self.sum.leaf().iter_mut().zip(figures) {
                *leaf = as_f32(figure);
            }
            self.sum.push();
        }
        let sum = self.sum.finish(peers)?;
        Ok(evaluation(step, Epoch(step.0 / setup.plan.steps_per_epoch), sum))
    }

    fn score(
        &mut self,
        state: &TrainState,
        setup: &Setup,
        orders: &Orders,
        ids: std::ops::Range<u64>,
        figures: &mut [f64; 2 * FIGURES + 1],
    ) -> Result<(), Interrupted> {
        let ids: Vec<u64> = ids.collect();
        self.loader.load(&ids, Epoch(0), &mut self.pixels)?;
        self.normalize.nchw(&self.pixels, &mut self.batch.images);
        self.batch.labels.clone_from(&self.pixels.labels);
        self.batch.size = self.pixels.size;
        let loss = LossConfig { label_smoothing: 0.0, with_kd: false, ..setup.loss };
        let networks = [state.network(), state.averaged()];
        for (network, figures) in networks.into_iter().zip(figures.chunks_exact_mut(FIGURES)) {
            orders.check()?;
            score_with(network, &self.batch, state.device(), &loss, figures);
        }
        figures[2 * FIGURES] += ids.len() as f64;
        Ok(())
    }
}

fn score_with(
    network: &Network,
    batch: &MicroBatch,
    device: Device,
    loss: &LossConfig,
    figures: &mut [f64],
) {
    let (images, labels) = tensors(batch); // [B, 3, S, S], [B]
    let (images, labels) = (images.to_device(device), labels.to_device(device));
    let exits = network.forward_eval(&images);
    let losses = tch::no_grad(|| multi_exit(&exits, Targets::Labels(&labels), loss));
    for (figure, correct) in figures.iter_mut().zip(exits.correct(&labels)) {
        *figure += correct as f64;
    }
    figures[FIGURES - 1] += losses.total.double_value(&[]) * batch.labels.len() as f64;
}

fn evaluation(step: Step, epoch: Epoch, sum: &[f32]) -> Evaluation {
    let samples = f64::from(sum[2 * FIGURES]);
    let scores = |figures: &[f32]| ExitScores {
        top1: std::array::from_fn(|exit| f64::from(figures[exit]) / samples),
        loss: f64::from(figures[FIGURES - 1]) / samples,
    };
    Evaluation {
        step,
        epoch,
        samples: count(samples),
        weights: scores(&sum[..FIGURES]),
        ema: scores(&sum[FIGURES..2 * FIGURES]),
    }
}

#[expect(clippy::cast_possible_truncation, reason = "counts below 2^24 are exact in f32")]
fn as_f32(value: f64) -> f32 {
    value as f32
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a sum of counts is a whole number and not negative"
)]
fn count(samples: f64) -> u64 {
    samples as u64
}
