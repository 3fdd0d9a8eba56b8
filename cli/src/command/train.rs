//! `percheron train`: the original training script's command line, which becomes what `percheron up` does.

pub(super) mod data;
mod flags;
pub(super) mod journal;

use std::{ffi::OsString, path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use recipe::{Recipe, Schedule};

use self::{
    data::Data,
    flags::{FLAGS, Line, Means},
};
use crate::{
    command::{curves, up, worker},
    print,
    run_dir::RunDir,
    up::{Request, worker_program},
};

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The flags of the original; --help lists them.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "FLAG")]
    words: Vec<String>,
}

/// A command line in this program's own terms.
struct Plan {
    line: Line,
    recipe: Recipe,
    data: Data,
}

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    if arguments.words.iter().any(|word| word == "--help" || word == "-h") {
        help();
        return Ok(ExitCode::SUCCESS);
    }
    let line = Line::parse(&arguments.words)?;
    if line.is_on("eval") {
        return evaluate(&line);
    }
    refuse(&line)?;
    let data = data::prepare(&line, None)?;
    let recipe = resolve(&line, &data)?;
    let plan = Plan { line, recipe, data };
    plan.differences().iter().for_each(|note| print::err(&format!("note: {note}")));
    if plan.line.has("dry_run") {
        plan.show()?;
        return Ok(ExitCode::SUCCESS);
    }
    plan.train()
}

/// What cannot be done here, before anything else is.
fn refuse(line: &Line) -> Result<()> {
    let opt = line.word_or_default("opt").unwrap_or_default();
    ensure!(opt == "adamw", "--opt {opt}: only adamw is there, which all published recipes use");
    let decay = line.word_or_default("layer_decay").unwrap_or("1.0");
    ensure!(
        decay.parse() == Ok(1.0),
        "--layer_decay {decay}: it must be 1.0; the original has layer decay for ConvNeXt alone"
    );
    if let Some(file) = line.word("resume").filter(|file| !file.is_empty()) {
        bail!(
            "--resume {file}: a run goes on from its own newest checkpoint: give its folder as \
             --output_dir and leave --resume out"
        );
    }
    let start = line.word_or_default("start_epoch").unwrap_or("0");
    ensure!(
        start == "0",
        "--start_epoch {start}: a run goes on where its newest checkpoint is; leave it out"
    );
    Ok(())
}

/// The recipe that a command line says: the original's defaults or a recipe, then flags, then `--set`.
fn resolve(line: &Line, data: &Data) -> Result<Recipe> {
    let base = line.word("recipe");
    let mut sets = Vec::new();
    let mut lay = |key: &str, value: &str| sets.push(format!("{key}={value}"));
    if base.is_none() {
        ensure!(
            line.has("model"),
            "--model is not given; `percheron model list` shows what there is"
        );
        lay("name", "\"train\"");
        for flag in FLAGS {
            let words: Vec<String> = flag.default.split_whitespace().map(str::to_owned).collect();
            if let (Means::Key(key), Some(value)) = (flag.means, flag.toml(&words)) {
                lay(key, &value);
            }
        }
    }
    for (flag, words) in line.flags() {
        match (flag.means, flag.toml(words)) {
            (Means::Key("augment.aa"), None) => {} // See below: it was the default.
            (Means::Key("checkpoint.keep"), Some(count)) if count == "1" || count == "0" => {
                lay("checkpoint.keep", "2");
            }
            (Means::Key(key), Some(value)) => lay(key, &value),
            (Means::Key(_) | Means::Command | Means::Nothing(_), _) => {}
        }
    }
    of_command(line, data, base.is_none(), &mut lay);
    finetune(line, &mut lay)?;
    let no_aa = line
        .words("aa")
        .is_some_and(|words| flags::flag("aa").and_then(|aa| aa.toml(words)).is_none());
    if no_aa {
        sets.retain(|set| !set.starts_with("augment.aa="));
    }
    sets.extend(line.all("set"));
    Ok(match base {
        Some(name) => Recipe::load(name, &sets)?,
        None => Recipe::from_toml("that the flags make", "", &sets)?,
    })
}

/// The weights that the run begins from: the file, pinned by its digest, and where in it they are.
fn finetune(line: &Line, lay: &mut dyn FnMut(&str, &str)) -> Result<()> {
    let Some(file) = line.word_or_default("finetune") else { return Ok(()) };
    let path = std::path::absolute(file).with_context(|| format!("--finetune {file}"))?;
    let bytes = std::fs::read(&path).with_context(|| format!("--finetune {file}"))?;
    let path = path.to_str().with_context(|| format!("--finetune {file}: it is not UTF-8"))?;
    let text = |text: &str| toml::Value::String(text.to_owned());
    lay("finetune.file", &text(path).to_string());
    lay("finetune.sha256", &text(&shards::Sha256::of(&bytes).to_string()).to_string());
    let keys = line.word_or_default("model_key").unwrap_or_default();
    let keys: Vec<toml::Value> =
        keys.split(['|', ',']).map(str::trim).filter(|key| !key.is_empty()).map(text).collect();
    lay("finetune.keys", &toml::Value::Array(keys).to_string());
    lay("finetune.prefix", &text(line.word("model_prefix").unwrap_or_default()).to_string());
    Ok(())
}

