//! Distributions of the initial values.

use std::sync::Arc;

use model::{Layout, Role, Weights};
use tch::{Device, Kind};

use super::golden::{self, Golden, number, text};
use super::report::{Check, for_each_case};

/// Means and standard deviations of all parameters, against those that the reference drew.
pub(crate) fn distributions(golden: &Golden) -> Vec<Check> {
    for_each_case(&golden.cases("init_stats.json", "cases"), |case| {
        let what = format!("{} initial values, in standard deviations", text(&case["model"]));
        let mut check = Check::new(what, 6.0);
        let layout = Arc::new(Layout::of(&golden::architecture(case)));
        let weights = Weights::initial(layout.clone(), 0, Kind::Float, Device::Cpu);
        // The reference's running statistics have seen noise (SPEC Q2); ours have seen nothing.
        let is_parameter = |role: Role| matches!(role, Role::Decayed | Role::Undecayed);
        for entry in layout.entries().iter().filter(|entry| is_parameter(entry.role)) {
            let stored = &case["entries"][&entry.name];
            let [n, mean, std] = ["n", "mean", "std"].map(|name| number(&stored[name]));
            let values = golden::widened(&weights.value(&entry.name).expect("a parameter"));
            check.must(values.len() as f64 == n, || entry.name.clone());
            let found_mean = values.iter().sum::<f64>() / n;
            let square = values.iter().map(|value| (value - found_mean).powi(2)).sum::<f64>() / n;
            let found_std = square.sqrt();
            if std == 0.0 {
                check.must((found_mean, found_std) == (mean, std), || entry.name.clone());
                continue;
            }
            // Two samples of the same distribution: both estimates vary, as 1/√n.
            let (sigma_mean, sigma_std) = (std * (2.0 / n).sqrt(), std * (1.0 / n).sqrt());
            check.see((found_mean - mean).abs() / sigma_mean, || format!("mean {}", entry.name));
            check.see((found_std - std).abs() / sigma_std, || format!("std {}", entry.name));
        }
        vec![check]
    })
}
