//! Gradients, updates and averages of the whole network.

use std::collections::BTreeSet;

use model::{
    AdamW, AdamWConfig, Ema, Entry, LossConfig, Losses, Network, Role, Targets, Update, Weights,
    multi_exit,
};
use serde_json::Value;
use tch::{Kind, Tensor};

use super::golden::{self, Golden, build, number, numbers, relative_distance, size, text, whole};
use super::loss::{loss_config, loss_error};
use super::network::DRAWS;
use super::report::{Check, for_each_case};

/// Names whose gradient is rounding noise.
fn without_gradient(case: &Value) -> BTreeSet<&str> {
    case["zero_gradient_parameters"].as_array().expect("a list").iter().map(text).collect()
}

/// An entry's elements of a flat tensor.
fn part<'v>(values: &'v [f64], entry: &Entry) -> &'v [f64] {
    &values[entry.range.clone()]
}

/// Images `input_<name>` and the soft targets of labels `labels<name>`.
fn batch(case: &Value, images: &str, labels: &str, classes: i64, kind: Kind) -> [Tensor; 2] {
    let (seed, batch) = (whole(&case["seed"]), size(&case["batch"]));
    let labels = golden::labels(seed, labels, batch, classes as u64);
    let targets = golden::mixed_targets(&labels, classes, kind);
    [golden::images(seed, images, batch, size(&case["size"]), kind), targets]
}

/// One training forward and backward of `input_train`.
struct Pass {
    weights: Weights,
    losses: Losses,
    gradients: Vec<f64>,
}

fn pass(case: &Value, kind: Kind) -> Pass {
    let (architecture, weights, network) = build(case, kind);
    let [images, targets] = batch(case, "input_train", "labels", architecture.classes(), kind);
    let exits = network.forward_train(&images, &DRAWS);
    let losses = multi_exit(&exits, Targets::Soft(&targets), &loss_config(&case["loss_args"]));
    let mut flat = weights.params().zeros_like();
    network.gradients(&losses.total, &mut flat).expect("has gradients");
    Pass { weights, losses, gradients: golden::widened(&flat) }
}

/// What one rounding can do to an f32 gradient, relative to its norm: a ReLU whose input is rounding noise and
/// so has either sign. Some 25 of 20 million are in the stored cases, and where they are is chance, so five
/// times the recorded error can hold only for tensors that none of them reaches.
const SIGN_OF_NOISE: f64 = 3e-2;

