//! The layers that every block is made of, with the reference's names for their tensors.

use tch::{Kind, Tensor};

use crate::draws::{Draws, Site};
use crate::fused;
use crate::init::Init;
use crate::norm::{self, Norm, Statistics, Then};
use crate::params::Scope;

/// How a forward pass runs.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Mode {
    /// Batch statistics, which also move the running ones, and dropout from these draws.
    Train(Draws),
    /// Running statistics and no dropout.
    Eval,
}

/// `y = x Wᵀ + b` on the last axis.
#[derive(Debug)]
pub(crate) struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    /// With bias and PyTorch's default initial values.
    pub(crate) fn new(scope: &Scope<'_, '_>, inputs: i64, outputs: i64) -> Linear {
        Linear::with_init(scope, inputs, outputs, Init::fan_in(inputs), Init::fan_in(inputs))
    }

    /// With bias.
    pub(crate) fn with_init(
        scope: &Scope<'_, '_>,
        inputs: i64,
        outputs: i64,
        weight: Init,
        bias: Init,
    ) -> Linear {
        let weight = scope.param("weight", &[outputs, inputs], weight);
        Linear { weight, bias: Some(scope.param("bias", &[outputs], bias)) }
    }

    /// What the reference stores as a 1×1 convolution with bias, on inputs of one pixel.
    pub(crate) fn of_pixel(
        scope: &Scope<'_, '_>,
        inputs: i64,
        outputs: i64,
        weight: Init,
        bias: Init,
    ) -> Linear {
        let stored = [outputs, inputs, 1, 1];
        let weight = scope.reshaped("weight", &stored, &[outputs, inputs], weight);
        Linear { weight, bias: Some(scope.param("bias", &[outputs], bias)) }
    }

    /// Without bias.
    pub(crate) fn unbiased(scope: &Scope<'_, '_>, inputs: i64, outputs: i64) -> Linear {
        let weight = scope.param("weight", &[outputs, inputs], Init::fan_in(inputs));
        Linear { weight, bias: None }
    }

    /// Several layers of `outputs` each, without bias, on the same input, as one.
    pub(crate) fn stacked(
        scope: &Scope<'_, '_>,
        names: &[&str],
        inputs: i64,
        outputs: i64,
    ) -> Linear {
        Linear { weight: scope.stacked(names, outputs, inputs, Init::fan_in(inputs)), bias: None }
    }

    /// `[..., inputs]` to `[..., outputs]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Tensor {
        x.linear(&self.weight, self.bias.as_ref())
    }
}

/// Normalises the last axis: eps 1e-5, affine.
#[derive(Debug)]
pub(crate) struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    width: i64,
}

impl LayerNorm {
    pub(crate) fn new(scope: &Scope<'_, '_>, width: i64) -> LayerNorm {
        let weight = scope.param("weight", &[width], Init::Ones);
        LayerNorm { weight, bias: scope.param("bias", &[width], Init::Zeros), width }
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Tensor {
        x.layer_norm([self.width], Some(&self.weight), Some(&self.bias), 1e-5, true)
    }
}

/// Constants of a [`BatchNorm`], and how its scale starts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct NormConstants {
    pub(crate) epsilon: f64,
    pub(crate) momentum: f64,
    pub(crate) scale: Init,
}

impl NormConstants {
    /// PyTorch's: eps 1e-5, momentum 0.1, scale 1.
    pub(crate) const DEFAULT: NormConstants =
        NormConstants { epsilon: 1e-5, momentum: 0.1, scale: Init::Ones };
}

/// Normalises each channel of `[B, C, H, W]` or `[B, C]`, affine.
#[derive(Debug)]
pub(crate) struct BatchNorm {
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    constants: NormConstants,
}

impl BatchNorm {
    /// With PyTorch's constants.
    pub(crate) fn new(scope: &Scope<'_, '_>, width: i64) -> BatchNorm {
        BatchNorm::with_constants(scope, width, NormConstants::DEFAULT)
    }

