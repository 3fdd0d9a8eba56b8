//! NCCL between the devices of a generation (NVIDIA Collective Communications Library, user guide, "Fault
//! tolerance").
//!
//! The thread that forms a communicator makes all calls on it. They return at once; it then watches the device,
//! the communicator's own state and the abort handle, so that neither a lost peer nor a stopped one holds it. Any
//! failure aborts the communicator for good; the next generation makes another one from a new id.

mod sys;
mod tensors;

use std::{
    ffi::c_void,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use cluster::Rank;

use self::sys::{Library, Progress, Raw};
use crate::{AbortHandle, Exchange, ExchangeError, RankList, take_own_message};

pub use self::{sys::UniqueId, tensors::CudaMemory};

/// NCCL cannot be used as asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NcclError {
    /// It is not there, or is no NCCL.
    #[error("NCCL cannot be loaded from {path}: {reason}; put its folder on LD_LIBRARY_PATH")]
    Library {
        /// Where it was looked for.
        path: String,
        /// What the loader says.
        reason: String,
    },
    /// It refused a call, or a communicator failed.
    #[error("NCCL: {what}: {detail}")]
    Refused {
        /// The kind of error.
        what: String,
        /// What NCCL says of it.
        detail: String,
    },
    /// The device refused.
    #[error("the device failed: {0}")]
    Device(String),
    /// The abort handle ended the formation.
    #[error("aborted")]
    Aborted,
    /// The others did not come.
    #[error("the ranks did not connect in {0:?}")]
    Deadline(Duration),
}

/// The loaded library.
#[derive(Clone)]
pub struct Nccl(Arc<Library>);

impl std::fmt::Debug for Nccl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Nccl").finish()
    }
}

impl Nccl {
    /// Loads NCCL from `path`, or the copy that the process has or the loader finds.
    ///
    /// # Errors
    /// [`NcclError::Library`] says where it was looked for.
    pub fn load(path: Option<&Path>) -> Result<Self, NcclError> {
        Library::load(path).map(|library| Self(Arc::new(library)))
    }

    /// Its version as NCCL writes it: 22809 is 2.28.9.
    ///
    /// # Errors
    /// [`NcclError::Refused`] if it does not say.
    pub fn version(&self) -> Result<i32, NcclError> {
        self.0.version()
    }

    /// A new name for one communicator. One rank makes it and all are given it.
    ///
    /// # Errors
    /// [`NcclError::Refused`], as where no network interface is found.
    pub fn unique_id(&self) -> Result<UniqueId, NcclError> {
        self.0.unique_id()
    }
}

/// The device of a rank: its stream, and memory through which messages of the host go.
pub trait DeviceMemory: Send {
    /// A place in the stream.
    type Mark: Mark;

    /// The stream on which the exchange runs: a `cudaStream_t`.
    ///
    /// # Errors
    /// What the device says.
    fn stream(&mut self) -> Result<*mut c_void, String>;

    /// Marks the end of what the stream holds now.
    ///
    /// # Errors
    /// What the device says.
    fn mark(&mut self) -> Result<Self::Mark, String>;

    /// Device memory number `slot`, at least one and at least `bytes` bytes long. It stays where it is until the
    /// slot is asked for again with more bytes.
    ///
    /// # Errors
    /// What the device says, as where it has no memory left.
    fn slot(&mut self, slot: usize, bytes: usize) -> Result<*mut c_void, String>;

    /// Copies `bytes` into a slot.
    ///
    /// # Errors
    /// What the device says.
    fn write(&mut self, slot: usize, bytes: &[u8]) -> Result<(), String>;

    /// Copies the beginning of a slot into `bytes`.
    ///
    /// # Errors
    /// What the device says.
    fn read(&mut self, slot: usize, bytes: &mut [u8]) -> Result<(), String>;
}

/// A place in a stream.
pub trait Mark {
    /// Whether the device has done all that was before it. Does not wait.
    ///
    /// # Errors
    /// If an operation before it failed.
    fn is_passed(&self) -> Result<bool, String>;
}

/// A range of device memory: an address and its length in bytes.
#[derive(Debug, Clone, Copy)]
pub struct DeviceRange {
    /// Its address on the device.
    pub address: *mut c_void,
    /// Its length in bytes.
    pub bytes: usize,
}

/// A communicator of the ranks of one generation.
pub struct NcclMesh<D: DeviceMemory> {
    library: Nccl,
    /// None once it was aborted.
    comm: Option<Raw>,
    device: D,
    rank: Rank,
    size: u32,
    abort: AbortHandle,
    stall_timeout: Duration,
    failed: Option<ExchangeError>,
}

// SAFETY: the communicator has no thread of its own; whoever holds the exchange makes all calls on it, one at a
// time, as `&mut self` ensures.
#[expect(unsafe_code, reason = "a communicator may change hands between calls")]
unsafe impl<D: DeviceMemory> Send for NcclMesh<D> {}

