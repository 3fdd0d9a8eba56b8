//! A CUDA device as training uses it: its own stream, marks in it, graphs of it, and its memory.
#![expect(unsafe_code, reason = "calls the shim and owns what it makes")]

use std::ffi::c_void;
use std::ptr::{self, NonNull};

use tch::Device;

use crate::sys::{self, ShimError};

/// Makes `device` this thread's device and gives the thread a stream of its own, on which all that follows
/// runs. On the CPU it does nothing.
///
/// # Errors
/// [`ShimError`] if there is no such device; the text says why.
pub fn enter(device: Device) -> Result<(), ShimError> {
    match ordinal(device)? {
        Some(ordinal) => sys::check(sys::percheron_cuda_enter(ordinal)),
        None => Ok(()),
    }
}

/// Waits until the device has done all that this thread asked of it. On the CPU it does nothing.
///
/// # Errors
/// [`ShimError`] if an operation failed on the device.
pub fn synchronize(device: Device) -> Result<(), ShimError> {
    match ordinal(device)? {
        Some(ordinal) => sys::check(sys::percheron_cuda_synchronize(ordinal)),
        None => Ok(()),
    }
}

/// The most bytes that tensors have held on `device` since the process began; 0 on the CPU.
///
/// # Errors
/// [`ShimError`] if the device cannot say.
pub fn peak_bytes(device: Device) -> Result<usize, ShimError> {
    let Some(ordinal) = ordinal(device)? else { return Ok(0) };
    let mut bytes = 0;
    // SAFETY: `bytes` is valid for one write.
    sys::check(unsafe { sys::percheron_cuda_peak(ordinal, &raw mut bytes) })?;
    Ok(bytes)
}

/// The PCI address of a device, `DOMAIN:BUS:DEVICE.FUNCTION` in hexadecimal digits; none for the CPU.
///
/// # Errors
/// [`ShimError`] if there is no such device.
pub fn bus_id(device: Device) -> Result<Option<String>, ShimError> {
    let Some(ordinal) = ordinal(device)? else { return Ok(None) };
    // SAFETY: the function writes no more than `capacity` bytes, and ends them with a nul.
    let call = |out, capacity| unsafe { sys::percheron_cuda_bus_id(ordinal, out, capacity) };
    sys::read_text(call).map(Some)
}

/// This thread's current stream on `device`, as CUDA's libraries take it: a `cudaStream_t`.
///
/// # Errors
/// [`ShimError`] if `device` is no CUDA device that is there.
pub fn raw_stream(device: Device) -> Result<*mut c_void, ShimError> {
    let ordinal = ordinal(device)?.ok_or_else(|| ShimError("the CPU has no streams".to_owned()))?;
    let mut stream = ptr::null_mut();
    // SAFETY: `stream` is valid for one write.
    sys::check(unsafe { sys::percheron_cuda_stream(ordinal, &raw mut stream) })?;
    Ok(stream)
}

/// The number of a CUDA device; none on the CPU.
fn ordinal(device: Device) -> Result<Option<i32>, ShimError> {
    match device {
        Device::Cpu => Ok(None),
        Device::Cuda(number) => i32::try_from(number)
            .map(Some)
            .map_err(|_| ShimError(format!("{number} is not a CUDA device number"))),
        Device::Mps | Device::Vulkan => Err(ShimError(format!("{device:?} is not supported"))),
    }
}

/// A place in a stream, which can be asked whether the device has passed it.
#[derive(Debug)]
pub struct Marker(NonNull<c_void>);

// SAFETY: an event may be asked and destroyed from any thread.
unsafe impl Send for Marker {}

impl Marker {
    /// A mark after what this thread's stream on `device` holds now.
    ///
    /// # Errors
    /// [`ShimError`] if `device` is no CUDA device that is there.
    pub fn here(device: Device) -> Result<Self, ShimError> {
        let Some(ordinal) = ordinal(device)? else {
            return Err(ShimError("the CPU has no streams".to_owned()));
        };
        let mut raw = ptr::null_mut();
        // SAFETY: `raw` is valid for one write.
        sys::check(unsafe { sys::percheron_marker_new(&raw mut raw) })?;
        let marker = Self(NonNull::new(raw).expect("the shim made one"));
        // SAFETY: the marker is alive and used by this thread alone.
        sys::check(unsafe { sys::percheron_marker_record(marker.0.as_ptr(), ordinal) })?;
        Ok(marker)
    }

    /// Whether the device has done all that was before the mark. Does not wait.
    ///
    /// # Errors
    /// [`ShimError`] if an operation before it failed.
    pub fn is_passed(&self) -> Result<bool, ShimError> {
        let mut passed = 0;
        // SAFETY: the marker is alive, and `passed` is valid for one write.
        sys::check(unsafe { sys::percheron_marker_is_passed(self.0.as_ptr(), &raw mut passed) })?;
        Ok(passed != 0)
    }
}

impl Drop for Marker {
    fn drop(&mut self) {
        // SAFETY: the shim made it, and this is its last use.
        unsafe { sys::percheron_marker_drop(self.0.as_ptr()) };
    }
}

/// Work of a device that was recorded once and can be done again with a single launch.
///
/// It reads and writes the memory that was there when it was recorded. Keep the tensors that it takes and
/// gives alive, and change their values in place.
#[derive(Debug)]
pub struct Graph(NonNull<c_void>);

impl Graph {
    /// Records what `work` puts on this thread's stream, which [`enter`] must have made. Nothing is computed.
    ///
    /// `work` may not wait for the device, read a value from it or copy from memory of the host. Run it a few
    /// times before: libraries prepare themselves at first use. What it returns is memory of the graph.
    ///
    /// # Errors
    /// [`ShimError`] if something in `work` cannot be recorded.
    pub fn record<T, E: From<ShimError>>(
        work: impl FnOnce() -> Result<T, E>,
    ) -> Result<(Self, T), E> {
        let mut raw = ptr::null_mut();
        // SAFETY: `raw` is valid for one write.
        sys::check(unsafe { sys::percheron_graph_begin(&raw mut raw) })?;
        let graph = Self(NonNull::new(raw).expect("the shim made one"));
        let made = work();
        // SAFETY: the graph is alive. Recording must end whether or not `work` succeeded.
        let ended = sys::check(unsafe { sys::percheron_graph_end(graph.0.as_ptr()) });
        let made = made?;
        ended?;
        Ok((graph, made))
    }

    /// Does the work again, on this thread's stream.
    ///
    /// # Errors
    /// [`ShimError`] if it cannot be launched.
    pub fn replay(&mut self) -> Result<(), ShimError> {
        // SAFETY: the graph is alive and borrowed exclusively.
        sys::check(unsafe { sys::percheron_graph_replay(self.0.as_ptr()) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: the shim made it, and this is its last use.
        unsafe { sys::percheron_graph_drop(self.0.as_ptr()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn on_the_cpu_there_is_nothing_to_enter_or_to_wait_for() {
        assert_eq!(enter(Device::Cpu), Ok(()));
        assert_eq!(synchronize(Device::Cpu), Ok(()));
        assert_eq!(peak_bytes(Device::Cpu), Ok(0));
        assert!(raw_stream(Device::Cpu).is_err());
        assert!(Marker::here(Device::Cpu).is_err());
    }

    #[test]
    fn a_device_that_is_not_there_is_an_error_and_no_crash() {
        crate::init(1).unwrap();
        assert!(enter(Device::Cuda(9_999)).is_err());
        assert!(enter(Device::Vulkan).is_err());
    }
}
