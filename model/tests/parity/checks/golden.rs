//! The reference's numbers: the rule that fills weights and inputs, and how to measure differences. The rule is
//! that of the README beside the numbers, its section 1.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use model::{Architecture, Layout, ModelConfig, Network, Role, Weights};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

/// A folder with numbers of the reference.
#[derive(Debug)]
pub(crate) struct Golden {
    folder: PathBuf,
}

impl Golden {
    pub(crate) fn at(folder: PathBuf) -> Golden {
        Golden { folder }
    }

    pub(crate) fn has(&self, file: &str) -> bool {
        self.folder.join(file).is_file()
    }

    /// A file's bytes.
    pub(crate) fn bytes(&self, file: &str) -> Vec<u8> {
        fs::read(self.folder.join(file)).unwrap_or_else(|error| panic!("{file}: {error}"))
    }

    /// A JSON file.
    pub(crate) fn json(&self, file: &str) -> Value {
        serde_json::from_slice(&self.bytes(file)).unwrap_or_else(|error| panic!("{file}: {error}"))
    }

    /// One of the lists of a JSON file; empty if it has none of that name.
    pub(crate) fn cases(&self, file: &str, key: &str) -> Vec<Value> {
        match self.json(file)[key].take() {
            Value::Array(cases) => cases,
            _ => Vec::new(),
        }
    }
}

/// The network that a case describes, without any dropout, as all stored numbers are.
pub(crate) fn architecture(case: &Value) -> Architecture {
    let mut config = ModelConfig {
        drop_path: Some(0.0),
        head_dropout: Some(0.0),
        ..ModelConfig::published(text(&case["model"]))
    };
    if let Some(size) = case["size"].as_i64() {
        config.input_size = size;
    }
    for (name, value) in case["options"].as_object().expect("a case has options") {
        set_option(&mut config, name, value);
    }
    Architecture::try_from(&config).unwrap_or_else(|error| panic!("{error}"))
}

/// Sets an option by the name that the reference has for it.
pub(crate) fn set_option(config: &mut ModelConfig, name: &str, value: &Value) {
    let on = || value.as_bool().expect("true or false");
    let count = || value.as_i64().expect("a whole number");
    if value.is_null() {
        return; // The reference's way to say "the default".
    }
    match name {
        "depth_factor" => config.depth_factor = Some(four(value).map(|factor| factor as usize)),
        "num_SA_heads" => config.num_sa_heads = Some(four(value)),
        "num_latent_channels" => config.num_latent_channels = Some(count()),
        "SA_widening_factor" => config.sa_widening_factor = count(),
        "nb_classes" => config.classes = count(),
        "input_size" => config.input_size = count(),
        "spatial_reduction" => config.spatial_reduction = on(),
        "with_last_CA" => config.with_last_ca = on(),
        "with_x2z" => config.with_x2z = on(),
        "with_z2x" => config.with_z2x = on(),
        "with_dwc" => config.with_dwc = on(),
        "with_isc" => config.with_isc = on(),
        other => panic!("unknown option {other}"),
    }
}

/// Four whole numbers, one a stage.
fn four(value: &Value) -> [i64; 4] {
    let stages: Vec<i64> = numbers(value).into_iter().map(|number| number as i64).collect();
    stages.try_into().expect("one number a stage")
}

/// The network of a case over filled weights.
pub(crate) fn build(case: &Value, kind: Kind) -> (Architecture, Weights, Network) {
    let architecture = architecture(case);
    let layout = Arc::new(Layout::of(&architecture));
    let weights = filled_weights(layout, whole(&case["seed"]), kind);
    let network = Network::new(&architecture, &weights);
    (architecture, weights, network)
}

/// A text of a JSON file.
pub(crate) fn text(value: &Value) -> &str {
    value.as_str().expect("a text")
}

/// A whole number of a JSON file that is not negative.
pub(crate) fn whole(value: &Value) -> u64 {
    value.as_u64().expect("a whole number")
}

/// The same as a size.
pub(crate) fn size(value: &Value) -> usize {
    whole(value) as usize
}

/// A number of a JSON file.
pub(crate) fn number(value: &Value) -> f64 {
    value.as_f64().expect("a number")
}

