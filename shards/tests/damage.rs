//! Damaged bytes, wherever they are, are found and named, never trained on and never a crash.
#![expect(clippy::unwrap_used, reason = "helpers of tests are tests too")]

use std::{error::Error, fs, path::PathBuf, sync::Arc};

use cluster::{Epoch, VirtualRank};
use proptest::prelude::*;
use shards::{
    Augment, Batch, BatchPlan, Dataset, LoadError, Loader, Manifest, OnCorruptSample, PackOptions,
    Scratch, Transform,
    decode::Decoder,
    format,
    index::Index,
    jpeg::{self, Opened, Pixels},
    pack, verify,
};
use tempfile::TempDir;

const SAMPLES: u64 = 24;

/// Twenty-four small photographs of two classes, packed.
struct Split {
    folder: TempDir,
}

impl Split {
    fn new() -> Self {
        let split = Self { folder: tempfile::tempdir().unwrap() };
        let source = split.folder.path().join("src");
        for number in 0..SAMPLES {
            let class = source.join(["ash", "oak"][usize::try_from(number % 2).unwrap()]);
            fs::create_dir_all(&class).unwrap();
            fs::write(class.join(format!("{number}.jpg")), photo(number)).unwrap();
        }
        let options = PackOptions { split: "train".to_owned(), ..PackOptions::default() };
        pack(&source, &split.location(), &options, &mut |_| ()).unwrap();
        split
    }

    fn location(&self) -> String {
        self.folder.path().join("out").to_str().unwrap().to_owned()
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join("out").join(name)
    }

    fn index(&self) -> Index {
        Index::parse(&fs::read(self.file(IDX)).unwrap()).unwrap()
    }

    /// Flips a bit in the image of each of these samples.
    fn damage(&self, samples: &[usize]) {
        let index = self.index();
        let mut tar = fs::read(self.file(TAR)).unwrap();
        for &sample in samples {
            let record = &index.records[sample];
            tar[usize::try_from(record.offset).unwrap() + record.length as usize / 2] ^= 16;
        }
        fs::write(self.file(TAR), tar).unwrap();
    }
}

const TAR: &str = "train-000000.tar";
const IDX: &str = "train-000000.idx";

fn photo(number: u64) -> Vec<u8> {
    let pixels: Vec<u8> =
        (0..40 * 30 * 3).map(|at: u64| (at * (2 * number + 3) / 2).to_le_bytes()[0]).collect();
    jpeg::encode(&pixels, 40, 30, Pixels::Rgb, 85).unwrap()
}

