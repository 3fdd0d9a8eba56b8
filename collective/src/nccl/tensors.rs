//! Tensors of CUDA devices over NCCL.

use cluster::Rank;
use libtorch::cuda::{self, Marker};
use tch::{Device, Kind, Tensor};

use super::{DeviceMemory, DeviceRange, Mark, NcclMesh};
use crate::{Exchange, ExchangeError, TensorExchange};

impl<D: DeviceMemory> TensorExchange for NcclMesh<D> {
    fn rank(&self) -> Rank {
        Exchange::rank(self)
    }

    fn size(&self) -> u32 {
        Exchange::size(self)
    }

    fn all_to_all(
        &mut self,
        outgoing: &[Tensor],
        incoming: &mut [Tensor],
    ) -> Result<(), ExchangeError> {
        let range = |row: &Tensor| {
            assert!(row.kind() == Kind::Float && row.is_contiguous(), "a contiguous row of floats");
            DeviceRange { address: row.data_ptr(), bytes: row.numel() * size_of::<f32>() }
        };
        let out: Vec<_> = outgoing.iter().map(range).collect();
        let into: Vec<_> = incoming.iter().map(range).collect();
        // SAFETY: the tensors live through the call, which returns when the device is done with them. Those of
        // `incoming` are borrowed exclusively; the stream is the one that made `outgoing`.
        #[expect(unsafe_code, reason = "the ranges are memory of tensors")]
        unsafe {
            self.all_to_all_on_device(&out, &into)
        }
    }

    fn sum(&mut self, row: &mut Tensor) -> Result<(), ExchangeError> {
        assert!(row.kind() == Kind::Float && row.is_contiguous(), "a contiguous row of floats");
        // SAFETY: as in `all_to_all`.
        #[expect(unsafe_code, reason = "the address is memory of a tensor")]
        unsafe {
            self.sum_on_device(row.data_ptr(), row.numel())
        }
    }
}

/// Memory of a CUDA device, and the stream of the thread that uses it.
#[derive(Debug)]
pub struct CudaMemory {
    device: Device,
    slots: Vec<Tensor>,
}

impl CudaMemory {
    /// Of `device`, whose stream is that of the calling thread.
    #[must_use]
    pub fn of(device: Device) -> Self {
        Self { device, slots: Vec::new() }
    }
}

impl DeviceMemory for CudaMemory {
    type Mark = Marker;

    fn stream(&mut self) -> Result<*mut std::ffi::c_void, String> {
        cuda::raw_stream(self.device).map_err(|error| error.0)
    }

    fn mark(&mut self) -> Result<Marker, String> {
        Marker::here(self.device).map_err(|error| error.0)
    }

    fn slot(&mut self, slot: usize, bytes: usize) -> Result<*mut std::ffi::c_void, String> {
        while self.slots.len() <= slot {
            self.slots.push(Tensor::zeros([1], (Kind::Uint8, self.device)));
        }
        let held = &mut self.slots[slot];
        if held.numel() < bytes {
            let bytes = i64::try_from(bytes).map_err(|error| error.to_string())?;
            *held = Tensor::f_zeros([bytes], (Kind::Uint8, self.device)).map_err(one_line)?;
        }
        Ok(held.data_ptr())
    }

    fn write(&mut self, slot: usize, bytes: &[u8]) -> Result<(), String> {
        let held = &self.slots[slot];
        let length = i64::try_from(bytes.len()).map_err(|error| error.to_string())?;
        let mut target = held.narrow(0, 0, length);
        target.f_copy_(&Tensor::from_slice(bytes)).map_err(one_line)
    }

    fn read(&mut self, slot: usize, bytes: &mut [u8]) -> Result<(), String> {
        let length = i64::try_from(bytes.len()).map_err(|error| error.to_string())?;
        let held =
            self.slots[slot].narrow(0, 0, length).f_to_device(Device::Cpu).map_err(one_line)?;
        let held = libtorch::slice::<u8>(&held).map_err(|error| error.to_string())?;
        bytes.copy_from_slice(held);
        Ok(())
    }
}

/// The first line of what libtorch says; the others are a trace of its own calls.
#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn one_line(error: tch::TchError) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

impl Mark for Marker {
    fn is_passed(&self) -> Result<bool, String> {
        Self::is_passed(self).map_err(|error| error.0)
    }
}
