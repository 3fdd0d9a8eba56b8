//! What the latents read of a map: a 7×7 depth-wise convolution, its input added, and the mean over each of
//! 7×7 cells, as one linear map.
//!
//! All three are linear, so the mean may come first: what tap (i, j) gives to a cell is the tap's weight times
//! the mean of the map over the cell moved by (i - 3, j - 3), with zeros outside the map. Each sum over a window
//! is the sum of sums over rows, and so a tap costs a few additions a place where the convolution multiplies 49
//! times. The convolution's output, as large as the map, is never made.
//!
//! Axes: B batch, C channels, H and W height and width, Y and X cells, I and J taps.

use std::ops::Range;

use libtorch::{Kernel, vectorized};
use tch::Tensor;

use crate::elementwise::{Real, elements, elements_mut, is_double};
use crate::fused::{by_channels, rounded, rows_of};

/// Cells along an axis.
const CELLS: usize = 7;
/// Taps along an axis.
const TAPS: usize = 7;
/// The tap of a place itself.
const CENTRE: usize = TAPS / 2;

/// `x` `[B, C, H, W]`, of which [`crate::fused::takes`] holds, `weight` `[C, 1, 7, 7]` and `bias` `[C]` to the
/// means over cells of `x + convolution(x)`, `[B, C, 7, 7]`.
pub(crate) fn summary(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Tensor {
    if is_double(x) { typed::<f64>(x, weight, bias) } else { typed::<f32>(x, weight, bias) }
}

fn typed<T: Real>(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Tensor {
    let size = x.size();
    let rows = rows_of(x); // [B, H, W, C]
    let plan = Plan::new(length(size[2]), length(size[3]), length(size[1]));
    let taps = plan.taps::<T>(weight);
    let cells_per_axis = [size[0], 7, 7, size[1]];
    let mut cells = Tensor::empty(cells_per_axis, (x.kind(), x.device())); // [B, Y, X, C]
    let bias_values: Vec<T> = elements::<T>(&bias.detach()).to_vec();
    let samples = elements::<T>(&rows).chunks_exact(plan.sample());
    let results = elements_mut::<T>(&mut cells).chunks_exact_mut(plan.cells());
    for (x, cells) in samples.zip(results) {
        vectorized(Forward { plan: &plan, x, taps: &taps, bias: &bias_values, cells });
    }
    let backward = move |g: &Tensor| {
        let g = rows_of(g); // [B, Y, X, C]
        let mut gx = Tensor::zeros(rows.size(), (rows.kind(), rows.device()));
        let mut sums = Sums { taps: vec![0.0; taps.len()], bias: vec![0.0; plan.width] };
        let samples = elements::<T>(&rows).chunks_exact(plan.sample());
        let gradients = elements_mut::<T>(&mut gx).chunks_exact_mut(plan.sample());
        let cells = elements::<T>(&g).chunks_exact(plan.cells());
        for ((x, g), gx) in samples.zip(cells).zip(gradients) {
            vectorized(Backward { plan: &plan, x, g, taps: &taps, gx, sums: &mut sums });
        }
        let width = plan.width as i64;
        let taps = rounded(&sums.taps, &g).view([49, width]).tr().contiguous();
        let bias = rounded(&sums.bias, &g);
        vec![Some(by_channels(&gx)), Some(taps.view([width, 1, 7, 7])), Some(bias)]
    };
    libtorch::with_backward(by_channels(&cells), &[x, weight, bias], backward)
        .expect("the tensors fit each other")
}

fn length(size: i64) -> usize {
    usize::try_from(size).expect("sizes are not negative")
}

/// Where the windows of a map lie.
#[derive(Debug)]
struct Plan {
    /// Along the height and along the width.
    axes: [Axis; 2],
    height: usize,
    /// Columns of the map.
    columns: usize,
    /// Channels.
    width: usize,
}

impl Plan {
    fn new(height: usize, columns: usize, width: usize) -> Plan {
        Plan { axes: [Axis::new(height), Axis::new(columns)], height, columns, width }
    }

    /// Elements of a sample.
    fn sample(&self) -> usize {
        self.height * self.row()
    }

    /// Elements of a row of the map.
    fn row(&self) -> usize {
        self.columns * self.width
    }

    /// Elements of a sample's cells.
    fn cells(&self) -> usize {
        CELLS * CELLS * self.width
    }

    /// What each window counts, `[I, J, C]`: the weights, and 1 more at the centre for the map itself.
    fn taps<T: Real>(&self, weight: &Tensor) -> Vec<T> {
        let by_tap = weight.detach().view([self.width as i64, 49]).tr().contiguous(); // [I·J, C]
        let mut taps = elements::<T>(&by_tap).to_vec();
        let centre = (CENTRE * TAPS + CENTRE) * self.width;
        for tap in &mut taps[centre..centre + self.width] {
            *tap = *tap + T::nearest(1.0);
        }
        taps
    }

    /// One over the places of cell (y, x), and so of its windows, those outside the map included.
    #[inline(always)]
    fn share(&self, y: usize, x: usize) -> f64 {
        1.0 / (self.axes[0].places[y] * self.axes[1].places[x]) as f64
    }
}

/// The cells of an axis and their moved windows, clipped to the map.
#[derive(Debug)]
struct Axis {
    places: [usize; CELLS],
    windows: [[Window; TAPS]; CELLS],
}

/// Places `start..end`.
#[derive(Debug, Clone, Copy)]
struct Window {
    start: usize,
    end: usize,
}

impl Window {
    /// The places in units of `step` elements.
    #[inline(always)]
    fn times(self, step: usize) -> Range<usize> {
        self.start * step..self.end * step
    }
}

impl Axis {
    /// Cell i covers places ⌊i·length/7⌋ to ⌈(i+1)·length/7⌉ - 1, as in adaptive pooling.
    fn new(length: usize) -> Axis {
        let cell = |cell: usize| (cell * length / CELLS, ((cell + 1) * length).div_ceil(CELLS));
        let clipped = |place: usize| place.saturating_sub(CENTRE).min(length);
        let windows = std::array::from_fn(|index| {
            let (start, end) = cell(index);
            std::array::from_fn(|tap| Window {
                start: clipped(start + tap),
                end: clipped(end + tap),
            })
        });
        let places = std::array::from_fn(|index| cell(index).1 - cell(index).0);
        Axis { places, windows }
    }
}

/// Adds `from` to `to`, element by element.
#[inline(always)]
fn add<T: Real>(to: &mut [T], from: &[T]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = *to + *from;
    }
}

/// The sum of the map's rows in a window, `[W, C]`.
#[inline(always)]
fn sum_rows<T: Real>(sum: &mut [T], x: &[T], window: Window) {
    sum.fill(T::nearest(0.0));
    for row in x[window.times(sum.len())].chunks_exact(sum.len()) {
        add(sum, row);
    }
}

/// The sum of a row's places in a window, `[C]`.
#[inline(always)]
fn sum_places<T: Real>(sum: &mut [T], row: &[T], window: Window) {
    sum.fill(T::nearest(0.0));
    for place in row[window.times(sum.len())].chunks_exact(sum.len()) {
        add(sum, place);
    }
}

struct Forward<'a, T> {
    plan: &'a Plan,
    /// One sample, `[H, W, C]`.
    x: &'a [T],
    taps: &'a [T],
    bias: &'a [T],
    /// `[Y, X, C]`.
    cells: &'a mut [T],
}

