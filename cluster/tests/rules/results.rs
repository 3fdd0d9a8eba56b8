//! Steps, checkpoints, and the end.

use std::time::Duration;

use cluster::{
    Command, Event, Generation, Ledger, Order, Outcome, Phase, Record, Report, RunConfig, Step,
    Timestamp, WorkerId,
};

use crate::table::*;

fn kept(table: &Table) -> Vec<u64> {
    table.coordinator.ledger().checkpoints.iter().map(|step| step.0).collect()
}

fn commits(commands: &[Command]) -> Vec<Step> {
    let commit = |command: &Command| {
        let Command::CommitCheckpoint { step, .. } = command else { return None };
        Some(*step)
    };
    commands.iter().filter_map(commit).collect()
}

/// A run whose two members have applied all steps and written the final checkpoint.
fn at_the_end() -> Table {
    let mut table = Table::training(&[A, B]);
    table.apply(100);
    table.say(A, evaluated(Generation(1), 100));
    table
}

#[test]
fn a_step_of_a_stale_generation_is_refused() {
    let mut table = Table::training(&[A, B]);
    table.apply(1);
    table.exit(B);
    assert_eq!(table.say(A, applied(Generation(1), 2)), []);
    assert_eq!(table.coordinator.ledger().canonical, Step(1));
}

#[test]
fn steps_are_adopted_without_gaps_and_never_twice() {
    let mut table = Table::training(&[A]);
    let adopted: Vec<_> = [1, 4, 3, 4, 5]
        .into_iter()
        .flat_map(|step| records(&table.apply(step)))
        .map(|record| {
            let Record::StepAdopted { step, metrics, .. } = record else { panic!("{record:?}") };
            (step.0, metrics.is_some())
        })
        .collect();
    assert_eq!(adopted, [(1, true), (2, false), (3, false), (4, true), (5, true)]);
}

#[test]
fn members_that_form_with_different_states_fail_the_run_by_name() {
    let mut table = Table::new(config(2));
    table.join(A);
    table.join(B);
    table.form(A, 0);
    let commands = table.form(B, 1);
    let [Order::Fail { reason }] = &said_to(&commands, A)[..] else { panic!("{commands:?}") };
    assert!(reason.contains("A 0 state-0") && reason.contains("B 1 state-1"), "{reason}");
}

#[test]
fn the_next_checkpoint_is_announced_when_one_is_reached() {
    let mut table = Table::training(&[A, B]);
    let commands = table.apply(40);
    let order = Order::CheckpointAt { generation: Generation(1), step: Step(80) };
    assert_eq!(said_to(&commands, B), [order]);
}

#[test]
fn members_whose_uploads_fail_hold_up_nobody_and_the_next_checkpoint_counts() {
    let mut table = Table::training(&[A, B, C, D]);
    table.apply(40);
    table.say(A, share(Generation(1), 40, &[0]));
    let mut commands = Vec::new();
    for worker in [B, C] {
        let (step, reason) = (Step(40), "503 SlowDown".to_owned());
        let failed = Report::ShareFailed { generation: Generation(1), step, reason };
        commands.extend(table.say(worker, failed));
    }
    commands.extend(table.say(D, share(Generation(1), 40, &[3])));
    let told: Vec<_> = [A, B, C, D].iter().flat_map(|&who| said_to(&commands, who)).collect();
    assert_eq!(told, [], "nobody waits, and nobody is stopped");
    table.is_training();
    assert!(kept(&table).is_empty());

    table.apply(80);
    for (worker, part) in [A, B, C, D].into_iter().zip(0..) {
        table.say(worker, share(Generation(1), 80, &[part]));
    }
    table.handle(Event::CheckpointCommitted { step: Step(80) });
    assert_eq!(kept(&table), [80]);
}

#[test]
fn a_checkpoint_on_demand_is_a_step_soon_to_come_and_the_plan_goes_on_after_it() {
    let mut table = Table::training(&[A, B]);
    table.apply(10);
    let commands = table.handle(Event::CheckpointRequested);
    let named = table.coordinator.next_kept().expect("steps are left");
    assert!(named > Step(11) && named < Step(40), "all members hear of step {named} in time");
    let order = Order::CheckpointAt { generation: Generation(1), step: named };
    assert_eq!((said_to(&commands, A), said_to(&commands, B)), (vec![order.clone()], vec![order]));
    assert_eq!(table.handle(Event::CheckpointRequested), [], "it is named once");

    let commands = table.apply(named.0);
    let planned = Order::CheckpointAt { generation: Generation(1), step: Step(40) };
    assert_eq!(said_to(&commands, A), [planned]);
    assert_eq!(commits(&table.say(A, share(Generation(1), named.0, &[0, 1, 2, 3]))), [named]);
}

