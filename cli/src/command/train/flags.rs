//! The flags of the original training script (SPEC of the reference, section 14): their names, their defaults and
//! what they become here.

use anyhow::{Result, bail, ensure};

/// What a flag's value is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// `true` or `false`, as the original writes them.
    Bool,
    Whole,
    Number,
    Text,
    /// So many whole numbers.
    Wholes(usize),
    /// So many numbers.
    Numbers(usize),
}

/// What a flag becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Means {
    /// A key of the recipe.
    Key(&'static str),
    /// It is read by the command itself.
    Command,
    /// Nothing, for this reason, which is said if the flag is given.
    Nothing(&'static str),
}

/// A flag of the original.
#[derive(Debug, Clone, Copy)]
pub(super) struct Flag {
    pub(super) name: &'static str,
    pub(super) kind: Kind,
    /// The original's default, as it is written on a command line; empty if it is none.
    pub(super) default: &'static str,
    pub(super) means: Means,
}

const fn key(name: &'static str, kind: Kind, default: &'static str, key: &'static str) -> Flag {
    Flag { name, kind, default, means: Means::Key(key) }
}

const fn own(name: &'static str, kind: Kind, default: &'static str) -> Flag {
    Flag { name, kind, default, means: Means::Command }
}

const fn idle(name: &'static str, kind: Kind, why: &'static str) -> Flag {
    Flag { name, kind, default: "", means: Means::Nothing(why) }
}

const AS_THERE: &str = "it has no effect, as in the original";
const FEED: &str = "each worker has one thread that prepares images ahead (data.prefetch)";
const LAUNCH: &str = "workers find each other through the run's coordinator";
const WANDB: &str = "nothing is sent to Weights & Biases; the run's folder has log.jsonl";

/// All flags.
pub(super) const FLAGS: &[Flag] = &[
    key("batch_size", Kind::Whole, "64", "batch_size"),
    key("epochs", Kind::Whole, "300", "epochs"),
    key("update_freq", Kind::Whole, "1", "update_freq"),
    key("model", Kind::Text, "", "model.name"),
    key("input_size", Kind::Whole, "224", "model.input_size"),
    key("dropout", Kind::Number, "0.0", "model.dropout"),
    key("num_latent_channels", Kind::Whole, "", "model.num_latent_channels"),
    key("SA_widening_factor", Kind::Whole, "1", "model.sa_widening_factor"),
    key("num_SA_heads", Kind::Wholes(4), "", "model.num_sa_heads"),
    key("depth_factor", Kind::Wholes(4), "", "model.depth_factor"),
    key("spatial_reduction", Kind::Bool, "", "model.spatial_reduction"),
    key("with_last_CA", Kind::Bool, "false", "model.with_last_ca"),
    key("with_x2z", Kind::Bool, "true", "model.with_x2z"),
    key("with_z2x", Kind::Bool, "true", "model.with_z2x"),
    key("with_dwc", Kind::Bool, "true", "model.with_dwc"),
    key("with_isc", Kind::Bool, "true", "model.with_isc"),
    key("with_kd", Kind::Bool, "false", "loss.with_kd"),
    key("T_kd", Kind::Number, "4.0", "loss.t_kd"),
    key("alpha_kd", Kind::Number, "0.5", "loss.alpha_kd"),
    key("loss_cnn_factor", Kind::Number, "0.25", "loss.cnn_factor"),
    key("loss_att_factor", Kind::Number, "0.25", "loss.att_factor"),
    key("loss_merge_factor", Kind::Number, "0.5", "loss.merge_factor"),
    key("smoothing", Kind::Number, "0.1", "loss.smoothing"),
    key("model_ema_decay", Kind::Number, "0.9999", "ema.decay"),
    key("opt_eps", Kind::Number, "1e-8", "optimizer.eps"),
    key("opt_betas", Kind::Numbers(2), "", "optimizer.betas"),
    key("clip_grad", Kind::Number, "", "optimizer.clip_grad"),
    key("weight_decay", Kind::Number, "0.05", "optimizer.weight_decay"),
    key("weight_decay_end", Kind::Number, "", "optimizer.weight_decay_end"),
    key("lr", Kind::Number, "4e-3", "schedule.lr"),
    key("min_lr", Kind::Number, "1e-6", "schedule.min_lr"),
    key("warmup_epochs", Kind::Whole, "20", "schedule.warmup_epochs"),
    key("color_jitter", Kind::Number, "0.4", "augment.color_jitter"),
    key("aa", Kind::Text, "rand-m9-mstd0.5-inc1", "augment.aa"),
    key("train_interpolation", Kind::Text, "bicubic", "data.interpolation"),
    key("reprob", Kind::Number, "0.25", "augment.reprob"),
    key("remode", Kind::Text, "pixel", "augment.remode"),
    key("recount", Kind::Whole, "1", "augment.recount"),
    key("mixup", Kind::Number, "0.8", "augment.mixup"),
    key("cutmix", Kind::Number, "1.0", "augment.cutmix"),
    key("cutmix_minmax", Kind::Numbers(2), "", "augment.cutmix_minmax"),
    key("mixup_prob", Kind::Number, "1.0", "augment.mixup_prob"),
    key("mixup_switch_prob", Kind::Number, "0.5", "augment.mixup_switch_prob"),
    key("mixup_mode", Kind::Text, "batch", "augment.mixup_mode"),
    key("crop_pct", Kind::Number, "", "data.crop_fraction"),
    key("seed", Kind::Whole, "0", "seed"),
    key("save_ckpt_freq", Kind::Whole, "1", "checkpoint.every_epochs"),
    key("save_ckpt_num", Kind::Whole, "3", "checkpoint.keep"),
    own("warmup_steps", Kind::Whole, "-1"),
    own("opt", Kind::Text, "adamw"),
    own("layer_decay", Kind::Number, "1.0"),
    own("finetune", Kind::Text, ""),
    own("data_path", Kind::Text, ""),
    own("eval_data_path", Kind::Text, ""),
    own("data_set", Kind::Text, "IMNET"),
    own("nb_classes", Kind::Whole, ""),
    own("imagenet_default_mean_and_std", Kind::Bool, "true"),
    own("output_dir", Kind::Text, ""),
    own("resume", Kind::Text, ""),
    own("auto_resume", Kind::Bool, "true"),
    own("start_epoch", Kind::Whole, "0"),
    own("save_ckpt", Kind::Bool, "true"),
    own("eval", Kind::Bool, "false"),
    own("disable_eval", Kind::Bool, "false"),
    own("use_amp", Kind::Bool, "false"),
    own("device", Kind::Text, "cuda"),
    own("model_ema", Kind::Bool, "false"),
    own("model_ema_eval", Kind::Bool, "false"),
    idle("model_ema_force_cpu", Kind::Bool, "the average lies where the weights lie"),
    idle("dist_eval", Kind::Bool, "evaluation is divided over the workers, each image once"),
    idle("num_workers", Kind::Whole, FEED),
    idle("pin_mem", Kind::Bool, FEED),
    idle("momentum", Kind::Number, "AdamW has none"),
    own("model_key", Kind::Text, "model|module|state_dict_ema"),
    own("model_prefix", Kind::Text, ""),
    idle("log_dir", Kind::Text, "what is logged lies in --output_dir"),
    idle("classifier_type", Kind::Text, AS_THERE),
    idle("drop_path", Kind::Number, AS_THERE),
    idle("layer_scale_init_value", Kind::Number, AS_THERE),
    idle("head_init_scale", Kind::Number, AS_THERE),
    idle("resplit", Kind::Bool, AS_THERE),
    idle("cka", Kind::Bool, AS_THERE),
    idle("visualize", Kind::Bool, AS_THERE),
    idle("world_size", Kind::Whole, LAUNCH),
    idle("local_rank", Kind::Whole, LAUNCH),
    idle("dist_on_itp", Kind::Bool, LAUNCH),
    idle("dist_url", Kind::Text, LAUNCH),
    idle("enable_wandb", Kind::Bool, WANDB),
    idle("project", Kind::Text, WANDB),
    idle("wandb_ckpt", Kind::Bool, WANDB),
];

/// Flags of this program alone, which take one value; those that take none.
const EXTRA: [&str; 4] = ["nproc_per_node", "recipe", "set", "workers"];
const SWITCHES: [&str; 2] = ["dry_run", "json"];

/// A command line, taken apart: names without dashes and their words, in order.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Line {
    given: Vec<(String, Vec<String>)>,
}

