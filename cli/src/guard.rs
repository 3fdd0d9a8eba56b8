//! Runs a worker on a machine that may be taken away: signals and the cloud's notices become one request to
//! leave, and what this process ends with tells a cluster whether to start it again.

mod notice;
mod relay;

use std::{
    ffi::OsString,
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result};
use cluster::Outcome;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    net::TcpStream,
    process::{Child, Command},
    signal::unix::{SignalKind, signal},
    time::{sleep, timeout},
};
use tracing::{info, warn};

pub(crate) use self::notice::Cloud;
use crate::{
    history::Source,
    up::{Report, worker_program},
    worker_arguments::{coordinators, value_of},
};

/// What a worker is to be started again after: it was asked to stop, or found no coordinator.
pub(crate) const AGAIN: u8 = 75;
/// The worker was refused, and would be again.
const REFUSED: u8 = 2;
/// Between two looks for a coordinator.
const LOOK: Duration = Duration::from_millis(500);
/// A host that does not answer for so long has no coordinator.
const ANSWER_MAX: Duration = Duration::from_secs(2);

/// What a guard is started with.
#[derive(Debug)]
pub(crate) struct Request {
    /// Whose notices count.
    pub(crate) cloud: Option<Cloud>,
    /// Where they are asked for, instead of the cloud's own address.
    pub(crate) notice_url: Option<String>,
    /// The log of the run: once it is finished, no worker is needed.
    pub(crate) log: Option<PathBuf>,
    /// The file with the coordinator's address; the worker then finds it wherever it has moved.
    pub(crate) coordinator_file: Option<PathBuf>,
    /// How long a coordinator is waited for.
    pub(crate) patience: Duration,
    /// For the worker.
    pub(crate) arguments: Vec<OsString>,
}

/// How a worker's life ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct End {
    /// What its process ended with, as a shell has it.
    code: u8,
    asked_to_stop: bool,
    /// Whether a coordinator could be reached afterwards; a worker that never met one was not refused.
    coordinator: bool,
}

/// Runs a worker; returns what to end with.
pub(crate) async fn run(mut request: Request) -> Result<u8> {
    let mut asked = Asked::listen(request.cloud, request.notice_url.as_deref())?;
    if is_finished(request.log.as_deref()).await {
        info!("the run is finished: no worker is needed");
        return Ok(0);
    }
    let relay = match &request.coordinator_file {
        Some(file) => Some(relay::start(file.clone()).await?),
        None => None,
    };
    if let Some(address) = relay {
        request.arguments.insert(0, format!("--coordinator=http://{address}").into());
    }
    let coordinators = match &request.coordinator_file {
        Some(file) => Coordinators::File(file.clone()),
        None => Coordinators::Named(named(&request.arguments)?),
    };
    let found = tokio::select! {
        found = timeout(request.patience, coordinators.wait_for()) => found.is_ok(),
        reason = asked.next() => {
            info!(reason, "asked to stop before there was a coordinator");
            return Ok(AGAIN);
        }
    };
    if !found {
        warn!("no coordinator has answered; giving the place back");
        return Ok(if is_finished(request.log.as_deref()).await { 0 } else { AGAIN });
    }
    let (status, asked_to_stop) = attend(start(&request.arguments)?, &mut asked).await?;
    let coordinator = coordinators.answer().await;
    let end = End { code: shell_code(status), asked_to_stop, coordinator };
    let code = verdict(end, is_finished(request.log.as_deref()).await);
    info!(worker = end.code, asked_to_stop, code, "the worker has ended");
    Ok(code)
}

/// What to end with, after a worker that ended like this.
fn verdict(end: End, finished: bool) -> u8 {
    match end {
        _ if finished => 0,
        End { asked_to_stop: true, .. } => AGAIN,
        End { code: REFUSED, coordinator: false, .. } => AGAIN,
        End { code, .. } => code,
    }
}

/// As a shell has it: 128 and the signal's number if there was one.
fn shell_code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
}

fn start(arguments: &[OsString]) -> Result<Child> {
    let program = worker_program()?;
    let mut command = Command::new(&program);
    // Its input ends with this process, and it with its input, however this process ends.
    command.arg("--exit-with-stdin").args(arguments).stdin(Stdio::piped()).process_group(0);
    command.spawn().with_context(|| format!("cannot start {}", program.display()))
}

/// Waits for its end, and hands on the first request to stop. Returns whether there was one.
async fn attend(mut child: Child, asked: &mut Asked) -> Result<(ExitStatus, bool)> {
    let _input = child.stdin.take(); // Kept open: waiting for a child closes it, and the worker ends with it.
    let reason = tokio::select! {
        status = child.wait() => return Ok((status.context("cannot wait for the worker")?, false)),
        reason = asked.next() => reason,
    };
    info!(reason, "the worker is asked to leave after its step");
    if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()) {
        kill(Pid::from_raw(pid), Signal::SIGTERM).ok(); // It may have ended just now.
    }
    Ok((child.wait().await.context("cannot wait for the worker")?, true))
}

