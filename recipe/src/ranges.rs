//! Values that have the right type and still make no recipe.

use std::{fmt::Display, ops::Range};

use crate::{Model, Recipe};

/// One sentence a problem, each naming its key.
pub(crate) fn problems(recipe: &Recipe) -> Vec<String> {
    let mut problems = Problems(Vec::new());
    problems.of_whole_numbers(recipe);
    problems.of_numbers(recipe);
    problems.of_model(&recipe.model);
    problems.of_augment(recipe);
    problems.of_finetune(recipe);
    problems.0
}

/// What has been found wrong.
struct Problems(Vec<String>);

impl Problems {
    fn require(&mut self, holds: bool, key: &str, value: &dyn Display, range: &str) {
        if !holds {
            self.0.push(format!("{key} = {value} must be {range}"));
        }
    }

    fn of_finetune(&mut self, r: &Recipe) {
        let digest = &r.finetune.sha256;
        let is_digest = digest.len() == 64 && digest.bytes().all(|byte| byte.is_ascii_hexdigit());
        let range = "the SHA-256 of finetune.file, 64 hexadecimal digits as sha256sum prints them";
        self.require(r.finetune.is_off() || is_digest, "finetune.sha256", digest, range);
    }

    fn of_whole_numbers(&mut self, r: &Recipe) {
        let whole = [
            ("virtual_ranks", r.virtual_ranks, 1, "at least 1"),
            (
                "batch_size",
                r.batch_size,
                2,
                "at least 2, because BatchNorm has no statistics of 1 image",
            ),
            ("update_freq", r.update_freq, 1, "at least 1"),
            ("threads", r.threads, 1, "at least 1"),
            ("data.prefetch", r.data.prefetch, 1, "at least 1"),
            ("data.shuffle_block", r.data.shuffle_block, 1, "at least 1"),
            ("data.shuffle_window", r.data.shuffle_window, 1, "at least 1"),
            (
                "checkpoint.keep",
                r.checkpoint.keep,
                2,
                "at least 2, so that one damaged is not the end",
            ),
            ("checkpoint.part_mib", r.checkpoint.part_mib, 1, "at least 1"),
        ];
        for (key, value, least, range) in whole {
            self.require(value >= least, key, &value, range);
        }
    }

    fn of_numbers(&mut self, r: &Recipe) {
        let not_negative = [
            ("loss.cnn_factor", Some(r.loss.cnn_factor)),
            ("loss.att_factor", Some(r.loss.att_factor)),
            ("loss.merge_factor", Some(r.loss.merge_factor)),
            ("loss.alpha_kd", Some(r.loss.alpha_kd)),
            ("optimizer.weight_decay", Some(r.optimizer.weight_decay)),
            ("optimizer.weight_decay_end", r.optimizer.weight_decay_end),
            ("schedule.lr", Some(r.schedule.lr)),
            ("schedule.min_lr", Some(r.schedule.min_lr)),
        ];
        for (key, value) in not_negative {
            let value = value.unwrap_or(0.0);
            self.require(value >= 0.0 && value.is_finite(), key, &value, "a number of at least 0");
        }
        let positive = [
            ("loss.t_kd", Some(r.loss.t_kd)),
            ("optimizer.eps", Some(r.optimizer.eps)),
            ("optimizer.clip_grad", r.optimizer.clip_grad),
        ];
        for (key, value) in positive {
            let value = value.unwrap_or(1.0);
            self.require(value > 0.0 && value.is_finite(), key, &value, "a number above 0");
        }
        let [beta1, beta2] = r.optimizer.betas;
        let below_one = [
            ("loss.smoothing", Some(r.loss.smoothing)),
            ("optimizer.betas[0]", Some(beta1)),
            ("optimizer.betas[1]", Some(beta2)),
            ("model.dropout", Some(r.model.dropout)),
            ("model.drop_path", r.model.drop_path),
            ("model.head_dropout", r.model.head_dropout),
        ];
        for (key, value) in below_one {
            let value = value.unwrap_or(0.0);
            self.require((0.0..1.0).contains(&value), key, &value, "at least 0 and below 1");
        }
        self.require((0.0..=1.0).contains(&r.ema.decay), "ema.decay", &r.ema.decay, "from 0 to 1");
    }

    /// What can be told without the table of variants; the rest is for who builds the network.
    fn of_model(&mut self, m: &Model) {
        let numbers = [
            ("model.classes", m.classes, 2..1_000_001),
            ("model.input_size", m.input_size, 32..4097),
            ("model.sa_widening_factor", m.sa_widening_factor, 1..65),
        ];
        for (key, value, allowed) in numbers {
            let range = format!("from {} to {}", allowed.start, allowed.end - 1);
            self.require(allowed.contains(&value), key, &value, &range);
        }
        self.four("model.depth_factor", m.depth_factor, 1..65);
        self.four("model.num_sa_heads", m.num_sa_heads, 1..4097);
        self.require(
            m.spatial_reduction,
            "model.spatial_reduction",
            &m.spatial_reduction,
            "true: the learned key offsets of the latents' reading have one place for each of 7×7 \
             cells, and the reference fails without it",
        );
        let Some(family) = Family::of(&m.name) else {
            self.require(
                false,
                "model.name",
                &format!("{:?}", m.name),
                "a registered model, reg…, resnet… or mobilenetV3…; `percheron model list` shows them",
            );
            return;
        };
        let rates = [
            ("model.drop_path", m.drop_path, family == Family::ResNet, "ResNet has drop-path"),
            (
                "model.head_dropout",
                m.head_dropout,
                family != Family::RegNetY,
                "ResNet and MobileNetV3 have dropout in their classifiers",
            ),
        ];
        for (key, rate, has, who) in rates {
            let rate = rate.unwrap_or(0.0);
            let range = format!("0 or left out for {family:?}: only {who}");
            self.require(has || rate == 0.0, key, &rate, &range);
        }
    }

