//! ResNet (He et al., arXiv:1512.03385) as Dyn-Perceiver uses it (SPEC §3.2): stride in the 3×3 convolution,
//! drop-path on every residual branch but the first, and a last normalisation that starts at zero.
//!
//! Axes: B batch, C channels, H and W height and width.

use tch::Tensor;

use super::blocks::ConvNorm;
use crate::cost::Tally;
use crate::init::Init;
use crate::layers::{ConvSize, DropPath, Mode, NormConstants};
use crate::params::Scope;

/// The sizes of a ResNet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ResNetSpec {
    pub(crate) block: BlockKind,
    /// Channels of the stem, and inside the blocks of stage 1; each stage has twice those before it.
    pub(crate) width: i64,
    /// Blocks in each stage.
    pub(crate) depths: [usize; 4],
}

/// The two residual blocks of the paper (its Fig. 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BlockKind {
    /// Two 3×3 convolutions.
    Basic,
    /// 1×1, 3×3 and 1×1 to four times the channels.
    Bottleneck,
}

impl BlockKind {
    /// Output channels in units of the channels inside.
    fn expansion(self) -> i64 {
        match self {
            BlockKind::Basic => 1,
            BlockKind::Bottleneck => 4,
        }
    }
}

impl ResNetSpec {
    /// C1 to C4, and Cout.
    pub(crate) fn widths(&self) -> [i64; 5] {
        let after = |stage: usize| (self.width << stage) * self.block.expansion();
        [self.width, after(0), after(1), after(2), after(3)]
    }

    /// The blocks of a stage, counted from 0.
    fn blocks(&self, stage: usize) -> impl Iterator<Item = BlockSize> {
        let (kind, planes) = (self.block, self.width << stage);
        let [before, outputs] = [self.widths()[stage], self.widths()[stage + 1]];
        let halving = if stage == 0 { 1 } else { 2 }; // The stem's pooling has done it for stage 1.
        (0..self.depths[stage]).map(move |index| match index {
            0 => BlockSize { kind, inputs: before, planes, outputs, stride: halving },
            _ => BlockSize { kind, inputs: outputs, planes, outputs, stride: 1 },
        })
    }

    fn stem(&self) -> ConvSize {
        ConvSize { inputs: 3, outputs: self.width, kernel: 7, stride: 2, groups: 1 }
    }

    pub(crate) fn tally_stem(&self, tally: &mut Tally) {
        tally.convolution(self.stem());
        tally.halve();
    }

    pub(crate) fn tally_stage(&self, stage: usize, tally: &mut Tally) {
        self.blocks(stage).for_each(|block| block.tally(tally));
    }
}

/// A ResNet.
#[derive(Debug)]
pub(crate) struct ResNet {
    stem: ConvNorm,
    stages: [Vec<Block>; 4],
}

impl ResNet {
    /// `drop_path`: rate of the last block; it grows evenly from 0 at the first.
    pub(crate) fn new(root: &Scope<'_, '_>, spec: &ResNetSpec, drop_path: f64) -> ResNet {
        let stem = ConvNorm::new(&(root / "cnn_stem"), spec.stem(), NormConstants::DEFAULT);
        let last = spec.depths.iter().sum::<usize>() - 1;
        let mut place = 0.0;
        let stages = std::array::from_fn(|stage| {
            let scope = root / &format!("cnn_body_stage{}", stage + 1);
            let block = |(index, size): (usize, BlockSize)| {
                let rate = drop_path * place / last as f64;
                place += 1.0;
                Block::new(&(&scope / &index.to_string()), size, rate)
            };
            spec.blocks(stage).enumerate().map(block).collect()
        });
        ResNet { stem, stages }
    }

    /// All convolutions with their BatchNorm.
    pub(crate) fn convolutions(&mut self) -> Vec<&mut ConvNorm> {
        let blocks = self.stages.iter_mut().flatten();
        let blocks = blocks.flat_map(|block| block.body.iter_mut().chain(block.project.iter_mut()));
        std::iter::once(&mut self.stem).chain(blocks).collect()
    }

    /// `[B, 3, S, S]` to `[B, C1, S/4, S/4]`.
    pub(crate) fn stem(&self, images: &Tensor, mode: Mode) -> Tensor {
        pool(&self.stem.forward_relu(images, mode))
    }

    /// `[B, C, H, W]` to `[B, C′, H/2, W/2]`, in stage 1 to `[B, C′, H, W]`.
    pub(crate) fn stage(&self, stage: usize, x: &Tensor, mode: Mode) -> Tensor {
        let blocks = &self.stages[stage];
        blocks.iter().fold(x.shallow_clone(), |x, block| block.forward(&x, mode))
    }
}

/// The largest of each 3×3 window, at every second place: `[B, C, H, W]` to `[B, C, ⌈H/2⌉, ⌈W/2⌉]`.
fn pool(x: &Tensor) -> Tensor {
    if x.device().is_cuda() {
        // There the backward of the pooling operation is not deterministic.
        pool_by_maxima(x)
    } else {
        x.max_pool2d([3, 3], [2, 2], [1, 1], [1, 1], false)
    }
}

