//! Losses, optimizer, averages, rates and initial values, each alone.

use std::sync::Arc;

use model::ema::average_counter;
use model::{
    AdamW, AdamWConfig, Ema, Exits, Layout, LossConfig, Role, Schedule, ScheduleConfig, Targets,
    Update, Weights, multi_exit,
};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::golden::{self, Worst, key, numbers, r};
use crate::training::{loss_config, loss_error};

const KINDS: [(Kind, &str, f64); 2] = [(Kind::Double, "f64", 1e-8), (Kind::Float, "f32", 2e-5)];

/// The stored case's logits as leaves.
fn leaves(file: &Value, kind: Kind) -> [Tensor; 4] {
    let seed = file["seed"].as_u64().unwrap();
    let [batch, classes] = ["batch", "classes"].map(|name| file[name].as_i64().unwrap());
    model::EXIT_NAMES.map(|exit| {
        let key = key(seed, &format!("loss/{exit}"));
        let values: Vec<f32> =
            (0..(batch * classes) as usize).map(|i| (4.0 * r(key, i)) as f32).collect();
        let logits = Tensor::from_slice(&values).view([batch, classes]).to_kind(kind);
        logits.set_requires_grad(true)
    })
}

fn exits(leaves: &[Tensor; 4]) -> Exits {
    let [early3, att, cnn, merge] = leaves.each_ref().map(Tensor::shallow_clone);
    Exits { early3, att, cnn, merge }
}

#[test]
fn losses_and_their_gradients_equal_the_stored_ones() {
    libtorch::init(1).unwrap();
    let Some(file) = golden::json("loss_unit.json") else { return };
    let seed = file["seed"].as_u64().unwrap();
    let labels: Vec<i64> = numbers(&file["labels"]).into_iter().map(|label| label as i64).collect();
    for (kind, label, tolerance) in KINDS {
        let (mut parts, mut gradients) = (Worst::default(), Worst::default());
        let classes = file["classes"].as_i64().unwrap();
        let targets = golden::mixed_targets(&labels, classes, kind);
        for case in file["cases"].as_array().unwrap() {
            let leaves = leaves(&file, kind);
            let config = loss_config(case);
            let losses = multi_exit(&exits(&leaves), Targets::Soft(&targets), &config);
            let name = || case["id"].to_string();
            parts.see(loss_error(&losses, &case[format!("parts_{label}")]), name);
            let mut flat = Tensor::zeros([4 * leaves[0].numel() as i64], (kind, Device::Cpu));
            libtorch::gradients_into(&losses.total, &leaves, &mut flat).unwrap();
            let stored = &case[format!("logit_grads_{label}")];
            let flat = golden::widened(&flat);
            for (exit, found) in model::EXIT_NAMES.iter().zip(flat.chunks_exact(leaves[0].numel()))
            {
                let statistics = golden::statistics(seed, &format!("loss/{exit}"), found);
                let stored = numbers(&stored[*exit]["l2_sum_probe"]);
                let place = || format!("{exit} {}", case["id"]);
                gradients.see(golden::statistics_error(statistics, &stored), place);
            }
        }
        parts.must_be_within(tolerance, &format!("loss parts {label}"));
        gradients.must_be_within(tolerance, &format!("logit gradients {label}"));
    }
}

#[test]
fn hard_labels_are_smoothed_as_stored() {
    libtorch::init(1).unwrap();
    let Some(file) = golden::json("loss_unit.json") else { return };
    let labels: Vec<i64> = numbers(&file["labels"]).into_iter().map(|label| label as i64).collect();
    let labels = Tensor::from_slice(&labels);
    for (kind, label, tolerance) in KINDS {
        for smoothing in [0.0, 0.1] {
            let stored = &file["hard_label_losses_on_merge_logits"];
            let stored = stored[format!("smoothing_{smoothing:.1}")][label].as_f64().unwrap();
            let config = LossConfig { label_smoothing: smoothing, ..LossConfig::default() };
            let leaves = leaves(&file, kind);
            let losses = multi_exit(&exits(&leaves), Targets::Labels(&labels), &config);
            let found = losses.cross_entropy.double_value(&[3]);
            assert!((found - stored).abs() / stored < tolerance, "{smoothing} {label}");
        }
    }
}

/// The toy state of the unit files: names and shapes by their stored number of elements.
fn toy_layout(with_buffers: bool) -> Arc<Layout> {
    let all: [(&str, &[i64]); 11] = [
        ("latent", &[2, 3]),
        ("fc.weight", &[3, 4]),
        ("fc.bias", &[3]),
        ("conv.weight", &[2, 2, 2, 2]),
        ("conv.bias", &[2]),
        ("norm.weight", &[4]),
        ("norm.bias", &[4]),
        ("norm.running_mean", &[4]),
        ("norm.running_var", &[4]),
        ("norm.num_batches_tracked", &[]),
        ("att.relative_position_bias", &[1, 2, 3]),
    ];
    let is_buffer = |name: &str| name.contains("running") || name.contains("tracked");
    Arc::new(Layout::of_state(all.into_iter().filter(|(name, _)| with_buffers || !is_buffer(name))))
}

