//! BatchNorm of channels-last maps in training, with the addition and the ReLU that follow it.
//!
//! libtorch's kernel for this layout sums in the map's own precision, which costs f32 gradients their third
//! digit; here all sums are f64. What a map takes are four passes over memory, two forwards and two backwards,
//! where separate operations take ten.
//!
//! `y = relu(scale·(x - mean)/√(variance + ε) + bias + shortcut)`, each of the last two if asked for.

pub(crate) mod running;

use libtorch::{Kernel, vectorized};
use tch::Tensor;

use crate::elementwise::{Real, elements, elements_mut, is_double};
use crate::fused::{blank_like, by_channels, nearest, rounded, rows_of, widened};

/// What a map is normalised with.
#[derive(Debug)]
pub(crate) struct Norm<'t> {
    pub(crate) weight: &'t Tensor,
    pub(crate) bias: &'t Tensor,
    pub(crate) epsilon: f64,
}

/// What follows the normalisation.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Then<'t> {
    Nothing,
    Relu,
    /// Adds this map, then ReLU.
    AddRelu(&'t Tensor),
}

/// Statistics of one batch, `[C]` each.
#[derive(Debug)]
pub(crate) struct Statistics {
    pub(crate) mean: Vec<f64>,
    /// With B·H·W in the denominator.
    pub(crate) variance: Vec<f64>,
    /// B·H·W.
    pub(crate) count: f64,
}

/// `x` `[B, C, H, W]`, of which [`crate::fused::takes`] holds, to the same, and the statistics.
pub(crate) fn batch_norm(x: &Tensor, norm: &Norm<'_>, then: Then<'_>) -> (Tensor, Statistics) {
    if is_double(x) { typed::<f64>(x, norm, then) } else { typed::<f32>(x, norm, then) }
}

fn typed<T: Real>(x: &Tensor, norm: &Norm<'_>, then: Then<'_>) -> (Tensor, Statistics) {
    let rows = rows_of(x); // [B, H, W, C]
    let (weight, bias) = (norm.weight.detach(), norm.bias.detach());
    let statistics = vectorized(Moments { x: elements::<T>(&rows), width: weight.numel() });
    let factors =
        Factors::<T>::new(&statistics, &widened::<T>(&weight), &widened::<T>(&bias), norm);
    let mut result = blank_like(&rows);
    let shortcut = match then {
        Then::AddRelu(shortcut) => Some(rows_of(shortcut)),
        Then::Nothing | Then::Relu => None,
    };
    vectorized(Apply {
        x: elements::<T>(&rows),
        shortcut: shortcut.as_ref().map(elements::<T>),
        relu: !matches!(then, Then::Nothing),
        factors: &factors,
        y: elements_mut::<T>(&mut result),
    });
    let y = by_channels(&result);
    let mut inputs = vec![x, norm.weight, norm.bias];
    let saved = Saved { x: rows, count: statistics.count, factors };
    let differentiable = match then {
        Then::Nothing => {
            libtorch::with_backward(y, &inputs, move |g| saved.backward(&rows_of(g), false))
        }
        Then::Relu => {
            libtorch::with_backward(y, &inputs, move |g| saved.backward(&rows_of(g), true))
        }
        Then::AddRelu(shortcut) => {
            inputs.push(shortcut);
            libtorch::with_backward(y, &inputs, move |g| {
                let open = masked::<T>(&rows_of(g), &result);
                let mut gradients = saved.backward(&open, false);
                gradients.push(Some(by_channels(&open)));
                gradients
            })
        }
    };
    (differentiable.expect("the tensors fit each other"), statistics)
}

/// Moves `running` `[C]` towards the values of a batch.
pub(crate) fn track(running: &mut Tensor, values: &[f64], momentum: f64) {
    if is_double(running) {
        track_typed(elements_mut::<f64>(running), values, momentum)
    } else {
        track_typed(elements_mut::<f32>(running), values, momentum)
    }
}

fn track_typed<T: Real>(running: &mut [T], values: &[f64], momentum: f64) {
    for (running, value) in running.iter_mut().zip(values) {
        *running = T::nearest(momentum * value + (1.0 - momentum) * running.widen());
    }
}

/// `y = x·scale + shift`, and what the backward needs, `[C]` each.
#[derive(Debug)]
struct Factors<T> {
    scale: Vec<T>,
    shift: Vec<T>,
    mean: Vec<f64>,
    inverse_deviation: Vec<f64>,
}

