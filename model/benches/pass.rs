//! CPU time of one micro-batch's forward and backward and of one update, and the memory they take:
//! `cargo bench -p model -- VARIANT BATCH SIZE CLASSES THREADS REPETITIONS` (default: the digits recipe's). The time is that
//! of all threads, from the scheduler's own count, so that a busy machine disturbs it little.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use model::{
    AdamW, AdamWConfig, Architecture, Draws, Ema, Layout, LossConfig, ModelConfig, Network,
    Targets, Update, Weights, multi_exit,
};
use tch::{Device, Kind, Tensor};

/// The time that all threads of this process have run.
fn cpu_time() -> Duration {
    let tasks = fs::read_dir("/proc/self/task").expect("Linux lists the threads");
    let nanoseconds = |task: fs::DirEntry| -> u64 {
        let counts = fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
        counts.split_whitespace().next().and_then(|count| count.parse().ok()).unwrap_or(0)
    };
    Duration::from_nanos(tasks.flatten().map(nanoseconds).sum())
}

/// The most memory this process has held, in MiB.
fn peak_memory_mib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("Linux describes the process");
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = peak.and_then(|peak| peak.split_whitespace().next()).and_then(|kib| kib.parse().ok());
    kib.map_or(0, |kib: u64| kib / 1024)
}

/// The times of one repetition.
#[derive(Debug, Clone, Copy)]
struct Times {
    forward: Duration,
    backward: Duration,
    optimizer: Duration,
    average: Duration,
}

#[expect(clippy::print_stdout, reason = "a benchmark reports to its user")]
fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let number = |place: usize, default: i64| {
        arguments.get(place).map_or(default, |text| text.parse().expect("a number"))
    };
    let name = arguments.first().map_or("reg400m_perceiver_t32", String::as_str);
    let (batch, size, classes, threads) =
        (number(1, 8), number(2, 32), number(3, 10), number(4, 1));
    libtorch::init(usize::try_from(threads).expect("a number of threads")).expect("starts");
    let config = ModelConfig {
        classes,
        input_size: size,
        depth_factor: (size == 32).then_some([1; 4]),
        ..ModelConfig::published(name)
    };
    let architecture = Architecture::try_from(&config).expect("a valid model");
    let default = if size == 32 { 60 } else { 5 };
    let repetitions = u64::try_from(number(5, default)).expect("a number of repetitions");
    let mut times = measure(&architecture, batch, repetitions);
    let mut median = |part: fn(&Times) -> Duration| {
        times.sort_by_key(part);
        part(&times[times.len() / 2])
    };
    println!(
        "{name} batch {batch} size {size} classes {classes} threads {threads}: CPU time forward \
         {:.1?} backward {:.1?} optimizer {:.1?} average {:.1?} (medians of {repetitions}), peak \
         memory {} MiB",
        median(|t| t.forward),
        median(|t| t.backward),
        median(|t| t.optimizer),
        median(|t| t.average),
        peak_memory_mib(),
    );
}

fn measure(architecture: &Architecture, batch: i64, repetitions: u64) -> Vec<Times> {
    let layout = Arc::new(Layout::of(architecture));
    let mut weights = Weights::initial(layout.clone(), 0, Kind::Float, Device::Cpu);
    let network = Network::new(architecture, &weights);
    let mut optimizer = AdamW::new(AdamWConfig::default(), &layout, weights.params());
    let mut ema = Ema::new(&weights);
    let mut gradients = weights.params().zeros_like();
    let size = architecture.input_size();
    let options = (Kind::Float, Device::Cpu);
    let images = Tensor::linspace(-2.0, 2.0, batch * 3 * size * size, options).sin();
    let images = images.view([batch, 3, size, size]);
    let labels =
        Tensor::arange(batch, (Kind::Int64, Device::Cpu)).remainder(architecture.classes());
    let repetition = |step: u64| {
        let draws = Draws { seed: 0, step, virtual_rank: 0 };
        let start = cpu_time();
        let exits = network.forward_train(&images, &draws);
        let losses = multi_exit(&exits, Targets::Labels(&labels), &LossConfig::default());
        let forward = cpu_time() - start;
        network.gradients(&losses.total, &mut gradients).expect("backward succeeds");
        let backward = cpu_time() - start - forward;
        let update = Update { step, learning_rate: 1e-3, weight_decay: 0.05 };
        optimizer.step(weights.params_mut(), &gradients, &update);
        let optimizer = cpu_time() - start - forward - backward;
        ema.update(&weights, 0.999);
        let average = cpu_time() - start - forward - backward - optimizer;
        Times { forward, backward, optimizer, average }
    };
    (0..repetitions).map(repetition).collect()
}
