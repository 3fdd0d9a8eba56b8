//! Many short lives of a run, each from one seed: the real machines over a made-up world.
//!
//! `PERCHERON_SIM_SEED=n` replays one seed, `PERCHERON_SIM_SEEDS=n` runs that many, from
//! `PERCHERON_SIM_FIRST=n` on. `PERCHERON_SIM_STORY=n` shows more events than the last 30.
//!
//! | file | holds |
//! | --- | --- |
//! | `plan` | what a seed makes of a run, and what will go wrong |
//! | `world` | virtual time, what happens next, the faults |
//! | `office`, `host` | the hosts of the real `Coordinator` and `Participant` |
//! | `network` | their sessions |
//! | `trainer` | modelled: states as hash chains, formations, sums, evaluations, uploads |
//! | `invariants`, `proof` | what must hold after every event, and of the log at the end |
//! | `tamper` | bugs that show that each invariant can fail |

mod chance;
mod host;
mod invariants;
mod network;
mod office;
mod plan;
mod proof;
mod tamper;
mod trainer;
mod world;

use std::collections::BTreeSet;

use tamper::Tamper;
use world::{Summary, simulate};

/// Seeds of each of the four ordinary tests: some five seconds on one core.
const SEEDS: u64 = if cfg!(debug_assertions) { 200 } else { 2_000 };
/// Faults that strike in so many seeds at least: 100,000 in all tests together.
const FAULTS: u64 = if cfg!(debug_assertions) { 2_500 } else { 25_000 };
/// Seeds that once broke an invariant. Where the rules or the world change, they tell other stories.
const ONCE_BROKEN: [u64; 18] = [
    517, 790, 982, 5_015, 5_498, 8_564, 10_718, 12_501, 13_335, 17_297, 20_038, 20_114, 21_569,
    22_033, 25_231, 27_502, 28_316, 30_622,
];

/// Events that a failure shows.
const STORY: usize = 30;

#[expect(clippy::disallowed_methods, reason = "a person chooses the seeds; the rules stay pure")]
fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect("it must be a whole number"))
}

/// Runs seeds to their ends.
fn run(seeds: impl IntoIterator<Item = u64>) -> Summary {
    let story = setting("PERCHERON_SIM_STORY").and_then(|n| n.try_into().ok()).unwrap_or(STORY);
    let mut all = Summary::default();
    for seed in seeds {
        match simulate(seed, Tamper::Nothing, story) {
            Ok(one) => all.add(&one),
            Err(failure) => panic!("{failure}"),
        }
    }
    all
}

/// A quarter of the seeds of an ordinary test run.
fn keep_every_invariant(quarter: u64) {
    let faults = run(quarter * SEEDS..(quarter + 1) * SEEDS).faults;
    assert!(faults >= FAULTS, "only {faults} faults struck");
}

#[test]
fn runs_keep_every_invariant_whatever_goes_wrong_first_quarter() {
    keep_every_invariant(0);
}

#[test]
fn runs_keep_every_invariant_whatever_goes_wrong_second_quarter() {
    keep_every_invariant(1);
}

#[test]
fn runs_keep_every_invariant_whatever_goes_wrong_third_quarter() {
    keep_every_invariant(2);
}

#[test]
fn runs_keep_every_invariant_whatever_goes_wrong_last_quarter() {
    keep_every_invariant(3);
}

#[test]
fn seeds_that_once_broke_an_invariant_keep_all_of_them() {
    run(ONCE_BROKEN);
}

/// For people: see the top of this file.
#[test]
fn chosen_seeds_keep_every_invariant() {
    if let Some(seed) = setting("PERCHERON_SIM_SEED") {
        println!("{:?}", run([seed]));
    }
    if let Some(count) = setting("PERCHERON_SIM_SEEDS") {
        let first = setting("PERCHERON_SIM_FIRST").unwrap_or(0);
        println!("{:?}", run(first..first + count));
    }
}

/// Runs seeds with a bug put in, until the invariant notices; returns those that noticed before it.
fn noticed(tamper: Tamper, invariant: &'static str) -> BTreeSet<&'static str> {
    let failures = (0..200).filter_map(|seed| simulate(seed, tamper, STORY).err());
    let mut noticed = BTreeSet::new();
    for failure in failures {
        noticed.insert(failure.violation.invariant);
        if failure.violation.invariant == invariant {
            break;
        }
    }
    noticed
}

/// Each invariant, with a bug that breaks it.
const MUTATIONS: [(Tamper, &str); 25] = [
    (Tamper::AnnouncesBeforeDurable, "a_generation_is_durable_before_it_is_announced"),
    (Tamper::LosesSteps, "the_ledger_is_the_fold_of_the_log"),
    (Tamper::MissesDeadlines, "every_run_finishes"),
    (Tamper::PassesOldNews, "no_stale_report_changes_the_ledger"),
    (Tamper::AddsWrongly, "a_step_has_one_result"),
    (Tamper::LowestStepWins, "no_applied_step_is_lost"),
    (Tamper::KeepsTraining, "a_formed_generation_silences_older_ones"),
    (Tamper::AdoptsTwice, "each_sample_is_seen_once_an_epoch"),
    (Tamper::SkipsAStep, "canonical_steps_are_contiguous"),
    (Tamper::SkipsAGeneration, "generations_only_grow"),
    (Tamper::AdoptsFromThePast, "one_generation_counts"),
    (Tamper::OpensAfterTheEnd, "an_ended_run_stands_still"),
    (Tamper::ForgetsTheTail, "no_committed_step_is_lost"),
    (Tamper::ForgetsTheTerms, "terms_only_grow"),
    (Tamper::StopsTheClock, "a_deadline_lies_ahead"),
    (Tamper::KeepsTheEnd, "every_worker_hears_of_the_end"),
    (Tamper::ReportsFalseDeaths, "nobody_who_lives_is_taken_for_dead"),
    (Tamper::WritesWrongly, "a_checkpoint_is_one_state"),
    (Tamper::EndsWrongly, "a_finished_run_is_the_undisturbed_one"),
    (Tamper::FormsWrongly, "no_run_fails"),
    (Tamper::SkipsEvaluations, "members_of_a_generation_do_the_same"),
    (Tamper::LeavesAtOnce, "gentle_changes_lose_no_step"),
    (Tamper::HidesHangs, "every_run_finishes"),
    (Tamper::BlamesAnother, "only_the_stuck_are_called_stuck"),
    (Tamper::EditsTheLog, "the_log_proves_the_run"),
];

#[test]
fn each_invariant_is_broken_by_its_mutation() {
    for (tamper, invariant) in MUTATIONS {
        let noticed = noticed(tamper, invariant);
        assert!(noticed.contains(invariant), "{tamper:?} breaks {noticed:?}, not {invariant}");
    }
}

#[test]
fn each_invariant_has_a_mutation() {
    let looked_at = run(0..SEEDS / 4).looked_at;
    let broken: BTreeSet<_> = MUTATIONS.iter().map(|(_, invariant)| *invariant).collect();
    let idle: Vec<_> = looked_at.difference(&broken).collect();
    assert!(idle.is_empty(), "nothing breaks {idle:?}");
    // Of the ends, `no_run_fails` and the two of liveness, is only spoken when they do not come.
    assert!(looked_at.len() + 3 >= broken.len(), "only {looked_at:?} are looked at");
}
