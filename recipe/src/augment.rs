//! The section `[augment]`: what training does to images at random. All of it is off unless asked for.
//!
//! The names are timm's, so that a command line of the reference can be copied.

use serde::{Deserialize, Serialize};

/// What training does to images at random, after the crop and the flip (SPEC of the reference,
/// section 10).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Augment {
    /// RandAugment, as timm writes it: `rand-m9-mstd0.5-inc1`. None: off.
    pub aa: Option<String>,
    /// Strength of the brightness, contrast and saturation jitter; 0 is off. Ignored where `aa` is set.
    pub color_jitter: f64,
    /// Chance that boxes of an image are erased.
    pub reprob: f64,
    /// What erased boxes are filled with.
    pub remode: EraseMode,
    /// Most boxes that an image loses; together they are as large as one would be.
    pub recount: u32,
    /// Both parameters of the beta distribution of mixup's share; 0 is off.
    pub mixup: f64,
    /// Both parameters of the beta distribution of CutMix's share; 0 is off.
    pub cutmix: f64,
    /// Smallest and largest share of the sides that a CutMix box takes, instead of a drawn area. Turns
    /// CutMix on.
    pub cutmix_minmax: Option<[f64; 2]>,
    /// Chance that a batch is mixed at all.
    pub mixup_prob: f64,
    /// Chance that it is CutMix where both are on.
    pub mixup_switch_prob: f64,
    /// What shares one draw.
    pub mixup_mode: MixMode,
}

impl Default for Augment {
    fn default() -> Self {
        Self {
            aa: None,
            color_jitter: 0.0,
            reprob: 0.0,
            remode: EraseMode::Pixel,
            recount: 1,
            mixup: 0.0,
            cutmix: 0.0,
            cutmix_minmax: None,
            mixup_prob: 1.0,
            mixup_switch_prob: 0.5,
            mixup_mode: MixMode::Batch,
        }
    }
}

impl Augment {
    /// Whether batches are ever mixed. If so, their size must be even.
    #[must_use]
    pub fn mixes(&self) -> bool {
        let any = self.mixup > 0.0 || self.cutmix > 0.0 || self.cutmix_minmax.is_some();
        any && self.mixup_prob > 0.0
    }
}

/// What erased boxes are filled with. timm's other modes are refused by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EraseMode {
    /// Normal noise, drawn for each pixel and channel.
    Pixel,
}

/// What shares one draw of mixup or CutMix. timm's other modes are refused by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MixMode {
    /// The micro-batch of a virtual rank.
    Batch,
}

/// How images are resized. timm's other filters are refused by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Interpolation {
    /// Pillow's antialiased bicubic filter, exactly.
    Bicubic,
}

/// What to do with a damaged sample that is to be trained on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnCorrupt {
    /// Stop with an error that names it.
    Fail,
    /// Take the next whole sample in its place, and say so in the log.
    SkipAndLog,
}

/// How an epoch mixes the samples.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Shuffle {
    /// Any sample can be anywhere: for data that is held where it is read.
    Full,
    /// Blocks of neighbouring samples, which can be read together.
    Blocks,
}
