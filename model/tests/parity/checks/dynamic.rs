//! Thresholds of dynamic inference, and what they give.

use model::dynamic::{Confidences, Measured, budgets, measure, thresholds};
use serde_json::Value;
use tch::{Kind, Tensor};

use super::golden::{self, Golden, difference, number, numbers, r, text, whole};
use super::report::Check;

/// What the exits say of one set.
struct Set {
    confidences: Confidences,
    correct: [Vec<bool>; 4],
}

/// The set of a name, by the file's own rule.
fn set(file: &Value, name: &str) -> Set {
    let (seed, classes) = (whole(&file["seed"]), whole(&file["classes"]) as usize);
    let samples = whole(&file[format!("n_{name}")]) as usize;
    let labels = golden::labels(seed, &format!("dyn/{name}/labels"), samples, classes as u64);
    let ease = golden::key(seed, &format!("dyn/{name}/ease"));
    let [a, b] = ["a", "b"].map(|factor| numbers(&file[factor]));
    let exit = |exit: usize| {
        let key = golden::key(seed, &format!("dyn/{name}/logits{exit}"));
        let value = |i: usize| {
            let (sample, class) = (i / classes, i % classes);
            let hit = labels[sample] == class as i64;
            let bonus = if hit { b[exit] * (1.0 + r(ease, sample)) } else { 0.0 };
            (a[exit] * r(key, i) + bonus) as f32
        };
        let logits: Vec<f32> = (0..samples * classes).map(value).collect();
        let logits = Tensor::from_slice(&logits).view([samples as i64, classes as i64]);
        let (sure, class) = logits.softmax(-1, Kind::Float).max_dim(1, false);
        let sure = libtorch::slice::<f32>(&sure).expect("a row of f32").to_vec();
        let class = libtorch::slice::<i64>(&class).expect("a row of i64");
        (sure, class.iter().zip(&labels).map(|(class, label)| class == label).collect())
    };
    let [first, second, third, fourth] = [0, 1, 2, 3].map(exit);
    Set {
        confidences: [first.0, second.0, third.0, fourth.0],
        correct: [first.1, second.1, third.1, fourth.1],
    }
}

/// Differences of accuracy, cost and the exits' accuracies from the stored ones.
fn compare(check: &mut Check, found: &Measured, stored: [&Value; 3], place: &str) {
    let [accuracy, cost, of_exits] = stored;
    check.see((100.0 * found.accuracy - number(accuracy)).abs() / 100.0, || place.to_owned());
    check.see((found.mean_cost - number(cost)).abs() / number(cost), || place.to_owned());
    let Some(of_exits) = of_exits.as_array() else { return };
    for (found, stored) in found.accuracy_of_exit.iter().zip(of_exits) {
        match (found, stored.as_f64()) {
            (Some(found), Some(stored)) => check.see((found - stored).abs(), || place.to_owned()),
            (found, stored) => check.must(*found == stored, || place.to_owned()),
        }
    }
}

/// Shares, thresholds and measures of all budgets, and of the cases at the edge.
pub(crate) fn evaluation(golden: &Golden) -> Vec<Check> {
    let file = golden.json("dynamic_eval.json");
    let [validation, test] = ["val", "test"].map(|name| set(&file, name));
    let costs: [f64; 4] = numbers(&file["flops"]).try_into().expect("one an exit");
    let mut solved = Check::new("shares and thresholds", 1e-6);
    let mut measured = Check::new("accuracies and costs", 1e-6);
    let mut lines = Check::new("lines of dynamic.txt, to the byte", 0.0);
    for (row, shares) in file["rows"].as_array().expect("a list").iter().zip(budgets()) {
        let place = || format!("budget {}", row["i"]);
        solved.see(difference(&shares.map(f64::from), &numbers(&row["p"])), place);
        let limits = thresholds(&validation.confidences, shares);
        solved.see(difference(&limits.map(f64::from), &numbers(&row["thresholds"])), place);
        let on = |set: &Set| measure(&set.confidences, &set.correct, limits, costs);
        let stored = [&row["val_acc"], &row["val_flops"], &Value::Null];
        compare(&mut measured, &on(&validation), stored, &place());
        let stored = [&row["test_acc"], &row["test_flops"], &row["test_exit_acc"]];
        let found = on(&test);
        compare(&mut measured, &found, stored, &place());
        let counts = numbers(&row["test_exit_counts"]);
        measured.must(found.counts.iter().map(|count| *count as f64).eq(counts), place);
        let line = format!("{:?}\t{:?}", number(&row["test_acc"]), number(&row["test_flops"]));
        lines.must(found.reference_line(costs) == line, || format!("{}: {line}", place()));
    }
    vec![solved, measured, lines, edges(&file)]
}

/// Ties, empty quotas and quotas that cannot be filled.
fn edges(file: &Value) -> Check {
    let mut check = Check::new("cases at the edge", 1e-6);
    for case in file["edge_cases"].as_array().expect("a list") {
        let place = text(&case["id"]);
        let lists = case["conf_class0"].as_array().expect("a list");
        let confidences: Vec<Vec<f32>> = lists
            .iter()
            .map(|list| numbers(list).into_iter().map(|sure| sure as f32).collect())
            .collect();
        let confidences: Confidences = confidences.try_into().expect("one list an exit");
        let shares: Vec<f32> = numbers(&case["p"]).into_iter().map(|share| share as f32).collect();
        let limits = thresholds(&confidences, shares.try_into().expect("one an exit"));
        let error = difference(&limits.map(f64::from), &numbers(&case["thresholds"]));
        check.see(error, || place.to_owned());
        // Every exit says class 0.
        let right: Vec<bool> = numbers(&case["labels"]).iter().map(|label| *label == 0.0).collect();
        let correct = std::array::from_fn(|_| right.clone());
        let costs = numbers(&case["flops"]).try_into().expect("one an exit");
        let found = measure(&confidences, &correct, limits, costs);
        let stored = [&case["acc"], &case["flops_mean"], &case["exit_acc"]];
        compare(&mut check, &found, stored, place);
    }
    check
}
