//! The classification branch: a latent code of few tokens (arXiv:2306.11248, §3.2).
//!
//! Axes: B batch, N latent tokens, C channels.

use tch::Tensor;

use crate::attention::{Mlp, SelfAttention};
use crate::layers::{LayerNorm, Linear, Mode};
use crate::params::Scope;

/// The self-attention layers of one stage.
#[derive(Debug)]
pub(crate) struct LatentStage {
    layers: Vec<LatentLayer>,
}

/// Self-attention and MLP, each with its residual.
#[derive(Debug)]
struct LatentLayer {
    attention: SelfAttention,
    mlp: Mlp,
}

/// Sizes of a [`LatentStage`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct LatentSize {
    pub(crate) layers: usize,
    pub(crate) width: i64,
    pub(crate) heads: i64,
    pub(crate) widening: i64,
    pub(crate) dropout: f64,
}

impl LatentStage {
    pub(crate) fn new(scope: &Scope<'_, '_>, size: LatentSize) -> LatentStage {
        let LatentSize { layers, width, heads, widening, dropout } = size;
        let layer = |index: usize| {
            let scope = scope / &index.to_string();
            LatentLayer {
                attention: SelfAttention::new(&(&scope / "self_attn"), width, heads, dropout),
                mlp: Mlp::new(&(&scope / "mlp"), width, widening, dropout),
            }
        };
        LatentStage { layers: (0..layers).map(layer).collect() }
    }

    /// `[B, N, C]` to `[B, N, C]`.
    pub(crate) fn forward(&self, z: Tensor, mode: Mode) -> Tensor {
        self.layers.iter().fold(z, |z, layer| {
            let z = &z + layer.attention.forward(&z, mode);
            &z + layer.mlp.forward(&z, mode)
        })
    }
}

/// Between two stages the latent code gets fewer tokens and more channels.
#[derive(Debug)]
pub(crate) struct LatentTransition {
    token_norm: LayerNorm,
    mix_tokens: Linear,
    channel_norm: LayerNorm,
    expand_channels: Linear,
}

impl LatentTransition {
    /// All transitions; in the state dict the expanders precede the mixers.
    pub(crate) fn all(root: &Scope<'_, '_>, tokens: [i64; 4], widths: [i64; 4]) -> Vec<Self> {
        let layer = |list: &str, index: usize, size: [i64; 4]| {
            let scope = &(root / list) / &index.to_string();
            let norm = LayerNorm::new(&(&scope / "0"), size[index]);
            (norm, Linear::new(&(&scope / "1"), size[index], size[index + 1]))
        };
        let expanders: Vec<_> =
            (0..3).map(|index| layer("token_expander", index, widths)).collect();
        let mixers: Vec<_> = (0..3).map(|index| layer("token_mixer", index, tokens)).collect();
        let join = |((channel_norm, expand_channels), (token_norm, mix_tokens))| LatentTransition {
            token_norm,
            mix_tokens,
            channel_norm,
            expand_channels,
        };
        expanders.into_iter().zip(mixers).map(join).collect()
    }

    /// `[B, N, C]` to `[B, N/2, C′]`.
    pub(crate) fn forward(&self, z: &Tensor) -> Tensor {
        let by_channel = z.transpose(1, 2); // [B, C, N]
        let mixed = self.mix_tokens.forward(&self.token_norm.forward(&by_channel)); // [B, C, N/2]
        let z = mixed.transpose(1, 2); // [B, N/2, C]
        self.expand_channels.forward(&self.channel_norm.forward(&z))
    }
}