/// Everything that asks this process to stop.
struct Asked {
    signals: Vec<(&'static str, tokio::signal::unix::Signal)>,
    notices: Option<notice::Watch>,
}

impl Asked {
    fn listen(cloud: Option<Cloud>, url: Option<&str>) -> Result<Self> {
        let kinds = [
            ("SIGTERM", SignalKind::terminate()),
            ("SIGINT", SignalKind::interrupt()),
            ("SIGUSR1", SignalKind::user_defined1()),
            ("SIGUSR2", SignalKind::user_defined2()),
        ];
        let mut signals = Vec::new();
        for (name, kind) in kinds {
            let listened = signal(kind).with_context(|| format!("cannot listen for {name}"))?;
            signals.push((name, listened));
        }
        let notices = cloud.map(|cloud| notice::watch(cloud, url)).transpose()?;
        Ok(Self { signals, notices })
    }

    /// The next request, in words.
    async fn next(&mut self) -> String {
        let signals = self.signals.iter_mut().map(|(name, signal)| {
            Box::pin(async move {
                signal.recv().await;
                (*name).to_owned()
            })
        });
        let any_signal = futures::future::select_all(signals);
        let notice = async {
            match &mut self.notices {
                Some(notices) => notices.next().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            (name, ..) = any_signal => name,
            notice = notice => notice,
        }
    }
}

/// Whether the log says so. A log that cannot be read says nothing.
async fn is_finished(log: Option<&Path>) -> bool {
    let Some(log) = log else { return false };
    let read = async {
        let entries = Source::of(log).await?.read(1).await?.entries;
        anyhow::Ok(matches!(Report::of(&entries).ledger().outcome, Some(Outcome::Finished { .. })))
    };
    match read.await {
        Ok(finished) => finished,
        Err(error) => {
            info!("the log of the run cannot be read yet: {error:#}");
            false
        }
    }
}

/// Where a coordinator may be.
#[derive(Debug)]
enum Coordinators {
    /// HOST:PORT of each.
    Named(Vec<String>),
    File(PathBuf),
}

impl Coordinators {
    async fn wait_for(&self) {
        while !self.answer().await {
            sleep(LOOK).await;
        }
    }

    /// Whether one takes a connection.
    async fn answer(&self) -> bool {
        let addresses = match self {
            Self::Named(addresses) => addresses.clone(),
            Self::File(file) => relay::read_address(file).into_iter().collect(),
        };
        for address in addresses {
            if let Ok(Ok(_)) = timeout(ANSWER_MAX, TcpStream::connect(&address)).await {
                return true;
            }
        }
        false
    }
}

/// HOST:PORT of each coordinator that the worker's arguments name.
fn named(arguments: &[OsString]) -> Result<Vec<String>> {
    let value = value_of(arguments, "--coordinator").context(
        "say --coordinator among the worker's arguments, or --coordinator-file before them",
    )?;
    coordinators(&value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(code: u8, asked_to_stop: bool, coordinator: bool) -> End {
        End { code, asked_to_stop, coordinator }
    }

    #[test]
    fn who_was_asked_to_stop_is_started_again_and_who_was_refused_is_not() {
        assert_eq!(verdict(end(0, false, true), false), 0, "let go by an operator");
        assert_eq!(verdict(end(0, true, true), false), AGAIN);
        assert_eq!(verdict(end(137, true, true), false), AGAIN);
        assert_eq!(verdict(end(2, false, true), false), 2);
        assert_eq!(verdict(end(2, false, false), false), AGAIN, "there was nobody to refuse it");
        assert_eq!(verdict(end(1, false, true), false), 1);
    }

    #[test]
    fn once_the_run_is_finished_nobody_is_started_again() {
        for code in [0, 1, 2, 137] {
            assert_eq!(verdict(end(code, true, false), true), 0);
        }
    }

    #[test]
    fn the_coordinators_are_those_of_the_workers_arguments() {
        let words = |line: &str| line.split(' ').map(OsString::from).collect::<Vec<_>>();
        let line = "--run toy --coordinator http://a:7070,http://b.c.svc:7070 --name x";
        assert_eq!(named(&words(line)).unwrap(), ["a:7070", "b.c.svc:7070"]);
        assert_eq!(named(&words("--coordinator=http://127.0.0.1:1/")).unwrap(), ["127.0.0.1:1"]);
        assert!(named(&words("--run toy")).unwrap_err().to_string().contains("--coordinator-file"));
        assert!(named(&words("--coordinator a:7070")).is_err());
    }
}
