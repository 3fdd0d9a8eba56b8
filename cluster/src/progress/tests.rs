//! Tables and properties of the verdicts.

use proptest::prelude::*;

use super::*;
use crate::Generation;

const A: WorkerId = WorkerId(1);
const B: WorkerId = WorkerId(2);
const C: WorkerId = WorkerId(3);

/// Heartbeat 250 ms; stuck after 5 s, in the first step after 60 s, in the first evaluation after 600 s.
fn timeouts() -> Timeouts {
    Timeouts::derived_from(Duration::from_secs(10)).unwrap()
}

fn at(step: u64, phase: StepPhase, ms: u64) -> Progress {
    Progress {
        generation: Generation(1),
        applied: Some(Step(step)),
        phase,
        in_phase: Duration::from_millis(ms),
        resident_bytes: 0,
    }
}

/// Each of `workers` has done steps of a second: `compute_ms` in compute, the rest in the others.
fn trained(workers: &[WorkerId], compute_ms: u64) -> Pace {
    let mut pace = Pace::default();
    for step in 0..9 {
        for &worker in workers {
            for (phase, ms) in [
                (StepPhase::Load, 10),
                (StepPhase::Compute, compute_ms),
                (StepPhase::Reduce, 100),
                (StepPhase::Update, 50),
                (StepPhase::Checkpoint, 20),
            ] {
                pace.beat(&timeouts(), worker, at(step, phase, ms));
            }
        }
    }
    pace
}

/// What it is about, what three workers say, and whom that is held against.
type Case = (&'static str, [(u64, StepPhase, u64); 3], &'static [WorkerId]);

fn verdict(pace: &mut Pace, said: &[(WorkerId, Progress)]) -> Option<Verdict> {
    for &(worker, progress) in said {
        pace.beat(&timeouts(), worker, progress);
    }
    let members: Vec<_> = said.iter().map(|(worker, _)| *worker).collect();
    pace.verdict(&timeouts(), &members, true)
}

fn blamed(verdict: Option<Verdict>) -> Vec<WorkerId> {
    match verdict {
        Some(Verdict::Stuck(stuck)) => stuck.into_iter().map(|one| one.worker).collect(),
        Some(Verdict::Stalled { .. }) | None => Vec::new(),
    }
}

#[test]
fn whoever_keeps_the_others_waiting_for_too_long_is_stuck() {
    use StepPhase::{Checkpoint, Compute, Form, Load, Reduce, Update};
    let table: [Case; 9] = [
        ("in compute", [(8, Reduce, 5_500), (8, Compute, 6_000), (8, Reduce, 5_400)], &[B]),
        ("loading", [(8, Load, 6_000), (8, Reduce, 5_500), (8, Reduce, 5_500)], &[A]),
        (
            "in update, the others in the next step",
            [(9, Reduce, 5_500), (9, Reduce, 5_500), (8, Update, 6_000)],
            &[C],
        ),
        (
            "copying a checkpoint",
            [(8, Reduce, 5_500), (8, Checkpoint, 6_000), (8, Reduce, 5_400)],
            &[B],
        ),
        (
            "in the sum the others have left",
            [(9, Reduce, 5_500), (8, Reduce, 6_000), (9, Reduce, 5_400)],
            &[B],
        ),
        (
            "while the others form a generation",
            [(8, Form, 5_500), (8, Compute, 6_000), (8, Form, 5_400)],
            &[B],
        ),
        ("not for long enough", [(8, Reduce, 4_900), (8, Compute, 4_990), (8, Reduce, 4_900)], &[]),
        (
            "the others took as long",
            [(8, Reduce, 1_000), (8, Compute, 9_000), (8, Reduce, 2_000)],
            &[],
        ),
        ("all compute", [(8, Compute, 90_000), (8, Compute, 90_000), (8, Load, 90_000)], &[]),
    ];
    for (what, said, expected) in table {
        let mut pace = trained(&[A, B, C], 500);
        let said = [A, B, C].into_iter().zip(said);
        let said: Vec<_> = said.map(|(w, (step, phase, ms))| (w, at(step, phase, ms))).collect();
        assert_eq!(blamed(verdict(&mut pace, &said)), expected, "{what}");
    }
}

#[test]
fn a_phase_that_is_known_to_be_long_has_longer() {
    let mut pace = trained(&[A, B], 4_000);
    assert_eq!(pace.deadline(&timeouts(), A, StepPhase::Compute), Duration::from_millis(12_750));
    let waits = at(8, StepPhase::Reduce, 12_000);
    assert_eq!(verdict(&mut pace, &[(A, waits), (B, at(8, StepPhase::Compute, 12_700))]), None);
    let late = verdict(&mut pace, &[(A, waits), (B, at(8, StepPhase::Compute, 12_800))]);
    assert_eq!(blamed(late), [B]);
}

#[test]
fn the_first_step_of_a_life_and_the_first_evaluation_have_longer() {
    let pace = trained(&[A], 500);
    let deadline = |worker, phase| pace.deadline(&timeouts(), worker, phase).as_secs();
    assert_eq!(deadline(A, StepPhase::Compute), 5);
    assert_eq!(deadline(B, StepPhase::Compute), 60, "it has done no step yet");
    assert_eq!(deadline(A, StepPhase::Evaluate), 600, "nobody has evaluated yet");
}

