//! Who is in, who is out, and what that costs.

use cluster::{
    Event, Fingerprint, Generation, Hello, Order, Phase, Record, Report, Step, StepPhase,
};

use crate::table::*;

#[test]
fn the_first_generation_waits_for_all_expected_workers_as_long_as_patience_lasts() {
    let mut table = Table::new(config(3));
    table.join(A);
    let commands = table.join(B);
    assert_eq!(forms(&commands).len(), 0);
    let opened = table.pass_ms(60_000, &[A, B]);
    assert_eq!(forms(&opened).keys().copied().collect::<Vec<_>>(), [A, B]);
}

#[test]
fn too_few_workers_wait_without_a_deadline_of_the_past() {
    let mut table = Table::new(cluster::RunConfig { workers_min: 2, ..config(2) });
    table.join(A);
    table.pass_ms(70_000, &[A]);
    assert!(matches!(table.coordinator.phase(), Phase::Gathering { .. }));
    assert!(table.coordinator.next_deadline() > Some(table.now));
    assert_eq!(forms(&table.join(B)).len(), 2, "the second worker is enough");
}

#[test]
fn losing_a_rank_opens_a_new_generation_for_the_survivors_at_once() {
    let mut table = Table::training(&[A, B, C]);
    let commands = table.exit(B);
    let forms = forms(&commands);
    assert_eq!(forms.keys().copied().collect::<Vec<_>>(), [A, C]);
    assert!(forms.values().all(|group| group.generation == Generation(2) && !group.planned));
    assert_eq!(forms[&A].members.iter().map(|m| m.worker).collect::<Vec<_>>(), [A, C]);
    assert_eq!(forms[&A].members[1].block.end, 8, "the blocks cover all virtual ranks");
}

#[test]
fn a_generation_is_durable_before_anyone_hears_of_it() {
    let mut table = Table::training(&[A, B]);
    let commands = table.exit(B);
    let is_opened = |command: &cluster::Command| {
        matches!(command, cluster::Command::Append(Record::GenerationOpened { .. }))
    };
    let is_form = |command: &cluster::Command| {
        matches!(command, cluster::Command::Send { order: Order::Form(_), .. })
    };
    let opened = commands.iter().position(is_opened).unwrap();
    assert!(opened < commands.iter().position(is_form).unwrap());
}

#[test]
fn a_death_that_is_reported_twice_is_one_loss() {
    let mut table = Table::training(&[A, B, C]);
    table.exit(B);
    assert_eq!(table.exit(B), []);
    assert_eq!(table.close(B), []);
    assert_eq!(table.generation(), Generation(2));
}

#[test]
fn a_planned_join_loses_no_step_and_old_results_count_until_all_have_formed() {
    let mut table = Table::training(&[A, B]);
    table.apply(1);
    let forms = forms(&table.join(C));
    assert!(forms.len() == 3 && forms[&A].planned);
    let before = Generation(1);
    table.say(A, applied(before, 2));
    assert_eq!(table.coordinator.ledger().canonical, Step(2), "the old generation trains on");
    table.all_form(&[A, B, C], 3);
    assert_eq!(table.coordinator.ledger().canonical, Step(3));
    assert_eq!(table.coordinator.ledger().repeated, 0);
    table.say(A, applied(before, 4));
    assert_eq!(table.coordinator.ledger().canonical, Step(3), "now it is the past");
}

#[test]
fn steps_of_the_new_generation_are_not_taken_for_repeated_ones() {
    let mut table = Table::training(&[A, B]);
    table.apply(1);
    table.exit(B);
    table.join(C);
    assert_eq!(table.members(), [A], "the newcomer waits until the generation stands");
    table.form(A, 1);
    assert_eq!(table.members(), [A, C]);
    table.form(A, 1);
    table.apply(2); // Rank 0 is faster than the news of the other.
    table.form(C, 1);
    assert_eq!(table.coordinator.ledger().repeated, 0);
}

#[test]
fn a_newcomer_that_dies_before_the_others_left_for_it_costs_nothing() {
    let mut table = Table::training(&[A, B]);
    table.join(C);
    table.say(C, beat(Generation(2), StepPhase::Form));
    table.say(A, beat(Generation(2), StepPhase::Compute));
    let forms = forms(&table.exit(C));
    assert_eq!(forms.keys().copied().collect::<Vec<_>>(), [A, B]);
    assert!(forms[&A].planned, "they leave together, after a common step");
    table.say(A, applied(Generation(1), 1));
    assert_eq!(table.coordinator.ledger().canonical, Step(1));
}

