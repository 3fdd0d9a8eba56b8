//! Compares the image pipeline with a folder of the reference's numbers and prints what it found as JSON;
//! behind `cargo xtask parity`, which knows the other crates' files too. `parity_images DIR` writes to the
//! standard output `{"passed", "failed", "files": {name: {"cases", "failed", "worst", "tolerance",
//! "checks": […]}}, "unknown": […]}`; the exit status is 1 if a case failed and 2 if there is no such
//! folder. Every comparison is to the bit, so the tolerance is 0 and the worst error 0 or 1.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::unwrap_used,
    reason = "a command that speaks to another, and files that are what they claim to be"
)]

use std::{path::PathBuf, process::ExitCode};

use serde_json::{Map, Value, json};

#[path = "../tests/reference/checks.rs"]
mod checks;

use checks::{COMPANIONS, Check, FILES, examine};

fn main() -> ExitCode {
    let folder = match (std::env::args_os().nth(1), std::env::args_os().nth(2)) {
        (Some(folder), None) => PathBuf::from(folder),
        _ => return complain("usage: parity_images DIR"),
    };
    let entries = match std::fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(error) => return complain(&format!("{}: {error}", folder.display())),
    };
    let checks = examine(&folder);
    let failed: usize = checks.iter().map(|check| check.failed.len()).sum();
    let cases: usize = checks.iter().map(|check| check.cases).sum();
    let mut files = Map::new();
    for name in FILES {
        let of_file: Vec<&Check> = checks.iter().filter(|check| check.file == name).collect();
        if !of_file.is_empty() {
            files.insert(name.to_owned(), summary(&of_file));
        }
    }
    let known = |name: &String| files.contains_key(name) || COMPANIONS.contains(&name.as_str());
    let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    let mut unknown: Vec<String> = names.filter(|name| !known(name)).collect();
    unknown.sort_unstable();
    let passed = cases - failed;
    println!(
        "{}",
        json!({ "passed": passed, "failed": failed, "files": files, "unknown": unknown })
    );
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn complain(text: &str) -> ExitCode {
    eprintln!("parity_images: {text}");
    ExitCode::from(2)
}

fn summary(checks: &[&Check]) -> Value {
    let failed: usize = checks.iter().map(|check| check.failed.len()).sum();
    let lines: Vec<String> = checks
        .iter()
        .map(|Check { name, cases, failed, .. }| {
            let differing = if failed.is_empty() { "none".to_owned() } else { failed.join(", ") };
            format!("{name}: {cases} cases, differing: {differing}")
        })
        .collect();
    json!({
        "cases": checks.iter().map(|check| check.cases).sum::<usize>(),
        "failed": failed,
        "worst": if failed == 0 { 0.0 } else { 1.0 },
        "tolerance": 0.0,
        "checks": lines,
    })
}