/// Losses and gradients of one training pass.
pub(crate) fn backward(golden: &Golden) -> Vec<Check> {
    for_each_case(&golden.cases("backward.json", "cases"), |case| {
        let model = text(&case["model"]);
        let silent = without_gradient(case);
        let [double, single] = [Kind::Double, Kind::Float].map(|kind| pass(case, kind));
        let mut checks = Vec::new();
        for (pass, label, tolerance) in [(&double, "f64", 1e-8), (&single, "f32", 1e-5)] {
            let mut check = Check::new(format!("{model} loss {label}"), tolerance);
            check.see(loss_error(&pass.losses, &case["loss_f64"]), String::new);
            checks.push(check);
        }
        let mut exact = Check::new(format!("{model} gradients f64"), 1e-8);
        let mut rounded = Check::in_tolerances(format!("{model} gradients f32, of the tolerance"));
        let mut ratios = Vec::new();
        for entry in double.weights.layout().entries() {
            let stored = &case["grads_f64"][&entry.name];
            if stored.is_null() || silent.contains(entry.name.as_str()) {
                continue;
            }
            let [found, in_single] =
                [&double.gradients, &single.gradients].map(|flat| part(flat, entry));
            let statistics = golden::statistics(whole(&case["seed"]), &entry.name, found);
            let error = golden::statistics_error(statistics, &numbers(stored));
            exact.see(error, || entry.name.clone());
            let recorded = number(&case["grad_rel_err_f32_vs_f64"][&entry.name]);
            let error = relative_distance(in_single, found);
            rounded.see(error / (5.0 * recorded).max(SIGN_OF_NOISE), || entry.name.clone());
            ratios.push(error / recorded);
        }
        let mut typical =
            Check::new(format!("{model} gradients f32, median of the recorded error"), 5.0);
        typical.see(median(ratios), String::new);
        let norm = double.gradients.iter().map(|g| g * g).sum::<f64>().sqrt();
        let stored = number(&case["total_grad_norm_f64"]);
        exact.see((norm - stored).abs() / stored, || "total norm".to_owned());
        checks.extend([exact, rounded, typical]);
        checks
    })
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// What some updates leave: live weights and averages, minus the values they started from.
struct Trained {
    losses: Vec<f64>,
    /// Live, then one for each decay: parameters and buffers.
    deltas: Vec<[Vec<f64>; 2]>,
    weights: Weights,
}

fn train(case: &Value, kind: Kind) -> Trained {
    let (architecture, mut weights, network) = build(case, kind);
    let start = weights.duplicate();
    let decays = numbers(&case["ema_decays"]);
    let mut averages: Vec<Ema> = decays.iter().map(|_| Ema::new(&weights)).collect();
    let [beta1, beta2] = numbers(&case["betas"])[..] else { panic!("two betas") };
    let config = AdamWConfig { beta1, beta2, epsilon: number(&case["eps"]) };
    let mut optimizer = AdamW::new(config, weights.layout(), weights.params());
    let mut gradients = weights.params().zeros_like();
    let mut losses = Vec::new();
    for (step, &learning_rate) in (0..).zip(&numbers(&case["lr"])) {
        let names = [format!("input_step{step}"), format!("labels_step{step}")];
        let [images, targets] = batch(case, &names[0], &names[1], architecture.classes(), kind);
        losses.push(gradients_of(&network, &images, &targets, &mut gradients));
        let update = Update { step, learning_rate, weight_decay: number(&case["weight_decay"]) };
        optimizer.step(weights.params_mut(), &gradients, &update);
        for (average, &decay) in averages.iter_mut().zip(&decays) {
            average.update(&weights, decay);
        }
    }
    let all = std::iter::once(&weights).chain(averages.iter().map(Ema::weights));
    let delta = |weights: &Weights| {
        let pairs = [(weights.params(), start.params()), (weights.buffers(), start.buffers())];
        pairs.map(|(end, start)| {
            golden::widened(&(end.to_kind(Kind::Double) - start.to_kind(Kind::Double)))
        })
    };
    Trained { losses, deltas: all.map(delta).collect(), weights }
}

fn gradients_of(network: &Network, images: &Tensor, targets: &Tensor, flat: &mut Tensor) -> f64 {
    let exits = network.forward_train(images, &DRAWS);
    let losses = multi_exit(&exits, Targets::Soft(targets), &LossConfig::default());
    network.gradients(&losses.total, flat).expect("has gradients");
    losses.total.double_value(&[])
}

/// The key of an average's stored changes: `ema9999_delta_f64` for a decay of 0.9999.
fn average_key(decay: f64) -> String {
    format!("ema{}_delta_f64", format!("{decay}").trim_start_matches("0."))
}

/// Losses, and what updates leave of the live weights and of two averages.
pub(crate) fn updates(golden: &Golden) -> Vec<Check> {
    for_each_case(&golden.cases("optim.json", "cases"), |case| {
        let model = text(&case["model"]);
        let silent = without_gradient(case);
        let [double, single] = [Kind::Double, Kind::Float].map(|kind| train(case, kind));
        let mut losses = Check::new(format!("{model} losses of the updates f64"), 1e-6);
        // The second update's losses differ by up to 3e-4 when the images move by one rounding: Adam turns a
        // gradient's noise into steps of full size.
        let mut losses_single = Check::new(format!("{model} losses of the updates f32"), 5e-4);
        for (step, stored) in numbers(&case["losses_f64"]).into_iter().enumerate() {
            let error = |found: f64| (found - stored).abs() / stored;
            losses.see(error(double.losses[step]), || format!("step {step}"));
            losses_single.see(error(single.losses[step]), || format!("step {step}"));
        }
        let mut exact = Check::new(format!("{model} updates f64"), 1e-6);
        let what = format!("{model} updates f32, of the tolerance");
        let mut rounded = Check::in_tolerances(what);
        let mut ratios = Vec::new();
        let averages = numbers(&case["ema_decays"]).into_iter().map(average_key);
        let keys: Vec<String> = std::iter::once("delta_f64".to_owned()).chain(averages).collect();
        for entry in double.weights.layout().entries() {
            let which = match entry.role {
                Role::Decayed | Role::Undecayed => 0,
                Role::Buffer => 1,
                Role::Counter => continue,
            };
            if silent.contains(entry.name.as_str()) {
                continue;
            }
            for (key, delta) in keys.iter().zip(&double.deltas) {
                let values = part(&delta[which], entry);
                let statistics = golden::statistics(whole(&case["seed"]), &entry.name, values);
                let stored = numbers(&case[key][&entry.name]);
                let error = golden::statistics_error(statistics, &stored);
                exact.see(error, || format!("{key} {}", entry.name));
            }
            let [found, exact] =
                [&single, &double].map(|trained| part(&trained.deltas[0][which], entry));
            let recorded = number(&case["delta_rel_err_f32_vs_f64"][&entry.name]);
            let error = relative_distance(found, exact);
            // The gradients that move the parameters have what `SIGN_OF_NOISE` is about.
            let floor = if which == 0 { SIGN_OF_NOISE } else { 1e-6 };
            rounded.see(error / (5.0 * recorded).max(floor), || entry.name.clone());
            ratios.push(error / recorded);
        }
        let mut typical =
            Check::new(format!("{model} updates f32, median of the recorded error"), 5.0);
        typical.see(median(ratios), String::new);
        vec![losses, losses_single, exact, rounded, typical]
    })
}
