//! Every comparison with the reference's numbers, one function a file of their folder. The tests run them on
//! the folder beside the repository, the example `parity` on any.

mod dynamic;
pub(crate) mod golden;
mod initial;
mod loss;
mod network;
pub(crate) mod report;
mod state;
mod training;
mod units;

use golden::Golden;
use report::{Check, FileReport};

/// Compares all that one file holds.
type Examiner = fn(&Golden) -> Vec<Check>;

/// The files whose numbers this crate must reproduce. A file beside another of the same name is read with it.
pub(crate) const EXAMINERS: [(&str, Examiner); 12] = [
    ("models.json", state::models),
    ("fill.json", state::fill_rule),
    ("forward.json", network::forward),
    ("variants.json", network::variants),
    ("loss_unit.json", loss::units),
    ("backward.json", training::backward),
    ("optim.json", training::updates),
    ("adamw_unit.json", units::adamw),
    ("ema_unit.json", units::averages),
    ("schedules.json", units::schedules),
    ("init_stats.json", initial::distributions),
    ("dynamic_eval.json", dynamic::evaluation),
];

/// Files that are read together with one of [`EXAMINERS`].
pub(crate) const COMPANIONS: [&str; 1] = ["forward.safetensors"];

/// Examines one file; `None` if the folder has no such file.
pub(crate) fn examine(golden: &Golden, name: &str) -> Option<FileReport> {
    let (_, examiner) = EXAMINERS.iter().find(|(known, _)| *known == name)?;
    golden.has(name).then(|| FileReport::of(name, || examiner(golden)))
}
