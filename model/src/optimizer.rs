//! AdamW (Loshchilov and Hutter, arXiv:1711.05101) on flat tensors, and the clipping that precedes it.

use std::ops::Range;

use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};

use crate::elementwise::{Real, elements, elements_mut, is_double};
use crate::params::{Layout, to_i64};

/// The constants of AdamW. Rates come with each update.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdamWConfig {
    /// Decay of the first moment. Default 0.9.
    pub beta1: f64,
    /// Decay of the second moment. Default 0.999.
    pub beta2: f64,
    /// Added to the root of the second moment. Default 1e-8.
    pub epsilon: f64,
}

impl Default for AdamWConfig {
    fn default() -> AdamWConfig {
        AdamWConfig { beta1: 0.9, beta2: 0.999, epsilon: 1e-8 }
    }
}

/// One update's place and rates.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Update {
    /// The number of updates before this one: the step.
    pub step: u64,
    /// Learning rate.
    pub learning_rate: f64,
    /// Decoupled weight decay, for the parameters that have it.
    pub weight_decay: f64,
}

/// The optimizer: two moments, each as long as the flat parameters.
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    decay_len: usize,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
}

impl AdamW {
    /// Zero moments for parameters of a layout, of the kind and on the device of `params`.
    pub fn new(config: AdamWConfig, layout: &Layout, params: &Tensor) -> AdamW {
        let zeros =
            || Tensor::zeros([to_i64(layout.param_len())], (params.kind(), params.device()));
        AdamW { config, decay_len: layout.decay_len(), exp_avg: zeros(), exp_avg_sq: zeros() }
    }

    /// First and second moment, each `[P]` in flat order.
    pub fn moments(&self) -> [&Tensor; 2] {
        [&self.exp_avg, &self.exp_avg_sq]
    }

    /// First and second moment, to be restored in place.
    pub fn moments_mut(&mut self) -> [&mut Tensor; 2] {
        [&mut self.exp_avg, &mut self.exp_avg_sq]
    }

    /// Updates `params` `[P]` in place from `gradients` `[P]`:
    /// `p ← p (1 - lr wd)`, `m ← β1 m + (1 - β1) g`, `v ← β2 v + (1 - β2) g²`,
    /// `p ← p - lr/(1 - β1ᵗ) · m / (√v/√(1 - β2ᵗ) + ε)` with t = step + 1.
    ///
    /// # Panics
    /// If the tensors are not flat tensors of the layout, of one kind and device.
    pub fn step(&mut self, params: &mut Tensor, gradients: &Tensor, update: &Update) {
        let total = self.exp_avg.numel();
        let decayed = Coefficients::new(&self.config, update, update.weight_decay);
        let others = Coefficients::new(&self.config, update, 0.0);
        for (range, coefficients) in [(0..self.decay_len, decayed), (self.decay_len..total, others)]
        {
            match (params.device(), is_double(params)) {
                (Device::Cpu, false) => {
                    self.step_slices::<f32>(params, gradients, range, &coefficients);
                }
                (Device::Cpu, true) => {
                    self.step_slices::<f64>(params, gradients, range, &coefficients);
                }
                (_, _) => self.step_tensors(params, gradients, range, &coefficients),
            }
        }
    }

    fn step_slices<T: Real>(
        &mut self,
        params: &mut Tensor,
        gradients: &Tensor,
        range: Range<usize>,
        c: &Coefficients,
    ) {
        let keep = T::nearest(c.keep);
        let [beta1, rest1] = [c.beta1, 1.0 - c.beta1].map(T::nearest);
        let [beta2, rest2] = [c.beta2, 1.0 - c.beta2].map(T::nearest);
        let [rate, root, epsilon] = [c.rate, c.root, c.epsilon].map(T::nearest);
        let params = &mut elements_mut::<T>(params)[range.clone()];
        let gradients = &elements::<T>(gradients)[range.clone()];
        let first = &mut elements_mut::<T>(&mut self.exp_avg)[range.clone()];
        let second = &mut elements_mut::<T>(&mut self.exp_avg_sq)[range];
        assert_eq!(params.len(), gradients.len());
        for (((p, &g), m), v) in params.iter_mut().zip(gradients).zip(first).zip(second) {
            *m = beta1 * *m + rest1 * g;
            *v = beta2 * *v + rest2 * (g * g);
            *p = *p * keep - rate * (*m / (v.square_root() / root + epsilon));
        }
    }

