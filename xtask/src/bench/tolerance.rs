//! `cargo xtask bench tolerance`: what it costs to be ready for faults while none comes.
//!
//! Training by itself is what a worker's `train` and `feed` threads do. All else that runs is there for
//! faults: the coordinator with its log, and each worker's agent with session, heartbeats and reports.
//! Figures are CPU time from the scheduler, so a busy machine disturbs them little. What the training
//! thread itself does for the agent (it notes its phase, looks whether it is to stop, hands in a report a
//! step) is not told from training: a few locks and atomic reads a pass.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::chaos::crew::Crew;
use crate::chaos::{self, unix_ms};
use crate::workspace::Workspace;

/// Steps before the measured ones.
const WARM_UP: usize = 10;
/// The run is given up after so long.
const PATIENCE: Duration = Duration::from_secs(3600);
/// From one look at the threads to the next, in milliseconds.
const LOOK_MS: u64 = 250;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Steps to train.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u64).range(50..))]
    steps: u64,
    /// How many workers train [default: one a processor, at most 8].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=8))]
    workers: Option<u32>,
    /// Print one object as the last line.
    #[arg(long)]
    json: bool,
}

/// CPU time of all threads of a kind until a moment, in nanoseconds.
#[derive(Debug, Clone, Copy, Default)]
struct Spent {
    at_ms: u64,
    training: u64,
    agents: u64,
    coordinator: u64,
}

/// By process and thread: its kind and its time. Those that have ended stay.
#[derive(Debug, Default)]
struct Threads(BTreeMap<(u32, String), (Kind, u64)>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Training,
    Agent,
    Coordinator,
}

pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<()> {
    let folder = tempfile::tempdir().context("cannot make a folder for the run")?;
    let dir = folder.path().join("tolerance");
    let recipe = chaos::recipe(workspace, arguments.steps, false)?;
    let processors = std::thread::available_parallelism().map_or(1, usize::from).min(8);
    let workers = arguments.workers.unwrap_or(u32::try_from(processors).expect("at most 8"));
    let mut crew = Crew::start(workspace, &dir, &recipe, (workers, workers as usize), None, 1)?;
    let (mut threads, mut seen) = (Threads::default(), Vec::<Spent>::new());
    chaos::wait_for_the_end(&mut crew, PATIENCE, |crew| {
        if seen.last().is_none_or(|last| unix_ms() >= last.at_ms + LOOK_MS) {
            seen.push(threads.look(&crew.processes()));
        }
        Ok(())
    })?;
    let tale = chaos::read(workspace, &dir)?;
    let times = tale.step_times();
    let (from, to) = times.get(WARM_UP).zip(times.last()).context("the run made too few steps")?;
    let first = seen.iter().find(|spent| spent.at_ms >= *from);
    let last = seen.iter().rfind(|spent| spent.at_ms <= *to);
    let (first, last) = first.zip(last).context("the run was too short to be looked at")?;
    let steps = times.iter().filter(|at| (first.at_ms..=last.at_ms).contains(*at)).count();
    let a_step = |kind: fn(&Spent) -> u64| (kind(last) - kind(first)) as f64 / 1e6 / steps as f64;
    let training = a_step(|spent| spent.training);
    let (agents, coordinator) = (a_step(|spent| spent.agents), a_step(|spent| spent.coordinator));
    let percent = 100.0 * (agents + coordinator) / training;
    println!("\n{steps} steps of {workers} workers, CPU time a step");
    println!("  training     {training:>9.3} ms");
    println!("  agents       {agents:>9.3} ms");
    println!("  coordinator  {coordinator:>9.3} ms");
    println!("  fault tolerance costs {percent:.2} % of a step (goal 1)");
    if arguments.json {
        let figures = serde_json::json!({
            "steps": steps, "workers": workers, "training_cpu_ms": training,
            "agents_cpu_ms": agents, "coordinator_cpu_ms": coordinator, "tolerance_percent": percent,
        });
        println!("{figures}");
    }
    Ok(())
}

impl Threads {
    fn look(&mut self, processes: &[(bool, u32)]) -> Spent {
        for &(is_worker, process) in processes {
            let tasks = format!("/proc/{process}/task");
            for task in fs::read_dir(tasks).into_iter().flatten().flatten() {
                // A thread that ends while it is looked at keeps its last figure.
                let Some((name, time)) = of_thread(&task.path()) else { continue };
                let kind = match (is_worker, name.trim()) {
                    (false, _) => Kind::Coordinator,
                    (true, "train" | "feed") => Kind::Training,
                    (true, _) => Kind::Agent,
                };
                let thread = task.file_name().to_string_lossy().into_owned();
                self.0.insert((process, thread), (kind, time));
            }
        }
        let sum = |kind| self.0.values().filter(|(of, _)| *of == kind).map(|(_, time)| time).sum();
        Spent {
            at_ms: unix_ms(),
            training: sum(Kind::Training),
            agents: sum(Kind::Agent),
            coordinator: sum(Kind::Coordinator),
        }
    }
}

/// A thread's name, and how long it has run.
fn of_thread(task: &Path) -> Option<(String, u64)> {
    let read = |file: &str| fs::read_to_string(task.join(file)).ok();
    let time = read("schedstat")?.split_ascii_whitespace().next()?.parse().ok()?;
    Some((read("comm")?, time))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_of_this_process_have_a_time_that_grows() {
        let mut threads = Threads::default();
        let own = [(true, std::process::id())];
        let before = threads.look(&own);
        assert!(before.agents > 0 && before.training == 0 && before.coordinator == 0);
        assert!(threads.look(&own).agents >= before.agents);
    }
}
