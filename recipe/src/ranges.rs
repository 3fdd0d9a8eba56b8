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
    problems
}
