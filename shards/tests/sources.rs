//! Every kind of source, packed or indexed where it lies, and back to a folder; and packing that was cut
//! short.
#![expect(clippy::unwrap_used, reason = "helpers of tests are tests too")]

use std::{
    collections::BTreeMap,
    fs,
    panic::{self, AssertUnwindSafe},
    path::{Path, PathBuf},
    sync::Arc,
};

use cluster::Epoch;
use shards::{
    Augment, Batch, Dataset, Loader, Manifest, PackError, PackOptions, Transform, index_tars,
    jpeg::{self, Pixels},
    pack,
    pack::PackProgress,
    stats, unpack, verify,
};
use tempfile::TempDir;

fn photo(number: u8) -> Vec<u8> {
    let pixels: Vec<u8> =
        (0..24 * 18 * 3).map(|at: u32| (at * (u32::from(number) + 5)).to_le_bytes()[0]).collect();
    jpeg::encode(&pixels, 24, 18, Pixels::Rgb, 90).unwrap()
}

fn tar(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, data) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, *data).unwrap();
    }
    builder.into_inner().unwrap()
}

/// A place for a source and for what is made of it.
struct Place {
    folder: TempDir,
}

impl Place {
    fn new() -> Self {
        let place = Self { folder: tempfile::tempdir().unwrap() };
        fs::create_dir(place.source()).unwrap();
        place
    }

    fn source(&self) -> PathBuf {
        self.folder.path().join("src")
    }

