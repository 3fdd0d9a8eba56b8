//! Workers on machines that are taken away: asked to leave by signals and by a cloud's notice, in whatever they
//! are doing, they lose no step; and what their guard ends with says whether to start them again.
#![expect(clippy::unwrap_used, reason = "a test: what cannot be unwrapped fails it")]

use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

/// What a guard ends with when its worker is to be started again.
const AGAIN: i32 = 75;
const STEPS: u64 = 42;
const WORKERS: usize = 3;
const LOOK: Duration = Duration::from_millis(100);

/// A coordinator of a run whose log is in a folder that all see, and its workers, each under a guard.
struct Run {
    folder: tempfile::TempDir,
    coordinator: Child,
    guards: Vec<Child>,
    started: usize,
}

impl Run {
    fn start(workers: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::write(path("recipe.toml"), recipe()).unwrap();
        fs::write(path("token"), "open sesame\n").unwrap();
        fs::write(path("run.toml"), "run = \"toy\"\n").unwrap();
        let mut coordinator = percheron();
        coordinator.args(["coordinator", "--exit-with-stdin", "--standby"]);
        coordinator.args(["--workers", &workers.to_string(), "--recipe"]).arg(path("recipe.toml"));
        coordinator.arg("--run-dir").arg(folder.path()).arg("--log").arg(path("journal"));
        coordinator.arg("--addr-file").arg(path("address"));
        let coordinator = coordinator.stdin(Stdio::piped()).stderr(log(&folder, "coordinator"));
        let coordinator = coordinator.spawn().unwrap();
        let mut run = Self { folder, coordinator, guards: Vec::new(), started: 0 };
        for _ in 0..workers {
            let guard = run.guard(&[]);
            run.guards.push(guard);
        }
        run
    }

    /// Starts a worker under a guard with more options.
    fn guard(&mut self, options: &[&str]) -> Child {
        let name = format!("worker-{}", self.started);
        self.started += 1;
        let path = |name: &str| self.folder.path().join(name);
        let mut guard = percheron();
        guard.args(["guard", "--coordinator-file"]).arg(path("address"));
        guard.arg("--log").arg(path("journal")).args(options).args(["--", "--run", "toy"]);
        guard.args(["--name", &name, "--token-file"]).arg(path("token"));
        guard.stdin(Stdio::null()).stderr(log(&self.folder, &name)).spawn().unwrap()
    }

    fn journal(&self) -> PathBuf {
        self.folder.path().join("journal")
    }

    fn status(&self) -> Value {
        let asked =
            percheron().args(["status", "--json", "--run-dir"]).arg(self.journal()).output();
        serde_json::from_slice(&asked.unwrap().stdout).unwrap_or_default()
    }

    /// Waits until so many workers train and the run has come to `step`, or is finished.
    fn wait_for(&mut self, workers: usize, step: u64) -> Value {
        loop {
            let status = self.status();
            let members = status["members"].as_array().map_or(0, Vec::len);
            let reached = status["step"].as_u64().is_some_and(|now| now >= step);
            if status["state"] == "finished" || (members == workers && reached) {
                return status;
            }
            if let Some(ended) = self.coordinator.try_wait().unwrap() {
                assert!(ended.success(), "the coordinator: {}", self.said());
            }
            std::thread::sleep(LOOK);
        }
    }

    fn said(&self) -> String {
        let logs = fs::read_dir(self.folder.path()).unwrap().map(|entry| entry.unwrap().path());
        let logs = logs.filter(|path| path.extension().is_some_and(|kind| kind == "log"));
        logs.map(|path| fs::read_to_string(path).unwrap()).collect()
    }

    /// Waits for the end of all; returns how the run ended.
    fn end(mut self) -> Value {
        for mut guard in std::mem::take(&mut self.guards) {
            assert_eq!(guard.wait().unwrap().code(), Some(0), "{}", self.said());
        }
        assert_eq!(self.coordinator.wait().unwrap().code(), Some(0), "{}", self.said());
        let audit = percheron().arg("audit").arg(self.journal()).output().unwrap();
        let proof = format!("steps 1 to {STEPS} of {STEPS} adopted once each, in order");
        assert!(String::from_utf8_lossy(&audit.stdout).contains(&proof), "{audit:?}");
        self.status()
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        for process in self.guards.iter_mut().chain([&mut self.coordinator]) {
            process.kill().ok(); // It may have ended.
            process.wait().unwrap();
        }
    }
}

fn percheron() -> Command {
    Command::new(env!("CARGO_BIN_EXE_percheron"))
}

fn log(folder: &tempfile::TempDir, name: &str) -> fs::File {
    fs::File::create(folder.path().join(format!("{name}.log"))).unwrap()
}

