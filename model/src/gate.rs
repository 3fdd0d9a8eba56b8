//! The two large steps of squeeze-and-excitation on channels-last maps: the mean of each channel, and the map
//! times a gate.
//!
//! libtorch's backward of the mean writes a whole map of equal values, and that of the product writes the
//! map's products before it sums them; here neither map is made.

use libtorch::{Kernel, vectorized};
use tch::Tensor;

use crate::elementwise::{Real, elements, elements_mut, is_double};
use crate::fused::{blank_like, by_channels, rounded, rows_of};

/// `x` `[B, C, H, W]`, of which [`crate::fused::takes`] holds, to the mean of each channel, `[B, C]`.
pub(crate) fn channel_mean(x: &Tensor) -> Tensor {
    if is_double(x) { mean_of::<f64>(x) } else { mean_of::<f32>(x) }
}

fn mean_of<T: Real>(x: &Tensor) -> Tensor {
    let rows = rows_of(x); // [B, H, W, C]
    let size = x.size();
    let places = size[2] * size[3];
    let (width, samples) = (length(size[1]), length(size[0]));
    let mut sums = vec![0.0; samples * width];
    let values = elements::<T>(&rows).chunks_exact(length(places) * width);
    for (x, sums) in values.zip(sums.chunks_exact_mut(width)) {
        vectorized(Sums { x, sums });
    }
    sums.iter_mut().for_each(|sum| *sum /= places as f64);
    let mean = rounded(&sums, &rows).view([size[0], size[1]]);
    let backward = move |g: &Tensor| {
        let each = (g / places as f64).unsqueeze(-1).unsqueeze(-1); // [B, C, 1, 1]
        vec![Some(each.expand(&size, false))]
    };
    libtorch::with_backward(mean, &[x], backward).expect("the tensors fit each other")
}

/// `x` `[B, C, H, W]`, of which [`crate::fused::takes`] holds, times `gate` `[B, C]`.
pub(crate) fn gated(x: &Tensor, gate: &Tensor) -> Tensor {
    if is_double(x) { gated_of::<f64>(x, gate) } else { gated_of::<f32>(x, gate) }
}

fn gated_of<T: Real>(x: &Tensor, gate: &Tensor) -> Tensor {
    let (rows, factors) = (rows_of(x), gate.detach().contiguous()); // [B, H, W, C], [B, C]
    let size = x.size();
    let width = length(size[1]);
    let sample = length(size[2] * size[3]) * width;
    let mut result = blank_like(&rows);
    each_sample::<T>(&rows, &factors, &mut result, sample, width);
    let backward = move |g: &Tensor| {
        let g = rows_of(g);
        let mut gx = blank_like(&rows);
        each_sample::<T>(&g, &factors, &mut gx, sample, width);
        let mut sums = vec![0.0; factors.numel()];
        let maps = elements::<T>(&rows).chunks_exact(sample);
        let maps = maps.zip(elements::<T>(&g).chunks_exact(sample));
        for ((x, g), sums) in maps.zip(sums.chunks_exact_mut(width)) {
            vectorized(ProductSums { x, g, sums });
        }
        let ggate = rounded(&sums, &g).view_as(&factors);
        vec![Some(by_channels(&gx)), Some(ggate)]
    };
    let y = by_channels(&result);
    libtorch::with_backward(y, &[x, gate], backward).expect("the tensors fit each other")
}

/// Each sample of `from` times its factors, into `to`.
fn each_sample<T: Real>(from: &Tensor, by: &Tensor, to: &mut Tensor, sample: usize, width: usize) {
    let to = elements_mut::<T>(to).chunks_exact_mut(sample);
    let from = elements::<T>(from).chunks_exact(sample);
    for ((y, x), factors) in to.zip(from).zip(elements::<T>(by).chunks_exact(width)) {
        vectorized(Product { x, factors, y });
    }
}

fn length(size: i64) -> usize {
    usize::try_from(size).expect("sizes are not negative")
}

struct Sums<'a, T> {
    x: &'a [T],
    sums: &'a mut [f64],
}

impl<T: Real> Kernel for Sums<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for x in self.x.chunks_exact(self.sums.len()) {
            for (sum, x) in self.sums.iter_mut().zip(x) {
                *sum += x.widen();
            }
        }
    }
}

struct Product<'a, T> {
    x: &'a [T],
    factors: &'a [T],
    y: &'a mut [T],
}

impl<T: Real> Kernel for Product<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let width = self.factors.len();
        for (y, x) in self.y.chunks_exact_mut(width).zip(self.x.chunks_exact(width)) {
            for ((y, x), factor) in y.iter_mut().zip(x).zip(self.factors) {
                *y = *x * *factor;
            }
        }
    }
}

struct ProductSums<'a, T> {
    x: &'a [T],
    g: &'a [T],
    sums: &'a mut [f64],
}

impl<T: Real> Kernel for ProductSums<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let width = self.sums.len();
        for (x, g) in self.x.chunks_exact(width).zip(self.g.chunks_exact(width)) {
            for ((sum, x), g) in self.sums.iter_mut().zip(x).zip(g) {
                *sum += x.widen() * g.widen();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    fn leaves(size: [i64; 4], kind: Kind) -> [Tensor; 2] {
        let waves = |count: i64| (Tensor::arange(count, (Kind::Double, Device::Cpu)) * 1.3).sin();
        let rows = waves(size.iter().product()).view([size[0], size[2], size[3], size[1]]);
        let gate = waves(size[0] * size[1]).view([size[0], size[1]]) + 0.2;
        [by_channels(&rows), gate].map(|x| x.to_kind(kind).set_requires_grad(true))
    }

    #[test]
    fn mean_and_gate_are_those_of_their_definitions_with_their_gradients() {
        libtorch::init(1).expect("starts");
        for size in [[2, 3, 5, 7], [1, 17, 1, 1], [3, 8, 2, 3]] {
            let values = |kind: Kind, own: bool| {
                let [x, gate] = leaves(size, kind);
                let (mean, y) = if own {
                    (channel_mean(&x), gated(&x, &gate))
                } else {
                    let mean = x.mean_dim([2_i64, 3].as_slice(), false, None);
                    (mean, &x * gate.unsqueeze(-1).unsqueeze(-1))
                };
                let loss = (&y * &y).sum(Kind::Double) + (&mean * &gate).sum(Kind::Double);
                let gradients = Tensor::run_backward(&[loss], &[x, gate], false, false);
                let all = [mean.detach(), y.detach()].into_iter().chain(gradients);
                all.map(|tensor| tensor.contiguous().to_kind(Kind::Double)).collect::<Vec<_>>()
            };
            let defined = values(Kind::Double, false);
            for (kind, tolerance) in [(Kind::Double, 1e-13), (Kind::Float, 1e-6)] {
                for (own, defined) in values(kind, true).iter().zip(&defined) {
                    let far = (own - defined).norm() / defined.norm();
                    let far = far.double_value(&[]);
                    assert!(far < tolerance, "{size:?} {kind:?}: {far:.1e}");
                }
            }
        }
    }
}
