//! `percheron status`: how far a run is, from its coordinator or, if there is none, from its log.

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Result};
use checkpoint::{Store, committed_steps};
use clap::Args;
use cluster::{Outcome, Step};
use proto::v1::Liveness;
use serde::Serialize;

use crate::{
    history::{History, Source},
    print,
    up::{Report, Top1},
};

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The folder of the run, or the URL of its event log.
    #[arg(long, value_name = "DIR|URL")]
    run_dir: PathBuf,
    /// Print one line of JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Status {
    run: String,
    run_dir: String,
    /// `new`, `gathering`, `forming`, `training`, `finished` or `failed`; `stopped` without a
    /// coordinator.
    state: &'static str,
    reason: Option<String>,
    coordinator: Option<String>,
    step: u64,
    steps_total: Option<u64>,
    epoch: Option<u64>,
    generation: u64,
    repeated_steps: u64,
    members: Vec<Member>,
    evaluation: Option<Scores>,
    checkpoints: Vec<u64>,
    state_sha256: Option<String>,
}

#[derive(Debug, Serialize)]
struct Member {
    name: String,
    virtual_ranks: [u32; 2],
    phase: Option<String>,
    resident_bytes: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Scores {
    step: u64,
    top1: Top1,
    ema_top1: Top1,
}

pub(crate) async fn run(arguments: Arguments) -> Result<ExitCode> {
    let status = find(&Source::of(&arguments.run_dir).await?).await?;
    if arguments.json {
        print::out(&serde_json::to_string(&status).context("the status cannot be written")?);
    } else {
        status.show();
    }
    Ok(ExitCode::SUCCESS)
}

async fn find(source: &Source) -> Result<Status> {
    let History { entries, coordinator, liveness } = source.read(1).await?;
    let report = Report::of(&entries);
    let store = Store::open(&source.checkpoints()?)?;
    let checkpoints = committed_steps(&store).await?;
    let run = source.run()?.to_string();
    Ok(Status::of(run, source.location(), coordinator, &report, &liveness, &checkpoints))
}

impl Status {
    fn of(
        run: String,
        location: &str,
        coordinator: Option<String>,
        report: &Report,
        liveness: &Liveness,
        checkpoints: &[Step],
    ) -> Self {
        let ledger = report.ledger();
        let (mut reason, mut state_sha256) = (None, None);
        let state = match &ledger.outcome {
            Some(Outcome::Finished { state_sha256: digest, .. }) => {
                state_sha256 = Some(digest.clone());
                "finished"
            }
            Some(Outcome::Failed { reason: why }) => {
                reason = Some(why.clone());
                "failed"
            }
            None if report.last() == 0 => "new",
            None if coordinator.is_none() => "stopped",
            None if ledger.members.is_empty() || !ledger.lost.is_empty() => "gathering",
            None if ledger.formed => "training",
            None => "forming",
        };
        let members = ledger.members.iter().map(|member| {
            let said = liveness.workers.iter().find(|worker| worker.worker == member.worker.0);
            let progress = said.and_then(|said| said.progress.as_ref());
            let phase = progress.and_then(|p| proto::progress(p).ok()).map(|p| p.phase.to_string());
            Member {
                name: member.name.clone(),
                virtual_ranks: [member.block.start, member.block.end],
                phase,
                resident_bytes: progress.map(|progress| progress.resident_bytes),
            }
        });
        let step = ledger.canonical.0;
        Self {
            run,
            run_dir: location.to_owned(),
            state,
            reason,
            coordinator,
            step,
            steps_total: report.plan().map(|plan| plan.steps_total.0),
            epoch: report.plan().map(|plan| step / plan.steps_per_epoch),
            generation: ledger.generation.0,
            repeated_steps: ledger.repeated,
            members: members.collect(),
            evaluation: report.evaluation().map(|evaluation| Scores {
                step: evaluation.step.0,
                top1: Top1::of(&evaluation.weights),
                ema_top1: Top1::of(&evaluation.ema),
            }),
            checkpoints: checkpoints.iter().map(|step| step.0).collect(),
            state_sha256,
        }
    }

    fn show(&self) {
        let row = |name: &str, value: String| print::out(&format!("  {name:<12} {value}"));
        print::out(&format!("run {} in {}", self.run, self.run_dir));
        match &self.reason {
            Some(reason) => row("state", format!("{}: {reason}", self.state)),
            None => row("state", self.state.to_owned()),
        }
        let total = self.steps_total.map(|total| format!(" of {total}")).unwrap_or_default();
        let epoch = self.epoch.map(|epoch| format!(", {epoch} epochs done")).unwrap_or_default();
        row("step", format!("{}{total}{epoch}", self.step));
        row("generation", format!("{}, {} steps repeated", self.generation, self.repeated_steps));
        for Member { name, virtual_ranks: [start, end], phase, resident_bytes } in &self.members {
            let phase = phase.as_ref().map(|phase| format!(", {phase}")).unwrap_or_default();
            let memory = resident_bytes.map(|b| format!(", {} MiB", b >> 20)).unwrap_or_default();
            row("member", format!("{name}: virtual ranks {start}..{end}{phase}{memory}"));
        }
        if let Some(Scores { step, top1, ema_top1 }) = &self.evaluation {
            for (whose, Top1 { early3, att, cnn, merge }) in
                [("weights", top1), ("average", ema_top1)]
            {
                row(
                    "top-1 in %",
                    format!(
                        "{whose} at step {step}: early3 {early3:.1}, att {att:.1}, cnn {cnn:.1}, \
                         merge {merge:.1}"
                    ),
                );
            }
        }
        let kept: Vec<_> = self.checkpoints.iter().map(ToString::to_string).collect();
        row("checkpoints", if kept.is_empty() { "none".to_owned() } else { kept.join(", ") });
        if let Some(digest) = &self.state_sha256 {
            row("state sha256", digest.clone());
        }
        row("coordinator", self.coordinator.clone().unwrap_or_else(|| "none".to_owned()));
    }
}
