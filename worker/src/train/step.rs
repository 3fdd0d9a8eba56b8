//! One optimizer update: forward and backward of each virtual rank, the sum over all of them, clip,
//! AdamW, running statistics, average.

use cluster::{Step, StepMetrics, StepPhase, VirtualRank};
use collective::{Exchange, Reduction};
use model::{Draws, Targets, Update, clip_norm, global_norm, multi_exit};
use recipe::BnBuffers;
use tch::{Kind, Tensor};

use super::{Interrupted, Orders, state::TrainState};
use crate::{
    feed::{Feed, MicroBatch},
    progress::Progress,
    setup::Setup,
};

/// Figures at the end of a virtual rank's vector: its loss, and the flag to leave.
pub(super) const FIGURES: usize = 2;

/// What makes updates: buffers that are kept from step to step.
#[derive(Debug)]
pub(crate) struct Stepper {
    /// One vector a virtual rank: gradients `[P]`, running statistics `[S]`, figures.
    sum: Reduction,
    /// Gradients of a virtual rank, later their mean, `[P]`.
    gradients: Tensor,
    /// The running statistics that every virtual rank starts from, `[S]`.
    start: Vec<f32>,
}

/// A step that was made.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Taken {
    /// Its figures, without times.
    pub(crate) metrics: StepMetrics,
    /// Whether rank 0 asked all to leave the generation after it.
    pub(crate) leave: bool,
}

/// What a step needs beside the state.
pub(crate) struct Surroundings<'a, P: ?Sized = dyn Exchange> {
    pub(crate) setup: &'a Setup,
    pub(crate) orders: &'a Orders,
    pub(crate) progress: &'a Progress,
    pub(crate) feed: &'a mut Feed,
    /// What moves the sum between workers.
    pub(crate) peers: &'a mut P,
}

impl Stepper {
    /// Buffers for steps on `state`.
    pub(crate) fn new(setup: &Setup, state: &TrainState) -> Self {
        let (params, buffers) = (state.layout().param_len(), state.layout().buffer_len());
        let everything = 0..setup.recipe.virtual_ranks;
        let length = params + buffers + FIGURES;
        Self {
            sum: Reduction::new(everything.end, &[everything], cluster::Rank(0), length),
            gradients: Tensor::zeros([to_i64(params)], (Kind::Float, tch::Device::Cpu)),
            start: vec![0.0; buffers],
        }
    }

    /// The sum, to be planned anew for another generation.
    pub(crate) fn sum_mut(&mut self) -> &mut Reduction {
        &mut self.sum
    }

    /// Makes the update after `state`'s step.
    ///
    /// # Errors
    /// [`Interrupted`] if a peer is lost, the generation is over or the images cannot be read: the
    /// state is then as before. So it is if the sum is not finite, which is fatal.
    pub(crate) fn train_step(
        &mut self,
        state: &mut TrainState,
        mut around: Surroundings<'_>,
    ) -> Result<Taken, Interrupted> {
        let step = state.step().expect("only a state that was agreed on is trained");
        self.start.copy_from_slice(state.buffers());
        self.sum.reset();
        for rank in self.sum.block().map(VirtualRank) {
            let result = self.contribute(state, &mut around, step, rank);
            state.buffers_mut().copy_from_slice(&self.start);
            result?;
        }
        let Surroundings { setup, progress, peers, .. } = around;
        progress.enter(StepPhase::Reduce);
        let sum = self.sum.finish(peers)?;
        progress.enter(StepPhase::Update);

        let (gradients, buffers, figures) = parts(sum, state);
        let share = 1.0 / setup.recipe.virtual_ranks as f32;
        let mean = libtorch::slice_mut::<f32>(&mut self.gradients).expect("it is f32 on the host");
        for (mean, sum) in mean.iter_mut().zip(gradients) {
            *mean = sum * share;
        }
        let norm = match setup.recipe.optimizer.clip_grad {
            Some(norm_max) => clip_norm(&mut self.gradients, norm_max),
            None => global_norm(&self.gradients),
        };
        let loss = figures[0] * share;
        if !(norm.is_finite() && loss.is_finite()) {
            return Err(Interrupted::not_finite(step, loss, norm));
        }
        let update = Update {
            step: step.0,
            learning_rate: setup.schedule.learning_rate(step.0),
            weight_decay: setup.schedule.weight_decay(step.0),
        };
        let buffers = Tensor::from_slice(buffers); // [S]
        state.apply(&self.gradients, &buffers, &update, setup.recipe.ema.decay);
        Ok(Taken { metrics: metrics(setup, loss, norm, &update), leave: figures[1] > 0.0 })
    }

