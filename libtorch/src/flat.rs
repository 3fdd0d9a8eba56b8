//! Slices over the storage of contiguous CPU tensors.
#![expect(unsafe_code, reason = "makes slices from data pointers")]

use tch::{Device, Kind, Tensor};

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
    impl Sealed for i64 {}
    impl Sealed for u8 {}
}

/// A Rust type that is bit for bit the element of a tensor kind.
pub trait Element: sealed::Sealed + Copy + 'static {
    /// The kind of a tensor with these elements.
    const KIND: Kind;
}

impl Element for f32 {
    const KIND: Kind = Kind::Float;
}
impl Element for f64 {
    const KIND: Kind = Kind::Double;
}
impl Element for i64 {
    const KIND: Kind = Kind::Int64;
}
impl Element for u8 {
    const KIND: Kind = Kind::Uint8;
}

/// A tensor whose storage cannot be seen as a slice.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FlatError {
    /// The slice has another element type than the tensor.
    #[error("the tensor holds {found:?}, not {wanted:?}")]
    Kind { found: Kind, wanted: Kind },
    /// Only host memory can be a slice.
    #[error("the tensor is on {0:?}, not on the CPU")]
    Device(Device),
    /// The elements do not lie one after the other.
    #[error("the tensor is not contiguous")]
    Strided,
    /// The tensor has no storage, or not a dense one.
    #[error("the tensor is undefined or sparse")]
    Undefined,
}

/// The elements of a contiguous CPU tensor, in row-major order, without a copy.
///
/// Tensors are handles: others may share the storage. No operation may write to it through another handle
/// while the slice lives.
///
/// # Errors
/// [`FlatError`] if the tensor is of another kind, on another device or strided.
pub fn slice<T: Element>(tensor: &Tensor) -> Result<&[T], FlatError> {
    let len = check::<T>(tensor)?;
    if len == 0 {
        return Ok(&[]);
    }
    // SAFETY: a contiguous CPU tensor of this kind has `len` initialised elements from its data pointer,
    // aligned for their type; the storage lives as long as the tensor, which the result borrows.
    Ok(unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast::<T>(), len) })
}

/// As [`slice()`], for writing. No other handle may be used for the storage while the slice lives, and autograd
/// does not see what is written.
///
/// # Errors
/// [`FlatError`] if the tensor is of another kind, on another device or strided.
pub fn slice_mut<T: Element>(tensor: &mut Tensor) -> Result<&mut [T], FlatError> {
    let len = check::<T>(tensor)?;
    if len == 0 {
        return Ok(&mut []);
    }
    // SAFETY: as in `slice`; the exclusive borrow of the tensor makes this the only slice from this handle.
    Ok(unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<T>(), len) })
}

/// The number of elements, if they form a slice of `T`.
fn check<T: Element>(tensor: &Tensor) -> Result<usize, FlatError> {
    if !tensor.defined() || tensor.is_sparse() {
        return Err(FlatError::Undefined);
    }
    if tensor.kind() != T::KIND {
        return Err(FlatError::Kind { found: tensor.kind(), wanted: T::KIND });
    }
    if tensor.device() != Device::Cpu {
        return Err(FlatError::Device(tensor.device()));
    }
    if !tensor.is_contiguous() {
        return Err(FlatError::Strided);
    }
    Ok(tensor.numel())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_reads_and_writes_the_tensor_itself() {
        let mut tensor = Tensor::from_slice(&[1.0_f32, 2.0, 3.0, 4.0]).view([2, 2]);
        assert_eq!(slice::<f32>(&tensor).unwrap(), [1.0, 2.0, 3.0, 4.0]);
        slice_mut::<f32>(&mut tensor).unwrap()[3] = 9.0;
        assert_eq!(tensor.double_value(&[1, 1]), 9.0);
    }

    #[test]
    fn a_view_starts_at_its_own_offset() {
        let tensor = Tensor::from_slice(&[1.0_f64, 2.0, 3.0]);
        assert_eq!(slice::<f64>(&tensor.narrow(0, 1, 2)).unwrap(), [2.0, 3.0]);
    }

    #[test]
    fn what_is_no_slice_is_refused() {
        let tensor = Tensor::from_slice(&[1.0_f32, 2.0, 3.0, 4.0]).view([2, 2]);
        let wanted = FlatError::Kind { found: Kind::Float, wanted: Kind::Double };
        assert_eq!(slice::<f64>(&tensor), Err(wanted));
        assert_eq!(slice::<f32>(&tensor.tr()), Err(FlatError::Strided));
        assert_eq!(slice::<f32>(&Tensor::new()), Err(FlatError::Undefined));
        assert_eq!(slice::<f32>(&tensor.narrow(0, 0, 0)), Ok(&[][..]));
    }
}
