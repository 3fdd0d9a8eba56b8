//! The four published command lines, word for word, on a small image folder; and what is wrong with others.
#![expect(clippy::unwrap_used, reason = "a test: what cannot be unwrapped fails it")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

/// The flags that the three trainings and the evaluation have in common, after the model and its depths.
const COMMON: &str = "--spatial_reduction true --with_last_CA true --SA_widening_factor 4 --with_x2z true \
                      --with_dwc true --with_z2x true --with_isc true --num_workers 4";
const LOSSES: &str = "--loss_cnn_factor 1.0 --loss_att_factor 0.5 --loss_merge_factor 1.0 --update_freq 1 \
                      --use_amp false --with_kd true --T_kd 1.0 --alpha_kd 0.5";

/// What makes a test of it: two images of 32 pixels a worker, and two steps.
const SMALL: [&str; 12] = [
    "--nproc_per_node",
    "2",
    "--set",
    "batch_size=2",
    "--set",
    "max_steps=2",
    "--set",
    "model.input_size=32",
    "--set",
    "schedule.warmup_epochs=0",
    "--set",
    "checkpoint.part_mib=64",
];

fn percheron(words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_percheron")).args(words).output().unwrap()
}

fn refused(words: &[&str]) -> String {
    let output = percheron(words);
    assert!(!output.status.success(), "{words:?} was taken");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(said.lines().filter(|line| line.starts_with("error: ")).count(), 1, "{said}");
    said
}

/// An image folder as ImageNet's: `train` and `val`, ten classes, six images of each.
fn images(folder: &Path) -> PathBuf {
    let all = folder.join("all");
    let unpack = ["shards", "unpack", "builtin:digits", "--split", "val", "--out"];
    let out = all.display().to_string();
    assert!(percheron(&[&unpack[..], &[&out]].concat()).status.success());
    let data = folder.join("data");
    for class in fs::read_dir(all.join("val")).unwrap() {
        let class = class.unwrap().path();
        let mut files: Vec<PathBuf> =
            fs::read_dir(&class).unwrap().map(|file| file.unwrap().path()).collect();
        files.sort();
        for (split, files) in [("train", &files[..6]), ("val", &files[6..9])] {
            let to = data.join(split).join(class.file_name().unwrap());
            fs::create_dir_all(&to).unwrap();
            for file in files {
                fs::copy(file, to.join(file.file_name().unwrap())).unwrap();
            }
        }
    }
    data
}

/// Runs a published line; `model` is its beginning.
fn train(model: &str, rates: &str, data: &str, out: &str) -> String {
    let line = format!(
        "{model} {COMMON} --model_ema true --model_ema_eval true {rates} {LOSSES} --data_path {data} \
         --output_dir {out}"
    );
    let words: Vec<&str> =
        std::iter::once("train").chain(line.split_whitespace()).chain(SMALL).collect();
    let output = percheron(&words);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    said
}

#[test]
fn the_four_published_command_lines_run_word_for_word() {
    let folder = tempfile::tempdir().unwrap();
    let data = images(folder.path()).display().to_string();
    let regnet = "--model reg800m_perceiver_t128 --depth_factor 1 1 1 2";
    for (name, model, rates) in [
        ("regnet", regnet, "--epochs 300 --batch_size 128 --lr 1e-3"),
        (
            "resnet",
            "--model resnet50_0375_perceiver_t128 --depth_factor 1 1 1 1",
            "--epochs 300 --batch_size 128 --lr 6e-4",
        ),
        (
            "mobilenet",
            "--model mobilenetV3_0x75_perceiver_t128 --depth_factor 1 1 1 3",
            "--epochs 600 --batch_size 128 --lr 1e-3",
        ),
    ] {
        let out = folder.path().join(name);
        let said = train(model, rates, &data, &out.display().to_string());
        assert_eq!(said.contains("packing"), name == "regnet", "packed once: {said}");
        assert!(said.contains("note: --num_workers:"), "{said}");
        let log = fs::read_to_string(out.join("log.jsonl")).unwrap();
        let line: serde_json::Value = serde_json::from_str(log.lines().last().unwrap()).unwrap();
        for field in ["train_loss", "train_lr", "test_loss", "test_acc1_merge", "test_acc1_att_ema"]
        {
            assert!(line[field].is_number(), "{field} in {line}");
        }
        assert!(line["n_parameters"].as_u64().unwrap() > 1_000_000);
        assert!(fs::read_to_string(out.join("curves.svg")).unwrap().contains("<polyline"));
        let mut events = fs::read_dir(out.join("tensorboard")).unwrap();
        assert!(events.next().unwrap().unwrap().metadata().unwrap().len() > 200);
    }

    let (run, out) = (folder.path().join("regnet"), folder.path().join("evaluated"));
    let line = format!(
        "train --eval true --resume {} {regnet} {COMMON} --batch_size 128 --lr 1e-3 {LOSSES} --data_path {data} \
         --output_dir {}",
        run.display(),
        out.display()
    );
    let output = percheron(&line.split_whitespace().collect::<Vec<_>>());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let curve = fs::read_to_string(out.join("dynamic.txt")).unwrap();
    assert_eq!(curve.lines().count(), 33);
    for line in curve.lines() {
        let (accuracy, cost) = line.split_once('\t').unwrap();
        assert!((0.0..=100.0).contains(&accuracy.parse::<f64>().unwrap()), "{line}");
        assert!(cost.parse::<f64>().unwrap() > 0.0, "{line}");
    }
    let found: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(out.join("eval.json")).unwrap()).unwrap();
    assert_eq!((&found["samples"], &found["classes"][3]["samples"]), (&30.into(), &3.into()));
    for picture in ["dynamic.svg", "confusion.svg"] {
        assert!(fs::read_to_string(out.join(picture)).unwrap().starts_with("<svg"));
    }
}

