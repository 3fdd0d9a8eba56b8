//! Images and labels that are unusual or wrong: one clear line each.
#![expect(clippy::unwrap_used, reason = "helpers of tests are tests too")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use shards::{
    Dataset,
    decode::Decoder,
    jpeg::{self, Pixels},
};
use tempfile::TempDir;

/// A folder with images of ash and oak, to be packed or trained on.
struct Bench {
    folder: TempDir,
}

impl Bench {
    fn new() -> Self {
        let bench = Self { folder: tempfile::tempdir().unwrap() };
        for split in ["train", "val"] {
            for class in ["ash", "oak"] {
                for number in 0..3_u8 {
                    bench.image(split, class, number);
                }
            }
        }
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, bytes: &[u8]) {
        fs::create_dir_all(self.path(name).parent().unwrap()).unwrap();
        fs::write(self.path(name), bytes).unwrap();
    }

    fn image(&self, split: &str, class: &str, number: u8) {
        let pixels = vec![number * 20; 16 * 16 * 3];
        let image = jpeg::encode(&pixels, 16, 16, Pixels::Rgb, 90).unwrap();
        self.write(&format!("data/{split}/{class}/{number}.jpg"), &image);
    }

    fn run(&self, line: &str) -> Output {
        let mut percheron = Command::new(env!("CARGO_BIN_EXE_percheron"));
        percheron.current_dir(self.folder.path()).args(line.split_whitespace()).output().unwrap()
    }

    /// The one error of a command, and that nothing but it and what was done before is said.
    fn refusal(&self, line: &str) -> String {
        let output = self.run(line);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let said = String::from_utf8(output.stderr).unwrap();
        let errors: Vec<&str> = said.lines().filter(|line| line.starts_with("error: ")).collect();
        assert_eq!(errors.len(), 1, "{said}");
        assert_eq!(said.lines().last(), Some(errors[0]), "{said}");
        errors[0].to_owned()
    }

    /// The notes of a packing that succeeds.
    fn notes(&self, line: &str) -> Vec<String> {
        let output = self.run(line);
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{said}");
        said.lines().filter(|line| line.starts_with("note: ")).map(str::to_owned).collect()
    }

    fn pixels(&self, dataset: &str, sample: u64) -> Vec<u8> {
        let dataset = Dataset::open(self.path(dataset).to_str().unwrap(), "train").unwrap();
        let image = dataset.read(sample).unwrap().image;
        let mut decoder = Decoder::new();
        let view = decoder.decode(&image).unwrap();
        (0..view.height()).flat_map(|row| view.row(row).to_vec()).collect()
    }
}

/// A grey PNG of 16 bits a channel, whose upper eight are 200.
fn deep_png(path: &Path) {
    let mut encoder = png::Encoder::new(fs::File::create(path).unwrap(), 8, 8);
    encoder.set_color(png::ColorType::Grayscale);
    encoder.set_depth(png::BitDepth::Sixteen);
    let pixels: Vec<u8> = [200, 255].repeat(64);
    encoder.write_header().unwrap().write_image_data(&pixels).unwrap();
}

#[test]
fn a_class_folder_that_one_split_lacks_is_named_with_the_split() {
    let bench = Bench::new();
    bench.image("train", "beech", 1);
    let train = "train --model reg400m_perceiver_t32 --data_path data --dry_run";
    let up = bench.refusal("train --model reg400m_perceiver_t32 --data_path data --batch_size 2");
    for word in ["\"train\" has \"beech\" and \"val\" has not", "same class folders"] {
        assert!(up.contains(word), "{up}");
    }
    fs::remove_dir_all(bench.path("data/.percheron-shards")).unwrap();
    fs::remove_dir_all(bench.path("data/val")).unwrap();
    let missing = bench.refusal(train);
    assert!(missing.contains("there is no data/val: it must hold the images"), "{missing}");
    fs::create_dir_all(bench.path("data/val/ash")).unwrap();
    let empty = bench.refusal(train);
    assert!(empty.contains("class folder data/val/ash has no .jpg, .jpeg or .png file"), "{empty}");
}