    /// The same with whole-tensor operations, for devices whose memory the host does not see.
    fn step_tensors(
        &mut self,
        params: &mut Tensor,
        gradients: &Tensor,
        range: Range<usize>,
        c: &Coefficients,
    ) {
        let part = |tensor: &Tensor| tensor.narrow(0, to_i64(range.start), to_i64(range.len()));
        let (mut p, g) = (part(params), part(gradients));
        let (mut m, mut v) = (part(&self.exp_avg), part(&self.exp_avg_sq));
        tch::no_grad(|| {
            drop(m.g_mul_scalar_(c.beta1).g_add_(&(&g * (1.0 - c.beta1))));
            drop(v.g_mul_scalar_(c.beta2).g_add_(&(g.square() * (1.0 - c.beta2))));
            let scaled = (&m / (v.sqrt() / c.root + c.epsilon)) * c.rate;
            drop(p.g_mul_scalar_(c.keep).g_sub_(&scaled));
        });
    }
}

/// The scalars of one update, in f64.
#[derive(Debug, Clone, Copy)]
struct Coefficients {
    /// `1 - lr wd`
    keep: f64,
    beta1: f64,
    beta2: f64,
    /// `lr / (1 - β1ᵗ)`
    rate: f64,
    /// `√(1 - β2ᵗ)`
    root: f64,
    epsilon: f64,
}

impl Coefficients {
    fn new(config: &AdamWConfig, update: &Update, weight_decay: f64) -> Coefficients {
        let t = (update.step + 1) as f64;
        Coefficients {
            keep: 1.0 - update.learning_rate * weight_decay,
            beta1: config.beta1,
            beta2: config.beta2,
            rate: update.learning_rate / (1.0 - libm::pow(config.beta1, t)),
            root: (1.0 - libm::pow(config.beta2, t)).sqrt(),
            epsilon: config.epsilon,
        }
    }
}

/// The Euclidean norm of a flat tensor, summed in f64. It is not finite if an element is not.
pub fn global_norm(flat: &Tensor) -> f64 {
    match (flat.device(), is_double(flat)) {
        (Device::Cpu, false) => squares::<f32>(elements(flat)).sqrt(),
        (Device::Cpu, true) => squares::<f64>(elements(flat)).sqrt(),
        (_, _) => tch::no_grad(|| flat.square().sum(tch::Kind::Double).double_value(&[])).sqrt(),
    }
}

/// The sum of squares, in eight interleaved partial sums: an order that needs no particular processor.
fn squares<T: Real>(values: &[T]) -> f64 {
    let mut sums = [0.0; 8];
    let chunks = values.chunks_exact(8);
    for (sum, value) in sums.iter_mut().zip(chunks.remainder()) {
        *sum += value.widen() * value.widen();
    }
    for chunk in chunks {
        for (sum, value) in sums.iter_mut().zip(chunk) {
            *sum += value.widen() * value.widen();
        }
    }
    sums.iter().sum()
}

