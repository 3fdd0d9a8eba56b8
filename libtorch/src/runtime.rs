//! Start-up: CUDA if it is there, threads, and deterministic kernels.
#![expect(unsafe_code, reason = "loads a library and sets an environment variable")]

use std::ffi::CStr;
use std::sync::Mutex;

use crate::sys::{self, ShimError};

/// Whether CUDA kernels can be used in this process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cuda {
    /// `libtorch_cuda` is loaded.
    Loaded,
    /// It is not on the loader path, or one of its own libraries is missing; the loader's reason.
    Absent(String),
}

/// The runtime cannot be started as asked.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// Threads are a part of what makes bits, so they are fixed once in a process.
    #[error("libtorch already runs with {running} threads, and {asked} were asked for")]
    Threads { running: usize, asked: usize },
    /// A thread count that libtorch cannot use.
    #[error("{0} threads are not a number of threads from 1 to 1024")]
    BadThreads(usize),
    /// libtorch refused a switch.
    #[error(transparent)]
    Shim(#[from] ShimError),
}

/// The threads that the process was started with, once it was.
static STARTED: Mutex<Option<(usize, Cuda)>> = Mutex::new(None);

/// Prepares libtorch: loads CUDA if present, fixes `threads` threads inside an operation and one between
/// operations, and chooses deterministic kernels. Calling it again with the same `threads` does nothing.
///
/// Call it at the top of a program, before other threads start and before any question about CUDA:
/// hooks that were once found missing stay missing.
///
/// # Errors
/// [`InitError`] if the process already runs with another number of threads. A missing CUDA is no error.
pub fn init(threads: usize) -> Result<Cuda, InitError> {
    let count = i32::try_from(threads).ok().filter(|count| (1..=1024).contains(count));
    let count = count.ok_or(InitError::BadThreads(threads))?;
    let mut started = STARTED.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    match &*started {
        Some((running, cuda)) if *running == threads => return Ok(cuda.clone()),
        Some((running, _)) => {
            return Err(InitError::Threads { running: *running, asked: threads });
        }
        None => {}
    }
    let cuda = load_cuda();
    keep_freed_memory();
    tch::set_num_threads(count);
    tch::set_num_interop_threads(1); // libtorch accepts this once in a process.
    sys::check(sys::percheron_set_deterministic())?;
    *started = Some((threads, cuda.clone()));
    Ok(cuda)
}

/// The number of threads that [`init`] fixed.
pub(crate) fn threads() -> Option<usize> {
    let started = STARTED.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    started.as_ref().map(|(threads, _)| *threads)
}

/// Lets the C library keep what is freed, in one heap: each step allocates the sizes of the step before, and
/// fresh pages from the kernel, which must clear them, were a sixth of a step's time.
fn keep_freed_memory() {
    // No block gets a mapping of its own, nothing is given back, and all threads share the heap that can grow.
    let settings = [(libc::M_MMAP_MAX, 0), (libc::M_TRIM_THRESHOLD, -1), (libc::M_ARENA_MAX, 1)];
    for (setting, value) in settings {
        // SAFETY: takes two numbers; a refusal changes nothing.
        let _accepted: i32 = unsafe { libc::mallopt(setting, value) };
    }
}

/// Loads `libtorch_cuda` with its symbols global, which registers its kernels.
fn load_cuda() -> Cuda {
    // SAFETY: the name is a C string; the library's initialisers are made to be run by a loader.
    let library =
        unsafe { libc::dlopen(c"libtorch_cuda.so".as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    if library.is_null() {
        // SAFETY: a failed dlopen on this thread makes dlerror return its text.
        let error = unsafe { libc::dlerror() };
        // SAFETY: that text is a C string until the next dl call on this thread.
        let error = unsafe { CStr::from_ptr(error) };
        return Cuda::Absent(error.to_string_lossy().into_owned());
    }
    if std::env::var_os("CUBLAS_WORKSPACE_CONFIG").is_none() {
        // cuBLAS is deterministic only with a workspace of fixed size.
        // SAFETY: `init` runs before other threads start, as its documentation demands.
        unsafe { std::env::set_var("CUBLAS_WORKSPACE_CONFIG", ":4096:8") };
    }
    Cuda::Loaded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starting_twice_with_the_same_threads_is_fine_and_with_others_is_refused() {
        let first = init(1).unwrap();
        assert_eq!(init(1).unwrap(), first);
        assert!(matches!(init(2), Err(InitError::Threads { running: 1, asked: 2 })));
        assert!(matches!(init(0), Err(InitError::BadThreads(0))));
        assert_eq!(tch::get_num_threads(), 1);
    }
}
