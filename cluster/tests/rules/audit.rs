//! A log of a run with faults is proved; no record of it can be taken away, doubled or changed unseen.

use cluster::{
    Event, Generation, Record, RunConfig, Step, Term, Timestamp, WorkerId,
    audit::{Contradiction, Proof, Samples, audit},
};

use crate::table::*;

/// 325 samples, of which an epoch of 20 steps leaves out five.
#[derive(Clone, Copy)]
struct Data {
    count: u64,
    /// A step that takes a sample of the step before once more.
    repeats_at: Option<u64>,
}

const DATA: Data = Data { count: 325, repeats_at: None };

impl Samples for Data {
    fn count(&self) -> u64 {
        self.count
    }

    fn global_batch(&self) -> u64 {
        16
    }

    fn steps_per_epoch(&self) -> u64 {
        self.count / 16
    }

    fn consumed_from(&self, step: Step, ids: &mut Vec<u64>) {
        let (epoch, place) = (step.0 / self.steps_per_epoch(), step.0 % self.steps_per_epoch());
        let id = |at: u64| (at * 7 + epoch * 3) % self.count;
        ids.extend((place * 16..place * 16 + 16).map(id));
        if self.repeats_at == Some(step.0) {
            ids[0] = id(place * 16 - 1);
        }
    }
}

/// A whole run: losses, a newcomer, a restarted coordinator, all workers gone and back, a drain.
fn history() -> Vec<Record> {
    let mut table = Table::training(&[A, B]);
    apply_all(&mut table, 1..=19);
    table.exit(B);
    table.form(A, 19);
    table.join(C);
    table.all_form(&[A, C], 20);
    apply_all(&mut table, 21..=40);
    let generation = table.generation();
    table.say(A, share(generation, 40, &[0, 1, 2, 3]));
    table.handle(Event::CheckpointCommitted { step: Step(40) });
    table.say(A, evaluated(generation, 40));
    apply_all(&mut table, 41..=50);
    let mut table = table.restart();
    table.return_of(A);
    table.return_of(C);
    table.say(A, lost(generation, Some(1)));
    table.exit(A);
    table.exit(C);
    table.join(D);
    table.pass_ms(31_000, &[D]);
    table.form(D, 40); // From the checkpoint: ten steps are computed again.
    apply_all(&mut table, 41..=80);
    table.say(D, leaving());
    table.join(WorkerId(0xE));
    table.all_form(&[D, WorkerId(0xE)], 80);
    table.all_form(&[WorkerId(0xE)], 80);
    apply_all(&mut table, 81..=100);
    let generation = table.generation();
    let member = table.members()[0];
    table.say(member, share(generation, 100, &[0, 1, 2, 3]));
    table.say(member, evaluated(generation, 100));
    table.handle(Event::CheckpointCommitted { step: Step(100) });
    for member in table.members() {
        table.finish(member, "f00d");
    }
    let mut log = table.log;
    for record in &mut log {
        if let Record::StepAdopted { metrics: Some(metrics), .. } = record {
            metrics.images = 16;
        }
    }
    log
}

fn apply_all(table: &mut Table, steps: std::ops::RangeInclusive<u64>) {
    for step in steps {
        table.apply(step);
    }
}

fn numbered(log: &[Record]) -> impl Iterator<Item = (u64, Timestamp, &Record)> {
    (1..).zip(log).map(|(sequence, record)| (sequence, Timestamp(sequence), record))
}

fn audited(log: &[Record]) -> Result<Proof, Contradiction> {
    audit(&config(2), &DATA, numbered(log))
}

fn place_of(log: &[Record], which: impl Fn(&Record) -> bool) -> usize {
    log.iter().position(which).expect("the history has such a record")
}

#[test]
fn a_run_with_faults_is_proved() {
    let log = history();
    let proof = audited(&log).unwrap();
    let said = proof.to_string();
    for part in [
        "steps 1 to 100 of 100 adopted once each",
        "1600 samples of 5 complete epochs and 0 begun",
        "(25 left out by drop_last)",
        "2 terms",
        "10 steps repeated",
        "2 checkpoints of adopted steps",
    ] {
        assert!(said.contains(part), "{part:?} is missing in: {said}");
    }
    assert_eq!(proof.epochs[0].left_out.len(), 5);
    assert!(proof.losses >= 3, "{proof:?}");
    assert!(proof.ledger.generation >= Generation(5));
}

#[test]
fn a_run_that_is_under_way_is_proved_so_far() {
    let mut log = history();
    log.truncate(place_of(&log, |record| is_step(record, 30)) + 1);
    let proof = audited(&log).unwrap();
    assert_eq!((proof.epochs.len(), proof.epochs[1].steps), (2, 10));
    assert!(!proof.epochs[1].is_complete && proof.epochs[1].left_out.is_empty());
}

fn is_step(record: &Record, wanted: u64) -> bool {
    matches!(record, Record::StepAdopted { step, .. } if step.0 == wanted)
}

#[test]
fn every_record_that_is_taken_away_or_doubled_is_missed_in_its_place() {
    let log = history();
    for at in 0..log.len() {
        let mut entries: Vec<_> = numbered(&log).collect();
        entries.remove(at);
        let audited = audit(&config(2), &DATA, entries.iter().copied());
        if at + 1 < log.len() {
            assert_eq!(audited.unwrap_err().sequence, at as u64 + 1, "without {:?}", log[at]);
        } else {
            audited.unwrap(); // Cut off at the end, it is a run under way.
        }
        let mut entries: Vec<_> = numbered(&log).collect();
        entries.insert(at, entries[at]);
        let contradiction = audit(&config(2), &DATA, entries.iter().copied()).unwrap_err();
        assert_eq!(contradiction.sequence, at as u64 + 2, "twice {:?}", log[at]);
    }
}

