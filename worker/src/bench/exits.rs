//! `bench-exits`: what early exit saves, on made images.
//!
//! The thresholds of a budget are solved on the images that are timed, so that its shares of them leave at each
//! exit; costs are counted from the exits that they really take. Full forwards and early ones are timed in turns.
//! With one thread times are CPU times, which a busy machine disturbs little, else wall times; medians count.
//! Memory is taken in processes of their own: what one has held, another cannot give back.

use std::{fmt, process::Command, sync::Arc, time::Instant};

use anyhow::{Context as _, Result, ensure};
use clap::{Args, ValueEnum};
use model::{
    Architecture, Cost, EXIT_NAMES, Layout, ModelConfig, Network, Weights, confidences,
    dynamic::{self, Confidences, NEVER},
};
use serde::Serialize;
use tch::{Device, Kind, Tensor};

use super::{cpu_s, peak_rss_mb};

/// Latency, throughput and memory of early exit, on made images.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// A registered model, as reg800m_perceiver_t128.
    #[arg(long, value_name = "NAME")]
    pub model: String,
    /// Images in a batch.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(i64).range(1..=4096))]
    pub batch: i64,
    /// Batches that are timed in a round [default: as many as make 32 images].
    #[arg(long, value_parser = clap::value_parser!(i64).range(1..=4096))]
    pub batches: Option<i64>,
    /// Height and width of an image.
    #[arg(long, default_value_t = 224, value_parser = clap::value_parser!(i64).range(32..=1024))]
    pub size: i64,
    /// Classes.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(i64).range(2..=100_000))]
    pub classes: i64,
    /// Threads inside an operation.
    #[arg(long, default_value_t = 1)]
    pub threads: usize,
    /// A budget from 0, cheap, to 32, expensive; may be repeated [default: every fourth].
    #[arg(long = "budget", value_name = "B", value_parser = clap::value_parser!(u64).range(0..33))]
    pub budgets: Vec<u64>,
    /// Rounds that are measured, after one that is not.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    pub rounds: u64,
    /// Leave BatchNorm by itself instead of folding it into the convolutions, as `percheron eval` does.
    #[arg(long)]
    pub batch_norm: bool,
    /// Print one object and nothing else.
    #[arg(long)]
    pub json: bool,
    /// Make only these passes and print the most memory held.
    #[arg(long, hide = true, requires = "thresholds")]
    passes: Option<Passes>,
    /// Of those passes.
    #[arg(long, hide = true, value_delimiter = ',', allow_hyphen_values = true)]
    thresholds: Vec<f32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Passes {
    Full,
    Early,
}

/// What early exit gives at a budget, or where all take one exit.
#[derive(Debug, Clone, Serialize)]
struct Figure {
    /// The budget, 0 to 32; not there where all take one exit.
    #[serde(skip_serializing_if = "Option::is_none")]
    budget: Option<usize>,
    /// The one exit that all take.
    #[serde(skip_serializing_if = "Option::is_none")]
    exit: Option<&'static str>,
    /// Images that took each exit.
    counts: [usize; 4],
    /// Multiply–accumulates of an image on average.
    macs: f64,
    /// Those of the full forward over these.
    mac_ratio: f64,
    /// Time of the full forward over that of the early one.
    speedup: f64,
    /// From a batch to its answers.
    latency_ms: f64,
    images_per_s: f64,
}

/// What was measured.
#[derive(Debug, Serialize)]
pub struct Report {
    model: String,
    batch: i64,
    images: i64,
    threads: usize,
    /// `cpu` or `wall`.
    clock: &'static str,
    full_latency_ms: f64,
    full_macs: u64,
    budgets: Vec<Figure>,
    exits: Vec<Figure>,
    /// The most memory a process with full forwards has held, in 10⁶ bytes.
    full_peak_rss_mb: f64,
    /// The same with early ones at a budget in the middle.
    early_peak_rss_mb: f64,
}

impl Report {
    /// One line of JSON.
    ///
    /// # Panics
    /// Never: all figures are plain values.
    #[must_use]
    pub fn json(&self) -> String {
        serde_json::to_string(self).expect("figures are plain values")
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report { model, batch, threads, clock, full_latency_ms, full_macs, .. } = self;
        writeln!(f, "{model}, batches of {batch}, threads: {threads}; {clock} time")?;
        let full_macs = *full_macs as f64 / 1e6;
        writeln!(f, "  full forward   {full_latency_ms:8.2} ms  {full_macs:8.1} M MACs an image")?;
        for figure in self.exits.iter().chain(&self.budgets) {
            let name = match (figure.exit, figure.budget) {
                (Some(exit), _) => format!("all {exit}"),
                (None, budget) => format!("budget {}", budget.unwrap_or_default()),
            };
            let Figure { macs, mac_ratio, speedup, latency_ms, .. } = figure;
            let macs = macs / 1e6;
            writeln!(
                f,
                "  {name:<14} {latency_ms:8.2} ms  {macs:8.1} M  cost 1/{mac_ratio:.2}  time 1/{speedup:.2}"
            )?;
        }
        let Report { full_peak_rss_mb: full, early_peak_rss_mb: early, .. } = self;
        write!(f, "  memory         {full:8.0} MB of full forwards, {early:.0} MB of early ones")
    }
}

