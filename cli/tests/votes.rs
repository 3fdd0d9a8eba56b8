//! A bit of one worker's state flips. The workers compare their states, the one is lost by name, what was computed
//! since they were last equal is computed again, and the run ends with the same bits.
#![expect(clippy::unwrap_used, reason = "a test: what cannot be unwrapped fails it")]

use std::path::Path;

use serde_json::Value;

use crate::{
    office::Office,
    short_run::{STEPS, summary},
};

mod office;
mod short_run;

fn undisturbed(folder: &Path) -> Value {
    let mut up = short_run::command(&folder.join("undisturbed"), 1);
    summary(&up.output().unwrap(), "undisturbed")["state_sha256"].clone()
}

/// Runs workers whose states are compared after each second step, the last of them with a bit that flips after the
/// fifth. Returns the run, and what that worker's process ended with and said.
fn run_with_a_flip(workers: u32) -> (Office, Option<i32>, Vec<String>) {
    let run = Office::start(workers, &["elastic.vote_every_steps=2"]);
    let names: Vec<_> = (0..workers).map(|number| format!("worker-{number}")).collect();
    let (broken, whole) = names.split_last().unwrap();
    let whole: Vec<_> = whole.iter().map(|name| run.worker(&["--name", name])).collect();
    let whole: Vec<_> = whole
        .into_iter()
        .map(|(process, lines)| (process, std::thread::spawn(move || lines.collect::<Vec<_>>())))
        .collect();
    let flips = ["--name", broken, "--flip-a-bit-after", "5"];
    let (mut process, lines) = run.worker(&flips);
    let said: Vec<_> = lines.collect();
    let code = process.wait().unwrap().code();
    for (mut process, lines) in whole {
        let lines = lines.join().unwrap();
        assert_eq!(process.wait().unwrap().code(), Some(0), "{lines:#?}");
    }
    (run, code, said)
}

#[test]
fn a_worker_whose_state_differs_from_the_others_is_lost_by_name_and_the_bits_are_the_same() {
    let (run, code, said) = run_with_a_flip(3);
    assert_eq!(code, Some(2), "{said:#?}");
    let lost = run.records("worker_lost");
    assert_eq!(lost.len(), 1, "{lost:?}");
    assert_eq!(lost[0]["name"], "worker-2");
    let cause = lost[0]["cause"].as_str().unwrap();
    assert!(cause.starts_with("the states differ after step 6: that of rank "), "{cause}");
    let given_up = run.records("checkpoint_abandoned");
    assert!(given_up.iter().all(|record| record["step"].as_u64() > Some(4)), "{given_up:?}");
    let finished = run.records("run_finished").pop().unwrap();
    assert_eq!(finished["step"], STEPS);
    assert_eq!(finished["state_sha256"], undisturbed(run.folder.path()));
}

#[test]
fn two_workers_that_disagree_both_go_back_to_where_they_were_equal_and_the_bits_are_the_same() {
    let (run, code, said) = run_with_a_flip(2);
    assert_eq!(code, Some(0), "{said:#?}");
    assert_eq!(run.records("worker_lost"), [] as [Value; 0]);
    let opened = run.records("generation_opened").pop().unwrap();
    let reason = opened["reason"].as_str().unwrap();
    assert!(reason.contains("none is that of most"), "{reason}");
    let finished = run.records("run_finished").pop().unwrap();
    assert_eq!(finished["state_sha256"], undisturbed(run.folder.path()));
}
