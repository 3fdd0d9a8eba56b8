//! From text to a recipe: a built-in or a file, then what `--set` says, and errors that help.

use std::path::Path;

use figment::{
    Figment,
    error::Kind,
    providers::{Format, Serialized, Toml},
};

use crate::{Recipe, ranges};

/// The recipes that ship with the program: name and TOML text.
pub const BUILT_IN: &[(&str, &str)] = &[
    ("digits", include_str!("../../worker/recipes/digits.toml")),
    ("clothing", include_str!("../../worker/recipes/clothing.toml")),
    ("reg800m", include_str!("../../worker/recipes/reg800m.toml")),
    ("resnet50-0375", include_str!("../../worker/recipes/resnet50-0375.toml")),
    ("mobilenetv3-0x75", include_str!("../../worker/recipes/mobilenetv3-0x75.toml")),
];

/// A recipe that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RecipeError {
    /// Neither a built-in recipe nor a readable file.
    #[error(
        "no recipe {name:?}: it is neither a readable file ({source}) nor one of the built-in recipes ({})",
        built_in_names()
    )]
    NotFound {
        /// What was asked for.
        name: String,
        /// Why the file could not be read.
        #[source]
        source: std::io::Error,
    },
    /// A key that no recipe has.
    #[error("recipe {origin}: unknown key {key:?}{}", suggestion(nearest.as_deref()))]
    UnknownKey {
        /// The file, the built-in recipe or `--set`.
        origin: String,
        /// The key, dotted.
        key: String,
        /// The known key most like it.
        nearest: Option<String>,
    },
    /// A value that does not fit its key, or text that is not TOML.
    #[error("recipe {origin}: {}{problem}", at_key(key))]
    Invalid {
        /// The file, the built-in recipe or `--set`.
        origin: String,
        /// The key, dotted; empty if it is not known.
        key: String,
        /// What is wrong.
        problem: String,
    },
    /// Values of the right type that cannot be, all of them.
    #[error("recipe {origin}: {}", problems.join("; "))]
    OutOfRange {
        /// The file or the built-in recipe.
        origin: String,
        /// One sentence a problem, each naming its key.
        problems: Vec<String>,
    },
    /// A `--set` that is not `key=value`.
    #[error(
        "--set {0:?} is not of the form key=value, such as --set seed=7 or --set ema.decay=0.99"
    )]
    NotAnAssignment(String),
}

fn built_in_names() -> String {
    BUILT_IN.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ")
}

fn suggestion(nearest: Option<&str>) -> String {
    nearest.map(|key| format!("; did you mean {key:?}?")).unwrap_or_default()
}

fn at_key(key: &str) -> String {
    if key.is_empty() { String::new() } else { format!("key {key:?}: ") }
}

/// A built-in recipe with `sets` (`key=value`) laid over it.
///
/// # Errors
/// [`RecipeError`] if there is none of that name, or a set does not fit.
pub fn built_in(name: &str, sets: &[String]) -> Result<Recipe, RecipeError> {
    match BUILT_IN.iter().find(|(known, _)| *known == name) {
        Some((name, text)) => Recipe::from_toml(name, text, sets),
        None => Err(RecipeError::NotFound {
            name: name.to_owned(),
            source: std::io::ErrorKind::NotFound.into(),
        }),
    }
}

impl Recipe {
    /// A built-in recipe by name, or a file by path, with `sets` (`key=value`) laid over it.
    ///
    /// # Errors
    /// [`RecipeError`] that names the file and the key.
    pub fn load(name: &str, sets: &[String]) -> Result<Self, RecipeError> {
        if BUILT_IN.iter().any(|(known, _)| *known == name) {
            return built_in(name, sets);
        }
        let text = std::fs::read_to_string(Path::new(name))
            .map_err(|source| RecipeError::NotFound { name: name.to_owned(), source })?;
        Self::from_toml(name, &text, sets)
    }

    /// A recipe from TOML text; `origin` names it in errors.
    ///
    /// # Errors
    /// [`RecipeError`] that names the origin and the key.
    pub fn from_toml(origin: &str, text: &str, sets: &[String]) -> Result<Self, RecipeError> {
        let base = Figment::from(Toml::string(text));
        // Read once without the sets, so that an error is blamed on the right place.
        base.extract::<Self>().map_err(|error| explain(origin, error))?;
        let mut layered = base;
        for set in sets {
            let (key, value) = assignment(set)?;
            layered = layered.merge(Serialized::default(key, value));
            layered.extract::<Self>().map_err(|error| explain(&format!("--set {set}"), error))?;
        }
        let recipe: Self = layered.extract().map_err(|error| explain(origin, error))?;
        let problems = ranges::problems(&recipe);
        if problems.is_empty() {
            return Ok(recipe);
        }
        Err(RecipeError::OutOfRange { origin: origin.to_owned(), problems })
    }
}