/// What `bench-exits` prints.
#[derive(Debug)]
pub enum Output {
    /// What was measured.
    Report(Box<Report>),
    /// The most memory held by the passes that were asked for, in 10⁶ bytes.
    PeakMb(f64),
}

/// Measures; `libtorch::init` was called with the options' threads.
///
/// # Errors
/// If the model does not exist, or a process for the memory cannot be started.
pub fn run(options: &Options) -> Result<Output> {
    let bench = Bench::new(options)?;
    if let Some(passes) = options.passes {
        let thresholds = options.thresholds.as_slice().try_into();
        let thresholds: [f32; 4] = thresholds.context("--thresholds: four numbers")?;
        for _ in 0..3 {
            match passes {
                Passes::Full => bench.full(),
                Passes::Early => drop(bench.early(thresholds)),
            }
        }
        return Ok(Output::PeakMb(peak_rss_mb()));
    }
    Ok(Output::Report(Box::new(report(options, &bench)?)))
}

fn report(options: &Options, bench: &Bench) -> Result<Report> {
    let sure = bench.sure();
    let wanted = |&budget: &usize| {
        let chosen = options.budgets.contains(&(budget as u64));
        chosen || (options.budgets.is_empty() && budget.is_multiple_of(4))
    };
    let shares = dynamic::budgets();
    let budgets: Vec<usize> = (0..shares.len()).filter(wanted).collect();
    let one_exit =
        (0..4).map(|exit| std::array::from_fn(|at| if at == exit { 0.0 } else { NEVER }));
    let mut settings: Vec<[f32; 4]> = one_exit.collect();
    settings.extend(budgets.iter().map(|&budget| dynamic::thresholds(&sure, shares[budget])));
    let timed = bench.time(&settings);
    let figure = |(setting, budget): (usize, Option<usize>)| bench.figure(&timed, setting, budget);
    let memory = |passes: &str| {
        let middle = dynamic::thresholds(&sure, shares[16]);
        peak_of(options, passes, if passes == "full" { [NEVER; 4] } else { middle })
    };
    Ok(Report {
        model: options.model.clone(),
        batch: options.batch,
        images: bench.samples() as i64,
        threads: options.threads,
        clock: if options.threads == 1 { "cpu" } else { "wall" },
        full_latency_ms: timed.full_s * 1e3 / bench.batches.len() as f64,
        full_macs: bench.cost.macs[3],
        exits: (0..4).map(|exit| figure((exit, None))).collect(),
        budgets: budgets.iter().enumerate().map(|(at, &b)| figure((at + 4, Some(b)))).collect(),
        full_peak_rss_mb: memory("full")?,
        early_peak_rss_mb: memory("early")?,
    })
}

struct Bench {
    network: Network,
    cost: Cost,
    batches: Vec<Tensor>,
    batch: i64,
    rounds: u64,
    by_cpu_time: bool,
}

/// Medians of a round over all images, in seconds.
struct Timed {
    full_s: f64,
    early_s: Vec<f64>,
    /// Images at each exit, as they were taken.
    counts: Vec<[usize; 4]>,
}

impl Bench {
    fn new(options: &Options) -> Result<Bench> {
        let published = ModelConfig::published(&options.model);
        let Options { classes, size: input_size, batch, .. } = *options;
        let architecture =
            Architecture::try_from(&ModelConfig { classes, input_size, ..published })?;
        let layout = Arc::new(Layout::of(&architecture));
        let weights = Weights::initial(layout, 0, Kind::Float, Device::Cpu);
        let count = options.batches.unwrap_or_else(|| (32 / batch).max(1));
        Ok(Bench {
            network: if options.batch_norm {
                Network::new(&architecture, &weights)
            } else {
                Network::for_inference(&architecture, &weights)
            },
            cost: Cost::of(&architecture),
            batches: (0..count).map(|index| made(index, batch, input_size)).collect(),
            batch,
            rounds: options.rounds,
            by_cpu_time: options.threads == 1,
        })
    }

