//! The sections of a recipe. Defaults are the published RegNetY recipe's where it has a value.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::augment::{Interpolation, OnCorrupt, Shuffle};

/// Whose BatchNorm running statistics a run keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BnBuffers {
    /// Virtual rank 0's, as PyTorch's data-parallel training does.
    Rank0,
    /// The mean over all virtual ranks.
    Mean,
}

/// In which order the gradients of virtual ranks are added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reduction {
    /// Along one fixed tree: the same bits for every number of workers.
    Exact,
    /// As they come, on GPUs only: the same bits for one number of workers only.
    Fast,
}

/// What forward and backward compute in. Parameters, moments, averages and sums are f32 in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// IEEE single throughout, as the published recipes.
    F32,
    /// Products and convolutions in brain float, the rest in single.
    Bf16,
    /// Products and convolutions in IEEE half, the rest in single. Needs loss scaling, and a GPU.
    F16,
}

/// Where the images are and how they are shown.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Data {
    /// A folder of shards (see `percheron shards pack`), or `builtin:digits`.
    pub location: String,
    /// The split to train on.
    pub train: String,
    /// The split to evaluate on.
    pub validation: String,
    /// How the training crop is cut.
    pub crop: Crop,
    /// Area of a random resized crop, as fractions of the image.
    pub crop_scale: [f64; 2],
    /// Width over height of a random resized crop.
    pub crop_ratio: [f64; 2],
    /// Chance of a mirrored image.
    pub flip_probability: f64,
    /// Evaluation resizes the short side to `input_size / crop_fraction`, then cuts the centre. Also
    /// read by timm's name, `crop_pct`.
    #[serde(alias = "crop_pct")]
    pub crop_fraction: f64,
    /// How images are resized.
    pub interpolation: Interpolation,
    /// Channel means, of values in `0..=1`.
    pub mean: [f64; 3],
    /// Channel standard deviations, of values in `0..=1`.
    pub std: [f64; 3],
    /// How an epoch mixes the samples.
    pub shuffle: Shuffle,
    /// Samples of a block, where `shuffle` is `blocks`.
    pub shuffle_block: u32,
    /// Blocks that are mixed with each other, where `shuffle` is `blocks`.
    pub shuffle_window: u32,
    /// What to do with a damaged sample that is to be trained on.
    pub on_corrupt: OnCorrupt,
    /// Micro-batches a worker prepares ahead.
    pub prefetch: u32,
}

impl Default for Data {
    fn default() -> Self {
        Self {
            location: String::new(),
            train: "train".to_owned(),
            validation: "val".to_owned(),
            crop: Crop::RandomResized,
            crop_scale: [0.08, 1.0],
            crop_ratio: [0.75, 4.0 / 3.0],
            flip_probability: 0.5,
            crop_fraction: 0.875,
            interpolation: Interpolation::Bicubic,
            mean: [0.485, 0.456, 0.406],
            std: [0.229, 0.224, 0.225],
            shuffle: Shuffle::Full,
            shuffle_block: 64,
            shuffle_window: 2048,
            on_corrupt: OnCorrupt::Fail,
            prefetch: 4,
        }
    }
}

/// How a training crop is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Crop {
    /// A random part of the image, resized.
    RandomResized,
    /// The image padded by 4 pixels, cut at a random place (the reference's choice up to 32 px).
    Padded,
    /// The whole image, resized.
    None,
}

/// The network (SPEC of the reference, section 4).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Model {
    /// A registered model, such as `reg800m_perceiver_t128`.
    pub name: String,
    /// Number of classes.
    pub classes: u32,
    /// Height and width of the input, in pixels.
    pub input_size: u32,
    /// Self-attention layers of each stage, in units of 3, 3, 9 and 3. None: the family's published ones,
    /// RegNetY 1 1 1 2, ResNet 1 1 1 1, MobileNetV3 1 1 1 3.
    pub depth_factor: Option<[u32; 4]>,
    /// Width of the self-attention MLPs, in token widths.
    pub sa_widening_factor: u32,
    /// Whether the image features read the latents once more after the last stage.
    pub with_last_ca: bool,
    /// Whether the latents read the image features in stages 2 to 4.
    pub with_x2z: bool,
    /// Whether the image features read the latents in stages 2 to 4.
    pub with_z2x: bool,
    /// Whether a depth-wise convolution prepares what the latents read.
    pub with_dwc: bool,
    /// Whether later exits see the earlier exits' logits.
    pub with_isc: bool,
    /// Dropout inside the attention blocks.
    pub dropout: f64,
    /// Whether the latents read a 7×7 summary of the features. Nothing else is possible, here and in the
    /// reference (SPEC of the reference, section 17, Q1).
    pub spatial_reduction: bool,
    /// Attention heads of the four latent stages. None: 1, 2, 4, 8. They must divide the channels there.
    pub num_sa_heads: Option<[u32; 4]>,
    /// Channels of the latents of stage 1. None: those of the features there, and nothing else is possible.
    pub num_latent_channels: Option<u32>,
    /// Drop-path rate of the last residual block; it grows evenly from 0 at the first. ResNet only. None: 0.2.
    pub drop_path: Option<f64>,
    /// Dropout before the last layer of the classifiers of the features. ResNet and MobileNetV3 only. None: 0.2.
    pub head_dropout: Option<f64>,
}

