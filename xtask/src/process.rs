//! Running programs: each is shown before it starts, and its failure is an error that names it.

use std::env;
use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

const BRIEF_WORDS: usize = 6;

/// Shows the command, runs it with our own input and output, and wants it to succeed.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    println!("+ {}", words(command).join(" "));
    let brief = brief(command);
    let status = command.status().with_context(|| format!("cannot start `{brief}`"))?;
    if !status.success() {
        bail!("`{brief}` failed ({status})");
    }
    Ok(())
}

/// Runs a command that prints an answer, and returns the answer.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let brief = brief(command);
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot start `{brief}`"))?;
    if !output.status.success() {
        bail!("`{brief}` failed ({})", output.status);
    }
    String::from_utf8(output.stdout).with_context(|| format!("`{brief}` printed no UTF-8"))
}

/// Whether a command that only asks (`--version`) can be run and succeeds.
pub(crate) fn answers(command: &mut Command) -> bool {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// The first file called `program` on the search path.
pub(crate) fn find_program(program: impl AsRef<OsStr>) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    let program = program.as_ref();
    env::split_paths(&path).map(|folder| folder.join(program)).find(|file| file.is_file())
}

/// The command for an error, where a long list of options would hide what failed.
fn brief(command: &Command) -> String {
    let words = words(command);
    match words.get(..BRIEF_WORDS) {
        Some(first) if words.len() > BRIEF_WORDS => format!("{} ...", first.join(" ")),
        _ => words.join(" "),
    }
}

fn words(command: &Command) -> Vec<String> {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy().into_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_names_the_command() {
        let error = output(Command::new("false").arg("now")).unwrap_err();
        assert!(error.to_string().starts_with("`false now` failed"), "{error}");
    }

    #[test]
    fn a_long_command_is_cut_in_errors() {
        let error = output(Command::new("false").args(["1", "2", "3", "4", "5", "6"])).unwrap_err();
        assert!(error.to_string().starts_with("`false 1 2 3 4 5 ...` failed"), "{error}");
    }

    #[test]
    fn a_missing_program_names_itself() {
        let error = output(&mut Command::new("no-such-program")).unwrap_err();
        assert_eq!(error.to_string(), "cannot start `no-such-program`");
        assert!(!answers(&mut Command::new("no-such-program")));
    }
}
