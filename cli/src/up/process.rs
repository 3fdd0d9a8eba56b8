//! A child process: started in a group of its own, ended at will, and waited for at once.

use std::{
    fs::{self, OpenOptions},
    io::{Read as _, Seek as _, SeekFrom},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    process::{Child, Command},
    sync::mpsc,
};

/// A child that has been started. Dropping this closes its standard input.
#[derive(Debug)]
pub(crate) struct Process {
    controls: mpsc::UnboundedSender<Control>,
}

#[derive(Debug)]
enum Control {
    CloseInput,
    Signal(Signal),
}

/// How a child ended.
#[derive(Debug)]
pub(crate) struct End {
    /// Exit code or signal.
    pub(crate) status: ExitStatus,
    /// How long it was there.
    pub(crate) lived: Duration,
    /// What follows `error:` in the last such line that it wrote.
    pub(crate) last_error: Option<String>,
}

/// Starts `command`; what it writes is appended to `log`. When it has ended, `to_message` of how is
/// sent through `ended`.
pub(crate) fn spawn<T: Send + 'static>(
    mut command: Command,
    log: &Path,
    ended: mpsc::Sender<T>,
    to_message: impl FnOnce(End) -> T + Send + 'static,
) -> Result<Process> {
    let unwritable = || format!("{} cannot be written", log.display());
    let file = OpenOptions::new().create(true).append(true).open(log).with_context(unwritable)?;
    let log_start = file.metadata().with_context(unwritable)?.len();
    let program = command.as_std().get_program().to_owned();
    command
        .stdin(Stdio::piped())
        .stdout(file.try_clone().with_context(unwritable)?)
        .stderr(file)
        .process_group(0) // Ctrl-C is for the supervisor, which ends its children in order.
        .kill_on_drop(true);
    let child = command
        .spawn()
        .with_context(|| format!("cannot start {}", Path::new(&program).display()))?;
    let (controls, receiver) = mpsc::unbounded_channel();
    let log = log.to_owned();
    tokio::spawn(async move {
        let started = Instant::now();
        let status = see_to_its_end(child, receiver).await;
        let last_error = last_error(&log, log_start);
        let end = End { status, lived: started.elapsed(), last_error };
        ended.send(to_message(end)).await.ok(); // Nobody listens any more at the very end.
    });
    Ok(Process { controls })
}

impl Process {
    /// Closes its standard input, which asks it to end.
    pub(crate) fn close_input(&self) {
        self.controls.send(Control::CloseInput).ok(); // It may have ended.
    }

    /// Sends it a signal, if it is still there.
    pub(crate) fn signal(&self, signal: Signal) {
        self.controls.send(Control::Signal(signal)).ok(); // It may have ended.
    }
}

/// Owns the child until it has ended, so a signal never hits another process of the same number.
async fn see_to_its_end(
    mut child: Child,
    mut controls: mpsc::UnboundedReceiver<Control>,
) -> ExitStatus {
    let mut input = child.stdin.take();
    loop {
        let control = tokio::select! {
            status = child.wait() => return status.expect("a child is waited for once"),
            control = controls.recv(), if input.is_some() || !controls.is_closed() => control,
        };
        match control {
            None | Some(Control::CloseInput) => drop(input.take()),
            Some(Control::Signal(signal)) => {
                let pid = child.id().and_then(|id| i32::try_from(id).ok());
                if let Some(pid) = pid {
                    kill(Pid::from_raw(pid), signal).ok(); // It may have ended just now.
                }
            }
        }
    }
}

fn last_error(log: &PathBuf, from: u64) -> Option<String> {
    const TAIL_MAX: u64 = 64 << 10;
    let mut file = fs::File::open(log).ok()?;
    let length = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(from.max(length.saturating_sub(TAIL_MAX)))).ok()?;
    let mut tail = Vec::new();
    file.read_to_end(&mut tail).ok()?;
    let tail = String::from_utf8_lossy(&tail);
    let line = tail.lines().rev().find_map(|line| line.strip_prefix("error:"))?;
    Some(line.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;

    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    async fn end_of(script: &str, act: impl FnOnce(&Process)) -> End {
        let folder = tempfile::tempdir().unwrap();
        let (sender, mut receiver) = mpsc::channel(1);
        let log = folder.path().join("child.log");
        fs::write(&log, "error: of the one before\n").unwrap();
        let process = spawn(shell(script), &log, sender, |end| end).unwrap();
        act(&process);
        receiver.recv().await.unwrap()
    }

    #[tokio::test]
    async fn the_exit_code_and_the_last_error_line_are_told() {
        let end = end_of("echo error: first >&2; echo 'error: second' >&2; exit 2", |_| {}).await;
        assert_eq!(end.status.code(), Some(2));
        assert_eq!(end.last_error.as_deref(), Some("second"));
        assert_eq!(end_of("exit 0", |_| {}).await.last_error, None);
    }

    #[tokio::test]
    async fn a_closed_input_ends_a_child_that_waits_for_it() {
        let end = end_of("cat", Process::close_input).await;
        assert_eq!(end.status.code(), Some(0));
    }

    #[tokio::test]
    async fn a_stopped_child_can_be_killed() {
        let end = end_of("cat", |process| {
            process.signal(Signal::SIGSTOP);
            process.signal(Signal::SIGKILL);
        });
        assert_eq!(end.await.status.signal(), Some(9));
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let (sender, _receiver) = mpsc::channel(1);
        let log = folder.path().join("child.log");
        let error = spawn(Command::new("no-such-program"), &log, sender, |end| end).unwrap_err();
        assert!(format!("{error:#}").starts_with("cannot start no-such-program: "), "{error:#}");
    }
}
