//! `percheron worker --devices LIST`: one worker a device under one supervisor, as on a machine with several GPUs.
//!
//! The supervisor sees at once how a process ends, and says so to the coordinator, so the others need not wait for a
//! lease; it starts another in its place as long as that makes sense, and ends all when it is asked to end.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use cluster::{RunId, WorkerId};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use proto::v1::watch_response::Kind;
use tokio::{
    process::{Child, Command},
    signal::unix::{SignalKind, signal},
    sync::watch,
    task::JoinSet,
    time::{sleep, timeout},
};
use tracing::{info, warn};

use crate::{
    client::Client,
    command::coordinator::stdin_closed,
    up::{FAILURES_MAX, WorkerEnd, apply_device, in_words, worker_program},
    worker_arguments::{coordinators, splits_as, value_of},
};

const DEVICES: &str = "--devices";
const NAME: &str = "--name";
const EXIT_WITH_STDIN: &str = "--exit-with-stdin";
/// A worker that lived for so long did not fail to start.
const LIFE_MIN: Duration = Duration::from_secs(60);
/// Before the first start again; it doubles with each failure.
const PAUSE: Duration = Duration::from_millis(200);
/// A place that the log never gets to: a watcher from there is told of the workers only.
const NO_ENTRY: u64 = u64::MAX;
/// How long the coordinator may take to say who is who.
const ANSWER_MAX: Duration = Duration::from_secs(3);

/// What the workers of a machine are started with.
#[derive(Debug, PartialEq, Eq)]
struct Request {
    devices: Devices,
    /// Each appends its place to it.
    name: String,
    /// For each worker, without the two above.
    arguments: Vec<OsString>,
}

#[derive(Debug, PartialEq, Eq)]
enum Devices {
    /// All GPUs that this machine shows.
    All,
    These(Vec<String>),
}

/// Whether the arguments of `percheron worker` ask for this.
pub(crate) fn is_asked_for(arguments: &[OsString]) -> bool {
    arguments.iter().any(|word| splits_as(word, DEVICES).is_some())
}

/// Runs a worker a device until all have ended. Returns what to end with: 0 if each finished or was let go, 2 if
/// one was refused, else 1.
pub(crate) async fn run(arguments: Vec<OsString>) -> Result<u8> {
    let request = Request::read(arguments)?;
    let program = worker_program()?;
    let devices = match request.devices {
        Devices::All => gpus(&program).await?,
        Devices::These(devices) => devices,
    };
    let client = client(&request.arguments)?;
    let (stop, stopped) = watch::channel(false);
    listen(stop, request.arguments.iter().any(|word| word == EXIT_WITH_STDIN))?;
    info!(devices = devices.join(","), "one worker a device");
    let released = Arc::new(AtomicBool::new(false));
    let mut seats = JoinSet::new();
    for place in 0..devices.len() {
        let seat = Seat {
            program: program.clone(),
            arguments: request.arguments.clone(),
            name: format!("{}-{place}", request.name),
            place: u32::try_from(place).context("--devices: so many are not possible")?,
            devices: devices.clone(),
            client: client.clone(),
            stopped: stopped.clone(),
            released: Arc::clone(&released),
        };
        seats.spawn(seat.attend());
    }
    let mut code = 0;
    for ended in seats.join_all().await {
        code = worse(code, ended?);
    }
    Ok(code)
}

/// Of two codes the one that says more of what is wrong: a failure, a refusal, nothing.
fn worse(one: u8, other: u8) -> u8 {
    [1, 2].into_iter().find(|&code| one == code || other == code).unwrap_or(0)
}

