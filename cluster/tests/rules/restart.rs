//! A coordinator dies, and the next continues from its records.

use cluster::{Event, Generation, Hello, Order, Outcome, Phase, Record, Step, StepPhase, Term};

use crate::table::*;

#[test]
fn each_start_is_a_term_of_its_own() {
    let table = Table::training(&[A]).restart().restart();
    assert_eq!(table.coordinator.term(), Term(3));
    assert!(matches!(table.log[0], Record::RunCreated { .. }));
}

#[test]
fn generations_are_counted_on_after_a_restart() {
    let mut table = Table::training(&[A, B]);
    table.exit(B);
    table.form(A, 0);
    assert_eq!(table.generation(), Generation(2));
    let mut table = table.restart();
    assert_eq!(table.generation(), Generation(2));
    table.exit(A);
    table.join(C);
    assert_eq!(table.generation(), Generation(3), "no number is ever used again");
}

#[test]
fn members_that_come_back_go_on_and_those_that_stay_away_are_lost() {
    let mut table = Table::training(&[A, B]);
    table.apply(9);
    let mut table = table.restart();
    table.is_training();
    assert_eq!(forms(&table.return_of(A)).len(), 0);
    table.apply(10);
    assert_eq!(table.coordinator.ledger().canonical, Step(10));
    assert_eq!(losses(&table.pass_ms(1_900, &[A])), []);
    assert_eq!(losses(&table.pass_ms(100, &[A])), [B]);
    assert_eq!(table.members(), [A]);
}

#[test]
fn a_member_that_is_not_back_yet_is_not_cut_off() {
    let mut table = Table::training(&[A, B]).restart();
    table.return_of(A);
    let commands = table.say(A, lost(Generation(1), Some(1)));
    assert_eq!(losses(&commands), []);
    table.return_of(B);
    let commands = table.pass_ms(500, &[A, B]);
    assert_eq!(forms(&commands).len(), 2, "all of them form again");
}

#[test]
fn members_say_again_that_they_formed() {
    let mut table = Table::training(&[A, B]);
    table.exit(B);
    table.join(C);
    table.form(A, 3);
    let generation = table.generation();
    table.form(A, 3);
    let mut table = table.restart();
    assert!(matches!(table.coordinator.phase(), Phase::Forming { .. }));
    table.return_of(A);
    table.return_of(C);
    table.all_form(&[A, C], 3);
    table.is_training();
    assert_eq!(table.generation(), generation);
}

#[test]
fn a_loss_that_is_durable_is_acted_upon_at_once() {
    let mut table = Table::training(&[A, B]);
    table.exit(B);
    // The coordinator died between the record of the loss and that of the generation.
    let opened = |record: &Record| matches!(record, Record::GenerationOpened { .. });
    let last = table.log.iter().rposition(opened).unwrap();
    table.log.truncate(last);
    let table = table.restart();
    assert_eq!((table.generation(), table.members()), (Generation(2), vec![A]));
}

#[test]
fn survivors_that_were_held_are_not_taken_for_training() {
    let config = cluster::RunConfig { workers_min: 2, ..config(2) };
    let mut table = Table::training_under(config, &[A, B]);
    table.exit(B);
    let mut table = table.restart();
    assert!(matches!(table.coordinator.phase(), Phase::Gathering { .. }));
    table.return_of(A);
    assert_eq!(forms(&table.join(C)).len(), 2);
}

#[test]
fn all_members_of_a_generation_are_told_the_same_however_late() {
    let mut table = Table::training(&[A, B]);
    table.apply(40);
    table.say(A, share(Generation(1), 40, &[0, 1, 2, 3]));
    let first = forms(&table.join(C))[&A].clone();
    table.say(A, evaluated(Generation(1), 40));
    table.handle(Event::CheckpointCommitted { step: Step(40) });
    let hello = Hello { generation: Some(Generation(1)), ..hello(B) };
    let late = forms(&table.handle(Event::WorkerJoined { worker: B, hello }))[&B].clone();
    assert_eq!((first.checkpoint, first.evaluated), (None, None));
    assert_eq!((late.checkpoint, late.evaluated), (first.checkpoint, first.evaluated));

    let mut table = table.restart();
    let hello = Hello { generation: Some(Generation(1)), ..crate::table::hello(B) };
    let later = forms(&table.handle(Event::WorkerJoined { worker: B, hello }))[&B].clone();
    assert_eq!((later.checkpoint, later.evaluated), (first.checkpoint, first.evaluated));
}

