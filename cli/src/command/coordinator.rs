//! `percheron coordinator`: the process that hosts the rules of one run.

use std::{
    io::{IsTerminal as _, Read as _},
    net::SocketAddr,
    path::PathBuf,
    process::ExitCode,
    time::{Duration, SystemTime},
};

use ::coordinator::{Config, Health, Leader, Lease, LogAt};
use anyhow::{Context as _, Result, bail, ensure};
use checkpoint::Store;
use clap::Args;
use cluster::Outcome;
use recipe::Recipe;
use shards::Dataset;
use tokio::{
    net::{TcpListener, TcpSocket},
    signal::unix::{SignalKind, signal},
    sync::oneshot,
};
use tracing_subscriber::EnvFilter;

use crate::{
    command::checkpoints,
    run_dir::{self, RunDir},
    shared::SharedRun,
};

/// Connections that may wait to be taken.
const BACKLOG: u32 = 1024;

pub(super) const AFTER_HELP: &str = "Ends with 0 if the run is finished, 143 if it was asked to stop by SIGTERM, else 1. PERCHERON_LOG says how \
much is logged on the standard error [default: info].";

/// What the process ends with when it was asked to stop: 128 and the number of SIGTERM.
const ASKED_TO_STOP: u8 = 143;

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The recipe of the run, a file. May be left out if --log names a run that has begun.
    #[arg(long, value_name = "FILE")]
    recipe: Option<String>,
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
    /// Where to answer over HTTP, HOST:PORT: /metrics for Prometheus, /healthz.
    #[arg(long, value_name = "ADDRESS", env = "PERCHERON_HTTP")]
    http: Option<SocketAddr>,
    /// The event log of the run in a store, s3://BUCKET/PREFIX or a folder that all nodes see: whoever leads
    /// holds a lease there [default: what the run in --run-dir began with, or a database in --run-dir].
    #[arg(long, value_name = "LOCATION")]
    log: Option<String>,
    /// Wait while another coordinator leads the run, and take over when it is gone.
    #[arg(long)]
    standby: bool,
    /// A leader that is not heard of for so long is replaced, such as 3s.
    #[arg(long, value_name = "DURATION", default_value = "3s", value_parser = parse_lease)]
    lease: Duration,
    /// What others see as the leader. Who starts under the name of the leader before says that it is dead
    /// [default: drawn].
    #[arg(long, value_name = "NAME")]
    holder: Option<String>,
    /// Answer gRPC health checks here, in plain text: the service "" is served by whoever is well, and
    /// "percheron.v1.ClusterService" by who leads.
    #[arg(long, value_name = "ADDRESS")]
    health: Option<SocketAddr>,
    /// When the run is finished, stay until asked to stop, so that a supervisor that starts again what has
    /// ended does not.
    #[arg(long)]
    linger: bool,
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
    let listen = arguments.listen;
    let socket = bind(listen).with_context(|| format!("cannot listen on {listen}"))?;
    if let Some(file) = &arguments.addr_file {
        let address = socket.local_addr().context("the address that is listened on")?;
        run_dir::write_atomically(file, address.to_string().as_bytes(), 0o644)?;
    }
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let health = health(arguments.health).await?;
    let config = configure(&arguments).await?;
    let led = async {
        let leader = Leader::begin(config).await?;
        // Only now: who stands by lets nobody in.
        let listener =
            socket.listen(BACKLOG).with_context(|| format!("cannot listen on {listen}"))?;
        let http = match arguments.http {
            Some(at) => listen_http(at, arguments.standby).await?,
            None => None,
        };
        lead(health.as_ref(), true).await;
        let outcome = leader.serve_with(listener, http).await;
        lead(health.as_ref(), false).await;
        if arguments.linger && matches!(outcome, Ok(Outcome::Finished { .. })) {
            tracing::info!("the run is finished; staying until asked to stop");
            std::future::pending::<()>().await;
        }
        anyhow::Ok(outcome?)
    };
    tokio::select! {
        outcome = led => match outcome? {
            Outcome::Finished { .. } => Ok(ExitCode::SUCCESS),
            Outcome::Failed { reason } => bail!(reason),
        },
        _ = terminate.recv() => {
            tracing::info!("asked to stop by SIGTERM");
            Ok(ExitCode::from(ASKED_TO_STOP))
        }
        () = stdin_closed(), if arguments.exit_with_stdin => Ok(ExitCode::SUCCESS),
    }
}