/// `key=value` with the value read as TOML, or taken as text if it is not TOML.
fn assignment(set: &str) -> Result<(&str, toml::Value), RecipeError> {
    let (key, value) =
        set.split_once('=').ok_or_else(|| RecipeError::NotAnAssignment(set.to_owned()))?;
    let (key, value) = (key.trim(), value.trim());
    if key.is_empty() || key.split('.').any(str::is_empty) {
        return Err(RecipeError::NotAnAssignment(set.to_owned()));
    }
    let parsed = format!("value = {value}").parse::<toml::Table>();
    let value = parsed.ok().and_then(|mut table| table.remove("value"));
    let text =
        || toml::Value::String(set[set.find('=').map_or(0, |at| at + 1)..].trim().to_owned());
    Ok((key, value.unwrap_or_else(text)))
}

/// One sentence from the first of figment's errors.
fn explain(origin: &str, errors: figment::Error) -> RecipeError {
    let origin = origin.to_owned();
    let Some(error) = errors.into_iter().next() else {
        return RecipeError::Invalid {
            origin,
            key: String::new(),
            problem: "unreadable".to_owned(),
        };
    };
    let path = error.path.join(".");
    if let Kind::UnknownField(field, _) = error.kind {
        let mut path = error.path;
        if path.last() != Some(&field) {
            path.push(field);
        }
        let key = path.join(".");
        let nearest = nearest_key(&key);
        return RecipeError::UnknownKey { origin, key, nearest };
    }
    let problem = error.kind.to_string().replace('\n', " ").trim().to_owned();
    RecipeError::Invalid { origin, key: path, problem }
}

fn nearest_key(key: &str) -> Option<String> {
    let leaf = |key: &str| key.rsplit('.').next().unwrap_or_default().to_owned();
    let likeness = |known: &String| {
        let whole = strsim::jaro_winkler(known, key);
        whole.max(strsim::jaro_winkler(&leaf(known), &leaf(key)))
    };
    all_keys(&Recipe { max_steps: Some(0), ..Recipe::default() })
        .into_iter()
        .map(|(known, _)| known)
        .chain(UNSET.map(str::to_owned))
        .max_by(|a, b| likeness(a).total_cmp(&likeness(b)))
        .filter(|known| likeness(known) > 0.8)
}

/// The keys that a recipe need not have.
const UNSET: [&str; 15] = [
    "optimizer.clip_grad",
    "optimizer.weight_decay_end",
    "schedule.warmup_steps",
    "elastic.workers_max",
    "model.depth_factor",
    "model.num_sa_heads",
    "model.num_latent_channels",
    "model.drop_path",
    "model.head_dropout",
    "augment.aa",
    "augment.cutmix_minmax",
    "finetune.file",
    "finetune.sha256",
    "finetune.keys",
    "finetune.prefix",
];

/// Keys of two recipes whose values differ, as `key: this, other`.
pub(crate) fn differing_keys(this: &Recipe, other: &Recipe) -> Vec<String> {
    let (this, other) = (all_keys(this), all_keys(other));
    let keys: std::collections::BTreeSet<_> =
        this.iter().chain(&other).map(|(key, _)| key.clone()).collect();
    let value = |keys: &[(String, String)], key: &str| {
        let found = keys.iter().find(|(known, _)| known == key);
        found.map_or_else(|| "unset".to_owned(), |(_, value)| value.clone())
    };
    keys.into_iter()
        .map(|key| (value(&this, &key), value(&other, &key), key))
        .filter(|(a, b, _)| a != b)
        .map(|(a, b, key)| format!("{key}: {a}, {b}"))
        .collect()
}

/// Every key of a recipe, dotted, with its value as TOML.
fn all_keys(recipe: &Recipe) -> Vec<(String, String)> {
    let table = toml::Table::try_from(recipe).expect("a recipe holds only plain values");
    let mut keys = Vec::new();
    flatten("", &table, &mut keys);
    keys
}

