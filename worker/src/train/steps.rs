//! How this worker makes steps: on the host, or on a GPU with what connects it to others.

use std::{
    ops::Range,
    time::{Duration, Instant},
};

use cluster::Rank;
use collective::{
    AbortHandle, Exchange as _, Mesh, Staged, TensorExchange,
    nccl::{CudaMemory, Nccl, NcclError, NcclMesh, Place, UniqueId},
};
use tch::Device;
use tracing::info;

use super::{
    Interrupted, Means, Transport,
    device_step::DeviceStepper,
    state::TrainState,
    step::{Stepper, Surroundings, Taken},
};
use crate::setup::Setup;

/// What makes steps.
#[derive(Debug)]
pub(crate) enum Steps {
    /// On the host.
    Host(Box<Stepper>),
    /// On a GPU.
    Device(Box<OnDevice>),
}

/// A GPU, and what connects it to those of other workers.
#[derive(Debug)]
pub(crate) struct OnDevice {
    stepper: DeviceStepper,
    device: Device,
    /// None: gradients go through the mesh.
    nccl: Option<Nccl>,
    /// Of this generation, if it has several members.
    communicator: Option<NcclMesh<CudaMemory>>,
}

impl Steps {
    /// For the device of `means`.
    ///
    /// # Errors
    /// What is missing, and what to do.
    pub(crate) fn new(setup: &Setup, state: &mut TrainState, means: Means) -> Result<Self, String> {
        if means.device == Device::Cpu {
            return match (means.transport, setup.recipe.reduction) {
                (Transport::Nccl, _) => {
                    Err("--transport nccl needs a GPU: choose --device cuda".to_owned())
                }
                (_, recipe::Reduction::Fast) => Err("recipe, reduction = fast needs GPUs: choose \
                                                     exact, or workers with --device cuda"
                    .to_owned()),
                (Transport::Auto | Transport::Mesh, recipe::Reduction::Exact) => {
                    Ok(Self::Host(Box::new(Stepper::new(setup, state))))
                }
            };
        }
        let nccl = match means.transport {
            Transport::Mesh => None,
            Transport::Auto | Transport::Nccl => {
                let nccl = Nccl::load(None).map_err(|error| {
                    format!("{error}, or choose --transport mesh for all workers of the run")
                })?;
                info!(version = nccl.version().map_err(|error| error.to_string())?, "NCCL");
                Some(nccl)
            }
        };
        let stepper = DeviceStepper::new(setup, state, means.graph);
        let device = means.device;
        Ok(Self::Device(Box::new(OnDevice { stepper, device, nccl, communicator: None })))
    }

    /// Plans the sums anew for another generation.
    pub(crate) fn regroup(&mut self, blocks: &[Range<u32>], rank: Rank) {
        match self {
            Self::Host(stepper) => stepper.sum_mut().regroup(blocks, rank),
            Self::Device(on) => on.stepper.regroup(blocks, rank),
        }
    }

    /// Connects the devices of a generation whose members are connected.
    ///
    /// # Errors
    /// [`Interrupted`] if a peer is lost or does not come.
    pub(crate) fn connect(
        &mut self,
        peers: &mut Mesh,
        abort: &AbortHandle,
        patience: Duration,
    ) -> Result<(), Interrupted> {
        let Self::Device(on) = self else { return Ok(()) };
        on.communicator = None;
        let Some(nccl) = on.nccl.clone().filter(|_| peers.size() > 1) else { return Ok(()) };
        let failed = |error: NcclError| Interrupted::Forming { reason: error.to_string() };
        // Rank 0 names the communicator, and the authenticated mesh carries the name.
        let mut name = [0; UniqueId::BYTES];
        if peers.rank() == Rank(0) {
            name = nccl.unique_id().map_err(failed)?.0;
        }
        peers.broadcast(Rank(0), &mut name)?;
        let place = Place {
            id: UniqueId(name),
            rank: peers.rank(),
            size: peers.size(),
            stall_timeout: super::stall_timeout(patience),
            abort: abort.clone(),
        };
        let memory = CudaMemory::of(on.device);
        let formed = NcclMesh::form(&nccl, place, memory, Instant::now() + patience * 4);
        on.communicator = Some(formed.map_err(|error| match error {
            NcclError::Aborted => collective::ExchangeError::Aborted.into(),
            error @ (NcclError::Library { .. }
            | NcclError::Refused { .. }
            | NcclError::Device(_)
            | NcclError::Deadline(_)) => failed(error),
        })?);
        Ok(())
    }

    /// Makes the update after `state`'s step.
    ///
    /// # Errors
    /// As [`Stepper::train_step`].
    pub(crate) fn train_step(
        &mut self,
        state: &mut TrainState,
        around: Surroundings<'_>,
    ) -> Result<Taken, Interrupted> {
        let on = match self {
            Self::Host(stepper) => return stepper.train_step(state, around),
            Self::Device(on) => on,
        };
        let Surroundings { setup, orders, progress, feed, peers } = around;
        let mut staged = Staged(peers);
        let peers: &mut dyn TensorExchange = match &mut on.communicator {
            Some(communicator) => communicator,
            None => &mut staged,
        };
        on.stepper.train_step(state, Surroundings { setup, orders, progress, feed, peers })
    }
}
