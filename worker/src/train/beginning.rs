//! The state that a run begins with: random weights, or as far as they fit those of a file (`[finetune]`).

use std::{fs, path::Path};

use recipe::{Finetune, Recipe};
use sha2::{Digest as _, Sha256};
use tracing::info;

use super::TrainState;
use crate::weights::{self, Misfit, Taken, Which};

/// Names that a line of the log shows at most.
const SHOWN: usize = 8;

/// Weights that a run cannot begin from.
#[derive(Debug, thiserror::Error)]
pub(super) enum BeginError {
    /// The file cannot be read, or is none of weights.
    #[error("finetune.file: {reason}; put the file there on every worker")]
    Unreadable {
        /// The file and why.
        reason: String,
    },
    /// The file is another.
    #[error(
        "finetune.file {file}: its SHA-256 is {found}, and finetune.sha256 is {expected}: put the same file there on every worker"
    )]
    Other {
        /// The file.
        file: String,
        /// Of this worker's file.
        found: String,
        /// What the recipe says.
        expected: String,
    },
    /// The file has no tensors where they are looked for.
    #[error(
        "finetune.file {file}: it has no tensors under {keys} or at the top; name the place as finetune.keys"
    )]
    NoTensors {
        /// The file.
        file: String,
        /// Where they were looked for.
        keys: String,
    },
    /// The tensors do not suit the network.
    #[error("finetune.file {file}: it does not fit the network: {problems}")]
    Misfit {
        /// The file.
        file: String,
        /// What does not fit; of very much, the first.
        problems: String,
    },
}

/// Makes `state` the initial one of a recipe, the same on every worker. The average begins as the weights do.
///
/// # Errors
/// [`BeginError`] if the recipe names a file and the run cannot begin from it.
pub(super) fn begin(state: &mut TrainState, recipe: &Recipe) -> Result<(), BeginError> {
    state.initialize(recipe.seed);
    if recipe.finetune.is_off() {
        return Ok(());
    }
    let Taken { taken, fresh, left } = overlay(state, &recipe.finetune)?;
    state.mend();
    let (fresh, left) = (shown(&fresh, ", "), shown(&left, ", "));
    info!(file = recipe.finetune.file, taken, fresh, left, "the run begins from a file of weights");
    Ok(())
}

fn overlay(state: &mut TrainState, finetune: &Finetune) -> Result<Taken, BeginError> {
    let Finetune { file, sha256: expected, keys, prefix } = finetune;
    let unreadable = |reason: String| BeginError::Unreadable { reason };
    let bytes = fs::read(file).map_err(|error| unreadable(format!("{file}: {error}")))?;
    let found = hex::encode(Sha256::digest(&bytes));
    if !found.eq_ignore_ascii_case(expected) {
        let (file, expected) = (file.clone(), expected.clone());
        return Err(BeginError::Other { file, found, expected });
    }
    drop(bytes);
    let content = crate::tool::read_weights(Path::new(file))
        .map_err(|error| unreadable(format!("{error:#}")))?;
    let below = keys.iter().find_map(|key| content.get(key)?.arrays());
    let Some(arrays) = below.or_else(|| content.arrays()) else {
        return Err(BeginError::NoTensors { file: file.clone(), keys: keys.join(", ") });
    };
    let misfit = |misfit: Misfit| {
        let problems = shown(&misfit.problems, "; ");
        BeginError::Misfit { file: file.clone(), problems }
    };
    weights::take(state, Which::Averaged, &arrays, prefix).map_err(misfit)?;
    weights::take(state, Which::Live, &arrays, prefix).map_err(misfit)
}

