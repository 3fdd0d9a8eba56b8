//! `cargo xtask parity DIR`: compares what is built here with a folder of the reference's numbers.
//!
//! A crate that reproduces such numbers has an example which examines the files it knows and prints what it
//! found as JSON. This joins their answers. xtask itself does not link torch.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{self, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::workspace::Workspace;

/// Crates with such an example, and its name.
const EXAMINERS: [(&str, &str); 2] = [("model", "parity"), ("shards", "parity_images")];

/// Files of the goldens' format that hold no numbers: explanations.
const EXPLANATIONS: [&str; 1] = ["README.md"];

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// A folder in the format of `../shared/reference/golden`; its README explains it.
    dir: PathBuf,
    /// Print one JSON object: passed, failed, files, and the names of files that nothing here examines.
    #[arg(long)]
    json: bool,
}

/// What an examiner prints.
#[derive(Debug, Deserialize)]
struct Answer {
    passed: u64,
    failed: u64,
    files: BTreeMap<String, File>,
    /// Files that it does not know.
    unknown: BTreeSet<String>,
}

/// What was found in one file.
#[derive(Debug, Deserialize)]
struct File {
    cases: u64,
    failed: u64,
    /// The error that came closest to its tolerance, or furthest above it.
    worst: f64,
    tolerance: f64,
    /// One line for each kind of comparison.
    checks: Vec<String>,
}

/// The answer of all examiners, for scripts.
#[derive(Debug, Serialize)]
struct Report<'a> {
    passed: u64,
    failed: u64,
    files: BTreeMap<&'a str, FileReport>,
    unexamined: &'a BTreeSet<String>,
}

#[derive(Debug, Serialize)]
struct FileReport {
    cases: u64,
    worst: f64,
    tolerance: f64,
}

pub(crate) fn run(workspace: &Workspace, options: &Options) -> Result<()> {
    let dir = path::absolute(&options.dir)?;
    if !dir.is_dir() {
        bail!("{} is no folder: name one with the reference's numbers", dir.display());
    }
    // Standard output is for the report alone.
    let set_up =
        Command::new(std::env::current_exe()?).arg("setup").stdout(std::io::stderr()).status();
    anyhow::ensure!(set_up.context("cannot start setup")?.success(), "setup failed");
    let answers = EXAMINERS
        .map(|(name, example)| {
            ask(workspace, name, example, &dir).with_context(|| format!("crate {name}"))
        })
        .into_iter()
        .collect::<Result<Vec<Answer>>>()?;
    let answer = joined(answers);
    if options.json {
        println!("{}", serde_json::to_string(&report(&answer))?);
    } else {
        print!("{}", table(&answer));
    }
    if answer.failed > 0 {
        bail!(
            "{} of {} cases differ from the reference",
            answer.failed,
            answer.passed + answer.failed
        );
    }
    anyhow::ensure!(answer.passed > 0, "{} holds nothing that is examined here", dir.display());
    Ok(())
}

/// Builds and runs the example of one crate.
fn ask(workspace: &Workspace, name: &str, example: &str, dir: &path::Path) -> Result<Answer> {
    let arguments = ["--quiet", "--release", "--package", name, "--example", example];
    let built = workspace.cargo(&["build"]).args(arguments).stdout(std::io::stderr()).status()?;
    anyhow::ensure!(built.success(), "the example {example} does not build");
    let program = workspace.target.join("release/examples").join(example);
    let output = workspace.command(program).arg(dir).stderr(Stdio::inherit()).output()?;
    // 1 says that something differs, which is an answer too.
    let answered = matches!(output.status.code(), Some(0 | 1));
    anyhow::ensure!(answered, "the example {example} failed ({})", output.status);
    serde_json::from_slice(&output.stdout).context("its answer is not what was agreed")
}

/// One answer from several. What one examiner does not know another may.
fn joined(answers: Vec<Answer>) -> Answer {
    let mut all = Answer { passed: 0, failed: 0, files: BTreeMap::new(), unknown: BTreeSet::new() };
    for answer in answers {
        all.passed += answer.passed;
        all.failed += answer.failed;
        all.files.extend(answer.files);
        all.unknown.extend(answer.unknown);
    }
    let Answer { files, unknown, .. } = &mut all;
    unknown.retain(|name| !files.contains_key(name) && !EXPLANATIONS.contains(&name.as_str()));
    all
}

fn report(answer: &Answer) -> Report<'_> {
    let mut files = BTreeMap::new();
    for (name, &File { cases, worst, tolerance, .. }) in &answer.files {
        files.insert(name.as_str(), FileReport { cases, worst, tolerance });
    }
    Report { passed: answer.passed, failed: answer.failed, files, unexamined: &answer.unknown }
}

/// All comparisons, then one line a file.
fn table(answer: &Answer) -> String {
    let mut lines = Vec::new();
    for (name, file) in &answer.files {
        lines.push(format!("{name}:"));
        lines.extend(file.checks.iter().map(|check| format!("  {check}")));
    }
    lines.push(format!(
        "\n{:<22} {:>7} {:>12} {:>12}  verdict",
        "file", "cases", "worst error", "tolerance"
    ));
    for (name, File { cases, failed, worst, tolerance, .. }) in &answer.files {
        let verdict = if *failed == 0 { "pass".to_owned() } else { format!("FAIL ({failed})") };
        lines.push(format!("{name:<22} {cases:>7} {worst:>12.2e} {tolerance:>12.2e}  {verdict}"));
    }
    for name in &answer.unknown {
        lines.push(format!("{name:<22} not examined: no crate here claims it"));
    }
    lines.push(format!("{} cases passed, {} failed", answer.passed, answer.failed));
    lines.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(files: &[(&str, u64, u64)], unknown: &[&str]) -> Answer {
        let file = |&(name, cases, failed): &(&str, u64, u64)| {
            let checks = vec![format!("{name} compared")];
            (name.to_owned(), File { cases, failed, worst: 0.5, tolerance: 1.0, checks })
        };
        Answer {
            passed: files.iter().map(|(_, cases, failed)| cases - failed).sum(),
            failed: files.iter().map(|(_, _, failed)| failed).sum(),
            files: files.iter().map(file).collect(),
            unknown: unknown.iter().map(|name| (*name).to_owned()).collect(),
        }
    }

    #[test]
    fn a_file_that_one_examiner_knows_is_not_called_unexamined() {
        let one = answer(&[("models.json", 5, 0)], &["mixup.json", "new.json", "README.md"]);
        let two = answer(&[("mixup.json", 3, 1)], &["models.json", "new.json", "README.md"]);
        let all = joined(vec![one, two]);
        assert_eq!((all.passed, all.failed), (7, 1));
        assert_eq!(Vec::from_iter(&all.unknown), ["new.json"]);
    }

    #[test]
    fn the_report_has_the_names_that_scripts_rely_on() {
        let all = joined(vec![answer(&[("models.json", 5, 2)], &[])]);
        let text = serde_json::to_string(&report(&all)).unwrap();
        let expected = r#"{"passed":3,"failed":2,"files":{"models.json":{"cases":5,"worst":0.5,"tolerance":1.0}},"unexamined":[]}"#;
        assert_eq!(text, expected);
    }

    #[test]
    fn the_table_says_what_failed_and_what_nobody_examined() {
        let all = joined(vec![answer(&[("models.json", 5, 2)], &["new.json"])]);
        let table = table(&all);
        assert!(
            table.contains("FAIL (2)") && table.contains("3 cases passed, 2 failed"),
            "{table}"
        );
        assert!(table.contains("new.json") && table.contains("not examined"), "{table}");
    }
}
