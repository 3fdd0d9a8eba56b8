//! Optimizer, averages and rates, each alone.

use std::sync::Arc;

use model::ema::average_counter;
use model::{AdamW, AdamWConfig, Ema, Layout, Role, Schedule, ScheduleConfig, Update, Weights};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::golden::{self, Golden, key, number, numbers, r, text, whole};
use super::report::Check;

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
fn compare(weights: &Weights, stored: &Value, check: &mut Check) {
    let entries = weights.layout().entries().iter().filter(|entry| entry.role != Role::Counter);
    for entry in entries {
        let found = golden::widened(&weights.value(&entry.name).expect("it is no counter"));
        let stored = numbers(&stored[&entry.name]);
        assert_eq!(found.len(), stored.len(), "{}", entry.name);
        for (found, stored) in found.iter().zip(stored) {
            check.see((found - stored).abs() / stored.abs().max(1e-3), || entry.name.clone());
        }
    }
}

/// Overwrites every entry with `value(name, key, i)`, keyed by a prefix and its name.
fn overwrite(
    weights: &mut Weights,
    seed: u64,
    prefix: &str,
    value: impl Fn(&str, u64, usize) -> f32,
) {
    let layout = weights.layout().clone();
    for entry in layout.entries().iter().filter(|entry| entry.role != Role::Counter) {
        let key = key(seed, &format!("{prefix}/{}", entry.name));
        let values: Vec<f32> = (0..entry.range.len()).map(|i| value(&entry.name, key, i)).collect();
        let values = Tensor::from_slice(&values).view(&entry.shape[..]);
        weights.set_value(&entry.name, &values).expect("it fits");
    }
}

/// Group membership and the values after every update.
pub(crate) fn adamw(golden: &Golden) -> Vec<Check> {
    let file = golden.json("adamw_unit.json");
    let seed = whole(&file["seed"]);
    let layout = toy_layout(false);
    let mut groups = Check::new("parameter groups", 0.0);
    for group in file["groups"].as_array().expect("a list") {
        let decayed = number(&group["weight_decay"]) > 0.0;
        let role = if decayed { Role::Decayed } else { Role::Undecayed };
        let members = layout.entries().iter().filter(|entry| entry.role == role);
        let stored = group["params"].as_array().expect("a list").iter().map(text);
        groups.must(members.map(|entry| entry.name.as_str()).eq(stored), || format!("{role:?}"));
    }
    let [beta1, beta2] = numbers(&file["betas"])[..] else { panic!("two betas") };
    let config = AdamWConfig { beta1, beta2, epsilon: number(&file["eps"]) };
    let mut checks = vec![groups];
    for (kind, label, tolerance) in [(Kind::Double, "f64", 1e-8), (Kind::Float, "f32", 1e-5)] {
        let mut weights = golden::filled_weights(layout.clone(), seed, kind);
        let mut optimizer = AdamW::new(config, &layout, weights.params());
        let mut check = Check::new(format!("AdamW {label}"), tolerance);
        let (rates, decays) = (numbers(&file["lr"]), numbers(&file["wd"]));
        for (step, (&learning_rate, &weight_decay)) in rates.iter().zip(&decays).enumerate() {
            let mut gradients = Weights::zeros(layout.clone(), kind, Device::Cpu);
            overwrite(&mut gradients, seed, &format!("grad{step}"), |_, key, i| {
                if i == 0 { 0.0 } else { (0.1 * r(key, i)) as f32 }
            });
            let update = Update { step: step as u64, learning_rate, weight_decay };
            optimizer.step(weights.params_mut(), gradients.params(), &update);
            compare(&weights, &file[format!("after_step_{label}")][step], &mut check);
        }
        checks.push(check);
    }
    checks
}

