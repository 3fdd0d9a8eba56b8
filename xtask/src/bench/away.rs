//! `cargo xtask bench away`: what it costs that a coordinator is away, dies or sleeps, with real processes.
//!
//! Away: training goes on without it. Restart: it reads its log again. Takeover: one that stands by leads
//! instead. Sleep: a leader that was stopped until another led writes nothing when it wakes.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde_json::{Value, json};

use super::figures::{Training, median, train};
use crate::chaos::crew::{Crew, Signal};
use crate::process;
use crate::workspace::Workspace;

const LOOK: Duration = Duration::from_millis(200);
/// No figure before a run has got going.
const WARM_UP_STEPS: u64 = 30;
/// A run that does not get there within that has failed.
const PATIENCE: Duration = Duration::from_secs(120);
/// Steps of the run whose leader sleeps, and from one checkpoint to the next.
const SLEEP_STEPS: u64 = 400;
const SLEEP_EVERY: u64 = 50;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// How long the coordinator is away, in seconds; before and after are as long.
    #[arg(long, value_name = "S", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
    /// How often it goes away.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// How many leaders are killed while another stands by.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    takeovers: u32,
    /// How many workers train.
    #[arg(long, default_value_t = 2)]
    workers: u32,
    /// Print one object as the last line.
    #[arg(long)]
    json: bool,
}

/// A line of `percheron log --json`.
#[derive(Debug, Deserialize)]
struct Line {
    at_ms: u64,
    record: Value,
}

pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<()> {
    let folder = tempfile::tempdir().context("cannot make a folder for the runs")?;
    let stage = Stage { workspace, folder: folder.path(), workers: arguments.workers };
    let away = stage.away(arguments)?;
    let takeovers = stage.takeovers(arguments.takeovers)?;
    let sleep = stage.sleep()?;
    let restarts: Vec<_> = away.iter().map(|round| round.restart_ms).collect();
    let first_steps: Vec<_> = away.iter().map(|round| round.first_step_ms).collect();
    let share = |of: fn(&Round) -> f64| {
        let mut shares: Vec<_> = away.iter().map(of).collect();
        shares.sort_by(f64::total_cmp);
        shares.get(shares.len() / 2).copied().context("there was no round")
    };
    let (by_clock, by_cpu) = (share(Round::by_clock)?, share(Round::by_cpu)?);
    let middle = |figures: &[u64]| median(figures).context("nothing was measured");
    let most = |figures: &[u64]| figures.iter().copied().max().unwrap_or_default();
    let (listens, steps): (Vec<_>, Vec<_>) = takeovers.into_iter().unzip();
    println!("\n{} workers; away {} s, {} times", arguments.workers, arguments.seconds, away.len());
    for round in &away {
        println!(
            "  step before and after {:.1} ms, while away {:.1} ms; CPU time {:.1} and {:.1} ms",
            round.with.step_ms, round.without.step_ms, round.with.cpu_ms, round.without.cpu_ms
        );
    }
    println!(
        "  throughput while away: {by_clock:.4} by the clock, {by_cpu:.4} by CPU time (goal 0.99)"
    );
    println!(
        "  restart to serving: median {:.0} ms, most {} ms (goal 2000); to the next record of a step: most {} \
         ms",
        middle(&restarts)?,
        most(&restarts),
        most(&first_steps)
    );
    println!(
        "  {} leaders killed: the standby serves after {:.0} ms, most {} ms (goal 5000); it records a step \
         after most {} ms",
        listens.len(),
        middle(&listens)?,
        most(&listens),
        most(&steps)
    );
    println!("  a leader that slept: {:?}; records of its term after that: none", sleep.words);
    println!("  state {}: the same as undisturbed", sleep.state);
    if arguments.json {
        let rounds: Vec<_> = away.iter().map(Round::to_json).collect();
        let figures = json!({
            "workers": arguments.workers, "away_s": arguments.seconds, "rounds": rounds,
            "throughput_by_clock": by_clock, "throughput_by_cpu": by_cpu,
            "restart_ms": restarts, "restart_first_step_ms": first_steps,
            "takeover_ms": listens, "takeover_first_step_ms": steps,
            "fenced": true, "state_sha256": sleep.state,
        });
        println!("{figures}");
    }
    Ok(())
}

