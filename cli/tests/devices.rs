//! The supervisor of a machine with several devices: one worker a device, another in the place of one that is
//! killed, and all of them leave when it is asked to end. Two CPUs are devices as well.
#![expect(clippy::unwrap_used, reason = "a test: what cannot be unwrapped fails it")]

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use crate::short_run::{summary, text};

mod short_run;

/// Enough for a worker to come back.
const STEPS: u64 = 60;
const LONGER: [&str; 2] = ["--set", "max_steps=60"];

/// A coordinator of the short run, and what its folder is.
struct Run {
    folder: tempfile::TempDir,
    coordinator: Child,
    address: String,
}

impl Run {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut show = percheron();
        show.args(["recipe", "show", "digits"]);
        short_run::set(&mut show);
        show.args(LONGER);
        fs::write(folder.path().join("recipe.toml"), show.output().unwrap().stdout).unwrap();
        fs::write(folder.path().join("token"), "open sesame\n").unwrap();
        fs::write(folder.path().join("run.toml"), "run = \"toy\"\n").unwrap();
        let mut coordinator = percheron();
        coordinator.args(["coordinator", "--exit-with-stdin", "--workers", "2", "--recipe"]);
        coordinator.arg(folder.path().join("recipe.toml")).arg("--run-dir").arg(folder.path());
        coordinator.arg("--addr-file").arg(folder.path().join("coordinator.address"));
        coordinator.env("PERCHERON_LOG", "info").stdin(Stdio::piped()).stderr(Stdio::piped());
        let mut coordinator = coordinator.spawn().unwrap();
        let mut lines = BufReader::new(coordinator.stderr.take().unwrap()).lines();
        // It says that it coordinates after it has written where.
        let says = lines.find(|line| line.as_ref().unwrap().contains("coordinating"));
        assert!(says.is_some(), "the coordinator did not start");
        std::thread::spawn(move || lines.for_each(drop)); // A full pipe would stop it.
        let address = fs::read_to_string(folder.path().join("coordinator.address")).unwrap();
        Self { folder, coordinator, address }
    }

    /// The supervisor of two workers, and what all three say.
    fn supervisor(&self) -> (Child, impl Iterator<Item = String>) {
        let mut worker = percheron();
        worker.args(["worker", "--devices", "cpu,cpu", "--name", "node", "--run", "toy"]);
        worker.args(["--coordinator", &format!("http://{}", self.address), "--token-file"]);
        worker.arg(self.folder.path().join("token")).stdin(Stdio::null()).stderr(Stdio::piped());
        let mut supervisor = worker.spawn().unwrap();
        let lines = BufReader::new(supervisor.stderr.take().unwrap()).lines();
        (supervisor, lines.map(Result::unwrap))
    }

    fn log(&self) -> Vec<Value> {
        let asked = percheron().args(["log", "--json"]).arg(self.folder.path()).output().unwrap();
        assert!(asked.status.success(), "{}", text(&asked.stderr));
        text(&asked.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        self.coordinator.kill().ok(); // It may have ended.
        self.coordinator.wait().unwrap();
    }
}

fn percheron() -> Command {
    Command::new(env!("CARGO_BIN_EXE_percheron"))
}

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
    summary(&up.args(LONGER).output().unwrap(), "undisturbed")
}

#[test]
fn a_killed_worker_is_reported_and_replaced_and_the_run_ends_with_the_same_bits() {
    let run = Run::start();
    let (mut supervisor, mut lines) = run.supervisor();
    let formed = lines.find(|line| line.contains("generation formed"));
    assert!(formed.is_some(), "no worker has begun");
    kill(children(supervisor.id(), ["node-0", "node-1"])[1], Signal::SIGKILL).unwrap();
    let said: Vec<_> = lines.collect();
    assert_eq!(supervisor.wait().unwrap().code(), Some(0), "{said:#?}");
    let log = run.log();
    let of = |kind: &str| {
        let is_it = |line: &&Value| line["record"]["kind"] == kind;
        log.iter().filter(is_it).map(|line| line["record"].clone()).collect::<Vec<_>>()
    };
    let lost = of("worker_lost");
    assert_eq!(lost.len(), 1, "{lost:?}");
    assert_eq!(lost[0]["name"], "node-1");
    assert_eq!(of("worker_joined").len(), 3, "another has come in its place");
    let finished = of("run_finished");
    assert_eq!(finished[0]["step"], STEPS);
    let state = undisturbed(run.folder.path())["state_sha256"].clone();
    assert_eq!(finished[0]["state_sha256"], state);
}

#[test]
fn all_workers_of_a_machine_leave_when_their_supervisor_is_asked_to_end() {
    let run = Run::start();
    let (mut supervisor, mut lines) = run.supervisor();
    let formed = lines.find(|line| line.contains("generation formed"));
    assert!(formed.is_some(), "no worker has begun");
    kill(Pid::from_raw(supervisor.id().cast_signed()), Signal::SIGTERM).unwrap();
    let said: Vec<_> = lines.collect();
    assert_eq!(supervisor.wait().unwrap().code(), Some(0), "{said:#?}");
    let log = run.log();
    let opened: Vec<_> =
        log.iter().filter(|line| line["record"]["kind"] == "generation_opened").collect();
    let last = &opened[opened.len() - 1]["record"];
    assert_eq!(last["members"].as_array().unwrap().len(), 0, "{last}");
    let kept = log.iter().rfind(|line| line["record"]["kind"] == "checkpoint_committed");
    let made = log.iter().rfind(|line| line["record"]["kind"] == "step_adopted");
    assert_eq!(kept.unwrap()["record"]["step"], made.unwrap()["record"]["step"], "no step is lost");
}

#[test]
fn a_machine_without_gpus_says_so() {
    let mut worker = percheron();
    worker.args(["worker", "--devices", "all", "--name", "node", "--run", "toy"]);
    worker.args(["--coordinator", "http://127.0.0.1:1", "--token-file", "/dev/null"]);
    let output = worker.env("CUDA_VISIBLE_DEVICES", "").output().unwrap();
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    let last = said.lines().last().unwrap();
    assert!(last.starts_with("error: --devices all: no GPU is seen on this machine"), "{said}");
}