#[test]
fn a_worker_in_the_sum_is_not_to_blame_while_another_computes_for_longer() {
    let mut pace = trained(&[A, B, C], 500);
    let said = [
        (A, at(8, StepPhase::Reduce, 8_000)),
        (B, at(9, StepPhase::Compute, 8_100)),
        (C, at(9, StepPhase::Reduce, 8_000)),
    ];
    assert_eq!(verdict(&mut pace, &said), None);
}

#[test]
fn what_most_suffer_from_is_their_fault_only_much_later() {
    let mut pace = trained(&[A, B, C], 500);
    let two_load = |ms| {
        [
            (A, at(8, StepPhase::Load, ms)),
            (B, at(8, StepPhase::Load, ms)),
            (C, at(8, StepPhase::Reduce, ms)),
        ]
    };
    assert_eq!(verdict(&mut pace, &two_load(14_000)), None);
    assert_eq!(blamed(verdict(&mut pace, &two_load(15_000))), [A, B]);
}

#[test]
fn a_generation_in_which_all_wait_forms_anew_with_growing_patience() {
    let mut pace = trained(&[A, B], 500);
    let both = |ms| [(A, at(8, StepPhase::Reduce, ms)), (B, at(8, StepPhase::Reduce, ms))];
    assert_eq!(verdict(&mut pace, &both(4_900)), None);
    let stalled = verdict(&mut pace, &both(5_100));
    assert!(matches!(stalled, Some(Verdict::Stalled { phase: StepPhase::Reduce, .. })));
    pace.stalled();
    assert_eq!(verdict(&mut pace, &both(9_900)), None, "it was wrong: now it has twice as long");
    assert!(verdict(&mut pace, &both(10_100)).is_some());
    pace.beat(&timeouts(), A, at(9, StepPhase::Load, 1));
    assert_eq!(pace.stalls, 0, "a step was done");
}

#[test]
fn a_generation_of_which_all_hang_is_given_up_in_the_end() {
    let mut pace = trained(&[A], 500);
    assert_eq!(verdict(&mut pace, &[(A, at(8, StepPhase::Compute, 599_000))]), None);
    let hangs = verdict(&mut pace, &[(A, at(8, StepPhase::Compute, 600_000))]);
    assert!(matches!(hangs, Some(Verdict::Stalled { phase: StepPhase::Compute, .. })));
    assert_eq!(verdict(&mut pace, &[(A, at(8, StepPhase::Idle, 900_000))]), None, "it is done");
}

#[test]
fn a_stall_needs_the_word_of_all() {
    let mut pace = trained(&[A, B], 500);
    pace.forget(B);
    let _waits = verdict(&mut pace, &[(A, at(8, StepPhase::Reduce, 90_000))]);
    assert_eq!(pace.verdict(&timeouts(), &[A, B], true), None);
}

fn phases() -> impl Strategy<Value = StepPhase> {
    prop::sample::select(vec![
        StepPhase::Load,
        StepPhase::Compute,
        StepPhase::Reduce,
        StepPhase::Update,
        StepPhase::Checkpoint,
        StepPhase::Form,
        StepPhase::Idle,
    ])
}

proptest! {
    /// However slow a machine is: if all members do the same, nobody is at fault.
    #[test]
    fn equally_slow_workers_are_never_evicted(
        slowness in 1u64..200,
        phase in phases(),
        jitter in prop::collection::vec(0u64..50, 2..8),
    ) {
        let workers: Vec<_> = (1..=jitter.len() as u64).map(WorkerId).collect();
        let mut pace = trained(&workers, 500);
        let said = workers.iter().zip(&jitter);
        let said: Vec<_> = said.map(|(&w, j)| (w, at(8, phase, 500 * slowness + j))).collect();
        prop_assert_eq!(blamed(verdict(&mut pace, &said)), []);
    }

    /// Whatever they say, whoever is blamed is at the rear, late, and waited for by somebody.
    #[test]
    fn the_culprit_is_behind_somebody_who_waits(
        said in prop::collection::vec((7u64..10, phases(), 0u64..40_000), 2..8),
    ) {
        let workers: Vec<_> = (1..=said.len() as u64).map(WorkerId).collect();
        let mut pace = trained(&workers, 500);
        let said = workers.iter().zip(said);
        let said: Vec<_> = said.map(|(&w, (s, phase, ms))| (w, at(s, phase, ms))).collect();
        if let Some(Verdict::Stuck(stuck)) = verdict(&mut pace, &said) {
            for one in stuck {
                let behind = |p: &Progress| position(p) > position(&one.progress);
                let waits = |p: &Progress| is_waiting(p.phase) && behind(p);
                prop_assert!(one.progress.in_phase >= one.deadline);
                prop_assert!(one.deadline >= timeouts().progress());
                let waiting = said.iter().filter(|(_, progress)| waits(progress)).count();
                prop_assert!(waiting >= one.waiting && one.waiting > 0);
            }
        }
    }
}
