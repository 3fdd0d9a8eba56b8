//! Comparisons with the reference pipeline (Pillow 9.5, torchvision, timm), to the bit. Shared by the tests
//! and by the example `parity_images`, which `cargo xtask parity` runs.

use std::{fs, path::Path};

use cluster::Epoch;
use safetensors::SafeTensors;
use serde::{Deserialize, de::DeserializeOwned};
use shards::{
    Augment, Batch, Mix, Normalize, Scratch, Transform,
    decode::Decoder,
    image::{self, Rect, View},
    operation::Operation,
    rand_augment::KINDS,
    resize::Resizer,
};

/// Some cases of one kind.
pub(crate) struct Check {
    /// The file that they are in.
    pub(crate) file: &'static str,
    pub(crate) name: &'static str,
    pub(crate) cases: usize,
    /// Those that differ.
    pub(crate) failed: Vec<String>,
}

/// The files of the reference that are examined here.
pub(crate) const FILES: [&str; 2] = ["augment.json", "mixup.json"];

/// Files that hold the arrays of those.
pub(crate) const COMPANIONS: [&str; 2] = ["augment.safetensors", "mixup.safetensors"];

/// Everything that `folder` has cases for.
pub(crate) fn examine(folder: &Path) -> Vec<Check> {
    let mut checks = Vec::new();
    if let Some(images) = Reference::<Cases>::load(folder, "augment") {
        checks.extend([
            resizing(&images),
            cropping(&images),
            flipping(&images),
            operations(&images),
            strengths(&images),
            pipelines(&images),
            normalisation(&images),
            evaluation(&images),
            decoding(&images),
        ]);
    }
    if let Some(batches) = Reference::<Mixed>::load(folder, "mixup") {
        checks.push(mixing(&batches));
    }
    checks
}

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

#[derive(Deserialize)]
struct Mixed {
    cases: Vec<MixedCase>,
}

#[derive(Deserialize)]
struct MixedCase {
    id: String,
    mode: String,
    lam: serde_json::Value,
    cutmix: serde_json::Value,
    centres_cy_cx: Option<serde_json::Value>,
    #[serde(rename = "B")]
    count: usize,
    #[serde(rename = "C")]
    channels: usize,
    #[serde(rename = "H")]
    height: usize,
    #[serde(rename = "W")]
    width: usize,
    classes: usize,
    smoothing: f64,
    labels: Vec<i64>,
}

struct Reference<C> {
    cases: C,
    tensors: Vec<u8>,
}

/// Counts the cases and keeps the names of those that differ.
fn check<T>(
    name: &'static str,
    cases: impl IntoIterator<Item = T>,
    mut differs: impl FnMut(&T) -> Option<String>,
) -> Check {
    let mut check = Check { file: "augment.json", name, cases: 0, failed: Vec::new() };
    for case in cases {
        check.cases += 1;
        check.failed.extend(differs(&case));
    }
    check
}

