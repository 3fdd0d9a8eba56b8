//! Steps, checkpoints, and the end.

use std::time::Duration;

use cluster::{
    Command, Event, Generation, Ledger, Order, Outcome, Phase, Rank, Record, Report, RunConfig,
    Step, Timestamp, WorkerId,
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

/// A run of two that cannot go on with one: so they leave together.
fn inseparable() -> Table {
    Table::training_under(RunConfig { workers_min: 2, ..config(2) }, &[A, B])
}

/// All of a run are asked to leave and come together for the last time, after step 12.
fn all_leave(table: &mut Table) -> Vec<Command> {
    table.apply(10);
    assert!(forms(&table.drain(A)).is_empty(), "it waits for another");
    let last = &forms(&table.drain(B))[&A];
    assert!(last.last && last.planned, "they leave after the step in flight, and train no more");
    assert_eq!(last.members.len(), 2);
    table.apply(11);
    table.form(A, 12);
    table.form(B, 12)
}

fn keep(table: &mut Table, step: u64) -> Vec<Command> {
    let generation = table.generation();
    assert_eq!(commits(&table.say(A, share(generation, step, &[0, 1, 2, 3]))), [Step(step)]);
    table.handle(Event::CheckpointCommitted { step: Step(step) })
}

#[test]
fn when_nobody_stays_the_state_is_kept_and_then_all_may_go_and_no_step_is_lost() {
    let mut table = inseparable();
    assert!(forms(&all_leave(&mut table)).is_empty(), "their state is not kept yet");
    let told = forms(&keep(&mut table, 12));
    assert_eq!(told.keys().copied().collect::<Vec<_>>(), [A, B]);
    assert!(told[&A].members.is_empty(), "nobody belongs to the next");
    assert_eq!(
        table.pass_ms(1_000, &[A, B]),
        [],
        "nobody waits for those who are on their way out"
    );
    table.close(A);
    table.close(B);
    assert_eq!(table.coordinator.workers().iter().count(), 0);
    let mut table = table.restart();
    table.join(C);
    assert!(table.members().is_empty(), "one is not enough");
    table.join(D);
    assert_eq!(table.members(), [C, D]);
    table.all_form(&[C, D], 12);
    assert_eq!(table.coordinator.ledger().repeated, 0);
}

#[test]
fn who_comes_before_the_last_has_gone_gets_the_state_and_trains() {
    let mut table = inseparable();
    all_leave(&mut table);
    let told = forms(&table.join(C));
    assert_eq!(told[&C].members.len(), 3, "those who are still there hand it over");
    assert!(told[&A].planned && !told[&A].last);
    table.all_form(&[A, B, C], 12);
    table.join(D);
    table.all_form(&[A, B, C, D], 13);
    assert_eq!(table.members(), [C, D], "and then go");

    let mut table = inseparable();
    all_leave(&mut table);
    keep(&mut table, 12);
    table.close(A);
    table.join(C);
    assert_eq!(table.members(), [], "who has been let go is not asked again");
    table.join(D);
    assert_eq!(table.members(), [C, D]);
}

#[test]
fn a_last_state_that_cannot_be_kept_is_tried_again_and_nobody_goes() {
    let mut table = inseparable();
    all_leave(&mut table);
    let generation = table.generation();
    table.say(A, share(generation, 12, &[0, 1, 2, 3]));
    let reason = "the store is full".to_owned();
    let told = forms(&table.handle(Event::CheckpointFailed { step: Step(12), reason }));
    assert!(told[&A].last && told[&A].members.len() == 2, "once more");
    table.all_form(&[A, B], 12);
    assert!(forms(&keep(&mut table, 12))[&B].members.is_empty());
}

#[test]
fn a_last_generation_that_loses_a_member_waits_if_too_few_are_left() {
    let mut table = inseparable();
    all_leave(&mut table);
    table.exit(B);
    let told = forms(&table.join(C));
    assert!(
        !told[&A].last && told[&A].members.len() == 2,
        "until another comes it waits with the state"
    );
}

#[test]
fn a_last_generation_that_loses_a_member_is_formed_again_and_ends_as_well() {
    let mut table = Table::training(&[A]);
    table.apply(10);
    assert!(forms(&table.drain(A))[&A].last);
    table.say(A, lost(Generation(1), None));
    table.pass_ms(600, &[A]);
    assert!(table.coordinator.ledger().last, "unplanned, but the last again");
    table.form(A, 10);
    assert!(forms(&keep(&mut table, 10))[&A].members.is_empty());
}

#[test]
fn the_end_of_a_run_is_seen_out_by_those_who_want_to_leave() {
    let mut table = at_the_end();
    table.drain(A);
    assert!(forms(&table.drain(B)).is_empty());
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

fn diverged(agreed: u64, odd: Option<u32>) -> Report {
    let (step, agreed, odd) = (Step(45), Step(agreed), odd.map(Rank));
    let reason = "the states differ".to_owned();
    Report::Diverged { generation: Generation(1), step, agreed, odd, reason }
}

/// A run of three that has kept the states after steps 20 and 40.
fn kept_twice() -> Table {
    let mut table = Table::training(&[A, B, C]);
    for step in [20, 40] {
        table.handle(Event::CheckpointRequested);
        for step in table.coordinator.ledger().canonical.0 + 1..=step {
            table.apply(step);
        }
        table.say(A, share(Generation(1), step, &[0, 1, 2, 3]));
        table.handle(Event::CheckpointCommitted { step: Step(step) });
    }
    table.apply(45);
    assert_eq!(kept(&table), [20, 40]);
    table
}

#[test]
fn whoever_holds_another_state_than_most_is_lost_and_the_others_go_on_from_where_all_were_equal() {
    let mut table = kept_twice();
    let commands = table.say(B, diverged(30, Some(2)));
    assert_eq!(losses(&commands), [C]);
    assert_eq!(kept(&table), [20], "the other was kept after they were last equal");
    let told = &forms(&commands)[&A];
    assert_eq!((told.checkpoint, told.planned, told.members.len()), (Some(Step(20)), false, 2));
    assert_eq!(table.say(A, diverged(30, Some(2))), [], "all say it, and it is heard once");
    table.form(A, 20);
    table.form(B, 20);
    assert_eq!(table.coordinator.ledger().repeated, 25);
}

#[test]
fn where_no_state_is_that_of_most_nobody_is_lost_and_all_go_on_from_where_they_were_equal() {
    let mut table = kept_twice();
    let commands = table.say(A, diverged(0, None));
    assert_eq!(losses(&commands), []);
    assert_eq!(kept(&table), Vec::<u64>::new());
    assert_eq!(forms(&commands)[&C].checkpoint, None, "they begin anew");
}

#[test]
fn a_run_whose_states_differ_again_and_again_is_given_up_with_what_to_do() {
    let mut table = Table::training(&[A, B]);
    for _ in 0..2 {
        table.apply(3);
        let (generation, reason) = (table.generation(), "the states differ".to_owned());
        let (step, agreed, odd) = (Step(3), Step(0), None);
        table.say(A, Report::Diverged { generation, step, agreed, odd, reason });
        table.all_form(&[A, B], 0);
    }
    let (generation, reason) = (table.generation(), "the states differ".to_owned());
    let (step, agreed, odd) = (Step(3), Step(0), None);
    table.say(B, Report::Diverged { generation, step, agreed, odd, reason });
    let Some(Outcome::Failed { reason }) = &table.coordinator.ledger().outcome else { panic!() };
    assert!(reason.contains("three or more"), "{reason}");
}
