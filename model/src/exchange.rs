//! Attention between the two branches (arXiv:2306.11248, Fig. 2): the latent code reads the image features
//! (X→Z) and writes to them (Z→X).
//!
//! Axes: B batch, N latent tokens, C channels, H and W the features' height and width.

use tch::{Device, Tensor};

use crate::attention::{CrossAttention, CrossWidths, Mlp};
use crate::init::Init;
use crate::layers::{Conv2d, ConvSize, Mode};
use crate::params::Scope;

/// The latents read a 7×7 summary of the features.
const GRID: i64 = 7;

/// Tokens of that summary.
pub(crate) const GRID_TOKENS: i64 = GRID * GRID;

/// The convolution that precedes the summary.
pub(crate) fn depthwise_size(width: i64) -> ConvSize {
    ConvSize::depthwise(width, 7, 1)
}

/// Channels inside the attention that writes to features of `features` channels.
pub(crate) fn write_width(features: i64) -> i64 {
    features / 8
}

/// Lets the latent code read the image features: an X→Z arrow.
#[derive(Debug)]
pub(crate) struct LatentRead {
    depthwise: Option<Conv2d>,
    attention: CrossAttention,
    mlp: Mlp,
}

impl LatentRead {
    /// `stage` counts from 1; `width` is C of both branches.
    pub(crate) fn new(
        root: &Scope<'_, '_>,
        stage: usize,
        width: i64,
        with_dwc: bool,
        dropout: f64,
    ) -> LatentRead {
        let convolution = || {
            let size = depthwise_size(width);
            Conv2d::biased(&(root / &format!("dwc{stage}_x2z")), size, Init::fan_in(7 * 7))
        };
        let depthwise = with_dwc.then(convolution);
        let scope = root / &format!("cross_att{stage}_x2z");
        let widths = CrossWidths { query: width, source: width, inner: width };
        LatentRead {
            depthwise,
            attention: CrossAttention::new(
                &(&scope / "cross_attn"),
                widths,
                Some(GRID_TOKENS),
                dropout,
            ),
            mlp: Mlp::new(&(&scope / "mlp"), width, 1, dropout),
        }
    }

    /// `z` `[B, N, C]` and `x` `[B, C, H, W]` to the updated latents `[B, N, C]`.
    pub(crate) fn forward(&self, z: &Tensor, x: &Tensor, mode: Mode) -> Tensor {
        let grid = match &self.depthwise {
            Some(convolution) if pools_first(x) => pooled_then_convolved(x, convolution),
            Some(convolution) => tokens(&summary(&(convolution.forward(x) + x))),
            None => tokens(&summary(x)),
        }; // [B, 49, C]
        let z = z + self.attention.forward(z, &grid, mode);
        &z + self.mlp.forward(&z, mode)
    }
}

/// Whether [`pooled_then_convolved`] is the faster way, and bits need not be the same on other devices.
fn pools_first(x: &Tensor) -> bool {
    const PLACES_MIN: i64 = 28 * 28;
    let size = x.size();
    x.device() == Device::Cpu && size[2] * size[3] >= PLACES_MIN
}

/// `summary(convolution(x) + x)` as tokens, `[B, C, H, W]` to `[B, 49, C]`, without a convolution.
///
/// Convolution and averages are linear, so the cells of the shifted map can be averaged first, for each of the
/// 7×7 shifts: two matrix products, where a depth-wise convolution of the whole map, forwards and above all
/// backwards, is the slowest there is. The kernel then weighs 49 numbers a cell.
fn pooled_then_convolved(x: &Tensor, convolution: &Conv2d) -> Tensor {
    let [batch, width, height, length] = x.size()[..] else { panic!("[B, C, H, W]") };
    let shifts = |side: i64| shifted_cell_weights(side).to_kind(x.kind()); // [7·7, side]
    let pixels = x.permute([0, 2, 3, 1]).reshape([batch, height, length * width]);
    let rows = shifts(height).expand([batch, -1, -1], false).bmm(&pixels); // [B, 7·7, W·C]
    let rows = rows.view([batch * GRID_TOKENS, length, width]);
    let cells = shifts(length).expand([batch * GRID_TOKENS, -1, -1], false).bmm(&rows);
    let cells = cells.view([batch, GRID, GRID, GRID, GRID, width]); // cell, shift, cell, shift, C
    let kernel = convolution.weight().squeeze_dim(1).permute([1, 2, 0]); // [7, 7, C]
    let kernel = kernel + centre().to_kind(x.kind()); // The map itself is added to the convolution.
    let weighed = cells * kernel.unsqueeze(1); // kernel [7, 1, 7, C] on shift, cell, shift, C
    let grid = weighed.sum_dim_intlist([2_i64, 4].as_slice(), false, None); // [B, 7, 7, C]
    let grid = grid.view([batch, GRID_TOKENS, width]);
    convolution.bias().map_or_else(|| grid.shallow_clone(), |bias| &grid + bias)
}

/// `[7·7, side]`: row (cell, shift) averages the places of the cell, each moved by shift - 3; what lies outside
/// of the map counts as zero.
fn shifted_cell_weights(side: i64) -> Tensor {
    let cells = cell_weights(side).pad([GRID / 2, GRID / 2], "constant", 0.0); // [7, side + 6]
    let shifted = |shift: i64| cells.narrow(1, GRID - 1 - shift, side); // [7, side]
    Tensor::stack(&Vec::from_iter((0..GRID).map(shifted)), 1).view([GRID_TOKENS, side])
}

/// `[7, 7, 1]`: one at the middle.
fn centre() -> Tensor {
    let mut values = [0.0_f64; 49];
    values[24] = 1.0;
    Tensor::from_slice(&values).view([GRID, GRID, 1])
}

