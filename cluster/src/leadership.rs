//! Who leads a run: a lease in the run's store, whose term fences all leaders before.
//!
//! ```text
//!               nobody leads, or the leader's beat stands still for a whole lease
//!   Watching ----------------------------------------------------> Claiming { term + 1 }
//!      ^                                                            |            |
//!      | another was first                                          |            | created
//!      +------------------------------------------------------------+            v
//!   Deposed <--------------------- a newer term is claimed ------------------ Leading
//! ```
//!
//! The store keeps one claim a term, made by a conditional create: so a term has one holder. Its holder
//! alone writes the beat beside it. No clock of one machine is compared with another's: a contender waits
//! until the beat has stood still for a whole lease by its own clock, which begins after the leader's.
//!
//! **Invariant**: the lease alone makes nobody a leader in the eyes of the log. It says who may try; what
//! is decided is fenced by the conditional append of records, so a leader that wakes up late, or a store
//! that answers late, does no harm.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{Term, Timestamp};

/// The newest claim, as it lies in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// The term that was claimed.
    pub term: Term,
    /// Who claimed it.
    pub holder: String,
    /// Grows as long as the holder lives.
    pub beat: u64,
    /// Whether the holder has laid it down.
    pub released: bool,
}

/// One contender's or leader's view. See [`Leadership::due`] and [`Leadership::handle`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leadership {
    holder: String,
    lease: Duration,
    state: State,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    /// Somebody leads, or may.
    Watching {
        /// The newest claim, and since when it has not changed.
        seen: Option<(Claim, Timestamp)>,
        /// When to look next.
        look_at: Timestamp,
    },
    /// It has asked for a term and does not know the answer.
    Claiming {
        term: Term,
        /// When to ask again.
        ask_at: Timestamp,
    },
    Leading {
        term: Term,
        beat: u64,
        /// Before it last looked, and nobody had claimed a newer term.
        looked: Option<Timestamp>,
        renew_at: Timestamp,
    },
    Deposed {
        by: Term,
    },
}

/// What the host has to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Due {
    /// Nothing before this moment.
    Wait(Timestamp),
    /// Find the newest claim and its beat, then say [`Found::Newest`].
    Look,
    /// Create the claim of this term if nobody has, then say [`Found::Claimed`].
    Claim(Term),
    /// Write the beat, **then** look for a newer claim; say [`Found::Renewed`] if there is none, else
    /// [`Found::Superseded`].
    Renew {
        /// Whose beat.
        term: Term,
        /// The beat.
        beat: u64,
    },
    /// Nothing more: it has been replaced.
    Stop {
        /// By the leader of this term, or a newer one.
        by: Term,
    },
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// The newest claim, if any.
    Newest(Option<Claim>),
    /// Whether the claim of this term is this holder's.
    Claimed {
        /// Which.
        term: Term,
        /// Whether its bytes are this holder's own.
        ours: bool,
    },
    /// The beat is written, and nobody had claimed a newer term after that.
    Renewed {
        /// The moment before the first request was sent.
        began: Timestamp,
    },
    /// Somebody has claimed a newer term, or has written under one.
    Superseded {
        /// The term.
        by: Term,
    },
    /// The store did not say.
    Unknown,
}

impl Leadership {
    /// A contender called `holder`. A leader that does not renew for `lease` is replaced.
    ///
    /// Who claims under the name of the last holder says that that one is dead: it need not wait.
    #[must_use]
    pub fn new(now: Timestamp, holder: &str, lease: Duration) -> Self {
        let state = State::Watching { seen: None, look_at: now };
        Self { holder: holder.to_owned(), lease, state }
    }

    /// What to do now.
    #[must_use]
    pub fn due(&self, now: Timestamp) -> Due {
        match &self.state {
            State::Watching { look_at, .. } if now < *look_at => Due::Wait(*look_at),
            State::Watching { .. } => Due::Look,
            State::Claiming { ask_at, .. } if now < *ask_at => Due::Wait(*ask_at),
            State::Claiming { term, .. } => Due::Claim(*term),
            State::Leading { renew_at, .. } if now < *renew_at => Due::Wait(*renew_at),
            State::Leading { term, beat, .. } => Due::Renew { term: *term, beat: *beat },
            State::Deposed { by } => Due::Stop { by: *by },
        }
    }