fn unequal(name: &str, found: &[u8], expected: &[u8]) -> Option<String> {
    (found != expected).then(|| name.to_owned())
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

impl<C: DeserializeOwned> Reference<C> {
    fn load(folder: &Path, name: &str) -> Option<Self> {
        let cases = fs::read(folder.join(format!("{name}.json"))).ok()?;
        let tensors = fs::read(folder.join(format!("{name}.safetensors"))).ok()?;
        Some(Self { cases: serde_json::from_slice(&cases).unwrap(), tensors })
    }
}

impl<C> Reference<C> {
    fn tensor(&self, key: &str) -> (Vec<usize>, Vec<u8>) {
        let tensors = SafeTensors::deserialize(&self.tensors).unwrap();
        let tensor = tensors.tensor(key).unwrap();
        (tensor.shape().to_vec(), tensor.data().to_vec())
    }

    fn picture(&self, key: &str) -> Picture {
        let (shape, pixels) = self.tensor(key);
        Picture { pixels, width: shape[1], height: shape[0] }
    }

    fn floats(&self, key: &str) -> Vec<f32> {
        let (_, bytes) = self.tensor(key);
        bytes.as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
    }
}

fn resizing(reference: &Reference<Cases>) -> Check {
    let mut resizer = Resizer::new();
    check("resize", &reference.cases.resize, |case| {
        let source = reference.picture(&format!("img/{}", case.image));
        let mut resized = vec![0; case.width * case.height * 3];
        resizer.resize(source.view(), case.width, case.height, &mut resized);
        unequal(&case.key, &resized, &reference.tensor(&case.key).1)
    })
}

fn cropping(reference: &Reference<Cases>) -> Check {
    let mut resizer = Resizer::new();
    check("crop, then resize", &reference.cases.crop, |case| {
        let source = reference.picture(&format!("img/{}", case.image));
        let rect = Rect { left: case.j, top: case.i, width: case.w, height: case.h };
        let mut resized = vec![0; case.size * case.size * 3];
        resizer.resize(source.view().crop(rect), case.size, case.size, &mut resized);
        unequal(&case.key, &resized, &reference.tensor(&case.key).1)
    })
}

fn flipping(reference: &Reference<Cases>) -> Check {
    check("flip", &reference.cases.flip, |key| {
        let mut picture = reference.picture(&key.replace("flip/", "img/"));
        image::flip(&mut picture.pixels, picture.width);
        unequal(key, &picture.pixels, &reference.tensor(key).1)
    })
}

/// timm's name of an operation, with its strength.
fn operation(name: &str, level: Option<f64>, sign: Option<f64>) -> Operation {
    let name = name.strip_suffix("Increasing").or(name.strip_suffix("Rel")).unwrap_or(name);
    let kind = KINDS.into_iter().find(|kind| format!("{kind:?}") == name).unwrap();
    kind.at_level(level.unwrap_or(0.0), sign == Some(-1.0))
}

const FILL: [u8; 3] = [124, 116, 104];

fn operations(reference: &Reference<Cases>) -> Check {
    let mut scratch = Vec::new();
    check("operations", &reference.cases.ops, |case| {
        let mut picture = reference.picture(&format!("img/{}", case.image));
        let operation = operation(&case.op, case.level, case.sign);
        operation.apply(&mut picture.pixels, picture.width, FILL, &mut scratch);
        unequal(&case.key, &picture.pixels, &reference.tensor(&case.key).1)
    })
}

fn strengths(reference: &Reference<Cases>) -> Check {
    check("levels to arguments", &reference.cases.level_to_arg, |case| {
        let found = match operation(&case.op, Some(case.level), case.sign) {
            Operation::Posterize { bits: argument }
            | Operation::Solarize { threshold: argument }
            | Operation::SolarizeAdd { add: argument } => Some(f64::from(argument)),
            Operation::Rotate { degrees: argument }
            | Operation::Color { factor: argument }
            | Operation::Contrast { factor: argument }
            | Operation::Brightness { factor: argument }
            | Operation::Sharpness { factor: argument }
            | Operation::ShearX { factor: argument }
            | Operation::ShearY { factor: argument }
            | Operation::TranslateX { fraction: argument }
            | Operation::TranslateY { fraction: argument } => Some(argument),
            Operation::AutoContrast | Operation::Equalize | Operation::Invert => None,
        };
        (found != Some(case.arg)).then(|| format!("{} at {}", case.op, case.level))
    })
}

fn pipelines(reference: &Reference<Cases>) -> Check {
    let (mut resizer, mut scratch) = (Resizer::new(), Vec::new());
    check("whole training transforms", &reference.cases.pipeline, |case| {
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
        let key = format!("pipe/{}/ops", case.id);
        unequal(&key, &pixels, &reference.tensor(&key).1)
    })
}

fn normalisation(reference: &Reference<Cases>) -> Check {
    let settings = Augment::default();
    let normalize = Normalize::new(settings.mean, settings.std);
    check("normalise", &reference.cases.normalise, |key| {
        let picture = reference.picture(&key.replace("norm/", "img/"));
        // A picture of any shape is checked as a row of 1 x 1 images.
        let pixels = picture.width * picture.height;
        let batch =
            Batch { images: picture.pixels, labels: vec![0; pixels], size: 1, ..Batch::new() };
        let mut normalized = Vec::new();
        normalize.nchw(&batch, &mut normalized);
        let same = reference.floats(key).iter().enumerate().all(|(at, expected)| {
            let (channel, pixel) = (at / pixels, at % pixels);
            normalized[pixel * 3 + channel].to_bits() == expected.to_bits()
        });
        (!same).then(|| (*key).clone())
    })
}

fn evaluation(reference: &Reference<Cases>) -> Check {
    let mut scratch = Scratch::new();
    check("evaluation transforms", &reference.cases.eval, |case| {
        let settings = Augment { crop_pct: case.crop_pct, ..Augment::default() };
        let transform = Transform::evaluation(&settings, case.input_size).unwrap();
        let source = reference.picture(&format!("img/{}", case.image));
        let size = transform.size();
        let mut images = vec![0; size * size * 3];
        transform.apply(source.view(), Epoch(0), 0, &mut scratch, &mut images).unwrap();
        let pixels = unequal(&case.key, &images, &reference.tensor(&case.key).1);
        let batch = Batch { images, labels: vec![0], size, ..Batch::new() };
        let mut normalized = Vec::new();
        transform.normalize().nchw(&batch, &mut normalized);
        let first = normalized.starts_with(&case.normalised.first);
        let sum: f64 = normalized.iter().copied().map(f64::from).sum();
        let near = (sum - case.normalised.sum).abs() < 1e-6 * sum.abs().max(1.0);
        pixels.or_else(|| (!first || !near).then(|| case.key.clone()))
    })
}

fn decoding(reference: &Reference<Cases>) -> Check {
    let mut decoder = Decoder::new();
    let jpegs = reference.cases.decode.iter().filter(|case| case.format == "JPEG");
    check("decode", jpegs, |case| {
        let (_, bytes) = reference.tensor(&format!("{}/bytes", case.key));
        let (shape, expected) = reference.tensor(&format!("{}/rgb", case.key));
        let image = decoder.decode(&bytes).unwrap();
        let same_shape = [image.height(), image.width(), 3] == *shape;
        let mut pixels = vec![0; image.height() * image.width() * 3];
        image.copy_to(&mut pixels);
        let differs = unequal(&case.key, &pixels, &expected);
        differs.or_else(|| (!same_shape).then(|| case.key.clone()))
    })
}

/// Mode `batch`, which is what is offered.
fn mixing(reference: &Reference<Mixed>) -> Check {
    let cases = reference.cases.cases.iter().filter(|case| case.mode == "batch");
    let check = check("mixup and CutMix", cases, |case| {
        let lambda = case.lam.as_f64().unwrap();
        let (height, width) = (case.height, case.width);
        let centre = case.centres_cy_cx.as_ref().filter(|_| case.cutmix == true);
        let mix = match centre {
            _ if lambda == 1.0 => Mix::None,
            None => Mix::Mixup { lambda },
            Some(centre) => {
                let [row, column] = [0, 1].map(|at| centre[at].as_u64().unwrap());
                let [row, column] = [row, column].map(|at| usize::try_from(at).unwrap());
                Mix::cutmix_about((row, column), lambda, height, width)
            }
        };
        let mut images = filled("mixup/x", case.count * case.channels * height * width);
        mix.images(&mut images, case.count, height, width);
        let mut targets = Vec::new();
        mix.targets(&case.labels, case.classes, case.smoothing, &mut targets);
        let same = images == reference.floats(&format!("mix/{}/x", case.id))
            && targets == reference.floats(&format!("mix/{}/target", case.id));
        (!same).then(|| case.id.clone())
    });
    Check { file: "mixup.json", ..check }
}

/// The reference's rule for inputs: `golden/README.md`, section 1.
#[expect(clippy::cast_possible_truncation, reason = "inputs are single")]
fn filled(name: &str, count: usize) -> Vec<f32> {
    const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;
    let key = format!("1/{name}").bytes().fold(0xCBF2_9CE4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01B3)
    });
    let word = |at: u64| {
        let mut z = key.wrapping_add(at.wrapping_mul(GOLDEN)).wrapping_add(GOLDEN);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    };
    let value = |at| ((word(at) >> 11) as f64 * f64::powi(2.0, -52) - 1.0) as f32;
    (0..count as u64).map(value).collect()
}
