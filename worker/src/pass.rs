//! Forward and backward of one micro-batch on a device, as a recorded graph where that is wanted.
//!
//! A step of these networks is thousands of small operations, and on a GPU the host is slower at asking for them
//! than the device at doing them. A graph is asked for once; its bits are those of the operations.

use libtorch::cuda::Graph;
use model::{Draws, GradientError, LossConfig, Network, Targets, multi_exit};
use tch::{Device, Kind, Tensor};

/// A micro-batch on the device.
#[derive(Debug)]
pub(crate) struct Inputs {
    /// `[B, 3, S, S]` f32, channels next to each other.
    pub(crate) images: Tensor,
    /// `[B]` i64.
    pub(crate) labels: Tensor,
    /// Probabilities `[B, K]` f32, where images are mixed.
    pub(crate) targets: Option<Tensor>,
}

/// What a pass computes, the same for every micro-batch of a run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rules {
    /// Of products and convolutions.
    pub(crate) precision: Kind,
    /// The loss of the exits.
    pub(crate) loss: LossConfig,
    /// Passes whose mean is one gradient.
    pub(crate) update_freq: u32,
    /// Whether to record a graph. The network must draw nothing.
    pub(crate) graph: bool,
}

/// The running statistics that a pass moves, `[S]`, and those that it starts from.
#[derive(Debug)]
pub(crate) struct Statistics<'a> {
    /// What the network's layers move.
    pub(crate) moving: &'a mut Tensor,
    /// Where they start.
    pub(crate) start: &'a Tensor,
}

/// Forward and backward, and the memory of their results.
#[derive(Debug)]
pub(crate) struct Pass {
    rules: Rules,
    /// `[P]` f32: this micro-batch's part of the gradient.
    gradients: Tensor,
    /// A scalar.
    loss: Tensor,
    recorded: Option<Recorded>,
}

#[derive(Debug)]
struct Recorded {
    graph: Graph,
    inputs: Inputs,
}

/// Runs before a graph is recorded, in which libraries choose their algorithms and find their memory.
const WARM_UPS: u32 = 2;

impl Pass {
    /// For a network of `params` parameters on `device`.
    pub(crate) fn new(rules: Rules, params: usize, device: Device) -> Self {
        let params = i64::try_from(params).expect("no memory holds more elements");
        let zeros = |size: &[i64]| Tensor::zeros(size, (Kind::Float, device));
        Self { rules, gradients: zeros(&[params]), loss: zeros(&[]), recorded: None }
    }

    /// The gradient that the newest run has made, `[P]`.
    pub(crate) fn gradients(&self) -> &Tensor {
        &self.gradients
    }

    /// The loss that the newest run has found: a scalar on the device.
    pub(crate) fn loss(&self) -> &Tensor {
        &self.loss
    }

    /// Runs on a micro-batch. All of a run have the same sizes.
    ///
    /// # Errors
    /// [`GradientError`] if libtorch refuses or the device fails.
    pub(crate) fn run(
        &mut self,
        network: &Network,
        statistics: Statistics<'_>,
        draws: &Draws,
        inputs: Inputs,
    ) -> Result<(), GradientError> {
        if !self.rules.graph {
            return self.eager(network, draws, &inputs);
        }
        match &mut self.recorded {
            Some(recorded) => recorded.inputs.overwrite(&inputs),
            None => self.record(network, statistics, draws, inputs)?,
        }
        self.recorded.as_mut().expect("it was recorded").graph.replay()
    }

    fn record(
        &mut self,
        network: &Network,
        statistics: Statistics<'_>,
        draws: &Draws,
        inputs: Inputs,
    ) -> Result<(), GradientError> {
        for _ in 0..WARM_UPS {
            self.eager(network, draws, &inputs)?;
            tch::no_grad(|| statistics.moving.copy_(statistics.start));
        }
        libtorch::cuda::synchronize(self.gradients.device())?;
        let (graph, ()) = Graph::record(|| self.eager(network, draws, &inputs))?;
        self.recorded = Some(Recorded { graph, inputs });
        Ok(())
    }

    fn eager(
        &mut self,
        network: &Network,
        draws: &Draws,
        inputs: &Inputs,
    ) -> Result<(), GradientError> {
        let total = self.forward(network, draws, inputs)?;
        self.backward(network, &total)
    }

    /// The loss of a micro-batch, without a graph of the device: a scalar.
    ///
    /// # Errors
    /// As [`Pass::run`].
    pub(crate) fn forward(
        &self,
        network: &Network,
        draws: &Draws,
        inputs: &Inputs,
    ) -> Result<Tensor, GradientError> {
        let Rules { precision, loss, .. } = self.rules;
        let forward = || network.forward_train(&inputs.images, draws);
        let forward = || libtorch::autocast(inputs.images.device(), precision, forward);
        let exits = libtorch::refusals(forward)??;
        let exits = exits.to_kind(Kind::Float); // Losses, KD included, are f32.
        let targets = inputs.targets.as_ref();
        let targets = targets.map_or(Targets::Labels(&inputs.labels), Targets::Soft);
        Ok(multi_exit(&exits, targets, &loss).total)
    }

    /// Takes the loss that [`Pass::forward`] has found, and its gradient.
    ///
    /// # Errors
    /// As [`Pass::run`].
    pub(crate) fn backward(
        &mut self,
        network: &Network,
        total: &Tensor,
    ) -> Result<(), GradientError> {
        let share = total / f64::from(self.rules.update_freq);
        network.gradients(&share, &mut self.gradients)?;
        tch::no_grad(|| self.loss.copy_(total));
        Ok(())
    }
}

impl Inputs {
    /// Takes the values of others of the same sizes.
    fn overwrite(&mut self, others: &Inputs) {
        tch::no_grad(|| {
            self.images.copy_(&others.images);
            self.labels.copy_(&others.labels);
            if let (Some(targets), Some(others)) = (&mut self.targets, &others.targets) {
                targets.copy_(others);
            }
        });
    }
}