#[test]
fn a_run_begins_from_a_file_of_weights_with_other_classes() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (first, weights, second) = (path("first"), path("weights.pth"), path("second"));
    let model =
        "--model reg400m_perceiver_t32 --depth_factor 1 1 1 1 --data_path builtin:digits --aa None";
    let train = |out: &str, more: &str| {
        let line = format!("train {model} --output_dir {out} {more}");
        let words: Vec<&str> = line.split_whitespace().chain(SMALL).collect();
        let output = percheron(&words);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{said}");
        said
    };
    train(&first, "--nb_classes 12");
    let export = ["export", "--checkpoint", &first, "--format", "pth", "--out", &weights];
    assert!(percheron(&export).status.success());
    let said = train(&second, &format!("--finetune {weights}"));
    assert!(said.contains("note: --finetune: tensors of other names stay random"), "{said}");
    let logs = fs::read_dir(Path::new(&second).join("logs")).unwrap();
    let logs = logs.map(|log| fs::read_to_string(log.unwrap().path()).unwrap_or_default());
    let begun = logs.collect::<String>();
    assert!(begun.contains("the run begins from a file of weights"), "{begun}");
    assert!(begun.contains("early_classifier3.weight"), "fresh: {begun}");
    let recipe = fs::read_to_string(Path::new(&second).join("recipe.toml")).unwrap();
    assert!(recipe.contains("[finetune]") && recipe.contains("state_dict_ema"), "{recipe}");

    let words: Vec<&str> = model.split_whitespace().collect();
    let missing = refused(&[&["train"], &words[..], &["--finetune", "nowhere.pth"]].concat());
    assert!(missing.contains("--finetune nowhere.pth"), "{missing}");
}

#[test]
fn a_dry_run_shows_the_recipe_and_what_it_takes() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out").display().to_string();
    let line = format!(
        "train --model reg400m_perceiver_t32 --depth_factor 1 1 1 1 --data_path builtin:digits --batch_size 16 \
         --aa None --input_size 32 --output_dir {out} --dry_run"
    );
    let output = percheron(&line.split_whitespace().collect::<Vec<_>>());
    let shown = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for part in [
        "name = \"reg400m_perceiver_t32\"",
        "lr = 0.004",
        "t_kd = 4.0",
        "sa_widening_factor = 1",
        "89 steps an epoch, 26700 in all",
        "core-hours",
    ] {
        assert!(shown.contains(part), "{part} in {shown}");
    }
    assert!(!shown.contains("rand-m9"), "--aa None switches it off");
    assert!(!Path::new(&out).exists(), "nothing is written");
}

#[test]
fn what_cannot_be_is_refused_in_one_line() {
    let line = |more: &[&'static str]| {
        let words = ["train", "--model", "reg400m_perceiver_t32", "--data_path", "builtin:digits"];
        refused(&[&words[..], more].concat())
    };
    assert!(
        line(&["--with_isk", "true"]).contains("unknown flag --with_isk; did you mean --with_isc?")
    );
    assert!(line(&["--opt", "sgd"]).contains("--opt sgd: only adamw"));
    assert!(line(&["--layer_decay", "0.9"]).contains("--layer_decay 0.9"));
    assert!(line(&["--spatial_reduction", "false"]).contains("spatial_reduction"));
    assert!(line(&["--eval", "true"]).contains("needs --resume"));
    assert!(line(&["--remode", "const"]).contains("augment.remode"));
    assert!(line(&["--nb_classes", "4"]).contains("10 classes"));
    assert!(refused(&["train", "--data_path", "builtin:digits"]).contains("--model is not given"));

    let folder = tempfile::tempdir().unwrap();
    let empty = folder.path().display().to_string();
    let words = ["train", "--model", "reg400m_perceiver_t32", "--data_path", &empty];
    assert!(refused(&words).contains("one folder a class"));
    fs::create_dir_all(folder.path().join("train/cat")).unwrap();
    assert!(refused(&words).contains("has no .jpg, .jpeg or .png file"));
}
