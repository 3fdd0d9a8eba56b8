//! MobileNetV3-Large (Howard et al., arXiv:1905.02244, Table 1) in six widths, as Dyn-Perceiver uses it
//! (SPEC §3.3): all 17 features, cut into a stem and four stages.
//!
//! Axes: B batch, C channels, H and W height and width.

use std::ops::Range;

use tch::Tensor;

use super::blocks::{ConvNorm, Gate, SqueezeExcite};
use crate::cost::Tally;
use crate::init::Init;
use crate::layers::{ConvSize, Mode, NormConstants};
use crate::params::Scope;

/// The family's BatchNorm.
const NORM: NormConstants = NormConstants { epsilon: 1e-3, momentum: 0.01, scale: Init::Ones };

/// The sizes of a MobileNetV3-Large.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MobileNetSpec {
    /// The width multiplier, in quarters.
    pub(crate) quarters: i64,
}

/// A row of the paper's Table 1 at width 1.
#[derive(Debug, Clone, Copy)]
struct Row {
    inputs: i64,
    expanded: i64,
    outputs: i64,
    kernel: i64,
    excite: bool,
    act: Act,
    stride: i64,
}

/// The non-linearity of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Act {
    Relu,
    /// `x · min(max(x + 3, 0), 6) / 6`
    HardSwish,
}

impl Act {
    fn apply(self, mut x: Tensor) -> Tensor {
        match self {
            Act::Relu => x.relu_(),
            Act::HardSwish => x.hardswish(),
        }
    }
}

/// Features 1 to 15: inputs, expanded, outputs, kernel, squeeze-and-excitation, non-linearity, stride.
const ROWS: [Row; 15] = [
    row(16, 16, 16, 3, false, Act::Relu, 1),
    row(16, 64, 24, 3, false, Act::Relu, 2),
    row(24, 72, 24, 3, false, Act::Relu, 1),
    row(24, 72, 40, 5, true, Act::Relu, 2),
    row(40, 120, 40, 5, true, Act::Relu, 1),
    row(40, 120, 40, 5, true, Act::Relu, 1),
    row(40, 240, 80, 3, false, Act::HardSwish, 2),
    row(80, 200, 80, 3, false, Act::HardSwish, 1),
    row(80, 184, 80, 3, false, Act::HardSwish, 1),
    row(80, 184, 80, 3, false, Act::HardSwish, 1),
    row(80, 480, 112, 3, true, Act::HardSwish, 1),
    row(112, 672, 112, 3, true, Act::HardSwish, 1),
    row(112, 672, 160, 5, true, Act::HardSwish, 2),
    row(160, 960, 160, 5, true, Act::HardSwish, 1),
    row(160, 960, 160, 5, true, Act::HardSwish, 1),
];

const fn row(
    inputs: i64,
    expanded: i64,
    outputs: i64,
    kernel: i64,
    excite: bool,
    act: Act,
    stride: i64,
) -> Row {
    Row { inputs, expanded, outputs, kernel, excite, act, stride }
}

/// The rows of the stem.
const STEM_ROWS: Range<usize> = 0..2;

/// The rows of each stage; the last stage ends with one more convolution.
const STAGE_ROWS: [Range<usize>; 4] = [2..4, 4..7, 7..13, 13..15];

impl MobileNetSpec {
    /// A width of the table, scaled.
    fn scaled(&self, width: i64) -> i64 {
        multiple_of_eight(width * self.quarters)
    }

    /// C1 to C4, and Cout.
    pub(crate) fn widths(&self) -> [i64; 5] {
        let first = |stage: usize| self.scaled(ROWS[STAGE_ROWS[stage].start].inputs);
        [first(0), first(1), first(2), first(3), self.last().outputs]
    }

    /// Hidden width of both classifiers of the features.
    pub(crate) fn head_hidden(&self) -> i64 {
        self.scaled(1280)
    }

    /// The first convolution.
    fn first(&self) -> ConvSize {
        ConvSize { inputs: 3, outputs: self.scaled(16), kernel: 3, stride: 2, groups: 1 }
    }

