//! What every `Exchange` promises, checked on each implementation.

use std::{
    sync::Barrier,
    time::{Duration, Instant},
};

use crate::transports::{Connect, PATIENT, on_threads};
use cluster::Rank;
use collective::{Exchange, ExchangeError, ProtocolFault, RankList};

macro_rules! contract {
    ($($name:ident,)*) => {
        mod local {
            $(#[test] fn $name() { super::$name(crate::transports::local) })*
        }
        mod mesh {
            $(#[test] fn $name() { super::$name(crate::transports::mesh) })*
        }
    };
}

/// What NCCL can promise: it does not say which peer is lost, and takes lengths on trust.
macro_rules! nccl_contract {
    ($($name:ident,)*) => {
        mod nccl {
            $(#[test] fn $name() { super::$name(crate::nccl::fake) })*
        }
    };
}

nccl_contract! {
    every_message_arrives_whatever_the_sizes,
    a_thousand_exchanges_in_a_row_do_not_mix,
    a_broadcast_reaches_all_from_each_root,
    a_rank_alone_talks_to_itself,
    an_abort_ends_a_blocked_exchange_at_once_and_for_good,
    a_peer_may_leave_after_its_last_exchange,
}

contract! {
    every_message_arrives_whatever_the_sizes,
    a_thousand_exchanges_in_a_row_do_not_mix,
    a_broadcast_reaches_all_from_each_root,
    a_rank_alone_talks_to_itself,
    an_abort_ends_a_blocked_exchange_at_once_and_for_good,
    a_lost_peer_is_named_and_stays_lost,
    a_peer_may_leave_after_its_last_exchange,
    a_silent_peer_is_named_after_the_stall_timeout,
    a_message_of_the_wrong_length_is_a_protocol_error,
}

/// What `from` sends to `to`: telling bytes, so that a swap shows.
fn message(from: u32, to: u32, round: u32, length: usize) -> Vec<u8> {
    let seed = from.wrapping_mul(31).wrapping_add(to.wrapping_mul(17)).wrapping_add(round);
    (0u32..).take(length).map(|at| (seed.wrapping_add(at) % 251) as u8).collect()
}

/// One all-to-all with the lengths that `length(from, to)` gives.
fn exchange(
    rank: &mut dyn Exchange,
    round: u32,
    length: impl Fn(u32, u32) -> usize,
) -> Result<(), ExchangeError> {
    let (me, size) = (rank.rank().0, rank.size());
    let outgoing: Vec<Vec<u8>> =
        (0..size).map(|to| message(me, to, round, length(me, to))).collect();
    let mut incoming: Vec<Vec<u8>> = (0..size).map(|from| vec![0; length(from, me)]).collect();
    rank.all_to_all(
        &outgoing.iter().map(Vec::as_slice).collect::<Vec<_>>(),
        &mut incoming.iter_mut().map(Vec::as_mut_slice).collect::<Vec<_>>(),
    )?;
    for (from, received) in (0..).zip(incoming) {
        let sent = message(from, me, round, length(from, me));
        assert!(received == sent, "what {from} sent to {me} in round {round} is another message");
    }
    Ok(())
}

fn every_message_arrives_whatever_the_sizes(connect: Connect) {
    const LENGTHS: [usize; 16] =
        [0, 1, 2, 15, 16, 17, 31, 255, 256, 4095, 4096, 65_535, 65_536, 300_000, 1 << 20, 3 << 20];
    for size in [2, 3, 5] {
        on_threads(connect(size, PATIENT), |mut rank| {
            for round in 0..16u32 {
                exchange(rank.as_mut(), round, |from, to| {
                    LENGTHS[((from * 5 + to * 3 + round) % 16) as usize]
                })
                .unwrap();
            }
        });
    }
}

fn a_thousand_exchanges_in_a_row_do_not_mix(connect: Connect) {
    on_threads(connect(3, PATIENT), |mut rank| {
        for round in 0..1000 {
            exchange(rank.as_mut(), round, |from, to| ((from + to + round) % 7) as usize).unwrap();
        }
    });
}

fn a_broadcast_reaches_all_from_each_root(connect: Connect) {
    for size in 1..=5 {
        on_threads(connect(size, PATIENT), |mut rank| {
            for root in 0..size {
                for length in [0, 1, 3, 7, 100_001] {
                    let sent = message(root, 0, 0, length);
                    let own = rank.rank() == Rank(root);
                    let mut data = if own { sent.clone() } else { vec![0; length] };
                    rank.broadcast(Rank(root), &mut data).unwrap();
                    assert!(data == sent, "{length} bytes of {root} came out differently");
                }
            }
        });
    }
}

fn a_rank_alone_talks_to_itself(connect: Connect) {
    let mut rank = connect(1, PATIENT).pop().unwrap();
    assert_eq!((rank.rank(), rank.size()), (Rank(0), 1));
    exchange(rank.as_mut(), 0, |_, _| 1000).unwrap();
}

fn an_abort_ends_a_blocked_exchange_at_once_and_for_good(connect: Connect) {
    let delays: Vec<Duration> = (0..20)
        .map(|round| {
            let mut ranks = connect(2, PATIENT);
            let silent = ranks.pop().unwrap();
            let mut blocked = ranks.pop().unwrap();
            let abort = blocked.abort_handle();
            let start = Barrier::new(2);
            let delay = std::thread::scope(|scope| {
                let exchanging = scope.spawn(|| {
                    start.wait();
                    let result = exchange(blocked.as_mut(), 0, |_, _| 4 << 20);
                    assert_eq!(result, Err(ExchangeError::Aborted));
                    let ended = Instant::now();
                    let again = exchange(blocked.as_mut(), 1, |_, _| 1);
                    assert_eq!(again, Err(ExchangeError::Aborted));
                    ended
                });
                start.wait();
                for _ in 0..round * 1000 {
                    std::thread::yield_now(); // So that it is met at many places.
                }
                let aborted = Instant::now();
                abort.abort();
                exchanging.join().unwrap().saturating_duration_since(aborted)
            });
            drop(silent);
            delay
        })
        .collect();
    // The machine may be busy, so only the best are held to the promise.
    let quick = delays.iter().filter(|&&delay| delay < Duration::from_millis(10)).count();
    assert!(quick >= 5, "aborts took {delays:?}");
}

fn a_lost_peer_is_named_and_stays_lost(connect: Connect) {
    let mut ranks = connect(3, PATIENT);
    let lost = ranks.pop().unwrap();
    let start = Barrier::new(3);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            start.wait();
            drop(lost);
        });
        // The survivors are kept until both have failed: a survivor that leaves is lost too.
        on_threads(ranks, |mut rank| {
            start.wait();
            for round in 0..2 {
                let error = exchange(rank.as_mut(), round, |_, _| 1 << 20).unwrap_err();
                let named = matches!(&error, ExchangeError::PeerLost { rank: Rank(2), .. });
                assert!(named, "rank 2 left, but: {error}");
            }
            rank
        });
    });
}

