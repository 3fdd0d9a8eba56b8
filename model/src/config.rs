//! What a user may choose about the network, and the sizes that follow.

use serde::{Deserialize, Serialize};

use crate::backbone::BackboneSpec;
use crate::variants::{variant, variant_names};

/// The choices that make a Dynamic Perceiver. All but `name` have the published recipe's value as default.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// A registered variant: backbone and number of latent tokens, as `reg800m_perceiver_t128`.
    pub name: String,
    /// Classes that each exit tells apart. Default 1000.
    #[serde(default = "defaults::classes")]
    pub classes: i64,
    /// Height and width of the images, in pixels. Default 224.
    #[serde(default = "defaults::input_size")]
    pub input_size: i64,
    /// Multipliers of the 3, 3, 9 and 3 self-attention layers of the four stages.
    /// Default: the family's published ones (RegNetY 1 1 1 2, ResNet 1 1 1 1, MobileNetV3 1 1 1 3).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub depth_factor: Option<[usize; 4]>,
    /// Hidden width of the self-attention layers' MLP, in latent widths. Default 4.
    #[serde(default = "defaults::sa_widening_factor")]
    pub sa_widening_factor: i64,
    /// Whether the latents write to the features once more, after the last CNN stage. Default true.
    #[serde(default = "defaults::on")]
    pub with_last_ca: bool,
    /// Whether the latents read the features in stages 2 to 4 (in stage 1 they always do). Default true.
    #[serde(default = "defaults::on")]
    pub with_x2z: bool,
    /// Whether the latents write to the features before stages 2 to 4. Default true.
    #[serde(default = "defaults::on")]
    pub with_z2x: bool,
    /// Whether a depth-wise 7×7 convolution precedes the reading of the features. Default true.
    #[serde(default = "defaults::on")]
    pub with_dwc: bool,
    /// Whether an exit's logits feed the next latent exit (forward knowledge transfer). Default true.
    #[serde(default = "defaults::on")]
    pub with_isc: bool,
    /// Dropout on attention probabilities, attention output and MLP output. Default 0.
    #[serde(default)]
    pub dropout: f64,
    /// Whether the latents read a 7×7 summary of the features. Default true, and nothing else is possible: the
    /// reference fails without it.
    #[serde(default = "defaults::on")]
    pub spatial_reduction: bool,
    /// Attention heads of the four latent stages. Default 1 2 4 8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_sa_heads: Option<[i64; 4]>,
    /// Channels of the latents of stage 1, which must be those of the features there. Default: those.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_latent_channels: Option<i64>,
    /// Drop-path rate of the last residual block; it grows evenly from 0 at the first. Default: 0.2 in ResNet.
    /// The other families have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drop_path: Option<f64>,
    /// Dropout before the last layer of the classifiers of the features: in ResNet of the `cnn` exit, in
    /// MobileNetV3 of `cnn` and `merge`. Default: 0.2 in both. RegNetY has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head_dropout: Option<f64>,
}

/// Field defaults that are not the type's own.
mod defaults {
    pub(super) fn classes() -> i64 {
        1000
    }
    pub(super) fn input_size() -> i64 {
        224
    }
    pub(super) fn sa_widening_factor() -> i64 {
        4
    }
    pub(super) fn on() -> bool {
        true
    }
}

