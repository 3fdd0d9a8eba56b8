//! What asks a worker to stop: a signal, or the end of whoever started it.

use std::{io::Read as _, thread};

use rustix::process::Signal;
use tracing::warn;

use super::{AgentError, system};

/// The signals that ask this process to stop.
pub(super) struct Terminations {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Terminations {
    pub(super) fn listen(exit_with_stdin: bool) -> Result<Self, AgentError> {
        use tokio::signal::unix::{SignalKind, signal};
        if exit_with_stdin {
            thread::Builder::new()
                .name("stdin".to_owned())
                .spawn(end_with_stdin)
                .map_err(system("start a thread"))?;
        }
        Ok(Self {
            terminate: signal(SignalKind::terminate()).map_err(system("listen for SIGTERM"))?,
            interrupt: signal(SignalKind::interrupt()).map_err(system("listen for SIGINT"))?,
        })
    }

    /// The next request to stop.
    pub(super) async fn next(&mut self) -> String {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM".to_owned(),
            _ = self.interrupt.recv() => "SIGINT".to_owned(),
        }
    }
}

/// Whoever started this process is gone: nobody would miss it, or end it.
fn end_with_stdin() {
    let mut sink = [0; 64];
    let mut stdin = std::io::stdin().lock();
    while stdin.read(&mut sink).is_ok_and(|read| read > 0) {}
    warn!("standard input has ended: this worker ends with it");
    // Not an orderly exit: that would tear libtorch down while it computes.
    let killed = rustix::process::kill_process(rustix::process::getpid(), Signal::KILL);
    killed.expect("a process may end itself");
}
