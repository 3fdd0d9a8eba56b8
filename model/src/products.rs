//! What the latents read of a map (see [`crate::neighbourhood`]), as matrix products: for devices on which those
//! cost little and a depth-wise convolution on a large map much.
//!
//! The 7×7 convolution, its input added and the mean over 7×7 cells are one linear map. Its means of windows
//! are separable: over rows, then over columns, each a product with a fixed matrix. What is left is a sum over
//! the 49 taps of weights times means.
//!
//! Axes: B batch, C channels, H and W height and width, Y and X cells, I and J taps.

use tch::{Device, Kind, Tensor};

const CELLS: i64 = 7;
const TAPS: i64 = 7;

/// The means of all windows are `7⁴` numbers a channel; on a smaller map than this the convolution reads less.
const PLACES_MIN: i64 = 49 * 49;

/// Whether [`summary`] is the better way for `x` `[B, C, H, W]`.
pub(crate) fn take(x: &Tensor) -> bool {
    let size = x.size();
    x.device().is_cuda() && size[2] * size[3] > PLACES_MIN
}

/// `x` `[B, C, H, W]`, `weight` `[C, 1, 7, 7]` and `bias` `[C]` to the cells `[B, C, 7, 7]`: the mean over each of
/// the convolution of `x`, padded by 3, plus `x`.
pub(crate) fn summary(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Tensor {
    let size = x.size();
    let [batch, width, height, columns] = size[..] else { panic!("a map has four axes") };
    let options = (x.kind(), x.device());
    let rows = x.permute([0, 2, 3, 1]); // [B, H, W, C]
    let by_rows = window_means(height, TAPS, options); // [Y·I, H]
    let by_columns = window_means(columns, TAPS, options); // [X·J, W]

    let rows = rows.reshape([batch, height, columns * width]);
    let means = by_rows.unsqueeze(0).expand([batch, -1, -1], false).bmm(&rows); // [B, Y·I, W·C]
    let means = means.reshape([batch * CELLS * TAPS, columns, width]);
    let all = batch * CELLS * TAPS;
    let means = by_columns.unsqueeze(0).expand([all, -1, -1], false).bmm(&means);
    let means = means.view([batch, CELLS, TAPS, CELLS, TAPS, width]); // [B, Y, I, X, J, C]

    let taps = weight.view([width, 1, TAPS, 1, TAPS]).permute([1, 2, 3, 4, 0]); // [1, I, 1, J, C]
    let centre = centre(weight); // [1, I, 1, J, 1]
    let taps = (taps + centre).to_kind(means.kind());
    let cells = (means * taps).sum_dim_intlist([2_i64, 4].as_slice(), false, None); // [B, Y, X, C]
    (cells + bias.to_kind(options.0)).permute([0, 3, 1, 2])
}

/// 1 at the middle tap, which is how the input is added; `[1, I, 1, J, 1]`.
fn centre(like: &Tensor) -> Tensor {
    let options = (like.kind(), like.device());
    let middle = Tensor::arange(TAPS, options).eq(3.0).to_kind(options.0);
    middle.view([1, TAPS, 1, 1, 1]) * middle.view([1, 1, 1, TAPS, 1])
}

/// `[7·taps, length]`: row `(cell, tap)` is the mean over the cell's places ⌊cell·length/7⌋ to
/// ⌈(cell+1)·length/7⌉ - 1, each moved by `tap - ⌊taps/2⌋`; places outside count as zeros.
///
/// It is made on the device: a copy from the host cannot be a part of a graph.
pub(crate) fn window_means(length: i64, taps: i64, (kind, device): (Kind, Device)) -> Tensor {
    let whole = (Kind::Int64, device);
    let cell = Tensor::arange(CELLS, whole);
    let start = (&cell * length).divide_scalar_mode(CELLS, "floor"); // [Y]
    let end = ((cell + 1) * length + (CELLS - 1)).divide_scalar_mode(CELLS, "floor"); // [Y]
    let share = (&end - &start).to_kind(Kind::Double).reciprocal(); // [Y]
    let moved = Tensor::arange(taps, whole) - taps / 2; // [I]
    let edge = |edge: Tensor| (edge.unsqueeze(1) + &moved).unsqueeze(2); // [Y, I, 1]
    let place = Tensor::arange(length, whole);
    let inside = place.ge_tensor(&edge(start)).logical_and(&place.lt_tensor(&edge(end)));
    let weights = inside.to_kind(Kind::Double) * share.view([CELLS, 1, 1]); // [Y, I, length]
    weights.view([CELLS * taps, length]).to_kind(kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_are_the_convolution_and_the_pooling_with_their_gradients() {
        libtorch::init(1).expect("starts");
        let waves = |size: &[i64], speed: f64| {
            let count: i64 = size.iter().product();
            let x = (Tensor::arange(count, (Kind::Double, Device::Cpu)) * speed).sin();
            x.view(size).set_requires_grad(true)
        };
        for (height, columns) in [(56, 49), (14, 9), (2, 4)] {
            let x = waves(&[2, 3, height, columns], 1.3);
            let (weight, bias) = (waves(&[3, 1, 7, 7], 0.7), waves(&[3], 0.3));
            let defined = {
                let y = x.conv2d(&weight, Some(&bias), [1, 1], [3, 3], [1, 1], 3) + &x;
                y.adaptive_avg_pool2d([7, 7])
            };
            let own = summary(&x, &weight, &bias);
            assert_eq!(own.size(), defined.size());
            let gradients = |y: &Tensor| {
                let loss = (y * y).sum(Kind::Double);
                let leaves = [x.shallow_clone(), weight.shallow_clone(), bias.shallow_clone()];
                Tensor::run_backward(&[loss], &leaves, false, false)
            };
            let pairs = gradients(&own).into_iter().zip(gradients(&defined));
            for (own, defined) in pairs.chain([(own.detach(), defined.detach())]) {
                let far = (own - &defined).norm() / defined.norm();
                assert!(far.double_value(&[]) < 1e-13, "{height}×{columns}");
            }
        }
    }
}