    /// Forward and backward of a virtual rank's micro-batches, one after the other on the running statistics
    /// that the one before left, into the sum: the mean of their gradients and losses.
    fn contribute(
        &mut self,
        state: &TrainState,
        around: &mut Surroundings<'_>,
        step: Step,
        rank: VirtualRank,
    ) -> Result<(), Interrupted> {
        let Surroundings { setup, orders, progress, feed, .. } = around;
        let update_freq = setup.recipe.update_freq;
        let mut loss = 0.0;
        for place in 0..update_freq {
            orders.check()?;
            progress.enter(StepPhase::Load);
            let batch = feed.next()?;
            progress.enter(StepPhase::Compute);
            let number = step.0 * u64::from(update_freq) + u64::from(place);
            let draws = Draws { seed: setup.recipe.seed, step: number, virtual_rank: rank.0 };
            loss += self.pass(state, setup, &draws, &batch, orders)? / f64::from(update_freq);
            let (gradients, _, _) = parts_mut(self.sum.leaf(), state);
            let made = libtorch::slice(&self.gradients).expect("it is f32 on the host");
            if place == 0 {
                gradients.copy_from_slice(made);
            } else {
                gradients.iter_mut().zip(made).for_each(|(sum, made)| *sum += made);
            }
            feed.give_back(batch);
        }
        let (_, buffers, figures) = parts_mut(self.sum.leaf(), state);
        let weight = match (setup.recipe.bn_buffers, rank) {
            (BnBuffers::Mean, _) => 1.0 / setup.recipe.virtual_ranks as f32,
            (BnBuffers::Rank0, VirtualRank(0)) => 1.0,
            (BnBuffers::Rank0, _) => 0.0,
        };
        for (kept, moved) in buffers.iter_mut().zip(state.buffers()) {
            *kept = moved * weight;
        }
        let asks_to_leave = rank == VirtualRank(0) && orders.is_leaving();
        figures.copy_from_slice(&[as_f32(loss), f32::from(u8::from(asks_to_leave))]);
        self.sum.push();
        Ok(())
    }

    /// Forward and backward of one micro-batch: its part of the virtual rank's gradients into `gradients`,
    /// over what was there. Returns its loss.
    fn pass(
        &mut self,
        state: &TrainState,
        setup: &Setup,
        draws: &Draws,
        batch: &MicroBatch,
        orders: &Orders,
    ) -> Result<f64, Interrupted> {
        let (images, labels) = tensors(batch); // [B, 3, S, S], [B]
        let forward = || state.network().forward_train(&images, draws);
        let exits = libtorch::autocast(images.device(), setup.precision, forward)?;
        let exits = exits.to_kind(Kind::Float); // Losses, KD included, are f32.
        let mixed = mixed_targets(batch); // [B, K]
        let targets = mixed.as_ref().map_or(Targets::Labels(&labels), Targets::Soft);
        let losses = multi_exit(&exits, targets, &setup.loss);
        orders.check()?; // The backward pass takes longer than all before it.
        let share = &losses.total / f64::from(setup.recipe.update_freq);
        state.network().gradients(&share, &mut self.gradients)?;
        Ok(losses.total.double_value(&[]))
    }
}

/// A micro-batch as the network takes it: images `[B, 3, S, S]` f32, labels `[B]` i64.
pub(crate) fn tensors(batch: &MicroBatch) -> (Tensor, Tensor) {
    let side = to_i64(batch.size);
    let images = Tensor::from_slice(&batch.images).view([-1, 3, side, side]);
    (images, Tensor::from_slice(&batch.labels))
}

/// What the exits should say of a micro-batch whose images are mixed, `[B, K]` f32.
fn mixed_targets(batch: &MicroBatch) -> Option<Tensor> {
    let rows = to_i64(batch.labels.len());
    (!batch.targets.is_empty()).then(|| Tensor::from_slice(&batch.targets).view([rows, -1]))
}

pub(super) fn to_i64(size: usize) -> i64 {
    i64::try_from(size).expect("no memory holds more elements")
}

fn parts<'v>(vector: &'v [f32], state: &TrainState) -> (&'v [f32], &'v [f32], &'v [f32]) {
    let (gradients, rest) = vector.split_at(state.layout().param_len());
    let (buffers, figures) = rest.split_at(state.layout().buffer_len());
    (gradients, buffers, figures)
}

fn parts_mut<'v>(
    vector: &'v mut [f32],
    state: &TrainState,
) -> (&'v mut [f32], &'v mut [f32], &'v mut [f32]) {
    let (gradients, rest) = vector.split_at_mut(state.layout().param_len());
    let (buffers, figures) = rest.split_at_mut(state.layout().buffer_len());
    (gradients, buffers, figures)
}

pub(super) fn metrics(setup: &Setup, loss: f32, norm: f64, update: &Update) -> StepMetrics {
    StepMetrics {
        loss,
        gradient_norm: as_f32(norm),
        learning_rate: update.learning_rate,
        images: setup.recipe.global_batch(),
        ..StepMetrics::default()
    }
}

#[expect(clippy::cast_possible_truncation, reason = "figures are reported in f32")]
pub(super) fn as_f32(value: f64) -> f32 {
    value as f32
}
