//! From a recipe to what training needs: the network's sizes, the rates, the images, the plan.

use std::sync::Arc;

use cluster::{RunConfig, RunId, Step};
use model::{AdamWConfig, Architecture, LossConfig, ModelConfig, Schedule, ScheduleConfig};
use recipe::{Precision, Recipe};
use shards::{BatchPlan, Dataset, Mixing, OnCorruptSample, Transform};
use tch::Kind;

pub(crate) mod images;

/// All that follows from the recipe and the dataset. The same on every worker of a run.
#[derive(Debug)]
pub struct Setup {
    /// The recipe.
    pub recipe: Recipe,
    /// The steps, and at which of them the state is evaluated.
    pub plan: RunConfig,
    /// The network.
    pub architecture: Architecture,
    /// What products and convolutions of a step compute in.
    pub precision: Kind,
    /// The loss of the exits.
    pub loss: LossConfig,
    /// The optimizer's constants.
    pub optimizer: AdamWConfig,
    /// Learning rate and weight decay.
    pub schedule: Schedule,
    /// Which samples a micro-batch takes. A step of this plan is one micro-batch of every virtual rank:
    /// `update_freq` of them make an optimizer update.
    pub batches: BatchPlan,
    /// How the images of a micro-batch are mixed. None: they are not.
    pub mixing: Option<Mixing>,
    /// What is done about a damaged sample that is to be trained on.
    pub on_corrupt: OnCorruptSample,
    /// The split that is trained on.
    pub training: Split,
    /// The split that is evaluated.
    pub validation: Split,
}

/// Images and how they are shown.
#[derive(Debug)]
pub struct Split {
    /// The images.
    pub dataset: Arc<Dataset>,
    /// How they are shown.
    pub transform: Transform,
}

/// A recipe that cannot be trained here.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The text is no recipe.
    #[error(transparent)]
    Recipe(#[from] recipe::RecipeError),
    /// A split cannot be opened.
    #[error("recipe, data.{field} = {split:?}: the images cannot be used")]
    Dataset {
        /// `train` or `validation`.
        field: &'static str,
        /// The split.
        split: String,
        /// Why.
        source: Box<shards::OpenError>,
    },
    /// The dataset has labels that the network cannot give.
    #[error(
        "recipe, model.classes = {classes}: the dataset {location} has {found} classes; set \
         model.classes to at least {found}"
    )]
    Classes {
        /// The network's.
        classes: u32,
        /// The dataset's.
        found: usize,
        /// The dataset.
        location: String,
    },
    /// Fields that do not fit, each named.
    #[error("recipe, section {section}: {problem}")]
    Section {
        /// The section.
        section: &'static str,
        /// What does not fit.
        problem: String,
    },
}

impl Setup {
    /// Whether states are compared while training goes on.
    #[must_use]
    pub fn votes(&self) -> bool {
        self.recipe.elastic.vote_every_steps > 0
    }

    /// Whether the states after `step` are compared.
    #[must_use]
    pub fn votes_at(&self, step: Step) -> bool {
        let is_last = step == self.plan.steps_total;
        self.votes() && (is_last || step.0.is_multiple_of(self.recipe.elastic.vote_every_steps))
    }

    /// The last step before `step` after which they were.
    #[must_use]
    pub fn voted_before(&self, step: Step) -> Step {
        let every = self.recipe.elastic.vote_every_steps;
        Step(step.0.saturating_sub(1).checked_div(every).unwrap_or(0) * every)
    }

