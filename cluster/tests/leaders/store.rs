//! A store that keeps its word: conditional creates of one name have one winner.

use std::collections::BTreeMap;

use cluster::{Claim, Term};

/// One life of one contender.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Life {
    pub(crate) node: usize,
    pub(crate) number: u32,
}

/// What is appended at one place of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) term: Term,
    pub(crate) writer: Life,
    /// No two entries of one writer are equal.
    pub(crate) nonce: u64,
}

/// An object that is created under a condition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Object {
    Claim { term: Term, holder: Life },
    Log { place: u64, entry: Entry },
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Beat {
    count: u64,
    released: bool,
}

#[derive(Debug, Default)]
pub(crate) struct Store {
    claims: BTreeMap<Term, Life>,
    beats: BTreeMap<Term, Beat>,
    pub(crate) log: BTreeMap<u64, Entry>,
    /// The bug that leaves the comparison out, for claims and for the log.
    pub(crate) overwrites: (bool, bool),
}

impl Store {
    pub(crate) fn create(&mut self, object: Object) {
        match object {
            Object::Claim { term, holder } => {
                if self.overwrites.0 || !self.claims.contains_key(&term) {
                    self.claims.insert(term, holder);
                }
            }
            Object::Log { place, entry } => {
                if self.overwrites.1 || !self.log.contains_key(&place) {
                    self.log.insert(place, entry);
                }
            }
        }
    }

    /// Whether an object has the bytes of `object`; nothing if it is not there.
    pub(crate) fn holds(&self, object: Object) -> Option<bool> {
        match object {
            Object::Claim { term, holder } => self.claims.get(&term).map(|&found| found == holder),
            Object::Log { place, entry } => self.log.get(&place).map(|&found| found == entry),
        }
    }

    pub(crate) fn beat(&mut self, term: Term, count: u64, released: bool) {
        self.beats.insert(term, Beat { count, released });
    }

    pub(crate) fn newest(&self, name: impl Fn(Life) -> String) -> Option<Claim> {
        let (&term, &holder) = self.claims.last_key_value()?;
        let Beat { count: beat, released } = self.beats.get(&term).copied().unwrap_or_default();
        Some(Claim { term, holder: name(holder), beat, released })
    }

    /// The newest claim after `term`, if there is one.
    pub(crate) fn newer_than(&self, term: Term) -> Option<Term> {
        self.claims.range(term.next()..).next_back().map(|(&newer, _)| newer)
    }
}
