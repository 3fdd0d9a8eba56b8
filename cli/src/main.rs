//! `percheron`, the command line of the elastic trainer: each subcommand is a thin face of a library.
//!
//! It links no torch. What needs torch is done by `percheron-worker`, which lies beside it.

mod client;
mod command;
mod guard;
mod history;
mod incidents;
mod node;
mod page;
mod print;
mod run_dir;
mod shared;
mod slurm;
mod tale;
mod up;
mod worker_arguments;

use std::process::ExitCode;

use clap::Parser;

use crate::command::Command;

/// Gives memory back that a burst of messages to thousands of workers has needed.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Trains an early-exit image classifier on workers that come and go: the same bits, whatever happens.
#[derive(Debug, Parser)]
#[command(name = "percheron", version, propagate_version = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

fn main() -> ExitCode {
    match Arguments::parse().command.run() {
        Ok(code) => code,
        Err(error) => {
            print::error(&error);
            ExitCode::FAILURE
        }
    }
}
