//! Losses, gradients, updates and averages of the whole network.

use std::collections::BTreeSet;
use std::fs;

use model::{
    AdamW, AdamWConfig, EXIT_NAMES, Ema, LossConfig, Losses, Network, Role, Targets, Update,
    Weights, multi_exit,
};
use serde_json::Value;
use tch::{Kind, Tensor};

use crate::golden::{self, Worst, numbers, relative_distance};
use crate::network::{DRAWS, build};

pub(crate) fn loss_config(arguments: &Value) -> LossConfig {
    let number = |name: &str| arguments[name].as_f64().unwrap();
    LossConfig {
        cnn_factor: number("fc"),
        att_factor: number("fa"),
        merge_factor: number("fm"),
        label_smoothing: 0.0,
        with_kd: arguments["kd"].as_bool().unwrap(),
        kd_temperature: number("T"),
        kd_alpha: number("alpha"),
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
        let stored = stored[name].as_f64().unwrap();
        (value - stored).abs() / stored.abs()
    });
    errors.fold(0.0, f64::max)
}

/// Names whose gradient is rounding noise.
fn without_gradient(case: &Value) -> BTreeSet<&str> {
    let names = case["zero_gradient_parameters"].as_array().unwrap();
    names.iter().map(|name| name.as_str().unwrap()).collect()
}

/// An entry's elements of a flat tensor.
fn part<'v>(values: &'v [f64], entry: &model::Entry) -> &'v [f64] {
    &values[entry.range.clone()]
}

/// One training forward and backward of `input_train`.
struct Pass {
    weights: Weights,
    logits: Vec<Vec<f64>>,
    losses: Losses,
    gradients: Vec<f64>,
}

fn pass(case: &Value, kind: Kind) -> Pass {
    let (seed, size) = (case["seed"].as_u64().unwrap(), case["size"].as_u64().unwrap() as usize);
    let batch = case["batch"].as_u64().unwrap() as usize;
    let (architecture, weights, network) = build(case, kind);
    let labels = golden::labels(seed, "labels", batch, architecture.classes() as u64);
    assert_eq!(labels.iter().map(|l| *l as f64).collect::<Vec<_>>(), numbers(&case["labels"]));
    let targets = golden::mixed_targets(&labels, architecture.classes(), kind);
    let images = golden::images(seed, "input_train", batch, size, kind);
    let exits = network.forward_train(&images, &DRAWS);
    let losses = multi_exit(&exits, Targets::Soft(&targets), &loss_config(&case["loss_args"]));
    let mut flat = weights.params().zeros_like();
    network.gradients(&losses.total, &mut flat).unwrap();
    let logits = exits.in_order().map(golden::widened).into();
    Pass { weights, logits, losses, gradients: golden::widened(&flat) }
}

