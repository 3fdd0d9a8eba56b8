//! Once its buffers have grown, a loader allocates nothing for a sample.
//!
//! What is counted is this program's heap. libjpeg-turbo has a state of its own for each image, which
//! it takes from the C library and gives back before the next.
#![expect(clippy::unwrap_used, reason = "helpers of tests are tests too")]

use std::{fs, path::Path, sync::Arc};

use cluster::Epoch;
use shards::{
    Augment, Batch, Dataset, Erase, Loader, PackOptions, RandAugment, Transform,
    jpeg::{self, Pixels},
    pack,
};

const CLASSES: usize = 2;
const IMAGES: usize = 12;

fn source(folder: &Path) {
    for class in 0..CLASSES {
        let class = folder.join(format!("class{class}"));
        fs::create_dir_all(&class).unwrap();
        for number in 0..IMAGES / CLASSES {
            let (width, height) = (120 + number * 9, 90 + number * 5);
            let pixels: Vec<u8> =
                (0..width * height * 3).map(|at| (at * 31 % 253).to_le_bytes()[0]).collect();
            let jpeg = jpeg::encode(&pixels, width, height, Pixels::Rgb, 90).unwrap();
            fs::write(class.join(format!("{number}.jpg")), jpeg).unwrap();
        }
    }
}

/// Allocations that two epochs of loading make after a first one.
fn allocations(location: &str, split: &str, transform: Transform) -> u64 {
    let dataset = Arc::new(Dataset::open(location, split).unwrap());
    let ids: Vec<u64> = (0..dataset.len().min(64)).collect();
    let mut loader = Loader::new(dataset, transform);
    let mut batch = Batch::new();
    for epoch in 0..8 {
        loader.load(&ids, Epoch(epoch), &mut batch).unwrap();
    }
    let counted = allocation_counter::measure(|| {
        loader.load(&ids, Epoch(3), &mut batch).unwrap();
        loader.load(&ids, Epoch(5), &mut batch).unwrap();
    });
    counted.count_total
}

#[test]
fn training_and_evaluation_allocate_nothing_a_sample() {
    let folder = tempfile::tempdir().unwrap();
    let (from, to) = (folder.path().join("src"), folder.path().join("out"));
    source(&from);
    let to = to.to_str().unwrap();
    let options = PackOptions { split: "train".to_owned(), ..PackOptions::default() };
    pack(&from, to, &options, &mut |_| ()).unwrap();
    let training = Transform::training(&Augment::default(), 64, 1).unwrap();
    let evaluation = Transform::evaluation(&Augment::default(), 64).unwrap();
    assert_eq!(allocations(to, "train", training.clone()), 0);
    assert_eq!(allocations(to, "train", evaluation), 0);
    assert_eq!(allocations("builtin:digits", "train", training), 0);
    let full = Augment {
        rand_augment: Some(RandAugment::parse("rand-m9-mstd0.5-inc1").unwrap()),
        erase: Some(Erase::default()),
        ..Augment::default()
    };
    let full = Transform::training(&full, 64, 1).unwrap();
    assert_eq!(allocations(to, "train", full), 0);
}

#[test]
fn the_counter_counts() {
    let counted = allocation_counter::measure(|| drop(std::hint::black_box(vec![1_u8; 100])));
    assert_eq!(counted.count_total, 1);
}