impl Request {
    fn read(words: Vec<OsString>) -> Result<Self> {
        let (mut devices, mut name, mut arguments) = (None, None, Vec::new());
        let mut words = words.into_iter();
        while let Some(word) = words.next() {
            let taken = [(DEVICES, &mut devices), (NAME, &mut name)]
                .into_iter()
                .find_map(|(flag, place)| Some((flag, place, splits_as(&word, flag)?)));
            let Some((flag, place, inline)) = taken else {
                arguments.push(word);
                continue;
            };
            let value = inline.or_else(|| words.next());
            let value = value.with_context(|| format!("{flag}: its value is missing"))?;
            let value = value.into_string().ok().with_context(|| format!("{flag}: not UTF-8"))?;
            ensure!(place.replace(value).is_none(), "{flag}: given twice");
        }
        let single = |word: &OsString| splits_as(word, "--device").is_some();
        ensure!(!arguments.iter().any(single), "--device and --devices: give one of them");
        let name = name.context("--name: say what people call this machine's workers")?;
        let devices = devices.context("--devices: say which, or all")?;
        let devices = match devices.as_str() {
            "all" => Devices::All,
            list => Devices::These(list.split(',').map(str::to_owned).collect()),
        };
        Ok(Self { devices, name, arguments })
    }
}

/// The way to the coordinator that the workers' arguments name.
fn client(arguments: &[OsString]) -> Result<Client> {
    let addresses = coordinators(&value_of(arguments, "--coordinator")?)?;
    let run = RunId::try_from(value_of(arguments, "--run")?).context("--run")?;
    let file = PathBuf::from(value_of(arguments, "--token-file")?);
    let token = std::fs::read_to_string(&file)
        .with_context(|| format!("--token-file {}", file.display()))?;
    Client::new(&addresses.join(","), run, token.trim())
}

/// The GPUs of this machine, as `percheron-worker` sees them.
async fn gpus(program: &Path) -> Result<Vec<String>> {
    let output = Command::new(program).arg("devices").stderr(Stdio::inherit()).output().await;
    let output = output.with_context(|| format!("cannot start {}", program.display()))?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let found: Vec<_> = said.lines().map(str::to_owned).collect();
    if !output.status.success() || found.is_empty() {
        bail!(
            "--devices all: no GPU is seen on this machine; name the devices, such as --devices cuda:0,cuda:1, or \
             train on the CPU with --devices cpu"
        );
    }
    Ok(found)
}

/// Has all workers leave when this process is asked to end.
fn listen(stop: watch::Sender<bool>, with_stdin: bool) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            () = stdin_closed(), if with_stdin => {}
        }
        stop.send_replace(true);
        stop.closed().await; // All have heard of it when they are gone.
    });
    Ok(())
}

/// The place of a worker beside a device: of one after the other.
struct Seat {
    program: PathBuf,
    arguments: Vec<OsString>,
    name: String,
    place: u32,
    devices: Vec<String>,
    client: Client,
    stopped: watch::Receiver<bool>,
    /// Whether any worker of this machine has ended in order.
    released: Arc<AtomicBool>,
}

impl Seat {
    /// Runs workers until one ends in order, is refused, or too many fail one after another.
    async fn attend(mut self) -> Result<u8> {
        let mut failures = 0;
        loop {
            let began = Instant::now();
            let status = self.live().await?;
            let end = WorkerEnd::of(status, false);
            let how = in_words(status);
            info!(name = self.name, how, "a worker has ended");
            match end {
                WorkerEnd::Released | WorkerEnd::Staged => {
                    self.released.store(true, Ordering::Relaxed);
                    return Ok(0);
                }
                WorkerEnd::Refused => return Ok(if self.came_too_late().await { 0 } else { 2 }),
                WorkerEnd::Failed => {}
            }
            self.report(&how).await;
            failures = if began.elapsed() >= LIFE_MIN { 1 } else { failures + 1 };
            if *self.stopped.borrow() || failures >= FAILURES_MAX {
                return Ok(1);
            }
            let pause = PAUSE * 2_u32.pow(failures - 1);
            tokio::select! {
                () = sleep(pause) => {}
                _ = self.stopped.wait_for(|stopped| *stopped) => return Ok(1),
            }
        }
    }

    /// Whether a worker that was refused only found no coordinator any more, because the run is finished.
    async fn came_too_late(&self) -> bool {
        let answers = matches!(timeout(ANSWER_MAX, self.client.watch(NO_ENTRY)).await, Ok(Ok(_)));
        !answers && self.released.load(Ordering::Relaxed)
    }

