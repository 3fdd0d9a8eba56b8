//! What a comparison found.

use std::panic::{AssertUnwindSafe, catch_unwind};

use serde_json::Value;

/// One kind of comparison over many cases: the worst error, and where it was.
#[derive(Debug)]
pub(crate) struct Check {
    pub(crate) what: String,
    /// The largest error that passes; in the error's own unit.
    pub(crate) tolerance: f64,
    pub(crate) cases: usize,
    pub(crate) failed: usize,
    pub(crate) worst: f64,
    pub(crate) place: String,
}

impl Check {
    pub(crate) fn new(what: impl Into<String>, tolerance: f64) -> Check {
        let what = what.into();
        Check { what, tolerance, cases: 0, failed: 0, worst: 0.0, place: String::new() }
    }

    /// A check whose errors are in units of their own tolerances.
    pub(crate) fn in_tolerances(what: impl Into<String>) -> Check {
        Check::new(what, 1.0)
    }

    /// A comparison that could not be made.
    fn impossible(what: impl Into<String>, why: String) -> Check {
        let mut check = Check::new(what, 0.0);
        check.see(f64::INFINITY, || why);
        check
    }

    /// Takes one case's error; NaN counts as the worst there is.
    pub(crate) fn see(&mut self, error: f64, place: impl FnOnce() -> String) {
        let error = if error.is_nan() { f64::INFINITY } else { error };
        self.cases += 1;
        if error > self.tolerance {
            self.failed += 1;
        }
        if error > self.worst {
            self.worst = error;
            self.place = place();
        }
    }

    /// Takes one case that is right or wrong.
    pub(crate) fn must(&mut self, holds: bool, place: impl FnOnce() -> String) {
        self.see(if holds { 0.0 } else { f64::INFINITY }, place);
    }

    /// The worst error in units of the tolerance.
    fn strain(&self) -> f64 {
        if self.worst == 0.0 { 0.0 } else { self.worst / self.tolerance }
    }
}

impl std::fmt::Display for Check {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Check { what, tolerance, cases, failed, worst, place } = self;
        let verdict = if *failed == 0 { "pass" } else { "FAIL" };
        let place = if place.is_empty() { String::new() } else { format!(" ({place})") };
        write!(
            f,
            "{verdict}  {what}: {cases} cases, worst {worst:.2e}{place}, tolerance {tolerance:.0e}"
        )?;
        if *failed > 0 { write!(f, ", {failed} failed") } else { Ok(()) }
    }
}

/// All checks of one file. There is at least one.
#[derive(Debug)]
pub(crate) struct FileReport {
    pub(crate) checks: Vec<Check>,
}

impl FileReport {
    /// Runs the examiner of a file. A broken file and one without cases fail.
    pub(crate) fn of(name: &str, examiner: impl FnOnce() -> Vec<Check>) -> FileReport {
        let mut checks = guarded(name, examiner);
        if checks.iter().all(|check| check.cases == 0) {
            checks.push(Check::impossible(name, "the file holds nothing to compare".to_owned()));
        }
        FileReport { checks }
    }

    pub(crate) fn cases(&self) -> usize {
        self.checks.iter().map(|check| check.cases).sum()
    }

    pub(crate) fn failed(&self) -> usize {
        self.checks.iter().map(|check| check.failed).sum()
    }

    /// The check that came closest to its tolerance, or furthest above it.
    pub(crate) fn tightest(&self) -> &Check {
        let tightest = self.checks.iter().max_by(|a, b| a.strain().total_cmp(&b.strain()));
        tightest.expect("a report has checks")
    }
}

/// Examines each case by itself, so that one that cannot be built does not hide the others.
pub(crate) fn for_each_case(
    cases: &[Value],
    mut examine: impl FnMut(&Value) -> Vec<Check>,
) -> Vec<Check> {
    let name = |case: &Value| {
        let text = |key: &str| case[key].as_str().unwrap_or_default().to_owned();
        format!("{} {}", text("model"), text("off")).trim().to_owned()
    };
    cases.iter().flat_map(|case| guarded(&name(case), || examine(case))).collect()
}

/// A panic, which is what a broken file or an unknown model ends in, becomes a failed check.
fn guarded(what: &str, examine: impl FnOnce() -> Vec<Check>) -> Vec<Check> {
    catch_unwind(AssertUnwindSafe(examine)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        let why = text.unwrap_or_else(|| "the comparison ended in a panic".to_owned());
        vec![Check::impossible(what, why)]
    })
}