impl<T: Real> Factors<T> {
    fn new(statistics: &Statistics, weight: &[f64], bias: &[f64], norm: &Norm<'_>) -> Self {
        let deviation = |variance: &f64| 1.0 / (variance + norm.epsilon).sqrt();
        let inverse_deviation: Vec<f64> = statistics.variance.iter().map(deviation).collect();
        let scale: Vec<f64> = inverse_deviation.iter().zip(weight).map(|(d, w)| d * w).collect();
        let shift = scale.iter().zip(&statistics.mean).zip(bias).map(|((s, m), b)| b - m * s);
        let shift = nearest(shift);
        let mean = statistics.mean.clone();
        Factors { scale: nearest(scale), shift, mean, inverse_deviation }
    }
}

/// What a backward keeps.
#[derive(Debug)]
struct Saved<T> {
    x: Tensor,
    count: f64,
    factors: Factors<T>,
}

impl<T: Real> Saved<T> {
    /// From the gradient of the output, `[B, H, W, C]`, to those of the map, the weight and the bias.
    fn backward(self, gradient: &Tensor, relu: bool) -> Vec<Option<Tensor>> {
        let (x, g) = (elements::<T>(&self.x), elements::<T>(gradient));
        let sums = vectorized(GradientSums { x, g, relu, factors: &self.factors });
        let Factors { mean, inverse_deviation, .. } = &self.factors;
        let along = sums.along.iter().zip(inverse_deviation);
        let weight: Vec<f64> = along.map(|(sum, deviation)| sum * deviation).collect();
        let pull = weight.iter().zip(inverse_deviation).map(|(w, d)| -w * d / self.count);
        let mut result = blank_like(&self.x);
        vectorized(GradientApply {
            x,
            g,
            relu,
            factors: &self.factors,
            offset: nearest(sums.total.iter().map(|sum| sum / self.count)),
            mean: nearest(mean.iter().copied()),
            pull: nearest(pull),
            gx: elements_mut::<T>(&mut result),
        });
        let (weight, bias) = (rounded(&weight, gradient), rounded(&sums.total, gradient));
        vec![Some(by_channels(&result)), Some(weight), Some(bias)]
    }
}

/// The gradient where `y` is above zero, `[B, H, W, C]`.
fn masked<T: Real>(gradient: &Tensor, y: &Tensor) -> Tensor {
    let mut open = blank_like(gradient);
    let (g, y) = (elements::<T>(gradient), elements::<T>(y));
    vectorized(Mask { g, y, open: elements_mut::<T>(&mut open) });
    open
}

/// Rows that are summed together before they join the sum.
const TOGETHER: usize = 4;

struct Moments<'a, T> {
    x: &'a [T],
    width: usize,
}

impl<T: Real> Kernel for Moments<'_, T> {
    type Output = Statistics;

    #[inline(always)]
    fn run(self) -> Statistics {
        let width = self.width;
        let (mut sum, mut squares) = (vec![0.0_f64; width], vec![0.0_f64; width]);
        let blocks = self.x.chunks_exact(TOGETHER * width);
        for row in blocks.remainder().chunks_exact(width) {
            for ((v, sum), squares) in row.iter().zip(&mut sum).zip(&mut squares) {
                let v = v.widen();
                *sum += v;
                *squares += v * v;
            }
        }
        for block in blocks {
            let (first, second) = block.split_at(2 * width);
            let (a, b) = first.split_at(width);
            let (c, d) = second.split_at(width);
            let rows = a.iter().zip(b).zip(c).zip(d);
            for ((row, sum), squares) in rows.zip(&mut sum).zip(&mut squares) {
                let (((a, b), c), d) = row;
                let (a, b, c, d) = (a.widen(), b.widen(), c.widen(), d.widen());
                *sum += (a + b) + (c + d);
                *squares += (a * a + b * b) + (c * c + d * d);
            }
        }
        let count = (self.x.len() / width) as f64;
        let mean: Vec<f64> = sum.iter().map(|sum| sum / count).collect();
        let variance = squares.iter().zip(&mean).map(|(s, m)| (s / count - m * m).max(0.0));
        Statistics { variance: variance.collect(), mean, count }
    }
}

struct Apply<'a, T> {
    x: &'a [T],
    shortcut: Option<&'a [T]>,
    relu: bool,
    factors: &'a Factors<T>,
    y: &'a mut [T],
}