/// The training logits and moved running statistics against `forward`'s, in units of their tolerance.
fn training_forward_error(pass: &Pass, case: &Value, double: bool) -> Worst {
    let model = case["model"].as_str().unwrap();
    let bytes = fs::read(golden::folder().unwrap().join("forward.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut worst = Worst::default();
    for (exit, logits) in EXIT_NAMES.iter().zip(&pass.logits) {
        let stored = file.tensor(&format!("{model}.train.{exit}.f64")).unwrap();
        let stored = stored.data().chunks_exact(8);
        let stored: Vec<f64> =
            stored.map(|bytes| f64::from_le_bytes(bytes.try_into().unwrap())).collect();
        let scale = stored.iter().fold(0.0_f64, |max, value| max.max(value.abs()));
        let recorded = case["f32_vs_f64_max_abs"][format!("train.{exit}")].as_f64().unwrap();
        let tolerance = if double { 1e-8 * scale } else { 5.0 * recorded };
        for (found, stored) in logits.iter().zip(&stored) {
            worst.see((found - stored).abs() / tolerance, || (*exit).to_owned());
        }
    }
    let buffers = golden::widened(pass.weights.buffers());
    for entry in pass.weights.layout().entries().iter().filter(|e| e.role == Role::Buffer) {
        let stored = numbers(&case["bn_after_train_f64"][&entry.name]); // sum, norm
        let values = part(&buffers, entry);
        let norm = values.iter().map(|value| value * value).sum::<f64>().sqrt();
        let tolerance = if double { 1e-8 } else { 1e-5 } * stored[1];
        worst.see((norm - stored[1]).abs() / tolerance, || entry.name.clone());
        let sum: f64 = values.iter().sum();
        worst.see((sum - stored[0]).abs() / tolerance, || entry.name.clone());
    }
    worst
}

#[test]
fn a_training_pass_equals_the_stored_logits_losses_gradients_and_statistics() {
    let forwards = golden::cases("forward.json", "cases");
    for case in golden::cases("backward.json", "cases") {
        let forward = forwards.iter().find(|forward| forward["model"] == case["model"]).unwrap();
        let silent = without_gradient(&case);
        let double = pass(&case, Kind::Double);
        let single = pass(&case, Kind::Float);

        let of_tolerance = "of the tolerance";
        training_forward_error(&double, forward, true)
            .must_be_within(1.0, &format!("training forward f64, {of_tolerance}"));
        training_forward_error(&single, forward, false)
            .must_be_within(1.0, &format!("training forward f32, {of_tolerance}"));
        assert!(loss_error(&double.losses, &case["loss_f64"]) < 1e-8);
        assert!(loss_error(&single.losses, &case["loss_f64"]) < 1e-5);

        let (mut exact, mut rounded) = (Worst::default(), Worst::default());
        let mut ratios = Vec::new();
        let layout = double.weights.layout();
        for entry in layout.entries().iter().filter(|e| !silent.contains(e.name.as_str())) {
            let stored = &case["grads_f64"][&entry.name];
            if stored.is_null() {
                continue;
            }
            let [found, in_single] =
                [&double.gradients, &single.gradients].map(|flat| part(flat, entry));
            let statistics = golden::statistics(case["seed"].as_u64().unwrap(), &entry.name, found);
            let error = golden::statistics_error(statistics, &numbers(stored));
            exact.see(error, || entry.name.clone());
            let recorded = case["grad_rel_err_f32_vs_f64"][&entry.name].as_f64().unwrap();
            let error = relative_distance(in_single, found);
            // One ReLU whose input is rounding noise, and so has either sign, costs up to 3e-2. Where it
            // happens is chance: five times the recorded error can hold only for most tensors.
            rounded.see(error / (5.0 * recorded).max(3e-2), || entry.name.clone());
            ratios.push(error / recorded);
        }
        exact.must_be_within(1e-8, "gradients f64");
        rounded.must_be_within(1.0, "gradients f32, of the tolerance");
        ratios.sort_by(f64::total_cmp);
        let median = ratios[ratios.len() / 2];
        println!("gradients f32: median {median:.2} of the recorded error");
        assert!(median <= 5.0);
        let norm = double.gradients.iter().map(|g| g * g).sum::<f64>().sqrt();
        let stored = case["total_grad_norm_f64"].as_f64().unwrap();
        assert!((norm - stored).abs() / stored < 1e-8);
    }
}

/// What three updates leave: live weights and averages, minus the values they started from.
struct Trained {
    losses: Vec<f64>,
    /// Live, then one for each decay: parameters and buffers.
    deltas: Vec<[Vec<f64>; 2]>,
    weights: Weights,
}

fn train(case: &Value, kind: Kind) -> Trained {
    let (seed, size) = (case["seed"].as_u64().unwrap(), case["size"].as_u64().unwrap() as usize);
    let batch = case["batch"].as_u64().unwrap() as usize;
    let (architecture, mut weights, network) = build(case, kind);
    let start = weights.duplicate();
    let decays = numbers(&case["ema_decays"]);
    let mut averages: Vec<Ema> = decays.iter().map(|_| Ema::new(&weights)).collect();
    let mut optimizer = AdamW::new(AdamWConfig::default(), weights.layout(), weights.params());
    let mut gradients = weights.params().zeros_like();
    let mut losses = Vec::new();
    for (step, &learning_rate) in numbers(&case["lr"]).iter().enumerate() {
        let images = golden::images(seed, &format!("input_step{step}"), batch, size, kind);
        let labels = format!("labels_step{step}");
        let labels = golden::labels(seed, &labels, batch, architecture.classes() as u64);
        let targets = golden::mixed_targets(&labels, architecture.classes(), kind);
        losses.push(gradients_of(&network, &images, &targets, &mut gradients));
        let weight_decay = case["weight_decay"].as_f64().unwrap();
        let update = Update { step: step as u64, learning_rate, weight_decay };
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
    network.gradients(&losses.total, flat).unwrap();
    losses.total.double_value(&[])
}

#[test]
fn three_updates_with_averages_equal_the_stored_ones() {
    for case in golden::cases("optim.json", "cases") {
        let silent = without_gradient(&case);
        let seed = case["seed"].as_u64().unwrap();
        let double = train(&case, Kind::Double);
        let single = train(&case, Kind::Float);
        for (found, stored) in double.losses.iter().zip(numbers(&case["losses_f64"])) {
            assert!((found - stored).abs() / stored < 1e-6, "loss {found}, stored {stored}");
        }
        for (found, stored) in single.losses.iter().zip(numbers(&case["losses_f64"])) {
            assert!((found - stored).abs() / stored < 5e-5, "loss {found}, stored {stored}");
        }
        let (mut exact, mut rounded) = (Worst::default(), Worst::default());
        for entry in double.weights.layout().entries() {
            let which = match entry.role {
                Role::Decayed | Role::Undecayed => 0,
                Role::Buffer => 1,
                Role::Counter => continue,
            };
            if silent.contains(entry.name.as_str()) {
                continue;
            }
            let keys = ["delta_f64", "ema9999_delta_f64", "ema9_delta_f64"];
            for (key, delta) in keys.iter().zip(&double.deltas) {
                let values = part(&delta[which], entry);
                let statistics = golden::statistics(seed, &entry.name, values);
                let error =
                    golden::statistics_error(statistics, &numbers(&case[*key][&entry.name]));
                exact.see(error, || format!("{key} {}", entry.name));
            }
            let [found, exact] =
                [&single, &double].map(|trained| part(&trained.deltas[0][which], entry));
            let recorded = case["delta_rel_err_f32_vs_f64"][&entry.name].as_f64().unwrap();
            let error = relative_distance(found, exact) / (5.0 * recorded).max(1e-6);
            rounded.see(error, || entry.name.clone());
        }
        exact.must_be_within(1e-6, "three updates f64");
        rounded.must_be_within(1.0, "three updates f32, of five times the recorded error");
    }
}
