//! Arithmetic on slices for the passes over flat tensors.
//!
//! On the CPU the optimizer and the averages are loops over slices and not tensor operations: one pass over
//! memory instead of ten, no temporaries, and bits that depend on neither thread count nor instruction set.

use std::ops::{Add, Div, Mul, Sub};

use libtorch::Element;
use tch::{Kind, Tensor};

/// A floating-point element with the arithmetic that the passes need.
pub(crate) trait Real:
    Element
    + PartialOrd
    + Send
    + Sync
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
{
    /// The nearest value of this type.
    fn nearest(value: f64) -> Self;
    /// Exact.
    fn widen(self) -> f64;
    fn square_root(self) -> Self;
}

impl Real for f32 {
    #[expect(clippy::cast_possible_truncation, reason = "rounding is what it is for")]
    fn nearest(value: f64) -> f32 {
        value as f32
    }
    fn widen(self) -> f64 {
        f64::from(self)
    }
    fn square_root(self) -> f32 {
        self.sqrt()
    }
}

impl Real for f64 {
    fn nearest(value: f64) -> f64 {
        value
    }
    fn widen(self) -> f64 {
        self
    }
    fn square_root(self) -> f64 {
        self.sqrt()
    }
}

/// The elements of a flat tensor on the CPU.
pub(crate) fn elements<T: Real>(tensor: &Tensor) -> &[T] {
    libtorch::slice(tensor).expect("flat tensors are contiguous and of one kind")
}

/// The elements of a flat tensor on the CPU, to be changed.
pub(crate) fn elements_mut<T: Real>(tensor: &mut Tensor) -> &mut [T] {
    libtorch::slice_mut(tensor).expect("flat tensors are contiguous and of one kind")
}

/// Whether a tensor is of double precision.
///
/// # Panics
/// If it is neither single nor double.
pub(crate) fn is_double(tensor: &Tensor) -> bool {
    let kind = tensor.kind();
    assert!(
        matches!(kind, Kind::Float | Kind::Double),
        "flat tensors are f32 or f64, not {kind:?}"
    );
    kind == Kind::Double
}
