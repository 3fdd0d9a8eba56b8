//! `percheron infer` on a run of one step, and weights that are no numbers.
#![expect(clippy::unwrap_used, reason = "a test: what cannot be unwrapped fails it")]

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    process::{Command, Output},
};

use checkpoint::pth::{self, Array, Value};
use serde_json::Value as Json;

fn percheron(folder: &Path, line: &str) -> Output {
    let mut percheron = Command::new(env!("CARGO_BIN_EXE_percheron"));
    percheron.current_dir(folder).args(line.split_whitespace()).output().unwrap()
}

fn said(folder: &Path, line: &str) -> String {
    let output = percheron(folder, line);
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn refusal(folder: &Path, line: &str) -> String {
    let output = percheron(folder, line);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{line}: {stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    stderr
}

/// A run of one step, and the digits as images.
fn begin(folder: &Path) {
    let sets = "--set max_steps=1 --set batch_size=2 --set evaluate_every_epochs=0";
    said(folder, &format!("up --recipe digits --run-dir run {sets}"));
    said(folder, "shards unpack builtin:digits --split val --out images");
}

/// Predictions by the last part of their images' names, without number and extension.
fn by_stem(lines: &str) -> BTreeMap<String, Json> {
    let lines = lines.lines().map(|line| serde_json::from_str::<Json>(line).unwrap());
    let stem = |line: &Json| {
        let name = Path::new(line["image"].as_str().unwrap()).file_stem().unwrap();
        name.to_str().unwrap().to_owned()
    };
    lines.map(|line| (stem(&line), line)).collect()
}

#[test]
fn images_are_told_with_the_exit_that_they_took() {
    let bench = tempfile::tempdir().unwrap();
    let folder = bench.path();
    begin(folder);

    let lines = said(folder, "infer images/val/7 --checkpoint run --json --thresholds 0,0,0");
    assert_eq!(lines.lines().count(), 34);
    for line in lines.lines() {
        let line: Json = serde_json::from_str(line).unwrap();
        assert_eq!(line["exit"], "early3");
        let top = line["top"].as_array().unwrap();
        let sure: Vec<f64> = top.iter().map(|top| top["probability"].as_f64().unwrap()).collect();
        assert_eq!(sure.len(), 5);
        assert!(sure.is_sorted_by(|a, b| a >= b) && sure.iter().sum::<f64>() < 1.0, "{sure:?}");
        assert_eq!(line["confidence"].as_f64().unwrap(), sure[0]);
        assert_eq!(top[0]["class"].as_str().unwrap(), top[0]["index"].to_string());
    }

    // Files and shards are shown alike.
    fs::create_dir(folder.join("sevens")).unwrap();
    fs::rename(folder.join("images/val/7"), folder.join("sevens/7")).unwrap();
    said(folder, "shards pack sevens --out packed --split val");
    let one_by_one = "--checkpoint run --json --batch 1 --ema";
    let loose = by_stem(&said(folder, &format!("infer sevens {one_by_one}")));
    let packed = by_stem(&said(folder, &format!("infer packed {one_by_one}")));
    assert_eq!(packed.len(), 34);
    for (key, line) in &packed {
        let stem = key.split_once('-').unwrap().1;
        let loose = &loose[stem];
        assert_eq!((&line["exit"], &line["top"]), (&loose["exit"], &loose["top"]), "{stem}");
        assert_eq!(line["exit"], "merge", "without thresholds nobody leaves early");
    }

    // The thresholds of a budget, solved now or before, are the same.
    said(folder, "eval --checkpoint run --out evaluated");
    let budget = "infer images --checkpoint run --csv --top 2 --budget";
    let now = said(folder, &format!("{budget} 0"));
    assert_eq!(now, said(folder, &format!("{budget} 0 --solved evaluated/eval.json")));
    assert_eq!(now.lines().count(), 1 + 360 - 34);
    let head = "image,exit,confidence,class1,probability1,class2,probability2";
    assert_eq!(now.lines().next().unwrap(), head);
    let early = |table: &str| table.lines().filter(|line| line.contains(",early3,")).count();
    let dear = said(folder, &format!("{budget} 32 --solved evaluated/eval.json"));
    assert!(early(&now) > early(&dear), "a smaller budget lets more leave early");

    // An image folder is evaluated as it is, and packed once.
    fs::rename(folder.join("sevens/7"), folder.join("images/val/7")).unwrap();
    let eval = "eval --checkpoint run --data images --json --calibration off";
    let digits = said(folder, "eval --checkpoint run --json --calibration off");
    let [digits, images] =
        [digits, said(folder, eval)].map(|text| serde_json::from_str::<Json>(&text).unwrap());
    assert_eq!((&images["samples"], &images["split"]), (&360.into(), &"val".into()));
    assert_eq!(images["exits"], digits["exits"]);
    assert!(folder.join("images/.percheron-shards/val.json").is_file());

    let text = said(folder, "infer images/val/3 --checkpoint run --thresholds 2,2,2");
    assert!(text.lines().last().unwrap().contains("exits: early3 0, att 0, cnn 0, merge"));

    fs::write(folder.join("few.txt"), "one\ntwo\n").unwrap();
    fs::create_dir(folder.join("empty")).unwrap();
    fs::write(folder.join("broken.jpg"), b"\xFF\xD8\xFF").unwrap();
    let infer =
        |line: &str| refusal(folder, &format!("infer {line} --checkpoint run --thresholds 0,0,0"));
    assert!(infer("images --classes few.txt").contains("few.txt: it has 2 lines"));
    assert!(infer("empty").contains("has no .jpg, .jpeg or .png file"));
    assert!(infer("broken.jpg").contains("broken.jpg cannot be used: repair it or leave it out"));
    assert!(infer("nowhere").contains("nowhere"));
    let few = refusal(folder, "infer images --checkpoint run --thresholds 0.5,0.5");
    assert!(few.contains("three numbers are needed"), "{few}");
}

/// The first array of floats in a checkpoint's weights, with something else in it.
fn spoil(value: &mut Value, number: f32) -> bool {
    match value {
        Value::Dict(items) => items.iter_mut().any(|(_, value)| spoil(value, number)),
        Value::Array(array) => match array.to_f32() {
            Some(mut values) if values.len() > 1 => {
                values[1] = number;
                *array = Array::f32(&array.shape, &values);
                true
            }
            Some(_) | None => false,
        },
        Value::None
        | Value::Bool(_)
        | Value::Int(_)
        | Value::Float(_)
        | Value::Text(_)
        | Value::Bytes(_)
        | Value::List(_) => false,
    }
}

#[test]
fn weights_that_are_no_numbers_are_refused_by_name() {
    let bench = tempfile::tempdir().unwrap();
    let folder = bench.path();
    begin(folder);
    said(folder, "export --checkpoint run --format pth --out whole.pth");
    for (name, number) in [("nan.pth", f32::NAN), ("infinite.pth", f32::INFINITY)] {
        let mut value = pth::read(&folder.join("whole.pth")).unwrap();
        assert!(spoil(&mut value, number));
        pth::write(&folder.join(name), &value).unwrap();
        let data = "--set data.location=builtin:digits --set data.validation=val";
        for line in ["eval --checkpoint", "infer images/val/1 --checkpoint"] {
            let said = refusal(folder, &format!("{line} {name} {data}"));
            assert!(said.contains("1 of ") && said.contains("of latent are not finite"), "{said}");
        }
    }
}
