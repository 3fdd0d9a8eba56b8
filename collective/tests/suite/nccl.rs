//! The rules of NCCL's calls, checked against a library that behaves like it in the memory of this process.
#![expect(unsafe_code, reason = "asks the fake library, and hands out addresses of the host")]

use std::{
    ffi::{c_int, c_void},
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
    time::{Duration, Instant},
};

use cluster::Rank;
use collective::{
    AbortHandle, Exchange, ExchangeError, TensorExchange,
    nccl::{DeviceMemory, Mark, Nccl, NcclError, NcclMesh, Place},
};
use tch::Tensor;

use crate::transports::{PATIENT, on_threads};

/// The library, compiled once.
fn library() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/suite/fake_nccl.cpp");
        // A name of its own, since other test processes build it at the same time.
        let name = format!("libfakenccl-{}.so", std::process::id());
        let built = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        let compiler = Command::new("c++")
            .args(["-std=c++17", "-O1", "-shared", "-fPIC", "-o"])
            .arg(&built)
            .arg(source)
            .status()
            .unwrap();
        assert!(compiler.success());
        built
    })
}

/// A function of the fake without arguments.
fn ask(name: &std::ffi::CStr) -> c_int {
    let path = std::ffi::CString::new(library().display().to_string()).unwrap();
    // SAFETY: the name is a C string; loading the library has no effects.
    let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW) };
    // SAFETY: the library is loaded for good.
    let found = unsafe { libc::dlsym(handle, name.as_ptr()) };
    assert!(!found.is_null());
    // SAFETY: these functions of the fake take nothing and give an int.
    let function = unsafe { std::mem::transmute::<*mut c_void, extern "C" fn() -> c_int>(found) };
    function()
}

/// Memory of the host in the place of a device's.
#[derive(Debug, Default)]
struct HostMemory(Vec<Vec<u8>>);

struct Done;

impl Mark for Done {
    fn is_passed(&self) -> Result<bool, String> {
        Ok(ask(c"fake_is_done") != 0)
    }
}

impl DeviceMemory for HostMemory {
    type Mark = Done;

    fn stream(&mut self) -> Result<*mut c_void, String> {
        Ok(std::ptr::null_mut())
    }

    fn mark(&mut self) -> Result<Done, String> {
        Ok(Done)
    }

    fn slot(&mut self, slot: usize, bytes: usize) -> Result<*mut c_void, String> {
        if self.0.len() <= slot {
            self.0.resize_with(slot + 1, || vec![0]);
        }
        if self.0[slot].len() < bytes {
            self.0[slot] = vec![0; bytes];
        }
        Ok(self.0[slot].as_mut_ptr().cast())
    }

