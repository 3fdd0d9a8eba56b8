//! `percheron shards` on the built-in digits: out to folders, back into shards, and indexed where they lie.
#![expect(clippy::unwrap_used, reason = "helpers of tests are tests too")]

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

fn percheron(words: &[&str], paths: &[&Path]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_percheron")).args(words).args(paths).output().unwrap()
}

fn said(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[test]
fn a_dataset_is_unpacked_packed_indexed_and_described() {
    let folder = tempfile::tempdir().unwrap();
    let (images, packed) = (folder.path().join("images"), folder.path().join("packed"));
    let unpack = ["shards", "unpack", "builtin:digits", "--split", "val", "--out"];
    assert!(said(&percheron(&unpack, &[&images])).contains("360 samples"));

    let pack =
        percheron(&["shards", "pack", "--split", "val", "--out"], &[&packed, &images.join("val")]);
    assert!(said(&pack).contains("360 samples of 10 classes in 1 shards"));
    let stats = said(&percheron(&["shards", "stats", "--json"], &[&packed]));
    let stats: serde_json::Value = serde_json::from_str(&stats).unwrap();
    assert_eq!((&stats["split"], &stats["stats"]["samples"]), (&"val".into(), &360.into()));
    assert!(said(&percheron(&["shards", "stats"], &[&packed])).contains("samples of a class"));

    // The tar alone is a WebDataset, of which an index makes a dataset again.
    let foreign = folder.path().join("foreign");
    fs::create_dir(&foreign).unwrap();
    fs::copy(packed.join("val-000000.tar"), foreign.join("part-0.tar")).unwrap();
    let index = percheron(&["shards", "index", "--split", "val"], &[&foreign]);
    assert!(said(&index).contains("360 samples of 10 classes in 1 shards"));
    assert!(said(&percheron(&["shards", "verify"], &[&foreign])).contains("is intact"));

    let reader =
        percheron(&["bench", "reader", "--split", "val", "--samples", "50", "--json"], &[&foreign]);
    let figures: serde_json::Value = serde_json::from_str(&said(&reader)).unwrap();
    assert!(figures["ns_per_sample"].as_f64().unwrap() > 0.0);
}

#[test]
fn images_are_prepared_and_timed() {
    let folder = tempfile::tempdir().unwrap();
    let unpack = ["shards", "unpack", "builtin:digits", "--split", "val", "--out"];
    said(&percheron(&unpack, &[folder.path()]));
    let class = folder.path().join("val/7");
    for recipe in ["crop", "full"] {
        let words = ["bench", "data", "--json", "--passes", "1", "--recipe", recipe, "--images"];
        let figures: serde_json::Value =
            serde_json::from_str(&said(&percheron(&words, &[&class]))).unwrap();
        assert_eq!(figures["images"], 34);
        assert!(figures["img_per_core_s"].as_f64().unwrap() > 0.0);
        assert!(figures["stages_ms"]["decode_ms"].as_f64().unwrap() > 0.0);
    }
}

#[test]
fn what_a_recipe_cannot_do_to_images_is_refused_by_name() {
    let up = |set: &str| {
        let words = ["up", "--recipe", "digits", "--run-dir", "never", "--set", set];
        let output = percheron(&words, &[]);
        assert!(!output.status.success(), "{set}");
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(up("augment.aa=augmix-m5").contains("key \"augment.aa\""));
    assert!(up("augment.remode=const").contains("key \"augment.remode\""));
    assert!(up("data.interpolation=bilinear").contains("key \"data.interpolation\""));
    assert!(up("augment.cutmix_minmax=[0.9, 0.1]").contains("augment.cutmix_minmax = [0.9, 0.1]"));
}
