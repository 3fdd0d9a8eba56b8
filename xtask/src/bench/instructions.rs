//! `cargo xtask bench instructions`: how many instructions an image takes, and that it is not too many.
//!
//! Counted by valgrind's callgrind. Times change with whatever else a machine does; this count does
//! not, so CI can hold it to a limit. The images are not part of the repository: without them, or where
//! valgrind cannot be had, this says so and checks nothing.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, ensure};

use crate::workspace::Workspace;
use crate::{process, setup};

/// Where the images lie beside a checkout, and the variable that names another place.
const BESIDE: &str = "../shared/images";
const VARIABLE: &str = "PERCHERON_IMAGES";

/// Millions of instructions: a third of what Pillow takes.
const LIMIT: f64 = 13.0;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Folder of .jpg files [default: `photos` in $PERCHERON_IMAGES, or in shared/images beside the checkout].
    #[arg(long, value_name = "DIR")]
    images: Option<PathBuf>,
    /// Millions of instructions an image may take: decode, random resized crop, flip, normalise.
    #[arg(long, default_value_t = LIMIT)]
    limit: f64,
}

impl Default for Arguments {
    fn default() -> Self {
        Self { images: None, limit: LIMIT }
    }
}

pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<()> {
    let Some(images) = arguments.images.clone().or_else(|| photos(workspace)) else {
        println!("instructions: nothing checked, there are no images: set {VARIABLE}");
        return Ok(());
    };
    if let Err(error) = setup::valgrind() {
        println!("instructions: nothing checked, there is no valgrind ({error:#})");
        return Ok(());
    }
    let images = std::path::absolute(images)?;
    build(workspace)?;
    let millions = count(workspace, &images)? / 1e6;
    println!("instructions an image: {millions:.2} million, the limit is {:.2}", arguments.limit);
    ensure!(millions <= arguments.limit, "an image takes more instructions than it may");
    Ok(())
}

fn photos(workspace: &Workspace) -> Option<PathBuf> {
    let folder = env::var_os(VARIABLE).map_or_else(|| workspace.root.join(BESIDE), PathBuf::from);
    Some(folder.join("photos")).filter(|photos| photos.is_dir())
}

/// Builds the program that is counted, which `bench data` times.
pub(super) fn build(workspace: &Workspace) -> Result<()> {
    let mut build = workspace.cargo(&["build"]);
    let arguments = ["--release", "-p", "shards", "--example", "bench_data"];
    process::output(build.args(arguments)).map(drop)
}

/// What two more passes take, so that starting and reading the files do not count.
pub(super) fn count(workspace: &Workspace, images: &Path) -> Result<f64> {
    let report = workspace.target.join("callgrind.out");
    let run = |passes: &str| {
        let mut valgrind = workspace.command("valgrind");
        valgrind.arg("--tool=callgrind").arg(joined("--callgrind-out-file=", &report));
        valgrind.arg(workspace.target.join("release/examples/bench_data"));
        valgrind.arg(images).args(["--passes", passes]);
        valgrind.stderr(Stdio::null());
        let output = valgrind.output().context("cannot start valgrind: install it")?;
        ensure!(output.status.success(), "valgrind failed ({})", output.status);
        let text = std::fs::read_to_string(&report)?;
        let said: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        let images = said["images"].as_f64().context("the program says how many images")?;
        Ok::<_, anyhow::Error>((total(&text).context("callgrind's file has a total")?, images))
    };
    let ((one, images), (three, _)) = (run("1")?, run("3")?);
    Ok((three - one) / (2.0 * images))
}

fn joined(option: &str, path: &Path) -> std::ffi::OsString {
    let mut joined = std::ffi::OsString::from(option);
    joined.push(path);
    joined
}

/// The sum of instructions in a file of callgrind's.
fn total(report: &str) -> Option<f64> {
    let line = |name| report.lines().find_map(|line| line.strip_prefix(name));
    line("totals:").or_else(|| line("summary:"))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn callgrinds_total_is_found() {
        assert_eq!(total("events: Ir\nsummary: 12\n\ntotals: 1234\n"), Some(1234.0));
        assert_eq!(total("events: Ir\n"), None);
    }
}