impl<D: DeviceMemory> std::fmt::Debug for NcclMesh<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { rank, size, failed, .. } = self;
        write!(f, "NcclMesh {{ rank: {rank}, size: {size}, failed: {failed:?} }}")
    }
}

/// A rank's place in a communicator.
#[derive(Debug, Clone)]
pub struct Place {
    /// The name that all ranks were given.
    pub id: UniqueId,
    /// This rank.
    pub rank: Rank,
    /// How many ranks there are.
    pub size: u32,
    /// How long an exchange may stand still.
    pub stall_timeout: Duration,
    /// Ends the formation and all exchanges.
    pub abort: AbortHandle,
}

impl<D: DeviceMemory> NcclMesh<D> {
    /// Connects all ranks of `place.id`; each must call it. Waits until `deadline` at most.
    ///
    /// # Errors
    /// [`NcclError`]; nothing is left behind.
    pub fn form(
        library: &Nccl,
        place: Place,
        device: D,
        deadline: Instant,
    ) -> Result<Self, NcclError> {
        let Place { id, rank, size, stall_timeout, abort } = place;
        let begun = Instant::now();
        let comm = Some(library.0.init(id, rank.0, size)?);
        let failed = None;
        let library = library.clone();
        // From here on dropping it aborts what was begun.
        let mesh = Self { library, comm, device, rank, size, abort, stall_timeout, failed };
        let mut pause = Pause::default();
        while mesh.progress()? == Progress::Busy {
            if mesh.abort.is_aborted() {
                return Err(NcclError::Aborted);
            }
            if Instant::now() > deadline {
                return Err(NcclError::Deadline(begun.elapsed()));
            }
            pause.take();
        }
        Ok(mesh)
    }

    fn progress(&self) -> Result<Progress, NcclError> {
        self.library.0.progress(self.comm.expect("it lives until it has failed"))
    }

    /// Sends `outgoing[p]` to rank `p` and receives from it into `incoming[p]`, all in device memory; the message
    /// to oneself is not moved. Returns when the device has done it.
    ///
    /// # Errors
    /// [`ExchangeError`], and from then on the same error at every call.
    ///
    /// # Safety
    /// The ranges are memory of this rank's device; those of `incoming` overlap no other and are not used by
    /// anyone until the call returns. The stream has passed, or holds, all that makes `outgoing`.
    #[expect(unsafe_code, reason = "takes addresses of the device")]
    pub unsafe fn all_to_all_on_device(
        &mut self,
        outgoing: &[DeviceRange],
        incoming: &[DeviceRange],
    ) -> Result<(), ExchangeError> {
        let me = self.rank.0;
        let others = |ranges: &[DeviceRange]| -> Vec<(u32, DeviceRange)> {
            let ranked = (0_u32..).zip(ranges.iter().copied());
            ranked.filter(|(rank, range)| *rank != me && range.bytes > 0).collect()
        };
        let sources: Vec<(u32, sys::Source)> = others(outgoing)
            .into_iter()
            .map(|(rank, range)| (rank, (range.address.cast_const(), range.bytes)))
            .collect();
        let targets: Vec<(u32, sys::Target)> = others(incoming)
            .into_iter()
            .map(|(rank, range)| (rank, (range.address, range.bytes)))
            .collect();
        let peers =
            sources.iter().map(|(rank, _)| *rank).chain(targets.iter().map(|(rank, _)| *rank));
        let mut peers: Vec<Rank> = peers.map(Rank).collect();
        peers.sort_unstable();
        peers.dedup();
        self.carry_out(peers, |library, comm, stream| {
            // SAFETY: as this function's own contract says.
            unsafe { library.exchange(comm, stream, &sources, &targets) }
        })
    }

    /// Adds all ranks' `floats` f32 at `address` in place, in whatever order NCCL takes: reproducible for one
    /// number of ranks only. Returns when the device has done it.
    ///
    /// # Errors
    /// As [`NcclMesh::all_to_all_on_device`].
    ///
    /// # Safety
    /// As [`NcclMesh::all_to_all_on_device`].
    #[expect(unsafe_code, reason = "takes an address of the device")]
    pub unsafe fn sum_on_device(
        &mut self,
        address: *mut c_void,
        floats: usize,
    ) -> Result<(), ExchangeError> {
        let peers = (0..self.size).map(Rank).filter(|rank| *rank != self.rank).collect();
        self.carry_out(peers, |library, comm, stream| {
            // SAFETY: as this function's own contract says.
            unsafe { library.sum(comm, stream, address, floats) }
        })
    }