/// 0 for what is below it; what is not a number stays so.
#[inline(always)]
fn above_zero<T: Real>(value: T) -> T {
    let zero = T::nearest(0.0);
    if value < zero { zero } else { value }
}

impl<T: Real> Kernel for Apply<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Factors { scale, shift, .. } = self.factors;
        let width = scale.len();
        let rows = self.y.chunks_exact_mut(width).zip(self.x.chunks_exact(width));
        match (self.shortcut, self.relu) {
            (Some(shortcut), _) => {
                for ((y, x), r) in rows.zip(shortcut.chunks_exact(width)) {
                    let factors = scale.iter().zip(shift);
                    for (((y, x), r), (scale, shift)) in y.iter_mut().zip(x).zip(r).zip(factors) {
                        *y = above_zero(*x * *scale + *shift + *r);
                    }
                }
            }
            (None, true) => {
                for (y, x) in rows {
                    for ((y, x), (scale, shift)) in y.iter_mut().zip(x).zip(scale.iter().zip(shift))
                    {
                        *y = above_zero(*x * *scale + *shift);
                    }
                }
            }
            (None, false) => {
                for (y, x) in rows {
                    for ((y, x), (scale, shift)) in y.iter_mut().zip(x).zip(scale.iter().zip(shift))
                    {
                        *y = *x * *scale + *shift;
                    }
                }
            }
        }
    }
}

struct Mask<'a, T> {
    g: &'a [T],
    y: &'a [T],
    open: &'a mut [T],
}

impl<T: Real> Kernel for Mask<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let zero = T::nearest(0.0);
        for ((open, g), y) in self.open.iter_mut().zip(self.g).zip(self.y) {
            *open = if *y > zero { *g } else { zero };
        }
    }
}

/// Sums of the gradient, and of the gradient times the distance from the mean, `[C]` each.
struct GradientTotals {
    total: Vec<f64>,
    along: Vec<f64>,
}

struct GradientSums<'a, T> {
    x: &'a [T],
    g: &'a [T],
    relu: bool,
    factors: &'a Factors<T>,
}

impl<T: Real> Kernel for GradientSums<'_, T> {
    type Output = GradientTotals;

    #[inline(always)]
    fn run(self) -> GradientTotals {
        let Factors { scale, shift, mean, .. } = self.factors;
        let width = scale.len();
        let (mut total, mut along) = (vec![0.0_f64; width], vec![0.0_f64; width]);
        for (x, g) in self.x.chunks_exact(width).zip(self.g.chunks_exact(width)) {
            let sums = total.iter_mut().zip(&mut along).zip(mean);
            let factors = scale.iter().zip(shift);
            for (((x, g), ((total, along), mean)), (scale, shift)) in
                x.iter().zip(g).zip(sums).zip(factors)
            {
                let g = if self.relu { open(*x, *g, *scale, *shift) } else { *g }.widen();
                *total += g;
                *along += g * (x.widen() - mean);
            }
        }
        GradientTotals { total, along }
    }
}

/// The gradient where `x·scale + shift`, as [`Apply`] computes it, is above zero.
#[inline(always)]
fn open<T: Real>(x: T, g: T, scale: T, shift: T) -> T {
    let zero = T::nearest(0.0);
    if x * scale + shift > zero { g } else { zero }
}

struct GradientApply<'a, T> {
    x: &'a [T],
    g: &'a [T],
    relu: bool,
    factors: &'a Factors<T>,
    /// The mean of the gradient.
    offset: Vec<T>,
    mean: Vec<T>,
    /// What the distance from the mean takes away, before the scale.
    pull: Vec<T>,
    gx: &'a mut [T],
}

