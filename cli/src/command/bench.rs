//! `percheron bench`: what this machine can do, measured in one process.

mod control;

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

use ::shards::{
    Dataset, Order, RemoteReads,
    measure::{Pipeline, STAGES, Work},
};
use anyhow::{Context as _, Result, bail};
use clap::{Args, Subcommand, ValueEnum};
use cluster::Epoch;
use nix::time::{ClockId, clock_gettime};

use crate::{command::worker, print};

mod crashes;
mod restart;

/// `percheron bench …`.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// CPU time and memory of a training step: `percheron bench step --model NAME`.
    #[command(disable_help_flag = true, disable_version_flag = true)]
    Step(worker::Arguments),
    /// How long training waits for checkpoints, and what they cost beside it.
    #[command(disable_help_flag = true, disable_version_flag = true)]
    Checkpoint(worker::Arguments),
    /// Kill processes while they keep checkpoints and write the log, and see whether anything is lost.
    Crashes(crashes::Arguments),
    /// The life of such a process.
    #[command(hide = true)]
    CrashingLife(crashes::Life),
    /// How long a coordinator takes to lead a run again whose log is long.
    Restart(restart::Arguments),
    /// Latency, throughput and memory of early exit at budgets: `percheron bench exits --model NAME`.
    #[command(disable_help_flag = true, disable_version_flag = true)]
    Exits(worker::Arguments),
    /// How many training images a core prepares in a second: decode, crop, resize, flip, normalise.
    Data(Data),
    /// What reading a sample costs: finding it, reading it and checking it, without decoding.
    Reader(Reader),
    /// How fast a coordinator makes a new generation of many workers known, and what it costs.
    Control(control::Control),
}

#[derive(Debug, Args)]
pub(crate) struct Reader {
    /// The folder of a dataset, s3://BUCKET/PREFIX, or `builtin:digits`.
    #[arg(value_name = "LOCATION")]
    location: String,
    /// The split that is read.
    #[arg(long, default_value = "train")]
    split: String,
    /// Samples to read, in the order of an epoch and again from the start.
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u64).range(1..))]
    samples: u64,
    /// One JSON object and nothing else.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Data {
    /// Folder of .jpg files, which are held in memory.
    #[arg(long, value_name = "DIR")]
    images: PathBuf,
    /// What is done to an image.
    #[arg(long, value_enum, default_value_t = Recipe::Full)]
    recipe: Recipe,
    /// Passes over the files; the median counts.
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..))]
    passes: u32,
    /// One JSON object and nothing else.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Recipe {
    /// A random resized crop to 224 pixels and a flip.
    Crop,
    /// The same, RandAugment and random erasing.
    Full,
}

/// What the passes came to.
#[derive(Debug)]
struct Figures {
    images: usize,
    images_per_core_s: f64,
    bytes_per_core_s: f64,
    /// Milliseconds an image, in the order of [`STAGES`].
    stages_ms: [f64; STAGES.len()],
}

pub(crate) fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Step(arguments) => return worker::run_tool("bench-step", arguments),
        Command::Checkpoint(arguments) => {
            return worker::run_tool("bench-checkpoint", arguments);
        }
        Command::Crashes(arguments) => crashes::run(&arguments)?,
        Command::CrashingLife(life) => crashes::live(&life)?,
        Command::Restart(arguments) => restart::run(&arguments)?,
        Command::Exits(arguments) => return worker::run_tool("bench-exits", arguments),
        Command::Data(data) => run_data(&data)?,
        Command::Reader(reader) => run_reader(&reader)?,
        Command::Control(control) => return super::in_runtime(control::run(control)),
    }
    Ok(ExitCode::SUCCESS)
}

/// Samples that the first pass has made ready at once, where they are far away.
const BATCH: usize = 256;

/// CPU time of this thread, after a first pass that brings the files into the system's memory.
fn run_reader(reader: &Reader) -> Result<()> {
    let dataset = Dataset::open(&reader.location, &reader.split)?;
    let order = Order::new(dataset.len(), 1, Epoch(0));
    let mut image = Vec::new();
    let first = Instant::now();
    let samples: Vec<u64> = (0..dataset.len()).collect();
    for batch in samples.chunks(BATCH) {
        dataset.prefetch(batch);
        for &sample in batch {
            dataset.read_into(sample, &mut image)?;
        }
    }
    let fetched_per_s = dataset.reads().remote.fetched_bytes as f64 / first.elapsed().as_secs_f64();
    let (before, start) = (dataset.reads(), cpu_seconds());
    for position in 0..reader.samples {
        dataset.read_into(order.sample(position % dataset.len()), &mut image)?;
    }
    let seconds = cpu_seconds() - start;
    let bytes = (dataset.reads().bytes - before.bytes) as f64;
    let samples = reader.samples as f64;
    let remote = dataset.reads().remote;
    let (ns, mean_bytes) = (seconds * 1e9 / samples, bytes / samples);
    if reader.json {
        let figures = serde_json::json!({
            "samples": reader.samples,
            "ns_per_sample": ns,
            "bytes_per_sample": mean_bytes,
            "bytes_per_core_s": bytes / seconds,
            "fetched_bytes": remote.fetched_bytes,
            "fetched_bytes_per_s": fetched_per_s,
            "cache_hits": remote.cache_hits,
            "cache_misses": remote.cache_misses,
            "cache_unkept": remote.cache_unkept,
            "hedged": remote.hedged,
            "retried": remote.retried,
        });
        print::out(&figures.to_string());
    } else {
        print::out(&format!("{ns:.0} ns a sample of {:.1} KB on average", mean_bytes / 1e3));
        print::out(&format!("{:.2} GB a second and core", bytes / seconds / 1e9));
        if remote != RemoteReads::default() {
            print::out(&format!(
                "{:.1} MB fetched, {:.1} MB a second in the first pass; blocks: {} found in the cache, {} not, {} could not be kept; \
                 requests: {} hedged, {} retried",
                remote.fetched_bytes as f64 / 1e6,
                fetched_per_s / 1e6,
                remote.cache_hits,
                remote.cache_misses,
                remote.cache_unkept,
                remote.hedged,
                remote.retried,
            ));
        }
    }
    Ok(())
}