    fn of_augment(&mut self, recipe: &Recipe) {
        let a = &recipe.augment;
        for (key, value) in [
            ("augment.reprob", a.reprob),
            ("augment.mixup_prob", a.mixup_prob),
            ("augment.mixup_switch_prob", a.mixup_switch_prob),
        ] {
            self.require((0.0..=1.0).contains(&value), key, &value, "from 0 to 1");
        }
        for (key, value, most) in [
            ("augment.color_jitter", a.color_jitter, 100.0),
            ("augment.mixup", a.mixup, 1e6),
            ("augment.cutmix", a.cutmix, 1e6),
        ] {
            let range = format!("0, which is off, to {most}");
            self.require((0.0..=most).contains(&value), key, &value, &range);
        }
        self.require((1..=16).contains(&a.recount), "augment.recount", &a.recount, "from 1 to 16");
        if let Some([low, high]) = a.cutmix_minmax {
            let fits = 0.0 < low && low <= high && high < 1.0;
            let value = format!("[{low}, {high}]");
            self.require(fits, "augment.cutmix_minmax", &value, "0 < low <= high < 1");
        }
        let is_even = !a.mixes() || recipe.batch_size.is_multiple_of(2);
        let range =
            "even where augment.mixup or augment.cutmix is on: each image is mixed with another";
        self.require(is_even, "batch_size", &recipe.batch_size, range);
    }

    fn four(&mut self, key: &str, values: Option<[u32; 4]>, allowed: Range<u32>) {
        let Some(values) = values else { return };
        let range = format!("four numbers from {} to {}", allowed.start, allowed.end - 1);
        let holds = values.iter().all(|value| allowed.contains(value));
        self.require(holds, key, &format!("{values:?}"), &range);
    }
}

/// The backbones, which differ in what can be chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    RegNetY,
    ResNet,
    MobileNetV3,
}

impl Family {
    /// The names of a family's variants begin alike.
    fn of(name: &str) -> Option<Self> {
        let beginnings =
            [("reg", Self::RegNetY), ("resnet", Self::ResNet), ("mobilenetV3", Self::MobileNetV3)];
        beginnings.into_iter().find(|(beginning, _)| name.starts_with(beginning)).map(|(_, f)| f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(sets: &[&str]) -> String {
        let sets: Vec<_> = sets.iter().map(|&set| set.to_owned()).collect();
        Recipe::from_toml("mine.toml", "", &sets).unwrap_err().to_string()
    }

    #[test]
    fn what_a_network_cannot_be_names_its_field() {
        for set in [
            "model.classes=1",
            "model.input_size=16",
            "model.sa_widening_factor=0",
            "model.depth_factor=[1, 1, 0, 1]",
            "model.num_sa_heads=[1, 2, 0, 8]",
            "model.spatial_reduction=false",
            "model.drop_path=0.2",
            "model.head_dropout=0.2",
            "model.drop_path=1.5",
            "model.name=convnext_tiny",
        ] {
            let (key, _) = set.split_once('=').unwrap();
            let refusal = refusal(&[set]);
            assert!(refusal.contains(&format!("{key} = ")), "{set}: {refusal}");
        }
    }

    #[test]
    fn every_family_has_what_it_can_do() {
        let allowed = |sets: &[&str]| {
            let sets: Vec<_> = sets.iter().map(|&set| set.to_owned()).collect();
            Recipe::from_toml("mine.toml", "", &sets).unwrap().model
        };
        let resnet = "model.name=resnet50_0375_perceiver_t128";
        let both = allowed(&[resnet, "model.drop_path=0.1", "model.head_dropout=0.3"]);
        assert_eq!((both.drop_path, both.head_dropout), (Some(0.1), Some(0.3)));
        let mobilenet = "model.name=mobilenetV3_0x75_perceiver_t128";
        assert_eq!(allowed(&[mobilenet, "model.head_dropout=0"]).head_dropout, Some(0.0));
        assert!(refusal(&[mobilenet, "model.drop_path=0.1"]).contains("MobileNetV3"));
        let heads = allowed(&["model.num_sa_heads=[2, 4, 8, 16]", "model.drop_path=0.0"]);
        assert_eq!(heads.num_sa_heads, Some([2, 4, 8, 16]));
    }
}
