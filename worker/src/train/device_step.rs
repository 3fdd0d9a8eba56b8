//! A step on a GPU: what [`super::step`] does, on tensors that never leave the device.
//!
//! The host waits for the device once a step, for the loss and the norm, which decide whether the step is made.

use std::ops::Range;

use cluster::{Rank, Step, StepPhase, VirtualRank};
use collective::{TensorExchange, TensorReduction};
use model::{Draws, Update, global_norm};
use recipe::{BnBuffers, Reduction};
use shards::Mix;
use tch::{Device, Kind, Tensor};

use super::{
    Interrupted,
    state::TrainState,
    step::{FIGURES, Surroundings, Taken, as_f32, metrics, to_i64},
};
use crate::{
    feed::{MicroBatch, Pixels},
    pass::{Inputs, Pass, Rules, Statistics},
    setup::Setup,
};

/// What makes updates on a device: buffers that are kept from step to step.
#[derive(Debug)]
pub(crate) struct DeviceStepper {
    sum: DeviceSum,
    pass: Pass,
    /// The running statistics that every virtual rank starts from, `[S]`.
    start: Tensor,
    /// `[1, 1, 1, 3]`: what makes a byte of a channel a normalised value.
    scale: Tensor,
    offset: Tensor,
    device: Device,
    params: i64,
}

/// The sum over virtual ranks, of one row a virtual rank as on the host.
#[derive(Debug)]
enum DeviceSum {
    /// Along the fixed tree.
    Exact(TensorReduction),
    /// In the order in which they come, and then in that of the transport.
    Fast { row: Tensor, next: Tensor, block: Range<u32>, pushed: u32 },
}

impl DeviceStepper {
    pub(crate) fn new(setup: &Setup, state: &mut TrainState, graph: bool) -> Self {
        let (params, buffers) = (state.layout().param_len(), state.layout().buffer_len());
        let (device, length) = (state.device(), params + buffers + FIGURES);
        let virtual_ranks = setup.recipe.virtual_ranks;
        let row = || Tensor::zeros([to_i64(length)], (Kind::Float, device));
        let sum = match setup.recipe.reduction {
            Reduction::Exact => {
                DeviceSum::Exact(TensorReduction::new(virtual_ranks, length, device))
            }
            Reduction::Fast => {
                DeviceSum::Fast { row: row(), next: row(), block: 0..virtual_ranks, pushed: 0 }
            }
        };
        let rules = Rules {
            precision: setup.precision,
            loss: setup.loss,
            update_freq: setup.recipe.update_freq,
            graph: graph && !setup.architecture.draws(),
        };
        let channels = |values: [f64; 3]| {
            let row = Tensor::from_slice(&values).to_kind(Kind::Float).to_device(device);
            row.view([1, 1, 1, 3])
        };
        let (mean, std) = (setup.recipe.data.mean, setup.recipe.data.std);
        Self {
            sum,
            pass: Pass::new(rules, params, device),
            start: state.buffers_tensor().zeros_like(),
            scale: channels(std.map(|std| 1.0 / (255.0 * std))),
            offset: channels([0, 1, 2].map(|channel| -mean[channel] / std[channel])),
            device,
            params: to_i64(params),
        }
    }

    /// Plans anew for another generation.
    pub(crate) fn regroup(&mut self, blocks: &[Range<u32>], rank: Rank) {
        match &mut self.sum {
            DeviceSum::Exact(sum) => sum.regroup(blocks, rank),
            DeviceSum::Fast { block, .. } => *block = blocks[rank.0 as usize].clone(),
        }
    }

