//! Machines that are broken.

use cluster::{Event, Generation, Hello, Order, Record, Report};

use crate::table::*;

fn faulty(table: &mut Table) -> Vec<cluster::Command> {
    table.say(B, Report::NodeFaulty { reason: "Xid 79".to_owned() })
}

/// C, on the machine of B.
fn another_there() -> Hello {
    Hello { node: hello(B).node, ..hello(C) }
}

fn is_refused(commands: &[cluster::Command]) -> bool {
    let refusal = |command: &cluster::Command| {
        matches!(command, cluster::Command::Send { worker: C, order: Order::Refuse { .. } })
    };
    commands.iter().any(refusal)
}

#[test]
fn a_worker_on_a_broken_machine_is_lost_at_once_and_the_machine_is_marked() {
    let mut table = Table::training(&[A, B]);
    let commands = faulty(&mut table);
    let marked = Record::NodeMarked {
        node: "host-B".to_owned(),
        name: "B".to_owned(),
        reason: "Xid 79".to_owned(),
    };
    assert_eq!(records(&commands)[0], marked);
    assert!(matches!(&records(&commands)[1], Record::WorkerLost { worker: B, cause, .. }
        if cause == "its machine is faulty: Xid 79"));
    assert_eq!(table.members(), [A]);
    assert_eq!(table.generation(), Generation(2));
    assert_eq!(faulty(&mut table), [], "said twice");
}

#[test]
fn no_worker_of_a_marked_machine_is_let_in_until_it_is_readmitted() {
    let mut table = Table::training(&[A, B]);
    faulty(&mut table);
    let joins = Event::WorkerJoined { worker: C, hello: another_there() };
    let commands = table.handle(joins.clone());
    assert!(is_refused(&commands));
    let said = "machine host-B is marked as faulty (Xid 79): repair it, then say `percheron readmit RUN_DIR host-B`";
    assert!(
        matches!(&records(&commands)[..], [Record::WorkerRefused { reason, .. }] if reason == said)
    );

    // Also not by the next coordinator.
    let (log, now) = (table.log.clone(), table.now);
    let mut next = Table::restored(config(2), log, now);
    assert!(is_refused(&next.handle(joins.clone())));

    let readmitted = Event::NodeReadmitted { node: "host-B".to_owned() };
    assert_eq!(next.handle(readmitted.clone()).len(), 1);
    assert_eq!(next.handle(readmitted), [], "it is whole already");
    assert!(!is_refused(&next.handle(joins)));
}

#[test]
fn workers_that_are_on_a_marked_machine_already_may_come_back_to_their_session() {
    let mut table = Table::new(config(3));
    table.join(A);
    table.join(B);
    table.handle(Event::WorkerJoined { worker: C, hello: another_there() });
    table.all_form(&[A, B, C], 0);
    faulty(&mut table);
    table.all_form(&[A, C], 0);
    table.close(C);
    let commands = table.handle(Event::WorkerJoined { worker: C, hello: another_there() });
    assert!(!is_refused(&commands));
    assert_eq!(table.members(), [A, C]);
}

#[test]
fn a_worker_that_does_not_name_its_machine_is_lost_and_nothing_is_marked() {
    let mut table = Table::new(config(2));
    table.join(A);
    table.handle(Event::WorkerJoined {
        worker: B,
        hello: Hello { node: String::new(), ..hello(B) },
    });
    table.all_form(&[A, B], 0);
    assert!(matches!(records(&faulty(&mut table))[0], Record::WorkerLost { worker: B, .. }));
    assert!(table.coordinator.ledger().faulty.is_empty());
}