    /// Takes in what came of it.
    pub fn handle(&mut self, now: Timestamp, found: Found) {
        match (&mut self.state, found) {
            (State::Deposed { .. }, _) => {}
            (State::Leading { term, .. }, Found::Superseded { by }) => {
                if by > *term {
                    self.state = State::Deposed { by };
                }
            }
            (_, Found::Superseded { .. }) => self.watch(now),
            (State::Watching { .. }, Found::Newest(newest)) => self.looked(now, newest),
            (State::Claiming { term, .. }, Found::Claimed { term: of, ours }) if *term == of => {
                if ours {
                    // Assured by its first beat only: the claim may be older than this answer.
                    let (term, beat) = (*term, 1);
                    self.state = State::Leading { term, beat, looked: None, renew_at: now };
                } else {
                    self.watch(now);
                }
            }
            (State::Leading { beat, looked, renew_at, .. }, Found::Renewed { began }) => {
                *beat += 1;
                *looked = (*looked).max(Some(began));
                *renew_at = now + self.lease / 4;
            }
            (State::Watching { look_at, .. }, Found::Unknown) => *look_at = now + self.lease / 12,
            (State::Claiming { ask_at, .. }, Found::Unknown) => *ask_at = now + self.lease / 12,
            (State::Leading { renew_at, .. }, Found::Unknown) => *renew_at = now + self.lease / 12,
            // Answers to what is no longer asked.
            (State::Watching { .. }, Found::Claimed { .. } | Found::Renewed { .. })
            | (
                State::Claiming { .. },
                Found::Newest(_) | Found::Claimed { .. } | Found::Renewed { .. },
            )
            | (State::Leading { .. }, Found::Newest(_) | Found::Claimed { .. }) => {}
        }
    }

    fn looked(&mut self, now: Timestamp, newest: Option<Claim>) {
        let State::Watching { seen, look_at } = &mut self.state else { return };
        let Some(newest) = newest else {
            self.state = State::Claiming { term: Term(1), ask_at: now };
            return;
        };
        let is_news = seen.as_ref().is_none_or(|(claim, _)| *claim != newest);
        if is_news {
            *seen = Some((newest.clone(), now));
        }
        let since = seen.as_ref().map_or(now, |(_, since)| *since);
        *look_at = now + self.lease / 12;
        // Its predecessor was ended by whoever started this one under the same name.
        let is_free = newest.released || newest.holder == self.holder;
        if is_free || since + self.lease <= now {
            self.state = State::Claiming { term: newest.term.next(), ask_at: now };
        }
    }

    fn watch(&mut self, now: Timestamp) {
        self.state = State::Watching { seen: None, look_at: now };
    }

    /// The term that is led, if any.
    #[must_use]
    pub fn term(&self) -> Option<Term> {
        match &self.state {
            State::Leading { term, .. } => Some(*term),
            State::Watching { .. } | State::Claiming { .. } | State::Deposed { .. } => None,
        }
    }

    /// Until when the last look for a newer leader counts, three quarters of a lease. After that a leader
    /// looks again before it says or decides anything: it may have slept.
    #[must_use]
    pub fn assured_until(&self) -> Option<Timestamp> {
        match &self.state {
            State::Leading { looked, .. } => looked.map(|began| began + self.lease * 3 / 4),
            State::Watching { .. } | State::Claiming { .. } | State::Deposed { .. } => None,
        }
    }

