//! Values that have the right type and still make no recipe.

use crate::Recipe;

/// One sentence a problem, each naming its key.
pub(crate) fn problems(recipe: &Recipe) -> Vec<String> {
    let mut problems = Vec::new();
    let mut require = |holds: bool, key: &str, value: &dyn std::fmt::Display, range: &str| {
        if !holds {
            problems.push(format!("{key} = {value} must be {range}"));
        }
    };
    let r = recipe;
    let whole = [
        ("virtual_ranks", r.virtual_ranks, 1, "at least 1"),
        (
            "batch_size",
            r.batch_size,
            2,
            "at least 2, because BatchNorm has no statistics of 1 image",
        ),
        ("threads", r.threads, 1, "at least 1"),
        ("data.prefetch", r.data.prefetch, 1, "at least 1"),
        ("data.shuffle_block", r.data.shuffle_block, 1, "at least 1"),
        ("data.shuffle_window", r.data.shuffle_window, 1, "at least 1"),
        ("checkpoint.keep", r.checkpoint.keep, 2, "at least 2, so that one damaged is not the end"),
        ("checkpoint.part_mib", r.checkpoint.part_mib, 1, "at least 1"),
    ];
    for (key, value, least, range) in whole {
        require(value >= least, key, &value, range);
    }
    let not_negative = [
        ("loss.cnn_factor", r.loss.cnn_factor),
        ("loss.att_factor", r.loss.att_factor),
        ("loss.merge_factor", r.loss.merge_factor),
        ("loss.alpha_kd", r.loss.alpha_kd),
        ("optimizer.weight_decay", r.optimizer.weight_decay),
        ("schedule.lr", r.schedule.lr),
        ("schedule.min_lr", r.schedule.min_lr),
    ];
    for (key, value) in not_negative {
        require(value >= 0.0 && value.is_finite(), key, &value, "a number of at least 0");
    }
    let positive = [
        ("loss.t_kd", Some(r.loss.t_kd)),
        ("optimizer.eps", Some(r.optimizer.eps)),
        ("optimizer.clip_grad", r.optimizer.clip_grad),
    ];
    for (key, value) in positive {
        let value = value.unwrap_or(1.0);
        require(value > 0.0 && value.is_finite(), key, &value, "a number above 0");
    }
    let [beta1, beta2] = r.optimizer.betas;
    let below_one = [
        ("loss.smoothing", r.loss.smoothing),
        ("optimizer.betas[0]", beta1),
        ("optimizer.betas[1]", beta2),
        ("model.dropout", r.model.dropout),
    ];
    for (key, value) in below_one {
        require((0.0..1.0).contains(&value), key, &value, "at least 0 and below 1");
    }
    require((0.0..=1.0).contains(&r.ema.decay), "ema.decay", &r.ema.decay, "from 0 to 1");
    problems.extend(augment_problems(r));
    problems
}

fn augment_problems(recipe: &Recipe) -> Vec<String> {
    let a = &recipe.augment;
    let mut problems = Vec::new();
    let mut require = |holds: bool, key: &str, value: &dyn std::fmt::Display, range: &str| {
        if !holds {
            problems.push(format!("augment.{key} = {value} must be {range}"));
        }
    };
    for (key, value) in [
        ("reprob", a.reprob),
        ("mixup_prob", a.mixup_prob),
        ("mixup_switch_prob", a.mixup_switch_prob),
    ] {
        require((0.0..=1.0).contains(&value), key, &value, "from 0 to 1");
    }
    let most = [("color_jitter", a.color_jitter, 100.0), ("mixup", a.mixup, 1e6)];
    for (key, value, most) in most.into_iter().chain([("cutmix", a.cutmix, 1e6)]) {
        let range = format!("0, which is off, to {most}");
        require((0.0..=most).contains(&value), key, &value, &range);
    }
    require((1..=16).contains(&a.recount), "recount", &a.recount, "from 1 to 16");
    if let Some([low, high]) = a.cutmix_minmax {
        let fits = 0.0 < low && low <= high && high < 1.0;
        let value = format!("[{low}, {high}]");
        require(fits, "cutmix_minmax", &value, "0 < low <= high < 1");
    }
    if a.mixes() && !recipe.batch_size.is_multiple_of(2) {
        problems.push(format!(
            "batch_size = {} must be even where augment.mixup or augment.cutmix is on: each image \
             is mixed with another",
            recipe.batch_size
        ));
    }
    problems
}
