//! The fingerprint: everything that can change the bits a worker computes.
#![expect(unsafe_code, reason = "calls the shim")]

use std::fmt;
use std::fs;

use tch::Device;

use crate::runtime;
use crate::sys::{self, ShimError};

/// The floating-point type that a run computes in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// IEEE single.
    F32,
    /// IEEE double.
    F64,
}

impl Precision {
    /// The kind of tensors of this precision.
    pub fn kind(self) -> tch::Kind {
        match self {
            Precision::F32 => tch::Kind::Float,
            Precision::F64 => tch::Kind::Double,
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Precision::F32 => "f32",
            Precision::F64 => "f64",
        })
    }
}

/// Names and values, in a fixed order, of everything that can change the bits computed on `device`.
///
/// Two workers may share a run only if all pairs are equal.
///
/// # Errors
/// [`ShimError`] if libtorch cannot say, or if [`crate::init`] has not been called.
pub fn fingerprint(
    device: Device,
    precision: Precision,
) -> Result<Vec<(String, String)>, ShimError> {
    let threads = runtime::threads()
        .ok_or_else(|| ShimError("libtorch::init was not called before the fingerprint".into()))?;
    let (kind, model) = match device {
        Device::Cpu => ("cpu", cpu_model()),
        Device::Cuda(ordinal) => ("cuda", cuda_model(ordinal)?),
        Device::Mps => ("mps", String::new()),
        Device::Vulkan => ("vulkan", String::new()),
    };
    let fields = [
        ("device", kind.to_owned()),
        ("device_model", model),
        ("cpu_capability", cpu_capability()?),
        ("onednn_isa_max", variable("ONEDNN_MAX_CPU_ISA")),
        ("mkl_cbwr", variable("MKL_CBWR")),
        ("libc", libc_version()),
        ("threads", threads.to_string()),
        ("precision", precision.to_string()),
        ("deterministic", is_deterministic()?.to_string()),
    ];
    let fields = versions(device)?.into_iter().chain(fields);
    Ok(fields.map(|(name, value)| (name.to_owned(), value)).collect())
}

/// The processor as the kernel describes it. Virtual machines hide its name, but not its family and model.
fn cpu_model() -> String {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let value = |wanted: &str| {
        let mut fields = cpuinfo.lines().filter_map(|line| line.split_once(':'));
        fields.find(|(name, _)| name.trim() == wanted).map_or("unknown", |(_, value)| value.trim())
    };
    format!("{}, family {}, model {}", value("model name"), value("cpu family"), value("model"))
}

fn cuda_model(ordinal: usize) -> Result<String, ShimError> {
    let number = i32::try_from(ordinal)
        .map_err(|_| ShimError(format!("{ordinal} is not a CUDA device number")))?;
    sys::read_text(|out, capacity| {
        // SAFETY: `out` has room for `capacity` bytes, and the shim writes no more.
        unsafe { sys::percheron_cuda_device(number, out, capacity) }
    })
}

/// The version of the libtorch that is loaded, and those of the libraries whose kernels it calls.
fn versions(device: Device) -> Result<[(&'static str, String); 5], ShimError> {
    let text = sys::read_text(|out, capacity| {
        // SAFETY: `out` has room for `capacity` bytes, and the shim writes no more.
        unsafe { sys::percheron_build_text(out, capacity) }
    })?;
    let after = |mark: &str, end: &[char]| {
        let found = text.split_once(mark).and_then(|(_, rest)| rest.split(end).next());
        found.map_or("none", str::trim).to_owned()
    };
    let on_cuda = |mark: &str| {
        // A CPU worker computes the same whether CUDA is there or not.
        if device.is_cuda() { after(mark, &['\n']) } else { "none".to_owned() }
    };
    Ok([
        ("torch", after("TORCH_VERSION=", &[',', '\n'])),
        ("mkl", after("Math Kernel Library Version", &['\n'])),
        ("onednn", after("Intel(R) MKL-DNN", &['\n'])),
        ("cuda", on_cuda("CUDA Runtime")),
        ("cudnn", on_cuda("CuDNN")),
    ])
}

fn cpu_capability() -> Result<String, ShimError> {
    sys::read_text(|out, capacity| {
        // SAFETY: `out` has room for `capacity` bytes, and the shim writes no more.
        unsafe { sys::percheron_cpu_capability(out, capacity) }
    })
}

fn is_deterministic() -> Result<bool, ShimError> {
    let mut on = 0;
    // SAFETY: `on` is valid for one write of an int.
    sys::check(unsafe { sys::percheron_is_deterministic(&raw mut on) })?;
    Ok(on != 0)
}

/// The C library, whose `exp` and `log` serve the elements that do not fill a vector.
fn libc_version() -> String {
    // SAFETY: takes nothing and returns a C string that is never freed.
    let version = unsafe { libc::gnu_get_libc_version() };
    // SAFETY: as above.
    unsafe { std::ffi::CStr::from_ptr(version) }.to_string_lossy().into_owned()
}

/// A setting of a kernel library, which it reads from the environment.
fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| "unset".to_owned())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// What the child process of the test below prints before its fingerprint.
    const MARK: &str = "fingerprint: ";

    fn fingerprint_here() -> Vec<(String, String)> {
        runtime::init(1).unwrap();
        fingerprint(Device::Cpu, Precision::F32).unwrap()
    }

    #[test]
    fn the_fields_are_stable_within_a_process_and_name_the_precision() {
        let first = fingerprint_here();
        assert_eq!(first, fingerprint_here());
        let double = fingerprint(Device::Cpu, Precision::F64).unwrap();
        let differing: Vec<_> = first.iter().zip(&double).filter(|(a, b)| a != b).collect();
        assert_eq!(differing.len(), 1);
        assert_eq!(differing[0].0.0, "precision");
        assert_eq!(first[0], ("torch".to_owned(), "2.11.0".to_owned()));
        assert!(first.contains(&("deterministic".to_owned(), "true".to_owned())));
        println!("{MARK}{first:?}");
    }

    #[test]
    fn another_cpu_capability_gives_another_fingerprint() {
        let printed = |capability: Option<&str>| {
            let mut child = Command::new(std::env::current_exe().unwrap());
            let name =
                "fingerprint::tests::the_fields_are_stable_within_a_process_and_name_the_precision";
            child.args(["--exact", "--nocapture", name]);
            match capability {
                Some(capability) => child.env("ATEN_CPU_CAPABILITY", capability),
                None => child.env_remove("ATEN_CPU_CAPABILITY"),
            };
            let output = String::from_utf8(child.output().unwrap().stdout).unwrap();
            let found = output.lines().find_map(|line| line.split_once(MARK));
            found.expect("the child prints its fingerprint").1.to_owned()
        };
        assert_eq!(printed(None), printed(None));
        assert_ne!(printed(None), printed(Some("default")));
    }
}