#[test]
fn when_all_are_asked_to_leave_the_state_is_kept_soon() {
    let mut table = Table::training(&[A, B]);
    table.apply(10);
    let told = |commands: &[Command]| {
        let named = |order: &Order| {
            if let Order::CheckpointAt { step, .. } = order { Some(*step) } else { None }
        };
        said_to(commands, A).iter().find_map(named)
    };
    assert_eq!(told(&table.say(A, leaving())), None, "another stays, and holds the state");
    assert_eq!(table.coordinator.next_kept(), Some(Step(40)), "as planned");
    let mut table = Table::training(&[A, B]);
    table.apply(10);
    table.drain(A);
    let commands = table.drain(B);
    let named = table.coordinator.next_kept().expect("steps are left");
    assert!(named > Step(11) && named < Step(40), "step {named} is kept");
    assert!(told(&commands).is_none_or(|told| told == named), "{commands:?}");
    assert_eq!(table.drain(B), [], "it is named once");
}

#[test]
fn a_checkpoint_on_demand_is_never_after_the_last_step() {
    let mut table = Table::training(&[A]);
    table.apply(99);
    table.handle(Event::CheckpointRequested);
    assert_eq!(table.coordinator.next_kept(), Some(Step(100)));
    table.apply(100);
    assert_eq!(table.handle(Event::CheckpointRequested), []);
    assert_eq!(table.coordinator.next_kept(), None);
}

#[test]
fn the_state_is_kept_when_none_has_been_for_as_long_as_the_plan_allows() {
    let plan = RunConfig { checkpoint_every: Duration::from_secs(60), ..config(1) };
    let mut table = Table::training_under(plan, &[A]);
    table.apply(10);
    assert_eq!(table.coordinator.next_kept(), Some(Step(40)), "as planned by steps");
    table.pass_ms(61_000, &[A]);
    table.apply(11);
    let named = table.coordinator.next_kept().expect("steps are left");
    assert!(named < Step(40), "{named}");
    table.apply(named.0);
    table.say(A, share(Generation(1), named.0, &[0, 1, 2, 3]));
    table.handle(Event::CheckpointCommitted { step: named });
    table.pass_ms(50_000, &[A]);
    table.apply(named.0 + 1);
    assert_eq!(
        table.coordinator.next_kept(),
        Some(Step(40)),
        "it counts from the last that was kept"
    );
}

#[test]
fn a_checkpoint_is_committed_once_the_shares_of_all_are_there() {
    let mut table = Table::training(&[A, B]);
    table.apply(40);
    assert_eq!(commits(&table.say(A, share(Generation(1), 40, &[0, 2]))), []);
    assert_eq!(commits(&table.say(A, share(Generation(1), 40, &[0, 2]))), [], "said twice");
    assert_eq!(commits(&table.say(B, share(Generation(1), 40, &[1, 3]))), [Step(40)]);
    assert_eq!(commits(&table.say(B, share(Generation(1), 40, &[1, 3]))), [], "said twice");
    assert!(kept(&table).is_empty(), "not before it was read back");
    table.handle(Event::CheckpointCommitted { step: Step(40) });
    assert_eq!(kept(&table), [40]);
}

#[test]
fn a_checkpoint_is_abandoned_at_a_loss_and_its_late_shares_are_refused() {
    let mut table = Table::training(&[A, B]);
    table.apply(40);
    table.say(A, share(Generation(1), 40, &[0, 2]));
    let commands = table.exit(B);
    let is_given_up =
        |record: &Record| matches!(record, Record::CheckpointAbandoned { step: Step(40), .. });
    assert!(records(&commands).iter().any(is_given_up));
    assert_eq!(commits(&table.say(A, share(Generation(1), 40, &[0, 1, 2, 3]))), []);
}

#[test]
fn a_checkpoint_whose_parts_are_all_there_outlives_a_loss() {
    let mut table = Table::training(&[A, B]);
    table.apply(40);
    table.say(A, share(Generation(1), 40, &[0, 1, 2, 3]));
    table.exit(B);
    table.handle(Event::CheckpointCommitted { step: Step(40) });
    assert_eq!(kept(&table), [40]);
    table.form(A, 40);
    table.exit(A);
    table.join(C);
    assert_eq!(forms(&table.return_of(C)).len(), 0);
    assert_eq!(table.coordinator.ledger().checkpoint_offered, Some(Step(40)));
}

