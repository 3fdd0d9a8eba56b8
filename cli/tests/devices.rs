//! The supervisor of a machine with several devices: one worker a device, another in the place of one that is
//! killed, and all of them leave when it is asked to end. Two CPUs are devices as well.
#![expect(clippy::unwrap_used, reason = "a test: what cannot be unwrapped fails it")]

use std::{fs, path::Path, process::Command};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use crate::{
    office::Office,
    short_run::{summary, text},
};

mod office;
mod short_run;

/// Enough for a worker to come back.
const STEPS: u64 = 60;
const LONGER: &str = "max_steps=60";
const SUPERVISOR: [&str; 4] = ["--devices", "cpu,cpu", "--name", "node"];

/// The processes that this one has started, by their names.
fn children(parent: u32, names: [&str; 2]) -> [Pid; 2] {
    let threads = fs::read_dir(format!("/proc/{parent}/task")).unwrap();
    let of_thread = |thread: std::io::Result<fs::DirEntry>| {
        fs::read_to_string(thread.unwrap().path().join("children")).unwrap_or_default()
    };
    let list: String = threads.map(of_thread).collect();
    names.map(|name| {
        let is_called = |pid: &&str| {
            let words = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            words.split('\0').any(|word| word == name)
        };
        let pid = list.split_whitespace().find(is_called).expect("each worker has a process");
        Pid::from_raw(pid.parse().unwrap())
    })
}

fn undisturbed(folder: &Path) -> Value {
    let mut up = short_run::command(&folder.join("undisturbed"), 1);
    summary(&up.args(["--set", LONGER]).output().unwrap(), "undisturbed")
}

#[test]
fn a_killed_worker_is_reported_and_replaced_and_the_run_ends_with_the_same_bits() {
    let run = Office::start(2, &[LONGER]);
    let (mut supervisor, mut lines) = run.worker(&SUPERVISOR);
    let formed = lines.find(|line| line.contains("generation formed"));
    assert!(formed.is_some(), "no worker has begun");
    kill(children(supervisor.id(), ["node-0", "node-1"])[1], Signal::SIGKILL).unwrap();
    let said: Vec<_> = lines.collect();
    assert_eq!(supervisor.wait().unwrap().code(), Some(0), "{said:#?}");
    let lost = run.records("worker_lost");
    assert_eq!(lost.len(), 1, "{lost:?}");
    assert_eq!(lost[0]["name"], "node-1");
    assert_eq!(run.records("worker_joined").len(), 3, "another has come in its place");
    let finished = run.records("run_finished");
    assert_eq!(finished[0]["step"], STEPS);
    let state = undisturbed(run.folder.path())["state_sha256"].clone();
    assert_eq!(finished[0]["state_sha256"], state);
}

#[test]
fn all_workers_of_a_machine_leave_when_their_supervisor_is_asked_to_end() {
    let run = Office::start(2, &[LONGER]);
    let (mut supervisor, mut lines) = run.worker(&SUPERVISOR);
    let formed = lines.find(|line| line.contains("generation formed"));
    assert!(formed.is_some(), "no worker has begun");
    kill(Pid::from_raw(supervisor.id().cast_signed()), Signal::SIGTERM).unwrap();
    let said: Vec<_> = lines.collect();
    assert_eq!(supervisor.wait().unwrap().code(), Some(0), "{said:#?}");
    let opened = run.records("generation_opened");
    let last = opened.last().unwrap();
    assert_eq!(last["members"].as_array().unwrap().len(), 0, "{last}");
    let kept = run.records("checkpoint_committed").pop().unwrap();
    let made = run.records("step_adopted").pop().unwrap();
    assert_eq!(kept["step"], made["step"], "no step is lost");
}

#[test]
fn a_machine_without_gpus_says_so() {
    let mut worker = Command::new(env!("CARGO_BIN_EXE_percheron"));
    worker.args(["worker", "--devices", "all", "--name", "node", "--run", "toy"]);
    worker.args(["--coordinator", "http://127.0.0.1:1", "--token-file", "/dev/null"]);
    let output = worker.env("CUDA_VISIBLE_DEVICES", "").output().unwrap();
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    let last = said.lines().last().unwrap();
    assert!(last.starts_with("error: --devices all: no GPU is seen on this machine"), "{said}");
}
