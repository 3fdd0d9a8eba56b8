//! `percheron serve`: a network that answers requests, over HTTP and gRPC on one port.
//!
//! ```text
//!   http, rpc --image, budget--> Desk: a place among those who may wait, decoding (blocking threads)
//!                                  |  pixels, thresholds         ^  exit, probabilities
//!                                  v                             |
//!                                one thread: gathers a batch, runs the network stage by stage
//! ```
//!
//! An image is shown as `percheron infer` shows it, and each request of a batch has the thresholds of its own budget.
//! In a batch of others an image's probabilities differ from those alone by rounding (within 1e-5), as in `infer`.

mod desk;
mod figures;
mod http;
mod network;
mod refusal;
mod rpc;

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use model::{Cost, EXIT_NAMES, dynamic};
use recipe::Recipe;
use serde::Serialize;
use shards::Transform;
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::oneshot,
};

use self::{
    desk::{Desk, Settings},
    network::{Gathering, Lane},
};
use super::{
    eval::{self, sets::Images},
    infer::{Solved, class_names},
    say,
};
use crate::{
    setup::{architecture, images},
    weights::Which,
};

/// `percheron serve …`.
#[derive(Debug, Args)]
pub struct Arguments {
    /// The folder of a run or of an import, or a file of weights: an official .pth, or .safetensors.
    #[arg(long, value_name = "PATH")]
    checkpoint: PathBuf,
    /// The step of the checkpoint; the newest without it.
    #[arg(long)]
    step: Option<u64>,
    /// Answer with the averaged weights.
    #[arg(long)]
    ema: bool,
    /// Where HTTP and gRPC are answered; port 0 takes a free one. Only this machine may reach it.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:8480")]
    listen: SocketAddr,
    /// The budget of requests that name none, from 0, cheap, to 32, expensive [default: they take the last exit].
    #[arg(long, value_name = "B", conflicts_with = "no_budgets")]
    #[arg(value_parser = clap::value_parser!(u32).range(0..33))]
    budget: Option<u32>,
    /// The eval.json of `percheron eval --out`, which has the thresholds of the budgets [default: they are solved
    /// at the start on training images].
    #[arg(long, value_name = "FILE")]
    solved: Option<PathBuf>,
    /// Solve no thresholds: every request takes the last exit, and one that names a budget is refused.
    #[arg(long, conflicts_with = "solved")]
    no_budgets: bool,
    /// The most images that thresholds are solved on.
    #[arg(long, default_value_t = 2_048, value_parser = clap::value_parser!(u64).range(1..))]
    calibration_images: u64,
    /// A file with the names of the classes, one a line [default: those of the recipe's dataset, or numbers].
    #[arg(long, value_name = "FILE")]
    classes: Option<PathBuf>,
    /// The most images in a forward.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u64).range(1..=4096))]
    batch: u64,
    /// How long an image waits for others to make a batch, in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 5)]
    #[arg(value_parser = clap::value_parser!(u64).range(0..=600_000))]
    delay_ms: u64,
    /// The most requests that are under way; further ones are told to ask again.
    #[arg(long, value_name = "N", default_value_t = 128)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=65_536))]
    waiting: u64,
    /// The longest image, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 16)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=1024))]
    image_mib: u64,
    /// The largest image, in millions of pixels.
    #[arg(long, value_name = "M", default_value_t = 50)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=256))]
    megapixels: u64,
    /// The longest that a request may take, in seconds, the sending of its image included.
    #[arg(long, value_name = "S", default_value_t = 30)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=3600))]
    patience_s: u64,
    /// Threads that decode images.
    #[arg(long, value_name = "N", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=256))]
    loaders: u64,
    /// Threads inside an operation.
    #[arg(long, default_value_t = 1)]
    pub(super) threads: usize,
    /// Lay a value over the recipe, such as data.crop_fraction=0.9; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
}

/// What is served, for those who ask.
#[derive(Debug, Clone, Serialize)]
struct About {
    model: String,
    weights: &'static str,
    step: u64,
    classes: usize,
    exits: Vec<Exit>,
    /// Whether a request may name a budget, 0 to 32.
    has_budgets: bool,
    default_budget: Option<u32>,
    batch: usize,
    delay_ms: u64,
    image_bytes_max: usize,
}

#[derive(Debug, Clone, Serialize)]
struct Exit {
    name: &'static str,
    /// Multiply–accumulates up to it.
    macs: u64,
    /// Of those of the last exit.
    share: f64,
}

