//! How a mesh comes about, and who is kept out of it.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

use crate::transports::{PATIENT, group, listen};
use cluster::{Generation, Rank, RunId, Term};
use collective::{
    AbortHandle, Exchange as _, FormError, Group, Mesh, MeshConfig, MeshListener, Refusal, Secret,
};

fn form(listener: &MeshListener, group: &Group) -> Result<Mesh, FormError> {
    form_within(listener, group, PATIENT)
}

fn form_within(
    listener: &MeshListener,
    group: &Group,
    patience: Duration,
) -> Result<Mesh, FormError> {
    listener.form(group, Instant::now() + patience, &AbortHandle::new().unwrap())
}

/// Two listeners and what each is told of their group.
fn pair() -> [(MeshListener, Group); 2] {
    let listeners = [listen(PATIENT), listen(PATIENT)];
    let group = group(&listeners.each_ref().map(MeshListener::local_addr));
    let mut rank = 0;
    listeners.map(|listener| {
        let member = (listener, Group { rank: Rank(rank), ..group.clone() });
        rank += 1;
        member
    })
}

/// Has `wrong` dial `acceptor`, then the right `dialer`; `wrong`'s error, once both are done.
fn intrude(
    acceptor: (MeshListener, Group),
    dialer: (MeshListener, Group),
    wrong: Group,
) -> Refusal {
    thread::scope(|scope| {
        let formed = scope.spawn(|| form(&acceptor.0, &acceptor.1));
        let refusal = match form(&listen(PATIENT), &wrong) {
            Err(FormError::Refused { rank: Rank(0), refusal, .. }) => refusal,
            other => panic!("the intruder got {other:?}"),
        };
        let mut meshes = [form(&dialer.0, &dialer.1).unwrap(), formed.join().unwrap().unwrap()];
        thread::scope(|scope| {
            for mesh in &mut meshes {
                scope.spawn(|| mesh.broadcast(Rank(0), &mut [0; 9]).unwrap());
            }
        });
        refusal
    })
}

#[test]
fn a_wrong_secret_is_refused_and_the_right_one_still_let_in() {
    let [acceptor, dialer] = pair();
    let wrong = Group { secret: Secret::from([1; 32]), ..dialer.1.clone() };
    assert_eq!(intrude(acceptor, dialer, wrong), Refusal::WrongSecret);
}

#[test]
fn a_worker_of_another_run_is_refused_and_both_runs_are_named() {
    let [acceptor, dialer] = pair();
    let run = RunId::try_from("other".to_owned()).unwrap();
    let wrong = Group { run, ..dialer.1.clone() };
    let refusal = intrude(acceptor, dialer, wrong);
    assert_eq!(refusal.to_string(), "a worker of run other dialled one of run test");
}

#[test]
fn a_wrong_place_is_refused() {
    let [acceptor, dialer] = pair();
    let mut addresses = dialer.1.addresses.clone();
    addresses.push(addresses[1]);
    let wrong = Group { addresses, rank: Rank(2), ..dialer.1.clone() };
    assert_eq!(intrude(acceptor, dialer, wrong), Refusal::WrongPlace { rank: Rank(0), size: 2 });
}

#[test]
fn an_older_generation_is_refused_on_both_sides() {
    let [acceptor, dialer] = pair();
    let older = dialer.1.clone();
    let newer = |group: &Group| Group { generation: Generation(5), ..group.clone() };
    let (acceptor, dialer) = ((acceptor.0, newer(&acceptor.1)), (dialer.0, newer(&dialer.1)));
    let again = acceptor.1.clone();
    let refusal = {
        let (acceptor, dialer) = (&acceptor, &dialer);
        thread::scope(|scope| {
            let formed = scope.spawn(|| form(&acceptor.0, &acceptor.1));
            form(&dialer.0, &dialer.1).unwrap();
            formed.join().unwrap().unwrap();
        });
        form(&listen(PATIENT), &older).unwrap_err()
    };
    let newest = (Term(1), Generation(5));
    let expected = Refusal::StaleGeneration { term: newest.0, generation: newest.1 };
    assert!(matches!(refusal, FormError::Refused { refusal, .. } if refusal == expected));

    // Nor does a process itself go back, or form the same one twice.
    for group in [Group { rank: Rank(0), ..older }, again.clone()] {
        let error = form(&acceptor.0, &group).unwrap_err();
        assert!(matches!(error, FormError::Stale { newest_generation: Generation(5), .. }));
    }
    let late = form(&listen(PATIENT), &Group { rank: Rank(1), ..again }).unwrap_err();
    assert!(matches!(late, FormError::Refused { refusal: Refusal::AlreadyFormed, .. }));
}

#[test]
fn a_newer_term_counts_more_than_a_newer_generation() {
    let listener = listen(PATIENT);
    let alone = group(&[listener.local_addr()]);
    form(&listener, &Group { term: Term(2), generation: Generation(1), ..alone.clone() }).unwrap();
    let error = form(&listener, &Group { term: Term(1), generation: Generation(9), ..alone });
    assert!(matches!(error, Err(FormError::Stale { newest_term: Term(2), .. })));
}

