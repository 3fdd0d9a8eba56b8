//! Two or three coordinators fight for a run over a store that delays, repeats and loses what is said to
//! it, while they are stopped, killed and started: the log never holds a word of two leaders at once.
//!
//! `PERCHERON_SIM_SEED=n` replays one seed, `PERCHERON_SIM_SEEDS=n` runs that many, from
//! `PERCHERON_SIM_FIRST=n` on. Real are the rules of the lease and of the workers; the store, the network
//! and the host's order of deeds (claim, read the log, append its term, then decide) are made up.

#[path = "../simulation/chance.rs"]
#[expect(dead_code, reason = "the other simulation uses more of it")]
mod chance;
mod store;
mod world;

use world::{Tamper, simulate};

/// Seeds of an ordinary test run: some seconds on one core.
const SEEDS: u64 = if cfg!(debug_assertions) { 1_000 } else { 20_000 };

#[expect(clippy::disallowed_methods, reason = "a person chooses the seeds; the rules stay pure")]
fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect("it must be a whole number"))
}

#[test]
fn two_leaders_never_both_commit() {
    let first = setting("PERCHERON_SIM_FIRST").unwrap_or(0);
    let seeds = match setting("PERCHERON_SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => first..first + setting("PERCHERON_SIM_SEEDS").unwrap_or(SEEDS),
    };
    let count = seeds.end - seeds.start;
    let (mut records, mut terms, mut fenced) = (0, 0, 0);
    for seed in seeds {
        let summary = simulate(seed, Tamper::Nothing).unwrap_or_else(|failure| panic!("{failure}"));
        records += summary.records;
        terms += summary.terms;
        fenced += summary.fenced;
    }
    println!("{count} seeds: {records} records, {terms} terms, {fenced} leaders fenced by the log");
    assert!(count < 1_000 || fenced > 0, "no leader was ever too late: nothing was tested");
}

#[test]
fn each_compare_is_needed() {
    for (tamper, invariant) in [
        (Tamper::ClaimsWithoutCompare, "a_term_has_one_leader"),
        (Tamper::AppendsWithoutCompare, "what_took_effect_stays"),
        (Tamper::FreesNames, "what_took_effect_stays"),
    ] {
        let mut failures = (0..5_000).filter_map(|seed| simulate(seed, tamper).err());
        let broken = failures.next().map(|failure| failure.invariant);
        assert_eq!(broken, Some(invariant), "with {tamper:?}");
    }
}