/// The flags that are no plain key.
fn of_command(line: &Line, data: &Data, alone: bool, lay: &mut dyn FnMut(&str, &str)) {
    if let Some(steps) = line.word("warmup_steps").and_then(|word| word.parse::<u64>().ok())
        && steps > 0
    {
        lay("schedule.warmup_steps", &steps.to_string());
    }
    if alone || line.has("nproc_per_node") {
        lay("virtual_ranks", line.word("nproc_per_node").unwrap_or("1"));
    }
    if !line.is_on("imagenet_default_mean_and_std") {
        lay("data.mean", "[0.5, 0.5, 0.5]");
        lay("data.std", "[0.5, 0.5, 0.5]");
    }
    if !line.is_on("save_ckpt") {
        lay("checkpoint.every_epochs", "0");
    }
    if line.is_on("disable_eval") {
        lay("evaluate_every_epochs", "0");
    }
    if line.is_on("use_amp") {
        lay("precision", "\"bf16\"");
    }
    lay("data.location", &toml::Value::String(data.location.clone()).to_string());
    let classes = line.word("nb_classes").map_or_else(|| data.classes.to_string(), str::to_owned);
    lay("model.classes", &classes);
}

impl Plan {
    /// What is not as in the original, for what was asked.
    fn differences(&self) -> Vec<String> {
        let line = &self.line;
        let mut notes = Vec::new();
        for (flag, _) in line.flags() {
            if let Means::Nothing(why) = flag.means {
                notes.push(format!("--{}: {why}", flag.name));
            }
        }
        let mut note = |given: bool, text: &str| {
            if given {
                notes.push(text.to_owned());
            }
        };
        note(
            line.has("device") && line.word("device") != Some("cpu"),
            "--device: this command trains on the CPU; `percheron up --device cuda:0` trains a recipe on GPUs",
        );
        note(
            !line.is_on("model_ema"),
            "--model_ema false: the average is kept anyway; it changes nothing else",
        );
        note(
            line.is_on("model_ema") && !line.is_on("model_ema_eval"),
            "--model_ema_eval false: the average is evaluated with the weights",
        );
        note(
            !self.recipe.finetune.is_off(),
            "--finetune: tensors of other names stay random, and so do those that depend on the classes if the \
             classes are others; the workers' logs name them",
        );
        note(line.is_on("use_amp"), "--use_amp: products are in bf16, which needs no loss scaling");
        note(
            line.has("clip_grad"),
            "--clip_grad: it clips with and without --use_amp; the original only with it",
        );
        note(
            line.is_on("disable_eval"),
            "--disable_eval: the state is still evaluated once, at the end",
        );
        note(
            !line.is_on("save_ckpt"),
            "--save_ckpt false: the state is still kept once, at the end",
        );
        let few = line.word("save_ckpt_num").is_some_and(|word| matches!(word, "0" | "1"));
        note(few, "--save_ckpt_num: two are kept, so that a damaged one is not the end");
        if !line.has("nb_classes") {
            let classes = self.data.classes;
            notes.push(format!("the network has {classes} classes, as many as the dataset; --nb_classes sets others"));
        }
        notes.push(format!(
            "the global batch is {}; the learning rate is not scaled by it",
            self.recipe.global_batch()
        ));
        notes
    }

    fn train(self) -> Result<ExitCode> {
        let Self { line, recipe, .. } = self;
        let output = line.word_or_default("output_dir").map(PathBuf::from);
        if let Some(output) = &output
            && !line.is_on("auto_resume")
        {
            let begun = output.join("recipe.toml").exists();
            ensure!(
                !begun,
                "--auto_resume false: {} holds a run already; choose another --output_dir",
                output.display()
            );
        }
        let workers = line.word("workers").map(str::parse).transpose().context("--workers")?;
        let json = line.has("json");
        let request = Request {
            workers: workers.unwrap_or(recipe.virtual_ranks),
            ready: Some(recipe),
            recipe: None,
            run_dir: output,
            checkpoints: None,
            sets: Vec::new(),
            standbys: 0,
            chaos: None,
            json,
            quarantine: false,
            log: None,
            devices: Vec::new(),
            transport: None,
        };
        let worker_program = worker_program()?;
        super::in_runtime(async move {
            let (code, dir) = up::carry_out(request).await?;
            if let Some(dir) = dir {
                curves::write(&RunDir::at(&dir)?, &worker_program).await?;
            }
            Ok(code)
        })
    }