    /// The last convolution.
    fn last(&self) -> ConvSize {
        let width = self.scaled(160);
        ConvSize::pointwise(width, 6 * width)
    }

    fn blocks(&self, rows: Range<usize>) -> impl Iterator<Item = BlockSize> {
        ROWS[rows].iter().map(|row| {
            let expanded = self.scaled(row.expanded);
            BlockSize {
                inputs: self.scaled(row.inputs),
                expanded,
                outputs: self.scaled(row.outputs),
                kernel: row.kernel,
                squeezed: row.excite.then(|| multiple_of_eight(expanded / 4 * 4)),
                act: row.act,
                stride: row.stride,
            }
        })
    }

    pub(crate) fn tally_stem(&self, tally: &mut Tally) {
        tally.convolution(self.first());
        self.blocks(STEM_ROWS).for_each(|block| block.tally(tally));
    }

    pub(crate) fn tally_stage(&self, stage: usize, tally: &mut Tally) {
        self.blocks(STAGE_ROWS[stage].clone()).for_each(|block| block.tally(tally));
        if stage == 3 {
            tally.convolution(self.last());
        }
    }
}

/// The multiple of 8 that is nearest to `quarters / 4`, at least 8 and not more than a tenth below it.
fn multiple_of_eight(quarters: i64) -> i64 {
    let nearest = ((quarters + 16) / 32 * 8).max(8);
    if 40 * nearest < 9 * quarters { nearest + 8 } else { nearest }
}

/// A MobileNetV3.
#[derive(Debug)]
pub(crate) struct MobileNet {
    first: ConvNorm,
    stem: Vec<Block>,
    stages: [Vec<Block>; 4],
    last: ConvNorm,
}

impl MobileNet {
    pub(crate) fn new(root: &Scope<'_, '_>, spec: &MobileNetSpec) -> MobileNet {
        let blocks = |scope: &Scope<'_, '_>, rows: Range<usize>, first: usize| -> Vec<Block> {
            let numbered = (first..).zip(spec.blocks(rows));
            numbered.map(|(index, size)| Block::new(&(scope / &index.to_string()), size)).collect()
        };
        let stem = root / "cnn_stem";
        let first = ConvNorm::new(&(&stem / "0"), spec.first(), NORM);
        let stem = blocks(&stem, STEM_ROWS, 1);
        let stage_scope = |stage: usize| root / &format!("cnn_body_stage{}", stage + 1);
        let stages =
            std::array::from_fn(|stage| blocks(&stage_scope(stage), STAGE_ROWS[stage].clone(), 0));
        let place = STAGE_ROWS[3].len().to_string();
        let last = ConvNorm::new(&(&stage_scope(3) / &place), spec.last(), NORM);
        MobileNet { first, stem, stages, last }
    }

    /// All convolutions with their BatchNorm.
    pub(crate) fn convolutions(&mut self) -> Vec<&mut ConvNorm> {
        let blocks = self.stem.iter_mut().chain(self.stages.iter_mut().flatten());
        let blocks = blocks.flat_map(|block| {
            let Block { expand, depthwise, excite: _, project, act: _, residual: _ } = block;
            expand.iter_mut().chain([depthwise, project])
        });
        [&mut self.first, &mut self.last].into_iter().chain(blocks).collect()
    }

    /// `[B, 3, S, S]` to `[B, C1, S/4, S/4]`.
    pub(crate) fn stem(&self, images: &Tensor, mode: Mode) -> Tensor {
        let x = self.first.forward(images, mode).hardswish(); // [B, C, S/2, S/2]
        run(&self.stem, x, mode)
    }

    /// `[B, C, H, W]` to `[B, C′, H/2, W/2]`, in stage 4 to `[B, C′, H, W]`.
    pub(crate) fn stage(&self, stage: usize, x: &Tensor, mode: Mode) -> Tensor {
        let x = run(&self.stages[stage], x.shallow_clone(), mode);
        if stage == 3 { self.last.forward(&x, mode).hardswish() } else { x }
    }
}

