//! `bench-checkpoint`: how long training waits for a checkpoint, and what the rest of it costs meanwhile.
//!
//! Threads stand for workers. Each holds a whole state, makes real steps in time with the others, and saves its
//! share by the code that training uses: the copy, then the upload on a runtime of its own kind, then the
//! manifest. Blocks of steps with a checkpoint and without take turns, so that a busy machine disturbs
//! both alike.

use std::{fmt::Write as _, thread, time::Instant};

use anyhow::{Context as _, Result, bail};
use checkpoint::{Digest, Layout, Manifest, PartRecord, Retention, Store};
use clap::Args;
use cluster::{Epoch, Generation, Notice, Part, Rank, RunId, Step, Term, Timestamp};
use model::{
    AdamWConfig, Architecture, Draws, LossConfig, ModelConfig, Targets, Update, multi_exit,
};
use tch::{Device, Kind, Tensor};
use tokio::runtime::Runtime;

use super::{cpu_s, made, peak_rss_mb};
use crate::{
    agent::upload::upload,
    train::{
        TrainState,
        checkpoints::{share, share_bytes},
        memory::ShareMemory,
    },
};

/// How long training waits for checkpoints, and what they cost in the background.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// A registered model; its state has four numbers of four bytes a parameter.
    #[arg(long, value_name = "NAME", default_value = "reg1x6g_perceiver_t128")]
    pub model: String,
    /// Workers that share the state, threads of this process.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub workers: u32,
    /// Checkpoints that are measured, after one that is not.
    #[arg(long, default_value_t = 25, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub rounds: u32,
    /// Steps of a block, with a checkpoint or without; an upload must be done within them.
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub steps: u32,
    /// Images in a worker's step.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(i64).range(2..=4096))]
    pub batch: i64,
    /// Height and width of an image.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(i64).range(32..=1024))]
    pub size: i64,
    /// Steps from checkpoint to checkpoint that the overhead is reckoned for.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    pub every: u32,
    /// Size of a part, in MiB.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub part_mib: u32,
    /// Where the checkpoints go: a folder, or s3://BUCKET/PREFIX. What is in it of checkpoints is deleted.
    #[arg(long, value_name = "LOCATION")]
    pub store: String,
    /// Print one object and nothing else.
    #[arg(long)]
    pub json: bool,
}

/// One of the workers.
struct Worker {
    rank: Rank,
    state: TrainState,
    gradients: Tensor,
    memory: ShareMemory,
    images: Tensor,
    labels: Tensor,
}

/// What the blocks came to.
#[derive(Default)]
struct Seen {
    stalls_ms: Vec<f64>,
    uploads_s: Vec<f64>,
    /// Of blocks without a checkpoint.
    plain: Vec<Block>,
    /// Of blocks with one.
    saving: Vec<Block>,
}

/// Seconds of a block of steps.
#[derive(Clone, Copy)]
struct Block {
    wall: f64,
    /// Of the whole process.
    cpu: f64,
}

