//! `percheron up` of a recipe that is done in seconds, for the tests that need whole runs.

use std::{
    path::Path,
    process::{Command, Output, Stdio},
};

use serde_json::Value;

/// Steps of the run.
pub(crate) const STEPS: u64 = 8;

/// Trains into `run_dir`; a checkpoint is kept after steps 3, 6 and 8.
pub(crate) fn command(run_dir: &Path, workers: u32) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_percheron"));
    command.args(["up", "--recipe", "digits", "--json", "--workers", &workers.to_string()]);
    set(&mut command);
    command.arg("--run-dir").arg(run_dir).stdin(Stdio::null());
    command
}

/// Lays what makes the recipe short over it.
pub(crate) fn set(command: &mut Command) {
    for set in [
        &format!("max_steps={STEPS}"),
        "batch_size=2",
        "evaluate_every_epochs=0",
        "checkpoint.every_steps=3",
        "checkpoint.part_mib=8",
        "elastic.max_recovery=4s",
        "schedule.warmup_epochs=0",
    ] {
        command.args(["--set", set]);
    }
}

/// The last line of `--json` of a run that succeeded; `name` is for the message if it did not.
pub(crate) fn summary(output: &Output, name: &str) -> Value {
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{name}:\n{stderr}\n{stdout}");
    serde_json::from_str(stdout.lines().last().unwrap()).unwrap()
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
