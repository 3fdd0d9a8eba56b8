//! Raw bindings of `cpp/shim.cpp` and their error.
#![expect(unsafe_code, reason = "declares and reads the results of C functions")]

use std::ffi::{CStr, c_char, c_int, c_void};

// SAFETY: the signatures are those of cpp/shim.cpp and cpp/cuda.cpp. Every function returns null or an error text that
// lives until the next call on this thread, and never unwinds.
unsafe extern "C" {
    pub(crate) safe fn percheron_set_deterministic() -> *const c_char;
    pub(crate) fn percheron_is_deterministic(out: *mut c_int) -> *const c_char;
    pub(crate) safe fn percheron_autocast(cuda: c_int, kind: c_int) -> *const c_char;
    pub(crate) fn percheron_cpu_capability(out: *mut c_char, capacity: usize) -> *const c_char;
    pub(crate) fn percheron_build_text(out: *mut c_char, capacity: usize) -> *const c_char;
    pub(crate) fn percheron_cuda_device(
        ordinal: c_int,
        out: *mut c_char,
        capacity: usize,
    ) -> *const c_char;
    pub(crate) fn percheron_gradients(
        loss: *const c_void,
        leaves: *const *const c_void,
        count: usize,
        flat: *const c_void,
    ) -> *const c_char;
    pub(crate) fn percheron_attach(
        output: *const c_void,
        inputs: *const *const c_void,
        count: usize,
        context: *mut c_void,
        backward: extern "C" fn(*mut c_void, *const c_void, *mut c_void, usize) -> c_int,
        drop: extern "C" fn(*mut c_void),
    ) -> *const c_char;
    pub(crate) safe fn percheron_cuda_enter(ordinal: c_int) -> *const c_char;
    pub(crate) safe fn percheron_cuda_synchronize(ordinal: c_int) -> *const c_char;
    pub(crate) fn percheron_cuda_stream(ordinal: c_int, out: *mut *mut c_void) -> *const c_char;
    pub(crate) fn percheron_cuda_peak(ordinal: c_int, out: *mut usize) -> *const c_char;
    pub(crate) fn percheron_cuda_bus_id(
        ordinal: c_int,
        out: *mut c_char,
        capacity: usize,
    ) -> *const c_char;
    pub(crate) fn percheron_marker_new(out: *mut *mut c_void) -> *const c_char;
    pub(crate) fn percheron_marker_record(marker: *mut c_void, ordinal: c_int) -> *const c_char;
    pub(crate) fn percheron_marker_is_passed(
        marker: *const c_void,
        out: *mut c_int,
    ) -> *const c_char;
    pub(crate) fn percheron_marker_drop(marker: *mut c_void);
    pub(crate) fn percheron_graph_begin(out: *mut *mut c_void) -> *const c_char;
    pub(crate) fn percheron_graph_end(graph: *mut c_void) -> *const c_char;
    pub(crate) fn percheron_graph_replay(graph: *mut c_void) -> *const c_char;
    pub(crate) fn percheron_graph_drop(graph: *mut c_void);
    pub(crate) fn percheron_assign(slots: *mut c_void, index: usize, value: *const c_void);
}

/// libtorch refused a call; the text is its own.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("libtorch: {0}")]
pub struct ShimError(pub String);

/// Turns what a function of the shim returned into a result.
pub(crate) fn check(error: *const c_char) -> Result<(), ShimError> {
    if error.is_null() {
        return Ok(());
    }
    // SAFETY: a non-null return is a C string that lives until the next call on this thread.
    let text = unsafe { CStr::from_ptr(error) };
    let text = text.to_string_lossy();
    // Missing memory is reported with a page of advice about the allocator.
    let words = text.contains("out of memory").then(|| text.split(" GPU ").next());
    Err(ShimError(words.flatten().unwrap_or(&text).to_owned()))
}

/// Reads the text that a function of the shim writes into a buffer.
pub(crate) fn read_text(
    call: impl FnOnce(*mut c_char, usize) -> *const c_char,
) -> Result<String, ShimError> {
    let mut buffer = [0_u8; 16_384];
    check(call(buffer.as_mut_ptr().cast(), buffer.len()))?;
    let text =
        CStr::from_bytes_until_nul(&buffer).expect("the shim ends what it writes with a nul");
    Ok(text.to_string_lossy().into_owned())
}