impl<T: Real> Kernel for Forward<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let (plan, width) = (self.plan, self.plan.width);
        let zero = T::nearest(0.0);
        let (mut row, mut place) = (vec![zero; plan.row()], vec![zero; width]);
        self.cells.fill(zero);
        for (y, cells) in self.cells.chunks_exact_mut(CELLS * width).enumerate() {
            for (i, taps) in self.taps.chunks_exact(TAPS * width).enumerate() {
                sum_rows(&mut row, self.x, plan.axes[0].windows[y][i]);
                for (x, cell) in cells.chunks_exact_mut(width).enumerate() {
                    for (j, tap) in taps.chunks_exact(width).enumerate() {
                        sum_places(&mut place, &row, plan.axes[1].windows[x][j]);
                        for ((cell, place), tap) in cell.iter_mut().zip(&place).zip(tap) {
                            *cell = *cell + *place * *tap;
                        }
                    }
                }
            }
            for (x, cell) in cells.chunks_exact_mut(width).enumerate() {
                let share = T::nearest(plan.share(y, x));
                for (cell, bias) in cell.iter_mut().zip(self.bias) {
                    *cell = *cell * share + *bias;
                }
            }
        }
    }
}

/// Gradients that all samples add to: of the taps `[I, J, C]` and of the bias `[C]`.
struct Sums {
    taps: Vec<f64>,
    bias: Vec<f64>,
}

