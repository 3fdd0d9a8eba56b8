//! A recipe: everything a person chooses about a run, in one TOML file.
//!
//! It has a crate of its own, without torch, so that the command line can check, print and compare
//! recipes on a machine that has no libtorch (`docs/decisions/0002-recipe-crate.md`).
//!
//! A field that changes results is under the run's digest: resuming a run with another value is
//! refused. The sections `[elastic]` and `[checkpoint]` change none and may differ.

mod augment;
mod layers;
mod ranges;
mod sections;

use cluster::{InvalidConfig, RunConfig, RunId, Step, Timeouts};
use serde::{Deserialize, Serialize};

pub use augment::{Augment, EraseMode, Interpolation, MixMode, OnCorrupt, Shuffle};
pub use layers::{BUILT_IN, RecipeError, built_in};
pub use sections::{
    BnBuffers, Checkpoint, Crop, Data, Elastic, Ema, Finetune, Loss, Model, Optimizer, Precision,
    Reduction, Schedule,
};

/// A complete recipe. Every field has a default, so a recipe states what it changes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Recipe {
    /// What the run is called if nothing else is said.
    pub name: String,
    /// Everything random follows from it.
    pub seed: u64,
    /// Passes over the training split.
    pub epochs: u64,
    /// Stop after so many optimizer updates, even if epochs are left. The schedules do not change.
    pub max_steps: Option<u64>,
    /// `V`: fixed places that the global batch is split into; the most workers the run can use.
    pub virtual_ranks: u32,
    /// `B`: images in a micro-batch. The global batch is `virtual_ranks * update_freq * batch_size`.
    pub batch_size: u32,
    /// Micro-batches that each virtual rank makes for an optimizer update; their gradients are averaged.
    pub update_freq: u32,
    /// Intra-op threads of a worker. Part of the fingerprint: other counts give other bits.
    pub threads: u32,
    /// What forward and backward of a step compute in; evaluation is in f32.
    pub precision: Precision,
    /// In which order the gradients of virtual ranks are added.
    pub reduction: Reduction,
    /// Whose BatchNorm running statistics the run keeps.
    pub bn_buffers: BnBuffers,
    /// Evaluate after every so many epochs, and always at the end; 0 for only at the end.
    pub evaluate_every_epochs: u64,
    /// The images.
    pub data: Data,
    /// What training does to them at random.
    pub augment: Augment,
    /// The network.
    pub model: Model,
    /// The loss of the four exits.
    pub loss: Loss,
    /// The optimizer.
    pub optimizer: Optimizer,
    /// The learning rate.
    pub schedule: Schedule,
    /// The averaged weights.
    pub ema: Ema,
    /// What is kept, and when.
    pub checkpoint: Checkpoint,
    /// What the weights begin as; not written where they begin as random ones.
    #[serde(skip_serializing_if = "Finetune::is_off")]
    pub finetune: Finetune,
    /// How many workers, and how long a loss may hold up the others.
    pub elastic: Elastic,
}

impl Default for Recipe {
    fn default() -> Self {
        Self {
            name: "run".to_owned(),
            seed: 0,
            epochs: 300,
            max_steps: None,
            virtual_ranks: 8,
            batch_size: 128,
            update_freq: 1,
            threads: 1,
            precision: Precision::F32,
            reduction: Reduction::Exact,
            bn_buffers: BnBuffers::Rank0,
            evaluate_every_epochs: 1,
            data: Data::default(),
            augment: Augment::default(),
            model: Model::default(),
            loss: Loss::default(),
            optimizer: Optimizer::default(),
            schedule: Schedule::default(),
            ema: Ema::default(),
            checkpoint: Checkpoint::default(),
            finetune: Finetune::default(),
            elastic: Elastic::default(),
        }
    }
}

impl Recipe {
    /// Images in a global batch.
    #[must_use]
    pub fn global_batch(&self) -> u64 {
        let micro_batches = u64::from(self.virtual_ranks) * u64::from(self.update_freq);
        micro_batches.saturating_mul(u64::from(self.batch_size))
    }

