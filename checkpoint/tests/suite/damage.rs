//! Every kind of damage is found, named, and answered with what to do.

use std::fs;

use bytes::Bytes;
use checkpoint::{
    Checkpoint, Committed, Fault, SaveError, Store, commit, committed_steps, copy, manifest_name,
    newest_intact, prune, quarantine, quarantine_name, quarantined_steps, save_part,
    unfinished_steps,
};
use cluster::Step;

use crate::fixture::{Folder, checkpoints, folder, in_memory, layout, manifest, save, state};

const NEWEST: Step = Step(30);

/// Three checkpoints, the newest of which `damage` spoils; how loading it then fails.
async fn load_after(damage: impl FnOnce(&Folder)) -> String {
    let folder = folder();
    checkpoints(&folder.store, &[10, 20, 30]).await;
    damage(&folder);
    let loaded = match Checkpoint::open(&folder.store, NEWEST).await {
        Ok(checkpoint) => checkpoint.verify().await,
        Err(error) => Err(error),
    };
    let error = loaded.unwrap_err();
    assert!(error.fault.is_damage());
    assert_eq!(error.intact, Some(Step(20)));
    let text = error.to_string();
    let advice = "; restore the object from a copy (the checkpoint of step 20 is intact)";
    let text = text.strip_suffix(advice).unwrap();
    text.replace(folder.store.location(), "RUN")
}

#[tokio::test]
async fn what_was_saved_is_loaded_whatever_the_number_of_ranks() {
    let folder = folder();
    for (step, size) in (1..).map(Step).zip([1, 2, 3, 6, 40]) {
        let parts = save(&folder.store, step, size).await;
        commit(&folder.store, &manifest(step, parts, "n")).await.unwrap();
        let checkpoint = Checkpoint::open(&folder.store, step).await.unwrap();
        let mut loaded = vec![0; state(step).len()];
        let mut sink = |range: std::ops::Range<u64>, bytes: &[u8]| {
            loaded[in_memory(range)].copy_from_slice(bytes);
        };
        checkpoint.read(&mut sink).await.unwrap();
        assert_eq!(loaded, state(step));
    }
    let newest_first = [5, 4, 3, 2, 1].map(Step);
    assert_eq!(committed_steps(&folder.store).await.unwrap(), newest_first);
}

#[tokio::test]
async fn a_truncated_part_is_named_with_both_lengths() {
    let text = load_after(|folder| {
        let part = folder.part(NEWEST, 2);
        fs::OpenOptions::new().write(true).open(part).unwrap().set_len(999).unwrap();
    });
    assert_eq!(
        text.await,
        "checkpoint of step 30 cannot be used: RUN/checkpoints/step-0000000030/part-00002 has 999 \
         bytes, expected 1000"
    );
}

#[tokio::test]
async fn a_flipped_bit_is_named_with_both_digests() {
    let text = load_after(|folder| {
        let part = folder.part(NEWEST, 5);
        let mut bytes = fs::read(&part).unwrap();
        bytes[499] ^= 1;
        fs::write(part, bytes).unwrap();
    });
    let text = text.await;
    assert!(text.contains("RUN/checkpoints/step-0000000030/part-00005 has the BLAKE3 digest "));
    assert!(text.contains(", expected "), "{text}");
}

#[tokio::test]
async fn a_missing_part_is_named() {
    let text = load_after(|folder| fs::remove_file(folder.part(NEWEST, 0)).unwrap());
    assert_eq!(
        text.await,
        "checkpoint of step 30 cannot be used: RUN/checkpoints/step-0000000030/part-00000 is not \
         there, expected 1000 bytes"
    );
}

#[tokio::test]
async fn without_its_manifest_it_is_no_checkpoint() {
    let text =
        load_after(|folder| fs::remove_file(folder.file(&manifest_name(NEWEST))).unwrap()).await;
    assert_eq!(
        text,
        "checkpoint of step 30 cannot be used: RUN/checkpoints/step-0000000030/manifest.json is \
         not there, so the step was never committed"
    );
}

#[tokio::test]
async fn a_garbage_manifest_is_named() {
    let text =
        load_after(|folder| fs::write(folder.file(&manifest_name(NEWEST)), "{\"fo").unwrap()).await;
    assert!(text.contains("step-0000000030/manifest.json is damaged: it is not a manifest: EOF"));
}

#[tokio::test]
async fn a_manifest_of_another_step_is_named() {
    let text = load_after(|folder| {
        let other = folder.file(&manifest_name(Step(20)));
        fs::copy(other, folder.file(&manifest_name(NEWEST))).unwrap();
    })
    .await;
    assert!(text.ends_with("manifest.json is of step 20, expected step 30"), "{text}");
}

#[tokio::test]
async fn when_nothing_is_intact_the_error_says_so() {
    let folder = folder();
    checkpoints(&folder.store, &[10, 20]).await;
    for step in [10, 20] {
        fs::remove_file(folder.part(Step(step), 1)).unwrap();
    }
    let checkpoint = Checkpoint::open(&folder.store, Step(20)).await.unwrap();
    let error = checkpoint.verify().await.unwrap_err();
    assert!(matches!(error.fault, Fault::PartMissing { .. }));
    assert!(error.to_string().ends_with("; restore the object: no other checkpoint is intact"));
    assert_eq!(newest_intact(&folder.store, None).await.unwrap(), None);
}

#[tokio::test]
async fn a_run_without_checkpoints_has_no_steps() {
    assert_eq!(committed_steps(&folder().store).await.unwrap(), []);
}

