//! Parity with the reference implementation: state dicts, costs, activations, losses, gradients, updates and
//! averages against stored numbers. Without the numbers beside the repository these tests say so and pass.
#![expect(
    clippy::print_stdout,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::wildcard_enum_match_arm,
    reason = "a test: it tells what it compared, and the numbers of its files are small"
)]

use std::path::PathBuf;

mod checks;

use checks::golden::Golden;
use checks::{COMPANIONS, EXAMINERS, examine};

/// The folder with the reference's numbers beside the repository.
fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared/reference/golden")
}

/// Runs all checks of one file, prints what they found, and fails if one did.
fn compare(file: &str) {
    libtorch::init(1).expect("starts");
    let Some(report) = examine(&Golden::at(folder()), file) else {
        println!("skipped: no {file} in ../shared/reference/golden beside the repository");
        return;
    };
    for check in &report.checks {
        println!("{check}");
    }
    assert_eq!(report.failed(), 0, "of {} cases in {file}: {}", report.cases(), report.tightest());
}

#[test]
fn state_dicts_and_costs_of_all_models_are_the_reference_s() {
    compare("models.json");
}

#[test]
fn the_fill_rule_gives_the_stored_vectors() {
    compare("fill.json");
}

#[test]
fn logits_and_moved_statistics_are_the_stored_ones() {
    compare("forward.json");
}

#[test]
fn every_option_switched_off_gives_the_stored_logits() {
    compare("variants.json");
}

#[test]
fn losses_and_their_gradients_are_the_stored_ones() {
    compare("loss_unit.json");
}

#[test]
fn gradients_of_a_training_pass_are_the_stored_ones() {
    compare("backward.json");
}

#[test]
fn updates_with_averages_leave_what_is_stored() {
    compare("optim.json");
}

#[test]
fn adamw_makes_the_stored_updates() {
    compare("adamw_unit.json");
}

#[test]
fn averages_are_the_stored_ones_to_the_bit() {
    compare("ema_unit.json");
}

#[test]
fn rates_are_the_stored_ones() {
    compare("schedules.json");
}

#[test]
fn initial_values_have_the_reference_s_distributions() {
    compare("init_stats.json");
}

#[test]
fn dynamic_inference_has_the_stored_thresholds_accuracies_and_costs() {
    compare("dynamic_eval.json");
}

#[test]
fn a_difference_a_broken_file_and_an_unknown_model_fail() {
    let folder = std::env::temp_dir().join(format!("parity-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    let failed = |file: &str, text: &str| {
        std::fs::write(folder.join(file), text).expect("a file");
        let report = examine(&Golden::at(folder.clone()), file).expect("the file is there");
        (report.failed(), report.tightest().to_string())
    };
    let (count, text) = failed("models.json", "{");
    assert!(count == 1 && text.contains("models.json"), "{text}");
    let (count, text) = failed("models.json", "{}");
    assert!(count == 1 && text.contains("nothing to compare"), "{text}");
    let unknown = r#"{"models": [{"model": "vit_t128", "options": {}}]}"#;
    let (count, text) = failed("models.json", unknown);
    assert!(count == 1 && text.contains("vit_t128"), "{text}");
    let moved = r#"{"seed": 1, "tensors": [], "input": {"name": "input", "shape": [1, 3, 8, 8],
        "sum": 1.0}, "labels": {"name": "labels", "classes": 10, "values": []}}"#;
    let (count, text) = failed("fill.json", moved);
    assert!(count == 1 && text.contains("input"), "{text}");
    std::fs::remove_dir_all(&folder).expect("the folder was there");
}

#[test]
fn each_file_is_compared_once() {
    let mut names: Vec<&str> = EXAMINERS.iter().map(|(name, _)| *name).collect();
    names.extend(COMPANIONS);
    let count = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), count);
}
