//! Compares this crate with a folder of the reference's numbers and prints what it found as JSON; behind
//! `cargo xtask parity`, which knows the other crates' files too. `parity DIR` writes to the standard output
//! `{"passed", "failed", "files": {name: {"cases", "failed", "worst", "tolerance", "checks": […]}},
//! "unknown": […]}`; the exit status is 1 if a case failed and 2 if there is no such folder.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::wildcard_enum_match_arm,
    reason = "a command that speaks to another, and the numbers of its files are small"
)]

use std::path::PathBuf;
use std::process::ExitCode;

use serde_json::{Map, Value, json};

#[path = "../tests/parity/checks/mod.rs"]
mod checks;

use checks::golden::Golden;
use checks::report::{Check, FileReport};
use checks::{COMPANIONS, EXAMINERS, examine};

fn main() -> ExitCode {
    let folder = match (std::env::args_os().nth(1), std::env::args_os().nth(2)) {
        (Some(folder), None) => PathBuf::from(folder),
        _ => return complain("usage: parity DIR"),
    };
    let entries = match std::fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(error) => return complain(&format!("{}: {error}", folder.display())),
    };
    if let Err(error) = libtorch::init(1) {
        return complain(&error.to_string());
    }
    let golden = Golden::at(folder);
    let (mut passed, mut failed, mut files) = (0, 0, Map::new());
    for (name, _) in EXAMINERS {
        let Some(report) = examine(&golden, name) else { continue };
        passed += report.cases() - report.failed();
        failed += report.failed();
        files.insert(name.to_owned(), summary(&report));
    }
    let known = |name: &String| files.contains_key(name) || COMPANIONS.contains(&name.as_str());
    let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    let mut unknown: Vec<String> = names.filter(|name| !known(name)).collect();
    unknown.sort_unstable();
    let answer = json!({ "passed": passed, "failed": failed, "files": files, "unknown": unknown });
    println!("{answer}");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn complain(text: &str) -> ExitCode {
    eprintln!("parity: {text}");
    ExitCode::from(2)
}

fn summary(report: &FileReport) -> Value {
    let Check { worst, tolerance, .. } = report.tightest();
    let checks: Vec<String> = report.checks.iter().map(Check::to_string).collect();
    json!({
        "cases": report.cases(),
        "failed": report.failed(),
        "worst": worst.min(f64::MAX), // JSON has no infinity.
        "tolerance": tolerance,
        "checks": checks,
    })
}
