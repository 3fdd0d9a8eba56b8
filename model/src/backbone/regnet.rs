//! RegNetY (Radosavovic et al., arXiv:2003.13678), as Dyn-Perceiver uses it (SPEC §3.1): stem of width 32
//! without pooling, bottleneck ratio 1, squeeze-and-excitation of a quarter of the block's input width.
//!
//! Axes: B batch, C channels, H and W height and width.

use tch::Tensor;

use super::blocks::{ConvNorm, Gate, SqueezeExcite};
use crate::cost::Tally;
use crate::layers::{ConvSize, Mode, NormConstants};
use crate::params::Scope;

/// Channels after the stem.
const STEM_WIDTH: i64 = 32;

/// The stem's convolution.
const STEM: ConvSize = ConvSize { inputs: 3, outputs: STEM_WIDTH, kernel: 3, stride: 2, groups: 1 };

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

impl RegNetSpec {
    /// C1 to C4, and Cout.
    pub(crate) fn widths(&self) -> [i64; 5] {
        let [first, second, third, last] = self.widths;
        [STEM_WIDTH, first, second, third, last]
    }

    /// The blocks of a stage, counted from 0.
    fn blocks(&self, stage: usize) -> impl Iterator<Item = BlockSize> {
        let [before, outputs] = [self.widths()[stage], self.widths()[stage + 1]];
        let groups = outputs / self.group_width;
        (0..self.depths[stage]).map(move |index| match index {
            0 => BlockSize { inputs: before, outputs, stride: 2, groups },
            _ => BlockSize { inputs: outputs, outputs, stride: 1, groups },
        })
    }

    pub(crate) fn tally_stem(&self, tally: &mut Tally) {
        tally.convolution(STEM);
    }

    pub(crate) fn tally_stage(&self, stage: usize, tally: &mut Tally) {
        self.blocks(stage).for_each(|block| block.tally(tally));
    }
}

/// A RegNetY.
#[derive(Debug)]
pub(crate) struct RegNet {
    stem: ConvNorm,
    stages: [Vec<Block>; 4],
}

impl RegNet {
    pub(crate) fn new(root: &Scope<'_, '_>, spec: &RegNetSpec) -> RegNet {
        let stem = ConvNorm::new(&(root / "cnn_stem"), STEM, NormConstants::DEFAULT);
        let stages = std::array::from_fn(|stage| {
            let number = stage + 1;
            let scope = &(root / "cnn_body") / &format!("block{number}");
            let block = |(index, size): (usize, BlockSize)| {
                Block::new(&(&scope / &format!("block{number}-{index}")), size)
            };
            spec.blocks(stage).enumerate().map(block).collect()
        });
        RegNet { stem, stages }
    }

    /// All convolutions with their BatchNorm.
    pub(crate) fn convolutions(&mut self) -> Vec<&mut ConvNorm> {
        let blocks = self.stages.iter_mut().flatten().flat_map(|block| {
            let Block { project, enter, group, excite: _, leave } = block;
            project.iter_mut().chain([enter, group, leave])
        });
        std::iter::once(&mut self.stem).chain(blocks).collect()
    }

    /// `[B, 3, S, S]` to `[B, 32, S/2, S/2]`.
    pub(crate) fn stem(&self, images: &Tensor, mode: Mode) -> Tensor {
        self.stem.forward_relu(images, mode)
    }

    /// `[B, C, H, W]` to `[B, C′, H/2, W/2]`.
    pub(crate) fn stage(&self, stage: usize, x: &Tensor, mode: Mode) -> Tensor {
        let blocks = &self.stages[stage];
        blocks.iter().fold(x.shallow_clone(), |x, block| block.forward(&x, mode))
    }
}

/// The sizes of a [`Block`].
#[derive(Debug, Clone, Copy)]
struct BlockSize {
    inputs: i64,
    outputs: i64,
    stride: i64,
    groups: i64,
}

impl BlockSize {
    /// The shortcut's convolution, where the size changes: in the first block of a stage.
    fn project(self) -> Option<ConvSize> {
        let size = ConvSize::pointwise(self.inputs, self.outputs);
        let resized = self.stride != 1 || self.inputs != self.outputs;
        resized.then_some(ConvSize { stride: self.stride, ..size })
    }

    /// The body's three convolutions.
    fn body(self) -> [ConvSize; 3] {
        let BlockSize { inputs, outputs, stride, groups } = self;
        let grouped = ConvSize { inputs: outputs, outputs, kernel: 3, stride, groups };
        [ConvSize::pointwise(inputs, outputs), grouped, ConvSize::pointwise(outputs, outputs)]
    }

    fn tally(self, tally: &mut Tally) {
        let [enter, group, leave] = self.body();
        self.project().iter().for_each(|project| tally.shortcut(*project));
        tally.convolution(enter);
        tally.convolution(group);
        tally.linear(1, self.outputs, quarter(self.inputs));
        tally.linear(1, quarter(self.inputs), self.outputs);
        tally.convolution(leave);
    }
}

/// Bottleneck with squeeze-and-excitation and a residual (arXiv:2003.13678, Fig. 4).
#[derive(Debug)]
struct Block {
    project: Option<ConvNorm>,
    enter: ConvNorm,
    group: ConvNorm,
    excite: SqueezeExcite,
    leave: ConvNorm,
}

impl Block {
    fn new(scope: &Scope<'_, '_>, size: BlockSize) -> Block {
        let layer =
            |scope: Scope<'_, '_>, size| ConvNorm::new(&scope, size, NormConstants::DEFAULT);
        // Precedes `f` in the state dict.
        let project = size.project().map(|size| layer(scope / "proj", size));
        let body = scope / "f";
        let [enter, group, leave] = size.body();
        let hidden = quarter(size.inputs);
        Block {
            project,
            enter: layer(&body / "a", enter),
            group: layer(&body / "b", group),
            excite: SqueezeExcite::new(&(&body / "se"), size.outputs, hidden, Gate::Sigmoid),
            leave: layer(&body / "c", leave),
        }
    }

    /// `[B, C, H, W]` to `[B, C′, H/stride, W/stride]`.
    fn forward(&self, x: &Tensor, mode: Mode) -> Tensor {
        let body = self.enter.forward_relu(x, mode); // [B, C′, H, W]
        let body = self.group.forward_relu(&body, mode); // [B, C′, H/stride, W/stride]
        let shortcut = match &self.project {
            Some(project) => project.forward(x, mode),
            None => x.shallow_clone(),
        };
        self.leave.forward_add_relu(&self.excite.forward(&body), &shortcut, mode)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_squeeze_width_rounds_half_to_even() {
        let widths = [32, 48, 104, 208, 440, 30, 50, 51];
        assert_eq!(widths.map(quarter), [8, 12, 26, 52, 110, 8, 12, 13]);
    }
}
