//! The jobs of a run on a Slurm cluster: their scripts, and how they are submitted.
//!
//! The coordinator is a job of its own, and each node of workers a task of a job array, so that Slurm starts,
//! preempts and requeues one node at a time, and the run goes on with those that are there.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};
use serde::Serialize;

use crate::{guard::AGAIN, run_dir::write_atomically};

/// What is submitted.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) run: String,
    /// The folder of the run.
    pub(crate) dir: String,
    /// How many workers the first generation waits for.
    pub(crate) workers: u32,
    /// How many nodes are asked for, spare ones included.
    pub(crate) nodes: u32,
    pub(crate) workers_per_node: u32,
    pub(crate) threads: u32,
    /// Whether each worker has a GPU.
    pub(crate) gpus: bool,
    pub(crate) cpus_per_worker: u32,
    pub(crate) mem: Option<String>,
    pub(crate) partition: Option<String>,
    pub(crate) coordinator_partition: Option<String>,
    pub(crate) time: Option<String>,
    /// From the request to leave to the end of a worker's time.
    pub(crate) notice_seconds: u32,
    /// Failures of a place before it is given up.
    pub(crate) restarts: u32,
    /// Further options of both scripts.
    pub(crate) sbatch: Vec<String>,
    /// This program, where all nodes see it.
    pub(crate) program: PathBuf,
}

/// Where the scripts are.
#[derive(Debug)]
pub(crate) struct Scripts {
    pub(crate) coordinator: PathBuf,
    pub(crate) workers: PathBuf,
}

/// The numbers of the jobs.
#[derive(Debug, Serialize)]
pub(crate) struct Submitted {
    pub(crate) coordinator: String,
    pub(crate) workers: String,
    pub(crate) run_dir: String,
}

impl Plan {
    /// Writes the scripts into the folder of the run.
    pub(crate) fn write(&self) -> Result<Scripts> {
        for text in [&self.dir, &self.run, &self.program.display().to_string()] {
            ensure!(
                !text.chars().any(|c| c.is_control() || "'\"\\%".contains(c)),
                "{text:?} has a character that Slurm or a shell would take for something else: choose \
                 another --run-dir"
            );
        }
        ensure!(
            !self.dir.contains(' '),
            "{:?} has a space, which sbatch cannot take: choose another --run-dir",
            self.dir
        );
        let folder = Path::new(&self.dir).join("slurm");
        fs::create_dir_all(&folder)
            .with_context(|| format!("{} cannot be made", folder.display()))?;
        let scripts = Scripts {
            coordinator: folder.join("coordinator.sh"),
            workers: folder.join("workers.sh"),
        };
        write_atomically(&scripts.coordinator, self.coordinator_script().as_bytes(), 0o755)?;
        write_atomically(&scripts.workers, self.workers_script().as_bytes(), 0o755)?;
        Ok(scripts)
    }

    fn coordinator_script(&self) -> String {
        let mut options = vec![
            format!("--job-name=percheron-{}", self.run),
            "--nodes=1 --ntasks=1 --cpus-per-task=1".to_owned(),
            "--signal=B:USR1@30".to_owned(),
            format!("--output={}/logs/coordinator-%j.log", self.dir),
        ];
        options.extend(partition(self.coordinator_partition.as_ref().or(self.partition.as_ref())));
        self.script(include_str!("slurm/coordinator.sh"), options)
    }

    fn workers_script(&self) -> String {
        let mut options = vec![
            format!("--job-name=percheron-{}-worker", self.run),
            format!("--array=1-{}", self.nodes),
            format!(
                "--nodes=1 --ntasks=1 --cpus-per-task={}",
                self.cpus_per_worker * self.workers_per_node
            ),
            // To the script alone, which hands it on as what a worker understands.
            format!("--signal=B:USR1@{}", self.notice_seconds),
            format!("--output={}/logs/workers-%A-%a.log", self.dir),
        ];
        options.extend(partition(self.partition.as_ref()));
        options.extend(self.time.as_ref().map(|time| format!("--time={time}")));
        options.extend(self.gpus.then(|| format!("--gres=gpu:{}", self.workers_per_node)));
        options.extend(self.mem.as_ref().map(|memory| format!("--mem={memory}")));
        self.script(include_str!("slurm/workers.sh"), options)
    }