fn run_data(data: &Data) -> Result<()> {
    let files = read(&data.images)?;
    let work = match data.recipe {
        Recipe::Crop => Work::Crop,
        Recipe::Full => Work::Full,
    };
    let figures = measure(&files, work, data.passes)?;
    if data.json {
        print::out(&json(&figures).to_string());
    } else {
        show(&figures);
    }
    Ok(())
}

fn read(folder: &Path) -> Result<Vec<Vec<u8>>> {
    let context = || format!("folder {}", folder.display());
    let entries = fs::read_dir(folder).with_context(context)?;
    let mut paths =
        entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>().with_context(context)?;
    paths.retain(|path| {
        path.extension().is_some_and(|end| end.eq_ignore_ascii_case("jpg") || end == "JPEG")
    });
    paths.sort();
    if paths.is_empty() {
        bail!("folder {} has no .jpg file", folder.display());
    }
    paths
        .iter()
        .map(|path| fs::read(path).with_context(|| format!("file {}", path.display())))
        .collect()
}

fn measure(files: &[Vec<u8>], work: Work, passes: u32) -> Result<Figures> {
    let mut pipeline = Pipeline::new(work);
    pipeline.pass(files, 0, &mut cpu_seconds)?; // Grows the buffers.
    pipeline.stages = Default::default();
    let mut seconds = Vec::new();
    for pass in 0..passes {
        let start = cpu_seconds();
        pipeline.pass(files, pass.into(), &mut cpu_seconds)?;
        seconds.push(cpu_seconds() - start);
    }
    seconds.sort_by(f64::total_cmp);
    let median = *seconds.get(seconds.len() / 2).context("there was no pass")?;
    let bytes: usize = files.iter().map(Vec::len).sum();
    let prepared = files.len() as f64 * f64::from(passes);
    Ok(Figures {
        images: files.len(),
        images_per_core_s: files.len() as f64 / median,
        bytes_per_core_s: bytes as f64 / median,
        stages_ms: pipeline.stages.map(|stage| stage * 1e3 / prepared),
    })
}

fn json(figures: &Figures) -> serde_json::Value {
    let stages: serde_json::Map<_, _> = STAGES
        .iter()
        .zip(figures.stages_ms)
        .map(|(name, ms)| (format!("{name}_ms"), ms.into()))
        .collect();
    serde_json::json!({
        "images": figures.images,
        "img_per_core_s": figures.images_per_core_s,
        "bytes_per_core_s": figures.bytes_per_core_s,
        "stages_ms": stages,
    })
}

fn show(figures: &Figures) {
    let Figures { images, images_per_core_s, bytes_per_core_s, stages_ms } = figures;
    print::out(&format!("{images_per_core_s:.0} images a second and core, of {images} images"));
    print::out(&format!("{:.1} MB a second and core of encoded images", bytes_per_core_s / 1e6));
    let total: f64 = stages_ms.iter().sum();
    for (name, ms) in STAGES.iter().zip(stages_ms) {
        print::out(&format!("  {name:<10} {ms:.3} ms an image  {:>3.0} %", ms / total * 100.0));
    }
}

/// CPU time of this thread so far.
fn cpu_seconds() -> f64 {
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("Linux has this clock");
    time.tv_sec() as f64 + time.tv_nsec() as f64 * 1e-9
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_figures_have_the_names_that_scripts_read() {
        let figures = Figures {
            images: 48,
            images_per_core_s: 900.0,
            bytes_per_core_s: 9e7,
            stages_ms: [0.8, 0.1, 0.2, 0.05],
        };
        let object = json(&figures);
        assert_eq!(object["img_per_core_s"], 900.0);
        assert_eq!(object["bytes_per_core_s"], 9e7);
        assert_eq!(object["stages_ms"]["augment_ms"], 0.2);
    }

    #[test]
    fn a_folder_without_images_is_named() {
        let folder = std::env::current_dir().unwrap().join("src");
        let error = read(&folder).unwrap_err().to_string();
        assert!(error.contains("has no .jpg file"), "{error}");
    }
}
