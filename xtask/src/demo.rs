//! `cargo xtask demo`: an elastic training run to look at.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::workspace::Workspace;
use crate::{process, setup, test};

const WORKERS: &str = "3";
const CHAOS: &str = "kill@60,join@90";
const PLAN: &str = "
This trains the Dynamic Perceiver on 1,797 scanned handwritten digits, on the CPU, with a
coordinator and three workers on this machine. On the way:

  - at step 60 one worker is killed without warning: the two others notice, agree on where
    they stand and go on;
  - at step 90 a new worker joins: all leave their generation after the same step, the newcomer
    is given the state, and three go on;
  - no step that was taken is lost, and no image is seen twice in an epoch.

At the end you see the accuracy of the four exits and a digest of the final state. The digest is
the same as that of a run that nobody disturbed. It takes a few minutes on two cores.
";

pub(crate) fn run(workspace: &Workspace) -> Result<()> {
    setup::run(workspace)?;
    test::build(workspace)?;
    let run_dir = unused_run_dir(&workspace.root);

    println!("{PLAN}");
    let mut up = workspace.binary("percheron");
    up.args(["up", "--recipe", "digits", "--workers", WORKERS, "--chaos", CHAOS]);
    process::run(up.arg("--run-dir").arg(&run_dir))?;
    println!("\nThe run is kept in {}.", run_dir.display());
    Ok(())
}

/// The first free `runs/demo-NNN`, seen from the root: numbers sort, and need no clock.
fn unused_run_dir(root: &Path) -> PathBuf {
    let mut number = 1;
    loop {
        let run_dir = Path::new("runs").join(format!("demo-{number:03}"));
        if !root.join(&run_dir).exists() {
            return run_dir;
        }
        number += 1;
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn each_demo_gets_a_folder_of_its_own() {
        let root = tempfile::tempdir().unwrap();
        let first = unused_run_dir(root.path());
        assert_eq!(first, Path::new("runs/demo-001"));
        fs::create_dir_all(root.path().join(first)).unwrap();
        assert_eq!(unused_run_dir(root.path()), Path::new("runs/demo-002"));
    }
}
