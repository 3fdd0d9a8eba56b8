//! `cargo xtask lint`: every check that runs no test. All of them run, then the failed are named.

use anyhow::{Result, bail};

use crate::process;
use crate::workspace::Workspace;
use crate::{setup, tidy};

type Check = (&'static str, fn(&Workspace) -> Result<()>);

pub(crate) fn run(workspace: &Workspace) -> Result<()> {
    setup::run(workspace)?;
    let checks: [Check; 5] =
        [("format", format), ("tidy", tidy::run), ("deny", deny), ("clippy", clippy), ("doc", doc)];

    let mut failed = Vec::new();
    for (name, check) in checks {
        println!("lint: {name}");
        if let Err(error) = check(workspace) {
            eprintln!("lint: {name}: {error:#}");
            failed.push(name);
        }
    }
    if !failed.is_empty() {
        bail!("failed checks: {}", failed.join(", "));
    }
    println!("lint: all {} checks passed", checks.len());
    Ok(())
}

fn format(workspace: &Workspace) -> Result<()> {
    process::run(workspace.cargo(&["fmt"]).args(["--all", "--check"]))
}

fn clippy(workspace: &Workspace) -> Result<()> {
    let arguments = ["--release", "--workspace", "--all-targets", "--", "-D", "warnings"];
    process::run(workspace.cargo(&["clippy"]).args(arguments))
}

fn doc(workspace: &Workspace) -> Result<()> {
    let mut doc = workspace.cargo(&["doc"]);
    doc.args(["--release", "--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "-D warnings");
    process::run(&mut doc)
}

/// Licences, bans and sources. Advisories are left to `cargo deny check advisories`: they need a
/// database from the network, and would let the same commit pass one day and fail the next.
fn deny(workspace: &Workspace) -> Result<()> {
    setup::cargo_deny(workspace)?;
    process::run(workspace.command("cargo").args(["deny", "check", "licenses", "bans", "sources"]))
}
