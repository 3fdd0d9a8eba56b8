//! RegNetY (Radosavovic et al., arXiv:2003.13678), as Dyn-Perceiver uses it: stem of width 32 without pooling,
//! bottleneck ratio 1, squeeze-and-excitation of a quarter of the block's input width.
//!
//! Axes: B batch, C channels, H and W height and width.

use tch::Tensor;

use crate::init::Init;
use crate::layers::{BatchNorm, Conv2d, ConvSize, Linear, Mode};
use crate::params::Scope;

/// Channels after the stem.
pub(crate) const STEM_WIDTH: i64 = 32;

/// The sizes of a RegNetY.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RegNetSpec {
    /// Output channels of the four stages.
    pub(crate) widths: [i64; 4],
    /// Blocks in each stage.
    pub(crate) depths: [usize; 4],
    /// Channels in a group of the 3×3 convolutions.
    pub(crate) group_width: i64,
}

/// A RegNetY.
#[derive(Debug)]
pub(crate) struct RegNet {
    stem: ConvNorm,
    stages: [Vec<Block>; 4],
}

impl RegNet {
    pub(crate) fn new(root: &Scope<'_, '_>, spec: &RegNetSpec) -> RegNet {
        let size = ConvSize { inputs: 3, outputs: STEM_WIDTH, kernel: 3, stride: 2, groups: 1 };
        let stem = ConvNorm::new(&(root / "cnn_stem"), size);
        let mut width = STEM_WIDTH;
        let stages = std::array::from_fn(|stage| {
            let number = stage + 1;
            let scope = &(root / "cnn_body") / &format!("block{number}");
            let block = |index: usize| {
                let outputs = spec.widths[stage];
                let block = BlockSize {
                    inputs: std::mem::replace(&mut width, outputs),
                    outputs,
                    stride: if index == 0 { 2 } else { 1 },
                    groups: outputs / spec.group_width,
                };
                Block::new(&(&scope / &format!("block{number}-{index}")), block)
            };
            (0..spec.depths[stage]).map(block).collect()
        });
        RegNet { stem, stages }
    }

    /// `[B, 3, S, S]` to `[B, 32, S/2, S/2]`.
    pub(crate) fn stem(&self, images: &Tensor, mode: Mode) -> Tensor {
        self.stem.forward(images, mode).relu_()
    }

    /// `[B, C, H, W]` to `[B, C′, H/2, W/2]`.
    pub(crate) fn stage(&self, stage: usize, x: &Tensor, mode: Mode) -> Tensor {
        let blocks = &self.stages[stage];
        blocks.iter().fold(x.shallow_clone(), |x, block| block.forward(&x, mode))
    }
}

/// A convolution without bias, then BatchNorm.
#[derive(Debug)]
struct ConvNorm {
    convolution: Conv2d,
    norm: BatchNorm,
}

impl ConvNorm {
    fn new(scope: &Scope<'_, '_>, size: ConvSize) -> ConvNorm {
        let init = fan_out(size);
        ConvNorm {
            convolution: Conv2d::unbiased(&(scope / "0"), size, init),
            norm: BatchNorm::new(&(scope / "1"), size.outputs),
        }
    }

    fn forward(&self, x: &Tensor, mode: Mode) -> Tensor {
        self.norm.forward(&self.convolution.forward(x), mode)
    }
}

/// The reference's fan-out, which it does not divide by the groups.
fn fan_out(size: ConvSize) -> Init {
    Init::normal((2.0 / (size.kernel * size.kernel * size.outputs) as f64).sqrt())
}

/// The sizes of a [`Block`].
#[derive(Debug, Clone, Copy)]
struct BlockSize {
    inputs: i64,
    outputs: i64,
    stride: i64,
    groups: i64,
}

/// Bottleneck with squeeze-and-excitation and a residual (arXiv:2003.13678, Fig. 4).
#[derive(Debug)]
struct Block {
    /// Present where the size changes: in the first block of a stage.
    project: Option<ConvNorm>,
    enter: ConvNorm,
    group: ConvNorm,
    excite: SqueezeExcite,
    leave: ConvNorm,
}

impl Block {
    fn new(scope: &Scope<'_, '_>, size: BlockSize) -> Block {
        let BlockSize { inputs, outputs, stride, groups } = size;
        let project = || {
            let size = ConvSize { stride, ..ConvSize::pointwise(inputs, outputs) };
            ConvNorm::new(&(scope / "proj"), size)
        };
        let resized = stride != 1 || inputs != outputs;
        let project = resized.then(project); // Precedes `f` in the state dict.
        let body = scope / "f";
        let grouped = ConvSize { inputs: outputs, outputs, kernel: 3, stride, groups };
        Block {
            project,
            enter: ConvNorm::new(&(&body / "a"), ConvSize::pointwise(inputs, outputs)),
            group: ConvNorm::new(&(&body / "b"), grouped),
            excite: SqueezeExcite::new(&(&body / "se"), outputs, quarter(inputs)),
            leave: ConvNorm::new(&(&body / "c"), ConvSize::pointwise(outputs, outputs)),
        }
    }

    /// `[B, C, H, W]` to `[B, C′, H/stride, W/stride]`.
    fn forward(&self, x: &Tensor, mode: Mode) -> Tensor {
        let body = self.enter.forward(x, mode).relu_(); // [B, C′, H, W]
        let body = self.group.forward(&body, mode).relu_(); // [B, C′, H/stride, W/stride]
        let body = self.leave.forward(&self.excite.forward(&body), mode);
        let shortcut = match &self.project {
            Some(project) => project.forward(x, mode),
            None => x.shallow_clone(),
        };
        (body + shortcut).relu_()
    }
}

/// `width / 4`, rounded half to even as Python does.
fn quarter(width: i64) -> i64 {
    let (whole, rest) = (width / 4, width % 4);
    match rest {
        3 => whole + 1,
        2 => whole + whole % 2,
        _ => whole,
    }
}

/// Scales each channel by a gate computed from all channels' means (arXiv:1709.01507).
///
/// The reference has 1×1 convolutions here. On one pixel they are linear layers, which cost far less to call.
#[derive(Debug)]
struct SqueezeExcite {
    squeeze: Linear,
    excite: Linear,
}

impl SqueezeExcite {
    fn new(scope: &Scope<'_, '_>, width: i64, hidden: i64) -> SqueezeExcite {
        let layer = |name: &str, inputs: i64, outputs: i64| {
            Linear::of_pixel(
                &(scope / name),
                inputs,
                outputs,
                fan_out(ConvSize::pointwise(inputs, outputs)),
            )
        };
        SqueezeExcite { squeeze: layer("fc1", width, hidden), excite: layer("fc2", hidden, width) }
    }

    /// `[B, C, H, W]` to the same.
    fn forward(&self, x: &Tensor) -> Tensor {
        let mean = x.mean_dim([2_i64, 3].as_slice(), false, None); // [B, C]
        let gate = self.excite.forward(&self.squeeze.forward(&mean).relu_()).sigmoid(); // [B, C]
        x * gate.unsqueeze(-1).unsqueeze(-1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_squeeze_width_rounds_half_to_even() {
        let widths = [32, 48, 104, 208, 440, 30, 50, 51];
        assert_eq!(widths.map(quarter), [8, 12, 26, 52, 110, 8, 12, 13]);
    }
}
