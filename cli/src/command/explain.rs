//! `percheron explain`: why things are as they are.

use std::{process::ExitCode, time::Duration};

use ::recipe::Recipe;
use anyhow::{Context as _, Result};
use clap::{Args, Subcommand};
use cluster::Timeouts;
use serde_json::json;

use crate::print;

/// `percheron explain …`.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Print how long who waits for what, shortest first: all of it follows from elastic.max_recovery.
    Timeouts(TimeoutsArguments),
}

#[derive(Debug, Args)]
pub(crate) struct TimeoutsArguments {
    /// A built-in recipe, or a file.
    #[arg(long, value_name = "NAME|PATH", default_value = "digits")]
    recipe: String,
    /// Lay a value over the recipe, such as `elastic.max_recovery=4s`; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Print one line of JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Timeouts(arguments) => timeouts(&arguments),
    }
}

fn timeouts(arguments: &TimeoutsArguments) -> Result<ExitCode> {
    let recipe = Recipe::load(&arguments.recipe, &arguments.sets)?;
    let timeouts = Timeouts::derived_from(recipe.elastic.max_recovery)?.validated()?;
    if arguments.json {
        let waits = timeouts.explained();
        let waits = waits.iter().map(|wait| {
            let ms = u64::try_from(wait.lasts.as_millis()).unwrap_or(u64::MAX);
            json!({ "name": wait.name, "ms": ms, "purpose": wait.purpose })
        });
        let waits = waits.collect::<Vec<_>>();
        let text = serde_json::to_string(&json!({ "timeouts": waits }));
        print::out(&text.context("the timeouts cannot be written")?);
    } else {
        print::out_text(&table(&timeouts));
    }
    Ok(ExitCode::SUCCESS)
}

fn table(timeouts: &Timeouts) -> String {
    let rows = timeouts
        .explained()
        .into_iter()
        .map(|wait| format!("  {:<17} {:>8}  {}\n", wait.name, seconds(wait.lasts), wait.purpose));
    let head = "all follow from elastic.max_recovery and keep this order:\n";
    head.to_owned() + &rows.collect::<String>()
}

fn seconds(duration: Duration) -> String {
    let text = format!("{:.3}", duration.as_secs_f64());
    format!("{} s", text.trim_end_matches('0').trim_end_matches('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_waits_are_shown_in_their_order() {
        let timeouts = Timeouts::derived_from(Duration::from_secs(10)).unwrap();
        let table = table(&timeouts);
        let rows: Vec<_> = table.lines().skip(1).map(|row| row.split_whitespace()).collect();
        let shown: Vec<_> =
            rows.into_iter().map(|mut row| row.by_ref().take(2).collect::<Vec<_>>()).collect();
        let expected: [Vec<&str>; 9] = [
            vec!["heartbeat", "0.25"],
            vec!["suspicion", "0.5"],
            vec!["lease", "2"],
            vec!["form", "5"],
            vec!["progress", "5"],
            vec!["max_recovery", "10"],
            vec!["gather", "60"],
            vec!["first_step", "60"],
            vec!["first_evaluation", "600"],
        ];
        assert_eq!(shown, expected, "{table}");
    }
}
