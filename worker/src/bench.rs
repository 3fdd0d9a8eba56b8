//! `bench-step`: CPU time and memory of a training step of one virtual rank.
//!
//! It runs what training runs (the network, the loss of the exits with self-distillation, backward into the flat
//! gradient, AdamW, the average) on made images, with the published options of the model. Times are CPU
//! times of the whole process, so a busy machine disturbs them little; the first step, which finds its memory, is not
//! counted.

pub mod checkpoint;
pub mod exits;

use std::fmt;
use std::fmt::Write as _;
use std::fs;
use std::sync::Arc;
use std::time::Instant;

use clap::Args;
use model::{
    AdamW, AdamWConfig, Architecture, Draws, Ema, Layout, LossConfig, ModelConfig, Network, Update,
    Weights,
};
use rustix::time::{ClockId, clock_gettime};
use sha2::{Digest as _, Sha256};
use tch::{Device, Kind, Tensor};

use crate::pass::{Inputs, Pass, Rules, Statistics};

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
    /// Where to compute: cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu", value_parser = crate::device::parse)]
    pub device: Device,
    /// What products and convolutions compute in.
    #[arg(long, default_value = "f32", value_parser = ["f32", "bf16"])]
    pub precision: String,
    /// Record forward and backward once as a CUDA graph and replay it.
    #[arg(long)]
    pub graph: bool,
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
    #[error("a step cannot be made; one with a smaller --batch needs less memory")]
    Backward(#[from] model::GradientError),
    /// A graph of what has no graphs.
    #[error("--graph needs --device cuda")]
    Graph,
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
    /// The most memory the process has held, and its tensors on the device, in 10⁶ bytes.
    peaks: [(&'static str, f64); 2],
    /// Of the parameters after the last step.
    params_sha256: String,
}

impl Report {
    /// One line of JSON.
    #[must_use]
    pub fn json(&self) -> String {
        let Options { model, batch, size, classes, threads, steps, precision, graph, .. } =
            &self.options;
        let mut text = format!(
            "{{\"model\":\"{model}\",\"batch\":{batch},\"size\":{size},\"classes\":{classes},\
             \"threads\":{threads},\"steps\":{steps},\"device\":\"{}\",\
             \"precision\":\"{precision}\",\"graph\":{graph}",
            crate::device::name(self.options.device)
        );
        for (name, value) in self.medians.iter().chain(&self.peaks) {
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
        for (name, value) in &self.peaks {
            writeln!(f, "  {name:<18} {value:>8.0} MB")?;
        }
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
    if options.graph && !options.device.is_cuda() {
        return Err(BenchError::Graph);
    }
    libtorch::cuda::enter(options.device)?;
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
    let device_peak_mb = libtorch::cuda::peak_bytes(options.device)? as f64 / 1e6;
    let peaks = [("peak_rss_mb", peak_rss_mb()), ("device_peak_mb", device_peak_mb)];
    Ok(Report { options: options.clone(), medians, peaks, params_sha256 })
}

/// The times of the steps but the first, and the digest of the parameters after the last.
fn measure(
    architecture: &Architecture,
    options: &Options,
) -> Result<(Vec<Times>, String), BenchError> {
    let device = options.device;
    let layout = Arc::new(Layout::of(architecture));
    let mut weights = Weights::initial(layout.clone(), 0, Kind::Float, device);
    let start = weights.buffers().copy();
    let network = Network::new(architecture, &weights);
    let mut optimizer = AdamW::new(AdamWConfig::default(), &layout, weights.params());
    let mut ema = Ema::new(&weights);
    let short = options.precision == "bf16";
    let precision = if short { Kind::BFloat16 } else { Kind::Float };
    let loss = LossConfig::default();
    let rules = Rules { precision, loss, update_freq: 1, graph: options.graph };
    let mut pass = Pass::new(rules, layout.param_len(), device);
    let mut times = Vec::new();
    let warm_ups = if device.is_cuda() { 10 } else { 1 };
    for step in 0..options.steps + warm_ups {
        let draws = Draws { seed: 0, step, virtual_rank: 0 };
        let inputs = made(options.batch, options.size, options.classes, device);
        libtorch::cuda::synchronize(device)?;
        let (wall, begun) = (Instant::now(), cpu_s());
        let forward = if options.graph {
            let statistics = Statistics { moving: weights.buffers_mut(), start: &start };
            pass.run(&network, statistics, &draws, inputs)?;
            cpu_s() // Both are one launch.
        } else {
            let total = pass.forward(&network, &draws, &inputs)?;
            let forward = cpu_s();
            pass.backward(&network, &total)?;
            forward
        };
        let passed = cpu_s();
        let update = Update { step, learning_rate: 1e-3, weight_decay: 0.05 };
        optimizer.step(weights.params_mut(), pass.gradients(), &update);
        let optimized = cpu_s();
        ema.update(&weights, 0.9999);
        libtorch::cuda::synchronize(device)?;
        let averaged = cpu_s();
        if step >= warm_ups {
            times.push(Times {
                forward: forward - begun,
                backward: passed - forward,
                optimizer: optimized - passed,
                average: averaged - optimized,
                wall: wall.elapsed().as_secs_f64(),
            });
        }
    }
    let params = weights.params().to_device(Device::Cpu);
    let params = libtorch::slice::<f32>(&params).expect("they are f32 on the host");
    Ok((times, hex::encode(Sha256::digest(bytemuck::cast_slice::<f32, u8>(params)))))
}

/// A micro-batch of waves.
fn made(batch: i64, size: i64, classes: i64, device: Device) -> Inputs {
    let images = Tensor::linspace(-2.0, 2.0, batch * 3 * size * size, (Kind::Float, device)).sin();
    let labels = Tensor::arange(batch, (Kind::Int64, device)).remainder(classes);
    Inputs { images: images.view([batch, 3, size, size]), labels, targets: None }
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