    /// Reads the recipe and opens the images.
    ///
    /// # Errors
    /// [`SetupError`] names the field and says what to do.
    pub fn new(run: RunId, recipe_toml: &str) -> Result<Self, SetupError> {
        let recipe = Recipe::from_toml("of the run", recipe_toml, &[])?;
        let in_section =
            |section: &'static str| move |problem: String| SetupError::Section { section, problem };
        let architecture = architecture(&recipe)?;
        let precision = short_kind(recipe.precision).map_err(in_section("(top level)"))?;
        let augment = images::augment(&recipe)?;
        let (mixing, on_corrupt) = (images::mixing(&recipe)?, images::on_corrupt(&recipe));
        let transforms = Transform::training(&augment, recipe.model.input_size, recipe.seed)
            .and_then(|train| {
                Ok((train, Transform::evaluation(&augment, recipe.model.input_size)?))
            });
        let (train, evaluate) =
            transforms.map_err(|error| in_section("[data] or [augment]")(error.to_string()))?;
        let training = split(&recipe, "train", &recipe.data.train, train)?;
        let validation = split(&recipe, "validation", &recipe.data.validation, evaluate)?;

        let samples = training.dataset.len();
        let (ranks, batch, seed) = (recipe.virtual_ranks, recipe.batch_size, recipe.seed);
        let batches = BatchPlan::new(samples, ranks, batch, seed)
            .map_err(|error| in_section("(top level)")(error.to_string()))?
            .with_shuffle(images::shuffle(&recipe));
        let plan = recipe
            .plan(run, samples, 1)
            .map_err(|error| in_section("(top level)")(error.problems.join("; ")))?;
        let schedule = Schedule::new(&schedule_config(&recipe), plan.steps_per_epoch)
            .map_err(|error| in_section("[schedule]")(error.to_string()))?;
        let (loss, optimizer) = (loss_config(&recipe), adamw(&recipe));
        Ok(Self {
            recipe,
            plan,
            architecture,
            precision,
            loss,
            optimizer,
            schedule,
            batches,
            mixing,
            on_corrupt,
            training,
            validation,
        })
    }
}

/// The recipe's network.
///
/// # Errors
/// [`SetupError`] names the fields of `[model]` that do not fit.
pub fn architecture(recipe: &Recipe) -> Result<Architecture, SetupError> {
    Architecture::try_from(&model_config(recipe))
        .map_err(|error| SetupError::Section { section: "[model]", problem: error.to_string() })
}

/// Images in the recipe's training split.
///
/// # Errors
/// If it cannot be opened.
pub fn training_samples(recipe: &Recipe) -> Result<u64, shards::OpenError> {
    Ok(Dataset::open(&recipe.data.location, &recipe.data.train)?.len())
}

/// The kind of a precision, where it can be trained in.
fn short_kind(precision: Precision) -> Result<Kind, String> {
    match precision {
        Precision::F32 => Ok(Kind::Float),
        Precision::Bf16 => Ok(Kind::BFloat16),
        Precision::F16 => {
            Err("precision = f16 is not trained in: bf16 costs the same and needs no loss \
                 scaling; choose bf16 or f32"
                .to_owned())
        }
    }
}

fn split(
    recipe: &Recipe,
    field: &'static str,
    name: &str,
    transform: Transform,
) -> Result<Split, SetupError> {
    let location = &recipe.data.location;
    let dataset = Dataset::open(location, name).map_err(|source| SetupError::Dataset {
        field,
        split: name.to_owned(),
        source: Box::new(source),
    })?;
    let (found, classes) = (dataset.classes().len(), recipe.model.classes);
    if found > classes as usize {
        return Err(SetupError::Classes { classes, found, location: location.clone() });
    }
    Ok(Split { dataset: Arc::new(dataset), transform })
}

fn model_config(recipe: &Recipe) -> ModelConfig {
    let m = &recipe.model;
    ModelConfig {
        name: m.name.clone(),
        classes: m.classes.into(),
        input_size: m.input_size.into(),
        depth_factor: m.depth_factor.map(|factors| factors.map(|factor| factor as usize)),
        sa_widening_factor: m.sa_widening_factor.into(),
        with_last_ca: m.with_last_ca,
        with_x2z: m.with_x2z,
        with_z2x: m.with_z2x,
        with_dwc: m.with_dwc,
        with_isc: m.with_isc,
        dropout: m.dropout,
        spatial_reduction: m.spatial_reduction,
        num_sa_heads: m.num_sa_heads.map(|heads| heads.map(i64::from)),
        num_latent_channels: m.num_latent_channels.map(i64::from),
        drop_path: m.drop_path,
        head_dropout: m.head_dropout,
    }
}

