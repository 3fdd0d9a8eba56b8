//! A coordinator of the short run as a process of its own, for tests that start its workers themselves.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    process::{Child, Command, Stdio},
};

use serde_json::Value;

use super::short_run::{self, text};

/// What its folder is, and where it listens.
pub(crate) struct Office {
    pub(crate) folder: tempfile::TempDir,
    coordinator: Child,
    address: String,
}

impl Office {
    /// Waits for so many workers; `sets` are laid over the recipe.
    pub(crate) fn start(workers: u32, sets: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut show = percheron();
        show.args(["recipe", "show", "digits"]);
        short_run::set(&mut show);
        for set in sets {
            show.args(["--set", set]);
        }
        fs::write(folder.path().join("recipe.toml"), show.output().unwrap().stdout).unwrap();
        fs::write(folder.path().join("token"), "open sesame\n").unwrap();
        fs::write(folder.path().join("run.toml"), "run = \"toy\"\n").unwrap();
        let mut coordinator = percheron();
        coordinator.args(["coordinator", "--exit-with-stdin", "--recipe"]);
        coordinator.arg(folder.path().join("recipe.toml")).arg("--run-dir").arg(folder.path());
        coordinator.args(["--workers", &workers.to_string()]);
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

    /// `percheron worker` of this run, and what it says.
    pub(crate) fn worker(
        &self,
        arguments: &[&str],
    ) -> (Child, impl Iterator<Item = String> + use<>) {
        let mut worker = percheron();
        worker.args(["worker", "--run", "toy"]).args(arguments);
        worker.args(["--coordinator", &format!("http://{}", self.address), "--token-file"]);
        worker.arg(self.folder.path().join("token")).stdin(Stdio::null()).stderr(Stdio::piped());
        let mut worker = worker.spawn().unwrap();
        let lines = BufReader::new(worker.stderr.take().unwrap()).lines();
        (worker, lines.map(Result::unwrap))
    }

    /// The records of the run's log.
    pub(crate) fn log(&self) -> Vec<Value> {
        let asked = percheron().args(["log", "--json"]).arg(self.folder.path()).output().unwrap();
        assert!(asked.status.success(), "{}", text(&asked.stderr));
        let record = |line: &str| serde_json::from_str::<Value>(line).unwrap()["record"].clone();
        text(&asked.stdout).lines().map(record).collect()
    }

    /// Those of a kind.
    pub(crate) fn records(&self, kind: &str) -> Vec<Value> {
        self.log().into_iter().filter(|record| record["kind"] == kind).collect()
    }
}

impl Drop for Office {
    fn drop(&mut self) {
        self.coordinator.kill().ok(); // It may have ended.
        self.coordinator.wait().unwrap();
    }
}

fn percheron() -> Command {
    Command::new(env!("CARGO_BIN_EXE_percheron"))
}
