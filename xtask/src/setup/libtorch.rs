//! libtorch for the build: taken from the wheels of PyTorch, so that it is the very library that
//! the GPU images have, but without what a CPU does not need (450 MB instead of 5 GB).
//!
//! ```text
//! libtorch-2.11.0/
//!   build-version          2.11.0+cu130, which torch-sys compares with its own
//!   include/               the headers
//!   lib/libtorch.so        a linker script: the real one would pull in CUDA
//!   lib/libtorch_cpu.so …  the library and what it is linked against
//! ```
//!
//! There is no `libtorch_cuda.so` in it, or torch-sys would link it. On a GPU machine the library
//! is opened at run time.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::wheels::{self, CUDA_RUNTIME, CUPTI, TORCH};
use crate::workspace::Workspace;

/// The folder's name in the cache.
pub(crate) const FOLDER: &str = "libtorch-2.11.0";
const BUILD_VERSION: &str = "2.11.0+cu130";
const LINKER_SCRIPT: &str = "INPUT(libtorch_cpu.so libc10.so)\n";
const TORCH_LIBRARIES: [&str; 3] = ["libtorch_cpu.so", "libc10.so", "libgomp.so.1"];
const CUDA_RUNTIME_LIBRARY: &str = "libcudart.so.13";
const CUPTI_LIBRARY: &str = "libcupti.so.13";

/// Sees to it that the build's libtorch is whole, and that `.libtorch` in the checkout leads to one.
pub(super) fn prepare(workspace: &Workspace) -> Result<()> {
    let link = workspace.root.join(".libtorch");
    let ready = fault(&workspace.libtorch).is_none();
    if ready && (workspace.libtorch == link || fault(&link).is_none()) {
        return Ok(());
    }
    let made = workspace.cache.join(FOLDER);
    ensure!(
        ready || workspace.libtorch == link || workspace.libtorch == made,
        "LIBTORCH is set to {}, where {}: unset it, or prepare that folder",
        workspace.libtorch.display(),
        fault(&workspace.libtorch).unwrap_or_default()
    );
    if ready {
        return lead(&link, &workspace.libtorch);
    }
    if let Some(fault) = fault(&made) {
        println!("setup: {}: {fault}", made.display());
        println!("setup: fetching libtorch {BUILD_VERSION} (540 MB, unpacked 520 MB)");
        wheels::make_whole(&made, fill)?;
        println!("setup: made {}", made.display());
    }
    lead(&link, &made)
}

/// What keeps a folder from being a whole libtorch.
fn fault(folder: &Path) -> Option<String> {
    let version = fs::read_to_string(folder.join("build-version")).unwrap_or_default();
    if version.trim() != BUILD_VERSION {
        return Some(format!("no libtorch {BUILD_VERSION} there"));
    }
    let lib = folder.join("lib");
    if fs::read_to_string(lib.join("libtorch.so")).unwrap_or_default() != LINKER_SCRIPT {
        return Some("lib/libtorch.so is not the linker script".to_owned());
    }
    if lib.join("libtorch_cuda.so").exists() {
        return Some("lib/libtorch_cuda.so would be linked".to_owned());
    }
    let headers = ["include/ATen/ATen.h", "include/torch/csrc/api/include/torch/torch.h"];
    let libraries = TORCH_LIBRARIES.iter().chain([&CUDA_RUNTIME_LIBRARY, &CUPTI_LIBRARY]);
    let files = headers.iter().map(|header| folder.join(header));
    let files = files.chain(libraries.map(|library| lib.join(library)));
    for file in files {
        if !fs::metadata(&file).is_ok_and(|file| file.is_file() && file.len() > 0) {
            return Some(format!("{} is missing", file.display()));
        }
    }
    None
}

fn fill(folder: &Path) -> Result<()> {
    let lib = folder.join("lib");
    let library = |folder: &str, name| (format!("{folder}/lib/{name}"), lib.join(name));
    let mut torch = vec![("torch/include/".to_owned(), folder.join("include"))];
    torch.extend(TORCH_LIBRARIES.map(|name| library("torch", name)));
    let cuda_runtime = vec![library("nvidia/cu13", CUDA_RUNTIME_LIBRARY)];
    let cupti = vec![library("nvidia/cu13", CUPTI_LIBRARY)];

    let files = wheels::download([&TORCH, &CUDA_RUNTIME, &CUPTI], folder)?;
    for (file, members) in files.iter().zip([torch, cuda_runtime, cupti]) {
        wheels::unpack(file, &members)?;
        fs::remove_file(file)?;
    }
    fs::write(lib.join("libtorch.so"), LINKER_SCRIPT)?;
    fs::write(folder.join("build-version"), BUILD_VERSION)?;
    match fault(folder) {
        Some(fault) => anyhow::bail!("the wheels are not as expected: {fault}"),
        None => Ok(()),
    }
}

