//! What is read from the event log of a run: audit, log, incidents.
#![expect(clippy::unwrap_used, reason = "helpers of tests are tests too")]

use std::{
    fs,
    path::PathBuf,
    process::{Command, Output},
};

use cluster::{
    Fingerprint, Generation, Member, Record, RunConfig, RunId, Step, StepMetrics, Term, Timestamp,
    WorkerId,
};
use coordinator::EventLog;
use tempfile::TempDir;

/// Training samples of the built-in digits.
const SAMPLES: u64 = 1437;

struct Run {
    folder: TempDir,
}

impl Run {
    /// A folder as `up` leaves it, with these records as its log.
    fn of(records: &[Record]) -> Self {
        let run = Self { folder: tempfile::tempdir().unwrap() };
        fs::create_dir(run.path("run")).unwrap();
        fs::write(run.path("run/recipe.toml"), recipe().to_toml()).unwrap();
        let mut log = EventLog::open(&run.path("run/log")).unwrap();
        for (place, record) in (0..).zip(records) {
            log.append(Timestamp(1_000_000 + 100 * place), std::slice::from_ref(record)).unwrap();
        }
        run
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn ask(&self, arguments: &[&str]) -> Output {
        let mut percheron = Command::new(env!("CARGO_BIN_EXE_percheron"));
        percheron.current_dir(self.folder.path()).args(arguments).output().unwrap()
    }

    fn shown(&self, arguments: &[&str]) -> Vec<String> {
        let output = self.ask(arguments);
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
    }

    fn refused(&self, arguments: &[&str]) -> String {
        let output = self.ask(arguments);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
        stderr
    }
}

fn recipe() -> recipe::Recipe {
    recipe::built_in("digits", &[]).unwrap()
}

fn plan() -> RunConfig {
    recipe().plan(RunId::try_from("run".to_owned()).unwrap(), SAMPLES, 2).unwrap()
}

fn member(number: u64, block: std::ops::Range<u32>) -> Member {
    let name = format!("worker-{number}");
    Member { worker: WorkerId(number), name, address: "127.0.0.1:1".to_owned(), block }
}

/// A run to its end, in which one of two workers is killed after 30 steps.
fn history() -> Vec<Record> {
    let plan = plan();
    let joined = |number| {
        let Member { worker, name, address, .. } = member(number, 0..1);
        Record::WorkerJoined { worker, name, address }
    };
    let opened = |generation, members, reason: &str| Record::GenerationOpened {
        generation: Generation(generation),
        members,
        planned: false,
        last: false,
        reason: reason.to_owned(),
    };
    let formed = |generation, step, repeated| Record::GenerationFormed {
        generation: Generation(generation),
        step: Step(step),
        digest: format!("state-{step}"),
        repeated,
        stopped_at: None,
    };
    let stepped = |step, generation| Record::StepAdopted {
        step: Step(step),
        generation: Generation(generation),
        metrics: Some(StepMetrics {
            images: recipe().global_batch(),
            step_ms: 100.0,
            ..StepMetrics::default()
        }),
        applied_at: None,
    };
    let total = plan.steps_total;
    let mut log = vec![
        Record::RunCreated { config: Box::new(plan) },
        Record::TermStarted { term: Term(1) },
        Record::FingerprintFixed { fingerprint: Fingerprint::default() },
        joined(0),
        joined(1),
        opened(1, vec![member(0, 0..4), member(1, 4..8)], "enough workers are there"),
        formed(1, 0, 0),
    ];
    log.extend((1..=30).map(|step| stepped(step, 1)));
    log.push(Record::WorkerLost {
        worker: WorkerId(1),
        name: "worker-1".to_owned(),
        cause: "killed by signal 9".to_owned(),
    });
    log.push(opened(2, vec![member(0, 0..8)], "worker-1 was lost"));
    log.push(formed(2, 30, 1));
    log.extend((31..=total.0).map(|step| stepped(step, 2)));
    log.push(Record::CheckpointCommitted { step: total });
    log.push(Record::RunFinished { step: total, state_sha256: "f00d".to_owned() });
    log
}

#[test]
fn an_audit_ends_with_its_proof_and_names_what_each_epoch_left_out() {
    let run = Run::of(&history());
    let shown = run.shown(&["audit", "run"]);
    let plan = plan();
    let epochs = plan.steps_total.0 / plan.steps_per_epoch;
    assert_eq!(shown.len() as u64, epochs + 1);
    let batch = recipe().global_batch();
    let (steps, consumed) = (plan.steps_per_epoch, plan.steps_per_epoch * batch);
    let first = format!("epoch 0: {steps} steps, {consumed} samples, each once; ");
    assert!(shown[0].starts_with(&first), "{}", shown[0]);
    assert!(shown[0].contains(&format!("{} left out by drop_last: ", SAMPLES - consumed)));
    let proof = shown.last().unwrap();
    assert!(proof.contains(&format!("steps 1 to {0} of {0} adopted once each", plan.steps_total)));
    assert!(proof.contains(&format!("{} samples of {epochs} complete epochs", consumed * epochs)));
}

#[test]
fn an_audit_names_the_record_that_was_changed() {
    let mut log = history();
    let Record::StepAdopted { step, .. } = &mut log[20] else { panic!("{:?}", log[20]) };
    assert_eq!(*step, Step(14));
    *step = Step(15);
    let refusal = Run::of(&log).refused(&["audit", "run"]);
    assert!(refusal.contains("record 21: step 15 is adopted; expected step 14"), "{refusal}");
}

#[test]
fn an_audit_of_other_data_names_what_does_not_follow() {
    let run = Run::of(&history());
    let other = recipe().to_toml().replace("batch_size = ", "batch_size = 1");
    fs::write(run.path("run/recipe.toml"), other).unwrap();
    let refusal = run.refused(&["audit", "run"]);
    assert!(refusal.contains("record 1: the run was planned with "), "{refusal}");
    assert!(refusal.contains("which follows from the recipe and the data"), "{refusal}");
}

#[test]
fn a_log_is_shown_record_by_record() {
    let log = history();
    let run = Run::of(&log);
    let shown = run.shown(&["log", "run"]);
    assert_eq!(shown.len(), log.len());
    assert!(shown[37].ends_with("worker-1 is lost: killed by signal 9"), "{}", shown[37]);
    assert!(shown[37].starts_with("    38       3.700 s"), "{}", shown[37]);
    let followed = run.shown(&["log", "run", "--follow", "--json"]);
    for (place, line) in followed.iter().enumerate() {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        assert_eq!(line["sequence"], place + 1);
        let record: Record = serde_json::from_value(line["record"].clone()).unwrap();
        assert_eq!(record, log[place]);
    }
    assert_eq!(followed.len(), log.len(), "it ends with the run");
}

#[test]
fn an_incident_is_shown_with_what_it_cost() {
    let run = Run::of(&history());
    let shown = run.shown(&["incidents", "run", "--json"]);
    assert_eq!(shown.len(), 1, "{shown:?}");
    let incident: serde_json::Value = serde_json::from_str(&shown[0]).unwrap();
    assert_eq!(incident["sequence"], 38);
    assert_eq!(incident["noticed_by"], "its supervisor");
    assert_eq!((&incident["recovery_ms"], &incident["cost_ms"]), (&300.into(), &300.into()));
    assert_eq!(incident["repeated_steps"], 1);
    let shown = run.shown(&["incidents", "run"]);
    assert_eq!(shown.last().unwrap(), "1 incidents; 1 steps repeated; 300 ms lost");
}

#[test]
fn a_folder_without_a_run_is_refused() {
    let run = Run::of(&[]);
    for view in ["audit", "log", "incidents"] {
        let refusal = run.refused(&[view, "nowhere"]);
        assert!(refusal.contains("nowhere holds no run"), "{refusal}");
    }
    let refusal = run.refused(&["audit", "run"]);
    assert!(refusal.contains("the log is empty"), "{refusal}");
}