fn chain(error: &dyn Error) -> String {
    let causes = std::iter::successors(Some(error), |&error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// Numbers that look random and are the same each time.
fn numbers(seed: u64) -> impl FnMut(usize) -> usize {
    let mut state = seed;
    move |below| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(state >> 33).unwrap() % below
    }
}

#[test]
fn a_flipped_byte_anywhere_is_found_and_named() {
    let split = Split::new();
    let whole: Vec<_> = {
        let dataset = Dataset::open(&split.location(), "train").unwrap();
        (0..SAMPLES).map(|sample| dataset.read(sample).unwrap()).collect()
    };
    let records = split.index().records;
    let mut random = numbers(1);
    for name in [TAR, IDX] {
        let bytes = fs::read(split.file(name)).unwrap();
        for _ in 0..300 {
            let (at, bit) = (random(bytes.len()), random(8));
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << bit;
            fs::write(split.file(name), &damaged).unwrap();

            let message = chain(&verify(&split.location(), "train", &mut |_| ()).unwrap_err());
            assert!(message.contains(name), "byte {at} of {name}: {message}");
            let inside = records.iter().find(|record| {
                name == TAR
                    && (record.offset..record.offset + u64::from(record.length))
                        .contains(&(at as u64))
            });
            if let Some(record) = inside {
                let place = format!("offset {}", record.offset);
                assert!(message.contains(&place) && message.contains("(key 0000"), "{message}");
            }
            // Reading finds an image's damage too, and nothing else ever changes what is read.
            let Ok(dataset) = Dataset::open(&split.location(), "train") else { continue };
            assert_eq!(name, TAR, "a changed index was opened");
            for (sample, expected) in (0..).zip(&whole) {
                match dataset.read(sample) {
                    Ok(read) => assert_eq!(&read, expected),
                    Err(error) => {
                        let place = inside.map(|record| format!("offset {}", record.offset));
                        assert!(chain(&error).contains(&place.unwrap()), "{}", chain(&error));
                    }
                }
            }
        }
        fs::write(split.file(name), &bytes).unwrap();
    }
    verify(&split.location(), "train", &mut |_| ()).unwrap();
}

/// The images and labels of a step, whoever prepares them.
fn step(location: &str, ranks: u32, on_corrupt: OnCorruptSample) -> Result<Batch, LoadError> {
    let dataset = Arc::new(Dataset::open(location, "train").unwrap());
    let plan = BatchPlan::new(SAMPLES, ranks, 24 / ranks, 5).unwrap();
    let transform = Transform::training(&Augment::default(), 16, 5).unwrap();
    let mut all = Batch { size: 16, ..Batch::new() };
    for rank in 0..ranks {
        let mut loader =
            Loader::new(Arc::clone(&dataset), transform.clone()).on_corrupt(on_corrupt);
        let ids: Vec<u64> = plan.micro_batch(Epoch(1), 0, VirtualRank(rank)).collect();
        let mut batch = Batch::new();
        loader.load(&ids, Epoch(1), &mut batch)?;
        let before = all.labels.len();
        all.images.extend(&batch.images);
        all.labels.extend(&batch.labels);
        all.skipped.extend(batch.skipped.into_iter().map(|mut skipped| {
            skipped.place += before;
            skipped
        }));
    }
    Ok(all)
}

#[test]
fn a_damaged_sample_stops_training_unless_told_otherwise() {
    let split = Split::new();
    split.damage(&[7]);
    let error = step(&split.location(), 1, OnCorruptSample::default()).unwrap_err();
    assert!(chain(&error).contains("damaged at sample 7 (key 00000007-"), "{}", chain(&error));
}

#[test]
fn skipping_takes_the_next_whole_sample_whoever_reads() {
    let split = Split::new();
    let whole = step(&split.location(), 4, OnCorruptSample::SkipAndLog).unwrap();
    assert_eq!(whole.skipped, []);
    split.damage(&[7, 8, 23]);
    let one = step(&split.location(), 1, OnCorruptSample::SkipAndLog).unwrap();
    for ranks in [2, 3, 8, 24] {
        let many = step(&split.location(), ranks, OnCorruptSample::SkipAndLog).unwrap();
        assert!(many == one, "{ranks} ranks");
    }
    let mut skipped: Vec<_> = one.skipped.iter().map(|one| (one.sample, one.instead)).collect();
    skipped.sort_unstable();
    assert_eq!(skipped, [(7, 9), (8, 9), (23, 0)]);
    assert!(one.skipped.iter().all(|skipped| skipped.fault.contains("crc32c")));
    // Every other place is as it was; the damaged ones show the other sample's own pixels.
    let places: Vec<usize> = one.skipped.iter().map(|skipped| skipped.place).collect();
    let image = |batch: &Batch, place: usize| batch.images[place * 768..][..768].to_vec();
    for place in (0..24).filter(|place| !places.contains(place)) {
        assert_eq!(image(&one, place), image(&whole, place));
    }
    let of_seven = one.skipped.iter().find(|skipped| skipped.sample == 7).unwrap();
    let of_eight = one.skipped.iter().find(|skipped| skipped.sample == 8).unwrap();
    assert_eq!(image(&one, of_seven.place), image(&one, of_eight.place));
}

#[test]
fn a_split_without_a_whole_sample_is_an_error() {
    let split = Split::new();
    split.damage(&(0..24).collect::<Vec<_>>());
    let error = step(&split.location(), 1, OnCorruptSample::SkipAndLog).unwrap_err();
    assert!(matches!(error, LoadError::NothingWhole { .. }), "{error}");
}

/// What the loader does with an image, whatever its bytes are.
fn prepare(bytes: &[u8], sample: u64) {
    let training = Transform::training(&Augment::default(), 16, 1).unwrap();
    let evaluation = Transform::evaluation(&Augment::default(), 16).unwrap();
    let (mut decoder, mut scratch) = (Decoder::new(), Scratch::new());
    let mut target = vec![0; 16 * 16 * 3];
    for transform in [training, evaluation] {
        let Ok(image) = Opened::new(bytes) else { return };
        let whole = (image.header().width, image.header().height);
        if whole.0 * whole.1 > 1 << 20 {
            return; // A damaged side can ask for a gigabyte.
        }
        let part = transform.part(whole.0, whole.1, Epoch(0), sample);
        let Ok(part) = decoder.decode_part(image, part) else { return };
        transform.apply_to_part(part, whole, Epoch(0), sample, &mut scratch, &mut target).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn any_bytes_are_an_image_or_an_error(
        mut bytes in prop::collection::vec(any::<u8>(), 0..600), start: bool, sample: u64,
    ) {
        if start && bytes.len() > 2 {
            bytes[..2].copy_from_slice(b"\xFF\xD8");
        }
        prepare(&bytes, sample);
    }

    #[test]
    fn a_photograph_with_changed_bytes_is_an_image_or_an_error(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in any::<prop::sample::Index>(), shorten: bool, sample: u64,
    ) {
        let mut bytes = photo(sample % 7);
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if shorten {
            bytes.truncate(cut.index(bytes.len()));
        }
        prepare(&bytes, sample);
    }

    #[test]
    fn any_bytes_are_an_archive_an_index_a_manifest_or_an_error(
        bytes in prop::collection::vec(any::<u8>(), 0..2000), offset in 0u64..3000,
    ) {
        let _outcome = format::member_at(&bytes, offset);
        let _outcome = Index::parse(&bytes);
        let _outcome = Manifest::parse(&bytes);
    }
}
