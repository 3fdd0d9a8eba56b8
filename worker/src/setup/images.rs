//! From the sections `[data]` and `[augment]` of a recipe to how images are read, shown and mixed.

use std::num::NonZeroU32;

use recipe::{Crop, EraseMode, Interpolation, MixMode, OnCorrupt, Recipe, Shuffle};
use shards::{Augment, Erase, Mixing, OnCorruptSample, RandAugment};

use super::SetupError;

/// How images are shown, to train on and to evaluate.
#[expect(clippy::cast_possible_truncation, reason = "pixels are normalised in f32")]
pub(crate) fn augment(recipe: &Recipe) -> Result<Augment, SetupError> {
    let (d, a) = (&recipe.data, &recipe.augment);
    let Interpolation::Bicubic = d.interpolation;
    let EraseMode::Pixel = a.remode;
    let rand_augment = a.aa.as_deref().map(RandAugment::parse).transpose();
    let erase = Erase { probability: a.reprob, count_max: a.recount, ..Erase::default() };
    Ok(Augment {
        crop: match d.crop {
            Crop::RandomResized => shards::Crop::RandomResized,
            Crop::Padded => shards::Crop::Padded,
            Crop::None => shards::Crop::None,
        },
        scale: d.crop_scale,
        ratio: d.crop_ratio,
        flip_probability: d.flip_probability,
        rand_augment: rand_augment.map_err(|error| SetupError::Section {
            section: "[augment]",
            problem: format!("aa: {error}"),
        })?,
        color_jitter: a.color_jitter,
        erase: (a.reprob > 0.0).then_some(erase),
        crop_pct: d.crop_fraction,
        mean: d.mean.map(|value| value as f32),
        std: d.std.map(|value| value as f32),
        ..Augment::default()
    })
}

/// How the images of a micro-batch are mixed. None: they are not.
pub(super) fn mixing(recipe: &Recipe) -> Result<Option<Mixing>, SetupError> {
    let a = &recipe.augment;
    let MixMode::Batch = a.mixup_mode;
    let mixing = Mixing {
        mixup: a.mixup,
        cutmix: a.cutmix,
        cutmix_minmax: a.cutmix_minmax,
        probability: a.mixup_prob,
        switch_probability: a.mixup_switch_prob,
    };
    mixing.check().map_err(|error| SetupError::Section {
        section: "[augment]",
        problem: error.to_string(),
    })?;
    Ok(mixing.is_on().then_some(mixing))
}

/// How an epoch mixes the samples.
pub(crate) fn shuffle(recipe: &Recipe) -> shards::Shuffle {
    let d = &recipe.data;
    let count = |value: u32| NonZeroU32::new(value).expect("the recipe has been checked");
    match d.shuffle {
        Shuffle::Full => shards::Shuffle::Full,
        Shuffle::Blocks => shards::Shuffle::Blocks {
            block: count(d.shuffle_block),
            window: count(d.shuffle_window),
        },
    }
}

/// What is done about a damaged sample that is to be trained on.
pub(super) fn on_corrupt(recipe: &Recipe) -> OnCorruptSample {
    match recipe.data.on_corrupt {
        OnCorrupt::Fail => OnCorruptSample::Fail,
        OnCorrupt::SkipAndLog => OnCorruptSample::SkipAndLog,
    }
}