#[test]
fn whoever_waits_for_an_older_generation_hears_of_the_newer() {
    let [(listener, older), _] = pair();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| form(&listener, &older));
        let alone = Group { generation: Generation(2), ..group(&[listener.local_addr()]) };
        form(&listener, &alone).unwrap();
        assert!(matches!(waiting.join().unwrap(), Err(FormError::Stale { .. })));
    });
}

#[test]
fn a_peer_that_is_ahead_waits_for_the_others_to_hear_of_the_generation() {
    let [(low, low_group), (high, high_group)] = pair();
    form(&low, &group(&[low.local_addr()])).unwrap();
    let ahead = Group { generation: Generation(2), ..high_group };
    thread::scope(|scope| {
        let waiting = scope.spawn(|| form(&high, &ahead));
        form(&low, &Group { generation: Generation(2), ..low_group }).unwrap();
        waiting.join().unwrap().unwrap();
    });
}

#[test]
fn a_peer_that_is_not_there_is_named_and_joined_once_it_is() {
    // No other test listens on this address, so none takes the port in between.
    let reserved = TcpListener::bind((Ipv4Addr::new(127, 0, 0, 2), 0)).unwrap();
    let address = reserved.local_addr().unwrap();
    drop(reserved);
    let high = listen(PATIENT);
    let low_group = group(&[address, high.local_addr()]);
    let high_group = Group { rank: Rank(1), ..low_group.clone() };

    let error = form_within(&high, &high_group, Duration::from_millis(30)).unwrap_err();
    let text = error.to_string();
    assert!(text.contains(&format!("rank 0 at {address}: Connection refused")), "{text}");

    thread::scope(|scope| {
        let joining = scope.spawn(|| form(&high, &high_group));
        let config = MeshConfig { stall_timeout: PATIENT, handshake_timeout: PATIENT };
        let low = MeshListener::bind(address, config).unwrap();
        form(&low, &low_group).unwrap();
        joining.join().unwrap().unwrap();
    });
}

#[test]
fn the_acceptor_reports_whom_it_refused_and_whom_it_lacks() {
    let [acceptor, dialer] = pair();
    let wrong = Group { secret: Secret::from([1; 32]), ..dialer.1 };
    thread::scope(|scope| {
        let short = Duration::from_secs(1);
        let lonely = scope.spawn(move || form_within(&acceptor.0, &acceptor.1, short));
        form(&dialer.0, &wrong).unwrap_err();
        match lonely.join().unwrap() {
            Err(FormError::Deadline { missing, refused, .. }) => {
                assert_eq!(missing[0].rank, Rank(1));
                assert_eq!(missing[0].problem, "it has not dialled");
                assert_eq!(refused[0].rank, Some(Rank(1)));
                assert_eq!(refused[0].refusal, Refusal::WrongSecret);
            }
            other => panic!("{other:?}"),
        }
    });
}

#[test]
fn an_abort_ends_a_formation_that_waits_to_dial_or_to_be_dialled() {
    let silent = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let listener = listen(PATIENT);
    let addresses = [silent.local_addr().unwrap(), listener.local_addr()];
    let dialling = Group { rank: Rank(1), ..group(&addresses) };
    let waiting = group(&[listener.local_addr(), addresses[0]]);
    for (generation, group) in (1..).zip([dialling, waiting]) {
        let group = Group { generation: Generation(generation), ..group };
        let abort = AbortHandle::new().unwrap();
        thread::scope(|scope| {
            let forming = scope.spawn(|| listener.form(&group, Instant::now() + PATIENT, &abort));
            if group.rank == Rank(1) {
                // Its hello is here: now it waits for an answer that never comes.
                silent.accept().unwrap().0.read_exact(&mut [0; 100]).unwrap();
            }
            let aborted = Instant::now();
            abort.abort();
            assert!(matches!(forming.join().unwrap(), Err(FormError::Aborted)));
            assert!(aborted.elapsed() < Duration::from_secs(5));
        });
    }
}

#[test]
fn strangers_neither_stop_the_acceptor_nor_get_in() {
    let [acceptor, dialer] = pair();
    let address: SocketAddr = acceptor.0.local_addr();
    let silent = TcpStream::connect(address).unwrap();
    let mut browser = TcpStream::connect(address).unwrap();
    browser.write_all(&[b'G'; 200]).unwrap();
    thread::scope(|scope| {
        let formed = scope.spawn(|| form(&acceptor.0, &acceptor.1));
        form(&dialer.0, &dialer.1).unwrap();
        formed.join().unwrap().unwrap();
    });
    drop((silent, browser));
}

#[test]
fn an_aborted_handle_ends_the_exchanges_of_its_mesh() {
    let listener = listen(PATIENT);
    let abort = AbortHandle::new().unwrap();
    let mesh = listener.form(&group(&[listener.local_addr()]), Instant::now(), &abort).unwrap();
    abort.abort();
    assert!(mesh.abort_handle().is_aborted());
}
