//! Time of one reduction over loopback: `cargo bench -p collective [-- FLOATS [V [N]]]`.
#![expect(clippy::print_stdout, reason = "the figures are what it is run for")]

use std::{
    net::{Ipv4Addr, SocketAddr},
    thread,
    time::{Duration, Instant},
};

use cluster::{Generation, Rank, RunId, Term, blocks::balanced_blocks};
use collective::{AbortHandle, Group, MeshConfig, MeshListener, Reduction, Secret};

const PATIENCE: Duration = Duration::from_secs(30);
const ROUNDS: usize = 30;

fn main() {
    let mut numbers = std::env::args().filter_map(|argument| argument.parse::<usize>().ok());
    let len = numbers.next().unwrap_or(12_000_000);
    let virtual_ranks = small(numbers.next().unwrap_or(8));
    let size = small(numbers.next().unwrap_or(2));

    let config = MeshConfig { stall_timeout: PATIENCE, handshake_timeout: PATIENCE };
    let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let listeners: Vec<MeshListener> = (0..size)
        .map(|_| MeshListener::bind(loopback, config).expect("a free port on loopback"))
        .collect();
    let addresses: Vec<SocketAddr> = listeners.iter().map(MeshListener::local_addr).collect();
    let times: Vec<Vec<[Duration; 2]>> = thread::scope(|scope| {
        let ranks: Vec<_> = (0..)
            .map(Rank)
            .zip(&listeners)
            .map(|(rank, listener)| {
                let addresses = addresses.clone();
                scope.spawn(move || measure(listener, addresses, rank, virtual_ranks, len))
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().expect("the rank did not panic")).collect()
    });
    println!("{len} floats, V={virtual_ranks}, N={size}, {ROUNDS} rounds, median (min) in ms");
    for (what, column) in [("add the own leaves", 0), ("exchange and finish", 1)] {
        let mut slowest: Vec<Duration> = (0..ROUNDS)
            .filter_map(|round| times.iter().map(|rank| rank[round][column]).max())
            .collect();
        slowest.sort_unstable();
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        println!("  {what}: {:.1} ({:.1})", ms(slowest[ROUNDS / 2]), ms(slowest[0]));
    }
}

/// By round, the time to add the own leaves and the time from there to the sum.
fn measure(
    listener: &MeshListener,
    addresses: Vec<SocketAddr>,
    rank: Rank,
    virtual_ranks: u32,
    len: usize,
) -> Vec<[Duration; 2]> {
    let size = small(addresses.len());
    let run = RunId::try_from("bench".to_owned()).expect("a usable name");
    let secret = Secret::from([7; 32]);
    let group = Group { run, term: Term(1), generation: Generation(1), rank, addresses, secret };
    let abort = AbortHandle::new().expect("a pipe");
    let mut mesh =
        listener.form(&group, Instant::now() + PATIENCE, &abort).expect("all ranks are here");
    let blocks = balanced_blocks(virtual_ranks, size);
    let mut reduction = Reduction::new(virtual_ranks, &blocks, rank, len);
    let leaf = vec![1.0 / 3.0; len];
    (0..ROUNDS)
        .map(|_| {
            let mut adding = Duration::ZERO;
            for _ in reduction.block() {
                reduction.leaf().copy_from_slice(&leaf);
                let started = Instant::now();
                reduction.push();
                adding += started.elapsed();
            }
            let started = Instant::now();
            let sum = reduction.finish(&mut mesh).expect("no rank leaves");
            assert!(sum.iter().all(|&value| value == sum[0]), "the sum is wrong");
            [adding, started.elapsed()]
        })
        .collect()
}

fn small(number: usize) -> u32 {
    u32::try_from(number).expect("it is no count of ranks")
}
