//! What can change the bits of a result, and how two of them differ.

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};

/// Named facts about a worker that can change bits: torch version, device model, CPU capability,
/// intra-op threads, precision, determinism switches. Workers of a run must agree on all.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Fingerprint(pub BTreeMap<String, String>);

/// A worker whose arithmetic may differ from the run's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct FingerprintMismatch {
    /// Fact, the run's value, the worker's value.
    pub differences: Vec<(String, String, String)>,
}

impl Fingerprint {
    /// Checks a newcomer's fingerprint against the run's (`self`).
    ///
    /// # Errors
    /// [`FingerprintMismatch`] with each fact that differs.
    pub fn admits(&self, other: &Self) -> Result<(), FingerprintMismatch> {
        let shown = |facts: &Self, fact: &String| {
            facts.0.get(fact).cloned().unwrap_or_else(|| "nothing".to_owned())
        };
        let facts: std::collections::BTreeSet<_> = self.0.keys().chain(other.0.keys()).collect();
        let differences: Vec<_> = facts
            .into_iter()
            .filter(|fact| self.0.get(*fact) != other.0.get(*fact))
            .map(|fact| (fact.clone(), shown(self, fact), shown(other, fact)))
            .collect();
        if differences.is_empty() { Ok(()) } else { Err(FingerprintMismatch { differences }) }
    }
}

impl fmt::Display for FingerprintMismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("this worker would compute other bits than the run: ")?;
        for (i, (fact, run, worker)) in self.differences.iter().enumerate() {
            let comma = if i == 0 { "" } else { ", " };
            write!(f, "{comma}{fact} is {worker:?} here and {run:?} in the run")?;
        }
        f.write_str("; start it where these agree, or start a new run")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_names_each_difference() {
        let facts = |pairs: &[(&str, &str)]| {
            Fingerprint(pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect())
        };
        let run = facts(&[("threads", "1"), ("torch", "2.11.0")]);
        assert_eq!(run.admits(&run.clone()), Ok(()));
        let refusal = run.admits(&facts(&[("threads", "2"), ("torch", "2.11.0")])).unwrap_err();
        assert_eq!(
            refusal.to_string(),
            "this worker would compute other bits than the run: threads is \"2\" here and \"1\" in \
             the run; start it where these agree, or start a new run"
        );
        assert!(run.admits(&facts(&[("torch", "2.11.0")])).is_err());
    }
}