impl Line {
    /// Takes a command line apart.
    ///
    /// # Errors
    /// An unknown flag with the nearest known one, or a value that is missing or of the wrong kind.
    pub(super) fn parse(words: &[String]) -> Result<Self> {
        let mut line = Self::default();
        let mut words = words.iter().peekable();
        while let Some(word) = words.next() {
            let Some(name) = word.strip_prefix("--") else {
                bail!("{word:?} belongs to no flag: each begins with --");
            };
            let (name, joined) = match name.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (name, None),
            };
            let mut values: Vec<String> = joined.into_iter().collect();
            let is_switch = SWITCHES.contains(&name);
            let most = most_values(name)?;
            while values.len() < most && words.peek().is_some_and(|next| is_value(next)) {
                values.extend(words.next().cloned());
            }
            ensure!(is_switch || !values.is_empty(), "--{name} needs a value");
            if let Some(flag) = flag(name) {
                flag.check(&values)?;
            }
            line.given.push((name.to_owned(), values));
        }
        Ok(line)
    }

    /// The words of a flag, if it was given; the last counts.
    pub(super) fn words(&self, name: &str) -> Option<&[String]> {
        let found = self.given.iter().rev().find(|(given, _)| given == name);
        found.map(|(_, words)| words.as_slice())
    }

    /// The one word of a flag.
    pub(super) fn word(&self, name: &str) -> Option<&str> {
        self.words(name)?.first().map(String::as_str)
    }

    /// The one word of a flag, or the original's default; empty is none.
    pub(super) fn word_or_default(&self, name: &str) -> Option<&str> {
        let default = || flag(name).map(|flag| flag.default);
        self.word(name).or_else(default).filter(|word| !word.is_empty())
    }

    /// The value of a flag that is `true` or `false`.
    pub(super) fn is_on(&self, name: &str) -> bool {
        self.word_or_default(name).is_some_and(|word| boolean(word) == Some(true))
    }

    /// Whether a switch is there.
    pub(super) fn has(&self, name: &str) -> bool {
        self.words(name).is_some()
    }

    /// All values of a flag that may be repeated.
    pub(super) fn all(&self, name: &str) -> Vec<String> {
        let given = self.given.iter().filter(|(given, _)| given == name);
        given.flat_map(|(_, words)| words.clone()).collect()
    }

    /// The flags of the original that were given.
    pub(super) fn flags(&self) -> impl Iterator<Item = (&'static Flag, &[String])> {
        FLAGS.iter().filter_map(|flag| Some((flag, self.words(flag.name)?)))
    }
}