    /// The recipe, the steps, the rates and what it takes.
    fn show(&self) -> Result<()> {
        let recipe = &self.recipe;
        let samples = shards::Dataset::open(&recipe.data.location, &recipe.data.train)?.len();
        let per_epoch = recipe.steps_per_epoch(samples);
        print::out_text(&recipe.to_toml());
        print::out("");
        let global = recipe.global_batch();
        ensure!(
            per_epoch > 0,
            "{samples} training images are less than the global batch of {global}: lower --batch_size, \
             --update_freq or --nproc_per_node"
        );
        let steps = recipe.max_steps.unwrap_or(u64::MAX).min(per_epoch * recipe.epochs);
        print::out(&format!(
            "# {samples} images: {per_epoch} steps an epoch, {steps} in all, {global} images each"
        ));
        print::out(&format!(
            "# learning rate {}",
            picture(&recipe.schedule, recipe.epochs, per_epoch)
        ));
        let card = journal::card(recipe, &worker_program()?)?;
        let (parameters, macs) = (card.parameters as f64, card.macs.merge as f64);
        let state_mb = parameters * 4.0 * 5.0 / 1e6; // weights, two moments, average, gradient
        let images = steps as f64 * global as f64;
        // A backward costs two forwards; a core makes some 25 billion multiply–accumulates a second.
        let core_hours = images * macs * 3.0 / 25e9 / 3600.0;
        print::out(&format!(
            "# {:.1} M parameters, {:.0} M multiply–accumulates an image; state {state_mb:.0} MB a worker, and \
             a gradient of {:.0} MB a virtual rank",
            parameters / 1e6,
            macs / 1e6,
            parameters * 4.0 / 1e6
        ));
        print::out(&format!(
            "# about {core_hours:.1} core-hours, if a core makes 25 G multiply–accumulates a second"
        ));
        Ok(())
    }
}

/// The learning rate over the run, in forty columns of eight heights.
fn picture(schedule: &Schedule, epochs: u64, per_epoch: u64) -> String {
    const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let total = (epochs * per_epoch).max(1) as f64;
    let warm = schedule.warmup_steps.unwrap_or(schedule.warmup_epochs * per_epoch) as f64;
    let share = |column: u32| {
        let step = (f64::from(column) + 0.5) / 40.0 * total;
        if step < warm {
            return step / warm;
        }
        let low = schedule.min_lr / schedule.lr.max(f64::MIN_POSITIVE);
        let along = (step - warm) / (total - warm).max(1.0);
        low + 0.5 * (1.0 - low) * (1.0 + (std::f64::consts::PI * along).cos())
    };
    let bars = (0..40).map(|column| {
        let level =
            BARS.iter().zip(1_u32..).find(|(_, level)| share(column) <= f64::from(*level) / 8.0);
        level.map_or('█', |(bar, _)| *bar)
    });
    format!("{} highest {:e}", bars.collect::<String>(), schedule.lr)
}

/// `--eval true`: section 12 of the specification, by `percheron-worker eval`.
fn evaluate(line: &Line) -> Result<ExitCode> {
    let Some(checkpoint) = line.word("resume").filter(|file| !file.is_empty()) else {
        bail!(
            "--eval true needs --resume, the checkpoint: a file of weights or the folder of a run"
        );
    };
    let data = data::prepare(line, None)?;
    let mut words: Vec<OsString> =
        ["--checkpoint", checkpoint, "--data", &data.location].map(Into::into).into();
    if let Some(out) = line.word_or_default("output_dir") {
        words.extend(["--out", out].map(OsString::from));
    }
    if std::path::Path::new(checkpoint).is_file() && line.has("model") {
        let network = line.flags().filter_map(|(flag, values)| match flag.means {
            Means::Key(key) if key.starts_with("model.") => {
                Some(format!("{key}={}", flag.toml(values)?))
            }
            Means::Key(_) | Means::Command | Means::Nothing(_) => None,
        });
        for set in network {
            words.extend(["--set", &set].map(OsString::from));
        }
    }
    for set in line.all("set") {
        words.extend(["--set", &set].map(OsString::from));
    }
    if line.has("json") {
        words.push("--json".into());
    }
    print::err(
        "note: --eval: thresholds are solved on training images shown as in evaluation, as the paper says; \
         `percheron eval --calibration train-aug101` does as the original's code",
    );
    print::err(
        "note: --eval: costs are all multiply–accumulates that run; `percheron eval --flops FILE` takes others",
    );
    worker::run_tool("eval", worker::Arguments { arguments: words })
}

fn help() {
    print::out(
        "percheron train: the original's training command line, on workers that come and go\n",
    );
    print::out("  --nproc_per_node N   virtual ranks and workers, as the original's launcher");
    print::out("  --workers N          fewer processes for the same bits");
    print::out(
        "  --recipe NAME|PATH   a recipe instead of the original's defaults; flags are laid over it",
    );
    print::out("  --set KEY=VALUE      a value over all; may be repeated");
    print::out("  --dry_run            print the recipe, the steps, the rates and what it takes");
    print::out("  --json               print the result as one line of JSON\n");
    print::out("The original's flags, their defaults and what they are here:");
    for flag in FLAGS {
        let means = match flag.means {
            Means::Key(key) => format!("recipe key {key}"),
            Means::Command => "as in the original".to_owned(),
            Means::Nothing(why) => why.to_owned(),
        };
        print::out(&format!("  --{:<30} {:<22} {means}", flag.name, flag.default));
    }
}