#[test]
fn a_newcomer_that_complains_of_another_does_not_make_the_others_stop() {
    let mut table = Table::training(&[A, B]);
    table.join(C);
    table.say(C, form_failed(Generation(2), Some(0)));
    let commands = table.pass_ms(500, &[A, B, C]);
    assert!(forms(&commands)[&A].planned, "it is tried again, after a common step");
}

#[test]
fn a_newcomer_that_dies_after_the_others_left_for_it_is_not_waited_for() {
    let mut table = Table::training(&[A, B]);
    table.join(C);
    table.say(A, beat(Generation(2), StepPhase::Form));
    assert!(!forms(&table.exit(C))[&A].planned);
}

#[test]
fn a_newcomer_that_had_formed_with_the_others_is_a_real_loss_once_that_is_known() {
    let mut table = Table::training(&[A, B]);
    table.join(C);
    table.exit(C); // All three had formed generation 2, but the news of it comes only now.
    let late = table.say(A, formed(Generation(2), 5));
    assert_eq!(table.generation(), Generation(4));
    assert!(!forms(&late)[&B].planned, "nobody waits for a step with the dead one");
}

#[test]
fn a_closed_session_alone_evicts_nobody_before_the_lease_is_out() {
    let mut table = Table::training(&[A, B]);
    table.close(B);
    assert_eq!(losses(&table.pass_ms(1_900, &[A])), []);
    assert_eq!(losses(&table.pass_ms(100, &[A])), [B]);
}

#[test]
fn who_falls_silent_is_named_with_what_it_did() {
    let mut table = Table::training(&[A, B]);
    table.say(B, beat(Generation(1), StepPhase::Reduce));
    table.pass_ms(2_000, &[A]);
    let lost = |record: &Record| {
        let Record::WorkerLost { name, cause, .. } = record else { return None };
        Some((name.clone(), cause.clone()))
    };
    let causes: Vec<_> = table.log.iter().filter_map(lost).collect();
    let cause = "it said nothing for 2s (B, rank 1); it was in reduce; its last event: it formed \
                 generation 1 at step 0";
    assert_eq!(causes, [("B".to_owned(), cause.to_owned())]);
}

#[test]
fn nobody_waits_for_a_newcomer_that_cannot_train_yet() {
    let mut table = Table::training_under(config(1), &[A]);
    let preparing = Hello { preparing: true, ..hello(B) };
    let joined = table.handle(Event::WorkerJoined { worker: B, hello: preparing.clone() });
    assert_eq!(forms(&joined).len(), 0);
    assert_eq!(losses(&table.pass_ms(5_000, &[A, B])), []);
    assert_eq!(table.members(), [A]);
    let forms = forms(&table.say(B, Report::Ready));
    assert_eq!(forms.keys().copied().collect::<Vec<_>>(), [A, B]);
    assert!(forms[&A].planned);
}

#[test]
fn a_first_generation_waits_until_its_workers_can_train() {
    let mut table = Table::new(config(2));
    for worker in [A, B] {
        let hello = Hello { preparing: true, ..hello(worker) };
        table.handle(Event::WorkerJoined { worker, hello });
    }
    assert_eq!(table.members(), []);
    table.say(A, Report::Ready);
    assert_eq!(table.members(), []);
    // The news that B is ready was lost with its session, and comes with its next greeting.
    table.return_of(B);
    assert_eq!(table.members(), [A, B]);
}

#[test]
fn a_newcomer_that_dies_before_it_can_train_costs_nothing() {
    let mut table = Table::training_under(config(1), &[A]);
    let hello = Hello { preparing: true, ..hello(B) };
    table.handle(Event::WorkerJoined { worker: B, hello });
    assert_eq!(forms(&table.close(B)).len(), 0);
    assert_eq!(table.members(), [A]);
    table.is_training();
}

#[test]
fn a_worker_that_comes_back_within_its_lease_stays() {
    let mut table = Table::training(&[A, B]);
    table.close(B);
    table.pass_ms(1_000, &[A]);
    assert_eq!(forms(&table.return_of(B)).len(), 0);
    assert_eq!(losses(&table.pass_ms(10_000, &[A, B])), []);
    table.is_training();
}

#[test]
fn a_worker_that_missed_an_order_is_told_when_it_comes_back() {
    let mut table = Table::training(&[A, B, C]);
    table.close(B);
    table.exit(C);
    let hello = Hello { generation: Some(Generation(1)), ..hello(B) };
    let commands = table.handle(Event::WorkerJoined { worker: B, hello });
    assert_eq!(forms(&commands)[&B].generation, Generation(2));
}

