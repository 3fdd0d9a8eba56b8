//! A step is committed once, by whoever comes first, whatever the store says about it.

use std::{fs, sync::Arc};

use checkpoint::{
    Checkpoint, CommitError, Committed, Created, Store, commit, committed_steps, create,
    manifest_name,
};
use cluster::{Generation, Step, Term, Timestamp};
use object_store::path::Path;

use crate::{
    fixture::{folder, manifest, save},
    unreliable::{Mishap, Unreliable},
};

const STEP: Step = Step(176);

#[tokio::test]
async fn a_second_commit_of_the_same_content_changes_nothing() {
    let store = folder();
    let parts = save(&store.store, STEP, 2).await;
    let first = manifest(STEP, parts.clone(), "first");
    assert_eq!(commit(&store.store, &first).await.unwrap(), Committed::Now);
    assert_eq!(commit(&store.store, &first).await.unwrap(), Committed::Now);

    let mut second = manifest(STEP, parts, "second");
    (second.term, second.generation) = (Term(2), Generation(9));
    second.created = Timestamp(99);
    assert_eq!(commit(&store.store, &second).await.unwrap(), Committed::Before);
    assert_eq!(*Checkpoint::open(&store.store, STEP).await.unwrap().manifest(), first);
}

#[tokio::test]
async fn a_commit_with_other_content_is_refused_and_the_difference_named() {
    let store = folder();
    let parts = save(&store.store, STEP, 2).await;
    let first = manifest(STEP, parts.clone(), "first");
    commit(&store.store, &first).await.unwrap();
    let mut other = manifest(STEP, parts, "second");
    "epochs = 9\n".clone_into(&mut other.recipe);
    other.parts[4].blake3 = other.parts[3].blake3;
    let error = commit(&store.store, &other).await.unwrap_err();
    assert!(
        error.to_string().contains("manifest.json is there with other content (recipe, part 4)")
    );
    assert!(!error.is_transient());
    assert_eq!(*Checkpoint::open(&store.store, STEP).await.unwrap().manifest(), first);
}

#[tokio::test]
async fn a_commit_waits_for_all_its_parts() {
    let store = folder();
    let parts = save(&store.store, STEP, 2).await;
    let whole = manifest(STEP, parts, "n");
    let part = store.part(STEP, 3);

    let bytes = fs::read(&part).unwrap();
    fs::write(&part, &bytes[1..]).unwrap();
    let error = commit(&store.store, &whole).await.unwrap_err();
    assert!(error.to_string().contains("part-00003 has 999 bytes, expected 1000"), "{error}");

    fs::remove_file(&part).unwrap();
    let error = commit(&store.store, &whole).await.unwrap_err();
    assert!(matches!(error, CommitError::PartMissing { .. }));
    assert!(error.to_string().contains("part-00003 is not there: save it again"), "{error}");
    assert!(!store.file(&manifest_name(STEP)).exists());

    save(&store.store, STEP, 5).await;
    assert_eq!(commit(&store.store, &whole).await.unwrap(), Committed::Now);
}

#[tokio::test]
async fn a_manifest_that_does_not_fit_is_not_written() {
    let store = folder();
    let mut parts = save(&store.store, STEP, 2).await;
    parts.pop();
    let error = commit(&store.store, &manifest(STEP, parts, "n")).await.unwrap_err();
    assert!(matches!(error, CommitError::Invalid { .. }));
    assert!(!store.file(&manifest_name(STEP)).exists());
}

#[tokio::test]
async fn garbage_in_the_manifests_place_is_healed_by_saving_again_and_kept_beside() {
    let store = folder();
    let parts = save(&store.store, STEP, 2).await;
    fs::write(store.file(&manifest_name(STEP)), "garbage").unwrap();
    fs::write(store.part(STEP, 3), "garbage too").unwrap();
    assert_eq!(save(&store.store, STEP, 3).await, parts, "a part is no committed one");
    let whole = manifest(STEP, parts, "n");
    assert_eq!(commit(&store.store, &whole).await.unwrap(), Committed::Now);
    let checkpoint = Checkpoint::open(&store.store, STEP).await.unwrap();
    assert_eq!(*checkpoint.manifest(), whole);
    checkpoint.verify().await.unwrap();
    let beside = store.file(&format!("{}.damaged", manifest_name(STEP)));
    assert_eq!(fs::read(beside).unwrap(), b"garbage");
    assert_eq!(committed_steps(&store.store).await.unwrap(), [STEP]);
}

#[tokio::test]
async fn a_manifest_of_another_version_is_reported_and_left() {
    let store = folder();
    let parts = save(&store.store, STEP, 2).await;
    let newer = b"{\"format\": 2, \"contents\": []}";
    fs::write(store.file(&manifest_name(STEP)), newer).unwrap();
    let error = commit(&store.store, &manifest(STEP, parts, "n")).await.unwrap_err();
    assert!(matches!(error, CommitError::Damaged { .. }), "{error}");
    assert_eq!(fs::read(store.file(&manifest_name(STEP))).unwrap(), newer);
}

#[tokio::test]
async fn of_many_writers_of_one_object_exactly_one_wins() {
    let folder = folder();
    for round in 0..20 {
        let name = format!("leader-{round}");
        let writers = (0..8).map(|writer| {
            let (store, name) = (folder.store.clone(), name.clone());
            tokio::spawn(async move {
                create(&store, &name, format!("writer {writer}").into()).await.unwrap()
            })
        });
        let outcomes = futures::future::try_join_all(writers).await.unwrap();
        let won = outcomes.iter().filter(|&outcome| *outcome == Created::Ours).count();
        assert_eq!(won, 1, "{outcomes:?}");
    }
}

/// Commits to a store whose next conditional put has this mishap.
async fn commit_with(mishap: Mishap) -> (Store, Result<Committed, CommitError>) {
    let objects = Arc::new(Unreliable::default());
    let prefix = Path::from("runs/digits");
    let store = Store::new(Arc::clone(&objects) as _, prefix, "memory:///runs/digits");
    let parts = save(&store, STEP, 2).await;
    objects.spoil_next_create(mishap);
    let result = commit(&store, &manifest(STEP, parts, "n")).await;
    (store, result)
}

#[tokio::test]
async fn a_put_that_broke_after_it_was_applied_is_a_commit() {
    let (_, result) = commit_with(Mishap::BreakAfter).await;
    assert_eq!(result.unwrap(), Committed::Now);
}

#[tokio::test]
async fn a_put_that_met_its_own_write_is_a_commit() {
    let (_, result) = commit_with(Mishap::ExistsAfter).await;
    assert_eq!(result.unwrap(), Committed::Now);
}

#[tokio::test]
async fn a_put_that_broke_before_it_was_applied_may_be_repeated() {
    let (store, result) = commit_with(Mishap::BreakBefore).await;
    let error = result.unwrap_err();
    assert!(error.is_transient());
    assert!(error.to_string().contains("cannot write memory:///runs/digits/checkpoints/step-"));
    let parts = save(&store, STEP, 3).await;
    assert_eq!(commit(&store, &manifest(STEP, parts, "n")).await.unwrap(), Committed::Now);
}
