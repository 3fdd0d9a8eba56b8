//! `percheron audit`: proves from its log that a run did what its recipe says, or names the place where
//! it did not.

mod tamper;

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Result};
use clap::Args;
use cluster::{
    Step, VirtualRank,
    audit::{EpochProof, Samples, audit},
};
use shards::{BatchPlan, Dataset};

use crate::{history::Source, print};

/// So many of the samples that an epoch leaves out are shown.
const SHOWN_MAX: usize = 8;

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The folder of the run, or the URL of its event log.
    #[arg(value_name = "RUN_DIR|URL")]
    run_dir: PathBuf,
    /// Afterwards, falsify a copy of the records in memory at so many places, in each way that there is, and
    /// see that the audit names each of them.
    #[arg(long, value_name = "PLACES")]
    tamper: Option<usize>,
}

/// The order in which the recipe visits the data.
struct Plan {
    batches: BatchPlan,
    samples: u64,
    virtual_ranks: u32,
}

impl Samples for Plan {
    fn count(&self) -> u64 {
        self.samples
    }

    fn global_batch(&self) -> u64 {
        self.batches.global_batch()
    }

    fn steps_per_epoch(&self) -> u64 {
        self.batches.steps_per_epoch()
    }

    fn consumed_from(&self, step: Step, ids: &mut Vec<u64>) {
        let (epoch, place) = self.batches.position(step);
        for rank in (0..self.virtual_ranks).map(VirtualRank) {
            ids.extend(self.batches.micro_batch(epoch, place, rank));
        }
    }
}

pub(crate) async fn run(arguments: Arguments) -> Result<ExitCode> {
    let source = Source::of(&arguments.run_dir).await?;
    let recipe = source.recipe()?;
    let place = source.location();
    let samples = Dataset::open(&recipe.data.location, &recipe.data.train)
        .context("key \"data.train\"")?
        .len();
    let in_recipe = || format!("the recipe in {place} with {samples} training samples");
    let planned = recipe.plan(source.run()?, samples, 1).with_context(in_recipe)?;
    let (virtual_ranks, batch) = (recipe.virtual_ranks, recipe.batch_size);
    let batches = BatchPlan::new(samples, virtual_ranks, batch, recipe.seed);
    let batches = batches.with_context(in_recipe)?;
    let entries = source.read(1).await?.entries;
    let records: Vec<_> =
        entries.iter().map(|entry| (entry.sequence, entry.at, &entry.record)).collect();
    let plan = Plan { batches, samples, virtual_ranks };
    let proof = audit(&planned, &plan, records.iter().copied())
        .with_context(|| format!("the log of run {place} contradicts itself or its recipe"))?;
    proof.epochs.iter().for_each(|epoch| print::out(&line(epoch)));
    if let Some(places) = arguments.tamper {
        let noticed = tamper::tamper(&planned, &plan, &records, places)?;
        print::out(&format!(
            "falsified in memory, each named in its place: {} records taken away, {} doubled, {} changed, {} \
             samples exchanged",
            noticed.taken_away, noticed.doubled, noticed.changed, noticed.samples
        ));
    }
    print::out(&proof.to_string());
    Ok(ExitCode::SUCCESS)
}

fn line(proof: &EpochProof) -> String {
    let EpochProof { epoch, steps, consumed, is_complete, left_out } = proof;
    let mut line = format!("epoch {epoch}: {steps} steps, {consumed} samples, each once");
    match left_out.as_slice() {
        _ if !is_complete => line.push_str("; not over yet"),
        [] => line.push_str("; none left out"),
        ids => {
            let shown: Vec<_> = ids.iter().take(SHOWN_MAX).map(ToString::to_string).collect();
            let more = if ids.len() > SHOWN_MAX { ", ..." } else { "" };
            let (count, shown) = (ids.len(), shown.join(", "));
            line.push_str(&format!("; {count} left out by drop_last: {shown}{more}"));
        }
    }
    line
}
