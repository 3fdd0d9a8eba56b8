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

mod chance;
mod host;
mod invariants;
mod network;
mod office;
mod plan;
mod proof;
mod trainer;
mod world;

use world::{Summary, Tamper, simulate};

/// Seeds of an ordinary test run: some ten seconds on one core.
const SEEDS: u64 = if cfg!(debug_assertions) { 1_000 } else { 10_000 };

/// Events that a failure shows.
const STORY: usize = 30;

#[expect(clippy::disallowed_methods, reason = "a person chooses the seeds; the rules stay pure")]
fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect("it must be a whole number"))
}

#[test]
fn runs_keep_every_invariant_whatever_goes_wrong() {
    let first = setting("PERCHERON_SIM_FIRST").unwrap_or(0);
    let seeds = match setting("PERCHERON_SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => first..first + setting("PERCHERON_SIM_SEEDS").unwrap_or(SEEDS),
    };
    let story = setting("PERCHERON_SIM_STORY").and_then(|n| n.try_into().ok()).unwrap_or(STORY);
    let count = seeds.end - seeds.start;
    let mut all = Summary::default();
    for seed in seeds {
        match simulate(seed, Tamper::Nothing, story) {
            Ok(one) => {
                all.events += one.events;
                all.generations += one.generations;
                all.repeated += one.repeated;
                all.settled_ms = all.settled_ms.max(one.settled_ms);
            }
            Err(failure) => panic!("{failure}"),
        }
    }
    println!("{count} seeds: {all:?}");
}

/// Runs seeds with a bug put in, until one of the invariants notices.
fn first_broken(tamper: Tamper) -> &'static str {
    let mut failures = (0..2_000).filter_map(|seed| simulate(seed, tamper, STORY).err());
    failures.next().map_or("nothing", |failure| failure.violation.invariant)
}

#[test]
fn invariants_can_fail() {
    for (tamper, invariant) in [
        (Tamper::AnnouncesBeforeDurable, "a_generation_is_durable_before_it_is_announced"),
        (Tamper::LosesSteps, "the_ledger_is_the_fold_of_the_log"),
        (Tamper::MissesDeadlines, "every_run_finishes"),
        (Tamper::PassesOldNews, "no_stale_report_changes_the_ledger"),
        (Tamper::AddsWrongly, "a_step_has_one_result"),
        (Tamper::LowestStepWins, "no_applied_step_is_lost"),
        (Tamper::KeepsTraining, "a_formed_generation_silences_older_ones"),
    ] {
        assert_eq!(first_broken(tamper), invariant, "with {tamper:?}");
    }
}