    /// Optimizer updates a pass over `samples` images; what is left over is dropped, as the
    /// reference does (`drop_last`).
    #[must_use]
    pub fn steps_per_epoch(&self, samples: u64) -> u64 {
        samples.checked_div(self.global_batch()).unwrap_or(0)
    }

    /// The plan of a run of this recipe on `samples` training images, started with `workers`.
    ///
    /// # Errors
    /// [`InvalidConfig`] with every number that does not fit.
    pub fn plan(&self, run: RunId, samples: u64, workers: u32) -> Result<RunConfig, InvalidConfig> {
        let steps_per_epoch = self.steps_per_epoch(samples);
        let steps = steps_per_epoch * self.epochs;
        RunConfig {
            run,
            virtual_ranks: self.virtual_ranks,
            steps_total: Step(self.max_steps.map_or(steps, |limit| limit.min(steps))),
            steps_per_epoch,
            evaluate_every_epochs: self.evaluate_every_epochs,
            checkpoint_every_epochs: self.checkpoint.every_epochs,
            checkpoint_every_steps: self.checkpoint.every_steps,
            checkpoint_every: self.checkpoint.every,
            workers_expected: workers,
            workers_min: self.elastic.workers_min.min(workers),
            workers_max: self.elastic.workers_max.unwrap_or(self.virtual_ranks).max(workers),
            timeouts: Timeouts::derived_from(self.elastic.max_recovery)?,
        }
        .validated()
    }

    /// The recipe as TOML, every field written out.
    ///
    /// # Panics
    /// Never: all of its types have a TOML form.
    #[must_use]
    pub fn to_toml(&self) -> String {
        toml::to_string_pretty(self).expect("a recipe holds only plain values")
    }

    /// The keys whose values differ from `other`'s and would change results, as `key: this, other`.
    #[must_use]
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let neutral = |recipe: &Self| Self {
            name: String::new(),
            checkpoint: Checkpoint::default(),
            elastic: Elastic::default(),
            ..recipe.clone()
        };
        layers::differing_keys(&neutral(self), &neutral(other))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recipe_survives_being_written_and_read() {
        for (name, _) in BUILT_IN {
            let recipe = built_in(name, &[]).unwrap();
            assert_eq!(Recipe::from_toml("again", &recipe.to_toml(), &[]).unwrap(), recipe);
        }
    }

    #[test]
    fn differences_name_what_changes_bits_and_nothing_else() {
        let recipe = Recipe::default();
        let mut other = recipe.clone();
        other.elastic.workers_min = 4;
        other.checkpoint.every_steps = 10;
        assert_eq!(recipe.differences(&other), Vec::<String>::new());
        other.seed = 7;
        other.loss.alpha_kd = 0.1;
        assert_eq!(recipe.differences(&other), ["loss.alpha_kd: 0.5, 0.1", "seed: 0, 7"]);
    }

    #[test]
    fn max_steps_ends_a_run_early() {
        let run = || RunId::try_from("toy".to_owned()).unwrap();
        let recipe = Recipe { epochs: 2, batch_size: 8, ..Recipe::default() };
        assert_eq!(recipe.plan(run(), 1437, 3).unwrap().steps_total, Step(44));
        let twice = Recipe { update_freq: 2, ..recipe.clone() };
        assert_eq!(twice.plan(run(), 1437, 3).unwrap().steps_total, Step(22));
        let short = Recipe { max_steps: Some(9), ..recipe };
        assert_eq!(short.plan(run(), 1437, 3).unwrap().steps_total, Step(9));
        let problems = short.plan(run(), 63, 9).unwrap_err().problems;
        assert!(problems[0].contains("workers = 9"), "{problems:?}");
        assert!(problems[1].contains("an epoch has no step"), "{problems:?}");
    }
}