/// Makes `link` lead to `folder`, unless it leads to a whole libtorch already.
fn lead(link: &Path, folder: &Path) -> Result<()> {
    if fault(link).is_none() {
        return Ok(());
    }
    match fs::symlink_metadata(link) {
        Ok(old) => {
            ensure!(old.is_symlink(), "{} is no whole libtorch: move it away", link.display());
            fs::remove_file(link).with_context(|| format!("cannot remove {}", link.display()))?;
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(|| format!("cannot see {}", link.display())),
    }
    symlink(folder, link).with_context(|| format!("cannot make the link {}", link.display()))?;
    println!("setup: {} leads to {}", link.display(), folder.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    /// A folder with the files that a libtorch has, each one byte long.
    fn whole(folder: &Path) {
        let lib = folder.join("lib");
        fs::create_dir_all(&lib).unwrap();
        fs::create_dir_all(folder.join("include/ATen")).unwrap();
        fs::create_dir_all(folder.join("include/torch/csrc/api/include/torch")).unwrap();
        fs::write(folder.join("include/ATen/ATen.h"), "h").unwrap();
        fs::write(folder.join("include/torch/csrc/api/include/torch/torch.h"), "h").unwrap();
        for library in TORCH_LIBRARIES.into_iter().chain([CUDA_RUNTIME_LIBRARY, CUPTI_LIBRARY]) {
            fs::write(lib.join(library), "l").unwrap();
        }
        fs::write(lib.join("libtorch.so"), LINKER_SCRIPT).unwrap();
        fs::write(folder.join("build-version"), "2.11.0+cu130\n").unwrap();
    }

    fn workspace(root: &Path, libtorch: PathBuf) -> Workspace {
        let cache = root.join("cache");
        Workspace { root: root.into(), cache, target: root.join("target"), libtorch, ci: false }
    }

    #[test]
    fn each_missing_piece_is_noticed() {
        let root = tempfile::tempdir().unwrap();
        assert!(fault(root.path()).unwrap().contains("2.11.0"));
        whole(root.path());
        assert_eq!(fault(root.path()), None);

        fs::write(root.path().join("lib/libc10.so"), "").unwrap();
        assert!(fault(root.path()).unwrap().contains("libc10.so"));
        whole(root.path());
        fs::write(root.path().join("lib/libtorch.so"), "the real one").unwrap();
        assert!(fault(root.path()).unwrap().contains("linker script"));
        whole(root.path());
        fs::write(root.path().join("lib/libtorch_cuda.so"), "l").unwrap();
        assert!(fault(root.path()).unwrap().contains("libtorch_cuda.so"));
    }

    #[test]
    fn a_whole_cache_is_linked_without_fetching() {
        let root = tempfile::tempdir().unwrap();
        let link = root.path().join(".libtorch");
        let workspace = workspace(root.path(), link.clone());
        whole(&workspace.cache.join(FOLDER));
        symlink("nowhere", &link).unwrap();

        prepare(&workspace).unwrap();
        assert_eq!(fs::read_link(&link).unwrap(), workspace.cache.join(FOLDER));
        prepare(&workspace).unwrap();
    }

    #[test]
    fn a_libtorch_made_by_hand_is_left_alone() {
        let root = tempfile::tempdir().unwrap();
        let by_hand = root.path().join(".libtorch");
        whole(&by_hand);
        prepare(&workspace(root.path(), by_hand.clone())).unwrap();
        assert!(fs::symlink_metadata(&by_hand).unwrap().is_dir());
        assert!(!root.path().join("cache").exists());
    }

    #[test]
    fn a_folder_in_the_links_place_is_not_removed() {
        let root = tempfile::tempdir().unwrap();
        let link = root.path().join(".libtorch");
        let workspace = workspace(root.path(), link.clone());
        whole(&workspace.cache.join(FOLDER));
        fs::create_dir(&link).unwrap();
        fs::write(link.join("precious"), "").unwrap();

        let error = prepare(&workspace).unwrap_err();
        assert!(error.to_string().contains("move it away"), "{error}");
        assert!(link.join("precious").exists());
    }

    #[test]
    fn a_wrong_libtorch_variable_is_named() {
        let root = tempfile::tempdir().unwrap();
        let error = prepare(&workspace(root.path(), root.path().join("other"))).unwrap_err();
        assert!(error.to_string().starts_with("LIBTORCH is set to"), "{error}");
    }
}
