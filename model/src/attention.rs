//! Multi-head attention and the MLP that follows it (Dyn-Perceiver, arXiv:2306.11248, §3.2; after
//! Perceiver IO, arXiv:2107.14795).
//!
//! Axes: B batch, N query tokens, L key tokens, C channels, H heads, D = width / H.

use tch::Tensor;

use crate::init::Init;
use crate::layers::{Dropout, LayerNorm, Linear, Mode};
use crate::params::Scope;

/// `softmax(q kᵀ / √D) v` for `q` `[B, H, N, D]` and `k`, `v` `[B, H, L, D]`, heads joined: `[B, N, H·D]`.
fn attend(q: &Tensor, k: &Tensor, v: &Tensor, dropout: &Dropout, mode: Mode) -> Tensor {
    // The fused kernel draws its own dropout, and on CUDA its backward is not deterministic.
    let read = if q.device().is_cuda() || dropout.is_active(mode) {
        attend_stepwise(q, k, v, dropout, mode)
    } else {
        Tensor::scaled_dot_product_attention(q, k, v, None::<&Tensor>, 0.0, false, None, false)
    }; // [B, H, N, D]
    read.transpose(1, 2).flatten(2, 3)
}

/// [`attend`] with heads apart, one operation at a time.
fn attend_stepwise(q: &Tensor, k: &Tensor, v: &Tensor, dropout: &Dropout, mode: Mode) -> Tensor {
    let scale = 1.0 / (head_width(q) as f64).sqrt();
    let weights = (q.matmul(&k.transpose(-2, -1)) * scale).softmax(-1, None); // [B, H, N, L]
    dropout.forward(weights, mode).matmul(v)
}

fn head_width(heads: &Tensor) -> i64 {
    heads.size()[3]
}

/// `[B, N, H·D]` to `[B, H, N, D]`.
fn split_heads(x: &Tensor, heads: i64) -> Tensor {
    x.unflatten(-1, [heads, -1]).transpose(1, 2)
}

/// Attention of tokens among themselves, pre-norm, without the residual.
#[derive(Debug)]
pub(crate) struct SelfAttention {
    norm: LayerNorm,
    query_key_value: Linear,
    output: Linear,
    heads: i64,
    dropout_weights: Dropout,
    dropout_output: Dropout,
}

impl SelfAttention {
    pub(crate) fn new(
        scope: &Scope<'_, '_>,
        width: i64,
        heads: i64,
        dropout: f64,
    ) -> SelfAttention {
        let attention = scope / "attention";
        SelfAttention {
            norm: LayerNorm::new(&(scope / "norm"), width),
            query_key_value: Linear::stacked(
                &attention,
                &["q_proj", "k_proj", "v_proj"],
                width,
                width,
            ),
            output: Linear::new(&(&attention / "o_proj"), width, width),
            heads,
            dropout_weights: Dropout::new(&attention, "dropout", dropout),
            dropout_output: Dropout::new(scope, "dropout", dropout),
        }
    }

    /// `[B, N, C]` to `[B, N, C]`.
    pub(crate) fn forward(&self, z: &Tensor, mode: Mode) -> Tensor {
        let joint = self.query_key_value.forward(&self.norm.forward(z)); // [B, N, 3C]
        let [q, k, v] = thirds(&joint).map(|part| split_heads(&part, self.heads)); // [B, H, N, D]
        let read = attend(&q, &k, &v, &self.dropout_weights, mode); // [B, N, C]
        self.dropout_output.forward(self.output.forward(&read), mode)
    }
}

/// The three equal parts of the last axis.
fn thirds(x: &Tensor) -> [Tensor; 3] {
    x.chunk(3, -1).try_into().expect("three parts were asked for")
}

/// Widths of a [`CrossAttention`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct CrossWidths {
    /// Channels of the tokens that ask, and of the result.
    pub(crate) query: i64,
    /// Channels of the tokens that answer.
    pub(crate) source: i64,
    /// Channels inside, of queries, keys and values.
    pub(crate) inner: i64,
}

/// One-head attention of tokens to others, pre-norm on both, without the residual.
#[derive(Debug)]
pub(crate) struct CrossAttention {
    query_norm: LayerNorm,
    source_norm: LayerNorm,
    /// Added to the projected keys, not to the logits; `[1, L, inner]`.
    position: Option<Tensor>,
    query: Linear,
    key_value: Linear,
    output: Linear,
    dropout_weights: Dropout,
    dropout_output: Dropout,
}

