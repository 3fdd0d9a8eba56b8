//! `cargo xtask ci`: what a change must pass.

use anyhow::Result;

use crate::workspace::Workspace;
use crate::{lint, test};

pub(crate) fn run(workspace: &Workspace) -> Result<()> {
    lint::run(workspace)?;
    test::run(workspace)
}
