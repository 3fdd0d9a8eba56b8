//! `bench-step`: CPU time and memory of a training step of one virtual rank.
//!
//! It runs what training runs (the network, the loss of the exits with self-distillation, backward into the flat
//! gradient, AdamW, the average) on made images, with the published options of the model. Times are CPU
//! times of the whole process, so a busy machine disturbs them little; the first step, which finds its memory, is not
//! counted.

pub mod exits;

use std::fmt;
use std::fmt::Write as _;
use std::fs;
use std::sync::Arc;
use std::time::Instant;

use clap::Args;
use model::{
    AdamW, AdamWConfig, Architecture, Draws, Ema, Layout, LossConfig, ModelConfig, Network,
    Targets, Update, Weights, multi_exit,
};
use rustix::time::{ClockId, clock_gettime};
use sha2::{Digest as _, Sha256};
use tch::{Device, Kind, Tensor};

/// CPU time and memory of a training step on one process, on made images.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// A registered model, as reg800m_perceiver_t128.
    #[arg(long, value_name = "NAME")]
    pub model: String,
    /// Images in a step.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(i64).range(2..=4096))]
    pub batch: i64,
    /// Height and width of an image.
    #[arg(long, default_value_t = 224, value_parser = clap::value_parser!(i64).range(32..=1024))]
    pub size: i64,
    /// Classes.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(i64).range(2..=100_000))]
    pub classes: i64,
    /// Threads inside an operation.
    #[arg(long, default_value_t = 1)]
    pub threads: usize,
    /// Steps that are measured, after one that is not.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    pub steps: u64,
    /// Print one object and nothing else.
    #[arg(long)]
    pub json: bool,
}

