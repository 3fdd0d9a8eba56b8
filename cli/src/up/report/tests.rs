//! A made-up log, folded.

use cluster::{Epoch, Member, WorkerId};

use super::*;

fn members(numbers: &[u64]) -> Vec<Member> {
    let member = |&number: &u64| Member {
        worker: WorkerId(number),
        name: format!("worker-{number}"),
        address: String::new(),
        block: 0..1,
    };
    numbers.iter().map(member).collect()
}

fn opened(generation: u64, numbers: &[u64], planned: bool) -> Record {
    Record::GenerationOpened {
        generation: Generation(generation),
        members: members(numbers),
        planned,
        last: false,
        reason: String::new(),
    }
}

fn formed(generation: u64, step: u64, repeated: u64, stopped_at: Option<u64>) -> Record {
    Record::GenerationFormed {
        generation: Generation(generation),
        step: Step(step),
        digest: String::new(),
        repeated,
        stopped_at: stopped_at.map(Timestamp),
    }
}

fn adopted(generation: u64, step: u64, applied_at: Option<u64>, step_ms: f32) -> Record {
    let metrics =
        StepMetrics { images: 64, step_ms, compute_ms: step_ms / 2.0, ..StepMetrics::default() };
    Record::StepAdopted {
        step: Step(step),
        generation: Generation(generation),
        metrics: applied_at.map(|_| metrics),
        applied_at: applied_at.map(Timestamp),
    }
}

fn evaluated() -> Record {
    let weights = ExitScores { top1: [0.1, 0.2, 0.3, 0.456_789_12], loss: 1.0 };
    let ema = ExitScores { top1: [0.5, 0.6, 0.7, 0.8], loss: 1.0 };
    let evaluation = Evaluation { step: Step(4), epoch: Epoch(1), samples: 9, weights, ema };
    Record::Evaluated { generation: Generation(2), evaluation }
}

fn finished() -> Record {
    Record::RunFinished { step: Step(4), state_sha256: "abc".to_owned() }
}

/// Takes records in as entries, one millisecond after the other from `at` on.
fn fold(report: &mut Report, at: u64, records: &[Record]) {
    for (record, at) in records.iter().zip(at..) {
        let sequence = report.last() + 1;
        report.apply(&Entry { sequence, at: Timestamp(at), record: record.clone() });
    }
}

#[test]
fn a_run_with_a_kill_is_summed_up() {
    let mut report = Report::default();
    let before = [opened(1, &[0, 1], false), formed(1, 0, 0, None)];
    fold(&mut report, 1_000, &before);
    fold(&mut report, 1_100, &[adopted(1, 1, Some(1_099), 100.0)]);
    report.worker_taken("worker-1", Timestamp(1_150));
    let after = [
        opened(2, &[0], false),
        adopted(2, 2, None, 0.0), // Applied before the loss, reported with the new generation.
        formed(2, 2, 1, Some(1_162)),
        adopted(2, 3, Some(1_400), 300.0),
        adopted(2, 4, Some(1_600), 200.0),
        evaluated(),
        finished(),
    ];
    fold(&mut report, 1_200, &after);
    let summary = report.summary("toy", "runs/toy").unwrap();
    insta::assert_json_snapshot!(summary, @r#"
    {
      "run": "toy",
      "steps": 4,
      "state_sha256": "abc",
      "top1": {
        "early3": 10.0,
        "att": 20.0,
        "cnn": 30.0,
        "merge": 45.6789
      },
      "ema_top1": {
        "early3": 50.0,
        "att": 60.0,
        "cnn": 70.0,
        "merge": 80.0
      },
      "generations": 2,
      "repeated_steps": 1,
      "recovery_ms": [
        250
      ],
      "images_per_s": 320.0,
      "abort_ms": [
        12
      ],
      "run_dir": "runs/toy",
      "step_ms_median": 200.0,
      "step_ms_by_100": [],
      "phase_ms_median": {
        "load": 0.0,
        "compute": 100.0,
        "reduce": 0.0,
        "update": 0.0
      },
      "worker_rss_bytes_max": 0,
      "worker_rss_bytes": []
    }
    "#);
}

#[test]
fn a_generation_that_still_has_the_lost_worker_is_no_recovery() {
    let mut report = Report::default();
    fold(&mut report, 0, &[opened(1, &[0, 1], false), formed(1, 0, 0, None)]);
    report.worker_taken("worker-1", Timestamp(10));
    // A join that was under way when the worker was killed.
    fold(&mut report, 11, &[opened(2, &[0, 1, 2], true), formed(2, 1, 0, None)]);
    fold(&mut report, 20, &[adopted(2, 2, Some(20), 5.0), opened(3, &[0, 2], false)]);
    fold(&mut report, 30, &[formed(3, 2, 0, Some(25)), adopted(3, 3, Some(40), 5.0)]);
    fold(&mut report, 50, &[finished()]);
    let summary = report.summary("toy", "toy").unwrap();
    assert_eq!((summary.recovery_ms, summary.abort_ms), (vec![30], vec![15]));
}

#[test]
fn who_has_no_part_in_training_is_not_missed() {
    let mut report = Report::default();
    fold(&mut report, 0, &[opened(1, &[0], false), formed(1, 0, 0, None)]);
    report.worker_taken("worker-5", Timestamp(10));
    fold(&mut report, 11, &[opened(2, &[0, 1], true), formed(2, 1, 0, None)]);
    fold(&mut report, 20, &[adopted(2, 2, Some(20), 5.0), finished()]);
    assert_eq!(report.summary("toy", "toy").unwrap().recovery_ms, [0; 0]);
}

#[test]
fn an_entry_that_is_seen_again_counts_once() {
    let mut report = Report::default();
    let entry = Entry { sequence: 1, at: Timestamp(0), record: opened(1, &[0], false) };
    report.apply(&entry);
    report.apply(&entry);
    assert_eq!(report.generations, 1);
}

#[test]
fn a_run_that_is_not_finished_has_no_summary() {
    assert_eq!(Report::default().summary("toy", "toy"), None);
}

#[test]
fn memory_is_the_most_of_any_worker_and_sampled_from_the_first() {
    let worker = |name: &str, resident_bytes| v1::WorkerLiveness {
        worker: 0,
        name: name.to_owned(),
        session: true,
        progress: Some(v1::Heartbeat { resident_bytes, ..v1::Heartbeat::default() }),
    };
    let liveness = |bytes: [u64; 2]| v1::Liveness {
        term: 1,
        workers: vec![worker("worker-10", bytes[0]), worker("worker-2", bytes[1])],
    };
    let mut report = Report::default();
    report.heard(&liveness([900, 100]));
    fold(&mut report, 0, &[adopted(1, 100, Some(1), 1.0), adopted(1, 101, Some(2), 1.0)]);
    report.heard(&liveness([800, 110]));
    report.heard(&liveness([800, 120]));
    assert_eq!((report.memory.bytes_max, &*report.memory.samples), (900, &[(100, 110)][..]));
}

#[test]
fn the_median_lies_in_the_middle() {
    assert_eq!(median(&[]), None);
    assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
    assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
}
