//! `cargo xtask ci`: what a change must pass.

use anyhow::Result;

use crate::workspace::Workspace;
use crate::{bench, lint, test};

pub(crate) fn run(workspace: &Workspace) -> Result<()> {
    lint::run(workspace)?;
    bench::check(workspace)?;
    test::run(workspace)
}