/// A step that cannot be measured.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The model or its sizes do not exist.
    #[error(transparent)]
    Model(#[from] model::ConfigError),
    /// The backward pass.
    #[error("the backward pass failed")]
    Backward(#[from] model::GradientError),
}

/// Seconds of the parts of a step.
#[derive(Debug, Clone, Copy)]
struct Times {
    forward: f64,
    backward: f64,
    optimizer: f64,
    average: f64,
    wall: f64,
}

impl Times {
    fn total(&self) -> f64 {
        self.forward + self.backward + self.optimizer + self.average
    }
}

/// Medians over the steps, and what else there is to say.
#[derive(Debug)]
pub struct Report {
    options: Options,
    medians: Vec<(&'static str, f64)>,
    /// The most memory the process has held, in 10⁶ bytes.
    peak_rss_mb: f64,
    /// Of the parameters after the last step.
    params_sha256: String,
}

impl Report {
    /// One line of JSON.
    #[must_use]
    pub fn json(&self) -> String {
        let Options { model, batch, size, classes, threads, steps, .. } = &self.options;
        let mut text = format!(
            "{{\"model\":\"{model}\",\"batch\":{batch},\"size\":{size},\"classes\":{classes},\
             \"threads\":{threads},\"steps\":{steps}"
        );
        for (name, value) in self.medians.iter().chain([&("peak_rss_mb", self.peak_rss_mb)]) {
            write!(text, ",\"{name}\":{value:.6}").expect("memory takes text");
        }
        write!(text, ",\"params_sha256\":\"{}\"}}", self.params_sha256).expect("memory takes text");
        text
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Options { model, batch, size, threads, steps, .. } = &self.options;
        writeln!(
            f,
            "{model}, {batch} images of {size}x{size}, threads: {threads}; medians of {steps} steps"
        )?;
        for (name, value) in &self.medians {
            writeln!(f, "  {name:<18} {value:>8.3} s")?;
        }
        writeln!(f, "  {:<18} {:>8.0} MB", "peak_rss_mb", self.peak_rss_mb)?;
        write!(f, "  {:<18} {}", "params_sha256", self.params_sha256)
    }
}

/// Measures; `libtorch::init` was called with the options' threads.
///
/// # Errors
/// [`BenchError`] if the model does not exist or libtorch refuses.
pub fn run(options: &Options) -> Result<Report, BenchError> {
    let published = ModelConfig::published(&options.model);
    let config = ModelConfig { classes: options.classes, input_size: options.size, ..published };
    let architecture = Architecture::try_from(&config)?;
    let (times, params_sha256) = measure(&architecture, options)?;
    let median = |part: &dyn Fn(&Times) -> f64| {
        let mut values: Vec<f64> = times.iter().map(part).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let medians = vec![
        ("forward_cpu_s", median(&|t| t.forward)),
        ("backward_cpu_s", median(&|t| t.backward)),
        ("optimizer_cpu_s", median(&|t| t.optimizer)),
        ("ema_cpu_s", median(&|t| t.average)),
        ("total_cpu_s", median(&Times::total)),
        ("wall_s", median(&|t| t.wall)),
    ];
    Ok(Report { options: options.clone(), medians, peak_rss_mb: peak_rss_mb(), params_sha256 })
}

/// The times of the steps but the first, and the digest of the parameters after the last.
fn measure(
    architecture: &Architecture,
    options: &Options,
) -> Result<(Vec<Times>, String), BenchError> {
    let layout = Arc::new(Layout::of(architecture));
    let mut weights = Weights::initial(layout.clone(), 0, Kind::Float, Device::Cpu);
    let network = Network::new(architecture, &weights);
    let mut optimizer = AdamW::new(AdamWConfig::default(), &layout, weights.params());
    let mut ema = Ema::new(&weights);
    let mut gradients = weights.params().zeros_like();
    let (images, labels) = made(options);
    let mut times = Vec::new();
    for step in 0..=options.steps {
        let draws = Draws { seed: 0, step, virtual_rank: 0 };
        let (wall, start) = (Instant::now(), cpu_s());
        let exits = network.forward_train(&images, &draws);
        let losses = multi_exit(&exits, Targets::Labels(&labels), &LossConfig::default());
        drop(exits);
        let forward = cpu_s();
        network.gradients(&losses.total, &mut gradients)?;
        let backward = cpu_s();
        let update = Update { step, learning_rate: 1e-3, weight_decay: 0.05 };
        optimizer.step(weights.params_mut(), &gradients, &update);
        let optimized = cpu_s();
        ema.update(&weights, 0.9999);
        let averaged = cpu_s();
        if step > 0 {
            times.push(Times {
                forward: forward - start,
                backward: backward - forward,
                optimizer: optimized - backward,
                average: averaged - optimized,
                wall: wall.elapsed().as_secs_f64(),
            });
        }
    }
    let params = libtorch::slice::<f32>(weights.params()).expect("they are f32 on the host");
    Ok((times, hex::encode(Sha256::digest(bytemuck::cast_slice::<f32, u8>(params)))))
}

/// Images `[B, 3, S, S]` and labels `[B]`.
fn made(options: &Options) -> (Tensor, Tensor) {
    let Options { batch, size, classes, .. } = *options;
    let kind = (Kind::Float, Device::Cpu);
    let images = Tensor::linspace(-2.0, 2.0, batch * 3 * size * size, kind).sin();
    let labels = Tensor::arange(batch, (Kind::Int64, Device::Cpu)).remainder(classes);
    (images.view([batch, 3, size, size]), labels)
}

/// Seconds that all threads of this process have run.
fn cpu_s() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

/// The most memory this process has held, in 10⁶ bytes; 0 where the system does not say.
fn peak_rss_mb() -> f64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = peak.and_then(|peak| peak.split_whitespace().next());
    kib.and_then(|kib| kib.parse::<f64>().ok()).map_or(0.0, |kib| kib * 1024.0 / 1e6)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn options(line: &str) -> Options {
        libtorch::init(1).unwrap();
        Line::parse_from(line.split(' ')).options
    }

    #[test]
    fn a_report_has_the_names_that_scripts_rely_on_and_the_same_bits_twice() {
        let line = "step --model reg400m_perceiver_t32 --batch 2 --size 32 --classes 3 --steps 1";
        let options = options(line);
        let first = run(&options).unwrap();
        let json = first.json();
        for name in [
            "forward_cpu_s",
            "backward_cpu_s",
            "optimizer_cpu_s",
            "ema_cpu_s",
            "total_cpu_s",
            "wall_s",
            "peak_rss_mb",
        ] {
            assert!(json.contains(&format!("\"{name}\":")), "{json}");
        }
        assert_eq!(run(&options).unwrap().params_sha256, first.params_sha256);
    }

    #[test]
    fn an_unknown_model_is_refused() {
        let options = options("step --model reg1m");
        assert!(matches!(run(&options), Err(BenchError::Model(_))));
    }
}