/// Averages to the bit, and the averaged counter.
pub(crate) fn averages(golden: &Golden) -> Vec<Check> {
    let file = golden.json("ema_unit.json");
    let seed = whole(&file["seed"]);
    let layout = toy_layout(true);
    let mut checks = Vec::new();
    for run in file["runs"].as_array().expect("a list") {
        let decay = number(&run["decay"]);
        let mut live = golden::filled_weights(layout.clone(), seed, Kind::Float);
        let mut ema = Ema::new(&live);
        let mut counter = 1;
        let mut check = Check::new(format!("average with decay {decay}"), 0.0);
        for (step, stored) in (0..).zip(run["after_step"].as_array().expect("a list")) {
            overwrite(&mut live, seed, &format!("ema{step}"), |name, key, i| {
                let drawn = r(key, i);
                (if name.ends_with("running_var") { 1.0 + 0.5 * drawn } else { drawn }) as f32
            });
            ema.update(&live, decay);
            counter = average_counter(counter, 2 + step, decay);
            let expected = stored["norm.num_batches_tracked"].as_i64();
            check.must(Some(counter) == expected, || format!("counter at step {step}"));
            compare(ema.weights(), stored, &mut check);
        }
        checks.push(check);
    }
    checks.push(long_counter(&file));
    checks
}

/// The counter of a long run.
fn long_counter(file: &Value) -> Check {
    let mut check = Check::new("the averaged counter of a long run", 0.0);
    let stored = &file["num_batches_tracked_decay_0.9999_when_model_counter_is_1_plus_s"];
    let stored = stored.as_object().expect("values by step").iter();
    let mut stored: Vec<(i64, Option<i64>)> =
        stored.map(|(step, value)| (step.parse().expect("a step"), value.as_i64())).collect();
    stored.sort_unstable();
    let (mut counter, mut step) = (1, 0);
    for (until, value) in stored {
        while step < until {
            step += 1;
            counter = average_counter(counter, 1 + step, 0.9999);
        }
        check.must(Some(counter) == value, || format!("after {step} steps"));
    }
    check
}

/// Rates of the recipes at chosen steps, and small schedules in full.
pub(crate) fn schedules(golden: &Golden) -> Vec<Check> {
    let file = golden.json("schedules.json");
    let mut check = Check::new("rates", 1e-14);
    let mut see = |found: f64, stored: &Value, place: &str| {
        let stored = number(stored);
        check.see((found - stored).abs() / stored.abs().max(1e-30), || place.to_owned());
    };
    for recipe in file["recipes"].as_array().expect("a list") {
        let schedule = recipe_schedule(&file, recipe);
        see(schedule.steps() as f64, &recipe["total_iterations"], "steps");
        for point in recipe["points"].as_array().expect("a list") {
            let step = whole(&point["it"]);
            see(schedule.learning_rate(step), &point["lr"], "lr");
            see(schedule.weight_decay(step), &point["wd"], "wd");
        }
    }
    for small in file["small"].as_array().expect("a list") {
        let arguments = &small["args"];
        let config = ScheduleConfig {
            epochs: whole(&arguments["epochs"]),
            lr: number(&arguments["base_value"]),
            min_lr: number(&arguments["final_value"]),
            warmup_epochs: whole(&arguments["warmup_epochs"]),
            warmup_steps: arguments["warmup_steps"].as_u64(),
            ..ScheduleConfig::default()
        };
        let schedule = Schedule::new(&config, whole(&arguments["niter_per_ep"]));
        let schedule = schedule.expect("a schedule");
        let stored = small["values"].as_array().expect("a list");
        assert_eq!(schedule.steps(), stored.len() as u64);
        for (step, stored) in (0..).zip(stored) {
            see(schedule.learning_rate(step), stored, "small");
        }
    }
    vec![check, sums(&file)]
}

fn recipe_schedule(file: &Value, recipe: &Value) -> Schedule {
    let config = ScheduleConfig {
        epochs: whole(&recipe["epochs"]),
        lr: number(&recipe["base_lr"]),
        min_lr: number(&recipe["min_lr"]),
        warmup_epochs: whole(&recipe["warmup_epochs"]),
        ..ScheduleConfig::default()
    };
    Schedule::new(&config, whole(&file["niter_per_ep"])).expect("a schedule")
}

/// The sum of a recipe's rates over the whole run.
fn sums(file: &Value) -> Check {
    let mut check = Check::new("sums of the rates, absolute", 1e-6);
    for recipe in file["recipes"].as_array().expect("a list") {
        let schedule = recipe_schedule(file, recipe);
        let sum: f64 = (0..schedule.steps()).map(|step| schedule.learning_rate(step)).sum();
        check.see((sum - number(&recipe["lr_sum"])).abs(), || "lr".to_owned());
    }
    check
}
