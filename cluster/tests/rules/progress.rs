//! Workers that beat and do not get on: who is given up for it, and with which words.

use std::time::Duration;

use cluster::{Command, Event, Generation, Progress, Record, Report, Step, StepPhase, WorkerId};

use crate::table::*;

fn at(generation: Generation, step: u64, phase: StepPhase, ms: u64) -> Report {
    Report::Heartbeat(Progress {
        generation,
        applied: Some(Step(step)),
        phase,
        in_phase: Duration::from_millis(ms),
        resident_bytes: 0,
    })
}

/// Heartbeats of six steps, so that the phases are known.
fn warm_up(table: &mut Table, members: &[WorkerId]) {
    let generation = table.generation();
    for step in 0..6 {
        for &member in members {
            table.say(member, at(generation, step, StepPhase::Compute, 100));
            table.say(member, at(generation, step, StepPhase::Reduce, 20));
            table.say(member, at(generation, step, StepPhase::Update, 5));
        }
        table.apply(step + 1);
    }
}

/// `stuck` stays in `phase` while the others wait; what happens until `ms` have passed.
fn stand_still(table: &mut Table, stuck: WorkerId, phase: StepPhase, ms: u64) -> Vec<Command> {
    let mut all = Vec::new();
    for passed in (0..ms).step_by(250) {
        table.wait_ms(250);
        let generation = table.generation();
        for member in table.members() {
            let report = match member == stuck {
                true => at(generation, 6, phase, passed + 250),
                false => at(generation, 6, StepPhase::Reduce, passed + 200),
            };
            all.extend(table.say(member, report));
        }
        all.extend(table.handle(Event::DeadlineReached));
        if table.generation() != generation {
            break;
        }
    }
    all
}

#[test]
fn a_stuck_worker_is_lost_by_name_rank_phase_time_and_last_event() {
    let mut table = Table::training(&[A, B, C]);
    warm_up(&mut table, &[A, B, C]);
    table.say(B, share(Generation(1), 5, &[1]));
    let before = table.now;
    let commands = stand_still(&mut table, B, StepPhase::Compute, 20_000);
    assert_eq!(losses(&commands), [B]);
    assert!(table.now.since(before) <= Duration::from_millis(5_500), "after max(5 s, 3 x p99)");
    let cause = records(&commands).into_iter().find_map(|record| {
        let Record::WorkerLost { cause, .. } = record else { return None };
        Some(cause)
    });
    assert_eq!(
        cause.unwrap(),
        "B (rank 1) made no progress: in compute for 5s after step 6, where 5s is allowed, while 2 \
         of 3 members waited for it; its last event: it wrote its share of checkpoint 5"
    );
    let forms = forms(&commands);
    assert_eq!(forms.keys().copied().collect::<Vec<_>>(), [A, C]);
    assert!(!forms[&A].planned, "they abort at once: the step cannot end");
}

#[test]
fn a_worker_that_is_stuck_in_its_first_step_has_longer() {
    let mut table = Table::training(&[A, B, C]);
    assert_eq!(losses(&stand_still(&mut table, B, StepPhase::Compute, 50_000)), []);
    let mut table = Table::training(&[A, B, C]);
    assert_eq!(losses(&stand_still(&mut table, B, StepPhase::Compute, 70_000)), [B]);
}

#[test]
fn workers_that_are_all_slow_stay() {
    let mut table = Table::training(&[A, B, C]);
    warm_up(&mut table, &[A, B, C]);
    let generation = table.generation();
    for passed in (0..120_000).step_by(250) {
        table.wait_ms(250);
        for member in [A, B, C] {
            let commands = table.say(member, at(generation, 6, StepPhase::Compute, passed));
            assert_eq!(losses(&commands), []);
        }
        assert_eq!(losses(&table.handle(Event::DeadlineReached)), []);
    }
    table.is_training();
}