pub(crate) fn loss_config(recipe: &Recipe) -> LossConfig {
    let l = &recipe.loss;
    LossConfig {
        cnn_factor: l.cnn_factor,
        att_factor: l.att_factor,
        merge_factor: l.merge_factor,
        label_smoothing: l.smoothing,
        with_kd: l.with_kd,
        kd_temperature: l.t_kd,
        kd_alpha: l.alpha_kd,
    }
}

/// The recipe's optimizer.
#[must_use]
pub fn adamw(recipe: &Recipe) -> AdamWConfig {
    let [beta1, beta2] = recipe.optimizer.betas;
    AdamWConfig { beta1, beta2, epsilon: recipe.optimizer.eps }
}

fn schedule_config(recipe: &Recipe) -> ScheduleConfig {
    ScheduleConfig {
        epochs: recipe.epochs,
        lr: recipe.schedule.lr,
        min_lr: recipe.schedule.min_lr,
        warmup_epochs: recipe.schedule.warmup_epochs,
        warmup_steps: recipe.schedule.warmup_steps,
        weight_decay: recipe.optimizer.weight_decay,
        weight_decay_end: recipe.optimizer.weight_decay_end,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn setup(text: &str) -> Result<Setup, SetupError> {
        let digits = recipe::built_in("digits", &[]).unwrap();
        let mut recipe = digits.to_toml();
        for line in text.lines() {
            let key = line.split('=').next().unwrap().trim();
            let old = recipe.lines().find(|old| old.starts_with(&format!("{key} ="))).unwrap();
            recipe = recipe.replacen(&old.to_owned(), line, 1);
        }
        Setup::new(RunId::try_from("toy".to_owned()).unwrap(), &recipe)
    }

    #[test]
    fn the_digits_recipe_is_complete() {
        let setup = setup("").unwrap();
        assert_eq!(setup.batches.steps_per_epoch(), setup.plan.steps_per_epoch);
        assert_eq!(setup.schedule.steps(), setup.plan.steps_total.0);
        assert_eq!(setup.training.dataset.classes().len(), 10);
    }

    #[test]
    fn what_cannot_be_trained_names_its_field() {
        let problem = |text: &str| setup(text).unwrap_err().to_string();
        assert!(problem("classes = 9").contains("model.classes = 9"), "{}", problem("classes = 9"));
        let missing = problem("validation = \"test\"");
        assert!(missing.contains("data.validation = \"test\""), "{missing}");
        assert!(problem("precision = \"f16\"").contains("precision = f16 is not trained in"));
        let unknown = problem("dropout = 2.0");
        assert!(unknown.contains("dropout"), "{unknown}");
    }

    #[test]
    fn what_is_done_to_images_is_as_the_recipe_says() {
        let with = |lines: &str| {
            let digits = recipe::built_in("digits", &[]).unwrap().to_toml();
            let table = format!("[augment]\n{lines}\n");
            let kept = digits.split_once("[augment]").map(|(before, rest)| {
                let after = rest.split_once("\n[").map_or("", |(_, after)| after);
                format!("{before}[{after}")
            });
            let text = format!("{}\n{table}", kept.unwrap());
            Setup::new(RunId::try_from("toy".to_owned()).unwrap(), &text)
        };
        let setup = with("mixup = 0.8\nreprob = 0.25\naa = \"rand-m9-mstd0.5-inc1\"").unwrap();
        assert_eq!(setup.mixing.map(|mixing| mixing.mixup), Some(0.8));
        assert_eq!(setup.training.transform.erasures_max(), 1);
        assert_eq!(setup.validation.transform.erasures_max(), 0);
        assert_eq!(with("reprob = 0.5\nrecount = 3").unwrap().training.transform.erasures_max(), 3);
        assert!(with("mixup = 0.8\nmixup_prob = 0.0").unwrap().mixing.is_none());
        let refused = with("aa = \"augmix-m5\"").unwrap_err().to_string();
        assert!(refused.contains("[augment]: aa: augmentation \"augmix-m5\""), "{refused}");
    }
}