/// Answers health checks at `address`, if there is one.
async fn health(address: Option<SocketAddr>) -> Result<Option<Health>> {
    let Some(address) = address else { return Ok(None) };
    let listener = TcpListener::bind(address).await;
    let listener = listener.with_context(|| format!("--health: cannot listen on {address}"))?;
    Ok(Some(Health::serve(listener).await))
}

async fn lead(health: Option<&Health>, leads: bool) {
    if let Some(health) = health {
        health.leads(leads).await;
    }
}

/// The port is taken by who leads. Who takes over from a leader that only sleeps may find it in use, and leads without.
async fn listen_http(at: SocketAddr, standby: bool) -> Result<Option<TcpListener>> {
    let listener = TcpListener::bind(at).await;
    match listener.with_context(|| format!("--http: cannot listen on {at}")) {
        Ok(listener) => Ok(Some(listener)),
        Err(error) if standby => {
            tracing::warn!("{error:#}; this coordinator leads without");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// A port that is taken; connections are refused until it is listened on.
fn bind(address: SocketAddr) -> std::io::Result<TcpSocket> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    Ok(socket)
}

async fn configure(arguments: &Arguments) -> Result<Config> {
    let dir = RunDir::at(&arguments.run_dir)?;
    let log = match &arguments.log {
        Some(log) => Some(log.clone()),
        None => dir.shared_log()?,
    };
    ensure!(
        log.is_some() || !arguments.standby,
        "--standby needs --log: a file cannot be taken over"
    );
    let (recipe, run, checkpoints) = match (&arguments.recipe, &arguments.log) {
        (None, Some(location)) => {
            let shared = SharedRun::read(&Store::open(location)?).await?;
            (shared.recipe(location)?, shared.run, shared.checkpoints)
        }
        (Some(file), at) => {
            let recipe = Recipe::load(file, &[])?;
            let (run, checkpoints) = (dir.run()?, dir.checkpoints()?);
            if let Some(location) = at {
                let (run, recipe) = (run.clone(), recipe.to_toml());
                let shared = SharedRun { run, checkpoints: checkpoints.clone(), recipe };
                shared.agree(&Store::create(location).context("--log")?).await?;
            }
            (recipe, run, checkpoints)
        }
        (None, None) => {
            bail!("no recipe is given: say --recipe FILE, or --log LOCATION of its run")
        }
    };
    let samples = Dataset::open(&recipe.data.location, &recipe.data.train)?.len();
    let plan = recipe.plan(run, samples, arguments.workers)?;
    let holder = match &arguments.holder {
        Some(holder) => holder.clone(),
        None => {
            format!("{} process {} at {:?}", host_name(), std::process::id(), SystemTime::now())
        }
    };
    let lease = Lease { holder, lasts: arguments.lease, standby: arguments.standby };
    Ok(Config {
        recipe: recipe.to_toml(),
        token: dir.read_token()?,
        log: log
            .map_or_else(|| LogAt::File(dir.log()), |location| LogAt::Shared { location, lease }),
        checkpoints,
        keep: checkpoints::retention(&recipe, plan.steps_per_epoch),
        run: plan,
        software: format!("percheron {}", env!("CARGO_PKG_VERSION")),
    })
}

fn parse_lease(text: &str) -> Result<Duration, String> {
    let problem = || format!("{text:?} is no time of at least 200ms, such as 3s or 500ms");
    let (number, unit) = match text.strip_suffix("ms") {
        Some(number) => (number, 1),
        None => (text.strip_suffix('s').ok_or_else(problem)?, 1000),
    };
    let number: u64 = number.parse().map_err(|_| problem())?;
    let millis = number.checked_mul(unit).filter(|&millis| millis >= 200).ok_or_else(problem)?;
    Ok(Duration::from_millis(millis))
}

/// What this machine calls itself.
pub(crate) fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    if name.trim().is_empty() { "this host".to_owned() } else { name.trim().to_owned() }
}

/// Ends when the standard input is closed.
pub(crate) async fn stdin_closed() {
    let (closed, heard) = oneshot::channel();
    // Tokio would wait for a read that is under way; a plain thread ends with the process.
    std::thread::spawn(move || {
        let mut input = std::io::stdin().lock();
        while matches!(input.read(&mut [0; 64]), Ok(1..)) {}
        closed.send(()).ok(); // The run may have ended just now.
    });
    drop(heard.await); // Closed or sent to: the input is no more.
}
