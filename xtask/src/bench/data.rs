//! `cargo xtask bench data`: how many images a core prepares, beside a Python pipeline.
//!
//! Both prepare the same files, held in memory: decode, random resized crop to 224, flip and f32
//! normalisation (`crop`), and the same with RandAugment and random erasing (`full`). Passes over the
//! files alternate between the two, so that whatever else the machine does slows both alike; what is
//! compared is the median of the CPU seconds of a pass.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, ensure};

use super::instructions;
use crate::setup;
use crate::workspace::Workspace;

/// The pipeline of Python, by the versions whose pixels ours are: Pillow 9.5 resizes as the reference.
const TIMM: [&str; 5] =
    ["numpy==1.26.4", "pillow==9.5.0", "torch==2.11.0", "torchvision==0.26.0", "timm==1.0.31"];
const TIMM_SCRIPT: &str = include_str!("timm_pillow.py");

const DALI: [&str; 2] = ["nvidia-dali-cuda130==2.4.0", "numpy==2.1.3"];
const DALI_SCRIPT: &str = include_str!("dali_cpu.py");

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Folder of .jpg files.
    #[arg(long, value_name = "DIR")]
    images: PathBuf,
    /// What to compare with.
    #[arg(long, value_enum)]
    against: Option<Peer>,
    /// Passes over the files of each program; the median counts.
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..))]
    passes: u32,
    /// A Python that has the peer's packages; one is set up in the cache if not given.
    #[arg(long, value_name = "PROGRAM")]
    python: Option<PathBuf>,
    /// Count the instructions an image takes too (recipe `crop`), with valgrind's callgrind: unlike
    /// times they are the same on a busy machine.
    #[arg(long)]
    instructions: bool,
    /// One JSON object and nothing else.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Peer {
    /// timm on Pillow 9.5.
    Timm,
    /// NVIDIA DALI on the CPU, with its cubic filter; it has no counterpart of the recipe `full`.
    Dali,
}

impl Peer {
    fn script(self) -> &'static str {
        match self {
            Self::Timm => TIMM_SCRIPT,
            Self::Dali => DALI_SCRIPT,
        }
    }

    /// The name of its environment, its packages, and a program that ends well where they are.
    fn packages(self) -> (&'static str, &'static [&'static str], &'static str) {
        match self {
            Self::Timm => (
                "bench-timm",
                &TIMM,
                "import timm, torchvision, PIL; assert PIL.__version__ == '9.5.0'",
            ),
            Self::Dali => ("bench-dali", &DALI, "import nvidia.dali.fn"),
        }
    }

    fn knows(self, recipe: &str) -> bool {
        match self {
            Self::Timm => true,
            Self::Dali => recipe == "crop",
        }
    }
}

/// Images a core and second.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Speeds {
    ours: f64,
    peer: Option<f64>,
}

impl Speeds {
    fn ratio(self) -> Option<f64> {
        self.peer.map(|peer| self.ours / peer)
    }
}

pub(crate) fn run(workspace: &Workspace, options: &Options) -> Result<()> {
    let images = std::path::absolute(&options.images)?;
    ensure!(images.is_dir(), "there is no folder {}", images.display());
    instructions::build(workspace)?;
    let python = match (options.against, &options.python) {
        (None, _) => None,
        (Some(peer), Some(python)) => Some((peer, python.clone())),
        (Some(peer), None) => Some((peer, prepare_python(workspace, peer)?)),
    };
    let measure = |recipe: &str| {
        let peer = python.as_ref().filter(|(peer, _)| peer.knows(recipe));
        compare(workspace, &images, recipe, peer, options.passes)
    };
    let (crop, full) = (measure("crop")?, measure("full")?);
    let instructions =
        options.instructions.then(|| instructions::count(workspace, &images)).transpose()?;
    if options.json {
        println!("{}", json(crop, full, instructions));
    } else {
        println!("{}", table(crop, full));
        if let Some(count) = instructions {
            println!("instructions an image: {:.2} million", count / 1e6);
        }
    }
    Ok(())
}

/// An environment with the peer's packages, made once.
fn prepare_python(workspace: &Workspace, peer: Peer) -> Result<PathBuf> {
    let (name, packages, test) = peer.packages();
    let wanted: Vec<_> = ["--only-binary=:all:"].iter().chain(packages).copied().collect();
    setup::python_with(workspace, name, test, &wanted)
}

