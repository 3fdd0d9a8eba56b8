//! The promise: one final state for every number of workers and every history, and every image once an
//! epoch. Real processes are killed, stopped and started.
#![expect(clippy::unwrap_used, reason = "a test: what cannot be unwrapped fails it")]

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Command, Stdio},
};

use cluster::Record;
use coordinator::EventLog;
use serde_json::Value;

use crate::short_run::{STEPS, summary, text};

mod short_run;

/// `percheron up` of the short recipe into `run_dir`.
fn command(run_dir: &Path, workers: u32, chaos: &str) -> Command {
    let mut command = short_run::command(run_dir, workers);
    if !chaos.is_empty() {
        command.args(["--chaos", chaos]);
    }
    command
}

/// Trains; returns the last line of `--json`.
fn up(run_dir: &Path, workers: u32, chaos: &str) -> Value {
    let output = command(run_dir, workers, chaos).output().unwrap();
    summary(&output, &format!("{workers} workers, {chaos:?}"))
}

/// The steps that the run adopted, in the order of its log.
fn adopted(run_dir: &Path) -> Vec<u64> {
    let entries = EventLog::open(&run_dir.join("log")).unwrap().read_from(1).unwrap();
    let step = |record: &Record| {
        if let Record::StepAdopted { step, .. } = record { Some(step.0) } else { None }
    };
    entries.iter().filter_map(|entry| step(&entry.record)).collect()
}

/// The log alone proves the run.
fn assert_proved(run_dir: &Path) {
    let mut audit = Command::new(env!("CARGO_BIN_EXE_percheron"));
    let output = audit.arg("audit").arg(run_dir).output().unwrap();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{stderr}");
    let proof = format!("steps 1 to {STEPS} of {STEPS} adopted once each, in order");
    assert!(stdout.lines().last().unwrap().contains(&proof), "{stdout}");
}

/// Trains once with each history; all must end in one state, with each step adopted once.
fn same_state(histories: &[(u32, &str)]) -> Vec<Value> {
    let folder = tempfile::tempdir().unwrap();
    let undisturbed = up(&folder.path().join("undisturbed"), 1, "");
    let mut all = Vec::new();
    for (number, (workers, chaos)) in histories.iter().enumerate() {
        let run_dir = folder.path().join(format!("history-{number}"));
        let summary = up(&run_dir, *workers, chaos);
        let name = format!("{workers} workers, {chaos:?}");
        assert_eq!(summary["state_sha256"], undisturbed["state_sha256"], "{name}");
        assert_eq!(summary["top1"], undisturbed["top1"], "{name}");
        assert_eq!(summary["ema_top1"], undisturbed["ema_top1"], "{name}");
        assert_eq!(adopted(&run_dir), (1..=STEPS).collect::<Vec<_>>(), "{name}");
        assert_proved(&run_dir);
        all.push(summary);
    }
    all
}

#[test]
fn every_number_of_workers_ends_in_one_state() {
    let summaries = same_state(&[(2, ""), (3, ""), (4, "")]);
    for summary in summaries {
        assert_eq!((&summary["steps"], &summary["repeated_steps"]), (&STEPS.into(), &0.into()));
        assert_eq!(summary["generations"], 1);
    }
}

#[test]
fn every_history_of_kills_joins_stops_and_restarts_ends_in_one_state() {
    let histories = [
        (3, "kill@3"),
        (2, "kill@2,join@4"),
        (1, "kill@4"), // Nobody is left: the newest checkpoint.
        (1, "join@2,join@3,kill@5"),
        (3, "stop@3"),
        (2, "coordinator-kill@2,kill@4"),
        (4, "kill@2,kill@3,coordinator-kill@4,join@5"),
    ];
    for (summary, (_, chaos)) in same_state(&histories).iter().zip(histories) {
        assert!(summary["generations"].as_u64().unwrap() >= 2, "{chaos}: {summary}");
        let disturbed = chaos.matches(",kill@").count()
            + usize::from(chaos.starts_with("kill@"))
            + chaos.matches("stop@").count();
        assert_eq!(summary["recovery_ms"].as_array().unwrap().len(), disturbed, "{chaos}");
    }
}

