//! The built-in dataset: that it is what its source makes, and that it can be used.

#[path = "../examples/make_digits/digits.rs"]
mod digits;

use std::{fs, path::Path, sync::Arc};

use cluster::{Epoch, VirtualRank};
use shards::{Augment, Batch, BatchPlan, Crop, Dataset, Loader, Transform, evaluation, verify};

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/datasets/digits");

#[test]
fn the_committed_files_are_what_the_maker_makes() {
    let table = fs::read(Path::new(FOLDER).join("digits.csv.gz")).unwrap();
    let out = tempfile::tempdir().unwrap();
    digits::make(&table, out.path()).unwrap();
    let mut made = 0;
    for entry in fs::read_dir(out.path()).unwrap() {
        let entry = entry.unwrap();
        let committed = fs::read(Path::new(FOLDER).join(entry.file_name())).unwrap();
        assert!(fs::read(entry.path()).unwrap() == committed, "{:?} differs", entry.file_name());
        made += 1;
    }
    assert_eq!(made, 6);
}

#[test]
fn both_splits_are_whole() {
    for (split, samples) in [("train", 1437), ("val", 360)] {
        let report = verify("builtin:digits", split, &mut |_| ()).unwrap();
        assert_eq!((report.shards, report.samples), (1, samples));
        let folder = verify(FOLDER, split, &mut |_| ()).unwrap();
        assert_eq!(folder, report);
    }
}

#[test]
fn the_digits_are_named_and_attributed() {
    let dataset = Dataset::open("builtin:digits", "train").unwrap();
    assert_eq!(dataset.classes(), ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]);
    let provenance = &dataset.manifest().provenance;
    assert!(provenance.attribution.as_ref().unwrap().contains("Alpaydin"));
    assert!(provenance.licence.as_ref().unwrap().starts_with("CC BY 4.0"));
}

#[test]
fn neighbours_in_a_shard_are_of_different_classes() {
    let dataset = Dataset::open("builtin:digits", "train").unwrap();
    let records = &dataset.indexes()[0].records;
    let alike = records.windows(2).filter(|pair| pair[0].label == pair[1].label).count();
    assert!((90..200).contains(&alike), "{alike} of 1436 neighbours are alike; chance gives 144");
}

#[test]
fn an_epoch_of_training_batches_is_the_same_for_any_division_of_the_work() {
    let dataset = Arc::new(Dataset::open("builtin:digits", "train").unwrap());
    let plan = BatchPlan::new(dataset.len(), 8, 8, 1).unwrap();
    let augment = Augment { crop: Crop::Padded, padding: 2, ..Augment::default() };
    let transform = Transform::training(&augment, 32, 1).unwrap();
    let load = |ranks: &[u32]| {
        let mut loader = Loader::new(Arc::clone(&dataset), transform.clone());
        let mut batch = Batch::new();
        let mut loaded = Vec::new();
        for &rank in ranks {
            let ids: Vec<u64> = plan.micro_batch(Epoch(3), 5, VirtualRank(rank)).collect();
            loader.load(&ids, Epoch(3), &mut batch).unwrap();
            loaded.push((rank, batch.clone()));
        }
        loaded.sort_by_key(|&(rank, _)| rank);
        loaded
    };
    let alone = load(&[0, 1, 2, 3, 4, 5, 6, 7]);
    let mut shared = std::thread::scope(|scope| {
        let first = scope.spawn(|| load(&[7, 2, 5]));
        let mut rest = load(&[0, 1, 3, 4, 6]);
        rest.extend(first.join().unwrap());
        rest
    });
    shared.sort_by_key(|&(rank, _)| rank);
    assert!(alone == shared);
}

#[test]
fn a_loader_moves_to_the_thread_that_prefetches() {
    let dataset = Arc::new(Dataset::open("builtin:digits", "val").unwrap());
    let transform = Transform::evaluation(&Augment::default(), 32).unwrap();
    let mut loader = Loader::new(dataset, transform);
    let prefetch = std::thread::spawn(move || {
        let mut batch = Batch::new();
        loader.load(&[1, 2], Epoch(0), &mut batch).unwrap();
        batch
    });
    assert_eq!(prefetch.join().unwrap().len(), 2);
}

#[test]
fn a_validation_batch_is_the_stored_image() {
    let dataset = Arc::new(Dataset::open("builtin:digits", "val").unwrap());
    let transform = Transform::evaluation(&Augment::default(), 32).unwrap();
    let normalize = transform.normalize();
    let mut loader = Loader::new(Arc::clone(&dataset), transform);
    let ids: Vec<u64> = evaluation(dataset.len(), 8, VirtualRank(7)).collect();
    let mut batch = Batch::new();
    loader.load(&ids, Epoch(0), &mut batch).unwrap();
    assert_eq!((batch.len(), batch.size, batch.images.len()), (45, 32, 45 * 32 * 32 * 3));
    assert!(batch.labels.iter().all(|label| (0..10).contains(label)));
    assert!(batch.images.as_chunks::<3>().0.iter().all(|[r, g, b]| r == g && g == b));
    let mut planes = Vec::new();
    normalize.nchw(&batch, &mut planes);
    assert_eq!(planes.len(), batch.images.len());
    assert_eq!(planes[0], (f32::from(batch.images[0]) / 255.0 - 0.485) / 0.229);
}