impl CrossAttention {
    /// `positions`: the fixed number of source tokens, if each has a learned key offset.
    pub(crate) fn new(
        scope: &Scope<'_, '_>,
        widths: CrossWidths,
        positions: Option<i64>,
        dropout: f64,
    ) -> CrossAttention {
        let attention = scope / "attention";
        let CrossWidths { query, source, inner } = widths;
        CrossAttention {
            query_norm: LayerNorm::new(&(scope / "q_norm"), query),
            source_norm: LayerNorm::new(&(scope / "kv_norm"), source),
            position: positions.map(|tokens| {
                attention.param("relative_position_bias", &[1, tokens, inner], Init::Zeros)
            }),
            query: Linear::unbiased(&(&attention / "q_proj"), query, inner),
            key_value: Linear::stacked(&attention, &["k_proj", "v_proj"], source, inner),
            output: Linear::new(&(&attention / "o_proj"), inner, query),
            dropout_weights: Dropout::new(&attention, "dropout", dropout),
            dropout_output: Dropout::new(scope, "dropout", dropout),
        }
    }

    /// `asking` `[B, N, query]` and `source` `[B, L, source]` to `[B, N, query]`.
    pub(crate) fn forward(&self, asking: &Tensor, source: &Tensor, mode: Mode) -> Tensor {
        let q = self.query.forward(&self.query_norm.forward(asking)); // [B, N, inner]
        let joint = self.key_value.forward(&self.source_norm.forward(source)); // [B, L, 2·inner]
        let [k, v] = halves(&joint); // [B, L, inner]
        let k = match &self.position {
            Some(position) => k + position,
            None => k,
        };
        let [q, k, v] = [q, k, v].map(|part| part.unsqueeze(1)); // one head: [B, 1, ·, inner]
        let read = attend(&q, &k, &v, &self.dropout_weights, mode); // [B, N, inner]
        self.dropout_output.forward(self.output.forward(&read), mode)
    }
}

/// The two equal parts of the last axis.
fn halves(x: &Tensor) -> [Tensor; 2] {
    x.chunk(2, -1).try_into().expect("two parts were asked for")
}

/// LayerNorm, two linear layers, and GELU between them, without the residual.
#[derive(Debug)]
pub(crate) struct Mlp {
    norm: LayerNorm,
    widen: Linear,
    narrow: Linear,
    dropout: Dropout,
}

impl Mlp {
    /// `widening`: hidden width in units of `width`.
    pub(crate) fn new(scope: &Scope<'_, '_>, width: i64, widening: i64, dropout: f64) -> Mlp {
        Mlp {
            norm: LayerNorm::new(&(scope / "layernorm"), width),
            widen: Linear::new(&(scope / "fc1"), width, widening * width),
            narrow: Linear::new(&(scope / "fc2"), widening * width, width),
            dropout: Dropout::new(scope, "dropout", dropout),
        }
    }

    /// `[B, N, C]` to `[B, N, C]`.
    pub(crate) fn forward(&self, x: &Tensor, mode: Mode) -> Tensor {
        let hidden = self.widen.forward(&self.norm.forward(x)).gelu("none"); // [B, N, widening·C]
        self.dropout.forward(self.narrow.forward(&hidden), mode)
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::params::Registry;

    #[test]
    fn fused_and_stepwise_attention_agree() {
        libtorch::init(1).expect("starts");
        let heads = |tokens: i64, phase: f64| {
            let angles = Tensor::arange(2 * 4 * tokens * 6, (Kind::Double, Device::Cpu)) + phase;
            (angles * 12.9898).sin().view([2, 4, tokens, 6])
        };
        let (q, k, v) = (heads(5, 0.1), heads(9, 0.2), heads(9, 0.3));
        let registry = std::cell::RefCell::new(Registry::default());
        let off = Dropout::new(&Scope::root(&registry), "dropout", 0.0);
        let fused = attend(&q, &k, &v, &off, Mode::Eval);
        let stepwise = attend_stepwise(&q, &k, &v, &off, Mode::Eval);
        let stepwise = stepwise.transpose(1, 2).flatten(2, 3);
        assert!((fused - stepwise).abs().max().double_value(&[]) < 1e-14);
    }
}