/// The figures, by name.
#[derive(Debug)]
pub struct Report(Vec<(&'static str, f64)>);

impl Report {
    /// One line of JSON.
    #[must_use]
    pub fn json(&self) -> String {
        let figures = self.0.iter().map(|(name, value)| format!("\"{name}\":{value:.6}"));
        format!("{{{}}}", figures.collect::<Vec<_>>().join(","))
    }

    /// A line a figure.
    #[must_use]
    pub fn text(&self) -> String {
        self.0.iter().fold(String::new(), |mut text, (name, value)| {
            writeln!(text, "  {name:<20} {value:>12.4}").expect("memory takes text");
            text
        })
    }
}

/// What stays the same.
struct Bench<'a> {
    options: &'a Options,
    layout: Layout,
    store: Store,
    /// As that of a worker.
    runtime: Runtime,
}

/// Measures; `libtorch::init` was called with one thread.
///
/// # Errors
/// If the model does not exist, the store does not take a part, or an upload lasts longer than a block.
pub fn run(options: &Options) -> Result<Report> {
    let published = ModelConfig::published(&options.model);
    let config = ModelConfig { input_size: options.size, ..published };
    let architecture = Architecture::try_from(&config)?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.context("cannot start the runtime")?;
    let store = Store::create(&options.store).context("--store")?;
    runtime.block_on(store.check_contract()).context("--store")?;
    let mut workers: Vec<Worker> = (0..options.workers)
        .map(|rank| Worker::new(Rank(rank), &architecture, options, config.classes))
        .collect();
    let part_bytes = u64::from(options.part_mib) << 20;
    let layout = workers[0].state.checkpoint_layout(part_bytes).context("--part-mib")?;
    for worker in &workers {
        worker.memory.prepare(share_bytes(&layout, worker.rank, options.workers));
    }
    let bench = Bench { options, layout, store, runtime };
    let mut seen = Seen::default();
    for round in 0..=options.rounds {
        if round == 1 {
            seen = Seen::default(); // Before, memory and files were found.
        }
        seen.plain.push(bench.block(&mut workers)?);
        bench.save(&mut workers, &mut seen)?;
    }
    Ok(bench.report(seen))
}

/// Has every worker do something at the same time.
fn all<T: Send>(
    workers: &mut [Worker],
    work: impl Fn(&mut Worker) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let work = &work;
    thread::scope(|scope| {
        let threads: Vec<_> =
            workers.iter_mut().map(|worker| scope.spawn(move || work(worker))).collect();
        let joined = threads.into_iter().map(|thread| thread.join().expect("no worker panics"));
        joined.collect()
    })
}

impl Bench<'_> {
    /// Steps of all workers, each in time with the others, as the sum over them makes them.
    fn block(&self, workers: &mut [Worker]) -> Result<Block> {
        let (began, cpu) = (Instant::now(), cpu_s());
        for _ in 0..self.options.steps {
            all(workers, Worker::step)?;
        }
        Ok(Block { wall: began.elapsed().as_secs_f64(), cpu: cpu_s() - cpu })
    }

    /// A block that begins with the copies of a checkpoint, whose uploads go on beside its steps.
    fn save(&self, workers: &mut [Worker], seen: &mut Seen) -> Result<()> {
        let step = workers[0].state.step().context("the workers hold a state")?;
        let (began, cpu) = (Instant::now(), cpu_s());
        let size = self.options.workers;
        let shares = all(workers, |worker| {
            let copying = Instant::now();
            let place = (worker.rank, size);
            let share = share(&worker.state, &self.layout, place, &worker.memory, false);
            Ok((share.context("the shares before are still in memory")?, copying.elapsed()))
        })?;
        let uploading = Instant::now();
        let mut uploads = Vec::with_capacity(shares.len());
        for (share, stalled) in shares {
            seen.stalls_ms.push(stalled.as_secs_f64() * 1e3);
            let store = self.store.clone();
            uploads.push(
                self.runtime.spawn(async move {
                    (upload(store, Generation(1), share).await, Instant::now())
                }),
            );
        }
        self.block(workers)?;
        seen.saving.push(Block { wall: began.elapsed().as_secs_f64(), cpu: cpu_s() - cpu });
        if !uploads.iter().all(tokio::task::JoinHandle::is_finished) {
            let steps = self.options.steps;
            bail!(
                "an upload lasted longer than {steps} steps, whose slowing is the figure: raise --steps"
            );
        }
        let (mut parts, mut last) = (Vec::new(), uploading);
        for upload in uploads {
            let (notice, ended) = self.runtime.block_on(upload)?;
            last = last.max(ended);
            parts.extend(saved(notice)?);
        }
        seen.uploads_s.push((last - uploading).as_secs_f64());
        self.runtime.block_on(self.commit(step, parts))
    }

    /// As the coordinator does it.
    async fn commit(&self, step: Step, parts: Vec<Part>) -> Result<()> {
        let record = |part: Part| {
            let blake3 = Digest::try_from(part.digest).map_err(anyhow::Error::msg)?;
            Ok(PartRecord { index: part.index, bytes: part.bytes, blake3 })
        };
        let manifest = Manifest {
            run: RunId::try_from("bench".to_owned())?,
            step,
            epoch: Epoch(0),
            term: Term(1),
            generation: Generation(1),
            sections: self.layout.sections().to_vec(),
            part_bytes: self.layout.part_bytes(),
            parts: parts.into_iter().map(record).collect::<Result<_>>()?,
            state_sha256: None,
            recipe: String::new(),
            fingerprint: std::collections::BTreeMap::new(),
            software: "percheron bench".to_owned(),
            created: Timestamp(step.0),
            nonce: std::process::id().to_string(),
        };
        checkpoint::commit(&self.store, &manifest).await?;
        let keep = Retention { newest: 2, every_steps: 0, best: false };
        for old in keep.prunable(&checkpoint::committed_steps(&self.store).await?, &[]) {
            checkpoint::prune(&self.store, old).await?;
        }
        Ok(())
    }

    fn report(&self, seen: Seen) -> Report {
        let Options { workers, rounds, steps, every, .. } = *self.options;
        let middle = |blocks: &[Block], of: fn(&Block) -> f64| {
            quantile(blocks.iter().map(of).collect(), 0.5)
        };
        let (plain, saving) = (&seen.plain, &seen.saving);
        let overhead = |of: fn(&Block) -> f64| {
            let step = middle(plain, of) / f64::from(steps);
            (middle(saving, of) - middle(plain, of)) / (step * f64::from(every))
        };
        let state_mb = self.layout.total_bytes() as f64 / 1e6;
        Report(vec![
            ("state_mb", state_mb),
            ("workers", f64::from(workers)),
            ("checkpoints", f64::from(rounds)),
            ("stall_p50_ms", quantile(seen.stalls_ms.clone(), 0.5)),
            ("stall_p99_ms", quantile(seen.stalls_ms, 0.99)),
            ("upload_mb_s", state_mb / quantile(seen.uploads_s, 0.5)),
            ("step_ms", middle(plain, |block| block.wall) / f64::from(steps) * 1e3),
            ("steps_between", f64::from(every)),
            ("step_overhead", overhead(|block| block.wall)),
            ("step_overhead_cpu", overhead(|block| block.cpu)),
            ("peak_rss_mb", peak_rss_mb()),
        ])
    }
}

