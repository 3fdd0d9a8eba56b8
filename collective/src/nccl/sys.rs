//! NCCL's C interface, found at run time: the program is not linked to it.
//!
//! Names, numbers and layouts are those of `nccl.h` 2.28; the configuration says so, and a newer library obeys it.
#![expect(unsafe_code, reason = "declares, finds and calls C functions")]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::Path;

use super::NcclError;

/// `ncclComm_t`, and `cudaStream_t`.
pub(super) type Raw = *mut c_void;

/// What names a communicator: `ncclUniqueId`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UniqueId(pub [u8; UniqueId::BYTES]);

impl UniqueId {
    /// Its length.
    pub const BYTES: usize = 128;
}

/// `ncclConfig_t`, of which only `blocking` is set.
#[repr(C)]
struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
    cga_cluster_size: c_int,
    ctas_min: c_int,
    ctas_max: c_int,
    net_name: *const c_char,
    split_share: c_int,
    traffic_class: c_int,
    comm_name: *const c_char,
    collnet_enable: c_int,
    cta_policy: c_int,
    shrink_share: c_int,
    nvls_ctas: c_int,
    channels_per_net_peer: c_int,
    nvlink_centric: c_int,
}

const _: () = assert!(size_of::<Config>() == 80, "ncclConfig_t of 2.28 has 80 bytes");

/// `NCCL_CONFIG_UNDEF_INT`.
const UNSET: c_int = c_int::MIN;

impl Config {
    /// Calls return at once, so that a lost peer blocks nobody.
    fn non_blocking() -> Self {
        Self {
            size: size_of::<Self>(),
            magic: 0xcafe_beef,
            version: 22_800,
            blocking: 0,
            cga_cluster_size: UNSET,
            ctas_min: UNSET,
            ctas_max: UNSET,
            net_name: std::ptr::null(),
            split_share: UNSET,
            traffic_class: UNSET,
            comm_name: std::ptr::null(),
            collnet_enable: UNSET,
            cta_policy: UNSET,
            shrink_share: UNSET,
            nvls_ctas: UNSET,
            channels_per_net_peer: UNSET,
            nvlink_centric: UNSET,
        }
    }
}

/// `ncclSuccess` and `ncclInProgress`: the answers that are no error.
const SUCCESS: c_int = 0;
const IN_PROGRESS: c_int = 7;
/// `ncclUint8`, `ncclFloat32` and `ncclSum`.
const UINT8: c_int = 1;
const FLOAT32: c_int = 7;
const SUM: c_int = 0;

macro_rules! library {
    ($($field:ident = $name:literal: fn($($argument:ty),*) -> $result:ty;)*) => {
        /// A loaded library.
        pub(super) struct Library {
            $($field: unsafe extern "C" fn($($argument),*) -> $result,)*
        }

        impl Library {
            fn find(handle: *mut c_void, path: &str) -> Result<Self, NcclError> {
                Ok(Self { $($field: {
                    let found = symbol(handle, path, $name)?;
                    // SAFETY: the library's function of this name has this signature, as its header says.
                    unsafe {
                        std::mem::transmute::<
                            *mut c_void,
                            unsafe extern "C" fn($($argument),*) -> $result,
                        >(found)
                    }
                },)* })
            }
        }
    };
}

library! {
    get_version = c"ncclGetVersion": fn(*mut c_int) -> c_int;
    get_unique_id = c"ncclGetUniqueId": fn(*mut UniqueId) -> c_int;
    init_rank = c"ncclCommInitRankConfig":
        fn(*mut Raw, c_int, UniqueId, c_int, *mut c_void) -> c_int;
    async_error = c"ncclCommGetAsyncError": fn(Raw, *mut c_int) -> c_int;
    abort = c"ncclCommAbort": fn(Raw) -> c_int;
    group_start = c"ncclGroupStart": fn() -> c_int;
    group_end = c"ncclGroupEnd": fn() -> c_int;
    send = c"ncclSend": fn(*const c_void, usize, c_int, c_int, Raw, Raw) -> c_int;
    receive = c"ncclRecv": fn(*mut c_void, usize, c_int, c_int, Raw, Raw) -> c_int;
    all_reduce = c"ncclAllReduce":
        fn(*const c_void, *mut c_void, usize, c_int, c_int, Raw, Raw) -> c_int;
    error_text = c"ncclGetErrorString": fn(c_int) -> *const c_char;
    last_error = c"ncclGetLastError": fn(Raw) -> *const c_char;
}

/// What a communicator is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    Ready,
    Busy,
}

/// Device memory that a call reads: an address and bytes.
pub(super) type Source = (*const c_void, usize);
/// Device memory that a call writes: an address and bytes.
pub(super) type Target = (*mut c_void, usize);

impl Library {
    /// Loads `path`, or what the loader finds under NCCL's name: the copy that libtorch has loaded, if any.
    pub(super) fn load(path: Option<&Path>) -> Result<Self, NcclError> {
        let name = path.map_or("libnccl.so.2".to_owned(), |path| path.display().to_string());
        let text = CString::new(name.clone()).map_err(|_| NcclError::Library {
            path: name.clone(),
            reason: "the path holds a nul byte".to_owned(),
        })?;
        // SAFETY: the name is a C string; the library's initialisers are made to be run by a loader.
        let handle = unsafe { libc::dlopen(text.as_ptr(), libc::RTLD_NOW) };
        if handle.is_null() {
            return Err(NcclError::Library { path: name, reason: loader_error() });
        }
        Self::find(handle, &name)
    }

