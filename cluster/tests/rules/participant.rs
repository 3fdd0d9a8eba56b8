//! What a worker does, and what it does not.

use cluster::{
    Action, Exit, Generation, Group, Member, Notice, Order, Participant, Rank, Report, State, Step,
    Term, Timestamp, WorkerId,
};

use crate::table::{A, B, C, applied, formed, leaving, lost, name};

fn group(generation: u64, members: &[WorkerId], planned: bool) -> Group {
    let member = |&worker| Member {
        worker,
        name: name(worker),
        address: format!("{worker}:1"),
        block: 0..1,
    };
    Group {
        generation: Generation(generation),
        term: Term(1),
        members: members.iter().map(member).collect(),
        planned,
        checkpoint: None,
        checkpoint_at: None,
        evaluated: None,
        last: false,
    }
}

fn order(order: Order) -> Notice {
    Notice::Ordered { term: Term(1), order }
}

fn form(group: &Group) -> Notice {
    order(Order::Form(group.clone()))
}

fn enter(group: &Group, rank: u32) -> Action {
    Action::Form { group: group.clone(), rank: Rank(rank) }
}

fn has_formed(generation: u64, step: u64) -> Notice {
    let (generation, digest) = (Generation(generation), format!("state-{step}"));
    let (step, begun) = (Step(step), Step(step));
    Notice::Formed { generation, step, digest, begun, stopped_at: None, metrics: None }
}

fn breaks(generation: u64) -> Notice {
    Notice::ExchangeLost {
        generation: Generation(generation),
        applied: Step(0),
        peer: None,
        reason: "connection reset".to_owned(),
        at: Timestamp(0),
    }
}

fn has_finished(generation: u64) -> Notice {
    let generation = Generation(generation);
    Notice::Finished { generation, step: Step(100), state_sha256: "f00d".to_owned() }
}

fn finished(generation: u64) -> Report {
    let generation = Generation(generation);
    Report::Finished { generation, step: Step(100), state_sha256: "f00d".to_owned() }
}

/// A worker that trains in generation 1 with B.
fn training(worker: WorkerId) -> Participant {
    let mut participant = Participant::new(worker);
    participant.handle(form(&group(1, &[A, B], false)));
    participant.handle(has_formed(1, 0));
    participant
}

#[test]
fn a_loss_aborts_the_old_generation_at_once() {
    let next = group(2, &[A], false);
    let actions = training(A).handle(form(&next));
    assert_eq!(actions, [Action::Abort { generation: Generation(1) }, enter(&next, 0)]);
}

#[test]
fn a_planned_change_is_entered_after_a_common_step_that_rank_0_asks_for() {
    let next = group(2, &[A, B, C], true);
    for (worker, rank) in [(A, 0), (B, 1)] {
        let mut participant = training(worker);
        let asks = Action::LeaveAfterStep { generation: Generation(1) };
        let asked = participant.handle(form(&next));
        assert_eq!(asked, if rank == 0 { vec![asks] } else { vec![] });
        let left = participant.handle(Notice::LeftTogether { generation: Generation(1) });
        assert_eq!(left, [enter(&next, rank)]);
    }
}

#[test]
fn who_left_before_it_was_ordered_enters_when_it_is() {
    let mut participant = training(B);
    participant.handle(Notice::LeftTogether { generation: Generation(1) });
    assert_eq!(*participant.state(), State::Left);
    let next = group(2, &[A, B, C], true);
    assert_eq!(participant.handle(form(&next)), [enter(&next, 1)]);
}

#[test]
fn an_exchange_that_breaks_because_the_others_left_is_no_loss() {
    let mut participant = training(B);
    let next = group(2, &[A, B, C], true);
    participant.handle(form(&next));
    assert_eq!(participant.handle(breaks(1)), [enter(&next, 1)]);
}

#[test]
fn an_order_of_the_past_is_ignored() {
    let mut participant = training(A);
    participant.handle(form(&group(3, &[A], false)));
    assert_eq!(participant.handle(form(&group(2, &[A, C], false))), []);
    assert_eq!(participant.handle(form(&group(3, &[A], false))), [], "said twice");
    let outdated = Order::Fail { reason: "old".to_owned() };
    assert_eq!(participant.handle(Notice::Ordered { term: Term(0), order: outdated }), []);
}