fn run(blocks: &[Block], x: Tensor, mode: Mode) -> Tensor {
    blocks.iter().fold(x, |x, block| block.forward(&x, mode))
}

/// The sizes of a [`Block`].
#[derive(Debug, Clone, Copy)]
struct BlockSize {
    inputs: i64,
    expanded: i64,
    outputs: i64,
    kernel: i64,
    /// Hidden width of the squeeze-and-excitation, if it has one.
    squeezed: Option<i64>,
    act: Act,
    stride: i64,
}

impl BlockSize {
    fn expand(self) -> Option<ConvSize> {
        let widens = self.expanded != self.inputs;
        widens.then_some(ConvSize::pointwise(self.inputs, self.expanded))
    }

    fn depthwise(self) -> ConvSize {
        ConvSize::depthwise(self.expanded, self.kernel, self.stride)
    }

    fn project(self) -> ConvSize {
        ConvSize::pointwise(self.expanded, self.outputs)
    }

    fn tally(self, tally: &mut Tally) {
        self.expand().iter().for_each(|expand| tally.convolution(*expand));
        tally.convolution(self.depthwise());
        self.squeezed.iter().for_each(|&hidden| {
            tally.linear(1, self.expanded, hidden);
            tally.linear(1, hidden, self.expanded);
        });
        tally.convolution(self.project());
    }
}

/// Inverted residual with a linear bottleneck (arXiv:1905.02244, Fig. 4).
#[derive(Debug)]
struct Block {
    expand: Option<ConvNorm>,
    depthwise: ConvNorm,
    excite: Option<SqueezeExcite>,
    project: ConvNorm,
    act: Act,
    residual: bool,
}

impl Block {
    fn new(scope: &Scope<'_, '_>, size: BlockSize) -> Block {
        let sequence = scope / "block";
        let mut index = 0;
        let mut next = || {
            let scope = &sequence / &index.to_string();
            index += 1;
            scope
        };
        let expand = size.expand().map(|size| ConvNorm::new(&next(), size, NORM));
        let depthwise = ConvNorm::new(&next(), size.depthwise(), NORM);
        let excite = size
            .squeezed
            .map(|hidden| SqueezeExcite::new(&next(), size.expanded, hidden, Gate::HardSigmoid));
        let project = ConvNorm::new(&next(), size.project(), NORM);
        let residual = size.stride == 1 && size.inputs == size.outputs;
        Block { expand, depthwise, excite, project, act: size.act, residual }
    }

    /// `[B, C, H, W]` to `[B, C′, ⌈H/stride⌉, ⌈W/stride⌉]`.
    fn forward(&self, x: &Tensor, mode: Mode) -> Tensor {
        let wide = match &self.expand {
            Some(expand) => self.act.apply(expand.forward(x, mode)), // [B, expanded, H, W]
            None => x.shallow_clone(),
        };
        let wide = self.act.apply(self.depthwise.forward(&wide, mode));
        let wide = match &self.excite {
            Some(excite) => excite.forward(&wide),
            None => wide,
        };
        let narrow = self.project.forward(&wide, mode);
        if self.residual { narrow + x } else { narrow }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widths_are_multiples_of_eight_that_lose_at_most_a_tenth() {
        // 24 at 0.75 is 18, whose nearest multiple, 16, is more than a tenth below.
        assert_eq!(MobileNetSpec { quarters: 3 }.widths(), [24, 32, 64, 120, 720]);
        assert_eq!(MobileNetSpec { quarters: 2 }.widths(), [16, 24, 40, 80, 480]);
        assert_eq!(MobileNetSpec { quarters: 4 }.widths(), [24, 40, 80, 160, 960]);
        assert_eq!(MobileNetSpec { quarters: 8 }.widths(), [48, 80, 160, 320, 1920]);
        assert_eq!(MobileNetSpec { quarters: 3 }.head_hidden(), 960);
    }
}