fn recipe() -> Vec<u8> {
    let mut show = percheron();
    show.args(["recipe", "show", "digits"]);
    for set in [
        &format!("max_steps={STEPS}"),
        "virtual_ranks=4",
        "batch_size=2",
        "evaluate_every_epochs=0",
        "checkpoint.every_steps=5",
        "elastic.max_recovery=4s",
        "schedule.warmup_epochs=0",
    ] {
        show.args(["--set", set]);
    }
    show.output().unwrap().stdout
}

fn signal(guard: &Child, signal: Signal) {
    kill(Pid::from_raw(guard.id().cast_signed()), signal).unwrap();
}

/// The final state of a run on which nothing happens.
fn undisturbed(folder: &Path) -> String {
    let recipe_file = folder.join("undisturbed.toml");
    fs::write(&recipe_file, recipe()).unwrap();
    let mut up = percheron();
    up.args(["up", "--json", "--recipe"]).arg(&recipe_file);
    let output = up.arg("--run-dir").arg(folder.join("undisturbed")).output().unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let summary: Value = serde_json::from_str(stdout.lines().last().unwrap()).unwrap();
    summary["state_sha256"].as_str().unwrap().to_owned()
}

#[test]
fn every_worker_is_preempted_twice_and_no_step_is_lost() {
    let mut run = Run::start(WORKERS);
    let signals = [Signal::SIGTERM, Signal::SIGUSR1, Signal::SIGUSR2];
    // Not the same places of a step and of a checkpoint's five: each waits for another step.
    for turn in 0..2 * WORKERS {
        let status = run.wait_for(WORKERS, 1 + 6 * turn as u64);
        assert_ne!(status["state"], "finished", "the run is too short for this test");
        let place = turn % WORKERS;
        signal(&run.guards[place], signals[turn % signals.len()]);
        let code = run.guards[place].wait().unwrap().code();
        assert_eq!(code, Some(AGAIN), "turn {turn}: {}", run.said());
        run.guards[place] = run.guard(&[]);
    }
    let folder = tempfile::tempdir().unwrap();
    let status = run.end();
    assert_eq!(status["repeated_steps"], 0, "{status}");
    assert_eq!(status["state_sha256"], undisturbed(folder.path()), "{status}");
}

#[test]
fn all_workers_are_preempted_at_once_and_the_run_goes_on_when_they_are_back() {
    let mut run = Run::start(2);
    run.wait_for(2, 8);
    for guard in &run.guards {
        signal(guard, Signal::SIGTERM);
    }
    for guard in &mut run.guards {
        assert_eq!(guard.wait().unwrap().code(), Some(AGAIN));
    }
    let kept = run.status();
    run.guards = vec![run.guard(&[]), run.guard(&[])];
    let folder = tempfile::tempdir().unwrap();
    let status = run.end();
    assert_eq!(status["repeated_steps"], 0, "{kept} {status}");
    assert_eq!(status["state_sha256"], undisturbed(folder.path()), "{status}");
}

#[test]
fn a_notice_of_the_cloud_is_a_request_to_leave() {
    let cloud = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", cloud.local_addr().unwrap());
    let mut run = Run::start(1);
    let mut preempted = run.guard(&["--notice", "gcp", "--notice-url", &url]);
    // Until both train, the cloud does not answer at all.
    run.wait_for(2, 2);
    std::thread::spawn(move || {
        loop {
            let (mut stream, _) = cloud.accept().unwrap();
            let mut head = [0; 1024];
            if stream.read(&mut head).unwrap_or(0) > 0 {
                let answer =
                    b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 4\r\n\r\nTRUE";
                stream.write_all(answer).ok(); // Who asked may have given up.
            }
        }
    });
    assert_eq!(preempted.wait().unwrap().code(), Some(AGAIN), "{}", run.said());
    assert!(run.said().contains("Compute Engine preempts this machine"), "{}", run.said());
    assert_eq!(run.end()["repeated_steps"], 0);
}

#[test]
fn who_is_refused_is_not_started_again_and_who_comes_too_late_is_not_needed() {
    let mut run = Run::start(1);
    run.wait_for(1, 1);
    let token = run.folder.path().join("token");
    fs::write(&token, "wrong\n").unwrap();
    let mut refused = run.guard(&[]);
    assert_eq!(refused.wait().unwrap().code(), Some(2), "{}", run.said());
    fs::write(&token, "open sesame\n").unwrap();
    run.wait_for(1, STEPS);
    let mut late = run.guard(&[]);
    assert_eq!(late.wait().unwrap().code(), Some(0), "{}", run.said());
    run.end();
}
