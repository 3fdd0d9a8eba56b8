//! `percheron recipe`: what a run would be made of.

use std::process::ExitCode;

use ::recipe::{BUILT_IN, Recipe};
use anyhow::Result;
use clap::{Args, Subcommand};

use crate::print;

/// `percheron recipe …`.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Print a recipe as TOML, every key written out.
    Show(Show),
    /// List the built-in recipes.
    List,
}

#[derive(Debug, Args)]
pub(crate) struct Show {
    /// A built-in recipe, or a file.
    #[arg(value_name = "NAME|PATH")]
    name: String,
    /// Lay a value over the recipe, such as `seed=7` or `ema.decay=0.99`; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
}

pub(crate) fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Show(show) => print::out_text(&Recipe::load(&show.name, &show.sets)?.to_toml()),
        Command::List => {
            for (name, text) in BUILT_IN {
                print::out(&format!("{name:<16} {}", headline(text)));
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The first comment of a recipe says what it is.
fn headline(text: &str) -> &str {
    text.lines().next().unwrap_or_default().trim_start_matches('#').trim()
}