    /// As [`super::step::Stepper::train_step`].
    pub(crate) fn train_step(
        &mut self,
        state: &mut TrainState,
        mut around: Surroundings<'_, dyn TensorExchange + '_>,
    ) -> Result<Taken, Interrupted> {
        let step = state.step().expect("only a state that was agreed on is trained");
        copy(&mut self.start, state.buffers_tensor());
        self.sum.reset();
        let mut spent = Vec::new();
        for rank in self.sum.block().map(VirtualRank) {
            let result = self.contribute(state, &mut around, step, rank, &mut spent);
            copy(state.buffers_tensor(), &self.start);
            result?;
        }
        let Surroundings { setup, progress, feed, peers, .. } = around;
        progress.enter(StepPhase::Reduce);
        let sum = self.sum.finish(peers)?;
        progress.enter(StepPhase::Update);

        let buffers = sum.narrow(0, self.params, self.start.size()[0]);
        let figures = sum.narrow(0, self.params + self.start.size()[0], to_i64(FIGURES));
        let share = 1.0 / f64::from(setup.recipe.virtual_ranks);
        let mut gradients = tch::no_grad(|| sum.narrow(0, 0, self.params) * share);
        let norm = global_norm(&gradients); // Here the host waits for the device.
        let figures = figures.to_device(Device::Cpu);
        let loss = as_f32(figures.double_value(&[0]) * share);
        spent.into_iter().for_each(|batch| feed.give_back(batch));
        if !(norm.is_finite() && loss.is_finite()) {
            return Err(Interrupted::not_finite(step, loss, norm));
        }
        let clip = setup.recipe.optimizer.clip_grad.map(|norm_max| norm_max / (norm + 1e-6));
        if let Some(factor) = clip.filter(|factor| *factor < 1.0) {
            drop(tch::no_grad(|| gradients.g_mul_scalar_(factor)));
        }
        let update = Update {
            step: step.0,
            learning_rate: setup.schedule.learning_rate(step.0),
            weight_decay: setup.schedule.weight_decay(step.0),
        };
        state.apply(&gradients, &buffers, &update, setup.recipe.ema.decay);
        let leave = figures.double_value(&[1]) > 0.0;
        Ok(Taken { metrics: metrics(setup, loss, norm, &update), leave })
    }

    /// Forward and backward of a virtual rank's micro-batches into the sum.
    fn contribute(
        &mut self,
        state: &mut TrainState,
        around: &mut Surroundings<'_, dyn TensorExchange + '_>,
        step: Step,
        rank: VirtualRank,
        spent: &mut Vec<MicroBatch>,
    ) -> Result<(), Interrupted> {
        let Surroundings { setup, orders, progress, feed, .. } = around;
        let update_freq = setup.recipe.update_freq;
        let buffers = self.start.size()[0];
        for place in 0..update_freq {
            orders.check()?;
            progress.enter(StepPhase::Load);
            let batch = feed.next()?;
            progress.enter(StepPhase::Compute);
            let inputs = self.inputs(&batch);
            spent.push(batch);
            let number = step.0 * u64::from(update_freq) + u64::from(place);
            let draws = Draws { seed: setup.recipe.seed, step: number, virtual_rank: rank.0 };
            let (moving, network) = state.moving();
            let statistics = Statistics { moving, start: &self.start };
            self.pass.run(network, statistics, &draws, inputs)?;
            let row = self.sum.leaf();
            let mut gradients = row.narrow(0, 0, self.params);
            let mut loss = row.narrow(0, self.params + buffers, 1);
            let share = self.pass.loss() / f64::from(update_freq);
            if place == 0 {
                copy(&mut gradients, self.pass.gradients());
                copy(&mut loss, &share);
            } else {
                add(&mut gradients, self.pass.gradients());
                add(&mut loss, &share);
            }
        }
        let weight = match (setup.recipe.bn_buffers, rank) {
            (BnBuffers::Mean, _) => 1.0 / f64::from(setup.recipe.virtual_ranks),
            (BnBuffers::Rank0, VirtualRank(0)) => 1.0,
            (BnBuffers::Rank0, _) => 0.0,
        };
        let row = self.sum.leaf();
        let moved = tch::no_grad(|| state.buffers_tensor() as &Tensor * weight);
        copy(&mut row.narrow(0, self.params, buffers), &moved);
        let asks_to_leave = rank == VirtualRank(0) && orders.is_leaving();
        let mut flag = row.narrow(0, self.params + buffers + 1, 1);
        drop(tch::no_grad(|| flag.fill_(f64::from(u8::from(asks_to_leave)))));
        self.sum.push();
        Ok(())
    }