fn compare(
    workspace: &Workspace,
    images: &Path,
    recipe: &str,
    peer: Option<&(Peer, PathBuf)>,
    passes: u32,
) -> Result<Speeds> {
    let mut ours = workspace.binary("examples/bench_data");
    let mut ours =
        Runner::start(ours.arg(images).args(["--recipe", recipe, "--interactive", "on"]))?;
    let mut peer = peer
        .map(|(peer, python)| {
            let mut program = workspace.command(python);
            Runner::start(program.args(["-c", peer.script()]).arg(images).arg(recipe))
        })
        .transpose()?;
    if let Some(peer) = &peer {
        ensure!(ours.images == peer.images, "{} images, the peer {}", ours.images, peer.images);
    }
    let (mut seconds, mut peer_seconds) = (Vec::new(), Vec::new());
    // The first pass of each grows buffers and caches, and does not count.
    for pass in 0..=passes {
        let second = ours.pass(pass)?;
        let peer_second = peer.as_mut().map(|peer| peer.pass(pass)).transpose()?;
        if pass > 0 {
            seconds.push(second);
            peer_seconds.extend(peer_second);
        }
    }
    let speed = |seconds: Vec<f64>| median(seconds).map(|seconds| f64::from(ours.images) / seconds);
    let ours = speed(seconds).context("there was no pass")?;
    Ok(Speeds { ours, peer: speed(peer_seconds) })
}

/// A program that answers each line with the CPU seconds of a pass.
struct Runner {
    program: Child,
    asks: ChildStdin,
    answers: BufReader<ChildStdout>,
    images: u32,
}

impl Runner {
    fn start(command: &mut Command) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        let mut program = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start `{name}`"))?;
        let asks = program.stdin.take().context("the program has an input")?;
        let answers = BufReader::new(program.stdout.take().context("the program has an output")?);
        let mut runner = Self { program, asks, answers, images: 0 };
        runner.images = runner.answer()?.parse().context("the number of images")?;
        ensure!(runner.images > 0, "the folder has no .jpg file");
        Ok(runner)
    }

    fn pass(&mut self, number: u32) -> Result<f64> {
        writeln!(self.asks, "{number}")?;
        self.answer()?.parse().context("the seconds of a pass")
    }

    fn answer(&mut self) -> Result<String> {
        let mut line = String::new();
        let bytes = self.answers.read_line(&mut line)?;
        ensure!(bytes > 0, "the program ended: {}", self.program.wait()?);
        Ok(line.trim().to_owned())
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        // It may have ended by itself, which is as good.
        drop(self.program.kill());
        drop(self.program.wait());
    }
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

fn json(crop: Speeds, full: Speeds, instructions: Option<f64>) -> String {
    serde_json::json!({
        "ratio_crop": crop.ratio(),
        "ratio_full": full.ratio(),
        "ours_img_per_core_s": full.ours,
        "peer_img_per_core_s": full.peer,
        "ours_crop_img_per_core_s": crop.ours,
        "peer_crop_img_per_core_s": crop.peer,
        "instructions_per_image": instructions,
    })
    .to_string()
}

fn table(crop: Speeds, full: Speeds) -> String {
    let mut lines = vec!["images a core and second    ours    peer   ratio".to_owned()];
    for (name, speeds) in [("crop, flip, normalise", crop), ("RandAugment and erasing too", full)] {
        let number = |value: Option<f64>, digits: usize| {
            value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"))
        };
        lines.push(format!(
            "{name:27} {:>5} {:>7} {:>7}",
            number(Some(speeds.ours), 0),
            number(speeds.peer, 0),
            number(speeds.ratio(), 2)
        ));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    const CROP: Speeds = Speeds { ours: 900.0, peer: Some(300.0) };

    #[test]
    fn the_figures_have_the_names_that_scripts_read() {
        let full = Speeds { ours: 800.0, peer: Some(200.0) };
        let object: serde_json::Value = serde_json::from_str(&json(CROP, full, None)).unwrap();
        assert_eq!(object["ratio_crop"], 3.0);
        assert_eq!(object["ratio_full"], 4.0);
        assert_eq!(object["ours_img_per_core_s"], 800.0);
        assert_eq!(object["peer_img_per_core_s"], 200.0);
    }

    #[test]
    fn without_a_peer_there_is_no_ratio() {
        let alone = Speeds { peer: None, ..CROP };
        let object: serde_json::Value =
            serde_json::from_str(&json(alone, alone, Some(1.0))).unwrap();
        assert!(object["ratio_crop"].is_null());
        assert_eq!(object["instructions_per_image"], 1.0);
        assert!(table(alone, CROP).contains("900       -       -"), "{}", table(alone, CROP));
    }

    #[test]
    fn one_slow_pass_does_not_count() {
        assert_eq!(median(vec![3.0, 90.0, 1.0]), Some(3.0));
        assert_eq!(median(Vec::new()), None);
    }

    #[test]
    fn a_program_answers_line_by_line_or_is_said_to_have_ended() {
        let script = "echo 2; read a; echo 0.5; read a; exit 3";
        let mut runner = Runner::start(Command::new("sh").args(["-c", script])).unwrap();
        assert_eq!(runner.images, 2);
        assert_eq!(runner.pass(0).unwrap(), 0.5);
        let error = runner.pass(1).unwrap_err().to_string();
        assert!(error.contains("the program ended: exit status: 3"), "{error}");
    }
}