/// FNV-1a 64.
pub(crate) fn fnv1a64(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// The i-th output of SplitMix64 for `seed` and `name`.
pub(crate) fn z(key: u64, i: u64) -> u64 {
    let s = key.wrapping_add((i + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    let s = (s ^ (s >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let s = (s ^ (s >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    s ^ (s >> 31)
}

/// The i-th number in [-1, 1).
pub(crate) fn r(key: u64, i: usize) -> f64 {
    (z(key, i as u64) >> 11) as f64 * 2.0_f64.powi(-52) - 1.0
}

pub(crate) fn key(seed: u64, name: &str) -> u64 {
    fnv1a64(&format!("{seed}/{name}"))
}

/// The fill rule's values of a state-dict entry.
pub(crate) fn filled(seed: u64, name: &str, shape: &[i64]) -> Vec<f32> {
    let fan_in: i64 = shape.iter().skip(1).product();
    let (offset, scale) = if name.ends_with("running_var") {
        (1.0, 0.5)
    } else if name.ends_with("running_mean") {
        (0.0, 0.2)
    } else if name.ends_with("relative_position_bias") {
        (0.0, 0.5)
    } else if name == "latent" {
        (0.0, 1.0)
    } else if shape.len() == 1 && name.ends_with(".weight") {
        (1.0, 0.25)
    } else if shape.len() == 1 {
        (0.0, 0.1)
    } else {
        (0.0, (3.0 / fan_in as f64).sqrt())
    };
    let key = key(seed, name);
    let count: i64 = shape.iter().product();
    (0..count as usize).map(|i| (offset + scale * r(key, i)) as f32).collect()
}

/// Weights of a layout, filled.
pub(crate) fn filled_weights(layout: Arc<Layout>, seed: u64, kind: Kind) -> Weights {
    let mut weights = Weights::zeros(layout.clone(), kind, Device::Cpu);
    for entry in layout.entries().iter().filter(|entry| entry.role != Role::Counter) {
        let values = filled(seed, &entry.name, &entry.shape);
        weights
            .set_value(&entry.name, &Tensor::from_slice(&values).view(&entry.shape[..]))
            .expect("it is of the layout");
    }
    weights
}

/// The image rule: noise on a coarse 7×7 pattern.
pub(crate) fn images(seed: u64, name: &str, batch: usize, size: usize, kind: Kind) -> Tensor {
    let noise = key(seed, &format!("{name}/noise"));
    let coarse = key(seed, &format!("{name}/coarse"));
    let mut values = Vec::with_capacity(batch * 3 * size * size);
    for plane in 0..batch * 3 {
        for y in 0..size {
            for x in 0..size {
                let cell = (plane * 7 + 7 * y / size) * 7 + 7 * x / size;
                values.push((0.5 * r(noise, values.len()) + r(coarse, cell)) as f32);
            }
        }
    }
    let [batch, size] = [batch, size].map(|n| n as i64);
    Tensor::from_slice(&values).view([batch, 3, size, size]).to_kind(kind)
}

/// The label rule.
pub(crate) fn labels(seed: u64, name: &str, batch: usize, classes: u64) -> Vec<i64> {
    let key = key(seed, name);
    (0..batch as u64).map(|i| (z(key, i) % classes) as i64).collect()
}

/// Soft targets of the loss goldens: smoothing 0.1, each label mixed 0.7 to 0.3 with that of the mirrored place.
pub(crate) fn mixed_targets(labels: &[i64], classes: i64, kind: Kind) -> Tensor {
    // As the reference, in f32 throughout.
    let off = 0.1 / classes as f64;
    let (on, off) = ((0.9 + off) as f32, off as f32);
    let level = |class: i64, label: i64| if class == label { on } else { off };
    let mut values = Vec::new();
    for (&label, &partner) in labels.iter().zip(labels.iter().rev()) {
        values
            .extend((0..classes).map(|c| 0.7_f32 * level(c, label) + 0.3_f32 * level(c, partner)));
    }
    Tensor::from_slice(&values).view([labels.len() as i64, classes]).to_kind(kind)
}

pub(crate) fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().expect("a list").iter().map(number).collect()
}

/// `[l2, sum, probe]` of a tensor, in f64.
pub(crate) fn statistics(seed: u64, name: &str, values: &[f64]) -> [f64; 3] {
    let key = key(seed, &format!("probe/{name}"));
    let l2 = values.iter().map(|value| value * value).sum::<f64>().sqrt();
    let probe = values.iter().enumerate().map(|(i, value)| value * r(key, i)).sum();
    [l2, values.iter().sum(), probe]
}

/// The largest difference of statistics, in units of the tensor's norm.
pub(crate) fn statistics_error(found: [f64; 3], expected: &[f64]) -> f64 {
    let scale = expected.iter().fold(1e-300_f64, |scale, value| scale.max(value.abs()));
    found.iter().zip(expected).map(|(a, b)| (a - b).abs() / scale).fold(0.0, f64::max)
}

/// All elements, widened.
pub(crate) fn widened(tensor: &Tensor) -> Vec<f64> {
    let tensor = tensor.to_kind(Kind::Double).contiguous();
    libtorch::slice::<f64>(&tensor).expect("contiguous and f64").to_vec()
}

/// `‖a - b‖ / ‖b‖`.
pub(crate) fn relative_distance(a: &[f64], b: &[f64]) -> f64 {
    let distance = a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt();
    distance / b.iter().map(|b| b * b).sum::<f64>().sqrt().max(1e-300)
}

/// The largest absolute value.
pub(crate) fn max_abs(values: &[f64]) -> f64 {
    values.iter().fold(0.0, |max, value| max.max(value.abs()))
}

/// The largest difference of two elements at the same place.
pub(crate) fn difference(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len(), "numbers of elements");
    a.iter().zip(b).fold(0.0, |max, (a, b)| max.max((a - b).abs()))
}
