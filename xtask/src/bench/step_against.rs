//! `cargo xtask bench step-against`: a training step of this build, in turns with others.
//!
//! The programs take turns, round by round, so that whatever else the machine does slows all alike; what is
//! compared are medians over the rounds of the CPU seconds of a step.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::process;
use crate::workspace::Workspace;

/// The same step, written with PyTorch's modules.
const TORCH_SCRIPT: &str = include_str!("step_torch.py");

/// What is compared: times of a step, and the peak of memory.
const FIGURES: [&str; 7] = [
    "forward_cpu_s",
    "backward_cpu_s",
    "optimizer_cpu_s",
    "ema_cpu_s",
    "total_cpu_s",
    "wall_s",
    "peak_rss_mb",
];

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Another build of `percheron-worker`; may be given several times.
    #[arg(long = "worker", value_name = "PROGRAM")]
    workers: Vec<PathBuf>,
    /// A Python that has torch 2.11: the same step in PyTorch (RegNetY models only).
    #[arg(long, value_name = "PROGRAM")]
    torch_python: Option<PathBuf>,
    /// The model.
    #[arg(long, default_value = "reg800m_perceiver_t128")]
    model: String,
    /// Images in a step.
    #[arg(long, default_value_t = 32)]
    batch: u32,
    /// Threads inside an operation.
    #[arg(long, default_value_t = 1)]
    threads: u32,
    /// Turns of each program.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Steps that each measures in a turn, after one that it does not.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// Print one object as the last line.
    #[arg(long)]
    json: bool,
}

/// A program and what it printed, a round each.
struct Contestant {
    name: String,
    program: PathBuf,
    leading: Vec<String>,
    rounds: Vec<Value>,
}

impl Contestant {
    fn worker(program: PathBuf) -> Self {
        let name = program.display().to_string();
        Self { name, program, leading: vec!["bench-step".to_owned()], rounds: Vec::new() }
    }

    fn torch(program: PathBuf) -> Self {
        let leading = ["-c", TORCH_SCRIPT].map(str::to_owned).into();
        Self { name: "PyTorch".to_owned(), program, leading, rounds: Vec::new() }
    }

    /// The middle of the rounds.
    fn median(&self, figure: &str) -> f64 {
        let mut values: Vec<f64> =
            self.rounds.iter().filter_map(|round| round[figure].as_f64()).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
    }
}

pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<()> {
    let ours = PathBuf::from(workspace.binary("percheron-worker").get_program());
    let others = arguments.workers.iter().cloned().map(Contestant::worker);
    let torch = arguments.torch_python.iter().cloned().map(Contestant::torch);
    let mut contestants = vec![Contestant::worker(ours)];
    contestants[0].name = "this build".to_owned();
    contestants.extend(others.chain(torch));
    for round in 1..=arguments.rounds {
        for contestant in &mut contestants {
            let answer = take_turn(workspace, contestant, arguments)
                .with_context(|| format!("round {round}, {}", contestant.name))?;
            contestant.rounds.push(answer);
        }
    }
    if arguments.json {
        println!("{}", report(&contestants));
    } else {
        print(&contestants, arguments);
    }
    Ok(())
}

fn take_turn(
    workspace: &Workspace,
    contestant: &Contestant,
    arguments: &Arguments,
) -> Result<Value> {
    // PyTorch brings its own libraries; a worker finds ours through the workspace.
    let mut command = if contestant.leading.len() > 1 {
        Command::new(&contestant.program)
    } else {
        workspace.command(&contestant.program)
    };
    command.args(&contestant.leading).args(["--model", &arguments.model, "--json"]);
    for (option, number) in [
        ("--batch", arguments.batch),
        ("--threads", arguments.threads),
        ("--steps", arguments.steps),
    ] {
        command.arg(option).arg(number.to_string());
    }
    let output = process::output(&mut command)?;
    let last = output.lines().last().context("it printed nothing")?;
    serde_json::from_str(last).context("its last line is no JSON")
}

fn report(contestants: &[Contestant]) -> Value {
    let one = |contestant: &Contestant| {
        let medians = FIGURES.map(|figure| (figure.to_owned(), contestant.median(figure).into()));
        let mut object: serde_json::Map<String, Value> = medians.into_iter().collect();
        object.insert("name".to_owned(), contestant.name.clone().into());
        object.insert("rounds".to_owned(), contestant.rounds.clone().into());
        Value::Object(object)
    };
    serde_json::json!({ "programs": contestants.iter().map(one).collect::<Vec<_>>() })
}

fn print(contestants: &[Contestant], arguments: &Arguments) {
    println!(
        "{}, {} images, threads: {}; medians of {} rounds of {} steps",
        arguments.model, arguments.batch, arguments.threads, arguments.rounds, arguments.steps
    );
    let base = contestants[0].median("total_cpu_s");
    for contestant in contestants {
        println!("{}", contestant.name);
        for figure in FIGURES {
            println!("  {figure:<18} {:>9.3}", contestant.median(figure));
        }
        println!("  {:<18} {:>9.3}", "total / ours", contestant.median("total_cpu_s") / base);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_round_counts() {
        let mut contestant = Contestant::worker(PathBuf::from("worker"));
        assert!(contestant.median("wall_s").is_nan());
        for seconds in [3.0, 1.0, 2.0] {
            contestant.rounds.push(serde_json::json!({ "wall_s": seconds }));
        }
        assert!((contestant.median("wall_s") - 2.0).abs() < f64::EPSILON);
    }
}