    /// Who leads, if somebody else was seen to.
    #[must_use]
    pub fn other(&self) -> Option<&Claim> {
        match &self.state {
            State::Watching { seen: Some((claim, _)), .. } => Some(claim),
            State::Watching { seen: None, .. }
            | State::Claiming { .. }
            | State::Leading { .. }
            | State::Deposed { .. } => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: Duration = Duration::from_secs(3);

    fn at(ms: u64) -> Timestamp {
        Timestamp(10_000 + ms)
    }

    fn claim(holder: &str, term: u64, beat: u64) -> Claim {
        Claim { term: Term(term), holder: holder.to_owned(), beat, released: false }
    }

    fn watching(holder: &str) -> Leadership {
        Leadership::new(at(0), holder, LEASE)
    }

    fn leading() -> Leadership {
        let mut lead = watching("a");
        lead.handle(at(0), Found::Newest(None));
        lead.handle(at(10), Found::Claimed { term: Term(1), ours: true });
        lead
    }

    #[test]
    fn a_run_that_nobody_leads_is_claimed_at_once() {
        let mut lead = watching("a");
        assert_eq!(lead.due(at(0)), Due::Look);
        lead.handle(at(5), Found::Newest(None));
        assert_eq!(lead.due(at(5)), Due::Claim(Term(1)));
        assert_eq!(lead.term(), None);
    }

    #[test]
    fn a_leader_whose_beat_stands_still_for_a_lease_is_replaced_and_not_before() {
        let mut lead = watching("b");
        for ms in [0, 1_000, 2_999] {
            lead.handle(at(ms), Found::Newest(Some(claim("a", 4, 7))));
            assert!(matches!(lead.due(at(ms)), Due::Wait(_)), "after {ms} ms");
        }
        lead.handle(at(3_000), Found::Newest(Some(claim("a", 4, 7))));
        assert_eq!(lead.due(at(3_000)), Due::Claim(Term(5)));
    }

    #[test]
    fn a_beat_that_moves_begins_the_wait_anew() {
        let mut lead = watching("b");
        lead.handle(at(0), Found::Newest(Some(claim("a", 4, 7))));
        lead.handle(at(2_900), Found::Newest(Some(claim("a", 4, 8))));
        lead.handle(at(5_000), Found::Newest(Some(claim("a", 4, 8))));
        assert!(matches!(lead.due(at(5_000)), Due::Wait(_)));
        lead.handle(at(5_900), Found::Newest(Some(claim("a", 4, 8))));
        assert_eq!(lead.due(at(5_900)), Due::Claim(Term(5)));
    }

    #[test]
    fn a_lease_that_was_laid_down_or_was_its_predecessors_is_taken_at_once() {
        for free in [claim("b", 4, 7), Claim { released: true, ..claim("a", 4, 7) }] {
            let mut lead = watching("b");
            lead.handle(at(0), Found::Newest(Some(free)));
            assert_eq!(lead.due(at(0)), Due::Claim(Term(5)));
        }
    }

    #[test]
    fn who_is_not_the_first_to_claim_goes_on_watching() {
        let mut lead = watching("b");
        lead.handle(at(0), Found::Newest(None));
        lead.handle(at(9), Found::Claimed { term: Term(1), ours: false });
        assert_eq!((lead.term(), lead.due(at(9))), (None, Due::Look));
    }

    #[test]
    fn a_claim_whose_answer_is_lost_is_asked_for_again() {
        let mut lead = watching("a");
        lead.handle(at(0), Found::Newest(None));
        lead.handle(at(9), Found::Unknown);
        assert!(matches!(lead.due(at(9)), Due::Wait(_)));
        assert_eq!(lead.due(at(9) + LEASE), Due::Claim(Term(1)));
    }

    #[test]
    fn a_leader_renews_four_times_a_lease_and_is_assured_from_when_it_began() {
        let mut lead = leading();
        assert_eq!(lead.due(at(10)), Due::Renew { term: Term(1), beat: 1 });
        assert_eq!(lead.assured_until(), None);
        lead.handle(at(900), Found::Renewed { began: at(100) });
        assert_eq!(lead.assured_until(), Some(at(2_350)));
        assert_eq!(lead.due(at(900)), Due::Wait(at(1_650)));
        assert_eq!(lead.due(at(1_650)), Due::Renew { term: Term(1), beat: 2 });
    }

    #[test]
    fn a_leader_that_was_replaced_stops_for_good() {
        let mut lead = leading();
        lead.handle(at(20), Found::Superseded { by: Term(1) });
        assert_eq!(lead.term(), Some(Term(1)), "its own term replaces nobody");
        lead.handle(at(20), Found::Superseded { by: Term(2) });
        lead.handle(at(30), Found::Renewed { began: at(25) });
        assert_eq!((lead.term(), lead.assured_until()), (None, None));
        assert_eq!(lead.due(at(30)), Due::Stop { by: Term(2) });
    }
}