/// Compares all stored values of one moment.
fn compare(weights: &Weights, stored: &Value, worst: &mut Worst) {
    let entries = weights.layout().entries().iter().filter(|entry| entry.role != Role::Counter);
    for entry in entries {
        let found = golden::widened(&weights.value(&entry.name).unwrap());
        let stored = numbers(&stored[&entry.name]);
        assert_eq!(found.len(), stored.len(), "{}", entry.name);
        for (found, stored) in found.iter().zip(stored) {
            worst.see((found - stored).abs() / stored.abs().max(1e-3), || entry.name.clone());
        }
    }
}

#[test]
fn adamw_equals_the_stored_updates() {
    libtorch::init(1).unwrap();
    let Some(file) = golden::json("adamw_unit.json") else { return };
    let seed = file["seed"].as_u64().unwrap();
    let layout = toy_layout(false);
    for group in file["groups"].as_array().unwrap() {
        let decayed = group["weight_decay"].as_f64().unwrap() > 0.0;
        let role = if decayed { Role::Decayed } else { Role::Undecayed };
        let members: Vec<&str> = layout
            .entries()
            .iter()
            .filter(|entry| entry.role == role)
            .map(|entry| entry.name.as_str())
            .collect();
        let stored = group["params"].as_array().unwrap();
        assert_eq!(members, stored.iter().map(|name| name.as_str().unwrap()).collect::<Vec<_>>());
    }
    for (kind, label, tolerance) in [(Kind::Double, "f64", 1e-8), (Kind::Float, "f32", 1e-5)] {
        let mut weights = golden::filled_weights(layout.clone(), seed, kind);
        let mut optimizer = AdamW::new(AdamWConfig::default(), &layout, weights.params());
        let mut worst = Worst::default();
        let (rates, decays) = (numbers(&file["lr"]), numbers(&file["wd"]));
        for step in 0..rates.len() {
            let mut gradients = Weights::zeros(layout.clone(), kind, Device::Cpu);
            for entry in layout.entries() {
                let key = key(seed, &format!("grad{step}/{}", entry.name));
                let value = |i: usize| if i == 0 { 0.0 } else { (0.1 * r(key, i)) as f32 };
                let values: Vec<f32> = (0..entry.range.len()).map(value).collect();
                let values = Tensor::from_slice(&values).view(&entry.shape[..]);
                gradients.set_value(&entry.name, &values).unwrap();
            }
            let update = Update {
                step: step as u64,
                learning_rate: rates[step],
                weight_decay: decays[step],
            };
            optimizer.step(weights.params_mut(), gradients.params(), &update);
            compare(&weights, &file[format!("after_step_{label}")][step], &mut worst);
        }
        worst.must_be_within(tolerance, &format!("AdamW {label}"));
    }
}

#[test]
fn averages_equal_the_stored_ones_to_the_bit() {
    libtorch::init(1).unwrap();
    let Some(file) = golden::json("ema_unit.json") else { return };
    let seed = file["seed"].as_u64().unwrap();
    let layout = toy_layout(true);
    for run in file["runs"].as_array().unwrap() {
        let decay = run["decay"].as_f64().unwrap();
        let mut live = golden::filled_weights(layout.clone(), seed, Kind::Float);
        let mut ema = Ema::new(&live);
        let mut counter = 1;
        let mut worst = Worst::default();
        for (step, stored) in run["after_step"].as_array().unwrap().iter().enumerate() {
            for entry in layout.entries().iter().filter(|entry| entry.role != Role::Counter) {
                let key = key(seed, &format!("ema{step}/{}", entry.name));
                let value = |i: usize| {
                    let drawn = r(key, i);
                    let is_variance = entry.name.ends_with("running_var");
                    (if is_variance { 1.0 + 0.5 * drawn } else { drawn }) as f32
                };
                let values: Vec<f32> = (0..entry.range.len()).map(value).collect();
                let values = Tensor::from_slice(&values).view(&entry.shape[..]);
                live.set_value(&entry.name, &values).unwrap();
            }
            ema.update(&live, decay);
            counter = average_counter(counter, 2 + step as i64, decay);
            assert_eq!(Some(counter), stored["norm.num_batches_tracked"].as_i64());
            compare(ema.weights(), stored, &mut worst);
        }
        worst.must_be_within(0.0, &format!("average with decay {decay}"));
    }
    let (mut counter, mut step) = (1, 0);
    let stored = &file["num_batches_tracked_decay_0.9999_when_model_counter_is_1_plus_s"];
    let mut stored: Vec<(i64, i64)> = stored
        .as_object()
        .unwrap()
        .iter()
        .map(|(step, value)| (step.parse().unwrap(), value.as_i64().unwrap()))
        .collect();
    stored.sort_unstable();
    for (until, value) in stored {
        while step < until {
            step += 1;
            counter = average_counter(counter, 1 + step, 0.9999);
        }
        assert_eq!(counter, value, "counter after {step} steps");
    }
}

