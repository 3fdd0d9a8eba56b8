//! `percheron simulate`: how a run would get on while machines fail.

use std::{process::ExitCode, time::Duration};

use ::simulation::{Forecast, Scenario, predict};
use anyhow::{Context as _, Result, bail};
use clap::Args;
use serde_json::json;

use crate::print;

pub(super) const AFTER_HELP: &str = "\
The rules are those of a real run; machines, network and trainers are modelled, and time is virtual. Of \
100 faults 65 are processes that end, 15 machines that fall silent, 10 trainers that hang and 10 \
coordinators that end. The same arguments give the same result.

Ends with 0 if every invariant held, else 1.";

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Workers; one that is lost is replaced.
    #[arg(long, value_name = "N")]
    workers: u32,
    /// How long the run is watched, in hours.
    #[arg(long, value_name = "H", default_value_t = 24.0)]
    hours: f64,
    /// What happens is a function of this number.
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
    /// Mean time between two faults of one worker, in hours.
    #[arg(long, value_name = "HOURS", default_value_t = 1_000.0)]
    mtbf: f64,
    /// From the loss of a worker until its replacement is ready, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 300.0)]
    repair: f64,
    /// A step with all workers, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 2.0)]
    step: f64,
    /// Forming a generation, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
    form: f64,
    /// Steps between two checkpoints.
    #[arg(long, value_name = "STEPS", default_value_t = 1_000)]
    checkpoint_every: u64,
    /// The knob from which all waits follow, in seconds (see `percheron explain timeouts`).
    #[arg(long, value_name = "SECONDS", default_value_t = 10.0)]
    max_recovery: f64,
    /// Print one line of JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    let forecast = predict(&scenario(arguments)?)?;
    if arguments.json {
        let text = serde_json::to_string(&as_json(&forecast));
        print::out(&text.context("the forecast cannot be written")?);
    } else {
        lines(&forecast).iter().for_each(|line| print::out(line));
    }
    let holds = forecast.violations.is_empty();
    Ok(if holds { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn scenario(arguments: &Arguments) -> Result<Scenario> {
    let time = |name: &str, number: f64, unit: f64| {
        Duration::try_from_secs_f64(number * unit)
            .with_context(|| format!("{name} {number}: take a number from 0 on"))
    };
    if arguments.hours > 24.0 * 365.0 {
        bail!("--hours {}: take at most a year, 8760", arguments.hours);
    }
    Ok(Scenario {
        workers: arguments.workers,
        lasts: time("--hours", arguments.hours, 3_600.0)?,
        seed: arguments.seed,
        mtbf: time("--mtbf", arguments.mtbf, 3_600.0)?,
        repair: time("--repair", arguments.repair, 1.0)?,
        step: time("--step", arguments.step, 1.0)?,
        form: time("--form", arguments.form, 1.0)?,
        checkpoint_every: arguments.checkpoint_every,
        max_recovery: time("--max-recovery", arguments.max_recovery, 1.0)?,
    })
}

fn as_json(forecast: &Forecast) -> serde_json::Value {
    let violations = forecast
        .violations
        .iter()
        .map(|violation| json!({ "invariant": violation.invariant, "found": violation.found }));
    json!({
        "goodput": forecast.goodput,
        "throughput_ratio": forecast.throughput_ratio,
        "faults": forecast.faults,
        "invariants_checked": forecast.invariants_checked,
        "violations": violations.collect::<Vec<_>>(),
        "generations": forecast.generations,
        "steps": forecast.steps,
        "repeated_steps": forecast.repeated_steps,
        "recovery_s_median": forecast.recovery.map(|(median, _)| median.as_secs_f64()),
        "recovery_s_max": forecast.recovery.map(|(_, worst)| worst.as_secs_f64()),
        "events": forecast.events,
    })
}

fn lines(forecast: &Forecast) -> Vec<String> {
    let percent = |share: f64| format!("{:.2} %", share * 100.0);
    let mut lines = vec![
        format!("goodput           {} of the time in steps that count", percent(forecast.goodput)),
        format!("throughput        {} of a run without faults", percent(forecast.throughput_ratio)),
        format!("faults            {}", print::grouped(forecast.faults)),
        format!("generations       {}", print::grouped(forecast.generations)),
        format!(
            "steps             {}, {} of them computed again",
            print::grouped(forecast.steps),
            forecast.repeated_steps
        ),
        format!(
            "invariants        looked at {} times, broken {}",
            print::grouped(forecast.invariants_checked),
            forecast.violations.len()
        ),
    ];
    if let Some((median, worst)) = forecast.recovery {
        let (median, worst) = (median.as_secs_f64(), worst.as_secs_f64());
        lines.push(format!("recovery          {median:.2} s at the median, {worst:.2} s at worst"));
    }
    let broken = forecast.violations.iter();
    lines.extend(
        broken.map(|broken| format!("broken            {}: {}", broken.invariant, broken.found)),
    );
    lines
}
