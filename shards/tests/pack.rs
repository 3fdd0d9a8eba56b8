//! Packing a folder, reading it back, and what happens to damaged files on the way.
#![expect(clippy::unwrap_used, reason = "helpers of tests are tests too")]

use std::{
    collections::BTreeMap,
    error::Error,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use cluster::Epoch;
use shards::{
    Augment, Batch, Dataset, Loader, Manifest, PackError, PackOptions, Transform,
    decode::Decoder,
    index::{Flags, Index},
    jpeg::{self, Pixels},
    pack,
    pack::OnCorrupt,
    verify,
};
use tempfile::TempDir;

/// A source folder and a place to pack it to.
struct Bench {
    folder: TempDir,
}

impl Bench {
    /// Two classes, `ash` with three images and `oak` with two.
    fn new() -> Self {
        Self::with(&[("ash", 3), ("oak", 2)])
    }

    fn with(classes: &[(&str, u8)]) -> Self {
        let bench = Self { folder: tempfile::tempdir().unwrap() };
        for &(class, count) in classes {
            fs::create_dir_all(bench.source().join(class)).unwrap();
            for number in 0..count {
                bench.add(&format!("{class}/leaf.{number}.JPEG"), &photo(number));
            }
        }
        bench
    }

    fn source(&self) -> PathBuf {
        self.folder.path().join("src")
    }

    fn out(&self) -> String {
        self.folder.path().join("out").to_str().unwrap().to_owned()
    }

    fn file(&self, name: &str) -> PathBuf {
        Path::new(&self.out()).join(name)
    }

    fn add(&self, name: &str, bytes: &[u8]) {
        fs::write(self.source().join(name), bytes).unwrap();
    }

    fn pack(&self, options: &PackOptions) -> Result<Manifest, PackError> {
        pack(&self.source(), &self.out(), options, &mut |_| ())
    }

    fn packed() -> Self {
        let bench = Self::new();
        bench.pack(&train()).unwrap();
        bench
    }

    fn damage(&self, name: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = fs::read(self.file(name)).unwrap();
        change(&mut bytes);
        fs::write(self.file(name), bytes).unwrap();
    }
}

fn train() -> PackOptions {
    PackOptions { split: "train".to_owned(), seed: 3, ..PackOptions::default() }
}

fn photo(number: u8) -> Vec<u8> {
    let pixels: Vec<u8> =
        (0..20 * 16 * 3).map(|at: u32| (at * (u32::from(number) + 3)).to_le_bytes()[0]).collect();
    jpeg::encode(&pixels, 20, 16, Pixels::Rgb, 90).unwrap()
}

fn png(color: png::ColorType, pixels: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, 4, 2);
    encoder.set_color(color);
    encoder.write_header().unwrap().write_image_data(pixels).unwrap();
    bytes
}

