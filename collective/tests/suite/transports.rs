//! Groups of connected ranks of each kind, to run one suite on all of them.

use std::{
    net::{Ipv4Addr, SocketAddr},
    thread,
    time::{Duration, Instant},
};

use cluster::{Generation, Rank, RunId, Term};
use collective::{AbortHandle, Exchange, Group, MeshConfig, MeshListener, Secret, local};

/// Longer than any test takes on a loaded machine.
pub(crate) const PATIENT: Duration = Duration::from_secs(60);

/// Makes this many ranks with this stall timeout.
pub(crate) type Connect = fn(u32, Duration) -> Vec<Box<dyn Exchange>>;

pub(crate) fn local(size: u32, stall_timeout: Duration) -> Vec<Box<dyn Exchange>> {
    let ranks = local::group(size, stall_timeout).unwrap();
    ranks.into_iter().map(|rank| Box::new(rank) as Box<dyn Exchange>).collect()
}

pub(crate) fn mesh(size: u32, stall_timeout: Duration) -> Vec<Box<dyn Exchange>> {
    let listeners: Vec<_> = (0..size).map(|_| listen(stall_timeout)).collect();
    let addresses: Vec<_> = listeners.iter().map(MeshListener::local_addr).collect();
    let group = group(&addresses);
    let listeners: Vec<_> = (0..).map(Rank).zip(&listeners).collect();
    on_threads(listeners, |(rank, listener)| {
        let group = Group { rank, ..group.clone() };
        let abort = AbortHandle::new().unwrap();
        let mesh = listener.form(&group, Instant::now() + PATIENT, &abort).unwrap();
        Box::new(mesh) as Box<dyn Exchange>
    })
}

pub(crate) fn listen(stall_timeout: Duration) -> MeshListener {
    let config = MeshConfig { stall_timeout, handshake_timeout: PATIENT };
    MeshListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), config).unwrap()
}

/// Rank 0 of generation 1 of a group at these addresses.
pub(crate) fn group(addresses: &[SocketAddr]) -> Group {
    Group {
        run: RunId::try_from("test".to_owned()).unwrap(),
        term: Term(1),
        generation: Generation(1),
        rank: Rank(0),
        addresses: addresses.to_vec(),
        secret: Secret::from([42; 32]),
    }
}

/// Runs `body` on each item at once, and returns the results in order.
pub(crate) fn on_threads<T: Send, R: Send>(items: Vec<T>, body: impl Fn(T) -> R + Sync) -> Vec<R> {
    thread::scope(|scope| {
        let body = &body;
        let threads: Vec<_> =
            items.into_iter().map(|item| scope.spawn(move || body(item))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}