#[test]
fn a_log_that_was_numbered_anew_cannot_hide_what_the_proof_rests_on() {
    let log = history();
    let mut noticed = 0;
    for at in 0..log.len() - 1 {
        let rests = match &log[at] {
            Record::RunCreated { .. }
            | Record::TermStarted { term: Term(1) }
            | Record::WorkerJoined { .. }
            | Record::GenerationOpened { .. }
            | Record::GenerationFormed { .. }
            | Record::StepAdopted { .. } => true,
            Record::CheckpointCommitted { step } => step.0 == 100,
            Record::TermStarted { .. } // A newest term that did nothing leaves no trace.
            | Record::FingerprintFixed { .. }
            | Record::WorkerRefused { .. }
            | Record::NodeMarked { .. }
            | Record::NodeReadmitted { .. }
            | Record::Resized { .. }
            | Record::WorkerLost { .. }
            | Record::ExchangeLost { .. }
            | Record::Evaluated { .. }
            | Record::CheckpointAbandoned { .. }
            | Record::RunFinished { .. }
            | Record::RunFailed { .. } => false,
        };
        if !rests {
            continue;
        }
        noticed += 1;
        let mut cut = log.clone();
        let taken = cut.remove(at);
        let is_formation = matches!(taken, Record::GenerationFormed { .. });
        assert!(is_formation || audited(&cut).is_err(), "nobody misses {taken:?}");
        let mut doubled = log.clone();
        doubled.insert(at, log[at].clone());
        assert!(audited(&doubled).is_err(), "twice {taken:?}");
    }
    assert!(noticed > 110, "{noticed}");
}

/// The history with one record changed, and what the audit then says of it.
fn changed(which: impl Fn(&Record) -> bool, change: impl Fn(&mut Record)) -> String {
    let mut log = history();
    let at = place_of(&log, which);
    change(&mut log[at]);
    let contradiction = audited(&log).expect_err("the change contradicts the rest");
    assert_eq!(contradiction.sequence, at as u64 + 1, "{contradiction}");
    contradiction.to_string()
}

#[test]
fn a_changed_record_is_named_with_what_it_should_say() {
    let said = changed(
        |record| is_step(record, 30),
        |record| {
            let Record::StepAdopted { step, .. } = record else { unreachable!() };
            *step = Step(31);
        },
    );
    assert!(said.contains("step 31 is adopted; expected step 30: each once, in order"), "{said}");
    let said = changed(
        |record| matches!(record, Record::TermStarted { term: Term(2) }),
        |record| *record = Record::TermStarted { term: Term(1) },
    );
    assert!(said.ends_with("term 1; expected term 2"), "{said}");
    let said = changed(
        |record| matches!(record, Record::GenerationOpened { generation: Generation(3), .. }),
        |record| {
            let Record::GenerationOpened { members, .. } = record else { unreachable!() };
            members[0].block.end -= 1;
        },
    );
    assert!(said.contains("virtual ranks"), "{said}");
    let said = changed(
        |record| matches!(record, Record::GenerationFormed { step: Step(40), .. }),
        |record| {
            let Record::GenerationFormed { repeated, .. } = record else { unreachable!() };
            *repeated = 9;
        },
    );
    assert!(said.contains("9 steps are repeated; expected at least 10"), "{said}");
    let said = changed(
        |record| matches!(record, Record::CheckpointCommitted { step: Step(40) }),
        |record| *record = Record::CheckpointCommitted { step: Step(4000) },
    );
    assert!(said.contains("the checkpoint of step 4000 is committed"), "{said}");
}

#[test]
fn a_checkpoint_of_a_step_that_was_never_adopted_is_named_where_it_was_committed() {
    let mut log = history();
    log.truncate(place_of(&log, |record| is_step(record, 90)) + 1);
    log.push(Record::CheckpointCommitted { step: Step(95) });
    assert_eq!(audited(&log).unwrap().awaiting, [Step(95)], "its step may still come");
    let mut log = history();
    let at = place_of(&log, |record| is_step(record, 100));
    log.insert(at, Record::CheckpointCommitted { step: Step(101) });
    assert_eq!(audited(&log).unwrap_err().sequence, at as u64 + 1);
}

#[test]
fn data_that_is_not_what_the_run_was_planned_for_is_named() {
    let log = history();
    let other = Data { count: 341, ..DATA }; // One step more an epoch.
    let contradiction = audit(&config(2), &other, numbered(&log)).unwrap_err();
    assert_eq!(contradiction.sequence, 1);
    assert!(contradiction.to_string().contains("21, as the order of the samples has it"));
    let planned = RunConfig { steps_per_epoch: 21, ..config(2) };
    let contradiction = audit(&planned, &other, numbered(&log)).unwrap_err();
    let said = contradiction.to_string();
    assert!(said.contains("record 1: the run was planned with 20 steps an epoch; expected 21"));
}

#[test]
fn a_sample_that_is_consumed_twice_is_named_with_both_steps() {
    let log = history();
    let data = Data { repeats_at: Some(29), ..DATA };
    let contradiction = audit(&config(2), &data, numbered(&log)).unwrap_err();
    assert_eq!(contradiction.sequence, place_of(&log, |r| is_step(r, 30)) as u64 + 1);
    let said = contradiction.to_string();
    assert!(said.contains("step 30 consumes sample ") && said.contains(" of epoch 1;"), "{said}");
    assert!(said.ends_with("expected each once: step 29 has consumed it"), "{said}");
}