fn flatten(prefix: &str, table: &toml::Table, keys: &mut Vec<(String, String)>) {
    for (name, value) in table {
        let key = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
        match value {
            toml::Value::Table(inner) => flatten(&key, inner, keys),
            toml::Value::String(_)
            | toml::Value::Integer(_)
            | toml::Value::Float(_)
            | toml::Value::Boolean(_)
            | toml::Value::Datetime(_)
            | toml::Value::Array(_) => keys.push((key, value.to_string())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(text: &str, sets: &[&str]) -> String {
        let sets: Vec<_> = sets.iter().map(|&set| set.to_owned()).collect();
        Recipe::from_toml("mine.toml", text, &sets).unwrap_err().to_string()
    }

    #[test]
    fn sets_are_laid_over_the_file() {
        let sets = ["seed=7", "model.name=reg400m_perceiver_t32", "elastic.max_recovery=4s"];
        let recipe = Recipe::from_toml("x", "seed = 1\nepochs = 3", &sets.map(str::to_owned));
        let recipe = recipe.unwrap();
        assert_eq!((recipe.seed, recipe.epochs), (7, 3));
        assert_eq!(recipe.model.name, "reg400m_perceiver_t32");
        assert_eq!(recipe.elastic.max_recovery, std::time::Duration::from_secs(4));
    }

    #[test]
    fn an_unknown_key_is_named_with_the_one_that_was_meant() {
        assert_eq!(
            refusal("virtual_rank = 8", &[]),
            "recipe mine.toml: unknown key \"virtual_rank\"; did you mean \"virtual_ranks\"?"
        );
        assert_eq!(
            refusal("[model]\ndepth_facto = 1", &[]),
            "recipe mine.toml: unknown key \"model.depth_facto\"; did you mean \"model.depth_factor\"?"
        );
        assert_eq!(
            refusal("", &["ema.deca=0.9"]),
            "recipe --set ema.deca=0.9: unknown key \"ema.deca\"; did you mean \"ema.decay\"?"
        );
    }

    #[test]
    fn a_value_of_the_wrong_kind_is_named_with_its_key() {
        let refusal = refusal("[schedule]\nlr = \"fast\"", &[]);
        assert!(refusal.starts_with("recipe mine.toml: key \"schedule.lr\": "), "{refusal}");
    }

    #[test]
    fn values_out_of_range_are_all_named_at_once() {
        let refusal = refusal("batch_size = 1\n[loss]\nt_kd = 0.0", &["ema.decay=nan"]);
        for key in ["batch_size = 1", "loss.t_kd = 0", "ema.decay = NaN"] {
            assert!(refusal.contains(key), "{key} in {refusal}");
        }
    }

    #[test]
    fn what_is_done_to_images_is_named_where_it_is_wrong() {
        let text = "[augment]\nreprob = 1.5\nrecount = 0\nmixup = -1.0\ncutmix_minmax = [0.8, 0.2]";
        let refused = refusal(text, &["batch_size=3", "augment.cutmix=1.0"]);
        for key in [
            "augment.reprob = 1.5",
            "augment.recount = 0",
            "augment.mixup = -1",
            "augment.cutmix_minmax = [0.8, 0.2]",
            "batch_size = 3 must be even",
        ] {
            assert!(refused.contains(key), "{key} in {refused}");
        }
        for (text, key) in [
            ("[augment]\nremode = \"const\"", "augment.remode"),
            ("[augment]\nmixup_mode = \"elem\"", "augment.mixup_mode"),
            ("[data]\ninterpolation = \"bilinear\"", "data.interpolation"),
            ("[data]\non_corrupt = \"ignore\"", "data.on_corrupt"),
            ("[data]\nshuffle = \"none\"", "data.shuffle"),
        ] {
            let refused = refusal(text, &[]);
            assert!(refused.contains(&format!("key \"{key}\"")), "{refused}");
            assert!(refused.contains("expected"), "{refused}"); // And says what there is.
        }
        let meant = refusal("[augment]\ncutmix_min_max = [0.1, 0.2]", &[]);
        assert!(meant.contains("did you mean \"augment.cutmix_minmax\"?"), "{meant}");
    }

    #[test]
    fn evaluations_crop_has_timms_name_too() {
        let recipe = Recipe::from_toml("x", "[data]\ncrop_pct = 0.95", &[]).unwrap();
        assert_eq!(recipe.data.crop_fraction, 0.95);
    }

    #[test]
    fn a_missing_recipe_is_told_with_the_built_in_ones() {
        let refusal = Recipe::load("nowhere.toml", &[]).unwrap_err().to_string();
        assert!(refusal.contains("nowhere.toml") && refusal.contains("digits"), "{refusal}");
    }

    #[test]
    fn a_set_without_a_value_is_refused() {
        assert!(refusal("", &["seed"]).contains("key=value"));
        assert!(refusal("", &["=3"]).contains("key=value"));
    }
}