#[test]
fn a_generation_in_which_all_wait_is_formed_anew_with_all_of_them() {
    let mut table = Table::training(&[A, B, C]);
    warm_up(&mut table, &[A, B, C]);
    let commands = stand_still(&mut table, B, StepPhase::Reduce, 20_000);
    assert_eq!(losses(&commands), []);
    let forms = forms(&commands);
    assert_eq!(forms.len(), 3);
    assert!(!forms[&A].planned);
    let reason = records(&commands).into_iter().find_map(|record| {
        let Record::GenerationOpened { reason, .. } = record else { return None };
        Some(reason)
    });
    assert_eq!(reason.unwrap(), "no member got on for 5.2s: all were in reduce");
}

#[test]
fn a_worker_that_hangs_while_a_generation_forms_is_lost() {
    let mut table = Table::training(&[A, B, C]);
    warm_up(&mut table, &[A, B, C]);
    table.exit(C);
    let generation = table.generation();
    let mut lost = Vec::new();
    for passed in (0..6_000).step_by(250) {
        table.wait_ms(250);
        lost.extend(table.say(A, at(generation, 6, StepPhase::Form, passed + 200)));
        lost.extend(table.say(B, at(generation, 6, StepPhase::Compute, passed + 250)));
        lost.extend(table.handle(Event::DeadlineReached));
    }
    assert_eq!(losses(&lost), [B]);
}

#[test]
fn if_all_members_hang_while_they_should_form_a_generation_those_that_stand_by_take_over() {
    let config = cluster::RunConfig { workers_max: 2, ..config(2) };
    let mut table = Table::training_under(config, &[A, B]);
    warm_up(&mut table, &[A, B]);
    table.join(C);
    table.join(D);
    table.say(A, lost(Generation(1), None)); // The last that is heard of either trainer.
    let mut all = Vec::new();
    for passed in (0..40_000).step_by(250) {
        table.wait_ms(250);
        let generation = table.generation();
        for hung in [A, B] {
            all.extend(table.say(hung, at(generation, 6, StepPhase::Compute, passed + 250)));
        }
        for spare in [C, D] {
            all.extend(table.say(spare, beat(generation, StepPhase::Idle)));
        }
        all.extend(table.handle(Event::DeadlineReached));
    }
    assert_eq!(losses(&all)[..2], [A, B]);
    assert!(table.members().iter().all(|worker| [C, D].contains(worker)));
}

#[test]
fn a_drained_worker_that_hangs_does_not_keep_the_others_in_its_step() {
    let mut table = Table::training(&[A, B, C]);
    warm_up(&mut table, &[A, B, C]);
    table.drain(B);
    assert_eq!(table.members(), [A, C]);
    let generation = table.generation();
    let mut all = Vec::new();
    for passed in (0..6_000).step_by(250) {
        table.wait_ms(250);
        all.extend(table.say(A, at(generation, 6, StepPhase::Reduce, passed + 200)));
        all.extend(table.say(B, at(generation, 6, StepPhase::Compute, passed + 250)));
        all.extend(table.say(C, at(generation, 6, StepPhase::Reduce, passed + 200)));
        all.extend(table.handle(Event::DeadlineReached));
    }
    assert_eq!(losses(&all), [B]);
    let forms = forms(&all);
    assert!(!forms[&A].planned && forms[&A].generation == Generation(3));
}

#[test]
fn a_coordinator_that_slept_blames_nobody_for_it() {
    let mut table = Table::training(&[A, B, C]);
    warm_up(&mut table, &[A, B, C]);
    let generation = table.generation();
    table.wait_ms(30_000);
    for member in [A, B, C] {
        let phase = if member == B { StepPhase::Compute } else { StepPhase::Reduce };
        table.say(member, at(generation, 6, phase, 30_000));
    }
    assert_eq!(losses(&table.handle(Event::DeadlineReached)), []);
    table.wait_ms(250);
    table.say(B, at(generation, 6, StepPhase::Reduce, 10));
    assert_eq!(losses(&table.handle(Event::DeadlineReached)), []);
}

#[test]
fn what_was_learnt_is_forgotten_with_the_coordinator_and_nobody_suffers() {
    let mut table = Table::training(&[A, B, C]);
    warm_up(&mut table, &[A, B, C]);
    let mut table = table.restart();
    for member in [A, B, C] {
        table.return_of(member);
    }
    assert_eq!(losses(&stand_still(&mut table, B, StepPhase::Compute, 20_000)), []);
}