#[test]
fn a_closed_session_and_a_peers_report_evict_at_once_in_either_order() {
    let mut table = Table::training(&[A, B, C]);
    table.close(B);
    assert_eq!(losses(&table.say(A, lost(Generation(1), Some(1)))), [B]);

    let mut table = Table::training(&[A, B, C]);
    table.say(A, lost(Generation(1), Some(1)));
    assert_eq!(losses(&table.close(B)), [B]);
}

#[test]
fn the_same_holds_while_a_generation_forms() {
    for session_first in [true, false] {
        let mut table = Table::training(&[A, B, C]);
        table.exit(C);
        let report = form_failed(Generation(2), Some(1));
        let last = if session_first {
            table.close(B);
            table.say(A, report)
        } else {
            table.say(A, report);
            table.close(B)
        };
        assert_eq!(losses(&last), [B], "session first: {session_first}");
    }
}

#[test]
fn a_broken_exchange_with_all_members_there_is_formed_again_with_all_of_them() {
    let mut table = Table::training(&[A, B]);
    table.say(A, lost(Generation(1), Some(1)));
    let commands = table.pass_ms(500, &[A, B]);
    assert_eq!(losses(&commands), []);
    assert_eq!(forms(&commands).len(), 2);
}

#[test]
fn a_failed_formation_is_tried_again_and_in_the_end_goes_without_whom_most_blame() {
    let mut table = Table::training(&[A, B, C]);
    table.say(A, lost(Generation(1), None));
    table.pass_ms(500, &[A, B, C]);
    let first = table.generation();
    let mut gone = Vec::new();
    while gone.is_empty() && table.generation() < Generation(50) {
        let generation = table.generation();
        table.say(A, form_failed(generation, Some(2)));
        table.say(A, form_failed(generation, Some(2)));
        table.say(B, form_failed(generation, Some(2)));
        table.say(C, form_failed(generation, Some(0)));
        gone = losses(&table.pass_ms(500, &[A, B, C]));
    }
    assert_eq!(gone, [C]);
    assert!(table.generation() > Generation(first.0 + 5), "it was tried more than once");
}

#[test]
fn members_that_did_not_form_in_time_are_gone_without() {
    let mut table = Table::training(&[A, B, C]);
    table.apply(1);
    table.exit(C);
    table.form(A, 1);
    let commands = table.pass_ms(6_000, &[A, B]);
    assert_eq!(losses(&commands), [B]);
    assert_eq!(table.members(), [A]);
}

#[test]
fn the_others_have_time_to_say_so_once_one_has_formed() {
    let mut table = Table::training(&[A, B, C]);
    table.apply(1);
    table.exit(C);
    table.pass_ms(5_100, &[A, B]); // The deadline is 5.2 s after the loss.
    table.form(A, 1);
    assert_eq!(losses(&table.pass_ms(400, &[A, B])), []);
    table.form(B, 1);
    table.is_training();
}

#[test]
fn an_exchange_that_breaks_before_the_last_member_has_formed_is_not_forgotten() {
    let mut table = Table::training(&[A, B, C]);
    table.exit(C);
    table.form(A, 0);
    table.say(A, lost(Generation(2), None));
    table.form(B, 0);
    assert!(matches!(table.coordinator.phase(), Phase::Training { suspicion: Some(_) }));
    assert_eq!(forms(&table.pass_ms(500, &[A, B])).len(), 2);
}

#[test]
fn another_fingerprint_is_refused_by_name() {
    let mut table = Table::training(&[A]);
    let other = Fingerprint([("threads".to_owned(), "2".to_owned())].into());
    let hello = Hello { fingerprint: other, ..hello(B) };
    let commands = table.handle(Event::WorkerJoined { worker: B, hello });
    let [Order::Refuse { reason }] = &said_to(&commands, B)[..] else { panic!("{commands:?}") };
    assert!(reason.contains("threads is \"2\" here and \"nothing\" in the run"), "{reason}");
    assert!(matches!(&records(&commands)[..], [Record::WorkerRefused { .. }]));
    assert_eq!(table.members(), [A]);
}

#[test]
fn too_few_survivors_hold_their_state_until_another_comes() {
    let mut table =
        Table::training_under(cluster::RunConfig { workers_min: 2, ..config(2) }, &[A, B]);
    let commands = table.exit(B);
    assert_eq!(said_to(&commands, A), [Order::Hold { generation: Generation(1) }]);
    assert!(matches!(table.coordinator.phase(), Phase::Gathering { .. }));
    let forms = forms(&table.join(C));
    assert_eq!(forms.keys().copied().collect::<Vec<_>>(), [A, C]);
}