#[test]
fn notices_of_a_generation_that_is_over_change_nothing() {
    let mut participant = training(A);
    participant.handle(form(&group(2, &[A, C], false)));
    let before = participant.clone();
    for notice in [
        has_formed(1, 0),
        breaks(1),
        has_finished(1),
        Notice::LeftTogether { generation: Generation(1) },
    ] {
        assert_eq!(participant.handle(notice.clone()), [], "{notice:?}");
    }
    assert_eq!(participant, before);
}

#[test]
fn only_rank_0_reports_steps() {
    let step = |generation| Notice::StepApplied {
        generation: Generation(generation),
        step: Step(1),
        metrics: cluster::StepMetrics { step_ms: 100.0, ..Default::default() },
        at: Timestamp(0),
    };
    assert_eq!(training(A).handle(step(1)), [Action::Report(applied(Generation(1), 1))]);
    assert_eq!(training(B).handle(step(1)), []);
}

#[test]
fn a_coordinator_that_forgot_is_told_again() {
    let welcome = || order(Order::Welcome { term: Term(2) });
    let mut participant = training(A);
    assert_eq!(participant.handle(welcome()), [Action::Report(formed(Generation(1), 0))]);

    participant.handle(has_finished(1));
    let told = [Action::Report(formed(Generation(1), 0)), Action::Report(finished(1))];
    assert_eq!(participant.handle(welcome()), told);

    let mut participant = training(A);
    participant.handle(breaks(1));
    assert_eq!(participant.handle(welcome()), [Action::Report(lost(Generation(1), None))]);
}

#[test]
fn who_is_held_keeps_what_it_had_to_say() {
    let hold = || order(Order::Hold { generation: Generation(1) });
    let mut participant = training(A);
    assert_eq!(participant.handle(hold()), [Action::Abort { generation: Generation(1) }]);
    assert_eq!(*participant.state(), State::Broken { lost: None });

    let mut participant = training(A);
    participant.handle(has_finished(1));
    assert_eq!(participant.handle(hold()), []);
    assert!(matches!(participant.state(), State::Finished { .. }));
}

#[test]
fn a_finished_worker_does_the_end_once_more_with_a_newcomer() {
    let mut participant = training(A);
    participant.handle(has_finished(1));
    let next = group(2, &[A, B, C], true);
    assert_eq!(participant.handle(form(&next)), [enter(&next, 0)]);
}

#[test]
fn a_worker_without_a_place_is_released() {
    let mut participant = training(B);
    participant.handle(form(&group(2, &[A], true)));
    let left = participant.handle(Notice::LeftTogether { generation: Generation(1) });
    assert_eq!(left, [Action::Exit(Exit::Released)]);
}

#[test]
fn a_worker_that_is_to_stop_asks_first_if_it_has_a_part() {
    let stop = || Notice::StopRequested { reason: "SIGTERM".to_owned() };
    assert_eq!(training(A).handle(stop()), [Action::Report(leaving())]);
    assert_eq!(Participant::new(A).handle(stop()), [Action::Exit(Exit::Released)]);
}

#[test]
fn a_refused_worker_stops_its_trainer_and_says_nothing_more() {
    let mut participant = training(A);
    let reason = "the run went on".to_owned();
    let actions = participant.handle(order(Order::Refuse { reason: reason.clone() }));
    let abort = Action::Abort { generation: Generation(1) };
    assert_eq!(actions, [abort, Action::Exit(Exit::Refused(reason))]);
    let torn_down = Notice::Failed { reason: "aborted".to_owned() };
    assert_eq!(participant.handle(torn_down), [], "it must not fail the run of the others");
}

#[test]
fn who_waits_in_a_last_generation_turns_to_the_next_at_once_and_leaves_if_it_has_no_place_there() {
    let last = Group { last: true, ..group(2, &[A, B], true) };
    let waiting = || {
        let mut participant = Participant::new(A);
        participant.handle(form(&last));
        let state = || Notice::Formed {
            generation: Generation(2),
            step: Step(4),
            digest: "d".to_owned(),
            begun: Step(4),
            stopped_at: None,
            metrics: None,
        };
        assert!(matches!(&participant.handle(state())[..], [Action::Report(_)]));
        participant
    };
    let abort = Action::Abort { generation: Generation(2) };
    let next = group(3, &[A, C], true);
    let joined = Action::Form { group: next.clone(), rank: Rank(0) };
    assert_eq!(waiting().handle(form(&next)), [abort.clone(), joined]);
    let nobody = Group { last: true, ..group(3, &[], true) };
    assert_eq!(waiting().handle(form(&nobody)), [abort, Action::Exit(Exit::Released)]);
}