/// Scales a flat gradient down so that its norm is at most `norm_max`; returns the norm it had.
///
/// As PyTorch's `clip_grad_norm_`: the factor is `min(1, norm_max / (norm + 1e-6))`.
pub fn clip_norm(gradients: &mut Tensor, norm_max: f64) -> f64 {
    let norm = global_norm(gradients);
    let factor = norm_max / (norm + 1e-6);
    if factor < 1.0 {
        drop(tch::no_grad(|| gradients.g_mul_scalar_(factor)));
    }
    norm
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;
    use crate::config::{Architecture, ModelConfig};

    fn flat(values: &[f64]) -> Tensor {
        Tensor::from_slice(values)
    }

    fn toy() -> (AdamW, Tensor) {
        let params = flat(&[1.0, -2.0, 0.5, 3.0, -1.0]);
        let zeros = || Tensor::zeros([5], (Kind::Double, Device::Cpu));
        let optimizer = AdamW {
            config: AdamWConfig::default(),
            decay_len: 3,
            exp_avg: zeros(),
            exp_avg_sq: zeros(),
        };
        (optimizer, params)
    }

    #[test]
    fn the_first_update_moves_each_parameter_by_the_rate_against_its_gradient() {
        let (mut optimizer, mut params) = toy();
        let update = Update { step: 0, learning_rate: 0.1, weight_decay: 0.5 };
        optimizer.step(&mut params, &flat(&[3.0, -0.2, 0.0, 5.0, -7.0]), &update);
        let expected = [0.95 - 0.1, -1.9 + 0.1, 0.475, 3.0 - 0.1, -1.0 + 0.1];
        for (value, expected) in elements::<f64>(&params).iter().zip(expected) {
            assert!((value - expected).abs() < 1e-6, "{value} is not {expected}");
        }
    }

    #[test]
    fn a_rate_of_zero_moves_the_moments_but_no_parameter() {
        let (mut optimizer, mut params) = toy();
        let before = params.copy();
        let update = Update { step: 0, learning_rate: 0.0, weight_decay: 0.5 };
        optimizer.step(&mut params, &flat(&[1.0; 5]), &update);
        assert_eq!(params, before);
        assert!(elements::<f64>(optimizer.moments()[0]).iter().all(|m| (m - 0.1).abs() < 1e-15));
    }

    #[test]
    fn slices_and_whole_tensors_give_the_same_update() {
        let (mut by_slices, mut a) = toy();
        let (mut by_tensors, mut b) = toy();
        for step in 0..20 {
            let wave = |i: usize| ((step as f64 + 1.0) * (i as f64 + 0.3)).sin();
            let gradients = flat(&[0, 1, 2, 3, 4].map(wave));
            let update = Update { step, learning_rate: 0.01, weight_decay: 0.05 };
            by_slices.step(&mut a, &gradients, &update);
            for (range, decay) in [(0..3, 0.05), (3..5, 0.0)] {
                let c = Coefficients::new(&by_tensors.config, &update, decay);
                by_tensors.step_tensors(&mut b, &gradients, range, &c);
            }
        }
        assert!((a - b).abs().max().double_value(&[]) < 1e-14);
    }

    #[test]
    fn clipping_scales_to_the_bound_and_leaves_small_gradients_alone() {
        let mut gradients = flat(&[3.0, 4.0]);
        assert_eq!(clip_norm(&mut gradients, 10.0), 5.0);
        assert_eq!(gradients, flat(&[3.0, 4.0]));
        assert_eq!(clip_norm(&mut gradients, 1.0), 5.0);
        assert!((global_norm(&gradients) - 1.0).abs() < 1e-6);
        assert!(global_norm(&flat(&[1.0, f64::NAN])).is_nan());
    }

    #[test]
    fn moments_are_as_long_as_the_parameters() {
        let published = ModelConfig::published("reg400m_perceiver_t32");
        let layout = Layout::of(&Architecture::try_from(&published).unwrap());
        let params = Tensor::zeros([to_i64(layout.param_len())], (Kind::Float, Device::Cpu));
        let optimizer = AdamW::new(AdamWConfig::default(), &layout, &params);
        assert_eq!(optimizer.moments().map(Tensor::numel), [11_592_972; 2]);
        assert_eq!(layout.decay_len(), 11_517_888);
    }
}
