//! The machinery of `percheron up`.
//!
//! ```text
//!  prepare: recipe, dataset, run directory, checkpoint: all is checked before anything is written
//!     |
//!  supervisor (one task) <-- what happened -- process: a child each, waited for at once
//!     |    |    |                       +---- watch: the event log, as the coordinator writes it
//!     |    |    +-> rules, chaos: what to start, what to disturb (pure)
//!     |    +------> report: the figures (a fold of the log)
//!     +-----------> face, words: what a person sees
//! ```

mod chaos;
mod face;
mod means;
mod prepare;
mod process;
mod report;
mod rules;
mod supervisor;
mod watch;
pub(crate) mod words;

use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};

pub(crate) use self::{
    means::apply_device,
    prepare::{Request, Start, prepare},
    report::{Report, Summary, Top1},
    rules::{FAILURES_MAX, WorkerEnd, in_words},
    supervisor::{Ending, supervise},
};

/// The program of a worker, which lies beside this one.
pub(crate) fn worker_program() -> Result<PathBuf> {
    let this = std::env::current_exe().context("this program cannot tell where it lies")?;
    let worker = this.with_file_name("percheron-worker");
    ensure!(
        worker.is_file(),
        "there is no {}: build it with `cargo build --release -p worker`, or put it beside {}",
        worker.display(),
        this.display()
    );
    Ok(worker)
}