impl ModelConfig {
    /// The published recipe's choices for a variant.
    pub fn published(name: &str) -> ModelConfig {
        ModelConfig {
            name: name.to_owned(),
            classes: defaults::classes(),
            input_size: defaults::input_size(),
            depth_factor: None,
            sa_widening_factor: defaults::sa_widening_factor(),
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

/// Choices that no network can be built from: one sentence a problem, each naming its field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the model cannot be built: {}", problems.join("; "))]
pub struct ConfigError {
    /// All problems found.
    pub problems: Vec<String>,
}

/// A validated network: every size, nothing left to choose.
#[derive(Debug, Clone, PartialEq)]
pub struct Architecture {
    pub(crate) backbone: BackboneSpec,
    pub(crate) classes: i64,
    pub(crate) input_size: i64,
    /// Latent tokens in each stage.
    pub(crate) tokens: [i64; 4],
    /// Self-attention layers in each stage.
    pub(crate) layers: [usize; 4],
    /// Attention heads in each stage.
    pub(crate) heads: [i64; 4],
    pub(crate) sa_widening_factor: i64,
    pub(crate) with_last_ca: bool,
    pub(crate) with_x2z: bool,
    pub(crate) with_z2x: bool,
    pub(crate) with_dwc: bool,
    pub(crate) with_isc: bool,
    pub(crate) dropout: f64,
    pub(crate) drop_path: f64,
    pub(crate) head_dropout: f64,
}

impl Architecture {
    /// Number of classes K of each exit's logits.
    pub fn classes(&self) -> i64 {
        self.classes
    }

    /// Height and width of the images.
    pub fn input_size(&self) -> i64 {
        self.input_size
    }

    /// Channels of the features that enter the four stages, C1 to C4, and of those that leave the last, Cout.
    pub fn channels(&self) -> [i64; 5] {
        self.backbone.widths()
    }

    /// Whether a training forward draws random numbers: it drops out anything.
    #[must_use]
    pub fn draws(&self) -> bool {
        [self.dropout, self.drop_path, self.head_dropout].iter().any(|rate| *rate > 0.0)
    }
}

impl TryFrom<&ModelConfig> for Architecture {
    type Error = ConfigError;

    /// Reports all problems at once.
    fn try_from(config: &ModelConfig) -> Result<Architecture, ConfigError> {
        let mut problems = Problems::default();
        let variant = variant(&config.name);
        problems.require(variant.is_some(), || {
            let known = variant_names().len();
            let name = &config.name;
            format!("name = {name:?} is none of the {known} that `percheron model list` shows")
        });
        problems.require_sizes(config);
        problems.require_rates(config);
        if let Some(variant) = &variant {
            problems.require_of_backbone(config, &variant.backbone);
        }
        let (Some(variant), true) = (variant, problems.0.is_empty()) else {
            return Err(ConfigError { problems: problems.0 });
        };
        let family = variant.backbone.family();
        let depth_factor = config.depth_factor.unwrap_or(family.depth_factor);
        Ok(Architecture {
            backbone: variant.backbone,
            classes: config.classes,
            input_size: config.input_size,
            tokens: [1, 2, 4, 8].map(|fold| variant.tokens / fold),
            layers: std::array::from_fn(|stage| LAYERS[stage] * depth_factor[stage]),
            heads: config.num_sa_heads.unwrap_or(HEADS),
            sa_widening_factor: config.sa_widening_factor,
            with_last_ca: config.with_last_ca,
            with_x2z: config.with_x2z,
            with_z2x: config.with_z2x,
            with_dwc: config.with_dwc,
            with_isc: config.with_isc,
            dropout: config.dropout,
            drop_path: config.drop_path.unwrap_or(family.drop_path),
            head_dropout: config.head_dropout.unwrap_or(family.head_dropout),
        })
    }
}

/// Self-attention layers of the four stages at depth factor 1; independent of the CNN's depth.
const LAYERS: [usize; 4] = [3, 3, 9, 3];

/// The published attention heads of the four stages.
const HEADS: [i64; 4] = [1, 2, 4, 8];

/// What has been found wrong, each naming its field.
#[derive(Debug, Default)]
struct Problems(Vec<String>);

impl Problems {
    fn require(&mut self, holds: bool, problem: impl FnOnce() -> String) {
        if !holds {
            self.0.push(problem());
        }
    }

    /// What any network needs.
    fn require_sizes(&mut self, config: &ModelConfig) {
        let ModelConfig { classes, input_size, sa_widening_factor, depth_factor, .. } = config;
        self.require((2..=1_000_000).contains(classes), || {
            format!("classes = {classes} must be from 2 to 1000000")
        });
        self.require((32..=4096).contains(input_size), || {
            format!(
                "input_size = {input_size} must be from 32 to 4096 (the stages halve it five times)"
            )
        });
        if let Some(factors) = depth_factor {
            self.require(factors.iter().all(|factor| (1..=64).contains(factor)), || {
                format!("depth_factor = {factors:?} must be four numbers from 1 to 64")
            });
        }
        self.require((1..=64).contains(sa_widening_factor), || {
            format!("sa_widening_factor = {sa_widening_factor} must be from 1 to 64")
        });
        self.require(config.spatial_reduction, || {
            "spatial_reduction = false is not possible: the learned key offsets of the latents' \
             reading have one place for each of 7×7 cells (the reference fails too); leave it true"
                .to_owned()
        });
    }

    fn require_rates(&mut self, config: &ModelConfig) {
        let rates = [
            ("dropout", Some(config.dropout)),
            ("drop_path", config.drop_path),
            ("head_dropout", config.head_dropout),
        ];
        for (field, rate) in rates {
            self.require(rate.is_none_or(|rate| (0.0..1.0).contains(&rate)), || {
                format!("{field} = {} must be at least 0 and below 1", rate.unwrap_or_default())
            });
        }
    }

    /// What depends on the backbone.
    fn require_of_backbone(&mut self, config: &ModelConfig, backbone: &BackboneSpec) {
        let (widths, family) = (backbone.widths(), backbone.family());
        let name = family.name;
        if let Some(heads) = config.num_sa_heads {
            let divide = heads
                .iter()
                .zip(widths)
                .all(|(heads, width)| (1..=width).contains(heads) && width % heads == 0);
            self.require(divide, || {
                format!(
                    "num_sa_heads = {heads:?} must divide the latents' channels, {:?}",
                    &widths[..4]
                )
            });
        }
        if let Some(channels) = config.num_latent_channels {
            self.require(channels == widths[0], || {
                format!(
                    "num_latent_channels = {channels} must be the {} channels of the features of \
                     stage 1, which the latents exchange with; leave it out",
                    widths[0]
                )
            });
        }
        let drops = |rate: Option<f64>| rate.is_some_and(|rate| rate > 0.0);
        self.require(!drops(config.drop_path) || family.drop_path > 0.0, || {
            format!("drop_path needs ResNet: the blocks of {name} have no drop-path; leave it out")
        });
        self.require(!drops(config.head_dropout) || family.head_dropout > 0.0, || {
            format!("head_dropout needs ResNet or MobileNetV3: {name} has none; leave it out")
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_variant_of_the_table_is_a_network() {
        let names = variant_names();
        assert_eq!(names.len(), 56);
        for name in names {
            Architecture::try_from(&ModelConfig::published(&name)).unwrap();
        }
    }

    #[test]
    fn latent_tokens_halve_and_self_attention_layers_multiply() {
        let published = ModelConfig::published("reg800m_perceiver_t128");
        let network = Architecture::try_from(&published).unwrap();
        assert_eq!(network.tokens, [128, 64, 32, 16]);
        assert_eq!(network.layers, [3, 3, 9, 6]);
    }

    #[test]
    fn all_problems_are_reported_at_once_and_name_their_field() {
        let bad = ModelConfig {
            classes: 1,
            depth_factor: Some([1, 0, 1, 1]),
            dropout: f64::NAN,
            ..ModelConfig::published("reg800m_perceiver_t12")
        };
        let error = Architecture::try_from(&bad).unwrap_err();
        assert_eq!(error.problems.len(), 4);
        for field in ["name = \"reg800m_perceiver_t12\"", "classes = 1", "depth_factor", "dropout"]
        {
            assert!(error.to_string().contains(field), "{field} in {error}");
        }
    }

    #[test]
    fn families_have_their_published_depths_and_regularisation() {
        let network = |name: &str| Architecture::try_from(&ModelConfig::published(name)).unwrap();
        let resnet = network("resnet50_0375_perceiver_t128");
        assert_eq!(resnet.layers, [3, 3, 9, 3]);
        assert_eq!([resnet.drop_path, resnet.head_dropout], [0.2, 0.2]);
        let mobilenet = network("mobilenetV3_0x75_perceiver_t128");
        assert_eq!(mobilenet.layers, [3, 3, 9, 9]);
        assert_eq!([mobilenet.drop_path, mobilenet.head_dropout], [0.0, 0.2]);
        let regnet = network("reg800m_perceiver_t128");
        assert_eq!([regnet.drop_path, regnet.head_dropout], [0.0, 0.0]);
    }

    #[test]
    fn what_a_family_cannot_do_is_refused_by_field() {
        let refused = |field: &str, config: ModelConfig| {
            let error = Architecture::try_from(&config).unwrap_err();
            assert_eq!(error.problems.len(), 1, "{error}");
            assert!(error.problems[0].starts_with(field), "{field} in {error}");
        };
        let published = ModelConfig::published;
        let regnet = || published("reg800m_perceiver_t128");
        refused("spatial_reduction", ModelConfig { spatial_reduction: false, ..regnet() });
        refused("num_sa_heads", ModelConfig { num_sa_heads: Some([3, 2, 4, 8]), ..regnet() });
        refused("num_sa_heads", ModelConfig { num_sa_heads: Some([0, 2, 4, 8]), ..regnet() });
        refused("num_latent_channels", ModelConfig { num_latent_channels: Some(64), ..regnet() });
        refused("drop_path", ModelConfig { drop_path: Some(0.1), ..regnet() });
        refused("head_dropout", ModelConfig { head_dropout: Some(0.1), ..regnet() });
        let mobilenet = || published("mobilenetV3_perceiver_t128");
        refused("drop_path", ModelConfig { drop_path: Some(0.1), ..mobilenet() });
        refused(
            "drop_path",
            ModelConfig { drop_path: Some(1.0), ..published("resnet18_perceiver_t128") },
        );
        let allowed = ModelConfig {
            num_sa_heads: Some([2, 4, 8, 16]),
            num_latent_channels: Some(32),
            drop_path: Some(0.0),
            head_dropout: Some(0.0),
            ..regnet()
        };
        assert_eq!(Architecture::try_from(&allowed).unwrap().heads, [2, 4, 8, 16]);
    }

    #[test]
    fn an_unknown_key_is_refused_and_absent_keys_have_defaults() {
        let minimal = r#"{"name": "reg400m_perceiver_t32"}"#;
        let config: ModelConfig = serde_json::from_str(minimal).unwrap();
        assert_eq!(config, ModelConfig::published("reg400m_perceiver_t32"));
        let unknown = r#"{"name": "reg400m_perceiver_t32", "clases": 10}"#;
        let error = serde_json::from_str::<ModelConfig>(unknown).unwrap_err();
        assert!(error.to_string().contains("clases"));
    }
}
