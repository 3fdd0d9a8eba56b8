//! The words of the system as types: a value of one cannot be passed for another.
//!
//! All of them print as the bare number, so a log field reads `generation=3`.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! counter {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(
            Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
        )]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl $name {
            /// The one after this.
            #[must_use]
            pub fn next(self) -> Self {
                Self(self.0 + 1)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

counter! {
    /// One coordinator's leadership. Grows at each start or takeover and fences the ones before.
    Term(u64)
}
counter! {
    /// Version of the membership. Grows at each change; made durable before it is announced.
    Generation(u64)
}
counter! {
    /// Optimizer updates applied: step `n` is the state after `n` updates, `0` the initial state.
    Step(u64)
}
counter! {
    /// A pass over the data, counted from 0.
    Epoch(u64)
}
counter! {
    /// A worker's place in a generation, `0..N`.
    Rank(u32)
}
counter! {
    /// A fixed place in the global batch, `0..V`. `V` never changes in a run.
    VirtualRank(u32)
}

/// One life of a training process: drawn at random when it starts, never used again.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct WorkerId(pub u64);

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// The name of a run: lower-case letters, digits, `-`, `_` and `.`, at most 64, a letter or digit first.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RunId(String);

/// A run name that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "run name {0:?} is not usable: take 1 to 64 of a-z, 0-9, '-', '_', '.', a letter or digit first"
)]
pub struct InvalidRunId(pub String);

impl RunId {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for RunId {
    type Error = InvalidRunId;

    fn try_from(name: String) -> Result<Self, InvalidRunId> {
        let plain = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
        let bytes = name.as_bytes();
        let usable = (1..=64).contains(&bytes.len())
            && plain(bytes[0])
            && bytes.iter().all(|&c| plain(c) || b"-_.".contains(&c));
        if usable { Ok(Self(name)) } else { Err(InvalidRunId(name)) }
    }
}

impl From<RunId> for String {
    fn from(run: RunId) -> Self {
        run.0
    }
}

impl fmt::Display for RunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_name_is_safe_as_a_folder_and_an_object_key() {
        for name in ["digits", "a", "run-2026.11_24", &"x".repeat(64)] {
            assert_eq!(RunId::try_from(name.to_owned()).unwrap().as_str(), name);
        }
        for name in ["", "-a", "..", "a/b", "A", "a b", &"x".repeat(65)] {
            assert!(RunId::try_from(name.to_owned()).is_err(), "{name:?} was taken");
        }
    }
}
