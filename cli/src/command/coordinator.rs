//! `percheron coordinator`: the process that hosts the rules of one run.

use std::{
    io::{IsTerminal as _, Read as _},
    net::SocketAddr,
    path::PathBuf,
    process::ExitCode,
};

use ::coordinator::{Config, serve};
use anyhow::{Context as _, Result, bail};
use clap::Args;
use cluster::Outcome;
use recipe::Recipe;
use shards::Dataset;
use tokio::{net::TcpListener, sync::oneshot};
use tracing_subscriber::EnvFilter;

use crate::{
    command::checkpoints,
    run_dir::{self, RunDir},
};

pub(super) const AFTER_HELP: &str =
    "PERCHERON_LOG says how much is logged on the standard error [default: info].";

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The recipe of the run, a file.
    #[arg(long, value_name = "FILE")]
    recipe: String,
    /// The folder of the run; it must hold the token.
    #[arg(long, value_name = "DIR")]
    run_dir: PathBuf,
    /// How many workers the first generation waits for.
    #[arg(long, value_name = "N", default_value_t = 1)]
    workers: u32,
    /// Where to listen; port 0 takes a free one.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// Write the address that is listened on into this file, in one piece.
    #[arg(long, value_name = "FILE")]
    addr_file: Option<PathBuf>,
    /// Stop when the standard input is closed, so as not to outlive who started this.
    #[arg(long)]
    exit_with_stdin: bool,
}

pub(crate) async fn run(arguments: Arguments) -> Result<ExitCode> {
    let filter =
        EnvFilter::try_from_env("PERCHERON_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    let dir = RunDir::at(&arguments.run_dir)?;
    let recipe = Recipe::load(&arguments.recipe, &[])?;
    let samples = Dataset::open(&recipe.data.location, &recipe.data.train)?.len();
    let plan = recipe.plan(dir.run()?, samples, arguments.workers)?;
    let config = Config {
        recipe: recipe.to_toml(),
        token: dir.read_token()?,
        log: dir.log(),
        checkpoints: dir.checkpoints()?,
        keep: checkpoints::retention(&recipe, plan.steps_per_epoch),
        run: plan,
        software: format!("percheron {}", env!("CARGO_PKG_VERSION")),
    };
    let listen = arguments.listen;
    let listener = TcpListener::bind(listen).await;
    let listener = listener.with_context(|| format!("cannot listen on {listen}"))?;
    if let Some(file) = &arguments.addr_file {
        let address = listener.local_addr().context("the address that is listened on")?;
        run_dir::write_atomically(file, address.to_string().as_bytes(), 0o644)?;
    }
    tokio::select! {
        outcome = serve(config, listener) => match outcome? {
            Outcome::Finished { .. } => Ok(ExitCode::SUCCESS),
            Outcome::Failed { reason } => bail!(reason),
        },
        () = stdin_closed(), if arguments.exit_with_stdin => Ok(ExitCode::SUCCESS),
    }
}

/// Ends when the standard input is closed.
async fn stdin_closed() {
    let (closed, heard) = oneshot::channel();
    // Tokio would wait for a read that is under way; a plain thread ends with the process.
    std::thread::spawn(move || {
        let mut input = std::io::stdin().lock();
        while matches!(input.read(&mut [0; 64]), Ok(1..)) {}
        closed.send(()).ok(); // The run may have ended just now.
    });
    drop(heard.await); // Closed or sent to: the input is no more.
}
