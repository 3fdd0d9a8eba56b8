//! `cargo xtask ci`: what a change must pass.

use anyhow::Result;

use crate::workspace::Workspace;
use crate::{bench, cloud, lint, test};

pub(crate) fn run(workspace: &Workspace) -> Result<()> {
    lint::run(workspace)?;
    bench::check(workspace)?;
    test::run(workspace)?;
    cloud::run(workspace, &cloud::Options::of_a_change())
}