    fn write(&mut self, slot: usize, bytes: &[u8]) -> Result<(), String> {
        self.0[slot][..bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn read(&mut self, slot: usize, bytes: &mut [u8]) -> Result<(), String> {
        bytes.copy_from_slice(&self.0[slot][..bytes.len()]);
        Ok(())
    }
}

fn group(size: u32, stall_timeout: Duration) -> Vec<NcclMesh<HostMemory>> {
    let nccl = Nccl::load(Some(library())).unwrap();
    let id = nccl.unique_id().unwrap();
    on_threads((0..size).collect(), |rank| {
        let abort = AbortHandle::new().unwrap();
        let place = Place { id, rank: Rank(rank), size, stall_timeout, abort };
        NcclMesh::form(&nccl, place, HostMemory::default(), Instant::now() + PATIENT).unwrap()
    })
}

/// Ranks for the contract.
pub(crate) fn fake(size: u32, stall_timeout: Duration) -> Vec<Box<dyn Exchange>> {
    let ranks = group(size, stall_timeout);
    ranks.into_iter().map(|rank| Box::new(rank) as Box<dyn Exchange>).collect()
}

/// One byte from each to each.
fn exchange(rank: &mut NcclMesh<HostMemory>) -> Result<(), ExchangeError> {
    let size = Exchange::size(rank) as usize;
    let mut incoming = vec![[0_u8; 64]; size];
    let mut incoming: Vec<&mut [u8]> = incoming.iter_mut().map(|bytes| &mut bytes[..]).collect();
    Exchange::all_to_all(rank, &vec![&[7_u8; 64][..]; size], &mut incoming)
}

#[test]
fn a_group_works_again_from_a_new_id_after_one_of_its_ranks_is_gone() {
    for size in [3, 2, 4] {
        let mut ranks = group(size, PATIENT);
        let lost = ranks.pop().unwrap();
        let lost = std::sync::Mutex::new(Some(lost));
        on_threads(ranks, |mut rank| {
            drop(lost.lock().unwrap().take());
            let error = exchange(&mut rank).unwrap_err();
            assert!(matches!(error, ExchangeError::PeerLost { .. }), "{error}");
            assert_eq!(exchange(&mut rank).unwrap_err(), error, "it stays lost");
        });
    }
    assert_eq!((ask(c"fake_violations"), ask(c"fake_live")), (0, 0));
}

#[test]
fn a_stopped_rank_holds_nobody_beyond_the_stall_timeout_and_the_abort_frees_at_once() {
    let after = Duration::from_millis(50);
    let mut ranks = group(2, after);
    let stopped = ranks.pop().unwrap();
    let error = exchange(&mut ranks[0]).unwrap_err();
    assert!(matches!(error, ExchangeError::TimedOut { after: found, .. } if found == after));
    drop((ranks, stopped));
    let mut ranks = group(2, PATIENT);
    Exchange::abort_handle(&ranks[0]).abort();
    assert_eq!(exchange(&mut ranks[0]), Err(ExchangeError::Aborted));
    drop(ranks);
    assert_eq!((ask(c"fake_violations"), ask(c"fake_live")), (0, 0));
}

#[test]
fn a_formation_that_lacks_a_rank_ends_by_its_deadline_or_its_abort_and_leaves_nothing() {
    let nccl = Nccl::load(Some(library())).unwrap();
    for aborted in [false, true] {
        let (id, abort) = (nccl.unique_id().unwrap(), AbortHandle::new().unwrap());
        if aborted {
            abort.abort();
        }
        let place = Place { id, rank: Rank(0), size: 2, stall_timeout: PATIENT, abort };
        let deadline = Instant::now() + Duration::from_millis(20);
        let error = NcclMesh::form(&nccl, place, HostMemory::default(), deadline).unwrap_err();
        assert_eq!(aborted, error == NcclError::Aborted, "{error}");
    }
    assert_eq!((ask(c"fake_violations"), ask(c"fake_live")), (0, 0));
}

#[test]
fn tensors_are_exchanged_and_summed_where_they_are() {
    on_threads(group(3, PATIENT), |mut rank| {
        let me = f64::from(Exchange::rank(&rank).0);
        let row = |value: f64| Tensor::from_slice(&[value, value + 0.5]).to_kind(tch::Kind::Float);
        let outgoing: Vec<Tensor> = (0..3).map(|to| row(me * 10.0 + f64::from(to))).collect();
        let mut incoming: Vec<Tensor> = (0..3).map(|_| row(-1.0)).collect();
        TensorExchange::all_to_all(&mut rank, &outgoing, &mut incoming).unwrap();
        for (from, came) in (0..3).map(f64::from).zip(&incoming) {
            let expected = if from == me { row(-1.0) } else { row(from * 10.0 + me) };
            assert_eq!(*came, expected);
        }
        let mut sum = row(me);
        TensorExchange::sum(&mut rank, &mut sum).unwrap();
        assert_eq!(sum, Tensor::from_slice(&[3.0_f32, 4.5]));
    });
}

#[test]
fn what_is_no_nccl_is_refused_with_its_path() {
    let missing = Nccl::load(Some(Path::new("/nowhere/libnccl.so.2"))).unwrap_err().to_string();
    assert!(missing.contains("/nowhere/libnccl.so.2") && missing.contains("LD_LIBRARY_PATH"));
    let other = Nccl::load(Some(Path::new("libc.so.6"))).unwrap_err().to_string();
    assert!(other.contains("it has no function nccl"), "{other}");
}