    fn samples(&self) -> usize {
        self.batches.len() * usize::try_from(self.batch).expect("a batch has a size")
    }

    /// How sure each exit is of each image, without early exit.
    fn sure(&self) -> Confidences {
        let mut sure = Confidences::default();
        for batch in &self.batches {
            let exits = self.network.forward_eval(batch);
            for (sure, logits) in sure.iter_mut().zip(exits.in_order()) {
                sure.extend(confidences(logits));
            }
        }
        sure
    }

    fn full(&self) {
        self.batches.iter().for_each(|batch| drop(self.network.forward_eval(batch)));
    }

    fn early(&self, thresholds: [f32; 4]) -> [usize; 4] {
        let mut counts = [0; 4];
        for batch in &self.batches {
            let answers = self.network.forward_early(batch, thresholds);
            answers.exits.iter().for_each(|&exit| counts[exit] += 1);
        }
        counts
    }

    /// All settings in turns with the full forward.
    fn time(&self, settings: &[[f32; 4]]) -> Timed {
        let mut full = Vec::new();
        let mut early = vec![Vec::new(); settings.len()];
        let mut counts = vec![[0; 4]; settings.len()];
        for round in 0..=self.rounds {
            let keep = |times: &mut Vec<f64>, seconds: f64| {
                if round > 0 {
                    times.push(seconds);
                }
            };
            keep(&mut full, self.seconds(|| self.full()));
            for ((times, counts), &thresholds) in early.iter_mut().zip(&mut counts).zip(settings) {
                keep(times, self.seconds(|| *counts = self.early(thresholds)));
            }
        }
        Timed { full_s: median(full), early_s: early.into_iter().map(median).collect(), counts }
    }

    fn seconds(&self, work: impl FnOnce()) -> f64 {
        let (wall, cpu) = (Instant::now(), cpu_s());
        work();
        if self.by_cpu_time { cpu_s() - cpu } else { wall.elapsed().as_secs_f64() }
    }

    fn figure(&self, timed: &Timed, setting: usize, budget: Option<usize>) -> Figure {
        let (seconds, counts) = (timed.early_s[setting], timed.counts[setting]);
        let total =
            counts.iter().zip(self.cost.macs).map(|(&count, macs)| count as f64 * macs as f64);
        let macs = total.sum::<f64>() / self.samples() as f64;
        Figure {
            budget,
            exit: budget.is_none().then(|| EXIT_NAMES[setting]),
            counts,
            macs,
            mac_ratio: self.cost.macs[3] as f64 / macs,
            speedup: timed.full_s / seconds,
            latency_ms: seconds * 1e3 / self.batches.len() as f64,
            images_per_s: self.samples() as f64 / seconds,
        }
    }
}

/// The most memory that a process with only such passes holds, in 10⁶ bytes.
fn peak_of(options: &Options, passes: &str, thresholds: [f32; 4]) -> Result<f64> {
    let program = std::env::current_exe().context("this program cannot tell where it lies")?;
    let Options { model, batch, size, classes, threads, .. } = options;
    let numbers = [("batch", *batch), ("size", *size), ("classes", *classes)];
    let mut command = Command::new(program);
    command.args(["bench-exits", "--model", model, "--passes", passes]);
    command.arg(format!("--threads={threads}"));
    command.args(numbers.map(|(name, value)| format!("--{name}={value}")));
    command.args(options.batch_norm.then_some("--batch-norm"));
    command.args(options.batches.map(|count| format!("--batches={count}")));
    command.arg(format!("--thresholds={}", thresholds.map(|t| t.to_string()).join(",")));
    let output = command.output().context("the process that measures memory cannot be started")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "the process that measures memory failed: {}", said.trim());
    let peak = String::from_utf8_lossy(&output.stdout);
    peak.trim().parse().with_context(|| format!("the most memory held is {:?}", peak.trim()))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Images `[B, 3, S, S]`: coarse waves that differ from image to image.
fn made(index: i64, batch: i64, size: i64) -> Tensor {
    let kind = (Kind::Float, Device::Cpu);
    let axis = Tensor::linspace(0.0, 6.0, size, kind);
    let phases = (Tensor::arange(batch * 3, kind) + (index * batch * 3) as f64).view([-1, 1, 1]);
    let rows = (&axis.view([1, -1, 1]) * (phases.sin() * 2.0 + 3.0) + &phases).sin(); // [3B, S, 1]
    let columns = (&axis.view([1, 1, -1]) * (phases.cos() * 2.0 + 3.0)).cos(); // [3B, 1, S]
    (rows + columns).view([batch, 3, size, size])
}
