//! Many short lives of a run, each from one seed: the real machines over a made-up world.
//!
//! `PERCHERON_SIM_SEED=n` replays one seed, `PERCHERON_SIM_SEEDS=n` runs that many.

mod chance;
mod host;
mod invariants;
mod network;
mod office;
mod plan;
mod trainer;
mod world;

use world::{Summary, Tamper, simulate};

/// Seeds of an ordinary test run.
const SEEDS: u64 = 1_500;

#[expect(clippy::disallowed_methods, reason = "a person chooses the seeds; the rules stay pure")]
fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect("it must be a whole number"))
}

#[test]
fn runs_keep_every_invariant_whatever_goes_wrong() {
    let seeds = match setting("PERCHERON_SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..setting("PERCHERON_SIM_SEEDS").unwrap_or(SEEDS),
    };
    let count = seeds.end - seeds.start;
    let mut all = Summary::default();
    for seed in seeds {
        match simulate(seed, Tamper::Nothing) {
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
    let mut failures = (0..200).filter_map(|seed| simulate(seed, tamper).err());
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

#[test]
#[ignore]
fn survey() {
    let mut by = std::collections::BTreeMap::<&str, Vec<u64>>::new();
    let mut slow = Vec::new();
    for seed in 0..setting("PERCHERON_SIM_SEEDS").unwrap_or(SEEDS) {
        match simulate(seed, Tamper::Nothing) {
            Err(failure) => by.entry(failure.violation.invariant).or_default().push(seed),
            Ok(one) => slow.push((one.settled_ms, seed)),
        }
    }
    slow.sort();
    let n = slow.len();
    for q in [50, 90, 99, 999] {
        let i = if q == 999 { n * 999 / 1000 } else { n * q / 100 };
        println!("p{q} {:?}", slow[i]);
    }
    println!("{:?}", &slow[n - 12..]);
    for (name, seeds) in by {
        println!("{name}: {} {:?}", seeds.len(), &seeds[..seeds.len().min(8)]);
    }
}
