//! `percheron bench restart`: how long a coordinator takes to lead a run again whose log is as long as that of
//! hundreds of epochs.
//!
//! The log is written first, with what a run of so many steps leaves: a record a step, an evaluation and a
//! checkpoint an epoch. Then a coordinator begins, again and again, as after a crash.

use std::{path::Path, time::Duration, time::Instant};

use anyhow::{Context as _, Result, ensure};
use checkpoint::{Retention, Store};
use clap::Args;
use cluster::{
    Fingerprint, Generation, Member, Record, RunConfig, RunId, Step, StepMetrics, Term, Timeouts,
    Timestamp, WorkerId,
};
use coordinator::{Config, EventLog, Leader, Lease, LogAt, append_shared};
use nix::sys::resource::{UsageWho, getrusage};
use serde_json::json;
use tokio::runtime::Runtime;

use crate::print;

/// Steps of an epoch of ImageNet in global batches of 1,024.
const STEPS_PER_EPOCH: u64 = 1251;
const WORKERS: u32 = 8;
/// Records that are synced together while the log is written.
const TOGETHER: usize = 4096;
const MAX_RECOVERY: Duration = Duration::from_secs(10);

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Steps that the run has made [default: those of 300 epochs of ImageNet in batches of 1,024].
    #[arg(long, default_value_t = 300 * STEPS_PER_EPOCH, value_parser = clap::value_parser!(u64).range(1..))]
    steps: u64,
    /// How often a coordinator begins.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Keep the log in a store, s3://BUCKET/PREFIX or a folder that holds no log yet, instead of a
    /// coordinator's own file.
    #[arg(long, value_name = "LOCATION")]
    log: Option<String>,
    /// One JSON object and nothing else.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    Runtime::new().context("cannot start the runtime")?.block_on(measure(arguments))
}

async fn measure(arguments: &Arguments) -> Result<()> {
    let folder = tempfile::tempdir().context("cannot make a folder for the run")?;
    let own = folder.path().join("log.redb");
    let records = history(arguments.steps)?;
    let log = match &arguments.log {
        None => {
            let mut log = EventLog::open(&own)?;
            for together in records.chunks(TOGETHER) {
                log.append(Timestamp(log.last()), together)?;
            }
            LogAt::File(own)
        }
        Some(location) => {
            let store = Store::create(location).context("--log")?;
            ensure!(
                coordinator::read_shared(&store, 1).await?.is_empty(),
                "--log {location}: there is a log"
            );
            append_shared(&store, Timestamp(1), &records).await?;
            let lease = Lease {
                holder: "bench".to_owned(), // The same each time: it need not wait for itself.
                lasts: Duration::from_secs(3),
                standby: false,
            };
            LogAt::Shared { location: location.clone(), lease }
        }
    };
    let count = records.len();
    drop(records);
    let mut begun = Vec::new();
    for _ in 0..arguments.rounds {
        let config = config(log.clone(), folder.path())?;
        let began = Instant::now();
        let leader = Leader::begin(config).await?;
        begun.push(began.elapsed().as_secs_f64() * 1e3);
        drop(leader);
    }
    begun.sort_by(f64::total_cmp);
    let middle = begun.get(begun.len() / 2).copied().context("--rounds")?;
    let most = begun.last().copied().context("--rounds")?;
    let usage = getrusage(UsageWho::RUSAGE_SELF).context("the memory of this process")?;
    let rss_mb = usage.max_rss() as f64 * 1024.0 / 1e6;
    if arguments.json {
        let figures = json!({
            "steps": arguments.steps, "records": count, "rounds": begun.len(), "log": log.to_string(),
            "restart_p50_ms": middle, "restart_max_ms": most, "rss_mb_max": rss_mb,
        });
        print::out(&figures.to_string());
    } else {
        print::out(&format!(
            "{count} records of {} steps: a coordinator leads again after {middle:.0} ms (median of {}; most \
             {most:.0} ms); at most {rss_mb:.0} MB",
            arguments.steps,
            begun.len()
        ));
    }
    Ok(())
}

fn plan(steps: u64) -> Result<RunConfig> {
    Ok(RunConfig {
        run: RunId::try_from("restart".to_owned())?,
        virtual_ranks: WORKERS,
        steps_total: Step(steps + STEPS_PER_EPOCH), // It is not over.
        steps_per_epoch: STEPS_PER_EPOCH,
        evaluate_every_epochs: 1,
        checkpoint_every_epochs: 1,
        checkpoint_every_steps: 0,
        checkpoint_every: Duration::ZERO,
        workers_expected: WORKERS,
        workers_min: 1,
        workers_max: WORKERS,
        timeouts: Timeouts::derived_from(MAX_RECOVERY)?,
    })
}

fn config(log: LogAt, folder: &Path) -> Result<Config> {
    Ok(Config {
        run: plan(0)?,
        recipe: String::new(),
        token: "open sesame".to_owned(),
        log,
        checkpoints: folder.join("checkpoints").display().to_string(),
        keep: Retention { newest: 2, every_steps: 0, best: false },
        software: "percheron bench".to_owned(),
    })
}

/// What the log of an undisturbed run holds.
fn history(steps: u64) -> Result<Vec<Record>> {
    let member = |rank: u32| Member {
        worker: WorkerId(u64::from(rank) + 1),
        name: format!("worker-{rank}"),
        address: format!("10.0.0.{}:7071", rank + 1),
        block: rank..rank + 1,
    };
    let members: Vec<_> = (0..WORKERS).map(member).collect();
    let generation = Generation(1);
    let mut records = vec![
        Record::RunCreated { config: Box::new(plan(steps)?) },
        Record::TermStarted { term: Term(1) },
        Record::FingerprintFixed { fingerprint: Fingerprint::default() },
    ];
    records.extend(members.iter().map(|Member { worker, name, address, .. }| {
        let (name, address) = (name.clone(), address.clone());
        Record::WorkerJoined { worker: *worker, name, address }
    }));
    records.push(Record::GenerationOpened {
        generation,
        members,
        planned: true,
        last: false,
        reason: "all are here".to_owned(),
    });
    records.push(Record::GenerationFormed {
        generation,
        step: Step(0),
        digest: "00".repeat(32),
        repeated: 0,
        stopped_at: None,
    });
    for step in (1..=steps).map(Step) {
        let metrics = StepMetrics {
            loss: 6.907_755 / (step.0 as f32).sqrt(),
            gradient_norm: 1.234_567,
            learning_rate: 1e-3 / step.0 as f64,
            images: 1024,
            step_ms: 191.7,
            load_ms: 0.03,
            compute_ms: 150.25,
            reduce_ms: 30.5,
            update_ms: 5.75,
        };
        let applied_at = Some(Timestamp(step.0));
        records.push(Record::StepAdopted { step, generation, metrics: Some(metrics), applied_at });
        if step.0.is_multiple_of(STEPS_PER_EPOCH) {
            records.push(Record::CheckpointCommitted { step });
        }
    }
    Ok(records)
}
