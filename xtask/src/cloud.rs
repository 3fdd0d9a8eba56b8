//! `cargo xtask cloud`: that chart, images, job templates and Slurm scripts do what they say, by real programs:
//! helm 4 and 3, hadolint, a Kubernetes control plane and a Slurm cluster, both on this machine alone.
//!
//! What the checks need is fetched once into the cache; then they need no network.

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};

use crate::workspace::Workspace;
use crate::{process, setup, test};

/// What is checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// The chart, with both helms, without a cluster.
    Helm,
    /// Dockerfiles, and job templates of the clouds.
    Files,
    /// A release on a real API server, with real processes as its pods.
    Kube,
    /// A run on a real Slurm cluster.
    Slurm,
}

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// What to check [default: what needs no cluster, helm and files].
    #[arg(value_enum)]
    parts: Vec<Part>,
    /// Write the goldens of the chart and the table of its README anew.
    #[arg(long)]
    update: bool,
}

impl Options {
    /// As a change must pass it.
    pub(crate) fn of_a_change() -> Self {
        Self { parts: Vec::new(), update: false }
    }
}

pub(crate) fn run(workspace: &Workspace, options: &Options) -> Result<()> {
    let mut parts = options.parts.clone();
    if parts.is_empty() {
        parts = vec![Part::Helm, Part::Files];
    }
    if parts.iter().any(|part| *part != Part::Helm) {
        setup::run(workspace)?;
        test::build(workspace)?;
    }
    let mut failed = Vec::new();
    for part in parts {
        println!("cloud: {part:?}");
        if let Err(error) = check(workspace, part, options.update) {
            eprintln!("cloud: {part:?}: {error:#}");
            failed.push(format!("{part:?}"));
        }
    }
    if !failed.is_empty() {
        bail!("failed checks: {}", failed.join(", "));
    }
    Ok(())
}

fn check(workspace: &Workspace, part: Part, update: bool) -> Result<()> {
    let scripts = workspace.root.join("xtask/src/cloud");
    let chart = workspace.root.join("helm/percheron");
    let programs = workspace.target.join("release");
    let script = |name: &str| -> Result<std::process::Command> {
        let mut python = workspace.command(setup::manifests_python(workspace)?);
        // What Python compiles must not lie about in the sources.
        python.env("PYTHONDONTWRITEBYTECODE", "1").arg(scripts.join(name));
        Ok(python)
    };
    match part {
        Part::Helm => {
            let helms = setup::helms(workspace)?;
            let mut check = script("helm.py")?;
            check.arg(chart).args(update.then_some("--update"));
            process::run(check.args(helms.map(|helm| helm.program())))
        }
        Part::Files => {
            setup::hadolint(workspace)?;
            process::run(script("files.py")?.arg(&workspace.root).arg(programs))
        }
        Part::Kube => {
            let control_plane = setup::control_plane(workspace)?;
            let helms = setup::helms(workspace)?;
            let mut check = script("kube.py")?;
            check.arg(chart).arg(programs).arg(control_plane);
            process::run(check.args(helms.map(|helm| helm.folder)))
        }
        Part::Slurm => {
            setup::slurm()?;
            process::run(script("slurm.py")?.arg(programs))
        }
    }
}
