//! A run whose checkpoints are in S3: interrupted, moved to another folder, gone on with by another number
//! of workers through a network that breaks, it ends with the same bits.
#![expect(clippy::unwrap_used, reason = "a test: what cannot be unwrapped fails it")]

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Command, Stdio},
};

use serde_json::Value;
use testing::{Breakage, Proxy, Rule, S3Server};

use crate::short_run::{STEPS, summary, text};

mod short_run;

/// `percheron up` of the short recipe; `variables` are in its environment.
fn command(run_dir: &Path, workers: u32, variables: &[(String, String)]) -> Command {
    let mut command = short_run::command(run_dir, workers);
    command.envs(variables.iter().map(|(name, value)| (name, value)));
    command
}

fn finished(command: &mut Command) -> Value {
    summary(&command.output().unwrap(), "a run in S3")
}

fn refused(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stdout));
    text(&output.stderr)
}

/// What a client has in its environment that speaks to `port`.
fn through(server: &S3Server, port: u16) -> Vec<(String, String)> {
    let mut variables = server.variables();
    variables.push(("AWS_ENDPOINT_URL".to_owned(), format!("http://127.0.0.1:{port}")));
    variables
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_in_s3_is_moved_and_resized_and_its_store_fails_and_it_ends_with_the_same_bits() {
    let server = S3Server::start().await;
    let proxy = Proxy::before(server.port()).await;
    let variables = through(&server, proxy.port());
    let folder = tempfile::tempdir().unwrap();
    let undisturbed = finished(&mut command(&folder.path().join("undisturbed"), 1, &[]));

    let before = folder.path().join("before");
    let location = server.location("runs/moved");
    let mut first = command(&before, 2, &variables)
        .args(["--checkpoints", &location])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(first.stderr.take().unwrap()).lines().map(Result::unwrap);
    lines.find(|line| line.contains("checkpoint kept")).expect("it keeps step 3");
    let pid = nix::unistd::Pid::from_raw(first.id().cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    let said: Vec<String> = lines.collect();
    assert_eq!(first.wait().unwrap().code(), Some(130), "{said:?}");
    assert!(!before.join("checkpoints").exists(), "nothing is kept in the folder");

    let after = folder.path().join("after");
    fs::rename(&before, &after).unwrap();
    for breakage in [Breakage::SlowDown, Breakage::ResetBefore, Breakage::ResetAfter] {
        proxy.add(Rule { method: "PUT", path: "/part-", breakage, times: 2 });
        proxy.add(Rule { method: "PUT", path: "/manifest.json", breakage, times: 1 });
    }
    let resumed = finished(&mut command(&after, 3, &variables));
    assert_eq!(resumed["state_sha256"], undisturbed["state_sha256"]);
    assert_eq!(proxy.left(), 0, "everything that was to break has broken");

    let mut verify = Command::new(env!("CARGO_BIN_EXE_percheron"));
    verify.args(["checkpoints", "verify"]).arg(&after);
    let output = verify.envs(variables.clone()).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));

    // Its weights are found by its folder, and its newest checkpoint is copied out of the bucket.
    let weights = folder.path().join("weights.safetensors");
    let mut export = Command::new(env!("CARGO_BIN_EXE_percheron"));
    export.args(["export", "--format", "safetensors", "--checkpoint"]).arg(&after);
    let output = export.arg("--out").arg(&weights).envs(variables.clone()).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let backup = folder.path().join("backup");
    let mut copy = Command::new(env!("CARGO_BIN_EXE_percheron"));
    copy.args(["checkpoints", "copy"]).args([&after, &backup]);
    let output = copy.envs(variables).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let again = folder.path().join("again.safetensors");
    let mut export = Command::new(env!("CARGO_BIN_EXE_percheron"));
    export.args(["export", "--format", "safetensors", "--checkpoint"]).arg(&backup);
    let output = export.arg("--out").arg(&again).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(
        fs::read(&weights).unwrap(),
        fs::read(&again).unwrap(),
        "both hold the same weights"
    );

    // Another run cannot take the place, and this one cannot go elsewhere.
    let direct = server.variables();
    let other = folder.path().join("other");
    let said = refused(command(&other, 1, &direct).args(["--checkpoints", &location]));
    let taken = format!("holds another run's checkpoints, up to step {STEPS}");
    assert!(said.contains(&taken), "{said}");
    assert!(!other.exists(), "nothing is begun");
    let said = refused(command(&after, 1, &direct).args(["--checkpoints", "s3://test/other"]));
    assert!(said.contains("keeps its checkpoints in s3://test/runs/moved"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_cannot_be_used_is_said_before_anything_is_begun() {
    let server = S3Server::start().await;
    let folder = tempfile::tempdir().unwrap();
    let run_dir = folder.path().join("run");
    let mut variables = server.variables();
    variables.push(("AWS_SECRET_ACCESS_KEY".to_owned(), "wrong".to_owned()));
    let location = server.location("runs");
    let said = refused(command(&run_dir, 1, &variables).args(["--checkpoints", &location]));
    assert!(said.contains("--checkpoints: cannot write s3://test/runs/probe/"), "{said}");
    let said = refused(command(&run_dir, 1, &[]).args(["--checkpoints", "gs://b/runs"]));
    assert!(said.contains("cannot open gs://b/runs: give a folder"), "{said}");
    assert!(!run_dir.exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_ranks_fail_to_upload_for_good_and_the_run_goes_on_and_keeps_the_next_checkpoint() {
    let server = S3Server::start().await;
    let proxy = Proxy::before(server.port()).await;
    let variables = through(&server, proxy.port());
    let folder = tempfile::tempdir().unwrap();
    let undisturbed = finished(&mut command(&folder.path().join("undisturbed"), 1, &[]));

    // More often than anybody tries: no part of step 3 gets through, of neither rank.
    let path = "step-0000000003/part-";
    proxy.add(Rule { method: "PUT", path, breakage: Breakage::SlowDown, times: u32::MAX });
    let run_dir = folder.path().join("run");
    let location = server.location("runs/unlucky");
    let ended = finished(command(&run_dir, 2, &variables).args(["--checkpoints", &location]));
    assert_eq!(ended["state_sha256"], undisturbed["state_sha256"]);
    assert_eq!(ended["repeated_steps"], 0, "nobody was lost: {ended}");
    let failed = [0, 1].map(|rank| failed_uploads(&run_dir, rank));
    assert!(failed.iter().all(|&count| count > 0), "both ranks met the errors: {failed:?}");

    let mut list = Command::new(env!("CARGO_BIN_EXE_percheron"));
    list.args(["checkpoints", "list", "--json"]).arg(&run_dir).envs(server.variables());
    let listed = text(&list.output().unwrap().stdout);
    let steps: Vec<_> = listed
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["step"].as_u64().unwrap())
        .collect();
    assert_eq!(steps, [6, STEPS], "all but the third: {listed}");
    let mut verify = Command::new(env!("CARGO_BIN_EXE_percheron"));
    verify.args(["checkpoints", "verify"]).arg(&run_dir).envs(server.variables());
    let output = verify.output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
}

/// How often a worker said that the store had refused a part.
fn failed_uploads(run_dir: &Path, rank: u32) -> usize {
    let log = fs::read_to_string(run_dir.join(format!("logs/worker-{rank}.log"))).unwrap();
    log.lines().filter(|line| line.contains("the store failed")).count()
}
