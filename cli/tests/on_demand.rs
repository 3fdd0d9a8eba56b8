//! `percheron checkpoint`: the state of a run that is on, kept because somebody asks.
#![expect(clippy::unwrap_used, reason = "helpers of tests are tests too")]

mod short_run;

use std::{
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Command, Stdio},
};

use short_run::{command, summary, text};

/// Enough for the questions of the test.
const STEPS: &str = "max_steps=60";

/// A run of which nothing but the end is kept by itself.
fn long(run_dir: &Path, workers: u32) -> Command {
    let mut up = command(run_dir, workers);
    up.args(["--set", "max_steps=120", "--set", "checkpoint.every_steps=0"]);
    up
}

#[test]
fn a_run_that_is_told_to_stop_keeps_its_state_first() {
    let folder = tempfile::tempdir().unwrap();
    let run_dir = folder.path().join("run");
    let mut up = long(&run_dir, 2).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(up.stderr.take().unwrap()).lines().map(Result::unwrap);
    lines.find(|line| line.contains("from step 0")).expect("it trains");
    let reading = std::thread::spawn(move || lines.collect::<Vec<_>>());
    let log = || {
        let mut log = Command::new(env!("CARGO_BIN_EXE_percheron"));
        text(&log.args(["log", "--json"]).arg(&run_dir).output().unwrap().stdout)
    };
    while !log().contains("step_adopted") {
        std::thread::yield_now();
    }
    let pid = nix::unistd::Pid::from_raw(up.id().cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert_eq!(up.wait().unwrap().code(), Some(130));
    let said = reading.join().unwrap();
    let kept: Vec<_> = said.iter().filter(|line| line.contains("checkpoint kept")).collect();
    assert_eq!(kept.len(), 1, "{said:?}");
    let step = kept[0].split_once("step ").unwrap().1.split_once(':').unwrap().0;
    let on = format!("goes on from step {step}");
    assert!(said.last().unwrap().ends_with(&on), "{said:?}");

    let resumed = summary(&long(&run_dir, 1).output().unwrap(), "the run that goes on");
    let undisturbed = folder.path().join("undisturbed");
    let undisturbed = summary(&long(&undisturbed, 1).output().unwrap(), "the undisturbed run");
    assert_eq!(resumed["state_sha256"], undisturbed["state_sha256"]);
}

#[test]
fn the_state_is_kept_when_somebody_asks_and_an_ended_run_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let run_dir = folder.path().join("run");
    let percheron = |arguments: &[&str]| {
        let mut percheron = Command::new(env!("CARGO_BIN_EXE_percheron"));
        percheron.args(arguments).arg(&run_dir).output().unwrap()
    };
    let mut up = command(&run_dir, 2);
    up.args(["--set", STEPS, "--set", "checkpoint.every_steps=0"]); // Only the last is kept by itself.
    let mut up = up.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(up.stderr.take().unwrap()).lines().map(Result::unwrap);
    lines.find(|line| line.contains("from step 0")).expect("it trains");
    let reading = std::thread::spawn(move || lines.count());

    let asked = percheron(&["checkpoint"]);
    assert!(asked.status.success(), "{}", text(&asked.stderr));
    let said = text(&asked.stdout);
    let step = said.strip_prefix("the state after step ").expect(&said);
    let step = step.strip_suffix(" is kept\n").expect(&said);
    assert!(step.parse::<u64>().unwrap() < 60, "it is not the last: {said}");
    let listed = text(&percheron(&["checkpoints", "list"]).stdout);
    assert!(listed.contains(&format!("step {step}: committed")), "{said}{listed}");
    let verified = percheron(&["checkpoints", "verify"]);
    assert!(verified.status.success(), "{}", text(&verified.stderr));

    reading.join().unwrap();
    let ended = summary(&up.wait_with_output().unwrap(), "the run that was asked");
    assert_eq!(ended["repeated_steps"], 0);
    let refused = percheron(&["checkpoint"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(text(&refused.stderr).contains("coordinator"), "{}", text(&refused.stderr));
}