impl Flag {
    fn check(&self, words: &[String]) -> Result<()> {
        let Self { name, kind, .. } = self;
        let count = match kind {
            Kind::Wholes(count) | Kind::Numbers(count) => *count,
            Kind::Bool | Kind::Whole | Kind::Number | Kind::Text => 1,
        };
        ensure!(
            words.len() == count,
            "--{name} needs {count} values, and {} were given",
            words.len()
        );
        for word in words {
            let (fits, what) = match kind {
                Kind::Bool => (boolean(word).is_some(), "true or false"),
                Kind::Whole | Kind::Wholes(_) => (word.parse::<i64>().is_ok(), "a whole number"),
                Kind::Number | Kind::Numbers(_) => {
                    (word.parse::<f64>().is_ok() || word == "None", "a number")
                }
                Kind::Text => (true, ""),
            };
            ensure!(fits, "--{name} {word:?}: it must be {what}");
        }
        Ok(())
    }

    /// The words as a value of a recipe; `None` where the original means that nothing is set.
    pub(super) fn toml(&self, words: &[String]) -> Option<String> {
        let number = |word: &String| match word.parse::<i64>() {
            Ok(whole) => format!("{whole}.0"),
            Err(_) => {
                word.parse::<f64>().map_or_else(|_| word.clone(), |value| format!("{value:?}"))
            }
        };
        let one = words.first()?;
        if one.is_empty() || one == "None" {
            return None;
        }
        Some(match self.kind {
            Kind::Bool => boolean(one)?.to_string(),
            Kind::Whole => one.clone(),
            Kind::Number => number(one),
            Kind::Text => toml::Value::String(one.clone()).to_string(),
            Kind::Wholes(_) => format!("[{}]", words.join(", ")),
            Kind::Numbers(_) => {
                format!("[{}]", words.iter().map(number).collect::<Vec<_>>().join(", "))
            }
        })
    }
}

