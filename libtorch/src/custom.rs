//! Results of own kernels as differentiable tensors.
#![expect(unsafe_code, reason = "hands a closure to the shim and reads its arguments")]

use std::ffi::{c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};

use tch::Tensor;

use crate::sys::{self, ShimError};

/// What a backward is made of: the gradient of the output to that of each input.
type Backward = Box<dyn FnOnce(&Tensor) -> Vec<Option<Tensor>> + Send>;

/// Makes `output` the differentiable result of `inputs`.
///
/// `output` must be fresh: computed under [`tch::no_grad`] or by own code, and no view of an input.
/// `backward` is called at most once, with the gradient of `output`, and returns one gradient an input, of
/// its shape, or none where there is none. It must hold tensors as [`Tensor::detach`] gives them, or the graph
/// would own itself. Where no input requires a gradient, or gradients are off, it is dropped.
///
/// # Errors
/// [`ShimError`] if libtorch refuses the tensors. A panic in `backward` makes the whole backward pass fail.
pub fn with_backward(
    output: Tensor,
    inputs: &[&Tensor],
    backward: impl FnOnce(&Tensor) -> Vec<Option<Tensor>> + Send + 'static,
) -> Result<Tensor, ShimError> {
    let handles: Vec<*const c_void> =
        inputs.iter().map(|input| input.as_ptr().cast::<c_void>()).collect();
    let backward: Backward = Box::new(backward);
    let context = Box::into_raw(Box::new(Some(backward))).cast::<c_void>();
    let result = output.as_ptr().cast::<c_void>();
    // SAFETY: all handles are tensors that live through the call. The shim takes `context`, gives it to
    // `run` while it holds it and at last once to `discard`.
    let error = unsafe {
        sys::percheron_attach(result, handles.as_ptr(), handles.len(), context, run, discard)
    };
    sys::check(error)?;
    Ok(output)
}

/// Calls the closure that `context` is, and hands its gradients to the shim.
extern "C" fn run(
    context: *mut c_void,
    gradient: *const c_void,
    slots: *mut c_void,
    count: usize,
) -> c_int {
    // SAFETY: `context` is what `with_backward` made, and the shim calls this from one thread at a time.
    let closure = unsafe { &mut *context.cast::<Option<Backward>>() };
    // SAFETY: the shim gives a tensor that lives through this call; the copy is another handle.
    let gradient = unsafe { Tensor::clone_from_ptr(gradient.cast_mut().cast()) };
    let work = || closure.take().expect("a graph is walked once")(&gradient);
    // A panic must not cross into C++; the shim turns this answer into an error.
    let Ok(gradients) = catch_unwind(AssertUnwindSafe(work)) else { return 1 };
    if gradients.len() != count {
        return 1;
    }
    for (index, gradient) in gradients.iter().enumerate() {
        if let Some(gradient) = gradient {
            // SAFETY: `slots` are `count` tensors, and the value lives through the call.
            unsafe { sys::percheron_assign(slots, index, gradient.as_ptr().cast::<c_void>()) };
        }
    }
    0
}

/// Frees the closure.
extern "C" fn discard(context: *mut c_void) {
    // SAFETY: `context` came from `Box::into_raw` of this type, and the shim calls this once.
    drop(unsafe { Box::from_raw(context.cast::<Option<Backward>>()) });
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tch::{Device, Kind};

    use super::*;
    use crate::{gradients_into, slice};

    fn leaf(values: &[f64]) -> Tensor {
        Tensor::from_slice(values).set_requires_grad(true)
    }

    #[test]
    fn a_product_with_its_own_backward_has_the_gradients_of_a_product() {
        let (a, b) = (leaf(&[1.0, 2.0]), leaf(&[3.0, 5.0]));
        let (x, y) = (a.detach(), b.detach());
        let product = with_backward(&x * &y, &[&a, &b], move |g| vec![Some(g * &y), Some(g * &x)]);
        let loss = (product.unwrap() * 2.0).sum(Kind::Double);
        let mut flat = Tensor::zeros([4], (Kind::Double, Device::Cpu));
        gradients_into(&loss, &[a, b], &mut flat).unwrap();
        assert_eq!(slice::<f64>(&flat).unwrap(), [6.0, 10.0, 2.0, 4.0]);
    }

    #[test]
    fn what_a_backward_holds_is_freed_with_the_graph_or_at_once_without_one() {
        let held = Arc::new(());
        let make = || {
            let (a, witness) = (leaf(&[1.0]), Arc::clone(&held));
            let output = a.detach() * 2.0;
            with_backward(output, &[&a], move |g| {
                drop(witness);
                vec![Some(g * 2.0)]
            })
            .unwrap()
        };
        let graph = make();
        assert_eq!(Arc::strong_count(&held), 2);
        drop(graph);
        assert_eq!(Arc::strong_count(&held), 1);
        let without = tch::no_grad(make);
        assert_eq!((Arc::strong_count(&held), without.requires_grad()), (1, false));
    }

    #[test]
    fn a_panic_in_a_backward_is_an_error() {
        let a = leaf(&[1.0]);
        let output = with_backward(a.detach() * 2.0, &[&a], |_| panic!("on purpose")).unwrap();
        let mut flat = Tensor::zeros([1], (Kind::Double, Device::Cpu));
        let error = gradients_into(&output.sum(Kind::Double), &[a], &mut flat).unwrap_err();
        assert!(error.0.contains("panicked"), "{error}");
    }
}
