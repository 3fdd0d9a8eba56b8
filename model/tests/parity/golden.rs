//! The reference's numbers: where they are, the rule that fills weights and inputs, and how to compare.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use model::{Architecture, Layout, ModelConfig, Role, Weights};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

/// The folder with the reference's numbers, if this checkout has one beside it.
pub(crate) fn folder() -> Option<PathBuf> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared/reference/golden");
    folder.is_dir().then_some(folder)
}

/// A JSON file of the folder; says so and gives nothing if there is none.
pub(crate) fn json(file: &str) -> Option<Value> {
    let path = folder().map(|folder| folder.join(file)).filter(|path| path.is_file());
    let Some(path) = path else {
        println!("skipped: no {file} in ../shared/reference/golden beside the repository");
        return None;
    };
    Some(serde_json::from_slice(&fs::read(path).unwrap()).unwrap())
}

/// The cases of a JSON file.
pub(crate) fn cases(file: &str, key: &str) -> Vec<Value> {
    let Some(mut root) = json(file) else { return Vec::new() };
    let Value::Array(cases) = root[key].take() else { panic!("{file} has no list {key}") };
    cases
}

/// The architecture that a case describes.
pub(crate) fn architecture(case: &Value) -> Architecture {
    let options = &case["options"];
    let on = |name: &str| options[name].as_bool().unwrap();
    let depth: Vec<usize> =
        numbers(&options["depth_factor"]).into_iter().map(|factor| factor as usize).collect();
    let config = ModelConfig {
        depth_factor: Some(depth.try_into().unwrap()),
        sa_widening_factor: options["SA_widening_factor"].as_i64().unwrap(),
        with_last_ca: on("with_last_CA"),
        with_x2z: on("with_x2z"),
        with_z2x: on("with_z2x"),
        with_dwc: on("with_dwc"),
        with_isc: on("with_isc"),
        spatial_reduction: on("spatial_reduction"),
        drop_path: Some(0.0),
        head_dropout: Some(0.0),
        ..ModelConfig::published(case["model"].as_str().unwrap())
    };
    Architecture::try_from(&config).unwrap()
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
            .unwrap();
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
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
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
    libtorch::slice::<f64>(&tensor).unwrap().to_vec()
}

/// `‖a - b‖ / ‖b‖`.
pub(crate) fn relative_distance(a: &[f64], b: &[f64]) -> f64 {
    let distance = a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt();
    distance / b.iter().map(|b| b * b).sum::<f64>().sqrt().max(1e-300)
}

/// The worst of many errors and where it was.
#[derive(Debug, Default)]
pub(crate) struct Worst {
    error: f64,
    place: String,
    cases: usize,
}

impl Worst {
    /// Takes an error in units of its tolerance; NaN counts as the worst there is.
    pub(crate) fn see(&mut self, error: f64, place: impl FnOnce() -> String) {
        self.cases += 1;
        if error > self.error || error.is_nan() {
            self.error = if error.is_nan() { f64::INFINITY } else { error };
            self.place = place();
        }
    }

    /// Prints the worst and fails if it is above `tolerance`.
    pub(crate) fn must_be_within(&self, tolerance: f64, what: &str) {
        let Worst { error, place, cases } = self;
        println!("{what}: {cases} cases, worst {error:.2e} ({place}), tolerance {tolerance:.0e}");
        assert!(error <= &tolerance, "{what}: {error:.3e} at {place}, tolerance {tolerance:e}");
    }
}