/// Averages over a grid of 7×7 cells: `[B, C, H, W]` to `[B, C, 7, 7]`.
fn summary(x: &Tensor) -> Tensor {
    if x.device().is_cuda() {
        // There the backward of the pooling operation is not deterministic.
        summary_by_products(x)
    } else {
        x.adaptive_avg_pool2d([GRID, GRID])
    }
}

/// [`summary`] as two matrix products.
fn summary_by_products(x: &Tensor) -> Tensor {
    let size = x.size();
    let cells = |length: i64| cell_weights(length).to_kind(x.kind()).to_device(x.device());
    cells(size[2]).matmul(&x.matmul(&cells(size[3]).tr()))
}

/// `[7, length]`: cell i is the mean of places ⌊i·length/7⌋ to ⌈(i+1)·length/7⌉ - 1.
fn cell_weights(length: i64) -> Tensor {
    let weight = |cell: i64, place: i64| {
        let (start, end) = (cell * length / GRID, ((cell + 1) * length + GRID - 1) / GRID);
        if (start..end).contains(&place) { 1.0 / (end - start) as f64 } else { 0.0 }
    };
    let row = |cell: i64| (0..length).map(move |place| weight(cell, place));
    let weights: Vec<f64> = (0..GRID).flat_map(row).collect();
    Tensor::from_slice(&weights).view([GRID, length])
}

/// Lets the latent code write to the image features: a Z→X arrow.
#[derive(Debug)]
pub(crate) struct FeatureWrite {
    attention: CrossAttention,
    mlp: Mlp,
}

impl FeatureWrite {
    /// `features` and `latents` are the branches' channels.
    pub(crate) fn new(
        scope: &Scope<'_, '_>,
        features: i64,
        latents: i64,
        dropout: f64,
    ) -> FeatureWrite {
        let widths = CrossWidths { query: features, source: latents, inner: write_width(features) };
        FeatureWrite {
            attention: CrossAttention::new(&(scope / "cross_attn"), widths, None, dropout),
            mlp: Mlp::new(&(scope / "mlp"), features, 1, dropout),
        }
    }

    /// `x` `[B, C, H, W]` and `z` `[B, N, C′]` to the updated features `[B, C, H, W]`.
    pub(crate) fn forward(&self, x: &Tensor, z: &Tensor, mode: Mode) -> Tensor {
        let size = x.size();
        let x = tokens(x); // [B, H·W, C]
        let x = &x + self.attention.forward(&x, z, mode);
        let x = &x + self.mlp.forward(&x, mode);
        x.transpose(1, 2).unflatten(2, [size[2], size[3]])
    }
}

/// `[B, C, H, W]` to `[B, H·W, C]`, row by row.
fn tokens(x: &Tensor) -> Tensor {
    x.flatten(2, 3).transpose(1, 2)
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use tch::Kind;

    use super::*;
    use crate::params::{Layout, Registry, Weights};

    #[test]
    fn matrix_products_pool_as_the_pooling_operation_does() {
        libtorch::init(1).expect("starts");
        for (height, width) in [(56, 56), (16, 16), (14, 9), (2, 4), (1, 7)] {
            let values = Tensor::arange(2 * 3 * height * width, (Kind::Double, Device::Cpu)).sin();
            let x = values.view([2, 3, height, width]);
            let difference = (summary_by_products(&x) - summary(&x)).abs().max();
            assert!(difference.double_value(&[]) < 1e-14, "{height}×{width}");
        }
    }

    #[test]
    fn pooling_before_the_convolution_gives_the_same_forwards_and_backwards() {
        libtorch::init(1).expect("starts");
        let values = |shape: &[i64], phase: f64| {
            let count: i64 = shape.iter().product();
            let angles = Tensor::arange(count, (Kind::Double, Device::Cpu)) + phase;
            (angles * 12.9898).sin().view(shape)
        };
        let state: [(&str, &[i64]); 2] = [("dwc.weight", &[5, 1, 7, 7]), ("dwc.bias", &[5])];
        let layout = std::sync::Arc::new(Layout::of_state(state));
        let mut weights = Weights::zeros(layout, Kind::Double, Device::Cpu);
        for (name, shape) in state {
            weights.set_value(name, &values(shape, 0.7)).expect("it fits");
        }
        let registry = RefCell::new(Registry::over(&weights));
        let scope = &Scope::root(&registry) / "dwc";
        let convolution = Conv2d::biased(&scope, depthwise_size(5), Init::Zeros);
        let leaves = registry.into_inner().into_leaves();
        for (height, length) in [(56, 56), (15, 22), (14, 14), (9, 30)] {
            let x = values(&[2, 5, height, length], 0.1).set_requires_grad(true);
            let probe = values(&[2, GRID_TOKENS, 5], 0.4);
            let run = |grid: Tensor| {
                let mut inputs: Vec<Tensor> = leaves.iter().map(Tensor::shallow_clone).collect();
                inputs.push(x.shallow_clone());
                let count: usize = inputs.iter().map(Tensor::numel).sum();
                let mut flat = Tensor::zeros([count as i64], (Kind::Double, Device::Cpu));
                let loss = (&grid * &probe).sum(Kind::Double);
                libtorch::gradients_into(&loss, &inputs, &mut flat).expect("has gradients");
                (grid.detach(), flat)
            };
            let direct = run(tokens(&summary(&(convolution.forward(&x) + &x))));
            let pooled = run(pooled_then_convolved(&x, &convolution));
            for (direct, pooled) in [(direct.0, pooled.0), (direct.1, pooled.1)] {
                let difference = (direct - pooled).abs().max().double_value(&[]);
                assert!(difference < 1e-13, "{height}×{length}: {difference}");
            }
        }
    }
}
