//! Workers that a run must not take: a wrong token, other arithmetic, a life that the run has given up.
//! Each ends with one clear line and does no harm.
#![expect(clippy::unwrap_used, reason = "a test: what cannot be unwrapped fails it")]

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

/// A coordinator with a run that nobody finishes.
struct Run {
    folder: tempfile::TempDir,
    coordinator: Child,
    address: String,
}

impl Run {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let recipe = folder.path().join("recipe.toml");
        let mut show = percheron();
        show.args(["recipe", "show", "digits", "--set", "elastic.max_recovery=4s"]);
        fs::write(&recipe, show.output().unwrap().stdout).unwrap();
        fs::write(folder.path().join("token"), "the right token\n").unwrap();
        fs::write(folder.path().join("run.toml"), "run = \"toy\"\n").unwrap();
        let mut coordinator = percheron()
            .args(["coordinator", "--exit-with-stdin", "--workers", "1", "--recipe"])
            .arg(&recipe)
            .arg("--run-dir")
            .arg(folder.path())
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .env("PERCHERON_LOG", "info")
            .arg("--addr-file")
            .arg(folder.path().join("address"))
            .spawn()
            .unwrap();
        // It says that it coordinates after it has written where.
        let mut lines = BufReader::new(coordinator.stderr.take().unwrap()).lines();
        let says = lines.find(|line| line.as_ref().unwrap().contains("coordinating"));
        assert!(says.is_some(), "the coordinator did not start");
        std::thread::spawn(move || lines.for_each(drop)); // A full pipe would stop it.
        let address = fs::read_to_string(folder.path().join("address")).unwrap();
        Self { folder, coordinator, address }
    }

    fn worker(&self, name: &str, token: &Path) -> Command {
        let mut worker = Command::new(worker_program());
        worker
            .args(["--coordinator", &format!("http://{}", self.address), "--run", "toy"])
            .args(["--name", name, "--exit-with-stdin", "--token-file"])
            .arg(token)
            .stdin(Stdio::piped())
            .stderr(Stdio::piped());
        worker
    }

    fn token(&self) -> PathBuf {
        self.folder.path().join("token")
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        self.coordinator.kill().unwrap();
        self.coordinator.wait().unwrap();
    }
}

fn percheron() -> Command {
    Command::new(env!("CARGO_BIN_EXE_percheron"))
}

fn worker_program() -> PathBuf {
    Path::new(env!("CARGO_BIN_EXE_percheron")).with_file_name("percheron-worker")
}

/// Waits for the end; returns exit code and the lines that begin with `error: `.
fn end(mut worker: Child) -> (Option<i32>, Vec<String>) {
    let stderr = BufReader::new(worker.stderr.take().unwrap());
    let lines = stderr.lines().map(Result::unwrap).filter(|line| line.starts_with("error: "));
    let errors = lines.collect();
    (worker.wait().unwrap().code(), errors)
}

/// Reads a worker's log until it has formed its first generation.
fn wait_until_formed(worker: &mut Child) {
    let mut lines = BufReader::new(worker.stderr.take().unwrap()).lines();
    let formed = lines.find(|line| line.as_ref().unwrap().contains("generation formed"));
    assert!(formed.is_some(), "the worker did not come to train");
    let (reader, writer) = std::io::pipe().unwrap();
    std::thread::spawn(move || {
        let mut writer = writer;
        for line in lines {
            std::io::Write::write_all(&mut writer, format!("{}\n", line.unwrap()).as_bytes())
                .unwrap();
        }
    });
    worker.stderr = Some(std::process::ChildStderr::from(std::os::fd::OwnedFd::from(reader)));
}

fn signal(worker: &Child, signal: nix::sys::signal::Signal) {
    let pid = nix::unistd::Pid::from_raw(worker.id().cast_signed());
    nix::sys::signal::kill(pid, signal).unwrap();
}

#[test]
fn a_worker_with_a_wrong_token_is_refused_by_name_and_sees_no_recipe() {
    let run = Run::start();
    let wrong = run.folder.path().join("wrong");
    fs::write(&wrong, "a guess").unwrap();
    let (code, errors) = end(run.worker("stranger", &wrong).spawn().unwrap());
    assert_eq!((code, errors.len()), (Some(2), 1), "{errors:?}");
    assert!(errors[0].contains("wrong token for run"), "{errors:?}");
    assert!(!errors[0].contains("right token"), "{errors:?}");
}

#[test]
fn a_worker_with_another_fingerprint_is_refused_and_the_difference_is_named() {
    let run = Run::start();
    let mut first = run.worker("first", &run.token()).spawn().unwrap();
    wait_until_formed(&mut first);
    let mut other = run.worker("other", &run.token());
    let (code, errors) = end(other.env("ATEN_CPU_CAPABILITY", "default").spawn().unwrap());
    assert_eq!((code, errors.len()), (Some(2), 1), "{errors:?}");
    assert!(errors[0].contains("cpu_capability is \"DEFAULT\" here"), "{errors:?}");
    first.kill().unwrap();
    first.wait().unwrap();
}

#[test]
fn a_worker_that_wakes_in_a_generation_that_is_over_is_told_so() {
    use nix::sys::signal::Signal;
    let run = Run::start();
    let mut sleeper = run.worker("sleeper", &run.token()).spawn().unwrap();
    wait_until_formed(&mut sleeper);
    signal(&sleeper, Signal::SIGSTOP);
    // The next one is given a generation only after the sleeper's lease is out.
    let mut next = run.worker("next", &run.token()).spawn().unwrap();
    wait_until_formed(&mut next);
    signal(&sleeper, Signal::SIGCONT);
    let (code, errors) = end(sleeper);
    assert_eq!((code, errors.len()), (Some(2), 1), "{errors:?}");
    assert!(errors[0].contains("went on without this worker"), "{errors:?}");
    next.kill().unwrap();
    next.wait().unwrap();
}
