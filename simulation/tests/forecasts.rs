//! What a forecast says, and that it says it again.

use std::time::Duration;

use simulation::{Impossible, Scenario, predict};

/// A day of a few workers; each fails every hour.
fn scenario(seed: u64) -> Scenario {
    Scenario {
        workers: 8,
        lasts: Duration::from_secs(24 * 3_600),
        seed,
        mtbf: Duration::from_secs(3_600),
        repair: Duration::from_secs(60),
        step: Duration::from_secs(1),
        form: Duration::from_millis(500),
        checkpoint_every: 500,
        max_recovery: Duration::from_secs(10),
    }
}

#[test]
fn without_faults_nearly_all_of_the_time_is_in_steps() {
    let calm = Scenario { mtbf: Duration::from_secs(u64::from(u32::MAX) * 3_600), ..scenario(1) };
    let forecast = predict(&calm).unwrap();
    assert_eq!((forecast.faults, forecast.generations, forecast.repeated_steps), (0, 1, 0));
    assert!(forecast.goodput > 0.9995 && forecast.goodput <= 1.0, "{forecast:?}");
    assert!(forecast.throughput_ratio > 0.9995, "{forecast:?}");
}

#[test]
fn runs_get_on_and_keep_every_invariant_under_hundreds_of_faults() {
    for seed in 0..20 {
        let forecast = predict(&scenario(seed)).unwrap();
        assert_eq!(forecast.violations, [], "seed {seed}");
        assert!(forecast.faults > 100, "{forecast:?}");
        assert!(forecast.goodput > 0.9 && forecast.goodput < 0.999, "seed {seed}: {forecast:?}");
        let (median, worst) = forecast.recovery.unwrap();
        assert!(median < Duration::from_secs(3), "seed {seed}: most deaths are seen at once");
        assert!(worst > Duration::from_secs(5), "seed {seed}: hangs and silence are not");
    }
}

#[test]
fn a_seed_says_the_same_again() {
    assert_eq!(predict(&scenario(7)).unwrap(), predict(&scenario(7)).unwrap());
    assert_ne!(predict(&scenario(7)).unwrap(), predict(&scenario(8)).unwrap());
}

#[test]
fn more_faults_cost_more() {
    let often = Scenario { mtbf: Duration::from_secs(600), ..scenario(3) };
    let (seldom, often) = (predict(&scenario(3)).unwrap(), predict(&often).unwrap());
    assert!(often.faults > 3 * seldom.faults && often.goodput < seldom.goodput);
}

#[test]
fn a_scenario_that_cannot_be_is_refused_by_name() {
    let none = predict(&Scenario { workers: 0, ..scenario(0) }).unwrap_err();
    assert_eq!(none.to_string(), "the number of workers must be between 1 and 65536");
    let hasty = Scenario { max_recovery: Duration::from_secs(1), ..scenario(0) };
    assert!(matches!(predict(&hasty), Err(Impossible::Config(_))));
}
