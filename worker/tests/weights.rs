//! `percheron-worker import` and `export`: what goes in comes out, bit by bit, and what does not fit is named.
#![expect(clippy::unwrap_used, reason = "a test: what cannot be unwrapped fails it")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use checkpoint::pth::{self, Array, Value};
use model::{Layout, Role};

/// The smallest registered network, with few classes.
const SETS: [&str; 2] = ["model.name=mobilenetV3_0x5_perceiver_t128", "model.classes=10"];
const UPDATES: i64 = 375_300;
/// As the reference truncates its average.
const AVERAGED: i64 = 365_311;

fn tool(folder: &Path, arguments: &[&str]) -> Output {
    let mut worker = Command::new(env!("CARGO_BIN_EXE_percheron-worker"));
    worker.current_dir(folder).args(arguments).output().unwrap()
}

/// Runs it; returns what it says as JSON.
fn done(folder: &Path, arguments: &[&str]) -> serde_json::Value {
    let output = tool(folder, &[arguments, &["--json"]].concat());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {stderr}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Runs it; it must refuse in one line.
fn refused(folder: &Path, arguments: &[&str]) -> String {
    let output = tool(folder, arguments);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {stderr}");
    assert_eq!((output.stdout.len(), stderr.lines().count()), (0, 1), "{stderr}");
    stderr
}

fn text(text: &str) -> Value {
    Value::Text(text.to_owned())
}

fn dict(items: Vec<(&str, Value)>) -> Value {
    Value::Dict(items.into_iter().map(|(key, value)| (text(key), value)).collect())
}

fn layout() -> Layout {
    let recipe = recipe::Recipe::from_toml("the test", "", &SETS.map(str::to_owned)).unwrap();
    Layout::of(&worker::setup::architecture(&recipe).unwrap())
}

/// Numbers that no two tensors share, all bits in use.
fn values(tag: u32, shape: &[i64]) -> Array {
    let sizes: Vec<u64> = shape.iter().map(|size| size.cast_unsigned()).collect();
    let count = sizes.iter().product::<u64>();
    let number = |place: u64| {
        let mixed = (place + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ u64::from(tag);
        let [.., a, b, c] = mixed.to_le_bytes();
        f32::from_bits(0x3e00_0000 | u32::from_le_bytes([a, b, c & 0x7f, 0]))
    };
    Array::f32(&sizes, &(0..count).map(number).collect::<Vec<_>>())
}

/// Named tensors of a set of weights.
fn weights(layout: &Layout, tag: u32, batches: i64, prefix: &str) -> Value {
    let entry = |(number, entry): (u32, &model::Entry)| {
        let array = match entry.role {
            Role::Counter => Array::i64_scalar(batches),
            Role::Decayed | Role::Undecayed | Role::Buffer => {
                values(tag + 3 * number, &entry.shape)
            }
        };
        (text(&format!("{prefix}{}", entry.name)), Value::Array(array))
    };
    Value::Dict((0..).zip(layout.entries()).map(entry).collect())
}

/// The moments, numbered as PyTorch does.
fn optimizer(layout: &Layout) -> Value {
    let of = |role: Role| layout.entries().iter().filter(move |entry| entry.role == role);
    let parameters = of(Role::Decayed).chain(of(Role::Undecayed));
    let moments = |(number, entry): (u32, &model::Entry)| {
        let moment = |tag: u32| Value::Array(values(tag + 7 * number, &entry.shape));
        let moments = vec![
            ("step", Value::Array(Array::f32(&[], &[UPDATES as f32]))),
            ("exp_avg", moment(1_000_000)),
            ("exp_avg_sq", moment(2_000_000)),
        ];
        (Value::Int(number.into()), dict(moments))
    };
    dict(vec![("state", Value::Dict((0..).zip(parameters).map(moments).collect()))])
}

/// A file in the official layout, as the reference would have written it.
fn official(prefix: &str) -> Value {
    let layout = layout();
    dict(vec![
        ("model", weights(&layout, 0, UPDATES, prefix)),
        ("optimizer", optimizer(&layout)),
        ("epoch", Value::Int(299)),
        ("args", dict(vec![("model", text("mobilenetV3_0x5_perceiver_t128"))])),
        ("model_ema", weights(&layout, 1, AVERAGED, prefix)),
    ])
}

/// One file a checkpoint: its name and bytes.
fn parts(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files = Vec::new();
    let mut folders = vec![folder.join("checkpoints")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.file_name().unwrap() != "manifest.json" {
                files.push((path.file_name().unwrap().into(), fs::read(&path).unwrap()));
            }
        }
    }
    files.sort();
    files
}

#[test]
fn an_official_file_survives_import_and_export_bit_by_bit() {
    let bench = tempfile::tempdir().unwrap();
    let folder = bench.path();
    pth::write(&folder.join("official.pth"), &official("")).unwrap();
    let first = done(folder, &["import", "official.pth", "--out", "first"]);
    assert_eq!(first["weights"], "model");
    assert_eq!(first["averaged"], "model_ema");
    assert_eq!((&first["moments"], &first["step"]), (&true.into(), &UPDATES.into()));

    done(folder, &["export", "--checkpoint", "first", "--format", "pth", "--out", "again.pth"]);
    let (before, after) = (official(""), pth::read(&folder.join("again.pth")).unwrap());
    for key in ["model", "model_ema"] {
        assert!(before.get(key) == after.get(key), "{key} changed");
    }
    let second = done(folder, &["import", "again.pth", "--out", "second"]);
    assert_eq!(first["state_sha256"], second["state_sha256"]);
    assert!(parts(&folder.join("first")) == parts(&folder.join("second")), "parts differ");
    assert!(!parts(&folder.join("first")).is_empty());
}

#[test]
fn safetensors_hold_the_live_or_the_averaged_weights() {
    let bench = tempfile::tempdir().unwrap();
    let folder = bench.path();
    // Names as a network wrapped for several devices has them.
    pth::write(&folder.join("official.pth"), &official("module.")).unwrap();
    done(folder, &["import", "official.pth", "--out", "first"]);
    let export = ["export", "--checkpoint", "first", "--format"];
    let live = done(folder, &[&export[..], &["safetensors"]].concat());
    assert_eq!(live["out"], format!("imported-step-{UPDATES}.safetensors"));
    let averaged = done(folder, &[&export[..], &["safetensors", "--ema"]].concat());
    assert_eq!(averaged["out"], format!("imported-step-{UPDATES}-ema.safetensors"));
    let bare = done(folder, &[&export[..], &["pth", "--ema", "--out", "ema.pth"]].concat());
    assert_eq!(bare["weights"], "averaged");

    let averages = weights(&layout(), 1, AVERAGED, "");
    assert!(pth::read(&folder.join("ema.pth")).unwrap().get("model") == Some(&averages));
    for (said, tag, batches) in [(&live, 0, UPDATES), (&averaged, 1, AVERAGED)] {
        let bytes = fs::read(folder.join(said["out"].as_str().unwrap())).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let wanted = weights(&layout(), tag, batches, "");
        for (name, array) in wanted.arrays().unwrap() {
            assert!(file.tensor(name).unwrap().data() == array.bytes, "{name} changed");
        }
        let out = said["out"].as_str().unwrap();
        let into = format!("from-{tag}");
        let sets = SETS.map(|set| ["--set", set]).concat();
        let taken = done(folder, &[&["import", out, "--out", &into], &sets[..]].concat());
        assert_eq!((&taken["weights"], &taken["moments"]), (&"the top".into(), &false.into()));
        let named = format!("{into}.pth");
        let again = ["export", "--checkpoint", &into, "--format", "pth", "--out", &named];
        done(folder, &again);
        let again = pth::read(&folder.join(&named)).unwrap();
        for (name, array) in
            wanted.arrays().unwrap().into_iter().filter(|(_, a)| !a.shape.is_empty())
        {
            assert!(
                again.get("model").unwrap().get(name) == Some(&Value::Array(array.clone())),
                "{name} changed"
            );
        }
    }
}

#[test]
fn bad_input_is_refused_in_one_line_and_nothing_is_written() {
    let bench = tempfile::tempdir().unwrap();
    let folder = bench.path();
    pth::write(&folder.join("official.pth"), &official("")).unwrap();
    let import = |more: &[&str]| refused(folder, &[&["import"], more].concat());

    assert!(import(&["missing.pth", "--out", "out"]).contains("missing.pth"));
    fs::write(folder.join("evil.pth"), "cos\nsystem\n(S'true'\ntR.").unwrap();
    assert!(import(&["evil.pth", "--out", "out"]).contains("evil.pth"));
    let other = ["official.pth", "--out", "out", "--set", "model.name=reg400m_perceiver_t32"];
    let misfit = import(&other);
    assert!(misfit.contains("latent has the shape"), "{misfit}");
    assert!(misfit.contains("is missing") && misfit.contains("more"), "{misfit}");
    assert!(import(&["official.pth", "--out", "out", "--key", "no"]).contains("\"no\""));
    pth::write(&folder.join("bare.pth"), &weights(&layout(), 0, 1, "")).unwrap();
    assert!(import(&["bare.pth", "--out", "out"]).contains("--recipe"));
    fs::write(folder.join("cut.safetensors"), [9, 0, 0]).unwrap();
    assert!(import(&["cut.safetensors", "--out", "out"]).contains("cut.safetensors"));
    assert!(!folder.join("out").exists(), "something was written");

    fs::create_dir(folder.join("full")).unwrap();
    fs::write(folder.join("full/note"), "mine").unwrap();
    assert!(import(&["official.pth", "--out", "full"]).contains("full"));
    let export = |more: &[&str]| refused(folder, &[&["export", "--format", "pth"], more].concat());
    assert!(export(&["--checkpoint", "full", "--out", "x.pth"]).contains("there is none"));
    assert!(export(&["--checkpoint", "nowhere", "--out", "x.pth"]).contains("nowhere"));
    let there = export(&["--checkpoint", "full", "--out", "official.pth"]);
    assert!(there.contains("official.pth") && there.contains("already"), "{there}");
}

#[test]
fn the_reference_sample_tells_its_model_and_what_it_lacks() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/reference/golden");
    let sample = golden.join("checkpoint_sample.pth");
    if !sample.is_file() {
        println!("not checked: the reference's goldens do not lie beside this checkout");
        return;
    }
    let bench = tempfile::tempdir().unwrap();
    let misfit = refused(bench.path(), &["import", sample.to_str().unwrap(), "--out", "out"]);
    // It holds 10 tensors, which all fit the network that its args name.
    assert!(misfit.contains("model does not fit") && misfit.contains("is missing"), "{misfit}");
    assert!(!misfit.contains("has the shape") && !misfit.contains("is not of"), "{misfit}");
}
