//! State dicts and logits.

use std::fs;
use std::sync::Arc;

use model::{Architecture, Draws, EXIT_NAMES, Layout, Network, Role, Weights};
use serde_json::Value;
use tch::{Kind, Tensor};

use crate::golden::{self, Worst, numbers};

pub(crate) const DRAWS: Draws = Draws { seed: 0, step: 0, virtual_rank: 0 };

/// A case's network over filled weights.
pub(crate) fn build(case: &Value, kind: Kind) -> (Architecture, Weights, Network) {
    libtorch::init(1).unwrap();
    let architecture = golden::architecture(case);
    let layout = Arc::new(Layout::of(&architecture));
    let weights = golden::filled_weights(layout, case["seed"].as_u64().unwrap(), kind);
    let network = Network::new(&architecture, &weights);
    (architecture, weights, network)
}

#[test]
fn state_dicts_have_the_reference_s_names_shapes_and_order() {
    let mut cases = golden::cases("models.json", "models");
    cases.extend(golden::cases("models.json", "variants"));
    for case in cases.iter().filter(|case| case["unsupported"].is_null()) {
        let name = format!("{} without {}", case["model"], case["off"]);
        let layout = Layout::of(&golden::architecture(case));
        let lines: Vec<String> = layout.entries().iter().map(line).collect();
        for (line, stored) in lines.iter().zip(case["state"].as_array().unwrap()) {
            let shape: Vec<i64> =
                numbers(&stored[1]).into_iter().map(|dimension| dimension as i64).collect();
            let stored = line_of(stored[0].as_str().unwrap(), &shape, stored[2].as_str().unwrap());
            assert_eq!(line, &stored, "{name}");
        }
        assert_eq!(lines.len() as u64, case["n_entries"].as_u64().unwrap(), "{name}");
        let hash = format!("{:016x}", golden::fnv1a64(&lines.join("\n")));
        assert_eq!(hash, case["state_fnv1a64"].as_str().unwrap(), "{name}");
        assert_eq!(layout.param_len() as u64, case["params"].as_u64().unwrap(), "{name}");
        assert_eq!(layout.decay_len() as u64, case["decay_params"].as_u64().unwrap(), "{name}");
    }
}

fn line(entry: &model::Entry) -> String {
    let kind = if entry.role == Role::Counter { "i64" } else { "f32" };
    line_of(&entry.name, &entry.shape, kind)
}

fn line_of(name: &str, shape: &[i64], kind: &str) -> String {
    let dimensions: Vec<String> = shape.iter().map(i64::to_string).collect();
    format!("{name} {} {kind}", dimensions.join("x"))
}

#[test]
fn the_fill_rule_gives_the_stored_vectors() {
    let Some(file) = golden::json("fill.json") else { return };
    let seed = file["seed"].as_u64().unwrap();
    for tensor in file["tensors"].as_array().unwrap() {
        let name = tensor["name"].as_str().unwrap();
        if name.ends_with("num_batches_tracked") {
            continue;
        }
        let shape: Vec<i64> = numbers(&tensor["shape"]).into_iter().map(|n| n as i64).collect();
        let values = golden::filled(seed, name, &shape);
        let first: Vec<f64> = values.iter().take(4).map(|value| f64::from(*value)).collect();
        assert_eq!(first, numbers(&tensor["values_first4"]), "{name}");
        let sum: f64 = values.iter().map(|value| f64::from(*value)).sum();
        assert!((sum - tensor["sum"].as_f64().unwrap()).abs() < 1e-9, "{name}");
    }
    let input = golden::images(seed, "input", 2, 224, Kind::Double);
    let probe = input.double_value(&[1, 2, 100, 200]);
    assert!((probe - file["input"]["at_1_2_100_200"].as_f64().unwrap()).abs() < 1e-12);
}