fn saved(notice: Notice) -> Result<Vec<Part>> {
    let Notice::ShareSaved { outcome, .. } = notice else {
        bail!("an upload ends with {notice:?}");
    };
    Ok(outcome.map_err(anyhow::Error::msg)?.parts)
}

/// The value that `fraction` of the values do not exceed.
fn quantile(mut values: Vec<f64>, fraction: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let place = (values.len() as f64 * fraction).ceil();
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it is a place")]
    let place = (place as usize).clamp(1, values.len());
    values[place - 1]
}

impl Worker {
    fn new(rank: Rank, architecture: &Architecture, options: &Options, classes: i64) -> Self {
        let mut state = TrainState::empty(architecture, AdamWConfig::default(), 1, Device::Cpu);
        state.initialize(0);
        let params = i64::try_from(state.layout().param_len()).expect("it is in memory");
        let gradients = Tensor::zeros([params], (Kind::Float, Device::Cpu));
        let made = made(options.batch, options.size, classes, Device::Cpu);
        let (images, labels) = (made.images, made.labels);
        Self { rank, state, gradients, memory: ShareMemory::default(), images, labels }
    }

    /// Forward, backward and update. All workers see the same images, so their states stay the same.
    fn step(&mut self) -> Result<()> {
        let step = self.state.step().expect("it holds a state").0;
        let draws = Draws { seed: 0, step, virtual_rank: 0 };
        let exits = self.state.network().forward_train(&self.images, &draws);
        let losses = multi_exit(&exits, Targets::Labels(&self.labels), &LossConfig::default());
        drop(exits);
        self.state.network().gradients(&losses.total, &mut self.gradients)?;
        let update = Update { step, learning_rate: 1e-3, weight_decay: 0.05 };
        let buffers = self.state.buffers_tensor().copy(); // [S]
        self.state.apply(&self.gradients, &buffers, &update, 0.9999);
        Ok(())
    }
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

    #[test]
    fn a_report_has_the_names_that_scripts_rely_on_and_two_checkpoints_are_left() {
        libtorch::init(1).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let store = folder.path().to_str().unwrap();
        let model = "mobilenetV3_0x5_perceiver_t128";
        let line = ["bench", "--model", model, "--size", "32", "--workers", "2", "--rounds", "3"];
        let line = line.into_iter().chain(["--steps", "20", "--part-mib", "4", "--store", store]);
        let options = Line::parse_from(line).options;
        let json = run(&options).unwrap().json();
        for name in ["stall_p50_ms", "stall_p99_ms", "upload_mb_s", "step_overhead"] {
            assert!(json.contains(&format!("\"{name}\":")), "{json}");
        }
        let runtime = Runtime::new().unwrap();
        let store = Store::open(store).unwrap();
        let kept = runtime.block_on(checkpoint::committed_steps(&store)).unwrap();
        assert_eq!(kept, [Step(140), Step(100)], "the states after three blocks and four");
        for step in kept {
            let opened = runtime.block_on(checkpoint::Checkpoint::open(&store, step)).unwrap();
            runtime.block_on(opened.verify()).unwrap();
        }
    }

    #[test]
    fn quantiles_are_values_that_were_seen() {
        let values: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(quantile(values.clone(), 0.5), 50.0);
        assert_eq!(quantile(values, 0.99), 99.0);
        assert_eq!(quantile(vec![3.0], 0.99), 3.0);
    }
}