#[test]
fn a_single_pixel_is_no_picture() {
    let bench = Bench::new();
    let image = jpeg::encode(&[1, 2, 3], 1, 1, Pixels::Rgb, 90).unwrap();
    bench.write("data/train/oak/dot.jpg", &image);
    let refusal = bench.refusal("shards pack data/train --out packed");
    assert!(refusal.contains("data/train/oak/dot.jpg is corrupt"), "{refusal}");
    assert!(refusal.contains("it is a single pixel, which shows nothing"), "{refusal}");
    let skipped = bench.run("shards pack data/train --out packed --skip-corrupt");
    let said = String::from_utf8(skipped.stdout).unwrap();
    assert!(said.contains("6 samples") && said.contains("1 left out"), "{said}");

    // A line of pixels is odd, and can be shown.
    let line = jpeg::encode(&[90; 30], 10, 1, Pixels::Rgb, 90).unwrap();
    bench.write("data/train/oak/dot.jpg", &line);
    assert!(bench.run("shards pack data/train --out line").status.success());
}

#[test]
fn a_png_of_16_bits_is_cut_to_8_and_that_is_said() {
    let bench = Bench::new();
    fs::remove_dir_all(bench.path("data/train/oak")).unwrap();
    fs::remove_dir_all(bench.path("data/train/ash")).unwrap();
    fs::create_dir_all(bench.path("data/train/oak")).unwrap();
    deep_png(&bench.path("data/train/oak/deep.png"));
    let notes = bench.notes("shards pack data/train --out packed");
    assert_eq!(
        notes,
        [
            "note: 1 images of split train have 16 bits a channel: the upper eight are kept, the lower dropped"
        ]
    );
    let pixels = bench.pixels("packed", 0);
    assert_eq!(pixels.len(), 8 * 8 * 3);
    assert!(pixels.iter().all(|pixel| pixel.abs_diff(200) <= 1), "{pixels:?}");
}

#[test]
fn a_cmyk_jpeg_is_shown_in_colours_and_that_is_said() {
    let bench = Bench::new();
    fs::remove_dir_all(bench.path("data/train/ash")).unwrap();
    fs::remove_dir_all(bench.path("data/train/oak")).unwrap();
    // As Adobe writes it, inverted: no magenta and yellow, half cyan, no black.
    let pixels = [128, 255, 255, 255].repeat(16 * 16);
    let image = jpeg::encode(&pixels, 16, 16, Pixels::Cmyk, 95).unwrap();
    bench.write("data/train/oak/print.jpg", &image);
    let notes = bench.notes("shards pack data/train --out packed");
    assert_eq!(
        notes,
        [
            "note: 1 images of split train are CMYK: they are kept, and shown as Pillow converts them"
        ]
    );
    let shown = bench.pixels("packed", 0);
    let [red, green, blue] = [shown[0], shown[1], shown[2]];
    assert!(red.abs_diff(128) < 4 && green > 250 && blue > 250, "{red} {green} {blue}");
}

#[test]
fn labels_out_of_range_are_named() {
    let bench = Bench::new();
    let image = fs::read(bench.path("data/val/ash/1.jpg")).unwrap();
    let mut archive = Vec::new();
    shards::format::append_member(&mut archive, "a.jpg", &image);
    shards::format::append_member(&mut archive, "a.cls", b"7");
    shards::format::append_trailer(&mut archive);
    bench.write("tars/one.tar", &archive);
    bench.write("tars/classes.txt", b"ash\noak\n");
    let refusal = bench.refusal("shards pack tars --out packed");
    assert!(refusal.contains("names 2 classes, but an image has the class 7"), "{refusal}");

    bench.image("val", "elm", 1);
    let pack = bench.run("shards pack data/val --out three --split val");
    assert!(pack.status.success());
    let up =
        "up --recipe digits --set data.location=three --set data.train=val --set model.classes=2";
    let refusal = bench.refusal(up);
    assert!(
        refusal.contains("three has 3 classes") && refusal.contains("model.classes"),
        "{refusal}"
    );
}