    fn add(&self, name: &str, bytes: &[u8]) {
        let path = self.source().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    fn out(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    fn pack(&self, source: &Path) -> Result<Manifest, PackError> {
        pack(source, &self.out("out"), &train(), &mut |_| ())
    }

    /// Images of the packed split with their class's name.
    fn packed(&self, source: &Path) -> BTreeMap<Vec<u8>, String> {
        self.pack(source).unwrap();
        verify(&self.out("out"), "train", &mut |_| ()).unwrap();
        contents(&self.out("out"), "train")
    }
}

fn train() -> PackOptions {
    PackOptions { split: "train".to_owned(), seed: 3, ..PackOptions::default() }
}

fn contents(location: &str, split: &str) -> BTreeMap<Vec<u8>, String> {
    let dataset = Dataset::open(location, split).unwrap();
    (0..dataset.len())
        .map(|id| dataset.read(id).unwrap())
        .map(|sample| (sample.image.to_vec(), dataset.classes()[sample.label as usize].clone()))
        .collect()
}

fn expected(pairs: &[(u8, &str)]) -> BTreeMap<Vec<u8>, String> {
    pairs.iter().map(|&(number, class)| (photo(number), class.to_owned())).collect()
}

fn webdataset() -> Place {
    let place = Place::new();
    let (one, two, three) = (photo(1), photo(2), photo(3));
    let long = format!("{}/a.jpg", "folder".repeat(30)); // Needs an extension of the format.
    let long_class = long.replace("jpg", "cls");
    place.add(
        "part-0.tar",
        &tar(&[
            ("x.cls", b"1\n"),
            ("x.jpg", &one),
            ("x.json", b"{}"),
            ("y.v2.jpg", &two),
            ("y.cls", b"0"),
        ]),
    );
    place.add("part-1.tar", &tar(&[(&long, &three), (&long_class, b"2")]));
    place
}

#[test]
fn webdataset_tars_are_packed() {
    let place = webdataset();
    let found = place.packed(&place.source());
    assert_eq!(found, expected(&[(1, "1"), (2, "0"), (3, "2")]));
}

#[test]
fn webdataset_tars_take_class_names_from_a_file() {
    let place = webdataset();
    place.add("classes.txt", b"ash\noak\nyew\n");
    assert_eq!(place.packed(&place.source()), expected(&[(1, "oak"), (2, "ash"), (3, "yew")]));
    let few = webdataset();
    few.add("classes.txt", b"ash\noak\n");
    let error = few.pack(&few.source()).unwrap_err().to_string();
    assert!(error.contains("names 2 classes, but an image has the class 2"), "{error}");
}

#[test]
fn an_image_without_a_class_is_named() {
    let place = Place::new();
    place.add("a.tar", &tar(&[("x.jpg", &photo(1)), ("y.cls", b"1")]));
    let error = place.pack(&place.source()).unwrap_err().to_string();
    assert!(error.contains("a.tar/x.jpg has no class"), "{error}");
    place.add("a.tar", &tar(&[("x.jpg", &photo(1)), ("x.cls", b"cat")]));
    let error = place.pack(&place.source()).unwrap_err().to_string();
    assert!(error.contains("a.tar/x.cls is not a class index"), "{error}");
}

#[test]
fn imagenets_training_tar_is_packed() {
    let place = Place::new();
    let first = tar(&[("n02_1.JPEG", &photo(1)), ("n02_2.JPEG", &photo(2))]);
    let second = tar(&[("n01_1.JPEG", &photo(3))]);
    place.add("train.tar", &tar(&[("n02.tar", &first), ("n01.tar", &second)]));
    let expected = expected(&[(1, "n02"), (2, "n02"), (3, "n01")]);
    assert_eq!(place.packed(&place.source().join("train.tar")), expected);
    let dataset = Dataset::open(&place.out("out"), "train").unwrap();
    assert_eq!(dataset.classes(), ["n01", "n02"]);
    // The same, taken out of the outer tar.
    let apart = Place::new();
    apart.add("n02.tar", &first);
    apart.add("n01.tar", &second);
    assert_eq!(apart.packed(&apart.source()), expected);
}

#[test]
fn imagenets_validation_tar_is_packed_with_its_labels() {
    let place = Place::new();
    place.add("val.tar", &tar(&[("v1.JPEG", &photo(1)), ("v2.JPEG", &photo(2))]));
    let source = place.source().join("val.tar");
    let error = place.pack(&source).unwrap_err().to_string();
    assert!(error.contains("val.txt") && error.contains("FILE CLASS"), "{error}");
    place.add("val.txt", b"v1.JPEG n02\nv2.JPEG n01\n");
    assert_eq!(place.packed(&source), expected(&[(1, "n02"), (2, "n01")]));
}

#[test]
fn a_damaged_source_tar_is_an_error() {
    let place = Place::new();
    let mut bytes = tar(&[("x.jpg", &photo(1)), ("x.cls", b"1")]);
    bytes[40] ^= 1;
    place.add("a.tar", &bytes);
    let error = place.pack(&place.source()).unwrap_err();
    assert!(error.to_string().contains("a.tar cannot be read"), "{error}");
    let bytes = tar(&[("x.jpg", &photo(1)), ("x.cls", b"1")]);
    place.add("a.tar", &bytes[..700]);
    assert!(place.pack(&place.source()).is_err());
}

#[test]
fn cmyk_sources_are_kept_counted_and_decoded() {
    let place = Place::new();
    let cmyk = jpeg::encode(&[40; 16 * 16 * 4], 16, 16, Pixels::Cmyk, 95).unwrap();
    place.add("ash/1.jpg", &cmyk);
    place.add("ash/2.jpg", &photo(1));
    let manifest = place.pack(&place.source()).unwrap();
    assert_eq!(manifest.provenance.cmyk, 1);
    assert_eq!(stats(&place.out("out"), "train").unwrap().kinds.cmyk, 1);
    let dataset = Arc::new(Dataset::open(&place.out("out"), "train").unwrap());
    let transform = Transform::evaluation(&Augment::default(), 16).unwrap();
    Loader::new(dataset, transform).load(&[0, 1], Epoch(0), &mut Batch::new()).unwrap();
}

#[test]
fn tars_can_be_indexed_where_they_lie() {
    let place = webdataset();
    let before = fs::read(place.source().join("part-0.tar")).unwrap();
    let folder = place.source();
    let manifest = index_tars(&folder, &train(), &mut |_| ()).unwrap();
    assert_eq!(fs::read(folder.join("part-0.tar")).unwrap(), before);
    let shards: Vec<_> = manifest.shards.iter().map(|s| (s.name.as_str(), s.first)).collect();
    assert_eq!(shards, [("part-0", 0), ("part-1", 2)]);

    let location = folder.to_str().unwrap();
    assert_eq!(verify(location, "train", &mut |_| ()).unwrap().samples, 3);
    assert_eq!(contents(location, "train"), expected(&[(1, "1"), (2, "0"), (3, "2")]));
    assert!(matches!(
        index_tars(&folder, &train(), &mut |_| ()),
        Err(PackError::AlreadyPacked { .. })
    ));

    for at in (0..before.len()).step_by(7) {
        let mut damaged = before.clone();
        damaged[at] ^= 1;
        fs::write(folder.join("part-0.tar"), damaged).unwrap();
        let error = verify(location, "train", &mut |_| ()).unwrap_err().to_string();
        assert!(error.contains("part-0.tar"), "byte {at}: {error}");
    }
}

#[test]
fn tars_with_other_images_than_jpeg_are_not_indexed() {
    let place = Place::new();
    let mut png = Vec::new();
    let mut encoder = png::Encoder::new(&mut png, 2, 1);
    encoder.set_color(png::ColorType::Grayscale);
    encoder.write_header().unwrap().write_image_data(&[1, 2]).unwrap();
    place.add("a.tar", &tar(&[("x.png", &png), ("x.cls", b"0")]));
    let error = index_tars(&place.source(), &train(), &mut |_| ()).unwrap_err().to_string();
    assert!(error.contains("a.tar/x.png is not a JPEG"), "{error}");
    assert_eq!(place.packed(&place.source()).len(), 1);
}

#[test]
fn a_split_is_unpacked_to_the_folder_it_came_from() {
    let place = Place::new();
    for number in 0..6 {
        let class = if number < 4 { "ash" } else { "oak" };
        place.add(&format!("{class}/{number}.jpg"), &photo(number));
    }
    let before = place.packed(&place.source());
    let back = PathBuf::from(place.out("back"));
    assert_eq!(unpack(&place.out("out"), "train", &back, &mut |_| ()).unwrap(), 6);
    pack(&back, &place.out("again"), &train(), &mut |_| ()).unwrap();
    assert_eq!(contents(&place.out("again"), "train"), before);
    let error = unpack(&place.out("out"), "train", &back, &mut |_| ()).unwrap_err();
    assert!(error.to_string().contains("cannot be written"), "{error}");
}

#[test]
fn statistics_come_from_the_indexes() {
    let found = stats("builtin:digits", "train").unwrap();
    assert_eq!((found.samples, found.shards), (1437, 1));
    assert_eq!((found.width.min, found.width.median, found.height.max), (32, 32, 32));
    assert_eq!(found.short_sides[0], 1437);
    assert_eq!(found.kinds.grey, 1437);
    let classes: u64 = found.classes.iter().map(|class| class.samples).sum();
    assert_eq!((classes, found.classes.len()), (1437, 10));
    assert!(found.bytes < found.tar_bytes && found.image_bytes.min > 0);
}

/// More files than a shard takes.
fn many() -> Place {
    let place = Place::new();
    for number in 0..2200_u16 {
        let [low, high] = number.to_le_bytes();
        let grey = jpeg::encode(&[low, high, 3, 4], 2, 2, Pixels::Grey, 50).unwrap();
        place.add(&format!("class{}/{number}.jpg", number % 3), &grey);
    }
    place
}

/// Packs, and is killed after so many files.
fn pack_and_die(place: &Place, out: &str, files: u64) {
    let mut progress = |progress: PackProgress| {
        assert!(progress.files < files, "killed");
    };
    let dying = AssertUnwindSafe(|| pack(&place.source(), out, &train(), &mut progress));
    assert!(panic::catch_unwind(dying).is_err(), "it was to be killed");
}

fn files(folder: &str) -> BTreeMap<String, Vec<u8>> {
    fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap()))
        .collect()
}