#[test]
fn a_final_checkpoint_whose_shares_were_forgotten_is_written_again() {
    let mut table = Table::training(&[A]);
    table.apply(100);
    table.say(A, share(Generation(1), 100, &[0, 1, 2, 3]));
    table.finish(A, "f00d");
    let mut table = table.restart();
    table.return_of(A);
    let commands = table.finish(A, "f00d");
    assert_eq!(forms(&commands)[&A].checkpoint_at, Some(Step(100)));
}

#[test]
fn the_end_is_not_reached_before_its_last_step_is_adopted() {
    let mut table = Table::new(config(1));
    table.join(A);
    let mut table = table.restart();
    table.return_of(A);
    table.say(A, share(table.generation(), 100, &[0, 1, 2, 3]));
    table.handle(Event::CheckpointCommitted { step: Step(100) });
    table.finish(A, "f00d"); // What it said before was heard by the one that died.
    assert_eq!(table.coordinator.ledger().outcome, None);
    table.form(A, 100);
    assert_eq!(table.coordinator.ledger().canonical, Step(100));
    assert!(matches!(table.coordinator.ledger().outcome, Some(Outcome::Finished { .. })));
}

#[test]
fn a_finished_run_stays_finished() {
    let mut table = Table::training(&[A]);
    table.apply(100);
    table.say(A, share(Generation(1), 100, &[0, 1, 2, 3]));
    table.handle(Event::CheckpointCommitted { step: Step(100) });
    table.finish(A, "f00d");
    let mut table = table.restart();
    let commands = table.return_of(A);
    let end = Order::Finish { step: Step(100), state_sha256: "f00d".to_owned() };
    assert_eq!(said_to(&commands, A)[1..], [end]);
}

#[test]
fn a_leaving_worker_that_missed_its_release_is_let_go_when_it_comes_back() {
    let mut table = Table::training(&[A, B]);
    table.close(B);
    table.drain(B);
    table.say(A, beat(Generation(2), StepPhase::Form));
    table.form(A, 1);
    let hello = Hello { generation: Some(Generation(1)), ..hello(B) };
    let commands = table.handle(Event::WorkerJoined { worker: B, hello });
    assert_eq!(forms(&commands)[&B].rank_of(B), None);
}

#[test]
fn a_step_is_adopted_before_its_generation_counts_as_formed() {
    let mut table = Table::training(&[A, B]);
    table.exit(B);
    let formed = records(&table.form(A, 7));
    assert!(matches!(formed[..7].last(), Some(Record::StepAdopted { step: Step(7), .. })));
    assert!(matches!(formed[7], Record::GenerationFormed { .. }), "a crash may fall in between");
}

#[test]
fn who_was_on_its_way_out_when_the_coordinator_died_does_not_keep_the_others() {
    let mut table = Table::training(&[A, B]);
    table.drain(B);
    let mut table = table.restart();
    table.return_of(A);
    let commands = table.pass_ms(2_500, &[A]);
    assert_eq!(losses(&commands), [B]);
    assert!(!forms(&commands)[&A].planned);
}

#[test]
fn the_holder_of_a_later_claim_records_the_terms_that_nobody_led() {
    let log = Table::training(&[A]).log;
    let config = Table::training(&[A]).coordinator.config().clone();
    let now = cluster::Timestamp(9_000);
    let mut coordinator = cluster::Coordinator::restore_as(now, config, Term(4), log.iter());
    let commands = coordinator.handle(now, Event::DeadlineReached);
    let wanted = [Term(2), Term(3), Term(4)];
    let appended = wanted.map(|term| cluster::Command::Append(Record::TermStarted { term }));
    assert_eq!(commands[..3], appended);
}