/// An error and everything that caused it, as a program prints it.
fn chain(error: &dyn Error) -> String {
    let causes = std::iter::successors(Some(error), |&error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

#[test]
fn jpeg_files_are_kept_byte_for_byte() {
    let bench = Bench::packed();
    let dataset = Dataset::open(&bench.out(), "train").unwrap();
    assert_eq!(dataset.classes(), ["ash", "oak"]);
    let mut packed: BTreeMap<Vec<u8>, u32> = BTreeMap::new();
    for id in 0..dataset.len() {
        let sample = dataset.read(id).unwrap();
        *packed.entry(sample.image.to_vec()).or_default() += 1 + 10 * sample.label;
    }
    // The first two photos are in both classes, the third only in the first.
    let found: Vec<u32> = [0, 1, 2].map(|number| packed[&photo(number)]).into();
    assert_eq!(found, [12, 12, 1]);
    assert_eq!(verify(&bench.out(), "train", &mut |_| ()).unwrap().samples, 5);
}

#[test]
fn equal_sources_and_seeds_make_equal_files() {
    let (one, two) = (Bench::packed(), Bench::packed());
    for name in ["train.json", "train-000000.tar", "train-000000.idx"] {
        assert!(fs::read(one.file(name)).unwrap() == fs::read(two.file(name)).unwrap(), "{name}");
    }
    let other = Bench::new();
    other.pack(&PackOptions { seed: 4, ..train() }).unwrap();
    let tar = |bench: &Bench| fs::read(bench.file("train-000000.tar")).unwrap();
    assert!(tar(&one) != tar(&other));
}

#[test]
fn only_finished_files_are_left_behind() {
    let bench = Bench::packed();
    let mut names: Vec<_> =
        fs::read_dir(bench.out()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["train-000000.idx", "train-000000.tar", "train.json"]);
}

#[test]
fn png_files_become_jpeg_of_nearly_the_same_pixels() {
    let bench = Bench::new();
    fs::create_dir(bench.source().join("yew")).unwrap();
    let ramp: Vec<u8> = (0..8).map(|at| at * 30).collect();
    bench.add("yew/grey.png", &png(png::ColorType::Grayscale, &ramp));
    let rgba: Vec<u8> = ramp.iter().flat_map(|&v| [v, 255 - v, 90, 7]).collect();
    bench.add("yew/rgba.png", &png(png::ColorType::Rgba, &rgba));
    let manifest = bench.pack(&train()).unwrap();
    assert_eq!(manifest.provenance.converted, 2);

    let dataset = Dataset::open(&bench.out(), "train").unwrap();
    let mut decoder = Decoder::new();
    for (id, record) in (0..).zip(&dataset.indexes()[0].records) {
        assert_eq!(record.flags.has(Flags::RE_ENCODED), record.label == 2);
        if record.label == 2 {
            let sample = dataset.read(id).unwrap();
            let image = decoder.decode(&sample.image).unwrap();
            assert_eq!((image.width(), image.height()), (4, 2));
            let grey = record.flags.has(Flags::GREY);
            let last = image.row(1)[9..].to_vec();
            let expected = if grey { [210; 3] } else { [210, 45, 90] };
            assert!(last.iter().zip(expected).all(|(&a, b)| a.abs_diff(b) <= 3), "{last:?}");
        }
    }
}

#[test]
fn a_corrupt_source_is_named_and_nothing_can_be_opened() {
    let bench = Bench::new();
    bench.add("oak/broken.jpg", &photo(1)[..photo(1).len() - 50]);
    let error = bench.pack(&train()).unwrap_err();
    let message = chain(&error);
    assert!(message.contains("oak/broken.jpg is corrupt"), "{message}");
    assert!(message.contains("end of JPEG"), "{message}");
    assert!(Dataset::open(&bench.out(), "train").is_err());
}

#[test]
fn corrupt_sources_are_left_out_on_request_and_listed() {
    let bench = Bench::new();
    bench.add("oak/broken.jpg", &photo(1)[..200]);
    bench.add("ash/text.png", b"not an image");
    let options = PackOptions { on_corrupt: OnCorrupt::Skip, ..train() };
    let manifest = bench.pack(&options).unwrap();
    assert_eq!(manifest.provenance.skipped, ["ash/text.png", "oak/broken.jpg"]);
    assert_eq!(verify(&bench.out(), "train", &mut |_| ()).unwrap().samples, 5);
}

#[test]
fn a_split_that_exists_is_not_overwritten() {
    let bench = Bench::packed();
    let before = fs::read(bench.file("train.json")).unwrap();
    let error = bench.pack(&PackOptions { seed: 9, ..train() }).unwrap_err();
    assert!(error.to_string().contains("already exists and is not overwritten"), "{error}");
    assert_eq!(fs::read(bench.file("train.json")).unwrap(), before);
    verify(&bench.out(), "train", &mut |_| ()).unwrap();
    bench.pack(&PackOptions { split: "val".to_owned(), ..train() }).unwrap();
}

#[test]
fn a_source_without_class_folders_or_images_is_refused() {
    let bench = Bench::new();
    fs::create_dir(bench.source().join("elm")).unwrap();
    assert!(
        matches!(bench.pack(&train()), Err(PackError::EmptyClass(path)) if path.ends_with("elm"))
    );
    let flat = bench.source().join("ash");
    let error = pack(&flat, &bench.out(), &train(), &mut |_| ()).unwrap_err();
    assert!(error.to_string().contains("has no class folders"), "{error}");
    let error = bench.pack(&PackOptions { split: "../x".to_owned(), ..train() }).unwrap_err();
    assert!(error.to_string().contains("split name"), "{error}");
}

#[test]
fn progress_ends_at_the_number_of_files() {
    let bench = Bench::new();
    let mut seen = Vec::new();
    pack(&bench.source(), &bench.out(), &train(), &mut |progress| seen.push(progress)).unwrap();
    assert_eq!(seen.len(), 5);
    assert_eq!((seen[4].files, seen[4].files_total), (5, 5));
}

#[test]
fn more_samples_than_fit_in_a_shard_start_another() {
    let bench = Bench::new();
    let grey = jpeg::encode(&[1, 2, 3, 4], 2, 2, Pixels::Grey, 50).unwrap();
    for number in 0..2100 {
        bench.add(&format!("oak/{number}.jpg"), &grey);
    }
    let manifest = bench.pack(&train()).unwrap();
    let shards: Vec<_> = manifest.shards.iter().map(|shard| (shard.first, shard.samples)).collect();
    assert_eq!(shards, [(0, 2048), (2048, 57)]);
    let dataset = Dataset::open(&bench.out(), "train").unwrap();
    assert!(dataset.read(2104).is_ok());
    assert!(dataset.read(2105).unwrap_err().to_string().contains("the split has 2105"));
    verify(&bench.out(), "train", &mut |_| ()).unwrap();
}

#[test]
fn a_truncated_shard_is_found_when_the_split_is_opened() {
    let bench = Bench::packed();
    bench.damage("train-000000.tar", |bytes| bytes.truncate(3000));
    let message = Dataset::open(&bench.out(), "train").unwrap_err().to_string();
    assert!(message.contains("train-000000.tar has 3000 bytes"), "{message}");
    assert!(message.contains("it is truncated; copy it again"), "{message}");
}

#[test]
fn a_missing_file_is_named_when_the_split_is_opened() {
    for name in ["train-000000.tar", "train-000000.idx"] {
        let bench = Bench::packed();
        fs::remove_file(bench.file(name)).unwrap();
        let message = Dataset::open(&bench.out(), "train").unwrap_err().to_string();
        assert!(message.contains(&format!("{name} is missing")), "{message}");
    }
    let bench = Bench::packed();
    let message = Dataset::open(&bench.out(), "val").unwrap_err().to_string();
    assert!(message.contains("has no split \"val\": val.json is missing"), "{message}");
}

#[test]
fn an_index_of_another_packing_is_refused() {
    let (bench, other) = (Bench::packed(), Bench::new());
    other.pack(&PackOptions { seed: 4, ..train() }).unwrap();
    fs::copy(other.file("train-000000.idx"), bench.file("train-000000.idx")).unwrap();
    let message = Dataset::open(&bench.out(), "train").unwrap_err().to_string();
    assert!(message.contains("is not the one the manifest names"), "{message}");
}

#[test]
fn a_damaged_sample_is_named_and_never_returned() {
    let bench = Bench::packed();
    let index = Index::parse(&fs::read(bench.file("train-000000.idx")).unwrap()).unwrap();
    let at = usize::try_from(index.records[2].offset).unwrap();
    bench.damage("train-000000.tar", |bytes| bytes[at + 100] ^= 4);
    let dataset = Arc::new(Dataset::open(&bench.out(), "train").unwrap());
    let message = dataset.read(2).unwrap_err().to_string();
    assert!(
        message.contains("train-000000.tar is damaged at sample 2 (key 00000002-leaf_"),
        "{message}"
    );
    assert!(message.contains(&format!("offset {at}")), "{message}");

    let transform = Transform::evaluation(&Augment::default(), 16).unwrap();
    let mut loader = Loader::new(dataset, transform);
    loader.load(&[0, 1, 3], Epoch(0), &mut Batch::new()).unwrap();
    assert!(loader.load(&[0, 1, 2], Epoch(0), &mut Batch::new()).is_err());
}

#[test]
fn verification_finds_a_flip_of_any_byte_and_says_where() {
    let bench = Bench::with(&[("ash", 1)]); // Each byte costs a verification.
    bench.pack(&train()).unwrap();
    for name in ["train-000000.tar", "train-000000.idx"] {
        let whole = fs::read(bench.file(name)).unwrap();
        for at in 0..whole.len() {
            bench.damage(name, |bytes| bytes[at] ^= 1 << (at % 8));
            let error = verify(&bench.out(), "train", &mut |_| ()).unwrap_err();
            assert!(chain(&error).contains(name), "byte {at} of {name}: {}", chain(&error));
            fs::write(bench.file(name), &whole).unwrap();
        }
    }
    verify(&bench.out(), "train", &mut |_| ()).unwrap();
}

#[test]
fn a_damaged_manifest_is_named_with_its_field() {
    let bench = Bench::packed();
    bench.damage("train.json", |bytes| {
        let text = String::from_utf8(bytes.clone()).unwrap();
        *bytes = text.replacen("\"samples\": 5", "\"samples\": 6", 1).into_bytes();
    });
    let message = chain(&Dataset::open(&bench.out(), "train").unwrap_err());
    assert!(message.contains("train.json is damaged"), "{message}");
    assert!(message.contains("field `samples`: is 6, the shards hold 5"), "{message}");
}