#[test]
fn a_packing_that_was_killed_is_taken_up_and_ends_alike() {
    let place = many();
    pack(&place.source(), &place.out("whole"), &train(), &mut |_| ()).unwrap();
    let out = place.out("out");
    pack_and_die(&place, &out, 2150);
    assert!(Dataset::open(&out, "train").is_err(), "nothing can be opened yet");
    let mut first = None;
    pack(&place.source(), &out, &train(), &mut |progress| {
        first.get_or_insert(progress.files);
    })
    .unwrap();
    assert_eq!(first, Some(2049), "the first shard is not packed again");
    assert!(files(&out) == files(&place.out("whole")));
}

#[test]
fn another_source_or_a_lost_shard_starts_anew() {
    let place = many();
    let out = place.out("out");
    pack_and_die(&place, &out, 2150);
    place.add("class0/new.jpg", &photo(1));
    let first = |place: &Place| {
        let mut first = None;
        pack(&place.source(), &out, &train(), &mut |progress| {
            first.get_or_insert(progress.files);
        })
        .unwrap();
        first
    };
    assert_eq!(first(&place), Some(1));

    fs::remove_file(Path::new(&out).join("train.json")).unwrap();
    pack_and_die(&place, &out, 2150);
    fs::remove_file(Path::new(&out).join("train-000000.tar")).unwrap();
    assert_eq!(first(&place), Some(1));
    verify(&out, "train", &mut |_| ()).unwrap();
}

