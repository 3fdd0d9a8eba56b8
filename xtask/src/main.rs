//! `cargo xtask`: everything that is done to this repository by command.
//!
//! Each subcommand does its own set-up, so that a fresh machine with Rust and Python needs no other.
//! One file a subcommand; `workspace` knows where things lie and `process` runs programs.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command speaks to a person")]

use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod bench;
mod chaos;
mod ci;
mod cloud;
mod demo;
mod gpu;
mod lint;
mod parity;
mod process;
mod setup;
mod tensorboard;
mod test;
mod tidy;
mod torch_files;
mod webdataset;
mod workspace;

use workspace::Workspace;

/// Tasks of the Percheron repository.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Find or install what the build needs: libtorch, a C++ compiler, make, cmake, nasm.
    Setup {
        /// Also what `cloud` needs: helm, hadolint, Slurm, and a Kubernetes control plane, built once.
        #[arg(long)]
        cloud: bool,
    },
    /// Train the digits with three workers, one of them killed and one joined on the way.
    Demo,
    /// Build the release binaries and run every test.
    Test,
    /// Check format, lints, documentation, dependencies and layout.
    Lint,
    /// What a change must pass: lint, then test.
    Ci,
    /// Compare what is built here with a folder of the reference's numbers.
    Parity(parity::Options),
    /// Check what no lint can: layout, sizes, dependency arrows, links.
    Tidy,
    /// Read the events of a run with the Python library tensorboard.
    Tensorboard(tensorboard::Options),
    /// Read the built-in shards with the Python library webdataset.
    Webdataset(webdataset::Options),
    /// Read exported weights with PyTorch, and import what it saves.
    TorchFiles(torch_files::Options),
    /// Build what the checks on a GPU need, and run them if there is one.
    Gpu(gpu::Options),
    /// Break a run of real processes again and again, and want the undisturbed run's bits.
    Chaos(chaos::Options),
    /// Check chart, images, job templates and Slurm scripts, with real servers.
    Cloud(cloud::Options),
    /// Run a benchmark on the release binaries.
    #[command(subcommand, arg_required_else_help = true)]
    Bench(bench::Benchmark),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments.task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: &Task) -> anyhow::Result<()> {
    let workspace = Workspace::find()?;
    match task {
        Task::Setup { cloud } => {
            setup::run(&workspace)?;
            setup::s3_server(&workspace)?;
            if *cloud { setup::for_cloud(&workspace) } else { Ok(()) }
        }
        Task::Demo => demo::run(&workspace),
        Task::Test => test::run(&workspace),
        Task::Lint => lint::run(&workspace),
        Task::Ci => ci::run(&workspace),
        Task::Parity(options) => parity::run(&workspace, options),
        Task::Tidy => tidy::run(&workspace),
        Task::Tensorboard(options) => tensorboard::run(&workspace, options),
        Task::Webdataset(options) => webdataset::run(&workspace, options),
        Task::TorchFiles(options) => torch_files::run(&workspace, options),
        Task::Gpu(options) => gpu::run(&workspace, options),
        Task::Chaos(options) => chaos::run(&workspace, options),
        Task::Cloud(options) => cloud::run(&workspace, options),
        Task::Bench(benchmark) => bench::run(&workspace, benchmark),
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::{Arguments, Task, bench};

    #[test]
    fn the_command_line_is_well_formed() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn a_benchmark_keeps_its_arguments() {
        let line = ["xtask", "bench", "reduce", "--json", "-n", "3"];
        let Task::Bench(bench::Benchmark::OfPercheron(words)) =
            Arguments::try_parse_from(line).unwrap().task
        else {
            panic!("not a benchmark of percheron");
        };
        assert_eq!(words, ["reduce", "--json", "-n", "3"]);
        assert!(Arguments::try_parse_from(["xtask", "bench"]).is_err());
    }
}
