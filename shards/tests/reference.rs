//! Parity with the reference pipeline (Pillow 9.5, torchvision, timm), to the bit.
//!
//! The reference values are not part of this repository. They are looked for beside it; without them
//! these tests print why they checked nothing, and the tests inside the modules stand alone.
#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests are tests too")]

use std::{fs, path::PathBuf};

use cluster::Epoch;
use safetensors::SafeTensors;
use serde::Deserialize;
use shards::{
    Augment, Batch, Normalize, Scratch, Transform,
    decode::Decoder,
    image::{self, Rect, View},
    operation::Operation,
    rand_augment::KINDS,
    resize::Resizer,
};

#[derive(Deserialize)]
struct Cases {
    resize: Vec<ResizeCase>,
    crop: Vec<CropCase>,
    flip: Vec<String>,
    normalise: Vec<String>,
    eval: Vec<EvalCase>,
    decode: Vec<DecodeCase>,
    ops: Vec<OperationCase>,
    level_to_arg: Vec<LevelCase>,
    pipeline: Vec<PipelineCase>,
}

#[derive(Deserialize)]
struct OperationCase {
    key: String,
    image: String,
    op: String,
    level: Option<f64>,
    sign: Option<f64>,
}

#[derive(Deserialize)]
struct LevelCase {
    op: String,
    level: f64,
    sign: Option<f64>,
    arg: f64,
}

#[derive(Deserialize)]
struct PipelineCase {
    id: u32,
    image: String,
    size: usize,
    #[serde(rename = "box")]
    crop: [usize; 4],
    flip: bool,
    ops: Vec<PipelineOperation>,
}

#[derive(Deserialize)]
struct PipelineOperation {
    op: String,
    level: Option<f64>,
    sign: Option<f64>,
}

#[derive(Deserialize)]
struct ResizeCase {
    key: String,
    image: String,
    width: usize,
    height: usize,
}

#[derive(Deserialize)]
struct CropCase {
    key: String,
    image: String,
    i: usize,
    j: usize,
    h: usize,
    w: usize,
    size: usize,
}

#[derive(Deserialize)]
struct EvalCase {
    key: String,
    image: String,
    input_size: u32,
    crop_pct: f64,
    normalised: Statistics,
}

#[derive(Deserialize)]
struct Statistics {
    sum: f64,
    first: Vec<f32>,
}

#[derive(Deserialize)]
struct DecodeCase {
    key: String,
    format: String,
}

struct Reference {
    cases: Cases,
    tensors: Vec<u8>,
}

struct Picture {
    pixels: Vec<u8>,
    width: usize,
    height: usize,
}

impl Picture {
    fn view(&self) -> View<'_> {
        View::new(&self.pixels, self.width, self.height)
    }
}

impl Reference {
    fn load() -> Option<Self> {
        let folder =
            PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared/reference/golden");
        let (Ok(cases), Ok(tensors)) =
            (fs::read(folder.join("augment.json")), fs::read(folder.join("augment.safetensors")))
        else {
            println!(
                "nothing checked: ../shared/reference/golden/augment.* are not beside the repository"
            );
            return None;
        };
        Some(Self { cases: serde_json::from_slice(&cases).unwrap(), tensors })
    }

    fn tensor(&self, key: &str) -> (Vec<usize>, Vec<u8>) {
        let tensors = SafeTensors::deserialize(&self.tensors).unwrap();
        let tensor = tensors.tensor(key).unwrap();
        (tensor.shape().to_vec(), tensor.data().to_vec())
    }

    fn picture(&self, key: &str) -> Picture {
        let (shape, pixels) = self.tensor(key);
        Picture { pixels, width: shape[1], height: shape[0] }
    }
}

#[test]
fn resizing_is_pillows() {
    let Some(reference) = Reference::load() else { return };
    let mut resizer = Resizer::new();
    for case in &reference.cases.resize {
        let source = reference.picture(&format!("img/{}", case.image));
        let mut resized = vec![0; case.width * case.height * 3];
        resizer.resize(source.view(), case.width, case.height, &mut resized);
        assert!(resized == reference.tensor(&case.key).1, "{}", case.key);
    }
    assert_eq!(reference.cases.resize.len(), 30);
}

#[test]
fn cropping_then_resizing_is_pillows() {
    let Some(reference) = Reference::load() else { return };
    let mut resizer = Resizer::new();
    for case in &reference.cases.crop {
        let source = reference.picture(&format!("img/{}", case.image));
        let rect = Rect { left: case.j, top: case.i, width: case.w, height: case.h };
        let mut resized = vec![0; case.size * case.size * 3];
        resizer.resize(source.view().crop(rect), case.size, case.size, &mut resized);
        assert!(resized == reference.tensor(&case.key).1, "{}", case.key);
    }
    assert_eq!(reference.cases.crop.len(), 6);
}

#[test]
fn flipping_is_pillows() {
    let Some(reference) = Reference::load() else { return };
    for key in &reference.cases.flip {
        let mut picture = reference.picture(&key.replace("flip/", "img/"));
        image::flip(&mut picture.pixels, picture.width);
        assert!(picture.pixels == reference.tensor(key).1, "{key}");
    }
}

/// timm's name of an operation, with its strength.
fn operation(name: &str, level: Option<f64>, sign: Option<f64>) -> Operation {
    let name = name.strip_suffix("Increasing").or(name.strip_suffix("Rel")).unwrap_or(name);
    let kind = KINDS.into_iter().find(|kind| format!("{kind:?}") == name).unwrap();
    kind.at_level(level.unwrap_or(0.0), sign == Some(-1.0))
}

const FILL: [u8; 3] = [124, 116, 104];