impl<T: Real> Kernel for GradientApply<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Factors { scale, shift, .. } = self.factors;
        let width = scale.len();
        let rows = self.x.chunks_exact(width).zip(self.g.chunks_exact(width));
        for (gx, (x, g)) in self.gx.chunks_exact_mut(width).zip(rows) {
            let maps = gx.iter_mut().zip(x.iter().zip(g));
            let factors = scale.iter().zip(shift);
            let corrections = self.offset.iter().zip(&self.mean).zip(&self.pull);
            for (((gx, (x, g)), (scale, shift)), ((offset, mean), pull)) in
                maps.zip(factors).zip(corrections)
            {
                let g = if self.relu { open(*x, *g, *scale, *shift) } else { *g };
                *gx = (g - *offset + (*x - *mean) * *pull) * *scale;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::fused::{by_rows, takes};

    /// `[B, C, H, W]` with channels next to each other, the same in every kind up to rounding.
    fn map(size: [i64; 4], phase: f64, kind: Kind) -> Tensor {
        let count = size.iter().product::<i64>();
        let angles = Tensor::arange(count, (Kind::Double, Device::Cpu)) * 12.9898 + phase;
        let rows = (angles.sin() * 1.7 + 0.9).view([size[0], size[2], size[3], size[1]]);
        by_channels(&rows.to_kind(kind))
    }

    /// Values of one pass: the output, and the gradients of map, weight, bias and shortcut, all as f64.
    fn pass(size: [i64; 4], kind: Kind, then: u8, own: bool) -> Vec<Tensor> {
        let leaf = |x: Tensor| x.set_requires_grad(true);
        let (x, shortcut) = (leaf(map(size, 0.3, kind)), leaf(map(size, 0.7, kind)));
        let channels = map([size[1], 1, 1, 1], 1.1, kind).view([size[1]]);
        let (weight, bias) = (leaf(channels.copy()), leaf(channels.flip([0]) * 0.5));
        let norm = Norm { weight: &weight, bias: &bias, epsilon: 1e-5 };
        let y = if own {
            assert!(takes(&x));
            let then = [Then::Nothing, Then::Relu, Then::AddRelu(&shortcut)][usize::from(then)];
            batch_norm(&x, &norm, then).0
        } else {
            let none = None::<&Tensor>;
            let y = x.contiguous().batch_norm(
                Some(&weight),
                Some(&bias),
                none,
                none,
                true,
                0.1,
                1e-5,
                false,
            );
            match then {
                0 => y,
                1 => y.relu(),
                _ => (y + &shortcut).relu(),
            }
        };
        let loss = (&y * map(size, 2.3, kind)).sum(Kind::Double);
        let leaves = [x, weight, bias, shortcut];
        let used = if then == 2 { 4 } else { 3 };
        let gradients = Tensor::run_backward(&[loss], &leaves[..used], false, false);
        let outputs = std::iter::once(y.detach()).chain(gradients);
        outputs.map(|tensor| tensor.contiguous().to_kind(Kind::Double)).collect()
    }

    fn distance(a: &Tensor, b: &Tensor) -> f64 {
        (a - b).norm().double_value(&[]) / b.norm().double_value(&[])
    }

    #[test]
    fn values_and_gradients_are_those_of_the_definition_in_double_precision() {
        libtorch::init(1).expect("starts");
        for size in [[2, 3, 5, 7], [3, 17, 1, 4], [1, 33, 3, 1], [2, 8, 4, 4]] {
            for then in 0..3 {
                let defined = pass(size, Kind::Double, then, false);
                for (kind, tolerance) in [(Kind::Double, 1e-12), (Kind::Float, 3e-6)] {
                    for (own, defined) in pass(size, kind, then, true).iter().zip(&defined) {
                        let far = distance(own, defined);
                        assert!(far < tolerance, "{size:?}, {then}, {kind:?}: {far:.1e}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_mean_a_hundred_thousand_deviations_from_zero_leaves_five_digits_of_the_variance() {
        libtorch::init(1).expect("starts");
        let x = map([2, 4, 9, 9], 0.1, Kind::Float) * 1e-3 + 100.0;
        let one = Tensor::ones([4], (Kind::Float, Device::Cpu));
        let norm = Norm { weight: &one, bias: &one.zeros_like(), epsilon: 0.0 };
        let found = batch_norm(&x, &norm, Then::Nothing).1;
        let places = x.to_kind(Kind::Double).transpose(0, 1).flatten(1, 3); // [C, B·H·W]
        let variance = places.var_dim([1_i64].as_slice(), false, false);
        let variance: Vec<f64> = Vec::try_from(&variance).expect("is f64");
        for (found, defined) in found.variance.iter().zip(variance) {
            assert!((found / defined - 1.0).abs() < 1e-5, "{found} {defined}");
        }
    }

    #[test]
    fn what_is_not_a_number_stays_so() {
        libtorch::init(1).expect("starts");
        let x = map([2, 3, 2, 2], 0.1, Kind::Float);
        let one = Tensor::ones([3], (Kind::Float, Device::Cpu));
        let norm = Norm { weight: &(&one * f64::NAN), bias: &one, epsilon: 1e-5 };
        let y = batch_norm(&x, &norm, Then::Relu).0;
        assert!(by_rows(&y).isnan().all().int64_value(&[]) == 1);
    }
}
