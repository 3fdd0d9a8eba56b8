//! Leaders of one run whose log is in a store: one at a time, and who was replaced writes nothing.
#![expect(clippy::unwrap_used, reason = "a test: what cannot be unwrapped fails it")]

use std::{path::Path, time::Duration};

use checkpoint::Store;
use cluster::{Record, Term};
use coordinator::{Config, Leader, Lease, LogAt, StartError, read_shared};
use tokio::net::TcpListener;

mod toy;

fn config(folder: &Path, holder: &str, standby: bool) -> Config {
    let location = folder.display().to_string();
    let lease = Lease { holder: holder.to_owned(), lasts: Duration::from_millis(600), standby };
    toy::config(LogAt::Shared { location, lease }, folder)
}

async fn terms(folder: &Path) -> Vec<Term> {
    let store = Store::open(folder.to_str().unwrap()).unwrap();
    let entries = read_shared(&store, 1).await.unwrap();
    let term = |record: &Record| {
        if let Record::TermStarted { term } = record { Some(*term) } else { None }
    };
    entries.iter().filter_map(|entry| term(&entry.record)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_leader_is_refused_and_a_standby_leads_when_the_first_is_gone() {
    let folder = tempfile::tempdir().unwrap();
    let first = Leader::begin(config(folder.path(), "a", false)).await.unwrap();
    let refused = Leader::begin(config(folder.path(), "b", false)).await.unwrap_err();
    assert!(refused.to_string().contains("a leads this run (term 1)"), "{refused}");
    let standby = tokio::spawn(Leader::begin(config(folder.path(), "c", true)));
    drop(first); // Its beat stands still.
    standby.await.unwrap().unwrap();
    assert_eq!(terms(folder.path()).await, [Term(1), Term(2)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_comes_under_the_same_name_replaces_the_one_before_which_then_ends() {
    let folder = tempfile::tempdir().unwrap();
    let first = Leader::begin(config(folder.path(), "a", false)).await.unwrap();
    let second = Leader::begin(config(folder.path(), "a", false)).await.unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let ended = first.serve(listener).await.unwrap_err();
    assert!(matches!(ended, StartError::Superseded { by: Term(2) }), "{ended}");
    assert_eq!(terms(folder.path()).await, [Term(1), Term(2)]);
    drop(second);
}
