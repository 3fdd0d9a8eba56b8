//! `percheron slurm`: runs on a Slurm cluster.

use std::{num::NonZeroU32, path::PathBuf, process::ExitCode, str::FromStr};

use anyhow::{Context as _, Result};
use clap::{Args, Subcommand};

use crate::{
    print,
    slurm::{self, Plan, Submitted},
    up::{Request, Start, prepare},
};

pub(super) const AFTER_HELP: &str = "\
Two jobs are submitted: the coordinator, and an array of workers of which each is requeued by itself. A worker \
whose node dies, that is preempted or whose time is up comes back when there is a node for it; one that was \
refused does not. The same command with the same --run-dir goes on with a run that was cancelled. Nodes must see \
--run-dir, and the programs, under the same paths.

With PreemptParameters=send_user_signal in the cluster's slurm.conf (before Slurm 23.11: \
SchedulerParameters=preempt_send_user_signal) a worker that is preempted has the whole grace time to leave.";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Train on a cluster: write the scripts of a run, and submit them.
    #[command(after_help = AFTER_HELP)]
    Submit(Box<Submit>),
}

#[derive(Debug, Args)]
pub(crate) struct Submit {
    /// The folder of the run, which all nodes see.
    #[arg(long, value_name = "DIR")]
    run_dir: PathBuf,
    /// A built-in recipe or a file; may be left out if --run-dir holds a run.
    #[arg(long, value_name = "NAME|PATH")]
    recipe: Option<String>,
    /// Lay a value over the recipe, such as `seed=7`; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// How many nodes: training begins with the first number and goes on with up to the second.
    #[arg(long, value_name = "MIN-MAX")]
    nodes: Nodes,
    /// Nodes beyond those that wait with a worker each, to stand in at once for one that is lost.
    #[arg(long, value_name = "N", default_value_t = 0)]
    spare: u32,
    /// Workers on each node; with GPUs, each has its own.
    #[arg(long, value_name = "N", default_value = "1")]
    workers_per_node: NonZeroU32,
    /// Whether workers compute on GPUs: one each.
    #[arg(long)]
    gpus: bool,
    /// Cores of a worker.
    #[arg(long, value_name = "N", default_value = "1")]
    cpus_per_worker: NonZeroU32,
    /// Memory of all workers of a node, as Slurm takes it, such as 64G [default: the cluster's].
    #[arg(long, value_name = "SIZE")]
    mem: Option<String>,
    /// Where the workers run; may well be preempted [default: the cluster's].
    #[arg(long, value_name = "NAME")]
    partition: Option<String>,
    /// Where the coordinator runs: better not preempted [default: --partition].
    #[arg(long, value_name = "NAME")]
    coordinator_partition: Option<String>,
    /// The time limit of a worker, after which it is requeued, as Slurm takes it [default: the cluster's].
    #[arg(long, value_name = "TIME")]
    time: Option<String>,
    /// A worker is asked to leave so many seconds before its time is up.
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    notice: u32,
    /// A worker that has failed so often is not started again.
    #[arg(long, value_name = "N", default_value_t = 10)]
    restarts: u32,
    /// A further line of both scripts, such as `--account=vision`; may be repeated.
    #[arg(long = "sbatch", value_name = "OPTION", allow_hyphen_values = true)]
    sbatch: Vec<String>,
    /// Where a new run keeps its event log [default: the folder `journal` in --run-dir].
    #[arg(long, value_name = "LOCATION")]
    log: Option<String>,
    /// Where a new run keeps its checkpoints [default: --run-dir].
    #[arg(long, value_name = "LOCATION")]
    checkpoints: Option<String>,
    /// Write the scripts and submit nothing.
    #[arg(long)]
    dry_run: bool,
    /// Print one line of JSON.
    #[arg(long)]
    json: bool,
}

/// A number of nodes, or two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Nodes {
    min: u32,
    max: u32,
}

impl FromStr for Nodes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let problem = || format!("{text:?} is no number of nodes, such as 4 or 2-8");
        let (min, max) = text.split_once('-').unwrap_or((text, text));
        let number = |text: &str| text.parse::<u32>().map_err(|_| problem());
        let nodes = Self { min: number(min)?, max: number(max)? };
        if nodes.min == 0 || nodes.max < nodes.min { Err(problem()) } else { Ok(nodes) }
    }
}

pub(crate) async fn run(command: Command) -> Result<ExitCode> {
    let Command::Submit(asked) = command;
    let log =
        asked.log.clone().unwrap_or_else(|| asked.run_dir.join("journal").display().to_string());
    let per_node = asked.workers_per_node.get();
    let workers = asked.nodes.min.checked_mul(per_node).context("--nodes: that is too many")?;
    let request = Request {
        recipe: asked.recipe.clone(),
        ready: None,
        workers,
        run_dir: Some(asked.run_dir.clone()),
        checkpoints: asked.checkpoints.clone(),
        log: Some(log),
        sets: asked.sets.clone(),
        chaos: None,
        json: asked.json,
        quarantine: false,
        devices: Vec::new(),
        transport: None,
        standbys: 0,
    };
    let prepared = match prepare(request).await? {
        Start::Run(prepared) => prepared,
        Start::Finished(summary) => {
            print::out(&format!("the run in {} is finished", summary.run_dir));
            return Ok(ExitCode::SUCCESS);
        }
    };
    let plan = Plan {
        run: prepared.plan.run.to_string(),
        dir: prepared.dir.location().to_owned(),
        workers,
        nodes: asked.nodes.max + asked.spare,
        workers_per_node: per_node,
        threads: prepared.means.threads,
        gpus: asked.gpus,
        cpus_per_worker: asked.cpus_per_worker.get(),
        mem: asked.mem,
        partition: asked.partition,
        coordinator_partition: asked.coordinator_partition,
        time: asked.time,
        notice_seconds: asked.notice,
        restarts: asked.restarts,
        sbatch: asked.sbatch,
        program: std::env::current_exe().context("this program cannot tell where it lies")?,
    };
    drop(prepared); // Others may use the folder while the jobs wait.
    let scripts = plan.write()?;
    if asked.dry_run {
        print::out(&format!("{}\n{}", scripts.coordinator.display(), scripts.workers.display()));
        return Ok(ExitCode::SUCCESS);
    }
    let submitted = slurm::submit(&plan, &scripts)?;
    if asked.json {
        print::out(&serde_json::to_string(&submitted).context("the result cannot be written")?);
        return Ok(ExitCode::SUCCESS);
    }
    let Submitted { coordinator, workers, run_dir } = submitted;
    print::out(&format!(
        "job {coordinator} coordinates, job {workers} is the workers\n\
         percheron status --run-dir {run_dir}   shows how far it is\n\
         scancel {coordinator} {workers}        ends it; submit again to go on"
    ));
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_one_number_or_two_in_order() {
        assert_eq!("2-8".parse(), Ok(Nodes { min: 2, max: 8 }));
        assert_eq!("4".parse(), Ok(Nodes { min: 4, max: 4 }));
        for wrong in ["0", "8-2", "0-3", "two", "2-", "-2", "2-3-4", ""] {
            assert!(wrong.parse::<Nodes>().is_err(), "{wrong}");
        }
    }
}