fn a_peer_may_leave_after_its_last_exchange(connect: Connect) {
    for _ in 0..20 {
        on_threads(connect(3, PATIENT), |mut rank| {
            exchange(rank.as_mut(), 0, |_, _| 200_000).unwrap();
        });
    }
}

fn a_silent_peer_is_named_after_the_stall_timeout(connect: Connect) {
    let after = Duration::from_millis(50);
    let mut ranks = connect(3, after);
    let silent = ranks.pop().unwrap();
    on_threads(ranks, |mut rank| {
        let error = exchange(rank.as_mut(), 0, |_, _| 100).unwrap_err();
        assert_eq!(error, ExchangeError::TimedOut { ranks: RankList(vec![Rank(2)]), after });
        assert_eq!(error.to_string(), "no byte moved for 50ms while waiting for rank 2");
        rank
    });
    drop(silent);
}

fn a_message_of_the_wrong_length_is_a_protocol_error(connect: Connect) {
    on_threads(connect(2, PATIENT), |mut rank| {
        // Rank 1 expects a byte less than rank 0 sends.
        let me = rank.rank().0;
        let result =
            exchange(
                rank.as_mut(),
                0,
                |from, to| if (from, to) == (0, 1) { 9 - me as usize } else { 9 },
            );
        if me == 1 {
            let fault = ProtocolFault::Length { expected: 8, found: 9 };
            assert_eq!(result, Err(ExchangeError::Protocol { rank: Rank(0), fault }));
        }
    });
}
