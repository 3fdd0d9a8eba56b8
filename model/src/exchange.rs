//! Attention between the two branches (arXiv:2306.11248, Fig. 2): the latent code reads the image features
//! (X→Z) and writes to them (Z→X).
//!
//! Axes: B batch, N latent tokens, C channels, H and W the features' height and width.

use tch::Tensor;

use crate::attention::{CrossAttention, CrossWidths, Mlp};
use crate::init::Init;
use crate::layers::{Conv2d, ConvSize, Mode};
use crate::params::Scope;
use crate::{fused, neighbourhood, products};

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
        let grid =
            match self.depthwise.as_ref().map(|convolution| (convolution, convolution.tensors())) {
                Some((_, (weight, Some(bias)))) if fused::takes(x) => {
                    neighbourhood::summary(x, weight, bias)
                }
                Some((_, (weight, Some(bias)))) if products::take(x) => {
                    products::summary(x, weight, bias)
                }
                Some((convolution, _)) => summary(&(convolution.forward(x) + x)),
                None => summary(x),
            }; // [B, C, 7, 7]
        let z = z + self.attention.forward(z, &tokens(&grid), mode);
        &z + self.mlp.forward(&z, mode)
    }
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
    let cells = |length: i64| products::window_means(length, 1, (x.kind(), x.device()));
    cells(size[2]).matmul(&x.matmul(&cells(size[3]).tr()))
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
    use tch::{Device, Kind};

    use super::*;

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
}
