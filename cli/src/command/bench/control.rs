//! `percheron bench control`: how fast a coordinator makes a new generation of thousands of workers known,
//! and what it costs.
//!
//! The coordinator is the real one, a process of its own with a log on disk. The workers are sessions of
//! this process, each with a connection of its own, that say what a worker says and do not train.

mod fleet;
mod office;

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use serde_json::json;

use self::{
    fleet::{Fleet, Measured},
    office::Office,
};
use crate::print;

#[derive(Debug, Args)]
pub(crate) struct Control {
    /// Workers of a generation.
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(2..=16_384))]
    workers: u32,
    /// Generations to measure: a worker is lost, another joins, and so on.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(2..))]
    rounds: u32,
    /// For how long nothing happens while processor time is counted, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..))]
    steady: u64,
    /// Time between two steps of the run, in milliseconds; each is a record of the log.
    #[arg(long, value_name = "MS", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..))]
    step: u64,
    /// One JSON object and nothing else.
    #[arg(long)]
    json: bool,
}

/// What it came to.
#[derive(Debug)]
struct Figures {
    workers: u32,
    /// Until all were told and the generation had formed, each in milliseconds, ascending.
    losses: Vec<f64>,
    joins: Vec<f64>,
    /// Until the last worker was told, of both kinds, ascending.
    told: Vec<f64>,
    /// Bytes of the orders of a generation, to all workers together, the median.
    generation_bytes: u64,
    first_generation_ms: f64,
    first_generation_bytes: u64,
    cpu_cores: f64,
    heard_bytes_per_s: f64,
    rss_mb: f64,
    rss_mb_max: f64,
    reports_per_s: f64,
}

pub(crate) async fn run(control: Control) -> Result<ExitCode> {
    let figures = measure(&control).await?;
    if control.json {
        print::out(&as_json(&figures).to_string());
    } else {
        lines(&figures).iter().for_each(|line| print::out(line));
    }
    Ok(ExitCode::SUCCESS)
}

async fn measure(control: &Control) -> Result<Figures> {
    office::allow_files(u64::from(control.workers) + 256)?;
    let office = Office::open(control.workers).await?;
    let step = Duration::from_millis(control.step);
    let (mut fleet, first) = Fleet::gather(office.door()?, control.workers, step).await?;
    let (mut losses, mut joins, mut told, mut bytes) = (vec![], vec![], vec![], vec![]);
    for round in 0..control.rounds {
        let measured = if round.is_multiple_of(2) {
            fleet.lose().await.map(|measured| (measured, &mut losses))
        } else {
            fleet.join().await.map(|measured| (measured, &mut joins))
        };
        let (measured, of_kind) =
            measured.with_context(|| format!("generation {} of the benchmark", round + 2))?;
        of_kind.push(millis(measured.formed));
        told.push(millis(measured.told));
        bytes.push(measured.bytes);
    }
    for figures in [&mut losses, &mut joins, &mut told] {
        figures.sort_by(f64::total_cmp);
    }
    bytes.sort_unstable();
    let (before, said, began) = (office.cpu_seconds()?, fleet.said(), Instant::now());
    tokio::time::sleep(Duration::from_secs(control.steady)).await;
    let wall = began.elapsed().as_secs_f64();
    let cpu_cores = (office.cpu_seconds()? - before) / wall;
    let (reports, heard) = fleet.said().since(said);
    let alive = fleet.alive();
    ensure!(alive == control.workers, "{alive} of {} workers are left", control.workers);
    let Measured { formed, bytes: first_bytes, .. } = first;
    Ok(Figures {
        workers: control.workers,
        losses,
        joins,
        told,
        generation_bytes: bytes.get(bytes.len() / 2).copied().unwrap_or(0),
        first_generation_ms: millis(formed),
        first_generation_bytes: first_bytes,
        cpu_cores,
        heard_bytes_per_s: heard / wall,
        rss_mb: office.resident_mb("VmRSS")?,
        rss_mb_max: office.resident_mb("VmHWM")?,
        reports_per_s: reports / wall,
    })
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// The smallest of ascending figures that so many of a hundred do not exceed (nearest rank).
fn percentile(ascending: &[f64], hundredths: usize) -> f64 {
    let rank = (ascending.len() * hundredths).div_ceil(100).max(1);
    ascending.get(rank - 1).copied().unwrap_or(f64::NAN)
}

fn of_all(figures: &Figures) -> Vec<f64> {
    let mut all = [figures.losses.as_slice(), &figures.joins].concat();
    all.sort_by(f64::total_cmp);
    all
}

fn as_json(figures: &Figures) -> serde_json::Value {
    let all = of_all(figures);
    json!({
        "workers": figures.workers,
        "generations": all.len(),
        "generation_p50_ms": percentile(&all, 50),
        "generation_p99_ms": percentile(&all, 99),
        "loss_p50_ms": percentile(&figures.losses, 50),
        "loss_p99_ms": percentile(&figures.losses, 99),
        "join_p50_ms": percentile(&figures.joins, 50),
        "join_p99_ms": percentile(&figures.joins, 99),
        "told_p50_ms": percentile(&figures.told, 50),
        "told_p99_ms": percentile(&figures.told, 99),
        "generation_bytes": figures.generation_bytes,
        "first_generation_ms": figures.first_generation_ms,
        "first_generation_bytes": figures.first_generation_bytes,
        "cpu_cores": figures.cpu_cores,
        "reports_per_s": figures.reports_per_s,
        "heard_bytes_per_s": figures.heard_bytes_per_s,
        "rss_mb": figures.rss_mb,
        "rss_mb_max": figures.rss_mb_max,
    })
}

fn lines(figures: &Figures) -> Vec<String> {
    let all = of_all(figures);
    let both = |name: &str, of: &[f64]| {
        let (half, most) = (percentile(of, 50), percentile(of, 99));
        format!("{name:<28} p50 {half:.1} ms, p99 {most:.1} ms")
    };
    vec![
        both("new generation, all formed", &all),
        both("  of them after a loss", &figures.losses),
        both("  of them after a join", &figures.joins),
        both("  until the last was told", &figures.told),
        format!(
            "orders of a generation       {:.1} KB to all; of the first {:.1} KB in {:.0} ms",
            figures.generation_bytes as f64 / 1e3,
            figures.first_generation_bytes as f64 / 1e3,
            figures.first_generation_ms
        ),
        format!(
            "coordinator, steady          {:.3} cores for {:.0} reports and {:.1} KB a second",
            figures.cpu_cores,
            figures.reports_per_s,
            figures.heard_bytes_per_s / 1e3
        ),
        format!(
            "resident memory              {:.0} MB, at most {:.0} MB",
            figures.rss_mb, figures.rss_mb_max
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_one_of_the_figures() {
        let figures: Vec<_> = (1..=50).map(f64::from).collect();
        assert_eq!(percentile(&figures, 50), 25.0);
        assert_eq!(percentile(&figures, 99), 50.0);
        assert_eq!(percentile(&[7.0], 50), 7.0);
        assert!(percentile(&[], 99).is_nan());
    }
}
