//! The processes of a run, one a host, which are started, hurt and started again.

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::lab::{self, Lab};
use crate::process;
use crate::workspace::Workspace;

const START_MAX: Duration = Duration::from_secs(30);
/// A worker takes part so long after its start, unless the machine is very busy.
const SETTLED: Duration = Duration::from_secs(5);
const LOOK: Duration = Duration::from_millis(20);

/// A coordinator and its workers.
#[derive(Debug)]
pub(crate) struct Crew<'a> {
    workspace: &'a Workspace,
    dir: PathBuf,
    address: String,
    workers: u32,
    pub(super) lab: Option<Lab>,
    coordinator: Option<Child>,
    /// By host; the coordinator's host is the one after the last.
    places: Vec<Option<Place>>,
    next: u32,
}

#[derive(Debug)]
struct Place {
    name: String,
    started: Instant,
    process: Child,
}

/// A signal by its name for `kill`.
#[derive(Debug, Clone, Copy)]
pub(super) enum Signal {
    Stop,
    Continue,
}

impl<'a> Crew<'a> {
    /// Writes what makes `dir` a run, and starts it with workers in the first places of `places`.
    pub(crate) fn start(
        workspace: &'a Workspace,
        dir: &Path,
        recipe: &str,
        (workers, places): (u32, usize),
        lab: Option<Lab>,
    ) -> Result<Self> {
        let write = |name: &str, text: &str| {
            let file = dir.join(name);
            fs::write(&file, text).with_context(|| file.display().to_string())
        };
        fs::create_dir_all(dir.join("logs")).with_context(|| dir.display().to_string())?;
        write("run.toml", "run = \"chaos\"\n")?;
        write("token", &format!("{:064x}", std::process::id()))?;
        write("recipe.toml", recipe)?;
        let host = if lab.is_some() { lab::address(places) } else { "127.0.0.1".to_owned() };
        let free = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr());
        let port = free.context("no free port")?.port();
        let mut crew = Self {
            workspace,
            dir: dir.to_owned(),
            address: format!("{host}:{port}"),
            workers,
            lab,
            coordinator: None,
            places: (0..places).map(|_| None).collect(),
            next: 0,
        };
        crew.start_coordinator()?;
        let started = Instant::now();
        while !dir.join("coordinator.address").exists() {
            ensure!(
                started.elapsed() < START_MAX,
                "the coordinator does not listen: {}",
                crew.said()
            );
            std::thread::sleep(LOOK);
        }
        for place in 0..workers as usize {
            crew.start_worker(place)?;
        }
        Ok(crew)
    }

    fn said(&self) -> String {
        fs::read_to_string(self.dir.join("logs/coordinator.log")).unwrap_or_default()
    }

    /// A program on a host, whose words go into a file of the run.
    fn on_host(&self, host: usize, program: &str, log: &str) -> Result<Command> {
        let path = self.workspace.target.join("release").join(program);
        let mut command = match &self.lab {
            Some(lab) => {
                let [first, rest @ ..] = lab.prefix(host);
                let mut command = self.workspace.command(first);
                command.args(rest).arg(path);
                command
            }
            None => self.workspace.command(path),
        };
        let file = self.dir.join("logs").join(format!("{log}.log"));
        let file = File::options().create(true).append(true).open(&file);
        let file = file.context("the log of a process")?;
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(file);
        Ok(command)
    }

    pub(super) fn start_coordinator(&mut self) -> Result<()> {
        let mut command = self.on_host(self.places.len(), "percheron", "coordinator")?;
        command.args(["coordinator", "--exit-with-stdin", "--workers"]);
        command.arg(self.workers.to_string()).args(["--listen", &self.address]);
        command.arg("--recipe").arg(self.dir.join("recipe.toml")).arg("--run-dir").arg(&self.dir);
        command.arg("--addr-file").arg(self.dir.join("coordinator.address"));
        self.coordinator = Some(command.spawn().context("cannot start the coordinator")?);
        Ok(())
    }

    /// Starts a worker in a free place; returns its name.
    pub(super) fn start_worker(&mut self, place: usize) -> Result<String> {
        ensure!(self.places[place].is_none(), "place {place} is taken");
        let name = format!("worker-{}", self.next);
        self.next += 1;
        let host = if self.lab.is_some() { lab::address(place) } else { "127.0.0.1".to_owned() };
        let mut command = self.on_host(place, "percheron-worker", &name)?;
        command.args(["--exit-with-stdin", "--run", "chaos", "--name", &name]);
        command.args(["--coordinator", &format!("http://{}", self.address)]);
        command
            .args(["--listen", &format!("{host}:0"), "--token-file"])
            .arg(self.dir.join("token"));
        let process = command.spawn().context("cannot start a worker")?;
        self.places[place] = Some(Place { name: name.clone(), started: Instant::now(), process });
        Ok(name)
    }

    /// Places with a worker that runs, and the free ones. Workers that have ended leave their place.
    pub(super) fn look_around(&mut self) -> Result<(Vec<usize>, Vec<usize>)> {
        for place in &mut self.places {
            if let Some(Place { process, .. }) = place
                && process.try_wait().context("a worker")?.is_some()
            {
                *place = None;
            }
        }
        Ok((0..self.places.len()).partition(|&place| self.places[place].is_some()))
    }

    /// Process ids of all that run, and whether each is a worker's.
    pub(crate) fn processes(&self) -> Vec<(bool, u32)> {
        let workers = self.places.iter().flatten().map(|place| (true, place.process.id()));
        workers.chain(self.coordinator.iter().map(|process| (false, process.id()))).collect()
    }

    /// Whether the worker in a place has had time to take part.
    pub(super) fn is_settled(&self, place: usize) -> bool {
        self.places[place].as_ref().is_some_and(|place| place.started.elapsed() >= SETTLED)
    }

    /// The name of the worker in a place.
    pub(super) fn name(&self, place: usize) -> Option<&str> {
        self.places[place].as_ref().map(|place| place.name.as_str())
    }

    pub(super) fn kill(&mut self, place: usize) -> Result<()> {
        let Some(mut place) = self.places[place].take() else { return Ok(()) };
        place.process.kill().and_then(|()| place.process.wait()).context("a worker")?;
        Ok(())
    }

    /// Sends a signal to a worker, if it is still there.
    pub(super) fn signal(&mut self, place: usize, signal: Signal) -> Result<()> {
        let Some(Place { process, .. }) = &mut self.places[place] else { return Ok(()) };
        if process.try_wait().context("a worker")?.is_some() {
            return Ok(());
        }
        let word = match signal {
            Signal::Stop => "-STOP",
            Signal::Continue => "-CONT",
        };
        let pid = process.id().to_string();
        process::output(Command::new("kill").args([word, &pid])).map(drop)
    }

    pub(super) fn kill_coordinator(&mut self) -> Result<()> {
        let coordinator = self.coordinator.as_mut().context("there is no coordinator")?;
        coordinator.kill().and_then(|()| coordinator.wait()).context("the coordinator")?;
        self.start_coordinator()
    }

    /// Asks for so many workers, from the coordinator's own host; again while that one is being started.
    pub(super) fn resize(&self, workers: u32) -> Result<()> {
        let started = Instant::now();
        loop {
            let mut command = self.on_host(self.places.len(), "percheron", "resize")?;
            command.arg("resize").arg(&self.dir).arg(workers.to_string()).stdin(Stdio::null());
            if command.status().context("cannot start percheron resize")?.success() {
                return Ok(());
            }
            let is_late = started.elapsed() >= START_MAX;
            ensure!(!is_late, "`percheron resize` failed; see logs/resize.log of the run");
            std::thread::sleep(LOOK);
        }
    }

    /// Whether the run has ended; an error if its coordinator has, in another way than by our hand.
    pub(super) fn has_ended(&mut self) -> Result<bool> {
        let coordinator = self.coordinator.as_mut().context("there is no coordinator")?;
        match coordinator.try_wait().context("the coordinator")? {
            None => Ok(false),
            Some(status) if status.success() => Ok(true),
            Some(status) => bail!("the coordinator ended ({status}): {}", self.said()),
        }
    }
}

impl Drop for Crew<'_> {
    fn drop(&mut self) {
        let workers = self.places.iter_mut().flatten().map(|place| &mut place.process);
        for process in workers.chain(&mut self.coordinator) {
            process.kill().and_then(|()| process.wait().map(drop)).ok(); // It may have ended.
        }
    }
}
