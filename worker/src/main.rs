//! `percheron-worker`: one training process. `percheron up` starts it; so may any supervisor.
//!
//! It ends with 0 if the run is done or it was let go, with 2 if it was refused, else with 1; the last
//! line of standard error then says why.

use std::{net::SocketAddr, path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Result};
use clap::{Args, Parser};
use cluster::{Exit, Fingerprint, RunId, Step};
use libtorch::Precision;
use tracing_subscriber::EnvFilter;
use worker::{
    agent::{self, Options},
    tool::Tool,
    train::{Means, Transport},
};

/// One training process of a Percheron run, and the tools that need its network.
#[derive(Debug, Parser)]
#[command(name = "percheron-worker", version, args_conflicts_with_subcommands = true)]
#[command(arg_required_else_help = true)]
struct Arguments {
    #[command(flatten)]
    training: Option<Training>,
    #[command(subcommand)]
    tool: Option<Tool>,
}

#[derive(Debug, Args)]
struct Training {
    /// The coordinator, http://HOST:PORT; and those that stand by, separated by commas.
    #[arg(long)]
    coordinator: String,
    /// The run to take part in.
    #[arg(long)]
    run: String,
    /// The file that holds the run's token.
    #[arg(long, value_name = "FILE")]
    token_file: PathBuf,
    /// What people call this worker.
    #[arg(long)]
    name: String,
    /// The machine it is on, as people call it: if it turns out to be broken, no worker of it is let in again
    /// [default: what the machine calls itself].
    #[arg(long, env = "PERCHERON_NODE")]
    node: Option<String>,
    /// Where other workers reach this one, HOST:PORT; port 0 takes a free one.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// Threads inside an operation; must be the recipe's `threads`.
    #[arg(long, default_value_t = 1)]
    threads: u32,
    /// What to compute on: cpu, cuda or cuda:N. All workers of a run need the same kind.
    #[arg(long, value_name = "DEVICE", default_value = "cpu", value_parser = worker::device::parse)]
    device: tch::Device,
    /// What moves gradients between GPUs; the same for all workers of a run.
    #[arg(long, value_enum, default_value = "auto")]
    transport: Transport,
    /// Threads that decode images [default: 1; with GPUs this machine's cores shared among them, less one].
    #[arg(long, value_name = "N")]
    loaders: Option<usize>,
    /// Ask a GPU for each operation by itself instead of for one recorded graph. The bits are the same.
    #[arg(long)]
    no_graph: bool,
    /// Flip a bit of this worker's state after a step, to see that a vote finds it (elastic.vote_every_steps).
    #[arg(long, value_name = "STEP", hide = true)]
    flip_a_bit_after: Option<u64>,
    /// End when standard input ends.
    #[arg(long)]
    exit_with_stdin: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let level = if arguments.tool.is_some() { "warn" } else { "info" };
    let filter = EnvFilter::try_from_env("PERCHERON_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    let format = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false);
    format.with_writer(std::io::stderr).init();
    let ended = match (arguments.tool, arguments.training) {
        (Some(tool), _) => work_with(tool).map(|()| Exit::Finished),
        (None, Some(training)) => train(training),
        (None, None) => Err(anyhow::anyhow!("nothing to do: see --help")),
    };
    match ended {
        Ok(Exit::Finished | Exit::Released) => ExitCode::SUCCESS,
        Ok(Exit::Refused(reason)) => ends_with(2, &reason),
        Ok(Exit::Failed(reason)) => ends_with(1, &reason),
        Err(error) => ends_with(1, &format!("{error:#}")),
    }
}

#[expect(clippy::print_stderr, reason = "the last words of a process are for people")]
fn ends_with(code: u8, reason: &str) -> ExitCode {
    eprintln!("error: {reason}");
    ExitCode::from(code)
}

/// A tool: one thread, and no run.
fn work_with(tool: Tool) -> Result<()> {
    libtorch::init(tool.threads())?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.context("cannot start the runtime")?.block_on(tool.run())
}

/// What this machine calls itself.
fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// Threads that decode images for a device.
fn loaders(device: tch::Device) -> usize {
    if !device.is_cuda() {
        return 1;
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let devices = usize::try_from(tch::Cuda::device_count()).unwrap_or(1).max(1);
    (cores / devices).saturating_sub(1).max(1)
}

fn train(arguments: Training) -> Result<Exit> {
    let run = RunId::try_from(arguments.run).context("--run")?;
    // Before any other thread: libtorch's settings hold for those that come later.
    libtorch::init(arguments.threads as usize).context("--threads")?;
    let facts = libtorch::fingerprint(arguments.device, Precision::F32)
        .context("cannot tell what changes this machine's bits")?;
    let fingerprint = Fingerprint(facts.into_iter().collect());
    let means = Means {
        device: arguments.device,
        loaders: arguments.loaders.unwrap_or_else(|| loaders(arguments.device)),
        transport: arguments.transport,
        graph: !arguments.no_graph,
        flip_after: arguments.flip_a_bit_after.map(Step),
    };
    let options = Options {
        coordinator: arguments.coordinator,
        run,
        token_file: arguments.token_file,
        name: arguments.name,
        node: arguments.node.unwrap_or_else(host_name),
        listen: arguments.listen,
        threads: arguments.threads,
        means,
        exit_with_stdin: arguments.exit_with_stdin,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let exit = runtime.block_on(agent::run(options, fingerprint));
    runtime.shutdown_background();
    Ok(exit?)
}