#[test]
fn a_share_may_be_longer_on_its_way_than_its_intact_generation_lasts() {
    let mut table = Table::training(&[A, B]);
    table.apply(40);
    table.say(A, share(Generation(1), 40, &[0, 2]));
    table.join(C);
    table.all_form(&[A, B, C], 41);
    assert_eq!(commits(&table.say(B, share(Generation(1), 40, &[1, 3]))), [Step(40)]);
}

#[test]
fn a_late_failure_does_not_take_a_committed_checkpoint_away() {
    let mut table = Table::training(&[A, B]);
    table.apply(40);
    table.say(A, share(Generation(1), 40, &[0, 1, 2, 3]));
    table.handle(Event::CheckpointCommitted { step: Step(40) });
    let (step, reason) = (Step(40), "disk full".to_owned());
    table.say(B, Report::ShareFailed { generation: Generation(1), step, reason });
    assert_eq!(kept(&table), [40]);
}

#[test]
fn a_checkpoint_that_was_taken_away_is_no_longer_counted_on() {
    let mut ledger = Ledger::default();
    for step in [10, 20, 30] {
        ledger.apply(&Record::CheckpointCommitted { step: Step(step) });
    }
    ledger.apply(&Record::CheckpointAbandoned { step: Step(30), reason: "gone".to_owned() });
    assert_eq!(ledger.checkpoints, [Step(10), Step(20)]);
}

#[test]
fn two_workers_that_write_different_bytes_fail_the_run_by_part() {
    let mut table = Table::training(&[A, B]);
    table.apply(40);
    table.say(A, share(Generation(1), 40, &[0]));
    let Report::ShareWritten { generation, mut share } = share(Generation(1), 40, &[0]) else {
        unreachable!()
    };
    share.parts[0].digest = "other".to_owned();
    table.say(B, Report::ShareWritten { generation, share });
    let Some(Outcome::Failed { reason }) = &table.coordinator.ledger().outcome else { panic!() };
    assert!(reason.contains("part 0 of checkpoint 40"), "{reason}");
}

#[test]
fn a_stale_generation_cannot_fail_the_final_checkpoint() {
    let mut table = at_the_end();
    table.exit(B);
    let (step, reason) = (Step(100), "disk full".to_owned());
    table.say(A, Report::ShareFailed { generation: Generation(1), step, reason: reason.clone() });
    table.handle(Event::CheckpointFailed { step, reason: reason.clone() });
    assert_eq!(table.coordinator.ledger().outcome, None);
    table.say(A, Report::ShareFailed { generation: Generation(2), step, reason });
    let outcome = &table.coordinator.ledger().outcome;
    assert!(matches!(outcome, Some(Outcome::Failed { reason }) if reason.contains("disk full")));
}

#[test]
fn the_final_checkpoint_is_required_before_the_run_is_finished() {
    let mut table = at_the_end();
    table.say(A, share(Generation(1), 100, &[0, 2]));
    table.finish(A, "f00d");
    table.say(B, share(Generation(1), 100, &[1, 3]));
    table.finish(B, "f00d");
    assert_eq!(table.coordinator.ledger().outcome, None);
    let commands = table.handle(Event::CheckpointCommitted { step: Step(100) });
    let end = Order::Finish { step: Step(100), state_sha256: "f00d".to_owned() };
    assert_eq!((said_to(&commands, A), said_to(&commands, B)), (vec![end.clone()], vec![end]));
    assert!(matches!(table.coordinator.phase(), Phase::Ended));
}

#[test]
fn different_final_digests_fail_the_run_by_name() {
    let mut table = at_the_end();
    table.say(A, share(Generation(1), 100, &[0, 1, 2, 3]));
    table.handle(Event::CheckpointCommitted { step: Step(100) });
    table.finish(A, "f00d");
    let commands = table.finish(B, "beef");
    let [Order::Fail { reason }] = &said_to(&commands, B)[..] else { panic!("{commands:?}") };
    assert_eq!(reason, "the final states differ: A f00d, B beef");
}

#[test]
fn a_loss_at_the_end_is_made_good_by_those_who_are_left() {
    let mut table = at_the_end();
    table.finish(A, "f00d");
    let forms = forms(&table.exit(B));
    assert_eq!(forms[&A].checkpoint_at, Some(Step(100)));
    table.form(A, 100);
    table.say(A, share(Generation(2), 100, &[0, 1, 2, 3]));
    table.finish(A, "f00d");
    table.handle(Event::CheckpointCommitted { step: Step(100) });
    assert!(matches!(table.coordinator.ledger().outcome, Some(Outcome::Finished { .. })));
}

