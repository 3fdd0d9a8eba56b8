//! The loss alone, on filled logits.

use model::{EXIT_NAMES, Exits, LossConfig, Losses, Targets, multi_exit};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::golden::{self, Golden, number, numbers, r, text, whole};
use super::report::Check;

const KINDS: [(Kind, &str, f64); 2] = [(Kind::Double, "f64", 1e-8), (Kind::Float, "f32", 2e-5)];

/// The factors that the reference's loss is called with. What it does to labels is in the targets.
pub(crate) fn loss_config(arguments: &Value) -> LossConfig {
    LossConfig {
        cnn_factor: number(&arguments["fc"]),
        att_factor: number(&arguments["fa"]),
        merge_factor: number(&arguments["fm"]),
        label_smoothing: 0.0,
        with_kd: arguments["kd"].as_bool().expect("true or false"),
        kd_temperature: number(&arguments["T"]),
        kd_alpha: number(&arguments["alpha"]),
    }
}

/// The largest relative error of all stored components of a loss.
pub(crate) fn loss_error(losses: &Losses, stored: &Value) -> f64 {
    let mut found: Vec<(String, f64)> = Vec::new();
    let cross_entropy = golden::widened(&losses.cross_entropy);
    let teaching = golden::widened(&losses.teaching);
    found.extend(EXIT_NAMES.iter().zip(&cross_entropy).map(|(exit, v)| (format!("ce_{exit}"), *v)));
    found.extend(EXIT_NAMES.iter().zip(&teaching).map(|(exit, v)| (format!("kd_{exit}"), *v)));
    found.push(("kd_total".to_owned(), teaching.iter().sum()));
    found.push(("loss".to_owned(), losses.total.double_value(&[])));
    let errors = found.iter().filter(|(name, _)| !stored[name].is_null()).map(|(name, value)| {
        let stored = number(&stored[name]);
        (value - stored).abs() / stored.abs()
    });
    errors.fold(0.0, f64::max)
}

/// The stored case's logits as leaves.
fn leaves(file: &Value, kind: Kind) -> [Tensor; 4] {
    let [batch, classes] = ["batch", "classes"].map(|name| whole(&file[name]));
    EXIT_NAMES.map(|exit| {
        let key = golden::key(whole(&file["seed"]), &format!("loss/{exit}"));
        let values: Vec<f32> =
            (0..(batch * classes) as usize).map(|i| (4.0 * r(key, i)) as f32).collect();
        let logits = Tensor::from_slice(&values).view([batch as i64, classes as i64]);
        logits.to_kind(kind).set_requires_grad(true)
    })
}

fn exits(leaves: &[Tensor; 4]) -> Exits {
    let [early3, att, cnn, merge] = leaves.each_ref().map(Tensor::shallow_clone);
    Exits { early3, att, cnn, merge }
}

/// Components, gradients with respect to the logits, and losses with hard labels.
pub(crate) fn units(golden: &Golden) -> Vec<Check> {
    let file = golden.json("loss_unit.json");
    let labels: Vec<i64> = numbers(&file["labels"]).into_iter().map(|label| label as i64).collect();
    let mut checks = Vec::new();
    for (kind, label, tolerance) in KINDS {
        let mut parts = Check::new(format!("loss components {label}"), tolerance);
        let mut gradients = Check::new(format!("logit gradients {label}"), tolerance);
        let targets = golden::mixed_targets(&labels, whole(&file["classes"]) as i64, kind);
        for case in file["cases"].as_array().expect("a list") {
            let leaves = leaves(&file, kind);
            let losses = multi_exit(&exits(&leaves), Targets::Soft(&targets), &loss_config(case));
            let error = loss_error(&losses, &case[format!("parts_{label}")]);
            parts.see(error, || text(&case["id"]).to_owned());
            let mut flat = Tensor::zeros([4 * leaves[0].numel() as i64], (kind, Device::Cpu));
            libtorch::gradients_into(&losses.total, &leaves, &mut flat).expect("has gradients");
            let flat = golden::widened(&flat);
            for (exit, found) in EXIT_NAMES.iter().zip(flat.chunks_exact(leaves[0].numel())) {
                let name = format!("loss/{exit}");
                let statistics = golden::statistics(whole(&file["seed"]), &name, found);
                let stored = &case[format!("logit_grads_{label}")][*exit]["l2_sum_probe"];
                let error = golden::statistics_error(statistics, &numbers(stored));
                gradients.see(error, || format!("{exit} {}", text(&case["id"])));
            }
        }
        let hard = hard_labels(&file, &Tensor::from_slice(&labels), (kind, label), tolerance);
        checks.extend([parts, gradients, hard]);
    }
    checks
}

/// Losses with hard labels, smoothed and not.
fn hard_labels(file: &Value, labels: &Tensor, kind: (Kind, &str), tolerance: f64) -> Check {
    let mut check = Check::new(format!("losses with hard labels {}", kind.1), tolerance);
    let cases = file["hard_label_losses_on_merge_logits"].as_object().expect("losses by name");
    for (name, stored) in cases {
        let smoothing = name.trim_start_matches("smoothing_").parse().expect("a number");
        let config = LossConfig { label_smoothing: smoothing, ..LossConfig::default() };
        let losses = multi_exit(&exits(&leaves(file, kind.0)), Targets::Labels(labels), &config);
        let stored = number(&stored[kind.1]);
        let found = losses.cross_entropy.double_value(&[3]);
        check.see((found - stored).abs() / stored, || name.clone());
    }
    check
}