/// The flag of a name.
pub(super) fn flag(name: &str) -> Option<&'static Flag> {
    FLAGS.iter().find(|flag| flag.name == name)
}

/// As the original reads them.
fn boolean(word: &str) -> Option<bool> {
    match word.to_ascii_lowercase().as_str() {
        "yes" | "true" | "t" | "y" | "1" => Some(true),
        "no" | "false" | "f" | "n" | "0" => Some(false),
        _ => None,
    }
}

fn most_values(name: &str) -> Result<usize> {
    if SWITCHES.contains(&name) {
        return Ok(0);
    }
    if EXTRA.contains(&name) {
        return Ok(1);
    }
    match flag(name).map(|flag| flag.kind) {
        Some(Kind::Wholes(count) | Kind::Numbers(count)) => Ok(count),
        Some(Kind::Bool | Kind::Whole | Kind::Number | Kind::Text) => Ok(1),
        None => {
            let nearest = nearest(name);
            bail!(
                "unknown flag --{name}; did you mean --{nearest}? `percheron train --help` lists all"
            )
        }
    }
}

/// A negative number is a value too.
fn is_value(word: &str) -> bool {
    !word.starts_with("--") || word[2..].parse::<f64>().is_ok()
}

fn nearest(name: &str) -> &'static str {
    let names = FLAGS.iter().map(|flag| flag.name).chain(EXTRA).chain(SWITCHES);
    let likeness = |known: &&str| strsim::jaro_winkler(known, name);
    names.max_by(|a, b| likeness(a).total_cmp(&likeness(b))).expect("there are flags")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> Result<Line> {
        let words: Vec<String> = text.split(' ').map(str::to_owned).collect();
        Line::parse(&words)
    }

    #[test]
    fn values_lists_and_switches_are_told_apart() {
        let line =
            line("--depth_factor 1 1 1 2 --lr 1e-3 --warmup_steps -1 --set seed=7 --dry_run");
        let line = line.unwrap();
        assert_eq!(line.words("depth_factor").unwrap(), ["1", "1", "1", "2"]);
        assert_eq!(flag("lr").unwrap().toml(line.words("lr").unwrap()).unwrap(), "0.001");
        assert_eq!(line.word("warmup_steps"), Some("-1"));
        assert_eq!(line.all("set"), ["seed=7"]);
        assert!(line.has("dry_run") && !line.has("json"));
        assert!(line.is_on("save_ckpt") && !line.is_on("eval"), "the original's defaults");
    }

    #[test]
    fn what_is_wrong_is_named_with_what_was_meant() {
        let problem = |text: &str| line(text).unwrap_err().to_string();
        assert!(problem("--depth_facto 1").contains("did you mean --depth_factor?"));
        assert!(problem("--depth_factor 1 1").contains("needs 4 values"));
        assert!(problem("--with_isc maybe").contains("must be true or false"));
        assert!(problem("--epochs ten").contains("must be a whole number"));
        assert!(problem("--lr").contains("needs a value"));
        assert!(problem("reg800m").contains("belongs to no flag"));
    }

    #[test]
    fn no_flag_is_there_twice_and_every_default_is_of_its_kind() {
        for (index, flag) in FLAGS.iter().enumerate() {
            assert!(FLAGS[..index].iter().all(|other| other.name != flag.name), "{}", flag.name);
            let words: Vec<String> = flag.default.split_whitespace().map(str::to_owned).collect();
            assert!(words.is_empty() || flag.check(&words).is_ok(), "{}", flag.name);
        }
    }
}