    /// Starts a call and watches it to its end.
    fn carry_out(
        &mut self,
        peers: Vec<Rank>,
        call: impl FnOnce(&Library, Raw, Raw) -> Result<(), NcclError>,
    ) -> Result<(), ExchangeError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        self.watched(peers, call).map_err(|error| self.fail(error))
    }

    fn watched(
        &mut self,
        peers: Vec<Rank>,
        call: impl FnOnce(&Library, Raw, Raw) -> Result<(), NcclError>,
    ) -> Result<(), ExchangeError> {
        let comm = self.comm.ok_or(ExchangeError::Aborted)?;
        if self.abort.is_aborted() {
            return Err(ExchangeError::Aborted);
        }
        let first = peers.first().copied().unwrap_or(self.rank);
        // NCCL does not say which peer it was; the coordinator knows better who has left.
        let lost = |reason: String| ExchangeError::PeerLost { rank: first, reason };
        let stream = self.device.stream().map_err(lost)?;
        call(&self.library.0, comm, stream).map_err(|error| lost(error.to_string()))?;
        let (begun, mut pause) = (Instant::now(), Pause::default());
        let mut mark = None;
        loop {
            let busy = match self.library.0.progress(comm) {
                Ok(progress) => progress == Progress::Busy,
                Err(error) => return Err(lost(error.to_string())),
            };
            // Only once the call is on the stream does a mark come after it.
            if !busy && mark.is_none() {
                mark = Some(self.device.mark().map_err(lost)?);
            }
            if let Some(mark) = &mark
                && mark.is_passed().map_err(lost)?
            {
                return Ok(());
            }
            if self.abort.is_aborted() {
                return Err(ExchangeError::Aborted);
            }
            if begun.elapsed() > self.stall_timeout {
                let after = self.stall_timeout;
                return Err(ExchangeError::TimedOut { ranks: RankList(peers), after });
            }
            pause.take();
        }
    }

    /// Aborts the communicator; all later calls give `error`.
    fn fail(&mut self, error: ExchangeError) -> ExchangeError {
        self.end();
        self.failed = Some(error.clone());
        error
    }

    #[expect(unsafe_code, reason = "ends the communicator")]
    fn end(&mut self) {
        if let Some(comm) = self.comm.take() {
            // SAFETY: it was taken, so nobody uses it again; `&mut self` is the only user.
            if let Err(error) = unsafe { self.library.0.abort_comm(comm) } {
                tracing::warn!(%error, "a communicator did not end well");
            }
        }
    }
}

impl<D: DeviceMemory> Drop for NcclMesh<D> {
    fn drop(&mut self) {
        self.end();
    }
}

impl<D: DeviceMemory> Exchange for NcclMesh<D> {
    fn rank(&self) -> Rank {
        self.rank
    }

    fn size(&self) -> u32 {
        self.size
    }

    /// Through memory of the device: slots `0..size` hold what is sent, the next `size` what is received.
    fn all_to_all(
        &mut self,
        outgoing: &[&[u8]],
        incoming: &mut [&mut [u8]],
    ) -> Result<(), ExchangeError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        take_own_message(self.rank, self.size, outgoing, incoming);
        let ranges = self.stage(outgoing, incoming);
        let (out, into) = ranges.map_err(|reason| {
            let rank = self.rank;
            self.fail(ExchangeError::PeerLost { rank, reason })
        })?;
        // SAFETY: the ranges are slots of this rank's device, each its own, and nobody else has them.
        #[expect(unsafe_code, reason = "the slots are memory of the device")]
        unsafe {
            self.all_to_all_on_device(&out, &into)?;
        }
        let (me, size) = (self.rank.0 as usize, self.size as usize);
        for (from, message) in incoming.iter_mut().enumerate() {
            if from != me && !message.is_empty() {
                self.device.read(size + from, message).map_err(|reason| {
                    let rank = self.rank;
                    self.fail(ExchangeError::PeerLost { rank, reason })
                })?;
            }
        }
        Ok(())
    }

    fn abort_handle(&self) -> AbortHandle {
        self.abort.clone()
    }
}

impl<D: DeviceMemory> NcclMesh<D> {
    fn stage(
        &mut self,
        outgoing: &[&[u8]],
        incoming: &mut [&mut [u8]],
    ) -> Result<(Vec<DeviceRange>, Vec<DeviceRange>), String> {
        let (me, size) = (self.rank.0 as usize, self.size as usize);
        let (mut out, mut into) = (Vec::with_capacity(size), Vec::with_capacity(size));
        for (to, message) in outgoing.iter().enumerate() {
            let bytes = if to == me { 0 } else { message.len() };
            let address = self.device.slot(to, bytes)?;
            if bytes > 0 {
                self.device.write(to, message)?;
            }
            out.push(DeviceRange { address, bytes });
        }
        for (from, message) in incoming.iter().enumerate() {
            let bytes = if from == me { 0 } else { message.len() };
            let address = self.device.slot(size + from, bytes)?;
            into.push(DeviceRange { address, bytes });
        }
        Ok((out, into))
    }
}

/// Waits between two looks: none at first, for exchanges that take microseconds, then a little.
#[derive(Debug, Default)]
struct Pause(u32);

impl Pause {
    fn take(&mut self) {
        self.0 = self.0.saturating_add(1);
        if self.0 < 200 {
            std::thread::yield_now();
        } else {
            std::thread::sleep(Duration::from_micros(50));
        }
    }
}
