//! What a user may choose about the network, and the one table of published variants.

use serde::{Deserialize, Serialize};

use crate::backbone::BackboneSpec;
use crate::backbone::regnet::RegNetSpec;

/// The choices that make a Dynamic Perceiver. All but `name` have the published recipe's value as default.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// A published variant: backbone and number of latent tokens, as `reg800m_perceiver_t128`.
    pub name: String,
    /// Classes that each exit tells apart. Default 1000.
    #[serde(default = "defaults::classes")]
    pub classes: i64,
    /// Height and width of the images, in pixels. Default 224.
    #[serde(default = "defaults::input_size")]
    pub input_size: i64,
    /// Multipliers of the 3, 3, 9 and 3 self-attention layers of the four stages.
    /// Default: the family's published ones (RegNetY 1 1 1 2).
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
    pub(crate) sa_widening_factor: i64,
    pub(crate) with_last_ca: bool,
    pub(crate) with_x2z: bool,
    pub(crate) with_z2x: bool,
    pub(crate) with_dwc: bool,
    pub(crate) with_isc: bool,
    pub(crate) dropout: f64,
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
}

impl TryFrom<&ModelConfig> for Architecture {
    type Error = ConfigError;

    /// Reports all problems at once.
    fn try_from(config: &ModelConfig) -> Result<Architecture, ConfigError> {
        let mut problems = Vec::new();
        let mut require = |holds: bool, problem: String| {
            if !holds {
                problems.push(problem);
            }
        };
        let variant = variant(&config.name);
        require(
            variant.is_some(),
            format!("name = {:?} is not a known variant; choose one of {}", config.name, names()),
        );
        require(
            (2..=1_000_000).contains(&config.classes),
            format!("classes = {} must be from 2 to 1000000", config.classes),
        );
        require(
            (32..=4096).contains(&config.input_size),
            format!(
                "input_size = {} must be from 32 to 4096 (the stages halve it five times)",
                config.input_size
            ),
        );
        let depth_factor = config.depth_factor.unwrap_or(PUBLISHED_DEPTH_FACTOR);
        require(
            depth_factor.iter().all(|factor| (1..=64).contains(factor)),
            format!("depth_factor = {depth_factor:?} must be four numbers from 1 to 64"),
        );
        require(
            (1..=64).contains(&config.sa_widening_factor),
            format!("sa_widening_factor = {} must be from 1 to 64", config.sa_widening_factor),
        );
        require(
            (0.0..1.0).contains(&config.dropout),
            format!("dropout = {} must be at least 0 and below 1", config.dropout),
        );
        let (Some(variant), true) = (variant, problems.is_empty()) else {
            return Err(ConfigError { problems });
        };
        Ok(Architecture {
            backbone: BackboneSpec::RegNet(*variant.backbone),
            classes: config.classes,
            input_size: config.input_size,
            tokens: [1, 2, 4, 8].map(|fold| variant.tokens / fold),
            layers: std::array::from_fn(|stage| LAYERS[stage] * depth_factor[stage]),
            sa_widening_factor: config.sa_widening_factor,
            with_last_ca: config.with_last_ca,
            with_x2z: config.with_x2z,
            with_z2x: config.with_z2x,
            with_dwc: config.with_dwc,
            with_isc: config.with_isc,
            dropout: config.dropout,
        })
    }
}

/// Self-attention layers of the four stages at depth factor 1; independent of the CNN's depth.
const LAYERS: [usize; 4] = [3, 3, 9, 3];

/// The depth factor of the published RegNetY recipe.
const PUBLISHED_DEPTH_FACTOR: [usize; 4] = [1, 1, 1, 2];

/// A published network: its backbone and its number of latent tokens.
#[derive(Debug, Clone, Copy)]
struct Variant {
    backbone: &'static RegNetSpec,
    tokens: i64,
}

/// The token counts that are registered for each backbone.
const VARIANTS: [(&str, &RegNetSpec, &[i64]); 4] = [
    ("reg400m", &REGNETY_400MF, &[32, 64, 128, 256, 512]),
    ("reg800m", &REGNETY_800MF, &[32, 64, 128, 256, 512]),
    ("reg1x6g", &REGNETY_1_6GF, &[128, 256, 512]),
    ("reg3x2g", &REGNETY_3_2GF, &[128, 256, 512]),
];

const REGNETY_400MF: RegNetSpec =
    RegNetSpec { widths: [48, 104, 208, 440], depths: [1, 3, 6, 6], group_width: 8 };
const REGNETY_800MF: RegNetSpec =
    RegNetSpec { widths: [64, 144, 320, 784], depths: [1, 3, 8, 2], group_width: 16 };
const REGNETY_1_6GF: RegNetSpec =
    RegNetSpec { widths: [48, 120, 336, 888], depths: [2, 6, 17, 2], group_width: 24 };
const REGNETY_3_2GF: RegNetSpec =
    RegNetSpec { widths: [72, 216, 576, 1512], depths: [2, 5, 13, 1], group_width: 24 };

/// Finds a variant by its published name.
fn variant(name: &str) -> Option<Variant> {
    let (backbone_name, tokens) = name.split_once("_perceiver_t")?;
    let (_, backbone, counts) = VARIANTS.iter().find(|(known, ..)| *known == backbone_name)?;
    let tokens = counts.iter().copied().find(|count| count.to_string() == tokens)?;
    Some(Variant { backbone, tokens })
}

/// The names of all variants, in the order of the table.
pub fn variant_names() -> Vec<String> {
    let names_of = |(backbone, _, counts): &(&str, &RegNetSpec, &[i64])| {
        counts.iter().map(|count| format!("{backbone}_perceiver_t{count}")).collect::<Vec<_>>()
    };
    VARIANTS.iter().flat_map(names_of).collect()
}

fn names() -> String {
    variant_names().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_variant_of_the_table_is_a_network() {
        let names = variant_names();
        assert_eq!(names.len(), 16);
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
    fn an_unknown_key_is_refused_and_absent_keys_have_defaults() {
        let minimal = r#"{"name": "reg400m_perceiver_t32"}"#;
        let config: ModelConfig = serde_json::from_str(minimal).unwrap();
        assert_eq!(config, ModelConfig::published("reg400m_perceiver_t32"));
        let unknown = r#"{"name": "reg400m_perceiver_t32", "clases": 10}"#;
        let error = serde_json::from_str::<ModelConfig>(unknown).unwrap_err();
        assert!(error.to_string().contains("clases"));
    }
}
