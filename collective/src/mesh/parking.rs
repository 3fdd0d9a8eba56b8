//! Where authenticated connections wait for the formation that wants them.
//!
//! A process forms one generation at a time and never goes back to an older one. A connection for a
//! newer generation than the process knows waits for it in its handshake thread, since only the
//! formation brings the secret; so what is parked is always authenticated and at most one a rank.

use std::{
    cmp::Ordering,
    collections::BTreeMap,
    net::{SocketAddr, TcpStream},
    sync::{Condvar, Mutex, MutexGuard},
    time::Instant,
};

use cluster::{Generation, Rank, Term};

use super::{
    Group,
    forming::{FormError, MissingPeer, RefusedPeer},
    handshake::Secret,
    message::{Hello, Refusal},
    socket::Patience,
};
use crate::AbortHandle;

/// Refused connections that a formation remembers for its report.
const REFUSALS_KEPT: usize = 16;

/// Orders generations across terms.
type Age = (Term, Generation);

#[derive(Debug, Default)]
pub(super) struct Parking {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    formation: Option<Formation>,
    /// Handshakes under way.
    guests: usize,
}

#[derive(Debug)]
struct Formation {
    group: Group,
    phase: Phase,
}

#[derive(Debug)]
enum Phase {
    /// Connections are parked until all are there.
    Gathering(Gathering),
    /// The mesh was handed out: this generation takes no more connections.
    Formed,
    /// It failed, and may be begun again.
    GivenUp,
}

#[derive(Debug, Default)]
struct Gathering {
    parked: BTreeMap<Rank, TcpStream>,
    /// By rank, why the last attempt to dial it failed.
    problems: BTreeMap<Rank, String>,
    /// What ends the formation before its deadline.
    rejection: Option<FormError>,
    refused: Vec<RefusedPeer>,
}

impl Parking {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics under this lock")
    }

    /// Wakes all who wait, so that they look at their deadlines and abort handles.
    pub(super) fn wake(&self) {
        let _state = self.lock(); // A waiter is now either before its check or in its wait.
        self.changed.notify_all();
    }

    /// Counts a handshake in, unless there are `limit` already.
    pub(super) fn enter(&self, limit: usize) -> bool {
        let mut state = self.lock();
        let free = state.guests < limit;
        state.guests += usize::from(free);
        free
    }

    pub(super) fn leave(&self) {
        self.lock().guests -= 1;
    }

    /// Makes `group` the one that connections are taken for.
    pub(super) fn begin(&self, group: &Group) -> Result<(), FormError> {
        let mut state = self.lock();
        if let Some(held) = &state.formation {
            let again = matches!(held.phase, Phase::GivenUp) && age(&held.group) == age(group);
            if age(&held.group) >= age(group) && !again {
                return Err(stale(&held.group, group));
            }
        }
        let phase = Phase::Gathering(Gathering::default());
        state.formation = Some(Formation { group: group.clone(), phase });
        self.changed.notify_all();
        Ok(())
    }

    /// The secret for a dialer's generation; waits for it if that generation is yet to come.
    pub(super) fn secret_for(
        &self,
        hello: &Hello,
        patience: Patience<'_>,
    ) -> Result<Secret, Refusal> {
        let mut state = self.lock();
        loop {
            if let Some(formation) = &state.formation
                && let Some(verdict) = formation.judge(hello)
            {
                return verdict.map(|()| formation.group.secret.clone());
            }
            let left = patience.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || patience.abort.is_aborted() {
                return Err(Refusal::NotYet);
            }
            let waited = self.changed.wait_timeout(state, left);
            (state, _) = waited.expect("nothing panics under this lock");
        }
    }

    /// Parks a connection from or to `rank`; one that was parked before is replaced, since its other
    /// end has given it up.
    ///
    /// `false` if the formation it was for is over.
    pub(super) fn park(&self, age_wanted: Age, rank: Rank, stream: TcpStream) -> bool {
        let mut state = self.lock();
        let Some(gathering) = state.gathering(age_wanted) else { return false };
        gathering.parked.insert(rank, stream);
        self.changed.notify_all();
        true
    }

    /// Remembers why dialling `rank` failed this time.
    pub(super) fn note_problem(&self, age_wanted: Age, rank: Rank, problem: String) {
        if let Some(gathering) = self.lock().gathering(age_wanted) {
            gathering.problems.insert(rank, problem);
        }
    }

    /// Ends a formation with `error`.
    pub(super) fn reject(&self, age_wanted: Age, error: FormError) {
        if let Some(gathering) = self.lock().gathering(age_wanted) {
            gathering.rejection.get_or_insert(error);
            self.changed.notify_all();
        }
    }

    /// Remembers a dialer that was not let in, for the report of the formation that lacks it.
    pub(super) fn note_refusal(&self, address: SocketAddr, rank: Option<Rank>, refusal: &Refusal) {
        if let Some(Formation { phase: Phase::Gathering(gathering), .. }) =
            &mut self.lock().formation
            && gathering.refused.len() < REFUSALS_KEPT
        {
            gathering.refused.push(RefusedPeer { address, rank, refusal: refusal.clone() });
        }
    }

    /// Waits until every peer of `group` is parked and takes them, by rank.
    pub(super) fn collect(
        &self,
        group: &Group,
        deadline: Instant,
        abort: &AbortHandle,
    ) -> Result<Vec<Option<TcpStream>>, FormError> {
        let started = Instant::now();
        let mut state = self.lock();
        loop {
            let formation = state.formation.as_mut().expect("it was begun, and is only replaced");
            if age(&formation.group) != age(group) {
                return Err(stale(&formation.group, group));
            }
            let Phase::Gathering(gathering) = &mut formation.phase else {
                unreachable!("no other call forms the same generation")
            };
            let left = deadline.saturating_duration_since(Instant::now());
            let failure = if abort.is_aborted() {
                Some(FormError::Aborted)
            } else if let Some(error) = gathering.rejection.take() {
                Some(error)
            } else if gathering.parked.len() + 1 == group.addresses.len() {
                let peers = (0..group.size()).map(|rank| gathering.parked.remove(&Rank(rank)));
                let peers = peers.collect();
                formation.phase = Phase::Formed;
                return Ok(peers);
            } else if left.is_zero() {
                let missing = gathering.missing(group);
                let refused = std::mem::take(&mut gathering.refused);
                Some(FormError::Deadline { waited: started.elapsed(), missing, refused })
            } else {
                None
            };
            if let Some(failure) = failure {
                formation.phase = Phase::GivenUp; // Closes what is parked, for its peers to see.
                return Err(failure);
            }
            let waited = self.changed.wait_timeout(state, left);
            (state, _) = waited.expect("nothing panics under this lock");
        }
    }
}