    pub(crate) fn with_constants(
        scope: &Scope<'_, '_>,
        width: i64,
        constants: NormConstants,
    ) -> BatchNorm {
        let weight = scope.param("weight", &[width], constants.scale);
        let bias = scope.param("bias", &[width], Init::Zeros);
        let running_mean = scope.buffer("running_mean", &[width], Init::Zeros);
        let running_var = scope.buffer("running_var", &[width], Init::Ones);
        scope.counter("num_batches_tracked");
        BatchNorm { weight, bias, running_mean, running_var, constants }
    }

    /// In training the running statistics, which are views of the flat buffers, move in place.
    pub(crate) fn forward(&self, x: &Tensor, mode: Mode) -> Tensor {
        self.normalized(x, mode)
    }

    /// Normalises what a convolution has made, then does what follows.
    pub(crate) fn forward_then(&self, x: Tensor, mode: Mode, then: Then<'_>) -> Tensor {
        if fused::takes(&x) {
            let epsilon = self.constants.epsilon;
            let norm = Norm { weight: &self.weight, bias: &self.bias, epsilon };
            if matches!(mode, Mode::Eval) {
                let running = [&self.running_mean, &self.running_var];
                return norm::running::normalize(x, &norm, running, then);
            }
            let (y, statistics) = norm::batch_norm(&x, &norm, then);
            self.track(&statistics);
            return y;
        }
        let mut y = self.normalized(&x, mode);
        match then {
            Then::Nothing => y,
            Then::Relu => y.relu_(),
            Then::AddRelu(shortcut) => (y + shortcut).relu_(),
        }
    }

    /// `y = x·scale + shift` of evaluation: both as f64, `[C]`.
    pub(crate) fn factors(&self) -> [Tensor; 2] {
        let [weight, bias, mean, variance] =
            [&self.weight, &self.bias, &self.running_mean, &self.running_var]
                .map(|tensor| tensor.detach().to_kind(Kind::Double));
        let scale = weight / (variance + self.constants.epsilon).sqrt();
        let shift = bias - mean * &scale;
        [scale, shift]
    }

    /// Moves the running statistics; that of the variance is unbiased.
    fn track(&self, batch: &Statistics) {
        let unbiased = batch.count / (batch.count - 1.0);
        let variance: Vec<f64> = batch.variance.iter().map(|value| value * unbiased).collect();
        for (running, values) in [(&self.running_mean, &batch.mean), (&self.running_var, &variance)]
        {
            norm::track(&mut running.shallow_clone(), values, self.constants.momentum);
        }
    }

    fn normalized(&self, x: &Tensor, mode: Mode) -> Tensor {
        x.batch_norm(
            Some(&self.weight),
            Some(&self.bias),
            Some(&self.running_mean),
            Some(&self.running_var),
            matches!(mode, Mode::Train(_)),
            self.constants.momentum,
            self.constants.epsilon,
            true,
        )
    }
}

/// A square 2-D convolution with padding that keeps the size at stride 1.
#[derive(Debug)]
pub(crate) struct Conv2d {
    weight: Tensor,
    bias: Option<Tensor>,
    stride: i64,
    padding: i64,
    groups: i64,
}

/// The sizes of a [`Conv2d`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct ConvSize {
    pub(crate) inputs: i64,
    pub(crate) outputs: i64,
    pub(crate) kernel: i64,
    pub(crate) stride: i64,
    pub(crate) groups: i64,
}

impl ConvSize {
    /// 1×1, stride 1, one group.
    pub(crate) fn pointwise(inputs: i64, outputs: i64) -> ConvSize {
        ConvSize { inputs, outputs, kernel: 1, stride: 1, groups: 1 }
    }

    /// Each channel by itself.
    pub(crate) fn depthwise(width: i64, kernel: i64, stride: i64) -> ConvSize {
        ConvSize { inputs: width, outputs: width, kernel, stride, groups: width }
    }

    /// Height or width after it, from that before it: `⌈side/stride⌉`.
    pub(crate) fn side_after(self, side: i64) -> i64 {
        (side + self.stride - 1) / self.stride
    }

