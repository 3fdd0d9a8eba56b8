//! `cargo xtask tidy`: what STYLE.md asks and no lint can check.
//!
//! Each rule is a function from text to findings, with a test that plants the fault. A finding is an
//! error or, for what only deserves a look, a warning.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::process;
use crate::workspace::Workspace;

mod arrows;
mod links;
mod machine_paths;
mod mask;
mod rust;

/// Something that a rule objects to.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Finding {
    severity: Severity,
    /// The file, relative to the root, or what else is at fault.
    place: String,
    /// From 1; 0 if the whole file is meant.
    line: usize,
    message: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Severity {
    Warning,
    Error,
}

/// `xtask/tidy.toml`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Exceptions {
    #[serde(default)]
    long_file: Vec<Exception>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Exception {
    path: String,
    reason: String,
}

pub(crate) fn run(workspace: &Workspace) -> Result<()> {
    let exceptions = read_exceptions(&workspace.root.join("xtask/tidy.toml"))?;
    let files = list_files(workspace)?;

    let mut findings = arrows::check(&arrows::Graph::load(workspace)?);
    for path in &files {
        // A link is somebody else's file, and pictures and data are not ours to read.
        let file = workspace.root.join(path);
        if file.is_symlink() {
            continue;
        }
        let Ok(text) = fs::read_to_string(&file) else { continue };
        findings.extend(check_file(path, &text));
        if path.ends_with(".md") {
            findings
                .extend(links::check(path, &text, |target| workspace.root.join(target).exists()));
        }
    }
    report(&excuse(findings, &exceptions), files.len())
}

fn check_file(path: &str, text: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    if path.ends_with(".rs") {
        findings.extend(rust::check(path, text));
    }
    if machine_paths::applies_to(path) {
        findings.extend(machine_paths::check(path, text));
    }
    findings
}

fn read_exceptions(path: &Path) -> Result<Exceptions> {
    let text =
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    toml::from_str(&text).with_context(|| format!("cannot understand {}", path.display()))
}

/// What git tracks or would track, without what has been deleted.
fn list_files(workspace: &Workspace) -> Result<BTreeSet<String>> {
    let mut git = workspace.command("git");
    git.args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]);
    let names = process::output(&mut git)?;
    let names = names.split_terminator('\0').map(str::to_owned);
    Ok(names.filter(|name| workspace.root.join(name).is_file()).collect())
}

/// Drops what has an exception, and objects to exceptions that are not needed.
fn excuse(findings: Vec<Finding>, exceptions: &Exceptions) -> Vec<Finding> {
    let mut unused: Vec<&Exception> = exceptions.long_file.iter().collect();
    let mut left = Vec::new();
    for finding in findings {
        let is_excused = |exception: &&Exception| {
            rust::is_long_file(&finding) && exception.path == finding.place
        };
        let excuse = exceptions.long_file.iter().find(is_excused);
        unused.retain(|exception| !is_excused(exception));
        match excuse {
            Some(exception) if exception.reason.trim().is_empty() => {
                left.push(Finding::error(
                    "xtask/tidy.toml",
                    0,
                    format!("{}: no reason", finding.place),
                ));
            }
            Some(_) => {}
            None => left.push(finding),
        }
    }
    let needless = |exception: &Exception| {
        Finding::error("xtask/tidy.toml", 0, format!("{}: not needed (any more)", exception.path))
    };
    left.extend(unused.into_iter().map(needless));
    left
}

fn report(findings: &[Finding], files: usize) -> Result<()> {
    for finding in findings {
        println!("{finding}");
    }
    let errors = findings.iter().filter(|finding| finding.severity == Severity::Error).count();
    println!("tidy: {files} files, {errors} errors, {} warnings", findings.len() - errors);
    if errors > 0 {
        bail!("not tidy");
    }
    Ok(())
}

impl Finding {
    fn error(place: &str, line: usize, message: impl Into<String>) -> Self {
        Self { severity: Severity::Error, place: place.to_owned(), line, message: message.into() }
    }

    fn warning(place: &str, line: usize, message: impl Into<String>) -> Self {
        Self { severity: Severity::Warning, ..Self::error(place, line, message) }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let severity = match self.severity {
            Severity::Warning => "warning",
            Severity::Error => "error",
        };
        match self.line {
            0 => write!(f, "{severity}: {}: {}", self.place, self.message),
            line => write!(f, "{severity}: {}:{line}: {}", self.place, self.message),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exceptions(path: &str, reason: &str) -> Exceptions {
        let exception = Exception { path: path.to_owned(), reason: reason.to_owned() };
        Exceptions { long_file: vec![exception] }
    }

    fn long_file() -> Vec<Finding> {
        check_file("a/src/long.rs", &format!("//! Long.\n{}", "\n".repeat(700)))
    }

    #[test]
    fn a_long_file_is_an_error_unless_it_has_a_reason() {
        assert_eq!(excuse(long_file(), &Exceptions::default()).len(), 1);
        assert_eq!(excuse(long_file(), &exceptions("a/src/long.rs", "one table")), []);

        let without_reason = excuse(long_file(), &exceptions("a/src/long.rs", " "));
        assert!(without_reason[0].message.contains("no reason"));
    }

    #[test]
    fn an_exception_that_is_not_needed_is_an_error() {
        let findings = excuse(Vec::new(), &exceptions("a/src/gone.rs", "once long"));
        assert_eq!(findings.len(), 1);
        assert!(findings[0].message.contains("a/src/gone.rs"));
    }

    #[test]
    fn an_exception_excuses_nothing_but_length() {
        let findings = check_file("libtorch/src/utils.rs", "//! Bits.\n");
        let findings = excuse(findings, &exceptions("libtorch/src/utils.rs", "no"));
        assert_eq!(findings.len(), 2, "{findings:?}");
    }

    #[test]
    fn errors_fail_and_warnings_do_not() {
        assert!(report(&[Finding::warning("a.rs", 1, "long")], 1).is_ok());
        assert!(report(&[Finding::error("a.rs", 1, "bad")], 1).is_err());
    }

    #[test]
    fn a_finding_can_be_clicked() {
        assert_eq!(Finding::error("a.rs", 3, "bad").to_string(), "error: a.rs:3: bad");
        assert_eq!(Finding::warning("a.rs", 0, "odd").to_string(), "warning: a.rs: odd");
    }

    #[test]
    fn the_exceptions_file_of_this_repository_is_understood() {
        toml::from_str::<Exceptions>(include_str!("../tidy.toml")).unwrap();
        assert!(toml::from_str::<Exceptions>("[[short_file]]").is_err());
    }
}