#[test]
fn a_drained_worker_leaves_after_a_common_step() {
    let mut table = Table::training(&[A, B]);
    let forms = forms(&table.drain(B));
    assert!(forms[&B].planned && forms[&B].rank_of(B).is_none());
    table.form(A, 1);
    table.close(B);
    table.is_training();
    assert_eq!(table.members(), [A]);
}

#[test]
fn the_last_holder_of_the_state_stays_until_another_has_it() {
    let mut table = Table::training(&[A]);
    assert_eq!(forms(&table.drain(A)).len(), 0, "nobody could go on");
    assert_eq!(forms(&table.join(B))[&A].members.len(), 2, "first it hands over");
    table.all_form(&[A, B], 7);
    assert_eq!(table.members(), [B], "then it may go");
}

#[test]
fn a_worker_that_drains_stays_in_when_another_is_lost() {
    let mut table = Table::training(&[A, B]);
    table.say(A, lost(Generation(1), Some(1)));
    table.say(A, leaving());
    table.exit(B);
    assert_eq!(table.members(), [A], "it may hold the only copy of the newest state");
}

#[test]
fn nor_is_it_let_go_in_an_unplanned_change_as_it_may_be_a_step_ahead() {
    let mut table = Table::training(&[A, B, C]);
    table.say(B, lost(Generation(1), Some(2)));
    table.say(A, leaving());
    table.exit(C);
    assert_eq!(table.members(), [A, B]);
}

#[test]
fn a_drain_waits_while_too_few_would_stay() {
    let config = cluster::RunConfig { workers_min: 2, ..config(2) };
    let mut table = Table::training_under(config, &[A, B]);
    assert_eq!(forms(&table.drain(A)).len(), 0);
    table.join(C);
    table.all_form(&[A, B, C], 1);
    assert_eq!(table.members(), [B, C]);
}

#[test]
fn a_drained_spare_goes_at_once() {
    let config = cluster::RunConfig { workers_max: 1, ..config(1) };
    let mut table = Table::training_under(config, &[A]);
    table.join(B);
    assert_eq!(forms(&table.drain(B))[&B].rank_of(B), None);
    assert_eq!(table.generation(), Generation(1), "the others do not notice");
}

#[test]
fn a_worker_that_falls_silent_on_its_way_out_does_not_keep_the_others() {
    let mut table = Table::training(&[A, B]);
    table.drain(B);
    let commands = table.pass_ms(2_500, &[A]);
    assert_eq!(losses(&commands), [B]);
    assert!(!forms(&commands)[&A].planned);
}

#[test]
fn a_spare_beyond_the_virtual_ranks_stands_by_and_takes_the_next_free_place() {
    let config = cluster::RunConfig { virtual_ranks: 2, workers_max: 2, ..config(2) };
    let mut table = Table::training_under(config, &[A, B]);
    assert_eq!(forms(&table.join(C)).len(), 0);
    let forms = forms(&table.exit(A));
    assert_eq!(forms.keys().copied().collect::<Vec<_>>(), [B, C]);
}

#[test]
fn a_spare_whose_session_closes_is_gone() {
    let config = cluster::RunConfig { workers_max: 1, ..config(1) };
    let mut table = Table::training_under(config, &[A]);
    table.join(B);
    assert_eq!(losses(&table.close(B)), [B]);
    assert_eq!(table.generation(), Generation(1));
}

#[test]
fn a_coordinator_that_slept_forgives() {
    let mut table = Table::training(&[A, B]);
    table.pass_ms(500, &[A, B]);
    table.wait_ms(60_000);
    assert_eq!(losses(&table.handle(Event::DeadlineReached)), []);
    assert_eq!(losses(&table.pass_ms(1_900, &[A])), [], "a whole lease begins anew");
    assert_eq!(losses(&table.pass_ms(200, &[A])), [B], "but not for ever");
}

#[test]
fn a_coordinator_that_slept_while_a_generation_formed_forgives_as_well() {
    let mut table = Table::training(&[A, B, C]);
    table.apply(1);
    table.exit(C);
    table.form(A, 1);
    table.wait_ms(60_000);
    assert_eq!(losses(&table.handle(Event::DeadlineReached)), []);
    table.form(B, 1);
    table.is_training();
}

#[test]
fn what_was_said_counts_before_what_was_not() {
    let mut table = Table::training(&[A, B]);
    for _ in 0..30 {
        table.wait_ms(100); // The host hands in what it heard before it says what time it is.
        table.say(A, beat(Generation(1), StepPhase::Compute));
    }
    table.say(B, beat(Generation(1), StepPhase::Compute));
    table.handle(Event::DeadlineReached);
    assert_eq!((table.generation(), table.members()), (Generation(1), vec![A, B]));
}
