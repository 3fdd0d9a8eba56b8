//! What more than one backbone is made of.
//!
//! Axes: B batch, C channels, H and W height and width.

use tch::Tensor;

use crate::folded::Folded;
use crate::init::Init;
use crate::layers::{BatchNorm, Conv2d, ConvSize, Linear, Mode, NormConstants};
use crate::norm::Then;
use crate::params::Scope;
use crate::{fused, gate};

/// The reference's fan-out, which it does not divide by the groups (SPEC §5): all backbones' convolutions.
pub(crate) fn fan_out(size: ConvSize) -> Init {
    Init::normal((2.0 / (size.kernel * size.kernel * size.outputs) as f64).sqrt())
}

/// A convolution without bias, then BatchNorm.
#[derive(Debug)]
pub(crate) struct ConvNorm {
    convolution: Conv2d,
    norm: BatchNorm,
    /// What evaluation runs instead of the two, once they were folded.
    folded: Option<Box<Folded>>,
}

impl ConvNorm {
    /// The two are `0` and `1` of a sequence.
    pub(crate) fn new(scope: &Scope<'_, '_>, size: ConvSize, constants: NormConstants) -> ConvNorm {
        ConvNorm::named(scope, ["0", "1"], size, constants)
    }

    /// The two have these names.
    pub(crate) fn named(
        scope: &Scope<'_, '_>,
        [convolution, norm]: [&str; 2],
        size: ConvSize,
        constants: NormConstants,
    ) -> ConvNorm {
        ConvNorm {
            convolution: Conv2d::unbiased(&(scope / convolution), size, fan_out(size)),
            norm: BatchNorm::with_constants(&(scope / norm), size.outputs, constants),
            folded: None,
        }
    }

    /// Folds BatchNorm into the convolution, as both are now; the layer is then for evaluation alone.
    pub(crate) fn fold(&mut self) {
        self.folded = Some(Box::new(Folded::new(&self.convolution, &self.norm)));
    }

    fn forward_then(&self, x: &Tensor, mode: Mode, then: Then<'_>) -> Tensor {
        match (&self.folded, mode) {
            (Some(folded), Mode::Eval) => folded.forward(x, then),
            (Some(_), Mode::Train(_)) => panic!("a network that was folded does not train"),
            (None, _) => self.norm.forward_then(self.convolution.forward(x), mode, then),
        }
    }

    /// `[B, inputs, H, W]` to `[B, outputs, ⌈H/stride⌉, ⌈W/stride⌉]`.
    pub(crate) fn forward(&self, x: &Tensor, mode: Mode) -> Tensor {
        self.forward_then(x, mode, Then::Nothing)
    }

    /// The same, then ReLU.
    pub(crate) fn forward_relu(&self, x: &Tensor, mode: Mode) -> Tensor {
        self.forward_then(x, mode, Then::Relu)
    }

    /// The same, then the addition of `shortcut` and ReLU.
    pub(crate) fn forward_add_relu(&self, x: &Tensor, shortcut: &Tensor, mode: Mode) -> Tensor {
        self.forward_then(x, mode, Then::AddRelu(shortcut))
    }
}

/// What makes a gate from a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Gate {
    Sigmoid,
    /// `min(max(x + 3, 0), 6) / 6`
    HardSigmoid,
}

/// Scales each channel by a gate computed from all channels' means (arXiv:1709.01507).
///
/// The reference has 1×1 convolutions here. On one pixel they are linear layers, which cost far less to call.
#[derive(Debug)]
pub(crate) struct SqueezeExcite {
    squeeze: Linear,
    excite: Linear,
    gate: Gate,
}

impl SqueezeExcite {
    /// `hidden` channels between the two layers. The biases start as PyTorch's default with a sigmoid and as
    /// zeros with a hard one: what the two families of the reference do (SPEC §5).
    pub(crate) fn new(scope: &Scope<'_, '_>, width: i64, hidden: i64, gate: Gate) -> SqueezeExcite {
        let layer = |name: &str, inputs: i64, outputs: i64| {
            let weight = fan_out(ConvSize::pointwise(inputs, outputs));
            let bias = match gate {
                Gate::Sigmoid => Init::fan_in(inputs),
                Gate::HardSigmoid => Init::Zeros,
            };
            Linear::of_pixel(&(scope / name), inputs, outputs, weight, bias)
        };
        let (squeeze, excite) = (layer("fc1", width, hidden), layer("fc2", hidden, width));
        SqueezeExcite { squeeze, excite, gate }
    }

    /// `[B, C, H, W]` to the same.
    pub(crate) fn forward(&self, x: &Tensor) -> Tensor {
        let own = fused::takes(x);
        let mean = if own {
            gate::channel_mean(x)
        } else {
            x.mean_dim([2_i64, 3].as_slice(), false, None)
        }; // [B, C]
        let open = self.excite.forward(&self.squeeze.forward(&mean).relu_()); // [B, C]
        let gate = match self.gate {
            Gate::Sigmoid => open.sigmoid(),
            Gate::HardSigmoid => open.hardsigmoid(),
        };
        if own { gate::gated(x, &gate) } else { x * gate.unsqueeze(-1).unsqueeze(-1) }
    }
}
