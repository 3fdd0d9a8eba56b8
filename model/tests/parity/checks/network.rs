//! Logits of the whole network.

use model::{Draws, EXIT_NAMES, Network};
use safetensors::SafeTensors;
use serde_json::Value;
use tch::{Kind, Tensor};

use super::golden::{self, Golden, build, difference, max_abs, number, numbers, size, text, whole};
use super::report::{Check, for_each_case};

/// All stored numbers are without dropout, so these decide nothing.
pub(crate) const DRAWS: Draws = Draws { seed: 0, step: 0, virtual_rank: 0 };

/// A kind, its name, and whether it is the one for the strict comparison.
pub(crate) const KINDS: [(Kind, &str); 2] = [(Kind::Double, "f64"), (Kind::Float, "f32")];

/// The two ways to run a network, and the images that the reference ran it on.
pub(crate) const MODES: [(&str, &str); 2] = [("eval", "input"), ("train", "input_train")];

/// The logits of a case in one mode, without a graph.
fn logits(network: &Network, case: &Value, mode: (&str, &str), kind: Kind) -> Vec<Tensor> {
    let batch = size(&case[format!("{}_batch", mode.0)]);
    let images = golden::images(whole(&case["seed"]), mode.1, batch, size(&case["size"]), kind);
    let exits = tch::no_grad(|| match mode.0 {
        "eval" => network.forward_eval(&images),
        _ => network.forward_train(&images, &DRAWS),
    });
    exits.in_order().map(Tensor::shallow_clone).into()
}

/// The logits that a file stores in f64, exits in order.
fn stored_logits(file: &SafeTensors<'_>, model: &str, mode: &str) -> Vec<Vec<f64>> {
    let read = |exit: &str| {
        let tensor = file.tensor(&format!("{model}.{mode}.{exit}.f64")).expect("stored logits");
        let values = tensor.data().chunks_exact(8);
        values.map(|bytes| f64::from_le_bytes(bytes.try_into().expect("eight bytes"))).collect()
    };
    EXIT_NAMES.iter().map(|exit| read(exit)).collect()
}

/// All logits, and the running statistics that the training forward moved.
pub(crate) fn forward(golden: &Golden) -> Vec<Check> {
    let bytes = golden.bytes("forward.safetensors");
    let file = SafeTensors::deserialize(&bytes).expect("a file of tensors");
    for_each_case(&golden.cases("forward.json", "cases"), |case| {
        let model = text(&case["model"]);
        let mut checks = Vec::new();
        for (kind, label) in KINDS {
            let (_, weights, network) = build(case, kind);
            for mode in MODES {
                let what = format!("{model} {} logits {label}, of the tolerance", mode.0);
                let mut check = Check::in_tolerances(what);
                let stored = stored_logits(&file, model, mode.0);
                let found = logits(&network, case, mode, kind);
                for ((exit, found), stored) in EXIT_NAMES.iter().zip(&found).zip(&stored) {
                    let error = difference(&golden::widened(found), stored);
                    let recorded = &case["f32_vs_f64_max_abs"][format!("{}.{exit}", mode.0)];
                    let tolerance = match kind {
                        Kind::Double => 1e-8 * max_abs(stored),
                        _ => 5.0 * number(recorded),
                    };
                    check.see(error / tolerance, || (*exit).to_owned());
                }
                checks.push(check);
            }
            checks.push(running_statistics(&weights, case, label));
        }
        checks
    })
}

/// Sum and norm of every running statistic after one training forward.
fn running_statistics(weights: &model::Weights, case: &Value, label: &str) -> Check {
    let tolerance = if label == "f64" { 1e-8 } else { 1e-5 };
    let what = format!("{} moved statistics {label}", text(&case["model"]));
    let mut check = Check::new(what, tolerance);
    for (name, stored) in case["bn_after_train_f64"].as_object().expect("statistics by name") {
        let (stored, value) = (numbers(stored), weights.value(name).expect("a running statistic"));
        let values = golden::widened(&value);
        let sum: f64 = values.iter().sum();
        let norm = values.iter().map(|value| value * value).sum::<f64>().sqrt();
        check.see((sum - stored[0]).abs() / stored[1], || format!("sum of {name}"));
        check.see((norm - stored[1]).abs() / stored[1], || format!("norm of {name}"));
    }
    check
}

/// Logits with one option off.
pub(crate) fn variants(golden: &Golden) -> Vec<Check> {
    for_each_case(&golden.cases("variants.json", "cases"), |case| {
        let mut checks = Vec::new();
        for ((kind, label), tolerance) in KINDS.into_iter().zip([1e-8, 2e-4]) {
            let (_, _, network) = build(case, kind);
            for mode in MODES {
                let (model, off) = (text(&case["model"]), text(&case["off"]));
                let what = format!("{model} without {off}, {} logits {label}", mode.0);
                let mut check = Check::new(what, tolerance);
                let stored = &case[format!("{}_{label}", mode.0)];
                let found = logits(&network, case, mode, kind);
                for (exit, found) in EXIT_NAMES.iter().zip(&found) {
                    check.see(variant_error(found, &stored[*exit]), || (*exit).to_owned());
                }
                checks.push(check);
            }
        }
        checks
    })
}

/// The error against sum, norm and the first few of the stored logits.
fn variant_error(logits: &Tensor, stored: &Value) -> f64 {
    let values = golden::widened(logits);
    let first = numbers(&stored["first"]);
    let l2 = values.iter().map(|value| value * value).sum::<f64>().sqrt();
    let by_element = difference(&values[..first.len()], &first) / max_abs(&values);
    let by_norm = (l2 - number(&stored["l2"])).abs() / l2;
    let by_sum = (values.iter().sum::<f64>() - number(&stored["sum"])).abs() / l2;
    by_element.max(by_norm).max(by_sum)
}