/// [`pool`] as element-wise maxima of shifted maps, first along one axis and then along the other.
fn pool_by_maxima(x: &Tensor) -> Tensor {
    let padded = x.pad([1, 1, 1, 1], "constant", f64::NEG_INFINITY); // [B, C, H+2, W+2]
    [2, 3].into_iter().fold(padded, |x, axis| {
        let places = (x.size()[usize::try_from(axis).expect("2 or 3")] - 1) / 2;
        let shifted = |from: i64| x.slice(axis, from, from + 2 * places - 1, 2);
        shifted(0).maximum(&shifted(1)).maximum(&shifted(2))
    })
}

/// The sizes of a [`Block`].
#[derive(Debug, Clone, Copy)]
struct BlockSize {
    kind: BlockKind,
    inputs: i64,
    /// Channels of the inner convolutions.
    planes: i64,
    outputs: i64,
    stride: i64,
}

impl BlockSize {
    /// The body's convolutions.
    fn body(self) -> Vec<ConvSize> {
        let BlockSize { kind, inputs, planes, outputs, stride } = self;
        let square = |inputs: i64, stride: i64| ConvSize {
            inputs,
            outputs: planes,
            kernel: 3,
            stride,
            groups: 1,
        };
        match kind {
            BlockKind::Basic => vec![square(inputs, stride), square(planes, 1)],
            BlockKind::Bottleneck => vec![
                ConvSize::pointwise(inputs, planes),
                square(planes, stride),
                ConvSize::pointwise(planes, outputs),
            ],
        }
    }

    /// The shortcut's convolution, where the size changes.
    fn project(self) -> Option<ConvSize> {
        let size = ConvSize::pointwise(self.inputs, self.outputs);
        let resized = self.stride != 1 || self.inputs != self.outputs;
        resized.then_some(ConvSize { stride: self.stride, ..size })
    }

    fn tally(self, tally: &mut Tally) {
        self.project().iter().for_each(|project| tally.shortcut(*project));
        self.body().iter().for_each(|size| tally.convolution(*size));
    }
}

/// Convolutions with a residual around them; ReLU between them and after the sum.
#[derive(Debug)]
struct Block {
    body: Vec<ConvNorm>,
    drop_path: DropPath,
    project: Option<ConvNorm>,
}

impl Block {
    fn new(scope: &Scope<'_, '_>, size: BlockSize, drop_path: f64) -> Block {
        let sizes = size.body();
        let last = sizes.len();
        let layer = |(number, size): (usize, &ConvSize)| {
            let names = [format!("conv{number}"), format!("bn{number}")];
            let scale = if number == last { Init::Zeros } else { Init::Ones };
            let constants = NormConstants { scale, ..NormConstants::DEFAULT };
            ConvNorm::named(scope, names.each_ref().map(String::as_str), *size, constants)
        };
        let body = (1..).zip(&sizes).map(layer).collect();
        let shortcut = |size| ConvNorm::new(&(scope / "downsample"), size, NormConstants::DEFAULT);
        let drop_path = DropPath::new(scope, drop_path);
        Block { body, drop_path, project: size.project().map(shortcut) }
    }

    /// `[B, C, H, W]` to `[B, C′, H/stride, W/stride]`.
    fn forward(&self, x: &Tensor, mode: Mode) -> Tensor {
        let (last, inner) = self.body.split_last().expect("a block has convolutions");
        let body = inner.iter().fold(x.shallow_clone(), |x, layer| layer.forward_relu(&x, mode));
        let body = self.drop_path.forward(last.forward(&body, mode), mode);
        let shortcut = match &self.project {
            Some(project) => project.forward(x, mode),
            None => x.shallow_clone(),
        };
        (body + shortcut).relu_()
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    #[test]
    fn maxima_pool_as_the_pooling_operation_does_forwards_and_backwards() {
        libtorch::init(1).expect("starts");
        for (height, width) in [(8, 8), (7, 9), (1, 2)] {
            let angles = Tensor::arange(2 * 3 * height * width, (Kind::Double, Device::Cpu)) + 0.3;
            let values = (angles * 12.9898).sin().view([2, 3, height, width]);
            let gradient = |pool: fn(&Tensor) -> Tensor| {
                let x = values.copy().set_requires_grad(true);
                let pooled = pool(&x);
                let mut flat = Tensor::zeros([values.numel() as i64], (Kind::Double, Device::Cpu));
                let loss = pooled.square().sum(Kind::Double);
                libtorch::gradients_into(&loss, &[x], &mut flat).expect("has gradients");
                (pooled.detach(), flat)
            };
            assert_eq!(gradient(pool), gradient(pool_by_maxima), "{height}×{width}");
        }
    }

    #[test]
    fn widths_double_and_a_bottleneck_ends_four_times_as_wide() {
        let spec = ResNetSpec { block: BlockKind::Bottleneck, width: 24, depths: [3, 4, 6, 3] };
        assert_eq!(spec.widths(), [24, 96, 192, 384, 768]);
        let spec = ResNetSpec { block: BlockKind::Basic, width: 64, depths: [2, 2, 2, 2] };
        assert_eq!(spec.widths(), [64, 64, 128, 256, 512]);
    }
}