    /// A micro-batch on the device: normalised, erased and mixed there.
    fn inputs(&self, batch: &MicroBatch) -> Inputs {
        let pixels = batch.pixels.as_ref().expect("the feed prepares for a device");
        let (count, side) = (to_i64(batch.labels.len()), to_i64(batch.size));
        let bytes = pixels.bytes.view([count, side, side, 3]);
        let bytes = bytes.to_device_(self.device, Kind::Uint8, true, false);
        let rows = bytes.to_kind(Kind::Float) * &self.scale + &self.offset; // [B, S, S, 3]
        let images = rows.permute([0, 3, 1, 2]);
        self.erase(&images, pixels);
        let rows = to_i64(batch.labels.len());
        let targets = (!batch.targets.is_empty())
            .then(|| Tensor::from_slice(&batch.targets).view([rows, -1]).to_device(self.device));
        let labels = Tensor::from_slice(&batch.labels).to_device(self.device);
        Inputs { images: mixed(images, pixels.mix), labels, targets }
    }

    /// Replaces boxes by noise, whose values are those that the host would write.
    fn erase(&self, images: &Tensor, pixels: &Pixels) {
        if pixels.erasures.is_empty() {
            return;
        }
        let noise: Vec<f32> = pixels.erasures.iter().flat_map(shards::Erasure::values).collect();
        let noise = Tensor::from_slice(&noise).to_device(self.device);
        let mut at = 0;
        for erasure in &pixels.erasures {
            let area = erasure.area;
            let [height, width] = [area.height, area.width].map(to_i64);
            let values = noise.narrow(0, at, 3 * height * width).view([3, height, width]);
            at += 3 * height * width;
            let image = images.select(0, to_i64(erasure.image));
            let rows = image.narrow(1, to_i64(area.top), height);
            copy(&mut rows.narrow(2, to_i64(area.left), width), &values);
        }
    }
}

/// Images `[B, 3, S, S]`, each mixed with its partner from the other end.
fn mixed(images: Tensor, mix: Mix) -> Tensor {
    match mix {
        Mix::None => images,
        Mix::Mixup { lambda } => &images * lambda + images.flip([0]) * (1.0 - lambda),
        Mix::Cutmix { area, .. } => {
            let part = |images: &Tensor| {
                let rows = images.narrow(2, to_i64(area.top), to_i64(area.height));
                rows.narrow(3, to_i64(area.left), to_i64(area.width))
            };
            let others = part(&images).flip([0]);
            copy(&mut part(&images), &others);
            images
        }
    }
}

impl DeviceSum {
    fn reset(&mut self) {
        match self {
            DeviceSum::Exact(sum) => sum.reset(),
            DeviceSum::Fast { pushed, .. } => *pushed = 0,
        }
    }

    fn block(&self) -> Range<u32> {
        match self {
            DeviceSum::Exact(sum) => sum.block(),
            DeviceSum::Fast { block, .. } => block.clone(),
        }
    }

    fn leaf(&mut self) -> &mut Tensor {
        match self {
            DeviceSum::Exact(sum) => sum.leaf(),
            DeviceSum::Fast { row, pushed: 0, .. } => row,
            DeviceSum::Fast { next, .. } => next,
        }
    }

    fn push(&mut self) {
        match self {
            DeviceSum::Exact(sum) => sum.push(),
            DeviceSum::Fast { row, next, pushed, .. } => {
                if *pushed > 0 {
                    add(row, next);
                }
                *pushed += 1;
            }
        }
    }

    fn finish(&mut self, peers: &mut dyn TensorExchange) -> Result<&Tensor, Interrupted> {
        match self {
            DeviceSum::Exact(sum) => Ok(sum.finish(peers)?),
            DeviceSum::Fast { row, .. } => {
                if peers.size() > 1 {
                    peers.sum(row)?;
                }
                Ok(row)
            }
        }
    }
}

fn copy(target: &mut Tensor, source: &Tensor) {
    tch::no_grad(|| target.copy_(source));
}

fn add(target: &mut Tensor, other: &Tensor) {
    drop(tch::no_grad(|| target.g_add_(other)));
}