impl State {
    /// What has come together so far for the generation of this age, while it is being formed.
    fn gathering(&mut self, wanted: Age) -> Option<&mut Gathering> {
        match &mut self.formation {
            Some(Formation { group, phase: Phase::Gathering(gathering) })
                if age(group) == wanted =>
            {
                Some(gathering)
            }
            Some(_) | None => None,
        }
    }
}

impl Formation {
    /// Whether a dialer is one of this group; nothing if that is yet to be seen.
    fn judge(&self, hello: &Hello) -> Option<Result<(), Refusal>> {
        let group = &self.group;
        if hello.run != group.run {
            let (dialer, acceptor) = (hello.run.clone(), group.run.clone());
            return Some(Err(Refusal::WrongRun { dialer, acceptor }));
        }
        let Group { term, generation, rank, .. } = *group;
        let fits = hello.to == rank
            && hello.size == group.size()
            && (rank.0 + 1..group.size()).contains(&hello.from.0);
        match ((hello.term, hello.generation).cmp(&(term, generation)), &self.phase) {
            (Ordering::Greater, _) | (Ordering::Equal, Phase::GivenUp) => None,
            (Ordering::Less, _) => Some(Err(Refusal::StaleGeneration { term, generation })),
            (Ordering::Equal, Phase::Formed) => Some(Err(Refusal::AlreadyFormed)),
            (Ordering::Equal, Phase::Gathering(_)) if fits => Some(Ok(())),
            (Ordering::Equal, Phase::Gathering(_)) => {
                Some(Err(Refusal::WrongPlace { rank, size: group.size() }))
            }
        }
    }
}

impl Gathering {
    fn missing(&self, group: &Group) -> Vec<MissingPeer> {
        (0..)
            .map(Rank)
            .zip(&group.addresses)
            .filter(|(rank, _)| *rank != group.rank && !self.parked.contains_key(rank))
            .map(|(rank, &address)| {
                let dialled = rank < group.rank;
                let silent = if dialled { "it cannot be reached" } else { "it has not dialled" };
                let problem = self.problems.get(&rank).cloned();
                MissingPeer { rank, address, problem: problem.unwrap_or_else(|| silent.to_owned()) }
            })
            .collect()
    }
}

pub(super) fn age(group: &Group) -> Age {
    (group.term, group.generation)
}

fn stale(newest: &Group, group: &Group) -> FormError {
    FormError::Stale {
        term: group.term,
        generation: group.generation,
        newest_term: newest.term,
        newest_generation: newest.generation,
    }
}
