//! The loss of all exits, with the merge exit as teacher of the others (arXiv:2306.11248, §3.3 and Eq. 3).
//!
//! Axes: B batch, K classes.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::exit::Exits;

/// The weights of the losses. Defaults are those of the published recipes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LossConfig {
    /// Factor of the CNN exit's cross-entropy. Default 1.
    pub cnn_factor: f64,
    /// Factor of both latent exits' cross-entropies. Default 0.5.
    pub att_factor: f64,
    /// Factor of the merge exit's cross-entropy. Default 1.
    pub merge_factor: f64,
    /// Probability that hard labels give to all classes together. Default 0.1.
    pub label_smoothing: f64,
    /// Whether the merge exit teaches the others. Default true.
    pub with_kd: bool,
    /// Temperature of teacher and students. Default 1.
    pub kd_temperature: f64,
    /// Factor of the teaching loss, which is added to the cross-entropies. Default 0.5.
    pub kd_alpha: f64,
}

impl Default for LossConfig {
    fn default() -> LossConfig {
        LossConfig {
            cnn_factor: 1.0,
            att_factor: 0.5,
            merge_factor: 1.0,
            label_smoothing: 0.1,
            with_kd: true,
            kd_temperature: 1.0,
            kd_alpha: 0.5,
        }
    }
}

/// What the exits should say.
#[derive(Debug, Clone, Copy)]
pub enum Targets<'t> {
    /// Classes `[B]`, i64; the configured smoothing applies.
    Labels(&'t Tensor),
    /// Probabilities `[B, K]` of the logits' kind, as mixup makes them; no smoothing is added.
    Soft(&'t Tensor),
}

/// The losses of one micro-batch, each a mean over B.
#[derive(Debug)]
pub struct Losses {
    /// What to take the gradient of: a scalar.
    pub total: Tensor,
    /// Cross-entropy of each exit, `[4]`, detached.
    pub cross_entropy: Tensor,
    /// Divergence from the teacher, times T², of the exits `early3`, `att` and `cnn`: `[3]`, detached. Zeros
    /// without teaching.
    pub teaching: Tensor,
}

/// The loss of all exits: `Σ fᵢ CE(yᵢ) + α Σ T² KL(softmax(y₃/T) ‖ softmax(yₛ/T))`, means over B.
///
/// The teacher y₃ is detached. All exits are one tensor `[4, B, K]`, so that each operation is done once.
///
/// # Panics
/// If the targets' shape or kind does not fit the logits.
pub fn multi_exit(exits: &Exits, targets: Targets<'_>, config: &LossConfig) -> Losses {
    let logits = exits.stacked(); // [4, B, K]
    let log_probabilities = logits.log_softmax(-1, None);
    let target = match targets {
        Targets::Labels(labels) => smoothed(labels, config.label_smoothing, &logits),
        Targets::Soft(target) => target.shallow_clone(),
    }; // [B, K]
    let cross_entropy = mean_over_batch(&(&log_probabilities * target)).neg(); // [4]
    let factors = [config.att_factor, config.att_factor, config.cnn_factor, config.merge_factor];
    // Made where they are used: a copy from the host cannot be a part of a graph.
    let factor = |value: &f64| Tensor::full([1], *value, (logits.kind(), logits.device()));
    let factors = Tensor::cat(&factors.each_ref().map(factor), 0); // [4]
    let supervised = cross_entropy.dot(&factors);

    if !config.with_kd {
        let teaching = Tensor::zeros([3], (logits.kind(), logits.device()));
        return Losses { total: supervised, cross_entropy: cross_entropy.detach(), teaching };
    }
    let temperature = config.kd_temperature;
    let tempered = if temperature == 1.0 {
        log_probabilities
    } else {
        (logits / temperature).log_softmax(-1, None)
    };
    let teacher = tempered.select(0, 3).detach(); // [B, K], log p
    let students = tempered.narrow(0, 0, 3); // [3, B, K], log q
    let divergence = mean_over_batch(&(teacher.exp() * (&teacher - students))); // [3]
    let teaching = divergence * (temperature * temperature);
    Losses {
        total: supervised + teaching.sum(None) * config.kd_alpha,
        cross_entropy: cross_entropy.detach(),
        teaching: teaching.detach(),
    }
}

/// `[E, B, K]` summed over K and averaged over B: `[E]`.
fn mean_over_batch(x: &Tensor) -> Tensor {
    x.sum_dim_intlist([1_i64, 2].as_slice(), false, None) / x.size()[1]
}

/// Probabilities `[B, K]` that give `1 - s + s/K` to the label and `s/K` to each other class.
fn smoothed(labels: &Tensor, smoothing: f64, logits: &Tensor) -> Tensor {
    let classes = logits.size()[2];
    let rest = smoothing / classes as f64;
    // `one_hot` would wait for the largest label.
    let places = Tensor::arange(classes, (Kind::Int64, labels.device()));
    let hot = labels.unsqueeze(-1).eq_tensor(&places); // [B, K]
    hot.to_kind(logits.kind()) * (1.0 - smoothing) + rest
}