impl Default for Model {
    fn default() -> Self {
        Self {
            name: "reg800m_perceiver_t128".to_owned(),
            classes: 1000,
            input_size: 224,
            depth_factor: None,
            sa_widening_factor: 4,
            with_last_ca: true,
            with_x2z: true,
            with_z2x: true,
            with_dwc: true,
            with_isc: true,
            dropout: 0.0,
            spatial_reduction: true,
            num_sa_heads: None,
            num_latent_channels: None,
            drop_path: None,
            head_dropout: None,
        }
    }
}

/// The loss over the four exits (SPEC of the reference, section 8).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Loss {
    /// Weight of the CNN exit.
    pub cnn_factor: f64,
    /// Weight of each of the two latent exits.
    pub att_factor: f64,
    /// Weight of the merged exit.
    pub merge_factor: f64,
    /// Label smoothing.
    pub smoothing: f64,
    /// Whether the merged exit teaches the others.
    pub with_kd: bool,
    /// Temperature of that.
    pub t_kd: f64,
    /// Weight of that.
    pub alpha_kd: f64,
}

impl Default for Loss {
    fn default() -> Self {
        Self {
            cnn_factor: 1.0,
            att_factor: 0.5,
            merge_factor: 1.0,
            smoothing: 0.1,
            with_kd: true,
            t_kd: 1.0,
            alpha_kd: 0.5,
        }
    }
}

/// AdamW (SPEC of the reference, section 6).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Optimizer {
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Where a cosine over the whole run leads the weight decay. None: it stays.
    pub weight_decay_end: Option<f64>,
    /// Decay rates of the two moments.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Largest gradient norm; larger gradients are scaled down. None: no limit.
    pub clip_grad: Option<f64>,
}

impl Default for Optimizer {
    fn default() -> Self {
        Self {
            weight_decay: 0.05,
            weight_decay_end: None,
            betas: [0.9, 0.999],
            eps: 1e-8,
            clip_grad: None,
        }
    }
}

/// Cosine with linear warm-up (SPEC of the reference, section 7).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Schedule {
    /// Learning rate after the warm-up. It is not scaled by the batch.
    pub lr: f64,
    /// Where the cosine ends.
    pub min_lr: f64,
    /// Epochs of linear warm-up from 0.
    pub warmup_epochs: u64,
    /// Steps of warm-up, instead of the epochs. None: `warmup_epochs`.
    pub warmup_steps: Option<u64>,
}

impl Default for Schedule {
    fn default() -> Self {
        Self { lr: 1e-3, min_lr: 1e-6, warmup_epochs: 20, warmup_steps: None }
    }
}

/// The exponential moving average of the weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Ema {
    /// How much of the average is kept at each step.
    pub decay: f64,
}

impl Default for Ema {
    fn default() -> Self {
        Self { decay: 0.9999 }
    }
}

/// What is kept. Changes no result, so a run may be resumed with other values.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Checkpoint {
    /// Keep the state after every so many epochs, and always at the end; 0 for only at the end.
    pub every_epochs: u64,
    /// Keep the state after every so many steps as well; 0 for never.
    pub every_steps: u64,
    /// Keep the state when none has been kept for so long as well, such as `"10m"`; `"0s"` for never.
    #[serde(with = "humantime_serde")]
    pub every: Duration,
    /// Newest checkpoints that are not pruned; at least 2.
    pub keep: u32,
    /// Keep the checkpoints of every so many epochs for good as well; 0 for none.
    pub keep_every_epochs: u64,
    /// Keep those that did best as well: of each exit, by the weights and by their average.
    pub keep_best: bool,
    /// Size of a part, in MiB.
    pub part_mib: u32,
}

impl Default for Checkpoint {
    fn default() -> Self {
        Self {
            every_epochs: 1,
            every_steps: 0,
            every: Duration::ZERO,
            keep: 3,
            keep_every_epochs: 0,
            keep_best: true,
            part_mib: 32,
        }
    }
}

/// The cluster. Changes no result, so a run may be resumed with other values.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Elastic {
    /// With fewer workers the run waits.
    pub workers_min: u32,
    /// More workers stand by. None: `virtual_ranks`.
    pub workers_max: Option<u32>,
    /// How long the loss of a worker may keep the others from training, such as `"10s"`. All other
    /// waits are derived from it.
    #[serde(with = "humantime_serde")]
    pub max_recovery: Duration,
    /// After every so many steps the workers compare digests of their whole states, and whoever differs from most
    /// takes the others'; 0 for never. Takes as long as hashing the state.
    pub vote_every_steps: u64,
}

impl Default for Elastic {
    fn default() -> Self {
        let max_recovery = Duration::from_secs(10);
        Self { workers_min: 1, workers_max: None, max_recovery, vote_every_steps: 1000 }
    }
}

/// Weights that a run begins from instead of random ones. Off unless a file is named.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Finetune {
    /// A file of `torch.save` or `.safetensors`, which every worker finds at this path.
    pub file: String,
    /// Its SHA-256, hexadecimal: workers with other bytes under that name are refused.
    pub sha256: String,
    /// Where in the file the weights are: the first of these keys that there is, else the top.
    pub keys: Vec<String>,
    /// What the names of the tensors begin with, in the file.
    pub prefix: String,
}

impl Default for Finetune {
    fn default() -> Self {
        Self {
            file: String::new(),
            sha256: String::new(),
            keys: ["model", "module", "state_dict_ema"].map(str::to_owned).to_vec(),
            prefix: String::new(),
        }
    }
}

impl Finetune {
    /// Whether a run begins from random weights.
    #[must_use]
    pub fn is_off(&self) -> bool {
        self.file.is_empty()
    }
}