/// Where the runs are.
struct Stage<'a> {
    workspace: &'a Workspace,
    folder: &'a Path,
    workers: u32,
}

/// A stretch of training.
#[derive(Debug, Clone, Copy)]
struct Pace {
    /// Median time from one step to the next.
    step_ms: f64,
    /// CPU time of all workers by the steps.
    cpu_ms: f64,
}

/// The coordinator was away once.
#[derive(Debug)]
struct Round {
    /// Before and after.
    with: Pace,
    without: Pace,
    /// From the start of its process to the first connection that it takes.
    restart_ms: u64,
    /// To the first record of a step.
    first_step_ms: u64,
}

impl Round {
    fn by_clock(&self) -> f64 {
        self.with.step_ms / self.without.step_ms
    }

    fn by_cpu(&self) -> f64 {
        self.with.cpu_ms / self.without.cpu_ms
    }

    fn to_json(&self) -> Value {
        let Self { with, without, .. } = self;
        json!({
            "step_ms_with": with.step_ms, "step_ms_away": without.step_ms,
            "cpu_ms_with": with.cpu_ms, "cpu_ms_away": without.cpu_ms,
        })
    }
}

/// A moment: the Unix epoch's milliseconds, and the workers' CPU time until then.
#[derive(Debug, Clone, Copy)]
struct Moment {
    at_ms: u64,
    cpu_ticks: u64,
}

/// What became of a leader that slept.
struct Sleep {
    words: String,
    state: String,
}

