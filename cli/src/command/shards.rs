//! `percheron shards`: faces of the `shards` library.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use ::shards::{
    Dataset, Manifest, OpenError, PackOptions, VerifyError, index_tars, pack, pack::OnCorrupt,
    pack::PackProgress, stats, unpack, verify, verify::VerifyReport,
};
use anyhow::{Result, bail};
use clap::{Args, Subcommand};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

use crate::print;

mod describe;

/// The splits that are looked for if none is named.
const USUAL_SPLITS: [&str; 2] = ["train", "val"];

/// `percheron shards …`.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Pack images, a folder a class or tars of them, as a split of a dataset.
    Pack(Pack),
    /// Read every byte of a dataset and check it.
    Verify(Location),
    /// Show what a dataset is.
    Inspect(Location),
    /// Show what a dataset holds: sizes, kinds of images, samples of each class.
    Stats(Stats),
    /// Make WebDataset tars a dataset where they lie: an index beside each, and a manifest.
    Index(Index),
    /// Write the images of a dataset to folders, one a class.
    Unpack(Unpack),
}

/// What the manifest says about where the images come from.
#[derive(Debug, Args)]
pub(crate) struct Provenance {
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
pub(crate) struct Pack {
    /// A folder of class folders with .jpg, .jpeg and .png files; or WebDataset's or ImageNet's tars: one,
    /// or a folder of them. Also s3://BUCKET/PREFIX of either.
    #[arg(value_name = "SRC")]
    source: PathBuf,
    /// The folder of the dataset, made if it is not there, or s3://BUCKET/PREFIX. A split that is there is not
    /// overwritten.
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
    #[command(flatten)]
    provenance: Provenance,
}

#[derive(Debug, Args)]
pub(crate) struct Index {
    /// The folder of the tars, or s3://BUCKET/PREFIX: KEY.jpg with KEY.cls, and if there is one a classes.txt with a name a line.
    #[arg(value_name = "DIR")]
    folder: PathBuf,
    /// Name of the split: letters, digits, '-' and '_'.
    #[arg(long, default_value = "train")]
    split: String,
    #[command(flatten)]
    provenance: Provenance,
}

#[derive(Debug, Args)]
pub(crate) struct Unpack {
    #[command(flatten)]
    location: Location,
    /// The folder to write to: the images of a split go to DIR/SPLIT/CLASS.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct Stats {
    #[command(flatten)]
    location: Location,
    /// One JSON object a split and nothing else.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Location {
    /// The folder of the dataset, s3://BUCKET/PREFIX, or `builtin:digits`.
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
                describe::inspect(&Dataset::open(&location.location, &split)?);
            }
        }
        Command::Stats(Stats { location, json }) => {
            for split in location.splits()? {
                let found = stats(&location.location, &split)?;
                if json {
                    print::out(&serde_json::json!({ "split": split, "stats": found }).to_string());
                } else {
                    describe::stats(&split, &found);
                }
            }
        }
        Command::Index(arguments) => run_index(arguments)?,
        Command::Unpack(Unpack { location, out }) => {
            for split in location.splits()? {
                run_unpack(&location.location, &split, &out.join(&split))?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

impl Provenance {
    fn options(self, split: String) -> PackOptions {
        let Self { provenance: source, attribution, licence } = self;
        PackOptions { split, source, attribution, licence, ..PackOptions::default() }
    }
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
    let on_corrupt = if arguments.skip_corrupt { OnCorrupt::Skip } else { OnCorrupt::Fail };
    let named = arguments.provenance.options(arguments.split);
    let options = PackOptions { seed: arguments.seed, on_corrupt, ..named };
    let bar = bar("files");
    let packed = pack(&arguments.source, &arguments.out, &options, &mut |at| advance(&bar, at));
    bar.finish_and_clear();
    let manifest = packed?;
    print::out(&format!(
        "packed split {} at {}: {}; {} converted, {} left out",
        manifest.split,
        arguments.out,
        in_numbers(&manifest),
        manifest.provenance.converted,
        manifest.provenance.skipped.len(),
    ));
    odd_images(&manifest).iter().for_each(|note| print::err(note));
    Ok(())
}

/// What people may want to know of the images of a split that was just packed, a line each.
pub(super) fn odd_images(manifest: &Manifest) -> Vec<String> {
    let (split, provenance) = (&manifest.split, &manifest.provenance);
    let line = |count: u64, what: &str| {
        (count > 0)
            .then(|| format!("note: {} images of split {split} {what}", print::grouped(count)))
    };
    let cmyk = line(provenance.cmyk, "are CMYK: they are kept, and shown as Pillow converts them");
    let deep = line(
        provenance.deep,
        "have 16 bits a channel: the upper eight are kept, the lower dropped",
    );
    cmyk.into_iter().chain(deep).collect()
}

fn run_index(arguments: Index) -> Result<()> {
    let options = arguments.provenance.options(arguments.split);
    let bar = bar("files");
    let indexed = index_tars(&arguments.folder, &options, &mut |at| advance(&bar, at));
    bar.finish_and_clear();
    let manifest = indexed?;
    let (split, folder) = (&manifest.split, arguments.folder.display());
    print::out(&format!("indexed split {split} at {folder}: {}", in_numbers(&manifest)));
    Ok(())
}

fn run_unpack(location: &str, split: &str, out: &Path) -> Result<()> {
    let bar = bar("samples");
    bar.set_length(Dataset::open(location, split)?.len());
    let unpacked = unpack(location, split, out, &mut |samples| bar.set_position(samples));
    bar.finish_and_clear();
    let samples = print::grouped(unpacked?);
    print::out(&format!("unpacked split {split} to {}: {samples} samples", out.display()));
    Ok(())
}

fn advance(bar: &ProgressBar, progress: PackProgress) {
    bar.set_length(progress.files_total);
    bar.set_position(progress.files);
    bar.set_message(HumanBytes(progress.bytes).to_string());
}

fn in_numbers(manifest: &Manifest) -> String {
    let (samples, classes) = (print::grouped(manifest.samples), manifest.classes.len());
    format!("{samples} samples of {classes} classes in {} shards", manifest.shards.len())
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