#[test]
fn operations_are_pillows() {
    let Some(reference) = Reference::load() else { return };
    let mut scratch = Vec::new();
    for case in &reference.cases.ops {
        let mut picture = reference.picture(&format!("img/{}", case.image));
        let operation = operation(&case.op, case.level, case.sign);
        operation.apply(&mut picture.pixels, picture.width, FILL, &mut scratch);
        assert!(picture.pixels == reference.tensor(&case.key).1, "{}", case.key);
    }
    assert_eq!(reference.cases.ops.len(), 330);
}

#[test]
fn strengths_are_timms() {
    let Some(reference) = Reference::load() else { return };
    for case in &reference.cases.level_to_arg {
        let found = match operation(&case.op, Some(case.level), case.sign) {
            Operation::Posterize { bits: argument }
            | Operation::Solarize { threshold: argument }
            | Operation::SolarizeAdd { add: argument } => f64::from(argument),
            Operation::Rotate { degrees: argument }
            | Operation::Color { factor: argument }
            | Operation::Contrast { factor: argument }
            | Operation::Brightness { factor: argument }
            | Operation::Sharpness { factor: argument }
            | Operation::ShearX { factor: argument }
            | Operation::ShearY { factor: argument }
            | Operation::TranslateX { fraction: argument }
            | Operation::TranslateY { fraction: argument } => argument,
            Operation::AutoContrast | Operation::Equalize | Operation::Invert => {
                panic!("{} has no strength", case.op)
            }
        };
        assert_eq!(found, case.arg, "{} at {}", case.op, case.level);
    }
    assert!(reference.cases.level_to_arg.len() > 50);
}

#[test]
fn a_whole_training_transform_is_timms() {
    let Some(reference) = Reference::load() else { return };
    let (mut resizer, mut scratch) = (Resizer::new(), Vec::new());
    for case in &reference.cases.pipeline {
        let source = reference.picture(&format!("img/{}", case.image));
        let [top, left, height, width] = case.crop;
        let mut pixels = vec![0; case.size * case.size * 3];
        let crop = source.view().crop(Rect { left, top, width, height });
        resizer.resize(crop, case.size, case.size, &mut pixels);
        if case.flip {
            image::flip(&mut pixels, case.size);
        }
        for step in &case.ops {
            let operation = operation(&step.op, step.level, step.sign);
            operation.apply(&mut pixels, case.size, FILL, &mut scratch);
        }
        let expected = reference.tensor(&format!("pipe/{}/ops", case.id)).1;
        assert!(pixels == expected, "pipeline {}", case.id);
    }
    assert!(reference.cases.pipeline.len() >= 5);
}

#[test]
fn normalisation_is_torchvisions() {
    let Some(reference) = Reference::load() else { return };
    let settings = Augment::default();
    let normalize = Normalize::new(settings.mean, settings.std);
    for key in &reference.cases.normalise {
        let picture = reference.picture(&key.replace("norm/", "img/"));
        // The table is per pixel, so a picture of any shape is checked as a row of 1 × 1 images.
        let pixels = picture.width * picture.height;
        let batch =
            Batch { images: picture.pixels, labels: vec![0; pixels], size: 1, ..Batch::new() };
        let mut normalized = Vec::new();
        normalize.nchw(&batch, &mut normalized);
        let (_, expected) = reference.tensor(key);
        let (expected, _) = expected.as_chunks::<4>();
        for (at, &bytes) in expected.iter().enumerate() {
            let (channel, pixel) = (at / pixels, at % pixels);
            let found = normalized[pixel * 3 + channel];
            assert_eq!(found.to_bits(), u32::from_le_bytes(bytes), "{key} at {at}");
        }
    }
}

#[test]
fn the_evaluation_transform_is_the_references() {
    let Some(reference) = Reference::load() else { return };
    let mut scratch = Scratch::new();
    for case in &reference.cases.eval {
        let settings = Augment { crop_pct: case.crop_pct, ..Augment::default() };
        let transform = Transform::evaluation(&settings, case.input_size).unwrap();
        let source = reference.picture(&format!("img/{}", case.image));
        let size = transform.size();
        let mut images = vec![0; size * size * 3];
        transform.apply(source.view(), Epoch(0), 0, &mut scratch, &mut images).unwrap();
        assert!(images == reference.tensor(&case.key).1, "{}", case.key);
        let batch = Batch { images, labels: vec![0], size, ..Batch::new() };
        let mut normalized = Vec::new();
        transform.normalize().nchw(&batch, &mut normalized);
        assert_eq!(normalized[..case.normalised.first.len()], case.normalised.first);
        let sum: f64 = normalized.iter().copied().map(f64::from).sum();
        assert!((sum - case.normalised.sum).abs() < 1e-6 * sum.abs().max(1.0), "{}", case.key);
    }
    assert_eq!(reference.cases.eval.len(), 7);
}

#[test]
fn decoding_is_pillows() {
    let Some(reference) = Reference::load() else { return };
    let mut decoder = Decoder::new();
    let mut checked = 0;
    for case in reference.cases.decode.iter().filter(|case| case.format == "JPEG") {
        let (_, bytes) = reference.tensor(&format!("{}/bytes", case.key));
        let (shape, expected) = reference.tensor(&format!("{}/rgb", case.key));
        let image = decoder.decode(&bytes).unwrap();
        assert_eq!([image.height(), image.width(), 3], *shape, "{}", case.key);
        let mut pixels = vec![0; expected.len()];
        image.copy_to(&mut pixels);
        assert!(pixels == expected, "{}", case.key);
        checked += 1;
    }
    assert_eq!(checked, 8);
}
