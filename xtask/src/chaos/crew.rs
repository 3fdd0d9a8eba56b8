//! The processes of a run, one a host, which are started, hurt and started again.

use std::fs::{self, File};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::lab::{self, Lab};
use crate::process;
use crate::workspace::Workspace;

const START_MAX: Duration = Duration::from_secs(30);
/// A worker takes part so long after its start, unless the machine is very busy.
const SETTLED: Duration = Duration::from_secs(5);
const LOOK: Duration = Duration::from_millis(20);
/// How often a door that is closed is tried.
const KNOCK: Duration = Duration::from_millis(2);

/// A coordinator and its workers.
#[derive(Debug)]
pub(crate) struct Crew<'a> {
    workspace: &'a Workspace,
    dir: PathBuf,
    workers: u32,
    pub(super) lab: Option<Lab>,
    coordinators: Vec<Seat>,
    /// By host; the coordinators' host is the one after the last.
    places: Vec<Option<Place>>,
    next: u32,
}

/// Where a coordinator listens, dead or alive.
#[derive(Debug)]
struct Seat {
    address: String,
    process: Option<Child>,
}

#[derive(Debug)]
struct Place {
    name: String,
    started: Instant,
    process: Child,
}

/// A signal by its name for `kill`.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Signal {
    Stop,
    Continue,
}

