//! Mixed precision: matrix products and convolutions in a shorter kind than the tensors they are given.

use tch::{Device, Kind};

use crate::sys::{self, ShimError};

/// What the shim calls the kinds, and no autocast.
const SHORT: [(Kind, i32); 2] = [(Kind::BFloat16, 1), (Kind::Half, 2)];
const OFF: i32 = 0;

/// Runs `work` with libtorch's autocast to `kind` on this thread: matrix products, linear layers, attention
/// and convolutions of f32 tensors compute and return `kind`, what loses too much in it stays in f32, and
/// gradients flow back to the f32 tensors. With [`Kind::Float`] it only runs `work`.
///
/// Call it around the forward pass only: backward follows what forward recorded.
///
/// # Errors
/// [`ShimError`] if the device has no autocast to this kind.
pub fn autocast<T>(device: Device, kind: Kind, work: impl FnOnce() -> T) -> Result<T, ShimError> {
    if kind == Kind::Float {
        return Ok(work());
    }
    let short = SHORT.iter().find(|(known, _)| *known == kind);
    let (_, number) = short.ok_or_else(|| ShimError(format!("no autocast to {kind:?}")))?;
    let is_cuda = i32::from(device.is_cuda());
    sys::check(sys::percheron_autocast(is_cuda, *number))?;
    let _off = Off { is_cuda };
    Ok(work())
}

/// Turns autocast off when `work` has returned or panicked.
struct Off {
    is_cuda: i32,
}

impl Drop for Off {
    fn drop(&mut self) {
        let off = sys::check(sys::percheron_autocast(self.is_cuda, OFF));
        off.expect("what could be turned on can be turned off");
    }
}

#[cfg(test)]
mod tests {
    use tch::Tensor;

    use super::*;

    #[test]
    fn products_are_short_inside_and_gradients_are_not() {
        let weight = Tensor::from_slice(&[1.0_f32, 2.0, 3.0, 4.0]).view([2, 2]);
        let weight = weight.set_requires_grad(true);
        let product = || weight.matmul(&weight);
        let short = autocast(Device::Cpu, Kind::BFloat16, product).unwrap();
        assert_eq!(short.kind(), Kind::BFloat16);
        assert_eq!(product().kind(), Kind::Float, "it is off again");
        assert_eq!(autocast(Device::Cpu, Kind::Float, product).unwrap().kind(), Kind::Float);
        let mut gradient = Tensor::zeros([4], (Kind::Float, Device::Cpu));
        let loss = short.to_kind(Kind::Float).sum(Kind::Float);
        crate::gradients_into(&loss, &[weight.shallow_clone()], &mut gradient).unwrap();
        assert_eq!(crate::slice::<f32>(&gradient).unwrap(), [7.0, 11.0, 9.0, 13.0]);
    }

    #[test]
    fn a_kind_without_autocast_is_refused_and_nothing_is_left_on() {
        assert!(autocast(Device::Cpu, Kind::Int64, || ()).is_err());
        let one = Tensor::ones([1, 1], (Kind::Float, Device::Cpu));
        assert_eq!(one.matmul(&one).kind(), Kind::Float);
    }
}
