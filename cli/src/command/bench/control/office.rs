//! The coordinator's process: a run with a virtual rank for each worker.

use std::{fs, path::Path, process::Stdio, time::Duration};

use anyhow::{Context as _, Result, bail};
use cluster::RunId;
use nix::{
    sys::resource::{Resource, getrlimit, setrlimit},
    unistd::{SysconfVar, sysconf},
};
use recipe::Recipe;
use shards::{Dataset, PackOptions, pack};
use tempfile::TempDir;
use tokio::{
    process::{Child, Command},
    time::{sleep, timeout},
};

use crate::run_dir::RunDir;

/// How long the coordinator may take until it listens.
const START_MAX: Duration = Duration::from_secs(30);
const LOOK_INTERVAL: Duration = Duration::from_millis(10);
/// The smallest that a recipe may have.
const BATCH_SIZE: u32 = 2;
/// More steps than a benchmark makes: the run must not end.
const EPOCHS: u32 = 100_000;

/// A coordinator that ends when this is dropped.
#[derive(Debug)]
pub(super) struct Office {
    process: Child,
    pid: u32,
    dir: RunDir,
    run: RunId,
    _folder: TempDir,
}

/// What it takes to be let in.
#[derive(Debug, Clone)]
pub(super) struct Door {
    /// `host:port`.
    pub(super) address: String,
    pub(super) run: RunId,
    pub(super) token: String,
}

impl Office {
    /// Starts the coordinator of a run that waits for so many workers.
    pub(super) async fn open(workers: u32) -> Result<Self> {
        let folder = tempfile::tempdir().context("cannot make a folder for the run")?;
        let data = write_dataset(folder.path(), workers * BATCH_SIZE)?;
        let dir = RunDir::at(&folder.path().join("control"))?;
        let run = dir.run()?;
        dir.write(&run, &recipe_for(workers, &data)?, None, None)?;
        let log = dir.process_log("coordinator");
        let log = fs::File::create(&log).with_context(|| log.display().to_string())?;
        let this = std::env::current_exe().context("this program cannot tell where it lies")?;
        let mut command = Command::new(this);
        command
            .arg("coordinator")
            .args(["--workers", &workers.to_string()])
            .arg("--recipe")
            .arg(dir.recipe())
            .arg("--run-dir")
            .arg(dir.location())
            .arg("--addr-file")
            .arg(dir.address())
            .arg("--exit-with-stdin")
            .env("PERCHERON_LOG", "warn")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(log)
            .kill_on_drop(true);
        let process = command.spawn().context("cannot start the coordinator")?;
        let pid = process.id().context("the coordinator has ended")?;
        let office = Self { process, pid, dir, run, _folder: folder };
        office.wait_until_it_listens().await
    }

    async fn wait_until_it_listens(mut self) -> Result<Self> {
        let listens = async {
            while self.dir.read_address().is_none() {
                if let Some(status) = self.process.try_wait().context("the coordinator")? {
                    let log = self.dir.process_log("coordinator");
                    let said = fs::read_to_string(log).unwrap_or_default();
                    bail!("the coordinator ended ({status}): {}", said.trim());
                }
                sleep(LOOK_INTERVAL).await;
            }
            Ok(())
        };
        timeout(START_MAX, listens).await.context("the coordinator does not listen")??;
        Ok(self)
    }

    pub(super) fn door(&self) -> Result<Door> {
        let address = self.dir.read_address().context("the coordinator has no address")?;
        Ok(Door { address, run: self.run.clone(), token: self.dir.read_token()? })
    }

    /// Processor time of the coordinator so far, in seconds.
    pub(super) fn cpu_seconds(&self) -> Result<f64> {
        let path = format!("/proc/{}/stat", self.pid);
        let stat = fs::read_to_string(&path).context("the coordinator has ended")?;
        let ticks = ticks_of(&stat).with_context(|| format!("{path} has another form"))?;
        let per_second = sysconf(SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100);
        Ok(ticks as f64 / per_second as f64)
    }

    /// Its memory by a field of `/proc/PID/status`, in millions of bytes.
    pub(super) fn resident_mb(&self, field: &str) -> Result<f64> {
        let path = format!("/proc/{}/status", self.pid);
        let status = fs::read_to_string(&path).context("the coordinator has ended")?;
        let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        let kib = line.and_then(|rest| rest.trim().strip_suffix(" kB")?.parse::<u64>().ok());
        Ok(kib.with_context(|| format!("{path} has no {field}"))? as f64 * 1024.0 / 1e6)
    }
}

/// `utime` and `stime`: the 12th and 13th field after the name, which may hold anything.
fn ticks_of(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

/// A step needs samples for each virtual rank: one digit, so many times.
fn write_dataset(folder: &Path, samples: u32) -> Result<String> {
    let mut image = Vec::new();
    Dataset::open("builtin:digits", "train")?.read_into(0, &mut image)?;
    let class = folder.join("images").join("digit");
    fs::create_dir_all(&class).with_context(|| class.display().to_string())?;
    for number in 0..samples {
        let file = class.join(format!("{number}.jpg"));
        fs::write(&file, &image).with_context(|| file.display().to_string())?;
    }
    let data = folder.join("data").display().to_string();
    let options = PackOptions { split: "train".to_owned(), ..PackOptions::default() };
    pack(&folder.join("images"), &data, &options, &mut |_| {})?;
    Ok(data)
}

fn recipe_for(workers: u32, data: &str) -> Result<Recipe> {
    let sets = [
        format!("virtual_ranks={workers}"),
        format!("data.location={data}"),
        format!("epochs={EPOCHS}"),
        format!("batch_size={BATCH_SIZE}"),
        "evaluate_every_epochs=0".to_owned(),
        "checkpoint.every_epochs=0".to_owned(),
    ];
    Ok(recipe::built_in("digits", &sets)?)
}

/// Lets this process, and those that it starts, have so many files open.
pub(super) fn allow_files(files: u64) -> Result<()> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("the limit of open files")?;
    if soft >= files {
        return Ok(());
    }
    if hard < files {
        bail!("{files} open files are needed and {hard} are allowed: raise the limit (ulimit -Hn)");
    }
    setrlimit(Resource::RLIMIT_NOFILE, files, hard).context("the limit of open files")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_is_read_behind_any_name() {
        let stat = "7 (a ) b) S 1 7 7 0 -1 4194560 9 0 0 0 150 25 0 0 20 0 4 0 99 1 2";
        assert_eq!(ticks_of(stat), Some(175));
        assert_eq!(ticks_of("7 (a) S 1"), None);
    }

    #[test]
    fn each_worker_has_a_virtual_rank_and_each_virtual_rank_its_samples() {
        let folder = tempfile::tempdir().unwrap();
        let data = write_dataset(folder.path(), 40 * BATCH_SIZE).unwrap();
        let samples = Dataset::open(&data, "train").unwrap().len();
        let recipe = recipe_for(40, &data).unwrap();
        let run = RunId::try_from("control".to_owned()).unwrap();
        let plan = recipe.plan(run, samples, 40).unwrap();
        assert_eq!((plan.virtual_ranks, plan.steps_per_epoch), (40, 1));
    }
}