    /// One worker, from its start to its end.
    async fn live(&mut self) -> Result<ExitStatus> {
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).args([NAME, &self.name]);
        if !self.arguments.iter().any(|word| word == EXIT_WITH_STDIN) {
            command.arg(EXIT_WITH_STDIN);
        }
        apply_device(&self.devices, self.place, &mut command);
        // Its input ends with this process, and it with its input, however this process ends.
        command.stdin(Stdio::piped()).process_group(0);
        let mut child =
            command.spawn().with_context(|| format!("cannot start {}", self.program.display()))?;
        let _input = child.stdin.take(); // Kept open: waiting for a child closes it.
        tokio::select! {
            status = child.wait() => return status.context("cannot wait for the worker"),
            _ = self.stopped.wait_for(|stopped| *stopped) => leave(&child),
        }
        child.wait().await.context("cannot wait for the worker")
    }

    /// Tells the coordinator that the worker of this name is gone. It finds out by itself if it does not hear it.
    async fn report(&self, how: &str) {
        let said = timeout(ANSWER_MAX, async {
            let worker = self.identity().await?;
            if let Some(worker) = worker {
                self.client.report_exit(worker, how).await?;
            }
            anyhow::Ok(())
        });
        match said.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => warn!(name = self.name, %error, "the coordinator was not told"),
            Err(_) => warn!(name = self.name, "the coordinator was not told: it does not answer"),
        }
    }

    /// Who the coordinator takes the worker of this name for.
    async fn identity(&self) -> Result<Option<WorkerId>> {
        let mut news = self.client.watch(NO_ENTRY).await?;
        while let Some(message) = news.message().await? {
            if let Some(Kind::Liveness(liveness)) = message.kind {
                let named = liveness.workers.iter().find(|worker| worker.name == self.name);
                return Ok(named.map(|worker| WorkerId(worker.worker)));
            }
        }
        Ok(None)
    }
}

/// Asks a worker to leave after its step.
fn leave(child: &Child) {
    if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()) {
        kill(Pid::from_raw(pid), Signal::SIGTERM).ok(); // It may have ended just now.
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<OsString> {
        line.split_ascii_whitespace().map(OsString::from).collect()
    }

    #[test]
    fn the_devices_and_the_name_are_taken_out_and_the_rest_is_for_each_worker() {
        let read = |line: &str| Request::read(words(line));
        let request = read("--run toy --devices cuda:0,cuda:1 --name=a --threads 2").unwrap();
        assert_eq!(request.devices, Devices::These(vec!["cuda:0".to_owned(), "cuda:1".to_owned()]));
        assert_eq!(
            (request.name.as_str(), request.arguments),
            ("a", words("--run toy --threads 2"))
        );
        assert_eq!(read("--devices=all --name a").unwrap().devices, Devices::All);
        let refused = |line: &str| read(line).unwrap_err().to_string();
        assert!(refused("--devices all").contains("--name: say what"));
        assert!(refused("--name a --devices").contains("--devices: its value is missing"));
        assert!(refused("--name a --devices cpu --devices cpu").contains("--devices: given twice"));
        assert!(refused("--name a --devices cpu --device cpu").contains("give one of them"));
    }

    #[test]
    fn only_the_flag_itself_asks_for_it() {
        assert!(is_asked_for(&words("--run toy --devices all")));
        assert!(is_asked_for(&words("--devices=cpu")));
        assert!(!is_asked_for(&words("--device cuda:0 --name devices")));
    }

    #[test]
    fn values_are_found_with_and_without_an_equals_sign() {
        let arguments = words("--coordinator=http://a:1,http://b:2/ --run toy");
        assert_eq!(value_of(&arguments, "--run").unwrap(), "toy");
        assert_eq!(value_of(&arguments, "--coordinator").unwrap(), "http://a:1,http://b:2/");
        let missing = client(&arguments).unwrap_err().to_string();
        assert!(missing.starts_with("--token-file: it is missing"), "{missing}");
    }

    #[test]
    fn a_failure_says_more_than_a_refusal_and_that_more_than_an_end_in_order() {
        assert_eq!([worse(0, 0), worse(0, 2), worse(2, 1), worse(1, 0)], [0, 2, 1, 1]);
    }
}