#[test]
fn an_image_folder_in_a_tar_is_packed() {
    let place = Place::new();
    let folder = tar(&[
        ("train/oak/1.jpg", &photo(1)),
        ("train/ash/2.jpg", &photo(2)),
        ("train/oak/3.jpg", &photo(3)),
    ]);
    place.add("train.tar", &folder);
    let expected = expected(&[(1, "oak"), (2, "ash"), (3, "oak")]);
    assert_eq!(place.packed(&place.source().join("train.tar")), expected);
    let flat = Place::new();
    flat.add("train.tar", &tar(&[("1.jpg", &photo(1))]));
    let error = flat.pack(&flat.source().join("train.tar")).unwrap_err().to_string();
    assert!(error.contains("neither .cls files nor class folders"), "{error}");
}

/// Class name, pixels and label of each packed image.
fn packed_pixels(place: &Place, source: &Path) -> Vec<(String, Vec<u8>, u32)> {
    place.pack(source).unwrap();
    verify(&place.out("out"), "train", &mut |_| ()).unwrap();
    let dataset = Dataset::open(&place.out("out"), "train").unwrap();
    let mut decoder = shards::decode::Decoder::new();
    (0..dataset.len())
        .map(|id| {
            let sample = dataset.read(id).unwrap();
            let view = decoder.decode(&sample.image).unwrap();
            let pixels = (0..view.height()).flat_map(|y| view.row(y).to_vec()).collect();
            (dataset.classes()[sample.label as usize].clone(), pixels, sample.label)
        })
        .collect()
}

fn idx(dimensions: &[u32], bytes: &[u8]) -> Vec<u8> {
    let magic = 0x0800 | u32::try_from(dimensions.len()).unwrap();
    let words = std::iter::once(&magic).chain(dimensions);
    words.flat_map(|word| word.to_be_bytes()).chain(bytes.iter().copied()).collect()
}