    /// A script of ours behind its options and what it has to know.
    fn script(&self, body: &str, options: Vec<String>) -> String {
        let common = ["--requeue".to_owned(), "--open-mode=append".to_owned()];
        let lines = options.into_iter().chain(common).chain(self.sbatch.iter().cloned());
        let options: String = lines.map(|option| format!("#SBATCH {option}\n")).collect();
        let known = [
            ("run", self.run.clone()),
            ("dir", self.dir.clone()),
            ("program", self.program.display().to_string()),
            ("workers", self.workers.to_string()),
            ("workers_per_node", self.workers_per_node.to_string()),
            ("threads", self.threads.to_string()),
            ("gpus", if self.gpus { "yes" } else { "" }.to_owned()),
            ("restarts_max", self.restarts.to_string()),
            ("again", AGAIN.to_string()),
        ];
        let known: String =
            known.iter().map(|(name, value)| format!("{name}='{value}'\n")).collect();
        format!("#!/bin/bash\n{options}\n{known}\n{body}")
    }
}

fn partition(name: Option<&String>) -> Option<String> {
    name.map(|name| format!("--partition={name}"))
}

/// Submits both; if the second is refused, the first is cancelled.
pub(crate) fn submit(plan: &Plan, scripts: &Scripts) -> Result<Submitted> {
    let coordinator = sbatch(&scripts.coordinator)?;
    let workers = match sbatch(&scripts.workers) {
        Ok(workers) => workers,
        Err(error) => {
            let cancelled = Command::new("scancel").arg(&coordinator).status();
            if !cancelled.is_ok_and(|status| status.success()) {
                return Err(error.context(format!("job {coordinator} is left: scancel it")));
            }
            return Err(error);
        }
    };
    // The coordinator's script takes back the places that nobody needs any more.
    let file = Path::new(&plan.dir).join("slurm/workers.job");
    write_atomically(&file, workers.as_bytes(), 0o644)?;
    Ok(Submitted { coordinator, workers, run_dir: plan.dir.clone() })
}

fn sbatch(script: &Path) -> Result<String> {
    let output = Command::new("sbatch").arg("--parsable").arg(script).output();
    let output = output.context("sbatch cannot be started: is this a node of a Slurm cluster?")?;
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        bail!("sbatch refuses {}: {}", script.display(), said.trim());
    }
    // JOB, or JOB;CLUSTER.
    let job = String::from_utf8_lossy(&output.stdout);
    let job = job.trim().split(';').next().unwrap_or_default();
    ensure!(!job.is_empty(), "sbatch has named no job for {}", script.display());
    Ok(job.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(dir: &str) -> Plan {
        Plan {
            run: "toy".to_owned(),
            dir: dir.to_owned(),
            workers: 4,
            nodes: 9,
            workers_per_node: 2,
            threads: 1,
            gpus: true,
            cpus_per_worker: 4,
            mem: Some("8G".to_owned()),
            partition: Some("spot".to_owned()),
            coordinator_partition: None,
            time: Some("1-00:00".to_owned()),
            notice_seconds: 90,
            restarts: 10,
            sbatch: vec!["--account=vision".to_owned()],
            program: PathBuf::from("/opt/percheron"),
        }
    }

    #[test]
    fn the_scripts_ask_slurm_for_what_was_asked_for() {
        let plan = plan("/shared/toy");
        let options = |script: &str| {
            let lines = script.lines().filter_map(|line| line.strip_prefix("#SBATCH "));
            lines.map(str::to_owned).collect::<Vec<_>>()
        };
        let workers = options(&plan.workers_script());
        for wanted in [
            "--array=1-9",
            "--partition=spot",
            "--gres=gpu:2",
            "--signal=B:USR1@90",
            "--time=1-00:00",
            "--requeue",
            "--mem=8G",
            "--account=vision",
            "--nodes=1 --ntasks=1 --cpus-per-task=8",
        ] {
            assert!(workers.iter().any(|option| option == wanted), "{wanted}: {workers:?}");
        }
        let coordinator = options(&plan.coordinator_script());
        assert!(coordinator.contains(&"--partition=spot".to_owned()), "{coordinator:?}");
        assert!(!coordinator.iter().any(|option| option.starts_with("--array")), "{coordinator:?}");
    }

    #[test]
    fn the_scripts_are_sound_shell() {
        let plan = plan("/shared/toy");
        for script in [plan.coordinator_script(), plan.workers_script()] {
            let folder = tempfile::tempdir().unwrap();
            let file = folder.path().join("script.sh");
            fs::write(&file, script).unwrap();
            let checked = Command::new("bash").arg("-n").arg(&file).output().unwrap();
            assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
        }
    }

    #[test]
    fn a_folder_that_a_shell_would_misread_is_refused() {
        for dir in ["/shared/it's", "/shared/$(x)\n", "/shared/100%", "/shared/my run"] {
            let refusal = plan(dir).write().unwrap_err().to_string();
            assert!(refusal.contains("choose another --run-dir"), "{refusal}");
        }
    }
}
