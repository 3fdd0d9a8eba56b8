//! A person decides how many workers take part.

use cluster::{Event, Generation, Record, RunConfig, Step};

use crate::table::*;

fn resize(table: &mut Table, workers: u32) -> Vec<cluster::Command> {
    table.handle(Event::ResizeRequested { workers })
}

#[test]
fn fewer_workers_go_on_after_a_common_step() {
    let mut table = Table::training(&[A, B, C]);
    table.apply(1);
    let commands = resize(&mut table, 2);
    assert!(matches!(records(&commands)[0], Record::Resized { workers: 2 }));
    let forms = forms(&commands);
    assert_eq!(forms.keys().copied().collect::<Vec<_>>(), [A, B, C], "the third is told to leave");
    assert!(forms[&C].planned && forms[&C].rank_of(C).is_none());
    table.say(A, applied(Generation(1), 2));
    table.all_form(&[A, B], 3);
    assert_eq!((table.members(), table.coordinator.ledger().repeated), (vec![A, B], 0));
    assert_eq!(table.coordinator.ledger().canonical, Step(3));
}

#[test]
fn whoever_comes_beyond_that_stands_by_until_there_is_room() {
    let mut table = Table::training(&[A, B]);
    resize(&mut table, 2);
    assert_eq!(forms(&table.join(C)).len(), 0);
    let grown = forms(&resize(&mut table, 3));
    assert_eq!(grown[&A].members.len(), 3);
    assert!(grown[&A].planned);
}

#[test]
fn what_was_asked_for_outlives_the_coordinator_and_the_recipes_maximum() {
    let mut table = Table::training_under(RunConfig { workers_max: 2, ..config(2) }, &[A, B]);
    assert_eq!(forms(&table.join(C)).len(), 0, "the recipe has two");
    resize(&mut table, 3);
    table.all_form(&[A, B, C], 0);
    resize(&mut table, 1);
    table.all_form(&[A], 0);
    let mut table = table.restart();
    assert_eq!(table.coordinator.ledger().workers_wanted, Some(1));
    table.return_of(A);
    assert_eq!(forms(&table.join(D)).len(), 0);
}

#[test]
fn a_number_that_cannot_be_changes_nothing_and_names_the_limits() {
    let mut table = Table::training_under(RunConfig { workers_min: 2, ..config(2) }, &[A, B]);
    for workers in [0, 1, 9] {
        assert_eq!(resize(&mut table, workers), []);
    }
    let problem = table.coordinator.config().check_resize(9).unwrap_err().to_string();
    assert!(problem.contains("take 2 (workers_min) to 8 (virtual_ranks)"), "{problem}");
    resize(&mut table, 3);
    assert_eq!(resize(&mut table, 3), [], "said twice");
}

#[test]
fn a_spare_that_is_older_than_all_who_hold_the_state_does_not_take_their_place() {
    let mut table = Table::new(RunConfig { workers_max: 1, ..config(1) });
    table.join(A);
    table.all_form(&[A], 0);
    table.apply(1);
    table.join(B);
    resize(&mut table, 2);
    table.all_form(&[A, B], 1);
    table.drain(A);
    table.all_form(&[B], 2);
    assert_eq!(table.members(), [B]);
    let group = forms(&resize(&mut table, 1));
    assert!(group.values().all(|group| group.rank_of(B).is_some()));
}