#[test]
fn an_ended_run_adopts_nothing_and_tells_whoever_comes() {
    let mut table = Table::training(&[A]);
    table.apply(5);
    table.say(A, Report::Failed { reason: "no GPU; get one".to_owned() });
    assert_eq!(table.apply(6), []);
    let commands = table.join(D);
    let told = Order::Fail { reason: "A: no GPU; get one".to_owned() };
    assert_eq!(said_to(&commands, D)[1..], [told]);
    assert_eq!(table.coordinator.next_deadline(), None);
}

#[test]
fn a_duplicate_or_stale_report_changes_nothing() {
    let mut table = Table::training(&[A, B]);
    table.apply(20);
    table.say(A, evaluated(Generation(1), 20));
    table.say(B, lost(Generation(1), None));
    table.exit(B);
    let before = table.coordinator.ledger().clone();
    let g = Generation(1);
    let stopped = Report::Finished { generation: g, step: Step(100), state_sha256: "f".to_owned() };
    for report in [
        formed(g, 20),
        applied(g, 21),
        evaluated(g, 40),
        share(g, 40, &[0, 1, 2, 3]),
        lost(g, Some(0)),
        form_failed(g, Some(0)),
        stopped,
    ] {
        assert_eq!(table.say(A, report.clone()), [], "{report:?}");
        assert_eq!(table.say(B, report.clone()), [], "{report:?}");
        assert_eq!(table.say(WorkerId(99), report.clone()), [], "{report:?}");
    }
    assert_eq!(*table.coordinator.ledger(), before);
}

#[test]
fn one_broken_exchange_is_one_record_a_member() {
    let mut table = Table::training(&[A, B]);
    assert_eq!(records(&table.say(A, lost(Generation(1), None))).len(), 1);
    assert_eq!(table.say(A, lost(Generation(1), None)), []);
}

#[test]
fn a_step_that_was_in_flight_at_a_loss_counts_as_repeated() {
    let mut table = Table::training(&[A, B]);
    table.apply(7);
    table.exit(B);
    let Report::Formed { generation, step, digest, .. } = formed(Generation(2), 7) else {
        unreachable!()
    };
    let (begun, stopped_at, metrics) = (Step(8), Some(Timestamp(1)), None);
    table.say(A, Report::Formed { generation, step, digest, begun, stopped_at, metrics });
    assert_eq!(table.coordinator.ledger().repeated, 1);
}

/// All workers of a run with checkpoints of these steps are gone, and D has come to begin anew.
fn only_checkpoints_are_left(steps: &[u64]) -> Table {
    let mut table = Table::training(&[A]);
    table.apply(50);
    let generation = table.generation();
    for &step in steps {
        table.say(A, share(generation, step, &[0, 1, 2, 3]));
        table.handle(Event::CheckpointCommitted { step: Step(step) });
    }
    table.exit(A);
    table.join(D);
    table
}

fn damaged(generation: Generation, step: u64) -> Report {
    let reason = "part 1 is torn".to_owned();
    Report::CheckpointDamaged { generation, step: Step(step), reason }
}

#[test]
fn the_checkpoint_before_a_damaged_one_is_offered_and_the_damaged_one_named() {
    let mut table = only_checkpoints_are_left(&[20, 40]);
    let before = table.generation();
    let commands = table.say(D, damaged(before, 40));
    let group = &forms(&commands)[&D];
    assert_eq!((group.generation, group.checkpoint), (before.next(), Some(Step(20))));
    let Record::CheckpointAbandoned { step, reason } = &records(&commands)[0] else {
        panic!("{commands:?}");
    };
    assert_eq!((*step, reason.as_str()), (Step(40), "quarantined, for part 1 is torn"));
    assert!(table.say(D, damaged(before, 40)).is_empty(), "it is said once");
    table.form(D, 20);
    table.is_training();
    assert_eq!(table.coordinator.ledger().repeated, 30);
    assert_eq!(table.coordinator.ledger().canonical, Step(50));
}

#[test]
fn a_run_whose_only_checkpoint_is_damaged_neither_begins_anew_nor_is_given_up() {
    let mut table = only_checkpoints_are_left(&[40]);
    let commands = table.say(D, damaged(table.generation(), 40));
    let said = said_to(&commands, D);
    let [Order::Refuse { reason }] = &said[..] else { panic!("{said:?}") };
    assert!(reason.contains("part 1 is torn; restore it: no other checkpoint is intact"));
    assert_eq!(table.coordinator.ledger().outcome, None);
    assert_eq!(table.coordinator.ledger().checkpoints, [Step(40)], "it may be restored");
}
