//! `cargo xtask test`: every test of the workspace, after the set-up and the release binaries.
//!
//! One profile, release, serves all of it, so that libtorch's bindings are built once. Integration
//! tests start `percheron` and `percheron-worker` from the same folder, so those are built first.

use anyhow::Result;

use crate::workspace::Workspace;
use crate::{process, setup};

pub(crate) fn run(workspace: &Workspace) -> Result<()> {
    setup::run(workspace)?;
    setup::s3_server(workspace)?;
    build(workspace)?;
    // Doctests come first: the last lines on the screen are then those of the real tests.
    process::run(workspace.cargo(&["test"]).args(["--doc", "--release", "--workspace"]))?;
    if process::answers(workspace.command("cargo").args(["nextest", "--version"])) {
        process::run(workspace.cargo(&["nextest", "run"]).args(["--release", "--workspace"]))
    } else {
        println!(
            "test: no cargo-nextest, so `cargo test` runs the tests, without their time limits"
        );
        let targets = ["--release", "--workspace", "--lib", "--bins", "--tests"];
        // One at a time: some start whole clusters, which are given up if they get no processor.
        let options = ["--", "--test-threads", "1"];
        process::run(workspace.cargo(&["test"]).args(targets).args(options))
    }
}

/// Builds the release binaries, which the tests, the demo and the benchmarks start.
pub(crate) fn build(workspace: &Workspace) -> Result<()> {
    process::run(workspace.cargo(&["build"]).args(["--release", "--workspace", "--bins"]))
}
