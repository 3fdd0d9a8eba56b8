//! What `percheron` hands over to `percheron-worker`: models, and weights in and out.
#![expect(clippy::unwrap_used, reason = "a test: what cannot be unwrapped fails it")]

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use checkpoint::pth::{self, Array, Value};

fn percheron(folder: &Path, arguments: &[&str]) -> Output {
    let mut percheron = Command::new(env!("CARGO_BIN_EXE_percheron"));
    percheron.current_dir(folder).args(arguments).output().unwrap()
}

fn json(folder: &Path, arguments: &[&str]) -> serde_json::Value {
    let output = percheron(folder, arguments);
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn refusal(folder: &Path, arguments: &[&str]) -> String {
    let output = percheron(folder, arguments);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    stderr
}

#[test]
fn models_are_listed_and_shown() {
    let bench = tempfile::tempdir().unwrap();
    let list = json(bench.path(), &["model", "list", "--json"]);
    assert_eq!(list.as_array().unwrap().len(), 56);
    let show = ["model", "show", "mobilenetV3_0x75_perceiver_t128", "--json"];
    let published = json(bench.path(), &show);
    assert_eq!(published["parameters"], 9_299_040);
    let options = ["--option", "nb_classes=10", "--option", "input_size=160"];
    let small = json(bench.path(), &[&show[..], &options].concat());
    assert_eq!((&small["classes"], &small["input_size"]), (&10.into(), &160.into()));
    assert!(small["macs"]["merge"].as_u64() < published["macs"]["merge"].as_u64());
    let unknown = refusal(bench.path(), &["model", "show", "reg800m_perceiver_t129"]);
    assert!(unknown.contains("reg800m_perceiver_t129"), "{unknown}");
    let help = percheron(bench.path(), &["export", "--help"]);
    assert!(String::from_utf8(help.stdout).unwrap().contains("Usage: percheron export"));
}

#[test]
fn a_file_that_is_no_set_of_weights_is_refused_and_nothing_is_made() {
    let bench = tempfile::tempdir().unwrap();
    let folder = bench.path();
    let weights = Value::Dict(vec![(
        Value::Text("latent".to_owned()),
        Value::Array(Array::f32(&[2, 2], &[1.0; 4])),
    )]);
    pth::write(&folder.join("small.pth"), &weights).unwrap();
    let import = ["import", "small.pth", "--out", "out"];
    assert!(refusal(folder, &import).contains("--recipe"));
    let misfit = refusal(folder, &[&import[..], &["--recipe", "digits"]].concat());
    assert!(misfit.contains("latent has the shape [2, 2], expected [32, 32]"), "{misfit}");
    fs::write(folder.join("text.pth"), "no archive").unwrap();
    assert!(refusal(folder, &["import", "text.pth", "--out", "out"]).contains("text.pth"));
    assert!(!folder.join("out").exists());
    let export = ["export", "--checkpoint", "nowhere", "--format", "pth"];
    assert!(refusal(folder, &export).contains("nowhere"));
    let there = refusal(folder, &[&export[..], &["--out", "small.pth"]].concat());
    assert!(there.contains("small.pth: it is there already"), "{there}");
}
