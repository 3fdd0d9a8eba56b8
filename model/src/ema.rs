//! Averaged weights: an exponential moving average of parameters and running statistics.

use tch::{Device, Tensor};

use crate::elementwise::{Real, elements, elements_mut, is_double};
use crate::params::Weights;

/// The moving average of a network's weights, itself weights of the same layout.
#[derive(Debug)]
pub struct Ema {
    weights: Weights,
}

impl Ema {
    /// Starts as a copy of the live weights.
    pub fn new(live: &Weights) -> Ema {
        Ema { weights: live.duplicate() }
    }

    /// The averaged weights, to build a network on or to store.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// The averaged weights, to be restored in place.
    pub fn weights_mut(&mut self) -> &mut Weights {
        &mut self.weights
    }

    /// `e ← d e + (1 - d) v` for every parameter and running statistic; no warm-up, no bias correction.
    ///
    /// # Panics
    /// If the live weights are of another kind, device or size.
    pub fn update(&mut self, live: &Weights, decay: f64) {
        average(self.weights.params_mut(), live.params(), decay);
        average(self.weights.buffers_mut(), live.buffers(), decay);
    }
}

/// `average ← decay · average + (1 - decay) · live`, each product rounded.
fn average(average: &mut Tensor, live: &Tensor, decay: f64) {
    assert_eq!(average.size(), live.size(), "the average has the size of what it averages");
    match (live.device(), is_double(live)) {
        (Device::Cpu, false) => average_slices::<f32>(average, live, decay),
        (Device::Cpu, true) => average_slices::<f64>(average, live, decay),
        (_, _) => average_tensors(average, live, decay),
    }
}

fn average_slices<T: Real>(average: &mut Tensor, live: &Tensor, decay: f64) {
    let [keep, take] = [decay, 1.0 - decay].map(T::nearest);
    for (mean, &value) in elements_mut::<T>(average).iter_mut().zip(elements::<T>(live)) {
        *mean = keep * *mean + take * value;
    }
}

/// The same with whole-tensor operations, for devices whose memory the host does not see.
fn average_tensors(average: &mut Tensor, live: &Tensor, decay: f64) {
    drop(tch::no_grad(|| average.g_mul_scalar_(decay).g_add_(&(live * (1.0 - decay)))));
}

/// The averaged `num_batches_tracked` after an update: as the reference, computed in f32 and truncated.
#[expect(clippy::cast_possible_truncation, reason = "the reference truncates")]
pub fn average_counter(average: i64, live: i64, decay: f64) -> i64 {
    (decay as f32 * average as f32 + (1.0 - decay) as f32 * live as f32) as i64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_and_whole_tensors_give_the_same_average_in_both_kinds() {
        let values = |seed: f32| Vec::from_iter((0..37).map(|i| (seed * (i as f32 + 1.0)).sin()));
        for kind in [tch::Kind::Float, tch::Kind::Double] {
            let start = Tensor::from_slice(&values(0.7)).to_kind(kind);
            let live = Tensor::from_slice(&values(1.3)).to_kind(kind);
            let (mut by_slices, mut by_tensors) = (start.copy(), start);
            for decay in [0.9999, 0.9, 0.0, 1.0] {
                average(&mut by_slices, &live, decay);
                average_tensors(&mut by_tensors, &live, decay);
                assert_eq!(by_slices, by_tensors);
            }
        }
    }

    #[test]
    fn a_decay_of_zero_takes_the_live_value_and_of_one_keeps_the_average() {
        let live = Tensor::from_slice(&[1.5_f32, -2.0]);
        let mut mean = Tensor::from_slice(&[7.0_f32, 8.0]);
        average(&mut mean, &live, 1.0);
        assert_eq!(mean, Tensor::from_slice(&[7.0_f32, 8.0]));
        average(&mut mean, &live, 0.0);
        assert_eq!(mean, live);
    }
}