#[test]
fn a_run_that_was_interrupted_goes_on_and_a_finished_one_is_not_run_again() {
    let folder = tempfile::tempdir().unwrap();
    let undisturbed = up(&folder.path().join("undisturbed"), 2, "");
    let again = up(&folder.path().join("undisturbed"), 2, "");
    for key in ["state_sha256", "top1", "generations", "step_ms_median", "images_per_s"] {
        assert_eq!(again[key], undisturbed[key], "{key}: nothing was trained again");
    }

    let run_dir = folder.path().join("interrupted");
    let mut first = command(&run_dir, 2, "").stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(first.stderr.take().unwrap()).lines().map(Result::unwrap);
    lines.find(|line| line.contains("checkpoint kept")).expect("it keeps step 3");
    let pid = nix::unistd::Pid::from_raw(first.id().cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    let said: Vec<String> = lines.collect();
    assert_eq!(first.wait().unwrap().code(), Some(130), "{said:?}");
    assert!(said.iter().any(|line| line.contains("--run-dir")), "it says how to go on: {said:?}");
    let resumed = up(&run_dir, 3, "");
    assert_eq!(resumed["state_sha256"], undisturbed["state_sha256"]);
    assert_eq!(adopted(&run_dir), (1..=STEPS).collect::<Vec<_>>());
}

/// A run that was interrupted after it had kept two checkpoints, the newer of which is damaged.
fn with_a_damaged_checkpoint(run_dir: &Path) {
    let mut first = command(run_dir, 1, "").stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(first.stderr.take().unwrap()).lines().map(Result::unwrap);
    lines.find(|line| line.contains("step 6: checkpoint kept")).expect("it keeps step 6");
    let pid = nix::unistd::Pid::from_raw(first.id().cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    lines.for_each(drop);
    first.wait().unwrap();
    // The coordinator ends with who started it, and lets the log go.
    while EventLog::open(&run_dir.join("log")).is_err() {
        std::thread::yield_now();
    }
    let part = run_dir.join(checkpoint::part_name(cluster::Step(6), 0));
    fs::OpenOptions::new().write(true).open(part).unwrap().set_len(1000).unwrap();
}

#[test]
fn a_damaged_checkpoint_is_refused_by_up_and_set_aside_on_request() {
    let folder = tempfile::tempdir().unwrap();
    let undisturbed = up(&folder.path().join("undisturbed"), 1, "");
    let run_dir = folder.path().join("damaged");
    with_a_damaged_checkpoint(&run_dir);
    let refused = command(&run_dir, 1, "").output().unwrap();
    assert_eq!(refused.status.code(), Some(1));
    assert!(text(&refused.stderr).contains("--quarantine"), "{}", text(&refused.stderr));
    let output = command(&run_dir, 1, "").arg("--quarantine").output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let summary: Value =
        serde_json::from_str(text(&output.stdout).lines().last().unwrap()).unwrap();
    assert_eq!(summary["state_sha256"], undisturbed["state_sha256"]);
    assert_proved(&run_dir);
}

#[test]
fn a_cluster_whose_members_have_all_gone_goes_on_from_the_checkpoint_before_a_damaged_one() {
    let folder = tempfile::tempdir().unwrap();
    let undisturbed = up(&folder.path().join("undisturbed"), 1, "");
    let run_dir = folder.path().join("damaged");
    with_a_damaged_checkpoint(&run_dir);
    let address = folder.path().join("address");
    let mut coordinator = Command::new(env!("CARGO_BIN_EXE_percheron"));
    coordinator.args(["coordinator", "--exit-with-stdin", "--recipe"]);
    coordinator.arg(run_dir.join("recipe.toml")).arg("--run-dir").arg(&run_dir);
    coordinator.arg("--addr-file").arg(&address).stdin(Stdio::piped()).stderr(Stdio::piped());
    let mut coordinator = coordinator.spawn().unwrap();
    let mut lines = BufReader::new(coordinator.stderr.take().unwrap()).lines().map(Result::unwrap);
    lines.find(|line| line.contains("coordinating")).expect("the coordinator starts");
    let told = std::thread::spawn(move || lines.collect::<Vec<_>>());
    let mut worker =
        Command::new(Path::new(env!("CARGO_BIN_EXE_percheron")).with_file_name("percheron-worker"));
    let at = format!("http://{}", fs::read_to_string(&address).unwrap());
    worker.args(["--coordinator", &at, "--run", "damaged", "--name", "late", "--token-file"]);
    let output = worker.arg(run_dir.join("token")).stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(coordinator.wait().unwrap().success());
    let told = told.join().unwrap().join("\n");
    assert!(told.contains("checkpoint abandoned") && told.contains("part-00000"), "{told}");
    let entries = EventLog::open(&run_dir.join("log")).unwrap().read_from(1).unwrap();
    let Some(Record::RunFinished { state_sha256, .. }) = entries.last().map(|last| &last.record)
    else {
        panic!("{told}");
    };
    assert_eq!(*state_sha256, undisturbed["state_sha256"]);
    assert_proved(&run_dir);
}
