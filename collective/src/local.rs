//! In-process ranks: each is moved to a thread of its own. For tests and simulations.

use std::{
    collections::VecDeque,
    fmt, io,
    sync::{Arc, Condvar, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use cluster::Rank;

use crate::{
    AbortHandle, Exchange, ExchangeError, ProtocolFault, RankList, abort::Waker, take_own_message,
};

/// One rank of a [`group`].
pub struct LocalRank {
    rank: Rank,
    hub: Arc<Hub>,
    stall_timeout: Duration,
    abort: AbortHandle,
    failure: Option<ExchangeError>,
    /// Held so that an abort can reach a thread that waits in the hub.
    _waker: Waker,
}

struct Hub {
    size: usize,
    mail: Mutex<Mail>,
    changed: Condvar,
}

struct Mail {
    /// Messages under way, by `from * size + to`.
    queues: Vec<VecDeque<Vec<u8>>>,
    gone: Vec<bool>,
}

/// Makes `size` connected ranks, in order.
///
/// # Errors
/// If the process is out of file descriptors (each abort handle has two).
pub fn group(size: u32, stall_timeout: Duration) -> io::Result<Vec<LocalRank>> {
    let ranks = size as usize;
    let mail = Mail { queues: vec![VecDeque::new(); ranks * ranks], gone: vec![false; ranks] };
    let hub = Arc::new(Hub { size: ranks, mail: Mutex::new(mail), changed: Condvar::new() });
    (0..size)
        .map(|rank| {
            let abort = AbortHandle::new()?;
            let woken = Arc::clone(&hub);
            let waker: Waker = Arc::new(move || {
                let _mail = woken.lock(); // A waiter is now either before its check or in its wait.
                woken.changed.notify_all();
            });
            abort.wake_at_abort(&waker);
            let hub = Arc::clone(&hub);
            Ok(LocalRank {
                rank: Rank(rank),
                hub,
                stall_timeout,
                abort,
                failure: None,
                _waker: waker,
            })
        })
        .collect()
}

impl Hub {
    fn lock(&self) -> MutexGuard<'_, Mail> {
        self.mail.lock().expect("nothing panics under this lock")
    }

    fn post(&self, from: usize, outgoing: &[&[u8]]) {
        let mut mail = self.lock();
        for (to, message) in outgoing.iter().enumerate().filter(|&(to, _)| to != from) {
            mail.queues[from * self.size + to].push_back(message.to_vec());
        }
        self.changed.notify_all();
    }
}

impl LocalRank {
    fn deliver(&self, from: usize, message: &[u8], room: &mut [u8]) -> Result<(), ExchangeError> {
        if message.len() != room.len() {
            let (expected, found) = (room.len() as u64, message.len() as u64);
            let fault = ProtocolFault::Length { expected, found };
            return Err(ExchangeError::Protocol { rank: rank(from), fault });
        }
        room.copy_from_slice(message);
        Ok(())
    }

    fn receive(&self, incoming: &mut [&mut [u8]]) -> Result<(), ExchangeError> {
        let me = self.rank.0 as usize;
        let mut waiting: Vec<usize> = (0..self.hub.size).filter(|&from| from != me).collect();
        let mut moved = Instant::now();
        let mut mail = self.hub.lock();
        loop {
            if self.abort.is_aborted() {
                return Err(ExchangeError::Aborted);
            }
            let mut still = Vec::with_capacity(waiting.len());
            for from in waiting {
                if let Some(message) = mail.queues[from * self.hub.size + me].pop_front() {
                    self.deliver(from, &message, incoming[from])?;
                    moved = Instant::now();
                } else if mail.gone[from] {
                    let reason = "it left the group".to_owned();
                    return Err(ExchangeError::PeerLost { rank: rank(from), reason });
                } else {
                    still.push(from);
                }
            }
            waiting = still;
            if waiting.is_empty() {
                return Ok(());
            }
            let left = self.stall_timeout.saturating_sub(moved.elapsed());
            if left.is_zero() {
                let ranks = RankList(waiting.into_iter().map(rank).collect());
                return Err(ExchangeError::TimedOut { ranks, after: self.stall_timeout });
            }
            let waited = self.hub.changed.wait_timeout(mail, left);
            (mail, _) = waited.expect("nothing panics under this lock");
        }
    }
}

impl Exchange for LocalRank {
    fn rank(&self) -> Rank {
        self.rank
    }

    fn size(&self) -> u32 {
        rank(self.hub.size).0
    }

    fn all_to_all(
        &mut self,
        outgoing: &[&[u8]],
        incoming: &mut [&mut [u8]],
    ) -> Result<(), ExchangeError> {
        take_own_message(self.rank, self.size(), outgoing, incoming);
        if let Some(failure) = &self.failure {
            return Err(failure.clone());
        }
        self.hub.post(self.rank.0 as usize, outgoing);
        let result = self.receive(incoming);
        self.failure = result.clone().err();
        result
    }

    fn abort_handle(&self) -> AbortHandle {
        self.abort.clone()
    }
}

impl Drop for LocalRank {
    fn drop(&mut self) {
        self.hub.lock().gone[self.rank.0 as usize] = true;
        self.hub.changed.notify_all();
    }
}

impl fmt::Debug for LocalRank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalRank")
            .field("rank", &self.rank)
            .field("size", &self.hub.size)
            .field("failure", &self.failure)
            .finish_non_exhaustive()
    }
}

fn rank(index: usize) -> Rank {
    Rank(u32::try_from(index).expect("ranks were counted in u32"))
}