struct Backward<'a, T> {
    plan: &'a Plan,
    /// One sample, `[H, W, C]`.
    x: &'a [T],
    /// The gradient of its cells, `[Y, X, C]`.
    g: &'a [T],
    taps: &'a [T],
    /// Its own gradient, `[H, W, C]`, which starts as zeros.
    gx: &'a mut [T],
    sums: &'a mut Sums,
}

impl<T: Real> Kernel for Backward<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let (plan, width) = (self.plan, self.plan.width);
        let zero = T::nearest(0.0);
        let (mut row, mut place) = (vec![zero; plan.row()], vec![zero; width]);
        let (mut row_gradient, mut shares) = (row.clone(), vec![zero; CELLS * width]);
        for (y, g) in self.g.chunks_exact(CELLS * width).enumerate() {
            let cells = g.chunks_exact(width).zip(shares.chunks_exact_mut(width));
            for (x, (g, share)) in cells.enumerate() {
                let factor = T::nearest(plan.share(y, x));
                for ((share, g), bias) in share.iter_mut().zip(g).zip(&mut self.sums.bias) {
                    *share = *g * factor;
                    *bias += g.widen();
                }
            }
            let sums = self.sums.taps.chunks_exact_mut(TAPS * width);
            for (i, (taps, sums)) in self.taps.chunks_exact(TAPS * width).zip(sums).enumerate() {
                let window = plan.axes[0].windows[y][i];
                sum_rows(&mut row, self.x, window);
                row_gradient.fill(zero);
                for (x, g) in shares.chunks_exact(width).enumerate() {
                    let taps = taps.chunks_exact(width).zip(sums.chunks_exact_mut(width));
                    for (j, (tap, sums)) in taps.enumerate() {
                        let window = plan.axes[1].windows[x][j];
                        sum_places(&mut place, &row, window);
                        for ((sum, place), g) in sums.iter_mut().zip(&place).zip(g) {
                            *sum += place.widen() * g.widen();
                        }
                        for ((place, g), tap) in place.iter_mut().zip(g).zip(tap) {
                            *place = *g * *tap;
                        }
                        for to in row_gradient[window.times(width)].chunks_exact_mut(width) {
                            add(to, &place);
                        }
                    }
                }
                for to in self.gx[window.times(row.len())].chunks_exact_mut(row.len()) {
                    add(to, &row_gradient);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    fn leaves(size: [i64; 4], kind: Kind) -> [Tensor; 3] {
        let waves = |count: i64| (Tensor::arange(count, (Kind::Double, Device::Cpu)) * 1.3).sin();
        let rows = waves(size.iter().product()).view([size[0], size[2], size[3], size[1]]);
        let weight = waves(size[1] * 49).view([size[1], 1, 7, 7]);
        let all = [by_channels(&rows), weight, waves(size[1])];
        all.map(|x| x.to_kind(kind).set_requires_grad(true))
    }

    /// The summary and the gradients of map, weight and bias, as f64.
    fn values(size: [i64; 4], kind: Kind, own: bool) -> Vec<Tensor> {
        let [x, weight, bias] = leaves(size, kind);
        let cells = if own {
            summary(&x, &weight, &bias)
        } else {
            let near = x.conv2d(&weight, Some(&bias), [1, 1], [3, 3], [1, 1], size[1]);
            (near + &x).adaptive_avg_pool2d([7, 7])
        };
        let loss = (&cells * &cells).sum(Kind::Double);
        let gradients = Tensor::run_backward(&[loss], &[x, weight, bias], false, false);
        let all = std::iter::once(cells.detach()).chain(gradients);
        all.map(|tensor| tensor.contiguous().to_kind(Kind::Double)).collect()
    }

    #[test]
    fn it_is_the_convolution_its_input_and_the_pooling_with_their_gradients() {
        libtorch::init(1).expect("starts");
        for (height, width) in [(28, 28), (14, 14), (16, 9), (7, 8), (3, 5), (2, 2), (1, 1)] {
            let size = [2, 3, height, width];
            let defined = values(size, Kind::Double, false);
            for (kind, tolerance) in [(Kind::Double, 1e-13), (Kind::Float, 2e-6)] {
                for (own, defined) in values(size, kind, true).iter().zip(&defined) {
                    let far = (own - defined).norm() / defined.norm();
                    let far = far.double_value(&[]);
                    assert!(far < tolerance, "{height}×{width} {kind:?}: {far:.1e}");
                }
            }
        }
    }
}