pub(super) async fn run(arguments: Arguments) -> Result<()> {
    let listen = arguments.listen;
    ensure!(
        listen.ip().is_loopback(),
        "--listen {listen}: the server has no door, so only this machine may reach it; put one that has before \
         it, or forward a port, such as ssh -L {port}:127.0.0.1:{port} HOST",
        port = listen.port()
    );
    let listener = TcpListener::bind(listen).await;
    let listener = listener.with_context(|| format!("--listen {listen}: cannot listen there"))?;
    let Arguments { checkpoint, step, sets, ema, .. } = &arguments;
    let subject = eval::subject(checkpoint, *step, None, sets).await?;
    let which = if *ema { Which::Averaged } else { Which::Live };
    eval::check_finite(&subject.state, which)?;
    let recipe = &subject.recipe;
    let settings = settings(&arguments, recipe, subject.step, |images| {
        let network = match which {
            Which::Live => subject.state.network(),
            Which::Averaged => subject.state.averaged(),
        };
        images.training(network, arguments.batch, arguments.calibration_images)
    })?;
    let gathering = Gathering {
        batch: settings.about.batch,
        delay: Duration::from_millis(arguments.delay_ms),
        normalize: settings.transform.normalize(),
        side: settings.transform.size(),
        figures: settings.figures.clone(),
    };
    let network = subject.state.for_inference(&architecture(recipe)?, which);
    drop(subject.state); // Moments and averages are not needed any more.
    let (lane, thread) = Lane::open(gathering, network)?;
    let patience = settings.patience;
    let desk = Arc::new(Desk::new(settings, lane));
    let address = listener.local_addr().context("the address")?;
    say(&format!("http://{address}"));
    let served = serve(listener, &desk, patience, thread.gone).await;
    drop(desk);
    served?;
    thread.handle.join().map_err(|_| anyhow::anyhow!("the network's thread has failed"))
}

/// Answers until a signal asks for the end and all who wait have their answers.
async fn serve(
    listener: TcpListener,
    desk: &Arc<Desk>,
    patience: Duration,
    network_gone: oneshot::Receiver<()>,
) -> Result<()> {
    let (mut terminate, mut interrupt) =
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let (asked, ending) = oneshot::channel();
    let closing = Arc::clone(desk);
    let asked_to_end = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        closing.end();
        asked.send(()).ok(); // The server may have failed.
    };
    let router = http::router(Arc::clone(desk)).merge(rpc::router(Arc::clone(desk)));
    let served = axum::serve(listener, router).with_graceful_shutdown(asked_to_end);
    let out_of_patience = async move {
        match ending.await {
            Ok(()) => tokio::time::sleep(patience).await,
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        served = served.into_future() => served.context("requests cannot be served"),
        () = out_of_patience => {
            tracing::warn!("connections that are still open are cut");
            Ok(())
        }
        _ = network_gone => anyhow::bail!("the network's thread has failed"),
    }
}

/// `sure` tells how sure the exits are of training images.
fn settings(
    arguments: &Arguments,
    recipe: &Recipe,
    step: u64,
    sure: impl FnOnce(&Images<'_>) -> Result<dynamic::Confidences>,
) -> Result<Settings> {
    let budgets = budgets(arguments, recipe, sure)?;
    let macs = Cost::of(&architecture(recipe)?).macs;
    let share = |macs: u64, all: u64| macs as f64 / all as f64;
    let exit = |(name, macs_of): (&'static str, u64)| Exit {
        name,
        macs: macs_of,
        share: share(macs_of, macs[3]),
    };
    let classes = class_names(arguments.classes.as_deref(), recipe)?;
    let count = |number: u64| usize::try_from(number).expect("it is limited");
    let about = About {
        model: recipe.model.name.clone(),
        weights: if arguments.ema { "averaged" } else { "live" },
        step,
        classes: classes.len(),
        exits: EXIT_NAMES.into_iter().zip(macs).map(exit).collect(),
        has_budgets: budgets.is_some(),
        default_budget: arguments.budget,
        batch: count(arguments.batch),
        delay_ms: arguments.delay_ms,
        image_bytes_max: count(arguments.image_mib) << 20,
    };
    Ok(Settings {
        about,
        classes,
        budgets,
        transform: Transform::evaluation(&images::augment(recipe)?, recipe.model.input_size)?,
        waiting: count(arguments.waiting),
        loaders: count(arguments.loaders),
        pixels_max: count(arguments.megapixels) * 1_000_000,
        patience: Duration::from_secs(arguments.patience_s),
        figures: figures::Figures::new(),
    })
}

/// The thresholds of each budget, unless there are to be none.
fn budgets(
    arguments: &Arguments,
    recipe: &Recipe,
    sure: impl FnOnce(&Images<'_>) -> Result<dynamic::Confidences>,
) -> Result<Option<Vec<[f32; 4]>>> {
    if arguments.no_budgets {
        return Ok(None);
    }
    if let Some(file) = &arguments.solved {
        let solved = Solved::read(file)?;
        let table = (0..33).map(|budget| solved.of(budget)).collect::<Result<_>>();
        return table.with_context(|| format!("--solved {}", file.display())).map(Some);
    }
    let images = Images::open(recipe, Some(&recipe.data.train)).context(
        "the thresholds of budgets are solved on training images; give those that `percheron eval --out` solved \
         as --solved FILE, or do without: --no-budgets",
    )?;
    let sure = sure(&images)?;
    let shares = dynamic::budgets().into_iter();
    Ok(Some(shares.map(|shares| dynamic::thresholds(&sure, shares)).collect()))
}