impl<'a> Crew<'a> {
    /// Writes what makes `dir` a run, and starts it with workers in the first places of `places`. With several
    /// coordinators the log lies in a folder that they share, and all but the first stand by.
    pub(crate) fn start(
        workspace: &'a Workspace,
        dir: &Path,
        recipe: &str,
        (workers, places): (u32, usize),
        lab: Option<Lab>,
        coordinators: usize,
    ) -> Result<Self> {
        let write = |name: &str, text: &str| {
            let file = dir.join(name);
            fs::write(&file, text).with_context(|| file.display().to_string())
        };
        fs::create_dir_all(dir.join("logs")).with_context(|| dir.display().to_string())?;
        let mut run = "run = \"chaos\"\n".to_owned();
        if coordinators > 1 {
            run += &format!("log = {:?}\n", dir.join("shared"));
        }
        write("run.toml", &run)?;
        write("token", &format!("{:064x}", std::process::id()))?;
        write("recipe.toml", recipe)?;
        let host = if lab.is_some() { lab::address(places) } else { "127.0.0.1".to_owned() };
        let seat = |_| -> Result<Seat> {
            let free = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr());
            let port = free.context("no free port")?.port();
            Ok(Seat { address: format!("{host}:{port}"), process: None })
        };
        let mut crew = Self {
            workspace,
            dir: dir.to_owned(),
            workers,
            lab,
            coordinators: (0..coordinators).map(seat).collect::<Result<_>>()?,
            places: (0..places).map(|_| None).collect(),
            next: 0,
        };
        for seat in 0..coordinators {
            crew.start_coordinator(seat)?;
            if seat == 0 && coordinators > 1 {
                crew.wait_until_it_listens(0)?; // Before another could take the lead.
            }
        }
        for place in 0..workers as usize {
            crew.start_worker(place)?;
        }
        Ok(crew)
    }

    /// What a coordinator has written.
    pub(crate) fn said(&self, seat: usize) -> String {
        fs::read_to_string(self.dir.join(format!("logs/coordinator-{seat}.log")))
            .unwrap_or_default()
    }

    /// Returns how long it took. Who stands by does not listen.
    pub(crate) fn wait_until_it_listens(&self, seat: usize) -> Result<Duration> {
        let address: SocketAddr = self.coordinators[seat].address.parse().context("an address")?;
        let started = Instant::now();
        while TcpStream::connect_timeout(&address, LOOK).is_err() {
            ensure!(
                started.elapsed() < START_MAX,
                "the coordinator does not listen: {}",
                self.said(seat)
            );
            std::thread::sleep(KNOCK);
        }
        Ok(started.elapsed())
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

    pub(crate) fn start_coordinator(&mut self, seat: usize) -> Result<()> {
        let log = format!("coordinator-{seat}");
        let mut command = self.on_host(self.places.len(), "percheron", &log)?;
        command
            .args(["coordinator", "--exit-with-stdin", "--workers"])
            .arg(self.workers.to_string());
        command.args(["--listen", &self.coordinators[seat].address]);
        command.arg("--recipe").arg(self.dir.join("recipe.toml")).arg("--run-dir").arg(&self.dir);
        let address_file = if seat == 0 { "coordinator.address".to_owned() } else { log };
        command.arg("--addr-file").arg(self.dir.join(address_file));
        if self.coordinators.len() > 1 {
            command.arg("--standby");
        }
        let process = command.spawn().context("cannot start the coordinator")?;
        self.coordinators[seat].process = Some(process);
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
        let addresses = self.coordinators.iter().map(|seat| format!("http://{}", seat.address));
        command.args(["--coordinator", &addresses.collect::<Vec<_>>().join(",")]);
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
        let led = self.coordinators.iter().filter_map(|seat| seat.process.as_ref());
        workers.chain(led.map(|process| (false, process.id()))).collect()
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
        send(process, signal)
    }

    /// Kills a coordinator, which stays away.
    pub(crate) fn kill_coordinator(&mut self, seat: usize) -> Result<()> {
        let process = self.coordinators[seat].process.take();
        let mut process = process.context("there is no coordinator")?;
        process.kill().and_then(|()| process.wait()).context("the coordinator")?;
        Ok(())
    }

    pub(crate) fn signal_coordinator(&self, seat: usize, signal: Signal) -> Result<()> {
        let process = self.coordinators[seat].process.as_ref();
        send(process.context("there is no coordinator")?, signal)
    }

    /// Waits until a coordinator has ended by itself; returns how.
    pub(crate) fn coordinators_end(&mut self, seat: usize) -> Result<ExitStatus> {
        let process = self.coordinators[seat].process.take();
        let mut process = process.context("there is no coordinator")?;
        let started = Instant::now();
        loop {
            if let Some(status) = process.try_wait().context("the coordinator")? {
                return Ok(status);
            }
            ensure!(started.elapsed() < START_MAX, "coordinator {seat} does not end");
            std::thread::sleep(LOOK);
        }
    }

    /// CPU time that the workers have used, in clock ticks.
    pub(crate) fn workers_ticks(&self) -> Result<u64> {
        let of = |place: &Place| {
            let file = format!("/proc/{}/stat", place.process.id());
            let stat = fs::read_to_string(&file).with_context(|| file.clone())?;
            let fields = stat.rsplit_once(')').map(|(_, rest)| rest.split_whitespace());
            let ticks = fields.map(|fields| {
                fields.skip(11).take(2).map(|field| field.parse::<u64>().unwrap_or(0)).sum::<u64>()
            });
            ticks.with_context(|| format!("cannot understand {file}"))
        };
        self.places.iter().flatten().map(of).sum()
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

    /// Whether the run has ended; an error if a coordinator has, in another way than by our hand.
    pub(crate) fn has_ended(&mut self) -> Result<bool> {
        for (number, seat) in self.coordinators.iter_mut().enumerate() {
            let Some(process) = &mut seat.process else { continue };
            match process.try_wait().context("the coordinator")? {
                None => {}
                Some(status) if status.success() => return Ok(true),
                Some(status) => bail!("the coordinator ended ({status}): {}", self.said(number)),
            }
        }
        Ok(false)
    }
}

fn send(process: &Child, signal: Signal) -> Result<()> {
    let word = match signal {
        Signal::Stop => "-STOP",
        Signal::Continue => "-CONT",
    };
    process::output(Command::new("kill").args([word, &process.id().to_string()])).map(drop)
}

impl Drop for Crew<'_> {
    fn drop(&mut self) {
        let workers = self.places.iter_mut().flatten().map(|place| &mut place.process);
        let coordinators = self.coordinators.iter_mut().filter_map(|seat| seat.process.as_mut());
        for process in workers.chain(coordinators) {
            process.kill().and_then(|()| process.wait().map(drop)).ok(); // It may have ended.
        }
    }
}
