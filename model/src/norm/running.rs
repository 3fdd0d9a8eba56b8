//! BatchNorm with running statistics: evaluation, in place and in one pass over memory.

use libtorch::{Kernel, vectorized};
use tch::Tensor;

use super::{Factors, Norm, Statistics, Then, above_zero};
use crate::elementwise::{Real, elements, elements_mut, is_double};
use crate::fused::{by_channels, rows_of, widened};

/// `x` `[B, C, H, W]`, of which [`crate::fused::takes`] holds and which nobody else reads, normalised with
/// `running` mean and variance `[C]`, outside the graph.
pub(crate) fn normalize(
    x: Tensor,
    norm: &Norm<'_>,
    running: [&Tensor; 2],
    then: Then<'_>,
) -> Tensor {
    if is_double(&x) {
        typed::<f64>(x, norm, running, then)
    } else {
        typed::<f32>(x, norm, running, then)
    }
}

fn typed<T: Real>(x: Tensor, norm: &Norm<'_>, running: [&Tensor; 2], then: Then<'_>) -> Tensor {
    let mut rows = rows_of(&x); // [B, H, W, C], the same memory
    drop(x);
    let [mean, variance] = running.map(widened::<T>);
    let statistics = Statistics { mean, variance, count: 0.0 };
    let [weight, bias] = [norm.weight, norm.bias].map(|tensor| widened::<T>(&tensor.detach()));
    let factors = Factors::<T>::new(&statistics, &weight, &bias, norm);
    let (scale, shift) = (&factors.scale, &factors.shift);
    let shortcut = match then {
        Then::AddRelu(shortcut) => Some(rows_of(shortcut)),
        Then::Nothing | Then::Relu => None,
    };
    let relu = !matches!(then, Then::Nothing);
    let shortcut = shortcut.as_ref().map(elements::<T>);
    vectorized(InPlace { y: elements_mut::<T>(&mut rows), shortcut, relu, scale, shift });
    by_channels(&rows)
}

struct InPlace<'a, T> {
    y: &'a mut [T],
    shortcut: Option<&'a [T]>,
    relu: bool,
    scale: &'a [T],
    shift: &'a [T],
}

impl<T: Real> Kernel for InPlace<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let InPlace { y, shortcut, relu, scale, shift } = self;
        let width = scale.len();
        let rows = y.chunks_exact_mut(width);
        match (shortcut, relu) {
            (Some(shortcut), _) => {
                for (y, r) in rows.zip(shortcut.chunks_exact(width)) {
                    for ((y, r), (scale, shift)) in y.iter_mut().zip(r).zip(scale.iter().zip(shift))
                    {
                        *y = above_zero(*y * *scale + *shift + *r);
                    }
                }
            }
            (None, true) => {
                for y in rows {
                    for (y, (scale, shift)) in y.iter_mut().zip(scale.iter().zip(shift)) {
                        *y = above_zero(*y * *scale + *shift);
                    }
                }
            }
            (None, false) => {
                for y in rows {
                    for (y, (scale, shift)) in y.iter_mut().zip(scale.iter().zip(shift)) {
                        *y = *y * *scale + *shift;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    #[test]
    fn it_is_what_libtorch_computes() {
        libtorch::init(1).expect("starts");
        for (kind, tolerance) in [(Kind::Double, 1e-13), (Kind::Float, 1e-5)] {
            let waves =
                |count: i64| (Tensor::arange(count, (Kind::Double, Device::Cpu)) * 1.3).sin();
            let map = |phase: f64| {
                by_channels(&(waves(2 * 3 * 5 * 17) + phase).view([2, 3, 5, 17]).to_kind(kind))
            };
            let [weight, bias, mean] = [0.3, 0.7, 1.1].map(|p| (waves(17) + p).to_kind(kind));
            let variance = (waves(17) + 1.5).to_kind(kind);
            let norm = Norm { weight: &weight, bias: &bias, epsilon: 1e-3 };
            let (x, shortcut) = (map(0.1), map(-0.4));
            let plain = x.batch_norm(
                Some(&weight),
                Some(&bias),
                Some(&mean),
                Some(&variance),
                false,
                0.1,
                1e-3,
                true,
            );
            for (then, expected) in [
                (Then::Nothing, plain.shallow_clone()),
                (Then::Relu, plain.relu()),
                (Then::AddRelu(&shortcut), (&plain + &shortcut).relu()),
            ] {
                let y = normalize(x.copy(), &norm, [&mean, &variance], then);
                let far = (y - expected).abs().max().double_value(&[]);
                assert!(far < tolerance, "{kind:?} {then:?}: {far:.1e}");
            }
        }
    }
}