    /// The version as NCCL writes it: 22809 is 2.28.9.
    pub(super) fn version(&self) -> Result<c_int, NcclError> {
        let mut version = 0;
        // SAFETY: `version` is valid for one write.
        self.check(unsafe { (self.get_version)(&raw mut version) })?;
        Ok(version)
    }

    pub(super) fn unique_id(&self) -> Result<UniqueId, NcclError> {
        let mut id = UniqueId([0; UniqueId::BYTES]);
        // SAFETY: `id` is valid for one write.
        self.check(unsafe { (self.get_unique_id)(&raw mut id) })?;
        Ok(id)
    }

    /// Starts to make a communicator; it is ready when [`Library::progress`] says so.
    pub(super) fn init(&self, id: UniqueId, rank: u32, size: u32) -> Result<Raw, NcclError> {
        let (mut raw, mut config) = (std::ptr::null_mut(), Config::non_blocking());
        let number = |value: u32| c_int::try_from(value).expect("ranks are few");
        let config = (&raw mut config).cast::<c_void>();
        // SAFETY: both pointers are valid through the call, which copies the configuration.
        let answer =
            unsafe { (self.init_rank)(&raw mut raw, number(size), id, number(rank), config) };
        self.check(answer)?;
        Ok(raw)
    }

    /// What `comm` is at, or how it has failed. Does not wait.
    pub(super) fn progress(&self, comm: Raw) -> Result<Progress, NcclError> {
        let mut state = SUCCESS;
        // SAFETY: the communicator is alive, and `state` is valid for one write.
        self.check(unsafe { (self.async_error)(comm, &raw mut state) })?;
        self.check(state)?;
        Ok(if state == IN_PROGRESS { Progress::Busy } else { Progress::Ready })
    }

    /// Puts one message each way and peer on `stream`.
    ///
    /// # Safety
    /// The addresses are device memory of as many bytes, which lives and, if it is written, is not touched
    /// until the stream has passed the call. Only the communicator's own thread may call.
    pub(super) unsafe fn exchange(
        &self,
        comm: Raw,
        stream: Raw,
        sources: &[(u32, Source)],
        targets: &[(u32, Target)],
    ) -> Result<(), NcclError> {
        let peer = |rank: u32| c_int::try_from(rank).expect("ranks are few");
        // SAFETY: a group may be started at any time; it is ended below whatever happens inside.
        self.check(unsafe { (self.group_start)() })?;
        let mut answers = Vec::with_capacity(sources.len() + targets.len() + 1);
        for &(rank, (address, bytes)) in sources {
            // SAFETY: as above.
            answers.push(unsafe { (self.send)(address, bytes, UINT8, peer(rank), comm, stream) });
        }
        for &(rank, (address, bytes)) in targets {
            // SAFETY: as above.
            answers
                .push(unsafe { (self.receive)(address, bytes, UINT8, peer(rank), comm, stream) });
        }
        // SAFETY: it was started above.
        answers.push(unsafe { (self.group_end)() });
        answers.into_iter().try_for_each(|answer| self.check(answer))
    }

    /// Puts the sum of all ranks' `floats` floats at `address`, in place, on `stream`.
    ///
    /// # Safety
    /// As [`Library::exchange`].
    pub(super) unsafe fn sum(
        &self,
        comm: Raw,
        stream: Raw,
        address: *mut c_void,
        floats: usize,
    ) -> Result<(), NcclError> {
        // SAFETY: as above.
        let answer = unsafe {
            (self.all_reduce)(address.cast_const(), address, floats, FLOAT32, SUM, comm, stream)
        };
        self.check(answer)
    }

    /// Ends a communicator, whatever it is at.
    ///
    /// # Safety
    /// It is not used afterwards. Only its own thread may call.
    pub(super) unsafe fn abort_comm(&self, comm: Raw) -> Result<(), NcclError> {
        // SAFETY: as above.
        self.check(unsafe { (self.abort)(comm) })
    }

    fn check(&self, answer: c_int) -> Result<(), NcclError> {
        if answer == SUCCESS || answer == IN_PROGRESS {
            return Ok(());
        }
        // SAFETY: it takes any number.
        let what = unsafe { (self.error_text)(answer) };
        // SAFETY: it takes a null communicator for all of the process.
        let detail = unsafe { (self.last_error)(std::ptr::null_mut()) };
        // SAFETY: it is a C string that lives as long as the library.
        let what = unsafe { text(what) };
        // SAFETY: it is a C string that lives until the next error of the process.
        let detail = unsafe { text(detail) };
        Err(NcclError::Refused { what, detail })
    }
}

/// # Safety
/// `raw` is null or a C string that lives through the call.
unsafe fn text(raw: *const c_char) -> String {
    if raw.is_null() {
        return String::new();
    }
    // SAFETY: as above.
    unsafe { CStr::from_ptr(raw) }.to_string_lossy().into_owned()
}

fn symbol(handle: *mut c_void, path: &str, name: &CStr) -> Result<*mut c_void, NcclError> {
    // SAFETY: the handle is of a loaded library, and the name is a C string.
    let found = unsafe { libc::dlsym(handle, name.as_ptr()) };
    if found.is_null() {
        let reason = format!("it has no function {}", name.to_string_lossy());
        return Err(NcclError::Library { path: path.to_owned(), reason });
    }
    Ok(found)
}

fn loader_error() -> String {
    // SAFETY: it takes nothing.
    let error = unsafe { libc::dlerror() };
    // SAFETY: after a failed dlopen on this thread it is a C string, which lives until the next dl call.
    unsafe { text(error) }
}