impl<'a> Stage<'a> {
    fn start(&self, name: &str, steps: u64, every: u64, coordinators: usize) -> Result<Run<'a>> {
        let mut show = self.workspace.binary("percheron");
        show.args(["recipe", "show", "digits"]);
        for set in sets(steps, every) {
            show.args(["--set", &set]);
        }
        let dir = self.folder.join(name);
        let places = (self.workers, self.workers as usize);
        let recipe = process::output(&mut show)?;
        let crew = Crew::start(self.workspace, &dir, &recipe, places, None, coordinators)?;
        Ok(Run { workspace: self.workspace, dir, crew })
    }

    fn away(&self, arguments: &Arguments) -> Result<Vec<Round>> {
        let mut run = self.start("away", 1_000_000, 100_000, 1)?;
        run.wait_for_steps(WARM_UP_STEPS)?;
        let lasts = Duration::from_secs(arguments.seconds);
        let mut moments = vec![run.moment()?];
        let mut restarts = Vec::new();
        thread::sleep(lasts);
        for round in 1..=arguments.rounds {
            println!("away {round} of {}", arguments.rounds);
            let killed = run.moment()?;
            run.crew.kill_coordinator(0)?;
            thread::sleep(lasts);
            let back = run.moment()?;
            run.crew.start_coordinator(0)?;
            let restart = run.crew.wait_until_it_listens(0)?;
            restarts.push(u64::try_from(restart.as_millis()).unwrap_or(u64::MAX));
            thread::sleep(lasts);
            moments.extend([killed, back, run.moment()?]);
        }
        let lines = run.log()?;
        let steps = steps_of(&lines);
        let rounds = moments.windows(4).step_by(3).zip(restarts);
        rounds
            .map(|(four, restart_ms)| {
                let pace = |from, to| pace(&steps, from, to);
                let (before, without) = (pace(four[0], four[1])?, pace(four[1], four[2])?);
                let after = pace(four[2], four[3])?;
                let with = Pace {
                    step_ms: f64::midpoint(before.step_ms, after.step_ms),
                    cpu_ms: f64::midpoint(before.cpu_ms, after.cpu_ms),
                };
                let first = first_step_recorded(&lines, four[2].at_ms)?;
                Ok(Round { with, without, restart_ms, first_step_ms: first - four[2].at_ms })
            })
            .collect()
    }

    /// From the death of each leader: until the other serves, and until it records a step.
    fn takeovers(&self, count: u32) -> Result<Vec<(u64, u64)>> {
        let mut run = self.start("takeover", 1_000_000, 100_000, 2)?;
        run.wait_for_steps(WARM_UP_STEPS)?;
        let mut deaths = Vec::new();
        let mut leader = 0;
        for number in 1..=count {
            println!("takeover {number} of {count}");
            let at_ms = unix_ms();
            run.crew.kill_coordinator(leader)?;
            let serves = run.crew.wait_until_it_listens(1 - leader)?;
            run.wait_for_a_step_recorded_after(at_ms)?;
            deaths.push((at_ms, u64::try_from(serves.as_millis()).unwrap_or(u64::MAX)));
            run.crew.start_coordinator(leader)?;
            leader = 1 - leader;
        }
        let lines = run.log()?;
        let cost = |(at, serves): (u64, u64)| Ok((serves, first_step_recorded(&lines, at)? - at));
        deaths.into_iter().map(cost).collect()
    }

    fn sleep(&self) -> Result<Sleep> {
        let undisturbed = train(
            self.workspace,
            &Training {
                recipe: "digits",
                workers: 1,
                chaos: "",
                sets: &sets(SLEEP_STEPS, SLEEP_EVERY),
                run_dir: &self.folder.join("undisturbed"),
            },
        )?;
        let mut run = self.start("sleep", SLEEP_STEPS, SLEEP_EVERY, 2)?;
        run.wait_for_steps(WARM_UP_STEPS)?;
        let kept = |lines: &[Line]| lines.iter().filter(|l| is(l, "checkpoint_committed")).count();
        println!("the leader is stopped");
        run.crew.signal_coordinator(0, Signal::Stop)?;
        let before = kept(&run.log()?);
        run.crew.wait_until_it_listens(1)?;
        run.wait_until("a checkpoint of the new leader", |lines| kept(lines) > before)?;
        run.crew.signal_coordinator(0, Signal::Continue)?;
        let status = run.crew.coordinators_end(0)?;
        let said = run.crew.said(0);
        let words = said.lines().last().unwrap_or_default().to_owned();
        ensure!(
            !status.success() && words.starts_with("error: another coordinator has taken the lead"),
            "the leader that slept ended ({status}): {said}"
        );
        let started = Instant::now();
        while !run.crew.has_ended()? {
            ensure!(started.elapsed() < PATIENCE, "the run does not end");
            thread::sleep(LOOK);
        }
        let mut audit = self.workspace.binary("percheron");
        print!("{}", process::output(audit.arg("audit").arg(&run.dir))?);
        let lines = run.log()?;
        let terms: Vec<_> = lines.iter().filter(|line| is(line, "term_started")).collect();
        ensure!(terms.len() == 2, "terms were begun: {terms:?}");
        let end = lines.iter().find(|line| is(line, "run_finished")).context("the run's end")?;
        let state = end.record["state_sha256"].as_str().unwrap_or_default().to_owned();
        let whole = undisturbed.state_sha256;
        ensure!(state == whole, "the state is {state} and undisturbed {whole}");
        Ok(Sleep { words, state })
    }
}

/// A run of real processes.
struct Run<'a> {
    workspace: &'a Workspace,
    dir: PathBuf,
    crew: Crew<'a>,
}