/// The stored logits of a mode and a kind, exits in order.
fn stored_logits(file: &safetensors::SafeTensors<'_>, model: &str, mode: &str) -> Vec<Vec<f64>> {
    let read = |exit: &str| {
        let tensor = file.tensor(&format!("{model}.{mode}.{exit}.f64")).unwrap();
        let values = tensor.data().chunks_exact(8);
        values.map(|bytes| f64::from_le_bytes(bytes.try_into().unwrap())).collect()
    };
    EXIT_NAMES.iter().map(|exit| read(exit)).collect()
}

fn max_abs(values: &[f64]) -> f64 {
    values.iter().fold(0.0, |max, value| max.max(value.abs()))
}

fn difference(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0.0, |max, (a, b)| max.max((a - b).abs()))
}

#[test]
fn eval_logits_equal_the_stored_ones() {
    let Some(folder) = golden::folder() else { return };
    let bytes = fs::read(folder.join("forward.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    for case in golden::cases("forward.json", "cases") {
        let model = case["model"].as_str().unwrap();
        let (seed, size) = (case["seed"].as_u64().unwrap(), case["size"].as_u64().unwrap());
        let batch = case["eval_batch"].as_u64().unwrap();
        let stored = stored_logits(&file, model, "eval");
        for (kind, label) in [(Kind::Double, "f64"), (Kind::Float, "f32")] {
            let (_, _, network) = build(&case, kind);
            let images = golden::images(seed, "input", batch as usize, size as usize, kind);
            let exits = network.forward_eval(&images);
            let mut worst = Worst::default();
            for ((exit, logits), stored) in EXIT_NAMES.iter().zip(exits.in_order()).zip(&stored) {
                let error = difference(&golden::widened(logits), stored);
                let recorded = &case["f32_vs_f64_max_abs"][format!("eval.{exit}")];
                let scale = match kind {
                    Kind::Double => 1e-8 * max_abs(stored),
                    _ => 5.0 * recorded.as_f64().unwrap(),
                };
                worst.see(error / scale, || (*exit).to_owned());
            }
            worst.must_be_within(1.0, &format!("{model} eval logits {label}, of the tolerance"));
        }
    }
}

/// The logits that `variants.json` holds for one mode: sum, norm and the first six.
fn variant_error(logits: &Tensor, stored: &Value) -> f64 {
    let values = golden::widened(logits);
    let first = numbers(&stored["first"]);
    let l2 = values.iter().map(|value| value * value).sum::<f64>().sqrt();
    let scale = max_abs(&values);
    let by_element = difference(&values[..first.len()], &first) / scale;
    let by_norm = (l2 - stored["l2"].as_f64().unwrap()).abs() / l2;
    let by_sum = (values.iter().sum::<f64>() - stored["sum"].as_f64().unwrap()).abs() / l2;
    by_element.max(by_norm).max(by_sum)
}

#[test]
fn every_option_switched_off_gives_the_stored_logits() {
    for case in golden::cases("variants.json", "cases") {
        let (seed, size) = (case["seed"].as_u64().unwrap(), case["size"].as_u64().unwrap());
        for (kind, label, tolerance) in [(Kind::Double, "f64", 1e-8), (Kind::Float, "f32", 2e-4)] {
            let (_, _, network) = build(&case, kind);
            for (mode, input) in [("eval", "input"), ("train", "input_train")] {
                let batch = case[format!("{mode}_batch")].as_u64().unwrap();
                let images = golden::images(seed, input, batch as usize, size as usize, kind);
                let exits = tch::no_grad(|| match mode {
                    "eval" => network.forward_eval(&images),
                    _ => network.forward_train(&images, &DRAWS),
                });
                let stored = &case[format!("{mode}_{label}")];
                let mut worst = Worst::default();
                for (exit, logits) in EXIT_NAMES.iter().zip(exits.in_order()) {
                    worst.see(variant_error(logits, &stored[*exit]), || (*exit).to_owned());
                }
                let off = case["off"].as_str().unwrap();
                worst.must_be_within(tolerance, &format!("{off} off, {mode} {label}"));
            }
        }
    }
}