    /// Multiply–accumulates on an input of this height and width.
    pub(crate) fn macs(self, side: i64) -> i64 {
        let weights: i64 = self.weight_shape().iter().product();
        weights * self.side_after(side).pow(2)
    }

    /// Inputs that one output sees: PyTorch's fan-in.
    fn fan_in(self) -> i64 {
        self.inputs / self.groups * self.kernel * self.kernel
    }

    fn weight_shape(self) -> [i64; 4] {
        [self.outputs, self.inputs / self.groups, self.kernel, self.kernel]
    }
}

impl Conv2d {
    /// Without bias.
    pub(crate) fn unbiased(scope: &Scope<'_, '_>, size: ConvSize, weight: Init) -> Conv2d {
        Conv2d::assemble(scope.param("weight", &size.weight_shape(), weight), None, size)
    }

    /// With a bias that starts as PyTorch's default.
    pub(crate) fn biased(scope: &Scope<'_, '_>, size: ConvSize, weight: Init) -> Conv2d {
        let weight = scope.param("weight", &size.weight_shape(), weight);
        let bias = scope.param("bias", &[size.outputs], Init::fan_in(size.fan_in()));
        Conv2d::assemble(weight, Some(bias), size)
    }

    /// The weight, and the bias where it has one.
    pub(crate) fn tensors(&self) -> (&Tensor, Option<&Tensor>) {
        (&self.weight, self.bias.as_ref())
    }

    /// The same with another weight, and a bias.
    pub(crate) fn with(&self, weight: Tensor, bias: Tensor) -> Conv2d {
        Conv2d { weight, bias: Some(bias), ..*self }
    }

    fn assemble(weight: Tensor, bias: Option<Tensor>, size: ConvSize) -> Conv2d {
        let ConvSize { kernel, stride, groups, .. } = size;
        Conv2d { weight, bias, stride, padding: (kernel - 1) / 2, groups }
    }

    /// `[B, inputs, H, W]` to `[B, outputs, ⌈H/stride⌉, ⌈W/stride⌉]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Tensor {
        let (stride, padding) = ([self.stride; 2], [self.padding; 2]);
        x.conv2d(&self.weight, self.bias.as_ref(), stride, padding, [1, 1], self.groups)
    }
}

/// Dropout at one place of the network.
#[derive(Debug)]
pub(crate) struct Dropout {
    rate: f64,
    site: Site,
}

impl Dropout {
    /// Draws under the name of its place.
    pub(crate) fn new(scope: &Scope<'_, '_>, name: &str, rate: f64) -> Dropout {
        Dropout { rate, site: Site::named(&scope.name(name)) }
    }

    /// Whether this pass drops anything here.
    pub(crate) fn is_active(&self, mode: Mode) -> bool {
        self.rate > 0.0 && matches!(mode, Mode::Train(_))
    }

    pub(crate) fn forward(&self, x: Tensor, mode: Mode) -> Tensor {
        match mode {
            Mode::Train(draws) if self.rate > 0.0 => {
                let options = (x.kind(), x.device());
                let mask = draws.dropout_mask(self.site, self.rate, &x.size(), options);
                x * mask
            }
            Mode::Train(_) | Mode::Eval => x,
        }
    }
}

/// Stochastic depth (arXiv:1603.09382): drops a residual branch of whole samples.
#[derive(Debug)]
pub(crate) struct DropPath(Dropout);

impl DropPath {
    /// Draws under the name of its block.
    pub(crate) fn new(scope: &Scope<'_, '_>, rate: f64) -> DropPath {
        DropPath(Dropout::new(scope, "drop_path", rate))
    }

    /// `[B, C, H, W]` to the same: in training each sample is 0 or divided by the probability to stay.
    pub(crate) fn forward(&self, x: Tensor, mode: Mode) -> Tensor {
        match mode {
            Mode::Train(draws) if self.0.rate > 0.0 => {
                let (size, options) = ([x.size()[0], 1, 1, 1], (x.kind(), x.device()));
                x * draws.dropout_mask(self.0.site, self.0.rate, &size, options)
            }
            Mode::Train(_) | Mode::Eval => x,
        }
    }
}
