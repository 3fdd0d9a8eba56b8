//! What the kernels on channels-last maps share.
//!
//! A map `[B, C, H, W]` whose channels lie next to each other is a slice of B·H·W rows of C elements. Sums
//! over rows are f64 and go from the first row to the last, so a kernel's bits depend on its arguments alone.

use tch::{Device, Kind, Tensor};

use crate::elementwise::{Real, elements};

/// Whether own kernels take `x`: a map on the CPU, single or double, with its channels next to each other.
pub(crate) fn takes(x: &Tensor) -> bool {
    let real = matches!(x.kind(), Kind::Float | Kind::Double);
    real && x.device() == Device::Cpu && x.dim() == 4 && by_rows(x).is_contiguous()
}

/// `[B, C, H, W]` as `[B, H, W, C]`, without a copy.
pub(crate) fn by_rows(x: &Tensor) -> Tensor {
    x.permute([0, 2, 3, 1])
}

/// `[B, H, W, C]` as `[B, C, H, W]`, without a copy and outside the graph: as an output it may be changed in place.
pub(crate) fn by_channels(rows: &Tensor) -> Tensor {
    rows.permute([0, 3, 1, 2]).detach()
}

/// A map as contiguous `[B, H, W, C]`, outside the graph; a copy only if its channels lie apart.
pub(crate) fn rows_of(x: &Tensor) -> Tensor {
    by_rows(&x.detach()).contiguous()
}

/// A tensor of this shape, kind and device, outside the graph, to be written.
pub(crate) fn blank_like(rows: &Tensor) -> Tensor {
    rows.detach().empty_like()
}

/// The elements of a contiguous tensor, outside the graph, as f64.
pub(crate) fn widened<T: Real>(tensor: &Tensor) -> Vec<f64> {
    elements::<T>(tensor).iter().map(|value| value.widen()).collect()
}

/// `[n]` of a tensor's kind from values that are rounded to it.
pub(crate) fn rounded(values: &[f64], like: &Tensor) -> Tensor {
    Tensor::from_slice(values).to_kind(like.kind())
}

/// Values rounded to `T`.
pub(crate) fn nearest<T: Real>(values: impl IntoIterator<Item = f64>) -> Vec<T> {
    values.into_iter().map(T::nearest).collect()
}
