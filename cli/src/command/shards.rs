//! `percheron shards`: faces of the `shards` library.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use ::shards::{
    Dataset, OpenError, PackOptions, VerifyError, pack, pack::OnCorrupt, verify,
    verify::VerifyReport,
};
use anyhow::{Result, bail};
use clap::{Args, Subcommand};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

use crate::print;

/// The splits that are looked for if none is named.
const USUAL_SPLITS: [&str; 2] = ["train", "val"];

/// `percheron shards …`.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Pack images, a folder a class or tars of them, as a split of a dataset.
    Pack(Pack),
    /// Read every byte of a dataset and check it.
    Verify(Location),
    /// Show what a dataset holds.
    Inspect(Location),
}

#[derive(Debug, Args)]
pub(crate) struct Pack {
    /// A folder of class folders with .jpg, .jpeg and .png files; or WebDataset's or ImageNet's tars: one,
    /// or a folder of them.
    #[arg(value_name = "SRC")]
    source: PathBuf,
    /// The folder of the dataset; made if it is not there. A split that is there is not overwritten.
    #[arg(long, value_name = "DST")]
    out: String,
    /// Name of the split: letters, digits, '-' and '_'.
    #[arg(long, default_value = "train")]
    split: String,
    /// Seed of the order in which the images are packed.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Leave corrupt files out and name them in the manifest, instead of stopping at the first.
    #[arg(long)]
    skip_corrupt: bool,
    /// What the manifest says was packed [default: the name of SRC].
    #[arg(long, value_name = "TEXT")]
    provenance: Option<String>,
    /// Who is to be named when the data is used.
    #[arg(long, value_name = "TEXT")]
    attribution: Option<String>,
    /// Terms under which the data may be used.
    #[arg(long, value_name = "TEXT")]
    licence: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Location {
    /// The folder of the dataset, or `builtin:digits`.
    #[arg(value_name = "LOCATION")]
    location: String,
    /// Only this split; may be repeated [default: those of train and val that are there].
    #[arg(long, value_name = "NAME")]
    split: Vec<String>,
}

pub(crate) fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Pack(arguments) => run_pack(arguments)?,
        Command::Verify(location) => {
            for split in location.splits()? {
                run_verify(&location.location, &split)?;
            }
        }
        Command::Inspect(location) => {
            for split in location.splits()? {
                inspect(&Dataset::open(&location.location, &split)?);
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

impl Location {
    fn splits(&self) -> Result<Vec<String>> {
        if !self.split.is_empty() {
            return Ok(self.split.clone());
        }
        let mut found = Vec::new();
        for split in USUAL_SPLITS {
            match Dataset::open(&self.location, split) {
                Err(OpenError::NoSplit { .. }) => {}
                Err(error) => return Err(error.into()),
                Ok(_) => found.push(split.to_owned()),
            }
        }
        if found.is_empty() {
            let names = USUAL_SPLITS.join(" nor ");
            bail!("{} has neither {names}: name its split with --split", self.location);
        }
        Ok(found)
    }
}

fn run_pack(arguments: Pack) -> Result<()> {
    let options = PackOptions {
        split: arguments.split,
        seed: arguments.seed,
        on_corrupt: if arguments.skip_corrupt { OnCorrupt::Skip } else { OnCorrupt::Fail },
        source: arguments.provenance,
        attribution: arguments.attribution,
        licence: arguments.licence,
    };
    let bar = bar("files");
    let packed = pack(&arguments.source, &arguments.out, &options, &mut |progress| {
        bar.set_length(progress.files_total);
        bar.set_position(progress.files);
        bar.set_message(HumanBytes(progress.bytes).to_string());
    });
    bar.finish_and_clear();
    let manifest = packed?;
    print::out(&format!(
        "packed split {} at {}: {} samples of {} classes in {} shards; {} converted from PNG, {} \
         left out",
        manifest.split,
        arguments.out,
        print::grouped(manifest.samples),
        manifest.classes.len(),
        manifest.shards.len(),
        manifest.provenance.converted,
        manifest.provenance.skipped.len(),
    ));
    Ok(())
}

fn run_verify(location: &str, split: &str) -> Result<(), VerifyError> {
    let bar = bar("samples");
    bar.set_length(Dataset::open(location, split)?.len());
    let verified = verify(location, split, &mut |report| {
        bar.set_position(report.samples);
        bar.set_message(HumanBytes(report.bytes).to_string());
    });
    bar.finish_and_clear();
    let VerifyReport { shards, samples, bytes } = verified?;
    print::out(&format!(
        "split {split} at {location} is intact: {} samples in {shards} shards, {}",
        print::grouped(samples),
        HumanBytes(bytes)
    ));
    Ok(())
}

/// A bar on the standard error; nothing is drawn where that is no terminal.
fn bar(unit: &str) -> ProgressBar {
    let template = format!("{{bar:40}} {{pos}}/{{len}} {unit}, {{msg}}, {{eta}} left");
    let style = ProgressStyle::with_template(&template).expect("the template is fixed");
    let bar = ProgressBar::no_length().with_style(style);
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

fn inspect(dataset: &Dataset) {
    let manifest = dataset.manifest();
    let archives = dataset.indexes().iter().map(|index| index.tar_length).sum();
    let records = || dataset.indexes().iter().flat_map(|index| &index.records);
    let images: u64 = records().map(|record| u64::from(record.length)).sum();
    let side = |side: fn(u16, u16) -> u16| {
        let sides = records().map(|record| side(record.width, record.height));
        let (least, most) = (sides.clone().min().unwrap_or(0), sides.max().unwrap_or(0));
        if least == most { format!("{least} px") } else { format!("{least} to {most} px") }
    };
    let provenance = &manifest.provenance;
    print::out(&format!("split {}", manifest.split));
    let row = |name: &str, value: String| print::out(&format!("  {name:<12} {value}"));
    row("samples", print::grouped(manifest.samples));
    row("classes", format!("{} ({})", manifest.classes.len(), some_of(&manifest.classes)));
    row("shards", format!("{}, {}", manifest.shards.len(), HumanBytes(archives)));
    row("images", format!("{} on average", HumanBytes(images / manifest.samples.max(1))));
    row("short side", side(u16::min));
    row("long side", side(u16::max));
    row("source", format!("{}, packed with seed {}", provenance.source, provenance.seed));
    row("converted", format!("{} images from PNG", provenance.converted));
    if !provenance.skipped.is_empty() {
        row("left out", format!("{} corrupt files", provenance.skipped.len()));
    }
    if let Some(attribution) = &provenance.attribution {
        row("attribution", attribution.clone());
    }
    if let Some(licence) = &provenance.licence {
        row("licence", licence.clone());
    }
}

fn some_of(names: &[String]) -> String {
    const SHOWN_MAX: usize = 10;
    let shown = names.iter().take(SHOWN_MAX).cloned().collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN_MAX { format!("{shown}, …") } else { shown }
}
