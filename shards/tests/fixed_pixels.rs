//! Recipes that people have run keep their samples, their order and their pixels for ever.
//!
//! The digests were taken before region decoding, SIMD and the later augmentations existed.
#![expect(clippy::unwrap_used, reason = "helpers of tests are tests too")]

use std::sync::Arc;

use cluster::{Epoch, VirtualRank};
use shards::{Augment, Batch, BatchPlan, Crop, Dataset, Loader, Sha256, Transform, evaluation};

/// Digest of the images and labels that `ranks` see at step 3 of epoch 2.
fn training_digest(augment: &Augment, size: u32) -> String {
    let dataset = Arc::new(Dataset::open("builtin:digits", "train").unwrap());
    let plan = BatchPlan::new(dataset.len(), 4, 6, 7).unwrap();
    let transform = Transform::training(augment, size, 7).unwrap();
    let mut loader = Loader::new(dataset, transform);
    let mut batch = Batch::new();
    let mut seen = Vec::new();
    for rank in 0..4 {
        let ids: Vec<u64> = plan.micro_batch(Epoch(2), 3, VirtualRank(rank)).collect();
        loader.load(&ids, Epoch(2), &mut batch).unwrap();
        add(&batch, &mut seen);
    }
    Sha256::of(&seen).to_string()
}

fn add(batch: &Batch, seen: &mut Vec<u8>) {
    seen.extend_from_slice(&batch.images);
    seen.extend(batch.labels.iter().flat_map(|label| label.to_le_bytes()));
}

#[test]
fn random_resized_crops_are_as_they_were() {
    assert_eq!(
        training_digest(&Augment::default(), 24),
        "f4afa934fd66b7efef49eb6d87598854e3a36bf37ec8c4d7056ce0ebecddc289"
    );
}

#[test]
fn padded_crops_are_as_they_were() {
    let augment = Augment { crop: Crop::Padded, padding: 2, ..Augment::default() };
    assert_eq!(
        training_digest(&augment, 32),
        "2fe747089d84f5e72cdb41a109b1a2c561d12a81fea9276238233d287d102b16"
    );
}

#[test]
fn whole_images_are_as_they_were() {
    let augment = Augment { crop: Crop::None, flip_probability: 0.0, ..Augment::default() };
    assert_eq!(
        training_digest(&augment, 48),
        "d42b50d3fd75f98dcff4d9741c57b4c41d1aea82a1e7b74e76d340a7d4dd3d37"
    );
}

#[test]
fn evaluation_is_as_it_was() {
    let dataset = Arc::new(Dataset::open("builtin:digits", "val").unwrap());
    let transform = Transform::evaluation(&Augment::default(), 28).unwrap();
    let ids: Vec<u64> = evaluation(dataset.len(), 9, VirtualRank(4)).collect();
    let mut loader = Loader::new(dataset, transform);
    let mut batch = Batch::new();
    loader.load(&ids, Epoch(0), &mut batch).unwrap();
    let mut seen = Vec::new();
    add(&batch, &mut seen);
    assert_eq!(
        Sha256::of(&seen).to_string(),
        "99f2199e7453d6a408d85abdd4943789400e666a883d5dbdd81e68637e67aafa"
    );
}
