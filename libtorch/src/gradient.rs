//! Gradients of a loss, written into one flat tensor.
#![expect(unsafe_code, reason = "calls the shim")]

use std::ffi::c_void;

use tch::Tensor;

use crate::sys::{self, ShimError};

/// Writes the gradients of the scalar `loss` with respect to `leaves` one after the other into `flat`.
///
/// `flat` is `[E]`, contiguous, where E is the number of elements of all leaves. What it held before is
/// overwritten; a leaf that the loss does not depend on gives zeros. The graph is freed, and no `.grad` is
/// read or written.
///
/// # Errors
/// [`ShimError`] if the sizes do not add up or backward fails. `flat` may then be half written.
pub fn gradients_into(
    loss: &Tensor,
    leaves: &[Tensor],
    flat: &mut Tensor,
) -> Result<(), ShimError> {
    let handles: Vec<*const c_void> =
        leaves.iter().map(|leaf| leaf.as_ptr().cast::<c_void>()).collect();
    let loss = loss.as_ptr().cast::<c_void>();
    let target = flat.as_mut_ptr().cast::<c_void>().cast_const();
    // SAFETY: all handles are tensors that live through the call; `flat` is borrowed exclusively.
    let error = unsafe { sys::percheron_gradients(loss, handles.as_ptr(), handles.len(), target) };
    sys::check(error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flat::slice;

    #[test]
    fn gradients_land_in_order_and_unused_leaves_give_zeros() {
        let a = Tensor::from_slice(&[1.0_f64, 2.0]).set_requires_grad(true);
        let unused = Tensor::from_slice(&[5.0_f64]).set_requires_grad(true);
        let b = Tensor::from_slice(&[3.0_f64, 4.0]).set_requires_grad(true);
        let loss = (&a * &b).sum(tch::Kind::Double);
        let mut flat = Tensor::full([5], 7.0, (tch::Kind::Double, tch::Device::Cpu));
        let leaves = [a.shallow_clone(), unused, b.shallow_clone()];
        gradients_into(&loss, &leaves, &mut flat).unwrap();
        assert_eq!(slice::<f64>(&flat).unwrap(), [3.0, 4.0, 0.0, 1.0, 2.0]);
        assert!(!a.grad().defined());
    }

    #[test]
    fn a_flat_gradient_of_the_wrong_size_is_refused() {
        let a = Tensor::from_slice(&[1.0_f64, 2.0]).set_requires_grad(true);
        let loss = a.sum(tch::Kind::Double);
        let mut flat = Tensor::zeros([3], (tch::Kind::Double, tch::Device::Cpu));
        let error = gradients_into(&loss, &[a], &mut flat).unwrap_err();
        assert!(error.0.contains("have 2 elements, the flat gradient 3"), "{error}");
    }
}