impl Run<'_> {
    fn log(&self) -> Result<Vec<Line>> {
        let mut log = self.workspace.binary("percheron");
        let text = process::output(log.arg("log").arg(&self.dir).arg("--json"))?;
        text.lines().map(|line| serde_json::from_str(line).context("the log")).collect()
    }

    fn moment(&self) -> Result<Moment> {
        Ok(Moment { at_ms: unix_ms(), cpu_ticks: self.crew.workers_ticks()? })
    }

    fn wait_for_steps(&mut self, steps: u64) -> Result<()> {
        let adopted = |lines: &[Line]| steps_of(lines).len() as u64;
        self.wait_until("its first steps", |lines| adopted(lines) >= steps)
    }

    fn wait_for_a_step_recorded_after(&mut self, at_ms: u64) -> Result<()> {
        self.wait_until("a step after that", |lines| first_step_recorded(lines, at_ms).is_ok())
    }

    fn wait_until(&mut self, what: &str, is_there: impl Fn(&[Line]) -> bool) -> Result<()> {
        let started = Instant::now();
        while !is_there(&self.log()?) {
            ensure!(started.elapsed() < PATIENCE, "the run does not come to {what}");
            ensure!(!self.crew.has_ended()?, "the run ended before {what}");
            thread::sleep(LOOK);
        }
        Ok(())
    }
}

/// Digits, with a batch so small that a step is short.
fn sets(steps: u64, every: u64) -> Vec<String> {
    vec![
        format!("max_steps={steps}"),
        format!("epochs={steps}"), // More than enough; max_steps ends the run.
        "batch_size=2".to_owned(),
        "evaluate_every_epochs=0".to_owned(),
        "checkpoint.every_epochs=0".to_owned(),
        format!("checkpoint.every_steps={every}"),
    ]
}

fn is(line: &Line, kind: &str) -> bool {
    line.record["kind"] == kind
}

/// When each step was applied, in order.
fn steps_of(lines: &[Line]) -> Vec<u64> {
    let steps = lines.iter().filter(|line| is(line, "step_adopted"));
    steps.filter_map(|line| line.record["applied_at"].as_u64()).collect()
}

/// When the first step after a moment was recorded.
fn first_step_recorded(lines: &[Line], at_ms: u64) -> Result<u64> {
    let first = lines.iter().find(|line| is(line, "step_adopted") && line.at_ms >= at_ms);
    first.map(|line| line.at_ms).context("no step was recorded after that")
}

/// How fast the workers were between two moments.
fn pace(steps: &[u64], from: Moment, to: Moment) -> Result<Pace> {
    let within: Vec<_> =
        steps.iter().copied().filter(|&at| at >= from.at_ms && at < to.at_ms).collect();
    let gaps: Vec<_> = within.windows(2).map(|two| two[1].saturating_sub(two[0])).collect();
    let step_ms = median(&gaps).context("hardly a step was made: --seconds is too short")?;
    let ticks = to.cpu_ticks - from.cpu_ticks;
    // Linux counts 100 of them a second for programs, whatever the kernel's own clock does.
    let cpu_ms = ticks as f64 * 10.0 / within.len() as f64;
    Ok(Pace { step_ms, cpu_ms })
}

fn unix_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pace_is_of_the_steps_between_two_moments() {
        let moment = |at_ms, cpu_ticks| Moment { at_ms, cpu_ticks };
        let steps = [0, 10, 20, 30, 45, 60, 200];
        let pace_of = pace(&steps, moment(10, 100), moment(100, 110)).unwrap();
        assert!((pace_of.step_ms - 12.5).abs() < 1e-9, "{pace_of:?}");
        assert!((pace_of.cpu_ms - 20.0).abs() < 1e-9, "{pace_of:?}");
        let problem = pace(&steps, moment(61, 0), moment(100, 1)).unwrap_err().to_string();
        assert!(problem.contains("--seconds is too short"), "{problem}");
    }

    #[test]
    fn the_first_step_after_a_moment_is_found_by_when_it_was_recorded() {
        let line = |at_ms, kind: &str| Line { at_ms, record: json!({ "kind": kind }) };
        let lines = [line(5, "step_adopted"), line(9, "term_started"), line(12, "step_adopted")];
        assert_eq!(first_step_recorded(&lines, 6).unwrap(), 12);
        assert!(first_step_recorded(&lines, 13).is_err());
    }
}