#[test]
fn mnists_files_are_packed() {
    let place = Place::new();
    let images: Vec<u8> =
        [40_u8, 90, 200].into_iter().flat_map(|grey| vec![grey; 28 * 28]).collect();
    place.add("t10k-images-idx3-ubyte", &idx(&[3, 28, 28], &images));
    place.add("t10k-labels-idx1-ubyte", &idx(&[3], &[7, 0, 2]));
    let source = place.source().join("t10k-images-idx3-ubyte");
    let mut found: Vec<(u32, u8)> = packed_pixels(&place, &source)
        .iter()
        .map(|(_, pixels, label)| (*label, pixels[300]))
        .collect();
    found.sort_unstable();
    assert_eq!(found, [(0, 90), (2, 200), (7, 40)]);
    place.add("t10k-labels-idx1-ubyte", &idx(&[2], &[7, 0]));
    let error = place.pack(&source).unwrap_err().to_string();
    assert!(error.contains("as many labels as images"), "{error}");
    place.add("t10k-images-idx3-ubyte", &images);
    let error = place.pack(&source).unwrap_err().to_string();
    assert!(error.contains("not an idx file"), "{error}");
}

#[test]
fn cifars_files_are_packed() {
    let place = Place::new();
    let image = |label: u8, rgb: [u8; 3]| {
        let planes = rgb.into_iter().flat_map(|value| vec![value; 1024]);
        std::iter::once(label).chain(planes).collect::<Vec<u8>>()
    };
    place.add("data_batch_1.bin", &image(3, [10, 20, 30]));
    place.add("data_batch_2.bin", &[image(9, [200, 100, 50]), image(0, [5, 6, 7])].concat());
    place.add("test_batch.bin", &image(1, [1, 1, 1]));
    let names = "airplane\nautomobile\nbird\ncat\ndeer\ndog\nfrog\nhorse\nship\ntruck\n\n";
    place.add("batches.meta.txt", names.as_bytes());
    let mut found: Vec<_> = packed_pixels(&place, &place.source())
        .into_iter()
        .map(|(class, pixels, _)| (class, [pixels[600], pixels[601], pixels[602]]))
        .collect();
    found.sort();
    let near = |(class, rgb): &(String, [u8; 3]), name: &str, expected: [u8; 3]| {
        // JPEG has other colours.
        class == name && rgb.iter().zip(expected).all(|(a, b)| a.abs_diff(b) <= 2)
    };
    assert!(near(&found[0], "airplane", [5, 6, 7]), "{found:?}");
    assert!(near(&found[1], "cat", [10, 20, 30]), "{found:?}");
    assert!(near(&found[2], "truck", [200, 100, 50]), "{found:?}");
    place.add("data_batch_1.bin", &[1; 100]);
    let error = place.pack(&place.source()).unwrap_err().to_string();
    assert!(error.contains("data_batch_1.bin is not a file of CIFAR's"), "{error}");
}

/// Bounded by a number of cases, not by time, so that it does the same on every machine.
#[test]
fn a_source_tar_with_changed_bytes_is_packed_or_an_error() {
    let mut random = 9_u64;
    let mut below = |limit: usize| {
        random =
            random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(random >> 33).unwrap() % limit
    };
    let members = [
        ("a.jpg", photo(1)),
        ("a.cls", b"1".to_vec()),
        ("b.jpg", photo(2)),
        ("b.cls", b"0".to_vec()),
    ];
    let members: Vec<(&str, &[u8])> =
        members.iter().map(|(name, bytes)| (*name, bytes.as_slice())).collect();
    let whole = tar(&members);
    let (mut packed, mut refused) = (0, 0);
    for _ in 0..400 {
        let place = Place::new();
        let mut damaged = whole.clone();
        for _ in 0..=below(3) {
            // Mostly headers: 512 bytes before each member.
            let at = below(damaged.len());
            let at = if below(4) == 0 { at } else { at / 512 * 512 + below(160).min(511) };
            damaged[at.min(whole.len() - 1)] = below(256).to_le_bytes()[0];
        }
        if below(6) == 0 {
            damaged.truncate(below(damaged.len()));
        }
        place.add("x.tar", &damaged);
        match place.pack(&place.source()) {
            Ok(_) => {
                verify(&place.out("out"), "train", &mut |_| ()).unwrap();
                packed += 1;
            }
            Err(error) => {
                assert!(!error.to_string().is_empty());
                refused += 1;
            }
        }
    }
    assert!(packed > 10 && refused > 10, "{packed} packed, {refused} refused");
}