#[tokio::test]
async fn a_damaged_part_is_restored_by_saving_it_again_and_other_bytes_are_refused() {
    let folder = folder();
    checkpoints(&folder.store, &[30]).await;
    fs::write(folder.part(NEWEST, 0), "rotten").unwrap();
    save(&folder.store, NEWEST, 2).await;
    Checkpoint::open(&folder.store, NEWEST).await.unwrap().verify().await.unwrap();

    let other = Bytes::from(vec![0; 1000]);
    let error = save_part(&folder.store, &layout(), NEWEST, 0, other).await.unwrap_err();
    assert!(matches!(error, SaveError::Committed { .. }), "{error}");
    Checkpoint::open(&folder.store, NEWEST).await.unwrap().verify().await.unwrap();
}

#[tokio::test]
async fn what_an_unfinished_save_left_does_not_spoil_the_next() {
    let folder = folder();
    save(&folder.store, NEWEST, 2).await;
    fs::write(folder.part(NEWEST, 3), "torn").unwrap();
    let parts = save(&folder.store, NEWEST, 3).await;
    commit(&folder.store, &manifest(NEWEST, parts, "n")).await.unwrap();
    Checkpoint::open(&folder.store, NEWEST).await.unwrap().verify().await.unwrap();
}

#[tokio::test]
async fn a_quarantined_checkpoint_keeps_its_bytes_and_is_passed_over_until_it_is_saved_again() {
    let folder = folder();
    checkpoints(&folder.store, &[10, 20, 30]).await;
    fs::write(folder.part(NEWEST, 0), "rotten").unwrap();
    for _ in 0..2 {
        quarantine(&folder.store, NEWEST, "part 0 is rotten").await.unwrap();
    }
    assert_eq!(committed_steps(&folder.store).await.unwrap(), [Step(20), Step(10)]);
    assert_eq!(quarantined_steps(&folder.store).await.unwrap(), [NEWEST]);
    assert_eq!(fs::read(folder.part(NEWEST, 0)).unwrap(), b"rotten");
    let marker = fs::read_to_string(folder.file(&quarantine_name(NEWEST))).unwrap();
    assert_eq!(marker, "{\"reason\":\"part 0 is rotten\"}");

    let parts = save(&folder.store, NEWEST, 2).await;
    let again = commit(&folder.store, &manifest(NEWEST, parts, "again")).await.unwrap();
    assert_eq!(again, Committed::Before);
    assert_eq!(committed_steps(&folder.store).await.unwrap()[0], NEWEST);
    assert_eq!(quarantined_steps(&folder.store).await.unwrap(), []);
    Checkpoint::open(&folder.store, NEWEST).await.unwrap().verify().await.unwrap();
}

#[tokio::test]
async fn what_cut_short_saves_left_below_the_newest_checkpoint_is_found() {
    let folder = folder();
    save(&folder.store, Step(10), 2).await;
    assert_eq!(unfinished_steps(&folder.store).await.unwrap(), [], "it may still be finished");
    checkpoints(&folder.store, &[20, 30]).await;
    quarantine(&folder.store, Step(20), "a test").await.unwrap();
    save(&folder.store, Step(40), 2).await;
    assert_eq!(unfinished_steps(&folder.store).await.unwrap(), [Step(10)]);
    prune(&folder.store, Step(10)).await.unwrap();
    assert_eq!(unfinished_steps(&folder.store).await.unwrap(), []);
}

#[tokio::test]
async fn a_pruned_checkpoint_leaves_nothing_behind() {
    let folder = folder();
    checkpoints(&folder.store, &[10, 20]).await;
    prune(&folder.store, Step(10)).await.unwrap();
    prune(&folder.store, Step(10)).await.unwrap();
    assert_eq!(committed_steps(&folder.store).await.unwrap(), [Step(20)]);
    assert!(!folder.file("checkpoints/step-0000000010").exists());

    // An interrupted deletion took the manifest first, and is finished by the next.
    fs::remove_file(folder.file(&manifest_name(Step(20)))).unwrap();
    prune(&folder.store, Step(20)).await.unwrap();
    assert!(!folder.file("checkpoints/step-0000000020").exists());
    let reopened = Store::open(folder.store.location()).unwrap();
    assert_eq!(committed_steps(&reopened).await.unwrap(), []);
}

#[tokio::test]
async fn a_copy_is_a_checkpoint_and_damage_is_not_copied() {
    let (here, there) = (folder(), folder());
    checkpoints(&here.store, &[10, 20]).await;
    assert_eq!(copy(&here.store, &there.store, Step(20)).await.unwrap(), Committed::Now);
    assert_eq!(committed_steps(&there.store).await.unwrap(), [Step(20)]);
    let original = Checkpoint::open(&here.store, Step(20)).await.unwrap();
    let copied = Checkpoint::open(&there.store, Step(20)).await.unwrap();
    assert_eq!(copied.manifest(), original.manifest());
    copied.verify().await.unwrap();
    copy(&here.store, &there.store, Step(20)).await.unwrap(); // Again.

    fs::write(here.part(Step(10), 1), vec![7; 1000]).unwrap();
    let error = copy(&here.store, &there.store, Step(10)).await.unwrap_err().to_string();
    assert!(error.contains("part-00001 has the BLAKE3 digest"), "{error}");
    assert_eq!(committed_steps(&there.store).await.unwrap(), [Step(20)]);
}