/// Some names and how many more there are.
fn shown(names: &[String], between: &str) -> String {
    let few = names.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(between);
    match names.len().saturating_sub(SHOWN) {
        0 => few,
        more => format!("{few} and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use checkpoint::pth::{self, Array, Value};
    use tch::Device;

    use super::*;
    use crate::{
        setup::{adamw, architecture},
        weights::{named, text},
    };

    fn recipe(sets: &[&str]) -> Recipe {
        let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
        recipe::built_in("digits", &sets).unwrap()
    }

    fn state(recipe: &Recipe) -> TrainState {
        libtorch::init(1).unwrap();
        TrainState::empty(&architecture(recipe).unwrap(), adamw(recipe), 1, Device::Cpu)
    }

    /// A file of the weights of another seed, with some names changed, and the keys that name it.
    fn file(folder: &Path, classes: u32, rename: impl Fn(&str) -> String) -> [String; 2] {
        let of = recipe(&[&format!("model.classes={classes}"), "seed=9"]);
        let mut other = state(&of);
        other.initialize(9);
        let tensors = named(&other, Which::Live);
        write(folder, tensors.into_iter().map(|(name, array)| (rename(&name), array)).collect())
    }

    fn write(folder: &Path, tensors: Vec<(String, Array)>) -> [String; 2] {
        let path = folder.join("weights.pth");
        let tensors = tensors.into_iter().map(|(name, array)| (text(&name), Value::Array(array)));
        pth::write(&path, &Value::Dict(vec![(text("module"), Value::Dict(tensors.collect()))]))
            .unwrap();
        let digest = hex::encode(Sha256::digest(fs::read(&path).unwrap()));
        [format!("finetune.file=\"{}\"", path.display()), format!("finetune.sha256=\"{digest}\"")]
    }

    fn values(state: &TrainState, name: &str) -> Vec<f32> {
        let tensors = named(state, Which::Live);
        tensors.into_iter().find(|(known, _)| known == name).unwrap().1.to_f32().unwrap()
    }

    #[test]
    fn a_run_begins_from_what_fits_and_heads_of_other_classes_stay_fresh() {
        let folder = tempfile::tempdir().unwrap();
        let [path, digest] = file(folder.path(), 100, |name| format!("net.{name}"));
        let recipe = recipe(&[&path, &digest, "finetune.prefix=net.", "seed=1"]);
        let (mut begun, mut random, mut source) = (state(&recipe), state(&recipe), state(&recipe));
        begin(&mut begun, &recipe).unwrap();
        random.initialize(1);
        source.initialize(9);
        for name in ["latent", "self_att1.0.0.module.0.norm.weight"] {
            if named(&begun, Which::Live).iter().any(|(known, _)| known == name) {
                assert_eq!(values(&begun, name), values(&source, name), "{name}");
            }
        }
        let head = "early_classifier3.weight";
        assert_eq!(values(&begun, head), values(&random, head));
        assert_ne!(values(&begun, "latent"), values(&random, "latent"));
        assert_eq!(begun.step(), Some(cluster::Step(0)));
        let average = named(&begun, Which::Averaged);
        let live = named(&begun, Which::Live);
        assert!(average.iter().zip(&live).all(|(a, b)| a.1.to_f32() == b.1.to_f32()));
    }

    #[test]
    fn what_a_run_cannot_begin_from_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let [path, digest] = file(folder.path(), 10, str::to_owned);
        let problem = |sets: &[&str]| {
            let recipe = recipe(sets);
            begin(&mut state(&recipe), &recipe).unwrap_err().to_string()
        };
        let other = format!("finetune.sha256=\"{}\"", "a".repeat(64));
        assert!(problem(&[&path, &other]).contains("its SHA-256 is "));
        assert!(problem(&["finetune.file=nowhere.pth", &other]).contains("nowhere.pth"));
        let foreign = problem(&[&path, &digest, "finetune.prefix=net."]);
        assert!(foreign.contains("none of its") && foreign.contains("weights.pth"), "{foreign}");
        let wide = problem(&[&path, &digest, "model.name=reg800m_perceiver_t128"]);
        assert!(wide.contains("has the shape") && wide.contains(" more"), "{wide}");

        let another = tempfile::tempdir().unwrap();
        let spoilt = write(
            another.path(),
            vec![("latent".to_owned(), Array::f32(&[32, 32], &[f32::NAN; 1024]))],
        );
        let [path, digest] = spoilt;
        assert!(problem(&[&path, &digest]).contains("latent is not finite (NaN or infinite)"));
    }
}