#[test]
fn rates_equal_the_stored_schedules() {
    let Some(file) = golden::json("schedules.json") else { return };
    let steps_per_epoch = file["niter_per_ep"].as_u64().unwrap();
    let mut worst = Worst::default();
    let mut see = |found: f64, stored: f64, place: &str| {
        worst.see((found - stored).abs() / stored.abs().max(1e-30), || place.to_owned());
    };
    for recipe in file["recipes"].as_array().unwrap() {
        let config = ScheduleConfig {
            epochs: recipe["epochs"].as_u64().unwrap(),
            lr: recipe["base_lr"].as_f64().unwrap(),
            min_lr: recipe["min_lr"].as_f64().unwrap(),
            warmup_epochs: recipe["warmup_epochs"].as_u64().unwrap(),
            ..ScheduleConfig::default()
        };
        let schedule = Schedule::new(&config, steps_per_epoch).unwrap();
        assert_eq!(Some(schedule.steps()), recipe["total_iterations"].as_u64());
        for point in recipe["points"].as_array().unwrap() {
            let step = point["it"].as_u64().unwrap();
            see(schedule.learning_rate(step), point["lr"].as_f64().unwrap(), "lr");
            see(schedule.weight_decay(step), point["wd"].as_f64().unwrap(), "wd");
        }
        let sum: f64 = (0..schedule.steps()).map(|step| schedule.learning_rate(step)).sum();
        assert!((sum - recipe["lr_sum"].as_f64().unwrap()).abs() < 1e-6);
    }
    for small in file["small"].as_array().unwrap() {
        let arguments = &small["args"];
        let config = ScheduleConfig {
            epochs: arguments["epochs"].as_u64().unwrap(),
            lr: arguments["base_value"].as_f64().unwrap(),
            min_lr: arguments["final_value"].as_f64().unwrap(),
            warmup_epochs: arguments["warmup_epochs"].as_u64().unwrap(),
            warmup_steps: arguments["warmup_steps"].as_u64(),
            ..ScheduleConfig::default()
        };
        let schedule = Schedule::new(&config, arguments["niter_per_ep"].as_u64().unwrap()).unwrap();
        let stored = numbers(&small["values"]);
        assert_eq!(schedule.steps(), stored.len() as u64);
        for (step, stored) in stored.into_iter().enumerate() {
            see(schedule.learning_rate(step as u64), stored, "small");
        }
    }
    worst.must_be_within(1e-14, "schedules");
}

#[test]
fn initial_values_have_the_reference_s_distributions() {
    libtorch::init(1).unwrap();
    let mut worst = Worst::default();
    for case in golden::cases("init_stats.json", "cases") {
        let layout = Arc::new(Layout::of(&golden::architecture(&case)));
        let weights = Weights::initial(layout.clone(), 0, Kind::Float, Device::Cpu);
        // The reference's running statistics have seen noise (Q2); ours have seen nothing.
        let parameters = |role: Role| matches!(role, Role::Decayed | Role::Undecayed);
        for entry in layout.entries().iter().filter(|entry| parameters(entry.role)) {
            let stored = &case["entries"][&entry.name];
            let [n, mean, std] = ["n", "mean", "std"].map(|name| stored[name].as_f64().unwrap());
            let values = golden::widened(&weights.value(&entry.name).unwrap());
            assert_eq!(values.len() as f64, n, "{}", entry.name);
            let found_mean = values.iter().sum::<f64>() / n;
            let square = values.iter().map(|value| (value - found_mean).powi(2)).sum::<f64>() / n;
            let found_std = square.sqrt();
            if std == 0.0 {
                assert_eq!((found_mean, found_std), (mean, std), "{}", entry.name);
                continue;
            }
            // Two samples of the same distribution: both estimates vary, as 1/√n.
            let sigma_mean = std * (2.0 / n).sqrt();
            let sigma_std = std * (1.0 / n).sqrt();
            worst.see((found_mean - mean).abs() / sigma_mean, || format!("mean {}", entry.name));
            worst.see((found_std - std).abs() / sigma_std, || format!("std {}", entry.name));
        }
    }
    worst.must_be_within(6.0, "initial values, in standard deviations");
}
